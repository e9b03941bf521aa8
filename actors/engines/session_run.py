"""One engine run of a session: from the controller's request to the record it judges.

The run writes into a folder of its own and renames it when it is whole, so a killed run leaves nothing that
looks like a result; asked for again, it goes on from the last iteration that was done.
"""

from __future__ import annotations

import logging
import shutil
import time
from pathlib import Path

from actors.engines.base import (
    STATE_NAME,
    Engine,
    EngineInput,
    EngineOutput,
    EngineSettings,
    SeedRefused,
)
from stream.records.commands import StartRun
from stream.records.errors import ConfigurationError
from stream.records.values import RunId, RunResult
from stream.sinks.exporter import write_run_input
from stream.store.layout import OutputLayout

log = logging.getLogger(__name__)


def make_engine(name: str) -> Engine:
    """Return the engine of that name."""
    if name == "embedded":
        from actors.engines.embedded import EmbeddedEngine

        return EmbeddedEngine()
    raise ConfigurationError("engine.name", "the engine is one that this version has: embedded", name)


def run_engine(
    command: StartRun, layout: OutputLayout, *, engine_name: str, settings: EngineSettings
) -> RunResult:
    """Write the run's particles, reconstruct from nothing or from an earlier map, and measure the result."""
    request = command.request
    engine = make_engine(engine_name)
    final = layout.run(request.run_id)
    # What a killed attempt left here is continued where its inputs are the same (`checkpoint`), else ignored.
    work = final.with_name(f".tmp-{request.run_id}")
    work.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    particles = work / "particles.star"
    n_particles = write_run_input(
        layout, command.members, request.model_hash, request.subset.score_threshold, particles
    )
    collected_s = time.monotonic() - started
    log.info("run_started run=%s particles=%d", request.run_id, n_particles)
    source = EngineInput(particles_star=particles, root=layout.root)
    initial, poses = _find_start(layout, request.warm_start)
    seconds = {"collect": collected_s}
    if initial is None:
        started = time.monotonic()
        try:
            initial = engine.initial_model(source, settings, work)
        except SeedRefused as refusal:
            seconds["initial_model"] = time.monotonic() - started
            log.warning("seed_refused run=%s reason=%s", request.run_id, refusal)
            shutil.rmtree(final, ignore_errors=True)
            work.rename(final)
            return _refused(request.run_id, engine.name, settings, layout, n_particles, refusal, seconds)
        seconds["initial_model"] = time.monotonic() - started
    output = engine.refine(source, initial, settings, work, warm_start_poses=poses)
    shutil.rmtree(final, ignore_errors=True)
    work.rename(final)
    if poses is not None and (final / STATE_NAME).is_file():
        # Later runs continue from this one; the earlier state is large and has served.
        poses.with_name(STATE_NAME).unlink(missing_ok=True)
    return _record(request.run_id, engine.name, settings, layout, final, output, seconds)


def _find_start(layout: OutputLayout, warm_start: RunId | None) -> tuple[Path | None, Path | None]:
    """Return map and poses of the run to start from; a run whose files are gone counts as none."""
    if warm_start is None:
        return None, None
    folder = layout.run(warm_start)
    volume, poses = folder / "map.mrc", folder / "poses.star"
    if volume.is_file() and poses.is_file():
        return volume, poses
    log.warning("warm_start_missing run=%s folder=%s", warm_start, folder)
    return None, None


def _refused(
    run_id: RunId,
    engine_name: str,
    settings: EngineSettings,
    layout: OutputLayout,
    n_particles: int,
    refusal: SeedRefused,
    seconds: dict[str, float],
) -> RunResult:
    """Return the record of a run that built nothing: no resolution, and why."""
    return RunResult(
        run_id=run_id,
        engine=engine_name,
        n_particles=n_particles,
        symmetry=settings.symmetry,
        resolution_angstrom=None,
        cfar=None,
        cfar_null=None,
        scf_star=None,
        note=f"refused: {refusal.rule}",
        folder=layout.relative(layout.run(run_id)),
        seconds=seconds,
    )


def _record(
    run_id: RunId,
    engine_name: str,
    settings: EngineSettings,
    layout: OutputLayout,
    folder: Path,
    output: EngineOutput,
    seconds: dict[str, float],
) -> RunResult:
    return RunResult(
        run_id=run_id,
        engine=engine_name,
        n_particles=output.n_particles,
        symmetry=settings.symmetry,
        resolution_angstrom=output.resolution_angstrom,
        cfar=output.cfar,
        cfar_null=output.cfar_null,
        scf_star=output.scf_star,
        note=output.note,
        folder=layout.relative(folder),
        seconds={**seconds, **output.seconds},
    )
