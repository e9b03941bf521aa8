"""Pre-training Cryo-IEF as a Ray job: `ray job submit --working-dir . -- python -m actors.jobs.cryo_ief CONFIG.yaml`.

With `workers` above 1 or `use_gpu`, Ray Train's workers share the batches; otherwise the loop runs in the driver, for
which `ray job submit --entrypoint-num-cpus` finds the place. `icestream train cryo-ief` is the same training.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from actors.jobs.launch import Progress, Resources, job_main
from actors.jobs.particle_data import DataSettings, build_image_sets
from models.cryo_ief.image_sets import ImageCollection
from models.cryo_ief.pretrain import PretrainConfig, pretrain
from models.cryo_ief.settings import parse_settings, read_document, split_document
from models.workers import Workers
from stream.records.errors import ConfigurationError


@dataclass(frozen=True, slots=True, kw_only=True)
class CryoIefJob:
    """A pre-training with its data."""

    data: DataSettings
    training: PretrainConfig
    resources: Resources
    model_name: str = "cryo_ief"

    def train(self, folder: Path, workers: Workers, on_progress: Progress) -> dict[str, Any]:
        """Pre-train in a folder; the first worker prepares the data, the others find them in the cache."""
        if not workers.is_first:
            workers.barrier()
        sets = build_image_sets(self.data, self.training.vit())
        if workers.is_first:
            workers.barrier()
        try:
            result = pretrain(
                self.training, ImageCollection(sets), folder, workers=workers, on_progress=on_progress
            )
        except ValueError as error:
            raise ConfigurationError(folder.name, "a training that can run", error) from error
        return {
            "checkpoint": str(result.checkpoint),
            "sha256": result.sha256,
            "metrics": {**(result.curve[-1] if result.curve else {}), "seconds": result.seconds},
            "n_steps": result.n_steps,
            "n_images": sum(each.n_images for each in sets),
        }


def read_job(path: Path, seed: int | None = None) -> CryoIefJob:
    """Read a YAML configuration; its keys are those of `PretrainConfig`, `DataSettings` and `Resources`, flat."""
    try:
        parts = split_document(read_document(path), (PretrainConfig, DataSettings, Resources))
        training = parse_settings(PretrainConfig, parts[0])
        training.vit()
        data, resources = parse_settings(DataSettings, parts[1]), parse_settings(Resources, parts[2])
        Workers(size=resources.workers).share(training.batch_size)
    except ValueError as error:
        raise ConfigurationError(path, "a training configuration", error) from error
    if not data.datasets:
        raise ConfigurationError(path, "datasets has at least one entry", "none")
    if seed is not None:
        training = replace(training, seed=seed)
    return CryoIefJob(data=data, training=training, resources=resources)


def main(arguments: list[str] | None = None) -> None:
    """Run the job from the command line."""
    job_main("actors.jobs.cryo_ief", read_job, arguments)


if __name__ == "__main__":
    main()
