"""What a training is told: the schedule, beside physics and networks; and these settings as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from models.cryogem.losses import GanForm, NceForm
from models.cryogem.networks import NetworkSettings
from models.cryogem.physics import PhysicsSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSettings:
    """The schedule; defaults are the paper's (100 rendered frames, 25 + 75 epochs, batch 1, 1024 × 1024).

    An epoch is one pass over the rendered frames. `crop_px` is the side of the images trained on, cut from the frames at
    random; `precision` bf16 computes convolutions in bfloat16. `nce_form` "unguided" is the ablation without masks.
    The network kept is that of the last validation, or of the one whose frames are nearest to training micrographs by the
    Fréchet distance of the shipped ranker's features (`keep`). A validation makes `n_validated` frames, or as many as that
    distance needs (`evaluation.frames_needed`).
    """

    seed: int = 0
    n_simulated: int = 100
    crop_px: int = 1024
    constant_epochs: int = 25
    decay_epochs: int = 75
    learning_rate: float = 1e-4
    beta1: float = 0.5
    beta2: float = 0.999
    n_queries: int = 256
    nce_weight: float = 10.0
    temperature: float = 0.07
    nce_form: NceForm = "paper"
    gan_form: GanForm = "lsgan"
    precision: Literal["fp32", "bf16"] = "fp32"
    is_channels_last: bool = False
    device: str = "auto"
    checkpoint_every: int = 100
    validate_every: int = 100
    n_validated: int = 4
    keep: Literal["last", "best"] = "best"

    def __post_init__(self) -> None:
        for name in (
            "n_simulated",
            "crop_px",
            "constant_epochs",
            "n_queries",
            "checkpoint_every",
            "validate_every",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)}, must be 1 or more")
        if self.decay_epochs < 0 or self.n_validated < 1:
            raise ValueError(
                f"decay_epochs, n_validated: {self.decay_epochs}, {self.n_validated}, must be 0, 1 or more"
            )
        if self.temperature <= 0 or self.learning_rate <= 0 or self.nce_weight < 0:
            raise ValueError("temperature, learning_rate, nce_weight: must be over 0, over 0, at least 0")

    @property
    def n_steps(self) -> int:
        """Steps of the whole training."""
        return (self.constant_epochs + self.decay_epochs) * self.n_simulated

    def learning_rate_at(self, epoch: int) -> float:
        """Return the rate of an epoch (from 0): constant, then linear towards 0 one epoch after the last."""
        done = max(0, epoch + 1 - self.constant_epochs)
        return self.learning_rate * (1.0 - done / (self.decay_epochs + 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class CryogemSettings:
    """All that a training depends on besides the bank."""

    physics: PhysicsSettings
    networks: NetworkSettings
    training: TrainingSettings


def plain_settings(settings: CryogemSettings) -> dict[str, Any]:
    """Return settings as JSON values."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(settings)))
    return plain


def describe_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Return which settings differ, as text; empty where none does. What `old` does not have yet was the default."""
    usual = plain_settings(
        CryogemSettings(physics=PhysicsSettings(), networks=NetworkSettings(), training=TrainingSettings())
    )
    before = {name: {**usual[name], **old.get(name, {})} for name in usual}
    return ", ".join(
        f"{section.name}.{key} {before[section.name][key]!r} → {value!r}"
        for section in fields(CryogemSettings)
        for key, value in new[section.name].items()
        if before[section.name][key] != value
    )
