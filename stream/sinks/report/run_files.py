"""What a run's folder holds for the report: curves, figures and pictures. A file that is not there is left out."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import starfile
from PIL import Image

MAX_PICTURE_BYTES = 2 * 2**20
"""Larger pictures are left out: three of this size keep a report under 10 MB."""

_THUMBNAIL_PX = 420
_THUMBNAIL_COLOURS = 64
_FSC_COLUMNS = {
    "corrected": "rlnFourierShellCorrelationCorrected",
    "unmasked": "rlnFourierShellCorrelationUnmaskedMaps",
    "masked": "rlnFourierShellCorrelationMaskedMaps",
    "phase-randomised": "rlnCorrectedFourierShellCorrelationPhaseRandomizedMaskedMaps",
}

Curve = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectionFan:
    """Conical FSCs of all directions: least and greatest value over the frequency in 1/Å."""

    low: Curve
    high: Curve


@dataclass(frozen=True, slots=True, kw_only=True)
class GrowthPoint:
    """Resolution of unions of random parts of a run's particles."""

    n_particles: float
    resolution_angstrom: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """An image of a run as a data URI, and what it shows."""

    uri: str
    words: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFiles:
    """What was found in a run's folder; `faults` names files that are there and cannot be read."""

    fsc: Mapping[str, Curve]
    fan: DirectionFan | None
    growth: Sequence[GrowthPoint]
    predicted_at_2n: Mapping[str, float]
    summary: Mapping[str, float]
    provenance: Mapping[str, str]
    map_picture: Picture | None
    orientation_picture: Picture | None
    local_resolution_picture: Picture | None
    faults: Sequence[str]


def read_run(folder: Path) -> RunFiles:
    """Return what the folder of a run holds."""
    faults: list[str] = []
    summary = _read_json(folder / "summary.json", faults)
    growth = _mapping(summary.get("growth"))
    return RunFiles(
        fsc=_read_fsc(folder / "fsc.star", faults),
        fan=_read_fan(_read_json(folder / "orientation.json", faults)),
        growth=list(_read_growth(growth)),
        predicted_at_2n=_finite(growth.get("predicted_angstrom_at_2n")),
        summary=_finite(summary)
        | {f"local_{k}": v for k, v in _finite(summary.get("local_resolution_angstrom")).items()}
        | {f"growth_{k}": v for k, v in _finite(growth).items()},
        provenance={k: str(v) for k, v in _mapping(summary.get("provenance")).items() if v is not None},
        map_picture=_read_picture(folder / "map.png", "central slices and projections", faults),
        orientation_picture=_read_picture(
            folder / "orientation.png",
            "conical FSC, resolution by direction and distribution of views",
            faults,
        ),
        local_resolution_picture=_read_picture(folder / "locres.png", "local resolution", faults),
        faults=faults,
    )


def read_thumbnail(path: Path) -> str | None:
    """Return a micrograph's picture, made small, as a data URI; None where there is none."""
    try:
        with Image.open(path) as image:
            image.thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX))
            # an octree keeps the few coloured pixels of the picks, which a median cut would make grey
            small = image.convert("RGB").quantize(_THUMBNAIL_COLOURS, method=Image.Quantize.FASTOCTREE)
            buffer = io.BytesIO()
            small.save(buffer, format="PNG", optimize=True)
    except (OSError, ValueError):
        return None
    return _as_uri(buffer.getvalue())


def _read_json(path: Path, faults: list[str]) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        return _mapping(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        faults.append(f"{path.name} cannot be read: {error}")
        return {}


def _read_fsc(path: Path, faults: list[str]) -> dict[str, Curve]:
    if not path.is_file():
        return {}
    try:
        table = starfile.read(path, always_dict=True)["fsc"]
        k = [float(v) for v in table["rlnResolution"]]
        columns = {name: [float(v) for v in table[c]] for name, c in _FSC_COLUMNS.items() if c in table}
    except (OSError, ValueError, KeyError, TypeError) as error:
        faults.append(f"{path.name} cannot be read: {error}")
        return {}
    curves = {name: list(zip(k, values, strict=True)) for name, values in columns.items()}
    return {name: [p for p in curve if all(map(math.isfinite, p))] for name, curve in curves.items()}


def _read_fan(document: Mapping[str, Any]) -> DirectionFan | None:
    """Return the least and greatest conical FSC over the shells of the box."""
    low, high = document.get("cfsc_min"), document.get("cfsc_max")
    extent = _finite(document)
    if not (isinstance(low, list) and isinstance(high, list)):
        return None
    if not extent.get("box_px") or not extent.get("pixel_size_angstrom"):
        return None
    shell = 1.0 / (extent["box_px"] * extent["pixel_size_angstrom"])
    known = [
        (i * shell, float(a), float(b))
        for i, (a, b) in enumerate(zip(low, high, strict=False))
        if isinstance(a, int | float) and isinstance(b, int | float)
    ]
    return DirectionFan(low=[(k, a) for k, a, _ in known], high=[(k, b) for k, _, b in known])


def _read_growth(growth: Mapping[str, Any]) -> Iterator[GrowthPoint]:
    points = growth.get("points")
    for point in points if isinstance(points, list) else []:
        numbers = _finite(point)
        n, d = numbers.get("n_particles", 0.0), numbers.get("resolution_angstrom", 0.0)
        if n > 0.0 and d > 0.0:
            yield GrowthPoint(n_particles=n, resolution_angstrom=d)


def _read_picture(path: Path, words: str, faults: list[str]) -> Picture | None:
    if not path.is_file():
        return None
    try:
        content = path.read_bytes()
        if len(content) > MAX_PICTURE_BYTES:
            faults.append(f"{path.name} is left out: {len(content) / 2**20:.0f} MiB")
            return None
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            image.verify()
    except (OSError, ValueError, SyntaxError) as error:  # Pillow raises SyntaxError for a broken PNG
        faults.append(f"{path.name} cannot be read: {error}")
        return None
    return Picture(uri=_as_uri(content), words=words)


def _as_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _finite(value: object) -> dict[str, float]:
    """Return the finite numbers of a document."""
    numbers = {
        k: v for k, v in _mapping(value).items() if isinstance(v, int | float) and not isinstance(v, bool)
    }
    return {k: float(v) for k, v in numbers.items() if math.isfinite(v)}
