"""Judging a model on particles that somebody labelled: a STAR or .cs file with a column of labels."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stream.records.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from stream.commands.evaluate_models import EncodingModel
    from stream.ingest.particle_table import ParticleTable

_ROWS_AT_ONCE = 256
_MIN_VIEWS = 48
"""Good particles with angles below which pose classes would hold a particle or two each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledSet:
    """A particle file's rows with labels in [0, 1] and, where a column names them, classes (structures)."""

    table: ParticleTable
    labels: NDArray[np.float64]
    classes: NDArray[np.object_] | None


def read_columns(path: Path, names: tuple[str, ...]) -> dict[str, NDArray[Any]]:
    """Return these columns of a STAR, CSV or .cs file, in the order of its rows.

    Of a STAR's blocks the one is taken that has them all.
    """
    import numpy as np
    import pandas as pd
    import starfile

    if not path.is_file():
        raise InputError(path, "a STAR, CSV or .cs file that exists")
    try:
        if path.suffix == ".cs":
            rows = np.load(path, allow_pickle=False)
            found = [{name: rows[name] for name in rows.dtype.names or ()}]
        elif path.suffix == ".csv":
            frame = pd.read_csv(path)
            found = [{str(name): frame[name].to_numpy() for name in frame.columns}]
        else:
            blocks = starfile.read(path, always_dict=True).values()
            found = [
                {str(name): block[name].to_numpy() for name in block.columns}
                for block in blocks
                if isinstance(block, pd.DataFrame)
            ]
    except (ValueError, OSError) as error:
        raise InputError(path, "a readable STAR, CSV or .cs file", error) from error
    for columns in found:
        if set(names) <= columns.keys():
            return {name: np.asarray(columns[name]) for name in names}
    raise InputError(path, f"has the columns {', '.join(names)}", [sorted(columns) for columns in found])


def read_numbers(path: Path, names: tuple[str, ...]) -> dict[str, NDArray[np.float64]]:
    """Return these columns as finite numbers."""
    import numpy as np

    numbers = {}
    for name, column in read_columns(path, names).items():
        try:
            numbers[name] = column.astype(np.float64)
        except ValueError as error:
            raise InputError(path, f"column {name} holds numbers", error) from error
        is_bad = ~np.isfinite(numbers[name])
        if is_bad.any():
            row = int(is_bad.argmax())
            raise InputError(path, f"column {name} is finite", f"{numbers[name][row]} in row {row + 1}")
    return numbers


def read_labelled_set(
    path: Path, *, label_column: str, class_column: str | None = None, root: Path | None = None
) -> LabelledSet:
    """Return the particles of a STAR or .cs file with their labels; labels lie in [0, 1]."""
    import numpy as np

    from stream.ingest.particle_sets import read_particle_table

    table = read_particle_table(path, root=root, require_ctf=False)
    labels = read_numbers(path, (label_column,))[label_column]
    is_bad = (labels < 0.0) | (labels > 1.0)
    if is_bad.any():
        row = int(is_bad.argmax())
        raise InputError(path, f"column {label_column} lies in [0, 1]", f"{labels[row]} in row {row + 1}")
    classes = None
    if class_column is not None:
        classes = read_columns(path, (class_column,))[class_column].astype(str).astype(object)
    if len(table) != len(labels):
        raise InputError(path, f"one label for each of {len(table)} particles", len(labels))
    return LabelledSet(table=table, labels=np.asarray(labels), classes=classes)


def judge_labelled_set(model: EncodingModel, given: LabelledSet, *, k: int = 1) -> dict[str, Any]:
    """Return the figures of a model's features (and scores, if it has a head) on a labelled set.

    `knn.structure` needs classes; `knn.pose` needs angles and is the paper's: twelve classes of view direction, the nearer half
    of each, of particles with a label above 0.7. The linear probe is fitted on every other class, or micrograph where
    there are no classes, and judged on the rest. Images without a signal are left out and counted.
    """
    import numpy as np

    from models.cryo_ief.neighbours import knn_accuracy, probe_quality, quality_classes
    from models.cryoranker.judge_features import majority_fraction
    from models.cryoranker.metrics import score_quality

    rows, grey = _read_grey(given.table, model)
    if len(rows) <= k:
        raise InputError(given.table.source, f"more than {k} images with a signal", len(rows))
    labels = given.labels[rows]
    encoded = model.encode(grey)
    source = given.table.source
    try:
        groups = _groups(given, rows)
        probe = probe_quality(encoded.features, labels, groups)
        judged = score_quality(probe.scores, labels[probe.rows], threshold=0.5)
        head = None if encoded.scores is None else score_quality(encoded.scores, labels)
    except ValueError as error:
        raise InputError(source, "good (above 0.7) and bad (up to 0.3) particles", error) from error
    ranked = judged if head is None else head
    quality = quality_classes(labels)
    guessing = {"quality": majority_fraction(quality)}
    structure = None
    if given.classes is not None:
        _, classes = np.unique(given.classes[rows].astype(str), return_inverse=True)
        structure = knn_accuracy(encoded.features, classes, k)
        guessing["structure"] = majority_fraction(classes)
    return {
        "model": model.name,
        "particles": len(given.table),
        "judged": len(rows),
        "excluded": len(given.table) - len(rows),
        "k": k,
        "knn": {
            "structure": structure,
            "pose": _knn_pose(given.table, rows, labels, encoded.features, k),
            "quality": knn_accuracy(encoded.features, quality, k),
        },
        "auc": ranked.auc,
        "ap": ranked.ap,
        "spearman": ranked.spearman,
        "pearson": ranked.pearson,
        "ranked_by": "probe" if head is None else "head",
        "probe": asdict(judged),
        "guessing": guessing,
    }


def score_labelled(path: Path, model: Path | None, *, root: Path | None = None) -> NDArray[np.float32]:
    """Return a ranker's scores of a file's particles, row by row; NaN where an image has no signal."""
    import tempfile

    import numpy as np

    from stream.commands.score import score_particles

    with tempfile.TemporaryDirectory(prefix="icestream-evaluate-") as folder:
        out = Path(folder) / "scores.npz"
        score_particles(path, out, model=model, root=root)
        with np.load(out, allow_pickle=False) as saved:
            return np.asarray(saved["score"], np.float32)


def _read_grey(table: ParticleTable, model: EncodingModel) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Return the rows whose images have a signal, and those images' grey levels at the model's input size."""
    import numpy as np

    from actors.stack_images import find_usable_images
    from models.cryo_ief.preprocess import to_grey_levels
    from stream.ingest.particle_table import iterate_images

    order = np.lexsort((table.stack_indices, table.stack_paths.astype(str)))
    rows, parts = [], []
    for first in range(0, len(order), _ROWS_AT_ONCE):
        part = order[first : first + _ROWS_AT_ONCE]
        images = np.stack([np.asarray(image, np.float32) for image in iterate_images(table, part)])
        if table.contrast_sign is not None:
            images *= table.contrast_sign[part, None, None]
        is_usable = find_usable_images(images)
        rows.append(part[is_usable])
        parts.append(
            to_grey_levels(images[is_usable], model.input_size_px, model.resize_mode, is_exact=False)
        )
    return np.concatenate(rows), np.concatenate(parts)


def _groups(given: LabelledSet, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return what a probe must not see both halves of: classes, else micrographs, else stacks or shares of one."""
    import numpy as np

    from stream.ingest.particle_table import split_by_micrograph

    if given.classes is not None and len(set(given.classes)) > 1:
        return np.unique(given.classes.astype(str), return_inverse=True)[1][rows]
    number = np.zeros(len(given.table), np.int64)
    groups = split_by_micrograph(given.table)
    for index, group in enumerate(groups):
        number[group.rows] = index
    return number[rows] if len(groups) > 1 else np.arange(len(rows)) % 2


def _knn_pose(
    table: ParticleTable,
    rows: NDArray[np.int64],
    labels: NDArray[np.float64],
    features: NDArray[np.float32],
    k: int,
) -> float | None:
    import numpy as np
    import torch

    from models.cryo_ief.neighbours import knn_accuracy
    from models.cryoranker.pose_sets import classify_views

    if table.euler_deg is None:
        return None
    angles = np.deg2rad(table.euler_deg[rows])
    chosen = np.flatnonzero((labels > 0.7) & np.isfinite(angles).all(axis=1))
    if len(chosen) < _MIN_VIEWS:
        return None
    rot, tilt = angles[chosen, 0], angles[chosen, 1]
    views = np.stack([np.sin(tilt) * np.cos(rot), np.sin(tilt) * np.sin(rot), np.cos(tilt)], axis=1)
    classes, is_kept = classify_views(torch.from_numpy(views))
    return knn_accuracy(features[chosen][is_kept], classes[is_kept], k)
