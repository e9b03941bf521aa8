"""Training a ranker: AdamW, linear warm-up, cosine decay, L_MR + L_CE, the whole network trained.

`icestream train cryoranker CONFIG.yaml` calls it, here or on the workers of a Ray cluster. One seed fixes simulation, initial
weights, order and augmentation; on another machine, thread count or number of workers the floating-point sums may differ
in their last bits. A killed training goes on from the last state in its folder.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from models.cryo_ief.config import Head, VitConfig, vit_config
from models.cryo_ief.encode import encode_grey
from models.cryo_ief.image_sets import grey_statistics
from models.cryo_ief.optimisation import build_optimiser, prepare_start, set_learning_rate
from models.cryo_ief.settings import unknown_key
from models.cryo_ief.training_state import TrainingState, restore_state, save_state
from models.cryo_ief.vit import CryoVit
from models.cryoranker.dataset import (
    LabelledParticles,
    SimulatedSet,
    augment,
    phantom_names,
    simulate_set_cached,
)
from models.cryoranker.losses import ALPHA, MARGIN, ranking_loss
from models.cryoranker.metrics import ScoreQuality, score_quality
from models.cryoranker.simulate import MOST_JUNK
from models.cryoranker.starting import is_exported, settle_norms, starting_network
from models.cryoranker.synthetic import SyntheticParticles, mix_sets, read_synthetic
from models.weights import save_checkpoint
from models.workers import Workers, gather_rows, sum_over_workers

CHECKPOINT_FILE = "ranker.safetensors"
_LEAST_CALIBRATION = 30
_SETTLING_IMAGES = 1024
_CALIBRATION_KEYS = ("good_accepted", "calibration_threshold", "calibration_snr")
Progress = Callable[[dict[str, float]], None]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Which phantoms are simulated. Training and validation seeds never overlap."""

    n_train_phantoms: int = 80
    n_validation_phantoms: int = 8
    fields_per_structure: int = 60
    n_shapes: int = 2
    weak_part: float = 0.0
    """Part of the training fields with an SNR of 0.03-0.1, beside those that the whole range gives."""
    most_junk: int = MOST_JUNK
    """Aggregates tried in a training field, and broken pieces: 0 to this many."""
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
    is_bfloat16: bool = False
    """Products in bfloat16 (weights, norms and loss stay float32): faster where the CPU multiplies bfloat16."""
    good_accepted: float | None = None
    """After training the scores are moved (ranks stay) so that this part of the good particles of validation images with
    an SNR of `calibration_snr` (a range) scores above `calibration_threshold`."""
    calibration_threshold: float = 0.4
    calibration_snr: tuple[float, float] = (0.03, 0.08)
    evaluate_every: int = 500
    time_limit_s: float | None = None
    """Wall clock at which the cosine ends early; the decay follows the clock or the steps, whichever is ahead."""
    checkpoint_every: int = 100
    initial_checkpoint: str | None = None
    """A ranker to go on from ("default": the shipped one), or a Cryo-IEF encoder to fine-tune (the paper's way)."""
    synthetic: SyntheticParticles | None = None
    """Generated particles mixed into the training images; the ranker gone on from then gives sizes and grey statistics."""

    def __post_init__(self) -> None:
        for name in ("n_steps", "batch_size", "evaluate_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                msg = f"{name}: {getattr(self, name)}, must be 1 or more"
                raise ValueError(msg)
        if self.good_accepted is not None and not 0.5 <= self.good_accepted < 1.0:
            msg = f"good_accepted: {self.good_accepted}, must lie in [0.5, 1)"
            raise ValueError(msg)
        if self.synthetic is not None and self.initial_checkpoint is None:
            msg = (
                "initial_checkpoint: none, synthetic particles fine-tune a ranker (default: the shipped one)"
            )
            raise ValueError(msg)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """The checkpoint written, its hash, the curve, and the last validation figures."""

    checkpoint: Path
    sha256: str | None
    validation: ScoreQuality
    curve: list[dict[str, float]]
    seconds: float


def train_ranker(
    config: TrainConfig,
    folder: Path,
    *,
    workers: Workers | None = None,
    on_progress: Progress | None = None,
) -> TrainResult:
    """Simulate (or reuse) the data, train, and write `ranker.safetensors` and `curve.json` into `folder`."""
    workers = workers or Workers()
    start = _ranker_gone_on_from(config)
    model_config = start or vit_config(config.size, **{"head": Head.SOFTMAX2, **_model_changes(config.model)})
    if not workers.is_first:
        workers.barrier()  # the first worker simulates, the others find it in the cache
    training, validation = load_data(config, model_config)
    if workers.is_first:
        workers.barrier()
    if start is None:
        mean, std = grey_statistics(training.grey)
        model_config = replace(model_config, mean=mean, std=std)
    result = fit(model_config, config, training, validation, folder, workers=workers, on_progress=on_progress)
    checkpoint, sha256 = folder / CHECKPOINT_FILE, None
    if workers.is_first:
        metadata = {
            "model": model_config.to_dict(),
            "training": asdict(config),
            "validation": asdict(result.validation),
        }
        sha256 = save_checkpoint(checkpoint, result.model.state_dict(), metadata)
        (folder / "curve.json").write_text(json.dumps(result.curve, indent=1) + "\n")
    workers.barrier()
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
        weak_part=data.weak_part,
        most_junk=data.most_junk,
    )
    validation_spec = replace(
        training_spec,
        structures=phantom_names(range(first_validation, first_validation + data.n_validation_phantoms)),
        seed=config.seed + 1,
        fields_per_structure=max(1, min(data.fields_per_structure, 20)),
        n_shapes=1,
        weak_part=0.0,
        most_junk=MOST_JUNK,
    )

    def report(done: int, total: int) -> None:
        log.info("simulated %d of %d structures", done, total)

    training = simulate_set_cached(training_spec, cache, n_processes=data.n_processes, on_progress=report)
    validation = simulate_set_cached(validation_spec, cache, n_processes=data.n_processes, on_progress=report)
    if config.synthetic is not None:
        synthetic = read_synthetic(config.synthetic, model_config, seed=config.seed)
        log.info("synthetic images %d", len(synthetic))
        training = mix_sets(training, synthetic, config.synthetic.part, seed=config.seed)
    log.info("training images %d, validation images %d", len(training), len(validation))
    return training, validation


def _ranker_gone_on_from(config: TrainConfig) -> VitConfig | None:
    """Return the configuration of the ranker that synthetic particles fine-tune."""
    if config.synthetic is None or config.initial_checkpoint is None:
        return None
    given = starting_network(config.initial_checkpoint).config
    if given.head is Head.NONE:
        msg = f"initial_checkpoint: {config.initial_checkpoint}, has no ranking head; synthetic particles fine-tune a ranker"
        raise ValueError(msg)
    return given


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
    folder: Path | None = None,
    *,
    workers: Workers | None = None,
    on_progress: Progress | None = None,
) -> FittedModel:
    """Train a network on one set, watching another; with a folder, go on from its state and keep one there."""
    workers = workers or Workers()
    rows = workers.share(config.batch_size)
    if len(training) < config.batch_size:
        msg = f"batch_size: {config.batch_size}, must not be larger than the data ({len(training)} images)"
        raise ValueError(msg)
    model = initial_model(config, model_config)
    if config.initial_checkpoint is not None and is_exported(config.initial_checkpoint):
        settle_norms(model, training.grey[:: max(1, len(training) // _SETTLING_IMAGES)])
    model = model.to(workers.device)
    generator = torch.Generator().manual_seed(config.seed)
    optimiser = build_optimiser(
        model, learning_rate=config.learning_rate, weight_decay=config.weight_decay, betas=(0.9, 0.98)
    )
    # Calibration comes after the loop: a finished training can be calibrated anew.
    of_loop = {key: value for key, value in asdict(config).items() if key not in _CALIBRATION_KEYS}
    described = {"training": of_loop, "n_images": len(training)}
    state = TrainingState(step=0, seconds=0.0)
    order = torch.empty(0, dtype=torch.long)
    if folder is not None:
        state = restore_state(folder, model, optimiser, described) or state
        workers.barrier()  # nobody replaces the state before all have read it
    if state.step:
        generator.set_state(state.tensors["generator"])
        order = state.tensors["order"]
    _set_attention(model, is_fused=not config.is_bfloat16)
    wrapped = workers.wrap(model)
    curve, step, running = list(state.curve), state.step, state.numbers.get("running", 0.0)
    start = time.monotonic() - state.seconds
    progress = _progress(config, step, state.seconds)
    quality = evaluate(model, validation)
    while progress < 1.0:
        if len(order) < config.batch_size:
            least_snr = config.first_least_snr * max(0.0, 1.0 - 2.0 * progress)
            shown = torch.from_numpy(np.flatnonzero(training.snr >= least_snr))
            order = shown[torch.randperm(len(shown), generator=generator)]
        chosen, order = order[: config.batch_size].numpy(), order[config.batch_size :]
        set_learning_rate(optimiser, _learning_rate(config, step, progress))
        loss = _step(wrapped, model, optimiser, config, training, chosen, generator, rows, workers.device)
        running = loss if step == 0 else 0.98 * running + 0.02 * loss
        step += 1
        seconds = time.monotonic() - start
        progress = _progress(config, step, seconds)
        if workers.size > 1 and config.time_limit_s is not None:
            progress = float(sum_over_workers(torch.tensor(progress, device=workers.device))) / workers.size
        if step % config.evaluate_every == 0 or progress >= 1.0:
            quality = evaluate(model, validation)
            point = {
                "step": float(step),
                "seconds": seconds,
                "loss": running,
                "learning_rate": optimiser.param_groups[0]["lr"],
                "auc": quality.auc,
                "good_accepted": quality.good_accepted,
                "bad_accepted": quality.bad_accepted,
            }
            curve.append(point)
            if on_progress is not None and workers.is_first:
                on_progress(point)
        is_due = step % config.checkpoint_every == 0 or progress >= 1.0
        if folder is not None and workers.is_first and is_due:
            now = TrainingState(
                step=step,
                seconds=seconds,
                curve=curve,
                tensors={"generator": generator.get_state(), "order": order},
                numbers={"running": running},
            )
            save_state(folder, model, optimiser, now, described)
    _set_attention(model, is_fused=True)
    if config.good_accepted is not None:
        _calibrate(model, config, validation, config.good_accepted)
        quality = evaluate(model, validation)
    return FittedModel(model=model.eval(), validation=quality, curve=curve, seconds=time.monotonic() - start)


def initial_model(config: TrainConfig, model_config: VitConfig) -> CryoVit:
    """Return the network at step 0: from the seed, a ranker's checkpoint, or a Cryo-IEF encoder with a fresh head.

    Raises `ValueError` where the initial checkpoint is of another architecture.
    """
    torch.manual_seed(config.seed)  # timm's initialiser takes no generator
    model = CryoVit(model_config)
    if config.is_start_prepared:
        prepare_start(model)
    if config.initial_checkpoint is None:
        return model
    given = starting_network(config.initial_checkpoint)
    weights = {key: value for key, value in given.state_dict().items() if not key.startswith("head.")}
    head = given if type(given.head) is type(model.head) else model
    weights |= {key: value for key, value in head.state_dict().items() if key.startswith("head.")}
    if model_config.head is Head.SIGMOID1:  # v1.5 has no final LayerNorm; the encoder's goes into the head
        norm = {key: weights.pop(key) for key in ("norm.weight", "norm.bias") if key in weights}
        weights |= {f"head.{key}": value for key, value in norm.items()}
    try:
        model.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        msg = (
            f"{config.initial_checkpoint}: {given.config.architecture}, the training builds"
            f" {model_config.architecture} ({error})"
        )
        raise ValueError(msg) from error
    return model


def evaluate(model: CryoVit, particles: LabelledParticles) -> ScoreQuality:
    """Return the figures of a network with a ranking head on labelled particles."""
    scores = encode_grey(model, particles.grey).scores
    if scores is None:
        msg = f"model: {model.config.architecture}, has no ranking head and gives no score"
        raise ValueError(msg)
    return score_quality(scores, particles.labels)


def _step(
    wrapped: torch.nn.Module,
    model: CryoVit,
    optimiser: torch.optim.Optimizer,
    config: TrainConfig,
    training: LabelledParticles,
    chosen: NDArray[np.int64],
    generator: torch.Generator,
    rows: slice,
    device: torch.device,
) -> float:
    model.train()
    # The whole batch is augmented by every worker: one random stream, whatever their number.
    images = augment(
        torch.from_numpy(training.grey[chosen]),
        model.config.mean,
        model.config.std,
        generator,
        rotation_probability=config.rotation_probability,
    )
    labels = torch.from_numpy(training.labels[chosen]).to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=config.is_bfloat16):
        _, logits = wrapped(images[rows].to(device))
    # Pairs are ranked over the batch of all workers, not within each share.
    loss = ranking_loss(
        gather_rows(model.score(logits.float())), labels, margin=config.margin, alpha=config.alpha
    )
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), config.gradient_norm)
    optimiser.step()
    return float(loss.detach())


def _set_attention(model: CryoVit, *, is_fused: bool) -> None:
    """Choose the attention's kernel: PyTorch's fused one is slow in bfloat16 on CPUs, three plain products are not."""
    blocks: Any = model.blocks  # timm's blocks have no types
    for block in blocks:
        block.attn.fused_attn = is_fused


def _calibrate(
    model: CryoVit, config: TrainConfig, validation: LabelledParticles, good_accepted: float
) -> None:
    """Move the head's bias so that the asked part of good particles lies above the threshold."""
    least, most = config.calibration_snr
    is_used = (validation.snr >= least) & (validation.snr <= most) & (validation.labels > config.alpha)
    scores = encode_grey(model, validation.grey[is_used]).scores
    if scores is None or len(scores) < _LEAST_CALIBRATION:
        found = "no score" if scores is None else f"{len(scores)} good validation images"
        msg = f"calibration_snr: {least}-{most}, has {found}, {_LEAST_CALIBRATION} are needed"
        raise ValueError(msg)
    log_odds = np.log(scores.astype(np.float64)) - np.log1p(
        -np.minimum(scores.astype(np.float64), 1.0 - 1e-7)
    )
    wanted = math.log(config.calibration_threshold / (1.0 - config.calibration_threshold))
    shift_log_odds(model, wanted - float(np.quantile(log_odds, 1.0 - good_accepted)))


def shift_log_odds(model: CryoVit, shift: float) -> None:
    """Add a constant to the log odds of every score, in place: the head's last bias takes it."""
    name = "linear1.bias" if model.config.head is Head.SOFTMAX2 else "mlp_classifier.0.bias"
    with torch.no_grad():
        model.head.get_parameter(name)[-1] += shift


def _learning_rate(config: TrainConfig, step: int, progress: float) -> float:
    if step < config.warm_up_steps:
        return config.learning_rate * (step + 1) / config.warm_up_steps
    return config.learning_rate * max(0.01, 0.5 * (1.0 + math.cos(math.pi * progress)))


def _progress(config: TrainConfig, step: int, seconds: float) -> float:
    by_step = step / config.n_steps
    return by_step if config.time_limit_s is None else max(by_step, seconds / config.time_limit_s)


def _model_changes(values: dict[str, Any]) -> dict[str, Any]:
    for key in set(values) - set(VitConfig.__dataclass_fields__):
        raise ValueError(unknown_key(f"model.{key}", VitConfig.__dataclass_fields__))
    return {**values, "head": Head(values["head"])} if "head" in values else dict(values)
