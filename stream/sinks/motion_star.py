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

from stream.records.errors import InputError
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


def read_motion_star(path: Path) -> MotionTable:
    """Read a motion file of RELION (3.1 to 5) or of ours.

    Raises
    ------
    InputError
        The file has no whole-frame shifts, or a local model of other than 36 coefficients.
    """
    blocks = starfile.read(path, always_dict=True)
    general, shifts = blocks.get("general"), blocks.get("global_shift")
    if general is None or shifts is None:
        raise InputError(path, "a motion file has the blocks general and global_shift", ", ".join(blocks))
    local = blocks.get("local_motion_model")
    coefficients: NDArray[np.floating] | None = None
    if local is not None:
        # RELION repeats the label of this column, so that it goes by its place
        values = local.iloc[:, 1].to_numpy(dtype=np.float64)
        if len(values) != 36:
            raise InputError(path, "a local motion model has 36 coefficients", len(values))
        coefficients = np.stack([values[18:].reshape(6, 3), values[:18].reshape(6, 3)])
    dose = general.get("rlnMicrographDoseRate")
    hot = blocks.get("hot_pixels")
    return MotionTable(
        movie_name=str(general["rlnMicrographMovieName"]),
        gain_name=str(general["rlnMicrographGainName"]) if "rlnMicrographGainName" in general else None,
        movie_shape_yx=(int(general["rlnImageSizeY"]), int(general["rlnImageSizeX"])),
        binning=float(general.get("rlnMicrographBinning", 1.0)),
        pixel_size_angstrom=float(general["rlnMicrographOriginalPixelSize"]),
        dose_per_frame_e_per_angstrom2=None if dose is None else float(dose),
        pre_exposure_e_per_angstrom2=float(general.get("rlnMicrographPreExposure", 0.0)),
        voltage_kv=float(general.get("rlnVoltage", 300.0)),
        shifts_px=_columns(shifts, "rlnMicrographShiftY", "rlnMicrographShiftX"),
        local_coefficients=coefficients,
        hot_pixels_yx=None
        if hot is None
        else _columns(hot, "rlnCoordinateY", "rlnCoordinateX").astype(np.int64),
    )


def _columns(block: pd.DataFrame, *names: str) -> NDArray[np.floating]:
    return np.asarray(block[list(names)], dtype=np.float64)


def evaluate_motion(table: MotionTable, positions_yx_px: NDArray[np.floating]) -> NDArray[np.floating]:
    """Return the corrections `(frame, position, yx)` in movie pixels at positions `(position, yx)`, local model included."""
    n_frames = len(table.shifts_px)
    shifts = np.repeat(np.asarray(table.shifts_px, dtype=np.float64)[:, None], len(positions_yx_px), axis=1)
    if table.local_coefficients is None:
        return shifts
    v, u = (np.asarray(positions_yx_px, dtype=np.float64) / table.movie_shape_yx - 0.5).T
    space = np.stack([np.ones_like(u), u, u * u, v, v * v, u * v], axis=-1)
    t = np.arange(n_frames, dtype=np.float64)
    time = np.stack([t, t * t, t**3], axis=-1)
    return np.asarray(shifts + np.einsum("ps,ast,ft->fpa", space, table.local_coefficients, time))
