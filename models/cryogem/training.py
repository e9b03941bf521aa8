"""Training CryoGEM in a folder: steps, checkpoints, losses, samples, and the generator that is kept.

Nothing random is kept between steps (`models.cryogem.pairs`): a training killed at any moment goes on from its last
checkpoint and has the losses that it would have had (on the CPU; on a GPU up to the order of floating-point sums).
Checkpoints are written whole or not at all.
"""

from __future__ import annotations

import csv
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from models.cryogem.bank import SessionBank
from models.cryogem.evaluation import (
    frames_needed,
    measure_distances,
    patch_side_px,
    ranker_features,
)
from models.cryogem.greys import levels_to_network_range, to_network_range
from models.cryogem.pairs import PairSource, Purpose, TrainingPair, random_stream, torch_stream
from models.cryogem.physics import build_physics
from models.cryogem.settings import CryogemSettings, describe_changes, plain_settings
from models.cryogem.trainer import CryogemTrainer
from models.cryogem.translation import add_input_noise, save_generator, translate
from models.weights import load_checkpoint, save_checkpoint
from models.workers import Workers

log = logging.getLogger(__name__)

_VALIDATION_MICROGRAPHS = 8
_FORMAT = "icestream-cryogem-training-2"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingResult:
    """What a training left: the generator's file, its hash, the step it is of, and its distances to real micrographs.

    `seconds` are those since it was started or went on, `cpu_s` the processor's of all its steps, earlier ones too.
    """

    generator: Path
    sha256: str
    step: int
    n_steps: int
    frechet_x1000: float
    spectrum_distance: float
    patch_distance: float
    n_skipped: int
    seconds: float
    cpu_s: float


def train_cryogem(
    bank: SessionBank,
    settings: CryogemSettings,
    folder: Path,
    *,
    workers: Workers | None = None,
    on_progress: Callable[[dict[str, float]], None] | None = None,
) -> TrainingResult:
    """Train, or go on where a killed training left off; write checkpoint, losses, samples and generator to `folder`.

    A step is a pair of images. Several `workers` take as many steps at once, as one update of the mean of their gradients; the
    first one writes. `losses.csv` has a row per step, `validation.csv` one per validation, `samples/` a strip per validation: physics, input,
    output, real. A folder that holds another configuration's training is refused.
    """
    if len(bank.training_micrographs) < 1 or len(bank.held_out_micrographs) < 1:
        n = len(bank.micrographs)
        raise ValueError(f"micrographs: {n}, training needs two or more (one of them is held out)")
    multiple = settings.networks.multiple_px
    if settings.training.crop_px % multiple:
        raise ValueError(f"crop_px: {settings.training.crop_px}, must be a multiple of 2**depth = {multiple}")
    workers = Workers() if workers is None else workers
    if settings.training.n_simulated % workers.size:
        raise ValueError(
            f"n_simulated: {settings.training.n_simulated}, must be a multiple of the {workers.size} workers"
        )
    folder.mkdir(parents=True, exist_ok=True)
    run = _Run(bank, settings, folder, workers)
    started, first = time.monotonic(), run.next_step
    while run.next_step < settings.training.n_steps:
        losses = run.advance()
        if on_progress is not None:
            done = run.next_step - first
            seconds = time.monotonic() - started
            on_progress(
                {**losses, "n_steps": float(settings.training.n_steps), "seconds_per_step": seconds / done}
            )
    return run.finish(time.monotonic() - started)


class _Run:
    """One training in its folder: the files, and where it stands."""

    def __init__(self, bank: SessionBank, settings: CryogemSettings, folder: Path, workers: Workers) -> None:
        self.settings = settings
        self.folder = folder
        self.workers = workers
        self.source = PairSource(build_physics(bank, settings.physics), settings.training)
        self.trainer = CryogemTrainer(settings, workers)
        self.next_step = 0
        self.best: dict[str, float] = {}
        self.n_without_labels = 0
        self._cpu_before_s = 0.0
        self._cpu_started_s = time.process_time()
        self._checkpoint = folder / "checkpoint.safetensors"
        if self._checkpoint.is_file():
            self._resume()
        workers.barrier()  # all have read the files before the first one writes them
        if workers.is_first:
            self._losses = _Table(folder / "losses.csv", self.next_step)
            self._validation = _Table(folder / "validation.csv", self.next_step)

    def advance(self) -> dict[str, float]:
        """Take one step per worker, in one update; keep what there is to keep."""
        training, workers, step = self.settings.training, self.workers, self.next_step
        epoch = step // training.n_simulated
        rate = training.learning_rate_at(epoch)
        self.trainer.set_learning_rate(rate)
        own = step + workers.rank
        pair = self.source.pair(own)
        losses = self.trainer.step(pair, self.trainer.draw_places(pair.mask, own))
        self.n_without_labels += int(losses.pop("n_without_labels"))
        if not all(np.isfinite(losses[name]) for name in ("discriminator", "generator")):
            raise ValueError(f"step {step}: losses {losses}, must be finite; lower the learning rate")
        row = {"step": float(step), "epoch": float(epoch), "learning_rate": rate, **losses}
        self.next_step = step + workers.size
        if workers.is_first:
            self._losses.append(row)
            if self._is_due(training.validate_every):
                row |= self._validate(pair)
            if self._is_due(training.checkpoint_every):
                self._save()
        return row

    def _is_due(self, every: int) -> bool:
        """Say whether this update passed a multiple of `every` steps, or was the last one."""
        is_last = self.next_step >= self.settings.training.n_steps
        return is_last or self.next_step % every < self.workers.size

    def finish(self, seconds: float) -> TrainingResult:
        """Return what was kept."""
        self.workers.barrier()
        kept = load_checkpoint(self.folder / "generator.safetensors")
        return TrainingResult(
            generator=kept.path,
            sha256=kept.sha256,
            step=int(kept.metadata["step"]),
            n_steps=self.settings.training.n_steps,
            frechet_x1000=float(kept.metadata["frechet_x1000"]),
            spectrum_distance=float(kept.metadata["spectrum_distance"]),
            patch_distance=float(kept.metadata["patch_distance"]),
            n_skipped=self.source.n_skipped + self.n_without_labels,
            seconds=seconds,
            cpu_s=self.cpu_s,
        )

    @property
    def cpu_s(self) -> float:
        """Processor seconds so far, those before a kill too (as of the checkpoint)."""
        return self._cpu_before_s + time.process_time() - self._cpu_started_s

    def _validate(self, pair: TrainingPair) -> dict[str, float]:
        """Measure translated frames against training micrographs; keep the network if it is to be kept."""
        training, stage = self.settings.training, self.source.stage
        facts, shape_yx = stage.bank.facts, stage.bank.shape_yx
        patch_px = patch_side_px(facts.diameter_angstrom / facts.pixel_size_angstrom, shape_yx)
        n_made = max(training.n_validated, frames_needed(patch_px, shape_yx))
        frames = [
            f for f in map(self.source.frame, range(min(n_made, training.n_simulated))) if f is not None
        ]
        made = []
        for index, rendered in enumerate(islice(cycle(frames), n_made)):
            # A frame that comes again has another CTF, ice and noise.
            rng = random_stream(training.seed, Purpose.VALIDATION, index)
            seen = stage.image(rendered, stage.draw_imaging(rng))
            noisy = add_input_noise(seen, float(seen.mean()), stage, torch_stream(rng))
            made.append(translate(self.trainer.generator, noisy))
        # Not the held-out ones: a generator that was chosen by them could not be judged by them.
        real = [levels_to_network_range(x) for x in stage.bank.training_micrographs[:_VALIDATION_MICROGRAPHS]]
        distances = measure_distances(real, made, ranker_features(), patch_px=patch_px)
        found = {
            "frechet_x1000": distances.frechet_x1000,
            "spectrum_distance": distances.spectrum,
            "patch_distance": distances.patches,
        }
        self._validation.append({"step": float(self.next_step - 1), **found})
        nearest = self.best.get("frechet_x1000", math.inf)
        if training.keep == "last" or distances.frechet_x1000 < nearest:
            self.best = found
            extra = {"step": self.next_step, **found, "settings": plain_settings(self.settings)}
            save_generator(
                self.folder / "generator.safetensors", self.trainer.generator, self.settings.physics, extra
            )
        self._write_sample(pair)
        return found

    def _write_sample(self, pair: TrainingPair) -> None:
        images = [
            to_network_range(pair.physics[0, 0]),
            pair.source[0, 0],
            translate(self.trainer.generator, pair.source[0, 0]),
            pair.real[0, 0],
        ]
        strip = torch.cat(images, dim=1).add(1.0).mul(127.5).clamp(0, 255).round().to(torch.uint8)
        folder = self.folder / "samples"
        folder.mkdir(exist_ok=True)
        Image.fromarray(strip.numpy()).save(folder / f"step_{self.next_step:06d}.png")

    def _save(self) -> None:
        metadata = {
            "format": _FORMAT,
            "next_step": self.next_step,
            "best": self.best,
            "n_without_labels": self.n_without_labels,
            "cpu_s": self.cpu_s,
            "settings": plain_settings(self.settings),
        }
        save_checkpoint(self._checkpoint, self.trainer.state(), metadata)

    def _resume(self) -> None:
        loaded = load_checkpoint(self._checkpoint)
        if loaded.metadata.get("format") != _FORMAT:
            raise ValueError(
                f"{self._checkpoint}: format {loaded.metadata.get('format')!r}, must be {_FORMAT!r}"
            )
        changed = describe_changes(loaded.metadata["settings"], plain_settings(self.settings))
        if changed:
            raise ValueError(
                f"{self._checkpoint}: was trained with other settings ({changed}); take another folder"
            )
        self.trainer.restore(loaded.tensors)
        self.next_step = int(loaded.metadata["next_step"])
        self.best = dict(loaded.metadata["best"])
        self.n_without_labels = int(loaded.metadata["n_without_labels"])
        self._cpu_before_s = float(loaded.metadata.get("cpu_s", 0.0))  # earlier versions did not count
        log.info("training_resumed step=%d of=%d", self.next_step, self.settings.training.n_steps)


class _Table:
    """A CSV that grows by rows; rows of steps that will be taken again are dropped when it is opened."""

    def __init__(self, path: Path, next_step: int) -> None:
        self._path = path
        self._kept: list[dict[str, str]] = []
        if path.is_file():
            with path.open(newline="") as stream:
                rows = [r for r in csv.DictReader(stream) if None not in r.values()]
            self._kept = [r for r in rows if float(r["step"]) < next_step]
        temporary = path.with_suffix(".part")
        with temporary.open("w", newline="") as stream:
            if self._kept:
                writer = csv.DictWriter(stream, list(self._kept[0]))
                writer.writeheader()
                writer.writerows(self._kept)
        temporary.replace(path)
        self._is_empty = not self._kept

    def append(self, row: Mapping[str, float]) -> None:
        """Add a row; it is in the file when this returns."""
        with self._path.open("a", newline="") as stream:
            writer = csv.DictWriter(stream, list(row))
            if self._is_empty:
                writer.writeheader()
                self._is_empty = False
            writer.writerow({key: format(value, ".9g") for key, value in row.items()})
