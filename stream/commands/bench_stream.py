"""Benchmark of the stream: movies per hour end to end, against the stages' own times in the same run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stream.config import parse_settings
from stream.records.events import Event, ExposureFound, ExposurePreprocessed, ExposureRanked
from stream.store.journal import read_journal

PIXEL_SIZE_ANGSTROM = 1.5
RANK_WORK = ("lookup", "read", "inference", "store")
"""What the ranker spends itself; its total also has the wait for a batch to fill."""


def run_stream_benchmark(folder: Path, n_movies: int = 24) -> dict[str, Any]:
    """Write movies first, then stream them through Ray actors; engine runs are off.

    Orchestration overhead is what the wall clock took beyond the sum of the stages' own seconds divided by the
    workers, from the start of the first movie to the last score; starting the actors is reported apart.
    """
    from stream.commands.simulate import SimulationSettings, write_simulated_session
    from stream.wiring import count_workers, run_session

    microscope = folder / "microscope"
    write_simulated_session(
        SimulationSettings(
            structure="phantom:1:mass_kda=300",
            movies=n_movies,
            size_yx_px=(1024, 1024),
            frames=16,
            pixel_size_angstrom=PIXEL_SIZE_ANGSTROM,
            particles_per_movie=40,
            seed=1,
        ),
        microscope,
    )
    document: dict[str, Any] = {
        "movies": microscope / "movies",
        "out": folder / "session",
        "microscope": {"voltage_kv": 300, "cs_mm": 2.7},
        "acquisition": {
            "pixel_size_angstrom": PIXEL_SIZE_ANGSTROM,
            "dose_e_per_angstrom2": 40,
            "gain": microscope / "gain.mrc",
        },
        "ingest": {"settle_s": 0.2, "poll_interval_s": 0.5},
        "particle": {"diameter_angstrom": 140, "box_size_px": 64, "extract_pixel_size_angstrom": 3.5},
        "policy": {"enabled": False},
        "runtime": {"min_free_disk_bytes": 0},
        "telemetry": {"port": None},
    }
    settings = parse_settings(document, item="bench stream")
    run_session(settings, until_idle=True)
    return summarize_stream(list(read_journal(settings.out / "journal.sqlite")), count_workers(settings))


def summarize_stream(events: list[Event], n_workers: int) -> dict[str, Any]:
    """Return the figure from a session's events."""
    preprocessed = [e for e in events if isinstance(e, ExposurePreprocessed)]
    ranked = [e for e in events if isinstance(e, ExposureRanked)]
    found = [e for e in events if isinstance(e, ExposureFound)]
    if len(ranked) < 2:
        msg = f"ranked exposures: {len(ranked)}, rule: a stream has at least two"
        raise ValueError(msg)
    first_start = min(e.at - sum(e.result.seconds.values()) for e in preprocessed)
    wall_s = max(e.at for e in ranked) - first_start
    stages_s = sum(sum(e.result.seconds.values()) for e in preprocessed)
    stages_s += sum(e.result.seconds.get(part, 0.0) for e in ranked for part in RANK_WORK)
    ideal_s = stages_s / n_workers
    return {
        "name": "stream",
        "value": 3600.0 * len(ranked) / wall_s,
        "unit": "movies/h (1024² px, 16 frames)",
        "baseline": f"the stages' own times on {n_workers} workers: {3600.0 * len(ranked) / ideal_s:.0f} movies/h",
        "ratio": ideal_s / wall_s,
        "overhead": wall_s / ideal_s - 1.0,
        "wall_s": wall_s,
        "stages_s": stages_s,
        "start_up_s": first_start - min(e.at for e in found),
        "movies": len(ranked),
        "workers": n_workers,
    }
