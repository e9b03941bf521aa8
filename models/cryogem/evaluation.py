"""How far generated micrographs are from real ones: features, power spectra, statistics of patches.

All images are micrographs in the networks' range (`models.cryogem.greys`), so that the scale of grey values plays no
part. Distances are 0 for equal sets; those of two halves of one set say how large chance alone makes them.
The paper's Inception network cannot be shipped; its place is taken by features that are handed in (our ranker's).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from scipy.stats import wasserstein_distance
from torch import Tensor

from models.fourier.filters import smooth_gaussian
from models.fourier.spectra import average_tile_power, radial_mean

Features = Callable[[NDArray[np.float32]], NDArray[np.floating]]
"""Takes patches `(n s s)`, protein white; returns a vector for each, `(n d)`."""

_TILE_PX = 128
_PATCH_SIDES_PX = (8, 32)
_PATCH_PER_DIAMETER = 1.5

MIN_PATCHES = 360
"""Of a made set; real micrographs are as many as there are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Distances:
    """Fréchet distance of features × 1000, rms ratio of ring power in nepers, Wasserstein distance of patch statistics."""

    frechet_x1000: float
    spectrum: float
    patches: float


def measure_distances(
    real: Sequence[Float[Tensor, "h w"]],
    made: Sequence[Float[Tensor, "h w"]],
    features: Features,
    *,
    patch_px: int,
) -> Distances:
    """Return every distance between two sets of micrographs; the Fréchet distance is over patches of `patch_px`."""
    vectors = [features(-cut_patches(images, patch_px)) for images in (real, made)]
    return Distances(
        frechet_x1000=1000.0 * frechet_distance(*vectors),
        spectrum=spectrum_distance(real, made),
        patches=patch_distance(real, made),
    )


def patch_side_px(diameter_px: float, shape_yx: tuple[int, int]) -> int:
    """Return the side of the Fréchet distance's patches: one and a half particle diameters, even, within the frame."""
    return min(max(32, 2 * round(0.5 * _PATCH_PER_DIAMETER * diameter_px)), *shape_yx)


def frames_needed(side_px: int, shape_yx: tuple[int, int]) -> int:
    """Return how many frames have `MIN_PATCHES` patches.

    With 36 patches the Fréchet distance of one generator moved between 8 and 18 from one draw of specimens to the next.
    """
    per_frame = (shape_yx[0] // side_px) * (shape_yx[1] // side_px)
    return -(-MIN_PATCHES // per_frame)


def cut_patches(images: Sequence[Float[Tensor, "h w"]], side_px: int) -> NDArray[np.float32]:
    """Return the square patches that tile the images without overlap, `(n s s)`; rests at the edges are left out."""
    parts = []
    for image in images:
        tiles = image.unfold(0, side_px, side_px).unfold(1, side_px, side_px)
        parts.append(tiles.reshape(-1, side_px, side_px).numpy())
    return np.concatenate(parts).astype(np.float32)


def frechet_distance(a: NDArray[np.floating], b: NDArray[np.floating]) -> float:
    """Return ‖μ₁ - μ₂‖² + tr(C₁ + C₂ - 2 (C₁^½ C₂ C₁^½)^½) of two sets of vectors `(n d)` (Dowson & Landau 1982).

    With fewer vectors than dimensions the estimate is biased upwards; compare sets of the same size alone.
    """
    for name, rows in (("a", a), ("b", b)):
        if rows.ndim != 2 or len(rows) < 2 or not np.isfinite(rows).all():
            raise ValueError(f"{name}: shape {rows.shape}, must be two or more finite vectors (n, d)")
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    shift = float(np.square(x.mean(0) - y.mean(0)).sum())
    # with C = RᵀR the last trace is the sum of the singular values of R₁ R₂ᵀ, which is small where vectors are few
    roots = [np.asarray(np.linalg.qr((v - v.mean(0)) / np.sqrt(len(v) - 1), mode="r")) for v in (x, y)]
    cross = float(np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False).sum())
    trace = sum(float(np.square(root).sum()) for root in roots)
    return max(0.0, shift + trace - 2.0 * cross)


def ring_spectrum(images: Sequence[Float[Tensor, "h w"]]) -> NDArray[np.float64]:
    """Return the mean power of the images by ring, from windowed tiles, rings 1 … Nyquist of a tile."""
    side = min(_TILE_PX, *(min(image.shape) for image in images))
    side -= side % 2
    rings = [radial_mean(average_tile_power(image, side)) for image in images]
    return np.asarray(np.mean(rings, axis=0)[1:], dtype=np.float64)


def spectrum_distance(real: Sequence[Float[Tensor, "h w"]], made: Sequence[Float[Tensor, "h w"]]) -> float:
    """Return the rms over rings of ln(P_made / P_real): 0.1 is about 10 % in power."""
    ratio = np.log(np.maximum(ring_spectrum(made), 1e-12) / np.maximum(ring_spectrum(real), 1e-12))
    return float(np.sqrt(np.mean(ratio**2)))


def patch_distance(real: Sequence[Float[Tensor, "h w"]], made: Sequence[Float[Tensor, "h w"]]) -> float:
    """Return the mean Wasserstein distance of the patches' mean, deviation, skewness and kurtosis.

    Each is over patches of 8 and 32 px, in units of the real patches' standard deviation of that statistic.
    """
    distances = []
    for side in _PATCH_SIDES_PX:
        a, b = (_statistics(cut_patches(images, side)) for images in (real, made))
        scale = np.maximum(a.std(axis=0), 1e-6)
        distances += [wasserstein_distance(a[:, i] / scale[i], b[:, i] / scale[i]) for i in range(a.shape[1])]
    return float(np.mean(distances))


def content_correlation(
    physics: Sequence[Float[Tensor, "h w"]], made: Sequence[Float[Tensor, "h w"]], diameter_px: float
) -> float:
    """Return the mean correlation of micrographs with their noise-free ones, in the band of a particle's features.

    The band lies between Gaussians of a tenth of and a whole diameter: noise and ice hardly count. A set that looks real
    because its particles are gone has 0, and annotations that are worth nothing.
    """
    found = []
    for clean, noisy in zip(physics, made, strict=True):
        bands = [
            smooth_gaussian(image, 0.1 * diameter_px) - smooth_gaussian(image, diameter_px)
            for image in (clean, noisy)
        ]
        found.append(float(torch.corrcoef(torch.stack([band.reshape(-1) for band in bands]))[0, 1]))
    return float(np.mean(found))


def _statistics(patches: NDArray[np.float32]) -> NDArray[np.float64]:
    flat = patches.reshape(len(patches), -1).astype(np.float64)
    mean = flat.mean(axis=1)
    sd = np.maximum(flat.std(axis=1), 1e-6)
    z = (flat - mean[:, None]) / sd[:, None]
    return np.stack((mean, sd, (z**3).mean(axis=1), (z**4).mean(axis=1)), axis=1)


def ranker_features(batch_size: int = 64) -> Features:
    """Return the feature function of the ranker that ships with icestream (ONNX Runtime)."""
    from models.cryoranker.serve import OnnxRanker

    ranker = OnnxRanker(batch_size=batch_size)

    def compute(patches: NDArray[np.float32]) -> NDArray[np.floating]:
        return ranker.score(patches)[1].astype(np.float64)

    return compute
