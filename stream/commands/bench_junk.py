"""Benchmark of a session in which half of the exposures are junk, beside the same session without them.

A virtual microscope takes exposures of a good grid square, then as many of a bad one: squares without particles, others
under crystals and aggregates, stage drift, and a beam that is as good as closed. The session has limits as a person
sets them and knows nothing of which is which. Both end with a map; the truth is the
density that the good exposures show. A session that was stopped goes on from its journal when the benchmark is asked
again in the same folder.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from stream.commands.simulate import SimulationSettings, write_simulated_session
from stream.records.errors import ConfigurationError

N_GOOD = 24
MOVIE_SIZE_PX = 768
PARTICLES_PER_MOVIE = 40.0
PIXEL_SIZE_ANGSTROM = 1.5
DOSE_E_PER_ANGSTROM2 = 40.0

_GOOD = SimulationSettings(
    movies=N_GOOD,
    structure="phantom:1:mass_kda=400",
    frames=10,
    size_yx_px=(MOVIE_SIZE_PX, MOVIE_SIZE_PX),
    pixel_size_angstrom=PIXEL_SIZE_ANGSTROM,
    dose_e_per_angstrom2=DOSE_E_PER_ANGSTROM2,
    particles_per_movie=PARTICLES_PER_MOVIE,
    has_gain=False,
    seed=1,
)

JUNK = {
    "empty": replace(_GOOD, contrast=0.0, junk_fraction=0.0, seed=11),
    "crystals": replace(_GOOD, contrast=0.0, junk_fraction=1.0, seed=12),
    "drift": replace(_GOOD, motion_angstrom=150.0, seed=13),
    "faint": replace(_GOOD, dose_e_per_angstrom2=0.5, seed=14),
}
"""What is wrong with a junk exposure; the kinds take turns."""


def run_junk_benchmark(
    folder: Path, *, n_good: int = N_GOOD, part: str | None = None
) -> list[dict[str, Any]]:
    """Run the sessions that `part` names ("with", "without" junk; None = both) and return a figure for each."""
    if part not in (None, "with", "without"):
        raise ConfigurationError("--part", "with, without, or both by leaving it out", part)
    names = ("without", "with") if part is None else (part,)
    return [_run_session(folder, name, n_good) for name in names]


def write_exposures(folder: Path, name: str, n_good: int) -> None:
    """Write the good exposures to `folder/name/movies` and, for "with", as many junk ones after them."""
    movies = folder / name / "movies"
    if movies.is_dir():  # a benchmark that goes on must not find its input changed
        return
    written = movies.with_name("writing")
    write_simulated_session(replace(_GOOD, movies=n_good), written / "good")
    _rename(written / "good" / "movies", movies, "good")
    (written / "good" / "truth" / "map.mrc").rename(folder / name / "truth.mrc")
    for number, (kind, settings) in enumerate(JUNK.items() if name == "with" else ()):
        n_movies = len(range(number, n_good, len(JUNK)))
        write_simulated_session(replace(settings, movies=n_movies), written / kind)
        _rename(written / kind / "movies", movies, kind)


def _rename(source: Path, target: Path, kind: str) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir()):
        path.rename(target / f"{kind}_{path.name}")


def _run_session(folder: Path, name: str, n_good: int) -> dict[str, Any]:
    from stream.config import parse_settings
    from stream.wiring import run_session

    write_exposures(folder, name, n_good)
    root = folder / name
    settings = parse_settings(_document(root), item=name)
    started, started_cpu = time.perf_counter(), time.process_time()
    status = run_session(settings, until_idle=True, in_process=True)
    seconds, cpu_s = time.perf_counter() - started, time.process_time() - started_cpu
    (folder / f"{name}.json").write_text(json.dumps(status, indent=2))
    return describe_session(status, root) | {"seconds": round(seconds, 1), "cpu_s": round(cpu_s, 1)}


def describe_session(status: dict[str, Any], root: Path) -> dict[str, Any]:
    """Return the figures of a session that has ended, and what became of each kind of exposure and its particles."""
    from stream.commands.demo import compare_with_truth
    from stream.control.exposures import ExposureState
    from stream.status import load_controller

    controller = load_controller(root / "session")
    fates, scored, used = Counter[str](), Counter[str](), Counter[str]()
    for record in controller.exposures.values():
        kind = record.name.split("_")[0]
        fates[
            f"{kind}: {record.state.value}" + (f", {record.rejected_by}" if record.rejected_by else "")
        ] += 1
        if record.state is ExposureState.DONE:
            scored[kind] += sum(record.score_histogram or ())
            used[kind] += controller.count_above(record)
    accepted = next((run for run in status["runs"] if run["run_id"] == status["accepted_run"]), None)
    truth = mean_fsc = None
    if accepted is not None:
        truth, curve = compare_with_truth(root / "session" / accepted["folder"], root / "truth.mrc")
        mean_fsc = round(float(curve[1:].mean()), 3)
    return {
        "name": f"junk, a session {root.name} it",
        "value": status["resolution_angstrom"],
        "unit": "Å, accepted map",
        "truth_angstrom": truth,
        "truth_mean_fsc": mean_fsc,
        "cfar": status["cfar"],
        "cfar_null": None if accepted is None else accepted["cfar_null"],
        "particles": None if accepted is None else accepted["particles"],
        "exposures": dict(fates),
        "scored": dict(scored),
        "above_threshold": dict(used),
        "advice": [advice["words"] for advice in status["advice"]],
    }


def _document(root: Path) -> dict[str, Any]:
    return {
        "movies": (root / "movies").absolute(),
        "out": (root / "session").absolute(),
        "microscope": {"voltage_kv": 300.0, "cs_mm": 2.7, "amplitude_contrast": 0.1},
        "acquisition": {
            "pixel_size_angstrom": PIXEL_SIZE_ANGSTROM,
            "dose_e_per_angstrom2": DOSE_E_PER_ANGSTROM2,
        },
        "ingest": {"settle_s": 0.0, "poll_interval_s": 0.5},
        "particle": {"diameter_angstrom": 150.0, "box_size_px": 64, "extract_pixel_size_angstrom": 3.0},
        "quality": {"max_ctf_fit_angstrom": 10.0, "max_total_motion_angstrom": 60.0, "min_picks": 2},
        "policy": {"rungs": [100_000], "final_min_particles": 100},
        "engine": {"n_starts": 2, "effort": "quick"},
        "runtime": {"min_free_disk_bytes": 2**29},
        "telemetry": {"port": None},
    }
