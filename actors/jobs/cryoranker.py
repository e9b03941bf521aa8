"""Training a ranker as a Ray job: `ray job submit --working-dir . -- python -m actors.jobs.cryoranker CONFIG.yaml`.

With `workers` above 1 or `use_gpu`, Ray Train's workers share the batches; otherwise the loop runs in the driver, for
which `ray job submit --entrypoint-num-cpus` finds the place. `icestream train cryoranker` is the same training.
Fine-tuning on generated particles is measured on a held-out session, before and after (`synthetic_effect`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from actors.jobs.launch import Progress, Resources, job_main
from actors.jobs.synthetic_effect import measure_effect
from models.cryo_ief.settings import parse_settings, read_document, split_document
from models.cryoranker.starting import DEFAULT
from models.cryoranker.synthetic import SyntheticParticles
from models.cryoranker.train import TrainConfig, train_ranker
from models.workers import Workers
from stream.records.errors import ConfigurationError


@dataclass(frozen=True, slots=True, kw_only=True)
class CryoRankerJob:
    """A ranker's training; `held_out` is a session of known truth on which generated particles' effect is measured."""

    training: TrainConfig
    resources: Resources
    held_out: Path | None = None
    model_name: str = "cryoranker"

    def train(self, folder: Path, workers: Workers, on_progress: Progress) -> dict[str, Any]:
        """Train in a folder and return the document of `icestream train`."""
        try:
            result = train_ranker(self.training, folder, workers=workers, on_progress=on_progress)
        except ValueError as error:
            raise ConfigurationError(folder.name, "a training that can run", error) from error
        document = {
            "checkpoint": str(result.checkpoint),
            "sha256": result.sha256,
            "metrics": {**asdict(result.validation), "seconds": result.seconds},
        }
        if self.held_out is not None and workers.is_first:
            document["effect"] = measure_effect(self.training, self.held_out, folder)
        return document


def read_job(path: Path, seed: int | None = None) -> CryoRankerJob:
    """Read a YAML configuration; its keys are those of `TrainConfig` and `Resources`, flat."""
    try:
        parts = split_document(read_document(path), (TrainConfig, Resources))
        training = parse_settings(TrainConfig, parts[0])
        resources = parse_settings(Resources, parts[1])
        Workers(size=resources.workers).share(training.batch_size)
    except ValueError as error:
        raise ConfigurationError(path, "a training configuration", error) from error
    if seed is not None:
        training = replace(training, seed=seed)
    return CryoRankerJob(training=training, resources=resources)


def with_synthetic(
    job: CryoRankerJob, folder: Path, *, part: float | None = None, held_out: Path | None = None
) -> CryoRankerJob:
    """Return the job with the particles of a folder of `icestream generate` mixed in.

    It starts from the shipped ranker where its configuration names no other.
    """
    training = job.training
    known = training.synthetic
    try:
        synthetic = (
            SyntheticParticles(folder=str(folder)) if known is None else replace(known, folder=str(folder))
        )
        if part is not None:
            synthetic = replace(synthetic, part=part)
        training = replace(
            training, synthetic=synthetic, initial_checkpoint=training.initial_checkpoint or DEFAULT
        )
    except ValueError as error:
        raise ConfigurationError(
            "--synthetic", "generated particles in a ranker's training", error
        ) from error
    return replace(job, training=training, held_out=held_out)


def main(arguments: list[str] | None = None) -> None:
    """Run the job from the command line."""
    job_main("actors.jobs.cryoranker", read_job, arguments)


if __name__ == "__main__":
    main()
