"""Features and scores of grey-level images from a network in torch, in evaluation mode."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy.typing import NDArray

from models.cryo_ief.config import Head
from models.cryo_ief.vit import CryoVit, unit_feature


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """Unit-length features, and scores where the model has a ranking head."""

    features: Float[NDArray[np.float32], "n d"]
    scores: Float[NDArray[np.float32], " n"] | None


def encode_grey(model: CryoVit, grey: UInt8[NDArray[np.uint8], "n s s"], *, batch_size: int = 256) -> Encoded:
    """Return features and scores of grey levels at the model's input size; the model's mode is left as it was."""
    was_training, device = model.training, model.cls_token.device
    model.eval()
    features, scores = [np.zeros((0, model.config.width), np.float32)], [np.zeros(0, np.float32)]
    with torch.inference_mode():
        for first in range(0, len(grey), batch_size):
            images = torch.from_numpy(grey[first : first + batch_size]).float()[:, None] / 255.0
            cls_token, logits = model(((images - model.config.mean) / model.config.std).to(device))
            features.append(unit_feature(cls_token).cpu().numpy())
            if model.config.head is not Head.NONE:
                scores.append(model.score(logits).cpu().numpy())
    model.train(was_training)
    has_scores = model.config.head is not Head.NONE
    return Encoded(features=np.concatenate(features), scores=np.concatenate(scores) if has_scores else None)
