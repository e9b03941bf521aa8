"""The paper's evaluation of an encoder: k-NN scores on structure, pose and quality classes, and how well quality is ranked.

Quality is ranked by the model's own head where it has one, and always by a linear probe fitted on other structures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models.cryo_ief.encode import Encoded
from models.cryo_ief.neighbours import knn_accuracy, probe_quality, quality_classes
from models.cryoranker.dataset import LabelledParticles
from models.cryoranker.metrics import ScoreQuality, score_quality
from models.cryoranker.pose_sets import PosedParticles

Encoder = Callable[[NDArray[np.uint8]], Encoded]
"""From grey levels `(n, s, s)` to features and scores."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureQuality:
    """Figures of one model; k-NN scores are fractions of images (paper, eq. 1)."""

    knn_structure: float
    knn_pose: float
    """Mean over structures, each searched by itself."""
    knn_pose_by_structure: dict[str, float]
    knn_quality: float
    probe: ScoreQuality
    head: ScoreQuality | None


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedFeatures:
    """A model's figures with the features that they were computed on."""

    quality: FeatureQuality
    posed: NDArray[np.float32]
    labelled: NDArray[np.float32]


def judge_features(
    encode: Encoder,
    posed: PosedParticles,
    labelled: LabelledParticles,
    names: tuple[str, ...],
    *,
    k: int = 1,
) -> JudgedFeatures:
    """Judge a model on posed particles (structures called `names`) and on labelled picks."""
    views, picks = encode(posed.grey), encode(labelled.grey)
    pose = {
        name: knn_accuracy(views.features[is_it], posed.pose_class[is_it], k)
        for index, name in enumerate(names)
        for is_it in [posed.structure == index]
    }
    probe = probe_quality(picks.features, labelled.labels, labelled.structure)
    return JudgedFeatures(
        quality=FeatureQuality(
            knn_structure=knn_accuracy(views.features, posed.structure, k),
            knn_pose=float(np.mean(list(pose.values()))),
            knn_pose_by_structure=pose,
            knn_quality=knn_accuracy(picks.features, quality_classes(labelled.labels), k),
            probe=score_quality(probe.scores, labelled.labels[probe.rows], threshold=0.5),
            head=None if picks.scores is None else score_quality(picks.scores, labelled.labels),
        ),
        posed=views.features,
        labelled=picks.features,
    )


def majority_fraction(classes: NDArray[np.integer]) -> float:
    """Return the fraction of the largest class: what guessing it gives."""
    return float(np.bincount(classes).max() / len(classes))
