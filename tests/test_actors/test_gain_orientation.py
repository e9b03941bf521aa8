"""How a gain reference lies, found from movies of the virtual microscope and from counts of a known camera."""

from __future__ import annotations

from pathlib import Path

import mrcfile
import numpy as np
import pytest
import tifffile
import torch

from actors.engines.base import EngineSettings
from actors.handlers import RankerOptions, WorkerSpec
from actors.local import LocalRuntime
from actors.preprocess.gain import load_session_gain, orient_session_gain, read_raw_mean
from actors.preprocess.settings import PreprocessSettings
from models.motion.gain import TURNS
from stream.commands.simulate import SimulationSettings, write_simulated_session
from stream.ingest.gain import orient_gain, read_gain
from stream.ingest.movie_reader import identify_file, inspect_movie
from stream.ingest.movie_writers import split_for_eer, write_eer
from stream.records.commands import OrientGain
from stream.records.errors import ConfigurationError, InputError
from stream.records.events import GainOriented, StageFailed
from stream.records.particles import derive_exposure_id
from stream.records.values import AcquisitionMetadata, Exposure, FailureKind, InputKind, Optics, Stage


def make_exposure(path: Path) -> Exposure:
    header = inspect_movie(path)
    return Exposure(
        exposure_id=derive_exposure_id(path.name),
        name=path.stem,
        kind=InputKind.MOVIE,
        file=identify_file(path),
        n_frames=header.n_frames,
        shape_yx=header.shape_yx,
        metadata=AcquisitionMetadata(),
    )


def make_settings(gain: Path | None, **more) -> PreprocessSettings:
    optics = Optics(voltage_kv=300.0, cs_mm=2.7, amplitude_contrast=0.1)
    return PreprocessSettings(pixel_size_angstrom=3.0, optics=optics, gain=gain, **more)


def write_gain(path: Path, values: np.ndarray) -> Path:
    if path.suffix == ".gain":
        tifffile.imwrite(path, values.astype(np.float32), photometric="minisblack")
    else:
        mrcfile.write(path, np.ascontiguousarray(values, dtype=np.float32), overwrite=True)
    return path


def ask(movies, gain: Path | None, tmp_path: Path, **more):
    """Send the question the way the service does and return the event that answers it."""
    spec = WorkerSpec(
        out=tmp_path / "out",
        source=tmp_path,
        preprocess=make_settings(gain, **more),
        ranker=RankerOptions(model=None, batch_size=1, max_wait_s=0.0, n_threads=1, n_callers=1),
        engine_name="embedded",
        engine=EngineSettings(symmetry="C1", mask_diameter_angstrom=None),
    )
    runtime = LocalRuntime(spec, clock=lambda: 7.0)
    runtime.submit(OrientGain(exposures=tuple(make_exposure(path) for path in movies)))
    (event,) = runtime.poll(0.0)
    runtime.close()
    assert event.at == 7.0
    return event


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """Two movies of the virtual microscope and its gain reference, which multiplies and lies as the movies do."""
    folder = tmp_path_factory.mktemp("microscope")
    files = write_simulated_session(
        SimulationSettings(
            movies=2, size_yx_px=(288, 288), frames=6, pixel_size_angstrom=3.0, particles_per_movie=12, seed=3
        ),
        folder,
    )
    return files.movies, mrcfile.read(files.gain)


@pytest.mark.parametrize("turn", TURNS, ids=str)
def test_a_reference_that_lies_in_any_of_eight_ways_is_turned_back(session, tmp_path, turn):
    movies, true = session
    lying = turn.apply(torch.from_numpy(true)).numpy()
    path = write_gain(tmp_path / "gain.mrc", lying)
    event = ask(movies[:1], path, tmp_path)
    assert isinstance(event, GainOriented)
    found = event.orientation
    assert found is not None, event.note
    turned = orient_gain(
        read_gain(path), flip_x=found.flip_x, flip_y=found.flip_y, rotate_deg=found.rotate_deg
    )
    np.testing.assert_array_equal(turned.values, np.where(true > 0, true, 1))
    assert event.contrast > 10
    assert event.n_movies == 1


def test_a_turn_is_what_the_reader_of_references_calls_by_the_same_names(tmp_path):
    values = np.random.default_rng(0).uniform(0.5, 1.5, (6, 9))
    gain = read_gain(write_gain(tmp_path / "g.mrc", values))
    for turn in TURNS:
        ours = turn.apply(torch.from_numpy(gain.values)).numpy()
        theirs = orient_gain(gain, flip_x=turn.flip_x, flip_y=turn.flip_y, rotate_deg=turn.rotate_deg).values
        np.testing.assert_array_equal(ours, theirs)


def test_an_unrelated_reference_is_refused_with_the_table_of_correlations(session, tmp_path):
    movies, true = session
    other = np.random.default_rng(1).normal(1, 0.03, true.shape)
    event = ask(movies, write_gain(tmp_path / "gain.mrc", other), tmp_path)
    assert event.orientation is None
    assert event.contrast < 6
    assert "no orientation of gain.mrc stands out" in event.note
    assert event.note.count("±") == 8
    assert event.n_movies == 2


def test_a_uniform_reference_is_refused(session, tmp_path):
    movies, true = session
    event = ask(movies, write_gain(tmp_path / "gain.mrc", np.full(true.shape, 1.2)), tmp_path)
    assert event.orientation is None
    assert event.contrast == 0
    assert "uniform" in event.note


def test_a_reference_the_other_way_about_is_refused_until_the_convention_is_set(session, tmp_path):
    movies, true = session
    path = write_gain(tmp_path / "gain.mrc", 1 / np.where(true > 0, true, 1))
    event = ask(movies, path, tmp_path)
    assert event.orientation is None
    assert "gain_convention" in event.note
    assert ask(movies, path, tmp_path, gain_convention="divide").orientation is not None


def write_counts(path: Path, gain: np.ndarray, electrons_per_px: float, seed: int, n_frames: int = 4) -> Path:
    rng = np.random.default_rng((5, seed))
    frames = rng.poisson(electrons_per_px / n_frames / gain, (n_frames, *gain.shape)).astype(np.uint8)
    tifffile.imwrite(path, frames, photometric="minisblack", compression="zlib")
    return path


def draw_gain(shape, seed=0):
    return np.random.default_rng((9, seed)).normal(1, 0.03, shape)


def test_a_reference_whose_shape_contradicts_the_movies_is_an_error_that_says_both_shapes(tmp_path):
    gain = draw_gain((96, 128))
    movie = write_counts(tmp_path / "m.tif", gain, 8, 0)
    event = ask([movie], write_gain(tmp_path / "gain.mrc", draw_gain((96, 120))), tmp_path)
    assert isinstance(event, StageFailed)
    assert event.kind is FailureKind.RESOURCE
    assert "gain 96 x 120, movie 96 x 128" in event.reason


def test_a_reference_that_only_fits_turned_is_tried_turned_alone(tmp_path):
    gain = draw_gain((160, 224))
    movie = write_counts(tmp_path / "m.tif", gain, 40, 0)
    path = write_gain(tmp_path / "gain.mrc", np.rot90(gain))
    found = ask([movie], path, tmp_path).orientation
    assert found.rotate_deg in (90, 270)
    oriented = make_settings(
        path, gain_flip_x=found.flip_x, gain_flip_y=found.flip_y, gain_rotate_deg=found.rotate_deg
    )
    loaded = load_session_gain(oriented, (160, 224), "m.tif")
    np.testing.assert_allclose(loaded.reference.values, gain, rtol=1e-5)


def test_what_one_faint_movie_does_not_show_eight_do(tmp_path):
    gain = draw_gain((160, 160))
    movies = [write_counts(tmp_path / f"m{i}.tif", gain, 0.8, i) for i in range(8)]
    path = write_gain(tmp_path / "gain.mrc", gain[::-1])
    assert ask(movies[:1], path, tmp_path).orientation is None
    event = ask(movies, path, tmp_path)
    assert event.orientation is not None
    assert event.orientation.flip_y


def test_a_broken_movie_is_left_out_and_named_and_is_the_error_where_it_is_the_only_one(tmp_path):
    gain = draw_gain((160, 160))
    movies = [write_counts(tmp_path / f"m{i}.tif", gain, 40, i) for i in range(2)]
    exposures = [make_exposure(path) for path in movies]
    movies[0].write_bytes(movies[0].read_bytes()[:2000])
    settings = make_settings(write_gain(tmp_path / "gain.mrc", gain))
    found = orient_session_gain(exposures, settings)
    assert found.orientation is not None
    assert found.n_movies == 2
    assert "left out" in found.note
    assert "m0.tif" in found.note
    with pytest.raises(InputError, match=r"m0\.tif"):
        orient_session_gain(exposures[:1], settings)


def test_a_failed_question_fails_in_the_name_of_its_first_movie(tmp_path):
    movie = write_counts(tmp_path / "m.tif", draw_gain((64, 64)), 8, 0)
    event = ask([movie], None, tmp_path)
    assert isinstance(event, StageFailed)
    assert (event.exposure_id, event.stage) == (derive_exposure_id("m.tif"), Stage.PREPROCESS)
    with pytest.raises(ConfigurationError, match="names a gain reference"):
        orient_session_gain([make_exposure(movie)], make_settings(None))


def test_an_eer_gain_of_the_sensor_is_found_and_holds_for_up_sampled_frames(tmp_path):
    gain = draw_gain((256, 256))
    frames = np.random.default_rng(2).poisson(2.0 / gain, (8, 256, 256)).astype(np.uint8)
    write_eer(tmp_path / "m.eer", split_for_eer(frames, 16))
    # Falcon references divide: the file holds the sensor's response
    path = write_gain(tmp_path / "camera.gain", np.rot90(1 / gain, -1))
    found = ask([tmp_path / "m.eer"], path, tmp_path, eer_upsampling=2).orientation
    assert (found.rotate_deg, found.flip_x, found.flip_y) == (90, False, False)
    settings = make_settings(path, gain_rotate_deg=90)
    loaded = load_session_gain(settings, (512, 512), "m.eer", upsampling=2).reference
    np.testing.assert_allclose(loaded.values, gain.repeat(2, axis=0).repeat(2, axis=1), rtol=1e-5)


def test_only_as_many_frames_are_read_as_the_answer_needs(tmp_path):
    frames = np.full((40, 32, 32), 4, np.uint8)
    frames[:, ::2] = 2
    frames[0] = 12
    tifffile.imwrite(tmp_path / "m.tif", frames, photometric="minisblack")
    mean = read_raw_mean(str(tmp_path / "m.tif"))
    # 3 e/px and frame: six frames from the first to the last make 16
    np.testing.assert_allclose(mean[1, 0], (12 + 5 * 4) / 6, rtol=1e-6)
