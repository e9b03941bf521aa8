"""Dose weighting after Grant & Grigorieff 2015."""

import math

import pytest
import torch

from models.motion.dose import accumulated_exposures, critical_exposure, dose_weight, noise_normalisation


def test_critical_exposure_follows_the_published_formula_at_300_kv():
    k = torch.tensor([0.05, 0.1, 1 / 3.0])
    expected = [0.24499 * f**-1.6649 + 2.8141 for f in k.tolist()]
    assert critical_exposure(k, 300.0).tolist() == pytest.approx(expected, rel=1e-5)


def test_critical_exposure_is_a_fifth_smaller_at_200_kv():
    k = torch.tensor([0.02, 0.2])
    ratio = critical_exposure(k, 200.0) / critical_exposure(k, 300.0)
    assert ratio.tolist() == pytest.approx([0.8, 0.8], rel=1e-6)


def test_dose_weight_is_one_over_e_at_twice_the_critical_exposure():
    assert float(dose_weight(torch.tensor([7.0]), 14.0)[0]) == pytest.approx(math.exp(-1), rel=1e-6)


def test_exposures_count_to_the_end_of_each_frame_and_include_the_pre_exposure():
    assert accumulated_exposures(4, 8.0, 3.0).tolist() == [5.0, 7.0, 9.0, 11.0]


def test_weights_times_normalisation_keep_the_noise_power_of_the_plain_sum():
    k = torch.linspace(0.0, 0.5, 50)
    critical = critical_exposure(k, 300.0)
    exposures = accumulated_exposures(20, 40.0, 0.0)
    norm = noise_normalisation(critical, exposures)
    power = sum((dose_weight(critical, float(n)) * norm).square() for n in exposures)
    assert torch.allclose(power, torch.full_like(power, 20.0), rtol=1e-4)


def test_normalisation_leaves_zero_frequency_alone():
    critical = critical_exposure(torch.tensor([0.0]), 300.0)
    norm = noise_normalisation(critical, accumulated_exposures(10, 30.0, 0.0))
    assert float(norm[0]) == pytest.approx(1.0, abs=1e-3)
