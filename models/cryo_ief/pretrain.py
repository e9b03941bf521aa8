"""Pre-training Cryo-IEF: MoCo v3 on unlabelled particles, on one or several workers, resumable after any kill.

The learning rate is base rate × batch / 256, warmed up linearly over the first epochs, then a cosine to 0 (paper,
"Optimizer"). Order and augmentation of a step depend on seed and step alone. Every worker reads and augments its
own rows of each batch. Failure: a loss that is not finite stops the training; its last state stays on disk.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from models.cryo_ief.augment import AugmentationConfig, apply_view, draw_view
from models.cryo_ief.config import Head, VitConfig, vit_config
from models.cryo_ief.image_sets import ImageCollection, Normalisation, epoch_order, step_generator
from models.cryo_ief.moco import Moco, MocoConfig, momentum_at
from models.cryo_ief.optimisation import build_optimiser, prepare_start, set_learning_rate
from models.cryo_ief.training_state import TrainingState, restore_state, save_state
from models.cryo_ief.vit import CryoVit
from models.weights import save_checkpoint
from models.workers import Workers, sum_over_workers

CHECKPOINT_FILE = "cryo_ief.safetensors"
Progress = Callable[[dict[str, float]], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class PretrainConfig:
    """Everything that a pre-training depends on besides its data. The defaults are the paper's where it states one."""

    seed: int = 1
    size: str = "base"
    model: dict[str, Any] = field(default_factory=dict)
    """Changes to the named size's `VitConfig`."""
    moco: MocoConfig = field(default_factory=MocoConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    normalisation: Normalisation = "dataset"
    n_epochs: int = 100
    """Not stated in the paper."""
    batch_size: int = 2048
    """Over all workers."""
    base_learning_rate: float = 1e-5
    warm_up_epochs: float = 5.0
    weight_decay: float = 0.1
    """Not stated in the paper: MoCo v3's."""
    precision: Literal["fp32", "bf16"] = "fp32"
    is_start_prepared: bool = False
    """Start from cosines in the patch embedding (`prepare_start`); for small networks and short trainings."""
    report_every: int = 50
    checkpoint_every: int = 200

    def __post_init__(self) -> None:
        for name in ("n_epochs", "batch_size", "report_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                msg = f"{name}: {getattr(self, name)}, must be 1 or more"
                raise ValueError(msg)
        if self.batch_size < 2:
            msg = "batch_size: 1, contrastive learning and batch statistics need 2 or more"
            raise ValueError(msg)
        if not self.base_learning_rate > 0.0 or self.weight_decay < 0.0 or self.warm_up_epochs < 0.0:
            msg = (
                f"base_learning_rate, weight_decay, warm_up_epochs: {self.base_learning_rate},"
                f" {self.weight_decay}, {self.warm_up_epochs}, must be above 0, 0 or more, 0 or more"
            )
            raise ValueError(msg)

    def vit(self) -> VitConfig:
        """Return the encoder's configuration, less the data's statistics."""
        unknown = set(self.model) - set(VitConfig.__dataclass_fields__)
        if unknown or "head" in self.model:
            msg = f"model: {sorted(unknown | {'head'} & set(self.model))}, cannot be set for an encoder"
            raise ValueError(msg)
        return vit_config(self.size, **{**self.model, "head": Head.NONE})


@dataclass(frozen=True, slots=True, kw_only=True)
class PretrainResult:
    """The checkpoint written (None on a worker that writes none), its hash and the curve."""

    checkpoint: Path
    sha256: str | None
    curve: list[dict[str, float]]
    n_steps: int
    seconds: float


def initial_encoder(config: PretrainConfig, vit: VitConfig) -> CryoVit:
    """Return the encoder that a training starts from: what a trained one is compared with."""
    return _initial_moco(config, vit).base_encoder


def learning_rate_at(config: PretrainConfig, epoch: float) -> float:
    """Return the learning rate at a point of the training, in epochs."""
    rate = config.base_learning_rate * config.batch_size / 256.0
    if epoch < config.warm_up_epochs:
        return rate * epoch / config.warm_up_epochs
    decayed = (epoch - config.warm_up_epochs) / max(config.n_epochs - config.warm_up_epochs, 1e-9)
    return rate * 0.5 * (1.0 + math.cos(math.pi * min(1.0, decayed)))


def pretrain(
    config: PretrainConfig,
    images: ImageCollection,
    folder: Path,
    *,
    workers: Workers | None = None,
    on_progress: Progress | None = None,
) -> PretrainResult:
    """Train an encoder on `images`; go on from the folder's state if there is one.

    `folder` (one that all workers see) gets `cryo_ief.safetensors`, in the layout of a Cryo-IEF checkpoint, `curve.json`
    and, every `checkpoint_every` steps, the training's state. `on_progress` is called on the first worker.
    """
    workers = workers or Workers()
    mean, std = images.pooled_statistics()
    vit = replace(config.vit(), mean=mean, std=std)
    steps_per_epoch = len(images) // config.batch_size
    if steps_per_epoch == 0:
        msg = f"batch_size: {config.batch_size}, must not be larger than the data ({len(images)} images)"
        raise ValueError(msg)
    workers.share(config.batch_size)
    model = _initial_moco(config, vit).to(workers.device)
    optimiser = build_optimiser(
        model, learning_rate=0.0, weight_decay=config.weight_decay, betas=(0.9, 0.999)
    )
    described = {
        "training": asdict(config),
        "datasets": [
            {"name": s.name, "n_images": s.n_images, "mean": s.mean, "std": s.std} for s in images.sets
        ],
    }
    state = restore_state(folder, model, optimiser, described) or TrainingState(step=0, seconds=0.0)
    workers.barrier()  # nobody replaces the state before all have read it
    wrapped = workers.wrap(model)
    curve, n_steps, start = list(state.curve), config.n_epochs * steps_per_epoch, time.monotonic()
    sums = torch.tensor([*_sums_of(state)], device=workers.device)
    for step, (views, view_seconds) in enumerate(
        _batches(config, images, workers, state.step, n_steps), state.step
    ):
        rate = learning_rate_at(config, step / steps_per_epoch)
        momentum = momentum_at(config.moco, step / n_steps)
        set_learning_rate(optimiser, rate)
        model.train()
        model.update_momentum_encoder(momentum)
        with torch.autocast(workers.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            loss, accuracy = wrapped(*views)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        sums += torch.stack((loss.detach(), accuracy, torch.ones_like(accuracy)))
        done, seconds = step + 1, state.seconds + time.monotonic() - start
        if done % config.report_every == 0 or done == n_steps:
            point = {
                "step": float(done),
                "epoch": done / steps_per_epoch,
                **_means(sums, done),
                "learning_rate": rate,
                "momentum": momentum,
                "seconds": seconds,
                "images_per_s": (done - state.step) * config.batch_size / (time.monotonic() - start),
                "waited_for_data_s": view_seconds,
            }
            sums.zero_()
            curve.append(point)
            if on_progress is not None and workers.is_first:
                on_progress(point)
        if done % config.checkpoint_every == 0 or done == n_steps:
            # Each worker goes on with its share of the sums, so a resumed curve is the undisturbed one's.
            loss_sum, accuracy_sum, count = (sum_over_workers(sums) / workers.size).tolist()
            _require_finite(loss_sum, done)
            numbers = {"loss_sum": loss_sum, "accuracy_sum": accuracy_sum, "count": count}
            if workers.is_first:
                now = TrainingState(step=done, seconds=seconds, curve=curve, numbers=numbers)
                save_state(folder, model, optimiser, now, described)
    seconds = state.seconds + time.monotonic() - start
    checkpoint, sha256 = folder / CHECKPOINT_FILE, None
    if workers.is_first:
        metadata = {"model": vit.to_dict(), **described, "n_steps": n_steps}
        sha256 = save_checkpoint(checkpoint, model.state_dict(), metadata)
        (folder / "curve.json").write_text(json.dumps(curve, indent=1) + "\n")
    workers.barrier()
    return PretrainResult(checkpoint=checkpoint, sha256=sha256, curve=curve, n_steps=n_steps, seconds=seconds)


def make_views(
    grey: UInt8[Tensor, "b s s"],
    config: PretrainConfig,
    generator: torch.Generator,
    rows: slice,
    mean: Float[Tensor, " b"],
    std: Float[Tensor, " b"],
) -> tuple[Float[Tensor, "b 1 s s"], Float[Tensor, "b 1 s s"]]:
    """Return the two normalised views of `rows` of a batch; `grey`, `mean` and `std` hold those rows alone."""
    device = grey.device
    mean, std = (value.to(device)[:, None, None, None] for value in (mean, std))
    drawn = [draw_view(config.batch_size, config.augmentation, view, generator) for view in (0, 1)]
    first, second = ((apply_view(grey, view.take(rows)) - mean) / std for view in drawn)
    return first, second


def _initial_moco(config: PretrainConfig, vit: VitConfig) -> Moco:
    """Return the network at step 0; its weights follow from the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)  # timm's initialiser takes no generator
        model = Moco(vit, config.moco)
        if config.is_start_prepared:
            prepare_start(model.base_encoder)
            model.update_momentum_encoder(0.0)
    return model


def _batches(
    config: PretrainConfig, images: ImageCollection, workers: Workers, first: int, n_steps: int
) -> Iterator[tuple[tuple[Tensor, Tensor], float]]:
    """Yield the views of this worker's rows of each step, and how long the step waited for them.

    A thread reads the next batch while the network works on this one.
    """
    rows = workers.share(config.batch_size)
    steps_per_epoch = len(images) // config.batch_size
    order, order_epoch = np.empty(0, np.int64), -1

    def load(step: int) -> tuple[Tensor, Tensor, Tensor]:
        nonlocal order, order_epoch
        epoch, position = divmod(step, steps_per_epoch)
        if epoch != order_epoch:
            order, order_epoch = epoch_order(len(images), config.seed, epoch), epoch
        chosen = order[position * config.batch_size : (position + 1) * config.batch_size][rows]
        mean, std = images.statistics(chosen, config.normalisation)
        return torch.from_numpy(images.read(chosen)), torch.from_numpy(mean), torch.from_numpy(std)

    with ThreadPoolExecutor(1, thread_name_prefix="particles") as reader:
        ahead = reader.submit(load, first) if first < n_steps else None
        for step in range(first, n_steps):
            if ahead is None:
                break
            started = time.monotonic()
            grey, mean, std = ahead.result()
            waited = time.monotonic() - started
            ahead = reader.submit(load, step + 1) if step + 1 < n_steps else None
            generator = step_generator(config.seed, step)
            views = make_views(grey.to(workers.device), config, generator, rows, mean, std)
            yield views, waited


def _sums_of(state: TrainingState) -> tuple[float, float, float]:
    return (
        state.numbers.get("loss_sum", 0.0),
        state.numbers.get("accuracy_sum", 0.0),
        state.numbers.get("count", 0.0),
    )


def _means(sums: Tensor, step: int) -> dict[str, float]:
    """Return mean loss and accuracy since the last report, over all workers."""
    loss, accuracy, count = sum_over_workers(sums).tolist()
    _require_finite(loss, step)
    return {"loss": loss / count, "accuracy": accuracy / count}


def _require_finite(loss: float, step: int) -> None:
    if not math.isfinite(loss):
        msg = f"loss: {loss} at step {step}, must be finite; lower the learning rate or freeze the patch projection"
        raise ValueError(msg)
