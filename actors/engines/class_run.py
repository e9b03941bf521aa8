"""Class averages of a particle table: from files to a folder with averages, a montage and every particle's class."""

from __future__ import annotations

import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mrcfile
import numpy as np
import pandas as pd
import starfile
import torch
from numpy.typing import NDArray
from torch import Tensor

from actors.engines.base import EngineInput
from actors.engines.particle_images import LoadedParticles, load_particles, mask_fraction
from actors.engines.run_folder import RunFolder, optics_block, particle_columns
from models.fourier.rotations import euler_to_matrix
from models.fourier.volumes import resample_volume
from models.reconstruction.classification import (
    Classes,
    ClassificationProgress,
    ClassificationSettings,
    classify,
)
from models.reconstruction.figures import save_class_montage
from models.reconstruction.grids import healpix_directions
from models.reconstruction.projector import extract_slices, volume_to_cube
from models.reconstruction.volume_io import read_volume
from stream.records.errors import ConfigurationError, InputError
from stream.sinks.relion_star import SCORE_COLUMN, join_image_names, write_particles_star
from stream.store.files import replacing

_SEED_ORDER = 2
"""HEALPix order of the projections that seed classes: 192 directions, 96 up to a mirrored image."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassRun:
    """The files written and one row per class, most populated first."""

    folder: Path
    averages: Path
    montage: Path
    classes_star: Path
    particles_star: Path
    rows: tuple[dict[str, Any], ...]
    n_particles: int
    n_excluded: int
    seconds: float


def run_classification(
    source: EngineInput,
    out: Path,
    *,
    n_classes: int,
    seed: int = 0,
    max_box_px: int = 96,
    mask_diameter_angstrom: float | None = None,
    resolution_angstrom: float = 10.0,
    seed_map: Path | None = None,
    features: Path | None = None,
    on_progress: Callable[[ClassificationProgress], None] | None = None,
) -> ClassRun:
    """Classify the particles of a table and write classes.mrcs, classes.star, particles.star and montage.png."""
    started = time.monotonic()
    particles = load_particles(source.particles_star, source.root, max_box_px=max_box_px)
    data = particles.data
    if n_classes < 1 or 2 * n_classes > len(data):
        raise ConfigurationError(
            "--classes", f"there are two particles per class or more, of {len(data)}", n_classes
        )
    settings = ClassificationSettings(
        n_classes=n_classes,
        max_shell=min(data.box_size_px / 2 - 1, data.box_angstrom / resolution_angstrom),
        mask_diameter_fraction=mask_fraction(mask_diameter_angstrom, data.box_angstrom),
    )
    if seed_map is not None and features is not None:
        raise ConfigurationError(
            "--features", "classes start from a map or from features, not both", features
        )
    references = None if seed_map is None else _projections(seed_map, particles)
    scores, labels = _scores(source.particles_star, particles), None
    if features is not None:
        scores, labels = _from_features(features, particles, n_classes, seed)
    classes = classify(
        data,
        settings,
        torch.Generator().manual_seed(seed),
        labels=labels,
        references=references,
        on_progress=on_progress,
    )
    rows = _rows(classes, scores)
    folder = RunFolder(out)
    run = ClassRun(
        folder=out,
        averages=out / "classes.mrcs",
        montage=out / "montage.png",
        classes_star=out / "classes.star",
        particles_star=out / "particles.star",
        rows=tuple(rows),
        n_particles=len(data),
        n_excluded=particles.n_excluded,
        seconds=round(time.monotonic() - started, 2),
    )
    _write(run, classes, particles)
    folder.write_json(
        out / "classes.json", {"classes": rows, "n_particles": run.n_particles, "seconds": run.seconds}
    )
    return run


def _projections(path: Path, particles: LoadedParticles) -> Tensor:
    """Return a map's projections along half of the HEALPix directions on the images' grid."""
    data = particles.data
    try:
        volume, pixel_size = read_volume(path)
    except ValueError as error:
        raise InputError(path, "a seed map is a finite cubic MRC map", error) from error
    box = data.box_size_px
    cube = volume_to_cube(resample_volume(volume, pixel_size, data.pixel_size_angstrom, box), box // 2 - 1)
    directions = healpix_directions(_SEED_ORDER)
    directions = directions[directions[:, 2] > 0]
    tilt = torch.rad2deg(torch.acos(directions[:, 2]))
    rot = torch.rad2deg(torch.atan2(directions[:, 1], directions[:, 0]))
    rotations = euler_to_matrix(torch.stack((rot, tilt, torch.zeros_like(rot)), dim=-1))
    slices = extract_slices(cube, rotations, data.plane)
    return data.plane.images(slices)


def _scores(path: Path, particles: LoadedParticles) -> NDArray[np.float64] | None:
    """Return the particles' scores where the table has a column of them."""
    if path.suffix != ".star":
        return None
    for block in starfile.read(path, always_dict=True).values():
        if SCORE_COLUMN in getattr(block, "columns", ()):
            values: NDArray[np.float64] = block[SCORE_COLUMN].to_numpy(dtype=float)[particles.rows]
            return values
    return None


def _from_features(
    path: Path, particles: LoadedParticles, n_classes: int, seed: int
) -> tuple[NDArray[np.float64], Tensor]:
    """Return scores, and clusters of the features, from what `icestream score --out FILE.npz` wrote."""
    from models.cryoranker.clusters import cluster_features

    try:
        with np.load(path, allow_pickle=False) as stored:
            names, values = stored["image"].tolist(), np.asarray(stored["feature"], dtype=np.float32)
            scores = np.asarray(stored["score"], dtype=float)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise InputError(path, "features come from icestream score --out FILE.npz", error) from error
    table, rows = particles.table, particles.rows
    place = {name: row for row, name in enumerate(names)}
    wanted = [
        place.get(name, -1) for name in join_image_names(table.stack_indices[rows], table.stack_paths[rows])
    ]
    chosen = np.array(wanted, dtype=np.int64)
    if (chosen < 0).any():
        raise InputError(
            path, "every particle has features", f"{int((chosen < 0).sum())} of {len(chosen)} missing"
        )
    own = values[chosen]
    is_finite = np.isfinite(own).all(axis=1)
    if int(is_finite.sum()) < n_classes:
        raise InputError(path, f"features of {n_classes} particles or more are finite", int(is_finite.sum()))
    labels = np.arange(len(chosen)) % n_classes
    labels[is_finite] = cluster_features(lambda: iter((own[is_finite],)), n_classes, seed=seed).labels
    return scores[chosen], torch.from_numpy(labels.astype(np.int64))


def _rows(classes: Classes, scores: NDArray[np.float64] | None) -> list[dict[str, Any]]:
    rows = []
    for c, n_members in enumerate(classes.populations.tolist()):
        is_own = classes.assignment == c
        row: dict[str, Any] = {"class": c + 1, "particles": n_members, "resolution_angstrom": None}
        row |= {"mean_score": None, "mean_gain_nats": None, "mean_confidence": None}
        if n_members:
            own_scores = np.full(1, np.nan) if scores is None else scores[is_own.numpy()]
            known = own_scores[np.isfinite(own_scores)]
            row["resolution_angstrom"] = classes.resolutions_angstrom[c]
            row["mean_score"] = float(known.mean()) if len(known) else None
            row["mean_gain_nats"] = float(classes.gains[is_own].mean())
            row["mean_confidence"] = float(classes.confidence[is_own].mean())
        rows.append(row)
    return rows


def _caption(row: dict[str, Any]) -> str:
    parts = [str(row["particles"])]
    if row["resolution_angstrom"] is not None:
        parts.append(f"{row['resolution_angstrom']:.0f} Å")
    if row["mean_score"] is not None:
        parts.append(f"{row['mean_score']:.2f}")
    return " · ".join(parts)


def _write(run: ClassRun, classes: Classes, particles: LoadedParticles) -> None:
    pixel_size = particles.data.pixel_size_angstrom
    with replacing(run.averages) as temporary, mrcfile.new(temporary) as handle:
        handle.set_data(classes.images.numpy().astype(np.float32))
        handle.set_image_stack()
        handle.voxel_size = pixel_size
    occupied = [row for row in run.rows if row["particles"]]
    title = f"{run.n_particles} particles, {len(occupied)} classes with members: particles · FRC 0.5"
    title += " · mean score" if any(row["mean_score"] is not None for row in occupied) else ""
    with replacing(run.montage) as temporary:
        save_class_montage(
            classes.images[: len(occupied)], [_caption(row) for row in occupied], temporary, title=title
        )
    n = max(1, run.n_particles)
    table = pd.DataFrame(
        {
            "rlnReferenceImage": [f"{row['class']:06d}@{run.averages.name}" for row in run.rows],
            "rlnClassDistribution": [row["particles"] / n for row in run.rows],
            "rlnEstimatedResolution": [row["resolution_angstrom"] or 999.0 for row in run.rows],
            "icestreamMeanScore": [
                np.nan if row["mean_score"] is None else row["mean_score"] for row in run.rows
            ],
        }
    )
    with replacing(run.classes_star) as temporary:
        starfile.write({"model_classes": table}, temporary)
    origin = (classes.shifts_xy_px * pixel_size).numpy()
    columns = particle_columns(particles) | {
        "rlnClassNumber": classes.assignment.numpy() + 1,
        "rlnAnglePsi": classes.psi_deg.numpy(),
        "rlnOriginXAngst": origin[:, 0],
        "rlnOriginYAngst": origin[:, 1],
        "rlnMaxValueProbDistribution": classes.confidence.numpy(),
        "rlnLogLikeliContribution": classes.gains.numpy(),
    }
    write_particles_star(run.particles_star, pd.DataFrame(columns), optics_block(particles))
