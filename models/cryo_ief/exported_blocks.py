"""Blocks as they are exported: the same function with less work, and with more digits where int8 needs them.

The score and the feature are read from the CLS token alone. So the last block need not compute the other tokens' rows
(`LastBlock`), and in int8 the CLS token's own row decides about the ranks: the patches' rounding averages out in the attention,
the CLS token's does not. `ClsInTwoDigits` gives that one row 15 bits at the price of three rows of 257.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

_STEPS = 127
"""Steps of int8 on either side of 0."""


class LastBlock(nn.Module):
    """A Transformer block of timm's, in evaluation, of which only the CLS token's row is computed.

    Keys and values come from all tokens; query, projection and MLP from one: ten twelfths of the block's products less.
    """

    def __init__(self, block: Any) -> None:  # noqa: ANN401 - timm's blocks have no types
        super().__init__()
        width = block.attn.proj.in_features
        self.n_heads = int(block.attn.num_heads)
        self.norm1, self.norm2 = block.norm1, block.norm2
        self.query, self.key_value = nn.Linear(width, width), nn.Linear(width, 2 * width)
        with torch.no_grad():
            for part, rows in ((self.query, slice(0, width)), (self.key_value, slice(width, None))):
                part.weight.copy_(block.attn.qkv.weight[rows])
                part.bias.copy_(block.attn.qkv.bias[rows])
        self.proj, self.mlp = block.attn.proj, block.mlp

    def forward(self, tokens: Float[Tensor, "b t c"]) -> Float[Tensor, "b 1 c"]:
        """Return the CLS token after the block."""
        n, t, width = tokens.shape
        shape = (self.n_heads, width // self.n_heads)
        seen = self.norm1(tokens)
        query = self.query(seen[:, :1]).reshape(n, 1, *shape).transpose(1, 2)
        key_value = self.key_value(seen).reshape(n, t, 2, *shape).permute(2, 0, 3, 1, 4)
        key, value = key_value.unbind(0)
        found = nn.functional.scaled_dot_product_attention(query, key, value)
        first = tokens[:, :1] + self.proj(found.transpose(1, 2).reshape(n, 1, width))
        return first + self.mlp(self.norm2(first))


class TwoDigitLinear(nn.Module):
    """A linear layer whose dynamic int8 product sees its input in two digits, 127 and 127 · 254 steps from 0.

    Row one is the input rounded to the steps that the quantiser will take, row two 254 times what is left, and row three
    only fixes the range, so that those steps are the quantiser's. In float32 it is the layer itself, up to rounding.
    """

    range_row: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        range_row = torch.zeros(1, 1, linear.in_features)
        range_row[..., 0], range_row[..., 1] = -_STEPS - 1, _STEPS
        self.register_buffer("range_row", range_row)

    def forward(self, row: Float[Tensor, "b 1 c"]) -> Float[Tensor, "b 1 d"]:
        """Return the layer's output."""
        widest = row.abs().amax(dim=2, keepdim=True).amax(dim=0, keepdim=True)
        step = (widest / _STEPS).clamp(min=1e-12)
        coarse = torch.round(row / step) * step
        fine = (row - coarse) * (2 * _STEPS)
        limits = (self.range_row * step).expand(row.shape[0], -1, -1)
        products = nn.functional.linear(torch.cat((coarse, fine, limits), dim=1), self.linear.weight)
        return products[:, :1] + products[:, 1:2] / (2 * _STEPS) + self.linear.bias


class ClsInTwoDigits(nn.Module):
    """A linear layer that takes the CLS token's row in two digits and the other tokens' as they are."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.others = linear
        self.first = TwoDigitLinear(linear)

    def forward(self, tokens: Float[Tensor, "b t c"]) -> Float[Tensor, "b t d"]:
        """Return the layer's output."""
        return torch.cat((self.first(tokens[:, :1]), self.others(tokens[:, 1:])), dim=1)


class ClsAwareMlp(nn.Module):
    """timm's MLP with the CLS token's row in two digits through both layers."""

    def __init__(self, mlp: Any) -> None:  # noqa: ANN401 - timm's blocks have no types
        super().__init__()
        self.mlp = mlp
        self.fc1, self.fc2 = TwoDigitLinear(mlp.fc1), TwoDigitLinear(mlp.fc2)

    def forward(self, tokens: Float[Tensor, "b t c"]) -> Float[Tensor, "b t c"]:
        """Return the MLP's output."""
        first = self.fc2(self.mlp.act(self.fc1(tokens[:, :1])))
        return torch.cat((first, self.mlp(tokens[:, 1:])), dim=1)


def prune_last_block(blocks: Any) -> None:  # noqa: ANN401 - timm's blocks have no types
    """Replace the last of a network's blocks by one that computes the CLS token alone."""
    blocks[-1] = LastBlock(blocks[-1])


def refine_cls_token(blocks: Any) -> None:  # noqa: ANN401 - as above
    """Let the CLS token pass through every MLP and projection in two digits; the last block is pruned already."""
    for block in blocks[:-1]:
        block.mlp = ClsAwareMlp(block.mlp)
        block.attn.proj = ClsInTwoDigits(block.attn.proj)
    last = blocks[-1]
    last.query, last.proj = TwoDigitLinear(last.query), TwoDigitLinear(last.proj)
    last.mlp.fc1, last.mlp.fc2 = TwoDigitLinear(last.mlp.fc1), TwoDigitLinear(last.mlp.fc2)
