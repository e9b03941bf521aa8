"""RELION STAR files: particles with optics groups, micrographs, picks.

Written through starfile (100,000 particles of 14 columns: 2.3 s to write on one core), without
its time stamp, so that the same table gives the same bytes, and durable by rename. Particle uids are unsigned
64-bit integers: they are written as decimal text and read as text, because no float keeps them. starfile
cannot quote `#`, quotes or white space other than a blank, so text with those is refused on the way out.
"""

from __future__ import annotations

from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import numpy as np
import pandas as pd
import starfile
from numpy.typing import NDArray

from stream.records.errors import InputError
from stream.records.values import Optics
from stream.store.files import replacing

UID_COLUMN = "icestreamUid"
SCORE_COLUMN = "icestreamScore"
HALF_SET_COLUMN = "rlnRandomSubset"

_REQUIRED_PARTICLE_COLUMNS = ("rlnImageName", "rlnOpticsGroup")
_UNSAFE_CHARACTERS = "[#'\"\t\n\r]"
_OWN_HEAD = "# version 30001\n# written by icestream\n"
_TEXT_COLUMNS = (
    UID_COLUMN,
    "rlnImageName",
    "rlnMicrographName",
    "rlnMicrographMetadata",
    "rlnCtfImage",
    "rlnOpticsGroupName",
)


@dataclass(frozen=True, slots=True)
class ParticleStar:
    """A STAR file's optics block and its particles (or micrographs) block, in file order."""

    optics: pd.DataFrame
    particles: pd.DataFrame


def make_particle_optics(
    optics: Optics,
    *,
    image_pixel_size_angstrom: float,
    image_size_px: int,
    optics_group: int = 1,
    name: str | None = None,
) -> pd.DataFrame:
    """Return the optics block (one row) of a particle STAR file."""
    return pd.DataFrame(
        {
            "rlnOpticsGroup": [optics_group],
            "rlnOpticsGroupName": [name or f"opticsGroup{optics_group}"],
            "rlnVoltage": [optics.voltage_kv],
            "rlnSphericalAberration": [optics.cs_mm],
            "rlnAmplitudeContrast": [optics.amplitude_contrast],
            "rlnImagePixelSize": [image_pixel_size_angstrom],
            "rlnImageSize": [image_size_px],
            "rlnImageDimensionality": [2],
        }
    )


def make_micrograph_optics(
    optics: Optics, *, micrograph_pixel_size_angstrom: float, optics_group: int = 1, name: str | None = None
) -> pd.DataFrame:
    """Return the optics block (one row) of a micrograph STAR file."""
    return pd.DataFrame(
        {
            "rlnOpticsGroup": [optics_group],
            "rlnOpticsGroupName": [name or f"opticsGroup{optics_group}"],
            "rlnVoltage": [optics.voltage_kv],
            "rlnSphericalAberration": [optics.cs_mm],
            "rlnAmplitudeContrast": [optics.amplitude_contrast],
            "rlnMicrographPixelSize": [micrograph_pixel_size_angstrom],
        }
    )


def write_particles_star(path: Path, table: pd.DataFrame, optics: pd.DataFrame) -> None:
    """Write the blocks `optics` and `particles`, durably, replacing `path`.

    `table` has RELION's columns (at least rlnImageName and rlnOpticsGroup); `icestreamUid`, when there, must
    be uint64. Every optics group that the particles name must be in `optics`.
    """
    _check_columns(path, table, _REQUIRED_PARTICLE_COLUMNS)
    _check_groups(path, table, optics)
    _write(path, {"optics": optics, "particles": table})


def write_micrographs_star(path: Path, table: pd.DataFrame, optics: pd.DataFrame) -> None:
    """Write the blocks `optics` and `micrographs` (at least rlnMicrographName, rlnOpticsGroup), durably."""
    _check_columns(path, table, ("rlnMicrographName", "rlnOpticsGroup"))
    _check_groups(path, table, optics)
    _write(path, {"optics": optics, "micrographs": table})


def write_picks_star(
    path: Path, coordinates_yx_px: NDArray[np.floating], scores: NDArray[np.floating]
) -> None:
    """Write pick centres in pixels of the micrograph with their figures of merit, in the order given."""
    coordinates = np.asarray(coordinates_yx_px, dtype=np.float64).reshape(-1, 2)
    merits = np.asarray(scores, dtype=np.float64)
    if merits.shape != (len(coordinates),):
        raise InputError(path, f"there is one score for each of {len(coordinates)} picks", merits.shape)
    table = pd.DataFrame(
        {
            "rlnCoordinateX": coordinates[:, 1],
            "rlnCoordinateY": coordinates[:, 0],
            "rlnAutopickFigureOfMerit": merits,
        }
    )
    _write(path, {"": table})


def read_particles_star(path: Path) -> ParticleStar:
    """Read a particle STAR file (RELION 3.1 or newer); `icestreamUid`, when there, is uint64."""
    return _read(path, "particles", _REQUIRED_PARTICLE_COLUMNS)


def read_micrographs_star(path: Path) -> ParticleStar:
    """Read a micrograph STAR file (RELION 3.1 or newer)."""
    return _read(path, "micrographs", ("rlnMicrographName", "rlnOpticsGroup"))


def read_uid_table(path: Path) -> pd.DataFrame:
    """Return the table of a STAR file that has the column `icestreamUid` (an engine's poses, say)."""
    blocks = _parse(path)
    table = next((block for block in blocks.values() if UID_COLUMN in block.columns), None)
    if table is None:
        raise InputError(path, f"the STAR file has a table with {UID_COLUMN}", ", ".join(blocks) or "none")
    return table.assign(**{UID_COLUMN: _parse_uids(path, table[UID_COLUMN])})


def read_picks_star(path: Path) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return (coordinates_yx_px [n, 2], scores [n]) of a picks STAR file; a missing score is NaN."""
    blocks = _parse(path)
    table = next(iter(blocks.values()), None)
    if table is None:
        raise InputError(path, "a picks STAR file has a table")
    _check_columns(path, table, ("rlnCoordinateX", "rlnCoordinateY"))
    coordinates = table[["rlnCoordinateY", "rlnCoordinateX"]].to_numpy(np.float64)
    if "rlnAutopickFigureOfMerit" not in table.columns:
        return coordinates, np.full(len(table), np.nan)
    return coordinates, table["rlnAutopickFigureOfMerit"].to_numpy(np.float64)


def split_image_names(names: pd.Series) -> tuple[NDArray[np.int64], NDArray[np.object_]]:
    """Split `000001@folder/stack.mrcs` into (0-based index in the stack, stack path)."""
    if names.empty:
        return np.empty(0, np.int64), np.empty(0, object)
    parts = names.astype(str).str.partition("@")
    is_bare = (parts[1] == "").to_numpy()
    if is_bare.any():
        raise InputError(names.iloc[int(is_bare.argmax())], "an image name is INDEX@STACK")
    numbers = pd.to_numeric(parts[0], errors="coerce").to_numpy(np.float64)
    is_bad = ~(numbers >= 1)
    if is_bad.any():
        raise InputError(names.iloc[int(is_bad.argmax())], "an image index counts from 1")
    return numbers.astype(np.int64) - 1, parts[2].to_numpy(object)


def join_image_names(indices: NDArray[np.integer], stacks: NDArray[np.object_]) -> list[str]:
    """Return `000001@stack` for 0-based indices."""
    return [
        f"{index + 1:06d}@{stack}" for index, stack in zip(indices.tolist(), stacks.tolist(), strict=True)
    ]


def _check_columns(path: Path, table: pd.DataFrame, required: tuple[str, ...]) -> None:
    missing = [column for column in required if column not in table.columns]
    if missing:
        raise InputError(
            path, f"the table has the columns {', '.join(required)}", f"without {', '.join(missing)}"
        )


def _check_groups(path: Path, table: pd.DataFrame, optics: pd.DataFrame) -> None:
    _check_columns(path, optics, ("rlnOpticsGroup",))
    unknown = set(table["rlnOpticsGroup"].unique().tolist()) - set(optics["rlnOpticsGroup"].tolist())
    if unknown:
        raise InputError(path, "every optics group of the particles is in the optics block", sorted(unknown))


def _write(path: Path, blocks: dict[str, pd.DataFrame]) -> None:
    text = starfile.to_string(
        {name: _as_written(path, block) for name, block in blocks.items()}, na_rep="nan", float_format="%.6f"
    )
    _, _, body = text.partition("\n")
    with replacing(path) as temporary:
        temporary.write_text(_OWN_HEAD + body, encoding="utf-8")


def _as_written(path: Path, block: pd.DataFrame) -> pd.DataFrame:
    if UID_COLUMN in block.columns:
        if block[UID_COLUMN].dtype != np.uint64:
            raise InputError(path, f"{UID_COLUMN} is an unsigned 64-bit integer", block[UID_COLUMN].dtype)
        block = block.assign(**{UID_COLUMN: block[UID_COLUMN].astype(str)})
    for column in block.columns:
        if pd.api.types.is_numeric_dtype(block[column].dtype):
            continue
        unsafe = block[column].astype(str).str.contains(_UNSAFE_CHARACTERS, regex=True)
        if unsafe.any():
            value = block[column][unsafe].iloc[0]
            raise InputError(path, f"text in a STAR file has no #, quote or tab ({column})", repr(value))
    return block


def _read(path: Path, block_name: str, required: tuple[str, ...]) -> ParticleStar:
    blocks = _parse(path)
    if "optics" not in blocks or block_name not in blocks:
        rule = f"the STAR file has the blocks optics and {block_name} (RELION 3.1 or newer)"
        raise InputError(path, rule, ", ".join(blocks) or "none")
    table = blocks[block_name]
    _check_columns(path, table, required)
    if UID_COLUMN in table.columns:
        table = table.assign(**{UID_COLUMN: _parse_uids(path, table[UID_COLUMN])})
    return ParticleStar(optics=blocks["optics"], particles=table)


def _parse(path: Path) -> dict[str, pd.DataFrame]:
    try:
        text = path.read_text(encoding="utf-8")
        if text.startswith(_OWN_HEAD):
            return _parse_own(text)
        blocks = starfile.read(path, always_dict=True, parse_as_string=list(_TEXT_COLUMNS))
    except OSError as error:
        raise InputError(path, "the STAR file can be read", error) from error
    except (ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        raise InputError(path, "the file is a STAR file", error) from error
    return {name: _as_table(block) for name, block in blocks.items() if block is not None}


def _parse_own(text: str) -> dict[str, pd.DataFrame]:
    """Parse what `_write` wrote, three times as fast as starfile: separated by tabs, one loop in each block."""
    blocks = {}
    for part in text.split("\ndata_")[1:]:
        name, _, loop = part.partition("\n")
        labels = [line.split()[0][1:] for line in loop.splitlines() if line.startswith("_")]
        rows = loop[loop.index("\n", loop.rindex("\n_") + 1) + 1 :].strip("\n")
        dtypes = {label: str for label in labels if label in _TEXT_COLUMNS}
        if rows:
            blocks[name] = pd.read_csv(
                StringIO(rows),
                sep="\t",
                header=None,
                names=labels,
                dtype=dtypes,
                keep_default_na=False,
                na_values={label: ["nan"] for label in labels if label not in dtypes},
            )
        else:
            blocks[name] = pd.DataFrame({label: [] for label in labels})
    return blocks


def _as_table(block: pd.DataFrame | dict[str, object]) -> pd.DataFrame:
    return block if isinstance(block, pd.DataFrame) else pd.DataFrame([block])


def _parse_uids(path: Path, text: pd.Series) -> NDArray[np.uint64]:
    try:
        # An empty block comes back from starfile as floats.
        return np.array([int(uid) for uid in text.tolist()], dtype=np.uint64)
    except (ValueError, OverflowError) as error:
        raise InputError(path, f"{UID_COLUMN} is an unsigned 64-bit integer", error) from error
