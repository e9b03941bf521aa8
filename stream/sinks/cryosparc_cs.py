"""CryoSPARC `.cs` files: one structured array of particles, written as cryosparc-tools' `Dataset` reads it.

Conversions (RELION to CryoSPARC): degrees to radians; optics group and half-set count from 0; an image's number
counts from 0; a pose is the rotation vector of the intrinsic ZYZ angles; a shift is in pixels of
`alignments3D/psize_A`, with RELION's sign; a coordinate is a fraction of the micrograph with y counted from the
other side. `blob/sign` is +1: our stacks hold protein white. Statistics of an alignment that we do not have
(errors, powers) are zero. Not verified against a CryoSPARC instance; `Dataset.load` and column names are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from stream.records.errors import InputError
from stream.sinks.particle_table import POSE_COLUMNS
from stream.sinks.relion_star import (
    HALF_SET_COLUMN,
    SCORE_COLUMN,
    UID_COLUMN,
    ParticleStar,
    split_image_names,
)
from stream.store.files import replacing

Column = tuple[str, NDArray[Any]]

_NEEDED = (
    "rlnImageName",
    "rlnOpticsGroup",
    "rlnDefocusU",
    "rlnDefocusV",
    "rlnDefocusAngle",
    HALF_SET_COLUMN,
    UID_COLUMN,
)
_ZERO_STATISTICS = ("error", "error_min", "resid_pow", "slice_pow", "image_pow", "cross_cor")
_UNIT_STATISTICS = ("alpha", "alpha_min", "weight", "pose_ess", "shift_ess", "class_posterior", "class_ess")


@dataclass(frozen=True, slots=True, kw_only=True)
class MicrographPlace:
    """What a particle's location needs to know of its micrograph."""

    uid: int
    shape_yx: tuple[int, int]
    pixel_size_angstrom: float


def write_particles_cs(
    path: Path, star: ParticleStar, micrographs: Mapping[str, MicrographPlace] | None = None
) -> None:
    """Write the particles durably; `micrographs` (by rlnMicrographName) adds the columns `location/*`."""
    rows = build_particles_cs(star, micrographs or {})
    with replacing(path) as temporary, temporary.open("wb") as stream:
        np.save(stream, rows, allow_pickle=False)


def build_particles_cs(star: ParticleStar, micrographs: Mapping[str, MicrographPlace]) -> NDArray[np.void]:
    """Return the structured array; `location/*` is there when every particle's micrograph is known."""
    particles = star.particles
    missing = [column for column in _NEEDED if column not in particles.columns]
    if missing:
        raise InputError(
            "particles.cs", f"particles have {', '.join(_NEEDED)}", f"without {', '.join(missing)}"
        )
    uids = particles[UID_COLUMN].to_numpy(np.uint64)
    if len(np.unique(uids)) != len(uids):
        raise InputError("particles.cs", "a uid belongs to one particle", f"{len(uids)} rows")
    optics = star.optics.set_index("rlnOpticsGroup").loc[particles["rlnOpticsGroup"].to_numpy()]
    columns = [("uid", uids), *_blob(particles, optics), *_ctf(particles, optics)]
    names = particles.get("rlnMicrographName", pd.Series(dtype=str))
    if len(names) and names.isin(list(micrographs)).all():
        columns += _location(particles, micrographs)
    columns.append(("alignments3D/split", (particles[HALF_SET_COLUMN].to_numpy() - 1).astype(np.uint32)))
    if _has_poses(particles):
        columns += _alignments(particles, optics)
    if SCORE_COLUMN in particles.columns:
        columns.append(("icestream/score", _float(particles[SCORE_COLUMN])))
    return _as_rows(columns)


def _has_poses(particles: pd.DataFrame) -> bool:
    if not all(column in particles.columns for column in POSE_COLUMNS):
        return False
    return bool(np.isfinite(particles[list(POSE_COLUMNS)].to_numpy(np.float64)).all())


def _blob(particles: pd.DataFrame, optics: pd.DataFrame) -> list[Column]:
    indices, stacks = split_image_names(particles["rlnImageName"])
    box = optics["rlnImageSize"].to_numpy(np.uint32)
    n = len(particles)
    return [
        ("blob/path", _text(stacks)),
        ("blob/idx", indices.astype(np.uint32)),
        ("blob/shape", np.stack((box, box), axis=-1)),
        ("blob/psize_A", _float(optics["rlnImagePixelSize"])),
        ("blob/sign", np.ones(n, np.float32)),
        ("blob/import_sig", np.zeros(n, np.uint64)),
    ]


def _ctf(particles: pd.DataFrame, optics: pd.DataFrame) -> list[Column]:
    n = len(particles)
    phase_shift_deg = particles.get("rlnPhaseShift", pd.Series(np.zeros(n)))
    return [
        ("ctf/type", np.full(n, b"imported")),
        ("ctf/exp_group_id", (particles["rlnOpticsGroup"].to_numpy() - 1).astype(np.uint32)),
        ("ctf/accel_kv", _float(optics["rlnVoltage"])),
        ("ctf/cs_mm", _float(optics["rlnSphericalAberration"])),
        ("ctf/amp_contrast", _float(optics["rlnAmplitudeContrast"])),
        ("ctf/df1_A", _float(particles["rlnDefocusU"])),
        ("ctf/df2_A", _float(particles["rlnDefocusV"])),
        (
            "ctf/df_angle_rad",
            np.deg2rad(particles["rlnDefocusAngle"].to_numpy(np.float64)).astype(np.float32),
        ),
        ("ctf/phase_shift_rad", np.deg2rad(phase_shift_deg.to_numpy(np.float64)).astype(np.float32)),
        ("ctf/scale", np.ones(n, np.float32)),
        ("ctf/scale_const", np.zeros(n, np.float32)),
        ("ctf/bfactor", np.zeros(n, np.float32)),
        ("ctf/shift_A", np.zeros((n, 2), np.float32)),
        ("ctf/tilt_A", np.zeros((n, 2), np.float32)),
        ("ctf/trefoil_A", np.zeros((n, 2), np.float32)),
        ("ctf/tetra_A", np.zeros((n, 4), np.float32)),
        ("ctf/anisomag", np.zeros((n, 4), np.float32)),  # the matrix less the identity
    ]


def _location(particles: pd.DataFrame, micrographs: Mapping[str, MicrographPlace]) -> list[Column]:
    names = particles["rlnMicrographName"]
    unique, inverse = np.unique(names.to_numpy(str), return_inverse=True)
    places = [micrographs[str(name)] for name in unique]
    shapes = np.array([place.shape_yx for place in places], np.uint32)[inverse]
    uids = np.array([place.uid for place in places], np.uint64)[inverse]
    pixel_sizes = np.array([place.pixel_size_angstrom for place in places], np.float32)[inverse]
    x_fraction = particles["rlnCoordinateX"].to_numpy(np.float64) / shapes[:, 1]
    y_fraction = 1.0 - particles["rlnCoordinateY"].to_numpy(np.float64) / shapes[:, 0]
    return [
        ("location/micrograph_uid", uids),
        ("location/exp_group_id", (particles["rlnOpticsGroup"].to_numpy() - 1).astype(np.uint32)),
        ("location/micrograph_path", _text(names.to_numpy(object))),
        ("location/micrograph_shape", shapes),
        ("location/micrograph_psize_A", pixel_sizes),
        ("location/center_x_frac", x_fraction.astype(np.float32)),
        ("location/center_y_frac", y_fraction.astype(np.float32)),
    ]


def _alignments(particles: pd.DataFrame, optics: pd.DataFrame) -> list[Column]:
    n = len(particles)
    pixel_size = optics["rlnImagePixelSize"].to_numpy(np.float64)
    origins = particles[["rlnOriginXAngst", "rlnOriginYAngst"]].to_numpy(np.float64)
    columns: list[Column] = [
        ("alignments3D/shift", (origins / pixel_size[:, None]).astype(np.float32)),
        (
            "alignments3D/pose",
            euler_to_rotation_vector(particles[list(POSE_COLUMNS[:3])].to_numpy(np.float64)),
        ),
        ("alignments3D/psize_A", pixel_size.astype(np.float32)),
        ("alignments3D/class", np.zeros(n, np.uint32)),
    ]
    columns += [(f"alignments3D/{name}", np.zeros(n, np.float32)) for name in _ZERO_STATISTICS]
    columns += [(f"alignments3D/{name}", np.ones(n, np.float32)) for name in _UNIT_STATISTICS]
    return columns


def euler_to_rotation_vector(euler_deg: NDArray[np.float64]) -> NDArray[np.float32]:
    """Return CryoSPARC's pose [n, 3] (rad) of RELION's (rot, tilt, psi) [n, 3] in degrees."""
    if not len(euler_deg):
        return np.empty((0, 3), np.float32)
    vectors: NDArray[np.float32] = (
        Rotation.from_euler("ZYZ", euler_deg, degrees=True).as_rotvec().astype(np.float32)
    )
    return vectors


def _float(column: pd.Series) -> NDArray[np.float32]:
    return column.to_numpy(np.float32)


def _text(values: NDArray[np.object_]) -> NDArray[np.bytes_]:
    encoded = [str(value).encode() for value in values]
    return np.array(encoded, dtype=f"S{max(map(len, encoded), default=1)}")


def _as_rows(columns: list[Column]) -> NDArray[np.void]:
    dtype = np.dtype([(name, values.dtype.str, values.shape[1:]) for name, values in columns])
    rows = np.zeros(len(columns[0][1]), dtype)
    for name, values in columns:
        rows[name] = values
    return rows
