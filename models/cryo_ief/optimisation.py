"""What Cryo-IEF's and CryoRanker's trainings share: the start of a small network, AdamW, the learning rate's course."""

from __future__ import annotations

import math

import torch
from torch import nn

from models.cryo_ief.vit import CryoVit


def build_optimiser(
    model: nn.Module, *, learning_rate: float, weight_decay: float, betas: tuple[float, float]
) -> torch.optim.Optimizer:
    """Return AdamW over what is trained; norms, biases and the CLS token are not decayed."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decayed = [p for name, p in trained if p.ndim > 1 and not name.endswith("cls_token")]
    others = [p for name, p in trained if p.ndim <= 1 or name.endswith("cls_token")]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas)


def set_learning_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """Give every group of the optimiser this rate."""
    for group in optimiser.param_groups:
        group["lr"] = rate


def prepare_start(model: CryoVit) -> None:
    """Give a small network initial weights that a short training on noisy images can use.

    The patch embedding's filters become a patch's 2-D cosines, lowest frequencies first and strongest: at the particles'
    signal-to-noise ratios a random filter sees noise alone. Linear layers get Xavier's scale, because the usual
    0.02 leaves the branches of a narrow network nearly silent. Filters beyond the patch's pixels stay random, and so does a
    convolutional stem.
    """
    if not model.config.stem_channels:
        _start_from_cosines(model)
    for module in model.blocks.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)


def _start_from_cosines(model: CryoVit) -> None:
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
