"""Benchmark of the embedded engine beside RELION on the same particles: initial model, then refinement.

RELION runs with the usual settings of its InitialModel and 3D auto-refine jobs (`INITIAL_MODEL`, `AUTO_REFINE`); both engines refine
from the same start map with the same half sets and mask diameter. RELION's full course takes hours on a CPU: a time limit
stops it, the last map that it wrote is measured, and how far it had come is stated; a higher limit lets it go on. Times are
wall and CPU seconds of both (of RELION's MPI ranks the followers', not the waiting leader's).
"""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stream.commands.engine_sets import SETS, PreparedSet, measure_volume, prepare_set
from stream.commands.relion_runs import TimedRun, run_relion
from stream.records.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable

    from actors.engines.base import EngineInput, EngineSettings
    from actors.engines.embedded import EmbeddedEngine

DEFAULT_SIZE = 1_000
DEFAULT_BOX_PX = 32
DEFAULT_LIMIT_S = 600.0
START_ANGSTROM = 30.0

PROGRAMS = ("initial", "refinement")

INITIAL_MODEL = (
    "--sgd --denovo_3dref --ctf --K 1 --flatten_solvent --zero_mask "
    "--sgd_ini_iter 50 --sgd_inbetween_iter 200 --sgd_fin_iter 50 --sgd_ini_resol 35 --sgd_fin_resol 15 "
    "--sgd_ini_subset 100 --sgd_fin_subset 500 --sgd_write_iter 10 --oversampling 1 --healpix_order 1 "
    "--offset_range 6 --offset_step 4"
)
N_SGD_ITERATIONS = 300

MPI_RUN = "mpirun -n 3 --oversubscribe --allow-run-as-root --bind-to none --mca mpi_yield_when_idle 1"

AUTO_REFINE = (
    "--auto_refine --split_random_halves --ctf --firstiter_cc --flatten_solvent --zero_mask "
    "--oversampling 1 --healpix_order 2 --offset_range 5 --offset_step 2 "
    "--low_resol_join_halves 40 --norm --scale"
)

LOCAL_SEARCH = ("--auto_local_healpix_order", "3")
"""One order earlier than RELION's usual 4: searching everywhere at order 3 takes more than an hour an iteration here."""

COMPUTATION = ("--pool", "3", "--dont_combine_weights_via_disc", "--j", "1")
"""Of both programs; a continued run has to be told them again."""


def run_engine_benchmark(
    folder: Path,
    *,
    n_particles: int = DEFAULT_SIZE,
    box_px: int = DEFAULT_BOX_PX,
    limit_s: float = DEFAULT_LIMIT_S,
    part: str | None = None,
) -> list[dict[str, Any]]:
    """Run the sets of `part` (names with commas, default `ribozyme`); return a figure per set and program.

    `ribozyme:initial` and `ribozyme:refinement` have RELION run one of its programs alone. What a set's folder has
    already is not run again; with a higher limit RELION goes on from where it was stopped.
    """
    names = ["ribozyme"] if part is None else part.split(",")
    for name in names:
        known, _, program = name.partition(":")
        if known not in SETS or program not in ("", *PROGRAMS):
            rule = f"a set is one of {', '.join(SETS)}, alone or with :{' or :'.join(PROGRAMS)}"
            raise ConfigurationError("--part", rule, name)
    if shutil.which("relion_refine_mpi") is None or shutil.which("mpirun") is None:
        raise ConfigurationError("bench engine", "RELION 3.1 and mpirun are on PATH", "relion_refine_mpi")
    return [figure for name in names for figure in _run_set(folder, name, n_particles, box_px, limit_s)]


def _run_set(folder: Path, part: str, n_particles: int, box_px: int, limit_s: float) -> list[dict[str, Any]]:
    name, _, program = part.partition(":")
    work = folder / f"{name}-{n_particles}-{box_px}"
    work.mkdir(parents=True, exist_ok=True)
    prepared = prepare_set(work, name, n_particles, box_px)
    initial = _once(work / "ours_initial.json", lambda: _own_initial_model(prepared))
    figures = []
    if program in ("", "refinement"):
        figures.append(_compare_refinements(prepared, initial, limit_s))
    if program in ("", "initial"):
        figures.append(_compare_initial_models(prepared, initial, limit_s))
    return figures


def _compare_initial_models(prepared: PreparedSet, own: dict[str, Any], limit_s: float) -> dict[str, Any]:
    out = prepared.star.parent / "relion_initial"
    computation = [*COMPUTATION, "--pad", "1", "--skip_gridding"]
    command = ["relion_refine", *relion_input(prepared), *INITIAL_MODEL.split(), *computation]
    time_of = run_relion(command, out, limit_s, resume=tuple(computation))
    measured = {} if own["note"] else measure_map(Path(own["map"]), prepared)
    theirs = _measure_latest(out, r"run_it(\d+)_class001\.mrc", prepared)
    per_iteration = time_of.cpu_s / max(time_of.n_iterations, 1)
    return _figure("initial model", prepared, own, time_of, "--sgd --denovo_3dref", measured, theirs) | {
        "relion_iterations": f"{time_of.n_iterations} of {N_SGD_ITERATIONS}",
        "relion_cpu_s_if_all_iterations_cost_the_same": per_iteration * N_SGD_ITERATIONS,
        "note": own["note"],
    }


def _compare_refinements(prepared: PreparedSet, initial: dict[str, Any], limit_s: float) -> dict[str, Any]:
    work, start = prepared.star.parent, Path(initial["map"])
    own = _once(work / "ours_refined.json", lambda: _own_refinement(prepared, start))
    half1, half2 = own["halves"]
    measured = measure_map(Path(own["map"]), prepared) | measure_halves(Path(half1), Path(half2), prepared)
    computation = [*COMPUTATION, "--pad", "2"]
    command = [
        "relion_refine_mpi", *relion_input(prepared), *AUTO_REFINE.split(), *LOCAL_SEARCH, *computation,
        "--ref", str(start), "--ini_high", f"{START_ANGSTROM:.0f}",
    ]  # fmt: skip
    out = work / "relion_refine"
    time_of = run_relion(
        command, out, limit_s, launcher=tuple(MPI_RUN.split()), resume=(*computation, *LOCAL_SEARCH)
    )
    theirs = _measure_relion_refinement(out, prepared)
    program = "--auto_refine, two MPI followers, from the same start"
    return _figure("refinement", prepared, own, time_of, program, measured, theirs) | {
        "relion_iterations": time_of.n_iterations,
        "relion_is_converged": time_of.is_finished,
        "start": "true map at 30 Å (our initial model was refused)"
        if initial["note"]
        else "our initial model",
    }


def _figure(
    what: str,
    prepared: PreparedSet,
    own: dict[str, Any],
    theirs: TimedRun,
    program: str,
    own_measures: dict[str, Any],
    their_measures: dict[str, Any],
) -> dict[str, Any]:
    return {
        "name": f"{what}, {prepared.name}",
        "value": own["cpu_s"],
        "unit": "CPU s",
        "baseline": f"RELION 3.1.3 relion_refine {program}, same particles (CPU s)",
        "baseline_value": theirs.cpu_s,
        "ratio": own["cpu_s"] / theirs.cpu_s,
        "wall_s": own["wall_s"],
        "relion_wall_s": theirs.wall_s,
        **{f"ours_{k}": v for k, v in own_measures.items()},
        **{f"relion_{k}": v for k, v in their_measures.items()},
        "n_particles": prepared.n_particles,
        "box_px": prepared.truth.shape[-1],
    }


def _once(path: Path, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what `run` gave when it last came to its end, or run it and keep that."""
    if path.is_file():
        kept: dict[str, Any] = json.loads(path.read_text())
        return kept
    wall, cpu = time.perf_counter(), time.process_time()
    result = run()
    result |= {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
    path.write_text(json.dumps(result))
    return result


def _engine_input(prepared: PreparedSet) -> tuple[EmbeddedEngine, EngineInput, EngineSettings]:
    from actors.engines.base import EngineInput, EngineSettings
    from actors.engines.embedded import EmbeddedEngine

    settings = EngineSettings(
        symmetry=prepared.symmetry, mask_diameter_angstrom=prepared.diameter_angstrom, n_starts=4
    )
    return (
        EmbeddedEngine(),
        EngineInput(particles_star=prepared.star, root=prepared.star.parent),
        settings,
    )


def _own_initial_model(prepared: PreparedSet) -> dict[str, Any]:
    from actors.engines.base import SeedRefused

    engine, source, settings = _engine_input(prepared)
    work = prepared.star.parent
    shutil.rmtree(
        work / "ours", ignore_errors=True
    )  # a run that was cut short would be found, and cost nothing
    try:
        path, note = engine.initial_model(source, settings, work / "ours"), ""
    except SeedRefused as refusal:
        path, note = work / "true_start.mrc", f"refused: {refusal.rule}"
        _write_start(path, prepared)
    return {"map": str(path.resolve()), "note": note}


def _own_refinement(prepared: PreparedSet, initial: Path) -> dict[str, Any]:
    engine, source, settings = _engine_input(prepared)
    output = engine.refine(source, initial, settings, prepared.star.parent / "ours")
    return {"map": str(output.map), "halves": [str(output.half1), str(output.half2)]}


def relion_input(prepared: PreparedSet) -> list[str]:
    """Return what both of RELION's programs are told of a set."""
    return [
        "--i", prepared.star.name, "--particle_diameter", f"{prepared.diameter_angstrom:.0f}",
        "--sym", prepared.symmetry, "--random_seed", "1",
    ]  # fmt: skip


def _write_start(path: Path, prepared: PreparedSet) -> None:
    from models.reconstruction.masks import gaussian_lowpass
    from models.reconstruction.volume_io import write_volume

    low = gaussian_lowpass(prepared.truth, prepared.pixel_size_angstrom, START_ANGSTROM)
    write_volume(path, low, prepared.pixel_size_angstrom)


def measure_map(path: Path, prepared: PreparedSet) -> dict[str, Any]:
    """Return what `measure_volume` says of a map file."""
    from models.reconstruction.volume_io import read_volume

    return measure_volume(read_volume(path)[0], prepared)


def measure_halves(half1: Path, half2: Path, prepared: PreparedSet) -> dict[str, Any]:
    """Return the half-maps' resolution (0.143) in one soft sphere of the particle's diameter, for both engines alike."""
    from models.reconstruction.fsc import fourier_shell_correlation, resolution_at
    from models.reconstruction.masks import spherical_mask
    from models.reconstruction.volume_io import read_volume

    a, b = read_volume(half1)[0], read_volume(half2)[0]
    pixel, box = prepared.pixel_size_angstrom, int(a.shape[0])
    ball = spherical_mask(box, 0.5 * prepared.diameter_angstrom / pixel, 3.0)
    curve = fourier_shell_correlation(a * ball, b * ball)
    return {"half_resolution_angstrom": resolution_at(curve, 0.143, pixel, box)}


def _latest(folder: Path, pattern: str) -> Path | None:
    found = [
        (int(match.group(1)), path)
        for path in folder.iterdir()
        if (match := re.fullmatch(pattern, path.name))
    ]
    return max(found)[1] if found else None


def _measure_latest(folder: Path, pattern: str, prepared: PreparedSet) -> dict[str, Any]:
    path = _latest(folder, pattern)
    return {} if path is None else measure_map(path, prepared)


def _measure_relion_refinement(folder: Path, prepared: PreparedSet) -> dict[str, Any]:
    """Measure the converged maps, or the last iteration's where the limit came first."""
    half1, half2 = (folder / f"run_half{h}_class001_unfil.mrc" for h in (1, 2))
    final = folder / "run_class001.mrc"
    if final.is_file() and half1.is_file() and half2.is_file():
        return measure_map(final, prepared) | measure_halves(half1, half2, prepared)
    last = _latest(folder, r"run_it(\d+)_half1_class001\.mrc")
    if last is None or "_it000_" in last.name:
        return {}
    other = last.with_name(last.name.replace("half1", "half2"))
    return measure_map(last, prepared) | measure_halves(last, other, prepared)
