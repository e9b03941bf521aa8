"""The in-process runtime: the same interface as Ray's, one command after the other, for tests and debugging.

Exposures go before engine runs and clusterings, so that the live stages keep their share.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping

from actors.handlers import PreprocessHandler, RankHandler, RunHandler, WorkerSpec, attempt
from actors.outcomes import WorkCommand, WorkOutcome, event_for, item_of
from stream.records.commands import (
    CancelRun,
    ClusterParticles,
    Command,
    OrientGain,
    Preprocess,
    Rank,
    StartRun,
)
from stream.records.events import Event, RunCancelled


class LocalRuntime:
    """Runs one command per `poll` in the calling thread."""

    def __init__(self, spec: WorkerSpec, *, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._queue: deque[WorkCommand] = deque()
        self._engine_queue: deque[StartRun | ClusterParticles] = deque()
        self._answers: list[Event] = []
        self._spec = spec
        self._preprocess = PreprocessHandler(spec)
        self._rank: RankHandler | None = None
        self._run = RunHandler(spec)

    def submit(self, command: Command) -> None:
        """Queue a command; a run that is cancelled before it begins is answered at once."""
        match command:
            case CancelRun():
                self._cancel(command)
            case StartRun() | ClusterParticles():
                self._engine_queue.append(command)
            case _:
                self._queue.append(command)

    def poll(self, timeout_s: float) -> list[Event]:
        """Do the oldest command, if there is one, and return its event."""
        if self._answers:
            answers, self._answers = self._answers, []
            return answers
        if not (self._queue or self._engine_queue):
            time.sleep(min(timeout_s, 0.05))
            return []
        command: WorkCommand = self._queue.popleft() if self._queue else self._engine_queue.popleft()
        outcome = attempt(lambda: self._process(command), item_of(command))
        return [event_for(command, outcome, self._clock())]

    @property
    def worker_restarts(self) -> Mapping[str, int]:
        """Nothing restarts in this process."""
        return {}

    def close(self) -> None:
        """Forget what is queued."""
        self._queue.clear()
        self._engine_queue.clear()
        if self._rank is not None:
            self._rank.close()

    def _process(self, command: WorkCommand) -> WorkOutcome:
        match command:
            case Preprocess() | OrientGain():
                return self._preprocess.process(command)
            case Rank():
                self._rank = self._rank or RankHandler(self._spec)
                return self._rank.process(command)
            case StartRun() | ClusterParticles():
                return self._run.process(command)

    def _cancel(self, command: CancelRun) -> None:
        for queued in list(self._engine_queue):
            if isinstance(queued, StartRun) and queued.request.run_id == command.run_id:
                self._engine_queue.remove(queued)
                self._answers.append(
                    RunCancelled(at=self._clock(), run_id=command.run_id, reason=command.reason)
                )
