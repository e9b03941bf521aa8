"""Benchmark of the journal: events per second, replay of a 100,000-movie session, memory."""

from __future__ import annotations

import json
import resource
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stream.control.controller import Controller
from stream.control.settings import ControllerSettings, RunPolicy
from stream.records.events import Event, ExposureFound, ExposurePreprocessed, ExposureRanked
from stream.records.particles import derive_exposure_id
from stream.records.values import (
    AcquisitionMetadata,
    CtfFit,
    Exposure,
    FileIdentity,
    InputKind,
    MotionSummary,
    PreprocessResult,
    RankResult,
)
from stream.store.journal import Journal, read_journal

EVENTS_PER_COMMIT = 16
"""What the live loop commits at once when it is busy (measured: 1 to 30)."""


def make_events(n_movies: int, n_particles: int = 300) -> Iterator[Event]:
    """Yield the events of a session in which every movie goes well, three for each."""
    histogram = tuple(n_particles // 100 for _ in range(100))
    for number in range(n_movies):
        name = f"FoilHole_{number:06d}_fractions"
        exposure_id = derive_exposure_id(f"GridSquare/{name}.tiff")
        exposure = Exposure(
            exposure_id=exposure_id,
            name=name,
            kind=InputKind.MOVIE,
            file=FileIdentity(
                path=f"/data/session/GridSquare/{name}.tiff",
                size_bytes=400_000_000,
                mtime_ns=1_760_000_000_000_000_000 + number,
                inode=number,
                fingerprint="0123456789abcdef0123456789abcdef",
            ),
            n_frames=40,
            shape_yx=(3838, 3710),
            metadata=AcquisitionMetadata(pixel_size_angstrom=0.885, voltage_kv=200.0, source="EPU"),
        )
        yield ExposureFound(at=float(number), exposure=exposure)
        result = PreprocessResult(
            exposure_id=exposure_id,
            micrograph=f"micrographs/{name}.mrc",
            thumbnail=f"micrographs/{name}.png",
            particles=f"particles/{name}.mrcs",
            n_picks=n_particles + 5,
            n_particles=n_particles,
            n_excluded_particles=5,
            box_size_px=256,
            pixel_size_angstrom=0.885,
            motion=MotionSummary(
                total_motion_angstrom=12.0, early_motion_angstrom=5.0, late_motion_angstrom=7.0
            ),
            ctf=CtfFit(
                defocus_u_angstrom=11000.0,
                defocus_v_angstrom=10800.0,
                astigmatism_angle_deg=45.0,
                phase_shift_deg=0.0,
                fit_resolution_angstrom=3.5,
                score=0.2,
                is_reliable=True,
            ),
            ice_ratio=1.1,
            seconds={"read": 1.0, "motion": 5.0, "ctf": 1.0, "pick": 1.0, "extract": 1.0, "write": 1.0},
        )
        yield ExposurePreprocessed(at=number + 0.5, result=result)
        ranked = RankResult(
            exposure_id=exposure_id,
            model_hash="f" * 64,
            n_scored=n_particles,
            n_excluded=0,
            n_cache_hits=0,
            score_histogram=histogram,
            seconds={"rank": 2.0},
        )
        yield ExposureRanked(at=number + 0.9, result=ranked)


def run_journal_benchmark(folder: Path, n_movies: int = 100_000) -> list[dict[str, Any]]:
    """Write the journal of a long session and replay it; the baselines are SQLite alone, in the same run."""
    path = folder / "journal.sqlite"
    n_durable = 2000
    with Journal(path) as journal:
        durable_s = _write(journal, make_events(n_durable // 3), EVENTS_PER_COMMIT)
    raw_s = _write_raw(folder / "raw.sqlite", n_durable, EVENTS_PER_COMMIT)
    path.unlink()
    with Journal(path) as journal:
        _write(journal, make_events(n_movies), 1000)
    scan_s = _scan(path)
    replay = _replay_in_child(path, n_movies)
    n_events = 3 * n_movies
    return [
        {
            "name": "journal_append",
            "value": n_durable / durable_s,
            "unit": "events/s",
            "baseline": f"SQLite alone, same row sizes and commits: {n_durable / raw_s:.0f} events/s",
            "ratio": raw_s / durable_s,
            "events_per_commit": EVENTS_PER_COMMIT,
        },
        {
            "name": "journal_replay",
            "value": replay["seconds"],
            "unit": f"s for {n_movies} movies ({n_events} events)",
            "baseline": f"reading the rows alone: {scan_s:.2f} s",
            "ratio": scan_s / replay["seconds"],
            "events_per_s": n_events / replay["seconds"],
            "peak_rss_bytes": replay["peak_rss_bytes"],
            "rss_per_movie_bytes": (replay["peak_rss_bytes"] - replay["rss_before_bytes"]) / n_movies,
            "journal_bytes": path.stat().st_size,
        },
    ]


def replay(path: Path) -> dict[str, Any]:
    """Replay a journal into a controller and report seconds and memory of this process."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    started = time.perf_counter()
    controller = Controller(ControllerSettings(runs=RunPolicy(enabled=False)))
    for event in read_journal(path):
        controller.handle(event)
    seconds = time.perf_counter() - started
    controller.check_invariants()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "seconds": seconds,
        "rss_before_bytes": before,
        "peak_rss_bytes": peak,
        "n_movies": len(controller.exposures),
    }


def _replay_in_child(path: Path, n_movies: int) -> dict[str, Any]:
    program = (
        "import json, sys; from pathlib import Path; from stream.commands.bench_journal import replay; "
        "print(json.dumps(replay(Path(sys.argv[1]))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)], check=True, capture_output=True, text=True
    )
    report: dict[str, Any] = json.loads(done.stdout)
    if report["n_movies"] != n_movies:
        msg = f"replay: {report['n_movies']} movies, rule: all {n_movies} come back"
        raise ValueError(msg)
    return report


def _write(journal: Journal, events: Iterator[Event], n_per_commit: int) -> float:
    batch: list[Event] = []
    spent = 0.0
    for event in events:
        batch.append(event)
        if len(batch) == n_per_commit:
            started = time.perf_counter()
            journal.append(batch)
            spent += time.perf_counter() - started
            batch = []
    started = time.perf_counter()
    journal.append(batch)
    return spent + time.perf_counter() - started


def _write_raw(path: Path, n_events: int, n_per_commit: int) -> float:
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("CREATE TABLE events (seq INTEGER PRIMARY KEY, at REAL, kind TEXT, payload TEXT)")
    row = (0.0, "ExposurePreprocessed", "x" * 600)
    started = time.perf_counter()
    for first in range(0, n_events, n_per_commit):
        with connection:
            n_rows = min(n_per_commit, n_events - first)
            connection.executemany("INSERT INTO events (at, kind, payload) VALUES (?, ?, ?)", [row] * n_rows)
    spent = time.perf_counter() - started
    connection.close()
    return spent


def _scan(path: Path) -> float:
    connection = sqlite3.connect(path)
    started = time.perf_counter()
    total = sum(len(payload) for (payload,) in connection.execute("SELECT payload FROM events ORDER BY seq"))
    spent = time.perf_counter() - started
    connection.close()
    if not total:
        msg = "scan: 0 bytes, rule: a journal has events"
        raise ValueError(msg)
    return spent
