"""Held-out figures of a ranker for its model card, beside what others make of the same boxes.

`python -m models.cryoranker.judge MODEL.onnx --models FOLDER [--particles STACKS]` simulates structures that no training
set contains (atomic models, and phantoms of other seeds) at a fixed SNR, scores the boxes, and prints one JSON
document. Beside the ranker stand
- a logistic regression on the radial power spectrum and grey-level moments, trained on the training phantoms' own
  simulation: what statistics without shape achieve;
- the calibrated score of the blob picker (`models.picking.blob`) at the same place of the same field;
- the log odds of somebody who knows structure, views, optics and noise (`templates.py`), on the kinds that these odds
  know: what the box's signal allows.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.cryo_ief.preprocess import to_grey_levels
from models.cryoranker.dataset import LabelledParticles, SimulatedSet, phantom_names, simulate_set_cached
from models.cryoranker.held_out import HeldOutBoxes, HeldOutSpec, held_out_sets
from models.cryoranker.metrics import ScoreQuality, score_quality
from models.cryoranker.serve import DEFAULT_MODEL, OnnxRanker
from models.cryoranker.simulate import Kind
from models.cryoranker.templates import MODELLED_KINDS

HELD_OUT_SEEDS = range(500_000, 500_006)
"""Phantoms for judging; training configurations start at 1000 and never come here."""
_BASELINE_SEEDS = range(1000, 1016)
_MOVED_PX = (20, 10)
"""How far real particles are moved off their centres: 22 px, beyond a small particle's edge in boxes of 64 px."""
_STRUCTURE_SUFFIXES = (".pdb", ".cif", ".pdb.gz", ".cif.gz")


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitedComparison:
    """The ranker and the template-aware odds on the kinds of box that the odds know."""

    kinds: tuple[str, ...]
    ranker: ScoreQuality
    templates: ScoreQuality


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """Figures of one ranker at one SNR on structures it was not trained on."""

    snr: float
    box_size_px: int
    ranker: ScoreQuality
    baseline: ScoreQuality
    picker: ScoreQuality
    limit: LimitedComparison
    auc_by_structure: dict[str, float]
    accepted_by_kind: dict[str, float]
    particles_per_cpu_second: float
    """From float32 boxes to scores and features, on as many threads as the ranker has."""


def held_out_specs(models: Path, snrs: Sequence[float], boxes_px: Sequence[int]) -> tuple[HeldOutSpec, ...]:
    """Return the sets that a ranker is judged on: a folder's atomic models and phantoms never trained on."""
    files = sorted(str(path) for path in models.iterdir() if path.name.lower().endswith(_STRUCTURE_SUFFIXES))
    structures = (*files, *phantom_names(HELD_OUT_SEEDS))
    return tuple(
        HeldOutSpec(structures=structures, snr=snr, box_size_px=box) for snr, box in product(snrs, boxes_px)
    )


def judge(
    ranker: OnnxRanker, spec: HeldOutSpec, held_out: HeldOutBoxes, baseline_data: LabelledParticles
) -> Judgement:
    """Return the figures of a ranker and of what it is compared with on one set."""
    images = held_out.images.astype(np.float32)
    started = time.process_time()
    scores, labels = ranker.score(images)[0], held_out.labels
    spent_s = time.process_time() - started
    grey = to_grey_levels(images, ranker.info.input_size_px, ranker.info.resize_mode, is_exact=False)
    is_modelled = np.isin(held_out.kinds, MODELLED_KINDS)
    return Judgement(
        snr=spec.snr,
        box_size_px=spec.box_size_px,
        ranker=score_quality(scores, labels),
        baseline=score_quality(baseline_scores(baseline_data, grey), labels),
        picker=score_quality(held_out.picker_scores, labels),
        limit=LimitedComparison(
            kinds=tuple(kind.name.lower() for kind in MODELLED_KINDS),
            ranker=score_quality(scores[is_modelled], labels[is_modelled]),
            templates=score_quality(
                held_out.template_scores[is_modelled], labels[is_modelled], threshold=0.0
            ),
        ),
        auc_by_structure={
            Path(name).name: score_quality(scores[is_it], labels[is_it]).auc
            for index, name in enumerate(spec.structures)
            for is_it in [held_out.structure == index]
        },
        accepted_by_kind={
            kind.name.lower(): float((scores[is_it] > 0.4).mean())
            for kind in Kind
            for is_it in [_is_clear(held_out, kind)]
            if is_it.any()
        },
        particles_per_cpu_second=len(images) / max(spent_s, 1e-9),
    )


def baseline_set(ranker: OnnxRanker, cache: Path, *, n_processes: int = 1) -> LabelledParticles:
    """Return the labelled boxes that the logistic regression is fitted on, at the ranker's input size."""
    spec = SimulatedSet(
        structures=phantom_names(_BASELINE_SEEDS),
        seed=78,
        fields_per_structure=14,
        input_size_px=ranker.info.input_size_px,
        resize_mode=ranker.info.resize_mode,
    )
    return simulate_set_cached(spec, cache, n_processes=n_processes)


def _is_clear(particles: HeldOutBoxes, kind: Kind) -> NDArray[np.bool_]:
    is_good = kind is Kind.PARTICLE
    clear = particles.labels > 0.7 if is_good else particles.labels <= 0.3
    return np.asarray((particles.kinds == kind) & clear)


def baseline_scores(training: LabelledParticles, grey: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Return scores of a logistic regression on spectrum and moments, trained on `training`'s clear labels."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    is_clear = (training.labels > 0.7) | (training.labels <= 0.3)
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    classifier.fit(spectrum_features(training.grey[is_clear]), training.labels[is_clear] > 0.7)
    return np.asarray(classifier.predict_proba(spectrum_features(grey))[:, 1])


def spectrum_features(grey: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Return log radial power, radial mean brightness, skewness and kurtosis of each image."""
    n = grey.shape[1]
    axis = np.fft.fftfreq(n) * n
    shell = np.hypot(axis[:, None], axis[None, :]).round().astype(int).ravel()
    place = np.arange(n) - n // 2
    ring = (np.hypot(place[:, None], place[None, :]) / 4).astype(int).ravel()
    rows = []
    for image in grey.astype(np.float64):
        centred = (image - image.mean()) / max(float(image.std()), 1e-6)
        power = np.abs(np.fft.fft2(centred)).ravel() ** 2
        radial = np.bincount(shell, power)[1 : n // 2] / np.bincount(shell)[1 : n // 2]
        brightness = np.bincount(ring, centred.ravel())[: n // 8] / np.bincount(ring)[: n // 8]
        moments = [(centred**3).mean(), (centred**4).mean(), image.mean(), image.std()]
        rows.append(np.concatenate((np.log(radial + 1e-6), brightness, moments)))
    return np.stack(rows)


def score_star_stacks(
    ranker: OnnxRanker, folder: Path, *, moved_px: tuple[int, int] = (0, 0)
) -> NDArray[np.float32]:
    """Return the scores of all images of all `.mrcs` stacks of a folder, stacks in name order; `moved_px` moves each (y, x)."""
    import mrcfile

    parts = []
    for path in sorted(folder.rglob("*.mrcs")):
        with mrcfile.open(path, permissive=True) as stack:
            images = np.atleast_3d(np.asarray(stack.data, np.float32))
            parts.append(ranker.score(np.roll(images, moved_px, axis=(1, 2)))[0])
    if not parts:
        msg = f"{folder}: no .mrcs stacks"
        raise ValueError(msg)
    return np.concatenate(parts)


def summary(scores: NDArray[np.float32]) -> dict[str, float]:
    """Return quantiles of scores and the fraction above 0.4."""
    q05, q25, q50, q75, q95 = (float(q) for q in np.nanquantile(scores, (0.05, 0.25, 0.5, 0.75, 0.95)))
    return {
        "n": float(len(scores)),
        "q05": q05,
        "q25": q25,
        "median": q50,
        "q75": q75,
        "q95": q95,
        "accepted": float((scores > 0.4).mean()),
    }


def main() -> None:
    """Judge a model from the command line."""
    parser = argparse.ArgumentParser(prog="python -m models.cryoranker.judge", description=__doc__)
    parser.add_argument("model", type=Path, nargs="?", default=DEFAULT_MODEL)
    parser.add_argument("--models", type=Path, required=True, help="folder of PDB/mmCIF files")
    parser.add_argument("--particles", type=Path, help="folder of real .mrcs stacks")
    parser.add_argument("--snr", type=float, nargs="+", default=[0.05])
    parser.add_argument("--box", type=int, nargs="+", default=[64, 128, 256], help="box sizes in px")
    parser.add_argument("--cache", type=Path, default=Path("~/.cache/icestream/ranker"))
    parser.add_argument("--processes", type=int, default=1)
    given = parser.parse_args()
    ranker, cache = OnnxRanker(given.model), given.cache.expanduser()
    specs = held_out_specs(given.models, given.snr, given.box)
    baseline_data = baseline_set(ranker, cache, n_processes=given.processes)
    document: dict[str, Any] = {"model": str(given.model), "model_hash": ranker.model_hash}
    document["judgements"] = [
        asdict(judge(ranker, spec, boxes, baseline_data))
        for spec, boxes in zip(specs, held_out_sets(specs, cache), strict=True)
    ]
    if given.particles is not None:
        document["real"] = summary(score_star_stacks(ranker, given.particles))
        moved = score_star_stacks(ranker, given.particles, moved_px=_MOVED_PX)
        document["real_moved"] = summary(moved)
    sys.stdout.write(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
