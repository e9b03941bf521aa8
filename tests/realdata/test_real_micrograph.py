"""Real micrographs and power spectra: the fitted CTF against references, picks against experts."""

import bz2
import os
from dataclasses import replace
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import starfile
import torch
from PIL import Image
from scipy.optimize import linear_sum_assignment

from models.fourier.spectra import half_from_centred
from models.optics.ctf_fit import Microscope, fit_ctf_spectrum, score_ctf_spectrum
from models.picking.blob import BlobSettings, pick_blobs

DEFAULT = Path(__file__).parents[2].parent / "shared" / "data"
DATA = Path(os.environ.get("ICESTREAM_TEST_DATA", DEFAULT))

pytestmark = [
    pytest.mark.realdata,
    pytest.mark.skipif(not DATA.is_dir(), reason=f"no real data at {DATA} (ICESTREAM_TEST_DATA)"),
]

SPECTRA = (21, 24, 26, 29, 31, 35, 40, 46, 49)
PIXEL = 1.39955
TALOS = Microscope(voltage_kv=200.0, cs_mm=1.4, amplitude_contrast=0.1)


def read_spectrum(number):
    path = DATA / "ctf" / "empiar10204_power_spectra" / f"20170629_{number:05d}_frameImage_PS.mrc"
    with mrcfile.open(path, permissive=True) as mrc:
        return half_from_centred(torch.from_numpy(np.array(mrc.data, dtype=np.float32)))


def read_values(number, name):
    blocks = starfile.read(DATA / "ctf" / name)
    table = blocks["micrographs"] if isinstance(blocks, dict) else blocks
    return table[table["rlnMicrographName"].str.contains(f"_{number:05d}_")].iloc[0]


@pytest.mark.parametrize("number", SPECTRA)
def test_the_fit_agrees_with_ctffind4(number):
    reference = read_values(number, "empiar10204_reference_ctffind4_relion31.star")
    fitted = fit_ctf_spectrum(read_spectrum(number), PIXEL, TALOS)
    mean = 0.5 * (reference.rlnDefocusU + reference.rlnDefocusV)
    assert fitted.is_reliable
    assert 0.5 * (fitted.defocus_u_angstrom + fitted.defocus_v_angstrom) == pytest.approx(mean, rel=0.015)
    if reference.rlnDefocusU - reference.rlnDefocusV > 200.0:
        turn = (fitted.astigmatism_angle_deg - reference.rlnDefocusAngle + 90.0) % 180.0 - 90.0
        assert abs(turn) < 10.0
    assert fitted.fit_resolution_angstrom < reference.rlnCtfMaxResolution + 0.5


@pytest.mark.parametrize("number", SPECTRA)
def test_the_failed_ctffind_run_is_recognised_as_wrong(number):
    failed = read_values(number, "empiar10204_FAILED_ctffind_run.star")
    power = read_spectrum(number)
    wrong = replace(
        fit_ctf_spectrum(power, PIXEL, TALOS),
        defocus_u_angstrom=float(failed.rlnDefocusU),
        defocus_v_angstrom=float(failed.rlnDefocusV),
        astigmatism_angle_deg=float(failed.rlnDefocusAngle),
    )
    assert not score_ctf_spectrum(power, PIXEL, TALOS, wrong).is_reliable


def test_apoferritin_is_picked_as_experts_pick_it():
    folder = DATA / "micrographs" / "apoferritin_empiar10146"
    image = np.asarray(Image.open(folder / "May08_03.05.02.bin_avg.png"), dtype=np.float32)
    truth = np.loadtxt(folder / "May08_03.05.02_GT_coords.csv", delimiter=",", skiprows=1)[:, [1, 0]]
    pixel, diameter = 1.5, 125.0
    settings = BlobSettings(
        min_diameter_angstrom=0.85 * diameter,
        max_diameter_angstrom=1.15 * diameter,
        border_angstrom=0.5 * diameter,
    )
    picks = pick_blobs(torch.from_numpy(image), pixel, settings).centres_yx_px
    distance = np.linalg.norm(picks[:, None] - truth[None], axis=-1)
    tolerance = 0.35 * diameter / pixel
    rows, columns = linear_sum_assignment(np.where(distance <= tolerance, distance, 1e6))
    n_matched = int((distance[rows, columns] <= tolerance).sum())
    assert 2.0 * n_matched / (len(picks) + len(truth)) >= 0.85


def test_the_full_size_micrograph_is_preprocessed(tmp_path):
    from actors.preprocess.exposure import preprocess_exposure
    from actors.preprocess.settings import PreprocessSettings
    from stream.ingest.movie_reader import identify_file, inspect_movie
    from stream.records.particles import derive_exposure_id
    from stream.records.values import AcquisitionMetadata, Exposure, InputKind, Optics
    from stream.store.layout import OutputLayout

    path = tmp_path / "fei-extended.mrc"
    path.write_bytes(bz2.decompress((DATA / "micrographs" / "fei-extended.mrc.bz2").read_bytes()))
    exposure = Exposure(
        exposure_id=derive_exposure_id(path.name),
        name=path.stem,
        kind=InputKind.MICROGRAPH,
        file=identify_file(path),
        n_frames=1,
        shape_yx=inspect_movie(path).shape_yx,
        metadata=AcquisitionMetadata(),
    )
    settings = PreprocessSettings(
        pixel_size_angstrom=0.8538,
        optics=Optics(voltage_kv=300.0, cs_mm=2.7, amplitude_contrast=0.1),
        particle_diameter_angstrom=160.0,
    )
    result = preprocess_exposure(exposure, settings, OutputLayout(tmp_path / "out"))
    assert result.ctf is not None
    assert result.ctf.is_reliable
    mean = 0.5 * (result.ctf.defocus_u_angstrom + result.ctf.defocus_v_angstrom)
    assert mean == pytest.approx(10500.0, rel=0.03)
    assert result.ctf.fit_resolution_angstrom < 6.0
    assert 40 < result.n_particles < 250
