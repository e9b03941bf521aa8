"""The CTF of an exposure: values, files, picture, offsets per particle, and the command."""

import json
import math

import mrcfile
import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from actors.preprocess.clock import StageClock
from actors.preprocess.ctf import measure_ctf
from actors.preprocess.settings import PreprocessSettings
from models.fourier.spectra import average_tile_power, centred_from_half
from models.optics.ctf import evaluate_ctf, frequency_grid
from stream.cli import app
from stream.records.values import Optics
from stream.sinks.exporter import CTF_COLUMNS
from stream.store.layout import OutputLayout

PIXEL, SIZE = 1.5, 1152
SETTINGS = PreprocessSettings(
    pixel_size_angstrom=PIXEL, optics=Optics(voltage_kv=300.0, cs_mm=2.7, amplitude_contrast=0.1)
)
VALUES = (
    "defocus_u_angstrom",
    "defocus_v_angstrom",
    "astigmatism_angle_deg",
    "phase_shift_deg",
    "ctf_fit_angstrom",
)


def make_micrograph(*, tilt_deg=0.0, signal=1.0, mean=14000.0, slab=150.0):
    """Return amorphous structure in noise whose defocus rises by tan(tilt) along y."""
    generator = torch.Generator().manual_seed(3)
    ky, kx = frequency_grid((SIZE, SIZE), PIXEL)
    structure = torch.fft.rfft2(torch.randn(SIZE, SIZE, generator=generator))
    structure *= torch.exp(-10.0 * (ky.square() + kx.square()))
    rise = math.tan(math.radians(tilt_deg)) * PIXEL * (torch.arange(SIZE) - 0.5 * (SIZE - 1))
    image = torch.randn(SIZE, SIZE, generator=generator)
    for i in range(math.ceil(float(rise.max() - rise.min()) / slab) + 1):
        level = float(rise.min()) + i * slab
        share = (1.0 - (rise - level).abs() / slab).clamp_min(0.0)[:, None]
        ctf = evaluate_ctf(
            ky,
            kx,
            defocus_u_angstrom=mean + level + 150.0,
            defocus_v_angstrom=mean + level - 150.0,
            astigmatism_angle_deg=30.0,
            voltage_kv=300.0,
            cs_mm=2.7,
            amplitude_contrast=0.1,
        )
        image += signal * share * torch.fft.irfft2(structure * ctf, s=(SIZE, SIZE))
    return image


@pytest.fixture(scope="module")
def flat_micrograph():
    return make_micrograph()


def test_particles_of_a_tilted_specimen_get_their_own_defocus(tmp_path):
    layout = OutputLayout(tmp_path)
    measured = measure_ctf(make_micrograph(tilt_deg=25.0), PIXEL, SETTINGS, layout, "tilted", StageClock())
    centres = np.array([[200.0, 300.0], [575.5, 900.0], [1000.0, 500.0]])
    truth = math.tan(math.radians(25.0)) * PIXEL * (centres[:, 0] - 575.5)
    assert measured.defocus_offsets_angstrom(centres) == pytest.approx(truth, abs=40.0)
    assert measured.fit.defocus_gradient_angstrom_per_um == pytest.approx(4663.0, rel=0.05)
    written = json.loads(layout.ctf_values("tilted").read_text())
    assert written["local_defocus"]["coefficients_angstrom"][1] == pytest.approx(403.0, rel=0.08)


def test_a_flat_specimen_has_one_defocus_and_known_uncertainties(tmp_path, flat_micrograph):
    layout = OutputLayout(tmp_path)
    measured = measure_ctf(flat_micrograph, PIXEL, SETTINGS, layout, "flat", StageClock())
    fit = measured.fit
    assert not measured.defocus_offsets_angstrom(np.array([[10.0, 10.0], [1100.0, 900.0]])).any()
    assert fit.defocus_gradient_angstrom_per_um == 0.0
    assert fit.defocus_sd_angstrom is not None
    mean = 0.5 * (fit.defocus_u_angstrom + fit.defocus_v_angstrom)
    assert abs(mean - 14000.0) < 4.0 * fit.defocus_sd_angstrom
    assert fit.confidence is not None
    assert fit.confidence > 0.99


def test_the_values_have_every_key_that_exports_read(tmp_path, flat_micrograph):
    layout = OutputLayout(tmp_path)
    measure_ctf(flat_micrograph, PIXEL, SETTINGS, layout, "flat", StageClock())
    written = json.loads(layout.ctf_values("flat").read_text())
    assert {key: written[key] for key in CTF_COLUMNS.values() if written.get(key) is None} == {}


def test_the_picture_shows_rings_where_the_fit_has_them(tmp_path, flat_micrograph):
    layout = OutputLayout(tmp_path)
    measure_ctf(flat_micrograph, PIXEL, SETTINGS, layout, "flat", StageClock())
    picture = np.asarray(Image.open(layout.ctf_picture("flat")).convert("L"), dtype=np.float64)
    n = picture.shape[1]
    square = picture[:n]
    y, x = np.indices(square.shape) - n // 2
    radius = np.hypot(y, x).astype(int)
    ring = (radius > n // 16) & (radius < n // 5)

    def profile(half):
        rows = radius[ring & half]
        return np.bincount(rows, square[ring & half])[n // 16 + 1 :] / np.bincount(rows)[n // 16 + 1 :]

    # the text in the corner lies outside these rings
    assert np.corrcoef(profile(x < -2), profile(x > 2))[0, 1] > 0.8
    assert picture[n:].max() > 200


def run(*arguments: object):
    result = CliRunner().invoke(app, ["ctf", *map(str, arguments), "--json"])
    return result, json.loads(result.stdout) if result.exit_code == 0 else None


def test_the_command_fits_micrographs_and_power_spectra_alike(tmp_path, flat_micrograph):
    image, spectrum = tmp_path / "a.mrc", tmp_path / "a_PS.mrc"
    mrcfile.write(image, flat_micrograph.numpy())
    mrcfile.write(spectrum, centred_from_half(average_tile_power(flat_micrograph, 512)).numpy())
    out = tmp_path / "out"
    _, of_image = run(image, "--pixel-size-angstrom", PIXEL, "--out", out)
    _, of_spectrum = run(spectrum, "--pixel-size-angstrom", PIXEL, "--power-spectrum", "--phase-shift")
    assert of_image[0]["ctf_status"] == "rings"
    assert of_image[0]["defocus_u_angstrom"] == pytest.approx(14150.0, abs=60.0)
    assert of_spectrum[0]["defocus_v_angstrom"] == pytest.approx(13850.0, abs=80.0)
    assert of_spectrum[0]["phase_shift_deg"] == pytest.approx(0.0, abs=3.0)
    assert of_spectrum[0]["defocus_gradient_angstrom_per_um"] is None
    assert {"a.png", "a.json"} == {p.name for p in (out / "ctf").iterdir()}


def test_without_rings_the_command_gives_a_status_and_no_numbers(tmp_path):
    path = tmp_path / "noise.mrc"
    mrcfile.write(path, torch.randn(600, 600, generator=torch.Generator().manual_seed(0)).numpy())
    _, documents = run(path, "--pixel-size-angstrom", 1.2, "--out", tmp_path)
    assert documents[0]["ctf_status"] == "no_rings"
    assert documents[0]["ctf_is_reliable"] is False
    assert [documents[0][key] for key in VALUES] == [None] * len(VALUES)
    assert json.loads((tmp_path / "ctf" / "noise.json").read_text())["defocus_u_angstrom"] is None


@pytest.mark.parametrize(
    ("shape", "value", "rule"),
    [((256, 200), 1.0, "square"), ((256, 256), math.nan, "finite"), ((256, 256), 1.0, "varies")],
)
def test_what_is_no_power_spectrum_ends_with_an_error(tmp_path, shape, value, rule):
    path = tmp_path / "bad.mrc"
    mrcfile.write(path, np.full(shape, 1.0, dtype=np.float32))
    with mrcfile.open(path, mode="r+") as mrc:
        mrc.data[7, 9:20] = value
    result, _ = run(path, "--pixel-size-angstrom", 1.2, "--power-spectrum")
    assert result.exit_code == 1
    assert rule in result.stderr
