"""Fourier sufficient statistics of a set of posed images, and the regularised map that they give.

For images F = CTF · P̂(R) · e^{-2πi k·o} + noise of variance σ²(shell), an accumulator holds on the padded cube
A = Σ Pᵀ(CTF · F · e^{...} / σ²) and W = Σ Pᵀ(CTF² / σ²) as channels (re A, im A, W). Accumulators add: that is
what makes halves, batches and revisions cheap. The map is V̂ = A / (W + W̄/SSNR) with the shell's mean weight W̄
and its signal-to-noise ratio as a radial prior (facts: facts/reconstruction.md §2.2).
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from models.reconstruction.projector import (
    HalfPlane,
    cube_half_side,
    cube_shells,
    insert_slices,
    symmetrise_friedel,
)


class ReconstructionGrid:
    """A cube's geometry with its shells, made once per radius."""

    def __init__(self, max_shell: float) -> None:
        self.max_shell = max_shell
        self.half_side = cube_half_side(max_shell)
        self.shell, radius = cube_shells(self.half_side)
        self.is_inside = radius <= max_shell
        self.n_shells = int(max_shell) + 1
        self.flat = torch.where(self.is_inside, self.shell, self.n_shells).reshape(-1)
        self.counts = torch.bincount(self.flat, minlength=self.n_shells + 1)[: self.n_shells].float()

    def zeros(self, n_channels: int = 3) -> Float[Tensor, "c d d d"]:
        """Return an empty accumulator."""
        side = 2 * self.half_side + 1
        return torch.zeros((n_channels, side, side, side))

    def shell_sum(self, values: Float[Tensor, "d d d"]) -> Float[Tensor, "s"]:
        """Sum a cube's values over each shell."""
        sums = torch.bincount(self.flat, weights=values.reshape(-1), minlength=self.n_shells + 1)
        return sums[: self.n_shells].float()

    def spread(self, per_shell: Float[Tensor, "s"]) -> Float[Tensor, "d d d"]:
        """Return a cube that has the shell's value at each sample and zero outside the radius."""
        return torch.cat((per_shell, per_shell.new_zeros(1)))[self.flat].reshape(self.shell.shape)


def correlate_shells(
    a: Float[Tensor, "2 d d d"], b: Float[Tensor, "2 d d d"], grid: ReconstructionGrid
) -> Float[Tensor, "s"]:
    """Return the Fourier shell correlation of two cubes, in [-1, 1]; 0 where a shell is empty."""
    cross = grid.shell_sum((a * b).sum(0))
    power = torch.sqrt(grid.shell_sum(a.square().sum(0)) * grid.shell_sum(b.square().sum(0)))
    return torch.where(power > 0, cross / power.clamp_min(1e-30), torch.zeros_like(cross))


def solve_map(
    accumulator: Float[Tensor, "3 d d d"], ssnr: Float[Tensor, "s"], grid: ReconstructionGrid
) -> Float[Tensor, "2 d d d"]:
    """Return the cube A / (W + W̄/SSNR); a shell with SSNR 0 becomes zero.

    `ssnr` is the map's ratio of signal to noise variance per shell, FSC/(1 − FSC) for a half map and twice that for
    both halves together.
    """
    sums = symmetrise_friedel(accumulator)
    mean_weight = grid.shell_sum(sums[2]) / grid.counts.clamp_min(1.0)
    known = ssnr > 0
    prior = torch.where(known, mean_weight / ssnr.clamp_min(1e-6), torch.zeros_like(ssnr))
    # A floor of a thousandth of the mean keeps almost empty samples from amplifying one image's noise.
    denominator = sums[2] + grid.spread(torch.maximum(prior, 1e-3 * mean_weight))
    keep = grid.spread(known.float()) * (denominator > 0)
    return sums[:2] * (keep / denominator.clamp_min(1e-30))


def ssnr_of(fsc: Float[Tensor, "s"], *, n_halves: int, floor: float = 0.01) -> Float[Tensor, "s"]:
    """Return FSC/(1 − FSC) times 1 (one half) or 2 (both), from a curve smoothed over three neighbours."""
    padded = torch.cat((fsc[:1], fsc, fsc[-1:]))
    smooth = (padded[:-2] + padded[1:-1] + padded[2:]) / 3.0
    value = torch.minimum(smooth, torch.maximum(fsc, smooth)).clamp(floor, 0.999)
    return n_halves * value / (1.0 - value)


def accumulate_posed(
    accumulator: Float[Tensor, "3 d d d"],
    weighted_images: Tensor,
    weights: Float[Tensor, "b k"],
    rotations: Float[Tensor, "b 3 3"],
    plane: HalfPlane,
    group: Float[Tensor, "g 3 3"],
) -> Float[Tensor, "3 d d d"]:
    """Insert images CTF·F·phase/σ² (complex `(b, k)`) with weights CTF²/σ² at R g for every g of the group."""
    channels = torch.stack((weighted_images.real, weighted_images.imag, weights))
    for element in group:
        accumulator = insert_slices(accumulator, channels, rotations @ element, plane)
    return accumulator


def ring_mean(values: Float[Tensor, "b k"], shell: Int[Tensor, "k"], n_shells: int) -> Float[Tensor, "s"]:
    """Return the mean over images and ring of per-coefficient values."""
    per_coefficient = values.mean(0)
    total = torch.zeros(n_shells).index_add_(0, shell, per_coefficient)
    count = torch.bincount(shell, minlength=n_shells).float()
    return total / count.clamp_min(1.0)
