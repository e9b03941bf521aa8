"""Poses of images finer than the search's grid: each image's distinct modes on the grid, then local search around them.

At 15° spacing the nearest rotation of the grid moves a particle's rim by more than the finest wave in use. What tells
nearly equal views apart is then mostly lost: on ClpB, nearly sixfold, images prefer the true map to one that mixes two
registers by 0.2 nats each on the grid and by 7.4 with local search (README).
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from models.reconstruction.expectation import CoarseSearch, choose_rotations, score_chosen
from models.reconstruction.grids import rotation_angle_deg
from models.reconstruction.online_em import OnlineEmSettings, coarse_search, fine_shift_search
from models.reconstruction.particle_data import ParticleData
from models.reconstruction.pose_search import Hypotheses, LocalLevel, search_locally
from models.reconstruction.scoring import (
    Projections,
    ShiftSearch,
    fast_products,
    shifted_matrix,
    weighted_images,
)

N_MODES = 6
"""Distinct rotations of the grid that are searched around: a nearly sixfold particle has six."""

MODE_DEG = 22.0
"""Rotations nearer than this belong to one mode: 1.5 times the fine grid's spacing."""

LEVELS = ((5.0, 0.5, 2, 0.75), (2.5, 0.25, 2, 1.0))
"""Steps in degrees and in the grid's shift step, the modes kept after each level, and its share of the radius."""

_IMAGES_PER_BLOCK = 50


def find_fine_poses(
    data: ParticleData,
    cube: Float[Tensor, "2 d d d"],
    inverse_noise: Float[Tensor, "k"],
    rotations: Float[Tensor, "j 3 3"],
    settings: OnlineEmSettings,
    group: Float[Tensor, "g 3 3"] | None = None,
) -> Hypotheses:
    """Return each image's likeliest distinct poses, best first; `rotations` is a grid of 15° in pairs.

    With a `group` poses that it makes equal are one mode.
    """
    box = data.box_size_px
    shift_step_px = settings.shift_step_fraction * box
    search = fine_shift_search(box, settings)
    coarse = coarse_search(data.plane, settings) or CoarseSearch(search, len(data.plane))
    copies = torch.eye(3)[None] if group is None else group
    projections = Projections.of_grid(cube, rotations, data.plane)
    shell = float(data.plane.radius[-1])
    levels = [LocalLevel(deg, step * shift_step_px, n, share * shell) for deg, step, n, share in LEVELS]
    images, weights = weighted_images(data, inverse_noise)
    phases = data.plane.phases(search.shifts_xy_px)
    starts = []
    with fast_products():
        chosen, _ = choose_rotations(data, images, weights, projections, coarse, 1.0)
        for index in torch.arange(len(data)).split(_IMAGES_PER_BLOCK):
            matrix = shifted_matrix(images[index], phases)
            scores = score_chosen(matrix, weights[index], projections, chosen[index], search, 1.0)
            starts.append(_modes(scores, chosen[index], rotations, search, copies))
        start = Hypotheses(*(torch.cat(parts) for parts in zip(*starts, strict=True)))
        return search_locally(
            data, cube, inverse_noise, start, levels, shift_sigma_px=settings.shift_sigma_fraction * box
        )


def decided(poses: Hypotheses, minimum_mass: float) -> Bool[Tensor, " b"]:
    """Say of which images one mode holds at least `minimum_mass` of the posterior."""
    is_decided: Tensor = torch.softmax(poses.scores, dim=1)[:, 0] >= minimum_mass
    return is_decided


def _modes(
    scores: Float[Tensor, "b t m"],
    chosen: Int[Tensor, "b m"],
    rotations: Float[Tensor, "j 3 3"],
    search: ShiftSearch,
    copies: Float[Tensor, "g 3 3"],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the best rotation of each mode with its best shift: what lies near a better one is left out."""
    best, shift = scores.max(1)
    left, rows = best.clone(), torch.arange(len(best))
    found = []
    for _ in range(min(N_MODES, best.shape[1])):
        top = left.argmax(1)
        found.append(top)
        same = rotations[chosen[rows, top]][:, None] @ copies
        angle = torch.stack([
            rotation_angle_deg(rotations[chosen], same[:, g, None]) for g in range(len(copies))
        ]).amin(0)  # fmt: skip
        # Modes may run out: what has been left out then comes back, best first, far below any mode.
        left = torch.where(angle < MODE_DEG, left - 1e4, left)
    index = torch.stack(found, dim=1)
    return (
        rotations[chosen.gather(1, index)],
        search.shifts_xy_px[shift.gather(1, index)],
        best.gather(1, index),
    )
