"""Motion files: RELION's own are read as RELION reads them, ours come back as they were written."""

import os
from pathlib import Path

import numpy as np
import pytest

from stream.records.errors import InputError
from stream.sinks.motion_star import MotionTable, evaluate_motion, read_motion_star, write_motion_star

DATA = Path(os.environ.get("ICESTREAM_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
RELION = DATA / "motion" / "relion31_20170629_00021_frameImage.star"
needs_data = pytest.mark.skipif(not RELION.is_file(), reason=f"no real data at {DATA} (ICESTREAM_TEST_DATA)")


def make_table(**more):
    rng = np.random.default_rng(0)
    return MotionTable(
        movie_name="movies/a.tiff",
        gain_name="gain.mrc",
        movie_shape_yx=(3838, 3710),
        binning=1.0,
        pixel_size_angstrom=0.885,
        dose_per_frame_e_per_angstrom2=1.277,
        pre_exposure_e_per_angstrom2=0.0,
        voltage_kv=200.0,
        shifts_px=rng.normal(size=(7, 2)),
        **more,
    )


@needs_data
def test_relions_own_file_gives_the_shifts_of_its_patches():
    table = read_motion_star(RELION)
    assert table.movie_shape_yx == (3838, 3710)
    assert len(table.shifts_px) == 24
    # the file's own figures, worked out by hand for u = v = 0.5 and the second frame (t = 1)
    corner = evaluate_motion(table, np.array([[3838.0, 3710.0]]))[1, 0] - table.shifts_px[1]
    x = 0.015511 + 0.003675 - 1.29781e-4
    x += 0.5 * (-1.03856 + 0.079612 - 0.00193) + 0.25 * (0.279661 - 0.04814 + 0.001287)
    x += 0.5 * (0.278671 - 0.01615 + 2.638831e-4) + 0.25 * (-0.09079 - 0.02030 + 8.781170e-4)
    x += 0.25 * (0.260456 - 0.01174 + 3.836492e-4)
    assert corner[1] == pytest.approx(x, abs=1e-6)


@needs_data
def test_relions_accumulated_motion_is_the_path_of_its_whole_frame_shifts():
    table = read_motion_star(RELION)
    path = np.linalg.norm(np.diff(table.shifts_px, axis=0), axis=1).sum()
    # rlnAccumMotionTotal of this movie in relion31_corrected_micrographs.star: RELION 3.1 gives it in pixels
    assert path == pytest.approx(16.420495, rel=1e-4)


@needs_data
def test_relions_fitted_model_lies_on_the_patch_shifts_it_was_fitted_to():
    import starfile

    table = read_motion_star(RELION)
    patches = starfile.read(RELION)["local_shift"]
    patches = patches[patches.rlnMicrographFrameNumber == 24]
    places = patches[["rlnCoordinateY", "rlnCoordinateX"]].to_numpy()
    measured = patches[["rlnMicrographShiftY", "rlnMicrographShiftX"]].to_numpy()
    modelled = evaluate_motion(table, places)[23] - table.shifts_px[23]
    assert np.corrcoef(modelled.ravel(), measured.ravel())[0, 1] > 0.8


def test_what_is_written_is_read_again(tmp_path):
    rng = np.random.default_rng(1)
    table = make_table(
        local_coefficients=rng.normal(size=(2, 6, 3)), hot_pixels_yx=np.array([[3, 4], [50, 6]])
    )
    write_motion_star(tmp_path / "a.star", table)
    again = read_motion_star(tmp_path / "a.star")
    places = rng.uniform(0, 3700, size=(5, 2))
    np.testing.assert_allclose(evaluate_motion(again, places), evaluate_motion(table, places), rtol=1e-4)
    assert again.hot_pixels_yx.tolist() == [[3, 4], [50, 6]]
    assert again.movie_shape_yx == (3838, 3710)
    assert again.dose_per_frame_e_per_angstrom2 == pytest.approx(1.277)


def test_whole_frame_motion_alone_is_the_same_everywhere(tmp_path):
    write_motion_star(tmp_path / "a.star", make_table())
    table = read_motion_star(tmp_path / "a.star")
    shifts = evaluate_motion(table, np.array([[0.0, 0.0], [3838.0, 100.0]]))
    np.testing.assert_allclose(shifts[:, 0], shifts[:, 1])
    assert table.local_coefficients is None


def test_a_star_file_without_shifts_is_refused(tmp_path):
    (tmp_path / "a.star").write_text("data_general\n\n_rlnImageSizeX 3\n")
    with pytest.raises(InputError, match="global_shift"):
        read_motion_star(tmp_path / "a.star")
