"""The Ray runtime on a real Ray: a worker that dies, a command that takes too long."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import mrcfile
import numpy as np
import pytest

from actors.engines.base import EngineSettings
from actors.handlers import RankerOptions, WorkerSpec
from actors.preprocess.settings import PreprocessSettings
from stream.ingest.files import identify_file
from stream.records.commands import Preprocess
from stream.records.events import Event, ExposurePreprocessed, StageFailed
from stream.records.values import AcquisitionMetadata, Exposure, ExposureId, FailureKind, InputKind, Optics

pytestmark = pytest.mark.ray
SIZE_PX = 512


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> WorkerSpec:
    folder = tmp_path_factory.mktemp("runtime")
    (folder / "out").mkdir()
    return WorkerSpec(
        out=folder / "out",
        source=folder,
        preprocess=PreprocessSettings(
            pixel_size_angstrom=2.0, optics=Optics(voltage_kv=300, cs_mm=2.7, amplitude_contrast=0.1)
        ),
        ranker=RankerOptions(model=None, batch_size=16, max_wait_s=0.1, n_threads=1, n_callers=2),
        engine_name="embedded",
        engine=EngineSettings(),
    )


@pytest.fixture(scope="module")
def command(spec: WorkerSpec) -> Preprocess:
    path = spec.source / "noise.mrc"
    with mrcfile.new(path) as handle:
        handle.set_data(np.random.default_rng(0).normal(10, 1, (SIZE_PX, SIZE_PX)).astype(np.float32))
    exposure = Exposure(
        exposure_id=ExposureId("noise"),
        name="noise",
        kind=InputKind.MICROGRAPH,
        file=identify_file(path),
        n_frames=1,
        shape_yx=(SIZE_PX, SIZE_PX),
        metadata=AcquisitionMetadata(),
    )
    return Preprocess(exposure=exposure)


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


def answers(runtime: object, limit_s: float = 120) -> list[Event]:
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        if events := runtime.poll(0.5):  # type: ignore[attr-defined]
            return list(events)
    raise AssertionError(f"no answer within {limit_s} s")


def test_a_worker_that_is_killed_costs_one_attempt_and_comes_back(
    started_ray: None, spec: WorkerSpec, command: Preprocess
) -> None:
    import ray

    from actors.runtime import PoolSettings, RayRuntime

    runtime = RayRuntime(spec, PoolSettings(n_preprocess_workers=1, n_rank_callers=1))
    try:
        pid = ray.get(runtime._preprocessors[0].health.remote())
        os.kill(pid, signal.SIGSTOP)
        runtime.submit(command)
        os.kill(pid, signal.SIGKILL)
        (died,) = answers(runtime)
        assert isinstance(died, StageFailed)
        assert died.kind is FailureKind.RESOURCE
        assert "worker died" in died.reason
        assert runtime.worker_restarts == {"preprocess": 1, "rank": 0, "engine": 0}
        runtime.submit(command)
        (done,) = answers(runtime)
        assert isinstance(done, ExposurePreprocessed)
        assert (spec.out / "micrographs" / "noise.mrc").is_file()
    finally:
        runtime.close()


def test_a_command_without_an_outcome_in_time_is_answered_and_its_worker_replaced(
    started_ray: None, spec: WorkerSpec, command: Preprocess
) -> None:
    import ray

    from actors.runtime import PoolSettings, RayRuntime

    runtime = RayRuntime(spec, PoolSettings(n_preprocess_workers=1, n_rank_callers=1, stage_timeout_s=1.0))
    try:
        pid = ray.get(runtime._preprocessors[0].health.remote())
        os.kill(pid, signal.SIGSTOP)
        runtime.submit(command)
        (late,) = answers(runtime)
        assert isinstance(late, StageFailed)
        assert "no outcome within 1 s" in late.reason
        assert ray.get(runtime._preprocessors[0].health.remote(), timeout=60) != pid
    finally:
        runtime.close()
        if Path(f"/proc/{pid}").exists():
            os.kill(pid, signal.SIGKILL)
