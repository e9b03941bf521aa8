"""Training CryoGEM as a job: `ray job submit --working-dir . -- python -m actors.jobs.cryogem CONFIG.yaml`.

The session is read once, into bank.safetensors in the training's folder; a training that is started again goes on from
its checkpoint and from that bank, whatever the session has become. One worker trains with batch 1, as the paper does;
several, on Ray Train, bring a pair of images each to every update.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from actors.cryogem.config import TrainConfig, read_train_config
from actors.cryogem.session_bank import read_session_bank
from actors.jobs.launch import Progress, Resources, job_main
from models.cryogem.bank import SessionBank, load_bank, save_bank
from models.cryogem.training import train_cryogem
from models.workers import Workers
from stream.records.errors import ConfigurationError

log = logging.getLogger(__name__)

BANK_FILE = "bank.safetensors"
_REPORT_EVERY = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class CryogemJob:
    """A training of CryoGEM with its configuration."""

    config: TrainConfig

    @property
    def model_name(self) -> str:
        """Label of the curves."""
        return "cryogem"

    @property
    def resources(self) -> Resources:
        """The workers asked for; each on a GPU of its own where the configuration says `training.device: cuda`."""
        is_gpu = self.config.training.device.startswith("cuda")
        return Resources(workers=self.config.workers, use_gpu=is_gpu, cpus_per_worker=self.config.cpus)

    def train(self, folder: Path, workers: Workers, on_progress: Progress) -> dict[str, Any]:
        """Train, or go on, in `folder` and return the JSON document of `icestream train cryogem`."""
        if not workers.is_first:
            workers.barrier()
        bank = prepare_bank(self.config, folder)
        if workers.is_first:
            workers.barrier()

        def report(row: dict[str, float]) -> None:
            if int(row["step"] + 1) % _REPORT_EVERY == 0 or "spectrum_distance" in row:
                on_progress(row)

        try:
            result = train_cryogem(bank, self.config.settings, folder, workers=workers, on_progress=report)
        except ValueError as error:
            raise ConfigurationError(folder, str(error)) from error
        return {
            "checkpoint": str(result.generator),
            "sha256": result.sha256,
            "bank": str(folder / BANK_FILE),
            "micrographs": len(bank.micrographs),
            "skipped_micrographs": dict(bank.facts.skipped),
            "metrics": {k: v for k, v in asdict(result).items() if k not in ("generator", "sha256")},
        }


def prepare_bank(config: TrainConfig, folder: Path) -> SessionBank:
    """Return the folder's bank; the first time, read the session and write it."""
    path = folder / BANK_FILE
    if path.is_file():
        bank = load_bank(path)
        if bank.facts.request != config.source.describe():
            rule = f"its source is what the folder was made with ({bank.facts.request}); take another folder"
            raise ConfigurationError(path, rule, config.source.describe())
        return bank

    def report(done: int, total: int) -> None:
        if done % _REPORT_EVERY == 0 or done == total:
            log.info("micrographs_read %d of %d", done, total)

    bank = read_session_bank(config.source, on_progress=report)
    save_bank(path, bank)
    return bank


def read_job(config: Path, seed: int | None) -> CryogemJob:
    """Read the configuration; a seed replaces the configuration's."""
    read = read_train_config(config)
    if seed is not None:
        read = replace(read, training=replace(read.training, seed=seed))
    return CryogemJob(config=read)


def main(arguments: list[str] | None = None) -> None:
    """Train from a job's command line."""
    job_main("actors.jobs.cryogem", read_job, arguments)


if __name__ == "__main__":
    main()
