"""Local defocus: tilted and flat specimens of amorphous ice, imaged with a CTF that varies across the field."""

import math

import numpy as np
import pytest
import torch

from models.optics.ctf import evaluate_ctf, frequency_grid
from models.optics.ctf_fit import Microscope, fit_ctf
from models.optics.ctf_local import LocalDefocus, fit_local_defocus

TITAN = Microscope(voltage_kv=300.0, cs_mm=2.7, amplitude_contrast=0.1)
PIXEL = 1.5
SHAPE = (1280, 1152)


def make_micrograph(defocus_map, *, signal, astigmatism=300.0, seed=0, slab_angstrom=100.0):
    """Return white structure imaged slab by slab, neighbouring slabs blended, plus white noise of SD 1."""
    generator = torch.Generator().manual_seed(seed)
    ky, kx = frequency_grid(SHAPE, PIXEL)
    damping = torch.exp(-10.0 * (ky.square() + kx.square()))
    structure = torch.fft.rfft2(torch.randn(SHAPE, generator=generator)) * damping
    image = torch.randn(SHAPE, generator=generator)
    lowest = float(defocus_map.min())
    for i in range(math.ceil((float(defocus_map.max()) - lowest) / slab_angstrom) + 1):
        level = lowest + i * slab_angstrom
        share = (1.0 - (defocus_map - level).abs() / slab_angstrom).clamp_min(0.0)
        ctf = evaluate_ctf(
            ky,
            kx,
            defocus_u_angstrom=level + 0.5 * astigmatism,
            defocus_v_angstrom=level - 0.5 * astigmatism,
            astigmatism_angle_deg=30.0,
            voltage_kv=300.0,
            cs_mm=2.7,
            amplitude_contrast=0.1,
        )
        image += signal * share * torch.fft.irfft2(structure * ctf, s=SHAPE)
    return image


def plane(mean, tilt_deg, direction_deg):
    """Return a defocus map that rises along a direction (from y to x), and its slope (y, x) in Å per Å."""
    slope = math.tan(math.radians(tilt_deg))
    slope_y, slope_x = (slope * f(math.radians(direction_deg)) for f in (math.cos, math.sin))
    y = torch.arange(SHAPE[0])[:, None] - 0.5 * (SHAPE[0] - 1)
    x = torch.arange(SHAPE[1])[None, :] - 0.5 * (SHAPE[1] - 1)
    return mean + PIXEL * (slope_y * y + slope_x * x), (slope_y, slope_x)


@pytest.mark.parametrize(("tilt", "direction"), [(20.0, 160.0), (30.0, -50.0)])
def test_the_slope_of_a_tilted_specimen_is_recovered(tilt, direction):
    truth, slope_yx = plane(14000.0, tilt, direction)
    image = make_micrograph(truth, signal=1.2)
    fitted, _ = fit_ctf(image, PIXEL, TITAN)
    local = fit_local_defocus(image, PIXEL, TITAN, fitted)
    assert local is not None
    assert local.is_significant
    error = math.hypot(local.gradient_yx[0] - slope_yx[0], local.gradient_yx[1] - slope_yx[1])
    assert error < 0.05 * math.hypot(*slope_yx)
    assert local.tilt_deg == pytest.approx(tilt, abs=1.5)
    # within three of its own standard deviations
    assert 1e4 * error < 3.0 * math.sqrt(2.0) * local.gradient_sd_angstrom_per_um
    y, x = np.array([100.0, 640.0, 1200.0]), np.array([1000.0, 576.0, 100.0])
    expected = [float(truth[int(b), int(a)]) for b, a in zip(y, x, strict=True)]
    found = fitted.defocus_mean_angstrom + local.defocus_at(y, x)
    assert found == pytest.approx(expected, abs=60.0)


@pytest.mark.parametrize(("signal", "seed"), [(1.0, 1), (0.5, 2), (0.35, 3), (0.3, 4)])
def test_a_flat_specimen_has_no_slope(signal, seed):
    image = make_micrograph(torch.full(SHAPE, 12000.0), signal=signal, seed=seed)
    fitted, _ = fit_ctf(image, PIXEL, TITAN)
    local = fit_local_defocus(image, PIXEL, TITAN, fitted)
    assert (
        local is None
        or np.abs(local.defocus_at(np.linspace(0, 1279, 9), np.linspace(0, 1151, 9))).max() < 50.0
    )
    assert fitted.defocus_mean_angstrom == pytest.approx(12000.0, rel=0.01)


def test_a_bent_specimen_is_followed():
    y = torch.linspace(-1.0, 1.0, SHAPE[0])[:, None]
    x = torch.linspace(-1.0, 1.0, SHAPE[1])[None, :]
    truth = 13000.0 + 700.0 * (y.square() + x.square())
    image = make_micrograph(truth, signal=1.5)
    fitted, _ = fit_ctf(image, PIXEL, TITAN)
    local = fit_local_defocus(image, PIXEL, TITAN, fitted)
    assert local is not None
    assert len(local.coefficients_angstrom) == 6
    rise = local.defocus_at(1200.0, 1080.0) - local.defocus_at(639.5, 575.5)
    assert rise == pytest.approx(float(truth[1200, 1080]) - 13000.0, rel=0.15)


def test_without_rings_or_room_there_is_no_map():
    noise = torch.randn(900, 900, generator=torch.Generator().manual_seed(0))
    fitted, _ = fit_ctf(noise, PIXEL, TITAN)
    assert fit_local_defocus(noise, PIXEL, TITAN, fitted) is None


def test_offsets_follow_the_coefficients():
    local = LocalDefocus(
        coefficients_angstrom=(5.0, 100.0, -40.0),
        centre_yx_px=(500.0, 400.0),
        half_side_px=500.0,
        pixel_size_angstrom=2.0,
        gain=30.0,
        n_tiles=50,
        gradient_sd_angstrom_per_um=10.0,
    )
    assert local.defocus_at(1000.0, 400.0) == pytest.approx(105.0)
    assert local.defocus_at(np.array([500.0]), np.array([900.0])) == pytest.approx([-35.0])
    assert local.gradient_angstrom_per_um == pytest.approx(1e4 * math.hypot(0.1, 0.04))
