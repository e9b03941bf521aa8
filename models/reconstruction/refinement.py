"""Gold-standard refinement: two halves that share nothing but a 30 Å start.

Each iteration aligns every image against its own half's map (global search first, local later), re-estimates the
noise per ring, reconstructs, and lets the half-map FSC decide the radial prior and the radius that the next
iteration may use. Symmetry is imposed by inserting each image at all group poses and by searching the asymmetric
unit. The images of one half never touch the other half's map, noise or mask.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from models.reconstruction.grids import random_rotations
from models.reconstruction.half_references import FLAT_SSNR, half_references
from models.reconstruction.online_em import soft_sphere
from models.reconstruction.particle_data import ParticleData
from models.reconstruction.pose_schedule import (
    Reference,
    RefinementSettings,
    align_globally,
    align_locally,
)
from models.reconstruction.pose_search import Hypotheses
from models.reconstruction.projector import cube_to_volume, extract_slices, sums_to_volume, volume_to_cube
from models.reconstruction.scoring import fast_products, weighted_images
from models.reconstruction.sufficient import ReconstructionGrid, accumulate_posed, ring_mean, solve_map


@dataclass(frozen=True, slots=True, kw_only=True)
class RefinementProgress:
    """What an iteration gave: FSC of the half maps in the solvent-masked sphere, and its 0.143 resolution."""

    iteration: int
    n_iterations: int
    resolution_angstrom: float
    fsc: Tensor
    is_global: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class RefinementResult:
    """Unfiltered half maps on the images' box and the pose of every image (in the order given)."""

    half1: Tensor
    half2: Tensor
    rotations: Tensor
    shifts_xy_px: Tensor
    log_likelihood_gain: Tensor
    fsc: Tensor
    n_iterations: int


@dataclass(frozen=True, slots=True)
class WarmPoses:
    """Poses from an earlier run; `is_known` says for which images they hold (the rest is searched globally)."""

    rotations: Tensor
    shifts_xy_px: Tensor
    is_known: Bool[Tensor, "b"]


class _Half:
    """One half set: images, poses, noise and map. Nothing in here is shared with the other half."""

    def __init__(
        self, data: ParticleData, volume: Tensor, warm: WarmPoses | None, grid: ReconstructionGrid
    ) -> None:
        n = len(data)
        self.data, self.grid = data, grid
        self.noise = data.mean_power().clamp_min(1e-20)
        self.cube = volume_to_cube(match_scale(volume, data, grid), grid.max_shell)
        self.rotations = torch.eye(3).repeat(n, 1, 1) if warm is None else warm.rotations.clone()
        self.shifts = torch.zeros((n, 2)) if warm is None else warm.shifts_xy_px.clone()
        self.is_known = torch.zeros(n, dtype=torch.bool) if warm is None else warm.is_known.clone()
        self.gain = torch.zeros(n)
        self.sums = grid.zeros()

    def inverse_noise(self) -> Float[Tensor, "k"]:
        inverse = (1.0 / self.noise)[self.data.plane.shell]
        inverse[0] = 0.0
        return inverse

    def adopt(self, index: Tensor, found: Hypotheses) -> None:
        rotations, shifts = found.best
        self.rotations[index], self.shifts[index] = rotations, shifts
        self.gain[index] = found.scores[:, 0]

    def estimate_noise(self, shell: float) -> None:
        self.noise = residual_noise(self.data, self.cube, self.rotations, self.shifts, shell)

    def reconstruct(self, group: Float[Tensor, "g 3 3"], index: Tensor | None = None) -> None:
        """Accumulate all images (or those at `index`) at their poses."""
        rows = torch.arange(len(self.data)) if index is None else index
        data, plane = self.data.take(rows), self.data.plane
        images, weights = weighted_images(data, (1.0 / self.noise)[plane.shell])
        images = images * plane.phases(self.shifts[rows])
        self.sums = accumulate_posed(self.grid.zeros(), images, weights, self.rotations[rows], plane, group)

    def volume(self, ssnr: Float[Tensor, "s"]) -> Float[Tensor, "n n n"]:
        """Return this half's map under a radial prior."""
        return sums_to_volume(solve_map(self.sums, ssnr, self.grid), self.data.box_size_px)


class Refinement:
    """A refinement in progress; `step()` is one iteration over all images of both halves."""

    def __init__(
        self,
        data: ParticleData,
        half_set: Int[Tensor, "b"],
        reference: Float[Tensor, "n n n"],
        settings: RefinementSettings,
        group: Float[Tensor, "g 3 3"],
        generator: torch.Generator,
        warm: WarmPoses | None = None,
        check: Callable[[], None] | None = None,
        *,
        n_threads: int = 1,
    ) -> None:
        self.n_threads = n_threads
        self.settings, self.group, self.generator, self.check = settings, group, generator, check
        self.data = data
        self.indices = [(half_set == h).nonzero()[:, 0] for h in (1, 2)]
        for h, index in enumerate(self.indices, start=1):
            if index.numel() < 2:
                raise ValueError(f"half set {h}: {index.numel()} images, each half has at least two")
        box = data.box_size_px
        self.grid = ReconstructionGrid(float(data.plane.shell.max()))
        self.sphere = soft_sphere(box, settings.mask_diameter_fraction * box, 0.06 * box)
        first_shell = max(4.0, data.box_angstrom / settings.initial_resolution_angstrom)
        self.shell = min(first_shell, self.grid.max_shell)
        start = _low_passed(reference * self.sphere, self.shell, self.grid)
        self.halves = [
            _Half(data.take(i), start, None if warm is None else _take_warm(warm, i), self.grid)
            for i in self.indices
        ]
        self.iteration = 0
        self.fsc = torch.zeros(self.grid.n_shells)
        self.n_unimproved, self.best_shell = 0, 0.0
        if warm is not None and all(int(half.is_known.sum()) >= 20 for half in self.halves):
            # Known poses say more than a 30 Å shape: each half starts from its own map at them.
            for half in self.halves:
                half.reconstruct(group, half.is_known.nonzero()[:, 0])
            self._update()
            self.n_unimproved = 0

    @property
    def is_done(self) -> bool:
        """Whether the schedule has ended, or local search has stopped paying: two iterations without gain."""
        is_all_known = all(bool(half.is_known.all()) for half in self.halves)
        is_local = is_all_known or self.iteration > self.settings.n_global
        return self.iteration >= self.n_iterations or (is_local and self.n_unimproved >= 2)

    @property
    def n_iterations(self) -> int:
        """How many iterations the schedule has."""
        return self.settings.n_global + self.settings.n_local

    @property
    def resolution_angstrom(self) -> float:
        """The resolution of the radius in use."""
        return self.data.box_angstrom / self.shell

    def step(self) -> RefinementProgress:
        """Align both halves, reconstruct them, and set prior and radius from their FSC."""
        is_global = self.iteration < self.settings.n_global
        turn = random_rotations(1, self.generator)[0]

        def advance(half: _Half) -> None:
            self._align(half, turn, is_global=is_global)
            half.estimate_noise(self.shell)
            half.reconstruct(self.group)

        with fast_products(), ThreadPoolExecutor(max_workers=min(2, max(1, self.n_threads))) as pool:
            list(pool.map(advance, self.halves))
        self._update()
        self.iteration += 1
        return RefinementProgress(
            iteration=self.iteration,
            n_iterations=self.n_iterations,
            resolution_angstrom=self.resolution_angstrom,
            fsc=self.fsc,
            is_global=is_global,
        )

    def _align(self, half: _Half, turn: Tensor, *, is_global: bool) -> None:
        unknown = (~half.is_known).nonzero()[:, 0]
        known = half.is_known.nonzero()[:, 0]
        reference = Reference(half.cube, half.inverse_noise(), self.shell)

        def locally(index: Tensor) -> Hypotheses:
            poses = half.rotations[index], half.shifts[index]
            return align_locally(half.data.take(index), reference, self.settings, *poses, self.check)

        if is_global and unknown.numel():
            found = align_globally(
                half.data.take(unknown), reference, self.settings, self.group, turn, self.check
            )
            half.adopt(unknown, found)
        elif unknown.numel():
            half.adopt(unknown, locally(unknown))
        if known.numel():
            half.adopt(known, locally(known))

    def _update(self) -> None:
        found = half_references(
            lambda half, ssnr: self.halves[half - 1].volume(ssnr),
            self.grid,
            self.data.pixel_size_angstrom,
            self.sphere,
            is_first=self.iteration < 1,
        )
        self.fsc, self.shell = found.fsc, found.shell
        self.n_unimproved = 0 if found.shell > self.best_shell else self.n_unimproved + 1
        self.best_shell = max(self.best_shell, found.shell)
        for half, cube in zip(self.halves, found.cubes, strict=True):
            half.cube = cube

    def progress(self) -> dict[str, Tensor]:
        """Return what `resume` needs: poses and noise of both halves, the schedule's place, the generator's state."""
        stored = {
            "iteration": torch.tensor(self.iteration),
            "n_unimproved": torch.tensor(self.n_unimproved),
            "best_shell": torch.tensor(self.best_shell),
            "generator": self.generator.get_state(),
        }
        for h, half in enumerate(self.halves, start=1):
            stored |= {
                f"rotations{h}": half.rotations,
                f"shifts{h}": half.shifts,
                f"gain{h}": half.gain,
                f"is_known{h}": half.is_known,
                f"noise{h}": half.noise,
            }
        return stored

    def resume(self, stored: Mapping[str, Tensor]) -> None:
        """Continue where `progress` was taken; sums, maps and radius follow from the poses."""
        for h, half in enumerate(self.halves, start=1):
            half.rotations, half.shifts = stored[f"rotations{h}"].clone(), stored[f"shifts{h}"].clone()
            half.gain, half.is_known = stored[f"gain{h}"].clone(), stored[f"is_known{h}"].clone()
            half.noise = stored[f"noise{h}"].clone()
            half.reconstruct(self.group)
        # A step updates the references before it counts itself.
        self.iteration = int(stored["iteration"]) - 1
        self._update()
        self.iteration = int(stored["iteration"])
        self.n_unimproved, self.best_shell = int(stored["n_unimproved"]), float(stored["best_shell"])
        self.generator.set_state(stored["generator"])

    def result(self) -> RefinementResult:
        """Return unfiltered half maps and poses in the input's order."""
        n = len(self.data)
        rotations, shifts, gain = torch.eye(3).repeat(n, 1, 1), torch.zeros((n, 2)), torch.zeros(n)
        for index, half in zip(self.indices, self.halves, strict=True):
            rotations[index], shifts[index], gain[index] = half.rotations, half.shifts, half.gain
        flat = torch.full((self.grid.n_shells,), FLAT_SSNR)
        return RefinementResult(
            half1=self.halves[0].volume(flat),
            half2=self.halves[1].volume(flat),
            rotations=rotations,
            shifts_xy_px=shifts,
            log_likelihood_gain=gain,
            fsc=self.fsc,
            n_iterations=self.iteration,
        )


def _take_warm(warm: WarmPoses, index: Tensor) -> WarmPoses:
    return WarmPoses(warm.rotations[index], warm.shifts_xy_px[index], warm.is_known[index])


def residual_noise(
    data: ParticleData,
    cube: Float[Tensor, "2 d d d"],
    rotations: Float[Tensor, "b 3 3"],
    shifts_xy_px: Float[Tensor, "b 2"],
    shell: float,
) -> Float[Tensor, "s"]:
    """Return σ² per ring: the mean residual power up to `shell`, the images' own power beyond."""
    near = data.within(shell)
    total = torch.zeros(int(near.plane.shell.max()) + 1)
    for index in torch.arange(len(near)).split(512):
        part = near.take(index)
        slices = extract_slices(cube, rotations[index], near.plane)
        model = part.ctf * slices * near.plane.phases(-shifts_xy_px[index])
        residual = (part.coefficients - model).abs().square()
        total += len(part) * ring_mean(residual, near.plane.shell, total.numel())
    noise = data.mean_power().clamp_min(1e-20)
    noise[: total.numel()] = (total / len(near)).clamp_min(1e-20)
    return noise


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


def _low_passed(volume: Tensor, shell: float, grid: ReconstructionGrid) -> Tensor:
    """Keep shells up to `shell` (cosine edge of two shells): all that the halves may have in common."""
    radius = torch.arange(grid.n_shells).float()
    gain = 0.5 + 0.5 * torch.cos(math.pi * ((radius - shell) / 2.0).clamp(0.0, 1.0))
    return cube_to_volume(volume_to_cube(volume, grid.max_shell) * grid.spread(gain), volume.shape[-1])
