"""How well scores tell good particles from bad: AUC, average precision, rank correlations (paper's definitions)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreQuality:
    """Figures of one set of scores; counts at a threshold give its confusion table."""

    auc: float
    ap: float
    spearman: float
    pearson: float
    n_good: int
    n_bad: int
    good_accepted: float
    """Fraction of good particles with a score above the threshold."""
    bad_accepted: float
    """Fraction of bad ones above it."""


def roc_auc(scores: NDArray[np.floating], is_good: NDArray[np.bool_]) -> float:
    """Return the probability that a good particle outscores a bad one, ties counting half."""
    n_good, n_bad = int(is_good.sum()), int((~is_good).sum())
    if not n_good or not n_bad:
        msg = f"is_good: {n_good} good and {n_bad} bad, AUC needs both"
        raise ValueError(msg)
    ranks = stats.rankdata(scores)
    return float((ranks[is_good].sum() - n_good * (n_good + 1) / 2) / (n_good * n_bad))


def average_precision(scores: NDArray[np.floating], is_good: NDArray[np.bool_]) -> float:
    """Return the area under the precision-recall steps: Σ (R_k − R_{k−1}) P_k over distinct thresholds."""
    if not is_good.any():
        msg = "is_good: 0 good, average precision needs one"
        raise ValueError(msg)
    if is_good.all():
        return 1.0
    curves = threshold_curves(scores, is_good)
    return float(np.sum(np.diff(curves.recall, prepend=0.0) * curves.precision))


@dataclass(frozen=True, slots=True, kw_only=True)
class ThresholdCurves:
    """What accepting everything at or above each distinct score gives, from the strictest threshold on."""

    threshold: NDArray[np.float64]
    precision: NDArray[np.float64]
    recall: NDArray[np.float64]
    false_positive_rate: NDArray[np.float64]


def threshold_curves(scores: NDArray[np.floating], is_good: NDArray[np.bool_]) -> ThresholdCurves:
    """Return precision, recall (the ROC's true positive rate) and false positive rate at every threshold."""
    n_good, n_bad = int(is_good.sum()), int((~is_good).sum())
    if not n_good or not n_bad:
        msg = f"is_good: {n_good} good and {n_bad} bad, the curves need both"
        raise ValueError(msg)
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(is_good[order])
    last = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))
    hits = hits[last]
    return ThresholdCurves(
        threshold=np.asarray(scores[order][last], np.float64),
        precision=hits / (last + 1),
        recall=hits / n_good,
        false_positive_rate=(last + 1 - hits) / n_bad,
    )


def score_quality(
    scores: NDArray[np.floating],
    labels: NDArray[np.floating],
    *,
    good_above: float = 0.7,
    bad_up_to: float = 0.3,
    threshold: float = 0.4,
) -> ScoreQuality:
    """Judge scores by labels in [0, 1]: AUC, AP and acceptance on the clear ones, correlations on all."""
    is_clear = (labels > good_above) | (labels <= bad_up_to)
    is_good = labels[is_clear] > good_above
    clear = scores[is_clear]
    is_constant = np.ptp(scores) == 0 or np.ptp(labels) == 0
    return ScoreQuality(
        auc=roc_auc(clear, is_good),
        ap=average_precision(clear, is_good),
        spearman=float("nan") if is_constant else float(stats.spearmanr(scores, labels).statistic),
        pearson=float("nan") if is_constant else float(stats.pearsonr(scores, labels).statistic),
        n_good=int(is_good.sum()),
        n_bad=int((~is_good).sum()),
        good_accepted=float((clear[is_good] > threshold).mean()),
        bad_accepted=float((clear[~is_good] > threshold).mean()),
    )
