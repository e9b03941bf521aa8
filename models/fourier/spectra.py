"""Power spectra: averages over overlapping tiles, radial means, polar resampling.

A power spectrum is a half spectrum |F|² in the layout of `torch.fft.rfft2`, zero frequency first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
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
    """Return the mean power spectrum of the tiles of `iterate_tile_powers`, on the image's device."""
    total = torch.zeros(tile_px, tile_px // 2 + 1, device=image.device)
    n_tiles = 0
    for _, powers in iterate_tile_powers(image, tile_px, overlap=overlap):
        total += powers.sum(dim=0)
        n_tiles += len(powers)
    return total / max(n_tiles, 1)


def iterate_tile_powers(
    image: Float[Tensor, "h w"], tile_px: int, *, overlap: float = 0.5
) -> Iterator[tuple[NDArray[np.float64], Float[Tensor, "b t tr"]]]:
    """Yield (tile centres (tile, yx) in px, power spectra) of Hann-windowed tiles, a row of tiles at a time.

    Each tile loses its mean; tiles whose standard deviation is off by more than a factor of two from the
    median (carbon edges, grid bars, contamination) do not take part. White noise of variance v gives v.
    """
    height, width = (int(n) for n in image.shape)
    if tile_px > min(height, width):
        raise ValueError(f"tile_px: {tile_px}, must not exceed the image ({height} x {width})")
    window = torch.hann_window(tile_px, periodic=True, device=image.device)
    window = window[:, None] * window[None, :]
    window = window / window.square().sum().sqrt()
    rows = _tile_starts(height, tile_px, overlap)
    columns = _tile_starts(width, tile_px, overlap)
    deviations = torch.stack(
        [torch.stack([image[y : y + tile_px, x : x + tile_px].std() for x in columns]) for y in rows]
    ).cpu()
    median = float(deviations.median())
    is_used = (deviations >= median / 2) & (deviations <= 2 * median)
    for i, y in enumerate(rows):
        # a row of tiles at once keeps the transform busy and the memory small
        used = [x for j, x in enumerate(columns) if is_used[i, j]]
        if not used:
            continue
        tiles = torch.stack([image[y : y + tile_px, x : x + tile_px] for x in used])
        tiles = (tiles - tiles.mean(dim=(-2, -1), keepdim=True)) * window
        spectra = torch.view_as_real(torch.fft.rfft2(tiles))
        centres = np.array([(y + tile_px // 2, x + tile_px // 2) for x in used], dtype=np.float64)
        yield centres, spectra.square().sum(dim=-1)


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
    sums = np.bincount(flat, weights=power.cpu()[inside].double().numpy(), minlength=n // 2 + 1)
    counts = np.bincount(flat, minlength=n // 2 + 1)
    return np.asarray(sums / np.maximum(counts, 1), dtype=np.float64)


class PolarBins:
    """Which Fourier pixel of a half spectrum of side `n` falls into which sector and ring (one pixel wide).

    The axes kx = 0 and ky = 0 and their neighbours are left out: what is fixed to the detector's rows and
    columns, and what the frame's edges leak, lies there.
    """

    def __init__(
        self,
        n: int,
        pixel_size_angstrom: float,
        *,
        k_range: tuple[float, float],
        n_sectors: int = 24,
        device: torch.device | None = None,
    ) -> None:
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
        used = ((ring >= 0) & (ring < n_rings) & (fx > 1) & (fy.abs() > 1)).flatten()
        self._shape = (n_sectors, n_rings)
        self._pixels = used.nonzero().squeeze(1).to(device)
        self._rings = ring.flatten()[used].to(device)
        self._bins = (sector * n_rings + ring).flatten()[used].to(device)
        counts = torch.bincount(self._bins, minlength=n_sectors * n_rings).cpu().numpy()
        self.counts = np.asarray(counts, dtype=np.float64).reshape(self._shape)
        ring_counts = self.counts.sum(axis=0)
        radii = np.bincount(
            self._rings.cpu().numpy(), weights=radius.flatten()[used].double().numpy(), minlength=n_rings
        )
        centres = np.where(ring_counts > 0, radii / np.maximum(ring_counts, 1), first + np.arange(n_rings))
        self.k = np.asarray(centres / (n * pixel_size_angstrom), dtype=np.float64)
        self.angles_deg = np.asarray((np.arange(n_sectors) + 0.5) * width, dtype=np.float64)

    def average(self, powers: Float[Tensor, "b n nr"]) -> NDArray[np.float64]:
        """Return the means `(b, sector, ring)` of half spectra.

        Single Fourier pixels above four times their ring's mean (spots of crystals, interference) count as
        that; a bin without pixels takes its ring's mean.
        """
        n_sectors, n_rings = self._shape
        values = powers.flatten(1)[:, self._pixels]
        ring_counts = torch.from_numpy(self.counts.sum(axis=0)).clamp_min(1).to(values)
        for _ in range(2):
            limit = 4.0 * self._sum(values, self._rings, n_rings) / ring_counts
            values = torch.minimum(values, limit[:, self._rings])
        sums = self._sum(values, self._bins, n_sectors * n_rings).double().cpu().numpy()
        sums = sums.reshape(-1, n_sectors, n_rings)
        ring_means = sums.sum(axis=1, keepdims=True) / np.maximum(self.counts.sum(axis=0), 1)
        return np.asarray(np.where(self.counts > 0, sums / np.maximum(self.counts, 1), ring_means))

    @staticmethod
    def _sum(values: Tensor, index: Tensor, n: int) -> Tensor:
        return torch.zeros(len(values), n, dtype=values.dtype, device=values.device).index_add_(
            1, index, values
        )


def polar_spectrum(
    power: Float[Tensor, "n nr"],
    pixel_size_angstrom: float,
    *,
    k_range: tuple[float, float],
    n_sectors: int = 24,
) -> PolarSpectrum:
    """Return the power by sector and ring for frequencies in `k_range` (1/Å), binned as by `PolarBins`."""
    bins = PolarBins(
        int(power.shape[0]), pixel_size_angstrom, k_range=k_range, n_sectors=n_sectors, device=power.device
    )
    values = bins.average(power[None])[0]
    return PolarSpectrum(values=values, counts=bins.counts, angles_deg=bins.angles_deg, k=bins.k)


def _squared_radius(n: int) -> Tensor:
    fy = torch.fft.fftfreq(n) * n
    fx = torch.arange(n // 2 + 1, dtype=fy.dtype)
    squared: Tensor = fy.square()[:, None] + fx.square()[None, :]
    return squared
