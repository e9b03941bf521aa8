"""Movies as microscopes write them, and every way in which they are broken."""

import os
import struct
import tracemalloc
import warnings
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import tifffile

from stream.ingest.eer import count_fractions, split_into_fractions
from stream.ingest.files import fingerprint_file, identify_file
from stream.ingest.movie_reader import (
    MovieFormat,
    check_content,
    inspect_micrograph,
    inspect_movie,
    iterate_chosen,
    iterate_frames,
    iterated_shape,
    n_iterated_frames,
    read_micrograph,
)
from stream.ingest.movie_writers import encode_eer_frame, write_eer, write_eer_strips
from stream.records.errors import InputError, ResourceError


def poisson(shape, seed=0, dtype=np.uint8):
    return np.random.default_rng(seed).poisson(1.0, shape).astype(dtype)


def write_tiff(path: Path, frames: np.ndarray, **options) -> Path:
    with tifffile.TiffWriter(
        path, bigtiff=options.pop("bigtiff", False), byteorder=options.pop("byteorder", None)
    ) as w:
        for frame in frames:
            w.write(frame, photometric="minisblack", contiguous=False, metadata=None, **options)
    return path


def write_mrc(path: Path, data: np.ndarray, pixel_size: float = 0.0) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # mrcfile warns of the NaN that some tests want
        with mrcfile.new(path, overwrite=True) as mrc:
            mrc.set_data(data)
            if data.ndim == 3:
                mrc.set_image_stack()
            mrc.voxel_size = pixel_size
    return path


@pytest.mark.parametrize("compression", [None, "lzw", "zstd", "deflate"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16])
def test_tiff_movies_come_back_as_written(tmp_path, compression, dtype):
    frames = poisson((5, 61, 70), dtype=dtype)  # odd on purpose
    path = write_tiff(tmp_path / "m.tif", frames, compression=compression, rowsperstrip=16)
    header = inspect_movie(path)
    assert (header.n_frames, header.shape_yx, header.format) == (5, (61, 70), MovieFormat.TIFF)
    assert header.dtype == np.dtype(dtype).name
    assert header.is_odd_sized
    check_content(path, header)
    read = list(iterate_frames(path))
    assert all(frame.dtype == (np.uint8 if dtype is np.uint8 else np.float32) for frame in read)
    np.testing.assert_array_equal(np.stack(read), frames)


@pytest.mark.parametrize("options", [{"bigtiff": True}, {"byteorder": ">"}, {"tile": (32, 32)}])
def test_every_flavour_of_tiff_is_read(tmp_path, options):
    frames = poisson((2, 64, 64), dtype=np.uint16)
    path = write_tiff(tmp_path / "m.tiff", frames, compression="zlib", **options)
    np.testing.assert_array_equal(np.stack(list(iterate_frames(path))), frames)


def test_tiff_pixel_size_is_read_from_a_resolution_in_centimetres_only(tmp_path):
    frames = poisson((1, 16, 16))
    path = write_tiff(
        tmp_path / "m.tif", frames, resolution=(1e8 / 0.85, 1e8 / 0.85), resolutionunit="CENTIMETER"
    )
    assert inspect_movie(path).pixel_size_angstrom == pytest.approx(0.85, rel=1e-6)
    path = write_tiff(tmp_path / "n.tif", frames, resolution=(72, 72), resolutionunit="INCH")
    assert inspect_movie(path).pixel_size_angstrom is None


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.uint16, np.float16, np.float32])
def test_mrc_movies_of_every_mode_come_back_as_written(tmp_path, dtype):
    frames = poisson((4, 31, 40), dtype=np.float32).astype(dtype)
    path = write_mrc(tmp_path / "m.mrcs", frames, 1.25)
    header = inspect_movie(path)
    assert (header.n_frames, header.shape_yx, header.format) == (4, (31, 40), MovieFormat.MRC)
    assert header.pixel_size_angstrom == pytest.approx(1.25)
    read = np.stack(list(iterate_frames(path)))
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, frames.astype(np.float32))


def test_imod_unsigned_bytes_and_old_headers_without_signature_are_read(tmp_path):
    frames = poisson((2, 16, 16)) + np.uint8(200)
    path = write_mrc(tmp_path / "m.mrc", frames.view(np.int8))
    data = bytearray(path.read_bytes())
    data[152:160] = struct.pack("<2i", 1146047817, 0)
    path.write_bytes(data)
    np.testing.assert_array_equal(np.stack(list(iterate_frames(path))), frames)
    data[208:212] = b"\0\0\0\0"
    path.write_bytes(data)
    np.testing.assert_array_equal(np.stack(list(iterate_frames(path))), frames)


def test_a_pixel_size_of_exactly_one_counts_as_not_said(tmp_path):
    path = write_mrc(tmp_path / "m.mrc", poisson((2, 8, 8), dtype=np.float32), 1.0)
    assert inspect_movie(path).pixel_size_angstrom is None


def eer_movie(path: Path, n_frames: int = 10, size: int = 64):
    rng = np.random.default_rng(5)
    frames = (rng.random((n_frames, size, size)) < 0.05).astype(np.uint8)
    write_eer(path, frames)
    return path, frames


def test_eer_events_come_back_frame_by_frame_and_summed_into_fractions(tmp_path):
    path, frames = eer_movie(tmp_path / "m.eer")
    header = inspect_movie(path)
    assert (header.n_frames, header.format) == (10, MovieFormat.EER)
    assert header.shape_yx == (64, 64)
    check_content(path, header)
    np.testing.assert_array_equal(np.stack(list(iterate_frames(path))), frames)
    fractions = np.stack(list(iterate_frames(path, eer_fractions=4)))
    assert fractions.shape == (4, 64, 64)
    expected = [frames[a:b].sum(0) for a, b in ((0, 2), (2, 5), (5, 7), (7, 10))]
    np.testing.assert_array_equal(fractions, expected)
    assert n_iterated_frames(header, eer_fractions=4) == 4


def test_more_fractions_than_eer_frames_give_the_frames(tmp_path):
    path, frames = eer_movie(tmp_path / "m.eer", n_frames=3)
    np.testing.assert_array_equal(np.stack(list(iterate_frames(path, eer_fractions=40))), frames)


def test_a_truncated_eer_is_refused(tmp_path):
    path, _ = eer_movie(tmp_path / "m.eer")
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(InputError, match=r"truncated"):
        inspect_movie(path)


@pytest.mark.parametrize("fraction", [0.2, 0.5, 0.8, 0.99])
@pytest.mark.parametrize("compression", [None, "lzw"])
def test_a_tiff_cut_anywhere_is_refused_with_the_byte_that_is_missing(tmp_path, fraction, compression):
    path = write_tiff(tmp_path / "m.tif", poisson((6, 64, 64)), compression=compression)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * fraction)])
    with pytest.raises(InputError, match=r"m\.tif: .*truncated.*frame \d needs byte \d+, the file has \d+"):
        inspect_movie(path)


def test_a_truncated_mrc_says_how_many_frames_are_there(tmp_path):
    path = write_mrc(tmp_path / "m.mrc", poisson((5, 32, 32), dtype=np.float32))
    data = path.read_bytes()
    path.write_bytes(data[:-5000])
    with pytest.raises(InputError, match=r"m\.mrc.*truncated.*found: 3 of 5 frames"):
        inspect_movie(path)
    path.write_bytes(data[:500])
    with pytest.raises(InputError, match=r"magic.*500 bytes in all"):
        inspect_movie(path)


def test_an_mrc_whose_header_lags_behind_its_data_is_still_being_written(tmp_path):
    path = write_mrc(tmp_path / "m.mrc", poisson((5, 32, 32), dtype=np.float32))
    data = bytearray(path.read_bytes())
    data[8:12] = struct.pack("<i", 3)
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"still being written.*header 3 frames, file 5"):
        inspect_movie(path)


def test_an_empty_file_is_refused(tmp_path):
    path = tmp_path / "m.eer"
    path.touch()
    with pytest.raises(InputError, match=r"m\.eer: a movie is not empty \(found: 0 bytes\)"):
        inspect_movie(path)


def test_wrong_magic_is_refused_and_shown(tmp_path):
    path = tmp_path / "m.tif"
    path.write_bytes(b"\x89PNG" + bytes(5000))
    with pytest.raises(InputError, match=r"magic.*89 50 4e 47"):
        inspect_movie(path)


def test_zeros_where_a_file_was_reserved_are_refused(tmp_path):
    path = tmp_path / "m.mrc"
    path.write_bytes(bytes(100_000))
    with pytest.raises(InputError, match=r"magic"):
        inspect_movie(path)


def test_zero_frames_are_refused(tmp_path):
    tiff = tmp_path / "m.tif"
    tiff.write_bytes(b"II*\0" + bytes(4))
    with pytest.raises(InputError, match=r"at least one frame.*0 frames"):
        inspect_movie(tiff)
    path = write_mrc(tmp_path / "m.mrc", poisson((2, 8, 8), dtype=np.float32))
    data = bytearray(path.read_bytes())
    data[8:12] = bytes(4)
    path.write_bytes(data[:1024])
    with pytest.raises(InputError, match=r"at least one frame.*0 frames"):
        inspect_movie(path)


def test_a_name_that_lies_about_the_format_is_refused(tmp_path):
    path = write_tiff(tmp_path / "m.mrc", poisson((2, 16, 16)))
    with pytest.raises(InputError, match=r"name agrees.*\.mrc holds TIFF"):
        inspect_movie(path)


def test_frames_of_different_shape_are_refused_with_both_shapes(tmp_path):
    with tifffile.TiffWriter(tmp_path / "m.tif") as w:
        for shape in ((32, 32), (32, 32), (32, 48)):
            w.write(poisson(shape), photometric="minisblack", contiguous=False, metadata=None)
    with pytest.raises(InputError, match=r"frame 1 is 32 x 32, frame 3 is 32 x 48"):
        inspect_movie(tmp_path / "m.tif")


def test_colour_images_are_refused(tmp_path):
    tifffile.imwrite(tmp_path / "m.tif", np.zeros((16, 16, 3), np.uint8), photometric="rgb")
    with pytest.raises(InputError, match=r"one value per pixel.*3 samples"):
        inspect_movie(tmp_path / "m.tif")


def test_nan_is_found_by_the_check_and_by_the_reader(tmp_path):
    frames = np.ones((5, 16, 16), np.float32)
    frames[0] = poisson((16, 16))
    frames[1, 2, 3] = np.nan  # a frame that the spot check does not look at
    path = write_mrc(tmp_path / "m.mrc", frames)
    with pytest.raises(InputError, match=r"frame 2: 1 NaN or infinite"):
        list(iterate_frames(path))
    path = write_mrc(tmp_path / "n.mrc", np.full((3, 16, 16), np.nan, np.float32))
    with pytest.raises(InputError, match=r"frame 1: 256 NaN or infinite"):
        check_content(path, inspect_movie(path))


def test_all_zero_movies_are_refused_by_the_check_and_by_the_reader(tmp_path):
    path = write_tiff(tmp_path / "m.tif", np.zeros((3, 16, 16), np.uint8))
    with pytest.raises(InputError, match=r"all zero or constant"):
        check_content(path, inspect_movie(path))
    with pytest.raises(InputError, match=r"all frames are zero"):
        list(iterate_frames(path))


def test_damaged_compressed_data_name_the_frame(tmp_path):
    path = write_tiff(tmp_path / "m.tif", poisson((3, 64, 64)), compression="zstd")
    header = inspect_movie(path)
    with tifffile.TiffFile(path) as tiff:
        start, count = tiff.pages[1].dataoffsets[0], tiff.pages[1].databytecounts[0]
    data = bytearray(path.read_bytes())
    data[start : start + count] = b"\xff" * count
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"every frame decodes.*frame 2"):
        check_content(path, header)


def test_a_chain_of_directories_that_bites_its_tail_ends(tmp_path):
    path = write_tiff(tmp_path / "m.tif", poisson((2, 16, 16)))
    data = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as tiff:
        first, second = (page.offset for page in tiff.pages)
    n_entries = struct.unpack("<H", data[second : second + 2])[0]
    at = second + 2 + 12 * n_entries
    data[at : at + 4] = struct.pack("<I", first)
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"chain of TIFF directories ends"):
        inspect_movie(path)


@pytest.mark.parametrize("seed", range(40))
def test_random_damage_is_an_input_error_or_still_a_movie(tmp_path, seed):
    rng = np.random.default_rng(seed)
    path = tmp_path / "m.tif"
    write_tiff(path, poisson((3, 32, 32)), compression="lzw", rowsperstrip=8)
    data = bytearray(path.read_bytes())
    for position in rng.integers(0, len(data), 12):
        data[position] = rng.integers(256)
    path.write_bytes(data)
    try:
        header = inspect_movie(path)
        check_content(path, header)
        assert sum(1 for _ in iterate_frames(path)) == header.n_frames
    except InputError as error:
        assert str(path) in str(error)  # noqa: PT017 - either outcome is right, another exception is not


def test_a_vanished_file_a_folder_and_a_loop_of_links_are_input_errors(tmp_path):
    with pytest.raises(InputError, match=r"vanished"):
        inspect_movie(tmp_path / "gone.tif")
    (tmp_path / "folder.tif").mkdir()
    with pytest.raises(InputError, match=r"not a folder"):
        inspect_movie(tmp_path / "folder.tif")
    (tmp_path / "loop.tif").symlink_to(tmp_path / "loop.tif")
    with pytest.raises(InputError, match=r"loop of symbolic links"):
        identify_file(tmp_path / "loop.tif")


def test_no_permission_is_an_input_error_and_an_io_error_is_the_machines(tmp_path, monkeypatch):
    path = write_tiff(tmp_path / "m.tif", poisson((2, 16, 16)))

    def refuse(*_args: object, **_options: object):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(InputError, match=r"permission.*found: Permission denied"):
        inspect_movie(path)

    def fail(*_args: object, **_options: object):
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(ResourceError, match=r"Input/output error"):
        inspect_movie(path)


def test_micrographs_are_single_images(tmp_path):
    image = np.random.default_rng(0).normal(size=(33, 48)).astype(np.float32)
    path = write_mrc(tmp_path / "m.mrc", image, 0.9)
    assert inspect_micrograph(path).n_frames == 1
    np.testing.assert_array_equal(read_micrograph(path), image)
    movie = write_mrc(tmp_path / "movie.mrc", np.stack([image, image]))
    with pytest.raises(InputError, match=r"a micrograph is a single image.*2 frames"):
        inspect_micrograph(movie)


def test_fingerprints_see_head_tail_and_size(tmp_path):
    path = tmp_path / "a.bin"
    data = bytearray(os.urandom(300_000))
    path.write_bytes(data)
    first = fingerprint_file(path)
    assert identify_file(path).fingerprint == first
    for position in (10, 299_990):
        changed = bytearray(data)
        changed[position] ^= 1
        path.write_bytes(changed)
        assert fingerprint_file(path) != first
    path.write_bytes(data[:150_000] + data[150_001:])
    assert fingerprint_file(path) != first


DATA = Path(os.environ.get("ICESTREAM_TEST_DATA", Path(__file__).parents[2] / "../shared/data")).resolve()


@pytest.mark.realdata
@pytest.mark.skipif(not DATA.is_dir(), reason=f"no real data at {DATA}")
def test_real_micrographs_and_maps_are_read_as_mrcfile_reads_them():
    path = DATA / "micrographs/24dec03a_00034gr_00005sq_v01_00003hl_00018ex_ds8.mrc"
    np.testing.assert_array_equal(read_micrograph(path), mrcfile.read(path))
    stack = next((DATA / "particles/betagal_empiar10204/stacks").glob("*.mrcs"))
    np.testing.assert_array_equal(
        np.stack(list(iterate_frames(stack))), mrcfile.read(stack).astype(np.float32)
    )
    header = inspect_micrograph(DATA / "micrographs/KLH_xmipp.tif")
    assert header.shape_yx == tifffile.imread(DATA / "micrographs/KLH_xmipp.tif").shape


def eer_of_one_event(sub_pixel: int) -> bytes:
    """A strip of 8 x 8 px with one event at row 3, column 5, at this 4-bit position within its pixel."""

    class Fixed:
        def integers(self, low, high, size):
            return np.full(size, sub_pixel)

    frame = np.zeros((8, 8), np.uint8)
    frame[3, 5] = 1
    return encode_eer_frame(frame, Fixed())


@pytest.mark.parametrize("sub_pixel", range(16))
def test_up_sampling_puts_an_event_into_its_quarter_of_the_pixel(tmp_path, sub_pixel):
    write_eer_strips(tmp_path / "m.eer", [(eer_of_one_event(sub_pixel), (8, 8))] * 2)
    (frame,) = iterate_frames(tmp_path / "m.eer", eer_fractions=1, eer_upsampling=2)
    assert frame.shape == (16, 16)
    # the format's 4 bits are y and x of the quarter pixel, each with its first bit inverted
    right, below = ((sub_pixel ^ 0x0A) & 2) >> 1, ((sub_pixel ^ 0x0A) & 8) >> 3
    assert frame.sum() == 2
    assert frame[2 * 3 + below, 2 * 5 + right] == 2


def test_up_sampled_frames_bin_to_the_sensors_frames(tmp_path):
    path, frames = eer_movie(tmp_path / "m.eer", n_frames=12)
    header = inspect_movie(path)
    assert iterated_shape(header) == (64, 64)
    assert iterated_shape(header, eer_upsampling=2) == (128, 128)
    fine = np.stack(list(iterate_frames(path, eer_fractions=3, eer_upsampling=2)))
    binned = fine.reshape(3, 64, 2, 64, 2).sum((2, 4))
    np.testing.assert_array_equal(binned, frames.reshape(3, 4, 64, 64).sum(1))
    # each quarter of a pixel has its share
    shares = fine.reshape(3, 64, 2, 64, 2).sum((0, 1, 3)) / fine.sum()
    assert shares == pytest.approx(np.full((2, 2), 0.25), abs=0.03)


def test_more_than_255_eer_frames_in_a_fraction_do_not_overflow(tmp_path):
    frames = np.zeros((300, 16, 16), np.uint8)
    frames[:, 3:5, 4] = 1
    write_eer(tmp_path / "m.eer", frames)
    (total,) = iterate_frames(tmp_path / "m.eer", eer_fractions=1)
    assert total.dtype == np.float32
    assert total[3, 4] == 300
    assert total.sum() == 600


def test_fractions_of_a_dose_are_the_nearest_whole_number():
    assert count_fractions(1000, 40.0, 1.0) == 40
    assert count_fractions(1000, 40.0, 0.9) == 44
    assert count_fractions(30, 40.0, 1.0) == 30  # no more than there are raw frames
    assert count_fractions(30, 0.4, 1.0) == 1
    assert [len(f) for f in split_into_fractions(range(10), 4)] == [2, 3, 2, 3]


@pytest.mark.parametrize("tail", ["zeros", "missing"])
def test_an_eer_whose_last_strip_was_never_finished_is_refused(tmp_path, tail):
    rng = np.random.default_rng(1)
    path = tmp_path / "m.eer"
    write_eer(path, (rng.random((6, 256, 256)) < 0.05).astype(np.uint8))
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[5]
        start, count = page.dataoffsets[0], page.databytecounts[0]
        counts_at = page.tags["StripByteCounts"].valueoffset
    data = bytearray(path.read_bytes())
    if tail == "zeros":  # reserved by the file system, never written
        data[start + count // 2 : start + count] = bytes(count - count // 2)
    else:  # the directory counts what was there when the writer stopped
        data[counts_at : counts_at + 8] = struct.pack("<Q", count // 2)
    path.write_bytes(data)
    header = inspect_movie(path)
    with pytest.raises(
        InputError, match=r"m\.eer.*reach its last row.*frame 6 has no event in its last 32 rows"
    ):
        check_content(path, header)
    with pytest.raises(InputError, match=r"frame 6 has no event"):
        list(iterate_frames(path, eer_fractions=2, eer_upsampling=2))


def test_a_faint_eer_is_not_taken_for_a_damaged_one(tmp_path):
    rng = np.random.default_rng(2)
    path = tmp_path / "m.eer"
    frames = (rng.random((40, 128, 128)) < 0.0005).astype(np.uint8)
    write_eer(path, frames)
    check_content(path, inspect_movie(path))
    np.testing.assert_array_equal(np.stack(list(iterate_frames(path))), frames)


@pytest.mark.parametrize(
    ("dtype", "top"), [(np.uint8, 255), (np.uint16, 65535), (np.int16, 32767), (np.int8, 127)]
)
def test_a_saturated_frame_is_refused_and_hot_pixels_are_not(tmp_path, dtype, top):
    frames = poisson((3, 64, 64)).astype(dtype)
    frames[1, 0, :30] = top  # hot pixels: 0.7 %
    path = (
        write_mrc(tmp_path / "m.mrc", frames) if dtype is np.int8 else write_tiff(tmp_path / "m.tif", frames)
    )
    check_content(path, inspect_movie(path))
    frames[1, :4] = top
    path = (
        write_mrc(tmp_path / "n.mrc", frames) if dtype is np.int8 else write_tiff(tmp_path / "n.tif", frames)
    )
    with pytest.raises(InputError, match=rf"saturated.*frame 2: 6\.2% at {top}"):
        check_content(path, inspect_movie(path))
    with pytest.raises(InputError, match=r"saturated.*frame 2"):
        list(iterate_frames(path))


def test_chosen_frames_come_in_the_order_asked_for(tmp_path):
    frames = poisson((6, 16, 16))
    path = write_tiff(tmp_path / "m.tif", frames)
    read = np.stack(list(iterate_chosen(path, inspect_movie(path), (4, 0))))
    np.testing.assert_array_equal(read, frames[[4, 0]])


@pytest.mark.parametrize("kind", ["tiff", "mrc", "eer"])
def test_reading_a_movie_holds_a_few_frames_however_many_there_are(tmp_path, kind):
    n_frames, shape = 60, (256, 256)
    path = tmp_path / f"m.{kind}"
    if kind == "tiff":
        write_tiff(path, poisson((n_frames, *shape), dtype=np.uint16), compression="lzw", rowsperstrip=64)
    elif kind == "mrc":
        write_mrc(path, poisson((n_frames, *shape), dtype=np.float32))
    else:
        strip = encode_eer_frame((poisson(shape) > 2).astype(np.uint8), np.random.default_rng(0))
        write_eer_strips(path, ((strip, shape) for _ in range(10 * n_frames)))
    tracemalloc.start()
    n_read = sum(1 for _ in iterate_frames(path, eer_fractions=n_frames))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n_read == n_frames
    # six float32 frames, and half a megabyte for the directories of 600 EER frames
    assert peak < 6 * 4 * shape[0] * shape[1] + 5e5
