"""Two-dimensional class averages by expectation maximisation over classes, in-plane angles and shifts.

Early iterations are soft over everything at low radius (matrix products, `scoring`); later ones keep each image's
best classes and search around their best angle and shift at a growing radius, soft over what is kept. All classes are
equally likely beforehand, so that large ones do not draw in their neighbours, and a class that has run empty is
given a copy of the largest, disturbed. Averages are Wiener-filtered with the correlation of their two halves.

A class's resolution is where the averages of its even and odd members fall to FRC 0.5. Both were aligned to the
same reference, so it is a help for ranking classes and too good as a resolution.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from models.reconstruction.grids import shift_grid
from models.reconstruction.particle_data import ParticleData
from models.reconstruction.planes import (
    add_friedel,
    images_to_planes,
    insert_planes,
    plane_shells,
    read_planes,
    sums_to_images,
    turned_points,
)
from models.reconstruction.projector import cube_half_side
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
from models.reconstruction.sufficient import ssnr_of

FRC_THRESHOLD = 0.5
_COARSE_ANGLES = 24
_FINE_STEPS = torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0])
"""In coarse steps of 15°: angles tried around the best one."""

_MAX_POINTS = 2_000_000
_EMPTY_SHARE = 0.2
"""Of the mean population: a class below it is reseeded while there is time to settle."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassificationSettings:
    """Shells count cycles per box; fractions are of the box (shifts, mask) or of the run (`soft_fraction`)."""

    n_classes: int = 50
    n_iterations: int = 24
    soft_fraction: float = 0.5
    first_shell: float = 4.0
    coarse_max_shell: float = 8.0
    max_shell: float = 20.0
    n_keep: int = 3
    mask_diameter_fraction: float = 0.85
    shift_step_fraction: float = 1.0 / 24.0
    shift_sigma_fraction: float = 3.0 / 64.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Classes:
    """Class averages, most populated first, and where every image went.

    `images` are white-particle averages without CTF; `populations` count the images whose best class it is;
    `assignment`, `psi_deg`, `shifts_xy_px` are each image's best (the shift is applied to the image), `gains` the log
    likelihood over no particle at all in nats and `confidence` the posterior of its class, in [0, 1].
    """

    images: Float[Tensor, "c n n"]
    populations: Int[Tensor, " c"]
    resolutions_angstrom: tuple[float | None, ...]
    assignment: Int[Tensor, " b"]
    psi_deg: Float[Tensor, " b"]
    shifts_xy_px: Float[Tensor, "b 2"]
    gains: Float[Tensor, " b"]
    confidence: Float[Tensor, " b"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassificationProgress:
    """An iteration done, the radius it used and how many classes have members."""

    iteration: int
    n_iterations: int
    shell: float
    n_occupied: int


class Classification:
    """A classification in progress; `step()` is one iteration over all images."""

    def __init__(
        self,
        data: ParticleData,
        settings: ClassificationSettings,
        generator: torch.Generator,
        *,
        labels: Int[Tensor, " b"] | None = None,
        references: Float[Tensor, "r n n"] | None = None,
    ) -> None:
        """Start from averages of random subsets, of `labels` (feature clusters), or from `references`."""
        if settings.n_classes < 1 or len(data) < 2 * settings.n_classes:
            raise ValueError(
                f"n_classes: {settings.n_classes} for {len(data)} images, at least two images each"
            )
        self.settings, self.generator = settings, generator
        self.max_shell = min(settings.max_shell, data.box_size_px / 2 - 1)
        self.data = data.within(self.max_shell)
        self.box = data.box_size_px
        noise = self.data.mean_power().clamp_min(1e-20)
        self.inverse_noise = (1.0 / noise)[self.data.plane.shell]
        self.inverse_noise[0] = 0.0
        self.shell_of, radius = plane_shells(cube_half_side(self.max_shell))
        self.is_inside = radius <= self.max_shell
        self.n_shells = int(self.max_shell) + 1
        self.disc = _disc(self.box, settings.mask_diameter_fraction * self.box, 0.06 * self.box)
        n, k = len(data), settings.n_classes
        self.psi = torch.arange(_COARSE_ANGLES) * (2 * math.pi / _COARSE_ANGLES)
        self.iteration = 0
        self.populations = torch.full((k,), n / k)
        self.best_class = torch.zeros(n, dtype=torch.long)
        self.best_psi, self.best_shift = torch.zeros(n), torch.zeros((n, 2))
        self.gains, self.confidence = torch.zeros(n), torch.zeros(n)
        self.frc = torch.zeros((k, self.n_shells))
        self.is_even = torch.arange(n) % 2 == 0
        if references is not None:
            self.images = self._scaled(references)
        else:
            self.images = self._seeded(labels)
        self.planes = images_to_planes(self.images, self.max_shell)

    # -- start --------------------------------------------------------------------------------------------------

    def _seeded(self, labels: Tensor | None) -> Float[Tensor, "c n n"]:
        n, k = len(self.data), self.settings.n_classes
        if labels is None:
            own = torch.randperm(n, generator=self.generator) % k
            psi = torch.rand(n, generator=self.generator) * (2 * math.pi)
        else:
            own, psi = labels % k, torch.zeros(n)
        sums = self._zeros()
        points = turned_points(psi, self.data.plane)
        images, weights = weighted_images(self.data, self.inverse_noise)
        for c in range(k):
            rows = torch.nonzero(own == c)[:, 0]
            if rows.numel():
                values = torch.stack((images[rows].real, images[rows].imag, weights[rows]))[None]
                half = sums[0, c : c + 1]
                sums[0, c : c + 1] = insert_planes(half, values, points[rows][None])
        self._solve(sums, self.settings.first_shell + 1.0, is_first=True)
        return self.images

    def _scaled(self, references: Float[Tensor, "r n n"]) -> Float[Tensor, "c n n"]:
        """Take references in turn (repeated if too few), at the scale of the images' power above the noise."""
        k = self.settings.n_classes
        chosen = references[torch.linspace(0, len(references) - 1, k).round().long()].float() * self.disc
        low = self.data.within(self.settings.first_shell)
        mean_ctf = low.ctf.square().mean(0)
        weight = (low.plane.shell > 0).float()
        planes = images_to_planes(chosen, self.max_shell)
        slices = read_planes(planes, turned_points(torch.zeros(k, 1), low.plane))
        model = (slices.square().sum(1)[:, 0].mean(0) * mean_ctf * weight).sum()
        # At the first shells about a tenth of the images' power is signal in ice; the EM corrects the scale at once.
        power = (low.coefficients.abs().square().mean(0) * weight).sum()
        scaled: Tensor = chosen * torch.sqrt(0.1 * power / model.clamp_min(1e-30))
        return scaled

    def _zeros(self) -> Float[Tensor, "2 c 3 d d"]:
        side = self.shell_of.shape[0]
        return torch.zeros((2, self.settings.n_classes, 3, side, side))

    # -- iterations ---------------------------------------------------------------------------------------------

    def shell(self) -> float:
        """Return the radius: it marches to the coarse limit while soft, and on to the last in three quarters."""
        s, done = self.settings, self.iteration / max(1, self.settings.n_iterations - 1)
        coarse = min(s.coarse_max_shell, self.max_shell)
        if done < s.soft_fraction:
            return s.first_shell + (coarse - s.first_shell) * done / s.soft_fraction
        ramp = min(1.0, (done - s.soft_fraction) / max(1e-6, 0.75 * (1.0 - s.soft_fraction)))
        return coarse + (self.max_shell - coarse) * ramp

    @property
    def is_done(self) -> bool:
        """Whether the schedule has ended."""
        return self.iteration >= self.settings.n_iterations

    def step(self) -> ClassificationProgress:
        """Run one iteration: assign all images, average, filter."""
        shell = self.shell()
        is_soft = self.iteration < self.settings.soft_fraction * self.settings.n_iterations
        sums = self._zeros()
        with fast_products():
            sums = self._soft(sums, shell) if is_soft else self._fine(sums, shell)
        self._solve(sums, shell)
        self.populations = torch.bincount(self.best_class, minlength=self.settings.n_classes).float()
        n_occupied = int((self.populations > 0).sum())
        self.iteration += 1
        if self.iteration < 0.7 * self.settings.n_iterations:
            self._reseed()
            self.images = _centred(self.images) * self.disc
        self.planes = images_to_planes(self.images, self.max_shell)
        return ClassificationProgress(
            iteration=self.iteration,
            n_iterations=self.settings.n_iterations,
            shell=shell,
            n_occupied=n_occupied,
        )

    def _coarse_search(self) -> ShiftSearch:
        s = self.settings
        return ShiftSearch.gaussian(
            shift_grid(1, 1.5 * s.shift_step_fraction * self.box), s.shift_sigma_fraction * self.box
        )

    def _coarse_projections(self, data: ParticleData) -> tuple[Projections, Tensor]:
        k = self.settings.n_classes
        points = turned_points(self.psi, data.plane)
        values = read_planes(self.planes, points[None].expand(k, -1, -1, -1))
        slices = torch.complex(values[:, 0], values[:, 1]).reshape(k * _COARSE_ANGLES, -1)
        return Projections.of(slices), points

    def _soft(self, sums: Tensor, shell: float) -> Tensor:
        """Weigh every class, angle and shift by its posterior."""
        near = self.data.within(shell)
        projections, points = self._coarse_projections(near)
        search = self._coarse_search()
        phases = near.plane.phases(search.shifts_xy_px)
        k, n_rotations, n_coefficients = self.settings.n_classes, projections.power.shape[0], len(near.plane)
        size = block_size(len(phases), n_rotations)
        for half, rows in enumerate((self.is_even.nonzero()[:, 0], (~self.is_even).nonzero()[:, 0])):
            slice_sums = torch.zeros((n_rotations, 2 * n_coefficients))
            weight_sums = torch.zeros((n_rotations, n_coefficients))
            for part in rows.split(size):
                images, weights = weighted_images(near.take(part), self.inverse_noise[:n_coefficients])
                matrix = shifted_matrix(images, phases)
                scores = score_block(matrix, weights, projections, search, 1.0)
                self._remember_coarse(part, scores, search)
                scores.sub_(scores.amax((1, 2), keepdim=True)).exp_()
                scores.div_(scores.sum((1, 2), keepdim=True))
                add_slice_sums(slice_sums, weight_sums, scores, matrix, weights)
            channels = torch.stack(
                (slice_sums[:, :n_coefficients], slice_sums[:, n_coefficients:], weight_sums)
            )
            values = channels.view(3, k, _COARSE_ANGLES, n_coefficients).transpose(0, 1)
            sums[half] = insert_planes(sums[half], values, points[None].expand(k, -1, -1, -1))
        return sums

    def _remember_coarse(self, rows: Tensor, scores: Float[Tensor, "b t j"], search: ShiftSearch) -> None:
        per_rotation, shift = scores.max(1)
        top, index = per_rotation.max(1)
        evidence = torch.logsumexp(scores.reshape(len(rows), -1), 1) - math.log(scores.shape[2])
        self.best_class[rows] = index // _COARSE_ANGLES
        self.best_psi[rows] = self.psi[index % _COARSE_ANGLES]
        self.best_shift[rows] = search.shifts_xy_px[shift.gather(1, index[:, None])[:, 0]]
        self.gains[rows] = evidence
        self.confidence[rows] = (top - torch.logsumexp(scores.reshape(len(rows), -1), 1)).exp()

    def _fine(self, sums: Tensor, shell: float) -> Tensor:
        """Keep each image's best classes at low radius; search around them at the full one."""
        coarse = self.data.within(min(shell, self.settings.coarse_max_shell))
        near = self.data.within(shell)
        projections, _ = self._coarse_projections(coarse)
        search = self._coarse_search()
        phases = coarse.plane.phases(search.shifts_xy_px)
        k, m = self.settings.n_classes, min(self.settings.n_keep, self.settings.n_classes)
        n_fine = m * len(_FINE_STEPS)
        size = min(
            block_size(len(phases), projections.power.shape[0]),
            max(1, _MAX_POINTS // (n_fine * len(near.plane))),
        )
        for rows in torch.arange(len(self.data)).split(size):
            images, weights = weighted_images(coarse.take(rows), self.inverse_noise[: len(coarse.plane)])
            scores = score_block(shifted_matrix(images, phases), weights, projections, search, 1.0)
            per_pose, shift = scores.view(len(rows), len(phases), k, _COARSE_ANGLES).max(1)
            per_class, angle = per_pose.max(2)
            top = per_class.topk(m, dim=1).indices
            psi = self.psi[angle.gather(1, top)]
            shift_index = shift.flatten(1).gather(1, top * _COARSE_ANGLES + angle.gather(1, top))
            sums = self._fine_block(sums, near.take(rows), rows, top, psi, search.shifts_xy_px[shift_index])
        return sums

    def _fine_block(
        self, sums: Tensor, data: ParticleData, rows: Tensor, top: Tensor, psi: Tensor, shifts: Tensor
    ) -> Tensor:
        """Score angles × shifts around each kept class of each image and add posterior-weighted images."""
        b, m = top.shape
        n_psi, s = len(_FINE_STEPS), self.settings
        angles = (psi[..., None] + _FINE_STEPS * (2 * math.pi / _COARSE_ANGLES)).reshape(b, m, n_psi)
        points = turned_points(angles, data.plane)  # b m p k 2
        # One call per class: all images that kept it read the same plane.
        flat_class = top.reshape(-1)
        order = flat_class.argsort(stable=True)
        counts = torch.bincount(flat_class, minlength=s.n_classes).tolist()
        flat_points = points.reshape(b * m, n_psi, -1, 2)
        values = torch.empty((b * m, n_psi, len(data.plane)), dtype=torch.complex64)
        members = order.split(counts)
        for c, rows_of in enumerate(members):
            if rows_of.numel():
                read = read_planes(self.planes[c : c + 1], flat_points[rows_of].flatten(0, 1)[None])[0]
                values[rows_of] = torch.complex(read[0], read[1]).view(len(rows_of), n_psi, -1)
        slices = values.view(b, m, n_psi, -1)
        images, weights = weighted_images(data, self.inverse_noise[: len(data.plane)])
        tried = shifts[:, :, None] + shift_grid(1, 0.75 * s.shift_step_fraction * self.box)
        shifted = images[:, None, None] * data.plane.phases(tried)  # b m t k
        cross = 2.0 * (
            torch.view_as_real(slices).flatten(-2) @ torch.view_as_real(shifted).flatten(-2).transpose(-1, -2)
        )
        power = (slices.abs().square() * weights[:, None, None]).sum(-1)
        prior = -0.5 * tried.square().sum(-1) / (s.shift_sigma_fraction * self.box) ** 2
        scores = cross - power[..., None] + prior[:, :, None, :]  # b m p t
        flat = scores.flatten(1)
        posterior = torch.softmax(flat, dim=1).view_as(scores)
        best_score, best = flat.max(1)
        n_t = scores.shape[3]
        kept, p, t = best // (n_psi * n_t), best // n_t % n_psi, best % n_t
        line = torch.arange(b)
        self.best_class[rows] = top[line, kept]
        self.best_psi[rows] = angles[line, kept, p]
        self.best_shift[rows] = tried[line, kept, t]
        self.gains[rows] = best_score
        self.confidence[rows] = posterior.sum((2, 3))[line, kept]
        summed = posterior.to(shifted.dtype) @ shifted  # b m p k
        mass = posterior.sum(3)[..., None] * weights[:, None, None]
        channels = torch.stack((summed.real, summed.imag, mass)).reshape(3, b * m, n_psi, -1)
        is_even = self.is_even[rows].repeat_interleave(m)
        for c, rows_of in enumerate(members):
            for half in (0, 1):
                own = rows_of[is_even[rows_of] == (half == 0)]
                if own.numel():
                    part = channels[:, own].flatten(1, 2)[None]
                    where = flat_points[own].flatten(0, 1)[None]
                    sums[half, c : c + 1] = insert_planes(sums[half, c : c + 1], part, where)
        return sums

    # -- averages -----------------------------------------------------------------------------------------------

    def _solve(self, sums: Float[Tensor, "2 c 3 d d"], shell: float, *, is_first: bool = False) -> None:
        """Correlate the halves of every class and make the filtered averages."""
        halves = [add_friedel(half) for half in sums]
        use = self.is_inside & (self.shell_of <= shell)
        if is_first:
            self.frc = torch.full_like(self.frc, 0.5)
        else:
            cut = [
                images_to_planes(
                    sums_to_images(_divide(half, 0.1, use, self.shell_of), self.box) * self.disc,
                    self.max_shell,
                )
                for half in halves
            ]
            self.frc = self._correlate(cut[0], cut[1])
        both = halves[0] + halves[1]
        ssnr = torch.stack([ssnr_of(curve, n_halves=2) for curve in self.frc])
        planes = _divide(both, 1.0 / ssnr, use, self.shell_of)
        self.images = sums_to_images(planes, self.box) * self.disc

    def _correlate(self, a: Float[Tensor, "c 2 d d"], b: Float[Tensor, "c 2 d d"]) -> Float[Tensor, "c s"]:
        def ring(values: Tensor) -> Tensor:
            index = torch.where(self.is_inside, self.shell_of, self.n_shells).flatten()
            out = torch.zeros((len(values), self.n_shells + 1))
            return out.index_add_(1, index, values.flatten(1))[:, : self.n_shells]

        power = torch.sqrt(ring(a.square().sum(1)) * ring(b.square().sum(1)))
        return torch.where(power > 0, ring((a * b).sum(1)) / power.clamp_min(1e-30), torch.zeros(()))

    def _reseed(self) -> None:
        """Give classes that have run empty a disturbed copy of the most populated ones."""
        few = _EMPTY_SHARE * float(self.populations.mean())
        empty = torch.nonzero(self.populations < few)[:, 0]
        donors = self.populations.argsort(descending=True)[: len(empty)]
        for target, donor in zip(empty.tolist(), donors.tolist(), strict=True):
            noise = torch.randn((self.box, self.box), generator=self.generator)
            smooth = sums_to_images(
                images_to_planes(noise[None], self.max_shell) * (self.shell_of <= self.shell()), self.box
            )[0]
            image = self.images[donor]
            self.images[target] = (image + 0.5 * smooth * (image.std() / smooth.std())) * self.disc

    def result(self) -> Classes:
        """Return the classes in falling order of population."""
        order = self.populations.argsort(descending=True, stable=True)
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order))
        return Classes(
            images=self.images[order],
            populations=self.populations[order].long(),
            resolutions_angstrom=tuple(self._resolution(c) for c in order.tolist()),
            assignment=rank[self.best_class],
            psi_deg=torch.rad2deg(self.best_psi) % 360.0,
            shifts_xy_px=self.best_shift,
            gains=self.gains,
            confidence=self.confidence,
        )

    def _resolution(self, c: int) -> float | None:
        below = torch.nonzero(self.frc[c, 1:] < FRC_THRESHOLD)[:, 0]
        last = int(below[0]) if below.numel() else self.n_shells - 1
        return self.data.box_angstrom / last if last >= 1 else None


def classify(
    data: ParticleData,
    settings: ClassificationSettings,
    generator: torch.Generator,
    *,
    labels: Int[Tensor, " b"] | None = None,
    references: Float[Tensor, "r n n"] | None = None,
    on_progress: Callable[[ClassificationProgress], None] | None = None,
) -> Classes:
    """Run a classification to its end; `on_progress` may raise."""
    run = Classification(data, settings, generator, labels=labels, references=references)
    while not run.is_done:
        progress = run.step()
        if on_progress is not None:
            on_progress(progress)
    return run.result()


def _divide(
    sums: Float[Tensor, "c 3 d d"], ratio: Float[Tensor, "c s"] | float, use: Tensor, shell: Tensor
) -> Float[Tensor, "c 2 d d"]:
    """Return A / (W + ratio · W̄), W̄ the ring's mean weight, zero outside `use`."""
    n_shells = int(shell[use].max()) + 1
    index = torch.where(use, shell, n_shells).flatten()
    counts = torch.bincount(index, minlength=n_shells + 1).clamp_min(1).float()
    total = torch.zeros((len(sums), n_shells + 1)).index_add_(1, index, sums[:, 2].flatten(1))
    mean = total / counts
    mean[:, n_shells] = 0.0
    factor = ratio if isinstance(ratio, float) else torch.cat((ratio[:, :n_shells], ratio[:, :1]), dim=1)
    prior = (mean * factor)[:, index].view(len(sums), *shell.shape)
    denominator = sums[:, 2] + prior.clamp_min(0.0)
    solved: Tensor = sums[:, :2] * (use / denominator.clamp_min(1e-12))[:, None]
    return solved


def _centred(images: Float[Tensor, "c n n"]) -> Float[Tensor, "c n n"]:
    """Move each average by whole pixels so that the mass of its upper half of values is in the middle."""
    n = int(images.shape[-1])
    top = images.flatten(1).amax(1)[:, None, None]
    mass = (images - 0.5 * top).clamp_min(0.0)
    x = torch.arange(n).float() - n // 2
    total = mass.sum((1, 2)).clamp_min(1e-30)
    off_y, off_x = (mass.sum(2) * x).sum(1) / total, (mass.sum(1) * x).sum(1) / total
    moved = [
        torch.roll(image, (-round(float(dy)), -round(float(dx))), dims=(0, 1))
        for image, dy, dx in zip(images, off_y, off_x, strict=True)
    ]
    return torch.stack(moved)


def _disc(box_px: int, diameter_px: float, edge_px: float) -> Float[Tensor, "n n"]:
    x = torch.arange(box_px).float() - box_px // 2
    r = torch.sqrt(x[:, None].square() + x[None, :].square())
    return 0.5 + 0.5 * torch.cos(math.pi * ((r - diameter_px / 2) / edge_px).clamp(0.0, 1.0))
