"""Electron events (EER) summed into frames, one strip decoded at a time straight onto the sum.

The position of an event within its pixel is kept by up-sampling 2: frames of twice the width and height, on
which the gain reference of the sensor holds for 2 x 2 pixels each. Dose fractions have equal shares of the raw
frames, to within one, and no electron is dropped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import imagecodecs
import numpy as np
from numpy.typing import NDArray

from stream.records.errors import InputError

EerUpsampling = Literal[1, 2]

_SKIP_BITS = {65000: 8, 65001: 7}
# The codec takes a strip that ends early (a file whose tail is missing or was never written) without a word: then the
# last rows get no event. This many are expected there, so that chance leaves them empty once in 10^26 frames.
_EVENTS_AT_THE_END = 60.0
_MIN_ROWS_AT_THE_END = 32
# A strip is made of these: at most one code per 127 pixels is a bare skip, all others are events.
_BITS_PER_EVENT, _BITS_PER_SKIP, _PIXELS_PER_SKIP = 11, 7, 127
_BITS_ARE_IN_TAGS = 65002


@dataclass(frozen=True, slots=True)
class _Code:
    skip_bits: int
    x_bits: int
    y_bits: int


def split_into_fractions(indices: Sequence[int], n_fractions: int) -> list[tuple[int, ...]]:
    """Return the raw frames of each dose fraction: fraction k of F holds frames ⌊kn/F⌋ to ⌊(k+1)n/F⌋."""
    n = len(indices)
    edges = [k * n // n_fractions for k in range(n_fractions + 1)]
    return [tuple(indices[a:b]) for a, b in pairwise(edges)]


def count_fractions(
    n_raw_frames: int, dose_e_per_angstrom2: float, dose_per_fraction_e_per_angstrom2: float
) -> int:
    """Return the number of fractions whose dose is nearest to the one asked for: 1 to the number of raw frames."""
    wanted = round(dose_e_per_angstrom2 / dose_per_fraction_e_per_angstrom2)
    return max(1, min(wanted, n_raw_frames))


def sum_events(
    tiff: Any,  # noqa: ANN401 - tifffile has no types
    indices: Sequence[int],
    item: str,
    *,
    shape_yx: tuple[int, int],
    upsampling: EerUpsampling,
) -> NDArray[np.uint8] | NDArray[np.uint16]:
    """Return the events of these raw frames, counted per pixel `(upsampling * h, upsampling * w)`.

    Raises
    ------
    InputError
        A frame is not one strip, ends early, or has no sub-pixel positions to up-sample by.
    RuntimeError, ValueError
        A strip does not decode (the codec's own error).
    """
    # one frame has at most one event per pixel, so 255 frames fit into a byte
    dtype = np.uint8 if len(indices) <= np.iinfo(np.uint8).max else np.uint16
    total = np.zeros((upsampling * shape_yx[0], upsampling * shape_yx[1]), dtype=dtype)
    for index in indices:
        page = tiff.pages[index]
        if len(page.dataoffsets) != 1:
            raise InputError(
                item, "an EER frame is one strip", f"frame {index + 1}: {len(page.dataoffsets)} strips"
            )
        code = _read_code(page)
        if upsampling > 2 ** min(code.x_bits, code.y_bits):
            value = f"{code.x_bits} and {code.y_bits} bits"
            raise InputError(item, f"events have sub-pixel positions to up-sample {upsampling} times", value)
        tiff.filehandle.seek(page.dataoffsets[0])
        strip = tiff.filehandle.read(page.databytecounts[0])
        strip += bytes(len(strip) % 2)  # the codec takes 16-bit words
        last_rows = total[total.shape[0] - upsampling * _rows_at_end(len(strip), shape_yx) :]
        n_before = int(last_rows.sum(dtype=np.uint64))
        imagecodecs.eer_decode(
            strip,
            total.shape,
            code.skip_bits,
            code.x_bits,
            code.y_bits,
            superres=upsampling - 1,
            out=total,
        )
        if len(last_rows) and int(last_rows.sum(dtype=np.uint64)) == n_before:
            value = f"frame {index + 1} has no event in its last {len(last_rows) // upsampling} rows"
            raise InputError(item, "the events of an EER frame reach its last row (file truncated)", value)
    return total


def _rows_at_end(strip_bytes: int, shape_yx: tuple[int, int]) -> int:
    """Return how many last rows have events for sure in a frame whose strip is this long; 0: none, too few events."""
    height, width = shape_yx
    n_events = (8 * strip_bytes - _BITS_PER_SKIP * height * width / _PIXELS_PER_SKIP) / _BITS_PER_EVENT
    if n_events <= 0:
        return 0
    n_rows = max(_MIN_ROWS_AT_THE_END, math.ceil(_EVENTS_AT_THE_END * height / n_events))
    return n_rows if n_rows <= height // 4 else 0


def _read_code(page: Any) -> _Code:  # noqa: ANN401
    if page.compression == _BITS_ARE_IN_TAGS:
        return _Code(
            *(int(page.tags.valueof(tag, default)) for tag, default in ((65007, 7), (65008, 2), (65009, 2)))
        )
    return _Code(_SKIP_BITS[int(page.compression)], 2, 2)
