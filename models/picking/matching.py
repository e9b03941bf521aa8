"""Picks against known centres: which are right, and the area under the precision-recall curve."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

TOLERANCE_DIAMETERS = 0.35
"""A pick is right within this many diameters of a centre: nearer than the neighbour of a touching particle."""

FloatArray = NDArray[np.floating]


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedPicks:
    """Scores of the picks that count, and whether each is right; how many centres could be found."""

    scores: FloatArray
    is_right: NDArray[np.bool_]
    n_true: int


def judge_picks(
    centres_yx_px: FloatArray,
    scores: FloatArray,
    truth_yx_px: FloatArray,
    is_counted: NDArray[np.bool_],
    *,
    tolerance_px: float,
) -> JudgedPicks:
    """Match picks and true centres one to one within a distance; picks of centres that do not count are left out."""
    is_right = np.zeros(len(scores), dtype=bool)
    is_ranked = np.ones(len(scores), dtype=bool)
    if len(truth_yx_px) and len(scores):
        distance = np.linalg.norm(centres_yx_px[:, None] - truth_yx_px[None], axis=-1)
        rows, columns = linear_sum_assignment(np.where(distance <= tolerance_px, distance, 1e6))
        good = distance[rows, columns] <= tolerance_px
        is_right[rows[good]] = is_counted[columns[good]]
        is_ranked[rows[good]] = is_counted[columns[good]]
    return JudgedPicks(scores=scores[is_ranked], is_right=is_right[is_ranked], n_true=int(is_counted.sum()))


def is_away_from_border(
    centres_yx_px: FloatArray, shape_yx: tuple[int, int], margin_px: float
) -> NDArray[np.bool_]:
    """Return which centres have the margin to every edge: a particle that the edge cuts is no fair truth."""
    limits = np.asarray(shape_yx) - margin_px
    return np.asarray(((centres_yx_px >= margin_px) & (centres_yx_px < limits)).all(axis=1))


def average_precision(scores: FloatArray, is_right: NDArray[np.bool_], n_true: int) -> float:
    """Return the area under the precision-recall curve (mean precision at each right pick, missed ones count 0)."""
    order = np.argsort(-scores, kind="stable")
    right = is_right[order]
    precision = np.cumsum(right) / np.arange(1, len(right) + 1)
    return float(precision[right].sum() / max(n_true, 1))
