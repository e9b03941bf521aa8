"""Reference CTFs: Warp's numeric images, and EMPIAR-10204 spectra under other settings, noise and assumptions."""

from __future__ import annotations

import os
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import starfile
import torch

from models.fourier.spectra import half_from_centred
from models.optics.ctf import evaluate_ctf, frequency_grid
from models.optics.ctf_fit import CtfSearch, CtfStatus, Microscope, fit_ctf_spectrum

DATA = Path(os.environ.get("ICESTREAM_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))

pytestmark = [
    pytest.mark.realdata,
    pytest.mark.skipif(not DATA.is_dir(), reason=f"no real data at {DATA} (ICESTREAM_TEST_DATA)"),
]

SPECTRA = (21, 24, 26, 29, 31, 35, 40, 46, 49)
PIXEL = 1.39955


@pytest.mark.parametrize(
    ("index", "pixel", "voltage_kv", "amplitude", "defocus_um", "delta_um", "angle_deg", "phase_pi", "scale"),
    [(0, 1.1, 300.0, 0.1, 1.5, 0.3, 25.0, 0.4, 0.9), (1, 1.5, 200.0, 0.07, 2.5, 0.0, 0.0, 0.0, 1.0)],
)
def test_warps_ctf_images_are_reproduced(
    index: int,
    pixel: float,
    voltage_kv: float,
    amplitude: float,
    defocus_um: float,
    delta_um: float,
    angle_deg: float,
    phase_pi: float,
    scale: float,
) -> None:
    """Warp: mean defocus and u - v in µm, phase shift in units of π, an envelope scale · exp(B k² / 4)."""
    with mrcfile.open(DATA / "ctf" / "warp" / "warp_ctf_reference.mrc") as mrc:
        reference = np.array(mrc.data[index])
    ky, kx = frequency_grid((256, 256), pixel)
    ctf = evaluate_ctf(
        ky,
        kx,
        defocus_u_angstrom=1e4 * (defocus_um + 0.5 * delta_um),
        defocus_v_angstrom=1e4 * (defocus_um - 0.5 * delta_um),
        astigmatism_angle_deg=angle_deg,
        voltage_kv=voltage_kv,
        cs_mm=2.7,
        amplitude_contrast=amplitude,
        phase_shift_deg=180.0 * phase_pi,
    )
    ours = scale * ctf * torch.exp(-40.0 / 4.0 * (ky.square() + kx.square()))
    assert float(np.abs(ours.numpy() - reference).max()) < 1e-4


def read_spectrum(number: int) -> torch.Tensor:
    path = DATA / "ctf" / "empiar10204_power_spectra" / f"20170629_{number:05d}_frameImage_PS.mrc"
    with mrcfile.open(path, permissive=True) as mrc:
        return half_from_centred(torch.from_numpy(np.array(mrc.data, dtype=np.float32)))


def read_reference(number: int) -> tuple[float, float, float]:
    """Return CTFFIND4's mean defocus, astigmatism and angle."""
    blocks = starfile.read(DATA / "ctf" / "empiar10204_reference_ctffind4_relion31.star")
    table = blocks["micrographs"]
    row = table[table["rlnMicrographName"].str.contains(f"_{number:05d}_")].iloc[0]
    return 0.5 * (row.rlnDefocusU + row.rlnDefocusV), row.rlnDefocusU - row.rlnDefocusV, row.rlnDefocusAngle


@pytest.mark.parametrize(
    ("search", "amplitude_contrast"),
    [
        (CtfSearch(), 0.07),
        (CtfSearch(min_defocus_angstrom=1000.0, max_defocus_angstrom=100000.0), 0.1),
        (CtfSearch(min_defocus_angstrom=5000.0, max_defocus_angstrom=15000.0), 0.1),
        (CtfSearch(finest_resolution_angstrom=3.0), 0.1),
        (CtfSearch(finest_resolution_angstrom=6.0), 0.1),
        (CtfSearch(coarsest_resolution_angstrom=50.0), 0.1),
        (CtfSearch(phase_shift_range_deg=(0.0, 175.0), max_thickness_angstrom=3000.0), 0.1),
    ],
    ids=["amplitude", "wide", "narrow", "fine", "coarse", "from-50-A", "phase"],
)
def test_other_settings_find_the_same_ctf(search: CtfSearch, amplitude_contrast: float) -> None:
    microscope = Microscope(voltage_kv=200.0, cs_mm=1.4, amplitude_contrast=amplitude_contrast)
    for number in SPECTRA:
        mean, _, angle = read_reference(number)
        fitted = fit_ctf_spectrum(read_spectrum(number), PIXEL, microscope, search)
        assert fitted.status is CtfStatus.RINGS, number
        assert fitted.defocus_mean_angstrom == pytest.approx(mean, rel=0.01), number
        assert abs((fitted.astigmatism_angle_deg - angle + 90.0) % 180.0 - 90.0) < 10.0, number
        assert fitted.thickness_angstrom is None, number


@pytest.mark.parametrize("n_tiles", [40, 10, 3])
def test_noise_makes_the_fit_unreliable_before_it_makes_it_wrong(n_tiles: int) -> None:
    microscope = Microscope(voltage_kv=200.0, cs_mm=1.4, amplitude_contrast=0.1)
    rng = np.random.default_rng(n_tiles)
    n_found = 0
    for number in SPECTRA:
        mean, _, _ = read_reference(number)
        power = read_spectrum(number)
        noise = rng.gamma(n_tiles, 1.0 / n_tiles, size=tuple(power.shape)).astype(np.float32)
        fitted = fit_ctf_spectrum(power * torch.from_numpy(noise), PIXEL, microscope)
        n_found += fitted.is_reliable
        if fitted.is_reliable:
            assert fitted.defocus_mean_angstrom == pytest.approx(mean, rel=0.02), number
    assert n_found == len(SPECTRA) or n_tiles < 40
