"""Filters and power spectra."""

import pytest
import torch

from models.fourier.filters import (
    b_factor_filter,
    high_pass_filter,
    low_pass_filter,
    smooth_gaussian,
    squared_frequencies,
)
from models.fourier.spectra import (
    average_tile_power,
    centred_from_half,
    half_from_centred,
    polar_spectrum,
    radial_mean,
)


def full_power(n=32, seed=0):
    image = torch.randn(n, n, generator=torch.Generator().manual_seed(seed))
    return torch.fft.fftshift(torch.fft.fft2(image).abs().square())


def test_half_and_centred_spectra_are_inverse():
    power = full_power()
    assert torch.allclose(centred_from_half(half_from_centred(power)), power, rtol=1e-4)


def test_radial_mean_of_a_radial_function_is_that_function():
    k = squared_frequencies((64, 64), 1.0).sqrt() * 64
    profile = radial_mean(k)
    assert profile[3:30] == pytest.approx(range(3, 30), abs=0.15)


def test_sectors_see_the_direction_of_an_anisotropic_spectrum():
    n = 128
    ky = torch.fft.fftfreq(n)[:, None]
    kx = torch.fft.rfftfreq(n)[None, :]
    angle = torch.atan2(ky.expand(n, n // 2 + 1), kx.expand(n, n // 2 + 1))
    power = 1.0 + torch.cos(2.0 * (angle - 0.5))  # strongest 0.5 rad from x towards y
    polar = polar_spectrum(power, 1.0, k_range=(0.1, 0.4), n_sectors=36)
    strongest = polar.angles_deg[polar.values.mean(axis=1).argmax()]
    assert strongest == pytest.approx(28.6, abs=5.0)


def test_too_narrow_a_range_of_frequencies_is_refused():
    with pytest.raises(ValueError, match="at least 8"):
        polar_spectrum(torch.ones(64, 33), 1.0, k_range=(0.1, 0.12))


def test_tiles_larger_than_the_image_are_refused():
    with pytest.raises(ValueError, match="tile_px"):
        average_tile_power(torch.zeros(64, 64), 128)


def test_contaminated_tiles_do_not_take_part():
    image = torch.randn(256, 256, generator=torch.Generator().manual_seed(1))
    dirty = image.clone()
    dirty[:64, :64] *= 100.0
    assert float(average_tile_power(dirty, 64)[5:20, 5:20].mean()) < 2.0


def test_smoothing_keeps_a_constant_and_the_edges():
    assert torch.allclose(
        smooth_gaussian(torch.full((40, 53), 3.0), 5.0), torch.full((40, 53), 3.0), atol=1e-4
    )


def test_smoothing_removes_the_variance_that_a_gaussian_removes():
    noise = torch.randn(256, 256, generator=torch.Generator().manual_seed(2))
    sigma = 3.0
    expected = 1.0 / (4.0 * torch.pi * sigma**2)
    assert float(smooth_gaussian(noise, sigma)[20:-20, 20:-20].var()) == pytest.approx(expected, rel=0.15)


def test_filters_are_one_where_they_pass():
    k2 = squared_frequencies((64, 64), 2.0)
    low, high = low_pass_filter(k2, 20.0), high_pass_filter(k2, 100.0)
    assert float(low[0, 0]) == 1.0
    assert float(low[32, 32]) == 0.0
    assert float(high[0, 0]) == 0.0
    assert float(high[32, 32]) == pytest.approx(1.0)
    assert float(b_factor_filter(k2, 100.0)[0, 1]) == pytest.approx(float(torch.exp(-25.0 * k2[0, 1])))
