"""Movies and micrographs: what the file promises, and its frames one by one.

Magic bytes decide the format, never the name alone. `inspect_movie` reads headers and offset tables only and
checks that everything they promise is in the file; `check_content` decodes three frames; `iterate_frames`
holds one frame (for EER: one fraction) in memory. Rows come in the order in which the file stores them, for
every format; RELION shows TIFF upside down against this, so a gain reference made for RELION needs its flip.
Frames of odd width or height are taken as they are.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

from stream.ingest.eer import EerUpsampling, split_into_fractions, sum_events
from stream.ingest.files import fingerprint_file, identify_file, translate_os_error
from stream.ingest.mrc_layout import HEADER_BYTES, MrcLayout, is_mrc, looks_like_old_mrc, read_mrc_layout
from stream.ingest.tiff_layout import TiffDirectory, is_tiff, read_tiff_layout
from stream.records.errors import InputError

__all__ = [
    "MovieFormat",
    "MovieHeader",
    "check_content",
    "fingerprint_file",
    "identify_file",
    "inspect_micrograph",
    "inspect_movie",
    "iterate_chosen",
    "iterate_frames",
    "iterate_unchecked",
    "iterated_shape",
    "n_iterated_frames",
    "read_micrograph",
]

Frame = NDArray[np.float32] | NDArray[np.uint8]

MAX_SATURATED_FRACTION = 0.01
"""Hot pixels and X-rays are below 0.001 of a frame; above this counts are lost and the mean is no dose any more."""

_SUFFIXES = {
    "tiff": {".tif", ".tiff", ".gain"},
    "mrc": {".mrc", ".mrcs", ".st", ".map", ".ali", ".raw"},
    "eer": {".eer"},
}
_DECODE_ERRORS = (
    tifffile.TiffFileError,
    ValueError,
    RuntimeError,
    KeyError,
    IndexError,
    TypeError,
    ZeroDivisionError,
    EOFError,
)
"""What tifffile and the codecs raise on damaged data (codec errors derive from RuntimeError)."""

# Damaged files make tifffile log a traceback; the reason travels in our own error instead.
logging.getLogger("tifffile").setLevel(logging.CRITICAL)


class MovieFormat(Enum):
    """The container, told by its magic bytes."""

    TIFF = "tiff"
    MRC = "mrc"
    EER = "eer"


@dataclass(frozen=True, slots=True, kw_only=True)
class MovieHeader:
    """What a movie file promises; `dtype` is a numpy name, `pixel_size_angstrom` None where it is not said.

    `frame_indices` are the images of the file that are frames (an EER may hold a preview beside them).
    """

    n_frames: int
    shape_yx: tuple[int, int]
    dtype: str
    format: MovieFormat
    pixel_size_angstrom: float | None
    compression: str
    frame_indices: tuple[int, ...]

    @property
    def is_odd_sized(self) -> bool:
        """Whether a side has an odd number of pixels (allowed; Fourier code pads)."""
        return bool(self.shape_yx[0] % 2 or self.shape_yx[1] % 2)


def inspect_movie(path: str | Path) -> MovieHeader:
    """Return what the file promises after checking that all of it is there.

    Raises
    ------
    InputError
        Empty, wrong magic, truncated, no frame, frames of different shape, unknown pixel type, unreadable.
    ResourceError
        The file system did not answer.
    """
    item = str(path)
    try:
        with Path(path).open("rb") as stream:
            head = stream.read(HEADER_BYTES)
            if not head:
                raise InputError(item, "a movie is not empty", "0 bytes")
            if is_tiff(head):
                header = _header_of_tiff(read_tiff_layout(stream, item), item)
            elif is_mrc(head) or looks_like_old_mrc(head, stream.seek(0, 2)):
                header = _header_of_mrc(read_mrc_layout(stream, item))
            else:
                raise InputError(
                    item, "a movie starts as a TIFF, MRC or EER file does (magic)", _describe(head)
                )
    except OSError as error:
        raise translate_os_error(path, error) from error
    _check_suffix(path, header)
    return header


def inspect_micrograph(path: str | Path) -> MovieHeader:
    """Return the header of an aligned micrograph: an MRC (or TIFF) with exactly one image."""
    header = inspect_movie(path)
    if header.n_frames != 1 or header.format is MovieFormat.EER:
        value = f"{header.n_frames} frames of {header.format.value}"
        raise InputError(path, "a micrograph is a single image (use movies as input otherwise)", value)
    return header


def n_iterated_frames(header: MovieHeader, *, eer_fractions: int | None = None) -> int:
    """Return how many frames `iterate_frames` gives: for EER the fractions, but never more than its frames."""
    if header.format is not MovieFormat.EER or eer_fractions is None:
        return header.n_frames
    return min(eer_fractions, header.n_frames)


def iterated_shape(header: MovieHeader, *, eer_upsampling: EerUpsampling = 1) -> tuple[int, int]:
    """Return the shape of the frames that `iterate_frames` gives."""
    if header.format is not MovieFormat.EER:
        return header.shape_yx
    return eer_upsampling * header.shape_yx[0], eer_upsampling * header.shape_yx[1]


def iterate_frames(
    path: str | Path, *, eer_fractions: int | None = None, eer_upsampling: EerUpsampling = 1
) -> Iterator[Frame]:
    """Yield the frames `(h w)` in order: uint8 where the file has unsigned bytes or events, else float32.

    Parameters
    ----------
    eer_fractions
        Number of dose fractions into which the frames of an EER are summed (see `split_into_fractions`). None
        gives the raw frames.
    eer_upsampling
        2 renders the events of an EER on twice as many pixels a side.

    Raises
    ------
    InputError
        A frame does not decode, has a non-finite value or is saturated; all frames are zero (told at the end).
    """
    header = inspect_movie(path)
    item = str(path)
    if eer_fractions is not None and eer_fractions < 1:
        raise InputError(item, "the number of EER fractions is at least 1", eer_fractions)
    has_signal = False
    if header.format is MovieFormat.EER:
        n_fractions = n_iterated_frames(header, eer_fractions=eer_fractions)
        groups = split_into_fractions(header.frame_indices, n_fractions)
        frames = _iterate_eer(path, header, groups, eer_upsampling)
    else:
        frames = _iterate_raw(path, header, header.frame_indices)
    for index, frame in enumerate(frames):
        _check_pixels(frame, header, item, index)
        has_signal = has_signal or bool(frame.any())
        yield frame
    if not has_signal:
        raise InputError(item, "a movie has a frame that is not all zero", "all frames are zero")


def check_content(path: str | Path, header: MovieHeader) -> None:
    """Decode the first, middle and last frame (of an EER up to 16); refuse NaN, saturation and empty content."""
    n = header.n_frames
    is_eer = header.format is MovieFormat.EER
    # A single EER frame may be empty at low dose, a movie may not: look at more of them.
    picks = np.unique(np.linspace(0, n - 1, 16 if is_eer else 3).round().astype(int))
    chosen = tuple(header.frame_indices[index] for index in picks)
    is_flat = True
    for index, frame in zip(picks, _iterate_raw(path, header, chosen), strict=True):
        _check_pixels(frame, header, str(path), int(index))
        is_flat = is_flat and bool(frame.min() == frame.max())
    if is_flat:
        value = f"{len(picks)} frames looked at, each of one value"
        raise InputError(path, "a movie has signal (it is all zero or constant)", value)


def iterate_chosen(path: str | Path, header: MovieHeader, positions: Sequence[int]) -> Iterator[Frame]:
    """Yield the raw frames at these positions (0 is the first frame), each of them checked."""
    chosen = tuple(header.frame_indices[position] for position in positions)
    for position, frame in zip(positions, _iterate_raw(path, header, chosen), strict=True):
        _check_pixels(frame, header, str(path), position)
        yield frame


def iterate_unchecked(path: str | Path, header: MovieHeader) -> Iterator[Frame]:
    """Yield the frames as they are, NaN and all (gain references mark defects so)."""
    return _iterate_raw(path, header, header.frame_indices)


def read_micrograph(path: str | Path) -> NDArray[np.float32]:
    """Return the single image `(h w)` of an MRC or TIFF micrograph; a non-finite value is an error."""
    header = inspect_micrograph(path)
    frame = next(_iterate_raw(path, header, header.frame_indices))
    _check_pixels(frame, header, str(path), 0)
    return np.ascontiguousarray(frame, dtype=np.float32)


def _header_of_tiff(directories: list[TiffDirectory], item: str) -> MovieHeader:
    is_eer = any(directory.is_eer for directory in directories)
    indices = tuple(i for i, directory in enumerate(directories) if directory.is_eer or not is_eer)
    first = directories[indices[0]]
    for index in indices:
        directory = directories[index]
        if directory.shape_yx != first.shape_yx:
            value = f"frame 1 is {_shape(first.shape_yx)}, frame {index + 1} is {_shape(directory.shape_yx)}"
            raise InputError(item, "all frames have one shape", value)
        if directory.samples != 1:
            raise InputError(item, "a frame has one value per pixel", f"{directory.samples} samples")
    return MovieHeader(
        n_frames=len(indices),
        shape_yx=first.shape_yx,
        dtype="uint8" if is_eer else _tiff_dtype(first, item),
        format=MovieFormat.EER if is_eer else MovieFormat.TIFF,
        pixel_size_angstrom=first.pixel_size_angstrom,
        compression=_compression_name(first.compression),
        frame_indices=indices,
    )


def _tiff_dtype(directory: TiffDirectory, item: str) -> str:
    kinds = {1: "uint", 2: "int", 3: "float"}
    name = f"{kinds.get(directory.sample_format, 'unknown')}{directory.bits}"
    if name not in {"uint8", "int8", "uint16", "int16", "uint32", "int32", "float16", "float32"}:
        raise InputError(item, "a TIFF movie has 8, 16 or 32-bit pixels", name)
    return name


def _compression_name(code: int) -> str:
    try:
        return tifffile.COMPRESSION(code).name.lower()
    except ValueError:
        return str(code)


def _header_of_mrc(layout: MrcLayout) -> MovieHeader:
    return MovieHeader(
        n_frames=layout.n_sections,
        shape_yx=layout.shape_yx,
        dtype=np.dtype(layout.dtype).name,
        format=MovieFormat.MRC,
        pixel_size_angstrom=layout.pixel_size_angstrom,
        compression="none",
        frame_indices=tuple(range(layout.n_sections)),
    )


def _check_suffix(path: str | Path, header: MovieHeader) -> None:
    suffix = Path(path).suffix.lower()
    claimed = next((name for name, suffixes in _SUFFIXES.items() if suffix in suffixes), None)
    # An EER is a TIFF by its container, and microscopes have named it so.
    if claimed is None or claimed == header.format.value or {claimed, header.format.value} == {"tiff", "eer"}:
        return
    value = f"{suffix} holds {header.format.value.upper()}"
    raise InputError(path, "the file's name agrees with what it holds", value)


def _iterate_raw(path: str | Path, header: MovieHeader, indices: tuple[int, ...]) -> Iterator[Frame]:
    """Yield the chosen images, decoded, uint8 or float32."""
    if header.format is MovieFormat.MRC:
        yield from _iterate_mrc(path, indices)
        return
    if header.format is MovieFormat.EER:
        yield from _iterate_eer(path, header, [(index,) for index in indices], 1)
        return
    with _open_tiff(path) as tiff:
        tiff.pages.cache = False  # keep one page's tags in memory, not thousands
        for index in indices:
            yield _as_frame(_decode(tiff, index, str(path)))


def _iterate_eer(
    path: str | Path, header: MovieHeader, groups: Sequence[tuple[int, ...]], upsampling: EerUpsampling
) -> Iterator[Frame]:
    item = str(path)
    with _open_tiff(path) as tiff:
        tiff.pages.cache = False
        for group in groups:
            with _naming_frames(item, group):
                total = sum_events(tiff, group, item, shape_yx=header.shape_yx, upsampling=upsampling)
            yield _as_frame(total)


@contextmanager
def _open_tiff(path: str | Path) -> Iterator[Any]:
    try:
        tiff = tifffile.TiffFile(path)
    except OSError as error:
        raise translate_os_error(path, error) from error
    except _DECODE_ERRORS as error:
        raise InputError(path, "a TIFF can be opened", error) from error
    with tiff:
        yield tiff


def _decode(tiff: Any, index: int, item: str) -> NDArray[Any]:  # noqa: ANN401 - tifffile has no types
    with _naming_frames(item, (index,)):
        image: NDArray[Any] = tiff.pages[index].asarray(maxworkers=1)
    if image.ndim != 2:
        raise InputError(item, "a frame has two axes", f"frame {index + 1}: {image.shape}")
    return image


@contextmanager
def _naming_frames(item: str, indices: Sequence[int]) -> Iterator[None]:
    """Turn what decoding raises into an error that names the file and the frames."""
    try:
        yield
    except OSError as error:
        raise translate_os_error(item, error) from error
    except _DECODE_ERRORS as error:
        first, last = indices[0] + 1, indices[-1] + 1
        frames = f"frame {first}" if first == last else f"frames {first} to {last}"
        raise InputError(item, "every frame decodes", f"{frames}: {error}") from error


def _iterate_mrc(path: str | Path, indices: tuple[int, ...]) -> Iterator[Frame]:
    try:
        with Path(path).open("rb") as stream:
            layout = read_mrc_layout(stream, str(path))
            n_pixels = layout.shape_yx[0] * layout.shape_yx[1]
            itemsize = np.dtype(layout.dtype).itemsize
            for index in indices:
                stream.seek(layout.data_offset + index * n_pixels * itemsize)
                data = stream.read(n_pixels * itemsize)
                if len(data) < n_pixels * itemsize:
                    value = f"frame {index + 1} ends early"
                    raise InputError(
                        path, "the file holds every frame its header promises (file truncated)", value
                    )
                yield _as_frame(np.frombuffer(data, dtype=layout.dtype).reshape(layout.shape_yx))
    except OSError as error:
        raise translate_os_error(path, error) from error


def _as_frame(image: NDArray[Any]) -> Frame:
    if image.dtype in (np.uint8, np.bool_):
        return image.astype(np.uint8, copy=False)
    with np.errstate(invalid="ignore", over="ignore"):
        return image.astype(np.float32)


def _check_pixels(frame: Frame, header: MovieHeader, item: str, index: int) -> None:
    _check_finite(frame, item, index)
    if header.format is MovieFormat.EER or not header.dtype.startswith(("int", "uint")):
        return  # an event is no grey value, and floats have no top
    top = np.iinfo(header.dtype).max
    if frame.max() < top:
        return
    share = np.count_nonzero(frame >= top) / frame.size
    if share > MAX_SATURATED_FRACTION:
        value = f"frame {index + 1}: {share:.1%} at {top}"
        rule = f"at most {MAX_SATURATED_FRACTION:.0%} of a frame's pixels are at the top of {header.dtype}"
        raise InputError(item, f"{rule} (saturated)", value)


def _check_finite(frame: Frame, item: str, index: int) -> None:
    if frame.dtype == np.uint8:
        return
    # One sum is NaN or infinite if any value is: cheaper than a mask of the whole frame.
    with np.errstate(invalid="ignore", over="ignore"):
        total = frame.sum(dtype=np.float64)
    if not np.isfinite(total):
        n_bad = int(frame.size - np.isfinite(frame).sum())
        raise InputError(
            item, "every pixel is a finite number", f"frame {index + 1}: {n_bad} NaN or infinite"
        )


def _shape(shape_yx: tuple[int, int]) -> str:
    return f"{shape_yx[0]} x {shape_yx[1]}"


def _describe(head: bytes) -> str:
    text = f"first bytes {head[:4].hex(' ')}"
    return text if len(head) >= HEADER_BYTES else f"{text}, {len(head)} bytes in all"
