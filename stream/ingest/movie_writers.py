"""Writers of what a microscope leaves on disk: TIFF, MRC and EER movies, gain references, EPU XML.

Row 0 of an array is the first row in every format here (tifffile's and EER's order; programs of the RELION
family flip TIFF rows on reading, which concerns them and not the file). Frames are consumed one at a time. A
movie appears under its final name either at once (`write_movie`, by rename) or grows there
(`copy_slowly`, as over a slow network).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator
from enum import Enum
from pathlib import Path
from typing import BinaryIO

import mrcfile
import numpy as np
import numpy.typing as npt
import tifffile

from stream.records.errors import InputError

Frame = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]

_EER_COMPRESSION_7BIT = 65001
_EER_METADATA_TAG = 65001
_EER_MAX_SKIP = 127


class MovieFormat(Enum):
    """File formats of movies; the value is the suffix."""

    TIFF = "tiff"
    EER = "eer"
    MRC = "mrc"


def write_movie(
    path: Path,
    frames: Iterable[Frame],
    movie_format: MovieFormat,
    *,
    pixel_size_angstrom: float,
    eer_sub_frames: int = 1,
    seed: int = 0,
) -> None:
    """Write a movie beside `path` and rename it, so that it appears complete.

    `seed` places EER events within their pixel and, with `eer_sub_frames`, within their frame.
    """
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        match movie_format:
            case MovieFormat.TIFF:
                write_tiff(temporary, frames)
            case MovieFormat.MRC:
                write_mrc(temporary, frames, pixel_size_angstrom=pixel_size_angstrom)
            case MovieFormat.EER:
                write_eer(temporary, split_for_eer(frames, eer_sub_frames, seed=seed), seed=seed)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_tiff(path: Path, frames: Iterable[Frame]) -> None:
    """Write a TIFF with LZW compression, one page per frame, strips of 64 rows."""
    with tifffile.TiffWriter(path, bigtiff=False) as writer:
        for frame in frames:
            writer.write(
                frame,
                photometric="minisblack",
                compression="lzw",
                rowsperstrip=min(64, frame.shape[0]),
                contiguous=False,
                metadata=None,
                software="icestream",
                datetime=False,
            )


def write_mrc(path: Path, frames: Iterable[Frame], *, pixel_size_angstrom: float) -> None:
    """Write an MRC stack: mode 0 (int8) for counts up to 127, else mode 6 (uint16); header from the whole."""
    stack = np.stack(list(frames))
    data = stack.astype(np.int8) if int(stack.max()) <= 127 else stack.astype(np.uint16)
    with mrcfile.new(path, overwrite=True) as handle:
        handle.set_data(data)
        handle.set_image_stack()
        handle.voxel_size = pixel_size_angstrom
        _freeze_header(handle)


def write_gain_reference(path: Path, gain: npt.NDArray[np.float32]) -> None:
    """Write a gain reference (float32 MRC) that raw counts are *multiplied* by; 0 marks dead pixels."""
    with mrcfile.new(path, overwrite=True) as handle:
        handle.set_data(np.asarray(gain, dtype=np.float32))
        _freeze_header(handle)


def write_volume(path: Path, volume: npt.NDArray[np.float32], *, pixel_size_angstrom: float) -> None:
    """Write a map (z, y, x) as a float32 MRC."""
    with mrcfile.new(path, overwrite=True) as handle:
        handle.set_data(np.asarray(volume, dtype=np.float32))
        handle.set_volume()
        handle.voxel_size = pixel_size_angstrom
        _freeze_header(handle)


def _freeze_header(handle: mrcfile.mrcfile.MrcFile) -> None:
    """Put a constant label in place of the time of writing: the same array gives the same bytes."""
    handle.header.label[0] = b"icestream".ljust(80)
    handle.header.nlabl = 1


def write_eer(path: Path, frames: Iterable[Frame], *, seed: int = 0) -> None:
    """Write an EER movie: BigTIFF, one strip per frame, compression 65001 (7-bit skips, 4-bit sub-pixels).

    Frames hold 0 or 1 per pixel (see `split_for_eer`). Sub-pixel positions are uniform, drawn from `seed` and
    the frame's number.
    """

    def encoded() -> Iterator[tuple[bytes, tuple[int, int]]]:
        for index, frame in enumerate(frames):
            rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, index, 0xEE8))))
            yield encode_eer_frame(frame, rng), (frame.shape[0], frame.shape[1])

    write_eer_strips(path, encoded())


def write_eer_strips(path: Path, strips: Iterable[tuple[bytes, tuple[int, int]]]) -> None:
    """Write an EER movie of encoded frames (see `encode_eer_frame`) and their shapes `(h, w)`."""
    with path.open("wb") as handle:
        handle.write(struct.pack("<2sHHHQ", b"II", 43, 8, 0, 0))
        previous_link = 8
        for index, (strip, shape_yx) in enumerate(strips):
            previous_link = _append_eer_frame(handle, strip, shape_yx, previous_link, has_metadata=index == 0)


def split_for_eer(
    frames: Iterable[Frame], n_sub_frames: int, *, seed: int = 0
) -> Iterator[npt.NDArray[np.uint8]]:
    """Split every frame into `n_sub_frames` of 0/1 counts that sum to it, as a fast camera would record.

    The electrons of one pixel fall into different sub-frames, at a random phase; more than `n_sub_frames`
    electrons in one pixel (a hot one) are lost to coincidence.
    """
    for index, frame in enumerate(frames):
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, index, 0x5B))))
        counts = np.minimum(frame.reshape(-1), n_sub_frames).astype(np.int64)
        pixels = np.repeat(np.arange(counts.size), counts)
        rank = np.arange(len(pixels)) - np.repeat(np.cumsum(counts) - counts, counts)
        phase = np.repeat(rng.integers(0, n_sub_frames, size=counts.size), counts)
        slot = (phase + rank * n_sub_frames // np.maximum(counts[pixels], 1)) % n_sub_frames
        order = np.argsort(slot, kind="stable")
        edges = np.searchsorted(slot[order], np.arange(n_sub_frames + 1))
        for sub in range(n_sub_frames):
            part = np.zeros(counts.size, dtype=np.uint8)
            part[pixels[order[edges[sub] : edges[sub + 1]]]] = 1
            yield part.reshape(frame.shape)


def _append_eer_frame(
    handle: BinaryIO, strip: bytes, shape_yx: tuple[int, int], previous_link: int, *, has_metadata: bool
) -> int:
    """Append one strip and its directory; return where the link to the next directory has to be written."""
    start = handle.seek(0, 2)
    handle.write(strip + b"\0" * (-len(strip) % 8))
    metadata = _EER_METADATA if has_metadata else b""
    metadata_start = handle.tell()
    handle.write(metadata + b"\0" * (-len(metadata) % 8))
    height, width = shape_yx
    entries = [
        (256, 4, 1, width),
        (257, 4, 1, height),
        (258, 3, 1, 1),
        (259, 3, 1, _EER_COMPRESSION_7BIT),
        (262, 3, 1, 1),
        (273, 16, 1, start),
        (277, 3, 1, 1),
        (278, 4, 1, height),
        (279, 16, 1, len(strip)),
    ]
    if metadata:
        entries.append((_EER_METADATA_TAG, 7, len(metadata), metadata_start))
    directory = handle.tell()
    packed = b"".join(struct.pack("<HHQQ", *entry) for entry in entries)
    handle.write(struct.pack("<Q", len(entries)) + packed + struct.pack("<Q", 0))
    handle.seek(previous_link)
    handle.write(struct.pack("<Q", directory))
    handle.seek(0, 2)
    return directory + 8 + len(packed)


_EER_METADATA = (
    b'<metadata><item name="acquisitionID">icestream</item>'
    b'<item name="commercialName">Virtual Falcon</item></metadata>'
)


def encode_eer_frame(frame: Frame, rng: np.random.Generator) -> bytes:
    """Encode one frame of counts as an EER strip (7-bit skip, 4-bit sub-pixel, least significant bit first).

    Skip 127 means "127 empty pixels and no event"; the stream closes exactly on the last pixel. Every event
    moves on by one pixel, so a frame holds at most one count per pixel (else InputError); `split_for_eer`
    spreads denser frames.
    """
    flat = frame.reshape(-1)
    if int(flat.max(initial=0)) > 1:
        raise InputError("EER frame", "holds at most 1 event per pixel", int(flat.max()))
    positions = np.flatnonzero(flat).astype(np.int64)
    # The gap before each event, and the empty pixels after the last one.
    gaps = np.diff(np.concatenate(([-1], positions, [flat.size]))) - 1
    full, rest = np.divmod(gaps, _EER_MAX_SKIP)
    n_codes = full + 1
    ends = np.cumsum(n_codes)
    skips = np.full(int(ends[-1]), _EER_MAX_SKIP, dtype=np.int64)
    skips[ends - 1] = rest
    has_event = np.zeros(len(skips), dtype=bool)
    has_event[ends - 1] = True
    # The last code skips what is left and has its event one past the end, where every decoder stops.
    sub_pixels = rng.integers(0, 16, size=len(skips))
    return _pack_eer_codes(skips, has_event, sub_pixels)


def _pack_eer_codes(
    skips: npt.NDArray[np.int64], has_event: npt.NDArray[np.bool_], sub_pixels: npt.NDArray[np.int64]
) -> bytes:
    """Pack codes of 7 bits (no event) or 11 bits (event) into bytes, least significant bit first."""
    lengths = np.where(has_event, 11, 7)
    starts = np.concatenate(([0], np.cumsum(lengths)))
    codes = skips | np.where(has_event, sub_pixels << 7, 0)
    bits = np.zeros(int(starts[-1]), dtype=np.uint8)
    for bit in range(11):
        used = lengths > bit
        bits[starts[:-1][used] + bit] = (codes[used] >> bit) & 1
    packed = np.packbits(bits, bitorder="little").tobytes()
    return packed + b"\0" * (len(packed) % 2)  # readers take 16-bit words; an odd length is an error


def copy_slowly(
    source: Path,
    target: Path,
    *,
    duration_s: float,
    n_chunks: int = 20,
    wait: Callable[[float], None],
) -> None:
    """Copy a file under its final name in chunks spread over `duration_s`, as a slow network writer does.

    `wait` is called with the seconds between chunks (a clock handed in: `time.sleep`, or an event's wait).
    """
    size = source.stat().st_size
    chunk = max(1, -(-size // n_chunks))
    with source.open("rb") as reader, target.open("wb") as writer:
        while block := reader.read(chunk):
            writer.write(block)
            writer.flush()
            if writer.tell() < size:
                wait(duration_s / n_chunks)
