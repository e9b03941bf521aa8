"""CryoRanker's losses: margin ranking over pairs plus cross-entropy on the clear-cut labels (paper, eq. 7-11)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

MARGIN = 0.2
"""Δ of eq. 8, the paper's value."""
ALPHA = 0.7
"""α of eq. 9, the paper's value."""


def margin_ranking_loss(
    scores: Float[Tensor, " b"], labels: Float[Tensor, " b"], margin: float = MARGIN
) -> Float[Tensor, ""]:
    """Return the mean of max(0, Δ − (ŷ_i − ŷ_j)) over all pairs of the batch with y_i > y_j.

    Equation 8 writes a sum; the mean over pairs keeps the balance with the cross-entropy independent of the batch
    size. A batch without such a pair gives 0.
    """
    is_better = labels[:, None] > labels[None, :]
    hinge = torch.relu(margin - (scores[:, None] - scores[None, :]))
    return (hinge * is_better).sum() / is_better.sum().clamp(min=1)


def clear_label_cross_entropy(
    scores: Float[Tensor, " b"], labels: Float[Tensor, " b"], alpha: float = ALPHA
) -> Float[Tensor, ""]:
    """Return the mean cross-entropy over labels above α (taken as 1) and at most 1 − α (taken as 0), eq. 9-10.

    Labels between take no part; a batch without a clear label gives 0.
    """
    is_good = labels > alpha
    is_clear = is_good | (labels <= 1.0 - alpha)
    entropy = torch.nn.functional.binary_cross_entropy(scores, is_good.to(scores.dtype), reduction="none")
    return (entropy * is_clear).sum() / is_clear.sum().clamp(min=1)


def ranking_loss(
    scores: Float[Tensor, " b"],
    labels: Float[Tensor, " b"],
    *,
    margin: float = MARGIN,
    alpha: float = ALPHA,
) -> Float[Tensor, ""]:
    """Return L_MR + L_CE (eq. 11) for scores in (0, 1) and labels in [0, 1]."""
    return margin_ranking_loss(scores, labels, margin) + clear_label_cross_entropy(scores, labels, alpha)
