"""The Vision Transformer of Cryo-IEF and CryoRanker, built on timm.

It differs from timm's in two ways: BatchNorm over all tokens of the batch stands in front of each block's MLP where
a LayerNorm usually does, and the position embedding is a fixed two-dimensional sine-cosine, rows first, zero
for the CLS token. Module names give the released checkpoints' state-dict keys.
"""

from __future__ import annotations

from functools import partial
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from models.cryo_ief.config import Head, VitConfig
from models.cryo_ief.stem import ConvolutionalStem
from models.cryo_ief.timm_door import load_timm
from models.workers import SharedBatchNorm

_LAYER_NORM_EPS = 1e-6
_BATCH_NORM_EPS = 1e-5


class TokenBatchNorm(SharedBatchNorm):
    """BatchNorm of tokens `(b, n, c)`: one mean and variance per channel over all b·n tokens of all workers."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Normalise every channel over the batch's tokens (running statistics in evaluation)."""
        b, n, c = tokens.shape
        return super().forward(tokens.reshape(b * n, c)).reshape(b, n, c)


class SoftmaxHead(nn.Module):
    """CryoRanker v1's head: one linear layer to two logits; the score is the softmax's second entry."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(width, 2)

    def forward(self, cls_token: Float[Tensor, "b c"]) -> Float[Tensor, "b 2"]:
        """Return the two logits (poor, good)."""
        return cast("Tensor", self.linear1(cls_token))

    def score(self, logits: Float[Tensor, "b 2"]) -> Float[Tensor, " b"]:
        """Return the probability of being good, eq. 7 of the paper."""
        return torch.softmax(logits, dim=-1)[:, 1]


class SigmoidHead(nn.Module):
    """CryoRanker v1.5's head: LayerNorm and one linear layer to one logit."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=_LAYER_NORM_EPS)
        self.mlp_classifier = nn.Sequential(nn.Linear(width, 1))

    def forward(self, cls_token: Float[Tensor, "b c"]) -> Float[Tensor, "b 1"]:
        """Return the logit of being good."""
        return cast("Tensor", self.mlp_classifier(self.norm(cls_token)))

    def score(self, logits: Float[Tensor, "b 1"]) -> Float[Tensor, " b"]:
        """Return the probability of being good."""
        return torch.sigmoid(logits)[:, 0]


class CryoVit(nn.Module):
    """An encoder of particle images with an optional ranking head.

    Parameters
    ----------
    config
        Sizes, head and input statistics.
    """

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.config = config
        load_timm()
        from timm.models.vision_transformer import VisionTransformer

        vit = VisionTransformer(
            img_size=config.input_size_px,
            patch_size=config.patch_size_px,
            in_chans=1,
            num_classes=0,
            global_pool="token",
            embed_dim=config.width,
            depth=config.depth,
            num_heads=config.n_heads,
            mlp_ratio=config.mlp_ratio,
            qkv_bias=True,
            class_token=True,
            norm_layer=partial(nn.LayerNorm, eps=_LAYER_NORM_EPS),
            final_norm=config.head is not Head.SIGMOID1,
        )
        for block in vit.blocks:
            block.norm2 = TokenBatchNorm(config.width, eps=_BATCH_NORM_EPS, momentum=0.1)
        # The parts are held directly, not under `vit.`, so that keys are those of the released files.
        self.cls_token = cast("nn.Parameter", vit.cls_token)
        channels = config.stem_channels
        self.patch_embed: nn.Module = (
            ConvolutionalStem(channels, config.width) if channels else vit.patch_embed
        )
        self.blocks: nn.Sequential = vit.blocks
        self.norm: nn.Module = vit.norm
        position = sincos_position_embedding(config.input_size_px // config.patch_size_px, config.width)
        self.pos_embed = nn.Parameter(position, requires_grad=False)
        self.head: nn.Module = _build_head(config)

    def encode(self, particles: Float[Tensor, "b 1 s s"]) -> Float[Tensor, "b c"]:
        """Return the CLS token (after the final LayerNorm, where the layout has one)."""
        tokens = self.patch_embed(particles)
        cls_token = self.cls_token.expand(tokens.shape[0], -1, -1)
        tokens = torch.cat((cls_token, tokens), dim=1) + self.pos_embed
        return cast("Tensor", self.norm(self.blocks(tokens))[:, 0])

    def forward(
        self, particles: Float[Tensor, "b 1 s s"]
    ) -> tuple[Float[Tensor, "b c"], Float[Tensor, "b k"]]:
        """Return (CLS token, logits); an encoder without a head gives the token twice."""
        cls_token = self.encode(particles)
        return cls_token, self.head(cls_token)

    def score(self, logits: Float[Tensor, "b k"]) -> Float[Tensor, " b"]:
        """Return scores in [0, 1] from logits; raises where the model has no ranking head."""
        if not isinstance(self.head, SoftmaxHead | SigmoidHead):
            msg = f"model: {self.config.architecture}, has no ranking head and gives no score"
            raise ValueError(msg)  # noqa: TRY004 - the model's kind is a value here
        return self.head.score(logits)


def sincos_position_embedding(grid: int, width: int) -> Float[Tensor, "1 n c"]:
    """Return the fixed embedding `(1, 1 + grid², width)`; the CLS row is zero.

    Token n = grid·row + column holds [sin(row·ω), cos(row·ω), sin(column·ω), cos(column·ω)] with
    ω_d = 10000^(−d/(width/4)).
    """
    quarter = width // 4
    omega = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    index = torch.arange(grid, dtype=torch.float64)
    row, column = (axis.reshape(-1, 1) * omega for axis in torch.meshgrid(index, index, indexing="ij"))
    tokens = torch.cat((row.sin(), row.cos(), column.sin(), column.cos()), dim=1)
    return torch.cat((tokens.new_zeros(1, width), tokens)).float()[None]


def unit_feature(cls_token: Float[Tensor, "b c"]) -> Float[Tensor, "b c"]:
    """Return features of Euclidean length 1, normalised in float32."""
    return nn.functional.normalize(cls_token.float(), dim=-1)


def _build_head(config: VitConfig) -> nn.Module:
    if config.head is Head.SOFTMAX2:
        return SoftmaxHead(config.width)
    if config.head is Head.SIGMOID1:
        return SigmoidHead(config.width)
    return nn.Identity()
