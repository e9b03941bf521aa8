"""Local resolution: the FSC of two half-maps within a Gaussian window around every voxel.

Both halves are split into bands of spatial frequency; within each, Σ a·b / √(Σ a² Σ b²) under the window is the local
FSC (Cardone et al. 2013 with soft windows; band-pass and windowing commute up to the window's own blur of frequency).
A voxel's resolution is where the running median of three bands first falls below the threshold, 0.5 as in other
programs' local resolution: with the few coefficients of a window, 0.143 is within the scatter of noise.

Nothing finer than the window can tell is claimed: values change over about its width, and the edge of a region
takes the better neighbour's signal in as far as the window reaches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

THRESHOLD = 0.5
WINDOW_SIGMA_ANGSTROM = 10.0
"""Standard deviation of the window: 24 Å across at half height, as RELION's and blocres' defaults."""

_SIGMA_PER_WAVE = 0.6
_N_BANDS = 32
_WORST_ANGSTROM = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalResolution:
    """Resolution in Å at every voxel of the mask; `outside_angstrom` is written elsewhere (coarser than any inside)."""

    volume: Float[Tensor, "n n n"]
    is_inside: Tensor
    threshold: float
    outside_angstrom: float

    def quantiles(self) -> dict[str, float]:
        """Return the 10 %, 50 % and 90 % quantiles over the mask."""
        values = self.volume[self.is_inside]
        levels = torch.quantile(values[:: max(1, len(values) // 100_000)], torch.tensor([0.1, 0.5, 0.9]))
        return dict(zip(("p10", "median", "p90"), levels.tolist(), strict=True))


def local_resolution(
    half1: Float[Tensor, "n n n"],
    half2: Float[Tensor, "n n n"],
    mask: Float[Tensor, "n n n"],
    pixel_size_angstrom: float,
    *,
    threshold: float = THRESHOLD,
    window_sigma_angstrom: float = WINDOW_SIGMA_ANGSTROM,
) -> LocalResolution:
    """Return the local resolution where `mask` > 0.5, from unfiltered and unmasked half-maps."""
    if half1.shape != half2.shape or half1.shape != mask.shape or len(set(half1.shape)) != 1:
        shapes = f"{tuple(half1.shape)}, {tuple(half2.shape)}, {tuple(mask.shape)}"
        raise ValueError(f"half1, half2, mask: shapes {shapes}, must be equal cubes")
    is_inside = mask > 0.5
    if not bool(is_inside.any()):
        raise ValueError("mask: no voxel above 0.5, local resolution needs some")
    size = int(half1.shape[0])
    k = _frequencies(size, pixel_size_angstrom)
    centres = _band_centres(size, pixel_size_angstrom, window_sigma_angstrom)
    spectra = [torch.fft.rfftn(half.float()) for half in (half1, half2)]
    curves = torch.stack(
        [
            _local_correlation(
                spectra, _band(k, centres, i), _window(k, float(c), window_sigma_angstrom), is_inside
            )
            for i, c in enumerate(centres)
        ]
    )
    smooth = torch.cat((curves[:1], curves, curves[-1:])).unfold(0, 3, 1).median(dim=2).values
    frequency = _crossing(smooth, centres, threshold)
    values = 1.0 / frequency
    worst = 1.0 / float(centres[0])
    volume = torch.full_like(half1, worst, dtype=torch.float32)
    volume[is_inside] = values
    return LocalResolution(volume=volume, is_inside=is_inside, threshold=threshold, outside_angstrom=worst)


def _frequencies(size: int, pixel_size_angstrom: float) -> Float[Tensor, "n n nr"]:
    full = torch.fft.fftfreq(size, d=pixel_size_angstrom)
    half = torch.fft.rfftfreq(size, d=pixel_size_angstrom)
    return torch.sqrt(full[:, None, None] ** 2 + full[None, :, None] ** 2 + half[None, None, :] ** 2)


def _band_centres(size: int, pixel_size_angstrom: float, sigma_angstrom: float) -> Float[Tensor, " b"]:
    """Return band centres in 1/Å: not finer than shells, nor than a window can tell apart, up to Nyquist."""
    nyquist = 0.5 / pixel_size_angstrom
    first = max(1.0 / _WORST_ANGSTROM, 2.0 / (size * pixel_size_angstrom))
    step = max(1.0 / (size * pixel_size_angstrom), 1.0 / (2.0 * math.pi * sigma_angstrom * 2.0))
    n = min(_N_BANDS, max(4, int((nyquist - first) / step) + 1))
    return torch.linspace(first, nyquist, n)


def _band(k: Float[Tensor, "n n nr"], centres: Float[Tensor, " b"], i: int) -> Float[Tensor, "n n nr"]:
    """Return a raised cosine that is one at the band's centre and zero at its neighbours'."""
    step = float(centres[1] - centres[0])
    distance = ((k - float(centres[i])) / step).abs().clamp_max(1.0)
    return 0.5 + 0.5 * torch.cos(math.pi * distance)


def _window(k: Float[Tensor, "n n nr"], centre: float, sigma_angstrom: float) -> Float[Tensor, "n n nr"]:
    """Return the window's transform; waves longer than the window get one of their own length, or chance decides."""
    sigma = max(sigma_angstrom, _SIGMA_PER_WAVE / centre)
    return torch.exp(-2.0 * math.pi**2 * sigma**2 * k.square())


def _local_correlation(
    spectra: list[Tensor], band: Float[Tensor, "n n nr"], window: Float[Tensor, "n n nr"], is_inside: Tensor
) -> Float[Tensor, " v"]:
    shape = is_inside.shape
    a, b = (torch.fft.irfftn(spectrum * band, s=shape) for spectrum in spectra)

    def averaged(product: Tensor) -> Tensor:
        smooth: Tensor = torch.fft.irfftn(torch.fft.rfftn(product) * window, s=shape)[is_inside]
        return smooth

    cross, power_a, power_b = averaged(a * b), averaged(a * a), averaged(b * b)
    power = (power_a.clamp_min(0.0) * power_b.clamp_min(0.0)).sqrt()
    # Rounding of the transforms must not become a correlation where a band is empty.
    floor = 1e-6 * power.max().clamp_min(1e-30)
    return torch.where(power > floor, cross / power.clamp_min(1e-30), torch.zeros(()))


def _crossing(
    curves: Float[Tensor, "b v"], centres: Float[Tensor, " b"], threshold: float
) -> Float[Tensor, " v"]:
    """Return the frequency at which each curve first falls below the threshold, linear between bands."""
    below = curves < threshold
    ends = below.any(0)
    first = torch.where(ends, below.int().argmax(0), len(centres) - 1)
    before = (first - 1).clamp_min(0)
    columns = torch.arange(curves.shape[1])
    high, low = curves[before, columns], curves[first, columns]
    share = ((high - threshold) / (high - low).clamp_min(1e-6)).clamp(0.0, 1.0)
    share = torch.where(ends & (first > 0), share, torch.where(ends, 0.0, 1.0))
    frequency: Tensor = centres[before] + share * (centres[first] - centres[before])
    return frequency
