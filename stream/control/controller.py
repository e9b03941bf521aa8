"""The controller: an event in, commands out; no clock, no disk, no Ray.

State is derived from events alone, so a journal that is replayed gives the same state, and the commands
that were issued but have no outcome are issued again by the next `SessionOpened`.
"""

from __future__ import annotations

from array import array
from collections import Counter, deque
from dataclasses import dataclass

from stream.control.admission import Load, find_reason_to_wait
from stream.control.exposures import ExposureRecord, ExposureState
from stream.control.runs import (
    RunRecord,
    RunState,
    choose_warm_start,
    describe_verdict,
    find_reason_for_final_run,
    find_reason_to_run,
    select_best,
)
from stream.control.settings import ControllerSettings
from stream.records.commands import Command, Preprocess, Rank, RunMember, StartRun
from stream.records.errors import InvariantError
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
from stream.records.values import (
    ExposureId,
    FailureKind,
    HalfSet,
    PreprocessResult,
    RankResult,
    RunId,
    RunRequest,
    RunResult,
    Stage,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """Something the controller decided, and why."""

    at: float
    what: str
    why: str


class Controller:
    """One session's state and rules; `handle` is the only way in."""

    def __init__(self, settings: ControllerSettings) -> None:
        self._settings = settings
        self.exposures: dict[ExposureId, ExposureRecord] = {}
        self.runs: dict[RunId, RunRecord] = {}
        self.decisions: deque[Decision] = deque(maxlen=1000)
        self.n_by_state: Counter[ExposureState] = Counter()
        self.n_above_threshold = 0
        self.is_input_ended = False
        self.is_draining = False
        self._is_disk_low = False
        self._waiting: dict[Stage, deque[ExposureId]] = {stage: deque() for stage in Stage}
        self._in_flight: dict[Stage, set[ExposureId]] = {stage: set() for stage in Stage}
        self._half_sizes: dict[HalfSet, int] = {1: 0, 2: 0}
        self._active_run: StartRun | None = None
        self._queued_run: RunRequest | None = None

    def handle(self, event: Event) -> list[Command]:
        """Take one event and return what is to be done now."""
        reissued: list[Command] = []
        match event:
            case SessionOpened():
                reissued = self._reopen()
            case ExposureFound():
                self._take_found(event)
            case FileRejected():
                self._take_rejected_file(event)
            case ExposurePreprocessed(result=preprocessed):
                self._take_preprocessed(preprocessed)
            case ExposureRanked(result=ranked):
                self._take_ranked(event.at, ranked)
            case StageFailed():
                self._take_failure(event)
            case RunEnded(result=result):
                self._take_run(event.at, result)
            case RunFailed(run_id=run_id, reason=reason):
                self._take_failed_run(event.at, run_id, reason)
            case DiskSpaceChanged(is_low=is_low):
                self._is_disk_low = is_low
            case InputEnded():
                self.is_input_ended = True
            case DrainRequested():
                self.is_draining = True
        return reissued + self._admit() + self._schedule_run(event.at)

    # --- what others may ask -------------------------------------------------------------------------

    @property
    def settings(self) -> ControllerSettings:
        """The rules this controller was made with."""
        return self._settings

    @property
    def active_run(self) -> RunRequest | None:
        """The run that the engine works on."""
        return None if self._active_run is None else self._active_run.request

    @property
    def best_run(self) -> RunResult | None:
        """The accepted map, or None."""
        results = [r.result for r in self.runs.values() if r.result is not None]
        return select_best(results, self._settings)

    def count_waiting(self, stage: Stage) -> int:
        """Count the exposures that wait for a stage."""
        return len(self._waiting[stage])

    def count_in_flight(self, stage: Stage) -> int:
        """Count the exposures that a stage works on."""
        return len(self._in_flight[stage])

    @property
    def has_work(self) -> bool:
        """True while an exposure or a run is in work."""
        return any(self._in_flight.values()) or self._active_run is not None

    @property
    def is_finished(self) -> bool:
        """True when no more input comes and everything has an outcome."""
        return self.is_input_ended and not (self.has_work or any(self._waiting.values()) or self._queued_run)

    def list_members(self) -> tuple[RunMember, ...]:
        """Return every done exposure with particles and its half-set, in order of arrival."""
        return tuple(
            RunMember(exposure_id=r.exposure_id, name=r.name, half_set=r.half_set)
            for r in self.exposures.values()
            if r.state is ExposureState.DONE and r.half_set is not None and r.n_particles
        )

    def check_invariants(self) -> None:
        """Raise `InvariantError` when the books do not balance."""
        counted = Counter(r.state for r in self.exposures.values())
        if +counted != +self.n_by_state:
            raise InvariantError(
                "controller", "kept counts equal counted states", f"{self.n_by_state} / {counted}"
            )
        queued = Counter(i for q in self._waiting.values() for i in q)
        flying = {i for s in self._in_flight.values() for i in s}
        for record in self.exposures.values():
            is_waiting = record.state is ExposureState.WAITING
            is_flying = record.state is ExposureState.IN_WORK
            if queued[record.exposure_id] != int(is_waiting) or (record.exposure_id in flying) != is_flying:
                raise InvariantError(
                    record.name, "an exposure is queued once, or in flight, or neither", record.state
                )
        above = sum(self._count_above(r.score_histogram) for r in self.exposures.values())
        if above != self.n_above_threshold:
            raise InvariantError(
                "controller", "particles above threshold add up", f"{self.n_above_threshold} / {above}"
            )

    # --- exposures -----------------------------------------------------------------------------------

    def _take_found(self, event: ExposureFound) -> None:
        exposure = event.exposure
        known = self.exposures.get(exposure.exposure_id)
        if known is None:
            record = ExposureRecord(
                exposure_id=exposure.exposure_id,
                name=exposure.name,
                file=exposure.file,
                exposure=exposure,
                state=ExposureState.WAITING,
            )
            self.exposures[exposure.exposure_id] = record
            self.n_by_state[ExposureState.WAITING] += 1
            self._waiting[Stage.PREPROCESS].append(exposure.exposure_id)
            return
        if known.file == exposure.file and known.state is not ExposureState.QUARANTINED:
            return
        if known.state in (ExposureState.IN_WORK, ExposureState.WAITING):
            # The file changed under our hands: what is in work is outdated, and `_land` takes it again.
            known.exposure, known.file = exposure, exposure.file
            return
        self._forget_scores(known)
        known.exposure, known.file, known.attempts = exposure, exposure.file, 0
        self._queue(known, Stage.PREPROCESS)

    def _take_rejected_file(self, event: FileRejected) -> None:
        known = self.exposures.get(event.exposure_id)
        if known is None:
            self.exposures[event.exposure_id] = ExposureRecord(
                exposure_id=event.exposure_id,
                name=event.name,
                file=event.file,
                exposure=None,
                state=ExposureState.QUARANTINED,
            )
            self.exposures[event.exposure_id].reason = event.reason
            self.n_by_state[ExposureState.QUARANTINED] += 1
        elif known.state is ExposureState.QUARANTINED:
            known.file, known.reason = event.file, event.reason

    def _take_preprocessed(self, result: PreprocessResult) -> None:
        record = self._land(result.exposure_id, Stage.PREPROCESS)
        if record is None:
            return
        record.n_particles, record.n_excluded = result.n_particles, result.n_excluded_particles
        record.pixel_size_angstrom = result.pixel_size_angstrom
        record.attempts = 0
        if reason := self._find_reason_to_reject(result):
            self._move(record, ExposureState.REJECTED, reason)
            return
        if not result.n_particles or result.particles is None:
            self._move(record, ExposureState.DONE, "no particles")
            return
        if record.half_set is None:
            record.half_set = 1 if self._half_sizes[1] <= self._half_sizes[2] else 2
            self._half_sizes[record.half_set] += result.n_particles
        record.preprocessed = result
        self._queue(record, Stage.RANK)

    def _find_reason_to_reject(self, result: PreprocessResult) -> str | None:
        limit = self._settings.max_ctf_fit_angstrom
        if limit is not None and result.ctf is not None:
            if not result.ctf.is_reliable:
                return "no Thon rings were found (rule: max_ctf_fit_angstrom)"
            if result.ctf.fit_resolution_angstrom > limit:
                return f"CTF fit to {result.ctf.fit_resolution_angstrom:.1f} Å (rule: at most {limit} Å)"
        limit = self._settings.max_total_motion_angstrom
        if limit is not None and result.motion is not None and result.motion.total_motion_angstrom > limit:
            return f"total motion {result.motion.total_motion_angstrom:.1f} Å (rule: at most {limit} Å)"
        return None

    def _take_ranked(self, at: float, result: RankResult) -> None:
        record = self._land(result.exposure_id, Stage.RANK)
        if record is None:
            return
        self._forget_scores(record)
        record.score_histogram = array("I", result.score_histogram)
        record.model_hash = result.model_hash
        record.n_unscored = result.n_excluded
        self.n_above_threshold += self._count_above(record.score_histogram)
        record.preprocessed = None
        self._move(record, ExposureState.DONE)
        self._request_run_if_due(at)

    def _take_failure(self, event: StageFailed) -> None:
        record = self._land(event.exposure_id, event.stage)
        if record is None:
            return
        record.attempts += 1
        if event.kind is FailureKind.INPUT:
            self._move(record, ExposureState.QUARANTINED, event.reason)
        elif record.attempts >= self._settings.max_attempts:
            reason = f"failed {record.attempts} times, last: {event.reason}"
            self._move(record, ExposureState.QUARANTINED, reason)
        else:
            self._queue(record, event.stage)

    def _land(self, exposure_id: ExposureId, stage: Stage) -> ExposureRecord | None:
        """Take an exposure out of flight; None when the outcome is late, a duplicate, or of an older file."""
        if exposure_id not in self._in_flight[stage]:
            return None
        self._in_flight[stage].discard(exposure_id)
        record = self.exposures[exposure_id]
        if record.file_in_work != record.file:
            record.attempts = 0
            self._queue(record, Stage.PREPROCESS)
            return None
        return record

    def _move(self, record: ExposureRecord, target: ExposureState, reason: str = "") -> None:
        self.n_by_state[record.state] -= 1
        record.move(target, reason)
        self.n_by_state[target] += 1

    def _queue(self, record: ExposureRecord, stage: Stage, *, first: bool = False) -> None:
        self._move(record, ExposureState.WAITING)
        record.stage = stage
        queue = self._waiting[stage]
        (queue.appendleft if first else queue.append)(record.exposure_id)

    def _forget_scores(self, record: ExposureRecord) -> None:
        self.n_above_threshold -= self._count_above(record.score_histogram)
        record.score_histogram = None

    def _count_above(self, histogram: array[int] | None) -> int:
        if histogram is None:
            return 0
        return sum(histogram[round(self._settings.score_threshold * len(histogram)) :])

    def _admit(self) -> list[Command]:
        commands: list[Command] = []
        for stage in (Stage.RANK, Stage.PREPROCESS):
            while self._waiting[stage]:
                load = Load(
                    n_in_flight=len(self._in_flight[stage]),
                    n_waiting_downstream=len(self._waiting[Stage.RANK]),
                    is_draining=self.is_draining,
                    is_disk_low=self._is_disk_low,
                )
                if find_reason_to_wait(stage, load, self._settings):
                    break
                record = self.exposures[self._waiting[stage].popleft()]
                self._in_flight[stage].add(record.exposure_id)
                if stage is Stage.PREPROCESS:
                    record.file_in_work = record.file
                self._move(record, ExposureState.IN_WORK)
                commands.append(_command_for(record, stage))
        return commands

    def _reopen(self) -> list[Command]:
        """Put back in front what was in flight when the service died; draining is over."""
        self.is_draining = False
        self.is_input_ended = False
        for stage, flying in self._in_flight.items():
            order = {exposure_id: n for n, exposure_id in enumerate(self.exposures)} if flying else {}
            for exposure_id in sorted(flying, key=order.__getitem__, reverse=True):
                self._queue(self.exposures[exposure_id], stage, first=True)
            flying.clear()
        return [] if self._active_run is None else [self._active_run]

    # --- runs ----------------------------------------------------------------------------------------

    def _request_run_if_due(self, at: float) -> None:
        reason = find_reason_to_run(self.n_above_threshold, self._n_last_requested(), self._settings)
        if reason:
            self._request_run(at, reason)

    def _n_last_requested(self) -> int | None:
        """Return the largest set that a run was asked for; a failed run waits for more particles, too."""
        runs = self.runs.values()
        return max((r.request.n_particles for r in runs if r.state is not RunState.SUPERSEDED), default=None)

    def _request_run(self, at: float, reason: str) -> None:
        if not self._settings.runs_enabled:
            return
        run_id = RunId(f"run{len(self.runs) + 1:03d}")
        request = RunRequest(
            run_id=run_id,
            n_particles=self.n_above_threshold,
            score_threshold=self._settings.score_threshold,
            model_hash=next((r.model_hash for r in reversed(self.exposures.values()) if r.model_hash), ""),
            warm_start=choose_warm_start(list(self.runs.values()), self.n_above_threshold, self._settings),
            reason=reason,
        )
        if self._queued_run is not None:
            older = self.runs[self._queued_run.run_id]
            older.state, older.verdict = RunState.SUPERSEDED, f"superseded by {run_id} before it started"
            self._decide(at, f"drop {older.request.run_id}", f"{run_id} has more particles")
        self._queued_run = request
        self.runs[run_id] = RunRecord(request=request, state=RunState.QUEUED)
        self._decide(at, f"queue {run_id}", reason)

    def _schedule_run(self, at: float) -> list[Command]:
        if self._is_everything_ranked() and self._queued_run is None and self._active_run is None:
            reason = find_reason_for_final_run(
                self.n_above_threshold, self._n_last_requested(), self._settings
            )
            if reason:
                self._request_run(at, reason)
        if self._queued_run is None or self._active_run is not None or self.is_draining:
            return []
        request, self._queued_run = self._queued_run, None
        self._active_run = StartRun(request=request, members=self.list_members())
        self.runs[request.run_id].state = RunState.RUNNING
        start = f"warm start from {request.warm_start}" if request.warm_start else "from nothing"
        self._decide(at, f"start {request.run_id} {start}", request.reason)
        return [self._active_run]

    def _is_everything_ranked(self) -> bool:
        return self.is_input_ended and not (any(self._waiting.values()) or any(self._in_flight.values()))

    def _take_run(self, at: float, result: RunResult) -> None:
        if self._active_run is None or self._active_run.request.run_id != result.run_id:
            return
        self._active_run = None
        record = self.runs[result.run_id]
        record.state, record.result = RunState.ENDED, result
        record.verdict = describe_verdict(result, self._settings)
        self._decide(at, f"judge {result.run_id}", record.verdict)

    def _take_failed_run(self, at: float, run_id: RunId, reason: str) -> None:
        if self._active_run is None or self._active_run.request.run_id != run_id:
            return
        self._active_run = None
        record = self.runs[run_id]
        record.state, record.verdict = RunState.FAILED, f"failed: {reason}"
        self._decide(at, f"give up {run_id}", reason)

    def _decide(self, at: float, what: str, why: str) -> None:
        self.decisions.append(Decision(at=at, what=what, why=why))


def _command_for(record: ExposureRecord, stage: Stage) -> Command:
    if stage is Stage.PREPROCESS:
        if record.exposure is None:
            raise InvariantError(record.name, "only a valid exposure is preprocessed", record.reason)
        return Preprocess(exposure=record.exposure)
    if record.preprocessed is None:
        raise InvariantError(record.name, "only a preprocessed exposure is ranked", record.reason)
    return Rank(exposure_id=record.exposure_id, name=record.name, preprocessed=record.preprocessed)
