"""Taking over particles that somebody else extracted, one micrograph's share at a time.

The images are checked (a NaN or constant image is excluded and counted), brought to our convention (protein
white, background mean 0 and standard deviation 1) where they are not there yet, and written as
`particles/NAME.mrcs` with `particles/NAME.star`, exactly as extraction writes them. float16 stacks stay
float16. A uid that the input carries (CryoSPARC's `uid`, our `icestreamUid`) is kept; otherwise it is derived
from the exposure and the row's place in it, so an excluded image shifts no other's uid.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Protocol

import mrcfile
import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from models.picking.extract import background_mask, normalise_background
from stream.ingest.particle_sets import (
    ParticleTable,
    iterate_images,
    read_particle_table_cached,
    split_by_micrograph,
)
from stream.records.errors import InputError
from stream.records.particles import derive_particle_uid
from stream.records.values import Exposure, Optics, PreprocessResult
from stream.sinks.relion_star import make_particle_optics, write_particles_star
from stream.store.files import replacing
from stream.store.layout import OutputLayout

BACKGROUND_FRACTION = 0.75
"""Diameter of the circle outside which the background is, as a part of the box (RELION's default)."""

MAX_BACKGROUND_MEAN = 0.3
BACKGROUND_SD_RANGE = (0.7, 1.4)
"""Medians over the stack within these count as normalised. RELION's own float16 stacks show a mean below 0.05
and deviations of 0.95 to 1.05; raw counts are far outside."""

_BATCH = 128


class ImportSettings(Protocol):
    """The preprocessing settings that matter for particles which are already cut out."""

    @property
    def particle_diameter_angstrom(self) -> float:
        """Longest diameter of the particle."""

    @property
    def optics(self) -> Optics:
        """Used where the file does not say (bare stacks)."""

    @property
    def pixel_size_angstrom(self) -> float:
        """Used where neither file nor stack says."""


Normalization = Literal["auto", "always", "never"]


def import_particles(
    exposure: Exposure,
    root: Path,
    settings: ImportSettings,
    layout: OutputLayout,
    *,
    normalization: Normalization = "auto",
) -> PreprocessResult:
    """Take over the particles of one micrograph from a STAR, .cs or .mrcs file.

    Parameters
    ----------
    root
        The folder to which paths in the particle file are relative (or the particle file itself); its folder
        and the parents of that are tried after it.
    normalization
        "auto" normalises the background where the stack's statistics say that nobody has.

    Raises
    ------
    InputError
        The file or a stack changed since it was found, or no image of the share is usable.
    """
    started = time.monotonic()
    table = _select(exposure, root, settings)
    kept, images = _read_valid(table)
    read_s = time.monotonic() - started
    if len(kept) == 0:
        value = f"{len(table)} images, all constant or with NaN"
        raise InputError(exposure.name, "a micrograph's share of particles has a usable image", value)
    images = _to_convention(images, table.take(kept), settings, normalization)
    _write_stack(layout.particles(exposure.name), images, float(table.pixel_size_angstrom[0]))
    _write_table(exposure, table, kept, layout)
    return PreprocessResult(
        exposure_id=exposure.exposure_id,
        micrograph=None,
        thumbnail=None,
        particles=layout.relative(layout.particles(exposure.name)),
        n_picks=len(table),
        n_particles=len(kept),
        n_excluded_particles=len(table) - len(kept),
        box_size_px=table.box_size_px,
        pixel_size_angstrom=float(table.pixel_size_angstrom[0]),
        motion=None,
        ctf=None,
        ice_ratio=None,
        seconds={"read": read_s, "import": time.monotonic() - started},
    )


def _select(exposure: Exposure, root: Path, settings: ImportSettings) -> ParticleTable:
    """The rows of this exposure; their optics must be one."""
    folder = root if root.is_dir() else root.parent
    table = read_particle_table_cached(
        exposure.file.path,
        root=folder,
        optics=settings.optics,
        pixel_size_angstrom=exposure.metadata.pixel_size_angstrom or settings.pixel_size_angstrom,
    )
    groups = {group.name: group.rows for group in split_by_micrograph(table)}
    name = exposure.micrograph_name
    if name is None or name not in groups:
        raise InputError(exposure.file.path, "the particle file still has this micrograph", name)
    share = table.take(groups[name])
    for column in ("voltage_kv", "cs_mm", "amplitude_contrast", "pixel_size_angstrom"):
        values = np.unique(getattr(share, column))
        if len(values) > 1:
            raise InputError(
                f"{exposure.file.path} ({name})", f"one micrograph has one {column}", values.tolist()
            )
    return share


def _read_valid(table: ParticleTable) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """Return the usable rows and their images (float16 or float32)."""
    kept: list[int] = []
    images: list[NDArray[Any]] = []
    for row, image in enumerate(iterate_images(table, np.arange(len(table)))):
        if np.isfinite(image).all() and image.min() != image.max():
            kept.append(row)
            images.append(image)
    if not images:
        return np.zeros(0, dtype=np.int64), np.zeros(
            (0, table.box_size_px, table.box_size_px), dtype=np.float32
        )
    return np.asarray(kept), np.stack(images)


def _to_convention(
    images: NDArray[Any], table: ParticleTable, settings: ImportSettings, normalization: Normalization
) -> NDArray[Any]:
    """Return the images with protein white and the background normalised; untouched where they are so already."""
    dtype = images.dtype
    is_dark = table.contrast_sign is not None and bool((table.contrast_sign < 0).any())
    if is_dark and table.contrast_sign is not None:
        images = images * table.contrast_sign[:, None, None].astype(dtype)
    if normalization == "never":
        return images
    radius_px = background_radius_px(table, settings.particle_diameter_angstrom)
    background = background_mask(table.box_size_px, radius_px)
    if normalization == "auto" and is_normalised(images, background.numpy()):
        return images
    batches = [
        normalise_background(torch.from_numpy(batch.astype(np.float32)), background).numpy()
        for batch in _batches(images)
    ]
    return np.concatenate(batches).astype(dtype)


def background_radius_px(table: ParticleTable, particle_diameter_angstrom: float) -> float:
    """Return the radius outside which the background is: the particle's, but at least RELION's default.

    It never reaches the middle of the box's edges, so that background is left.
    """
    box = table.box_size_px
    particle = 0.5 * particle_diameter_angstrom / float(table.pixel_size_angstrom[0])
    return min(max(0.5 * BACKGROUND_FRACTION * box, particle), 0.48 * box)


def is_normalised(images: NDArray[Any], background: NDArray[np.bool_]) -> bool:
    """Return whether the background of the typical image has mean 0 and standard deviation 1."""
    values = images[:, background].astype(np.float32)
    mean = float(np.median(np.abs(values.mean(axis=1))))
    deviation = float(np.median(values.std(axis=1)))
    return mean <= MAX_BACKGROUND_MEAN and BACKGROUND_SD_RANGE[0] <= deviation <= BACKGROUND_SD_RANGE[1]


def _batches(images: NDArray[Any]) -> Iterator[NDArray[Any]]:
    for start in range(0, len(images), _BATCH):
        yield images[start : start + _BATCH]


def _write_stack(path: Path, images: NDArray[Any], pixel_size_angstrom: float) -> None:
    with replacing(path) as temporary, mrcfile.new(temporary) as mrc:
        mrc.set_data(images)
        mrc.set_image_stack()
        mrc.voxel_size = pixel_size_angstrom


def _write_table(
    exposure: Exposure, table: ParticleTable, kept: NDArray[np.int64], layout: OutputLayout
) -> None:
    """Write one row per image of the stack, in its order."""
    share = table.take(kept)
    if share.uids is not None:
        uids = share.uids
    else:
        derived = [derive_particle_uid(exposure.exposure_id, int(row)) for row in kept]
        uids = np.asarray(derived, dtype=np.uint64)
    stack = layout.relative(layout.particles(exposure.name))
    merit = np.full(len(kept), np.nan) if share.figure_of_merit is None else share.figure_of_merit
    columns: dict[str, Any] = {
        "rlnImageName": [f"{index + 1:06d}@{stack}" for index in range(len(kept))],
        "rlnMicrographName": layout.relative(layout.micrograph(exposure.name)),
        "rlnCoordinateX": share.coordinate_x_px,
        "rlnCoordinateY": share.coordinate_y_px,
        "rlnDefocusU": share.defocus_u_angstrom,
        "rlnDefocusV": share.defocus_v_angstrom,
        "rlnDefocusAngle": share.astigmatism_angle_deg,
        "rlnPhaseShift": share.phase_shift_deg,
        "rlnAutopickFigureOfMerit": merit,
        "rlnOpticsGroup": 1,
        "icestreamUid": uids,
    }
    if share.euler_deg is not None:
        columns |= dict(zip(("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"), share.euler_deg.T, strict=True))
    if share.origin_xy_angstrom is not None:
        columns |= dict(zip(("rlnOriginXAngst", "rlnOriginYAngst"), share.origin_xy_angstrom.T, strict=True))
    optics = make_particle_optics(
        Optics(
            voltage_kv=float(share.voltage_kv[0]),
            cs_mm=float(share.cs_mm[0]),
            amplitude_contrast=float(share.amplitude_contrast[0]),
        ),
        image_pixel_size_angstrom=float(share.pixel_size_angstrom[0]),
        image_size_px=share.box_size_px,
        name=f"opticsGroup{int(share.optics_groups[0])}",
    )
    write_particles_star(layout.particles_table(exposure.name), pd.DataFrame(columns), optics)
