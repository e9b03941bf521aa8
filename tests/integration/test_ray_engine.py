"""Engine runs on a real Ray: a run that hangs is killed in time, one that nobody wants is killed on demand."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pandas as pd
import pytest

from actors.engines.base import EngineSettings
from actors.handlers import RankerOptions, WorkerSpec
from actors.preprocess.settings import PreprocessSettings
from stream.records.commands import CancelRun, RunMember, StartRun
from stream.records.events import Event, RunCancelled, RunFailed
from stream.records.values import (
    CampaignId,
    ClusteringId,
    ExposureId,
    Optics,
    ParticleSubset,
    RunId,
    RunPurpose,
    RunRequest,
)
from stream.sinks.relion_star import make_particle_optics, write_particles_star
from stream.store.layout import OutputLayout

pytestmark = pytest.mark.ray
HANGING = ClusteringId("hanging")
OPTICS = Optics(voltage_kv=300, cs_mm=2.7, amplitude_contrast=0.1)


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> WorkerSpec:
    """An output folder with one exposure, and a clustering whose labels are a pipe that nobody writes to."""
    layout = OutputLayout(tmp_path_factory.mktemp("engine"))
    columns = ("rlnDefocusU", "rlnDefocusV", "rlnDefocusAngle", "rlnPhaseShift")
    row = {"rlnImageName": "000001@particles/a.mrcs", "rlnOpticsGroup": 1, "icestreamUid": 1}
    table = pd.DataFrame([row | dict.fromkeys(columns, 0.0)]).astype({"icestreamUid": "uint64"})
    layout.particles_table("a").parent.mkdir()
    optics = make_particle_optics(OPTICS, image_pixel_size_angstrom=1.0, image_size_px=8)
    write_particles_star(layout.particles_table("a"), table, optics)
    layout.clustering(HANGING).mkdir(parents=True)
    os.mkfifo(layout.cluster_labels(HANGING))
    return WorkerSpec(
        out=layout.root,
        source=layout.root,
        preprocess=PreprocessSettings(pixel_size_angstrom=2.0, optics=OPTICS),
        ranker=RankerOptions(model=None, batch_size=16, max_wait_s=0.1, n_threads=1, n_callers=2),
        engine_name="embedded",
        engine=EngineSettings(),
    )


@pytest.fixture(scope="module")
def started_ray() -> Iterator[None]:
    os.environ["RAY_AUTH_MODE"] = "token"
    import ray

    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=100 * 2**20,
        _node_ip_address="127.0.0.1",
    )
    yield
    ray.shutdown()


def start(run_id: str, *, hangs: bool) -> StartRun:
    subset = ParticleSubset(score_threshold=-1.0)
    if hangs:
        subset = ParticleSubset(score_threshold=-1.0, clustering=HANGING, clusters=(0,))
    request = RunRequest(
        run_id=RunId(run_id),
        campaign_id=CampaignId("campaign001"),
        purpose=RunPurpose.INITIAL,
        subset=subset,
        n_particles=1,
        model_hash="m",
        symmetry="C1",
        mask_diameter_angstrom=None,
        start_map=None,
        warm_start=None,
        compare_with=None,
        reason="",
    )
    return StartRun(request=request, members=(RunMember(exposure_id=ExposureId("a"), name="a", half_set=1),))


def wait_for(runtime: object, limit_s: float = 60.0) -> list[Event]:
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        if events := runtime.poll(0.2):  # type: ignore[attr-defined]
            return list(events)
    raise AssertionError(f"no event within {limit_s} s")


@pytest.mark.timeout(180)
def test_a_run_that_nobody_wants_is_killed_and_the_next_one_gets_the_engine(
    spec: WorkerSpec, started_ray: None
) -> None:
    from actors.runtime import PoolSettings, RayRuntime

    runtime = RayRuntime(spec, PoolSettings(n_preprocess_workers=1, n_rank_callers=2), clock=lambda: 5.0)
    try:
        runtime.submit(start("run001", hangs=True))
        runtime.submit(start("run002", hangs=True))
        runtime.submit(start("run003", hangs=False))
        runtime.poll(1.0)
        runtime.submit(CancelRun(run_id=RunId("run001"), reason="superseded"))
        assert wait_for(runtime) == [RunCancelled(at=5.0, run_id=RunId("run001"), reason="superseded")]
        runtime.submit(CancelRun(run_id=RunId("run002"), reason="superseded"))
        assert wait_for(runtime) == [RunCancelled(at=5.0, run_id=RunId("run002"), reason="superseded")]
        (failed,) = wait_for(runtime)
        assert isinstance(failed, RunFailed)
        assert failed.run_id == "run003"
        assert runtime.worker_restarts["engine"] == 0, "killed on purpose"
    finally:
        runtime.close()


@pytest.mark.timeout(180)
def test_a_run_that_hangs_fails_after_its_time_and_its_worker_is_replaced(
    spec: WorkerSpec, started_ray: None
) -> None:
    from actors.runtime import PoolSettings, RayRuntime

    pools = PoolSettings(n_preprocess_workers=1, n_rank_callers=2, run_timeout_s=2.0)
    runtime = RayRuntime(spec, pools)
    try:
        runtime.submit(start("run001", hangs=True))
        (failed,) = wait_for(runtime)
        assert isinstance(failed, RunFailed)
        assert failed.reason == "run001: no outcome within 2 s"
        assert runtime.worker_restarts["engine"] == 1
    finally:
        runtime.close()
