"""Networks of several sizes trained alike for a short while: AUC on held-out structures beside particles per second.

`python -m models.cryoranker.compare_sizes --models FOLDER --cpu-seconds 30` simulates one training set for all input sizes,
gives every network the same CPU time of training (its steps follow from its own speed), and scores the held-out sets through
the exported file. The figures compare networks with each other; a full training takes all of them further.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models.cryo_ief.config import Head, VitConfig
from models.cryo_ief.export import export_onnx
from models.cryo_ief.image_sets import grey_statistics
from models.cryoranker.dataset import (
    LabelledParticles,
    SimulatedSet,
    phantom_names,
    simulate_input_sizes,
)
from models.cryoranker.held_out import HeldOutBoxes, held_out_sets
from models.cryoranker.judge import held_out_specs
from models.cryoranker.metrics import score_quality
from models.cryoranker.serve import OnnxRanker
from models.cryoranker.train import TrainConfig, fit

log = logging.getLogger(__name__)

_N_TIMED = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A network's shape."""

    input_size_px: int
    patch_size_px: int
    width: int
    depth: int
    n_heads: int
    stem_channels: tuple[int, ...] = ()

    @property
    def config(self) -> VitConfig:
        """The network with CryoRanker v1's head."""
        return VitConfig(
            input_size_px=self.input_size_px,
            patch_size_px=self.patch_size_px,
            width=self.width,
            depth=self.depth,
            n_heads=self.n_heads,
            stem_channels=self.stem_channels,
            head=Head.SOFTMAX2,
        )


def _shape(
    size: int, patch: int, width: int, depth: int, heads: int, stem: tuple[int, ...] = ()
) -> Candidate:
    return Candidate(
        input_size_px=size,
        patch_size_px=patch,
        width=width,
        depth=depth,
        n_heads=heads,
        stem_channels=stem,
    )


CANDIDATES = (
    _shape(64, 8, 128, 4, 4),
    _shape(64, 16, 128, 4, 4),
    _shape(48, 8, 128, 4, 4),
    _shape(48, 8, 128, 4, 4, (32, 64, 128)),
    _shape(96, 12, 128, 4, 4),
    _shape(64, 8, 128, 6, 4),
)


def compare(
    candidates: tuple[Candidate, ...],
    held_out: dict[int, HeldOutBoxes],
    *,
    cpu_seconds: float,
    n_phantoms: int = 6,
    fields_per_structure: int = 60,
) -> list[dict[str, Any]]:
    """Train every candidate for the same CPU time and return its figures."""
    spec = SimulatedSet(
        structures=phantom_names(range(1000, 1000 + n_phantoms)),
        seed=1,
        fields_per_structure=fields_per_structure,
        input_size_px=64,
    )
    sizes = tuple(sorted({candidate.input_size_px for candidate in candidates}))
    data = simulate_input_sizes(
        spec, sizes, on_progress=lambda done, total: log.info("simulated %d of %d", done, total)
    )
    rows = []
    for candidate in candidates:
        rows.append(_row(candidate, data[candidate.input_size_px], held_out, cpu_seconds))
        log.info("%s", json.dumps(rows[-1]))
    return rows


def _row(
    candidate: Candidate, training: LabelledParticles, held_out: dict[int, HeldOutBoxes], cpu_seconds: float
) -> dict[str, Any]:
    mean, std = grey_statistics(training.grey)
    config = replace(candidate.config, mean=mean, std=std)
    watched = _first(training, 64)
    short = TrainConfig(
        n_steps=8,
        batch_size=64,
        warm_up_steps=60,
        first_least_snr=0.1,
        is_bfloat16=True,
        evaluate_every=1000,
    )
    # The difference leaves out what every fit does once; the smaller of two, because a shared core's time is uneven.
    seconds_per_step = min(
        _spent_s(config, replace(short, n_steps=24), training, watched)
        - _spent_s(config, short, training, watched)
        for _ in range(2)
    ) / (24 - short.n_steps)
    n_steps = max(60, round(cpu_seconds / seconds_per_step))
    started = time.process_time()
    fitted = fit(config, replace(short, n_steps=n_steps, evaluate_every=n_steps), training, watched)
    spent_s = time.process_time() - started
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ranker.onnx"
        export_onnx(fitted.model, path, layout="v1", source_sha256="0" * 64)
        ranker = OnnxRanker(path)
        quality = {
            box: score_quality(ranker.score(boxes.images.astype(np.float32))[0], boxes.labels)
            for box, boxes in held_out.items()
        }
        per_second = {box: _speed(ranker, boxes) for box, boxes in held_out.items()}
        size_bytes = path.stat().st_size
    return {
        "architecture": config.architecture,
        "tokens": (config.input_size_px // config.patch_size_px) ** 2,
        "parameters": sum(p.numel() for p in fitted.model.parameters()),
        "file_bytes": size_bytes,
        "steps": n_steps,
        "training_cpu_s": spent_s,
        "auc": {str(box): found.auc for box, found in quality.items()},
        "particles_per_cpu_s": {str(box): value for box, value in per_second.items()},
    }


def _spent_s(
    config: VitConfig, training: TrainConfig, data: LabelledParticles, watched: LabelledParticles
) -> float:
    started = time.process_time()
    fit(config, training, data, watched)
    return time.process_time() - started


def _speed(ranker: OnnxRanker, boxes: HeldOutBoxes) -> float:
    """Return particles per CPU second from boxes to scores, one thread, after a warm-up."""
    images = boxes.images[:_N_TIMED].astype(np.float32)
    ranker.score(images[:64])
    started = time.process_time()
    ranker.score(images)
    return len(images) / (time.process_time() - started)


def _first(particles: LabelledParticles, n: int) -> LabelledParticles:
    return LabelledParticles(
        **{name: getattr(particles, name)[:n] for name in LabelledParticles.__dataclass_fields__}
    )


def main() -> None:
    """Compare from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m models.cryoranker.compare_sizes", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--models", type=Path, required=True, help="folder of PDB/mmCIF files")
    parser.add_argument("--cpu-seconds", type=float, default=30.0, help="CPU time of each training")
    parser.add_argument("--input-size", type=int, help="train the candidates of this input size alone")
    parser.add_argument("--snr", type=float, default=0.05)
    parser.add_argument("--cache", type=Path, default=Path("~/.cache/icestream/ranker"))
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    specs = held_out_specs(given.models, [given.snr], [64, 128])
    found = held_out_sets(specs, given.cache.expanduser())
    held_out = {spec.box_size_px: boxes for spec, boxes in zip(specs, found, strict=True)}
    chosen = tuple(c for c in CANDIDATES if given.input_size in (None, c.input_size_px))
    if not chosen:
        parser.error(f"--input-size: {given.input_size}, no candidate has it")
    rows = compare(chosen, held_out, cpu_seconds=given.cpu_seconds)
    sys.stdout.write(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
