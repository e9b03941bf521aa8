"""Power spectra: averages over overlapping tiles, radial means, polar resampling.

A power spectrum is a half spectrum |F|² in the layout of `torch.fft.rfft2`, zero frequency first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, slots=True)
class PolarSpectrum:
    """A power spectrum by angle and radius.

    `values` and `counts` are `(angle, radius)`; `counts` is the number of Fourier pixels in a bin; angles are
    sector centres in [0, 180) from x towards y, `k` the mean frequency of each radius in 1/Å.
    """

    values: NDArray[np.float64]
    counts: NDArray[np.float64]
    angles_deg: NDArray[np.float64]
    k: NDArray[np.float64]


def average_tile_power(
    image: Float[Tensor, "h w"], tile_px: int, *, overlap: float = 0.5
) -> Float[Tensor, "t tr"]:
    """Return the mean power spectrum of Hann-windowed tiles that cover the image.

    Each tile loses its mean; tiles whose standard deviation is off by more than a factor of two from the
    median (carbon edges, grid bars, contamination) do not take part. White noise of variance v gives v.
    """
    height, width = (int(n) for n in image.shape)
    if tile_px > min(height, width):
        raise ValueError(f"tile_px: {tile_px}, must not exceed the image ({height} x {width})")
    window = torch.hann_window(tile_px, periodic=True)
    window = window[:, None] * window[None, :]
    window = window / window.square().sum().sqrt()
    rows = _tile_starts(height, tile_px, overlap)
    columns = _tile_starts(width, tile_px, overlap)
    deviations = torch.tensor(
        [[float(image[y : y + tile_px, x : x + tile_px].std()) for x in columns] for y in rows]
    )
    median = float(deviations.median())
    total = torch.zeros(tile_px, tile_px // 2 + 1)
    n_tiles = 0
    for i, y in enumerate(rows):
        # a row of tiles at once keeps the transform busy and the memory small
        used = [x for j, x in enumerate(columns) if median / 2 <= float(deviations[i, j]) <= 2 * median]
        if not used:
            continue
        tiles = torch.stack([image[y : y + tile_px, x : x + tile_px] for x in used])
        tiles = (tiles - tiles.mean(dim=(-2, -1), keepdim=True)) * window
        spectrum = torch.view_as_real(torch.fft.rfft2(tiles))
        total += spectrum.square().sum(dim=-1).sum(dim=0)
        n_tiles += len(used)
    return total / max(n_tiles, 1)


def _tile_starts(n: int, tile_px: int, overlap: float) -> list[int]:
    step = max(1, round(tile_px * (1.0 - overlap)))
    n_tiles = max(1, math.ceil((n - tile_px) / step) + 1)
    return [round(float(s)) for s in np.linspace(0, n - tile_px, n_tiles)]


def half_from_centred(power: Float[Tensor, "n n"]) -> Float[Tensor, "n nr"]:
    """Return the half spectrum of a full, centred power spectrum image (origin at n // 2)."""
    n = int(power.shape[-1])
    shifted: Tensor = torch.fft.ifftshift(power, dim=(-2, -1))
    return shifted[:, : n // 2 + 1]


def centred_from_half(power: Float[Tensor, "n nr"]) -> Float[Tensor, "n n"]:
    """Return the full, centred image of a half spectrum of a square, even image."""
    n = int(power.shape[0])
    mirrored = torch.roll(torch.flip(power, dims=(0,)), 1, dims=0)
    negative = torch.flip(mirrored[:, 1 : n // 2], dims=(1,))
    centred: Tensor = torch.fft.fftshift(torch.cat([power, negative], dim=1), dim=(-2, -1))
    return centred


def radial_mean(power: Float[Tensor, "n nr"]) -> NDArray[np.float64]:
    """Return the mean over rings of one Fourier pixel, radius 0 … n // 2."""
    n = int(power.shape[0])
    radius = torch.sqrt(_squared_radius(n)).round().to(torch.int64)
    inside = radius <= n // 2
    flat = radius[inside].numpy()
    sums = np.bincount(flat, weights=power[inside].double().numpy(), minlength=n // 2 + 1)
    counts = np.bincount(flat, minlength=n // 2 + 1)
    return np.asarray(sums / np.maximum(counts, 1), dtype=np.float64)


def polar_spectrum(
    power: Float[Tensor, "n nr"],
    pixel_size_angstrom: float,
    *,
    k_range: tuple[float, float],
    n_sectors: int = 24,
) -> PolarSpectrum:
    """Return the power by sector and ring (one Fourier pixel wide) for frequencies in `k_range` (1/Å).

    The axes kx = 0 and ky = 0 are left out: what is fixed to the detector's rows and columns lies there.
    """
    n = int(power.shape[0])
    fy = torch.fft.fftfreq(n)[:, None].expand(n, n // 2 + 1) * n
    fx = torch.arange(n // 2 + 1)[None, :].expand(n, n // 2 + 1)
    radius = torch.sqrt(_squared_radius(n))
    first = max(1, round(k_range[0] * n * pixel_size_angstrom))
    last = min(n // 2 - 1, math.floor(k_range[1] * n * pixel_size_angstrom))
    n_rings = last - first + 1
    if n_rings < 8:
        raise ValueError(f"k_range: {k_range}, must span at least 8 Fourier pixels (has {n_rings})")
    ring = radius.round().to(torch.int64) - first
    angle = torch.rad2deg(torch.atan2(fy, fx.to(fy.dtype))).remainder(180.0)
    width = 180.0 / n_sectors
    sector = (angle / width).floor().to(torch.int64).clamp(max=n_sectors - 1)
    used = (ring >= 0) & (ring < n_rings) & (fx > 0) & (fy != 0)
    flat = (sector * n_rings + ring)[used].numpy()
    size = n_sectors * n_rings
    counts = np.asarray(np.bincount(flat, minlength=size), dtype=np.float64).reshape(n_sectors, n_rings)
    sums = np.bincount(flat, weights=power[used].double().numpy(), minlength=size)
    values = sums.reshape(n_sectors, n_rings)
    ring_means = values.sum(axis=0) / np.maximum(counts.sum(axis=0), 1)
    values = np.where(counts > 0, values / np.maximum(counts, 1), ring_means[None, :])
    radii = np.bincount(ring[used].numpy(), weights=radius[used].double().numpy(), minlength=n_rings)
    k = radii / np.maximum(counts.sum(axis=0), 1) / (n * pixel_size_angstrom)
    angles = np.asarray((np.arange(n_sectors) + 0.5) * width, dtype=np.float64)
    return PolarSpectrum(
        values=np.asarray(values, dtype=np.float64),
        counts=counts,
        angles_deg=angles,
        k=np.asarray(k, dtype=np.float64),
    )


def _squared_radius(n: int) -> Tensor:
    fy = torch.fft.fftfreq(n) * n
    fx = torch.arange(n // 2 + 1, dtype=fy.dtype)
    squared: Tensor = fy.square()[:, None] + fx.square()[None, :]
    return squared
