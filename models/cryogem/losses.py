"""Where patches are compared, and how: mask-guided sampling, the contrastive loss (eq. 5, 6), the adversarial loss (eq. 7)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

NceForm = Literal["paper", "released", "unguided"]
GanForm = Literal["lsgan", "log"]

LEAST_PIXELS = 16
"""Fewer pixels of a label than this are not an object: the same few places would be drawn again and again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryPlaces:
    """Pixels `(n yx)` on particles and on the background."""

    particle: Int[Tensor, "p 2"]
    background: Int[Tensor, "b 2"]


def has_both_labels(mask: Bool[Tensor, "h w"], least_pixels: int = LEAST_PIXELS) -> bool:
    """Return whether a mask has enough pixels of either label to be sampled."""
    n_particle = int(mask.sum())
    return min(n_particle, mask.numel() - n_particle) >= least_pixels


def sample_places(mask: Bool[Tensor, "h w"], n_queries: int, generator: torch.Generator) -> QueryPlaces:
    """Draw `n_queries` pixels of each label, with replacement; raise ValueError where a label has too few pixels."""
    if not has_both_labels(mask):
        n = int(mask.sum())
        raise ValueError(
            f"mask: {n} of {mask.numel()} pixels are particle, need {LEAST_PIXELS} of particle and of background"
        )
    particle, background = (
        label.nonzero()[torch.randint(int(label.sum()), (n_queries,), generator=generator)]
        for label in (mask, ~mask)
    )
    return QueryPlaces(particle=particle, background=background)


def sample_anywhere(shape_yx: tuple[int, int], n_queries: int, generator: torch.Generator) -> QueryPlaces:
    """Draw twice `n_queries` pixels wherever they fall: the ablation without mask guidance."""
    flat = torch.randint(shape_yx[0] * shape_yx[1], (2 * n_queries,), generator=generator)
    places = torch.stack((torch.div(flat, shape_yx[1], rounding_mode="floor"), flat % shape_yx[1]), dim=1)
    return QueryPlaces(particle=places[:n_queries], background=places[n_queries:])


def contrast(
    anchors: Float[Tensor, "q c"],
    positives: Float[Tensor, "q c"],
    negatives: Float[Tensor, "k c"],
    temperature: float,
) -> Float[Tensor, " q"]:
    """Return ℓ of eq. 5 for each anchor: -log of its positive's share among itself and all negatives."""
    positive = (anchors * positives).sum(dim=1, keepdim=True)
    logits = torch.cat((positive, anchors @ negatives.T), dim=1) / temperature
    return -functional.log_softmax(logits, dim=1)[:, 0]


def contrast_released(
    anchors: Float[Tensor, "q c"],
    positives: Float[Tensor, "q c"],
    negatives: Float[Tensor, "q c"],
    temperature: float,
) -> Float[Tensor, " q"]:
    """Return the released code's variant: row i holds the positive of i, and negative i against *all* anchors."""
    if len(negatives) != len(anchors):
        raise ValueError(
            f"negatives: {len(negatives)}, the released form needs as many as anchors ({len(anchors)})"
        )
    positive = (anchors * positives).sum(dim=1, keepdim=True)
    logits = torch.cat((positive, negatives @ anchors.T), dim=1) / temperature
    return -functional.log_softmax(logits, dim=1)[:, 0]


def contrast_unguided(
    anchors: Float[Tensor, "q c"], positives: Float[Tensor, "q c"], temperature: float
) -> Float[Tensor, " q"]:
    """Return CUT's loss: an anchor's negatives are the positives of all other anchors, whatever lies there."""
    logits = anchors @ positives.T / temperature
    return -functional.log_softmax(logits, dim=1).diagonal()


def mask_nce_loss(
    source: list[Float[Tensor, "n c"]],
    output: list[Float[Tensor, "n c"]],
    n_particle: int,
    *,
    temperature: float = 0.07,
    form: NceForm = "paper",
) -> Float[Tensor, ""]:
    """Return L_MaskNCE of eq. 6, from vectors of the source z and of the output ẑ, level by level.

    The first `n_particle` rows lie on particles, the rest on background. For p on a particle the anchor is z^p, the
    positive ẑ^p, the negatives all ẑ^b; and the reverse. Sums over queries and levels are means here, and the two
    directions are averaged, as in the released code: λ = 10 belongs to that scale.
    """
    losses = []
    for z, z_hat in zip(source, output, strict=True):
        if form == "unguided":
            losses.append(contrast_unguided(z, z_hat, temperature).mean())
            continue
        of: Callable[..., Tensor] = contrast if form == "paper" else contrast_released
        on, off = slice(0, n_particle), slice(n_particle, None)
        particle = of(z[on], z_hat[on], z_hat[off], temperature).mean()
        background = of(z[off], z_hat[off], z_hat[on], temperature).mean()
        losses.append(0.5 * (particle + background))
    return torch.stack(losses).mean()


def discriminator_loss(real: Tensor, fake: Tensor, form: GanForm) -> Float[Tensor, ""]:
    """Return what the discriminator minimises; `real` and `fake` are its logits.

    `lsgan` is ½ [(D(real) - 1)² + D(fake)²] (Mao et al. 2017, and the released code); `log` is minus eq. 7's first line,
    halved likewise.
    """
    if form == "lsgan":
        return 0.5 * ((real - 1.0).square().mean() + fake.square().mean())
    return 0.5 * (functional.softplus(-real).mean() + functional.softplus(fake).mean())


def generator_loss(fake: Tensor, form: GanForm) -> Float[Tensor, ""]:
    """Return what the generator minimises: (D(fake) - 1)², or log(1 - D(fake)) as printed."""
    if form == "lsgan":
        return (fake - 1.0).square().mean()
    return -functional.softplus(fake).mean()
