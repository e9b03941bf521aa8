"""The incremental path of a run: when an earlier run's state fits the new set, only what changed is aligned.

It fits where box, pixel size, symmetry and settings are the same, particles have uids, halves and CTF of those in
common are unchanged, and at most half of the set is new and a third gone. Otherwise, or when the state asks for it
(`models.reconstruction.incremental`), the whole set is refined from the known poses as without a state.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actors.engines.particle_images import LoadedParticles, load_particles
from actors.engines.state_file import read_state
from models.reconstruction.figures import save_growth_picture
from models.reconstruction.incremental import (
    IncrementalState,
    Newcomers,
    advance,
    half_maps,
    references_of,
    start_state,
)
from models.reconstruction.particle_data import ParticleData
from models.reconstruction.pose_schedule import RefinementSettings
from models.reconstruction.pose_search import Hypotheses
from models.reconstruction.refinement import RefinementResult
from models.reconstruction.unions import GrowthCurve, growth_curve
from stream.records.errors import InputError
from stream.store.files import replacing

log = logging.getLogger(__name__)

N_GROUPS = 4
"""Random groups per half: points at N/4, N/2 and N. A state has 8 buckets of 12 MB at 64 px, 42 MB at 96 px."""

REVISITED_FRACTION = 0.1
"""Of the old in every run, also where few or none are new: poses creep towards what all of them would give."""

MAX_NEW_FRACTION = 0.5
MAX_DROPPED_FRACTION = 1.0 / 3.0
_CTF_TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True)
class IncrementalOutcome:
    """The result of a tick with the state that it left."""

    result: RefinementResult
    state: IncrementalState
    note: str


def refine_incrementally(
    particles: LoadedParticles,
    state_path: Path,
    old_poses: Path,
    root: Path,
    settings: RefinementSettings,
    group: Tensor,
    *,
    seed: int,
    n_threads: int,
    check: Callable[[], None],
) -> IncrementalOutcome | None:
    """Continue an earlier run's state with this set; None where that is not possible or a full run is due."""
    uids = uids_of(particles)
    state = _read_if_sound(state_path)
    if uids is None or state is None:
        return None
    data = particles.data
    place = {uid: row for row, uid in enumerate(uids.tolist())}
    rows = torch.tensor([place.get(uid, -1) for uid in state.records.uids.tolist()], dtype=torch.long)
    is_kept = rows >= 0
    reason = _why_not(state, particles, settings, group, rows)
    if reason is not None:
        log.info("incremental_refinement_not_possible state=%s reason=%s", state_path, reason)
        return None
    dropped = state.records.uids[~is_kept]
    new = torch.nonzero(~torch.isin(uids, state.records.uids))[:, 0]
    gone = _load_gone(old_poses, root, data, dropped) if dropped.numel() else None

    def load(wanted: Tensor) -> ParticleData:
        if gone is not None and int(wanted[0]) not in place:
            return gone
        return data.take(torch.tensor([place[uid] for uid in wanted.tolist()], dtype=torch.long))

    newcomers = Newcomers(
        data=data.take(new),
        uids=uids[new],
        half=particles.half_set[new],
        cluster=particles.cluster[new],
        micrograph=particles.groups.micrograph[new],
        scales=_known_scales(state, particles, rows)[new],
    )
    _move_clusters(state, particles, rows)
    report = advance(
        state, newcomers, load, generator=torch.Generator().manual_seed(seed), dropped_uids=dropped,
        quota=max(len(new), int(REVISITED_FRACTION * int(is_kept.sum()))), n_threads=n_threads, check=check,
    )  # fmt: skip
    if report.needs_rebase:
        return None
    note = (
        f"continued from the earlier run's sums: {report.n_new} new, {report.n_revisited} revisited, "
        f"{report.n_dropped} dropped"
    )
    return IncrementalOutcome(_result_of(state, uids), state, note)


def state_after(
    particles: LoadedParticles, result: RefinementResult, settings: RefinementSettings, group: Tensor
) -> IncrementalState | None:
    """Build the state that later runs continue from; None where particles have no uids to know them by."""
    uids = uids_of(particles)
    if uids is None:
        return None
    poses = Hypotheses(
        result.rotations[:, None], result.shifts_xy_px[:, None], result.log_likelihood_gain[:, None]
    )
    data = particles.data
    if bool(result.defocus_offset_angstrom.any()):
        ctf = particles.defocus_model().ctf_at(data.ctf, data.plane.radius, result.defocus_offset_angstrom)
        data = data.with_ctf(ctf)
    return start_state(
        data, uids, particles.half_set, particles.cluster, poses, scales=result.scales,
        weights=result.weights, symmetry=group, settings=settings, n_groups=N_GROUPS,
    )  # fmt: skip


def uids_of(particles: LoadedParticles) -> Tensor | None:
    """Return the uids of the images in use as signed 64-bit integers (same bits), None where there are none."""
    if particles.table.uids is None:
        return None
    uids = particles.table.uids[particles.rows]
    if len(np.unique(uids)) != len(uids):
        return None
    return torch.from_numpy(uids.astype(np.uint64).view(np.int64).copy())


def measure_growth(state: IncrementalState, mask: Tensor, picture: Path) -> dict[str, Any] | None:
    """Measure resolution against the number of particles and draw it; None where too few unions have one."""
    try:
        curve = growth_curve(state, mask)
    except ValueError:
        return None
    with replacing(picture) as temporary:
        save_growth_picture(curve, temporary)
    return _describe(curve)


def _describe(curve: GrowthCurve) -> dict[str, Any]:
    n = curve.points[-1].n_particles
    return {
        "points": [
            {
                "n_particles": round(p.n_particles, 1),
                "resolution_angstrom": p.resolution_angstrom,
                "inverse_square_sd": p.inverse_square_sd,
                "n_unions": p.n_unions,
            }
            for p in curve.points
        ],
        "b_factor_angstrom2": curve.b_factor_angstrom2,
        "slope_per_ln_n": curve.slope,
        "slope_sd": curve.slope_sd,
        "predicted_angstrom_at_2n": dict(zip(("line", "ssnr"), curve.predict(2 * n), strict=True)),
    }


def _read_if_sound(path: Path) -> IncrementalState | None:
    if not path.is_file():
        return None
    try:
        return read_state(path)
    except InputError as error:
        # A damaged state costs time, not the run: everything in it can be computed again.
        log.warning("refinement_state_unusable error=%s", error)
        return None


def _why_not(
    state: IncrementalState,
    particles: LoadedParticles,
    settings: RefinementSettings,
    group: Tensor,
    rows: Tensor,
) -> str | None:
    """Return why a state does not fit a set, None where it does; `rows` are its particles' places or −1."""
    data = particles.data
    is_kept = rows >= 0
    kept, n_old = rows[is_kept], len(rows)
    if state.sums.box_size_px != data.box_size_px:
        return "another box"
    if abs(state.pixel_size_angstrom / data.pixel_size_angstrom - 1.0) > 1e-4:
        return "another pixel size"
    if state.settings != settings:
        return "other settings"
    if state.sums.symmetry.shape != group.shape or not torch.allclose(state.sums.symmetry, group, atol=1e-4):
        return "another symmetry"
    if len(data) - len(kept) > MAX_NEW_FRACTION * n_old:
        return "too many new particles"
    if n_old - len(kept) > MAX_DROPPED_FRACTION * n_old:
        return "too many particles gone"
    if not torch.equal(state.records.inserted.half[is_kept], particles.half_set[kept]):
        return "other half sets"
    power = state.sums.ctf_power_of(data.take(kept))
    if not torch.allclose(power, state.records.ctf_power[is_kept], rtol=_CTF_TOLERANCE):
        return "another CTF"
    return None


def _known_scales(state: IncrementalState, particles: LoadedParticles, rows: Tensor) -> Tensor:
    """Return the scale of every image's micrograph where the sums have particles of it; NaN elsewhere."""
    scales = torch.full((len(particles.micrographs),), float("nan"))
    is_kept = rows >= 0
    micrograph = particles.groups.micrograph[rows[is_kept]]
    is_named = micrograph >= 0
    scales[micrograph[is_named]] = state.records.inserted.scales[is_kept][is_named]
    of_image = particles.groups.micrograph
    unknown = torch.full((len(of_image),), float("nan"))
    return torch.where(of_image >= 0, scales[of_image], unknown) if len(scales) else unknown


def _move_clusters(state: IncrementalState, particles: LoadedParticles, rows: Tensor) -> None:
    """Move what the sums hold of a particle to its cluster of today."""
    kept = torch.nonzero(rows >= 0)[:, 0]
    old = state.records.inserted
    cluster = old.cluster.clone()
    cluster[kept] = particles.cluster[rows[kept]]
    moved = torch.nonzero(cluster != old.cluster)[:, 0]
    if not moved.numel():
        return
    before = old.take(moved)
    state.sums.revise(particles.data.take(rows[moved]), before, replace(before, cluster=cluster[moved]))
    state.records = replace(state.records, inserted=replace(old, cluster=cluster))


def _load_gone(old_poses: Path, root: Path, data: ParticleData, uids: Tensor) -> ParticleData:
    """Load the images that leave, from the earlier run's table, which still names them."""
    old = load_particles(old_poses, root, max_box_px=data.box_size_px)
    old_uids = uids_of(old)
    if old_uids is None:
        raise InputError(old_poses, "poses of a run with a state have uids", "none")
    place = {uid: row for row, uid in enumerate(old_uids.tolist())}
    return old.data.take(torch.tensor([place[uid] for uid in uids.tolist()], dtype=torch.long))


def _result_of(state: IncrementalState, uids: Tensor) -> RefinementResult:
    rows = state.records.rows_of(uids)
    inserted = state.records.inserted.take(rows)
    half1, half2 = half_maps(state)
    return RefinementResult(
        half1=half1,
        half2=half2,
        rotations=inserted.rotations,
        shifts_xy_px=inserted.shifts_xy_px,
        log_likelihood_gain=state.records.gains[rows],
        scales=inserted.scales,
        weights=inserted.weights,
        defocus_offset_angstrom=torch.zeros(len(rows)),
        fsc=references_of(state).fsc,
        n_iterations=state.tick,
    )
