"""One half set of a refinement: its images, what is known of each of them, its noise and its map.

Nothing in here is shared with the other half.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from models.reconstruction.defocus_search import search_defocus
from models.reconstruction.image_fit import (
    ImageGroups,
    fit_rings,
    image_weights,
    micrograph_scales,
    noise_per_group,
)
from models.reconstruction.particle_data import DefocusModel, ParticleData
from models.reconstruction.pose_schedule import Reference, RefinementSettings
from models.reconstruction.pose_search import Hypotheses
from models.reconstruction.projector import sums_to_volume, volume_to_cube
from models.reconstruction.scoring import weighted_images
from models.reconstruction.sufficient import ReconstructionGrid, accumulate_posed, solve_map

RELIABLE_FSC = 0.5
"""Scales are measured where half of a half map's power is signal: the map's own noise is in every image's favour."""

STORED = (
    "rotations", "shifts", "gain", "is_known", "noise", "scales", "weights", "defocus_offset",
)  # fmt: skip
"""What of a half cannot be computed again from its images."""


@dataclass(frozen=True, slots=True)
class WarmPoses:
    """Poses from an earlier run; `is_known` says for which images they hold (the rest is searched globally)."""

    rotations: Tensor
    shifts_xy_px: Tensor
    is_known: Bool[Tensor, "b"]

    def take(self, index: Tensor) -> WarmPoses:
        """Return the poses of the images at `index`."""
        return WarmPoses(self.rotations[index], self.shifts_xy_px[index], self.is_known[index])


class HalfSet:
    """Images, poses, scales, weights, noise and map of one half."""

    def __init__(
        self,
        data: ParticleData,
        volume: Tensor,
        warm: WarmPoses | None,
        grid: ReconstructionGrid,
        groups: ImageGroups,
        defocus: DefocusModel | None,
    ) -> None:
        n = len(data)
        self.given, self.grid, self.groups, self.defocus = data, grid, groups, defocus
        self.data = data
        self.noise = data.mean_power().clamp_min(1e-20)[None].repeat(int(groups.optics.max()) + 1, 1)
        self.cube = volume_to_cube(match_scale(volume, data, grid), grid.max_shell)
        self.rotations = torch.eye(3).repeat(n, 1, 1) if warm is None else warm.rotations.clone()
        self.shifts = torch.zeros((n, 2)) if warm is None else warm.shifts_xy_px.clone()
        self.is_known = torch.zeros(n, dtype=torch.bool) if warm is None else warm.is_known.clone()
        self.gain, self.defocus_offset = torch.zeros(n), torch.zeros(n)
        self.scales, self.weights = torch.ones(n), torch.ones(n)
        self.sums = grid.zeros()

    def reference(self, shell: float) -> Reference:
        """Return what images are aligned against."""
        inverse = (1.0 / self._mean_noise())[self.data.plane.shell]
        inverse[0] = 0.0
        return Reference(self.cube, inverse, shell)

    def images(self, index: Tensor) -> ParticleData:
        """Return images at one noise spectrum: those of other optics groups are whitened to the mean one."""
        few = self.data.take(index)
        if len(self.noise) == 1:
            return few
        ratio = torch.sqrt(self._mean_noise() / self.noise)[self.groups.optics[index]]
        return few.times(ratio[:, few.plane.shell])

    def adopt(self, index: Tensor, found: Hypotheses) -> None:
        """Take over the best poses found for the images at `index`."""
        rotations, shifts = found.best
        self.rotations[index], self.shifts[index] = rotations, shifts
        self.gain[index] = found.scores[:, 0]

    def measure(self, shell: float, reliable_shell: float | None, settings: RefinementSettings) -> None:
        """Estimate noise and, where the map is `reliable_shell` good already, defocus, scales and weights."""
        if self.defocus is not None and reliable_shell is not None:
            self.defocus_offset = search_defocus(
                self.given, self.defocus, self.scales, self.cube, self._inverse_rings(), self.rotations,
                self.shifts, shell,
            )  # fmt: skip
            self._apply()
        fit = fit_rings(self.data, self.cube, self.rotations, self.shifts, shell).unscaled(self.scales)
        self.noise = noise_per_group(fit, self.data, self.groups.optics, self.scales, self.weights)
        if reliable_shell is None:
            return
        inverse = self._inverse_rings()
        if settings.estimate_scale:
            self.scales = micrograph_scales(
                fit, inverse, self.groups.micrograph, self.weights, reliable_shell
            )
        if settings.weigh_images:
            self.weights = image_weights(fit, inverse, self.scales, shell)
        self._apply()
        self.noise = noise_per_group(fit, self.data, self.groups.optics, self.scales, self.weights)

    def reconstruct(self, group: Float[Tensor, "g 3 3"], index: Tensor | None = None) -> None:
        """Accumulate all images (or those at `index`) at their poses."""
        rows = torch.arange(len(self.data)) if index is None else index
        data, plane = self.images(rows), self.data.plane
        images, weights = weighted_images(data, (1.0 / self._mean_noise())[plane.shell])
        own = self.weights[rows][:, None]
        images, weights = own * images * plane.phases(self.shifts[rows]), own * weights
        self.sums = accumulate_posed(self.grid.zeros(), images, weights, self.rotations[rows], plane, group)

    def volume(self, ssnr: Float[Tensor, "s"]) -> Float[Tensor, "n n n"]:
        """Return this half's map under a radial prior."""
        return sums_to_volume(solve_map(self.sums, ssnr, self.grid), self.data.box_size_px)

    def progress(self) -> dict[str, Tensor]:
        """Return all that cannot be computed again from the images."""
        return {name: getattr(self, name) for name in STORED}

    def resume(self, stored: Mapping[str, Tensor], group: Float[Tensor, "g 3 3"]) -> None:
        """Take up what `progress` gave; sums follow from the poses."""
        for name in STORED:
            setattr(self, name, stored[name].clone())
        self._apply()
        self.reconstruct(group)

    def _apply(self) -> None:
        """Put scales and defocus into the CTF that the images are compared with."""
        ctf = self.given.ctf
        if self.defocus is not None:
            ctf = self.defocus.ctf_at(ctf, self.given.plane.radius, self.defocus_offset)
        self.data = self.given.with_ctf(ctf * self.scales[:, None])

    def _mean_noise(self) -> Float[Tensor, " s"]:
        share = torch.bincount(self.groups.optics, minlength=len(self.noise)).float()
        mean: Tensor = (share[:, None] * self.noise).sum(0) / share.sum()
        return mean

    def _inverse_rings(self) -> Float[Tensor, "b s"]:
        return (1.0 / self.noise)[self.groups.optics]


def match_scale(
    reference: Float[Tensor, "n n n"], data: ParticleData, grid: ReconstructionGrid, n_shells: int = 3
) -> Float[Tensor, "n n n"]:
    """Scale a centred map of unknown units to the images, without poses.

    The mean image over uniform views is the projection of the map's spherical average times the CTF; the factor is
    the least-squares one over the lowest shells, where that average is far above the noise and the particles'
    unknown shifts hardly blur it (they make the factor up to a quarter too small). A map whose contrast is
    the images' opposite would get a negative factor and is refused.
    """
    cube = volume_to_cube(reference, grid.max_shell)
    average = grid.shell_sum(cube[0]) / grid.counts.clamp_min(1.0)
    near = data.within(min(float(n_shells), grid.max_shell))
    model = average[near.plane.shell]
    weight = (near.plane.shell > 0).float()
    observed = (near.ctf * near.coefficients.real).mean(0)
    expected = near.ctf.square().mean(0) * model
    factor = float((weight * observed * model).sum() / (weight * expected * model).sum().clamp_min(1e-30))
    if factor <= 0:
        raise ValueError(f"reference: scale {factor:.3g}, the map's contrast agrees with the images'")
    return reference * factor
