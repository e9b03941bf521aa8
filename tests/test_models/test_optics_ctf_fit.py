"""CTF fits on simulated spectra, on pure noise, and at the limits of what is asked."""

from dataclasses import replace

import pytest
import torch

from models.fourier.spectra import average_tile_power
from models.optics.ctf import evaluate_ctf, frequency_grid
from models.optics.ctf_fit import (
    CtfSearch,
    Microscope,
    fit_ctf,
    fit_ctf_spectrum,
    profile_ctf,
    score_ctf_spectrum,
)
from models.optics.ice import estimate_ice_ratio, first_maximum_angstrom

TITAN = Microscope(voltage_kv=300.0, cs_mm=2.7, amplitude_contrast=0.1)


def make_spectrum(u, v, angle, *, pixel=1.0, n=256, phase=0.0, signal=0.5, b_factor=60.0, n_tiles=40, seed=0):
    """Return a half power spectrum with rings on a falling background and the noise of `n_tiles` tiles."""
    generator = torch.Generator().manual_seed(seed)
    ky, kx = frequency_grid((n, n), pixel)
    k2 = ky.square() + kx.square()
    ctf = evaluate_ctf(
        ky,
        kx,
        defocus_u_angstrom=u,
        defocus_v_angstrom=v,
        astigmatism_angle_deg=angle,
        voltage_kv=300.0,
        cs_mm=2.7,
        amplitude_contrast=0.1,
        phase_shift_deg=phase,
    )
    clean = 1.0 + 4.0 * torch.exp(-k2.sqrt() * 25) + signal * ctf.square() * torch.exp(-0.5 * b_factor * k2)
    chi2 = torch.randn(n_tiles * 2, n, n // 2 + 1, generator=generator).square().mean(dim=0)
    return clean * chi2


def angle_between(a, b):
    return abs((a - b + 90.0) % 180.0 - 90.0)


@pytest.mark.parametrize(
    ("u", "v", "angle"),
    [
        (6000.0, 5700.0, 20.0),
        (10000.0, 10000.0, 0.0),
        (15000.0, 14300.0, -70.0),
        (24000.0, 23000.0, 45.0),
        (12000.0, 9500.0, 80.0),
    ],
)
def test_defocus_and_astigmatism_are_recovered(u, v, angle):
    fitted = fit_ctf_spectrum(make_spectrum(u, v, angle), 1.0, TITAN)
    assert fitted.is_reliable
    assert 0.5 * (fitted.defocus_u_angstrom + fitted.defocus_v_angstrom) == pytest.approx(
        0.5 * (u + v), rel=0.005
    )
    assert fitted.defocus_u_angstrom - fitted.defocus_v_angstrom == pytest.approx(u - v, abs=150.0)
    if u - v > 200.0:
        assert angle_between(fitted.astigmatism_angle_deg, angle) < 10.0


def test_u_is_the_larger_defocus():
    fitted = fit_ctf_spectrum(make_spectrum(9000.0, 10000.0, 30.0), 1.0, TITAN)
    assert fitted.defocus_u_angstrom >= fitted.defocus_v_angstrom
    assert angle_between(fitted.astigmatism_angle_deg, 120.0) < 10.0


def test_a_phase_shift_is_recovered_when_it_is_asked_for():
    search = CtfSearch(
        phase_shift_range_deg=(0.0, 175.0), min_defocus_angstrom=5000.0, max_defocus_angstrom=20000.0
    )
    power = make_spectrum(11000.0, 10800.0, 10.0, phase=80.0)
    fitted = fit_ctf_spectrum(power, 1.0, TITAN, search)
    assert fitted.phase_shift_deg == pytest.approx(80.0, abs=12.0)
    mean = 0.5 * (fitted.defocus_u_angstrom + fitted.defocus_v_angstrom)
    assert mean == pytest.approx(10900.0, rel=0.02)


@pytest.mark.parametrize("seed", range(6))
def test_pure_noise_has_no_reliable_fit(seed):
    power = make_spectrum(10000.0, 10000.0, 0.0, signal=0.0, seed=seed)
    assert not fit_ctf_spectrum(power, 1.0, TITAN).is_reliable


@pytest.mark.parametrize("seed", range(3))
def test_a_micrograph_of_noise_has_no_reliable_fit(seed):
    generator = torch.Generator().manual_seed(seed)
    image = torch.poisson(torch.full((768, 768), 20.0), generator=generator)
    fitted, _ = fit_ctf(image, 1.2, TITAN)
    assert not fitted.is_reliable


def test_a_small_micrograph_is_fitted_with_smaller_tiles():
    n, pixel = 640, 1.5
    generator = torch.Generator().manual_seed(1)
    ky, kx = frequency_grid((n, n), pixel)
    ctf = evaluate_ctf(
        ky,
        kx,
        defocus_u_angstrom=13000.0,
        defocus_v_angstrom=12600.0,
        astigmatism_angle_deg=35.0,
        voltage_kv=300.0,
        cs_mm=2.7,
        amplitude_contrast=0.1,
    )
    structure = torch.fft.rfft2(torch.randn(n, n, generator=generator)) * ctf
    image = 0.7 * torch.fft.irfft2(structure, s=(n, n)) + torch.randn(n, n, generator=generator)
    fitted, power = fit_ctf(image, pixel, TITAN)
    assert power.shape[0] < 512
    assert fitted.is_reliable
    mean = 0.5 * (fitted.defocus_u_angstrom + fitted.defocus_v_angstrom)
    assert mean == pytest.approx(12800.0, rel=0.01)


def test_rings_that_end_early_give_a_coarser_resolution():
    far = fit_ctf_spectrum(make_spectrum(12000.0, 12000.0, 0.0, b_factor=40.0), 1.0, TITAN)
    near = fit_ctf_spectrum(make_spectrum(12000.0, 12000.0, 0.0, b_factor=400.0), 1.0, TITAN)
    assert far.fit_resolution_angstrom < 4.0
    assert near.fit_resolution_angstrom > 1.3 * far.fit_resolution_angstrom


def test_somebody_elses_wrong_fit_is_recognised():
    power = make_spectrum(10800.0, 10500.0, 75.0)
    right = fit_ctf_spectrum(power, 1.0, TITAN)
    wrong = replace(right, defocus_u_angstrom=37000.0, defocus_v_angstrom=36500.0)
    assert not score_ctf_spectrum(power, 1.0, TITAN, wrong).is_reliable
    assert score_ctf_spectrum(power, 1.0, TITAN, right).score == pytest.approx(right.score)


def test_profiles_of_data_and_fit_agree_where_there_are_rings():
    power = make_spectrum(14000.0, 13000.0, 30.0)
    fitted = fit_ctf_spectrum(power, 1.0, TITAN)
    profile = profile_ctf(power, 1.0, TITAN, fitted)
    inside = profile.k < 1 / 5.0
    stacked = torch.tensor([profile.contrast[inside].tolist(), profile.ctf2[inside].tolist()])
    assert float(torch.corrcoef(stacked)[0, 1]) > 0.8


def test_the_ice_ring_is_seen_and_its_absence_too():
    n, pixel = 512, 1.0
    power = make_spectrum(12000.0, 12000.0, 0.0, n=n, signal=2.0)
    ky, kx = frequency_grid((n, n), pixel)
    k = torch.sqrt(ky.square() + kx.square())
    ring = power + 6.0 * torch.exp(-0.5 * ((k - 1 / 3.7) / 0.004) ** 2)
    at = first_maximum_angstrom(12000.0, 0.0197, 0.1)
    clear, icy = (estimate_ice_ratio(p, pixel, at) for p in (power, ring))
    assert clear is not None
    assert icy is not None
    assert abs(clear) < 0.15
    assert icy > 0.5


def test_the_ice_ratio_is_unknown_when_nyquist_does_not_hold_the_ring():
    assert estimate_ice_ratio(torch.ones(128, 65), 1.9, 20.0) is None


def test_white_noise_has_its_variance_as_power():
    image = 3.0 * torch.randn(512, 384, generator=torch.Generator().manual_seed(0))
    power = average_tile_power(image, 128)
    assert float(power[4:60, 4:60].mean()) == pytest.approx(9.0, rel=0.05)
