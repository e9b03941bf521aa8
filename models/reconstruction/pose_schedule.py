"""How images are aligned at a given radius: which grids, steps and radii, globally or around a known pose."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from models.reconstruction.grids import asymmetric_unit, grid_spacing_deg, shift_grid, so3_grid
from models.reconstruction.particle_data import ParticleData
from models.reconstruction.pose_search import Hypotheses, LocalLevel, search_globally, search_locally
from models.reconstruction.scoring import ShiftSearch

LOCAL_STEP_DEG = 3.0
"""First step around a known pose; poses of an earlier map are nearer than twice this (facts §2.3)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RefinementSettings:
    """The schedule; shells count cycles per box, fractions are of the box.

    `estimate_scale` gives every micrograph a contrast of its own, `weigh_images` lets images that do not show the
    particle count less.
    """

    n_global: int = 3
    n_local: int = 5
    initial_resolution_angstrom: float = 30.0
    global_max_shell: float = 11.0
    grid_order: int = 2
    n_keep: int = 6
    mask_diameter_fraction: float = 0.85
    shift_sigma_fraction: float = 3.0 / 64.0
    shift_step_fraction: float = 1.0 / 32.0
    estimate_scale: bool = True
    weigh_images: bool = True


@dataclass(frozen=True, slots=True)
class Reference:
    """One half's map as a cube, its inverse noise per coefficient, and the radius (shells) that may be used."""

    cube: Tensor
    inverse_noise: Tensor
    shell: float


def align_globally(
    data: ParticleData,
    reference: Reference,
    settings: RefinementSettings,
    group: Float[Tensor, "g 3 3"],
    turn: Float[Tensor, "3 3"],
    check: Callable[[], None] | None = None,
) -> Hypotheses:
    """Search all poses (the asymmetric unit of a grid turned by `turn`), then around the best few."""
    s, box = settings, data.box_size_px
    coarse_shell = min(reference.shell, s.global_max_shell)
    rotations = asymmetric_unit(so3_grid(s.grid_order) @ turn, group)
    search = ShiftSearch.gaussian(shift_grid(2, s.shift_step_fraction * box), s.shift_sigma_fraction * box)
    near = data.within(coarse_shell)
    found = search_globally(
        near, reference.cube, reference.inverse_noise[: len(near.plane)], rotations, search,
        n_keep=s.n_keep, check=check,
    )  # fmt: skip
    step_deg, step_px = grid_spacing_deg(s.grid_order) / 2, s.shift_step_fraction * box / 2
    levels = [
        LocalLevel(step_deg, step_px, 4, coarse_shell),
        LocalLevel(step_deg / 2, step_px / 2, 2, _shell_for(step_deg / 2, reference.shell, s)),
        LocalLevel(step_deg / 4, step_px / 4, 1, _shell_for(step_deg / 4, reference.shell, s)),
    ]
    if _needs_step_below(step_deg / 4, reference.shell, box):
        levels.append(LocalLevel(step_deg / 8, step_px / 4, 1, reference.shell))
    return search_locally(
        data, reference.cube, reference.inverse_noise, found, levels,
        shift_sigma_px=s.shift_sigma_fraction * box, check=check,
    )  # fmt: skip


def align_locally(
    data: ParticleData,
    reference: Reference,
    settings: RefinementSettings,
    rotations: Float[Tensor, "b 3 3"],
    shifts_xy_px: Float[Tensor, "b 2"],
    check: Callable[[], None] | None = None,
) -> Hypotheses:
    """Search around known poses with halving steps, down to what the radius can tell apart."""
    s, box = settings, data.box_size_px
    start = Hypotheses(rotations[:, None], shifts_xy_px[:, None], torch.zeros((len(data), 1)))
    step_px = 0.5 * s.shift_step_fraction * box
    steps = [LOCAL_STEP_DEG / 2**i for i in range(4)]
    levels = [
        LocalLevel(step, step_px / 2**i, 1, _shell_for(step, reference.shell, s))
        for i, step in enumerate(steps)
        if i == 0 or _needs_step_below(step * 2, reference.shell, box)
    ]
    return search_locally(
        data, reference.cube, reference.inverse_noise, start, levels,
        shift_sigma_px=s.shift_sigma_fraction * box, check=check,
    )  # fmt: skip


def _shell_for(step_deg: float, shell: float, settings: RefinementSettings) -> float:
    """Return the radius that a step can tell apart: beyond 0.4 waves at the rim, points are wasted on it."""
    return min(shell, max(settings.global_max_shell, 0.4 / (0.35 * math.radians(step_deg))))


def _needs_step_below(step_deg: float, shell: float, box_px: int) -> bool:
    """Say whether half this step still moves the particle's rim by a fifth of the finest wave in use."""
    rim_px = 0.5 * 0.7 * box_px
    wave_px = box_px / shell
    return math.radians(step_deg) * rim_px > 0.2 * wave_px
