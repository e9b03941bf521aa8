"""Gain references."""

import mrcfile
import numpy as np
import pytest
import tifffile

from stream.ingest.gain import check_gain, check_gain_turned, orient_gain, read_gain, upsample_gain
from stream.records.errors import ConfigurationError, InputError


def write_gain(path, values):
    if path.suffix == ".mrc":
        with mrcfile.new(path) as mrc:
            mrc.set_data(values.astype(np.float32))
    else:
        tifffile.imwrite(path, values.astype(np.float32), photometric="minisblack")
    return path


def test_gain_is_read_from_mrc_and_tiff_with_its_defects(tmp_path):
    values = np.random.default_rng(0).uniform(0.8, 1.2, (20, 30)).astype(np.float32)
    values[3, 4], values[5, 6], values[7, 8] = 0, -2, np.inf
    tiff = read_gain(write_gain(tmp_path / "g.tif", values))
    assert tiff.shape_yx == (20, 30)
    assert np.argwhere(tiff.defect_mask).tolist() == [[3, 4], [5, 6], [7, 8]]
    assert (tiff.values[tiff.defect_mask] == 1).all()
    np.testing.assert_array_equal(tiff.values[~tiff.defect_mask], values[~tiff.defect_mask])
    values[7, 8] = 0
    np.testing.assert_array_equal(read_gain(write_gain(tmp_path / "g.mrc", values)).values, tiff.values)


def test_references_that_divide_are_inverted(tmp_path):
    values = np.full((8, 8), 4.0)
    values[0, 0] = 0
    eer = read_gain(write_gain(tmp_path / "x.gain", values))
    assert eer.values[1, 1] == pytest.approx(0.25)
    assert eer.values[0, 0] == 1
    assert eer.defect_mask[0, 0]
    assert read_gain(tmp_path / "x.gain", convention="multiply").values[1, 1] == 4


def test_something_that_is_no_gain_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"at most 25% of a gain reference are defects.*64 of 64"):
        read_gain(write_gain(tmp_path / "g.mrc", np.zeros((8, 8))))
    with pytest.raises(InputError, match=r"a gain reference is a single image.*3 frames"):
        read_gain(write_gain(tmp_path / "h.mrc", np.ones((3, 8, 8))))


def test_rotation_comes_before_the_flips_and_is_counter_clockwise(tmp_path):
    values = np.arange(1, 7, dtype=float).reshape(2, 3)
    gain = read_gain(write_gain(tmp_path / "g.mrc", values))
    np.testing.assert_array_equal(orient_gain(gain, rotate_deg=90).values, [[3, 6], [2, 5], [1, 4]])
    np.testing.assert_array_equal(orient_gain(gain, flip_x=True).values, [[3, 2, 1], [6, 5, 4]])
    np.testing.assert_array_equal(orient_gain(gain, flip_y=True).values, [[4, 5, 6], [1, 2, 3]])
    np.testing.assert_array_equal(
        orient_gain(gain, rotate_deg=90, flip_y=True).values, [[1, 4], [2, 5], [3, 6]]
    )
    with pytest.raises(ConfigurationError, match=r"multiple of 90 degrees.*45"):
        orient_gain(gain, rotate_deg=45)


@pytest.mark.parametrize(
    ("gain_shape", "movie", "remedy"),
    [
        ((20, 30), (30, 20), "turned by 90 or 270"),
        ((40, 60), (20, 30), "binned by 2"),
        ((60, 40), (20, 30), "turned by 90 degrees and binned by 2"),
        ((10, 15), (20, 30), "super-resolution"),
        ((21, 30), (20, 30), None),
    ],
)
def test_a_wrong_shape_names_both_shapes_and_the_remedy(tmp_path, gain_shape, movie, remedy):
    gain = read_gain(write_gain(tmp_path / "g.mrc", np.ones(gain_shape)))
    with pytest.raises(ConfigurationError) as caught:
        check_gain(gain, movie, "movie_1.tif")
    text = str(caught.value)
    assert f"gain {gain_shape[0]} x {gain_shape[1]}, movie {movie[0]} x {movie[1]}" in text
    assert "g.mrc" in text
    assert "movie_1.tif" in text
    assert ("; " not in text) if remedy is None else (remedy in text)


def test_a_gain_that_fits_passes(tmp_path):
    gain = read_gain(write_gain(tmp_path / "g.mrc", np.ones((20, 30))))
    check_gain(orient_gain(gain, rotate_deg=270), (30, 20), "m")


def test_while_the_orientation_is_sought_a_turned_shape_passes_and_another_does_not(tmp_path):
    gain = read_gain(write_gain(tmp_path / "g.mrc", np.ones((20, 30))))
    check_gain_turned(gain, (20, 30), "m")
    check_gain_turned(gain, (30, 20), "m")
    with pytest.raises(ConfigurationError, match=r"gain 20 x 30, movie 20 x 32"):
        check_gain_turned(gain, (20, 32), "m")


def test_a_reference_of_the_sensor_is_spread_over_up_sampled_frames(tmp_path):
    values = np.arange(1.0, 7.0).reshape(2, 3)
    values[0, 1] = 0
    gain = read_gain(write_gain(tmp_path / "g.mrc", values))
    fine = upsample_gain(gain, (4, 6), factor=2)
    np.testing.assert_array_equal(fine.values[::2, ::2], gain.values)
    np.testing.assert_array_equal(fine.values[1::2, 1::2], gain.values)
    assert fine.defect_mask.sum() == 4
    assert upsample_gain(gain, (2, 3), factor=2) is gain  # frames of the sensor's own pixels
