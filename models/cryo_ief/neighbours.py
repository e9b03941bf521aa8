"""How much features know: the paper's k-NN score (eq. 1), and a linear probe of quality.

Everything is leave-one-out or split by structure, so no image votes for itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Integer
from numpy.typing import NDArray

_ROWS_AT_ONCE = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeScores:
    """A linear probe's scores of the images it was not fitted on; `rows` says which images those are."""

    rows: NDArray[np.int64]
    scores: NDArray[np.float64]


def knn_accuracy(
    features: Float[NDArray[np.floating], "n d"], classes: Integer[NDArray[np.integer], " n"], k: int = 1
) -> float:
    """Return the fraction of images whose class is the majority's among their `k` nearest others.

    Nearest by the angle between features. A tie goes to the class whose nearest member is nearest.
    """
    n = len(features)
    if n != len(classes) or not 1 <= k < n:
        msg = f"k: {k} of {n} features and {len(classes)} classes, must be 1 or more and below the number of images"
        raise ValueError(msg)
    unit = unit_rows(features)
    n_right = 0
    for first in range(0, n, _ROWS_AT_ONCE):
        rows = np.arange(first, min(first + _ROWS_AT_ONCE, n))
        similarity = unit[rows] @ unit.T
        similarity[np.arange(len(rows)), rows] = -np.inf
        if k == 1:
            votes = classes[similarity.argmax(axis=1)]
        else:
            nearest = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
            votes = np.array([_majority(classes[row]) for row in nearest])
        n_right += int((votes == classes[rows]).sum())
    return n_right / n


def quality_classes(labels: NDArray[np.floating]) -> NDArray[np.int64]:
    """Return 2 for labels above 0.7, 0 for those below 0.3, 1 between (the paper's three quality classes)."""
    return np.where(labels > 0.7, 2, np.where(labels < 0.3, 0, 1)).astype(np.int64)


def probe_quality(
    features: Float[NDArray[np.floating], "n d"],
    labels: Float[NDArray[np.floating], " n"],
    groups: Integer[NDArray[np.integer], " n"],
) -> ProbeScores:
    """Score half of the groups (structures) by a logistic regression fitted on the clear labels of the other half.

    Clear labels are those above 0.7 and up to 0.3. Features are standardised on the half that is fitted.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    is_fitted = np.isin(groups, np.unique(groups)[::2])
    is_clear = (labels > 0.7) | (labels <= 0.3)
    fitted = is_fitted & is_clear
    good = labels[fitted] > 0.7
    if not good.any() or good.all() or is_fitted.all():
        msg = f"labels: {int(good.sum())} good of {int(fitted.sum())} clear ones, a probe needs both in two structures"
        raise ValueError(msg)
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=3000, C=0.1))
    unit = unit_rows(features)
    classifier.fit(unit[fitted], good)
    rows = np.flatnonzero(~is_fitted)
    return ProbeScores(rows=rows, scores=np.asarray(classifier.predict_proba(unit[rows])[:, 1]))


def unit_rows(features: NDArray[np.floating]) -> NDArray[np.float32]:
    """Return features of Euclidean length 1; one of length 0 stays."""
    values = np.asarray(features, np.float32)
    length = np.linalg.norm(values, axis=1, keepdims=True)
    return np.asarray(values / np.where(length > 0.0, length, 1.0))


def _majority(votes: NDArray[np.integer]) -> int:
    values, counts = np.unique(votes, return_counts=True)
    best = set(values[counts == counts.max()].tolist())
    return next(int(vote) for vote in votes if int(vote) in best)
