"""Losses and metrics against values computed by hand."""

import math

import numpy as np
import pytest
import torch

from models.cryoranker.losses import clear_label_cross_entropy, margin_ranking_loss, ranking_loss
from models.cryoranker.metrics import average_precision, roc_auc, score_quality


def test_margin_loss_equals_the_hand_computed_value():
    scores = torch.tensor([0.9, 0.8, 0.3])
    labels = torch.tensor([1.0, 0.5, 0.0])
    # Pairs (better, worse): (0,1): 0.2 - 0.1 = 0.1; (0,2): 0.2 - 0.6 < 0; (1,2): 0.2 - 0.5 < 0. Mean of three.
    assert float(margin_ranking_loss(scores, labels)) == pytest.approx(0.1 / 3)


def test_margin_loss_of_a_reversed_pair_grows_with_the_reversal():
    loss = margin_ranking_loss(torch.tensor([0.1, 0.7]), torch.tensor([1.0, 0.0]))
    assert float(loss) == pytest.approx(0.2 + 0.6)


def test_margin_loss_without_a_ranked_pair_is_zero():
    assert float(margin_ranking_loss(torch.tensor([0.1, 0.9]), torch.tensor([0.5, 0.5]))) == 0.0


def test_cross_entropy_takes_clear_labels_alone():
    scores = torch.tensor([0.8, 0.5, 0.25, 0.6])
    labels = torch.tensor([0.71, 0.7, 0.3, 0.31])
    # 0.71 > α counts as 1; 0.3 <= 1 - α as 0; 0.7 and 0.31 lie between.
    expected = (-math.log(0.8) - math.log(0.75)) / 2
    assert float(clear_label_cross_entropy(scores, labels)) == pytest.approx(expected, rel=1e-6)


def test_total_loss_is_the_sum_of_both():
    scores, labels = torch.tensor([0.6, 0.55]), torch.tensor([1.0, 0.0])
    expected = (0.2 - 0.05) + (-math.log(0.6) - math.log(0.45)) / 2
    assert float(ranking_loss(scores, labels)) == pytest.approx(expected, rel=1e-6)


def test_gradient_pushes_good_up_and_bad_down():
    scores = torch.tensor([0.5, 0.5], requires_grad=True)
    ranking_loss(scores, torch.tensor([1.0, 0.0])).backward()
    assert scores.grad[0] < 0 < scores.grad[1]


def test_auc_counts_ordered_pairs_and_halves_ties():
    scores = np.array([0.9, 0.5, 0.5, 0.1])
    is_good = np.array([True, True, False, False])
    # Pairs: 0.9 beats both; 0.5 ties one, beats one: (1 + 1 + 0.5 + 1) / 4.
    assert roc_auc(scores, is_good) == pytest.approx(0.875)


def test_average_precision_equals_the_hand_computed_value():
    scores = np.array([0.9, 0.8, 0.7, 0.6])
    is_good = np.array([True, False, True, False])
    assert average_precision(scores, is_good) == pytest.approx(0.5 * 1.0 + 0.5 * 2 / 3)


def test_metrics_agree_with_scikit_learn():
    sklearn_metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    is_good = rng.random(300) < 0.4
    scores = np.round(rng.normal(size=300) + is_good, 1)
    assert roc_auc(scores, is_good) == pytest.approx(sklearn_metrics.roc_auc_score(is_good, scores))
    assert average_precision(scores, is_good) == pytest.approx(
        sklearn_metrics.average_precision_score(is_good, scores)
    )


def test_quality_counts_acceptance_at_the_threshold():
    quality = score_quality(np.array([0.9, 0.3, 0.5, 0.1]), np.array([1.0, 1.0, 0.0, 0.0]), threshold=0.4)
    assert (quality.good_accepted, quality.bad_accepted) == (0.5, 0.5)
    assert (quality.n_good, quality.n_bad) == (2, 2)


def test_auc_needs_both_classes():
    with pytest.raises(ValueError, match="needs both"):
        roc_auc(np.array([0.1, 0.2]), np.array([True, True]))
