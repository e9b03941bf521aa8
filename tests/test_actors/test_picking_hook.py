"""Which picker a micrograph gets, and what each of them gives and writes."""

import stat

import mrcfile
import numpy as np
import pytest
import torch
from PIL import Image

from actors.preprocess.clock import StageClock
from actors.preprocess.ctf import CtfMeasurement
from actors.preprocess.picking import name_picker, pick_particles, write_picks
from actors.preprocess.settings import PreprocessSettings
from models.simulation.session import build_microscope
from models.simulation.settings import MicroscopeSettings, SessionSettings, SpecimenSettings
from stream.records.errors import ConfigurationError
from stream.records.values import CtfFit, Optics, RunId
from stream.store.layout import OutputLayout

PIXEL = 4.0
RUN = RunId("run003")
OPTICS = Optics(voltage_kv=300.0, cs_mm=2.7, amplitude_contrast=0.1)


@pytest.fixture(scope="module")
def session():
    """Return a simulated micrograph, its truth, and the microscope that made it."""
    settings = SessionSettings(
        specimen=SpecimenSettings(particles_per_exposure=30.0, junk_fraction=0.0),
        microscope=MicroscopeSettings(shape_yx_px=(512, 512), pixel_size_angstrom=PIXEL, n_frames=1),
        seed=3,
    )
    microscope = build_microscope("phantom:3:mass_kda=300", settings)
    image, truth = microscope.micrograph(0)
    return torch.from_numpy(image), truth, microscope


def measured(truth, *, is_reliable=True):
    fit = CtfFit(
        defocus_u_angstrom=truth.ctf.defocus_u_angstrom,
        defocus_v_angstrom=truth.ctf.defocus_v_angstrom,
        astigmatism_angle_deg=truth.ctf.astigmatism_angle_deg,
        phase_shift_deg=0.0,
        fit_resolution_angstrom=5.0,
        score=0.9,
        is_reliable=is_reliable,
    )
    return CtfMeasurement(fit=fit, ice_ratio=None)


def make_settings(microscope, **more):
    return PreprocessSettings(
        pixel_size_angstrom=PIXEL,
        optics=OPTICS,
        particle_diameter_angstrom=microscope.diameter_angstrom,
        **more,
    )


def write_map(layout, volume):
    folder = layout.run(RUN)
    folder.mkdir(parents=True)
    with mrcfile.new(folder / "map.mrc") as mrc:
        mrc.set_data(volume.numpy())
        mrc.voxel_size = PIXEL


def pick(session, layout, settings, *, template_run=None, is_reliable=True):
    image, truth, _ = session
    measurement = measured(truth, is_reliable=is_reliable)
    return pick_particles(
        "exposure_1", image, PIXEL, settings, measurement, layout, template_run, StageClock()
    )


def recall(picks, truth, tolerance=15.0):
    inside = ((truth.coordinates_yx_px > 25) & (truth.coordinates_yx_px < 487)).all(axis=1)
    centres = truth.coordinates_yx_px[inside]
    distance = np.linalg.norm(picks.centres_yx_px[:, None] - centres[None], axis=-1)
    return float((distance.min(axis=0, initial=np.inf) < tolerance).mean())


def test_a_run_s_map_gives_the_templates(session, tmp_path):
    _, truth, microscope = session
    layout, settings = OutputLayout(tmp_path), make_settings(microscope)
    write_map(layout, microscope.truth_volume)
    picks = pick(session, layout, settings, template_run=RUN)
    assert name_picker(settings, measured(truth), RUN) == "template:run003"
    assert picks.template_index is not None
    assert recall(picks, truth) > 0.9


def test_the_same_micrograph_gives_the_same_picks_in_the_same_order(session, tmp_path):
    layout, settings = OutputLayout(tmp_path), make_settings(session[2])
    first, second = (pick(session, layout, settings) for _ in range(2))
    assert np.array_equal(first.centres_yx_px, second.centres_yx_px)
    assert np.array_equal(first.scores, second.scores)


def test_without_rings_blobs_pick_whatever_the_command_says(session, tmp_path):
    _, truth, microscope = session
    settings = make_settings(microscope)
    picks = pick(session, OutputLayout(tmp_path), settings, template_run=RUN, is_reliable=False)
    assert name_picker(settings, measured(truth, is_reliable=False), RUN) == "blob"
    assert picks.template_index is None


def test_a_run_without_a_map_is_told(session, tmp_path):
    with pytest.raises(ConfigurationError, match=r"map\.mrc"):
        pick(session, OutputLayout(tmp_path), make_settings(session[2]), template_run=RUN)


def test_topaz_without_its_program_is_a_matter_of_configuration(session, tmp_path):
    with pytest.raises(ConfigurationError, match="topaz_executable"):
        pick(session, OutputLayout(tmp_path), make_settings(session[2], picker="topaz"))


def test_topaz_s_picks_leave_out_the_border(session, tmp_path):
    table = "image_name\\tx_coord\\ty_coord\\tscore\\nexposure_1\\t200\\t300\\t1.0\\nexposure_1\\t2\\t300\\t5.0\\n"
    program = tmp_path / "topaz"
    program.write_text(
        f"#!/bin/sh\nif [ $1 = preprocess ]; then touch $5/exposure_1.mrc; else printf '{table}'; fi\n"
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    settings = make_settings(session[2], picker="topaz", topaz_executable=program)
    picks = pick(session, OutputLayout(tmp_path), settings)
    assert name_picker(settings, measured(session[1]), RUN) == "topaz"
    assert picks.centres_yx_px.tolist() == [[300.0, 200.0]]


def test_the_picture_shows_what_was_masked(session, tmp_path):
    image, _, microscope = session
    layout, settings = OutputLayout(tmp_path), make_settings(microscope)
    spoiled = image.clone()
    spoiled[100:260, 200:360] *= 0.3
    picks = pick_particles(
        "exposure_1", spoiled, PIXEL, settings, measured(session[1]), layout, None, StageClock()
    )
    write_picks(layout, "exposure_1", spoiled, PIXEL, picks, settings)
    pixels = np.asarray(Image.open(layout.thumbnail("exposure_1")), dtype=int)
    red = (pixels[..., 0] > 200) & (pixels[..., 1] < 120)
    rows, columns = np.nonzero(red)
    assert picks.excluded_fraction > 0.05
    assert red.sum() > 200
    assert 60 < rows.min() < 110
    assert 250 < rows.max() < 300
    assert 160 < columns.min() < 210
