"""Dose weighting after Grant & Grigorieff 2015 (eLife 4:e06980, eq. 3-5)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

# Fitted by the authors on rotavirus at 300 kV; k in 1/Å, result in e/Å².
_A, _B, _C = 0.24499, -1.6649, 2.8141
_FACTOR_BELOW_300_KV = 0.8


def critical_exposure(k: Float[Tensor, "*k"], voltage_kv: float) -> Float[Tensor, "*k"]:
    """Return N_e(k) in e/Å²: the exposure after which a signal at frequency k (1/Å) has fallen to 1/√e power.

    N_e = 0.245 k^−1.665 + 2.81 at 300 kV, 0.8 times that at 200 kV, linear in between and beyond.
    """
    factor = 1.0 + (voltage_kv - 300.0) / 100.0 * (1.0 - _FACTOR_BELOW_300_KV)
    return factor * (_A * k.clamp(min=1e-6).pow(_B) + _C)


def dose_weight(
    critical_e_per_angstrom2: Float[Tensor, "*k"], accumulated_e_per_angstrom2: float
) -> Float[Tensor, "*k"]:
    """Return exp(−N / 2 N_e) for the exposure N that has accumulated at the end of a frame."""
    return torch.exp(-0.5 * accumulated_e_per_angstrom2 / critical_e_per_angstrom2)


def accumulated_exposures(
    n_frames: int, dose_e_per_angstrom2: float, pre_exposure_e_per_angstrom2: float
) -> Float[Tensor, "frame"]:
    """Return the exposure at the end of each of `n_frames` equal frames of a movie of the given total dose."""
    per_frame = dose_e_per_angstrom2 / n_frames
    return pre_exposure_e_per_angstrom2 + per_frame * torch.arange(1, n_frames + 1)


def noise_normalisation(
    critical_e_per_angstrom2: Float[Tensor, "*k"], accumulated: Float[Tensor, "frame"]
) -> Float[Tensor, "*k"]:
    """Return √(n / Σ q²): with it a weighted sum has the noise power, and the mean, of the plain sum.

    The squared weights are a geometric series for equal frames, but are summed here for any exposures.
    """
    total = torch.zeros_like(critical_e_per_angstrom2)
    for exposure in accumulated.tolist():
        total += torch.exp(-exposure / critical_e_per_angstrom2)
    # beyond 1e-30 a frequency has no signal left in any frame; the ratio must stay finite in float32
    return torch.sqrt(len(accumulated) / total.clamp(min=1e-30))
