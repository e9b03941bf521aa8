"""Benchmark of the controller: a long session's events live, with campaigns and runs, and the replay of its journal.

The engine is answered for: each run ends at once, with a resolution that follows ln N, so that every rung of the
ladder, every sweep and every rebuild happens. Times are CPU seconds of the process alone: events are made outside of
the clock.
"""

from __future__ import annotations

import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

from stream.commands.bench_journal import make_events
from stream.control.controller import Controller
from stream.control.settings import ControllerSettings
from stream.records.commands import ClusterParticles, Command, StartRun
from stream.records.events import (
    CampaignEnded,
    CampaignStarted,
    Event,
    InputEnded,
    ParticlesClustered,
    RunEnded,
)
from stream.records.values import ClusteringResult, RunResult
from stream.store.journal import Journal, read_journal

N_PARTS = 10
EVENTS_PER_BATCH = 16
"""What the live loop commits at once when it is busy."""


def run_controller_benchmark(folder: Path, n_movies: int = 100_000) -> list[dict[str, Any]]:
    """Play a session into a controller, write its journal and replay it; the baselines are of the same run."""
    path = folder / "journal.sqlite"
    live = _in_child("play", path, n_movies)
    replayed = _in_child("replay", path, n_movies)
    told = ("n_events", "n_particles", "n_campaigns", "n_runs", "accepted")
    if [live[key] for key in told] != [replayed[key] for key in told]:
        msg = f"replay: {replayed}, rule: a replay gives the same state as the session ({live})"
        raise ValueError(msg)
    first, last = live["microseconds_by_part"][0], live["microseconds_by_part"][-1]
    return [
        {
            "name": "controller_live",
            "value": live["n_events"] / live["seconds"],
            "unit": "events/s",
            "baseline": f"the median cost of an event, first and last tenth: {first:.1f}, {last:.1f} µs",
            "ratio": first / last,
            "microseconds_by_part": [round(value, 1) for value in live["microseconds_by_part"]],
            "campaign_ms": round(1e3 * live["campaign_s"] / max(live["n_campaigns"], 1), 1),
            "longest_batch_ms": round(1e3 * live["longest_s"], 1),
            **{key: live[key] for key in told},
            "peak_rss_bytes": live["peak_rss_bytes"],
            "rss_per_movie_bytes": (live["peak_rss_bytes"] - live["rss_before_bytes"]) / n_movies,
        },
        {
            "name": "controller_replay",
            "value": replayed["seconds"],
            "unit": f"s for {n_movies} movies ({replayed['n_events']} events)",
            "baseline": f"reading and decoding the events alone: {replayed['decode_s']:.2f} s",
            "ratio": replayed["decode_s"] / replayed["seconds"],
            "events_per_s": replayed["n_events"] / replayed["seconds"],
            "peak_rss_bytes": replayed["peak_rss_bytes"],
            "journal_bytes": path.stat().st_size,
        },
    ]


def play(path: Path, n_movies: int) -> dict[str, Any]:
    """Play a session of `n_movies` and write its journal; report what the controller alone took."""
    before = _peak_rss()
    controller = Controller(ControllerSettings())
    n_batches = 3 * n_movies // EVENTS_PER_BATCH + 1
    costs: list[list[float]] = [[] for _ in range(N_PARTS)]
    total_s, longest, campaign_s, n_events = 0.0, 0.0, 0.0, 0
    with Journal(path) as journal:
        waiting: list[Event] = []
        for number, batch in enumerate(_batches(n_movies)):
            started = time.process_time()
            committed = _take(controller, batch)
            took = time.process_time() - started
            if any(isinstance(event, CampaignStarted | CampaignEnded) for event in committed):
                # Its exposures are listed then: told apart, because it happens some twenty times in a session.
                campaign_s += took
            else:
                part = min(N_PARTS * number // n_batches, N_PARTS - 1)
                costs[part].append(1e6 * took / len(committed))
            total_s += took
            longest = max(longest, took)
            n_events += len(committed)
            waiting += committed
            if len(waiting) > 1000:
                journal.append(waiting)
                waiting = []
        journal.append(waiting)
    return _describe(controller) | {
        "seconds": total_s,
        "campaign_s": campaign_s,
        # Medians: the collector of garbage stops a batch in a thousand, wherever in the session that is.
        "microseconds_by_part": [median(part) for part in costs],
        "longest_s": longest,
        "n_events": n_events,
        "rss_before_bytes": before,
        "peak_rss_bytes": _peak_rss(),
    }


def replay(path: Path, n_movies: int) -> dict[str, Any]:
    """Replay the journal; report seconds, those of reading alone, and memory."""
    started = time.process_time()
    n_events = sum(1 for _ in read_journal(path))
    decode_s = time.process_time() - started
    started = time.process_time()
    controller = Controller(ControllerSettings())
    for event in read_journal(path):
        controller.handle(event)
    seconds = time.process_time() - started
    controller.check_invariants()
    if len(controller.exposures) != n_movies:
        msg = f"replay: {len(controller.exposures)} movies, rule: all {n_movies} come back"
        raise ValueError(msg)
    return _describe(controller) | {
        "seconds": seconds,
        "decode_s": decode_s,
        "n_events": n_events,
        "peak_rss_bytes": _peak_rss(),
    }


def _describe(controller: Controller) -> dict[str, Any]:
    best = controller.best_run
    return {
        "n_particles": sum(record.n_particles for record in controller.exposures.values()),
        "n_campaigns": len(controller.campaigns),
        "n_runs": len(controller.runs),
        "accepted": None if best is None else best.run_id,
    }


def _batches(n_movies: int) -> Iterator[list[Event]]:
    batch: list[Event] = []
    for event in make_events(n_movies):
        batch.append(event)
        if len(batch) == EVENTS_PER_BATCH:
            yield batch
            batch = []
    yield [*batch, InputEnded(at=float(n_movies))]


def _take(controller: Controller, events: Iterable[Event]) -> list[Event]:
    """Commit events, what the controller proposes, and the engine's answers, as the service does."""
    committed: list[Event] = []
    pending = list(events)
    while pending:
        answers: list[Event] = []
        for event in pending:
            committed.append(event)
            answers += [answer for c in controller.handle(event) if (answer := _answer(c, event.at))]
        pending = answers + controller.propose(committed[-1].at)
    return committed


def _answer(command: Command, at: float) -> Event | None:
    """Return what an engine would say at once; the stages' own results are in the session already."""
    match command:
        case StartRun(request=request):
            n = request.n_particles
            return RunEnded(
                at=at,
                result=RunResult(
                    run_id=request.run_id,
                    engine="embedded",
                    n_particles=n,
                    symmetry=request.symmetry,
                    resolution_angstrom=1.0 / math.sqrt(0.01 * math.log(max(n, 2))),
                    cfar=0.6,
                    cfar_null=0.65,
                    scf_star=0.9,
                    note="",
                    folder=f"runs/{request.run_id}",
                    seconds={"refine": 60.0},
                    nyquist_angstrom=1.8,
                ),
            )
        case ClusterParticles(request=clustering):
            share = 1000
            return ParticlesClustered(
                at=at,
                result=ClusteringResult(
                    clustering_id=clustering.clustering_id,
                    sizes=(share,) * clustering.n_clusters,
                    n_without_features=0,
                    folder=f"runs/{clustering.clustering_id}",
                    seconds={},
                ),
            )
        case _:
            return None


def _peak_rss() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _in_child(what: str, path: Path, n_movies: int) -> dict[str, Any]:
    """Run one half in a process of its own, so that its memory is its own."""
    program = (
        "import json, sys; from pathlib import Path; from stream.commands import bench_controller as b; "
        f"print(json.dumps(b.{what}(Path(sys.argv[1]), int(sys.argv[2]))))"
    )
    command = [sys.executable, "-c", program, str(path), str(n_movies)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    report: dict[str, Any] = json.loads(done.stdout)
    return report
