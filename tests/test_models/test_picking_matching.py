"""Picks against truth: one to one, within a distance, and the area under precision and recall."""

from __future__ import annotations

import numpy as np
import pytest

from models.picking.matching import average_precision, is_away_from_border, judge_picks


def test_a_centre_is_found_once():
    picks = np.array([[10.0, 10.0], [11.0, 10.0], [40.0, 40.0]])
    truth = np.array([[10.0, 11.0], [80.0, 80.0]])
    judged = judge_picks(picks, np.array([3.0, 2.0, 1.0]), truth, np.ones(2, bool), tolerance_px=5.0)
    assert judged.is_right.tolist() == [True, False, False]
    assert judged.n_true == 2


def test_picks_of_centres_that_do_not_count_are_left_out():
    picks, truth = np.array([[1.0, 1.0], [50.0, 50.0]]), np.array([[0.0, 0.0], [50.0, 51.0]])
    judged = judge_picks(picks, np.array([2.0, 1.0]), truth, np.array([False, True]), tolerance_px=5.0)
    assert judged.scores.tolist() == [1.0]
    assert judged.is_right.tolist() == [True]
    assert judged.n_true == 1


def test_no_picks_and_no_truth_are_judged_too():
    none = judge_picks(
        np.zeros((0, 2)), np.zeros(0), np.array([[5.0, 5.0]]), np.ones(1, bool), tolerance_px=5.0
    )
    assert average_precision(none.scores, none.is_right, none.n_true) == 0.0
    false = judge_picks(
        np.array([[5.0, 5.0]]), np.ones(1), np.zeros((0, 2)), np.zeros(0, bool), tolerance_px=5.0
    )
    assert false.is_right.tolist() == [False]


def test_average_precision_is_the_hand_computed_value():
    # right, wrong, right of three true: 1/1 and 2/3 over three
    found = average_precision(np.array([3.0, 2.0, 1.0]), np.array([True, False, True]), 3)
    assert found == pytest.approx((1.0 + 2.0 / 3.0) / 3.0)


def test_border_is_half_a_particle():
    centres = np.array([[5.0, 50.0], [4.9, 50.0], [50.0, 95.0], [50.0, 94.9]])
    assert is_away_from_border(centres, (100, 100), 5.0).tolist() == [True, False, False, True]
