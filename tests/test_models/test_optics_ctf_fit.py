"""CTF fits on simulated spectra, on pure noise, and at the limits of what is asked."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from models.fourier.spectra import average_tile_power
from models.optics.ctf import electron_wavelength_angstrom, evaluate_ctf, frequency_grid
from models.optics.ctf_fit import (
    CtfSearch,
    CtfStatus,
    Microscope,
    fit_ctf,
    fit_ctf_spectrum,
    profile_ctf,
    score_ctf_spectrum,
)
from models.optics.ice import estimate_ice_ratio, first_maximum_angstrom

TITAN = Microscope(voltage_kv=300.0, cs_mm=2.7, amplitude_contrast=0.1)


def make_spectrum(
    u,
    v,
    angle,
    *,
    pixel=1.0,
    n=256,
    phase=0.0,
    signal=0.5,
    b_factor=60.0,
    n_tiles=40,
    seed=0,
    microscope=TITAN,
    background=4.0,
    ice=0.0,
    drift_angstrom=0.0,
    drift_deg=0.0,
    thickness=0.0,
):
    """Return a half power spectrum with rings on a falling background and the noise of `n_tiles` tiles.

    Drift blurs the rings along one direction, thickness multiplies them by sinc(π λ k² t), `ice` is the height
    of a ring at 3.7 Å over the background.
    """
    ky, kx = frequency_grid((n, n), pixel)
    k2 = ky.square() + kx.square()
    ctf = evaluate_ctf(
        ky,
        kx,
        defocus_u_angstrom=u,
        defocus_v_angstrom=v,
        astigmatism_angle_deg=angle,
        voltage_kv=microscope.voltage_kv,
        cs_mm=microscope.cs_mm,
        amplitude_contrast=microscope.amplitude_contrast,
        phase_shift_deg=phase,
    )
    node = torch.sinc(electron_wavelength_angstrom(microscope.voltage_kv) * k2 * thickness)
    rings = 0.5 + (ctf.square() - 0.5) * node
    along = kx * math.cos(math.radians(drift_deg)) + ky * math.sin(math.radians(drift_deg))
    envelope = torch.exp(-0.5 * b_factor * k2 - (drift_angstrom * along).square())
    clean = 1.0 + background * torch.exp(-k2.sqrt() * 25) + signal * rings * envelope
    clean = clean + ice * torch.exp(-0.5 * ((k2.sqrt() - 1.0 / 3.7) / 0.004) ** 2)
    noise = np.random.default_rng(seed).gamma(n_tiles, 1.0 / n_tiles, size=tuple(clean.shape))
    return clean * torch.from_numpy(noise.astype(np.float32))


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


@pytest.mark.parametrize("phase", [5.0, 80.0, 165.0])
@pytest.mark.parametrize(("mean", "astigmatism"), [(7000.0, 200.0), (16000.0, 1500.0)])
def test_a_phase_shift_is_recovered_when_it_is_asked_for(phase, mean, astigmatism):
    search = CtfSearch(phase_shift_range_deg=(0.0, 175.0))
    power = make_spectrum(
        mean + 0.5 * astigmatism, mean - 0.5 * astigmatism, 10.0, phase=phase, n=512, n_tiles=80
    )
    fitted = fit_ctf_spectrum(power, 1.0, TITAN, search)
    assert fitted.phase_shift_deg == pytest.approx(phase, abs=3.0)
    assert fitted.defocus_mean_angstrom == pytest.approx(mean, rel=0.005)
    assert fitted.defocus_u_angstrom - fitted.defocus_v_angstrom == pytest.approx(astigmatism, abs=60.0)


TALOS = Microscope(voltage_kv=200.0, cs_mm=1.4, amplitude_contrast=0.1)


@pytest.mark.parametrize(
    ("microscope", "mean", "astigmatism", "pixel", "n", "spoiled"),
    [
        (TITAN, 3500.0, 300.0, 0.8, 640, {"background": 30.0, "b_factor": 30.0}),
        (TITAN, 5000.0, 2000.0, 1.0, 512, {"ice": 3.0}),
        (TALOS, 9000.0, 2000.0, 1.4, 512, {"background": 30.0, "drift_angstrom": 4.0, "drift_deg": 70.0}),
        (TALOS, 12000.0, 100.0, 0.5, 1280, {"ice": 5.0, "drift_angstrom": 6.0}),
        (TITAN, 20000.0, 600.0, 2.0, 512, {"background": 30.0, "b_factor": 200.0}),
        (TITAN, 33000.0, 2000.0, 1.0, 640, {"drift_angstrom": 5.0, "drift_deg": 120.0}),
        (TALOS, 48000.0, 300.0, 3.5, 512, {"background": 30.0}),
        (TITAN, 50000.0, 900.0, 1.2, 640, {"ice": 3.0, "b_factor": 150.0}),
    ],
)
def test_no_wrong_optimum_takes_over(microscope, mean, astigmatism, pixel, n, spoiled):
    u, v = mean + 0.5 * astigmatism, mean - 0.5 * astigmatism
    power = make_spectrum(
        u, v, 35.0, pixel=pixel, n=n, signal=0.3, n_tiles=60, microscope=microscope, **spoiled
    )
    fitted = fit_ctf_spectrum(power, pixel, microscope)
    assert fitted.is_reliable
    assert fitted.confidence > 0.95
    assert fitted.defocus_mean_angstrom == pytest.approx(mean, rel=0.015)
    assert fitted.defocus_u_angstrom - fitted.defocus_v_angstrom == pytest.approx(astigmatism, abs=150.0)


def test_standard_deviations_are_the_scatter_over_noise():
    fits = [
        fit_ctf_spectrum(
            make_spectrum(15200.0, 14600.0, 30.0, signal=0.15, n_tiles=60, seed=seed), 1.0, TITAN
        )
        for seed in range(16)
    ]
    mean = np.std([f.defocus_mean_angstrom for f in fits], ddof=1)
    astigmatism = np.std([f.defocus_u_angstrom - f.defocus_v_angstrom for f in fits], ddof=1)
    angle = np.std([f.astigmatism_angle_deg for f in fits], ddof=1)
    # a scatter of 16 is itself known to 18 %
    assert np.mean([f.defocus_sd_angstrom for f in fits]) == pytest.approx(mean, rel=0.4)
    assert np.mean([f.astigmatism_sd_angstrom for f in fits]) == pytest.approx(astigmatism, rel=0.4)
    assert np.mean([f.angle_sd_deg for f in fits]) == pytest.approx(angle, rel=0.4)


def test_weak_rings_lean_towards_no_astigmatism_and_say_so():
    fits = [
        fit_ctf_spectrum(make_spectrum(12060.0, 11940.0, 40.0, signal=0.2, n_tiles=20, seed=s), 1.0, TITAN)
        for s in range(8)
    ]
    found = [f for f in fits if f.is_reliable]
    assert len(found) >= 6
    assert all(f.status is CtfStatus.WEAK for f in found)
    assert max(f.defocus_u_angstrom - f.defocus_v_angstrom for f in found) < 350.0
    assert max(abs(f.defocus_mean_angstrom - 12000.0) for f in found) < 0.015 * 12000.0


def test_strong_rings_overrule_the_prior_on_the_astigmatism():
    fitted = fit_ctf_spectrum(make_spectrum(15000.0, 10500.0, -20.0, n=512, n_tiles=80), 1.0, TITAN)
    assert fitted.defocus_u_angstrom - fitted.defocus_v_angstrom == pytest.approx(4500.0, rel=0.01)
    assert fitted.status is CtfStatus.RINGS


@pytest.mark.parametrize("seed", range(6))
def test_pure_noise_has_no_reliable_fit(seed):
    power = make_spectrum(10000.0, 10000.0, 0.0, signal=0.0, seed=seed)
    assert fit_ctf_spectrum(power, 1.0, TITAN).status is CtfStatus.NO_RINGS


@pytest.mark.parametrize("seed", range(2))
def test_noise_has_no_phase_shift_either(seed):
    power = make_spectrum(10000.0, 10000.0, 0.0, signal=0.0, ice=2.0, background=30.0, seed=seed)
    search = CtfSearch(phase_shift_range_deg=(0.0, 175.0), max_thickness_angstrom=3000.0)
    fitted = fit_ctf_spectrum(power, 1.0, TITAN, search)
    assert fitted.status is CtfStatus.NO_RINGS
    assert fitted.thickness_angstrom is None


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


@pytest.mark.parametrize("b_factor", [40.0, 100.0, 250.0, 500.0])
def test_the_resolution_is_where_rings_drown_in_the_noise(b_factor):
    n, n_tiles, signal = 512, 60, 0.4
    k = np.arange(20, n // 2) / n
    # height of rings (rms of the modulation) and noise of a ring's mean, both over the background
    rings = signal * np.exp(-0.5 * b_factor * k**2) / math.sqrt(8.0)
    noise = 1.0 / np.sqrt(n_tiles * math.pi * k * n)
    # a correlation of 0.5 needs a ring height of noise / √3
    truth = 1.0 / k[np.flatnonzero(rings < noise / math.sqrt(3.0))[0]]
    found = [
        fit_ctf_spectrum(
            make_spectrum(
                12200.0, 11800.0, 0.0, n=n, signal=signal, b_factor=b_factor, n_tiles=n_tiles, seed=s
            ),
            1.0,
            TITAN,
        ).fit_resolution_angstrom
        for s in range(3)
    ]
    assert np.median(found) == pytest.approx(truth, rel=0.15)


@pytest.mark.parametrize("thickness", [800.0, 1400.0, 2500.0])
def test_the_ices_thickness_is_read_from_the_node_of_the_rings(thickness):
    power = make_spectrum(
        15200.0, 14800.0, 30.0, n=512, signal=1.0, b_factor=20.0, n_tiles=100, thickness=thickness
    )
    plain = fit_ctf_spectrum(power, 1.0, TITAN)
    aware = fit_ctf_spectrum(power, 1.0, TITAN, CtfSearch(max_thickness_angstrom=4000.0))
    node = math.sqrt(electron_wavelength_angstrom(300.0) * thickness)
    assert aware.thickness_angstrom == pytest.approx(thickness, rel=0.03)
    assert aware.defocus_mean_angstrom == pytest.approx(15000.0, rel=0.005)
    # rings beyond the node stand reversed: a fit that does not know of it ends there
    assert plain.thickness_angstrom is None
    assert plain.fit_resolution_angstrom > 0.95 * node
    assert aware.fit_resolution_angstrom < 0.9 * node


def test_thin_ice_has_no_node():
    power = make_spectrum(15200.0, 14800.0, 30.0, n=512, signal=1.0, b_factor=20.0, n_tiles=100)
    fitted = fit_ctf_spectrum(power, 1.0, TITAN, CtfSearch(max_thickness_angstrom=4000.0))
    assert fitted.thickness_angstrom is None


def test_an_amplitude_spectrum_has_the_same_ctf():
    power = make_spectrum(14300.0, 13900.0, 60.0, n=512)
    of_power, of_amplitude = (fit_ctf_spectrum(p, 1.0, TITAN) for p in (power, power.sqrt()))
    assert of_amplitude.defocus_mean_angstrom == pytest.approx(of_power.defocus_mean_angstrom, abs=10.0)
    assert of_amplitude.status is of_power.status


def test_crosses_on_the_axes_and_spots_do_not_matter():
    clean = make_spectrum(14300.0, 13900.0, 60.0, n=512)
    power = clean.clone()
    power[:2] *= 30.0
    power[-1:] *= 30.0
    power[:, :2] *= 30.0
    power[100:103, 60:63] *= 1000.0
    fitted, reference = (fit_ctf_spectrum(p, 1.0, TITAN) for p in (power, clean))
    assert fitted.defocus_mean_angstrom == pytest.approx(reference.defocus_mean_angstrom, abs=15.0)
    difference = np.hypot(*(fitted.point[1:3] - reference.point[1:3]))
    assert difference < 60.0


def test_a_wrong_pixel_size_does_not_make_rings():
    # rings of 0.7 Å pixels, read as 2.8 Å: sixteen times the defocus, beyond the search
    power = make_spectrum(20000.0, 20000.0, 0.0, n=512, pixel=0.7)
    assert fit_ctf_spectrum(power, 2.8, TITAN).status is CtfStatus.NO_RINGS


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: p.masked_fill(torch.arange(p.shape[1]) == 7, math.nan), "not finite"),
        (lambda p: p - 2.0, "not negative"),
        (lambda p: p[:-20], "square"),
        (torch.ones_like, "varies"),
    ],
)
def test_what_is_no_power_spectrum_is_refused(spoil, message):
    with pytest.raises(ValueError, match=f"power: .*{message}"):
        fit_ctf_spectrum(spoil(make_spectrum(12000.0, 12000.0, 0.0)), 1.0, TITAN)


def test_a_micrograph_with_missing_values_is_refused():
    image = torch.ones(300, 300)
    image[5, 5] = math.nan
    with pytest.raises(ValueError, match="image: 1 pixels"):
        fit_ctf(image, 1.0, TITAN)


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
