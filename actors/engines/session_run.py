"""One engine run of a session: from the controller's request to the record it judges.

The run writes into a folder of its own and renames it when it is whole, so a killed run leaves nothing that
looks like a result; asked for again, it goes on from the last iteration that was done. A run that takes longer
than it may, or whose half maps hold a value that is no number, fails.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from actors.engines.base import (
    STATE_NAME,
    Engine,
    EngineInput,
    EngineOutput,
    EngineSettings,
    EngineStopped,
    SeedRefused,
)
from actors.engines.run_figures import read_run_figures
from actors.engines.union_run import UNIONS_NAME
from stream.records.commands import StartRun
from stream.records.errors import ConfigurationError, InputError
from stream.records.values import ClusteringId, RunRequest, RunResult, UnionForecast
from stream.sinks.exporter import write_run_input
from stream.store.layout import OutputLayout

log = logging.getLogger(__name__)


COMPARED_TO_ANGSTROM = 20.0
"""Two maps are compared to the resolution of the new one, or to this where it has none."""


def make_engine(name: str) -> Engine:
    """Return the engine of that name."""
    if name == "embedded":
        from actors.engines.embedded import EmbeddedEngine

        return EmbeddedEngine()
    raise ConfigurationError("engine.name", "the engine is one that this version has: embedded", name)


def run_engine(
    command: StartRun,
    layout: OutputLayout,
    *,
    engine_name: str,
    settings: EngineSettings,
    timeout_s: float = float("inf"),
) -> RunResult:
    """Write the run's particles, reconstruct from nothing or from an earlier map, and measure the result.

    Symmetry and mask are the request's. Raises `EngineStopped` after `timeout_s`.
    """
    request = command.request
    engine = make_engine(engine_name)
    settings = replace(
        settings, symmetry=request.symmetry, mask_diameter_angstrom=request.mask_diameter_angstrom
    )
    deadline = time.monotonic() + timeout_s
    final = layout.run(request.run_id)
    # What a killed attempt left here is continued where its inputs are the same (`checkpoint`), else ignored.
    work = final.with_name(f".tmp-{request.run_id}")
    work.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    particles = work / "particles.star"
    n_particles = write_run_input(layout, command.members, request.model_hash, request.subset, particles)
    seconds = {"collect": time.monotonic() - started}
    log.info("run_started run=%s particles=%d", request.run_id, n_particles)
    source = _engine_input(layout, request, particles)
    initial, poses = _find_start(layout, request)
    try:
        if initial is None:
            started = time.monotonic()
            try:
                initial = engine.initial_model(source, settings, work, should_stop=_is_past(deadline))
            except SeedRefused as refusal:
                seconds["initial_model"] = time.monotonic() - started
                log.warning("seed_refused run=%s reason=%s", request.run_id, refusal)
                shutil.rmtree(final, ignore_errors=True)
                work.rename(final)
                return _refused(request, engine.name, layout, n_particles, refusal, seconds)
            seconds["initial_model"] = time.monotonic() - started
        output = engine.refine(
            source, initial, settings, work, warm_start_poses=poses, should_stop=_is_past(deadline)
        )
    except EngineStopped as stop:
        raise EngineStopped(request.run_id, f"a run ends within {timeout_s:.0f} s", "no result") from stop
    _check_maps(output)
    shutil.rmtree(final, ignore_errors=True)
    work.rename(final)
    if poses is not None and (final / STATE_NAME).is_file():
        # Later runs continue from this one; the earlier state is large and has served.
        poses.with_name(STATE_NAME).unlink(missing_ok=True)
    started = time.monotonic()
    correlation = _correlate(layout, request, final, output.resolution_angstrom)
    if correlation is not None:
        seconds["compare"] = time.monotonic() - started
    return RunResult(
        run_id=request.run_id,
        engine=engine.name,
        n_particles=output.n_particles,
        symmetry=request.symmetry,
        resolution_angstrom=output.resolution_angstrom,
        cfar=output.cfar,
        cfar_null=output.cfar_null,
        scf_star=output.scf_star,
        note=output.note,
        folder=layout.relative(final),
        seconds={**seconds, **output.seconds},
        nyquist_angstrom=_find_nyquist(output),
        correlation=correlation,
        union=read_union(final / UNIONS_NAME),
        figures=read_run_figures(final),
    )


def _engine_input(layout: OutputLayout, request: RunRequest, particles: Path) -> EngineInput:
    """Return the engine's input; sums are kept by cluster where the subset is all of a clustering."""
    clustering = request.subset.clustering
    if clustering is None or request.subset.clusters:
        return EngineInput(particles_star=particles, root=layout.root)
    return EngineInput(
        particles_star=particles,
        root=layout.root,
        clusters=layout.cluster_labels(clustering),
        clustering=clustering,
    )


def _is_past(deadline: float) -> Callable[[], bool]:
    return lambda: time.monotonic() > deadline


def _find_start(layout: OutputLayout, request: RunRequest) -> tuple[Path | None, Path | None]:
    """Return map and poses to start from; a run whose files are gone counts as none."""
    if request.start_map is None:
        return None, None
    folder = layout.run(request.start_map)
    volume, poses = folder / "map.mrc", folder / "poses.star"
    if not volume.is_file():
        log.warning("start_map_missing run=%s folder=%s", request.start_map, folder)
        return None, None
    if request.warm_start is None:
        return volume, None
    return volume, poses if poses.is_file() else None


def _check_maps(output: EngineOutput) -> None:
    """Raise `InputError` when a half map holds a value that is no number."""
    import mrcfile
    import numpy as np

    for path in (output.half1, output.half2):
        with mrcfile.mmap(path) as half:
            if not np.isfinite(half.data).all():
                raise InputError(path, "every value of a half map is a finite number", "NaN or infinity")


def _find_nyquist(output: EngineOutput) -> float | None:
    pixel_size = output.provenance.get("pixel_size_angstrom")
    return None if pixel_size is None else 2.0 * float(pixel_size)


def _correlate(
    layout: OutputLayout, request: RunRequest, folder: Path, resolution_angstrom: float | None
) -> float | None:
    """Return the correlation of the map with that of the run to be compared with, aligned; None without one."""
    if request.compare_with is None:
        return None
    other = layout.run(request.compare_with)
    if not (other / "map.mrc").is_file():
        return None
    import torch

    from models.fourier.volumes import resample_volume
    from models.reconstruction.alignment import align_volumes, apply_alignment, map_correlation
    from models.reconstruction.volume_io import read_volume

    volume, pixel_size = read_volume(folder / "map.mrc")
    mask, _ = read_volume(folder / "mask.mrc")
    reference, other_pixel_size = read_volume(other / "map.mrc")
    reference = resample_volume(reference, other_pixel_size, pixel_size, int(volume.shape[0]))
    alignment = align_volumes(reference, volume, pixel_size, generator=torch.Generator().manual_seed(0))
    aligned = apply_alignment(reference, alignment)
    finest = max(resolution_angstrom or COMPARED_TO_ANGSTROM, 2.0 * pixel_size)
    return map_correlation(volume, aligned, mask, pixel_size, finest)


def read_union(path: Path) -> UnionForecast | None:
    """Return the best union of clusters that the engine foretold; None where it foretold nothing.

    A file that does not say what it has to is no reason to lose the run: it is told of and left aside.
    """
    if not path.is_file():
        return None
    try:
        best: dict[str, Any] | None = json.loads(path.read_text())["best"]
        if best is None:
            return None
        return UnionForecast(
            clustering=ClusteringId(best["clustering"]),
            clusters=tuple(int(label) for label in best["clusters"]),
            n_particles=int(best["n_particles"]),
            resolution_angstrom=best["resolution_angstrom"],
            cfar=best["cfar"],
            cfar_null=best.get("cfar_null"),
        )
    except (ValueError, KeyError, TypeError) as error:
        log.warning("unions_unusable file=%s error=%r", path, error)
        return None


def _refused(
    request: RunRequest,
    engine_name: str,
    layout: OutputLayout,
    n_particles: int,
    refusal: SeedRefused,
    seconds: dict[str, float],
) -> RunResult:
    """Return the record of a run that built nothing: no resolution, and why."""
    return RunResult(
        run_id=request.run_id,
        engine=engine_name,
        n_particles=n_particles,
        symmetry=request.symmetry,
        resolution_angstrom=None,
        cfar=None,
        cfar_null=None,
        scf_star=None,
        note=f"refused: {refusal.rule}",
        folder=layout.relative(layout.run(request.run_id)),
        seconds=seconds,
    )
