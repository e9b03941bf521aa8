"""Boxes of structures that no ranker is trained on, each with the picker's own score and what its templates would say.

The boxes are kept as the extraction leaves them, so that a ranker is judged through its own preprocessing. Beside
them stand two yardsticks: the calibrated score of `models.picking.blob` at the same place of the same field, and the
log odds of somebody who knows the structure, the views, the optics and the noise (`templates.py`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from models.cryoranker.dataset import SIMULATION_VERSION
from models.cryoranker.simulate import LabelledBoxes, simulate_boxes
from models.cryoranker.specimen import ViewPool, render_pool, structure_named
from models.cryoranker.templates import template_log_odds
from models.picking.blob import BlobSettings, pick_blobs

_VERSION = 1
_PICK_RADIUS = 0.15
"""A maximum of the picker's response belongs to a box within this many diameters of the centre; 0.15 served the picker best."""
NO_PICK = 0.0
"""The picker's score of a box without a maximum above the noise: the least that its calibration tells apart."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOutSpec:
    """What a set is made of; the same values give the same boxes."""

    structures: tuple[str, ...]
    snr: float
    box_size_px: int
    seed: int = 77
    fields_per_structure: int = 8
    n_views: int = 96
    n_fragments: int = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOutBoxes:
    """Boxes `(b, n, n)` protein white, with labels, kinds, the structure's number and the two yardsticks."""

    images: NDArray[np.float16]
    labels: NDArray[np.float32]
    kinds: NDArray[np.int8]
    structure: NDArray[np.int16]
    picker_scores: NDArray[np.float32]
    template_scores: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.labels)


def held_out_sets(
    specs: tuple[HeldOutSpec, ...], folder: Path, *, on_progress: Callable[[int, int], None] | None = None
) -> list[HeldOutBoxes]:
    """Return the sets, from `folder` where they are there, else simulated and kept.

    Sets that differ in SNR and box size alone share the structures' views, whose making takes most of the time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"held-out-{_key(spec)}.npz" for spec in specs]
    missing = [index for index, path in enumerate(paths) if not path.exists()]
    for group in _groups([specs[index] for index in missing]):
        for spec, made in zip(group, _simulate(group, on_progress), strict=True):
            path = folder / f"held-out-{_key(spec)}.npz"
            temporary = path.with_suffix(".part.npz")
            np.savez(temporary, **{name: getattr(made, name) for name in HeldOutBoxes.__dataclass_fields__})
            temporary.replace(path)
    return [_read(path) for path in paths]


def picker_scores(boxes: LabelledBoxes) -> NDArray[np.float32]:
    """Return the blob picker's calibrated score at each box's centre, told the particle's diameter to -20 and +10 %."""
    conditions = boxes.conditions
    diameter = conditions.diameter_px
    picks = pick_blobs(
        -boxes.field,
        1.0,  # in units of the field's own pixel
        BlobSettings(
            min_diameter_angstrom=0.8 * diameter,
            max_diameter_angstrom=1.1 * diameter,
            min_distance_angstrom=_PICK_RADIUS * diameter,
            threshold=NO_PICK,
        ),
    )
    centres = boxes.corners_yx_px + conditions.box_size_px // 2
    distances = np.linalg.norm(centres[:, None, :] - picks.centres_yx_px[None, :, :], axis=-1)
    near = np.where(distances <= _PICK_RADIUS * diameter, picks.scores[None, :], NO_PICK)
    return np.asarray(near.max(axis=1, initial=NO_PICK), np.float32)


def _key(spec: HeldOutSpec) -> str:
    named = {**asdict(spec), "structures": [Path(name).name for name in spec.structures]}
    text = json.dumps([_VERSION, SIMULATION_VERSION, named], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _groups(specs: list[HeldOutSpec]) -> list[list[HeldOutSpec]]:
    groups: dict[tuple[tuple[str, ...], int, int, int], list[HeldOutSpec]] = {}
    for spec in specs:
        groups.setdefault((spec.structures, spec.seed, spec.n_views, spec.n_fragments), []).append(spec)
    return list(groups.values())


def _read(path: Path) -> HeldOutBoxes:
    with np.load(path, allow_pickle=False) as stored:
        return HeldOutBoxes(**{name: stored[name] for name in HeldOutBoxes.__dataclass_fields__})


def _simulate(group: list[HeldOutSpec], on_progress: Callable[[int, int], None] | None) -> list[HeldOutBoxes]:
    first = group[0]
    parts: list[list[HeldOutBoxes]] = [[] for _ in group]
    for index, name in enumerate(first.structures):
        generator = torch.Generator().manual_seed(first.seed * 100_003 + index)
        pool = render_pool(
            structure_named(name),
            n_views=first.n_views,
            n_fragments=first.n_fragments,
            generator=generator,
        )
        for spec, made in zip(group, parts, strict=True):
            rng = np.random.default_rng((spec.seed, index, spec.box_size_px, round(spec.snr * 1e6)))
            fields = simulate_boxes(
                [pool], rng, n_fields=spec.fields_per_structure, snr=spec.snr, box_size_px=spec.box_size_px
            )
            made += [_part(boxes, pool, index) for boxes in fields]
        if on_progress is not None:
            on_progress(index + 1, len(first.structures))
    return [_concatenate(made) for made in parts]


def _part(boxes: LabelledBoxes, pool: ViewPool, index: int) -> HeldOutBoxes:
    return HeldOutBoxes(
        images=boxes.images.numpy().astype(np.float16),
        labels=boxes.labels,
        kinds=boxes.kinds,
        structure=np.full(len(boxes.labels), index, np.int16),
        picker_scores=picker_scores(boxes),
        template_scores=template_log_odds(boxes, pool),
    )


def _concatenate(parts: list[HeldOutBoxes]) -> HeldOutBoxes:
    return HeldOutBoxes(
        **{
            name: np.concatenate([getattr(part, name) for part in parts])
            for name in HeldOutBoxes.__dataclass_fields__
        }
    )
