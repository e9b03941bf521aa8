"""Blob picking: balls and shells of a range of diameters on a flattened, binned micrograph.

Protein is dark in a micrograph; the picker works on its negative. Scores are z-scores: the locally normalised
correlation over its spread on white noise, so that one threshold serves every dose and thickness.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import cKDTree
from torch import Tensor

from models.fourier.filters import smooth_gaussian
from models.fourier.transforms import crop_rfft2, good_size

# A template's surround, in radii, and the radii of the hollow in its shells (0: a ball; 0.66: a ferritin).
_SUPPORT = 1.3
_HOLLOWS = (0.0, 0.66)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobSettings:
    """What a particle looks like and how many there may be.

    Diameters are in Å; `n_scales` are spread evenly over the range. `min_distance_angstrom` separates picks
    (None: 0.75 of the mean diameter). `threshold` is in z-score units (safe: 3.5-6). `border_angstrom` keeps
    picks away from the edge. `contamination_sd` is the limit of the
    contamination mask in robust standard deviations.
    """

    min_diameter_angstrom: float
    max_diameter_angstrom: float
    n_scales: int = 3
    min_distance_angstrom: float | None = None
    threshold: float = 4.5
    max_picks: int = 2000
    border_angstrom: float = 0.0
    contamination_sd: float = 6.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Picks:
    """Centres `(pick yx)` in pixels of the micrograph, best first; `excluded_fraction` of the area was masked."""

    centres_yx_px: NDArray[np.float32]
    scores: NDArray[np.float32]
    diameters_angstrom: NDArray[np.float32]
    excluded_fraction: float


def pick_blobs(micrograph: Float[Tensor, "h w"], pixel_size_angstrom: float, settings: BlobSettings) -> Picks:
    """Pick dark blobs of the given diameters."""
    if settings.min_diameter_angstrom <= 4.0 * pixel_size_angstrom:
        raise ValueError(
            f"min_diameter_angstrom: {settings.min_diameter_angstrom}, must be over four pixels "
            f"({pixel_size_angstrom} Å each)"
        )
    binned, scale_yx, pixel = _bin_for_picking(micrograph, pixel_size_angstrom, settings)
    flat = flatten_background(binned, settings.max_diameter_angstrom / pixel)
    mask = find_contamination(flat, settings.max_diameter_angstrom / pixel, settings.contamination_sd)
    response, diameters = _respond(flat, pixel, settings, mask)
    yx, scores, scale_index = _local_maxima(response, mask, pixel, settings)
    # Fourier cropping keeps pixel 0 in its place
    centres = yx * np.asarray(scale_yx)
    return Picks(
        centres_yx_px=centres.astype(np.float32),
        scores=scores.astype(np.float32),
        diameters_angstrom=diameters[scale_index].astype(np.float32),
        excluded_fraction=float(mask.float().mean()),
    )


def _bin_for_picking(
    micrograph: Tensor, pixel_size_angstrom: float, settings: BlobSettings
) -> tuple[Tensor, tuple[float, float], float]:
    """Return the negative at about 16 pixels a diameter, pixels per binned pixel, and the binned pixel size.

    The micrograph is mirrored to a good length first: a wrapped-around edge would look like a particle.
    """
    height, width = (int(n) for n in micrograph.shape)
    factor = max(1.0, settings.min_diameter_angstrom / 16.0 / pixel_size_angstrom)
    padded = (good_size(height + height // 50), good_size(width + width // 50))
    pad = (0, padded[1] - width, 0, padded[0] - height)
    image = torch.nn.functional.pad(-micrograph[None, None], pad, mode="reflect")[0, 0]
    new = (2 * round(padded[0] / factor / 2), 2 * round(padded[1] / factor / 2))
    small = torch.fft.irfft2(crop_rfft2(torch.fft.rfft2(image), padded, new), s=new)
    scale = (padded[0] / new[0], padded[1] / new[1])
    kept = small[: int(height / scale[0]), : int(width / scale[1])]
    return kept, scale, pixel_size_angstrom * math.sqrt(scale[0] * scale[1])


def flatten_background(image: Float[Tensor, "h w"], diameter_px: float) -> Float[Tensor, "h w"]:
    """Return the image less its background over three diameters, divided by its local contrast.

    The local standard deviation over six diameters may fall at most to half of the micrograph's median, so
    that empty areas are not blown up to look like full ones.
    """
    sigma = max(2.0, 1.5 * diameter_px)
    centred = image - smooth_gaussian(image, sigma)
    limit = 6.0 * float(centred.std())
    local = smooth_gaussian(centred.clamp(-limit, limit).square(), 2.0 * sigma).clamp(min=0.0).sqrt()
    return centred / local.clamp(min=max(0.5 * float(local.median()), 1e-12))


def find_contamination(
    flat: Float[Tensor, "h w"], diameter_px: float, limit_sd: float
) -> Bool[Tensor, "h w"]:
    """Return where ice crystals, aggregates, carbon edges or holes are: picks there are not particles.

    Two maps at the scale of half a diameter are compared with their medians in robust standard deviations:
    the local mean (thick, dark or bright things) and the logarithm of the local variance (crystals, edges).
    What is found is kept when it is larger than a particle, and grown by half a diameter.
    """
    sigma = max(1.0, 0.5 * diameter_px)
    mean = smooth_gaussian(flat, sigma)
    variance = smooth_gaussian((flat - mean).square(), sigma).clamp(min=1e-12).log()
    is_odd = (_robust_z(mean).abs() > limit_sd) | (_robust_z(variance).abs() > limit_sd)
    labels, n = ndimage.label(is_odd.numpy())
    if n == 0:
        return torch.zeros_like(is_odd)
    areas = np.bincount(labels.ravel())
    areas[0] = 0
    kept = areas[labels] > 0.5 * math.pi * (0.5 * diameter_px) ** 2
    distance = ndimage.distance_transform_edt(~kept) if kept.any() else np.full(kept.shape, np.inf)
    return torch.from_numpy(np.asarray(distance <= 0.5 * diameter_px))


def _robust_z(image: Tensor) -> Tensor:
    centred = image - image.median()
    return centred / (1.4826 * centred.abs().median()).clamp(min=1e-12)


def _respond(
    flat: Tensor, pixel: float, settings: BlobSettings, mask: Tensor
) -> tuple[Float[Tensor, "scale h w"], NDArray[np.float64]]:
    """Return the locally normalised correlation with each template, in units of its spread on white noise.

    Over a support of n pixels the correlation of white noise with any unit template has the spread 1 / √n,
    whatever the dose and however densely the micrograph is packed; a spread measured on the micrograph itself
    would count its particles as noise.
    """
    diameters = np.linspace(settings.min_diameter_angstrom, settings.max_diameter_angstrom, settings.n_scales)
    if settings.max_diameter_angstrom <= settings.min_diameter_angstrom:
        diameters = diameters[:1]
    height, width = (int(n) for n in flat.shape)
    pad = min(math.ceil(_SUPPORT * settings.max_diameter_angstrom / pixel), height - 1, width - 1)
    shape = (good_size(height + 2 * pad), good_size(width + 2 * pad))
    pads = (
        pad,
        min(shape[1] - width - pad, width - 1),
        pad,
        min(shape[0] - height - pad, height - 1),
    )
    # contaminated areas must not leak into their surroundings
    clean = torch.where(mask, torch.zeros_like(flat), flat)
    padded = torch.nn.functional.pad(clean[None, None], pads, mode="reflect")[0, 0]
    size = (int(padded.shape[0]), int(padded.shape[1]))
    spectrum, squares = torch.fft.rfft2(padded), torch.fft.rfft2(padded.square())

    def convolve(of: Tensor, kernel: Tensor) -> Tensor:
        whole: Tensor = torch.fft.irfft2(of * torch.fft.rfft2(kernel), s=size)
        return whole[pad : pad + height, pad : pad + width]

    responses, used = [], []
    for diameter in diameters:
        radius = 0.5 * float(diameter) / pixel
        for hollow in _HOLLOWS:
            template, support = _template(size, radius, hollow)
            n = float(support.sum())
            mean = convolve(spectrum, support / n)
            variance = convolve(squares, support / n) - mean.square()
            # half of the typical variance keeps an empty corner from being blown up
            floor = max(0.5 * float(variance.median()), 1e-12)
            responses.append(convolve(spectrum, template) / variance.clamp(min=floor).sqrt())
            used.append(float(diameter))
    return torch.stack(responses), np.array(used)


def _template(
    size: tuple[int, int], radius_px: float, hollow: float
) -> tuple[Float[Tensor, "h w"], Float[Tensor, "h w"]]:
    """Return a unit-norm, zero-mean projection of a ball (less `hollow` of its radius) and its support.

    Both have their origin at pixel 0 and wrap around. The support ends at 1.3 radii: the wide surround of a
    Laplacian of Gaussian reaches into the neighbours of a dense field (F1 0.70 against 0.90 on EMPIAR-10146).
    """
    y = torch.fft.fftfreq(size[0]) * size[0]
    x = torch.fft.fftfreq(size[1]) * size[1]
    r2 = y.square()[:, None] + x.square()[None, :]
    ball = (1.0 - r2 / radius_px**2).clamp(min=0.0).sqrt()
    if hollow > 0.0:
        ball = ball - hollow * (1.0 - r2 / (hollow * radius_px) ** 2).clamp(min=0.0).sqrt()
    support = (r2 <= (_SUPPORT * radius_px) ** 2).to(torch.float32)
    centred = (ball - (ball * support).sum() / support.sum()) * support
    return centred / centred.square().sum().sqrt(), support


def _local_maxima(
    response: Tensor, mask: Tensor, pixel: float, settings: BlobSettings
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    best, scale = (array.numpy() for array in response.max(dim=0))
    mean_diameter = 0.5 * (settings.min_diameter_angstrom + settings.max_diameter_angstrom)
    distance = settings.min_distance_angstrom or 0.75 * mean_diameter
    border = max(1, math.ceil(settings.border_angstrom / pixel))
    # candidates: maxima of their 3 × 3 neighbourhood, then greedy suppression by distance, best first
    is_peak = (best == ndimage.maximum_filter(best, size=3)) & (best >= settings.threshold) & ~mask.numpy()
    is_peak[:border] = is_peak[-border:] = False
    is_peak[:, :border] = is_peak[:, -border:] = False
    rows, columns = np.nonzero(is_peak)
    if not len(rows):
        return np.zeros((0, 2)), np.zeros(0), np.zeros(0, dtype=np.int64)
    order = np.argsort(-best[rows, columns], kind="stable")
    yx = np.stack([rows, columns], axis=1)[order].astype(np.float64)
    neighbours = cKDTree(yx).query_ball_point(yx, distance / pixel)
    is_free = np.ones(len(yx), dtype=bool)
    kept = []
    for i in range(len(yx)):
        if is_free[i]:
            kept.append(i)
            is_free[neighbours[i]] = False
            if len(kept) == settings.max_picks:
                break
    chosen = yx[kept].astype(np.int64)
    refined = np.array([_parabolic(best, int(y), int(x)) for y, x in chosen])
    return refined, best[chosen[:, 0], chosen[:, 1]].astype(np.float64), scale[chosen[:, 0], chosen[:, 1]]


def _parabolic(image: NDArray[np.float32], y: int, x: int) -> tuple[float, float]:
    """Return the vertex of the parabolas through a maximum and its neighbours along each axis."""

    def vertex(low: float, middle: float, high: float) -> float:
        curvature = low - 2.0 * middle + high
        return 0.0 if curvature >= 0.0 else max(-0.5, min(0.5, 0.5 * (low - high) / curvature))

    dy = vertex(float(image[y - 1, x]), float(image[y, x]), float(image[y + 1, x]))
    dx = vertex(float(image[y, x - 1]), float(image[y, x]), float(image[y, x + 1]))
    return y + dy, x + dx
