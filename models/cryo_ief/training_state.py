"""A training's state on disk: written atomically, read without unpickling, so that a killed run goes on as if it had not been.

One safetensors file holds the weights, the optimiser's moments, and what else the loop needs (random state, order of the
data); its metadata hold the configuration, the step and the curve. Floats survive JSON exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.weights import load_checkpoint, save_checkpoint

STATE_FILE = "training_state.safetensors"
_MODEL, _OPTIMISER, _EXTRA = "model.", "optimiser.", "extra."


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingState:
    """Where a training stands; `curve` holds the points reported so far."""

    step: int
    seconds: float
    curve: list[dict[str, float]] = field(default_factory=list)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    numbers: Mapping[str, float] = field(default_factory=dict)


def save_state(
    folder: Path,
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    state: TrainingState,
    configuration: Mapping[str, Any],
) -> None:
    """Replace the folder's state file by this state."""
    tensors = {f"{_MODEL}{key}": value for key, value in model.state_dict().items()}
    for index, values in optimiser.state_dict()["state"].items():
        tensors |= {f"{_OPTIMISER}{index}.{name}": torch.as_tensor(value) for name, value in values.items()}
    tensors |= {f"{_EXTRA}{key}": value for key, value in state.tensors.items()}
    metadata = {
        "configuration": configuration,
        "step": state.step,
        "seconds": state.seconds,
        "curve": state.curve,
        "numbers": dict(state.numbers),
    }
    save_checkpoint(folder / STATE_FILE, tensors, metadata)


def restore_state(
    folder: Path, model: nn.Module, optimiser: torch.optim.Optimizer, configuration: Mapping[str, Any]
) -> TrainingState | None:
    """Load the folder's state into model and optimiser and return the rest; None where there is no state file.

    Raises `ValueError` where the state belongs to another configuration (naming what differs) or another network.
    """
    path = folder / STATE_FILE
    if not path.exists():
        return None
    loaded = load_checkpoint(path)
    _check_configuration(path, loaded.metadata.get("configuration"), configuration)
    try:
        model.load_state_dict(_below(loaded.tensors, _MODEL), strict=True)
    except RuntimeError as error:
        msg = f"{path}: the weights are those of another network ({error})"
        raise ValueError(msg) from error
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in _below(loaded.tensors, _OPTIMISER).items():
        index, _, name = key.partition(".")
        moments.setdefault(int(index), {})[name] = value
    groups = optimiser.state_dict()["param_groups"]
    optimiser.load_state_dict({"state": moments, "param_groups": groups})
    return TrainingState(
        step=int(loaded.metadata["step"]),
        seconds=float(loaded.metadata["seconds"]),
        curve=list(loaded.metadata["curve"]),
        tensors=_below(loaded.tensors, _EXTRA),
        numbers=dict(loaded.metadata["numbers"]),
    )


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _check_configuration(path: Path, written: Any, wanted: Mapping[str, Any]) -> None:  # noqa: ANN401 - JSON
    before, now = _flat(written), _flat(_as_json(wanted))
    different = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    if different:
        shown = ", ".join(f"{key} {before.get(key)} then, {now.get(key)} now" for key in different[:5])
        msg = f"{path}: state of a training with another configuration ({shown}); use another folder"
        raise ValueError(msg)


def _as_json(value: Any) -> Any:  # noqa: ANN401
    import json

    return json.loads(json.dumps(value))


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:  # noqa: ANN401
    if not isinstance(value, Mapping):
        return {prefix.removesuffix("."): value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= _flat(inner, f"{prefix}{key}.")
    return flat
