"""The controller as a function of events: command lists compared whole, invariants over random histories."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule
from story import (
    found,
    make_exposure,
    make_file,
    moved,
    play,
    preprocessed,
    rank_one,
    ranked,
    run_result,
)

from stream.control.controller import Controller
from stream.control.exposures import ExposureState
from stream.control.runs import RunState
from stream.control.settings import ControllerSettings
from stream.records.commands import Preprocess, Rank, StartRun
from stream.records.errors import InvariantError
from stream.records.events import (
    DiskSpaceChanged,
    DrainRequested,
    Event,
    ExposureOverruled,
    FileRejected,
    GainOriented,
    InputEnded,
    QualityLimitsChanged,
    RunEnded,
    RunFailed,
    SessionOpened,
    StageFailed,
)
from stream.records.values import (
    ExposureId,
    FailureKind,
    GainOrientation,
    QualityLimits,
    RunId,
    Stage,
)

SETTINGS = ControllerSettings(
    first_run_particles=100,
    growth_factor=1.5,
    final_run_min_particles=50,
    max_in_flight_preprocess=2,
    max_in_flight_rank=2,
)


def test_a_found_movie_is_preprocessed_then_ranked_then_done() -> None:
    controller = Controller(SETTINGS)
    assert play(controller, found("a")) == [Preprocess(exposure=make_exposure("a"))]
    commands = play(controller, preprocessed("a"))
    assert commands == [Rank(exposure_id=ExposureId("a"), name="a", preprocessed=preprocessed("a").result)]
    assert play(controller, ranked("a")) == []
    assert controller.n_by_state[ExposureState.DONE] == 1
    assert controller.n_above_threshold == 60


def test_a_stage_never_holds_more_than_its_cap() -> None:
    controller = Controller(SETTINGS)
    commands = [len(play(controller, found(name))) for name in "abcd"]
    assert commands == [1, 1, 0, 0]
    first = [c.exposure.name for c in play(controller, preprocessed("a", 0)) if isinstance(c, Preprocess)]
    assert first == ["c"]


def test_bad_input_is_quarantined_and_the_stream_goes_on() -> None:
    controller = Controller(SETTINGS)
    play(controller, found("a"), found("b"), found("c"))
    failure = StageFailed(
        at=1.0,
        exposure_id=ExposureId("a"),
        stage=Stage.PREPROCESS,
        kind=FailureKind.INPUT,
        reason="a.tif: truncated",
    )
    commands = play(controller, failure)
    assert commands == [Preprocess(exposure=make_exposure("c"))]
    assert controller.exposures[ExposureId("a")].state is ExposureState.QUARANTINED
    assert controller.exposures[ExposureId("a")].reason == "a.tif: truncated"


def test_a_quarantined_movie_is_taken_again_when_its_file_changes() -> None:
    controller = Controller(SETTINGS)
    rejected = FileRejected(
        at=0.0, exposure_id=ExposureId("a"), name="a", file=make_file("a"), reason="empty"
    )
    assert play(controller, rejected) == []
    assert play(controller, found("a", 1)) == [Preprocess(exposure=make_exposure("a", 1))]


def test_a_movie_that_changes_while_in_work_is_taken_again_and_counted_once() -> None:
    controller = Controller(SETTINGS)
    play(controller, found("a"))
    assert play(controller, found("a", 1)) == []
    assert play(controller, preprocessed("a")) == [Preprocess(exposure=make_exposure("a", 1))]
    assert play(controller, preprocessed("a"))
    assert sum(controller.n_by_state.values()) == 1


def test_a_worker_that_dies_is_tried_again_and_a_poisonous_movie_is_quarantined() -> None:
    controller = Controller(SETTINGS)
    play(controller, found("a"))
    death = StageFailed(
        at=1.0,
        exposure_id=ExposureId("a"),
        stage=Stage.PREPROCESS,
        kind=FailureKind.RESOURCE,
        reason="worker died",
    )
    again = [Preprocess(exposure=make_exposure("a"))]
    assert play(controller, death) == again
    assert play(controller, death) == again
    assert play(controller, death) == []
    assert "failed 3 times" in controller.exposures[ExposureId("a")].reason


def test_a_run_starts_at_the_first_rung_and_again_when_the_count_has_grown() -> None:
    controller = Controller(SETTINGS)
    assert rank_one(controller, "a", 60) == []
    (first,) = rank_one(controller, "b", 60)
    assert isinstance(first, StartRun)
    assert (first.request.run_id, first.request.n_particles, first.request.warm_start) == (
        "run001",
        120,
        None,
    )
    assert [(m.name, m.half_set) for m in first.members] == [("a", 1), ("b", 2)]
    play(controller, RunEnded(at=3.0, result=run_result("run001", n=120)))
    assert rank_one(controller, "c", 50) == []
    (second,) = rank_one(controller, "d", 50)
    assert isinstance(second, StartRun)
    assert second.request.warm_start == "run001"
    assert "1.83 times" in second.request.reason


def test_a_newer_run_supersedes_a_queued_one_and_leaves_the_running_one() -> None:
    controller = Controller(SETTINGS)
    for name, n in (("a", 100), ("b", 60), ("c", 100)):
        rank_one(controller, name, n)
    states = {run_id: record.state for run_id, record in controller.runs.items()}
    assert states == {"run001": RunState.RUNNING, "run002": RunState.SUPERSEDED, "run003": RunState.QUEUED}
    (started,) = play(controller, RunEnded(at=3.0, result=run_result("run001")))
    assert isinstance(started, StartRun)
    assert started.request.run_id == "run003"


def test_a_map_with_low_cfar_is_kept_but_not_accepted() -> None:
    controller = Controller(SETTINGS)
    rank_one(controller, "a", 100)
    play(controller, RunEnded(at=3.0, result=run_result("run001", resolution=6.0, cfar=0.05)))
    assert controller.best_run is None
    assert "preferred orientation" in controller.runs[RunId("run001")].verdict


def test_the_last_run_uses_everything_when_input_has_ended() -> None:
    controller = Controller(SETTINGS)
    rank_one(controller, "a", 60)
    (last,) = play(controller, InputEnded(at=5.0))
    assert isinstance(last, StartRun)
    assert "no more input" in last.request.reason
    assert not controller.is_finished
    play(controller, RunEnded(at=6.0, result=run_result("run001", n=60)))
    assert controller.is_finished


def test_a_failed_last_run_does_not_start_for_ever() -> None:
    controller = Controller(SETTINGS)
    rank_one(controller, "a", 60)
    play(controller, InputEnded(at=5.0))
    assert play(controller, RunFailed(at=6.0, run_id=RunId("run001"), reason="engine died")) == []
    assert controller.is_finished


def test_half_sets_are_balanced_and_never_change() -> None:
    controller = Controller(replace(SETTINGS, runs_enabled=False))
    for name, n in (("a", 100), ("b", 10), ("c", 20), ("d", 30)):
        rank_one(controller, name, n)
    halves = {r.name: r.half_set for r in controller.exposures.values()}
    assert halves == {"a": 1, "b": 2, "c": 2, "d": 2}
    play(controller, found("a", 1), preprocessed("a", 5))
    assert controller.exposures[ExposureId("a")].half_set == 1


def test_nothing_new_starts_while_draining_or_while_the_disk_is_full() -> None:
    controller = Controller(SETTINGS)
    play(controller, DiskSpaceChanged(at=0.0, is_low=True, free_bytes=1))
    assert play(controller, found("a")) == []
    assert len(play(controller, DiskSpaceChanged(at=1.0, is_low=False, free_bytes=10**10))) == 1
    play(controller, DrainRequested(at=2.0))
    assert play(controller, found("b")) == []


WIDE: dict[str, Any] = {"max_in_flight_preprocess": 8, "max_in_flight_rank": 8}


def test_a_restart_issues_again_what_had_no_outcome_and_the_same_run() -> None:
    events: list[Event] = [
        found("a"),
        preprocessed("a", 100),
        ranked("a", 100),
        found("b"),
        preprocessed("b"),
        found("c"),
    ]
    before = Controller(SETTINGS)
    play(before, *events)
    after = Controller(SETTINGS)
    play(after, *events)
    commands = play(after, SessionOpened(at=9.0, settings_digest="", version=""))
    kinds = [type(c).__name__ for c in commands]
    assert kinds == ["StartRun", "Rank", "Preprocess"]
    assert before.runs == after.runs


@pytest.mark.parametrize(
    "changes",
    [
        {"max_in_flight_preprocess": 1, "max_in_flight_rank": 1},
        {"is_gain_orientation_sought": True},
    ],
)
def test_results_in_the_journal_count_under_settings_that_would_have_waited(changes: dict[str, Any]) -> None:
    events: list[Event] = [*(found(n) for n in "abcd"), preprocessed("b"), preprocessed("a"), ranked("b", 60)]
    events += [preprocessed("c"), preprocessed("d"), ranked("d", 60)]
    before = Controller(replace(SETTINGS, **WIDE))
    after = Controller(replace(SETTINGS, **{**WIDE, **changes}))
    for controller in (before, after):
        play(controller, *events)
        controller.check_invariants()
    assert after.n_above_threshold == before.n_above_threshold > 0
    assert {r.name: r.half_set for r in after.exposures.values()} == {
        r.name: r.half_set for r in before.exposures.values()
    }
    commands = play(after, SessionOpened(at=9.0, settings_digest="", version=""))
    assert not [c for c in commands if isinstance(c, Preprocess)]


def test_a_result_of_an_older_file_does_not_count_for_an_exposure_that_waits() -> None:
    controller = Controller(replace(SETTINGS, max_in_flight_preprocess=1))
    play(controller, found("a"), found("b"), found("b", version=2), preprocessed("b"))
    assert controller.exposures[ExposureId("b")].state is ExposureState.WAITING


def test_new_micrographs_are_picked_with_the_accepted_map_once_it_is_good_enough() -> None:
    controller = Controller(
        replace(SETTINGS, is_picking_by_template=True, template_min_resolution_angstrom=20.0)
    )
    rank_one(controller, "a", 100)
    play(controller, RunEnded(at=3.0, result=run_result("run001", resolution=25.0, n=100)))
    assert play(controller, found("b")) == [Preprocess(exposure=make_exposure("b"))]
    play(controller, preprocessed("b", 100), ranked("b", 100))
    play(controller, RunEnded(at=4.0, result=run_result("run002", resolution=12.0, n=200)))
    for name in "cd":
        assert play(controller, found(name)) == [
            Preprocess(exposure=make_exposure(name), template_run=RunId("run002"))
        ]
    said = [d for d in controller.decisions if "templates of run002" in d.what]
    assert [d.why for d in said] == ["its map has reached 20 Å"]


def test_blobs_are_picked_whatever_the_map_unless_templates_were_asked_for() -> None:
    controller = Controller(SETTINGS)
    rank_one(controller, "a", 100)
    play(controller, RunEnded(at=3.0, result=run_result("run001", resolution=8.0)))
    assert play(controller, found("b")) == [Preprocess(exposure=make_exposure("b"))]


def test_an_illegal_move_tells_the_items_story() -> None:
    controller = Controller(SETTINGS)
    rank_one(controller, "a", 10)
    with pytest.raises(InvariantError, match="done cannot become quarantined"):
        controller.exposures[ExposureId("a")].move(ExposureState.QUARANTINED)


class AnyHistory(RuleBasedStateMachine):
    """Arrivals, outcomes, late and double outcomes, changes, restarts and runs in any order."""

    names = Bundle("names")
    settings = SETTINGS

    @initialize()
    def begin(self) -> None:
        self.controller = Controller(self.settings)
        self.log: list[Event] = []
        self.n_starts: dict[str, int] = {}

    def tell(self, event: Event) -> None:
        self.log.append(event)
        reopened = isinstance(event, SessionOpened)
        for command in self.controller.handle(event):
            if isinstance(command, StartRun) and not reopened:
                run_id = command.request.run_id
                self.n_starts[run_id] = self.n_starts.get(run_id, 0) + 1

    @rule(target=names, number=st.integers(0, 8), version=st.integers(0, 2))
    def arrive(self, number: int, version: int) -> str:
        self.tell(found(f"m{number}", version))
        return f"m{number}"

    @rule(number=st.integers(0, 8))
    def refuse(self, number: int) -> None:
        name = f"m{number}"
        self.tell(
            FileRejected(at=0.0, exposure_id=ExposureId(name), name=name, file=make_file(name), reason="bad")
        )

    @rule(name=names, n=st.integers(0, 90), motion=st.floats(0, 10))
    def preprocess(self, name: str, n: int, motion: float) -> None:
        self.tell(preprocessed(name, n, motion=moved(motion)))

    @rule(limit=st.one_of(st.none(), st.floats(0, 10)))
    def limit_motion(self, limit: float | None) -> None:
        limits = QualityLimits(max_total_motion_angstrom=limit)
        self.tell(QualityLimitsChanged(at=0.0, limits=limits, reason=""))

    @rule(name=names, is_accepted=st.sampled_from([True, False, None]))
    def overrule(self, name: str, is_accepted: bool | None) -> None:
        self.tell(ExposureOverruled(at=0.0, exposure_id=ExposureId(name), is_accepted=is_accepted, reason=""))

    @rule(orientation=st.sampled_from([None, GainOrientation(), GainOrientation(flip_y=True)]))
    def orient_gain(self, orientation: GainOrientation | None) -> None:
        self.tell(GainOriented(at=0.0, orientation=orientation, contrast=1.0, n_movies=1, note="x"))

    @rule(name=names, n=st.integers(0, 90), bad=st.integers(0, 50))
    def rank(self, name: str, n: int, bad: int) -> None:
        self.tell(ranked(name, n, bad))

    @rule(name=names, stage=st.sampled_from(Stage), kind=st.sampled_from(FailureKind))
    def fail(self, name: str, stage: Stage, kind: FailureKind) -> None:
        self.tell(StageFailed(at=0.0, exposure_id=ExposureId(name), stage=stage, kind=kind, reason="x"))

    @rule(number=st.integers(1, 5), resolution=st.one_of(st.none(), st.floats(3, 20)), cfar=st.floats(0, 1))
    def end_run(self, number: int, resolution: float | None, cfar: float) -> None:
        self.tell(RunEnded(at=0.0, result=run_result(f"run{number:03d}", resolution=resolution, cfar=cfar)))

    @rule(number=st.integers(1, 5))
    def fail_run(self, number: int) -> None:
        self.tell(RunFailed(at=0.0, run_id=RunId(f"run{number:03d}"), reason="x"))

    @rule()
    def reopen(self) -> None:
        self.tell(SessionOpened(at=0.0, settings_digest="", version=""))

    @rule()
    def end_input(self) -> None:
        self.tell(InputEnded(at=0.0))

    @rule()
    def drain(self) -> None:
        self.tell(DrainRequested(at=0.0))

    @invariant()
    def books_balance(self) -> None:
        if hasattr(self, "controller"):
            self.controller.check_invariants()

    @invariant()
    def a_run_is_started_once(self) -> None:
        assert all(n == 1 for n in getattr(self, "n_starts", {}).values())

    def teardown(self) -> None:
        if hasattr(self, "controller"):
            again = Controller(self.settings)
            for event in self.log:
                again.handle(event)
            assert again.exposures == self.controller.exposures
            assert again.runs == self.controller.runs


class AnyHistoryWithGain(AnyHistory):
    """The same, with a gain reference whose orientation has to be found first."""

    settings = replace(SETTINGS, is_gain_orientation_sought=True)


AnyHistory.TestCase.settings = hypothesis_settings(max_examples=60, stateful_step_count=40, deadline=None)
TestAnyHistory = AnyHistory.TestCase

AnyHistoryWithGain.TestCase.settings = hypothesis_settings(
    max_examples=40, stateful_step_count=40, deadline=None
)
TestAnyHistoryWithGain = AnyHistoryWithGain.TestCase
