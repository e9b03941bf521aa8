"""From two half maps to the map that people look at: averaged, weighted by the FSC, sharpened where that is known.

Weights are C_ref = √(2 FSC / (1 + FSC)) (Rosenthal & Henderson 2003, eq. 10). A B factor is estimated from the
Guinier plot beyond 10 Å and therefore only for maps better than 7 Å; coarser maps are not sharpened.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from models.reconstruction.fsc import shell_index, shell_sum

GUINIER_FROM_ANGSTROM = 10.0
SHARPEN_BETTER_THAN_ANGSTROM = 7.0


@dataclass(frozen=True, slots=True, kw_only=True)
class CombinedMap:
    """The weighted map, and the B factor (Å², negative sharpens) that was compensated; None = not sharpened."""

    volume: Tensor
    b_factor_angstrom2: float | None


def combine_halves(
    half1: Float[Tensor, "n n n"],
    half2: Float[Tensor, "n n n"],
    fsc: Float[Tensor, "s"],
    pixel_size_angstrom: float,
    resolution_angstrom: float | None,
) -> CombinedMap:
    """Average the halves and weigh each shell by what the (corrected) FSC says is signal.

    Beyond the resolution the map is zero, so that noise cannot pass for detail.
    """
    n = int(half1.shape[-1])
    shells = torch.arange(n // 2 + 1).float()
    frequency = shells / (n * pixel_size_angstrom)
    safe = fsc[: n // 2 + 1].clamp(0.0, 1.0)
    weight = torch.sqrt(2.0 * safe / (1.0 + safe))
    weight[0] = 1.0
    if resolution_angstrom is not None:
        # A cosine edge of two shells: a sharp one would ring around the molecule.
        edge = (frequency * n * pixel_size_angstrom - n * pixel_size_angstrom / resolution_angstrom) / 2.0
        weight = weight * (0.5 + 0.5 * torch.cos(math.pi * edge.clamp(0.0, 1.0)))
    spectrum = torch.fft.rfftn(0.5 * (half1 + half2))
    b_factor = _guinier_b_factor(spectrum, weight, frequency, n, resolution_angstrom)
    if b_factor is not None:
        weight = weight * torch.exp(-0.25 * b_factor * frequency.square())
    gain = torch.cat((weight, weight.new_zeros(1)))[shell_index(n).clamp_max(n // 2 + 1)]
    volume: Tensor = torch.fft.irfftn(spectrum * gain, s=(n, n, n))
    return CombinedMap(volume=volume, b_factor_angstrom2=b_factor)


def _guinier_b_factor(
    spectrum: Tensor, weight: Tensor, frequency: Tensor, n: int, resolution_angstrom: float | None
) -> float | None:
    """Return the slope of ln⟨|F| C_ref⟩ over k² times 4, between 10 Å and the resolution."""
    if resolution_angstrom is None or resolution_angstrom > SHARPEN_BETTER_THAN_ANGSTROM:
        return None
    power = shell_sum(spectrum.abs().square(), n).float()
    counts = shell_sum(torch.ones(spectrum.shape), n).float()
    amplitude = torch.sqrt(power / counts.clamp_min(1.0)) * weight
    is_used = (
        (frequency >= 1 / GUINIER_FROM_ANGSTROM) & (frequency <= 1 / resolution_angstrom) & (amplitude > 0)
    )
    if int(is_used.sum()) < 4:
        return None
    x, y = frequency[is_used].square(), amplitude[is_used].log()
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    return float(min(0.0, max(-1000.0, 4.0 * float(slope))))
