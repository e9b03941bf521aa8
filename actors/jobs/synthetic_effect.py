"""What fine-tuning on generated particles did to a ranker: its figures before and after, on the same boxes.

The boxes are the blob picker's picks on a session of known truth that neither the training nor CryoGEM saw, labelled by that truth, and
the validation phantoms, which say what was forgotten. Better or not, the table is written beside the checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from models.cryo_ief.config import VitConfig
from models.cryo_ief.vit import CryoVit
from models.cryoranker.dataset import LabelledParticles, concatenate
from models.cryoranker.starting import starting_network
from models.cryoranker.synthetic import (
    KnownField,
    Places,
    blob_places,
    cut_labelled,
    freedom,
    label_places,
)
from models.cryoranker.train import CHECKPOINT_FILE, TrainConfig, evaluate, load_data
from stream.ingest.movie_reader import read_micrograph
from stream.records.errors import ConfigurationError, InputError
from stream.sinks.relion_star import read_particles_star
from stream.store.files import replacing
from stream.store.layout import OutputLayout
from stream.store.yaml_files import read_mapping

EFFECT_FILE = "synthetic_effect.json"
TRUTH_STAR = Path("truth/particles.star")
_COORDINATES = ["rlnCoordinateY", "rlnCoordinateX"]
SESSION_PICKS, PHANTOMS = "held-out session's picks", "validation phantoms"


def measure_effect(training: TrainConfig, held_out: Path, folder: Path) -> dict[str, Any]:
    """Judge the ranker that was fine-tuned in `folder` and the one it came from; write and return the table."""
    if training.synthetic is None or training.initial_checkpoint is None:
        raise ConfigurationError(
            "--held-out", "it is measured what synthetic particles did: give --synthetic"
        )
    rankers = {
        "before": starting_network(training.initial_checkpoint),
        "after": starting_network(str(folder / CHECKPOINT_FILE)),
    }
    config = rankers["after"].config
    _, phantoms = load_data(training, config)
    picks = read_picks(held_out, config, training.synthetic.box_per_diameter)
    table = compare({SESSION_PICKS: picks, PHANTOMS: phantoms}, rankers)
    document = {"held_out": str(held_out), "synthetic": asdict(training.synthetic), "sets": table}
    with replacing(folder / EFFECT_FILE) as temporary:
        temporary.write_text(json.dumps(document, indent=2) + "\n")
    return document


def compare(
    sets: Mapping[str, LabelledParticles], rankers: Mapping[str, CryoVit]
) -> dict[str, dict[str, Any]]:
    """Return the figures of every ranker on every set."""
    return {
        name: {which: asdict(evaluate(ranker, boxes)) for which, ranker in rankers.items()}
        for name, boxes in sets.items()
    }


def read_picks(session: Path, config: VitConfig, box_per_diameter: float) -> LabelledParticles:
    """Return the blob picker's picks on the micrographs of a session with `truth/particles.star`, labelled by it."""
    star, layout = session / TRUTH_STAR, OutputLayout(session)
    table = read_particles_star(star).particles
    missing = [name for name in ("rlnMicrographName", *_COORDINATES) if name not in table.columns]
    if missing:
        raise InputError(star, "the truth has a micrograph and coordinates for each particle", missing)
    particle = read_mapping(layout.session).get("particle", {})
    diameter_angstrom = particle.get("diameter_angstrom") if isinstance(particle, dict) else None
    if diameter_angstrom is None:
        raise InputError(layout.session, "a session's particle.diameter_angstrom is known", diameter_angstrom)
    parts = []
    for name, rows in table.groupby("rlnMicrographName", sort=True):
        path = session / str(name)
        diameter_px = float(diameter_angstrom) / _pixel_size(path)
        centres = rows[_COORDINATES].to_numpy(np.float64)
        field = KnownField(
            image=read_micrograph(path),
            centres_yx_px=centres,
            worth=freedom(centres, diameter_px),
            diameter_px=diameter_px,
        )
        where = blob_places(field.image, diameter_px)
        labels, kinds = label_places(where, field)
        places = Places(centres_yx_px=where, labels=labels, kinds=kinds)
        parts.append(cut_labelled(field, places, box_per_diameter, config))
    if not parts:
        raise InputError(star, "the truth names a micrograph", "none")
    return concatenate(parts)


def describe_effect(document: Mapping[str, Any]) -> list[str]:
    """Return the table as lines: AUC, average precision, and what is accepted at 0.4, before and after."""
    lines = [f"{'':28}{'':8}{'AUC':>8}{'AP':>8}{'good > 0.4':>12}{'bad > 0.4':>12}{'boxes':>8}"]
    for name, found in document["sets"].items():
        for which, q in found.items():
            lines.append(
                f"{name:28}{which:8}{q['auc']:8.3f}{q['ap']:8.3f}{q['good_accepted']:12.3f}"
                f"{q['bad_accepted']:12.3f}{q['n_good'] + q['n_bad']:8d}"
            )
    return lines


def _pixel_size(path: Path) -> float:
    import mrcfile

    with mrcfile.open(path, header_only=True, permissive=True) as file:
        pixel = float(file.voxel_size.x)
    if not pixel > 0.0:
        raise InputError(path, "a micrograph's header has its pixel size", pixel)
    return pixel
