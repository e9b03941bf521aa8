"""The counting camera: MTF, gain, defects and Poisson counts.

A raw pixel is Poisson(expected electrons / gain); raw counts times the gain reference give electrons. The
reference is 0 on dead pixels, and 1 on hot ones, which a program has to find by itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from scipy.special import gammaln
from torch import Tensor

from models.simulation.settings import MicroscopeSettings

HOT_PIXEL_FACTOR = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Camera:
    """One camera: its gain reference (multiply raw counts by it) and defects."""

    gain: npt.NDArray[np.float32]
    sensitivity: npt.NDArray[np.float32]

    def expose(
        self, electrons: npt.NDArray[np.float32], rng: np.random.Generator
    ) -> npt.NDArray[np.uint8] | npt.NDArray[np.uint16]:
        """Return raw counts; uint8 where the mean is below 20 e/px (counts above 255 saturate), else uint16."""
        expected = np.clip(electrons, 0.0, None) * self.sensitivity
        is_small = float(expected.mean()) < 20.0
        counts = draw_poisson(expected, rng)
        return (
            np.minimum(counts, 255).astype(np.uint8)
            if is_small
            else np.minimum(counts, 65535).astype(np.uint16)
        )


def draw_poisson(expected: npt.NDArray[np.float32], rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Return Poisson counts of the expected values.

    An even image is drawn three times faster as a sum: one value that nearly all pixels exceed, by table
    look-up, and the rest, which is small. Both are exact Poisson draws, and so is their sum.
    """
    base = float(np.quantile(expected.reshape(-1)[::101], 0.02))
    if not 0.05 < base < 500.0:
        return np.asarray(rng.poisson(expected), dtype=np.int64)
    counts = _draw_even_poisson(base, expected.shape, rng)
    is_low = expected < base
    counts += rng.poisson(np.where(is_low, 0.0, expected - base))
    counts[is_low] = rng.poisson(expected[is_low])
    return counts


def _draw_even_poisson(
    mean: float, shape: tuple[int, ...], rng: np.random.Generator
) -> npt.NDArray[np.int64]:
    """Return counts of one mean, by inverting the distribution with 16 bits, and 32 more where they matter."""
    n_counts = int(mean + 12.0 * np.sqrt(mean) + 20.0)
    cumulative = np.cumsum(
        np.exp(np.arange(n_counts) * np.log(mean) - mean - gammaln(np.arange(n_counts) + 1.0))
    )
    edges = np.searchsorted(cumulative, np.arange(2**16 + 1) / 2**16, side="right")
    bits = rng.integers(0, 2**16, size=shape, dtype=np.uint16)
    counts = edges[:-1][bits]
    is_split = (edges[:-1] != edges[1:])[bits]
    fine = (bits[is_split] + rng.random(int(is_split.sum()))) / 2**16
    counts[is_split] = np.searchsorted(cumulative, fine, side="right")
    return np.asarray(counts, dtype=np.int64)


def build_camera(settings: MicroscopeSettings, rng: np.random.Generator) -> Camera:
    """Draw a camera: 3 % pixel-wise gain, 1 % per row and column, 2 % per readout block, a few defects."""
    height, width = settings.shape_yx_px
    gain = np.ones((height, width), dtype=np.float32)
    if settings.has_gain:
        gain *= 1.0 + 0.03 * rng.standard_normal((height, width), dtype=np.float32)
        gain *= 1.0 + 0.01 * rng.standard_normal((height, 1), dtype=np.float32)
        gain *= 1.0 + 0.01 * rng.standard_normal((1, width), dtype=np.float32)
        blocks = 1.0 + 0.02 * rng.standard_normal((4, 8), dtype=np.float32)
        rows = np.minimum(np.arange(height) * 4 // height, 3)
        columns = np.minimum(np.arange(width) * 8 // width, 7)
        gain *= blocks[rows][:, columns]
        gain = np.clip(gain, 0.5, 2.0)
        gain /= gain.mean()
    sensitivity = (1.0 / gain).astype(np.float32)
    n_defects = round(settings.defect_fraction * height * width)
    for i, pixel in enumerate(rng.choice(height * width, size=n_defects, replace=False).tolist()):
        y, x = divmod(pixel, width)
        is_dead = i % 2 == 0
        sensitivity[y, x] = 0.0 if is_dead else HOT_PIXEL_FACTOR
        gain[y, x] = 0.0 if is_dead else 1.0
    return Camera(gain=gain.astype(np.float32), sensitivity=sensitivity)


def camera_mtf(shape_yx: tuple[int, int]) -> Float[Tensor, "h wr"]:
    """Return the MTF sinc(f) (f in cycles/px) of a square pixel: 0.64 at Nyquist along an axis.

    Counting noise stays white, so DQE(f) = MTF², 0.41 at Nyquist; DQE(0) is 1.
    """
    fy = torch.fft.fftfreq(shape_yx[0])
    fx = torch.fft.rfftfreq(shape_yx[1])
    return torch.sinc(fy)[:, None] * torch.sinc(fx)[None, :]
