"""Ice figures on drawn spectra: vitreous halo, Thon rings, spots and rings of crystalline ice."""

import numpy as np
import pytest
import torch

from models.fourier.spectra import average_tile_power
from models.optics.ice import estimate_crystalline_ice, estimate_ice_ratio

N, PIXEL = 512, 0.85


def draw_power(*, n_tiles=80, halo=1.0, spots=(), ring_angstrom=None, anisotropy=0.0, seed=0):
    """Return a mean spectrum of tiles: falling background, Thon rings, the halo at 3.7 Å, and what is asked for."""
    generator = np.random.default_rng(seed)
    fy = np.fft.fftfreq(N, PIXEL)[:, None]
    fx = np.fft.rfftfreq(N, PIXEL)[None, :]
    k = np.hypot(fy, fx)
    angle = np.arctan2(fy, fx)
    power = 1.0 + 8.0 * np.exp(-k / 0.05) + 2.0 * np.sin(900.0 * k**2) ** 2 * np.exp(-80.0 * k**2)
    power = power + halo * np.exp(-(((k - 0.27) / 0.02) ** 2))
    power = power * (1.0 + anisotropy * np.cos(2.0 * angle))
    if ring_angstrom:
        power = power + 0.6 * np.exp(-(((k - 1.0 / ring_angstrom) * N * PIXEL / 1.0) ** 2))
    for spacing, angle_deg, height in spots:
        a = np.radians(angle_deg)
        y, x = np.sin(a) / spacing, np.cos(a) / spacing
        power = power + height * np.exp(-(((fy - y) ** 2 + (fx - x) ** 2) * (N * PIXEL / 1.2) ** 2))
    noisy = power * generator.gamma(n_tiles, 1.0 / n_tiles, power.shape)
    return torch.from_numpy(noisy.astype(np.float32))


@pytest.mark.parametrize("halo", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("n_tiles", [9, 80])
def test_vitreous_ice_has_no_crystals(halo, n_tiles):
    for seed in range(3):
        power = draw_power(halo=halo, n_tiles=n_tiles, seed=seed)
        assert estimate_crystalline_ice(power, PIXEL) < 1e-4


def test_drift_that_dims_one_direction_is_not_a_crystal():
    assert estimate_crystalline_ice(draw_power(anisotropy=0.3), PIXEL) < 1e-3


def test_spots_of_hexagonal_ice_are_found():
    spots = [(spacing, angle, 6.0) for angle in (17.0, 77.0, -43.0) for spacing in (3.90, 3.67, 3.44)]
    few = estimate_crystalline_ice(draw_power(spots=spots), PIXEL)
    strong = estimate_crystalline_ice(draw_power(spots=[(s, a, 5.0 * h) for s, a, h in spots]), PIXEL)
    assert 2e-3 < few < strong < 1.0


@pytest.mark.parametrize("spacing", [3.90, 3.67, 2.25])
def test_a_sharp_ring_of_many_small_crystals_is_found(spacing):
    found = estimate_crystalline_ice(draw_power(ring_angstrom=spacing), PIXEL)
    assert found > 5e-3


def test_spots_elsewhere_are_not_ice():
    """Graphene's spots lie at 2.13 Å, gold's at 2.35 Å."""
    assert estimate_crystalline_ice(draw_power(spots=[(2.13, 20.0, 50.0), (2.35, 50.0, 50.0)]), PIXEL) < 1e-4


def test_lines_of_the_detector_are_not_a_crystal():
    power = draw_power()
    power[0, :] *= 30.0
    power[:, 0] *= 30.0
    assert estimate_crystalline_ice(power, PIXEL) < 1e-4


def test_a_lattice_in_a_corner_of_an_image_is_found():
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1536, 1536, generator=generator)
    y, x = torch.arange(1536.0)[:, None], torch.arange(1536.0)[None, :]
    wave = torch.zeros(1536, 1536)
    for angle in (10.0, 70.0, 130.0):
        a = np.radians(angle)
        wave += torch.cos(2 * np.pi * PIXEL / 3.90 * (x * np.cos(a) + y * np.sin(a)))
    wave *= ((y - 400) ** 2 + (x - 500) ** 2 < 250**2).float()
    without = estimate_crystalline_ice(average_tile_power(image, N), PIXEL)
    assert without < 1e-4
    assert estimate_crystalline_ice(average_tile_power(image + 0.2 * wave, N), PIXEL) > 1e-3


@pytest.mark.parametrize("pixel", [1.75, 3.0])
def test_pixels_that_do_not_reach_the_lattice_give_none(pixel):
    assert estimate_crystalline_ice(draw_power(), pixel) is None
    assert estimate_ice_ratio(draw_power(), pixel, 20.0) is None or pixel < 1.76


def test_an_empty_spectrum_has_no_crystals():
    assert estimate_crystalline_ice(torch.zeros(N, N // 2 + 1), PIXEL) == 0.0


def test_the_ice_ratio_grows_with_the_halo():
    # the first CTF maximum of these rings, sin² = 1 at k = √(π / 2 / 900)
    first = 1.0 / np.sqrt(np.pi / 2 / 900.0)
    ratios = [estimate_ice_ratio(draw_power(halo=h), PIXEL, first) for h in (0.0, 1.0, 4.0)]
    assert abs(ratios[0]) < 0.1
    assert ratios[0] < ratios[1] < ratios[2]
