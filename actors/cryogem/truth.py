"""Micrographs of a session with their particles' known places and poses, which no training has seen.

The truth is a particle STAR: `truth/particles.star` of a virtual session, or a refinement's particles of a real one. Of the
micrographs it names, those that the bank trained on are left out; the held-out ones come from the bank, others are read from their
files (relative to the STAR's folder or the one above) and prepared as the bank's were.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.cryogem.bank import SessionBank
from models.cryogem.greys import levels_to_network_range, prepare_micrograph
from models.fourier.rotations import euler_to_matrix
from stream.ingest.movie_reader import read_micrograph
from stream.records.errors import InputError
from stream.sinks.relion_star import read_particles_star

_PLACE = ("rlnMicrographName", "rlnCoordinateX", "rlnCoordinateY")
_POSE = ("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi")
_CTF = ("rlnDefocusU", "rlnDefocusV", "rlnDefocusAngle")
_ORIGIN = ("rlnOriginXAngst", "rlnOriginYAngst")


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownMicrograph:
    """A micrograph in the networks' range with its particles: centres (y, x) in working pixels, and what else is known.

    `rotations` `(n 3 3)` and `ctf` (u, v in Å, angle, phase shift in degrees, `(n 4)`) are None where the STAR has none.
    """

    name: str
    image: Tensor
    centres_yx_px: NDArray[np.float64]
    rotations: Tensor | None
    ctf: Tensor | None


def read_truth(
    path: Path,
    bank: SessionBank,
    *,
    is_training: bool = False,
    limit: int | None = None,
    on_progress: Callable[[str], None] | None = None,
) -> list[KnownMicrograph]:
    """Return known micrographs in the STAR's order: those never trained on, or (`is_training`) those trained on alone.

    There may be none.
    """
    table = read_particles_star(path).particles
    missing = [column for column in _PLACE if column not in table.columns]
    if missing:
        raise InputError(path, "the truth has a micrograph and coordinates for each particle", missing)
    n_training = len(bank.training_micrographs)
    places = {name: index for index, name in enumerate(bank.facts.names)}
    found: list[KnownMicrograph] = []
    for name, rows in table.groupby("rlnMicrographName", sort=False):
        stem = Path(str(name)).stem
        index = places.get(stem)
        if (index is not None and index < n_training) != is_training:
            continue
        if limit is not None and len(found) == limit:
            break
        image = bank.micrographs[index] if index is not None else _read(path, str(name), bank)
        found.append(_known(stem, levels_to_network_range(image), rows, bank))
        if on_progress is not None:
            on_progress(f"read {stem}: {len(rows)} particles")
    return found


def _known(name: str, image: Tensor, rows: pd.DataFrame, bank: SessionBank) -> KnownMicrograph:
    facts = bank.facts
    centres = rows[["rlnCoordinateY", "rlnCoordinateX"]].to_numpy(np.float64)
    if all(column in rows.columns for column in _ORIGIN):
        # the origin is what has to be added to the image to centre it: the particle lies the other way
        origin = rows[["rlnOriginYAngst", "rlnOriginXAngst"]].to_numpy(np.float64)
        centres = centres - origin / facts.micrograph_pixel_size_angstrom
    rotations = ctf = None
    if all(column in rows.columns for column in _POSE):
        angles = torch.from_numpy(rows[list(_POSE)].to_numpy(np.float64, copy=True))
        rotations = euler_to_matrix(angles).float()
    if all(column in rows.columns for column in _CTF):
        values = rows[list(_CTF)].to_numpy(np.float64)
        phase = rows["rlnPhaseShift"].to_numpy(np.float64) if "rlnPhaseShift" in rows else np.zeros(len(rows))
        ctf = torch.from_numpy(np.column_stack((values, phase))).float()
    return KnownMicrograph(
        name=name,
        image=image,
        centres_yx_px=centres * (facts.micrograph_pixel_size_angstrom / facts.pixel_size_angstrom),
        rotations=rotations,
        ctf=ctf,
    )


def _read(star: Path, name: str, bank: SessionBank) -> Tensor:
    folders = (star.absolute().parent, star.absolute().parent.parent)
    path = next((folder / name for folder in folders if (folder / name).is_file()), None)
    if path is None:
        raise InputError(star, "micrographs lie beside the truth or in the folder above", name)
    try:
        levels = prepare_micrograph(torch.from_numpy(read_micrograph(path)), min(bank.shape_yx)).levels
    except ValueError as error:
        raise InputError(path, f"a micrograph of the session ({error})") from error
    if levels.shape != bank.micrographs.shape[1:]:
        raise InputError(path, f"micrographs have the bank's shape {bank.shape_yx}", tuple(levels.shape))
    return levels
