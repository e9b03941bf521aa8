"""The embedded engine: initial model and gold-standard refinement on this machine's CPU, nothing to install.

Thin by design: the mathematics is in `models.reconstruction`; here particles are loaded, settings translated,
progress and stopping passed through, and the run folder written (each file whole or not at all).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actors.engines.base import (
    STATE_NAME,
    EngineInput,
    EngineOutput,
    EngineProgress,
    EngineSettings,
    EngineStopped,
    ProgressCallback,
    SeedRefused,
    StopCheck,
)
from actors.engines.checkpoint import CHECKPOINT_NAME, Checkpoint, digest_of
from actors.engines.incremental_run import measure_growth, refine_incrementally, state_after
from actors.engines.particle_images import LoadedParticles, load_particles, mask_fraction, read_mask
from actors.engines.run_folder import RunFolder, RunSummary, measure_orientation
from actors.engines.state_file import write_state
from actors.engines.union_run import UNIONS_NAME, write_unions
from models.fourier.point_groups import symmetry_matrices
from models.fourier.rotations import euler_to_matrix
from models.fourier.volumes import resample_volume
from models.reconstruction.acceptance import ROUND_SHARE
from models.reconstruction.cross_evidence import SHARED_MISTAKES, cross_half_evidence
from models.reconstruction.fsc import masked_fsc
from models.reconstruction.half_set import WarmPoses
from models.reconstruction.halfmaps import combine_halves
from models.reconstruction.incremental import IncrementalState
from models.reconstruction.initial_model import InitialModel, find_initial_model
from models.reconstruction.local_resolution import local_resolution
from models.reconstruction.masks import mask_from_map
from models.reconstruction.online_em import EmProgress, OnlineEmSettings
from models.reconstruction.pose_schedule import RefinementSettings
from models.reconstruction.refinement import (
    Refinement,
    RefinementProgress,
    RefinementResult,
)
from models.reconstruction.symmetry import impose_symmetry, symmetry_score
from models.reconstruction.volume_io import read_volume, write_volume
from stream.ingest.particle_sets import read_particle_table
from stream.records.errors import ConfigurationError, InputError, ResourceError
from stream.store.files import replacing

_EFFORT = {"quick": (50, 300), "normal": (80, 400), "thorough": (120, 600)}
"""Iterations and last batch of the initial model. The full recipe is "thorough"; weaker ones need more starts."""

PIXEL_SIZE_TOLERANCE = 0.02
"""Relative; calibrations of one microscope differ by less, binning by more."""

MIN_SYMMETRY_SCORE = 0.5
"""A start map whose copies correlate less is searched for its axes before the group is imposed."""


class EmbeddedEngine:
    """Online EM and FSC-regularised refinement in PyTorch (`models.reconstruction`)."""

    @property
    def name(self) -> str:
        """The engine's name."""
        return "embedded"

    def initial_model(
        self,
        source: EngineInput,
        settings: EngineSettings,
        out: Path,
        progress: ProgressCallback | None = None,
        should_stop: StopCheck | None = None,
    ) -> Path:
        """Find a map from nothing and write it to `out/initial.mrc` (and initial.json: every start tried)."""
        started = time.monotonic()
        folder = RunFolder(out)
        digest = digest_of(settings, source.particles_star)
        if folder.has_initial_model(digest):
            return folder.initial_map
        group = _group(settings.symmetry)
        particles = load_particles(source.particles_star, source.root, max_box_px=settings.max_box_px)
        data = particles.data
        n_iterations, last_batch = _EFFORT[settings.effort]
        em_settings = OnlineEmSettings(
            n_iterations=n_iterations,
            last_batch=last_batch,
            mask_diameter_fraction=mask_fraction(
                settings.mask_diameter_angstrom, particles.data.box_angstrom
            ),
        )

        def report(phase: str, step: EmProgress) -> None:
            _check(should_stop, source.particles_star)
            if progress is not None:
                resolution = data.box_angstrom / step.shell
                text = f"{phase}: iteration {step.iteration}/{step.n_iterations}, {resolution:.1f} Å"
                progress(
                    EngineProgress(
                        phase="initial_model",
                        iteration=step.iteration,
                        n_iterations=step.n_iterations,
                        resolution_angstrom=resolution,
                        text=text,
                    )
                )

        with _one_thread():
            model = find_initial_model(
                data,
                em_settings,
                group,
                n_starts=settings.n_starts,
                seed=settings.seed,
                n_threads=settings.n_threads,
                on_progress=report,
            )
        description = _describe(model, settings, time.monotonic() - started)
        with _writing(out):
            folder.write_json(folder.initial_summary, description | {"digest": digest})
        if model.acceptance.reason is not None:
            rule = f"the particles determine a map; {model.acceptance.reason}"
            raise SeedRefused(source.particles_star, rule, f"{len(data)} particles")
        with _writing(out), replacing(folder.initial_map) as temporary:
            write_volume(temporary, model.volume, data.pixel_size_angstrom)
        return folder.initial_map

    def refine(
        self,
        source: EngineInput,
        initial_map: Path,
        settings: EngineSettings,
        out: Path,
        warm_start_poses: Path | None = None,
        progress: ProgressCallback | None = None,
        should_stop: StopCheck | None = None,
    ) -> EngineOutput:
        """Refine both halves from the map's 30 Å shape (and known poses); write the run folder into `out`."""
        clock = _Clock()
        group = _group(settings.symmetry)
        particles = load_particles(
            source.particles_star, source.root, max_box_px=settings.max_box_px, clusters=source.clusters
        )
        notes = _loading_notes(particles)
        reference = _reference(initial_map, particles, group, settings.symmetry, notes)
        mask = None if settings.mask is None else read_mask(settings.mask, particles)
        warm = _warm_poses(warm_start_poses, source.root, particles, notes)
        clock.lap("load")

        def check() -> None:
            _check(should_stop, source.particles_star)

        def report(step: RefinementProgress) -> None:
            if progress is not None:
                kind = "global" if step.is_global else "local"
                text = f"{kind} search {step.iteration}/{step.n_iterations}: {step.resolution_angstrom:.1f} Å"
                progress(
                    EngineProgress(
                        phase="refine",
                        iteration=step.iteration,
                        n_iterations=step.n_iterations,
                        resolution_angstrom=step.resolution_angstrom,
                        text=text,
                    )
                )

        own = _refinement_settings(settings, particles)
        with _one_thread():
            outcome = None
            # The sums know neither a mask of the user's nor defocus that changes.
            if warm_start_poses is not None and mask is None and not settings.refine_defocus:
                outcome = refine_incrementally(
                    particles, warm_start_poses.with_name(STATE_NAME), warm_start_poses, source.root, own, group,
                    seed=settings.seed, n_threads=settings.n_threads, check=check,
                )  # fmt: skip
            if outcome is None:
                checkpoint = Checkpoint(
                    out / CHECKPOINT_NAME,
                    digest_of(settings, source.particles_star, initial_map, warm_start_poses, settings.mask),
                )
                result = _refine(
                    particles, reference, mask, settings, own, group, warm, check, report, checkpoint
                )
                state = state_after(particles, result, own, group)
            else:
                result, state = outcome.result, outcome.state
                notes.append(outcome.note)
        clock.lap("refine")
        folder = RunFolder(out)
        with _writing(out):
            if state is not None:
                write_state(folder.state, state)
            clock.lap("state")
            output = _finish(particles, result, state, mask, settings, source, group, folder, clock, notes)
            (out / CHECKPOINT_NAME).unlink(missing_ok=True)
        return output

    def orientation_diagnostics(self, out: Path) -> Mapping[str, Any]:
        """Measure the diagnostics of a finished run folder again, from its half maps, mask and poses."""
        folder = RunFolder(out)
        half1, pixel_size = read_volume(folder.half1)
        half2, _ = read_volume(folder.half2)
        mask, _ = read_volume(folder.mask)
        table = read_particle_table(folder.poses, require_ctf=False)
        if table.euler_deg is None:
            raise InputError(folder.poses, "a pose file has Euler angles", "none")
        rotations = euler_to_matrix(torch.from_numpy(table.euler_deg).float())
        group = _group(str(folder.read_json(folder.summary)["symmetry"]))
        diagnostics = measure_orientation(half1, half2, mask, pixel_size, group, rotations, folder)
        return diagnostics.summary()


class _Clock:
    """Seconds per part of a run."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.seconds[name] = round(now - self._last, 3)
        self._last = now


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one thread per worker: parallelism comes from starts and halves, not from splitting products."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    """Name what could not be written: a full disk is no fault of the particles, and the run may be tried again."""
    try:
        yield
    except OSError as error:
        raise ResourceError(target, "the disk takes what a run writes", error) from error


def _check(should_stop: StopCheck | None, item: Path) -> None:
    if should_stop is not None and should_stop():
        raise EngineStopped(item, "the run was asked to stop before it was done")


def _group(symmetry: str) -> Tensor:
    try:
        return symmetry_matrices(symmetry).float()
    except ValueError as error:
        raise ConfigurationError("symmetry", "a point group is Cn, Dn, T, O or I", symmetry) from error


def _reference(
    initial_map: Path, particles: LoadedParticles, group: Tensor, symmetry: str, notes: list[str]
) -> Tensor:
    """Read the start map onto the working grid; if it lacks the group's axes where they belong, find them."""
    data = particles.data
    try:
        volume, pixel_size = read_volume(initial_map)
    except ValueError as error:
        raise InputError(initial_map, "the initial map is a finite cubic MRC map", error) from error
    volume = resample_volume(volume, pixel_size, data.pixel_size_angstrom, data.box_size_px)
    if len(group) == 1:
        return volume
    score = symmetry_score(volume, group, max_shell=8.0)
    if score >= MIN_SYMMETRY_SCORE:
        notes.append(f"the initial map has {symmetry} with score {score:.2f} (1 = exact)")
        return volume
    fit = impose_symmetry(volume, group, max_shell=9.0)
    notes.append(f"symmetry axes found on the initial map with score {fit.score:.2f} (1 = exact)")
    if fit.score < MIN_SYMMETRY_SCORE:
        notes.append(f"the initial map does not have {symmetry}: it was imposed nevertheless")
    return fit.symmetrised


def _warm_poses(
    poses: Path | None, root: Path, particles: LoadedParticles, notes: list[str]
) -> WarmPoses | None:
    """Match an earlier run's poses by uid, or by stack and index where either side has no uid."""
    if poses is None:
        return None
    old, new, rows = read_particle_table(poses, root=root, require_ctf=False), particles.table, particles.rows
    if old.euler_deg is None or old.origin_xy_angstrom is None:
        raise InputError(poses, "warm-start poses have angles and origins", "none")
    if old.uids is not None and new.uids is not None:
        old_keys: list[Any] = [int(uid) for uid in old.uids]
        new_keys: list[Any] = [int(uid) for uid in new.uids[rows]]
    else:
        old_keys = list(zip(old.stack_paths.tolist(), old.stack_indices.tolist(), strict=True))
        new_keys = list(zip(new.stack_paths[rows].tolist(), new.stack_indices[rows].tolist(), strict=True))
    place = {key: i for i, key in enumerate(old_keys)}
    found = np.array([place.get(key, -1) for key in new_keys], dtype=np.int64)
    is_known = torch.from_numpy(found >= 0)
    n_unknown = len(place) - int(is_known.sum())
    if n_unknown:
        notes.append(f"{n_unknown} earlier poses belong to particles that are not in this set")
    euler = torch.from_numpy(old.euler_deg[np.maximum(found, 0)]).float()
    origin = torch.from_numpy(old.origin_xy_angstrom[np.maximum(found, 0)]).float()
    return WarmPoses(euler_to_matrix(euler), origin / particles.data.pixel_size_angstrom, is_known)


def _refinement_settings(settings: EngineSettings, particles: LoadedParticles) -> RefinementSettings:
    own = RefinementSettings(
        mask_diameter_fraction=mask_fraction(settings.mask_diameter_angstrom, particles.data.box_angstrom)
    )
    return replace(own, n_global=2, n_local=3) if settings.effort == "quick" else own


def _refine(
    particles: LoadedParticles,
    reference: Tensor,
    mask: Tensor | None,
    settings: EngineSettings,
    own: RefinementSettings,
    group: Tensor,
    warm: WarmPoses | None,
    check: Callable[[], None],
    report: Callable[[RefinementProgress], None],
    checkpoint: Checkpoint,
) -> RefinementResult:
    generator = torch.Generator().manual_seed(settings.seed)
    try:
        refinement = Refinement(
            particles.data, particles.half_set, reference, own, group, generator, warm, check,
            groups=particles.groups, solvent_mask=mask, n_threads=settings.n_threads,
            defocus=particles.defocus_model() if settings.refine_defocus else None,
        )  # fmt: skip
    except ValueError as error:
        raise InputError(particles.table.source, "the initial map fits the images", error) from error
    checkpoint.restore(refinement)
    while not refinement.is_done:
        check()
        step = refinement.step()
        with _writing(checkpoint.path):
            checkpoint.save(refinement)
        report(step)
    return refinement.result()


def _finish(
    particles: LoadedParticles,
    result: RefinementResult,
    state: IncrementalState | None,
    given_mask: Tensor | None,
    settings: EngineSettings,
    source: EngineInput,
    group: Tensor,
    folder: RunFolder,
    clock: _Clock,
    notes: list[str],
) -> EngineOutput:
    """Measure the half maps and write everything."""
    data = particles.data
    pixel_size = data.pixel_size_angstrom
    generator = torch.Generator().manual_seed(settings.seed + 1)
    mask = given_mask
    if mask is None:
        mask = mask_from_map(0.5 * (result.half1 + result.half2), pixel_size)
    curves = masked_fsc(result.half1, result.half2, mask, pixel_size, generator=generator)
    evidence = cross_half_evidence(
        data, particles.half_set, (result.half1, result.half2), curves.unmasked, mask, group, generator
    )
    if curves.resolution_angstrom is None:
        notes.append("the halves do not correlate beyond chance: no resolution")
    elif not evidence.is_supported:
        notes.append(
            f"the halves agree to {curves.resolution_angstrom:.1f} Å, but the particles of one do not support the map "
            f"of the other ({evidence.log_evidence:.2f} nats each, {evidence.z:.1f} standard deviations above noise): "
            "no resolution"
        )
        curves = replace(curves, resolution_angstrom=None, is_at_nyquist=False)
    elif evidence.elsewhere > SHARED_MISTAKES:
        notes.append(
            f"about {100 * evidence.elsewhere:.0f} % of the poses may be those of another, nearly equal view: both "
            "halves make the same mistakes, so that the resolution is probably too high"
        )
    combined = combine_halves(
        result.half1, result.half2, curves.corrected, pixel_size, curves.resolution_angstrom
    )
    folder.write_maps(
        {"map": combined.volume, "half1": result.half1, "half2": result.half2, "mask": mask}, pixel_size
    )
    folder.write_fsc(curves)
    folder.write_poses(particles, result)
    clock.lap("write")
    diagnostics = measure_orientation(
        result.half1, result.half2, mask, pixel_size, group, result.rotations, folder
    )
    folder.write_pictures(combined.volume, curves, diagnostics, pixel_size)
    clock.lap("orientation")
    local = None
    if curves.resolution_angstrom is not None:
        found = local_resolution(result.half1, result.half2, mask, pixel_size)
        local = folder.write_local_resolution(found, combined.volume, pixel_size)
    clock.lap("local_resolution")
    growth = None if state is None else measure_growth(state, mask, folder.growth_picture)
    if state is not None and source.clusters is not None:
        write_unions(
            state,
            mask,
            folder.path / UNIONS_NAME,
            clustering=source.clustering,
            cfar_null=diagnostics.cfar_null,
        )
    clock.lap("growth")
    if curves.is_at_nyquist:
        notes.append("the FSC stays above 0.143 to Nyquist: smaller pixels would show more")
    if pixel_size > particles.table.pixel_size_angstrom[0] * 1.001:
        notes.append(f"images were reduced to {data.box_size_px} px of {pixel_size:.3f} Å")
    notes.append("the hand of the map is not determined")
    summary = RunSummary(
        particles=particles,
        settings=settings,
        curves=curves,
        diagnostics=diagnostics,
        b_factor_angstrom2=combined.b_factor_angstrom2,
        n_iterations=result.n_iterations,
        notes=tuple(notes),
        seconds=clock.seconds,
        growth=growth,
        local_resolution=local,
        images=_describe_images(particles, result),
        cross_evidence=asdict(evidence),
    )
    return folder.write_summary(summary)


def _describe_images(particles: LoadedParticles, result: RefinementResult) -> dict[str, Any]:
    """Say what the refinement found out about single images and micrographs."""
    micrograph, offset = particles.groups.micrograph, result.defocus_offset_angstrom
    named = [(name, result.scales[micrograph == i]) for i, name in enumerate(particles.micrographs)]
    return {
        "scale_of_micrograph": {name: round(float(s.mean()), 4) for name, s in named if len(s)},
        "n_below_half_weight": int((result.weights < 0.5).sum()),
        "mean_weight": float(result.weights.mean()),
        "defocus_offset_sd_angstrom": float(offset.std()) if bool(offset.any()) else None,
    }


def _loading_notes(particles: LoadedParticles) -> list[str]:
    notes = [f"{n} particles left out: {reason}" for reason, n in particles.excluded.items()]
    told = particles.stack_pixel_size_angstrom
    used = float(particles.table.pixel_size_angstrom[0])
    # 1 Å is what programs write that do not know.
    if told is not None and abs(told - 1.0) > 1e-3 and abs(told / used - 1.0) > PIXEL_SIZE_TOLERANCE:
        notes.append(f"the stacks' headers say {told:.3f} Å per pixel, the table {used:.3f} Å: one is wrong")
    return notes


def _describe(model: InitialModel, settings: EngineSettings, seconds: float) -> dict[str, Any]:
    return {
        "symmetry": settings.symmetry,
        "starts": [{"name": r.name, "log_evidence_nats": round(r.log_evidence, 4)} for r in model.reports],
        "evidence_spread_nats": model.evidence_spread,
        "symmetry_score": model.symmetry_score,
        "acceptance": asdict(model.acceptance)
        | {
            "is_accepted": model.acceptance.is_accepted,
            "reason": model.acceptance.reason,
            "shape_share": model.acceptance.shape_share,
            "is_round": model.acceptance.shape_share < ROUND_SHARE,
        },
        "seed": settings.seed,
        "effort": settings.effort,
        "seconds": round(seconds, 2),
    }
