"""Movie writers: exact counts back from independent readers, same bytes for the same input."""

from __future__ import annotations

from pathlib import Path

import mrcfile
import numpy as np
import pytest
import tifffile

from stream.ingest.movie_writers import (
    MovieFormat,
    copy_slowly,
    encode_eer_frame,
    write_eer,
    write_gain_reference,
    write_movie,
)
from stream.records.errors import InputError


def poisson_frames(n: int = 3, mean: float = 1.5, shape: tuple[int, int] = (70, 93)) -> list[np.ndarray]:
    rng = np.random.default_rng(4)
    return [rng.poisson(mean, shape).astype(np.uint8) for _ in range(n)]


def read(path: Path) -> np.ndarray:
    if path.suffix == ".mrc":
        return np.asarray(mrcfile.read(path))
    with tifffile.TiffFile(path) as handle:
        return np.stack([page.asarray() for page in handle.pages])


@pytest.mark.parametrize("movie_format", [MovieFormat.TIFF, MovieFormat.MRC])
@pytest.mark.parametrize("mean", [0.5, 90.0])
def test_tiff_and_mrc_give_their_counts_back(tmp_path, movie_format, mean):
    frames = poisson_frames(mean=mean)
    path = tmp_path / f"movie.{movie_format.value}"
    write_movie(path, iter(frames), movie_format, pixel_size_angstrom=1.2)
    assert np.array_equal(read(path), np.stack(frames))
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_tiff_is_lzw_in_strips(tmp_path):
    write_movie(tmp_path / "movie.tiff", poisson_frames(), MovieFormat.TIFF, pixel_size_angstrom=1.0)
    with tifffile.TiffFile(tmp_path / "movie.tiff") as handle:
        assert len(handle.pages) == 3
        assert handle.pages[0].compression == tifffile.COMPRESSION.LZW
        assert handle.pages[0].rowsperstrip == 64


def test_counts_above_int8_go_to_mode_6(tmp_path):
    frames = [np.full((8, 8), 200, dtype=np.uint8)] * 2
    write_movie(tmp_path / "movie.mrc", frames, MovieFormat.MRC, pixel_size_angstrom=1.0)
    with mrcfile.open(tmp_path / "movie.mrc") as handle:
        assert int(handle.header.mode) == 6
        assert float(handle.voltage if hasattr(handle, "voltage") else handle.voxel_size.x) == pytest.approx(
            1.0
        )


@pytest.mark.parametrize("density", [0.0, 0.002, 0.03, 0.4, 1.0])
def test_eer_frames_give_their_events_back(tmp_path, density):
    rng = np.random.default_rng(1)
    for shape in ((96, 130), (33, 47), (16, 16)):
        frames = [(rng.random(shape) < density).astype(np.uint8) for _ in range(6)]
        frames[1][-1, -1] = 1  # an event on the very last pixel
        frames[2][:] = 0
        frames[2][0, 0] = 1
        frames[3].reshape(-1)[-127:] = 0  # a tail of exactly one "no event" code
        write_eer(tmp_path / "movie.eer", frames)
        assert np.array_equal(read(tmp_path / "movie.eer").astype(np.uint8), np.stack(frames))


def test_eer_carries_its_metadata_and_sub_pixels(tmp_path):
    frame = np.zeros((64, 64), dtype=np.uint8)
    frame[10, 20] = frame[40, 41] = 1
    write_eer(tmp_path / "movie.eer", [frame], seed=3)
    with tifffile.TiffFile(tmp_path / "movie.eer") as handle:
        assert handle.is_eer
        assert handle.pages[0].tags[65001].value.startswith(b"<metadata>")
        assert handle.pages[0].compression == 65001
    with tifffile.TiffFile(tmp_path / "movie.eer", superres=1) as handle:
        fine = handle.pages[0].asarray()
    assert fine.shape == (128, 128)
    assert np.array_equal(fine.reshape(64, 2, 64, 2).sum((1, 3)), frame)


def test_dense_frames_split_into_eer_frames_that_sum_to_them(tmp_path):
    frames = poisson_frames(mean=2.0)
    frames[0][5, 5] = 40  # a hot pixel saturates: one event per frame
    write_movie(tmp_path / "m.eer", frames, MovieFormat.EER, pixel_size_angstrom=1.0, eer_sub_frames=20)
    stack = read(tmp_path / "m.eer").astype(np.int64).reshape(3, 20, *frames[0].shape)
    expected = np.minimum(np.stack(frames), 20)
    assert np.array_equal(stack.sum(1), expected)
    shares = stack.sum((0, 2, 3)) / stack.sum()
    assert np.allclose(shares, 1 / 20, atol=0.01)


def test_two_counts_in_an_eer_pixel_are_refused():
    with pytest.raises(InputError, match="at most 1 event"):
        encode_eer_frame(np.full((4, 4), 2, dtype=np.uint8), np.random.default_rng(0))


@pytest.mark.parametrize("movie_format", list(MovieFormat))
def test_same_frames_give_the_same_bytes(tmp_path, movie_format):
    contents = []
    for name in ("a", "b"):
        path = tmp_path / f"{name}.{movie_format.value}"
        write_movie(path, poisson_frames(), movie_format, pixel_size_angstrom=1.0, eer_sub_frames=16, seed=7)
        contents.append(path.read_bytes())
    assert contents[0] == contents[1]


def test_a_failing_movie_leaves_nothing_behind(tmp_path):
    def frames():
        yield poisson_frames()[0]
        raise RuntimeError("camera gone")

    with pytest.raises(RuntimeError, match="camera gone"):
        write_movie(tmp_path / "movie.tiff", frames(), MovieFormat.TIFF, pixel_size_angstrom=1.0)
    assert list(tmp_path.iterdir()) == []


def test_slow_writer_grows_under_the_final_name(tmp_path):
    source, target = tmp_path / "whole", tmp_path / "movie.tiff"
    source.write_bytes(bytes(range(256)) * 40)
    sizes, waited = [], []

    def wait(seconds: float) -> None:
        sizes.append(target.stat().st_size)
        waited.append(seconds)

    copy_slowly(source, target, duration_s=5.0, n_chunks=10, wait=wait)
    assert target.read_bytes() == source.read_bytes()
    assert sizes == sorted(set(sizes))
    assert len(sizes) == 9
    assert sum(waited) == pytest.approx(4.5)


def test_gain_reference_comes_back_exactly(tmp_path):
    gain = np.random.default_rng(0).normal(1.0, 0.03, (30, 40)).astype(np.float32)
    write_gain_reference(tmp_path / "gain.mrc", gain)
    assert np.array_equal(mrcfile.read(tmp_path / "gain.mrc"), gain)
