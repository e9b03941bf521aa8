"""Campaigns of engine runs: when they start, what they do next, which map is accepted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from story import found, make_exposure, play, preprocessed, rank_one, ranked, replay, run_result, tell

from stream.control.controller import Controller
from stream.control.runs import RunState
from stream.control.settings import ControllerSettings, RunPolicy
from stream.control.sweep import list_parts, list_turn
from stream.records.commands import CancelRun, ClusterParticles, Command, Preprocess, Rank, StartRun
from stream.records.errors import InvariantError
from stream.records.events import (
    ClusteringFailed,
    DiskSpaceChanged,
    Event,
    InputEnded,
    ParticlesClustered,
    RunCancelled,
    RunEnded,
    RunFailed,
    RunStarted,
    SessionDecided,
    SessionOpened,
)
from stream.records.values import (
    CampaignPlan,
    CampaignTrigger,
    ClusteringId,
    ClusteringResult,
    RunId,
    RunPurpose,
    RunRequest,
    SweepPolicy,
    UnionForecast,
)
from stream.records.wishes import Wish, WishKind

POLICY = RunPolicy(
    rungs=(100, 1000),
    full_rungs=(1000,),
    full_min_particles=400,
    final_min_particles=50,
    search_sizes=(300, 600),
    part_min_particles=50,
    cluster_min_particles=50,
    n_clusters=4,
)
SETTINGS = ControllerSettings(runs=POLICY, max_in_flight_preprocess=50, max_in_flight_rank=50)


def with_policy(**changes: Any) -> ControllerSettings:
    return replace(SETTINGS, runs=replace(POLICY, **changes))


def arrive(controller: Controller, n_exposures: int, n_each: int = 60, *, prefix: str = "e") -> None:
    for i in range(n_exposures):
        rank_one(controller, f"{prefix}{i:03d}", n_each)


Answer = Callable[[RunRequest], dict[str, Any] | str]


def good(request: RunRequest) -> dict[str, Any]:
    return {"resolution": 8.0, "cfar": 0.5, "n": request.n_particles}


def answer_all(
    controller: Controller, answer: Answer, *, sizes: tuple[int, ...] = (100, 200, 30, 150)
) -> list[str]:
    """Answer every run and clustering until nothing is in work; return what was asked for, in words."""
    asked: list[str] = []
    for _ in range(200):
        clustering = [c.clustering for c in controller.campaigns.values() if c.clustering is not None]
        if clustering and clustering[-1].is_in_work:
            asked.append("cluster")
            play(controller, clustered(clustering[-1].request.clustering_id, sizes))
            continue
        if not controller.runs_in_work:
            return asked
        request = controller.runs_in_work[0]
        subset = request.subset
        which = f" {subset.clusters}" if subset.clusters else ""
        asked.append(f"{request.purpose.value} {request.n_particles}{which}")
        play(controller, outcome(request, answer))
    raise AssertionError("the runs do not end")


def outcome(request: RunRequest, answer: Answer) -> Event:
    said = answer(request)
    if isinstance(said, str):
        return RunFailed(at=3.0, run_id=request.run_id, reason=said)
    figures = {"n": request.n_particles, **said}
    more = {
        k: figures.pop(k) for k in ("union", "nyquist_angstrom", "seconds", "correlation") if k in figures
    }
    return RunEnded(
        at=3.0, result=replace(run_result(request.run_id, **figures), symmetry=request.symmetry, **more)
    )


def clustered(clustering_id: str, sizes: tuple[int, ...]) -> ParticlesClustered:
    result = ClusteringResult(
        clustering_id=ClusteringId(clustering_id), sizes=sizes, n_without_features=3, folder="x", seconds={}
    )
    return ParticlesClustered(at=3.0, result=result)


def finish(
    settings: ControllerSettings, answer: Answer, n_exposures: int = 10
) -> tuple[Controller, list[str]]:
    """Play a session whose runs all come at the end of the input; return the controller and the runs."""
    controller = Controller(replace(settings, runs=replace(settings.runs, rungs=(100_000,))))
    arrive(controller, n_exposures)
    play(controller, InputEnded(at=2.5))
    return controller, answer_all(controller, answer)


def words(controller: Controller) -> str:
    return "\n".join(f"{d.what}: {d.why}" for d in controller.decisions)


# --- rungs -----------------------------------------------------------------------------------------


def test_a_run_starts_at_the_first_rung_and_again_at_the_next() -> None:
    controller = Controller(with_policy(rungs=(100, 200)))
    assert rank_one(controller, "a", 60) == []
    (first,) = rank_one(controller, "b", 60)
    assert isinstance(first, StartRun)
    assert (first.request.run_id, first.request.n_particles, first.request.start_map) == ("run001", 120, None)
    assert [m.name for m in first.members] == ["a", "b"]
    assert sorted(m.half_set for m in first.members) == [1, 2]
    play(controller, RunEnded(at=3.0, result=run_result("run001", n=120)))
    assert rank_one(controller, "c", 50) == []
    (second,) = rank_one(controller, "d", 50)
    assert isinstance(second, StartRun)
    assert (second.request.warm_start, second.request.purpose) == ("run001", RunPurpose.UPDATE)
    play(controller, RunEnded(at=3.0, result=run_result("run002", n=220)))
    assert rank_one(controller, "e", 100) == [], "above the last rung the count has to grow by half"
    (third,) = rank_one(controller, "f", 10)
    assert isinstance(third, StartRun)


def test_a_rung_waits_for_the_run_in_work_and_the_newest_one_counts() -> None:
    controller = Controller(SETTINGS)
    for name, n in (("a", 100), ("b", 60), ("c", 100)):
        rank_one(controller, name, n)
    assert [r.run_id for r in controller.runs_in_work] == ["run001"]
    play(controller, RunEnded(at=3.0, result=run_result("run001")))
    assert controller.runs_in_work == [], "260 particles are under the next rung of 1000"


def test_a_campaign_that_the_particles_have_outgrown_ends_after_its_run() -> None:
    controller = Controller(with_policy(rungs=(100, 1000, 3000), full_rungs=(1000, 3000)))
    arrive(controller, 17)
    play(controller, RunEnded(at=3.0, result=run_result("run001", n=120)))
    assert controller.runs_in_work[0].n_particles == 1020
    arrive(controller, 40, prefix="late")
    assert len(controller.runs_in_work) == 1, "the run is let finish"
    (started,) = play(controller, RunEnded(at=3.0, result=run_result("run002", n=1020)))
    first, second = list(controller.campaigns.values())[1:]
    assert (first.is_complete, second.request.n_particles) == (False, 3420)
    assert first.verdict.startswith("superseded")
    assert isinstance(started, StartRun)


def test_every_rebuild_factor_the_particles_are_refined_from_nothing_too_and_compared() -> None:
    controller = Controller(with_policy(rungs=(100, 390), full_min_particles=5000, full_rungs=()))
    arrive(controller, 2)
    play(controller, RunEnded(at=3.0, result=run_result("run001", n=120)))
    arrive(controller, 6, prefix="x")

    def compared(request: RunRequest) -> dict[str, Any]:
        is_fresh = request.purpose is RunPurpose.REBUILD
        return {
            "resolution": 7.5 if is_fresh else 7.0,
            "seconds": {"all": 100.0 if is_fresh else 13.0},
            "correlation": 0.97 if is_fresh else None,
        }

    controller_runs = answer_all(controller, compared)
    assert controller_runs == ["update 420"], "420 is under four times 120"
    arrive(controller, 4, prefix="y")
    assert answer_all(controller, compared) == ["update 660", "rebuild 660"]
    said = words(controller)
    assert "difference +0.50 Å" in said
    assert "correlation of the maps 0.970" in said
    assert "100 s from nothing, 13 s continued (ratio 0.13)" in said
    assert controller.best_run is not None
    assert controller.best_run.resolution_angstrom == 7.0


def test_scores_of_another_model_ask_for_a_campaign_once_every_exposure_has_them() -> None:
    controller = Controller(SETTINGS)
    arrive(controller, 2)
    answer_all(controller, good)
    for i in range(2):
        name = f"e{i:03d}"
        again = ranked(name, 60)
        play(controller, found(name, 1), preprocessed(name, 60))
        play(controller, replace(again, result=replace(again.result, model_hash="m2")))
        assert len(controller.campaigns) == 1 + i
    last = list(controller.campaigns.values())[-1].request
    assert (last.trigger, last.model_hash) == (CampaignTrigger.RESCORED, "m2")


# --- the paper's policy ----------------------------------------------------------------------------


def test_two_sizes_are_searched_and_the_sweep_goes_from_the_better_one_over_four_nested_parts() -> None:
    def halves_are_better(request: RunRequest) -> dict[str, Any]:
        return {"resolution": 6.0 if request.n_particles == 300 else 7.0, "cfar": 0.4}

    controller, asked = finish(SETTINGS, halves_are_better)
    assert asked == ["initial 300", "initial 600", "sweep 150", "sweep 300", "sweep 450", "sweep 600"]
    sweep = [r.request for r in controller.runs.values() if r.request.purpose is RunPurpose.SWEEP]
    assert {r.start_map for r in sweep} == {RunId("run001")}
    assert [r.subset.top for r in sweep] == [150, 300, 450, None]
    assert controller.best_run is not None
    assert controller.best_run.n_particles == 300


def test_a_search_run_that_fails_or_does_not_pass_leaves_the_choice_to_the_other() -> None:
    for bad in ("engine died", {"resolution": 3.0, "cfar": 0.01}, {"resolution": None, "cfar": None}):

        def answer(request: RunRequest, bad: Any = bad) -> Any:
            return (
                bad if request.purpose is RunPurpose.INITIAL and request.n_particles == 600 else good(request)
            )

        controller, asked = finish(SETTINGS, answer)
        sweep = [r.request for r in controller.runs.values() if r.request.purpose is RunPurpose.SWEEP]
        assert {r.start_map for r in sweep} == {RunId("run001")}
        assert "cluster" not in asked


def test_without_any_initial_model_the_campaign_ends_and_is_not_tried_for_ever() -> None:
    controller, asked = finish(SETTINGS, lambda _: "engine died")
    assert asked == ["initial 300", "initial 600"]
    assert controller.is_finished
    assert controller.best_run is None
    assert "no initial model; none passes" in words(controller)


def test_starts_that_do_not_agree_are_answered_by_clusters_of_like_views_too() -> None:
    """Few views besides the preferred one: no model of everything is believed, one of a cluster is."""

    def answer(request: RunRequest) -> Any:
        is_refused = request.purpose is RunPurpose.INITIAL or request.subset.clusters == (0,)
        return {"resolution": None, "cfar": None} if is_refused else good(request)

    controller, asked = finish(SETTINGS, answer)
    assert asked[:3] == ["initial 300", "initial 600", "cluster"]
    assert "survey 600" not in asked, "there is no run whose sums could be kept by cluster"
    template = next(r.request for r in controller.runs.values() if r.request.purpose is RunPurpose.TEMPLATE)
    assert controller.runs[template.start_map].request.purpose is RunPurpose.CLUSTER  # type: ignore[index]
    assert controller.best_run is not None


def test_where_no_cluster_gives_a_model_either_the_campaign_ends() -> None:
    controller, asked = finish(SETTINGS, lambda _: {"resolution": None, "cfar": None})
    assert asked[3:] == ["cluster 100 (0,)", "cluster 200 (1,)", "cluster 150 (3,)"]
    assert controller.is_finished
    assert "no initial model; none passes" in words(controller)


def preferred(request: RunRequest) -> dict[str, Any]:
    """Give what preferred orientation gives: a fine and streaked map of all, an isotropic one of cluster 2."""
    is_good = request.subset.clusters == (1,) or request.purpose in (RunPurpose.TEMPLATE, RunPurpose.SWEEP)
    return {"resolution": 7.0 if is_good else 5.0, "cfar": 0.4 if is_good else 0.03}


def test_preferred_orientation_is_answered_by_clusters_of_like_views() -> None:
    controller, asked = finish(SETTINGS, preferred)
    assert asked == [
        "initial 300",
        "initial 600",
        "cluster",
        "survey 600",
        "cluster 100 (0,)",
        "cluster 200 (1,)",
        "cluster 150 (3,)",
        "template 600",
        "sweep 150",
        "sweep 300",
        "sweep 450",
    ]
    template = next(r.request for r in controller.runs.values() if r.request.purpose is RunPurpose.TEMPLATE)
    assert controller.runs[template.start_map].request.subset.clusters == (1,)  # type: ignore[index]
    assert controller.best_run is not None
    assert controller.best_run.cfar == 0.4
    said = words(controller)
    assert "left out for fewer than 50: 3" in said
    assert "3 particles without features are in none" in said


def test_where_everything_stays_streaked_the_clusters_map_that_passes_is_accepted() -> None:
    def answer(request: RunRequest) -> Any:
        return (
            {"resolution": 7.0, "cfar": 0.4}
            if request.subset.clusters == (1,)
            else {"resolution": 5.0, "cfar": 0.03}
        )

    controller, asked = finish(SETTINGS, answer)
    assert "template 600" in asked
    accepted = controller.best_run
    assert accepted is not None
    assert controller.runs[accepted.run_id].request.purpose is RunPurpose.CLUSTER


def test_the_branch_can_be_switched_off() -> None:
    _, asked = finish(with_policy(orientation_branch=False), preferred)
    assert asked == ["initial 300", "initial 600", "sweep 150", "sweep 300", "sweep 450"]


def test_a_small_set_is_not_divided_and_the_streaked_map_is_not_accepted() -> None:
    settings = with_policy(full_min_particles=10_000, full_rungs=())
    controller, asked = finish(settings, lambda _: {"resolution": 5.0, "cfar": 0.03})
    assert asked == ["initial 600", "sweep 300"]
    assert controller.best_run is None
    assert "with fewer than 10000 particles they are not divided by view" in words(controller)


def foretell(*, cfar: float) -> UnionForecast:
    return UnionForecast(
        clustering=ClusteringId("k"),
        clusters=(0, 2),
        n_particles=120,
        resolution_angstrom=7.0,
        cfar=cfar,
        cfar_null=0.6,
    )


def test_a_union_that_the_sums_foretell_saves_the_clusters_runs() -> None:
    forecast = foretell(cfar=0.33)

    def answer(request: RunRequest) -> dict[str, Any]:
        streaked = (RunPurpose.INITIAL, RunPurpose.SURVEY)
        said = (
            {"resolution": 5.0, "cfar": 0.03}
            if request.purpose in streaked
            else {"resolution": 7.2, "cfar": 0.3}
        )
        return said | {"union": forecast if request.purpose is RunPurpose.SURVEY else None}

    controller, asked = finish(SETTINGS, answer)
    assert asked[2:6] == ["cluster", "survey 600", "union 120 (0, 2)", "template 600"]
    assert "foretold 7.00 Å, cFAR 0.33; obtained 7.20 Å, cFAR 0.30" in words(controller)


def test_a_union_that_does_not_keep_what_was_foretold_is_followed_by_the_clusters() -> None:
    forecast = foretell(cfar=0.33)

    def answer(request: RunRequest) -> dict[str, Any]:
        return preferred(request) | {"union": forecast if request.purpose is RunPurpose.SURVEY else None}

    _, asked = finish(SETTINGS, answer)
    assert asked[2:6] == ["cluster", "survey 600", "union 120 (0, 2)", "cluster 100 (0,)"]


def test_a_union_that_passes_by_a_little_is_followed_by_the_clusters_of_which_the_most_isotropic_is_the_template() -> (
    None
):
    """A union keeps the poses of the map that did not pass; at Nyquist resolution tells maps apart no more."""
    forecast = foretell(cfar=0.24)
    answers = {RunPurpose.UNION: 0.2, RunPurpose.CLUSTER: 0.5}

    def answer(request: RunRequest) -> dict[str, Any]:
        cfar = answers.get(request.purpose, 0.1)
        resolution = 7.1 if request.purpose is RunPurpose.CLUSTER else 7.0
        said: dict[str, Any] = {"resolution": resolution, "cfar": cfar}
        return said | {"union": forecast if request.purpose is RunPurpose.SURVEY else None}

    controller, asked = finish(SETTINGS, answer)
    assert asked[4:6] == ["union 120 (0, 2)", "cluster 100 (0,)"]
    template = next(r for r in controller.runs.values() if r.request.purpose is RunPurpose.TEMPLATE)
    start = controller.runs[template.request.start_map]  # type: ignore[index]
    assert start.request.purpose is RunPurpose.CLUSTER


def test_a_clustering_that_fails_or_divides_too_finely_leaves_the_sweep_to_the_best_resolution() -> None:
    controller, asked = finish(SETTINGS, lambda _: {"resolution": 5.0, "cfar": 0.03})
    assert asked[-4:] == ["cluster 150 (3,)", "sweep 150", "sweep 300", "sweep 450"]
    controller = Controller(with_policy(rungs=(100_000,)))
    arrive(controller, 10)
    play(controller, InputEnded(at=2.5))
    for run_id in ("run001", "run002"):
        (command,) = play(controller, RunEnded(at=3.0, result=run_result(run_id, cfar=0.01)))
    assert isinstance(command, ClusterParticles)
    assert command.request.subset.top is None
    failure = ClusteringFailed(at=3.0, clustering_id=command.request.clustering_id, reason="no features")
    (started,) = play(controller, failure)
    assert isinstance(started, StartRun)
    assert started.request.purpose is RunPurpose.SWEEP
    small = Controller(with_policy(rungs=(100_000,)))
    arrive(small, 10)
    play(small, InputEnded(at=2.5))
    assert "cluster 30" not in str(answer_all(small, preferred, sizes=(30, 30, 30)))


def test_turns_narrow_down_the_best_count_between_two_scores() -> None:
    assert list_turn(0, (8, 4, 4), (0, 800), None) == (50, 150, 250, 350, 450, 550, 650, 750)
    assert list_turn(1, (8, 4, 4), (0, 800), 350) == (310, 330, 370, 390)
    assert list_turn(2, (8, 4, 4), (0, 800), 370) == (362, 366, 374, 378)
    assert list_turn(0, (8, 4, 4), (100, 103), None) == (100, 101, 102, 103)
    settings = with_policy(sweep=SweepPolicy.BOUNDS, bound_scores=(0.85, 0.1), search_sizes=(600,))
    best = {"resolution": 6.0}
    controller, _ = finish(settings, lambda r: {**best, "resolution": 6.0 + abs(r.n_particles - 420) / 100})
    sweep = [r.request for r in controller.runs.values() if r.request.purpose is RunPurpose.SWEEP]
    assert len(sweep) == 16
    assert {r.subset.score_threshold for r in sweep} == {0.0}
    assert controller.best_run is not None
    assert abs(controller.best_run.n_particles - 420) <= 2


def test_parts_are_nested_and_the_last_one_is_everything() -> None:
    assert list_parts(1003, 4, 100) == (250, 500, 750, 1003)
    assert list_parts(1003, 4, 600) == (750, 1003)


# --- small sets and odd scores ---------------------------------------------------------------------


def test_a_small_session_costs_one_run_from_nothing() -> None:
    settings = replace(SETTINGS, runs=RunPolicy())
    _, asked = finish(settings, good, n_exposures=15)
    assert asked == ["initial 900"], "parts under 1000 particles tell nothing"
    _, asked = finish(settings, good, n_exposures=60)
    assert asked == ["initial 3600", "sweep 1800"]


def test_fewer_particles_than_any_run_needs_are_said_and_nothing_starts() -> None:
    controller = Controller(SETTINGS)
    rank_one(controller, "a", 40)
    assert play(controller, InputEnded(at=5.0)) == []
    assert controller.is_finished
    assert "no more input: 40 particles above 0.4, at least 50 are needed" in words(controller)


def test_equal_scores_rank_nothing_so_there_is_no_sweep() -> None:
    controller = Controller(with_policy(rungs=(100_000,)))
    for i in range(500):
        rank_one(controller, f"e{i:03d}", 1)
    play(controller, InputEnded(at=5.0))
    assert answer_all(controller, good) == ["initial 500"]
    assert "every score lies in one bin" in words(controller)


# --- what is accepted ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("figures", "accepted", "said"),
    [
        ({"cfar": 0.05}, False, "cFAR 0.05 (isotropic: 0.60) is under 0.15: preferred orientation"),
        ({"cfar": 0.05, "null": 0.15}, True, "passed"),
        ({"cfar": 0.03, "null": 0.15}, False, "is under 0.04"),
        ({"cfar": 0.05, "null": 0.02}, False, "is under 0.15"),
        ({"cfar": None}, False, "without a cFAR nobody knows whether views are missing"),
        ({"cfar": float("nan")}, False, "without a cFAR"),
        ({"resolution": float("nan")}, False, "the half maps do not agree at any resolution"),
        ({"resolution": 6.0, "nyquist": 6.0}, True, "at Nyquist: smaller pixels would show more"),
    ],
)
def test_a_result_is_judged_by_resolution_and_cfar_with_its_null(
    figures: dict[str, Any], accepted: bool, said: str
) -> None:
    controller = Controller(SETTINGS)
    rank_one(controller, "a", 100)
    result = run_result("run001", resolution=figures.get("resolution", 8.0), cfar=figures.get("cfar", 0.5))
    result = replace(result, cfar_null=figures.get("null", 0.6), nyquist_angstrom=figures.get("nyquist"))
    play(controller, RunEnded(at=3.0, result=result))
    assert (controller.best_run is not None) == accepted
    assert said in controller.runs[RunId("run001")].verdict


def test_at_nyquist_more_particles_win_and_not_a_finer_number() -> None:
    def at_nyquist(request: RunRequest) -> dict[str, Any]:
        return {"resolution": 6.0 - request.n_particles % 7 / 10, "nyquist_angstrom": 6.0}

    controller, _ = finish(SETTINGS, at_nyquist)
    assert controller.best_run is not None
    assert controller.best_run.n_particles == 600


def test_the_last_campaigns_choice_is_accepted_even_if_an_earlier_map_looked_finer_and_the_reason_is_said() -> (
    None
):
    controller = Controller(SETTINGS)
    arrive(controller, 2)
    answer_all(controller, lambda _: {"resolution": 5.0})
    arrive(controller, 2, prefix="x")
    play(controller, InputEnded(at=5.0))
    answer_all(controller, lambda _: {"resolution": 6.0})
    assert controller.best_run is not None
    assert controller.best_run.n_particles == 240
    assert "the choice of campaign002 (before: run001, 5.00 Å" in words(controller)


def test_the_last_campaign_is_skipped_when_the_same_runs_were_done() -> None:
    controller = Controller(with_policy(part_min_particles=1000))
    arrive(controller, 2)
    answer_all(controller, good)
    assert play(controller, InputEnded(at=5.0)) == []
    assert controller.is_finished


# --- replay, restarts, supersession ----------------------------------------------------------------


def test_a_replay_under_other_settings_keeps_every_run_and_every_result() -> None:
    controller = Controller(SETTINGS)
    log: list[Event] = []
    for i in range(10):
        for event in (found(f"e{i}"), preprocessed(f"e{i}", 60), ranked(f"e{i}", 60)):
            log += tell(controller, event)[1]
        while controller.runs_in_work:
            log += tell(controller, outcome(controller.runs_in_work[0], good))[1]
    log += tell(controller, InputEnded(at=5.0))[1]
    request = controller.runs_in_work[0]
    log += tell(controller, outcome(request, good))[1]
    for changed in (
        with_policy(rungs=(7000,), full_min_particles=9000, full_rungs=()),
        with_policy(enabled=False),
        replace(SETTINGS, score_threshold=0.85),
        with_policy(n_parts=8, search_sizes=(10, 20, 30)),
    ):
        again = replay(changed, log)
        assert again.runs == controller.runs
        assert again.best_run == controller.best_run
        play(again, SessionOpened(at=9.0, settings_digest="", version=""))
        assert again.runs[request.run_id].result == controller.runs[request.run_id].result


def test_runs_that_are_switched_off_end_the_campaign_in_work_and_live_stages_go_on() -> None:
    controller = Controller(SETTINGS)
    log: list[Event] = []
    for event in (found("a"), preprocessed("a", 100), ranked("a", 100), found("b")):
        log += tell(controller, event)[1]
    again = replay(with_policy(enabled=False), log)
    commands = play(again, SessionOpened(at=9.0, settings_digest="", version=""))
    assert [type(c) for c in commands] == [Preprocess]
    assert again.runs[RunId("run001")].state is RunState.CANCELLED
    assert next(iter(again.campaigns.values())).verdict == "runs are switched off"


def decide(controller: Controller, **wish: Any) -> list[Command]:
    return play(controller, SessionDecided(at=6.0, wish=Wish(**wish), reason="seen"))


def test_another_symmetry_cancels_the_run_in_work_and_continues_the_map_without_its_poses() -> None:
    controller = Controller(with_policy(rungs=(100, 200)))
    arrive(controller, 2)
    answer_all(controller, good)
    arrive(controller, 2, prefix="x")
    commands = decide(controller, kind=WishKind.SET_SYMMETRY, symmetry="D2")
    assert commands == [CancelRun(run_id=RunId("run002"), reason=commands[0].reason)]  # type: ignore[union-attr]
    assert controller.runs[RunId("run002")].state is RunState.CANCELLING
    assert len(controller.runs) == 2, "the engine is busy until the cancelled run is answered"
    (started,) = play(controller, RunCancelled(at=6.5, run_id=RunId("run002"), reason="x"))
    assert isinstance(started, StartRun)
    assert (started.request.symmetry, started.request.start_map, started.request.warm_start) == (
        "D2",
        "run001",
        None,
    )
    play(controller, outcome(started.request, lambda _: {"resolution": 9.0}))
    assert controller.best_run is not None
    assert controller.best_run.symmetry == "D2"
    assert "symmetry is D2 now, that of run001 is C1" in words(controller)


def test_a_result_that_comes_before_the_cancellation_answers_the_run() -> None:
    controller = Controller(with_policy(rungs=(100, 200)))
    arrive(controller, 2)
    decide(controller, kind=WishKind.SET_SYMMETRY, symmetry="D2")
    (started,) = play(controller, RunEnded(at=6.5, result=run_result("run001")))
    assert isinstance(started, StartRun)
    play(controller, RunCancelled(at=6.6, run_id=RunId("run001"), reason="late"))
    assert controller.runs[RunId("run001")].state is RunState.ENDED
    assert controller.best_run is None, "it has a symmetry that nobody wants"


def test_a_cancelled_run_is_over_when_the_service_comes_back() -> None:
    controller = Controller(SETTINGS)
    arrive(controller, 2)
    decide(controller, kind=WishKind.SET_MASK_DIAMETER, mask_diameter_angstrom=120.0)
    commands = play(controller, SessionOpened(at=9.0, settings_digest="", version=""))
    assert [c.request.run_id for c in commands if isinstance(c, StartRun)] == ["run002"]
    assert controller.runs[RunId("run001")].state is RunState.CANCELLED
    assert controller.runs[RunId("run002")].request.mask_diameter_angstrom == 120.0


def test_a_person_forces_a_run_pins_one_and_rejects_one() -> None:
    controller = Controller(SETTINGS)
    arrive(controller, 2)
    answer_all(controller, good)
    (started,) = decide(controller, kind=WishKind.FORCE_RUN)
    assert isinstance(started, StartRun)
    play(controller, outcome(started.request, lambda _: {"resolution": 7.0}))
    assert controller.best_run is not None
    assert controller.best_run.run_id == "run002"
    decide(controller, kind=WishKind.REJECT_RUN, run_id=RunId("run002"))
    assert controller.best_run.run_id == "run001"
    assert ("accept run001", "a person's word") in [(d.what, d.why) for d in controller.decisions]
    decide(controller, kind=WishKind.UNDO, decision_id="d2")
    assert controller.best_run.run_id == "run002"
    decide(controller, kind=WishKind.PIN_RUN, run_id=RunId("run001"))
    assert controller.best_run.run_id == "run001"


def test_a_run_that_was_asked_for_is_taken_back_while_it_is_in_work() -> None:
    controller = Controller(SETTINGS)
    arrive(controller, 2)
    answer_all(controller, good)
    (started,) = decide(controller, kind=WishKind.FORCE_RUN)
    assert isinstance(started, StartRun)
    assert decide(controller, kind=WishKind.UNDO, decision_id="d1") == [
        CancelRun(run_id=started.request.run_id, reason="the person who asked for it took it back")
    ]
    play(controller, RunCancelled(at=9.0, run_id=started.request.run_id, reason="asked to stop"))
    assert not controller.runs_in_work, "nothing else was due"
    assert controller.best_run is not None
    assert controller.best_run.run_id == "run001"
    (again,) = decide(controller, kind=WishKind.UNDO, decision_id="d2")
    assert isinstance(again, StartRun), "the undo was taken back: the run is asked for again"


def test_a_run_that_waits_for_particles_is_not_started_once_it_was_taken_back() -> None:
    controller = Controller(SETTINGS)
    decide(controller, kind=WishKind.FORCE_RUN)
    decide(controller, kind=WishKind.UNDO, decision_id="d1")
    arrive(controller, 1)
    assert CampaignTrigger.USER not in {c.request.trigger for c in controller.campaigns.values()}


def test_after_the_end_a_run_that_was_taken_back_leaves_nothing_to_do_again() -> None:
    controller = Controller(SETTINGS)
    arrive(controller, 3)
    play(controller, InputEnded(at=5.0))
    answer_all(controller, good)
    assert controller.is_finished
    n_runs = len(controller.runs)
    decide(controller, kind=WishKind.FORCE_RUN)
    decide(controller, kind=WishKind.UNDO, decision_id="d1")
    for run in controller.runs_in_work:
        play(controller, RunCancelled(at=9.0, run_id=run.run_id, reason="asked to stop"))
    assert controller.is_finished
    assert len(controller.runs) == n_runs + 1, "only the run that was taken back"


def test_nothing_goes_on_from_a_run_that_a_person_rejected() -> None:
    controller = Controller(with_policy(rungs=(100_000,)))
    arrive(controller, 10)
    play(controller, InputEnded(at=5.0))
    for resolution in (7.0, 6.0):
        play(controller, outcome(controller.runs_in_work[0], lambda _, r=resolution: {"resolution": r}))  # type: ignore[misc]
    assert controller.runs_in_work[0].start_map == "run002"
    decide(controller, kind=WishKind.REJECT_RUN, run_id=RunId("run002"))
    play(controller, outcome(controller.runs_in_work[0], good))
    answer_all(controller, good)
    sweep = [r.request for r in controller.runs.values() if r.request.purpose is RunPurpose.SWEEP]
    assert [r.start_map for r in sweep] == ["run002", "run001", "run001", "run001", "run001"]
    assert controller.best_run is not None
    assert controller.best_run.run_id != "run002"


def test_no_run_starts_while_the_disk_is_full() -> None:
    controller = Controller(SETTINGS)
    play(controller, found("a"), preprocessed("a", 100))
    play(controller, DiskSpaceChanged(at=1.0, is_low=True, free_bytes=1), ranked("a", 100))
    assert not controller.campaigns
    (started,) = play(controller, DiskSpaceChanged(at=2.0, is_low=False, free_bytes=10**10))
    assert isinstance(started, StartRun)


def test_another_threshold_counts_again_and_asks_for_a_campaign() -> None:
    controller = Controller(SETTINGS)
    arrive(controller, 4)
    answer_all(controller, good)
    (started,) = decide(controller, kind=WishKind.SET_SCORE_THRESHOLD, score_threshold=0.85)
    assert isinstance(started, StartRun)
    assert started.request.subset.score_threshold == 0.85
    assert controller.n_above_threshold == started.request.n_particles == 120
    decide(controller, kind=WishKind.SET_SCORE_THRESHOLD, score_threshold=0.0)
    assert controller.n_above_threshold == 240


def test_a_run_is_started_by_a_campaign_in_work_and_once() -> None:
    controller = Controller(SETTINGS)
    arrive(controller, 2)
    with pytest.raises(InvariantError, match="a run is started once"):
        play(controller, RunStarted(at=4.0, request=controller.runs_in_work[0]))


def test_several_runs_go_side_by_side_when_the_engine_may() -> None:
    controller = Controller(with_policy(rungs=(100_000,), max_parallel_runs=3))
    arrive(controller, 10)
    commands = play(controller, InputEnded(at=5.0))
    assert [c.request.n_particles for c in commands if isinstance(c, StartRun)] == [300, 600]
    play(controller, outcome(controller.runs_in_work[0], good))
    commands = play(controller, outcome(controller.runs_in_work[0], good))
    assert [c.request.n_particles for c in commands if isinstance(c, StartRun)] == [150, 300, 450]


def test_an_engine_that_fails_stops_no_live_stage() -> None:
    controller = Controller(SETTINGS)
    arrive(controller, 2)
    play(controller, RunFailed(at=3.0, run_id=RunId("run001"), reason="no outcome within 60 s"))
    assert play(controller, found("z")) == [Preprocess(exposure=make_exposure("z"))]
    (command,) = play(controller, preprocessed("z"))
    assert isinstance(command, Rank)
    assert controller.runs[RunId("run001")].verdict == "failed: no outcome within 60 s"


def test_plans_are_full_only_where_there_is_enough() -> None:
    controller = Controller(SETTINGS)
    arrive(controller, 2)
    assert next(iter(controller.campaigns.values())).request.plan is CampaignPlan.LIGHT
