"""Topaz as an external program: its command line is run on a micrograph and its table of coordinates read.

Topaz (Bepler et al. 2019) is GPL-3 and is never imported. `topaz preprocess` bins and normalises the micrograph
into a temporary folder, `topaz extract` scores it and prints a table with the columns image_name, x_coord,
y_coord and score, in pixels of the micrograph (`--up-scale` is the binning). Scores are Topaz's own
log-likelihood ratios (0 means a probability of one half), not the z-scores of the other pickers. The table is
read from standard output: one release ignores `--output` unless it writes a file per micrograph.

A program that is not there raises `ConfigurationError`; one that fails or writes something else `ResourceError`
(the exposure is tried again: a GPU may have been full).
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stream.records.errors import ConfigurationError, ResourceError

_COLUMNS = ("image_name", "x_coord", "y_coord", "score")
# Its networks see 71 px; a particle of about 24 px leaves room for its surroundings.
_DIAMETER_PX = 24.0
# Radius of non-maximum suppression in diameters: neighbours that touch stay two picks.
_RADIUS_DIAMETERS = 0.375
_IMAGE_SUFFIXES = (".mrc", ".tiff", ".tif")


@dataclass(frozen=True, slots=True, kw_only=True)
class TopazSettings:
    """Which program and which of its models (None: its own default) pick; `threshold` is a log-likelihood ratio."""

    executable: Path
    model: Path | None = None
    diameter_angstrom: float
    threshold: float = 0.0
    timeout_s: float = 900.0


def run_topaz(
    micrograph: Path, pixel_size_angstrom: float, settings: TopazSettings
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return centres `(pick yx)` in pixels of the micrograph and their scores, best first."""
    diameter_px = settings.diameter_angstrom / pixel_size_angstrom
    scale = max(1, round(diameter_px / _DIAMETER_PX))
    radius = max(1, round(_RADIUS_DIAMETERS * diameter_px / scale))
    with tempfile.TemporaryDirectory(prefix="icestream-topaz-") as folder:
        _call(
            settings, ["preprocess", "--scale", str(scale), "--destdir", folder, str(micrograph)], micrograph
        )
        images = sorted(
            p for p in Path(folder).iterdir() if p.stem == micrograph.stem and p.suffix in _IMAGE_SUFFIXES
        )
        if len(images) != 1:
            raise ResourceError(
                micrograph,
                "topaz preprocess writes one image",
                ", ".join(os.listdir(folder)) or "an empty folder",  # noqa: PTH208 - names are shown as they are
            )
        command = ["extract", "--radius", str(radius), "--threshold", f"{settings.threshold:g}"]
        command += ["--up-scale", str(scale)]
        if settings.model is not None:
            command += ["--model", str(settings.model)]
        table = _call(settings, [*command, str(images[0])], micrograph)
    return _parse_table(table, micrograph)


def _call(settings: TopazSettings, arguments: list[str], micrograph: Path) -> str:
    """Run one topaz command and return what it printed."""
    try:
        done = subprocess.run(
            [str(settings.executable), *arguments],
            capture_output=True,
            text=True,
            timeout=settings.timeout_s,
            check=False,
        )
    except (FileNotFoundError, PermissionError) as error:
        raise ConfigurationError(
            "topaz_executable", "topaz is installed and may be run", settings.executable
        ) from error
    except subprocess.TimeoutExpired as error:
        raise ResourceError(
            micrograph, f"topaz {arguments[0]} ends within {settings.timeout_s:g} s", "still running"
        ) from error
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["nothing on standard error"])[-1]
        raise ResourceError(micrograph, f"topaz {arguments[0]} ends well", f"exit {done.returncode}: {last}")
    return done.stdout


def _parse_table(text: str, micrograph: Path) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return centres and scores of the lines below the header; what is printed before it does not count."""
    lines = text.splitlines()
    header = "\t".join(_COLUMNS)
    if header not in lines:
        rule = f"topaz extract prints a table with the columns {', '.join(_COLUMNS)}"
        raise ResourceError(micrograph, rule, lines[0] if lines else "nothing")
    rows = [line.split("\t") for line in lines[lines.index(header) + 1 :] if line.strip()]
    try:
        values = np.array([[float(row[2]), float(row[1]), float(row[3])] for row in rows], dtype=np.float64)
    except (ValueError, IndexError) as error:
        raise ResourceError(micrograph, "topaz prints numbers in its columns", error) from error
    values = values.reshape(-1, 3)
    order = np.argsort(-values[:, 2], kind="stable")
    return values[order, :2].astype(np.float32), values[order, 2].astype(np.float32)
