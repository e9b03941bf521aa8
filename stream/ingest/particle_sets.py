"""Reading particle inputs: RELION STAR (3.0 and 3.1, also .gz), CryoSPARC .cs, bare .mrcs stacks.

Everything is converted to RELION's units and signs here (radians to degrees, fractions to pixels, rotation
vectors to ZYZ angles). Paths: RELION's are relative to the project folder, which a STAR does not name, so the
given root, the STAR's folder and its parents are tried in turn; CryoSPARC's likewise.
"""

from __future__ import annotations

import functools
import gzip
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import starfile
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from stream.ingest.files import translate_os_error
from stream.ingest.particle_table import (
    Floats,
    ParticleGroup,
    ParticleTable,
    check_stacks,
    iterate_images,
    split_by_micrograph,
)
from stream.records.errors import InputError
from stream.records.values import Optics

__all__ = [
    "ParticleGroup",
    "ParticleTable",
    "iterate_images",
    "read_particle_table",
    "read_particle_table_cached",
    "split_by_micrograph",
]

_NPY_MAGIC = b"\x93NUMPY"
_CSDAT_MAGIC = b"\x95CSDAT"
_TEXT_COLUMNS = ["rlnImageName", "rlnMicrographName", "rlnOpticsGroupName", "icestreamUid"]
_STAR_CTF = ("rlnDefocusU", "rlnDefocusV", "rlnDefocusAngle")
_STAR_MAGNIFICATION = ("rlnMagMat00", "rlnMagMat01", "rlnMagMat10", "rlnMagMat11")
_CS_ABERRATIONS = ("ctf/tilt_A", "ctf/trefoil_A", "ctf/tetra_A", "ctf/anisomag")
_CS_CTF = ("ctf/df1_A", "ctf/df2_A", "ctf/df_angle_rad", "ctf/accel_kv", "ctf/cs_mm", "ctf/amp_contrast")


def read_particle_table(
    path: str | Path,
    *,
    root: Path | None = None,
    require_ctf: bool = True,
    optics: Optics | None = None,
    pixel_size_angstrom: float | None = None,
) -> ParticleTable:
    """Return the particles of a .star, .star.gz, .cs, .mrcs or .mrc file; every address is checked.

    Parameters
    ----------
    root
        The project folder to which paths in the file are relative; tried first.
    require_ctf
        Refuse particles without defocus (a bare stack never has one). Scoring can do without, a
        reconstruction cannot.
    optics, pixel_size_angstrom
        Used where the file does not say (bare stacks).

    Raises
    ------
    InputError
        Names the file and what is wrong: missing stack, index beyond its end, missing columns, mixed boxes.
    """
    path = Path(path).absolute()
    try:
        with path.open("rb") as stream:
            magic = stream.read(6)
    except OSError as error:
        raise translate_os_error(path, error) from error
    suffixes = {suffix.lower() for suffix in path.suffixes[-2:]}
    if magic == _CSDAT_MAGIC:
        raise InputError(path, "a .cs file is in NumPy format (save it with format='numpy')", "CSDAT")
    if magic == _NPY_MAGIC:
        return _read_cs(path, root, require_ctf=require_ctf)
    if ".star" in suffixes:
        return _read_star(path, root, require_ctf=require_ctf)
    if suffixes & {".mrcs", ".mrc", ".st"}:
        return _read_stack(path, optics, pixel_size_angstrom, require_ctf=require_ctf)
    raise InputError(
        path, "particles come as .star, .star.gz, .cs, .mrcs or .mrc", path.suffix or "no suffix"
    )


@functools.lru_cache(maxsize=2)
def _cached_table(
    key: tuple[str, int, int],
    root: Path | None,
    optics: Optics | None,
    pixel_size_angstrom: float | None,
) -> ParticleTable:
    return read_particle_table(
        key[0], root=root, require_ctf=False, optics=optics, pixel_size_angstrom=pixel_size_angstrom
    )


def read_particle_table_cached(
    path: str | Path,
    *,
    root: Path | None = None,
    optics: Optics | None = None,
    pixel_size_angstrom: float | None = None,
) -> ParticleTable:
    """Return the table, CTF or not, read anew only when the file has changed (each micrograph's actor asks)."""
    try:
        status = Path(path).stat()
    except OSError as error:
        raise translate_os_error(path, error) from error
    key = (str(Path(path).absolute()), status.st_size, status.st_mtime_ns)
    return _cached_table(key, root, optics, pixel_size_angstrom)


class _PathFinder:
    """Absolute paths of files that are named relative to an unknown project folder."""

    def __init__(self, source: Path, root: Path | None) -> None:
        self._source = source
        self._folders = ([root.absolute()] if root else []) + list(source.parents)
        self._found: dict[str, str] = {}

    def find(self, name: str) -> str:
        if name not in self._found:
            candidates = [folder / name for folder in self._folders]
            hit = next((candidate for candidate in candidates if candidate.is_file()), None)
            if hit is None:
                value = f"{name}, looked for below {', '.join(str(f) for f in self._folders[:4])}"
                raise InputError(self._source, "every particle stack is there", value)
            self._found[name] = str(hit)
        return self._found[name]


def _read_blocks(path: Path) -> Mapping[str, Any]:
    try:
        if path.suffix.lower() == ".gz":
            with tempfile.NamedTemporaryFile(suffix=".star") as plain:
                plain.write(gzip.decompress(path.read_bytes()))
                plain.flush()
                return _parse_star(Path(plain.name), path)
        return _parse_star(path, path)
    except (OSError, EOFError) as error:
        if isinstance(error, gzip.BadGzipFile | EOFError):
            raise InputError(path, "a .gz file can be unpacked", error) from error
        raise translate_os_error(path, error) from error


def _parse_star(plain: Path, path: Path) -> Mapping[str, Any]:
    try:
        blocks: Mapping[str, Any] = starfile.read(plain, always_dict=True, parse_as_string=_TEXT_COLUMNS)
    except (ValueError, KeyError, IndexError, TypeError, StopIteration) as error:
        raise InputError(path, "a STAR file can be parsed", error) from error
    return blocks


def _read_star(path: Path, root: Path | None, *, require_ctf: bool) -> ParticleTable:
    blocks = _read_blocks(path)
    table = next((b for b in blocks.values() if hasattr(b, "columns") and "rlnImageName" in b.columns), None)
    if table is None:
        names = ", ".join(blocks) or "no block"
        raise InputError(path, "a particle STAR has a table with rlnImageName", names)
    if len(table) == 0:
        raise InputError(path, "a particle STAR has at least one row", "0 rows")
    columns = {name: table[name].to_numpy() for name in table.columns}
    columns |= _optics_columns(blocks.get("optics"), columns, path)
    n = len(table)
    if require_ctf:
        needed = (*_STAR_CTF, "rlnVoltage", "rlnSphericalAberration", "rlnAmplitudeContrast")
        _require(columns, needed, path)
    finder = _PathFinder(path, root)
    indices, stacks = _parse_image_names(columns["rlnImageName"], path, finder)
    box, header_pixel_size = check_stacks(str(path), stacks, indices)
    pixel_size = _star_pixel_size(columns, n, header_pixel_size, path)

    def number(name: str, default: float = float("nan")) -> Floats:
        return _floats(columns, name, n, default, path)

    return ParticleTable(
        source=str(path),
        stack_paths=stacks,
        stack_indices=indices,
        micrograph_names=_texts(columns.get("rlnMicrographName"), n),
        coordinate_y_px=number("rlnCoordinateY"),
        coordinate_x_px=number("rlnCoordinateX"),
        defocus_u_angstrom=number("rlnDefocusU"),
        defocus_v_angstrom=number("rlnDefocusV"),
        astigmatism_angle_deg=number("rlnDefocusAngle"),
        phase_shift_deg=number("rlnPhaseShift", 0.0),
        voltage_kv=number("rlnVoltage"),
        cs_mm=number("rlnSphericalAberration"),
        amplitude_contrast=number("rlnAmplitudeContrast"),
        pixel_size_angstrom=pixel_size,
        box_size_px=box,
        optics_groups=number("rlnOpticsGroup", 1.0).astype(np.int64),
        uids=_uids(columns.get("icestreamUid"), path),
        half_sets=number("rlnRandomSubset").astype(np.int8) if "rlnRandomSubset" in columns else None,
        euler_deg=_stacked(columns, ("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"), n, path),
        origin_xy_angstrom=_star_origins(columns, n, pixel_size, path),
        figure_of_merit=number("rlnAutopickFigureOfMerit") if "rlnAutopickFigureOfMerit" in columns else None,
        beam_tilt_xy_mrad=_stacked(columns, ("rlnBeamTiltX", "rlnBeamTiltY"), n, path),
        aberrations=_star_aberrations(columns),
    )


def _star_aberrations(columns: Mapping[str, Any]) -> tuple[str, ...]:
    """Name the columns of aberrations beyond beam tilt that are not zero (a matrix: not the unit matrix)."""
    found = [
        name
        for name in ("rlnOddZernike", "rlnEvenZernike")
        if any(set(str(value)) & set("123456789") for value in columns.get(name, ()))
    ]
    for name, neutral in zip(_STAR_MAGNIFICATION, (1.0, 0.0, 0.0, 1.0), strict=True):
        values = np.asarray(columns.get(name, neutral), dtype=np.float64)
        if (np.abs(values - neutral) > 1e-6).any():
            found.append(name)
    return tuple(found)


def _optics_columns(optics: Any, columns: Mapping[str, Any], path: Path) -> dict[str, NDArray[Any]]:  # noqa: ANN401
    """The optics block's columns, one value per particle; columns of the particles themselves win."""
    if optics is None:
        return {}
    # A block of one row may come as a plain mapping.
    names = list(optics.columns) if hasattr(optics, "columns") else list(optics)
    block = {name: np.atleast_1d(np.asarray(optics[name])) for name in names}
    _require(block, ("rlnOpticsGroup",), path)
    _require(columns, ("rlnOpticsGroup",), path)
    groups = [int(group) for group in block["rlnOpticsGroup"]]
    positions = {group: position for position, group in enumerate(groups)}
    unknown = sorted({int(g) for g in columns["rlnOpticsGroup"]} - positions.keys())
    if unknown:
        raise InputError(path, "every particle's optics group is in the optics block", f"group {unknown[0]}")
    rows = np.asarray([positions[int(group)] for group in columns["rlnOpticsGroup"]])
    return {name: values[rows] for name, values in block.items() if name not in columns}


def _parse_image_names(
    names: Sequence[str] | NDArray[Any], path: Path, finder: _PathFinder
) -> tuple[NDArray[np.int64], NDArray[np.object_]]:
    indices = np.zeros(len(names), dtype=np.int64)
    stacks = np.empty(len(names), dtype=object)
    for row, name in enumerate(names):
        index, separator, stack = str(name).partition("@")
        if not separator:
            index, stack = "1", str(name)
        if not index.isdigit():
            raise InputError(path, "an image name reads NUMBER@STACK", f"row {row + 1}: {name}")
        indices[row] = int(index) - 1
        stacks[row] = finder.find(stack)
    return indices, stacks


def _star_pixel_size(columns: Mapping[str, Any], n: int, header: float, path: Path) -> Floats:
    for name in ("rlnImagePixelSize", "rlnPixelSize"):
        if name in columns:
            return _floats(columns, name, n, float("nan"), path)
    if "rlnDetectorPixelSize" in columns and "rlnMagnification" in columns:
        detector_um = _floats(columns, "rlnDetectorPixelSize", n, float("nan"), path)
        return detector_um * 1e4 / _floats(columns, "rlnMagnification", n, float("nan"), path)
    if np.isfinite(header):
        return np.full(n, header)
    rule = "a STAR gives the pixel size (rlnImagePixelSize, or rlnDetectorPixelSize and rlnMagnification)"
    raise InputError(path, rule, "none of them")


def _star_origins(columns: Mapping[str, Any], n: int, pixel_size: Floats, path: Path) -> Floats | None:
    origins = _stacked(columns, ("rlnOriginXAngst", "rlnOriginYAngst"), n, path)
    if origins is not None:
        return origins
    in_pixels = _stacked(columns, ("rlnOriginX", "rlnOriginY"), n, path)
    return None if in_pixels is None else in_pixels * pixel_size[:, None]


def _stacked(columns: Mapping[str, Any], names: tuple[str, ...], n: int, path: Path) -> Floats | None:
    if not all(name in columns for name in names):
        return None
    return np.stack([_floats(columns, name, n, float("nan"), path) for name in names], axis=-1)


def _floats(columns: Mapping[str, Any], name: str, n: int, default: float, path: Path) -> Floats:
    if name not in columns:
        return np.full(n, default)
    try:
        return np.asarray(columns[name], dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(path, f"column {name} holds numbers", error) from error


def _uids(values: Any, path: Path) -> NDArray[np.uint64] | None:  # noqa: ANN401 - a pandas or numpy column
    if values is None:
        return None
    try:
        uids = np.asarray([int(value) for value in values], dtype=np.uint64)
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(path, "column icestreamUid holds unsigned 64-bit integers", error) from error
    return _check_uids(uids, path)


def _texts(values: Any, n: int) -> NDArray[np.object_]:  # noqa: ANN401 - a pandas or numpy column
    texts = np.empty(n, dtype=object)
    if values is not None:
        texts[:] = [_text(value) or None for value in values]
    return texts


def _text(value: Any) -> str:  # noqa: ANN401 - str or fixed-width bytes
    return value.decode("utf-8", errors="replace") if isinstance(value, bytes) else str(value)


def _check_uids(uids: NDArray[np.uint64], path: Path) -> NDArray[np.uint64]:
    if (uids == 0).any():
        raise InputError(path, "a particle's uid is not 0", f"row {int((uids == 0).argmax()) + 1}")
    values, counts = np.unique(uids, return_counts=True)
    if (counts > 1).any():
        repeated = int(values[counts > 1][0])
        raise InputError(
            path, "every particle has a uid of its own", f"{repeated} is there {counts.max()} times"
        )
    return uids


def _require(columns: Mapping[str, Any] | Sequence[str], names: Sequence[str], path: Path) -> None:
    missing = [name for name in names if name not in columns]
    if missing:
        raise InputError(path, f"particles have the column {', '.join(missing)}", "missing")


def _read_cs(path: Path, root: Path | None, *, require_ctf: bool) -> ParticleTable:
    try:
        # Wide datasets have headers beyond numpy's default limit; allow_pickle stays off.
        rows = np.load(path, allow_pickle=False, max_header_size=1_000_000)
    except (ValueError, EOFError) as error:
        raise InputError(path, "a .cs file is a NumPy structured array", error) from error
    except OSError as error:
        raise translate_os_error(path, error) from error
    names = rows.dtype.names or ()
    _require(names, ("blob/path", "blob/idx"), path)
    if require_ctf:
        _require(names, _CS_CTF, path)
    n = len(rows)
    if n == 0:
        raise InputError(path, "a .cs file has at least one row", "0 rows")
    finder = _PathFinder(path, root)
    stacks = np.empty(n, dtype=object)
    # An exported result group marks paths relative to itself with ">".
    stacks[:] = [finder.find(_text(value).lstrip(">")) for value in rows["blob/path"]]
    indices = rows["blob/idx"].astype(np.int64)
    box, header_pixel_size = check_stacks(str(path), stacks, indices)

    def number(name: str, default: float = float("nan"), factor: float = 1.0) -> Floats:
        return rows[name].astype(np.float64) * factor if name in names else np.full(n, default)

    y_px, x_px = _cs_coordinates(rows, n)
    has_pose = {"alignments3D/pose", "alignments3D/shift"} <= set(names)
    pixel_size = number("blob/psize_A", header_pixel_size)
    return ParticleTable(
        source=str(path),
        stack_paths=stacks,
        stack_indices=indices,
        micrograph_names=_texts(
            rows["location/micrograph_path"] if "location/micrograph_path" in names else None, n
        ),
        coordinate_y_px=y_px,
        coordinate_x_px=x_px,
        defocus_u_angstrom=number("ctf/df1_A"),
        defocus_v_angstrom=number("ctf/df2_A"),
        astigmatism_angle_deg=number("ctf/df_angle_rad", factor=180 / np.pi),
        phase_shift_deg=number("ctf/phase_shift_rad", 0.0, factor=180 / np.pi),
        voltage_kv=number("ctf/accel_kv"),
        cs_mm=number("ctf/cs_mm"),
        amplitude_contrast=number("ctf/amp_contrast"),
        pixel_size_angstrom=pixel_size,
        box_size_px=box,
        optics_groups=number("ctf/exp_group_id", 0.0).astype(np.int64) + 1,
        uids=_check_uids(rows["uid"].astype(np.uint64), path) if "uid" in names else None,
        half_sets=(rows["alignments3D/split"] + 1).astype(np.int8) if "alignments3D/split" in names else None,
        euler_deg=_rotation_vectors_to_euler(rows["alignments3D/pose"]) if has_pose else None,
        origin_xy_angstrom=_cs_origins(rows, pixel_size) if has_pose else None,
        contrast_sign=np.where(rows["blob/sign"] < 0, -1, 1).astype(np.int8)
        if "blob/sign" in names
        else None,
        aberrations=tuple(name for name in _CS_ABERRATIONS if name in names and np.any(rows[name] != 0)),
    )


def _cs_coordinates(rows: NDArray[Any], n: int) -> tuple[Floats, Floats]:
    """Pixels of the micrograph; CryoSPARC counts y from the other side than RELION on the same micrograph."""
    needed = {"location/center_x_frac", "location/center_y_frac", "location/micrograph_shape"}
    if not needed <= set(rows.dtype.names or ()):
        return np.full(n, np.nan), np.full(n, np.nan)
    shape = rows["location/micrograph_shape"].astype(np.float64)
    return (1 - rows["location/center_y_frac"]) * shape[:, 0], rows["location/center_x_frac"] * shape[:, 1]


def _rotation_vectors_to_euler(vectors: NDArray[Any]) -> Floats:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # gimbal lock at the poles: any of the equal answers will do
        angles = Rotation.from_rotvec(vectors.astype(np.float64)).as_euler("ZYZ", degrees=True)
    return np.asarray(angles, dtype=np.float64)


def _cs_origins(rows: NDArray[Any], pixel_size: Floats) -> Floats:
    """Shifts are in pixels of the alignment's own pixel size, which need not be the stack's."""
    own = rows["alignments3D/psize_A"] if "alignments3D/psize_A" in (rows.dtype.names or ()) else pixel_size
    return np.asarray(
        rows["alignments3D/shift"].astype(np.float64) * np.asarray(own, dtype=np.float64)[:, None]
    )


def _read_stack(
    path: Path, optics: Optics | None, pixel_size_angstrom: float | None, *, require_ctf: bool
) -> ParticleTable:
    if require_ctf:
        raise InputError(path, "particles have a CTF (give the STAR or .cs of this stack)", "a bare stack")
    from stream.ingest.particle_table import read_stack_layout

    n = read_stack_layout(str(path)).n_sections
    stacks = np.full(n, str(path), dtype=object)
    box, header_pixel_size = check_stacks(str(path), stacks, np.arange(n))
    unknown = np.full(n, np.nan)
    return ParticleTable(
        source=str(path),
        stack_paths=stacks,
        stack_indices=np.arange(n),
        micrograph_names=np.full(n, None, dtype=object),
        coordinate_y_px=unknown,
        coordinate_x_px=unknown,
        defocus_u_angstrom=unknown,
        defocus_v_angstrom=unknown,
        astigmatism_angle_deg=unknown,
        phase_shift_deg=unknown,
        voltage_kv=unknown if optics is None else np.full(n, optics.voltage_kv),
        cs_mm=unknown if optics is None else np.full(n, optics.cs_mm),
        amplitude_contrast=unknown if optics is None else np.full(n, optics.amplitude_contrast),
        pixel_size_angstrom=np.full(n, pixel_size_angstrom or header_pixel_size),
        box_size_px=box,
        optics_groups=np.ones(n, dtype=np.int64),
    )
