"""What a person reads while a session runs: one line per thing that happened, on stderr."""

from __future__ import annotations

import time

from rich.console import Console
from rich.markup import escape

from stream.app import Service
from stream.records.events import (
    DiskSpaceChanged,
    DrainRequested,
    Event,
    ExposureFound,
    ExposurePreprocessed,
    ExposureRanked,
    FileRejected,
    InputEnded,
    RunEnded,
    RunFailed,
    SessionOpened,
    StageFailed,
)
from stream.records.values import PreprocessResult


class Narrator:
    """Says what happened; knows names, because results carry ids."""

    def __init__(self, console: Console, score_threshold: float) -> None:
        self._console = console
        self._threshold = score_threshold
        self._names: dict[str, str] = {}
        self._n_decisions_told = 0

    def tell(self, event: Event) -> None:
        """Print one event."""
        match event:
            case SessionOpened():
                self._say(event.at, "session open")
            case ExposureFound(exposure=exposure):
                self._names[exposure.exposure_id] = exposure.name
                self._say(
                    event.at, f"found {exposure.name} ({exposure.kind.value}, {exposure.n_frames} frames)"
                )
            case FileRejected():
                self._say(event.at, f"[yellow]quarantine[/yellow] {escape(event.reason)}")
            case ExposurePreprocessed(result=result):
                self._say(event.at, f"{self._name(result.exposure_id)}: {_describe(result)}")
            case ExposureRanked(result=ranked):
                n_bins = len(ranked.score_histogram)
                n_good = sum(ranked.score_histogram[round(self._threshold * n_bins) :])
                self._say(
                    event.at,
                    f"{self._name(ranked.exposure_id)}: {ranked.n_scored} scored, {n_good} above {self._threshold}",
                )
            case StageFailed():
                self._say(event.at, f"[yellow]{event.stage.value} failed[/yellow] {escape(event.reason)}")
            case RunEnded(result=run):
                resolution = (
                    "no resolution" if run.resolution_angstrom is None else f"{run.resolution_angstrom:.2f} Å"
                )
                cfar = "?" if run.cfar is None else f"{run.cfar:.2f}"
                self._say(
                    event.at,
                    f"[green]{run.run_id}[/green] {run.n_particles} particles: {resolution}, cFAR {cfar}",
                )
            case RunFailed():
                self._say(event.at, f"[red]{event.run_id} failed[/red] {escape(event.reason)}")
            case DiskSpaceChanged():
                state = "under the reserve: nothing new starts" if event.is_low else "back above the reserve"
                self._say(event.at, f"[yellow]disk[/yellow] {event.free_bytes / 2**30:.1f} GiB free, {state}")
            case InputEnded():
                self._say(event.at, "no more input")
            case DrainRequested():
                self._say(event.at, "draining: what is in work ends, nothing new starts")

    def follow(self, service: Service) -> None:
        """Print decisions that are new since the last call."""
        decisions = service.controller.decisions
        if self._n_decisions_told == 0 and len(decisions) > 50:
            self._n_decisions_told = len(decisions)
        for decision in list(decisions)[self._n_decisions_told :]:
            self._say(decision.at, f"[cyan]decided[/cyan] {decision.what}: {decision.why}")
        self._n_decisions_told = len(decisions)

    def _name(self, exposure_id: str) -> str:
        return self._names.get(exposure_id, exposure_id)

    def _say(self, at: float, text: str) -> None:
        clock = time.strftime("%H:%M:%S", time.localtime(at))
        self._console.print(f"[dim]{clock}[/dim] {text}", highlight=False, soft_wrap=True)


def _describe(result: PreprocessResult) -> str:
    parts = [f"{result.n_particles} particles"]
    if result.motion is not None:
        parts.append(f"motion {result.motion.total_motion_angstrom:.1f} Å")
    if result.ctf is not None and result.ctf.is_reliable:
        mean = (result.ctf.defocus_u_angstrom + result.ctf.defocus_v_angstrom) / 2
        parts.append(f"defocus {mean / 1e4:.2f} µm, fit to {result.ctf.fit_resolution_angstrom:.1f} Å")
    elif result.ctf is not None:
        parts.append("no Thon rings")
    return f"{', '.join(parts)} ({sum(result.seconds.values()):.1f} s)"
