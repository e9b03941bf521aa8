"""Generated, labelled micrographs as training data for a ranker.

A folder of `icestream generate` knows where every particle is, which of them the border cuts and which overlap. Boxes are cut from its
micrographs as a live session cuts them: good ones at the true centres, graded and bad ones off centre and on overlapping
particles, bad ones on cut particles and on the background (half of them where the blob picker finds something). They are mixed
into the simulated phantoms' boxes, so that what the ranker knows of other specimens is not forgotten.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from models.cryo_ief.config import VitConfig
from models.cryo_ief.preprocess import to_grey_levels
from models.cryoranker.dataset import LabelledParticles, concatenate
from models.cryoranker.simulate import OFFSET_BAD, OFFSET_GOOD, Kind
from models.picking.blob import BlobSettings, pick_blobs
from models.picking.extract import BoxSettings, extract_particles

_BACKGROUND_DIAMETERS = 0.6
"""A box whose centre lies farther than this from every particle's shows background, as in `simulate.py`."""
_FARTHEST_OFFSET = 0.6
_BACKGROUND_PER_GOOD = 0.7
_TRIES = 40
_CROWDED, _FREE = 0.45, 0.8
"""Distance of the nearest particle in diameters at which a particle is worth nothing, and everything; as in `simulate.py`."""
_BLOB_DIAMETERS = (0.6, 0.9)
"""A blob's diameter is that of a ball of the same projected area, below the greatest extent."""
_LOWEST_BLOB_SCORE = 1.0
_NOT_A_PHANTOM = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class SyntheticParticles:
    """A folder of `icestream generate`, and what part of the training images comes from it.

    `box_per_diameter` is the side of the boxes: a live session's, one and a half diameters by default.
    """

    folder: str
    part: float = 0.5
    box_per_diameter: float = 1.5

    def __post_init__(self) -> None:
        if not 0.0 < self.part <= 1.0:
            msg = f"part: {self.part}, must lie in (0, 1]"
            raise ValueError(msg)
        if not 1.0 <= self.box_per_diameter <= 4.0:
            msg = f"box_per_diameter: {self.box_per_diameter}, must lie in [1, 4]"
            raise ValueError(msg)


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownField:
    """A micrograph (dark protein), its particles' centres (y, x), and the label of a box centred on each."""

    image: NDArray[np.float32]
    centres_yx_px: NDArray[np.float64]
    worth: NDArray[np.float64]
    diameter_px: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Where boxes are cut: centres (y, x), labels in [0, 1], kinds."""

    centres_yx_px: NDArray[np.float64]
    labels: NDArray[np.float32]
    kinds: NDArray[np.int8]


def read_synthetic(synthetic: SyntheticParticles, config: VitConfig, *, seed: int) -> LabelledParticles:
    """Return the labelled boxes of a folder of `icestream generate` as a network takes them; the seed fixes the places."""
    parts = []
    for index, field in enumerate(read_generated(Path(synthetic.folder))):
        rng = np.random.default_rng((seed, index))
        parts.append(cut_labelled(field, draw_places(field, rng), synthetic.box_per_diameter, config))
    return concatenate(parts)


def read_generated(folder: Path) -> Iterator[KnownField]:
    """Yield the micrographs of a folder of `icestream generate` with what its STAR says of them."""
    import mrcfile
    import starfile

    star, summary = folder / "particles.star", folder / "summary.json"
    missing = [path.name for path in (star, summary) if not path.is_file()]
    if missing:
        msg = f"{folder}: no {', '.join(missing)}, must be a folder of `icestream generate`"
        raise ValueError(msg)
    facts: dict[str, Any] = json.loads(summary.read_text())
    diameter_px = float(facts["diameter_angstrom"]) / float(facts["pixel_size_angstrom"])
    table = starfile.read(star, always_dict=True)["particles"]
    for name, rows in table.groupby("rlnMicrographName", sort=True):
        with mrcfile.open(folder / str(name), permissive=True) as file:
            image = np.array(file.data, np.float32)
        is_cut, overlaps = (rows[c].to_numpy(bool) for c in ("icestreamBorder", "icestreamOverlap"))
        centres = rows[["rlnCoordinateY", "rlnCoordinateX"]].to_numpy(np.float64)
        worth = np.where(overlaps, freedom(centres, diameter_px), 1.0) * ~is_cut
        yield KnownField(image=image, centres_yx_px=centres, worth=worth, diameter_px=diameter_px)


def freedom(centres_yx_px: NDArray[np.float64], diameter_px: float) -> NDArray[np.float64]:
    """Return 1 for particles whose nearest neighbour is far, 0 for those that it covers, in between by its distance."""
    apart = np.linalg.norm(centres_yx_px[:, None] - centres_yx_px[None], axis=-1)
    np.fill_diagonal(apart, np.inf)
    clearance = apart.min(axis=1, initial=np.inf) / diameter_px
    return np.asarray(np.clip((clearance - _CROWDED) / (_FREE - _CROWDED), 0.0, 1.0))


def draw_places(field: KnownField, rng: np.random.Generator) -> Places:
    """Draw where boxes are cut: at every particle, off centre for every second one, and on the background.

    Labels are those of the simulation: what the particle is worth within `OFFSET_GOOD` of the diameter from its centre, falling
    to 0 at `OFFSET_BAD`; 0 on the background.
    """
    diameter, centres = field.diameter_px, field.centres_yx_px
    near = centres + _disc(rng, len(centres)) * OFFSET_GOOD * diameter
    is_moved = rng.random(len(centres)) < 0.5
    turn = rng.uniform(0.0, 2.0 * math.pi, len(centres))
    far = rng.uniform(OFFSET_GOOD, _FARTHEST_OFFSET, len(centres)) * diameter
    moved = (centres + np.stack((np.sin(turn), np.cos(turn)), axis=1) * far[:, None])[is_moved]
    background = _background(
        field, rng, math.ceil(_BACKGROUND_PER_GOOD * max(1, int((field.worth > 0.0).sum())))
    )
    places = np.concatenate((near, moved, background))
    labels, kinds = label_places(places, field)
    return Places(centres_yx_px=places, labels=labels, kinds=kinds)


def label_places(
    places_yx_px: NDArray[np.float64], field: KnownField
) -> tuple[NDArray[np.float32], NDArray[np.int8]]:
    """Return label and kind of boxes at any places, by the nearest particle."""
    if not len(field.centres_yx_px) or not len(places_yx_px):
        n = len(places_yx_px)
        return np.zeros(n, np.float32), np.full(n, Kind.NOISE, np.int8)
    offsets = np.linalg.norm(places_yx_px[:, None] - field.centres_yx_px[None], axis=-1) / field.diameter_px
    nearest = offsets.argmin(axis=1)
    offset, worth = offsets[np.arange(len(offsets)), nearest], field.worth[nearest]
    labels = np.clip((OFFSET_BAD - offset) / (OFFSET_BAD - OFFSET_GOOD), 0.0, 1.0) * worth
    kinds = np.select(
        (offset > _BACKGROUND_DIAMETERS, offset > OFFSET_GOOD, worth < 1.0),
        (Kind.NOISE, Kind.OFF_CENTRE, Kind.CROWDED),
        Kind.PARTICLE,
    )
    return labels.astype(np.float32), kinds.astype(np.int8)


def cut_labelled(
    field: KnownField, places: Places, box_per_diameter: float, config: VitConfig
) -> LabelledParticles:
    """Cut boxes as a session does (white, background normalised; beyond the border mirrored) and make grey levels of them.

    The SNR is not known: it is put at infinity, so that a curriculum by SNR shows these boxes from the start.
    """
    box = max(16, 2 * round(0.5 * box_per_diameter * field.diameter_px))
    pad = min(box, min(field.image.shape) - 1)
    padded = np.pad(field.image, pad, mode="reflect")
    limits = np.asarray(padded.shape) - box // 2 - 1
    centres = np.clip(places.centres_yx_px + pad, box // 2 + 1, limits)
    radius = min(0.5 * field.diameter_px, 0.5 * box)
    settings = BoxSettings(box_size_px=box, extract_box_px=box, background_radius_px=radius)
    batches = extract_particles(torch.from_numpy(np.ascontiguousarray(padded)), centres, settings)
    grey = [
        to_grey_levels(batch.numpy(), config.input_size_px, config.resize_mode, is_exact=False)
        for batch in batches
    ]
    n = len(places.labels)
    empty = np.zeros((0, config.input_size_px, config.input_size_px), np.uint8)
    return LabelledParticles(
        grey=np.concatenate([empty, *grey]),
        labels=places.labels,
        kinds=places.kinds,
        snr=np.full(n, np.inf, np.float32),
        structure=np.full(n, _NOT_A_PHANTOM, np.int16),
    )


def mix_sets(
    simulated: LabelledParticles, synthetic: LabelledParticles, part: float, *, seed: int
) -> LabelledParticles:
    """Return a set of which `part` is synthetic: all simulated boxes, and synthetic ones as often as that takes.

    With a part of 1 the simulated boxes are left out.
    """
    if part >= 1.0:
        return synthetic
    wanted = max(1, round(len(simulated) * part / (1.0 - part)))
    order = np.random.default_rng((seed, 0x5E)).permutation(len(synthetic))
    return concatenate([simulated, take_rows(synthetic, np.resize(order, wanted))])


def take_rows(particles: LabelledParticles, rows: NDArray[np.intp]) -> LabelledParticles:
    """Return some rows of a set, in this order."""
    return LabelledParticles(
        **{name: getattr(particles, name)[rows] for name in LabelledParticles.__dataclass_fields__}
    )


def blob_places(image: NDArray[np.float32], diameter_px: float) -> NDArray[np.float64]:
    """Return where the blob picker finds something, however faint, in a micrograph with dark protein."""
    low, high = (ratio * diameter_px for ratio in _BLOB_DIAMETERS)
    settings = BlobSettings(
        min_diameter_angstrom=low,
        max_diameter_angstrom=high,
        min_distance_angstrom=0.7 * diameter_px,
        border_angstrom=0.5 * diameter_px,
        threshold=_LOWEST_BLOB_SCORE,
    )
    # in units of the micrograph's own pixel
    return np.asarray(pick_blobs(torch.tensor(image), 1.0, settings).centres_yx_px, dtype=np.float64)


def _background(field: KnownField, rng: np.random.Generator, n_wanted: int) -> NDArray[np.float64]:
    """Return places without a particle, half of them picked as blobs where there are so many."""
    blobs = blob_places(field.image, field.diameter_px)
    free = blobs[_is_background(blobs, field)]
    picked = free[rng.permutation(len(free))[: n_wanted // 2]]
    shape = np.asarray(field.image.shape, dtype=np.float64)
    anywhere = rng.uniform(0.0, 1.0, (_TRIES * n_wanted, 2)) * (shape - 1.0)
    drawn = anywhere[_is_background(anywhere, field)][: n_wanted - len(picked)]
    return np.concatenate((picked, drawn))


def _is_background(places_yx_px: NDArray[np.float64], field: KnownField) -> NDArray[np.bool_]:
    offsets = np.linalg.norm(places_yx_px[:, None] - field.centres_yx_px[None], axis=-1)
    return np.asarray((offsets > _BACKGROUND_DIAMETERS * field.diameter_px).all(axis=1))


def _disc(rng: np.random.Generator, n: int) -> NDArray[np.float64]:
    """Return points of the unit disc, uniform over its area."""
    turn, radius = rng.uniform(0.0, 2.0 * math.pi, n), np.sqrt(rng.random(n))
    return np.stack((radius * np.sin(turn), radius * np.cos(turn)), axis=1)
