"""The resolution that predicted poses give: two half maps by direct Fourier inversion, and where their FSC falls to 0.5.

The paper reconstructs by filtered back-projection and takes 0.5 because its maps seldom hold at 0.143 (appendix C.3). Here the
halves are Fourier sums weighted by the CTF (`models.reconstruction`). Both halves' poses come from one network, which knows the
map it was trained on: the figure says how consistent poses are with each other, not that they are right.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from models.reconstruction.fsc import find_crossing, fourier_shell_correlation
from models.reconstruction.masks import spherical_mask
from models.reconstruction.particle_data import ParticleData
from models.reconstruction.projector import sums_to_volume
from models.reconstruction.sufficient import ReconstructionGrid, accumulate_posed, solve_map

FSC_THRESHOLD = 0.5
_SSNR = 10.0
"""Signal to noise of the prior in every shell: a light regularisation of samples that few views reach."""

_MASK_EDGE_PX = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PoseResolution:
    """The curve per shell, and its crossing of 0.5 in Å and in pixels (None: no significant correlation)."""

    fsc: tuple[float, ...]
    resolution_angstrom: float | None
    resolution_px: float | None


def resolve_poses(
    data: ParticleData,
    rotations: Float[Tensor, "b 3 3"],
    shifts_yx_px: Float[Tensor, "b 2"],
    group: Float[Tensor, "g 3 3"],
    *,
    diameter_angstrom: float,
) -> PoseResolution:
    """Reconstruct even and odd images at these poses and compare; shifts are where particles are from the box's middle."""
    if len(data) < 2:
        raise ValueError(f"data: {len(data)} images, two half maps need two or more")
    halves = [
        reconstruct_posed(
            data.take(rows), rotations[rows], shifts_yx_px[rows], group, diameter_angstrom=diameter_angstrom
        )
        for rows in (torch.arange(0, len(data), 2), torch.arange(1, len(data), 2))
    ]
    fsc = fourier_shell_correlation(halves[0], halves[1])
    crossing = find_crossing(fsc, FSC_THRESHOLD, data.pixel_size_angstrom, data.box_size_px)
    found = crossing.resolution_angstrom
    return PoseResolution(
        fsc=tuple(float(value) for value in fsc),
        resolution_angstrom=found,
        resolution_px=None if found is None else found / data.pixel_size_angstrom,
    )


def reconstruct_posed(
    data: ParticleData,
    rotations: Float[Tensor, "b 3 3"],
    shifts_yx_px: Float[Tensor, "b 2"],
    group: Float[Tensor, "g 3 3"],
    *,
    diameter_angstrom: float,
) -> Float[Tensor, "n n n"]:
    """Return the map of images at given poses, inside a soft sphere of 1.2 diameters."""
    plane, box = data.plane, data.box_size_px
    grid = ReconstructionGrid(float(plane.radius.max()))
    centred = data.coefficients * plane.phases(-shifts_yx_px.flip(-1))
    sums = accumulate_posed(grid.zeros(), data.ctf * centred, data.ctf.square(), rotations, plane, group)
    solved = solve_map(sums, torch.full((grid.n_shells,), _SSNR), grid)
    radius_px = min(0.6 * diameter_angstrom / data.pixel_size_angstrom, 0.45 * box)
    return sums_to_volume(solved, box) * spherical_mask(box, radius_px, _MASK_EDGE_PX)
