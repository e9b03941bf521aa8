"""Distances with known values, and noise baselines that find the noise they are fitted to."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from models.cryogem.baselines import NOISE_MODELS, add_noise, fit_noise
from models.cryogem.evaluation import (
    content_correlation,
    cut_patches,
    frechet_distance,
    measure_distances,
    patch_distance,
    ranker_features,
    spectrum_distance,
)
from models.cryogem.greys import measure_greys, to_network_range
from models.fourier.filters import smooth_gaussian


def white(seed: int, n: int = 256) -> torch.Tensor:
    return torch.randn(n, n, generator=torch.Generator().manual_seed(seed))


def structure(seed: int, n: int = 256) -> torch.Tensor:
    smooth = smooth_gaussian(white(seed, n), 4.0)
    return smooth / smooth.std()


def test_frechet_distance_of_gaussians_is_the_closed_form():
    rng = np.random.default_rng(1)
    a = rng.normal(size=(40_000, 2)) * [1.0, 2.0]
    b = rng.normal(size=(40_000, 2)) * [3.0, 2.0] + [1.0, -1.0]
    # means 1² + 1², deviations (1 - 3)² + 0
    assert frechet_distance(a, b) == pytest.approx(6.0, rel=0.03)
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-9)


def test_frechet_distance_knows_correlation():
    rng = np.random.default_rng(2)
    a = rng.normal(size=(40_000, 2))
    mixed = a @ np.array([[1.0, 0.8], [0.0, 0.6]])
    # rotated covariances with eigenvalues 1.8 and 0.2 against the identity
    expected = 2 + 2 - 2 * (1.8**0.5 + 0.2**0.5)
    assert frechet_distance(a, mixed) == pytest.approx(expected, rel=0.05)


def test_frechet_distance_of_fewer_vectors_than_dimensions_is_the_formula():
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(6, 9)), rng.normal(size=(5, 9)) * 2.0 + 0.3
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    roots = np.sqrt(np.clip(np.linalg.eigvals(first @ second).real, 0.0, None)).sum()
    shift = np.square(a.mean(0) - b.mean(0)).sum()
    expected = shift + np.trace(first) + np.trace(second) - 2.0 * roots
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-5)


def test_frechet_distance_refuses_what_is_not_finite():
    with pytest.raises(ValueError, match="b: shape"):
        frechet_distance(np.zeros((3, 2)), np.array([[np.nan, 1.0], [1.0, 1.0]]))


def test_spectrum_distance_is_the_log_ratio():
    images = [white(i) for i in range(3)]
    louder = [image * np.exp(0.25) for image in images]
    assert spectrum_distance(images, louder) == pytest.approx(0.5, abs=1e-5)
    assert spectrum_distance(images, images) == pytest.approx(0.0, abs=1e-9)


def test_distances_of_two_draws_are_small_and_of_other_noise_large():
    real = [to_network_range(white(i) + structure(10 + i)) for i in range(4)]
    same = [to_network_range(white(20 + i) + structure(30 + i)) for i in range(4)]
    other = [to_network_range(white(40 + i) + 0.2 * structure(50 + i)) for i in range(4)]
    assert spectrum_distance(real, other) > 5 * spectrum_distance(real, same)
    assert patch_distance(real, other) > 5 * patch_distance(real, same)


def test_patches_tile_the_image():
    image = torch.arange(70 * 40, dtype=torch.float32).reshape(70, 40)
    patches = cut_patches([image], 32)
    assert patches.shape == (2, 32, 32)
    assert np.array_equal(patches[1], image[32:64, :32].numpy())


def test_ranker_features_tell_structure_from_noise():
    features = ranker_features()
    real = [to_network_range(structure(i)) for i in range(3)]
    same = [to_network_range(structure(10 + i)) for i in range(3)]
    noise = [to_network_range(white(20 + i)) for i in range(3)]
    near = measure_distances(real, same, features, patch_px=64)
    far = measure_distances(real, noise, features, patch_px=64)
    assert far.frechet_x1000 > 3 * near.frechet_x1000
    assert far.spectrum > near.spectrum


@pytest.mark.parametrize("ratio", [0.1, 0.5])
def test_fit_finds_the_signal_to_noise_ratio(ratio):
    signals = [structure(i) for i in range(4)]
    real = [np.sqrt(ratio) * structure(10 + i) + white(20 + i) for i in range(4)]
    fit = fit_noise(signals, real, measure_greys(real[0]), diameter_px=60.0)
    assert fit.signal_variance / fit.noise_variance == pytest.approx(ratio, rel=0.15)
    assert fit.signal_variance + fit.noise_variance == pytest.approx(1.0)
    fixed = fit.at_snr(0.1)
    assert fixed.signal_variance / fixed.noise_variance == pytest.approx(0.1)
    assert fixed.counts == fit.counts


def test_poisson_fit_finds_the_dose():
    rng = np.random.default_rng(3)
    signals = [structure(i) for i in range(3)]
    real = [
        torch.from_numpy(rng.poisson(12.0 * (1 + 0.05 * s.numpy().clip(-5, 5))).astype(np.float32))
        for s in signals
    ]
    fit = fit_noise(signals, real, measure_greys(real[0]), diameter_px=60.0)
    assert fit.counts == pytest.approx(12.0, rel=0.05)
    assert fit.poisson_share > 0.85


def test_mixed_fit_finds_the_share_of_counting_noise():
    rng = np.random.default_rng(4)
    signals = [structure(i, 512) for i in range(3)]
    real = [
        torch.from_numpy((rng.poisson(6.0, s.shape) + rng.normal(0, 6.0**0.5, s.shape)).astype(np.float32))
        for s in signals
    ]
    fit = fit_noise(signals, real, measure_greys(real[0]), diameter_px=60.0)
    assert fit.poisson_share == pytest.approx(0.5, abs=0.12)
    assert fit.mixed_counts == pytest.approx(6.0, rel=0.25)


@pytest.mark.parametrize("model", NOISE_MODELS)
def test_baselines_reproduce_the_fitted_spectrum(model):
    signals = [structure(i) for i in range(4)]
    real = [40.0 + 2.0 * (0.5 * structure(10 + i) + white(20 + i)) for i in range(4)]
    fit = fit_noise(signals, real, measure_greys(real[0]), diameter_px=60.0)
    rng = np.random.default_rng(1)
    made = [add_noise(s, model, fit, rng) for s in signals]
    assert spectrum_distance([to_network_range(r) for r in real], made) < 0.12


def test_content_is_what_is_left_of_the_particles():
    clean = [structure(i) for i in range(3)]
    assert content_correlation(clean, clean, 30.0) == pytest.approx(1.0)
    assert abs(content_correlation(clean, [structure(20 + i) for i in range(3)], 30.0)) < 0.1
    # white noise of ten times the variance is mostly outside the band
    assert content_correlation(clean, [c + 3.0 * white(i) for i, c in enumerate(clean)], 30.0) > 0.8
    assert content_correlation(clean, [-c for c in clean], 30.0) == pytest.approx(-1.0)
