"""Initial model from nothing: online EM over all poses, on Fourier sufficient statistics.

Every iteration scores a batch against projections at a randomly turned SO(3) grid, and blends the posterior's
slice sums into running accumulators (two sub-halves, whose shell correlation gives the radial prior). Resolution
and grid grow, temperature falls to one at half time. What decides convergence, and how it was measured, is in
`README.md`; the schedule follows facts/reconstruction.md §2.2. Randomness comes from the generator alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from models.reconstruction.expectation import PRUNING_SHELL, CoarseSearch, sum_slices
from models.reconstruction.grids import asymmetric_unit, random_rotations, shift_grid, so3_grid
from models.reconstruction.masks import solvent_sphere
from models.reconstruction.particle_data import ParticleData
from models.reconstruction.projector import (
    HalfPlane,
    cube_to_volume,
    insert_slices,
    sums_to_volume,
    volume_to_cube,
)
from models.reconstruction.scoring import (
    Projections,
    ShiftSearch,
    block_size,
    fast_products,
    score_block,
    shifted_matrix,
    weighted_images,
)
from models.reconstruction.sufficient import ReconstructionGrid, correlate_shells, solve_map, ssnr_of
from models.reconstruction.symmetry import turn_volume

RISING = 0.005
"""A run whose held-out evidence rose by more than this share in its last block has not arrived yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OnlineEmSettings:
    """The schedule. Defaults converged in all prototype runs; each weaker variant failed somewhere.

    Shells count cycles per box, so they suit a particle that fills about half to two thirds of its box.
    `mask_diameter_fraction` is the soft sphere's diameter over the box.
    """

    n_iterations: int = 120
    first_batch: int = 200
    last_batch: int = 600
    first_shell: float = 4.0
    last_shell: float = 14.0
    fine_grid_from_shell: float = 7.5
    initial_sample_fraction: float = 0.011
    final_sample_fraction: float = 2e-4
    mask_diameter_fraction: float = 0.85
    shift_step_fraction: float = 1.0 / 32.0
    shift_sigma_fraction: float = 3.0 / 64.0
    n_held_out: int = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class EmProgress:
    """What an iteration tells: the resolution in use and the sub-halves' agreement."""

    iteration: int
    n_iterations: int
    shell: float
    inverse_temperature: float
    fsc: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class EmResult:
    """One start's map (on the EM's own small box), and the log evidence of each held-out image (nats)."""

    volume: Tensor
    cube: Tensor
    max_shell: float
    evidence: Tensor
    inverse_noise: Tensor
    fsc: Tensor

    @property
    def log_evidence(self) -> float:
        """The mean over held-out images: what starts are ranked by."""
        return float(self.evidence.double().mean())


class OnlineEm:
    """One start of the online EM; `step()` is one iteration."""

    def __init__(
        self,
        data: ParticleData,
        settings: OnlineEmSettings,
        generator: torch.Generator,
        group: Float[Tensor, "g 3 3"] | None = None,
        start: Float[Tensor, "n n n"] | None = None,
    ) -> None:
        self.settings, self.generator = settings, generator
        self.group = torch.eye(3)[None] if group is None else group
        self.max_shell = min(settings.last_shell, data.box_size_px // 2 - 1)
        self.box_px = 2 * (int(self.max_shell) + 2)
        self.data = data.within(self.max_shell)
        self.grid = ReconstructionGrid(self.max_shell)
        noise = self.data.mean_power().clamp_min(1e-20)
        self.inverse_noise = (1.0 / noise)[self.data.plane.shell]
        self.inverse_noise[0] = 0.0  # the mean carries the background, not the particle
        n = len(data)
        held = held_out_rows(n, settings)
        is_training = torch.ones(n, dtype=torch.bool)
        is_training[held] = False
        self.held_out, self.training = held, is_training.nonzero()[:, 0]
        self.queue = torch.empty(0, dtype=torch.long)
        self.sums = self.grid.zeros(6)
        self.coarse, self.fine = so3_grid(1), so3_grid(2)
        self.mask = solvent_sphere(self.box_px, settings.mask_diameter_fraction)
        self.iteration = 0
        self.fsc = torch.zeros(self.grid.n_shells)
        self.volume = torch.zeros((self.box_px,) * 3)
        if start is None:
            self.cube = self._starting_cube()
        else:
            # A map to polish enters at half time: untempered, free of sign, its radius about to be the last.
            self.iteration = settings.n_iterations // 2
            self.cube = volume_to_cube(start, self.max_shell)

    # -- schedule -----------------------------------------------------------------------------------------------

    def _fraction(self) -> float:
        return self.iteration / max(1, self.settings.n_iterations)

    def shell(self) -> float:
        """Return the current radius: it marches between 10 % and 70 % of the run."""
        s = self.settings
        ramp = min(1.0, max(0.0, (self._fraction() - 0.1) / 0.6))
        return min(self.max_shell, s.first_shell + (s.last_shell - s.first_shell) * ramp)

    def target_fraction(self) -> float:
        """Return the share of poses that should matter: falls geometrically until half time, then 0 (untempered)."""
        s, ramp = self.settings, self._fraction() / 0.5
        if ramp >= 1.0:
            return 0.0
        return float(s.initial_sample_fraction ** (1 - ramp) * s.final_sample_fraction**ramp)

    def batch_size(self) -> int:
        """Return the batch: a fifth to a third of a small set, the settings' sizes for a large one."""
        n, s = self.training.numel(), self.settings
        first, last = min(s.first_batch, max(1, n // 4)), min(s.last_batch, max(1, n // 2))
        return int(first + (last - first) * min(1.0, self._fraction() / 0.3))

    def next_batch(self) -> Int[Tensor, " b"]:
        """Return the rows of the next batch: all training images in random order, again and again."""
        size = self.batch_size()
        while self.queue.numel() < size:
            order = torch.randperm(self.training.numel(), generator=self.generator)
            self.queue = torch.cat((self.queue, self.training[order]))
        batch, self.queue = self.queue[:size], self.queue[size:]
        return batch

    # -- steps --------------------------------------------------------------------------------------------------

    def _starting_cube(self) -> Tensor:
        """Back-project one batch at random angles and add as much noise: a blob of the right size and scale."""
        batch = self.data.take(self.next_batch())
        images, weights = weighted_images(batch, self.inverse_noise)
        rotations = random_rotations(len(batch), self.generator)
        channels = torch.stack((images.real, images.imag, weights))
        sums = self.grid.zeros()
        for element in self.group:
            sums = insert_slices(sums, channels, rotations @ element, batch.plane)
        shells = torch.arange(self.grid.n_shells)
        ssnr = torch.where(shells <= self.settings.first_shell, 1.0, 0.0)
        volume = sums_to_volume(solve_map(sums, ssnr, self.grid), self.box_px)
        noise = torch.randn(volume.shape, generator=self.generator)
        low = volume_to_cube(noise, self.max_shell) * self.grid.spread(ssnr)
        noise = cube_to_volume(low, self.box_px)
        if len(self.group) > 1:
            noise = torch.stack([turn_volume(noise, g, torch.zeros(3)) for g in self.group]).mean(0)
        noise = noise * (volume.std() / noise.std())
        return volume_to_cube((volume + noise).clamp_min(0.0) * self.mask, self.max_shell)

    def step(self) -> EmProgress:
        """Run one iteration: E-step on a batch, M-step into the accumulators, new map."""
        shell, is_fine = self.shell(), self.shell() >= self.settings.fine_grid_from_shell
        search = _shift_search(self.data.box_size_px, self.settings, is_fine=is_fine)
        turn = random_rotations(1, self.generator)[0]
        rotations = asymmetric_unit((self.fine if is_fine else self.coarse) @ turn, self.group)
        batch = self.data.take(self.next_batch()).within(shell)
        projections = Projections.of_grid(self.cube, rotations, batch.plane)
        half = len(batch) // 2
        beta = self._find_temperature(batch, projections, search)
        coarse = coarse_search(batch.plane, self.settings) if is_fine else None
        inverse_noise = self.inverse_noise[: len(batch.plane)]
        halves = torch.cat([
            sum_slices(batch.take(part), inverse_noise, projections, search, beta, coarse)
            for part in (torch.arange(half), torch.arange(half, len(batch)))
        ])  # fmt: skip
        used = ((halves[2] + halves[5]).amax(1) > 0).nonzero()[:, 0]
        new, turned = self.grid.zeros(6), rotations[used]
        for element in self.group:
            new = insert_slices(new, halves[:, used], turned @ element, batch.plane)
        scale = self.training.numel() / len(batch)
        # The running sums never reach back further than one pass over the images: older maps made older sums.
        eta = max((self.iteration + 2) ** -0.6, 0.05, 1.0 / scale)
        self.sums = (1 - eta) * self.sums + (eta * scale) * new
        self.update_map(shell)
        self.iteration += 1
        return EmProgress(
            iteration=self.iteration,
            n_iterations=max(self.settings.n_iterations, self.iteration),
            shell=shell,
            inverse_temperature=beta,
            fsc=self.fsc,
        )

    def run_to(self, iteration: int, on_progress: Callable[[EmProgress], None] | None = None) -> None:
        """Run until `iteration` are done; `on_progress` may raise."""
        while self.iteration < iteration:
            progress = self.step()
            if on_progress is not None:
                on_progress(progress)

    def run_to_end(self, on_progress: Callable[[EmProgress], None] | None = None) -> None:
        """Run the schedule, then on in blocks (as long again at most) while the held-out evidence keeps rising."""
        n = self.settings.n_iterations
        self.run_to(n, on_progress)
        evidence = float(self.held_out_evidence().mean())
        while self.iteration < 2 * n:
            self.run_to(self.iteration + max(1, n // 8), on_progress)
            before, evidence = evidence, float(self.held_out_evidence().mean())
            if evidence < before + RISING * abs(before):
                break

    def _find_temperature(self, batch: ParticleData, projections: Projections, search: ShiftSearch) -> float:
        """Return β ≤ 1 at which the target share of the poses carries an image's posterior (exp of its entropy)."""
        target = self.target_fraction()
        if target == 0.0:
            return 1.0
        few = batch.take(torch.arange(min(24, len(batch))))
        images, weights = weighted_images(few, self.inverse_noise[: len(few.plane)])
        matrix = shifted_matrix(images, few.plane.phases(search.shifts_xy_px))
        flat = ShiftSearch(search.shifts_xy_px, torch.zeros_like(search.log_prior))
        scores = score_block(matrix, weights, projections, flat, 1.0).flatten(1)
        low, high = math.log(1e-4), 0.0
        if _share_of_poses(scores) >= target:
            return 1.0
        for _ in range(10):
            middle = 0.5 * (low + high)
            is_broad = _share_of_poses(scores * math.exp(middle)) > target
            low, high = (middle, high) if is_broad else (low, middle)
        return math.exp(0.5 * (low + high))

    def update_map(self, shell: float) -> None:
        """Solve the sub-halves for the radial prior and the sum for the map; constrain it in real space."""
        in_use = torch.arange(self.grid.n_shells) <= shell
        one = torch.where(in_use, 2.0, 0.0)
        halves = [
            volume_to_cube(
                sums_to_volume(solve_map(s, one, self.grid), self.box_px) * self.mask, self.max_shell
            )
            for s in (self.sums[:3], self.sums[3:])
        ]
        self.fsc = correlate_shells(halves[0], halves[1], self.grid)
        ssnr = torch.where(in_use, ssnr_of(self.fsc, n_halves=2), torch.zeros(()))
        volume = sums_to_volume(solve_map(self.sums[:3] + self.sums[3:], ssnr, self.grid), self.box_px)
        if self._fraction() < 0.5:
            volume = volume.clamp_min(0.0)
        self.volume = volume * self.mask
        self.cube = volume_to_cube(self.volume, self.max_shell)

    def held_out_evidence(self) -> Float[Tensor, " h"]:
        """Return each held-out image's log marginal likelihood over no particle at all, at β = 1 (nats)."""
        return evidence_of(self.data.take(self.held_out), self.cube, self.inverse_noise, self.settings)

    def full_size_volume(self) -> Float[Tensor, "n n n"]:
        """Return the map on the images' box."""
        return cube_to_volume(self.cube, self.data.box_size_px)

    def result(self) -> EmResult:
        """Return the map with its held-out evidence."""
        return EmResult(
            volume=self.volume,
            cube=self.cube,
            max_shell=self.max_shell,
            evidence=self.held_out_evidence(),
            inverse_noise=self.inverse_noise,
            fsc=self.fsc,
        )


def _share_of_poses(scores: Float[Tensor, "b p"]) -> float:
    """Return the mean over images of exp(entropy) of the softmax, as a share of all poses."""
    log_p = torch.log_softmax(scores, dim=1)
    entropy = -(log_p.exp() * log_p).sum(1)
    return float((entropy - math.log(scores.shape[1])).exp().mean())


def held_out_rows(n_images: int, settings: OnlineEmSettings) -> Int[Tensor, " h"]:
    """Return which images no start is trained on: the same for all of them, a fixed stride through the set."""
    n_held_out = min(settings.n_held_out, n_images // 5)
    return torch.linspace(0, n_images - 1, n_held_out).round().long()


def evidence_of(
    data: ParticleData,
    cube: Float[Tensor, "2 d d d"],
    inverse_noise: Float[Tensor, "k"],
    settings: OnlineEmSettings,
) -> Float[Tensor, " b"]:
    """Return log ∫ p(image | pose) / p(image | nothing) over the fine grid and its shifts, per image in nats.

    `data` and `inverse_noise` reach as far as the cube. For noise of that variance and a map that has not seen the
    image, the ratio is 1 on average, so that its logarithm is below 0 on average, whatever the map.
    """
    rotations = so3_grid(2)
    search = _shift_search(data.box_size_px, settings, is_fine=True)
    projections = Projections.of_grid(cube, rotations, data.plane)
    images, weights = weighted_images(data, inverse_noise)
    phases = data.plane.phases(search.shifts_xy_px)
    size = block_size(phases.shape[0], rotations.shape[0])
    parts = []
    with fast_products():
        for part, part_weights in zip(images.split(size), weights.split(size), strict=True):
            scores = score_block(shifted_matrix(part, phases), part_weights, projections, search, 1.0)
            parts.append(torch.logsumexp(scores.flatten(1), dim=1))
    return torch.cat(parts) - math.log(rotations.shape[0])


def fine_shift_search(box_size_px: int, settings: OnlineEmSettings) -> ShiftSearch:
    """Return the shifts of the last iterations, with their prior."""
    return _shift_search(box_size_px, settings, is_fine=True)


def coarse_search(plane: HalfPlane, settings: OnlineEmSettings) -> CoarseSearch | None:
    """Return the first of two steps, None while the radius is too small for two to pay."""
    n = plane.count_within(PRUNING_SHELL)
    if len(plane) < 1.3 * n:
        return None
    return CoarseSearch(_shift_search(plane.box_size_px, settings, is_fine=False), n)


def _shift_search(box_size_px: int, settings: OnlineEmSettings, *, is_fine: bool) -> ShiftSearch:
    step = settings.shift_step_fraction * box_size_px * (1.0 if is_fine else 1.5)
    return ShiftSearch.gaussian(
        shift_grid(2 if is_fine else 1, step), settings.shift_sigma_fraction * box_size_px
    )


def run_start(
    data: ParticleData,
    settings: OnlineEmSettings,
    generator: torch.Generator,
    on_progress: Callable[[EmProgress], None] | None = None,
    *,
    group: Float[Tensor, "g 3 3"] | None = None,
    start: Float[Tensor, "n n n"] | None = None,
) -> EmResult:
    """Run one start (or, from the map `start`, the second half of one) to its end; `on_progress` may raise."""
    em = OnlineEm(data, settings, generator, group, start)
    em.run_to(settings.n_iterations, on_progress)
    return em.result()
