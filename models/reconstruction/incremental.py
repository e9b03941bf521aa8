"""Refinement that follows a growing set: newcomers are aligned globally, a quota of the old is revisited locally.

Only what changes pose is touched in the sums (`buckets`), so that a tick costs its newcomers and not the whole set.
Halves stay apart as in `refinement`. A wrong start is not repaired by this (facts §4.2): `needs_rebase` says when
the whole set is to be refined again, that is when resolution improved by 10 % or the set doubled since the base.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from models.reconstruction.buckets import BucketSums, Inserted, random_groups
from models.reconstruction.grids import random_rotations
from models.reconstruction.half_references import (
    FLAT_SSNR,
    HalfReferences,
    half_references,
    last_shell_above,
)
from models.reconstruction.half_set import RELIABLE_FSC
from models.reconstruction.image_fit import fit_rings, image_weights, micrograph_scales, noise_per_group
from models.reconstruction.masks import solvent_sphere
from models.reconstruction.particle_data import ParticleData
from models.reconstruction.pose_schedule import (
    Reference,
    RefinementSettings,
    align_globally,
    align_locally,
)
from models.reconstruction.pose_search import Hypotheses
from models.reconstruction.scoring import fast_products

REBASE_GAIN = 0.10
"""Relative gain in resolution after which old poses, found on a coarser map, are worth searching again."""

MIN_NOISE_IMAGES = 50
"""Fewer images of a half in one tick say less about the noise than what is known already."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParticleRecords:
    """One row per particle in the sums: its uid, what was inserted, gain (nats), Σ CTF², and the tick it was aligned."""

    uids: Int[Tensor, " b"]
    inserted: Inserted
    gains: Float[Tensor, " b"]
    ctf_power: Float[Tensor, " b"]
    aligned_at: Int[Tensor, " b"]

    def __len__(self) -> int:
        return int(self.uids.numel())

    def take(self, index: Tensor) -> ParticleRecords:
        """Return the rows at `index`."""
        return ParticleRecords(
            uids=self.uids[index],
            inserted=self.inserted.take(index),
            gains=self.gains[index],
            ctf_power=self.ctf_power[index],
            aligned_at=self.aligned_at[index],
        )

    def rows_of(self, uids: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        """Return where these particles stand; raise KeyError for one that is not there."""
        place = {uid: row for row, uid in enumerate(self.uids.tolist())}
        return torch.tensor([place[uid] for uid in uids.tolist()], dtype=torch.long)


@dataclass(frozen=True, slots=True, kw_only=True)
class Newcomers:
    """Images to take in, with their uids, half sets (1 or 2), feature clusters and micrographs (−1 = not known).

    `scales` are those of micrographs that the sums know already; NaN where they are to be estimated.
    """

    data: ParticleData
    uids: Int[Tensor, " b"]
    half: Int[Tensor, " b"]
    cluster: Int[Tensor, " b"]
    micrograph: Int[Tensor, " b"]
    scales: Float[Tensor, " b"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TickReport:
    """What a tick did, the resolution in use afterwards, and whether the whole set is worth refining again."""

    n_new: int
    n_revisited: int
    n_dropped: int
    resolution_angstrom: float
    needs_rebase: bool


@dataclass(slots=True, kw_only=True)
class IncrementalState:
    """Everything that a later tick needs. `noise` is per half and ring; `base_*` describe the last full refinement."""

    sums: BucketSums
    records: ParticleRecords
    noise: dict[int, Tensor]
    pixel_size_angstrom: float
    tick: int
    base_n: int
    base_resolution_angstrom: float
    n_groups: int
    settings: RefinementSettings = field(default_factory=RefinementSettings)

    @property
    def box_angstrom(self) -> float:
        """The extent of images and maps."""
        return self.sums.box_size_px * self.pixel_size_angstrom


def start_state(
    data: ParticleData,
    uids: Int[Tensor, " b"],
    half: Int[Tensor, " b"],
    cluster: Int[Tensor, " b"],
    poses: Hypotheses,
    *,
    scales: Float[Tensor, " b"],
    weights: Float[Tensor, " b"],
    symmetry: Float[Tensor, "g 3 3"],
    settings: RefinementSettings,
    n_groups: int,
) -> IncrementalState:
    """Build the sums from refined poses (one hypothesis per image): the base that later ticks add to."""
    rotations, shifts = poses.best
    n = len(data)
    if len(set(uids.tolist())) != n:
        raise ValueError(f"uids: {n - len(set(uids.tolist()))} are repeated, each particle has its own")
    sums = BucketSums(float(data.plane.shell.max()), data.box_size_px, symmetry)
    inserted = Inserted(half, random_groups(uids, n_groups), cluster, rotations, shifts, weights, scales)
    sums.take(data, inserted)
    records = ParticleRecords(
        uids=uids,
        inserted=inserted,
        gains=poses.scores[:, 0],
        ctf_power=sums.ctf_power_of(data),
        aligned_at=torch.zeros(n, dtype=torch.long),
    )
    state = IncrementalState(
        sums=sums,
        records=records,
        noise={},
        pixel_size_angstrom=data.pixel_size_angstrom,
        tick=0,
        base_n=n,
        base_resolution_angstrom=0.0,
        n_groups=n_groups,
        settings=settings,
    )
    references = references_of(state)
    for h in (1, 2):
        own = torch.nonzero(half == h)[:, 0]
        own = own[torch.linspace(0, len(own) - 1, min(500, len(own))).long()]
        state.noise[h] = _noise_of(data.take(own), inserted.take(own), references, h)
    state.base_resolution_angstrom = resolution_of(state, references)
    return state


def references_of(state: IncrementalState) -> HalfReferences:
    """Return both halves' references, their FSC and radius from the sums as they are."""
    box = state.sums.box_size_px
    sphere = solvent_sphere(box, state.settings.mask_diameter_fraction)
    return half_references(
        lambda half, ssnr: state.sums.half_map(half, ssnr, box),
        state.sums.grid,
        state.pixel_size_angstrom,
        sphere,
    )


def resolution_of(state: IncrementalState, references: HalfReferences) -> float:
    """Return the resolution in Å at which the halves' FSC (in their own envelopes) falls below 0.143."""
    return state.box_angstrom / max(references.crossing_shell, 1.0)


def half_maps(state: IncrementalState) -> tuple[Tensor, Tensor]:
    """Return the unfiltered half maps on the images' box."""
    flat = torch.full((state.sums.grid.n_shells,), FLAT_SSNR)
    return state.sums.maps(lambda _: True, flat, state.sums.box_size_px)


def advance(
    state: IncrementalState,
    newcomers: Newcomers,
    load: Callable[[Int[Tensor, " n"]], ParticleData],
    *,
    generator: torch.Generator,
    dropped_uids: Int[Tensor, " d"] | None = None,
    quota: int | None = None,
    n_threads: int = 1,
    check: Callable[[], None] | None = None,
) -> TickReport:
    """Take newcomers in, revisit `quota` of the old (as many as newcomers by default), drop what is to go.

    `load` gives the images of uids that are in the sums already, in the order asked; the longest unvisited are
    revisited first. The state is changed at the end of each part, after its images have been aligned.
    """
    state.tick += 1
    n_dropped = 0
    if dropped_uids is not None and dropped_uids.numel():
        _drop(state, dropped_uids, load)
        n_dropped = int(dropped_uids.numel())
    references = references_of(state)
    if len(newcomers.data):
        _take_in(state, newcomers, references, generator, n_threads, check)
        references = references_of(state)
    n_revisited = min(len(state.records), (len(newcomers.data) if quota is None else quota))
    if n_revisited:
        # Newcomers wait for their turn: they were aligned just now.
        oldest = state.records.aligned_at.argsort(stable=True)[:n_revisited]
        _revisit(state, oldest, load(state.records.uids[oldest]), references, n_threads, check)
        references = references_of(state)
    resolution = resolution_of(state, references)
    has_doubled = len(state.records) >= 2 * state.base_n
    is_finer = resolution <= (1.0 - REBASE_GAIN) * state.base_resolution_angstrom
    return TickReport(
        n_new=len(newcomers.data),
        n_revisited=n_revisited,
        n_dropped=n_dropped,
        resolution_angstrom=resolution,
        needs_rebase=has_doubled or is_finer,
    )


def _drop(state: IncrementalState, uids: Tensor, load: Callable[[Tensor], ParticleData]) -> None:
    rows = state.records.rows_of(uids)
    state.sums.drop(load(uids), state.records.inserted.take(rows))
    is_kept = torch.ones(len(state.records), dtype=torch.bool)
    is_kept[rows] = False
    state.records = state.records.take(is_kept.nonzero()[:, 0])


def _take_in(
    state: IncrementalState,
    new: Newcomers,
    references: HalfReferences,
    generator: torch.Generator,
    n_threads: int,
    check: Callable[[], None] | None,
) -> None:
    turn = random_rotations(1, generator)[0]

    def align(half: int, index: Tensor) -> Hypotheses:
        reference = _reference(state, references, half)
        data = _scaled(new.data.take(index), new.scales[index].nan_to_num(1.0))
        return align_globally(data, reference, state.settings, state.sums.symmetry, turn, check)

    rotations, shifts, gains = _by_half(new.half, align, n_threads)
    n = len(new.data)
    scales, weights = _judge(state, new, rotations, shifts, references)
    inserted = Inserted(
        new.half, random_groups(new.uids, state.n_groups), new.cluster, rotations, shifts, weights, scales
    )
    _estimate_noise(state, new.data, inserted, references)
    state.sums.take(new.data, inserted)
    added = ParticleRecords(
        uids=new.uids,
        inserted=inserted,
        gains=gains,
        ctf_power=state.sums.ctf_power_of(new.data),
        aligned_at=torch.full((n,), state.tick),
    )
    old = state.records
    state.records = ParticleRecords(
        uids=torch.cat((old.uids, added.uids)),
        inserted=Inserted.joined((old.inserted, added.inserted)),
        gains=torch.cat((old.gains, added.gains)),
        ctf_power=torch.cat((old.ctf_power, added.ctf_power)),
        aligned_at=torch.cat((old.aligned_at, added.aligned_at)),
    )


def _revisit(
    state: IncrementalState,
    rows: Tensor,
    data: ParticleData,
    references: HalfReferences,
    n_threads: int,
    check: Callable[[], None] | None,
) -> None:
    old = state.records.inserted.take(rows)

    def align(half: int, index: Tensor) -> Hypotheses:
        reference = _reference(state, references, half)
        poses = old.rotations[index], old.shifts_xy_px[index]
        images = _scaled(data.take(index), old.scales[index])
        return align_locally(images, reference, state.settings, *poses, check)

    rotations, shifts, gains = _by_half(old.half, align, n_threads)
    new = replace(old, rotations=rotations, shifts_xy_px=shifts)
    _estimate_noise(state, data, new, references)
    state.sums.revise(data, old, new)
    records = state.records
    all_rotations, all_shifts = records.inserted.rotations.clone(), records.inserted.shifts_xy_px.clone()
    all_gains, aligned_at = records.gains.clone(), records.aligned_at.clone()
    all_rotations[rows], all_shifts[rows], all_gains[rows] = rotations, shifts, gains
    aligned_at[rows] = state.tick
    state.records = replace(
        records,
        inserted=replace(records.inserted, rotations=all_rotations, shifts_xy_px=all_shifts),
        gains=all_gains,
        aligned_at=aligned_at,
    )


def _reference(state: IncrementalState, references: HalfReferences, half: int) -> Reference:
    inverse = (1.0 / state.noise[half])[state.sums.plane.shell]
    inverse[0] = 0.0
    return Reference(references.cubes[half - 1], inverse, references.shell)


def _by_half(
    half: Int[Tensor, " b"], align: Callable[[int, Tensor], Hypotheses], n_threads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Align the images of each half against their own map; return poses and gains in the order given."""
    n = int(half.numel())
    rotations, shifts, gains = torch.eye(3).repeat(n, 1, 1), torch.zeros((n, 2)), torch.zeros(n)
    rows: Mapping[int, Tensor] = {h: torch.nonzero(half == h)[:, 0] for h in (1, 2)}
    with fast_products(), ThreadPoolExecutor(max_workers=min(2, max(1, n_threads))) as pool:
        jobs = {h: pool.submit(align, h, index) for h, index in rows.items() if index.numel()}
        for h, job in jobs.items():
            found = job.result()
            rotations[rows[h]], shifts[rows[h]] = found.best
            gains[rows[h]] = found.scores[:, 0]
    return rotations, shifts, gains


def _estimate_noise(
    state: IncrementalState, data: ParticleData, inserted: Inserted, references: HalfReferences
) -> None:
    """Measure the noise anew where this tick's images of a half are enough to do so."""
    for h in (1, 2):
        own = torch.nonzero(inserted.half == h)[:, 0]
        if own.numel() >= MIN_NOISE_IMAGES:
            state.noise[h] = _noise_of(data.take(own), inserted.take(own), references, h)


def _noise_of(data: ParticleData, inserted: Inserted, references: HalfReferences, half: int) -> Tensor:
    """Return the noise per ring of one half's images at the poses they went in with."""
    cube = references.cubes[half - 1]
    fit = fit_rings(data, cube, inserted.rotations, inserted.shifts_xy_px, references.shell)
    nothing = torch.zeros(len(data), dtype=torch.long)
    return noise_per_group(fit, data, nothing, inserted.scales, inserted.weights)[0]


def _judge(
    state: IncrementalState, new: Newcomers, rotations: Tensor, shifts: Tensor, references: HalfReferences
) -> tuple[Tensor, Tensor]:
    """Return newcomers' scales (their micrograph's where that is known) and weights, from their own half's map."""
    scales, weights = new.scales.nan_to_num(1.0), torch.ones(len(new.data))
    reliable = float(max(last_shell_above(references.fsc, RELIABLE_FSC), 3))
    for h in (1, 2):
        own = torch.nonzero(new.half == h)[:, 0]
        if not own.numel():
            continue
        fit = fit_rings(
            new.data.take(own), references.cubes[h - 1], rotations[own], shifts[own], references.shell
        )
        inverse = (1.0 / state.noise[h])[None].expand(len(own), -1)
        if state.settings.estimate_scale:
            found = micrograph_scales(fit, inverse, new.micrograph[own], weights[own], reliable)
            scales[own] = torch.where(new.scales[own].isnan(), found, scales[own])
        if state.settings.weigh_images:
            weights[own] = image_weights(fit, inverse, scales[own], references.shell)
    return scales, weights


def _scaled(data: ParticleData, scales: Float[Tensor, " b"]) -> ParticleData:
    return data.with_ctf(data.ctf * scales[:, None])
