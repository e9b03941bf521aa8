"""What is said while a session runs, one line per thing that happened, on stderr: to a person, or to a program."""

from __future__ import annotations

import re
import time
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

from rich.console import Console
from rich.markup import escape

from stream.control.controller import Controller
from stream.control.decisions import Decision
from stream.records.advice import Advice, AdviceKind, Severity
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
from stream.records.values import AcquisitionMetadata, FileIdentity, PreprocessResult
from stream.status import advise_session
from stream.telemetry.logs import get_logger

log = get_logger(__name__)

N_OLD_DECISIONS_TOLD = 50
"""A session that resumes tells its earlier decisions when they are this few."""

_OF_RUNS = frozenset({AdviceKind.PREFERRED_ORIENTATION, AdviceKind.JUNK, AdviceKind.GROWTH, AdviceKind.STOP})
_WORD_BOUNDARY = re.compile(r"(?<=[a-z])(?=[A-Z])")


class NewDecisions:
    """Gives each decision once; those of a long earlier life of the session are left out."""

    def __init__(self) -> None:
        self._n_told: int | None = None

    def take(self, controller: Controller) -> list[Decision]:
        """Return the decisions since the last call that the controller still remembers."""
        decided = list(controller.decisions)
        if self._n_told is None:
            self._n_told = controller.decisions.n_decided if len(decided) > N_OLD_DECISIONS_TOLD else 0
        n_new, self._n_told = controller.decisions.n_decided - self._n_told, controller.decisions.n_decided
        return decided[-n_new:] if n_new else []


class NewAdvice:
    """Gives advice when it begins to stand, and again when a run has changed it.

    What scores and counts say changes a little with every movie: that is told once, until it stands no more.
    """

    def __init__(self) -> None:
        self._told: set[tuple[AdviceKind, Severity, str]] = set()
        self._is_stale = True

    def note_event(self) -> None:
        """Something has happened: look again at the next call of `take`."""
        self._is_stale = True

    def take(self, controller: Controller) -> list[Advice]:
        """Return what is new since the last call."""
        if not self._is_stale:
            return []
        self._is_stale = False
        standing = {self._key(item): item for item in advise_session(controller)}
        new = [item for key, item in standing.items() if key not in self._told]
        self._told = set(standing)
        return new

    @staticmethod
    def _key(item: Advice) -> tuple[AdviceKind, Severity, str]:
        return item.kind, item.severity, item.words if item.kind in _OF_RUNS else ""


class EventLog:
    """Writes events, decisions and advice to the log, for programs that read it in a person's place."""

    def __init__(self) -> None:
        self._decisions = NewDecisions()
        self._advice = NewAdvice()

    def tell(self, event: Event) -> None:
        """Log one event: its kind, and every plain value of it and of its result."""
        self._advice.note_event()
        log.info(_WORD_BOUNDARY.sub("_", type(event).__name__).lower(), **_plain_fields(event))

    def follow(self, controller: Controller) -> None:
        """Log decisions and advice that are new since the last call."""
        for decision in self._decisions.take(controller):
            log.info("decided", what=decision.what, why=decision.why)
        for advice in self._advice.take(controller):
            tell = log.warning if advice.severity is Severity.WARNING else log.info
            known = {name: value for name, value in advice.numbers.items() if value is not None}
            tell("advice", kind=advice.kind.value, words=advice.words, **known)


def _plain_fields(record: Any) -> dict[str, object]:  # noqa: ANN401 - events and their results share no type
    plain: dict[str, object] = {}
    for field in fields(record):
        value = getattr(record, field.name)
        if isinstance(value, Enum):
            plain[field.name] = value.value
        elif is_dataclass(value) and not isinstance(value, (FileIdentity, AcquisitionMetadata)):
            plain |= _plain_fields(value)
        elif value is None or isinstance(value, (str, int, float)):
            plain[field.name] = value
    return plain


class Narrator:
    """Says what happened; knows names, because results carry ids."""

    def __init__(self, console: Console, score_threshold: float) -> None:
        self._console = console
        self._threshold = score_threshold
        self._names: dict[str, str] = {}
        self._decisions = NewDecisions()
        self._advice = NewAdvice()
        self._at = 0.0

    def tell(self, event: Event) -> None:
        """Print one event; what follows from a person's word or the gain's orientation is a decision."""
        self._advice.note_event()
        self._at = event.at
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

    def follow(self, controller: Controller) -> None:
        """Print decisions and advice that are new since the last call."""
        self._threshold = controller.score_threshold
        for decision in self._decisions.take(controller):
            self._say(decision.at, f"[cyan]decided[/cyan] {escape(decision.what)}: {escape(decision.why)}")
        for advice in self._advice.take(controller):
            colour = "yellow" if advice.severity is Severity.WARNING else "blue"
            self._say(self._at, f"[{colour}]advice[/{colour}] {escape(advice.words)}")

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
