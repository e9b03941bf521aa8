"""Gain references: read, turned, and checked against the movie's shape before anything is computed.

Convention inside: *multiplicative*, corrected frame = frame * gain. References that divide (the `.gain` files
of Falcon EER cameras) are inverted when they are read. Pixels whose value is not finite or not positive are
defects: their value becomes 1 and the mask says where they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from stream.ingest.movie_reader import MovieFormat, inspect_movie, iterate_unchecked
from stream.records.errors import ConfigurationError, InputError

GainConvention = Literal["auto", "multiply", "divide"]

MAX_DEFECT_FRACTION = 0.25
"""Above this a reference is no gain (a dark image, a mask); good cameras have below 0.001."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GainReference:
    """Factors `values` (float32, positive, 1 at defects) for each pixel, and the defects."""

    path: str
    values: NDArray[np.float32]
    defect_mask: NDArray[np.bool_]

    @property
    def shape_yx(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.values.shape[0], self.values.shape[1]


def read_gain(path: str | Path, *, convention: GainConvention = "auto") -> GainReference:
    """Read a gain reference (MRC, TIFF or .gain), multiplicative afterwards.

    Parameters
    ----------
    convention
        "multiply": frame * file; "divide": frame / file; "auto": divide for `.gain` (EER), else multiply.

    Raises
    ------
    InputError
        The file is not a single image, or most of it is not a positive number.
    """
    header = inspect_movie(path)
    if header.n_frames != 1 or header.format is MovieFormat.EER:
        value = f"{header.n_frames} frames of {header.format.value}"
        raise InputError(path, "a gain reference is a single image", value)
    raw = next(iterate_unchecked(path, header)).astype(np.float32)
    with np.errstate(invalid="ignore"):
        is_good = np.isfinite(raw) & (raw > 0)
    n_defects = int(raw.size - is_good.sum())
    if n_defects > MAX_DEFECT_FRACTION * raw.size:
        value = f"{n_defects} of {raw.size} pixels are zero, negative or not finite"
        raise InputError(path, f"at most {MAX_DEFECT_FRACTION:.0%} of a gain reference are defects", value)
    values = np.where(is_good, raw, np.float32(1))
    if convention == "divide" or (convention == "auto" and Path(path).suffix.lower() == ".gain"):
        values = np.where(is_good, 1 / values, np.float32(1)).astype(np.float32)
    return GainReference(path=str(path), values=values, defect_mask=~is_good)


def orient_gain(
    gain: GainReference, *, flip_x: bool = False, flip_y: bool = False, rotate_deg: int = 0
) -> GainReference:
    """Return the reference turned, then flipped.

    Parameters
    ----------
    flip_x
        Reverse the columns (left becomes right).
    flip_y
        Reverse the rows (top becomes bottom).
    rotate_deg
        0, 90, 180 or 270, counter-clockwise with row 0 at the top; done before the flips.
    """
    if rotate_deg % 90:
        raise ConfigurationError(
            "gain rotation", "a gain reference is turned by a multiple of 90 degrees", rotate_deg
        )

    def turn(image: NDArray[np.generic]) -> NDArray[np.generic]:
        turned = np.rot90(image, rotate_deg // 90 % 4)
        turned = turned[:, ::-1] if flip_x else turned
        return np.ascontiguousarray(turned[::-1] if flip_y else turned)

    return GainReference(
        path=gain.path,
        values=turn(gain.values).astype(np.float32, copy=False),
        defect_mask=turn(gain.defect_mask).astype(np.bool_, copy=False),
    )


def upsample_gain(gain: GainReference, shape_yx: tuple[int, int], *, factor: int) -> GainReference:
    """Spread a reference of the sensor's pixels over frames that are `factor` times finer; others stay as they are.

    Events of one sensor pixel share its gain wherever within it they are placed.
    """
    if factor == 1 or (gain.shape_yx[0] * factor, gain.shape_yx[1] * factor) != shape_yx:
        return gain

    def spread(image: NDArray[np.generic]) -> NDArray[np.generic]:
        return image.repeat(factor, axis=0).repeat(factor, axis=1)

    return GainReference(
        path=gain.path,
        values=spread(gain.values).astype(np.float32, copy=False),
        defect_mask=spread(gain.defect_mask).astype(np.bool_, copy=False),
    )


def check_gain_turned(gain: GainReference, movie_shape_yx: tuple[int, int], item: object) -> None:
    """Refuse a reference that has the movie's shape in no orientation, as `check_gain` does for one."""
    if gain.shape_yx != movie_shape_yx[::-1]:
        check_gain(gain, movie_shape_yx, item)


def check_gain(gain: GainReference, movie_shape_yx: tuple[int, int], item: object) -> None:
    """Refuse a gain reference whose shape is not the movie's; say what would make it fit.

    Raises
    ------
    ConfigurationError
        Names the gain file, both shapes and, where there is one, the remedy.
    """
    if gain.shape_yx == movie_shape_yx:
        return
    rule = f"the gain reference has the movie's shape ({item})"
    value = (
        f"gain {_text(gain.shape_yx)}, movie {_text(movie_shape_yx)}{_remedy(gain.shape_yx, movie_shape_yx)}"
    )
    raise ConfigurationError(gain.path, rule, value)


def _remedy(gain: tuple[int, int], movie: tuple[int, int]) -> str:
    turned = (gain[1], gain[0])
    if turned == movie:
        return "; it would fit turned by 90 or 270 degrees"
    for shape, how in ((gain, ""), (turned, " turned by 90 degrees and")):
        if shape == (2 * movie[0], 2 * movie[1]):
            return f"; it would fit{how} binned by 2 (a super-resolution reference)"
        if (2 * shape[0], 2 * shape[1]) == movie:
            return f"; the movie is twice as large{how}: super-resolution frames need a super-resolution reference"
    return ""


def _text(shape_yx: tuple[int, int]) -> str:
    return f"{shape_yx[0]} x {shape_yx[1]}"
