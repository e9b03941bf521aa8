"""A ranker on the picks of a simulated session: what a live run accepts of the true particles and of the rest.

`python -m models.cryoranker.judge_session SESSION TRUTH --diameter-angstrom D` reads the extracted particles of a session
(`export/all_particles.star`) and the simulator's truth (`particles.star`), scores every box through the ranker, and
prints one JSON document. A pick is good within `OFFSET_GOOD` of the diameter from a true centre (label 1, falling to 0 at
`OFFSET_BAD`, as in training); true particles within the radius of a crystal or an aggregate count as neither. The picker's
own score of the same picks stands beside the ranker's. Micrographs without a true particle are left out.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.cryoranker.metrics import score_quality
from models.cryoranker.serve import DEFAULT_MODEL, OnnxRanker
from models.cryoranker.simulate import OFFSET_BAD, OFFSET_GOOD

_COORDINATES = ["rlnCoordinateY", "rlnCoordinateX"]
_SPOTS = ("ice_crystal", "aggregate")
_NEITHER = 0.5


def judge_session(
    ranker: OnnxRanker, session: Path, truth: Path, *, diameter_angstrom: float
) -> dict[str, Any]:
    """Return the figures of the ranker and of the picker on a session's particles."""
    import mrcfile
    import starfile

    picks = starfile.read(session / "export" / "all_particles.star", always_dict=True)["particles"]
    known = starfile.read(truth / "particles.star", always_dict=True)
    pixel_angstrom = float(known["optics"]["rlnMicrographPixelSize"].iloc[0])
    labels = np.zeros(len(picks), np.float32)
    scores = np.full(len(picks), np.nan, np.float32)
    true_centres = {
        Path(str(name)).stem: rows[_COORDINATES].to_numpy(float)
        for name, rows in known["particles"].groupby("rlnMicrographName")
    }
    junk = starfile.read(truth / "junk.star", always_dict=True)["junk"]
    spots = {
        Path(str(name)).stem: rows[[*_COORDINATES, "icestreamJunkRadius"]].to_numpy(float)
        for name, rows in junk[junk["icestreamJunkLabel"].isin(_SPOTS)].groupby("rlnMicrographName")
    }
    places = picks["rlnImageName"].str.partition("@")
    for stack, rows in picks.groupby(places[2].to_numpy()):
        where = picks.index.get_indexer(rows.index)
        micrograph = Path(str(rows["rlnMicrographName"].iloc[0])).stem
        if micrograph not in true_centres:
            continue
        labels[where] = _labels(
            rows[_COORDINATES].to_numpy(float),
            true_centres.get(micrograph, np.empty((0, 2))),
            spots.get(micrograph, np.empty((0, 3))),
            diameter_angstrom / pixel_angstrom,
        )
        with mrcfile.open(session / str(stack), permissive=True) as file:
            images = np.asarray(file.data, np.float32)[places[0].loc[rows.index].astype(int).to_numpy() - 1]
        scores[where] = ranker.score(images)[0]
    is_scored = np.isfinite(scores)
    merits = picks["rlnAutopickFigureOfMerit"].to_numpy(float)
    return {
        "model_hash": ranker.model_hash,
        "particles": int(is_scored.sum()),
        "ranker": asdict(score_quality(scores[is_scored], labels[is_scored])),
        "picker": asdict(score_quality(merits[is_scored], labels[is_scored])),
    }


def _labels(
    picks_yx: NDArray[np.float64],
    true_yx: NDArray[np.float64],
    spots: NDArray[np.float64],
    diameter_px: float,
) -> NDArray[np.float64]:
    """Return the picks' labels; `spots` holds y, x and radius of what spoils particles."""
    offsets = np.linalg.norm(picks_yx[:, None] - true_yx[None], axis=-1) / diameter_px
    nearest = offsets.min(axis=1, initial=np.inf)
    labels = np.clip((OFFSET_BAD - nearest) / (OFFSET_BAD - OFFSET_GOOD), 0.0, 1.0)
    is_spoiled = (np.linalg.norm(picks_yx[:, None] - spots[None, :, :2], axis=-1) < spots[:, 2]).any(axis=1)
    return np.where(is_spoiled, np.minimum(labels, _NEITHER), labels)


def main() -> None:
    """Judge from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m models.cryoranker.judge_session", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("session", type=Path, help="output folder of a live run")
    parser.add_argument("truth", type=Path, help="truth folder of icestream simulate or demo")
    parser.add_argument("--diameter-angstrom", type=float, required=True)
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL)
    given = parser.parse_args()
    found = judge_session(
        OnnxRanker(given.model), given.session, given.truth, diameter_angstrom=given.diameter_angstrom
    )
    sys.stdout.write(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
