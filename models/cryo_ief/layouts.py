"""Recognising a checkpoint by its keys, and loading it whole or not at all.

Four layouts are known: CryoRanker v1 (`head.linear1` with two outputs), CryoRanker v1.5 (`head.norm` and
`head.mlp_classifier.0`, no final norm), and Cryo-IEF with MoCo's `base_encoder.` prefix or bare. Sizes are read from the
tensors' shapes; `patch_embed.convolutions` tell icestream's convolutional stem from a patch embedding. A file that covers a part of the network is refused with the keys that are missing or unknown:
a silently half-loaded encoder gives plausible nonsense.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from math import isqrt
from typing import Any

from torch import Tensor

from models.cryo_ief.config import RELEASED_MEAN, RELEASED_STD, VIT_S_MEAN, VIT_S_STD, Head, VitConfig
from models.cryo_ief.vit import CryoVit

_MOCO_PREFIX = "base_encoder."
_MAX_LISTED = 12
# Attention's head count leaves no trace in the tensors: upstream's sizes and icestream's, by width.
_HEADS_BY_WIDTH = {96: 3, 128: 4, 192: 3, 384: 12, 768: 12, 1024: 16}


class Layout(Enum):
    """The known kinds of checkpoint."""

    RANKER_V1 = "cryoranker-v1"
    RANKER_V15 = "cryoranker-v1.5"
    CRYO_IEF_MOCO = "cryo-ief-moco"
    CRYO_IEF_BARE = "cryo-ief-bare"


_HEAD_OF = {
    Layout.RANKER_V1: Head.SOFTMAX2,
    Layout.RANKER_V15: Head.SIGMOID1,
    Layout.CRYO_IEF_MOCO: Head.NONE,
    Layout.CRYO_IEF_BARE: Head.NONE,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A network in evaluation mode with all its weights, and the layout they came in."""

    model: CryoVit
    layout: Layout


def detect_layout(tensors: Mapping[str, Tensor]) -> Layout:
    """Return the layout that the keys speak of, or raise naming what was found."""
    if any(key.startswith(_MOCO_PREFIX) for key in tensors):
        return Layout.CRYO_IEF_MOCO
    if "head.mlp_classifier.0.weight" in tensors:
        return Layout.RANKER_V15
    if "head.linear1.weight" in tensors:
        if "head.linear2.weight" in tensors:
            msg = "checkpoint: head.linear1 and head.linear2, the two-layer head was never released"
            raise ValueError(msg)
        return Layout.RANKER_V1
    if {"cls_token", "patch_embed.proj.weight", "norm.weight"} <= set(tensors):
        return Layout.CRYO_IEF_BARE
    msg = f"checkpoint: keys {_listed(sorted(tensors))}, none of the known layouts ({[v.value for v in Layout]})"
    raise ValueError(msg)


def config_from_tensors(
    tensors: Mapping[str, Tensor], layout: Layout, written: Mapping[str, Any] | None = None
) -> VitConfig:
    """Return the configuration: `written` (icestream's own files carry one) or as read from the shapes."""
    backbone = _backbone_tensors(tensors, layout)
    if written:
        config = VitConfig.from_dict(dict(written))
        if config.head is not _HEAD_OF[layout]:
            msg = f"checkpoint: head {config.head.value} in its metadata, but the keys are those of {layout.value}"
            raise ValueError(msg)
        return config
    try:
        width, _, patch, _ = backbone["patch_embed.proj.weight"].shape
        stem_channels = _stem_channels(backbone)
        patch = 2 ** len(stem_channels) if stem_channels else patch
        grid = isqrt(backbone["pos_embed"].shape[1] - 1)
        hidden = backbone["blocks.0.mlp.fc1.weight"].shape[0]
    except (KeyError, ValueError) as error:
        msg = f"checkpoint: {layout.value} without a readable patch_embed, pos_embed or blocks.0 ({error})"
        raise ValueError(msg) from error
    if width not in _HEADS_BY_WIDTH:
        msg = f"checkpoint: width {width}, known widths are {sorted(_HEADS_BY_WIDTH)}"
        raise ValueError(msg)
    mean, std = (VIT_S_MEAN, VIT_S_STD) if width == 384 else (RELEASED_MEAN, RELEASED_STD)
    return VitConfig(
        input_size_px=grid * patch,
        patch_size_px=patch,
        width=width,
        depth=1 + max((int(k.split(".")[1]) for k in backbone if k.startswith("blocks.")), default=-1),
        n_heads=_HEADS_BY_WIDTH[width],
        mlp_ratio=hidden / width,
        head=_HEAD_OF[layout],
        mean=mean,
        std=std,
        stem_channels=stem_channels,
    )


def load_model(tensors: Mapping[str, Tensor], written: Mapping[str, Any] | None = None) -> LoadedModel:
    """Build the network that a checkpoint's tensors describe and fill every one of its entries.

    Raises `ValueError` with the lists of missing, unknown and misshapen keys if anything is left over on either
    side. MoCo's projector, predictor and momentum encoder are known companions and are not loaded.
    """
    layout = detect_layout(tensors)
    model = CryoVit(config_from_tensors(tensors, layout, written))
    given = _backbone_tensors(tensors, layout)
    wanted = model.state_dict()
    missing = sorted(set(wanted) - set(given))
    unknown = sorted(set(given) - set(wanted))
    misshapen = sorted(k for k in set(wanted) & set(given) if wanted[k].shape != given[k].shape)
    if missing or unknown or misshapen:
        parts = (("missing", missing), ("unknown", unknown), ("misshapen", misshapen))
        found = "; ".join(f"{name}: {_listed(keys)}" for name, keys in parts if keys)
        msg = f"checkpoint: does not cover {layout.value} ({model.config.architecture}) exactly, {found}"
        raise ValueError(msg)
    model.load_state_dict(given, strict=True)
    return LoadedModel(model=model.eval(), layout=layout)


def _stem_channels(backbone: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Return the channels of a convolutional stem, none where the keys are those of a patch embedding."""
    channels: list[int] = []
    while (weight := backbone.get(f"patch_embed.convolutions.{len(channels)}.weight")) is not None:
        channels.append(int(weight.shape[0]))
    return tuple(channels)


def _backbone_tensors(tensors: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    if layout is Layout.CRYO_IEF_MOCO:
        stripped = {k.removeprefix(_MOCO_PREFIX): v for k, v in tensors.items() if k.startswith(_MOCO_PREFIX)}
        return {k: v for k, v in stripped.items() if not k.startswith("head.")}
    if layout is Layout.CRYO_IEF_BARE:
        return {
            k: v for k, v in tensors.items() if not k.startswith(("head.", "momentum_encoder.", "predictor."))
        }
    return dict(tensors)


def _listed(keys: list[str]) -> str:
    more = f" and {len(keys) - _MAX_LISTED} more" if len(keys) > _MAX_LISTED else ""
    return "[" + ", ".join(keys[:_MAX_LISTED]) + "]" + more
