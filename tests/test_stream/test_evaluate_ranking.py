"""`icestream evaluate ranking`: subsets of equal size, drawn as promised."""

import numpy as np
import pytest

from stream.commands.evaluate_ranking import _halves, subsets
from stream.records.errors import ConfigurationError

SCORES = np.array([0.9, np.nan, 0.1, 0.5, 0.7, 0.2, 0.8])


def test_best_and_worst_are_the_ends_of_the_ranking_and_random_ones_are_of_the_same_size():
    found = dict(subsets(SCORES, 3, 2, seed=0))
    assert found["best"].tolist() == [0, 4, 6]
    assert found["worst"].tolist() == [2, 3, 5]
    assert [len(found[f"random{i}"]) for i in (1, 2)] == [3, 3]
    assert found["random1"].tolist() != found["random2"].tolist()
    assert all(1 not in rows for rows in found.values())


def test_random_subsets_follow_from_the_seed():
    first, again = (dict(subsets(SCORES, 3, 1, seed=4)) for _ in range(2))
    assert first["random1"].tolist() == again["random1"].tolist()


def test_more_particles_than_are_scored_are_refused():
    with pytest.raises(ConfigurationError, match="particles-per-subset"):
        list(subsets(SCORES, 7, 1, seed=0))


def test_half_sets_are_equal_in_size():
    halves = _halves(501, seed=0)
    assert sorted(np.bincount(halves)[1:].tolist()) == [250, 251]
