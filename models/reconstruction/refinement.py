"""Gold-standard refinement: two halves that share nothing but a 30 Å start.

Each iteration aligns every image against its own half's map (global search first, local later), re-estimates the
noise per optics group and ring, the micrographs' scales and the images' weights (`image_fit`), reconstructs, and lets
the half-map FSC decide the radial prior and the radius that the next iteration may use. Symmetry is imposed by inserting each image at all group poses and by searching the asymmetric
unit. The images of one half never touch the other half's map, noise or mask.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from models.reconstruction.grids import random_rotations
from models.reconstruction.half_references import FLAT_SSNR, half_references, last_shell_above
from models.reconstruction.half_set import RELIABLE_FSC, STORED, HalfSet, WarmPoses
from models.reconstruction.image_fit import ImageGroups
from models.reconstruction.masks import solvent_sphere
from models.reconstruction.particle_data import DefocusModel, ParticleData
from models.reconstruction.pose_schedule import RefinementSettings, align_globally, align_locally
from models.reconstruction.pose_search import Hypotheses
from models.reconstruction.projector import cube_to_volume, volume_to_cube
from models.reconstruction.scoring import fast_products
from models.reconstruction.sufficient import ReconstructionGrid


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
    """Unfiltered half maps on the images' box; pose, scale, weight and defocus offset of every image in the order given.

    `scales` are those of the micrographs (mean 1), `weights` lie in [0, 1], `defocus_offset_angstrom` adds to u and v.
    """

    half1: Tensor
    half2: Tensor
    rotations: Tensor
    shifts_xy_px: Tensor
    log_likelihood_gain: Tensor
    scales: Tensor
    weights: Tensor
    defocus_offset_angstrom: Tensor
    fsc: Tensor
    n_iterations: int


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
        groups: ImageGroups | None = None,
        defocus: DefocusModel | None = None,
        solvent_mask: Float[Tensor, "n n n"] | None = None,
        n_threads: int = 1,
    ) -> None:
        """Take images with their half sets, a start map, and optionally poses of an earlier run.

        `groups` says which micrograph and optics an image is of; `defocus` has the defocus refined; `solvent_mask`
        replaces the soft sphere of the settings.
        """
        self.n_threads = n_threads
        self.settings, self.group, self.generator, self.check = settings, group, generator, check
        self.data = data
        self.indices = [(half_set == h).nonzero()[:, 0] for h in (1, 2)]
        for h, index in enumerate(self.indices, start=1):
            if index.numel() < 2:
                raise ValueError(f"half set {h}: {index.numel()} images, each half has at least two")
        box = data.box_size_px
        self.grid = ReconstructionGrid(float(data.plane.shell.max()))
        sphere = solvent_sphere(box, settings.mask_diameter_fraction)
        self.sphere = sphere if solvent_mask is None else solvent_mask
        own = ImageGroups.single(len(data)) if groups is None else groups
        first_shell = max(4.0, data.box_angstrom / settings.initial_resolution_angstrom)
        self.shell = min(first_shell, self.grid.max_shell)
        start = _low_passed(reference * self.sphere, self.shell, self.grid)
        self.halves = [
            HalfSet(
                data.take(i), start, None if warm is None else warm.take(i), self.grid, own.take(i),
                None if defocus is None else defocus.take(i),
            )
            for i in self.indices
        ]  # fmt: skip
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
        # The first map has the start's 30 Å shape: its amplitudes say nothing about single images yet.
        is_own_map = bool(self.fsc.any())
        reliable = float(max(last_shell_above(self.fsc, RELIABLE_FSC), 3)) if is_own_map else None

        def advance(half: HalfSet) -> None:
            self._align(half, turn, is_global=is_global)
            half.measure(self.shell, reliable, self.settings)
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

    def _align(self, half: HalfSet, turn: Tensor, *, is_global: bool) -> None:
        unknown = (~half.is_known).nonzero()[:, 0]
        known = half.is_known.nonzero()[:, 0]
        reference = half.reference(self.shell)

        def locally(index: Tensor) -> Hypotheses:
            poses = half.rotations[index], half.shifts[index]
            return align_locally(half.images(index), reference, self.settings, *poses, self.check)

        if is_global and unknown.numel():
            found = align_globally(
                half.images(unknown), reference, self.settings, self.group, turn, self.check
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
            stored |= {f"{name}{h}": value for name, value in half.progress().items()}
        return stored

    def resume(self, stored: Mapping[str, Tensor]) -> None:
        """Continue where `progress` was taken; sums, maps and radius follow from the poses."""
        for h, half in enumerate(self.halves, start=1):
            half.resume({name: stored[f"{name}{h}"] for name in STORED}, self.group)
        # A step updates the references before it counts itself.
        self.iteration = int(stored["iteration"]) - 1
        self._update()
        self.iteration = int(stored["iteration"])
        self.n_unimproved, self.best_shell = int(stored["n_unimproved"]), float(stored["best_shell"])
        self.generator.set_state(stored["generator"])

    def result(self) -> RefinementResult:
        """Return unfiltered half maps and poses in the input's order."""
        flat = torch.full((self.grid.n_shells,), FLAT_SSNR)
        return RefinementResult(
            half1=self.halves[0].volume(flat),
            half2=self.halves[1].volume(flat),
            rotations=self._joined([half.rotations for half in self.halves]),
            shifts_xy_px=self._joined([half.shifts for half in self.halves]),
            log_likelihood_gain=self._joined([half.gain for half in self.halves]),
            scales=self._joined([half.scales for half in self.halves]),
            weights=self._joined([half.weights for half in self.halves]),
            defocus_offset_angstrom=self._joined([half.defocus_offset for half in self.halves]),
            fsc=self.fsc,
            n_iterations=self.iteration,
        )

    def _joined(self, parts: list[Tensor]) -> Tensor:
        """Put both halves' rows into the order of the input; images of no half have zeros."""
        whole = parts[0].new_zeros((len(self.data), *parts[0].shape[1:]))
        for index, part in zip(self.indices, parts, strict=True):
            whole[index] = part
        return whole


def _low_passed(volume: Tensor, shell: float, grid: ReconstructionGrid) -> Tensor:
    """Keep shells up to `shell` (cosine edge of two shells): all that the halves may have in common."""
    radius = torch.arange(grid.n_shells).float()
    gain = 0.5 + 0.5 * torch.cos(math.pi * ((radius - shell) / 2.0).clamp(0.0, 1.0))
    return cube_to_volume(volume_to_cube(volume, grid.max_shell) * grid.spread(gain), volume.shape[-1])
