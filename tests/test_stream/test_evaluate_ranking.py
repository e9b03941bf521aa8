"""`icestream evaluate ranking`: subsets of equal size, drawn as promised."""

import numpy as np
import pytest

from stream.commands.evaluate_ranking import SubsetFigures, _halves, random_spread, subsets
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


def _figures(subset: str, fsc: float) -> SubsetFigures:
    return SubsetFigures(
        subset=subset,
        particles=500,
        median_score=0.5,
        half_map_fsc_mean=fsc,
        half_map_resolution_angstrom=8.0,
        reference_fsc_mean=fsc,
        reference_resolution_angstrom=None,
        reference_correlation=fsc,
    )


def test_the_best_subset_is_set_against_mean_and_spread_of_random_ones():
    drawn = [_figures(f"random{i}", fsc) for i, fsc in enumerate((0.60, 0.62, 0.64), 1)]
    spread = random_spread([_figures("best", 0.63), *drawn, _figures("worst", 0.1)])["half_map_fsc_mean"]
    assert spread["mean"] == pytest.approx(0.62)
    assert spread["standard_deviation"] == pytest.approx(0.02)
    assert spread["best_above_mean"] == pytest.approx(0.01)
    assert spread["best_in_deviations"] == pytest.approx(0.5)
    assert (spread["beaten_by_best"], spread["subsets"]) == (2, 3)


def test_one_random_subset_has_no_spread():
    spread = random_spread([_figures("best", 0.7), _figures("random1", 0.6)])["reference_fsc_mean"]
    assert spread["standard_deviation"] is None
    assert spread["best_in_deviations"] is None
