from __future__ import annotations

import threading
import time
import urllib.error
import urllib.request
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream.control.quality import RULE_NAMES
from stream.records.advice import Advice, AdviceKind, Severity
from stream.records.errors import ConfigurationError, InvariantError, ResourceError
from stream.records.events import (
    CampaignStarted,
    DiskSpaceChanged,
    DrainRequested,
    Event,
    ExposureFound,
    ExposurePreprocessed,
    ExposureRanked,
    FileRejected,
    InputEnded,
    RunCancelled,
    RunEnded,
    RunFailed,
    RunStarted,
    SessionOpened,
    StageFailed,
)
from stream.records.values import (
    AcquisitionMetadata,
    CampaignId,
    CampaignPlan,
    CampaignRequest,
    CampaignTrigger,
    CtfFit,
    Exposure,
    ExposureId,
    FailureKind,
    FileIdentity,
    InputKind,
    MotionSummary,
    ParticleSubset,
    PreprocessResult,
    RankResult,
    RunId,
    RunPurpose,
    RunRequest,
    RunResult,
    Stage,
    SweepPolicy,
)
from stream.telemetry.metrics import MAX_FOLLOWED, Snapshot, Telemetry, Volume
from stream.telemetry.scores import RecentScores
from stream.telemetry.series import (
    QUARANTINE_REASONS,
    REJECTION_RULES,
    RUN_KINDS,
    RUN_OUTCOMES,
    classify_reason,
    list_declared_names,
)

PEERS_MINIMAL_SET = {
    "icestream_movies_total",
    "icestream_stage_duration_seconds_bucket",
    "icestream_movie_latency_seconds_bucket",
    "icestream_queue_depth",
    "icestream_inflight",
    "icestream_particles_total",
    "icestream_particle_score_bucket",
    "icestream_particle_score_median",
    "icestream_batch_size_bucket",
    "icestream_feature_cache_hits_total",
    "icestream_feature_cache_misses_total",
    "icestream_feature_cache_bytes",
    "icestream_ingest_bytes_total",
    "icestream_last_movie_timestamp_seconds",
    "icestream_quarantined_movies",
    "icestream_controller_runs_total",
    "icestream_map_resolution_angstroms",
    "icestream_cfar_ratio",
    "icestream_cfar_null_ratio",
    "icestream_map_particles",
    "icestream_exposures",
    "icestream_disk_free_bytes",
    "icestream_build_info",
}


def identity(name: str, size_bytes: int = 1000) -> FileIdentity:
    return FileIdentity(path=f"/in/{name}.tiff", size_bytes=size_bytes, mtime_ns=1, inode=1, fingerprint=name)


def found(
    name: str, at: float, kind: InputKind = InputKind.MOVIE, fingerprint: str | None = None
) -> ExposureFound:
    file = identity(fingerprint or name)
    exposure = Exposure(
        exposure_id=ExposureId(name),
        name=name,
        kind=kind,
        file=file,
        n_frames=40,
        shape_yx=(64, 64),
        metadata=AcquisitionMetadata(),
    )
    return ExposureFound(at=at, exposure=exposure)


def preprocessed(name: str, at: float, n_particles: int = 10, motion: float = 12.0) -> ExposurePreprocessed:
    ctf = CtfFit(
        defocus_u_angstrom=1e4,
        defocus_v_angstrom=9e3,
        astigmatism_angle_deg=0.0,
        phase_shift_deg=0.0,
        fit_resolution_angstrom=4.2,
        score=0.1,
        is_reliable=True,
    )
    result = PreprocessResult(
        exposure_id=ExposureId(name),
        micrograph=None,
        thumbnail=None,
        particles=None,
        n_picks=n_particles + 2,
        n_particles=n_particles,
        n_excluded_particles=2,
        box_size_px=64,
        pixel_size_angstrom=1.5,
        motion=MotionSummary(
            total_motion_angstrom=motion, early_motion_angstrom=6.0, late_motion_angstrom=6.0
        ),
        ctf=ctf,
        ice_ratio=None,
        seconds={"motion": 2.0, "ctf": 1.0},
    )
    return ExposurePreprocessed(at=at, result=result)


def ranked(
    name: str, at: float, histogram: dict[int, int], n_cache_hits: int = 0, n_excluded: int = 0
) -> ExposureRanked:
    counts = tuple(histogram.get(index, 0) for index in range(100))
    result = RankResult(
        exposure_id=ExposureId(name),
        model_hash="m",
        n_scored=sum(counts),
        n_excluded=n_excluded,
        n_cache_hits=n_cache_hits,
        score_histogram=counts,
        seconds={"score": 0.5},
    )
    return ExposureRanked(at=at, result=result)


def run_ended(at: float, resolution: float | None, cfar: float | None, n: int = 5000) -> RunEnded:
    result = RunResult(
        run_id=RunId("r"),
        engine="embedded",
        n_particles=n,
        symmetry="C1",
        resolution_angstrom=resolution,
        cfar=cfar,
        cfar_null=None if cfar is None else 0.8,
        scf_star=None,
        note="",
        folder="runs/r",
        seconds={"refine": 100.0},
    )
    return RunEnded(at=at, result=result)


def failed(name: str, kind: FailureKind, stage: Stage = Stage.PREPROCESS) -> StageFailed:
    return StageFailed(at=9.0, exposure_id=ExposureId(name), stage=stage, kind=kind, reason="x")


def value(telemetry: Telemetry, name: str, **labels: str) -> float | None:
    return telemetry.registry.get_sample_value(name, labels)


def samples(telemetry: Telemetry) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (s.name, tuple(sorted(s.labels.items()))): s.value
        for family in telemetry.registry.collect()
        for s in family.samples
        if s.name.startswith("icestream_")
    }


STORY: list[Event] = [
    SessionOpened(at=0.0, settings_digest="d", version="1"),
    found("a", 10.0),
    found("b", 20.0),
    FileRejected(at=21.0, exposure_id=ExposureId("c"), name="c", file=identity("c"), reason="c: empty"),
    preprocessed("a", 30.0),
    failed("b", FailureKind.RESOURCE),
    ranked("a", 31.0, {10: 4, 90: 6}, n_cache_hits=3, n_excluded=1),
    failed("b", FailureKind.INPUT),
    run_ended(60.0, None, None),
    run_ended(61.0, 7.5, 0.6),
    RunCancelled(at=62.0, run_id=RunId("s"), reason="superseded by run t"),
]


def observed(events: list[Event], *, replay: bool = False) -> Telemetry:
    telemetry = Telemetry("1.2.3")
    for event in events:
        telemetry.observe(event, replay=replay)
    return telemetry


def test_every_series_of_the_minimal_set_is_declared():
    assert list_declared_names() >= PEERS_MINIMAL_SET


def test_two_exporters_live_side_by_side_in_one_process():
    first, second = observed(STORY), Telemetry("2")
    assert value(first, "icestream_movies_total", stage="rank", outcome="done") == 1
    assert value(second, "icestream_movies_total", stage="rank", outcome="done") == 0


def test_events_are_counted_by_stage_and_outcome():
    telemetry = observed(STORY)
    counts = {
        (stage, outcome): value(telemetry, "icestream_movies_total", stage=stage, outcome=outcome)
        for stage in ("ingest", "preprocess", "rank")
        for outcome in ("done", "input_error", "resource_error")
    }
    assert counts == {
        ("ingest", "done"): 2,
        ("ingest", "input_error"): 1,
        ("ingest", "resource_error"): None,
        ("preprocess", "done"): 1,
        ("preprocess", "input_error"): 1,
        ("preprocess", "resource_error"): 1,
        ("rank", "done"): 1,
        ("rank", "input_error"): 0,
        ("rank", "resource_error"): 0,
    }
    assert value(telemetry, "icestream_picks_total") == 12
    assert value(telemetry, "icestream_particles_total", decision="accepted") == 6
    assert value(telemetry, "icestream_particles_total", decision="below_threshold") == 4
    assert value(telemetry, "icestream_particles_total", decision="unscored") == 1
    assert value(telemetry, "icestream_feature_cache_hits_total") == 3
    assert value(telemetry, "icestream_feature_cache_misses_total") == 7
    assert value(telemetry, "icestream_ingest_bytes_total") == 2000
    assert value(telemetry, "icestream_last_movie_timestamp_seconds") == 20
    assert value(telemetry, "icestream_stage_duration_seconds_sum", stage="preprocess") == 3
    assert value(telemetry, "icestream_step_duration_seconds_sum", stage="preprocess", step="motion") == 2
    assert value(telemetry, "icestream_total_motion_angstroms_sum") == 12
    assert value(telemetry, "icestream_build_info", version="1.2.3", python=_python()) == 1


def test_particles_are_accepted_by_the_threshold_in_force_when_they_were_scored() -> None:
    telemetry = Telemetry("1", score_threshold=0.4)
    for name, threshold in (("a", 0.4), ("b", 0.85)):
        telemetry.observe(found(name, 1.0), score_threshold=threshold)
        telemetry.observe(ranked(name, 2.0, {10: 1, 60: 2, 90: 4}), score_threshold=threshold)
    assert value(telemetry, "icestream_particles_total", decision="accepted") == 6 + 4
    assert value(telemetry, "icestream_particles_total", decision="below_threshold") == 1 + 3


def _python() -> str:
    import platform

    return platform.python_version()


def test_a_movie_latency_runs_from_found_to_each_milestone():
    telemetry = observed(STORY)
    assert value(telemetry, "icestream_movie_latency_seconds_sum", milestone="preprocessed") == 20
    assert value(telemetry, "icestream_movie_latency_seconds_sum", milestone="ranked") == 21
    assert value(telemetry, "icestream_movie_latency_seconds_count", milestone="ranked") == 1


def test_a_clock_that_is_set_back_gives_no_negative_latency():
    telemetry = observed([found("a", 100.0), preprocessed("a", 40.0)])
    assert value(telemetry, "icestream_movie_latency_seconds_sum", milestone="preprocessed") == 0


def test_replay_restores_every_series_but_latency():
    live, replayed = samples(observed(STORY)), samples(observed(STORY, replay=True))
    assert live.keys() == replayed.keys()
    differing = {name for name, _ in live if live[name, _] != replayed[name, _]}  # type: ignore[index]
    assert {name.rsplit("_", 1)[0] for name in differing} == {"icestream_movie_latency_seconds"}
    assert all(v == 0 for (name, _), v in replayed.items() if "movie_latency" in name)


def test_a_movie_in_work_over_a_restart_has_its_full_latency():
    telemetry = Telemetry("1")
    telemetry.observe(found("a", 10.0), replay=True)
    telemetry.observe(SessionOpened(at=500.0, settings_digest="d", version="1"))
    telemetry.observe(preprocessed("a", 510.0))
    assert value(telemetry, "icestream_movie_latency_seconds_sum", milestone="preprocessed") == 500


def test_followed_movies_are_bounded_and_leave_when_finished(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("stream.telemetry.metrics.MAX_FOLLOWED", 3)
    assert MAX_FOLLOWED > 3
    telemetry = Telemetry("1")
    for index in range(5):
        telemetry.observe(found(f"m{index}", float(index)))
    telemetry.observe(preprocessed("m0", 10.0))
    assert value(telemetry, "icestream_movie_latency_seconds_count", milestone="preprocessed") == 0
    telemetry.observe(preprocessed("m4", 10.0, n_particles=0))
    telemetry.observe(failed("m3", FailureKind.INPUT))
    assert list(telemetry._found_at) == ["m2"]


def run_started(run_id: str, purpose: RunPurpose) -> RunStarted:
    request = RunRequest(
        run_id=RunId(run_id),
        campaign_id=CampaignId("c"),
        purpose=purpose,
        subset=ParticleSubset(score_threshold=0.4),
        n_particles=5000,
        model_hash="m",
        symmetry="C1",
        mask_diameter_angstrom=None,
        start_map=None,
        warm_start=None,
        compare_with=None,
        reason="",
    )
    return RunStarted(at=50.0, request=request)


def test_runs_are_counted_by_purpose_and_outcome():
    events = [
        run_started("r", RunPurpose.INITIAL),
        run_ended(60.0, None, None),
        run_started("r", RunPurpose.SWEEP),
        run_ended(61.0, 7.5, 0.6),
        run_started("s", RunPurpose.UPDATE),
        RunCancelled(at=62.0, run_id=RunId("s"), reason="superseded"),
        run_started("u", RunPurpose.UPDATE),
        RunFailed(at=70.0, run_id=RunId("u"), reason="worker died"),
    ]
    telemetry = observed(events)
    counts = {
        (k, o): value(telemetry, "icestream_controller_runs_total", kind=k, outcome=o)
        for k in RUN_KINDS
        for o in RUN_OUTCOMES
    }
    assert {key for key, n in counts.items() if n == 1} == {
        ("initial", "unresolved"),
        ("sweep", "resolved"),
        ("update", "cancelled"),
        ("update", "failed"),
    }
    assert sum(n or 0 for n in counts.values()) == 4


def test_a_run_on_chosen_views_is_not_the_latest_run_that_is_shown():
    telemetry = observed(
        [run_ended(60.0, 7.5, 0.6), run_started("r", RunPurpose.CLUSTER), run_ended(61.0, 9.0, 0.02)]
    )
    assert value(telemetry, "icestream_latest_run_cfar_ratio", engine="embedded") == 0.6


def test_campaigns_are_counted_by_trigger():
    request = CampaignRequest(
        campaign_id=CampaignId("c"),
        trigger=CampaignTrigger.LOSS,
        plan=CampaignPlan.LIGHT,
        sweep=SweepPolicy.PAPER,
        n_particles=5000,
        score_threshold=0.4,
        model_hash="m",
        symmetry="C1",
        mask_diameter_angstrom=None,
        start_map=None,
        warm_start=None,
        search_sizes=(),
        n_parts=1,
        turns=(),
        count_range=None,
        repeats=None,
        reason="",
    )
    telemetry = observed([CampaignStarted(at=1.0, request=request)])
    assert value(telemetry, "icestream_campaigns_total", trigger="loss") == 1
    assert value(telemetry, "icestream_campaigns_total", trigger="rung") == 0


def advice(kind: AdviceKind, severity: Severity, **numbers: float | None) -> Advice:
    return Advice(kind=kind, severity=severity, words="", numbers=numbers)


def test_advice_is_shown_by_kind_and_leaves_when_it_no_longer_stands():
    telemetry = Telemetry("1")
    standing = [
        advice(AdviceKind.SCORE_FALL, Severity.WARNING),
        advice(
            AdviceKind.GROWTH, Severity.INFO, gain_angstrom=0.2, gain_low_angstrom=0.1, gain_high_angstrom=0.3
        ),
    ]
    telemetry.set_gauges(Snapshot(n_found=0, states={}, advice=standing))
    levels = {k.value: value(telemetry, "icestream_advice", kind=k.value) for k in AdviceKind}
    assert {kind: level for kind, level in levels.items() if level} == {"score_fall": 2, "growth": 1}
    assert value(telemetry, "icestream_predicted_gain_angstroms", bound="high") == 0.3
    telemetry.set_gauges(Snapshot(n_found=0, states={}))
    assert value(telemetry, "icestream_advice", kind="score_fall") == 0
    assert value(telemetry, "icestream_predicted_gain_angstroms", bound="high") is None


def test_a_latest_runs_figures_are_absent_until_measured_and_leave_when_a_run_could_not_tell():
    telemetry = Telemetry("1")
    assert value(telemetry, "icestream_latest_run_map_resolution_angstroms", engine="embedded") is None
    telemetry.observe(run_ended(1.0, 7.5, 0.6))
    assert value(telemetry, "icestream_latest_run_map_resolution_angstroms", engine="embedded") == 7.5
    assert value(telemetry, "icestream_latest_run_cfar_ratio", engine="embedded") == 0.6
    assert value(telemetry, "icestream_latest_run_map_particles", engine="embedded") == 5000
    telemetry.observe(run_ended(2.0, 7.0, None))
    assert value(telemetry, "icestream_latest_run_cfar_ratio", engine="embedded") is None
    assert value(telemetry, "icestream_latest_run_map_resolution_angstroms", engine="embedded") == 7.0


def test_the_map_gauges_show_the_accepted_map_and_not_the_latest_run():
    telemetry = Telemetry("1")
    accepted, later = run_ended(1.0, 7.5, 0.6), run_ended(2.0, 9.0, 0.1)
    telemetry.observe(accepted)
    assert value(telemetry, "icestream_map_resolution_angstroms", engine="embedded") is None
    for event in (accepted, later):
        telemetry.observe(event)
        telemetry.set_gauges(Snapshot(n_found=0, states={}, accepted_map=accepted.result))
    assert value(telemetry, "icestream_map_resolution_angstroms", engine="embedded") == 7.5
    assert value(telemetry, "icestream_cfar_ratio", engine="embedded") == 0.6
    assert value(telemetry, "icestream_latest_run_cfar_ratio", engine="embedded") == 0.1


def test_quality_figures_of_every_exposure_are_counted_when_they_are_known():
    event = preprocessed("a", 30.0)
    full = replace(event, result=replace(event.result, ice_ratio=0.6, masked_fraction=0.04))
    telemetry = observed([found("a", 10.0), event, full])
    assert value(telemetry, "icestream_astigmatism_angstroms_sum") == 2000
    assert value(telemetry, "icestream_early_motion_angstroms_sum") == 12
    assert value(telemetry, "icestream_ice_ratio_bucket", le="0.5") == 0
    assert value(telemetry, "icestream_ice_ratio_bucket", le="0.75") == 1
    assert value(telemetry, "icestream_masked_field_ratio_count") == 1
    blind = replace(event, result=replace(event.result, ctf=None, motion=None))
    assert value(observed([blind]), "icestream_astigmatism_angstroms_count") == 0


def test_rejections_show_by_rule_and_go_when_they_are_taken_back():
    telemetry = Telemetry("1")
    for counts in ({"max_ice_ratio": 2, "overruled": 1}, {"overruled": 1}):
        telemetry.set_gauges(
            Snapshot(n_found=0, states={}, rejected_by=counts, n_particles_in_use=40, is_gain_unknown=True)
        )
        assert value(telemetry, "icestream_rejected_exposures", rule="overruled") == 1
    assert value(telemetry, "icestream_rejected_exposures", rule="max_ice_ratio") == 0
    assert value(telemetry, "icestream_particles_in_use") == 40
    assert value(telemetry, "icestream_gain_orientation_unknown") == 1


def test_the_rules_that_are_shown_are_those_that_reject():
    assert REJECTION_RULES == RULE_NAMES


def test_the_gain_residual_is_absent_until_there_are_enough_movies():
    telemetry = Telemetry("1")
    telemetry.set_gauges(Snapshot(n_found=0, states={}, gain_residual_limit=0.05))
    assert value(telemetry, "icestream_gain_residual") is None
    assert value(telemetry, "icestream_gain_residual_limit") == 0.05
    telemetry.set_gauges(Snapshot(n_found=0, states={}, gain_residual=-0.2, gain_residual_limit=0.05))
    assert value(telemetry, "icestream_gain_residual") == -0.2


def test_a_particle_file_that_comes_once_per_micrograph_is_weighed_once():
    shares = [found(f"p{i}", float(i), InputKind.PARTICLES, fingerprint="stack") for i in range(4)]
    assert value(observed(list(shares)), "icestream_ingest_bytes_total") == 1000


def test_session_is_open_until_input_ends_or_the_operator_drains():
    telemetry = Telemetry("1")
    opened = SessionOpened(at=0.0, settings_digest="d", version="1")
    for event in (InputEnded(at=1.0), DrainRequested(at=1.0)):
        telemetry.observe(opened)
        assert value(telemetry, "icestream_session_open") == 1
        telemetry.observe(event)
        assert value(telemetry, "icestream_session_open") == 0


def test_a_low_disk_shows_and_clears():
    telemetry = observed([DiskSpaceChanged(at=1.0, is_low=True, free_bytes=5)])
    assert value(telemetry, "icestream_disk_low") == 1
    telemetry.observe(DiskSpaceChanged(at=2.0, is_low=False, free_bytes=50))
    assert value(telemetry, "icestream_disk_low") == 0


def test_expected_interval_follows_arrivals_unless_configured():
    arrivals = [found(str(i), 30.0 * i + (500.0 if i > 5 else 0.0)) for i in range(10)]
    assert value(observed(list(arrivals)), "icestream_expected_movie_interval_seconds") == 30
    configured = Telemetry("1", expected_interval_s=12.0)
    for event in arrivals:
        configured.observe(event)
    assert value(configured, "icestream_expected_movie_interval_seconds") == 12


# --- scores ------------------------------------------------------------------------------------------


def test_score_histogram_has_cumulative_buckets_and_a_sum_to_half_a_bin():
    telemetry = observed([ranked("a", 1.0, {0: 2, 4: 1, 5: 1, 99: 6})])
    assert value(telemetry, "icestream_particle_score_bucket", le="0.05") == 3
    assert value(telemetry, "icestream_particle_score_bucket", le="0.1") == 4
    assert value(telemetry, "icestream_particle_score_bucket", le="1.0") == 10
    assert value(telemetry, "icestream_particle_score_bucket", le="+Inf") == 10
    assert value(telemetry, "icestream_particle_score_count") == 10
    total = value(telemetry, "icestream_particle_score_sum")
    assert total == pytest.approx(2 * 0.005 + 0.045 + 0.055 + 6 * 0.995)


def test_a_histogram_of_another_shape_is_refused():
    with pytest.raises(InvariantError, match="100 bins"):
        RecentScores(5).add((1, 2, 3))


@given(st.lists(st.lists(st.integers(0, 99), max_size=30), min_size=1, max_size=12), st.integers(1, 5))
def test_recent_median_is_the_pooled_median_of_the_last_movies(movies: list[list[int]], n_movies: int):
    recent = RecentScores(n_movies)
    for bins in movies:
        recent.add(tuple(bins.count(index) for index in range(100)))
    pooled = sorted(b for bins in movies[-n_movies:] for b in bins)
    centre = recent.median()
    if not pooled:
        assert centre is None
        return
    lower = pooled[(len(pooled) - 1) // 2]
    assert centre is not None
    assert lower / 100 <= centre <= (lower + 1) / 100


def test_score_median_is_absent_at_first_and_forgets_old_movies():
    telemetry = Telemetry("1", n_recent_movies=2)
    telemetry.observe(ranked("empty", 1.0, {}))
    assert value(telemetry, "icestream_particle_score_median") is None
    for index, score_bin in enumerate((90, 90, 20, 20)):
        telemetry.observe(ranked(str(index), 1.0, {score_bin: 10}))
    assert value(telemetry, "icestream_particle_score_median") == pytest.approx(0.205)


# --- gauges ------------------------------------------------------------------------------------------


def test_gauges_show_the_snapshot():
    telemetry = observed(STORY)
    telemetry.set_gauges(
        Snapshot(
            n_found=3,
            states={"waiting": 0, "in_work": 0, "done": 1, "rejected": 0, "quarantined": 2},
            queue_depth={"preprocess": 3},
            inflight={"rank": 2},
            quarantine_reasons={"c.tiff: a movie is not empty": 1, "b: no rule we know": 1},
            volumes={"output": Volume(free_bytes=10, size_bytes=40)},
            feature_cache_bytes=77,
            worker_restarts={"preprocess": 2},
        )
    )
    assert value(telemetry, "icestream_exposures", state="quarantined") == 2
    assert value(telemetry, "icestream_exposures_found") == 3
    assert value(telemetry, "icestream_queue_depth", stage="preprocess") == 3
    assert value(telemetry, "icestream_inflight", stage="rank") == 2
    assert value(telemetry, "icestream_quarantined_movies", reason="truncated") == 1
    assert value(telemetry, "icestream_quarantined_movies", reason="other") == 1
    assert value(telemetry, "icestream_disk_free_bytes", volume="output") == 10
    assert value(telemetry, "icestream_disk_size_bytes", volume="output") == 40
    assert value(telemetry, "icestream_feature_cache_bytes") == 77
    assert value(telemetry, "icestream_worker_restarts_total", pool="preprocess") == 2


def test_worker_restarts_count_growth_and_survive_a_pool_that_starts_again():
    telemetry = Telemetry("1")
    for count in (2, 5, 0, 1):
        telemetry.set_gauges(Snapshot(n_found=0, states={}, worker_restarts={"rank": count}))
    assert value(telemetry, "icestream_worker_restarts_total", pool="rank") == 6


def test_states_that_do_not_add_up_to_what_was_found_raise():
    telemetry = observed(STORY)
    with pytest.raises(InvariantError, match=r"exactly one state \(3 found\)"):
        telemetry.set_gauges(Snapshot(n_found=3, states={"done": 1, "quarantined": 1}))


def test_a_controller_that_knows_less_than_the_events_raises():
    telemetry = observed(STORY)
    with pytest.raises(InvariantError, match=r"3 in events.*found: 2"):
        telemetry.set_gauges(Snapshot(n_found=2, states={"done": 1, "quarantined": 1}))


def test_a_file_that_is_found_again_is_one_exposure():
    telemetry = observed([*STORY, found("c", 70.0), found("a", 71.0)])
    telemetry.set_gauges(Snapshot(n_found=3, states={"waiting": 2, "quarantined": 1}))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("gain_ref/x.tiff: the file is readable (found: Permission denied)", "permission"),
        ("x.tiff: the file still exists (found: vanished)", "vanished"),
        ("nan.mrc: a movie has at least one frame (found: 0)", "dimensions"),
        ("x.mrc: the file ends early (found: 10 of 20 bytes)", "truncated"),
        ("x.mrc: every pixel is finite (found: 3 NaN)", "values"),
        ("x.tiff: the gain has the movie's shape (found: 64x64)", "gain"),
        ("x.tiff: pixel size in the EPU XML equals the configured one (found: 0.8)", "metadata"),
        ("x.eer: an EER file opens with the TIFF magic number (found: b'abcd')", "format"),
        ("failed 3 times, last: a: its worker died (ActorDiedError)", "machine"),
        ("failed 3 times, last: a: who knows", "machine"),
        ("failed 3 times, last: a.tiff: the file is readable (found: Permission denied)", "permission"),
        ("a:", "other"),
        ("", "other"),
    ],
)
def test_free_text_reasons_fall_into_the_closed_vocabulary(text: str, reason: str):
    assert classify_reason(text) == reason


@given(st.text())
def test_no_reason_makes_a_new_label(text: str):
    assert classify_reason(text) in QUARANTINE_REASONS


# --- endpoint ----------------------------------------------------------------------------------------


def fetch(url: str, token: str | None = None) -> tuple[int, str]:
    request = urllib.request.Request(
        url, headers={} if token is None else {"Authorization": f"Bearer {token}"}
    )
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_endpoint_takes_a_free_port_and_shows_the_series():
    telemetry = observed(STORY)
    server = telemetry.serve()
    try:
        assert server.port > 0
        assert server.url == f"http://127.0.0.1:{server.port}/metrics"
        status, text = fetch(server.url)
        assert status == 200
        assert 'icestream_movies_total{outcome="done",stage="ingest"} 2.0' in text
        assert "_created" not in text
        assert fetch(server.url.replace("/metrics", "/secret"))[0] == 404
    finally:
        telemetry.close()
    with pytest.raises(urllib.error.URLError):
        fetch(server.url)
    telemetry.close()


def test_an_open_address_needs_a_token_and_refuses_a_wrong_one():
    telemetry = Telemetry("1")
    with pytest.raises(ConfigurationError, match="needs a token"):
        telemetry.serve("0.0.0.0")
    with pytest.raises(ConfigurationError, match="visible character"):
        telemetry.serve("127.0.0.1", token=" ")
    server = telemetry.serve("0.0.0.0", token="s3cret")
    url = f"http://127.0.0.1:{server.port}/metrics"
    try:
        assert fetch(url)[0] == 401
        assert fetch(url, "s3cre")[0] == 401
        assert fetch(url, "s3crét")[0] == 401
        assert fetch(url, "s3cret")[0] == 200
    finally:
        telemetry.close()


def test_a_port_in_use_is_a_resource_error_that_names_it():
    first, second = Telemetry("1"), Telemetry("1")
    port = first.serve().port
    try:
        with pytest.raises(ResourceError, match=f"127.0.0.1:{port}"):
            second.serve(port=port)
    finally:
        first.close()


def test_scrapes_while_events_come_in_see_counters_that_only_grow():
    telemetry = Telemetry("1")
    server = telemetry.serve()
    seen: list[float] = []

    def scrape() -> None:
        for _ in range(10):
            text = fetch(server.url)[1]
            line = next(ln for ln in text.splitlines() if ln.startswith("icestream_particle_score_count"))
            seen.append(float(line.split()[1]))

    scraper = threading.Thread(target=scrape)
    scraper.start()
    n = 0
    while scraper.is_alive():
        telemetry.observe(ranked("x", 1.0, {50: 1}))
        n += 1
    scraper.join()
    telemetry.close()
    assert seen == sorted(seen)
    assert seen[-1] <= n


@pytest.mark.slow
def test_a_session_of_100000_movies_replays_in_seconds():
    telemetry = Telemetry("1")
    events = [preprocessed("a", 2.0), ranked("a", 3.0, {10: 100, 80: 200})]
    started = time.monotonic()
    for index in range(100_000):
        telemetry.observe(found(str(index), 1.0), replay=True)
        for event in events:
            telemetry.observe(event, replay=True)
    assert time.monotonic() - started < 60
