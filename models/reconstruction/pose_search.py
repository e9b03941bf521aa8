"""Pose search of images against one reference: global over SO(3) × shifts, then local with halving steps.

Global search is one matrix product per block (`scoring`); local search reads 27 neighbouring slices around every
hypothesis and scores them at nine shifts. Hypotheses of an image are kept as long as they may still win.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from models.reconstruction.grids import local_rotations, shift_grid
from models.reconstruction.particle_data import ParticleData
from models.reconstruction.projector import extract_slices
from models.reconstruction.scoring import (
    Projections,
    ShiftSearch,
    block_size,
    fast_products,
    score_block,
    shifted_matrix,
    weighted_images,
)

MAX_LOCAL_POINTS = 2_000_000
"""Points interpolated per block of local search; bounds memory to ~100 MB."""


@dataclass(frozen=True, slots=True)
class Hypotheses:
    """Candidate poses `(b, m, 3, 3)` and shifts `(b, m, 2)` in px (applied to the image), with log scores `(b, m)`."""

    rotations: Tensor
    shifts_xy_px: Tensor
    scores: Tensor

    @property
    def best(self) -> tuple[Tensor, Tensor]:
        """Return the first (best) rotation and shift of every image."""
        return self.rotations[:, 0], self.shifts_xy_px[:, 0]


@dataclass(frozen=True, slots=True)
class LocalLevel:
    """One level of local search: steps, hypotheses kept afterwards, and the radius in shells."""

    step_deg: float
    step_px: float
    n_keep: int
    max_shell: float


def search_globally(
    data: ParticleData,
    cube: Float[Tensor, "2 d d d"],
    inverse_noise: Float[Tensor, "k"],
    rotations: Float[Tensor, "j 3 3"],
    search: ShiftSearch,
    *,
    n_keep: int,
    check: Callable[[], None] | None = None,
) -> Hypotheses:
    """Return each image's `n_keep` best rotations of the grid (in pairs, see `so3_grid`), each with its best shift."""
    projections = Projections.of_grid(cube, rotations, data.plane)
    images, weights = weighted_images(data, inverse_noise)
    phases = data.plane.phases(search.shifts_xy_px)
    size = block_size(phases.shape[0], rotations.shape[0])
    n_keep = min(n_keep, rotations.shape[0])
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    with fast_products():
        for part, part_weights in zip(images.split(size), weights.split(size), strict=True):
            scores = score_block(shifted_matrix(part, phases), part_weights, projections, search, 1.0)
            per_rotation, shift_index = scores.max(1)
            top, index = per_rotation.topk(n_keep, dim=1)
            found.append((rotations[index], search.shifts_xy_px[shift_index.gather(1, index)], top))
            if check is not None:
                check()
    return Hypotheses(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def search_locally(
    data: ParticleData,
    cube: Float[Tensor, "2 d d d"],
    inverse_noise: Float[Tensor, "k"],
    start: Hypotheses,
    levels: list[LocalLevel],
    *,
    shift_sigma_px: float,
    check: Callable[[], None] | None = None,
) -> Hypotheses:
    """Refine hypotheses level by level; scores are log likelihoods (+ shift prior) at the last level's radius."""
    current = start
    for level in levels:
        near = data.within(level.max_shell)
        noise = inverse_noise[: len(near.plane)]
        n_points = current.scores.shape[1] * 27 * len(near.plane)
        size = max(1, MAX_LOCAL_POINTS // n_points)
        parts = []
        for index in torch.arange(len(data)).split(size):
            few = Hypotheses(current.rotations[index], current.shifts_xy_px[index], current.scores[index])
            parts.append(_search_level(near.take(index), cube, noise, few, level, shift_sigma_px))
            if check is not None:
                check()
        current = Hypotheses(
            torch.cat([p.rotations for p in parts]),
            torch.cat([p.shifts_xy_px for p in parts]),
            torch.cat([p.scores for p in parts]),
        )
    return current


def _search_level(
    data: ParticleData,
    cube: Float[Tensor, "2 d d d"],
    inverse_noise: Float[Tensor, "k"],
    start: Hypotheses,
    level: LocalLevel,
    shift_sigma_px: float,
) -> Hypotheses:
    b, m = start.scores.shape
    turns = local_rotations(level.step_deg)
    rotations = turns[None, None] @ start.rotations[:, :, None]
    slices = extract_slices(cube, rotations.reshape(-1, 3, 3), data.plane).view(b, m, 27, -1)
    images, weights = weighted_images(data, inverse_noise)
    shifts = start.shifts_xy_px[:, :, None] + shift_grid(1, level.step_px)
    shifted = images[:, None, None] * data.plane.phases(shifts)
    # Re⟨x, p⟩ for 27 slices × 9 shifts of every hypothesis, as a product of stacked real and imaginary parts.
    left = torch.view_as_real(slices).flatten(-2)
    right = torch.view_as_real(shifted).flatten(-2)
    cross = 2.0 * (left @ right.transpose(-1, -2))
    power = (slices.abs().square() * weights[:, None, None]).sum(-1)
    prior = -0.5 * shifts.square().sum(-1) / shift_sigma_px**2
    scores = (cross - power[..., None] + prior[:, :, None, :]).flatten(2)
    # The best of each hypothesis's neighbourhood and then the best hypotheses: neighbours do not crowd out rivals.
    top_score, top = scores.max(2)
    keep_score, keep = top_score.topk(min(level.n_keep, m), dim=1)
    rows = torch.arange(b)[:, None]
    chosen = top[rows, keep]
    return Hypotheses(
        rotations[rows, keep, chosen // 9],
        shifts[rows, keep, chosen % 9],
        keep_score,
    )
