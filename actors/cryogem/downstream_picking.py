"""What generated micrographs are worth for picking: AUPRC of pickers trained on them, on micrographs of known truth (CryoGEM §5.2).

One network is trained from random weights on each arm's micrographs (`models.cryogem.picker`; the paper fine-tunes a pretrained
Topaz) and picks the same unseen micrographs. Beside the arms stand the blob picker, which needs no training, and a network trained
on the session's own micrographs with their true labels: what labels by hand would give at best. With Topaz's program, Topaz is
trained on the same micrographs too. The metric is that of `icestream bench picking`: particles near the border do not count.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from actors.cryogem.arms import Arm
from actors.cryogem.topaz_training import TopazTraining, train_topaz
from actors.cryogem.truth import KnownMicrograph
from actors.topaz import TopazSettings, run_topaz
from models.cryogem.bank import BankFacts
from models.cryogem.picker import (
    MIN_DISTANCE_DIAMETERS,
    LabelledMicrograph,
    PickerNetwork,
    PickerTraining,
    pick_with_network,
    train_picker,
)
from models.picking.blob import BlobSettings, pick_blobs
from models.picking.matching import (
    TOLERANCE_DIAMETERS,
    FloatArray,
    average_precision,
    is_away_from_border,
    judge_picks,
)
from stream.sinks.mrc_images import write_micrograph

_LOWEST_SCORE = 1.0
"""Blobs below this calibrated score are not ranked: there is one on every sixth particle-sized area of noise."""
_LOWEST_LOG_RATIO = -6.0
"""Topaz's own default for extraction."""
Picker = Callable[[torch.Tensor], tuple[FloatArray, FloatArray]]


@dataclass(frozen=True, slots=True, kw_only=True)
class PickingResult:
    """AUPRC on the unseen micrographs by arm; how many there are, and how many generated micrographs each arm had."""

    auprc: Mapping[str, float]
    n_micrographs: int
    n_particles: int
    n_training_micrographs: int


def evaluate_picking(
    arms: Sequence[Arm],
    unseen: Sequence[KnownMicrograph],
    labelled: Sequence[KnownMicrograph],
    facts: BankFacts,
    *,
    n_training: int,
    training: PickerTraining,
    topaz: Path | None = None,
    on_progress: Callable[[str], None] | None = None,
) -> PickingResult:
    """Train a picker per arm on `n_training` micrographs and measure all on `unseen`.

    `labelled` are the session's training micrographs with their truth; as many of them are used.
    """
    pixel, diameter = facts.pixel_size_angstrom, facts.diameter_angstrom
    auprc: dict[str, float] = {}

    def measure(name: str, picker: Picker) -> None:
        auprc[name] = _auprc(picker, unseen, diameter / pixel)
        if on_progress is not None:
            on_progress(f"picking, {name}: AUPRC {auprc[name]:.3f}")

    blobs = BlobSettings(
        # a blob's diameter is that of a ball of the same projected area, below the greatest extent
        min_diameter_angstrom=0.6 * diameter,
        max_diameter_angstrom=0.9 * diameter,
        min_distance_angstrom=MIN_DISTANCE_DIAMETERS * diameter,
        border_angstrom=0.5 * diameter,
        threshold=_LOWEST_SCORE,
    )

    def pick_blobs_in(image: torch.Tensor) -> tuple[FloatArray, FloatArray]:
        picks = pick_blobs(image, pixel, blobs)
        return picks.centres_yx_px, picks.scores

    measure("blobs", pick_blobs_in)
    for name, micrographs in _training_sets(arms, labelled, facts, n_training):
        network = train_picker(micrographs, training)

        def pick_in(image: torch.Tensor, network: PickerNetwork = network) -> tuple[FloatArray, FloatArray]:
            picks = pick_with_network(network, image, pixel, diameter)
            return picks.centres_yx_px, picks.scores

        measure(name, pick_in)
        if topaz is not None:
            with tempfile.TemporaryDirectory(prefix="icestream-topaz-") as folder:
                model = train_topaz(topaz, micrographs, Path(folder), TopazTraining(seed=training.seed))
                measure(f"topaz, {name}", _topaz_picker(topaz, model, pixel, diameter, Path(folder)))
    return PickingResult(
        auprc=auprc,
        n_micrographs=len(unseen),
        n_particles=sum(_count(m, diameter / pixel) for m in unseen),
        n_training_micrographs=n_training,
    )


def _training_sets(
    arms: Sequence[Arm], labelled: Sequence[KnownMicrograph], facts: BankFacts, n_training: int
) -> list[tuple[str, list[LabelledMicrograph]]]:
    def label(image: torch.Tensor, centres: np.ndarray) -> LabelledMicrograph:
        return LabelledMicrograph(
            image=image,
            centres_yx_px=centres,
            pixel_size_angstrom=facts.pixel_size_angstrom,
            diameter_angstrom=facts.diameter_angstrom,
        )

    sets = [
        (arm.name, [label(arm.image(i), arm.frames[i].specimen.centres_yx_px) for i in range(n_training)])
        for arm in arms
    ]
    if labelled:
        sets.append(
            ("session, true labels", [label(m.image, m.centres_yx_px) for m in labelled[:n_training]])
        )
    return sets


def _topaz_picker(executable: Path, model: Path, pixel: float, diameter: float, folder: Path) -> Picker:
    settings = TopazSettings(
        executable=executable, model=model, diameter_angstrom=diameter, threshold=_LOWEST_LOG_RATIO
    )

    def pick(image: torch.Tensor) -> tuple[FloatArray, FloatArray]:
        path = folder / "unseen.mrc"
        write_micrograph(path, image.numpy(), pixel)
        return run_topaz(path, pixel, settings)

    return pick


def _auprc(picker: Picker, unseen: Sequence[KnownMicrograph], diameter_px: float) -> float:
    parts = []
    for micrograph in unseen:
        centres, scores = picker(micrograph.image)
        parts.append(
            judge_picks(
                centres,
                scores,
                micrograph.centres_yx_px,
                _counted(micrograph, diameter_px),
                tolerance_px=TOLERANCE_DIAMETERS * diameter_px,
            )
        )
    return average_precision(
        np.concatenate([p.scores for p in parts]),
        np.concatenate([p.is_right for p in parts]),
        sum(p.n_true for p in parts),
    )


def _counted(micrograph: KnownMicrograph, diameter_px: float) -> np.ndarray:
    shape = (int(micrograph.image.shape[0]), int(micrograph.image.shape[1]))
    return is_away_from_border(micrograph.centres_yx_px, shape, 0.5 * diameter_px)


def _count(micrograph: KnownMicrograph, diameter_px: float) -> int:
    return int(_counted(micrograph, diameter_px).sum())
