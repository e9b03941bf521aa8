"""The controller: an event in, commands out; no clock, no disk, no Ray.

State is derived from events alone, so a journal that is replayed gives the same state, and the commands
that were issued but have no outcome are issued again by the next `SessionOpened`. What is to become a fact (campaigns, runs) is proposed, committed and handled like any other event. The controller routes events;
counts live in `books`, judgement in `quality`, the gain reference in `gain`, rules of runs in `runs`.
"""

from __future__ import annotations

from array import array
from collections import Counter, deque
from collections.abc import Iterable
from typing import assert_never

from stream.control.admission import Load, find_reason_to_wait
from stream.control.books import ExposureBooks
from stream.control.campaign import CampaignRecord
from stream.control.decisions import DecisionLog
from stream.control.exposures import ExposureRecord, ExposureState
from stream.control.gain import GainSearch, ResidualWatch, describe_orientation
from stream.control.ladder import RunLadder
from stream.control.quality import EXCLUDED, Breach, describe_limits, figures_of
from stream.control.runs import RunRecord, RunState
from stream.control.settings import ControllerSettings
from stream.control.training import TrainingDesk
from stream.control.trend import ScoreTrend
from stream.control.wishes import Wishes
from stream.records.commands import Command, Preprocess, Rank, RunMember
from stream.records.errors import InvariantError
from stream.records.events import (
    BY_CONFIGURATION,
    CampaignEnded,
    CampaignStarted,
    ClusteringFailed,
    ClusteringStarted,
    DiskSpaceChanged,
    DrainRequested,
    Event,
    ExposureFound,
    ExposureOverruled,
    ExposurePreprocessed,
    ExposureRanked,
    FileRejected,
    GainOriented,
    InputEnded,
    ParticlesClustered,
    QualityLimitsChanged,
    RunCancelled,
    RunEnded,
    RunFailed,
    RunStarted,
    SessionDecided,
    SessionOpened,
    StageFailed,
    TrainingChanged,
)
from stream.records.values import (
    CampaignId,
    Exposure,
    ExposureId,
    FailureKind,
    InputKind,
    PreprocessResult,
    QualityLimits,
    RankResult,
    RunId,
    RunRequest,
    RunResult,
    Stage,
)
from stream.records.wishes import WishKind


class Controller:
    """One session's state and rules; `handle` is the only way in."""

    def __init__(self, settings: ControllerSettings) -> None:
        self._settings = settings
        self._books = ExposureBooks(settings.score_threshold)
        self.exposures = self._books.records
        self.decisions = DecisionLog()
        self.wishes = Wishes()
        self._ladder = RunLadder(settings, self._books, self.wishes, self.decisions)
        self.limits = QualityLimits()
        self.configured_limits = QualityLimits()
        self.request_ids: set[str] = set()
        self.gain = GainSearch(settings)
        self.gain_residual = ResidualWatch(settings)
        self.trend = ScoreTrend()
        self.training = TrainingDesk(settings.training)
        self.is_input_ended = False
        self.is_draining = False
        self._is_disk_low = False
        self._waiting: dict[Stage, deque[ExposureId]] = {stage: deque() for stage in Stage}
        self._in_flight: dict[Stage, set[ExposureId]] = {stage: set() for stage in Stage}
        self._is_hold_told = False

    def handle(self, event: Event) -> list[Command]:
        """Take one event and return what is to be done now."""
        commands: list[Command] = []
        best = self.best_run if isinstance(event, SessionDecided) else None
        self.wishes.take(event)
        match event:
            case SessionOpened():
                commands = self._reopen()
            case ExposureFound():
                self._take_found(event)
            case FileRejected():
                self._take_rejected_file(event)
            case GainOriented():
                self._take_orientation(event)
            case QualityLimitsChanged():
                self.request_ids |= {event.request_id} - {""}
                self._take_limits(event)
            case ExposureOverruled():
                self.request_ids |= {event.request_id} - {""}
                self._take_overrule(event)
            case SessionDecided():
                self.request_ids |= {event.request_id} - {""}
                self._take_wish(event, best)
            case ExposurePreprocessed(result=preprocessed):
                self._take_preprocessed(event.at, preprocessed)
            case ExposureRanked(result=ranked):
                self._take_ranked(event.at, ranked)
            case StageFailed():
                self._take_failure(event)
            case RunEnded(result=result):
                self._ladder.take_result(event.at, result)
            case RunFailed(run_id=run_id, reason=reason):
                self._ladder.take_failure(event.at, run_id, reason, RunState.FAILED)
            case RunCancelled(run_id=run_id, reason=reason):
                self._ladder.take_failure(event.at, run_id, reason, RunState.CANCELLED)
            case CampaignStarted():
                self._ladder.start_campaign(event)
            case CampaignEnded():
                commands = self._ladder.end_campaign(event)
            case RunStarted():
                commands = self._ladder.start_run(event)
            case ClusteringStarted():
                commands = self._ladder.start_clustering(event)
            case ParticlesClustered():
                self._ladder.take_clusters(event)
            case ClusteringFailed():
                self._ladder.take_clustering_failure(event)
            case TrainingChanged():
                self.training.take(event)
                self.decisions.add(event.at, f"CryoGEM {event.state.value}", event.words)
            case DiskSpaceChanged(is_low=is_low):
                self._is_disk_low = is_low
            case InputEnded():
                self.is_input_ended = True
                if self._is_everything_ranked:
                    self._tell_if_too_few(event.at, "no more input")
            case DrainRequested():
                self.is_draining = True
            case _:
                assert_never(event)
        return commands + self._ask_gain(event.at) + self._admit()

    def propose(self, at: float) -> list[Event]:
        """Return what the controller wants to be a fact: campaigns, runs and clusterings to start or to end, an offer.

        It changes nothing. Each event is to be committed and handled, and the question asked again until
        the answer is empty. A replay asks nothing: what was decided is in the journal.
        """
        if self.is_draining or self._is_disk_low:
            return []
        n_good = self.n_by_state[ExposureState.DONE]
        return self._ladder.propose(at, is_complete=self._is_everything_ranked) or self.training.propose(
            at, n_good, self.best_run
        )

    # --- what others may ask -------------------------------------------------------------------------

    @property
    def settings(self) -> ControllerSettings:
        """The rules this controller was made with."""
        return self._settings

    @property
    def score_threshold(self) -> float:
        """The threshold in force: a person's, or else the configured one."""
        return self._books.score_threshold

    @property
    def n_by_state(self) -> Counter[ExposureState]:
        """Exposures in each state."""
        return self._books.n_by_state

    @property
    def n_rejected_by(self) -> Counter[str]:
        """Rejected exposures by the rule that rejected them."""
        return self._books.n_rejected_by

    @property
    def n_above_threshold(self) -> int:
        """Particles above the threshold in the exposures that count."""
        return self._books.n_above_threshold

    @property
    def n_half_sets_by_balance(self) -> int:
        """Exposures whose half-set the balance decided, against the hash of their id: the order of arrival did."""
        return self._books.n_half_sets_by_balance

    @property
    def runs_in_work(self) -> list[RunRequest]:
        """The runs that the engine works on."""
        return [run.request for run in self._ladder.runs_in_work]

    @property
    def campaigns(self) -> dict[CampaignId, CampaignRecord]:
        """Every campaign, in order."""
        return self._ladder.campaigns

    @property
    def runs(self) -> dict[RunId, RunRecord]:
        """Every run ever asked for, in order."""
        return self._ladder.runs

    @property
    def best_run(self) -> RunResult | None:
        """The accepted map, or None."""
        return self._ladder.best

    @property
    def model_hash(self) -> str:
        """The model that scored last, "" before any did."""
        return self._books.model_hash

    def count_above(self, record: ExposureRecord) -> int:
        """Count an exposure's particles above the threshold, used or not."""
        return self._books.count_above(record)

    def count_waiting(self, stage: Stage) -> int:
        """Count the exposures that wait for a stage."""
        return len(self._waiting[stage])

    def count_in_flight(self, stage: Stage) -> int:
        """Count the exposures that a stage works on."""
        return len(self._in_flight[stage])

    def find_hold(self, stage: Stage) -> str | None:
        """Return why the exposures that wait for a stage cannot move now, or None."""
        if not self._waiting[stage]:
            return None
        load = Load(
            n_in_flight=len(self._in_flight[stage]),
            n_waiting_downstream=len(self._waiting[Stage.RANK]),
            is_draining=self.is_draining,
            is_disk_low=self._is_disk_low,
            gain_hold=self.gain.hold,
        )
        return find_reason_to_wait(stage, load, self._settings)

    @property
    def has_work(self) -> bool:
        """True while an exposure, the gain reference or a run is in work."""
        return any(self._in_flight.values()) or self.gain.in_flight is not None or self._ladder.has_work

    @property
    def is_finished(self) -> bool:
        """True when no more input comes and everything has an outcome, or waits for one that cannot come."""
        if not self._is_everything_ranked or self.has_work:
            return False
        return not self._ladder.propose(0.0, is_complete=True)

    @property
    def _is_everything_ranked(self) -> bool:
        is_held_for_good = self.gain.is_given_up
        waiting = self._waiting[Stage.RANK] or (self._waiting[Stage.PREPROCESS] and not is_held_for_good)
        return self.is_input_ended and not (waiting or any(self._in_flight.values()))

    def list_members(self) -> tuple[RunMember, ...]:
        """Return every done exposure with particles and its half-set, by name."""
        return self._books.list_members()

    def check_invariants(self) -> None:
        """Raise `InvariantError` when the books do not balance."""
        self._books.check()
        self._ladder.check()
        queued = Counter(i for q in self._waiting.values() for i in q)
        flying = {i for s in self._in_flight.values() for i in s}
        for record in self.exposures.values():
            is_waiting = record.state is ExposureState.WAITING
            is_flying = record.state is ExposureState.IN_WORK
            if queued[record.exposure_id] != int(is_waiting) or (record.exposure_id in flying) != is_flying:
                raise InvariantError(
                    record.name, "an exposure is queued once, or in flight, or neither", record.state
                )
            is_judged = record.state in (ExposureState.DONE, ExposureState.REJECTED)
            is_refused = self._find_breach(record) is not None
            if is_judged and is_refused != (record.state is ExposureState.REJECTED):
                raise InvariantError(
                    record.name, "an exposure is used when nothing speaks against it", record.reason
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
            self._books.add(record)
            self._waiting[Stage.PREPROCESS].append(exposure.exposure_id)
            return
        if known.file == exposure.file and known.state is not ExposureState.QUARANTINED:
            return
        if known.file_in_work is None:
            # it may have flown under other settings, with the file that it had then
            known.file_in_work = known.file
        known.exposure, known.file = exposure, exposure.file
        if known.state in (ExposureState.IN_WORK, ExposureState.WAITING):
            # The file changed under our hands: what is in work is outdated, and `_land` takes it again.
            return
        known.attempts = 0
        self._queue(known, Stage.PREPROCESS)

    def _take_rejected_file(self, event: FileRejected) -> None:
        known = self.exposures.get(event.exposure_id)
        if known is None:
            record = ExposureRecord(
                exposure_id=event.exposure_id,
                name=event.name,
                file=event.file,
                exposure=None,
                state=ExposureState.QUARANTINED,
            )
            record.reason = event.reason
            self._books.add(record)
        elif known.state is ExposureState.QUARANTINED:
            known.file, known.reason = event.file, event.reason

    def _take_preprocessed(self, at: float, result: PreprocessResult) -> None:
        record = self._land(result.exposure_id, Stage.PREPROCESS, is_done=True)
        if record is None:
            return
        record.n_particles, record.n_excluded = result.n_particles, result.n_excluded_particles
        record.pixel_size_angstrom = result.pixel_size_angstrom
        record.figures = figures_of(result)
        record.preprocessed = result if result.n_particles and result.particles is not None else None
        record.attempts = 0
        if record.preprocessed is None:
            self.trend.add(record.figures, ())
        self._settle(record)
        if result.gain_residual is not None and (said := self.gain_residual.take(result.gain_residual)):
            self.decisions.add(at, "watch the gain reference", said)

    def _take_ranked(self, at: float, result: RankResult) -> None:
        record = self._land(result.exposure_id, Stage.RANK, is_done=True)
        if record is None:
            return
        record.score_histogram = array("I", result.score_histogram)
        record.model_hash = self._books.model_hash = result.model_hash
        record.n_unscored = result.n_excluded
        record.preprocessed = None
        self.trend.add(record.figures, result.score_histogram)
        self._settle(record)
        if self._is_everything_ranked:
            self._tell_if_too_few(at, "the last exposure is scored")

    def _take_failure(self, event: StageFailed) -> None:
        is_machine = event.kind is FailureKind.RESOURCE
        record = self._land(event.exposure_id, event.stage)
        if record is None:
            if event.stage is Stage.PREPROCESS and self.gain.is_asking_about(event.exposure_id):
                self.gain.take_failure(event.reason, is_machine=is_machine)
                if not is_machine:
                    self._withdraw(self.exposures[event.exposure_id], event.reason)
            return
        record.attempts += 1
        if not is_machine:
            self._books.move(record, ExposureState.QUARANTINED, event.reason)
        elif record.attempts >= self._settings.max_attempts:
            reason = f"failed {record.attempts} times, last: {event.reason}"
            self._books.move(record, ExposureState.QUARANTINED, reason)
        elif event.stage is Stage.RANK:
            self._settle(record)
        else:
            self._queue(record, event.stage)

    def _withdraw(self, record: ExposureRecord, reason: str) -> None:
        """Quarantine a movie that waits: the question about the gain reference found it to be bad."""
        if record.state is ExposureState.WAITING:
            self._waiting[record.stage].remove(record.exposure_id)
            self._books.move(record, ExposureState.QUARANTINED, reason)

    def _land(self, exposure_id: ExposureId, stage: Stage, *, is_done: bool = False) -> ExposureRecord | None:
        """Take an exposure out of flight; None when the outcome is late, a duplicate, or of an older file.

        A result that is there (`is_done`) also counts while its exposure waits for the stage: the journal may have
        been written under settings that let more items fly, or the worker was given up too early.
        """
        record = self.exposures.get(exposure_id)
        if record is None:
            return None
        if exposure_id in self._in_flight[stage]:
            self._in_flight[stage].discard(exposure_id)
        elif is_done and self._is_awaited(record, stage):
            self._waiting[stage].remove(exposure_id)
            self._books.move(record, ExposureState.IN_WORK)
            record.file_in_work = record.file
            return record
        else:
            return None
        if record.file_in_work != record.file:
            record.attempts = 0
            self._queue(record, Stage.PREPROCESS)
            return None
        return record

    @staticmethod
    def _is_awaited(record: ExposureRecord, stage: Stage) -> bool:
        """True when the exposure waits for this stage with the file that its last command named, if any did."""
        is_waiting = record.state is ExposureState.WAITING and record.stage is stage
        return is_waiting and record.file_in_work in (None, record.file)

    def _settle(self, record: ExposureRecord, *, first: bool = False) -> None:
        """Move a preprocessed exposure to where judgement and scores say that it belongs."""
        if breach := self._find_breach(record):
            self._books.move(record, ExposureState.REJECTED, breach.reason, breach.rule)
        elif record.preprocessed is not None:
            self._books.assign_half_set(record)
            self._queue(record, Stage.RANK, first=first)
        else:
            no_scores = record.score_histogram is None
            self._books.move(record, ExposureState.DONE, "no particles" if no_scores else "")

    def _queue(self, record: ExposureRecord, stage: Stage, *, first: bool = False) -> None:
        self._books.move(record, ExposureState.WAITING)
        record.stage = stage
        if stage is Stage.PREPROCESS:
            record.score_histogram = record.figures = record.preprocessed = None
        queue = self._waiting[stage]
        (queue.appendleft if first else queue.append)(record.exposure_id)

    def _admit(self) -> list[Command]:
        commands: list[Command] = []
        for stage in (Stage.RANK, Stage.PREPROCESS):
            while self._waiting[stage] and not self.find_hold(stage):
                record = self.exposures[self._waiting[stage].popleft()]
                self._in_flight[stage].add(record.exposure_id)
                if stage is Stage.PREPROCESS:
                    record.file_in_work = record.file
                self._books.move(record, ExposureState.IN_WORK)
                commands.append(self._command_for(record, stage))
        return commands

    def _command_for(self, record: ExposureRecord, stage: Stage) -> Command:
        if stage is Stage.PREPROCESS:
            if record.exposure is None:
                raise InvariantError(record.name, "only a valid exposure is preprocessed", record.reason)
            return Preprocess(
                exposure=record.exposure,
                gain_orientation=self.gain.orientation,
                template_run=self._ladder.template,
            )
        if record.preprocessed is None:
            raise InvariantError(record.name, "only a preprocessed exposure is ranked", record.reason)
        return Rank(exposure_id=record.exposure_id, name=record.name, preprocessed=record.preprocessed)

    def _reopen(self) -> list[Command]:
        """Put back in front what was in flight when the service died; draining is over."""
        self.is_draining = False
        self.is_input_ended = False
        for stage, flying in self._in_flight.items():
            order = {exposure_id: n for n, exposure_id in enumerate(self.exposures)} if flying else {}
            again = sorted(flying, key=order.__getitem__, reverse=True)
            flying.clear()
            for exposure_id in again:
                if stage is Stage.RANK:
                    self._settle(self.exposures[exposure_id], first=True)
                else:
                    self._queue(self.exposures[exposure_id], stage, first=True)
        return self._ladder.reopen() + list(self.gain.reopen())

    # --- the gain reference --------------------------------------------------------------------------

    def _ask_gain(self, at: float) -> list[Command]:
        if self.gain.hold is None or self.is_draining or self._is_disk_low:
            return []
        question = self.gain.ask(self._list_waiting_movies(), is_input_ended=self.is_input_ended)
        if self.gain.is_given_up and not self._is_hold_told:
            self.decisions.add(at, "hold every movie back", self.gain.hold or "")
        self._is_hold_told = self.gain.is_given_up
        return [] if question is None else [question]

    def _list_waiting_movies(self) -> Iterable[Exposure]:
        records = (self.exposures[exposure_id] for exposure_id in self._waiting[Stage.PREPROCESS])
        exposures = (record.exposure for record in records)
        return (e for e in exposures if e is not None and e.kind is InputKind.MOVIE)

    def _take_orientation(self, event: GainOriented) -> None:
        if not self.gain.take(event):
            return
        if event.orientation is not None:
            self.decisions.add(
                event.at, f"use the gain reference {describe_orientation(event.orientation)}", event.note
            )
        elif not self.gain.is_given_up:
            self.decisions.add(
                event.at, "ask again with more movies how the gain reference is turned", event.note
            )

    # --- quality -------------------------------------------------------------------------------------

    def _take_limits(self, event: QualityLimitsChanged) -> None:
        self.limits = event.limits
        if event.request_id == BY_CONFIGURATION:
            self.configured_limits = event.limits
        n_before = self.n_by_state[ExposureState.REJECTED]
        self._judge_again(self.exposures.values())
        n_after = self.n_by_state[ExposureState.REJECTED]
        words = f"{event.reason or 'no reason given'}; {n_after} exposures rejected (before: {n_before})"
        self.decisions.add(event.at, f"set quality limits: {describe_limits(event.limits)}", words)

    def _take_overrule(self, event: ExposureOverruled) -> None:
        record = self.exposures.get(event.exposure_id)
        if record is None:
            return
        record.overruled_as, record.overruled_because = event.is_accepted, event.reason
        self._judge_again([record])
        verbs = {True: "accept {}", False: "reject {}", None: "judge {} by the limits again"}
        self.decisions.add(
            event.at, verbs[event.is_accepted].format(record.name), event.reason or "no reason given"
        )

    def _take_wish(self, event: SessionDecided, best: RunResult | None) -> None:
        """Let what a person decided take effect: the threshold, excluded times, the accepted map."""
        what = self.wishes.history[-1].what
        self.decisions.add(event.at, what, event.reason or "no reason given")
        wished = self.wishes.score_threshold
        self._books.score_threshold = self._settings.score_threshold if wished is None else wished
        self._judge_again(self.exposures.values())
        self._ladder.review(event.at, best)
        if event.wish.kind is WishKind.FORCE_RUN:
            self._tell_if_too_few(event.at, "a run was asked for")

    def _find_breach(self, record: ExposureRecord) -> Breach | None:
        """Return why an exposure is not to be used: a person's word on it, an excluded time, the limits; or None."""
        is_excluded = record.exposure is not None and self.wishes.is_excluded(record.exposure)
        if is_excluded and record.overruled_as is None:
            return Breach(rule=EXCLUDED, reason="taken in a time that was excluded by hand")
        return record.find_breach(self.limits)

    def _tell_if_too_few(self, at: float, when: str) -> None:
        n, needed = self.n_above_threshold, self._settings.runs.final_min_particles
        if n < needed and self._settings.runs.enabled:
            words = (
                f"{when}: {n} particles above {self._books.score_threshold:g}, at least {needed} are needed"
            )
            self.decisions.add(at, "start no run", words)

    def _judge_again(self, records: Iterable[ExposureRecord]) -> None:
        """Judge by today's limits and words; what is in work is judged when it lands."""
        for record in records:
            is_waiting_to_be_ranked = record.state is ExposureState.WAITING and record.stage is Stage.RANK
            if record.state is ExposureState.REJECTED:
                self._settle(record)
            elif (record.state is ExposureState.DONE or is_waiting_to_be_ranked) and (
                breach := self._find_breach(record)
            ):
                self._books.move(record, ExposureState.REJECTED, breach.reason, breach.rule)
        queue = self._waiting[Stage.RANK]
        self._waiting[Stage.RANK] = deque(
            i for i in queue if self.exposures[i].state is ExposureState.WAITING
        )
        self._ladder.count_losses()
