"""The truth of a simulated session as RELION STAR files.

Coordinates are px of the unbinned *first* frame, whose shift is zero; poses are RELION's (rot, tilt, psi) with
zero origin, because the particle's centre is the coordinate itself. Motion files have RELION's MotionCor
blocks; `rlnMicrographShiftX/Y` are the corrections in px (minus the specimen's displacement).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class OpticsTruth:
    """The session's one optics group."""

    pixel_size_angstrom: float
    voltage_kv: float
    cs_mm: float
    amplitude_contrast: float
    dose_per_frame_e_per_angstrom2: float
    group_name: str = "opticsGroup1"


@dataclass(frozen=True, slots=True, kw_only=True)
class ParticleTruth:
    """One particle."""

    exposure_name: str
    coordinate_yx_px: tuple[float, float]
    euler_deg: tuple[float, float, float]
    defocus_u_angstrom: float
    defocus_v_angstrom: float
    astigmatism_angle_deg: float
    phase_shift_deg: float


@dataclass(frozen=True, slots=True, kw_only=True)
class JunkRow:
    """One junk object; for carbon and empty areas (y, x) is on the edge and the angle its normal's."""

    exposure_name: str
    label: str
    coordinate_yx_px: tuple[float, float]
    radius_px: float
    angle_deg: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MotionTruth:
    """Displacements of the specimen in px, relative to the first frame.

    `global_yx_px` is (frame, yx); `local_yx_px` (frame, point, yx) at `points_yx_px` (point, yx), on top of
    the global part.
    """

    shape_yx_px: tuple[int, int]
    global_yx_px: FloatArray
    points_yx_px: FloatArray
    local_yx_px: FloatArray


def write_particles_star(path: Path, particles: Sequence[ParticleTruth], optics: OpticsTruth) -> None:
    """Write the optics and particles blocks (`rlnMicrographName` is `micrographs/NAME.mrc`)."""
    columns = (
        "rlnMicrographName", "rlnCoordinateX", "rlnCoordinateY", "rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi",
        "rlnOriginXAngst", "rlnOriginYAngst", "rlnDefocusU", "rlnDefocusV", "rlnDefocusAngle",
        "rlnPhaseShift", "rlnOpticsGroup",
    )  # fmt: skip
    rows = (
        f"micrographs/{p.exposure_name}.mrc {p.coordinate_yx_px[1]:.4f} {p.coordinate_yx_px[0]:.4f}"
        f" {p.euler_deg[0]:.5f} {p.euler_deg[1]:.5f} {p.euler_deg[2]:.5f} 0.0 0.0"
        f" {p.defocus_u_angstrom:.2f} {p.defocus_v_angstrom:.2f} {p.astigmatism_angle_deg:.3f}"
        f" {p.phase_shift_deg:.3f} 1"
        for p in particles
    )
    _replace_text(path, format_optics(optics) + _loop("particles", columns, rows))


def format_optics(optics: OpticsTruth) -> str:
    """Return the optics block."""
    columns = (
        "rlnOpticsGroup", "rlnOpticsGroupName", "rlnVoltage", "rlnSphericalAberration",
        "rlnAmplitudeContrast", "rlnMicrographPixelSize", "rlnMicrographOriginalPixelSize",
    )  # fmt: skip
    row = (
        f"1 {optics.group_name} {optics.voltage_kv:.4f} {optics.cs_mm:.4f} {optics.amplitude_contrast:.4f}"
        f" {optics.pixel_size_angstrom:.6f} {optics.pixel_size_angstrom:.6f}"
    )
    return _loop("optics", columns, (row,))


def write_junk_star(path: Path, junk: Sequence[JunkRow]) -> None:
    """Write the junk with its label, radius in px and angle."""
    columns = (
        "rlnMicrographName", "rlnCoordinateX", "rlnCoordinateY", "icestreamJunkLabel",
        "icestreamJunkRadius", "icestreamJunkAngle",
    )  # fmt: skip
    rows = (
        f"micrographs/{j.exposure_name}.mrc {j.coordinate_yx_px[1]:.3f} {j.coordinate_yx_px[0]:.3f}"
        f" {j.label} {j.radius_px:.3f} {j.angle_deg:.3f}"
        for j in junk
    )
    _replace_text(path, _loop("junk", columns, rows))


def write_motion_star(
    path: Path, motion: MotionTruth, *, optics: OpticsTruth, movie: str, gain: str | None
) -> None:
    """Write RELION's general, global_shift and local_shift blocks."""
    n_frames = len(motion.global_yx_px)
    general = (
        ("rlnImageSizeX", str(motion.shape_yx_px[1])),
        ("rlnImageSizeY", str(motion.shape_yx_px[0])),
        ("rlnImageSizeZ", str(n_frames)),
        ("rlnMicrographMovieName", movie),
        *((("rlnMicrographGainName", gain),) if gain else ()),
        ("rlnMicrographBinning", "1.000000"),
        ("rlnMicrographOriginalPixelSize", f"{optics.pixel_size_angstrom:.6f}"),
        ("rlnMicrographDoseRate", f"{optics.dose_per_frame_e_per_angstrom2:.6f}"),
        ("rlnMicrographPreExposure", "0.000000"),
        ("rlnVoltage", f"{optics.voltage_kv:.6f}"),
        ("rlnMicrographStartFrame", "1"),
        ("rlnMotionModelVersion", "0"),
    )
    text = "\n# version 30001\n\ndata_general\n\n" + "".join(f"_{k:<40} {v}\n" for k, v in general) + "\n"
    text += _loop(
        "global_shift",
        ("rlnMicrographFrameNumber", "rlnMicrographShiftX", "rlnMicrographShiftY"),
        (f"{i + 1} {-x + 0.0:.5f} {-y + 0.0:.5f}" for i, (y, x) in enumerate(motion.global_yx_px.tolist())),
    )
    text += _loop(
        "local_shift",
        (
            "rlnMicrographFrameNumber",
            "rlnCoordinateX",
            "rlnCoordinateY",
            "rlnMicrographShiftX",
            "rlnMicrographShiftY",
        ),
        (
            f"{frame + 1} {point[1]:.3f} {point[0]:.3f}"
            f" {-motion.local_yx_px[frame, i, 1] + 0.0:.5f} {-motion.local_yx_px[frame, i, 0] + 0.0:.5f}"
            for i, point in enumerate(motion.points_yx_px.tolist())
            for frame in range(n_frames)
        ),
    )
    _replace_text(path, text)


def _loop(block: str, columns: Sequence[str], rows: Iterable[str]) -> str:
    header = "".join(f"_{name} #{i}\n" for i, name in enumerate(columns, 1))
    return (
        f"\n# version 30001\n\ndata_{block}\n\nloop_\n{header}" + "".join(f"{row}\n" for row in rows) + "\n"
    )


def _replace_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.write_text(text, encoding="ascii")
    temporary.replace(path)
