"""RELION's motion files: whole-frame shifts, the local model's 36 coefficients, hot pixels, patch shifts.

Shifts are corrections in movie pixels: what is added to a frame's content to align it with the first frame.
The local model is evaluated at u = x / width − 0.5, v = y / height − 0.5 and t = frame index from zero
(`ThirdOrderPolynomialModel` of RELION's micrograph_model.cpp); 18 coefficients of x, then 18 of y.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import starfile
from numpy.typing import NDArray

from stream.store.files import replacing


@dataclass(frozen=True, slots=True, kw_only=True)
class MotionTable:
    """What a motion file says; `local_coefficients` is `(yx, space, time)`, None = whole-frame motion alone.

    `patch_shifts_px` is `(patch, frame, yx)` and belongs to `patch_centres_yx_px`; hot pixels are `(n, yx)`.
    `eer_grouping` is the number of raw frames in a frame of an EER, None for other movies.
    """

    movie_name: str
    gain_name: str | None
    movie_shape_yx: tuple[int, int]
    binning: float
    pixel_size_angstrom: float
    dose_per_frame_e_per_angstrom2: float | None
    pre_exposure_e_per_angstrom2: float
    voltage_kv: float
    shifts_px: NDArray[np.floating]
    local_coefficients: NDArray[np.floating] | None = None
    patch_centres_yx_px: NDArray[np.floating] | None = None
    patch_shifts_px: NDArray[np.floating] | None = None
    hot_pixels_yx: NDArray[np.integer] | None = None
    eer_grouping: int | None = None
    eer_upsampling: int = 1


def write_motion_star(path: Path, table: MotionTable) -> None:
    """Write the motion file, durably, replacing `path`."""
    n_frames = len(table.shifts_px)
    general: dict[str, object] = {
        "rlnImageSizeX": table.movie_shape_yx[1],
        "rlnImageSizeY": table.movie_shape_yx[0],
        "rlnImageSizeZ": n_frames,
        "rlnMicrographMovieName": table.movie_name,
        "rlnMicrographBinning": table.binning,
        "rlnMicrographOriginalPixelSize": table.pixel_size_angstrom,
        "rlnMicrographPreExposure": table.pre_exposure_e_per_angstrom2,
        "rlnVoltage": table.voltage_kv,
        "rlnMicrographStartFrame": 1,
        "rlnMotionModelVersion": 0 if table.local_coefficients is None else 1,
    }
    if table.gain_name is not None:
        general["rlnMicrographGainName"] = table.gain_name
    if table.dose_per_frame_e_per_angstrom2 is not None:
        general["rlnMicrographDoseRate"] = table.dose_per_frame_e_per_angstrom2
    if table.eer_grouping is not None:
        general |= {"rlnEERGrouping": table.eer_grouping, "rlnEERUpsampling": table.eer_upsampling}
    shifts = pd.DataFrame(
        {
            "rlnMicrographFrameNumber": np.arange(1, n_frames + 1),
            "rlnMicrographShiftX": np.asarray(table.shifts_px, dtype=np.float64)[:, 1],
            "rlnMicrographShiftY": np.asarray(table.shifts_px, dtype=np.float64)[:, 0],
        }
    )
    blocks: dict[str, pd.DataFrame | dict[str, object]] = {"general": general, "global_shift": shifts}
    if table.local_coefficients is not None:
        blocks["local_motion_model"] = _coefficients(table.local_coefficients)
    if table.hot_pixels_yx is not None and len(table.hot_pixels_yx):
        hot = np.asarray(table.hot_pixels_yx, dtype=np.float64)
        blocks["hot_pixels"] = pd.DataFrame({"rlnCoordinateX": hot[:, 1], "rlnCoordinateY": hot[:, 0]})
    if table.patch_centres_yx_px is not None and table.patch_shifts_px is not None:
        blocks["local_shift"] = _patch_shifts(table.patch_centres_yx_px, table.patch_shifts_px)
    with replacing(path) as temporary:
        starfile.write(blocks, temporary, overwrite=True)


def _coefficients(coefficients: NDArray[np.floating]) -> pd.DataFrame:
    y, x = np.asarray(coefficients, dtype=np.float64).reshape(2, 18)
    values = np.concatenate([x, y])
    return pd.DataFrame({"rlnMotionModelCoeffsIdx": np.arange(36), "rlnMotionModelCoeff": values})


def _patch_shifts(centres_yx: NDArray[np.floating], shifts: NDArray[np.floating]) -> pd.DataFrame:
    n_patches, n_frames = shifts.shape[:2]
    return pd.DataFrame(
        {
            "rlnMicrographFrameNumber": np.tile(np.arange(1, n_frames + 1), n_patches),
            "rlnCoordinateX": np.repeat(np.asarray(centres_yx, dtype=np.float64)[:, 1], n_frames),
            "rlnCoordinateY": np.repeat(np.asarray(centres_yx, dtype=np.float64)[:, 0], n_frames),
            "rlnMicrographShiftX": np.asarray(shifts, dtype=np.float64)[..., 1].ravel(),
            "rlnMicrographShiftY": np.asarray(shifts, dtype=np.float64)[..., 0].ravel(),
        }
    )
