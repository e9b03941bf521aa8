"""The in-process runtime: exposures before engine runs, cancellations, one answer for each command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from actors.engines.base import EngineSettings
from actors.handlers import RankerOptions, WorkerSpec
from actors.local import LocalRuntime
from actors.preprocess.settings import PreprocessSettings
from stream.records.commands import CancelRun, ClusterParticles, Preprocess, StartRun
from stream.records.events import ClusteringFailed, Event, RunCancelled, RunFailed, StageFailed
from stream.records.values import (
    AcquisitionMetadata,
    CampaignId,
    ClusteringId,
    ClusteringRequest,
    Exposure,
    ExposureId,
    FileIdentity,
    InputKind,
    Optics,
    ParticleSubset,
    RunId,
    RunPurpose,
    RunRequest,
)

SUBSET = ParticleSubset(score_threshold=0.4)


@pytest.fixture
def runtime(tmp_path: Path) -> LocalRuntime:
    optics = Optics(voltage_kv=300.0, cs_mm=2.7, amplitude_contrast=0.1)
    spec = WorkerSpec(
        out=tmp_path,
        source=tmp_path,
        preprocess=PreprocessSettings(pixel_size_angstrom=1.0, optics=optics),
        ranker=RankerOptions(model=None, batch_size=8, max_wait_s=0.0, n_threads=1, n_callers=1),
        engine_name="embedded",
        engine=EngineSettings(),
    )
    return LocalRuntime(spec, clock=lambda: 7.0)


def start(run_id: str) -> StartRun:
    request = RunRequest(
        run_id=RunId(run_id),
        campaign_id=CampaignId("campaign001"),
        purpose=RunPurpose.INITIAL,
        subset=SUBSET,
        n_particles=5,
        model_hash="m",
        symmetry="C1",
        mask_diameter_angstrom=None,
        start_map=None,
        warm_start=None,
        compare_with=None,
        reason="",
    )
    return StartRun(request=request, members=())


def movie(path: Path) -> Preprocess:
    file = FileIdentity(path=str(path / "gone.mrc"), size_bytes=1, mtime_ns=0, inode=1, fingerprint="x")
    exposure = Exposure(
        exposure_id=ExposureId("a"),
        name="a",
        kind=InputKind.MICROGRAPH,
        file=file,
        n_frames=1,
        shape_yx=(8, 8),
        metadata=AcquisitionMetadata(),
    )
    return Preprocess(exposure=exposure)


def answers(runtime: LocalRuntime) -> list[Event]:
    events: list[Event] = []
    while batch := runtime.poll(0.0):
        events += batch
    return events


def test_an_exposure_goes_before_an_engine_run_that_came_first(runtime: LocalRuntime, tmp_path: Path) -> None:
    runtime.submit(start("run001"))
    runtime.submit(movie(tmp_path))
    kinds: list[Any] = [type(e) for e in answers(runtime)]
    assert kinds == [StageFailed, RunFailed]


def test_a_run_that_has_not_begun_is_answered_by_its_cancellation_alone(runtime: LocalRuntime) -> None:
    runtime.submit(start("run001"))
    runtime.submit(start("run002"))
    runtime.submit(CancelRun(run_id=RunId("run001"), reason="superseded"))
    first, second = answers(runtime)
    assert first == RunCancelled(at=7.0, run_id=RunId("run001"), reason="superseded")
    assert isinstance(second, RunFailed)
    assert second.run_id == "run002"


def test_a_cancellation_of_a_run_that_is_over_changes_nothing(runtime: LocalRuntime) -> None:
    runtime.submit(CancelRun(run_id=RunId("run001"), reason="late"))
    assert answers(runtime) == []


def test_a_clustering_without_particles_is_answered_with_its_reason(runtime: LocalRuntime) -> None:
    request = ClusteringRequest(
        clustering_id=ClusteringId("campaign001-clusters"),
        campaign_id=CampaignId("campaign001"),
        model_hash="m",
        subset=SUBSET,
        n_clusters=4,
        reason="",
    )
    runtime.submit(ClusterParticles(request=request, members=()))
    (event,) = answers(runtime)
    assert isinstance(event, ClusteringFailed)
    assert "at least one exposure has particles" in event.reason
