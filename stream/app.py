"""The live service: source → journal → controller → runtime, in one loop and one thread.

Clock: wall time enters here and travels with events. Failure: an event that cannot be written stops the
service (exit 1), because nothing may run whose event is not on disk; everything else becomes an event.
"""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from actors.interface import Runtime
from stream import __version__
from stream.config import SessionSettings
from stream.control.controller import Controller
from stream.control.exposures import ExposureState
from stream.records.events import (
    DiskSpaceChanged,
    DrainRequested,
    Event,
    InputEnded,
    SessionOpened,
)
from stream.records.values import Stage
from stream.requests import take_inbox
from stream.status import advise_session
from stream.store.files import replacing
from stream.store.inbox import Inbox
from stream.store.journal import Journal
from stream.store.layout import OutputLayout
from stream.telemetry.logs import get_logger
from stream.telemetry.metrics import Snapshot, Telemetry, Volume
from stream.training_job import TrainingRunner

log = get_logger(__name__)

DISK_CHECK_INTERVAL_S = 5.0
INBOX_CHECK_INTERVAL_S = 1.0
SNAPSHOT_INTERVAL_S = 1.0


class Source(Protocol):
    """Where exposures come from."""

    def poll(self, now: float) -> Sequence[Event]:
        """Return the files that have settled since the last call, stamped with `now`."""

    @property
    def is_quiet(self) -> bool:
        """True when the first scan is over and nothing waits to settle."""

    @property
    def problem(self) -> str | None:
        """Why nothing can be noticed now, or None."""

    def take_dropped(self) -> list[str]:
        """Return one line for each file that vanished before its verdict."""

    def close(self) -> None:
        """Stop watching."""


class Service:
    """One session on one output folder."""

    def __init__(
        self,
        settings: SessionSettings,
        *,
        controller: Controller,
        journal: Journal,
        source: Source,
        runtime: Runtime,
        telemetry: Telemetry,
        trainer: TrainingRunner | None = None,
        clock: Callable[[], float] = time.time,
        on_event: Callable[[Event], None] | None = None,
    ) -> None:
        self.settings = settings
        self.controller = controller
        self._journal = journal
        self._source = source
        self._runtime = runtime
        self._telemetry = telemetry
        self._trainer = trainer
        self._clock = clock
        self._on_event = on_event
        self._inbox = Inbox(OutputLayout(settings.out).inbox)
        self._next_disk_check = 0.0
        self._next_inbox_check = 0.0
        self._next_snapshot = 0.0
        self._is_disk_low = False
        self._n_done_at_size_check = -1
        self._problem: str | None = None
        self._quarantine_reasons: Counter[str] = Counter()

    def open(self) -> None:
        """Commit that the session is open; what was in work when it closed is issued again."""
        self._take(
            [SessionOpened(at=self._clock(), settings_digest=self.settings.digest(), version=__version__)]
        )

    def step(self, timeout_s: float) -> None:
        """Take what has come in, once; waits at most `timeout_s` for it."""
        now = self._clock()
        events: list[Event] = self._check_disk(now)
        if not self.controller.is_draining:
            events += self._source.poll(now)
            self._tell_troubles()
        events += self._runtime.poll(0.0 if events else timeout_s)
        self._take(events)
        if now >= self._next_inbox_check:
            self._next_inbox_check = now + INBOX_CHECK_INTERVAL_S
            take_inbox(self._inbox, self.controller, now, lambda event: self._take([event]))
            if self._trainer is not None:
                self._take(self._trainer.poll(now, self.controller))
        if now >= self._next_snapshot:
            self._next_snapshot = now + SNAPSHOT_INTERVAL_S
            self._telemetry.set_gauges(self._snapshot())

    def end_input(self) -> None:
        """Say that no more input will come."""
        if not self.controller.is_input_ended:
            self._take([InputEnded(at=self._clock())])

    def drain(self) -> None:
        """Start nothing new; what is in work may end."""
        if not self.controller.is_draining:
            self._take([DrainRequested(at=self._clock())])

    @property
    def is_input_quiet(self) -> bool:
        """True when every file that is there has been taken."""
        return self._source.is_quiet

    @property
    def has_stage_in_work(self) -> bool:
        """True while an exposure is in work; an engine run does not count, it is issued again."""
        return any(self.controller.count_in_flight(stage) for stage in Stage)

    def close(self) -> None:
        """Stop everything; the journal stays whole whatever is in work."""
        self._telemetry.set_gauges(self._snapshot())
        self._source.close()
        if self._trainer is not None:
            self._trainer.close()
        self._runtime.close()
        self._telemetry.close()
        self._journal.close()

    def _take(self, events: Iterable[Event]) -> None:
        """Commit events and do what follows, until the controller proposes nothing more."""
        pending = list(events)
        while pending:
            self._journal.append(pending)
            for event in pending:
                commands = self.controller.handle(event)
                self._telemetry.observe(event, score_threshold=self.controller.score_threshold)
                if self._on_event is not None:
                    self._on_event(event)
                for command in commands:
                    self._runtime.submit(command)
            pending = self.controller.propose(self._clock())

    def _tell_troubles(self) -> None:
        for line in self._source.take_dropped():
            log.warning("file_vanished", what=line)
        if self._source.problem != self._problem:
            self._problem = self._source.problem
            log.warning("input_folder", problem=self._problem)

    def _check_disk(self, now: float) -> list[Event]:
        if now < self._next_disk_check:
            return []
        self._next_disk_check = now + DISK_CHECK_INTERVAL_S
        free = shutil.disk_usage(self.settings.out).free
        reserve = self.settings.runtime.min_free_disk_bytes
        # Coming back asks for a tenth more than the reserve, so that the state does not flutter.
        is_low = free < (reserve * 1.1 if self._is_disk_low else reserve)
        if is_low == self._is_disk_low:
            return []
        self._is_disk_low = is_low
        log.warning("disk_space_changed", is_low=is_low, free_bytes=free, reserve_bytes=reserve)
        return [DiskSpaceChanged(at=now, is_low=is_low, free_bytes=free)]

    def _snapshot(self) -> Snapshot:
        controller = self.controller
        usage = shutil.disk_usage(self.settings.out)
        snapshot = Snapshot(
            n_found=len(controller.exposures),
            states={state.value: controller.n_by_state[state] for state in ExposureState},
            rejected_by=controller.n_rejected_by,
            n_particles_in_use=controller.n_above_threshold,
            advice=advise_session(controller),
            accepted_map=controller.best_run,
            gain_residual=controller.gain_residual.mean,
            gain_residual_limit=controller.settings.max_gain_residual,
            is_gain_unknown=controller.gain.is_given_up,
            queue_depth={stage.value: controller.count_waiting(stage) for stage in Stage},
            inflight={stage.value: controller.count_in_flight(stage) for stage in Stage},
            quarantine_reasons=self._count_quarantine_reasons(),
            worker_restarts=self._runtime.worker_restarts,
            volumes={"output": Volume(free_bytes=usage.free, size_bytes=usage.total)},
        )
        if controller.n_by_state[ExposureState.DONE] == self._n_done_at_size_check:
            return snapshot
        self._n_done_at_size_check = controller.n_by_state[ExposureState.DONE]
        return replace(snapshot, feature_cache_bytes=_folder_bytes(OutputLayout(self.settings.out).features))

    def _count_quarantine_reasons(self) -> Counter[str]:
        """Count the reasons anew only when the quarantine has changed: sessions grow to 100,000 exposures."""
        n_quarantined = self.controller.n_by_state[ExposureState.QUARANTINED]
        if n_quarantined != sum(self._quarantine_reasons.values()):
            records = self.controller.exposures.values()
            held = (r.reason for r in records if r.state is ExposureState.QUARANTINED)
            self._quarantine_reasons = Counter(held)
        return self._quarantine_reasons


def _folder_bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:  # a segment that was compacted away while we looked
            continue
    return total


def write_session(settings: SessionSettings, layout: OutputLayout) -> None:
    """Write the configuration as used, with every default, where a restart and `status` find it."""
    with replacing(layout.session) as temporary:
        temporary.write_text(settings.to_yaml(), encoding="utf-8")
