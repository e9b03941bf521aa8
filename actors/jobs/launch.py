"""Running a training: in this process with one worker, as Ray Train workers with several or on GPUs; the same loop.

Workers share a folder that every node sees. A worker that dies takes its group down; Ray Train starts the group again, which
goes on from the state in the folder. The TensorBoard and Prometheus files are written by the first worker.
Failure: what is wrong with the configuration or the data ends the training with the error's own text.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch

from actors.jobs.curves import TrainingCurves
from models.workers import Workers
from stream.records.errors import ConfigurationError, IcestreamError, ResourceError

log = logging.getLogger(__name__)

Progress = Callable[[dict[str, float]], None]
_MAX_RESTARTS = 3
_COLLECTIVE_TIMEOUT_S = (
    24 * 3600
)  # the first worker may simulate or preprocess for hours while the others wait


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """How many workers train together, and what each of them gets."""

    workers: int = 1
    use_gpu: bool = False
    """One GPU per worker."""
    cpus_per_worker: int = 1

    def __post_init__(self) -> None:
        if self.workers < 1 or self.cpus_per_worker < 1:
            msg = f"workers, cpus_per_worker: {self.workers}, {self.cpus_per_worker}, must be 1 or more"
            raise ValueError(msg)


class TrainingJob(Protocol):
    """A training with its configuration; `train` is called on every worker and returns the first one's document."""

    @property
    def model_name(self) -> str:
        """Label of the curves: `cryo_ief` or `cryoranker`."""

    @property
    def resources(self) -> Resources:
        """What the training runs on."""

    def train(self, folder: Path, workers: Workers, on_progress: Progress) -> dict[str, Any]:
        """Train (or go on) in a folder and return the JSON document of `icestream train`."""


def run_training(job: TrainingJob, folder: Path, *, on_progress: Progress | None = None) -> dict[str, Any]:
    """Run a training to its end and return its document; a folder with a state goes on from there."""
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if job.resources.workers == 1 and not job.resources.use_gpu:
        torch.set_num_threads(job.resources.cpus_per_worker)
        return _train_here(job, folder, Workers(), on_progress)
    return _train_on_ray(job, folder)


def _train_here(
    job: TrainingJob, folder: Path, workers: Workers, on_progress: Progress | None
) -> dict[str, Any]:
    if not workers.is_first:
        return job.train(folder, workers, lambda _point: None)
    with TrainingCurves(folder, job.model_name) as curves:

        def report(point: dict[str, float]) -> None:
            curves.report(point)
            if on_progress is not None:
                on_progress(point)

        return job.train(folder, workers, report)


def _train_worker(config: dict[str, Any]) -> dict[str, Any]:
    """Train as one of Ray Train's workers."""
    import ray.train.torch

    job: TrainingJob = config["job"]
    torch.set_num_threads(job.resources.cpus_per_worker)
    workers = Workers.of_process_group(ray.train.torch.get_device())
    return _train_here(job, Path(config["folder"]), workers, None)


def _train_on_ray(job: TrainingJob, folder: Path) -> dict[str, Any]:
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    with _connected_ray():
        import ray.train
        from ray.train.torch import TorchConfig, TorchTrainer
        from ray.train.v2.api.exceptions import TrainingFailedError

        given = job.resources
        _require_cluster(given)
        trainer: Any = TorchTrainer(
            cast("Any", _train_worker),  # declared to return nothing, documented to return anything
            train_loop_config={"job": job, "folder": str(folder)},
            torch_config=TorchConfig(timeout_s=_COLLECTIVE_TIMEOUT_S),
            scaling_config=ray.train.ScalingConfig(
                num_workers=given.workers,
                use_gpu=given.use_gpu,
                resources_per_worker={"CPU": given.cpus_per_worker, **({"GPU": 1} if given.use_gpu else {})},
            ),
            run_config=ray.train.RunConfig(
                name="ray-train",
                storage_path=str(folder),
                failure_config=ray.train.FailureConfig(max_failures=_MAX_RESTARTS),
            ),
        )
        try:
            result = trainer.fit()
        except TrainingFailedError as error:
            raise _own_error(error, folder) from error
    document: dict[str, Any] = result.return_value
    return document


def _own_error(error: Exception, folder: Path) -> Exception:
    """Return our own error that ended a worker, or one that says that the workers failed."""
    failures: dict[int, Exception] = getattr(error, "worker_failures", {})
    for failure in failures.values():
        cause = getattr(failure, "cause", failure)
        if isinstance(cause, IcestreamError | ValueError):
            return cause
    return ResourceError(folder, f"a training's workers live, or come back {_MAX_RESTARTS} times", error)


def _require_cluster(given: Resources) -> None:
    """Refuse what the cluster can never place, which Ray would wait for without end."""
    import ray

    there: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    for name, wanted in (
        ("CPU", given.workers * given.cpus_per_worker),
        ("GPU", given.workers if given.use_gpu else 0),
    ):
        if wanted > there.get(name, 0.0):
            rule = f"{given.workers} workers need {wanted} {name} of the cluster"
            raise ConfigurationError("workers", rule, f"{there.get(name, 0.0):g} there")


@contextmanager
def _connected_ray() -> Iterator[None]:
    """Use the Ray that is there (in a submitted job, the cluster's), or one on this machine for the while."""
    import ray

    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    if address:
        ray.init(address=address, log_to_driver=False)
    else:
        ray.init(address="local", include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1")
    try:
        yield
    finally:
        ray.shutdown()


def job_main(
    program: str, read_job: Callable[[Path, int | None], TrainingJob], arguments: list[str] | None
) -> None:
    """Run a training from a job's command line: progress to the log, its result as one JSON document on stdout."""
    parser = argparse.ArgumentParser(prog=f"python -m {program}")
    parser.add_argument("config", type=Path)
    parser.add_argument("--out", type=Path, default=Path("training"), help="a folder that all nodes share")
    parser.add_argument("--seed", type=int, default=None, help="instead of the configuration's")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    try:
        job = read_job(given.config, given.seed)
        document = run_training(job, given.out, on_progress=lambda point: log.info("%s", json.dumps(point)))
    except ConfigurationError as error:
        log.error("%s", error)  # noqa: TRY400 - the one line is the whole story
        sys.exit(2)
    except IcestreamError as error:
        log.error("%s", error)  # noqa: TRY400
        sys.exit(1)
    sys.stdout.write(json.dumps(document, indent=2) + "\n")
