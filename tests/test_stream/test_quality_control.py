"""Quality: judged by figures against limits, changed while a session runs, taken back without a trace."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from story import fit, found, make_exposure, moved, play, preprocessed, rank_one, ranked, run_result

from stream.control.controller import Controller
from stream.control.exposures import ExposureState
from stream.control.quality import OVERRULED, RULES, figures_of, find_breaches, judge
from stream.control.settings import ControllerSettings, RunPolicy
from stream.records.commands import Preprocess, Rank, StartRun
from stream.records.events import (
    Event,
    ExposureOverruled,
    InputEnded,
    QualityLimitsChanged,
    RunEnded,
    SessionOpened,
    StageFailed,
)
from stream.records.values import CampaignTrigger, ExposureId, FailureKind, QualityLimits, Stage

SETTINGS = ControllerSettings(
    runs=RunPolicy(rungs=(100,), final_min_particles=50), max_in_flight_preprocess=100, max_in_flight_rank=100
)
QUIET = replace(SETTINGS, runs=RunPolicy(enabled=False))


def limited(at: float = 5.0, **limits: float) -> QualityLimitsChanged:
    return QualityLimitsChanged(at=at, limits=QualityLimits(**limits), reason="test")  # type: ignore[arg-type]


def overruled(name: str, is_accepted: bool | None, reason: str = "seen") -> ExposureOverruled:
    return ExposureOverruled(at=6.0, exposure_id=ExposureId(name), is_accepted=is_accepted, reason=reason)


def state_of(controller: Controller, name: str) -> ExposureState:
    return controller.exposures[ExposureId(name)].state


# --- judgement -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limits", "rule", "words"),
    [
        ({"max_ctf_fit_angstrom": 3.9}, "max_ctf_fit_angstrom", "CTF fit to 4.0 Å (rule: at most 3.9 Å)"),
        (
            {"max_astigmatism_angstrom": 150},
            "max_astigmatism_angstrom",
            "astigmatism 200 Å (rule: at most 150 Å)",
        ),
        ({"min_defocus_angstrom": 13000}, "min_defocus_angstrom", "defocus 12000 Å (rule: at least 13000 Å)"),
        ({"max_defocus_angstrom": 11000}, "max_defocus_angstrom", "defocus 12000 Å (rule: at most 11000 Å)"),
        (
            {"max_total_motion_angstrom": 5},
            "max_total_motion_angstrom",
            "total motion 9.0 Å (rule: at most 5 Å)",
        ),
        (
            {"max_early_motion_angstrom": 2},
            "max_early_motion_angstrom",
            "early motion 3.0 Å (rule: at most 2 Å)",
        ),
        ({"max_ice_ratio": 1.5}, "max_ice_ratio", "ice ratio 2.25 (rule: at most 1.5)"),
        ({"max_crystalline_ice": 5}, "max_crystalline_ice", "crystalline ice 8.0 sd (rule: at most 5 sd)"),
        ({"max_masked_fraction": 0.2}, "max_masked_fraction", "masked fraction 0.40 (rule: at most 0.2)"),
        ({"min_picks": 61}, "min_picks", "picks 60 (rule: at least 61)"),
        ({"max_picks": 59}, "max_picks", "picks 60 (rule: at most 59)"),
    ],
)
def test_every_limit_rejects_with_value_and_rule_and_lets_its_own_value_pass(
    limits: dict[str, float], rule: str, words: str
) -> None:
    result = preprocessed(
        "a", ctf=fit(), motion=moved(9.0, 3.0), ice_ratio=2.25, crystalline_ice=8.0, masked_fraction=0.4
    ).result
    figures = figures_of(result)
    breach = judge(figures, QualityLimits(**limits))  # type: ignore[arg-type]
    assert breach is not None
    assert (breach.rule, breach.reason) == (rule, words)
    figure = next(r.figure for r in RULES if r.limit == rule)
    assert judge(figures, QualityLimits(**{rule: getattr(figures, figure)})) is None


def test_every_limit_of_the_record_has_its_rule() -> None:
    assert {rule.limit for rule in RULES} == {field.name for field in fields(QualityLimits)}


def test_no_rings_break_every_limit_on_the_ctf_and_what_is_not_known_breaks_none() -> None:
    limits = QualityLimits(
        max_ctf_fit_angstrom=5.0,
        max_astigmatism_angstrom=500.0,
        max_total_motion_angstrom=1.0,
        max_ice_ratio=0.1,
    )
    blind = figures_of(preprocessed("a", ctf=fit(rings=False)).result)
    assert [b.rule for b in find_breaches(blind, limits)] == [
        "max_ctf_fit_angstrom",
        "max_astigmatism_angstrom",
    ]
    assert "no Thon rings" in next(find_breaches(blind, limits)).reason
    assert judge(figures_of(preprocessed("a").result), limits) is None


# --- what a change does ----------------------------------------------------------------------------


def test_a_done_exposure_that_is_rejected_leaves_the_counts_and_comes_back_with_its_scores() -> None:
    controller = Controller(QUIET)
    play(controller, found("a"), preprocessed("a", 60, motion=moved(9.0)), ranked("a", 40, 20))
    rank_one(controller, "b", 30)
    assert play(controller, limited(max_total_motion_angstrom=5.0)) == []
    assert (state_of(controller, "a"), controller.n_above_threshold) == (ExposureState.REJECTED, 30)
    assert +controller.n_rejected_by == {"max_total_motion_angstrom": 1}
    assert [m.name for m in controller.list_members()] == ["b"]
    assert play(controller, limited(max_total_motion_angstrom=10.0)) == []
    assert (state_of(controller, "a"), controller.n_above_threshold) == (ExposureState.DONE, 70)
    assert sorted(m.half_set for m in controller.list_members()) == [1, 2]


def test_an_exposure_that_was_rejected_before_it_was_ranked_is_ranked_when_limits_let_it() -> None:
    controller = Controller(QUIET)
    event = preprocessed("a", 60, motion=moved(9.0))
    assert play(controller, limited(max_total_motion_angstrom=5.0), found("a"), event) == []
    commands = play(controller, limited())
    assert commands == [Rank(exposure_id=ExposureId("a"), name="a", preprocessed=event.result)]
    play(controller, ranked("a", 60))
    assert controller.n_above_threshold == 60


def test_an_exposure_that_is_rejected_while_it_is_ranked_keeps_its_scores_for_later() -> None:
    controller = Controller(QUIET)
    play(controller, found("a"), preprocessed("a", 60, motion=moved(9.0)))
    assert play(controller, limited(max_total_motion_angstrom=5.0)) == []
    assert state_of(controller, "a") is ExposureState.IN_WORK
    play(controller, ranked("a", 60))
    assert (state_of(controller, "a"), controller.n_above_threshold) == (ExposureState.REJECTED, 0)
    assert play(controller, limited()) == []
    assert controller.n_above_threshold == 60


def test_an_exposure_that_is_rejected_while_it_waits_is_not_ranked() -> None:
    controller = Controller(replace(QUIET, max_in_flight_rank=1))
    for name in "ab":
        play(controller, found(name), preprocessed(name, 60, motion=moved(9.0)))
    play(controller, limited(max_total_motion_angstrom=5.0))
    assert state_of(controller, "b") is ExposureState.REJECTED
    assert controller.count_waiting(Stage.RANK) == 0
    assert play(controller, ranked("a", 60)) == []


def test_a_rank_that_fails_for_a_rejected_exposure_is_not_tried_again() -> None:
    controller = Controller(QUIET)
    play(controller, found("a"), preprocessed("a", 60), overruled("a", is_accepted=False))
    died = StageFailed(
        at=7.0, exposure_id=ExposureId("a"), stage=Stage.RANK, kind=FailureKind.RESOURCE, reason="died"
    )
    assert play(controller, died) == []
    assert state_of(controller, "a") is ExposureState.REJECTED
    assert [type(c) for c in play(controller, overruled("a", is_accepted=None))] == [Rank]


def test_a_word_wins_over_limits_until_it_is_taken_back() -> None:
    controller = Controller(QUIET)
    play(controller, limited(max_total_motion_angstrom=5.0))
    play(controller, found("a"), preprocessed("a", 60, motion=moved(9.0)))
    play(controller, overruled("a", is_accepted=True), ranked("a", 60))
    assert state_of(controller, "a") is ExposureState.DONE
    play(controller, limited(max_total_motion_angstrom=1.0))
    assert controller.n_above_threshold == 60
    play(controller, overruled("a", is_accepted=None))
    assert +controller.n_rejected_by == {"max_total_motion_angstrom": 1}
    play(controller, limited(), overruled("a", is_accepted=False, reason="ice crystal"))
    assert controller.exposures[ExposureId("a")].reason == "rejected by hand: ice crystal"
    assert +controller.n_rejected_by == {OVERRULED: 1}


def test_a_word_on_an_exposure_that_is_still_in_work_is_kept() -> None:
    controller = Controller(QUIET)
    play(controller, found("a"), overruled("a", is_accepted=False), preprocessed("a", 60))
    assert state_of(controller, "a") is ExposureState.REJECTED


def test_half_sets_stay_and_new_ones_fill_the_half_that_rejection_emptied() -> None:
    controller = Controller(QUIET)
    for name, n in (("a", 50), ("b", 50)):
        rank_one(controller, name, n)
    play(controller, overruled("a", is_accepted=False))
    rank_one(controller, "c", 10)
    play(controller, overruled("a", is_accepted=None))
    halves = {r.name: r.half_set for r in controller.exposures.values()}
    assert halves["a"] != halves["b"]
    assert halves["c"] == halves["a"]


def test_a_file_that_changes_is_measured_and_judged_anew() -> None:
    controller = Controller(QUIET)
    play(controller, limited(max_total_motion_angstrom=5.0))
    play(controller, found("a"), preprocessed("a", 60, motion=moved(9.0)))
    assert play(controller, found("a", 1)) == [Preprocess(exposure=make_exposure("a", 1))]
    play(controller, preprocessed("a", 60, motion=moved(2.0)), ranked("a", 60))
    assert state_of(controller, "a") is ExposureState.DONE


# --- runs ------------------------------------------------------------------------------------------


def test_losing_more_than_a_tenth_of_the_last_runs_particles_asks_for_another_run() -> None:
    controller = Controller(SETTINGS)
    for name, n in (("a", 100), ("b", 9), ("c", 8)):
        rank_one(controller, name, n)
    rank_one(controller, "d", 100)
    (started,) = play(controller, RunEnded(at=4.0, result=run_result("run001", n=100)))
    assert isinstance(started, StartRun)
    assert started.request.run_id == "run002"
    play(controller, overruled("b", is_accepted=False), overruled("c", is_accepted=False))
    assert len(controller.runs) == 2
    play(controller, overruled("d", is_accepted=False))
    # The run in work is let finish; the next one waits for it and has the exposures of then.
    (started,) = play(controller, RunEnded(at=7.0, result=run_result("run002", n=217)))
    assert isinstance(started, StartRun)
    assert [m.name for m in started.members] == ["a"]
    assert started.request.n_particles == 100
    campaign = controller.campaigns[started.request.campaign_id]
    assert campaign.request.trigger is CampaignTrigger.LOSS
    assert "117 of the last campaign's 217 particles have been rejected" in campaign.request.reason


def test_growth_is_counted_from_the_run_after_the_loss() -> None:
    controller = Controller(SETTINGS)
    for name in "abc":
        rank_one(controller, name, 40)
    play(controller, RunEnded(at=4.0, result=run_result("run001", n=120)))
    play(controller, overruled("a", is_accepted=False))
    play(controller, RunEnded(at=7.0, result=run_result("run002", n=80)))
    (third,) = rank_one(controller, "d", 40)
    assert isinstance(third, StartRun)
    reason = controller.campaigns[third.request.campaign_id].request.reason
    assert reason == "120 particles score above 0.4: 1.50 times the last campaign's 80 (rung 100)"


def test_a_campaign_that_was_due_and_lost_its_particles_does_not_start() -> None:
    controller = Controller(SETTINGS)
    for name in "ab":
        rank_one(controller, name, 100)
    play(controller, overruled("a", is_accepted=False), overruled("b", is_accepted=False))
    assert play(controller, RunEnded(at=4.0, result=run_result("run001", n=100))) == []
    assert len(controller.runs) == 1
    play(controller, InputEnded(at=9.0))
    assert controller.is_finished
    assert "at least 50 are needed" in [d.why for d in controller.decisions if d.what == "start no run"][-1]


# --- any history -----------------------------------------------------------------------------------

NAMES = "abcdef"
LIMITS = st.builds(
    QualityLimits,
    max_total_motion_angstrom=st.one_of(st.none(), st.integers(1, 9).map(float)),
    max_ice_ratio=st.one_of(st.none(), st.integers(1, 9).map(float)),
    min_picks=st.one_of(st.none(), st.integers(0, 60)),
)
CHANGES = st.one_of(
    st.builds(QualityLimitsChanged, at=st.just(5.0), limits=LIMITS, reason=st.just("")),
    st.builds(overruled, st.sampled_from(NAMES), st.sampled_from([True, False, None])),
)
FIGURES = st.fixed_dictionaries(
    {
        name: st.tuples(st.integers(0, 60), st.integers(0, 10).map(float), st.integers(0, 10).map(float))
        for name in NAMES
    }
)


class Story:
    """A controller with every exposure's truth; `finish` answers all work that is in flight."""

    def __init__(self, truth: dict[str, tuple[int, float, float]]) -> None:
        self.truth = truth
        self.controller = Controller(QUIET)
        self.log: list[Event] = []
        for name in truth:
            self.tell(found(name))

    def tell(self, event: Event) -> None:
        self.log.append(event)
        play(self.controller, event)

    def preprocess(self, name: str) -> None:
        n, motion, ice = self.truth[name]
        self.tell(preprocessed(name, n, motion=moved(motion), ice_ratio=ice))

    def finish(self) -> None:
        for name in self.truth:
            self.preprocess(name)
            self.tell(ranked(name, self.truth[name][0]))

    def counts(self) -> tuple[int, Counter[ExposureState], Counter[str], int]:
        controller = self.controller
        members = sum(controller.exposures[m.exposure_id].n_particles for m in controller.list_members())
        return (
            controller.n_above_threshold,
            +controller.n_by_state,
            +controller.n_rejected_by,
            members,
        )

    def is_used(self, name: str) -> bool:
        """Judge independently of the code under test."""
        word, limits = None, QualityLimits()
        for event in self.log:
            if isinstance(event, QualityLimitsChanged):
                limits = event.limits
            if isinstance(event, ExposureOverruled) and event.exposure_id == name:
                word = event.is_accepted
        n, motion, ice = self.truth[name]
        keeps = (
            (limits.max_total_motion_angstrom is None or motion <= limits.max_total_motion_angstrom)
            and (limits.max_ice_ratio is None or ice <= limits.max_ice_ratio)
            and (limits.min_picks is None or n >= limits.min_picks)
        )
        return keeps if word is None else word


STEPS = st.lists(
    st.one_of(
        CHANGES,
        st.sampled_from(NAMES).map(lambda name: ("preprocess", name)),
        st.sampled_from(NAMES).map(lambda name: ("rank", name)),
        st.just(SessionOpened(at=8.0, settings_digest="", version="")),
    ),
    max_size=25,
)


@hypothesis_settings(max_examples=150, deadline=None)
@given(truth=FIGURES, steps=STEPS)
def test_only_particles_of_accepted_exposures_count_whatever_happened(
    truth: dict[str, tuple[int, float, float]], steps: list[Event | tuple[str, str]]
) -> None:
    story = Story(truth)
    for step in steps:
        match step:
            case ("preprocess", name):
                story.preprocess(name)
            case ("rank", name):
                story.tell(ranked(name, truth[name][0]))
            case event:
                story.tell(event)  # type: ignore[arg-type]
    halves = {r.name: r.half_set for r in story.controller.exposures.values() if r.half_set}
    story.finish()
    used = {name for name in truth if story.is_used(name)}
    assert story.controller.n_above_threshold == sum(truth[name][0] for name in used)
    assert {m.name for m in story.controller.list_members()} == {name for name in used if truth[name][0]}
    assert story.controller.n_by_state[ExposureState.REJECTED] == len(truth) - len(used)
    assert all(story.controller.exposures[ExposureId(name)].half_set == half for name, half in halves.items())
    again = Controller(QUIET)
    for event in story.log:
        again.handle(event)
    assert again.exposures == story.controller.exposures


@hypothesis_settings(max_examples=100, deadline=None)
@given(truth=FIGURES, before=st.lists(CHANGES, max_size=5), change=CHANGES)
def test_taking_a_change_back_restores_every_count(
    truth: dict[str, tuple[int, float, float]], before: list[Event], change: Event
) -> None:
    story = Story(truth)
    for event in before:
        story.tell(event)
    story.finish()
    counts = story.counts()
    match change:
        case ExposureOverruled(exposure_id=exposure_id):
            word = story.controller.exposures[exposure_id].overruled_as
            undo: Event = replace(change, is_accepted=word)
        case _:
            undo = QualityLimitsChanged(at=7.0, limits=story.controller.limits, reason="undo")
    story.tell(change)
    story.tell(undo)
    story.finish()
    assert story.counts() == counts


@hypothesis_settings(max_examples=60, deadline=None)
@given(truth=FIGURES, limits=st.lists(LIMITS, min_size=1, max_size=5), last=LIMITS, seed=st.randoms())
def test_only_the_last_limits_matter(
    truth: dict[str, tuple[int, float, float]],
    limits: list[QualityLimits],
    last: QualityLimits,
    seed: random.Random,
) -> None:
    direct, winding = Story(truth), Story(truth)
    names = list(truth)
    for values in limits:
        winding.tell(QualityLimitsChanged(at=5.0, limits=values, reason=""))
        name = seed.choice(names)
        winding.preprocess(name)
        winding.tell(ranked(name, truth[name][0]))
    for story in (direct, winding):
        story.tell(QualityLimitsChanged(at=6.0, limits=last, reason=""))
        story.finish()
    assert winding.counts() == direct.counts()
