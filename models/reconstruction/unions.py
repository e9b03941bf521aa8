"""What unions of buckets tell: resolution against the number of particles, and which clusters help the map.

No particle is aligned again: every union is a solved map. Poses therefore come from the whole set's map, and the best
of many unions is a selection; a winner is to be refined by itself before it is believed (facts §4.2).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from models.reconstruction.buckets import Bucket, BucketSums
from models.reconstruction.fsc import GOLD_STANDARD_THRESHOLD, find_crossing
from models.reconstruction.half_references import FLAT_SSNR
from models.reconstruction.incremental import IncrementalState
from models.reconstruction.orientation import area_ratio, conical_fsc, crossing_shells, weighted_area
from models.reconstruction.projector import volume_to_cube
from models.reconstruction.sampling import sampling_factor, view_directions
from models.reconstruction.sufficient import correlate_shells

MAX_EXHAUSTIVE_CLUSTERS = 4
"""15 unions; beyond that clusters are left out one by one as long as that helps."""

_MAX_DRAWS = 12
"""Unions measured per number of groups: enough for a standard deviation, at about 0.2 s each (64 px)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UnionQuality:
    """A union's particles, FSC resolution (None: no correlation beyond chance), cFAR and SCF*."""

    clusters: tuple[int, ...]
    n_particles: int
    resolution_angstrom: float | None
    cfar: float
    scf_star: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CountPoint:
    """Resolution of unions of `n_groups` random groups: mean and standard deviation over `n_unions` of them.

    Means are over 1/d², which is what grows linearly with ln N. Unions overlap beyond half of the groups, so the
    deviation there is too small; it is exact where they are disjoint.
    """

    n_particles: float
    resolution_angstrom: float
    inverse_square_sd: float
    n_unions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GrowthCurve:
    """1/d² = slope · ln N + intercept (Rosenthal & Henderson 2003; ResLog, Stagg et al. 2014), and its points.

    `b_factor_angstrom2` = 2 / slope; None where resolution does not grow with N. `fsc` is that of all particles.
    """

    points: tuple[CountPoint, ...]
    slope: float
    slope_sd: float
    intercept: float
    fsc: Float[Tensor, "s"]
    box_angstrom: float

    @property
    def b_factor_angstrom2(self) -> float | None:
        """The B factor that the slope amounts to."""
        return 2.0 / self.slope if self.slope > 0 else None

    def predict(self, n_particles: float) -> tuple[float | None, float | None]:
        """Return the resolution at `n_particles` by the line and by SSNR scaling: they bracket the truth (§4.3).

        Neither goes beyond the last shell of the sums: finer pixels may show more than either says.
        """
        finest = self.box_angstrom / (len(self.fsc) - 1)
        inverse_square = self.slope * math.log(n_particles) + self.intercept
        line = max(inverse_square**-0.5, finest) if inverse_square > 0 else None
        ratio = n_particles / self.points[-1].n_particles
        ssnr = ratio * self.fsc.clamp(0.0, 0.9999) / (1.0 - self.fsc.clamp(0.0, 0.9999))
        scaled = _resolution(ssnr / (1.0 + ssnr), self.box_angstrom)
        return line, scaled


def growth_curve(state: IncrementalState, mask: Float[Tensor, "n n n"]) -> GrowthCurve:
    """Measure resolution over unions of 1, 2, 4 … random groups with the mask of the whole map."""
    sums, n_groups = state.sums, state.n_groups
    counts = torch.bincount(state.records.inserted.group, minlength=n_groups)
    points: list[CountPoint] = []
    size = 1
    full = _fsc(sums, lambda _: True, mask)
    while size <= n_groups:
        values, numbers = [], []
        for chosen in _draws(n_groups, size):
            fsc = full if size == n_groups else _fsc(sums, _of_groups(chosen), mask)
            resolution = _resolution(fsc, state.box_angstrom)
            if resolution is not None:
                values.append(resolution**-2)
                numbers.append(float(counts[list(chosen)].sum()))
        if values:
            points.append(
                CountPoint(
                    n_particles=float(np.mean(numbers)),
                    resolution_angstrom=float(np.mean(values)) ** -0.5,
                    inverse_square_sd=float(np.std(values, ddof=1)) if len(values) > 1 else 0.0,
                    n_unions=len(values),
                )
            )
        size *= 2
    if len(points) < 2:
        raise ValueError(f"state: {len(points)} sizes of union have a resolution, a curve needs two")
    slope, slope_sd, intercept = _fit(points)
    return GrowthCurve(
        points=tuple(points),
        slope=slope,
        slope_sd=slope_sd,
        intercept=intercept,
        fsc=full,
        box_angstrom=state.box_angstrom,
    )


def measure_union(
    state: IncrementalState,
    clusters: tuple[int, ...],
    mask: Float[Tensor, "n n n"],
    *,
    generator: torch.Generator,
) -> UnionQuality:
    """Measure resolution, cFAR and SCF* of the map that these clusters alone make."""
    flat = torch.full((state.sums.grid.n_shells,), FLAT_SSNR)
    halves = state.sums.maps(lambda b: b.cluster in clusters, flat, int(mask.shape[-1]))
    a, b = (torch.fft.rfftn(half * mask) for half in halves)
    cfsc = conical_fsc(a, b, _group(state))[:, : state.sums.grid.n_shells]
    inserted = state.records.inserted
    is_in = torch.isin(inserted.cluster, torch.tensor(clusters))
    if not bool(is_in.any()):
        raise ValueError(f"clusters: {clusters}, hold no particle")
    cubes = [volume_to_cube(half * mask, state.sums.grid.max_shell) for half in halves]
    fsc = correlate_shells(cubes[0], cubes[1], state.sums.grid)
    sampling = sampling_factor(
        view_directions(inserted.rotations[is_in]), generator=generator, group=_group(state)
    )
    return UnionQuality(
        clusters=clusters,
        n_particles=int(is_in.sum()),
        resolution_angstrom=_resolution(fsc, state.box_angstrom),
        cfar=area_ratio(weighted_area(cfsc, crossing_shells(cfsc), power=2)),
        scf_star=sampling.scf_star,
    )


def leave_one_out(
    state: IncrementalState,
    clusters: tuple[int, ...],
    mask: Float[Tensor, "n n n"],
    *,
    generator: torch.Generator,
) -> tuple[UnionQuality, ...]:
    """Return the union of `clusters` and then each union that lacks one of them, in order."""
    rest = [tuple(c for c in clusters if c != out) for out in clusters]
    wanted = [clusters, *(union for union in rest if union)]
    return tuple(measure_union(state, union, mask, generator=generator) for union in wanted)


def best_union(
    state: IncrementalState,
    mask: Float[Tensor, "n n n"],
    *,
    generator: torch.Generator,
    by: Literal["cfar", "scf_star"] = "cfar",
) -> tuple[UnionQuality, tuple[UnionQuality, ...]]:
    """Return the union with the best cFAR (or SCF*), and all that were measured.

    Up to four clusters every union is measured; with more, clusters are left out one at a time while that helps.
    """
    every = tuple(sorted(set(state.records.inserted.cluster.tolist())))
    if len(every) <= MAX_EXHAUSTIVE_CLUSTERS:
        unions = [u for n in range(1, len(every) + 1) for u in itertools.combinations(every, n)]
        measured = [measure_union(state, union, mask, generator=generator) for union in unions]
        return max(measured, key=lambda q: _merit(q, by)), tuple(measured)
    best, *others = leave_one_out(state, every, mask, generator=generator)
    measured = [best, *others]
    while others:
        winner = max(others, key=lambda q: _merit(q, by))
        if _merit(winner, by) <= _merit(best, by):
            break
        best = winner
        _, *others = leave_one_out(state, best.clusters, mask, generator=generator)
        measured.extend(others)
    return best, tuple(measured)


def _merit(quality: UnionQuality, by: Literal["cfar", "scf_star"]) -> float:
    if quality.resolution_angstrom is None:
        return -1.0
    return quality.cfar if by == "cfar" else quality.scf_star


def _group(state: IncrementalState) -> Tensor | None:
    symmetry = state.sums.symmetry
    return None if len(symmetry) == 1 else symmetry


def _of_groups(groups: tuple[int, ...]) -> Callable[[Bucket], bool]:
    return lambda bucket: bucket.group in groups


def _draws(n_groups: int, size: int) -> list[tuple[int, ...]]:
    """Return unions of `size` groups: disjoint ones first, then turns of them around the circle of groups."""
    starts = [*range(0, n_groups, size), *(s for s in range(n_groups) if s % size)]
    unions = [tuple(sorted((s + i) % n_groups for i in range(size))) for s in starts[:_MAX_DRAWS]]
    return list(dict.fromkeys(unions))


def _fsc(sums: BucketSums, wanted: Callable[[Bucket], bool], mask: Tensor) -> Float[Tensor, "s"]:
    flat = torch.full((sums.grid.n_shells,), FLAT_SSNR)
    halves = sums.maps(wanted, flat, int(mask.shape[-1]))
    cubes = [volume_to_cube(half * mask, sums.grid.max_shell) for half in halves]
    return correlate_shells(cubes[0], cubes[1], sums.grid)


def _resolution(fsc: Float[Tensor, "s"], box_angstrom: float) -> float | None:
    n = 2 * (int(fsc.numel()) - 1)
    return find_crossing(fsc, GOLD_STANDARD_THRESHOLD, box_angstrom / n, n).resolution_angstrom


def _fit(points: list[CountPoint]) -> tuple[float, float, float]:
    """Return slope, its standard deviation and intercept of the weighted line through (ln N, 1/d²)."""
    x = np.log([p.n_particles for p in points])
    y = np.array([p.resolution_angstrom**-2 for p in points])
    known = [p.inverse_square_sd for p in points if p.inverse_square_sd > 0]
    # A single union shows no spread: it is as uncertain as the surest of the others.
    floor = min(known) if known else 1.0
    sd = np.array(
        [p.inverse_square_sd / math.sqrt(p.n_unions) if p.inverse_square_sd > 0 else floor for p in points]
    )
    w = 1.0 / sd**2
    mean_x, mean_y = (w * x).sum() / w.sum(), (w * y).sum() / w.sum()
    spread = (w * (x - mean_x) ** 2).sum()
    slope = float((w * (x - mean_x) * (y - mean_y)).sum() / spread)
    return slope, float(spread**-0.5), float(mean_y - slope * mean_x)
