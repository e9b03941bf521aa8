"""Training a ranker: AdamW, linear warm-up, cosine decay, L_MR + L_CE, the whole network trained.

Run `python -m models.cryoranker.train CONFIG.yaml --out FOLDER`, or `icestream train cryoranker CONFIG.yaml`.
One seed fixes simulation, initial weights, order and augmentation; on another machine or thread count the
floating-point sums may differ in their last bits.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from models.cryo_ief.config import Head, VitConfig, vit_config
from models.cryo_ief.vit import CryoVit
from models.cryoranker.dataset import (
    LabelledParticles,
    SimulatedSet,
    augment,
    grey_statistics,
    phantom_names,
    simulate_set_cached,
)
from models.cryoranker.losses import ALPHA, MARGIN, ranking_loss
from models.cryoranker.metrics import ScoreQuality, score_quality
from models.weights import load_checkpoint, save_checkpoint

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Which phantoms are simulated. Training and validation seeds never overlap."""

    n_train_phantoms: int = 80
    n_validation_phantoms: int = 8
    fields_per_structure: int = 60
    n_shapes: int = 2
    first_seed: int = 1000
    cache: str = "~/.cache/icestream/ranker"
    n_processes: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """Everything that a training run depends on."""

    seed: int = 1
    size: str = "micro"
    model: dict[str, Any] = field(default_factory=dict)
    """Changes to the named size's `VitConfig`."""
    data: DataConfig = field(default_factory=DataConfig)
    n_steps: int = 3000
    batch_size: int = 96
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    warm_up_steps: int = 150
    margin: float = MARGIN
    alpha: float = ALPHA
    gradient_norm: float = 1.0
    rotation_probability: float = 0.0
    is_start_prepared: bool = True
    """Start from cosines in the patch embedding and Xavier's scale elsewhere (see `prepare_start`)."""
    first_least_snr: float = 0.0
    """Only images with at least this SNR are shown at first; the bound falls linearly to 0 at half of the training."""
    evaluate_every: int = 500
    time_limit_s: float | None = None
    """Wall clock at which the cosine ends early; the decay follows the clock or the steps, whichever is ahead."""
    initial_checkpoint: str | None = None

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """Build from a parsed YAML document; unknown keys raise."""
        _refuse_unknown("training configuration", values, {f.name for f in fields(cls)})
        given = dict(values)
        data = given.pop("data", {})
        _refuse_unknown("data", data, {f.name for f in fields(DataConfig)})
        return cls(**given, data=DataConfig(**data))


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """The checkpoint written, its hash, the curve, and the last validation figures."""

    checkpoint: Path
    sha256: str
    validation: ScoreQuality
    curve: list[dict[str, float]]
    seconds: float


def read_train_config(path: Path) -> TrainConfig:
    """Read a training configuration from YAML."""
    import yaml

    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        msg = f"{path}: not a readable YAML file ({error})"
        raise ValueError(msg) from error
    if not isinstance(values, dict):
        msg = f"{path}: holds a {type(values).__name__}, a configuration is a mapping"
        raise ValueError(msg)  # noqa: TRY004 - the file's content is a value here
    return TrainConfig.from_dict(values)


def train_ranker(
    config: TrainConfig,
    folder: Path,
    *,
    on_progress: Callable[[dict[str, float]], None] | None = None,
) -> TrainResult:
    """Simulate (or reuse) the data, train, and write `ranker.safetensors` and `curve.json` into `folder`."""
    model_config = vit_config(config.size, **{"head": Head.SOFTMAX2, **_model_changes(config.model)})
    training, validation = load_data(config, model_config)
    mean, std = grey_statistics(training.grey)
    model_config = replace(model_config, mean=mean, std=std)
    result = fit(model_config, config, training, validation, on_progress=on_progress)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / "ranker.safetensors"
    sha256 = save_checkpoint(
        checkpoint,
        result.model.state_dict(),
        {
            "model": model_config.to_dict(),
            "training": asdict(config),
            "validation": asdict(result.validation),
        },
    )
    (folder / "curve.json").write_text(json.dumps(result.curve, indent=1) + "\n")
    return TrainResult(
        checkpoint=checkpoint,
        sha256=sha256,
        validation=result.validation,
        curve=result.curve,
        seconds=result.seconds,
    )


def load_data(config: TrainConfig, model_config: VitConfig) -> tuple[LabelledParticles, LabelledParticles]:
    """Return the training and the validation set, simulated now or earlier."""
    data = config.data
    first_validation = data.first_seed + data.n_train_phantoms
    cache = Path(data.cache).expanduser()
    training_spec = SimulatedSet(
        structures=phantom_names(range(data.first_seed, first_validation)),
        seed=config.seed,
        fields_per_structure=data.fields_per_structure,
        input_size_px=model_config.input_size_px,
        resize_mode=model_config.resize_mode,
        n_shapes=data.n_shapes,
    )
    validation_spec = replace(
        training_spec,
        structures=phantom_names(range(first_validation, first_validation + data.n_validation_phantoms)),
        seed=config.seed + 1,
        fields_per_structure=max(1, min(data.fields_per_structure, 20)),
        n_shapes=1,
    )

    def report(done: int, total: int) -> None:
        log.info("simulated %d of %d structures", done, total)

    training = simulate_set_cached(training_spec, cache, n_processes=data.n_processes, on_progress=report)
    validation = simulate_set_cached(validation_spec, cache, n_processes=data.n_processes, on_progress=report)
    log.info("training images %d, validation images %d", len(training), len(validation))
    return training, validation


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedModel:
    """A trained network with its curve and the validation figures at the end."""

    model: CryoVit
    validation: ScoreQuality
    curve: list[dict[str, float]]
    seconds: float


def fit(
    model_config: VitConfig,
    config: TrainConfig,
    training: LabelledParticles,
    validation: LabelledParticles,
    *,
    on_progress: Callable[[dict[str, float]], None] | None = None,
) -> FittedModel:
    """Train a network on one set, watching another."""
    torch.manual_seed(config.seed)  # initial weights: timm's initialiser takes no generator
    model = CryoVit(model_config)
    if config.is_start_prepared:
        prepare_start(model)
    if config.initial_checkpoint is not None:
        model.load_state_dict(dict(load_checkpoint(Path(config.initial_checkpoint)).tensors), strict=True)
    generator = torch.Generator().manual_seed(config.seed)
    optimiser = _optimiser(model, config)
    curve: list[dict[str, float]] = []
    start = time.monotonic()
    running, order, step, progress = 0.0, torch.empty(0, dtype=torch.long), 0, 0.0
    while progress < 1.0:
        if len(order) < config.batch_size:
            least_snr = config.first_least_snr * max(0.0, 1.0 - 2.0 * progress)
            shown = torch.from_numpy(np.flatnonzero(training.snr >= least_snr))
            order = shown[torch.randperm(len(shown), generator=generator)]
        chosen, order = order[: config.batch_size].numpy(), order[config.batch_size :]
        rate = _learning_rate(config, step, progress)
        for group in optimiser.param_groups:
            group["lr"] = rate
        loss = _step(model, optimiser, config, training, chosen, generator)
        running = loss if step == 0 else 0.98 * running + 0.02 * loss
        step += 1
        progress = _progress(config, step, time.monotonic() - start)
        if step % config.evaluate_every == 0 or progress >= 1.0:
            quality = evaluate(model, validation)
            point = {
                "step": float(step),
                "seconds": time.monotonic() - start,
                "loss": running,
                "auc": quality.auc,
                "good_accepted": quality.good_accepted,
                "bad_accepted": quality.bad_accepted,
            }
            curve.append(point)
            if on_progress is not None:
                on_progress(point)
    return FittedModel(model=model.eval(), validation=quality, curve=curve, seconds=time.monotonic() - start)


def prepare_start(model: CryoVit) -> None:
    """Give a small network initial weights that a short training on noisy images can use.

    The patch embedding's filters become a patch's 2-D cosines, lowest frequencies first and strongest: at the particles'
    signal-to-noise ratios a random filter sees noise alone. Linear layers get Xavier's scale, because the usual
    0.02 leaves the branches of a narrow network nearly silent. Filters beyond the patch's pixels stay random.
    """
    weight = model.patch_embed.get_parameter("proj.weight")
    width, _, patch, _ = weight.shape
    place, frequency = torch.arange(patch) + 0.5, torch.arange(patch)
    basis = torch.cos(math.pi / patch * frequency[:, None] * place[None, :]) * math.sqrt(2.0 / patch)
    basis[0] /= math.sqrt(2.0)
    radius = torch.hypot(frequency[:, None].float(), frequency[None, :].float()).flatten()
    order = torch.argsort(radius, stable=True)[:width]
    filters = torch.einsum("uy,vx->uvyx", basis, basis).reshape(-1, patch, patch)[order]
    strength = 1.0 / (1.0 + radius[order] / 3.0)
    with torch.no_grad():
        weight[: len(filters), 0] = filters * strength[:, None, None]
    for module in model.blocks.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.xavier_uniform_(module.weight)


def evaluate(model: CryoVit, particles: LabelledParticles, *, batch_size: int = 256) -> ScoreQuality:
    """Return the figures of a network on labelled particles."""
    return score_quality(score_grey(model, particles.grey, batch_size=batch_size), particles.labels)


def score_grey(model: CryoVit, grey: NDArray[np.uint8], *, batch_size: int = 256) -> NDArray[np.float32]:
    """Return the scores of grey-level images, the network in evaluation mode."""
    was_training = model.training
    model.eval()
    parts = []
    with torch.inference_mode():
        for first in range(0, len(grey), batch_size):
            images = torch.from_numpy(grey[first : first + batch_size]).float()[:, None] / 255.0
            _, logits = model((images - model.config.mean) / model.config.std)
            parts.append(model.score(logits).numpy())
    model.train(was_training)
    return np.concatenate(parts)


def _step(
    model: CryoVit,
    optimiser: torch.optim.Optimizer,
    config: TrainConfig,
    training: LabelledParticles,
    chosen: NDArray[np.int64],
    generator: torch.Generator,
) -> float:
    model.train()
    images = augment(
        torch.from_numpy(training.grey[chosen]),
        model.config.mean,
        model.config.std,
        generator,
        rotation_probability=config.rotation_probability,
    )
    labels = torch.from_numpy(training.labels[chosen])
    _, logits = model(images)
    loss = ranking_loss(model.score(logits), labels, margin=config.margin, alpha=config.alpha)
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), config.gradient_norm)
    optimiser.step()
    return float(loss.detach())


def _optimiser(model: CryoVit, config: TrainConfig) -> torch.optim.Optimizer:
    """Return AdamW; norms, biases and the CLS token are not decayed."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decayed = [p for name, p in trained if p.ndim > 1 and name != "cls_token"]
    others = [p for name, p in trained if p.ndim <= 1 or name == "cls_token"]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98))


def _learning_rate(config: TrainConfig, step: int, progress: float) -> float:
    if step < config.warm_up_steps:
        return config.learning_rate * (step + 1) / config.warm_up_steps
    return config.learning_rate * max(0.01, 0.5 * (1.0 + math.cos(math.pi * progress)))


def _progress(config: TrainConfig, step: int, seconds: float) -> float:
    by_step = step / config.n_steps
    return by_step if config.time_limit_s is None else max(by_step, seconds / config.time_limit_s)


def _model_changes(values: dict[str, Any]) -> dict[str, Any]:
    _refuse_unknown("model", values, set(VitConfig.__dataclass_fields__))
    return {**values, "head": Head(values["head"])} if "head" in values else dict(values)


def _refuse_unknown(name: str, values: dict[str, Any], known: set[str]) -> None:
    unknown = set(values) - known
    if unknown:
        msg = f"{name}: unknown keys {sorted(unknown)}, known are {sorted(known)}"
        raise ValueError(msg)


def main() -> None:
    """Train from the command line; progress goes to the log."""
    parser = argparse.ArgumentParser(prog="python -m models.cryoranker.train", description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=None, help="instead of the configuration's")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    config = read_train_config(arguments.config)
    if arguments.seed is not None:
        config = replace(config, seed=arguments.seed)
    result = train_ranker(config, arguments.out, on_progress=lambda point: log.info("%s", json.dumps(point)))
    log.info("checkpoint %s sha256 %s", result.checkpoint, result.sha256)


if __name__ == "__main__":
    main()
