"""The real exporter, fed a session's events, scraped by a real Prometheus: what every panel shows."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from stream.records.advice import Advice, AdviceKind, Severity
from stream.records.events import (
    ExposureFound,
    ExposurePreprocessed,
    ExposureRanked,
    FileRejected,
    RunEnded,
    RunStarted,
    SessionOpened,
    StageFailed,
)
from stream.records.values import (
    AcquisitionMetadata,
    CampaignId,
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
)
from stream.telemetry import Snapshot, Telemetry, Volume

HERE = Path(__file__).resolve().parent


def load_harness() -> ModuleType:
    """Import the helper beside this file, which pytest's importlib mode does not put on the path."""
    name = "prometheus_harness"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


harness = load_harness()

pytestmark = [
    pytest.mark.prometheus,
    pytest.mark.skipif(
        not harness.has_prometheus(), reason="prometheus is not installed (apt-get install prometheus)"
    ),
]

N_MOVIES = 60
GROWTH_ADVICE = (
    Advice(
        kind=AdviceKind.GROWTH,
        severity=Severity.INFO,
        words="",
        numbers={"gain_angstrom": 0.2, "gain_low_angstrom": 0.1, "gain_high_angstrom": 0.3},
    ),
)
MOVIES_AFTER_RESTART = 24


class Session:
    """Plays a session into the exporter: movies in, a bad file, retries, growing maps."""

    def __init__(self, telemetry: Telemetry, seed: int) -> None:
        self.telemetry = telemetry
        self._rng = np.random.default_rng(seed)
        self.n_done = 0
        self.n_particles = 0
        self.accepted_map: RunResult | None = None

    def open(self) -> None:
        at = time.time()
        self.telemetry.observe(SessionOpened(at=at, settings_digest="d", version="1"))
        file = FileIdentity(path="/in/bad.tiff", size_bytes=0, mtime_ns=1, inode=1, fingerprint="bad")
        rejected = FileRejected(
            at=at, exposure_id=ExposureId("bad"), name="bad", file=file, reason="bad.tiff: empty"
        )
        self.telemetry.observe(rejected)

    def play_movie(self) -> None:
        index = self.n_done
        name, at, rng = f"m{index}", time.time(), self._rng
        file = FileIdentity(
            path=f"/in/{name}", size_bytes=570_000_000, mtime_ns=1, inode=index, fingerprint=name
        )
        exposure = Exposure(
            exposure_id=ExposureId(name),
            name=name,
            kind=InputKind.MOVIE,
            file=file,
            n_frames=40,
            shape_yx=(3838, 3710),
            metadata=AcquisitionMetadata(),
        )
        telemetry = self.telemetry
        telemetry.observe(ExposureFound(at=at - 40.0, exposure=exposure))
        if index % 10 == 3:
            failed = StageFailed(
                at=at,
                exposure_id=ExposureId(name),
                stage=Stage.PREPROCESS,
                kind=FailureKind.RESOURCE,
                reason="worker",
            )
            telemetry.observe(failed)
        scores = np.clip(np.concatenate([rng.normal(0.75, 0.1, 140), rng.normal(0.15, 0.06, 60)]), 0, 0.999)
        histogram = tuple(int(n) for n in np.bincount((scores * 100).astype(int), minlength=100))
        telemetry.observe(ExposurePreprocessed(at=at - 10.0, result=self._preprocessed(name)))
        ranked = RankResult(
            exposure_id=ExposureId(name),
            model_hash="m",
            n_scored=200,
            n_excluded=2,
            n_cache_hits=20,
            score_histogram=histogram,
            batch_sizes=(64,),
            seconds={"load": 0.1, "score": 1.5},
        )
        telemetry.observe(ExposureRanked(at=at, result=ranked))
        self.n_done += 1
        self.n_particles += sum(histogram[40:])
        if self.n_done % 20 == 0:
            run = self._run()
            self.telemetry.observe(RunStarted(at=at, request=self._request(run)))
            self.telemetry.observe(RunEnded(at=at, result=run))
            # The first run is the accepted map: later ones must not show as it.
            self.accepted_map = self.accepted_map or run
        telemetry.set_gauges(self._snapshot())

    def _preprocessed(self, name: str) -> PreprocessResult:
        ctf = CtfFit(
            defocus_u_angstrom=1.2e4,
            defocus_v_angstrom=1.1e4,
            astigmatism_angle_deg=10.0,
            phase_shift_deg=0.0,
            fit_resolution_angstrom=float(self._rng.normal(4.2, 0.3)),
            score=0.2,
            is_reliable=True,
        )
        return PreprocessResult(
            exposure_id=ExposureId(name),
            micrograph="m",
            thumbnail="t",
            particles="p",
            n_picks=210,
            n_particles=202,
            n_excluded_particles=8,
            box_size_px=96,
            pixel_size_angstrom=3.0,
            motion=MotionSummary(
                total_motion_angstrom=14.0, early_motion_angstrom=8.0, late_motion_angstrom=6.0
            ),
            ctf=ctf,
            ice_ratio=float(self._rng.normal(0.2, 0.1)),
            masked_fraction=0.03,
            seconds={"read": 1.0, "motion": 12.0, "ctf": 4.0, "pick": 2.0, "extract": 1.0},
        )

    def _run(self) -> RunResult:
        return RunResult(
            run_id=RunId(f"r{self.n_done}"),
            engine="embedded",
            n_particles=self.n_particles,
            symmetry="D2",
            resolution_angstrom=12.0 - 0.1 * self.n_done,
            cfar=0.7,
            cfar_null=0.85,
            scf_star=0.9,
            note="",
            folder="runs/r",
            seconds={"initial": 40.0, "refine": 90.0},
        )

    def _request(self, run: RunResult) -> RunRequest:
        return RunRequest(
            run_id=run.run_id,
            campaign_id=CampaignId("c001"),
            purpose=RunPurpose.UPDATE if self.accepted_map else RunPurpose.INITIAL,
            subset=ParticleSubset(score_threshold=0.4),
            n_particles=run.n_particles,
            model_hash="m",
            symmetry="D2",
            mask_diameter_angstrom=None,
            start_map=None,
            warm_start=None,
            compare_with=None,
            reason="",
        )

    def _snapshot(self) -> Snapshot:
        return Snapshot(
            n_found=self.n_done + 1,
            states={"waiting": 0, "in_work": 0, "done": self.n_done, "rejected": 0, "quarantined": 1},
            n_particles_in_use=self.n_particles,
            accepted_map=self.accepted_map,
            advice=GROWTH_ADVICE,
            gain_residual=0.01,
            gain_residual_limit=0.05,
            queue_depth={"preprocess": 3, "rank": 1},
            inflight={"preprocess": 2, "rank": 1},
            quarantine_reasons={"bad.tiff: a movie is not empty": 1},
            volumes={"output": Volume(free_bytes=10**12 - self.n_done * 10**8, size_bytes=2 * 10**12)},
            feature_cache_bytes=self.n_done * 200 * 768,
            worker_restarts={"preprocess": self.n_done // 30},
        )


@pytest.fixture(scope="module")
def watched() -> Iterator[tuple[Any, Telemetry]]:
    """A Prometheus that watched a session of some seconds, still running."""
    telemetry = Telemetry("1.0")
    session = Session(telemetry, seed=3)
    session.open()
    session.play_movie()
    server = telemetry.serve()
    with harness.Prometheus.scraping(server.url, interval_s=0.5) as prometheus:
        prometheus.wait_for("up == 1")
        prometheus.wait_for_scrapes(1)
        while session.n_done < N_MOVIES:
            session.play_movie()
            if session.n_done % 10 == 0:
                prometheus.wait_for_scrapes(1)
        prometheus.wait_for(f"sum(icestream_exposures) == {N_MOVIES + 1}")
        prometheus.wait_for_scrapes(2)
        yield prometheus, telemetry
    telemetry.close()


def test_every_panel_parses_and_every_icestream_panel_shows_finite_numbers(watched):
    reports = harness.check_dashboard(watched[0])
    assert len(reports) > 50
    assert [r for r in reports if r.error is not None] == []
    empty = {(r.panel, r.expr) for r in reports if not r.values and not r.is_ray}
    assert empty == set()


def test_panels_show_the_session_that_was_played(watched):
    reports = {(r.panel, r.expr): r for r in harness.check_dashboard(watched[0])}

    def shown(panel: str) -> dict[str, float]:
        return {
            labels: v for (title, _), r in reports.items() if title == panel for labels, v in r.values.items()
        }

    assert shown("Movies done") == {"state=done": N_MOVIES}
    assert shown("Exposures not accounted for") == {"": 0}
    assert shown("Every exposure in one state")["state=done"] == N_MOVIES
    assert shown("Quarantine by reason")["reason=truncated"] == 1
    assert shown("Resolution") == {"engine=embedded": pytest.approx(12.0 - 0.1 * 20)}
    assert shown("Particles in use") == {"": shown("Particles")["decision=accepted"]}
    assert shown("Rejected by rule")["rule=max_ice_ratio"] == 0
    assert shown("cFAR") == {"engine=embedded": pytest.approx(0.7)}
    assert shown("Feature cache") == {"": pytest.approx(0.1)}
    assert 0.6 < next(iter(shown("Median score").values())) < 0.8
    assert shown("Advice")["kind=growth"] == 1
    assert shown("Predicted gain")["bound=high"] == pytest.approx(0.3)
    assert shown("Controller runs") == {"kind=initial,outcome=resolved": 1, "kind=update,outcome=resolved": 2}
    distribution = shown("Score distribution, whole session")
    assert distribution["le=1.0"] == 200 * N_MOVIES
    assert 0.2 < distribution["le=0.4"] / distribution["le=1.0"] < 0.4
    assert 10 < shown("Stage time")["stage=preprocess"] <= 30
    assert shown("Throughput")["stage=rank"] > 0


def test_all_rules_evaluate_and_none_fires_in_a_healthy_session(watched):
    prometheus, _ = watched
    prometheus.wait_for("instance:icestream_quarantined:ratio")
    assert prometheus.unhealthy_rules() == []
    assert prometheus.query('ALERTS{alertstate="firing"}') == (None, [])
    assert prometheus.value("instance:icestream_quarantined:ratio") == pytest.approx(1 / (N_MOVIES + 1))


def test_a_wrong_query_is_reported_with_prometheus_own_words(watched):
    error, samples = watched[0].query("sum by (icestream_exposures{")
    assert samples == []
    assert "parse error" in error


def test_counters_do_not_fall_over_a_restart_that_replays_the_journal():
    """The same port, a new process's registry, the journal replayed first: `resets()` stays 0."""
    telemetry = Telemetry("1.0")
    session = Session(telemetry, seed=5)
    recorded: list[Any] = []
    original = telemetry.observe

    def record(event: Any, *, replay: bool = False) -> None:
        recorded.append(event)
        original(event, replay=replay)

    telemetry.observe = record  # type: ignore[method-assign]
    session.open()
    for _ in range(MOVIES_AFTER_RESTART):
        session.play_movie()
    server = telemetry.serve()
    with harness.Prometheus.scraping(server.url, interval_s=0.5) as prometheus:
        done = 'icestream_movies_total{stage="rank", outcome="done"}'
        prometheus.wait_for(f"{done} == {MOVIES_AFTER_RESTART}")
        telemetry.close()
        prometheus.wait_for("up == 0")
        again = Telemetry("1.0")
        for event in recorded:
            again.observe(event, replay=True)
        again.serve(port=server.port)
        prometheus.wait_for("up == 1")
        session.telemetry = again
        session.play_movie()
        prometheus.wait_for(f"{done} == {MOVIES_AFTER_RESTART + 1}")
        for series in (
            done,
            "icestream_particle_score_count",
            'icestream_stage_duration_seconds_count{stage="rank"}',
        ):
            assert prometheus.value(f"resets({series}[5m])") == 0
        latency = 'icestream_movie_latency_seconds_count{milestone="ranked"}'
        assert prometheus.value(f"resets({latency}[5m])") == 1
        again.close()


def test_a_scrape_with_the_bearer_token_works_and_without_it_fails():
    telemetry = Telemetry("1.0")
    server = telemetry.serve("127.0.0.1", token="s3cret")
    try:
        with harness.Prometheus.scraping(server.url, interval_s=0.5, token="s3cret") as prometheus:
            prometheus.wait_for("up == 1")
        with harness.Prometheus.scraping(server.url, interval_s=0.5) as prometheus:
            prometheus.wait_for("up == 0")
    finally:
        telemetry.close()
