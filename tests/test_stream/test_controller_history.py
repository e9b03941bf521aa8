"""The controller over random histories: invariants after every event, restarts anywhere, live equal to offline."""

from __future__ import annotations

import hashlib
import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule
from story import found, make_file, moved, preprocessed, ranked, replay, run_result, tell

from stream.control.controller import Controller
from stream.control.runs import IN_WORK, honest_resolution
from stream.control.settings import ControllerSettings, RunPolicy
from stream.records.commands import CancelRun, ClusterParticles, Command, RunMember, StartRun
from stream.records.events import (
    ClusteringFailed,
    DrainRequested,
    Event,
    ExposureOverruled,
    FileRejected,
    GainOriented,
    InputEnded,
    ParticlesClustered,
    QualityLimitsChanged,
    RunCancelled,
    RunEnded,
    RunFailed,
    SessionDecided,
    SessionOpened,
    StageFailed,
)
from stream.records.values import (
    ClusteringId,
    ClusteringResult,
    ExposureId,
    FailureKind,
    GainOrientation,
    QualityLimits,
    RunId,
    RunPurpose,
    RunRequest,
    RunResult,
    Stage,
)
from stream.records.wishes import TimeWindow, Wish, WishKind

SETTINGS = ControllerSettings(
    runs=RunPolicy(
        rungs=(100, 200),
        full_rungs=(200,),
        full_min_particles=150,
        final_min_particles=50,
        search_sizes=(100, 200),
        part_min_particles=50,
        cluster_min_particles=50,
        n_clusters=3,
    ),
    max_in_flight_preprocess=2,
    max_in_flight_rank=2,
)
RUN_NUMBERS = st.integers(1, 12)
WISHES = st.one_of(
    st.builds(Wish, kind=st.just(WishKind.SET_SYMMETRY), symmetry=st.sampled_from(["C1", "C2"])),
    st.builds(Wish, kind=st.just(WishKind.SET_MASK_DIAMETER), mask_diameter_angstrom=st.just(100.0)),
    st.builds(Wish, kind=st.just(WishKind.SET_SCORE_THRESHOLD), score_threshold=st.sampled_from([0.4, 0.85])),
    st.builds(Wish, kind=st.just(WishKind.FORCE_RUN)),
    st.builds(
        Wish,
        kind=st.just(WishKind.EXCLUDE_TIME),
        window=st.sampled_from([TimeWindow(from_s=0.0, to_s=1.0), TimeWindow(from_s=1e9, to_s=2e9)]),
    ),
    st.builds(
        Wish,
        kind=st.sampled_from([WishKind.PIN_RUN, WishKind.REJECT_RUN]),
        run_id=RUN_NUMBERS.map(lambda n: RunId(f"run{n:03d}")),
    ),
    st.builds(Wish, kind=st.just(WishKind.UNDO), decision_id=st.integers(1, 4).map(lambda n: f"d{n}")),
)


class AnyHistory(RuleBasedStateMachine):
    """Arrivals, outcomes, late and double ones, failures, engine deaths, decisions and restarts in any order."""

    names = Bundle("names")
    settings = SETTINGS

    @initialize()
    def begin(self) -> None:
        self.controller = Controller(self.settings)
        self.log: list[Event] = []
        self.started: set[RunId] = set()
        self.answered: dict[RunId, tuple[Any, ...]] = {}
        self.sets_that_were: set[tuple[RunMember, ...]] = {()}
        self.accepted: RunResult | None = None

    def tell(self, event: Event) -> None:
        n_decided = self.controller.decisions.n_decided
        commands, committed = tell(self.controller, event)
        self.log += committed
        self.sets_that_were.add(self.controller.list_members())
        for command in commands:
            self.note(command, is_again=isinstance(event, SessionOpened))
        best = self.controller.best_run
        if best != self.accepted:
            assert self.controller.decisions.n_decided > n_decided
            if self.accepted is not None:
                said = [d for d in self.controller.decisions if d.what.startswith(("accept", "no map"))]
                assert said[-1].why
                if best is not None:
                    assert str(best.run_id) in said[-1].what
                    is_worse = honest_resolution(best) > honest_resolution(self.accepted)
                    reasons = ("choice of campaign", "symmetry is", "a person's word")
                    assert not is_worse or any(word in said[-1].why for word in reasons)
        self.accepted = best

    def note(self, command: Command, *, is_again: bool) -> None:
        match command:
            case StartRun(request=request, members=members):
                assert members in self.sets_that_were, "the run is on a set that was there"
                assert is_again or request.run_id not in self.started, "only a restart asks again"
                self.started.add(request.run_id)
            case ClusterParticles(members=members):
                assert members in self.sets_that_were
            case CancelRun(run_id=run_id):
                assert run_id in self.started
            case _:
                pass

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

    @rule(names=st.lists(st.integers(0, 8), unique=True, min_size=1), n=st.integers(30, 120))
    def pass_through(self, names: list[int], n: int) -> None:
        for number in names:
            name = f"m{number}"
            self.tell(found(name))
            self.tell(preprocessed(name, n))
            self.tell(ranked(name, n))

    @rule(limit=st.one_of(st.none(), st.floats(0, 10)))
    def limit_motion(self, limit: float | None) -> None:
        limits = QualityLimits(max_total_motion_angstrom=limit)
        self.tell(QualityLimitsChanged(at=0.0, limits=limits, reason=""))

    @rule(name=names, is_accepted=st.sampled_from([True, False, None]))
    def overrule(self, name: str, is_accepted: bool | None) -> None:
        self.tell(ExposureOverruled(at=0.0, exposure_id=ExposureId(name), is_accepted=is_accepted, reason=""))

    @rule(wish=WISHES)
    def decide(self, wish: Wish) -> None:
        if wish.kind is WishKind.UNDO and self.controller.wishes.find(wish.decision_id or "") is None:
            return
        self.tell(SessionDecided(at=0.0, wish=wish, reason="wished"))

    @rule(orientation=st.sampled_from([None, GainOrientation(), GainOrientation(flip_y=True)]))
    def orient_gain(self, orientation: GainOrientation | None) -> None:
        self.tell(GainOriented(at=0.0, orientation=orientation, contrast=1.0, n_movies=1, note="x"))

    @rule(name=names, n=st.integers(0, 90), bad=st.integers(0, 50))
    def rank(self, name: str, n: int, bad: int) -> None:
        self.tell(ranked(name, n, bad))

    @rule(name=names, stage=st.sampled_from(Stage), kind=st.sampled_from(FailureKind))
    def fail(self, name: str, stage: Stage, kind: FailureKind) -> None:
        self.tell(StageFailed(at=0.0, exposure_id=ExposureId(name), stage=stage, kind=kind, reason="x"))

    @rule(
        n_runs=st.integers(1, 6),
        resolution=st.one_of(st.none(), st.floats(3, 20), st.just(float("nan"))),
        cfar=st.one_of(st.none(), st.floats(0, 0.5)),
    )
    def end_runs(self, n_runs: int, resolution: float | None, cfar: float | None) -> None:
        for _ in range(n_runs):
            for request in self.controller.runs_in_work[:1]:
                result = run_result(request.run_id, resolution=resolution, cfar=cfar, n=request.n_particles)
                self.tell(RunEnded(at=0.0, result=replace(result, symmetry=request.symmetry)))

    @rule(number=RUN_NUMBERS, resolution=st.floats(3, 20))
    def end_any_run(self, number: int, resolution: float) -> None:
        self.tell(RunEnded(at=0.0, result=run_result(f"run{number:03d}", resolution=resolution)))

    @rule(number=RUN_NUMBERS, is_cancelled=st.booleans())
    def lose_run(self, number: int, is_cancelled: bool) -> None:
        kind = RunCancelled if is_cancelled else RunFailed
        self.tell(kind(at=0.0, run_id=RunId(f"run{number:03d}"), reason="x"))

    @rule(
        number=st.integers(1, 4),
        sizes=st.one_of(st.none(), st.lists(st.integers(0, 90), min_size=3, max_size=3)),
    )
    def end_clustering(self, number: int, sizes: list[int] | None) -> None:
        clustering_id = ClusteringId(f"campaign{number:03d}-clusters")
        if sizes is None:
            self.tell(ClusteringFailed(at=0.0, clustering_id=clustering_id, reason="x"))
            return
        result = ClusteringResult(
            clustering_id=clustering_id, sizes=tuple(sizes), n_without_features=0, folder="x", seconds={}
        )
        self.tell(ParticlesClustered(at=0.0, result=result))

    @rule()
    def restart(self) -> None:
        """Kill the service: a new one replays the journal and goes on."""
        self.controller = replay(self.settings, self.log)
        self.tell(SessionOpened(at=0.0, settings_digest="", version=""))

    @rule()
    def end_input(self) -> None:
        self.tell(InputEnded(at=0.0))

    @rule()
    def drain(self) -> None:
        self.tell(DrainRequested(at=0.0))

    @invariant()
    def a_run_is_answered_once(self) -> None:
        if not hasattr(self, "controller"):
            return
        for run in self.controller.runs.values():
            story = (run.state, run.result)
            if run.state not in IN_WORK:
                assert self.answered.setdefault(run.run_id, story) == story
        assert len(self.controller.runs_in_work) <= self.settings.runs.max_parallel_runs

    @invariant()
    def no_exposure_is_in_both_halves(self) -> None:
        if not hasattr(self, "controller"):
            return
        sides: dict[ExposureId, int] = {}
        for members in self.sets_that_were:
            for member in members:
                assert sides.setdefault(member.exposure_id, member.half_set) == member.half_set

    def teardown(self) -> None:
        if hasattr(self, "controller"):
            again = replay(self.settings, self.log)
            assert again.exposures == self.controller.exposures
            assert again.runs == self.controller.runs
            assert again.campaigns == self.controller.campaigns
            assert again.best_run == self.controller.best_run
            assert again.propose(0.0) == self.controller.propose(0.0)


class AnyHistoryWithGain(AnyHistory):
    """The same, with a gain reference whose orientation has to be found first, and two runs side by side."""

    settings = replace(
        SETTINGS, is_gain_orientation_sought=True, runs=replace(SETTINGS.runs, max_parallel_runs=2)
    )


AnyHistory.TestCase.settings = hypothesis_settings(max_examples=100, stateful_step_count=40, deadline=None)
TestAnyHistory = AnyHistory.TestCase

AnyHistoryWithGain.TestCase.settings = hypothesis_settings(
    max_examples=40, stateful_step_count=40, deadline=None
)
TestAnyHistoryWithGain = AnyHistoryWithGain.TestCase


# --- live equals offline ---------------------------------------------------------------------------


class Session:
    """A session whose engine's answer depends on nothing but the particles and how the run started."""

    def __init__(self, counts: dict[str, int], seed: int, *, is_oriented: bool) -> None:
        self.counts = counts
        self.seed = seed
        self.is_oriented = is_oriented

    def play(self, order: list[str], when_to_answer: random.Random, *, with_rungs: bool) -> Controller:
        rungs = SETTINGS.runs.rungs if with_rungs else (100_000,)
        controller = Controller(
            replace(
                SETTINGS,
                runs=replace(SETTINGS.runs, rungs=rungs),
                max_in_flight_preprocess=99,
                max_in_flight_rank=99,
            )
        )
        for name in order:
            for event in (
                found(name),
                preprocessed(name, self.counts[name]),
                ranked(name, self.counts[name]),
            ):
                tell(controller, event)
                if when_to_answer.random() < 0.3:
                    self.answer_one(controller)
        tell(controller, InputEnded(at=9.0))
        for _ in range(200):
            if controller.is_finished:
                return controller
            self.answer_one(controller)
        raise AssertionError("the session does not end")

    def answer_one(self, controller: Controller) -> None:
        for campaign in controller.campaigns.values():
            clustering = campaign.clustering
            if clustering is not None and clustering.is_in_work:
                sizes = tuple(self.draw(f"{m.name} cluster", 40, 90) for m in campaign.members[:3])
                result = ClusteringResult(
                    clustering_id=clustering.request.clustering_id,
                    sizes=sizes,
                    n_without_features=0,
                    folder="x",
                    seconds={},
                )
                tell(controller, ParticlesClustered(at=5.0, result=result))
                return
        for request in controller.runs_in_work[:1]:
            tell(controller, RunEnded(at=5.0, result=self.run(request, controller)))

    def run(self, request: RunRequest, controller: Controller) -> RunResult:
        members = [m.name for m in controller.campaigns[request.campaign_id].members]
        start = None if request.start_map is None else controller.runs[request.start_map].request.subset
        key = f"{sorted(members)} {request.purpose} {strip(str(request.subset))} {strip(str(start))}"
        if request.purpose is RunPurpose.UPDATE:
            key += str(
                request.start_map
            )  # what continues an earlier map depends on how the session came here
        resolution = self.draw(key, 40, 120) / 10
        cfar = 0.5 if self.is_oriented else self.draw(key + "cfar", 0, 30) / 100
        result = run_result(request.run_id, resolution=resolution, cfar=cfar, n=request.n_particles)
        return replace(result, symmetry=request.symmetry)

    def draw(self, key: str, low: int, high: int) -> int:
        digest = hashlib.blake2b(f"{self.seed} {key}".encode(), digest_size=4).digest()
        return low + int.from_bytes(digest, "little") % (high - low + 1)


def plan_of(controller: Controller) -> list[tuple[RunPurpose, Any, Any]]:
    """Return the last campaign's runs, less the one that continued an earlier map."""
    last = list(controller.campaigns.values())[-1]
    last = last if last.request.repeats is None else controller.campaigns[last.request.repeats]
    starts = {r.run_id: (r.request.purpose, str(r.request.subset)) for r in last.runs}
    return [
        (r.request.purpose, strip(str(r.request.subset)), strip(str(starts.get(r.request.start_map))))  # type: ignore[arg-type]
        for r in last.runs
        if r.request.purpose is not RunPurpose.UPDATE
    ]


def strip(text: str) -> str:
    """Leave the number of the campaign out: a session with rungs has had more of them."""
    return text.split("campaign", 1)[0] + text.split("-clusters", 1)[-1]


@pytest.mark.parametrize("is_oriented", [True, False])
@hypothesis_settings(max_examples=100, deadline=None)
@given(
    counts=st.lists(st.integers(20, 90), min_size=3, max_size=9),
    order=st.randoms(use_true_random=False),
    seed=st.integers(0, 10_000),
)
def test_any_order_of_arrival_ends_with_the_run_plan_and_the_particles_of_an_offline_run(
    is_oriented: bool, counts: list[int], order: random.Random, seed: int
) -> None:
    session = Session({f"m{i}": n for i, n in enumerate(counts)}, seed, is_oriented=is_oriented)
    names = list(session.counts)
    offline = session.play(names, random.Random(0), with_rungs=False)
    order.shuffle(names)
    live = session.play(names, order, with_rungs=True)
    assert live.n_above_threshold == offline.n_above_threshold == sum(counts)
    if not offline.campaigns:
        assert not live.campaigns
        return
    assert plan_of(live) == plan_of(offline)
    chosen = [c.best_run and c.runs[c.best_run.run_id].request for c in (offline, live)]
    if chosen[0] is not None and chosen[0].purpose in (
        RunPurpose.SWEEP,
        RunPurpose.TEMPLATE,
        RunPurpose.INITIAL,
    ):
        assert chosen[1] is not None
        assert (chosen[1].purpose, chosen[1].subset) == (chosen[0].purpose, chosen[0].subset)
