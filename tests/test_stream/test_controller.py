"""The controller as a function of events: command lists compared whole, invariants over random histories."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from story import (
    found,
    make_exposure,
    make_file,
    play,
    preprocessed,
    rank_one,
    ranked,
    replay,
    run_result,
    tell,
)

from stream.control.books import hash_half_set
from stream.control.controller import Controller
from stream.control.exposures import ExposureState
from stream.control.settings import ControllerSettings, RunPolicy
from stream.records.commands import Preprocess, Rank
from stream.records.errors import InvariantError
from stream.records.events import (
    DiskSpaceChanged,
    DrainRequested,
    Event,
    FileRejected,
    RunEnded,
    SessionOpened,
    StageFailed,
)
from stream.records.values import (
    ExposureId,
    FailureKind,
    RunId,
    Stage,
)

SETTINGS = ControllerSettings(
    runs=RunPolicy(rungs=(100,), final_min_particles=50),
    max_in_flight_preprocess=2,
    max_in_flight_rank=2,
)


QUIET = replace(SETTINGS, runs=RunPolicy(enabled=False))


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


def test_half_sets_come_from_the_exposures_id_while_the_halves_are_in_balance() -> None:
    controller = Controller(QUIET)
    names = [f"m{i:03d}" for i in range(200)]
    for name in names:
        rank_one(controller, name, 50)
    halves = {r.name: r.half_set for r in controller.exposures.values()}
    by_hash = sum(halves[n] == hash_half_set(ExposureId(n)) for n in names)
    assert by_hash == 200 - controller.n_half_sets_by_balance
    assert controller.n_half_sets_by_balance < 20, "balance decides only where few exposures are there yet"
    assert abs(sum(h == 1 for h in halves.values()) - 100) <= 20


def test_half_sets_stay_in_balance_and_never_change() -> None:
    controller = Controller(QUIET)
    for name, n in (("a", 100), ("b", 10), ("c", 20), ("d", 30)):
        rank_one(controller, name, n)
    halves = {r.name: r.half_set for r in controller.exposures.values()}
    assert len({halves[n] for n in "bcd"}) == 1, "they go against the large one whatever their ids say"
    assert halves["a"] != halves["b"]
    play(controller, found("a", 1), preprocessed("a", 5))
    assert controller.exposures[ExposureId("a")].half_set == halves["a"]


def test_nothing_new_starts_while_draining_or_while_the_disk_is_full() -> None:
    controller = Controller(SETTINGS)
    play(controller, DiskSpaceChanged(at=0.0, is_low=True, free_bytes=1))
    assert play(controller, found("a")) == []
    assert len(play(controller, DiskSpaceChanged(at=1.0, is_low=False, free_bytes=10**10))) == 1
    play(controller, DrainRequested(at=2.0))
    assert play(controller, found("b")) == []


WIDE: dict[str, Any] = {"max_in_flight_preprocess": 8, "max_in_flight_rank": 8}


def test_a_restart_issues_again_what_had_no_outcome_and_the_same_run() -> None:
    before = Controller(SETTINGS)
    log: list[Event] = []
    for event in (
        found("a"),
        preprocessed("a", 100),
        ranked("a", 100),
        found("b"),
        preprocessed("b"),
        found("c"),
    ):
        log += tell(before, event)[1]
    after = replay(SETTINGS, log)
    assert before.runs == after.runs
    commands = play(after, SessionOpened(at=9.0, settings_digest="", version=""))
    kinds = [type(c).__name__ for c in commands]
    assert kinds == ["StartRun", "Rank", "Preprocess"]


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
