"""Finding a point group's axes in a map, and imposing the group in its conventional setting.

The map is searched in C1 first and symmetrised afterwards, never during the search (facts §2.3). A frame (R, o)
says: M̂(k) = V̂(Rᵀk) e^{2πi (Rᵀk)·o / n} has the group's axes where `models.fourier.point_groups` puts them and
its centre at the box centre. The score is the mean correlation of M with its rotated copies, over shells of equal
say, so that the envelope alone cannot win.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from models.reconstruction.grids import rotation_vector_to_matrix, so3_grid
from models.reconstruction.projector import (
    cube_half_side,
    read_cube,
    samples_to_volume,
    volume_to_cube,
)
from models.reconstruction.sufficient import ReconstructionGrid, correlate_shells

N_REFINED = 12
"""Coarse candidates that are refined; the coarse grid of 15° ranks the right one among the first few."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SymmetryFit:
    """The map in the group's setting.

    `rotation` and `offset_xyz_px` are the frame (R, o); a pose R_i of the old map is R_i Rᵀ for the new one.
    `score` is the mean correlation with the copies (1 = exactly symmetric), `fsc` compares the map with its
    symmetrised self per shell.
    """

    aligned: Tensor
    symmetrised: Tensor
    rotation: Tensor
    offset_xyz_px: Tensor
    score: float
    fsc: Tensor


class _SymmetryScore:
    """Reads the map's transform at the copies of a set of frequencies."""

    def __init__(self, cube: Tensor, group: Tensor, box_px: int, max_shell: float) -> None:
        h = int(max_shell)
        axis = torch.arange(-h, h + 1).float()
        z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
        k = torch.stack((x, y, z), dim=-1).reshape(-1, 3)
        radius = k.norm(dim=1)
        is_used = (
            (radius <= max_shell) & (radius >= 1.0) & ((k[:, 2] > 0) | ((k[:, 2] == 0) & (k[:, 1] >= 0)))
        )
        self.k, self.shell = k[is_used], radius[is_used].round().long()
        self.cube, self.group, self.box_px = cube, group, box_px

    def values(self, rotation: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
        """Return real and imaginary parts of M̂(g k) as `(g, k)`."""
        points = (self.k @ self.group.transpose(1, 2)) @ rotation  # rows: Rᵀ (g k)
        value = read_cube(self.cube, points)
        angle = (points @ offset) * (2.0 * math.pi / self.box_px)
        cos, sin = torch.cos(angle), torch.sin(angle)
        return value[0] * cos - value[1] * sin, value[0] * sin + value[1] * cos

    def score(self, rotation: Tensor, offset: Tensor) -> Tensor:
        """Return the mean over shells of the copies' mean pairwise correlation, in [-1, 1]."""
        re, im = self.values(rotation, offset)
        g = re.shape[0]
        n_shells = int(self.shell.max()) + 1
        total = torch.zeros(n_shells).index_add(0, self.shell, re.sum(0).square() + im.sum(0).square())
        own = torch.zeros(n_shells).index_add(0, self.shell, (re.square() + im.square()).sum(0))
        # |Σ_g M_g|² = Σ|M_g|² + Σ_{g≠h} Re M_g M_h*
        pair = (total[1:] - own[1:]) / ((g - 1) * own[1:].clamp_min(1e-30))
        return pair.mean()


def impose_symmetry(
    volume: Float[Tensor, "n n n"],
    group: Float[Tensor, "g 3 3"],
    *,
    max_shell: float,
    coarse_shell: float = 6.0,
) -> SymmetryFit:
    """Return the best frame of `find_frames`: the map snapped to the group's axes, and symmetrised."""
    return find_frames(volume, group, max_shell=max_shell, coarse_shell=coarse_shell, n_best=1)[0]


def find_frames(
    volume: Float[Tensor, "n n n"],
    group: Float[Tensor, "g 3 3"],
    *,
    max_shell: float,
    coarse_shell: float = 6.0,
    n_best: int = 3,
    n_refined: int = N_REFINED,
) -> list[SymmetryFit]:
    """Find the group's axes in `volume` using shells up to `max_shell`; return the best distinct frames.

    The caller judges `score`: below about 0.5 the map does not have the group.
    """
    n = int(volume.shape[-1])
    top_shell = n // 2 - 1
    cube = volume_to_cube(volume, top_shell)
    if group.shape[0] == 1:
        return [SymmetryFit(
            aligned=volume, symmetrised=volume, rotation=torch.eye(3), offset_xyz_px=torch.zeros(3),
            score=1.0, fsc=torch.ones(top_shell + 1),
        )]  # fmt: skip
    offset = _centre_of_mass(volume)
    candidates = so3_grid(2)
    coarse = _SymmetryScore(cube, group, n, min(coarse_shell, max_shell))
    fine = _SymmetryScore(cube, group, n, max_shell)
    with torch.no_grad():
        scores = torch.stack([coarse.score(r, offset) for r in candidates])
    found: list[tuple[float, Tensor, Tensor]] = []
    for index in scores.topk(n_refined).indices:
        rotation, moved, _ = _ascend(coarse, candidates[index], offset, n_steps=40)
        rotation, moved, score = _ascend(fine, rotation, moved, n_steps=25)
        found.append((score, rotation, moved))
    found.sort(key=lambda item: -item[0])
    distinct: list[tuple[float, Tensor, Tensor]] = []
    for score, rotation, moved in found:
        # Frames that differ by the group, or by a turn that permutes its axes, have the same score and centre.
        is_new = all(abs(score - s) > 0.01 or float((moved - o).norm()) > 1.0 for s, _, o in distinct)
        if is_new and len(distinct) < n_best:
            distinct.append((score, rotation, moved))
    return [_snap(volume, group, rotation, moved, score) for score, rotation, moved in distinct]


def symmetry_score(
    volume: Float[Tensor, "n n n"], group: Float[Tensor, "g 3 3"], *, max_shell: float
) -> float:
    """Return the mean correlation of a map with its copies about axes that lie where the group puts them."""
    if group.shape[0] == 1:
        return 1.0
    n = int(volume.shape[-1])
    scorer = _SymmetryScore(volume_to_cube(volume, n // 2 - 1), group, n, min(max_shell, n // 2 - 1))
    return float(scorer.score(torch.eye(3), torch.zeros(3)))


def _ascend(
    scorer: _SymmetryScore, rotation: Tensor, offset: Tensor, *, n_steps: int
) -> tuple[Tensor, Tensor, float]:
    """Climb the score by Adam on a rotation vector (rad) and an offset (in box/20, to a like scale)."""
    vector = torch.zeros(3, requires_grad=True)
    moved = torch.zeros(3, requires_grad=True)
    unit = scorer.box_px / 20.0
    optimiser = torch.optim.Adam([vector, moved], lr=0.03)
    for step in range(n_steps):
        for group in optimiser.param_groups:
            group["lr"] = 0.03 * (1 - step / n_steps) + 0.001
        optimiser.zero_grad()
        value = scorer.score(rotation_vector_to_matrix(vector) @ rotation, offset + unit * moved)
        (-value).backward()
        optimiser.step()
    with torch.no_grad():
        turned = rotation_vector_to_matrix(vector) @ rotation
        centre = offset + unit * moved
        return turned, centre.detach(), float(scorer.score(turned, centre))


def _snap(volume: Tensor, group: Tensor, rotation: Tensor, offset: Tensor, score: float) -> SymmetryFit:
    n = int(volume.shape[-1])
    top_shell = n // 2 - 1
    aligned = turn_volume(volume, rotation, offset)
    copies = torch.stack([turn_volume(aligned, g, torch.zeros(3)) for g in group])
    symmetrised = copies.mean(0)
    grid = ReconstructionGrid(top_shell)
    fsc = correlate_shells(volume_to_cube(aligned, top_shell), volume_to_cube(symmetrised, top_shell), grid)
    return SymmetryFit(
        aligned=aligned,
        symmetrised=symmetrised,
        rotation=rotation,
        offset_xyz_px=offset,
        score=score,
        fsc=fsc,
    )


def turn_volume(
    volume: Float[Tensor, "n n n"], rotation: Float[Tensor, "3 3"], offset_xyz_px: Float[Tensor, "3"]
) -> Float[Tensor, "n n n"]:
    """Return M(x) = V(Rᵀx + o): the map turned by R after moving its point `o` to the box centre."""
    n = int(volume.shape[-1])
    top_shell = n // 2 - 1
    cube = volume_to_cube(volume, top_shell)
    h = cube_half_side(top_shell)
    axis = torch.arange(-h, h + 1).float() / 2.0
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    points = torch.stack((x, y, z), dim=-1).reshape(1, -1, 3) @ rotation
    value = read_cube(cube, points)[:, 0]
    angle = (points[0] @ offset_xyz_px) * (2.0 * math.pi / n)
    cos, sin = torch.cos(angle), torch.sin(angle)
    turned = torch.stack((value[0] * cos - value[1] * sin, value[0] * sin + value[1] * cos))
    inside = points[0].norm(dim=1) <= top_shell
    return samples_to_volume((turned * inside).view_as(cube), n)


def _centre_of_mass(volume: Tensor) -> Tensor:
    n = int(volume.shape[-1])
    axis = torch.arange(n).float() - n // 2
    # Half of the maximum keeps noise and the mask's rim out of the sum.
    mass = (volume - 0.5 * volume.max()).clamp_min(0.0)
    total = mass.sum().clamp_min(1e-20)
    return torch.stack(
        (
            (mass.sum((0, 1)) * axis).sum() / total,
            (mass.sum((0, 2)) * axis).sum() / total,
            (mass.sum((1, 2)) * axis).sum() / total,
        )
    )
