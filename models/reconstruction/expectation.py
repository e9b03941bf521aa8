"""The E-step of the online EM: posterior over rotations × shifts, summed per rotation.

Exact where few coefficients are in use. Otherwise in two steps: all rotations at the coefficients of a smaller
radius and a coarser grid of shifts, then everything at each image's best rotations there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from models.reconstruction.particle_data import ParticleData
from models.reconstruction.scoring import (
    Projections,
    ShiftSearch,
    add_slice_sums,
    block_size,
    fast_products,
    score_block,
    shifted_matrix,
    weighted_images,
)

PRUNING_SHELL = 7.0
"""Radius of the first step; there most rotations are already out of question for a particle of half the box."""

COVERAGE = 0.9
"""Mean share of the first step's posterior that the second step's rotations hold."""

MIN_ROTATIONS = 128
"""Rotations kept per image at least: at a grid's spacing the first step is surer of itself than it should be."""

MAX_ROTATIONS = 256
"""Kept at most: with all coefficients the posterior is narrower than in the first step."""

MIN_COVERAGE = 0.4
"""Where that many hold less than this, images say little about their pose and nothing is left out."""

MAX_SUMMED = 40
"""Rotations per image that enter the sums; they get what share the others had."""

MIN_SHARE = 2e-3
"""A rotation that holds less of an image's posterior is left out of the sums."""

_BLOCK_BYTES = 24_000_000


@dataclass(frozen=True, slots=True)
class CoarseSearch:
    """The first step: shifts to try, and how many coefficients to look at."""

    search: ShiftSearch
    n_coefficients: int


def sum_slices(
    batch: ParticleData,
    inverse_noise: Float[Tensor, "k"],
    projections: Projections,
    search: ShiftSearch,
    beta: float,
    coarse: CoarseSearch | None,
) -> Float[Tensor, "3 h k"]:
    """Return the batch's posterior-weighted sums (re A, im A, W) at the first half of the grid's rotations.

    What belongs to the second half is conjugated and added to its mate. `coarse` None means the exact posterior.
    """
    n_rotations, k2 = projections.stacked.shape
    images, weights = weighted_images(batch, inverse_noise)
    phases = batch.plane.phases(search.shifts_xy_px)
    sums, weight_sums = torch.zeros((n_rotations, k2)), torch.zeros((n_rotations, k2 // 2))
    with fast_products():
        chosen = None
        if coarse is not None:
            chosen, coverage = choose_rotations(batch, images, weights, projections, coarse, beta)
        if chosen is None or coverage < MIN_COVERAGE:
            size = block_size(phases.shape[0], n_rotations)
            for part, part_weights in zip(images.split(size), weights.split(size), strict=True):
                matrix = shifted_matrix(part, phases)
                posterior = score_block(matrix, part_weights, projections, search, beta)
                _normalise(posterior)
                add_slice_sums(sums, weight_sums, posterior, matrix, part_weights)
        else:
            size = max(1, _BLOCK_BYTES // (chosen.shape[1] * 8 * k2))
            for part, part_weights, part_chosen in zip(
                images.split(size), weights.split(size), chosen.split(size), strict=True
            ):
                matrix = shifted_matrix(part, phases)
                _add_chosen(sums, weight_sums, matrix, part_weights, projections, part_chosen, search, beta)
    k, h = k2 // 2, n_rotations // 2
    return torch.stack((
        sums[:h, :k] + sums[h:, :k], sums[:h, k:] - sums[h:, k:], weight_sums[:h] + weight_sums[h:]
    ))  # fmt: skip


def _normalise(scores: Float[Tensor, "b t j"]) -> None:
    scores.sub_(scores.amax((1, 2), keepdim=True)).exp_()
    scores.div_(scores.sum((1, 2), keepdim=True))


def choose_rotations(
    batch: ParticleData,
    images: Tensor,
    weights: Tensor,
    projections: Projections,
    coarse: CoarseSearch,
    beta: float,
) -> tuple[Int[Tensor, "b m"], float]:
    """Return the rotations that hold the mass at the smaller radius, best first, and the share that they hold at most."""
    low = projections.cropped(coarse.n_coefficients)
    plane = batch.plane.cropped(coarse.n_coefficients)
    phases = plane.phases(coarse.search.shifts_xy_px)
    n, n_rotations = coarse.n_coefficients, low.stacked.shape[0]
    size = block_size(phases.shape[0], n_rotations)
    found, covered = [], torch.zeros(min(MAX_ROTATIONS, n_rotations))
    for part, part_weights in zip(images[:, :n].split(size), weights[:, :n].split(size), strict=True):
        scores = score_block(shifted_matrix(part, phases), part_weights, low, coarse.search, beta)
        shares = torch.softmax(scores.amax(1), dim=1)
        mass, index = shares.topk(len(covered), dim=1)
        covered += mass.cumsum(1).sum(0)
        found.append(index)
    n_needed = int((covered < COVERAGE * len(images)).sum()) + 1
    return torch.cat(found)[:, : max(MIN_ROTATIONS, n_needed)], float(covered[-1]) / len(images)


def _add_chosen(
    sums: Float[Tensor, "j k2"],
    weight_sums: Float[Tensor, "j k"],
    matrix: Float[Tensor, "b t k2"],
    weights: Float[Tensor, "b k"],
    projections: Projections,
    chosen: Int[Tensor, "b m"],
    search: ShiftSearch,
    beta: float,
) -> None:
    """Add the sums of a block whose posterior is computed at `chosen` alone."""
    scores = score_chosen(matrix, weights, projections, chosen, search, beta)
    _normalise(scores)
    shares, top = scores.sum(1).topk(min(MAX_SUMMED, chosen.shape[1]), dim=1)
    scores = scores.gather(2, top[:, None, :].expand(-1, scores.shape[1], -1))
    is_kept = shares >= MIN_SHARE
    rows, columns = is_kept.nonzero(as_tuple=True)
    scale = 1.0 / (shares * is_kept).sum(1).clamp_min(1e-6)
    sums_of_images = torch.bmm(scores.transpose(1, 2), matrix)[rows, columns] * scale[rows, None]
    place = chosen.gather(1, top)[rows, columns]
    sums.index_add_(0, place, sums_of_images)
    weight_sums.index_add_(0, place, (shares[rows, columns] * scale[rows])[:, None] * weights[rows])


def score_chosen(
    matrix: Float[Tensor, "b t k2"],
    weights: Float[Tensor, "b k"],
    projections: Projections,
    chosen: Int[Tensor, "b m"],
    search: ShiftSearch,
    beta: float,
) -> Float[Tensor, "b t m"]:
    """Return what `score_block` does, at each image's own rotations `chosen` `(b, m)`."""
    # index_select copies rows several times faster than indexing does; the power of all is cheaper than a few's rows.
    slices = projections.stacked.index_select(0, chosen.reshape(-1)).view(*chosen.shape, -1)
    power = (weights @ projections.power.T).gather(1, chosen % len(projections.power))
    scores = 2.0 * torch.bmm(matrix, slices.transpose(1, 2))
    scores.sub_(power[:, None, :])
    return scores.mul_(beta).add_(search.log_prior[None, :, None])
