"""MoCo v3 as Cryo-IEF uses it: two encoders, a projector, a predictor, InfoNCE over the batch without a queue.

Module names give the key layout of a Cryo-IEF checkpoint (`base_encoder.`, `momentum_encoder.`, `predictor.`), which
`layouts.py` reads. Sources: Chen, Xie & He 2021 (MoCo v3, Algorithm 1); the paper's "Pre-training of Cryo-IEF".
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from models.cryo_ief.config import Head, VitConfig
from models.cryo_ief.vit import CryoVit
from models.workers import SharedBatchNorm, gather_rows, n_workers


@dataclass(frozen=True, slots=True, kw_only=True)
class MocoConfig:
    """The heads, temperature and momentum; the defaults are the paper's."""

    hidden: int = 4096
    dim: int = 256
    temperature: float = 0.5
    momentum: float = 0.99
    momentum_schedule: Literal["constant", "cosine"] = "constant"
    """`constant`: m as the paper states it. `cosine`: from m to 1 over the training, MoCo v3's option."""
    is_patch_embedding_frozen: bool = False
    """Leave the patch projection as it started: MoCo v3's remedy for unstable training. The paper does not say."""

    def __post_init__(self) -> None:
        if self.hidden < 1 or self.dim < 1:
            msg = f"moco.hidden, moco.dim: {self.hidden}, {self.dim}, must be 1 or more"
            raise ValueError(msg)
        if not self.temperature > 0.0:
            msg = f"moco.temperature: {self.temperature}, must be above 0"
            raise ValueError(msg)
        if not 0.0 <= self.momentum <= 1.0:
            msg = f"moco.momentum: {self.momentum}, must be in [0, 1]"
            raise ValueError(msg)


@dataclass(frozen=True, slots=True, kw_only=True)
class MocoStep:
    """The loss of one batch, and how often the nearest key is the query's own."""

    loss: Float[Tensor, ""]
    accuracy: Float[Tensor, ""]


class Moco(nn.Module):
    """Query encoder (trained), key encoder (its moving average) and predictor.

    Parameters
    ----------
    vit
        The encoder; its head has to be `Head.NONE`, because the projector takes that place.
    moco
        Heads, temperature, momentum.
    """

    def __init__(self, vit: VitConfig, moco: MocoConfig) -> None:
        super().__init__()
        if vit.head is not Head.NONE:
            msg = f"model.head: {vit.head.value}, pre-training needs an encoder without a head"
            raise ValueError(msg)
        self.moco = moco
        self.base_encoder = CryoVit(vit)
        self.base_encoder.head = _mlp((vit.width, moco.hidden, moco.hidden, moco.dim))
        self.predictor = _mlp((moco.dim, moco.hidden, moco.dim))
        if moco.is_patch_embedding_frozen:
            self.base_encoder.patch_embed.requires_grad_(requires_grad=False)
        self.momentum_encoder = copy.deepcopy(self.base_encoder).requires_grad_(requires_grad=False)

    def forward(
        self, view1: Float[Tensor, "b 1 s s"], view2: Float[Tensor, "b 1 s s"]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Return the symmetric loss L(q₁, k₂) + L(q₂, k₁) and the mean accuracy of both."""
        queries = [self.predictor(self.base_encoder(view)[1]) for view in (view1, view2)]
        with torch.no_grad():
            keys = [self.momentum_encoder(view)[1] for view in (view1, view2)]
        first = info_nce(queries[0], keys[1], self.moco.temperature)
        second = info_nce(queries[1], keys[0], self.moco.temperature)
        return first.loss + second.loss, 0.5 * (first.accuracy + second.accuracy)

    @torch.no_grad()
    def update_momentum_encoder(self, momentum: float) -> None:
        """Move the key encoder's weights: f_k ← m f_k + (1 − m) f_q. Batch statistics are its own."""
        pairs = zip(self.base_encoder.parameters(), self.momentum_encoder.parameters(), strict=True)
        for query, key in pairs:
            key.mul_(momentum).add_(query, alpha=1.0 - momentum)


def info_nce(query: Float[Tensor, "b c"], key: Float[Tensor, "b c"], temperature: float) -> MocoStep:
    """Return eq. 6 of the paper, averaged over queries: the own key against the keys of the batch (of all workers).

    As in MoCo v3 the loss is scaled by 2τ, which is 1 at the paper's τ of 0.5. No gradient passes to the keys.
    """
    query = nn.functional.normalize(query.float(), dim=1)
    keys = gather_rows(nn.functional.normalize(key.detach().float(), dim=1))
    logits = query @ keys.T / temperature
    own = _own_rows(len(query), query.device)
    loss = nn.functional.cross_entropy(logits, own) * (2.0 * temperature)
    accuracy = (logits.detach().argmax(1) == own).float().mean()
    return MocoStep(loss=loss, accuracy=accuracy)


def momentum_at(config: MocoConfig, progress: float) -> float:
    """Return m at a fraction of the training: constant, or 1 − (1 − m)(1 + cos πp)/2."""
    if config.momentum_schedule == "constant":
        return config.momentum
    return 1.0 - (1.0 - config.momentum) * 0.5 * (1.0 + math.cos(math.pi * progress))


def _own_rows(n: int, device: torch.device) -> Int[Tensor, " b"]:
    first = n * torch.distributed.get_rank() if n_workers() > 1 else 0
    return torch.arange(first, first + n, device=device)


def _mlp(widths: tuple[int, ...]) -> nn.Sequential:
    """Return linear layers without bias, each followed by BatchNorm, with ReLU between; the last norm has no weights."""
    layers: list[nn.Module] = []
    last = len(widths) - 2
    for index, (before, after) in enumerate(pairwise(widths)):
        layers.append(nn.Linear(before, after, bias=False))
        layers.append(SharedBatchNorm(after, affine=index < last))
        if index < last:
            layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)
