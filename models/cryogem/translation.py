"""From I_phy to a synthetic micrograph (eq. 4): noise, the 150/40 rule, the generator; and generators as files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from models.cryogem.greys import scale_to_network_range
from models.cryogem.networks import NetworkSettings, UnetGenerator
from models.cryogem.physics import PhysicsSettings, PhysicsStage
from models.weights import load_checkpoint, save_checkpoint

_FORMAT = "icestream-cryogem-generator-1"


def add_input_noise(
    image: Float[Tensor, "h w"], frame_mean: float, stage: PhysicsStage, generator: torch.Generator
) -> Float[Tensor, "h w"]:
    """Return the generator's input: I_phy with zero-mean white Gaussian noise, in the networks' range.

    `image` is a frame or a part of one; `frame_mean` is the whole frame's, and the deviation is the session's, so that a
    crop in thick ice stays darker than one in thin ice.
    """
    noisy = image + stage.noise_sd * torch.randn(image.shape, generator=generator)
    sd = stage.noise_sd * math.sqrt(1.0 + stage.snr)
    return scale_to_network_range(noisy, mean=frame_mean, sd=sd)


@torch.inference_mode()
def translate(network: UnetGenerator, image: Float[Tensor, "h w"]) -> Float[Tensor, "h w"]:
    """Return a whole frame translated; it is mirrored at its end to the multiple of pixels that the network needs."""
    height, width = (int(n) for n in image.shape)
    multiple = network.settings.multiple_px
    rows, columns = (_mirrored(n, n + -n % multiple) for n in (height, width))
    padded = image[rows][:, columns]
    device = next(network.parameters()).device
    return network(padded[None, None].to(device))[0, 0, :height, :width].float().cpu()


def _mirrored(size: int, new_size: int) -> Tensor:
    """Return indices 0 … size - 1, then back to 0, and so on, `new_size` in all."""
    period = max(1, 2 * size - 2)
    place = torch.arange(new_size) % period
    return torch.where(place < size, place, period - place)


def save_generator(
    path: Path, network: UnetGenerator, physics: PhysicsSettings, extra: Mapping[str, Any]
) -> str:
    """Write a generator with its sizes and the physics it was trained on; return the SHA-256."""
    metadata = {
        **extra,
        "format": _FORMAT,
        "network": asdict(network.settings),
        "physics": asdict(physics),
    }
    return save_checkpoint(path, network.state_dict(), metadata)


def load_generator(path: Path) -> tuple[UnetGenerator, PhysicsSettings]:
    """Read a generator for inference; raise ValueError for anything else."""
    loaded = load_checkpoint(path)
    if loaded.metadata.get("format") != _FORMAT:
        raise ValueError(f"{path}: format {loaded.metadata.get('format')!r}, must be {_FORMAT!r}")
    network = UnetGenerator(network_settings_from(loaded.metadata["network"]))
    network.load_state_dict(dict(loaded.tensors), strict=True)
    return network.eval().requires_grad_(requires_grad=False), physics_settings_from(
        loaded.metadata["physics"]
    )


def network_settings_from(values: Mapping[str, Any]) -> NetworkSettings:
    """Return settings as JSON gives them back."""
    return NetworkSettings(**{**values, "nce_levels": tuple(values["nce_levels"])})


def physics_settings_from(values: Mapping[str, Any]) -> PhysicsSettings:
    """Return settings as JSON gives them back."""
    weights = values["conformation_weights"]
    return PhysicsSettings(**{**values, "conformation_weights": None if weights is None else tuple(weights)})
