"""Benchmark of scoring: stacks on disk to scores in the cache, against inference alone in the same run."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def run_score_benchmark(
    folder: Path,
    *,
    n_particles: int = 4_000,
    box_size_px: int = 128,
    n_per_exposure: int = 300,
    batch_size: int = 64,
    n_callers: int = 2,
    n_threads: int = 1,
    n_repeats: int = 3,
    model: Path | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Score `n_particles` noise images in stacks of `n_per_exposure`; the figure is particles/s of the whole path.

    The baseline is `OnnxRanker.score` on the same images, which lie in memory, in batches of the same size: it
    includes the model's own preprocessing, but no reading, no checks, no batching across stacks and no cache.
    Whole path and baseline alternate `n_repeats` times and the medians count, because machines are shared. Others on the
    machine hardly change `particles_per_cpu_s`, which counts all threads' processor time, and `cpu_ratio`, the share of the whole
    path's processor time that inference takes.
    """
    from actors.ranker import BatchingRanker
    from stream.commands.score import load_scorer
    from stream.store.feature_cache import FeatureCache

    scorer = load_scorer(model, n_threads=n_threads, batch_size=batch_size)
    noise = np.random.default_rng(seed)
    images = noise.standard_normal((n_particles, box_size_px, box_size_px), dtype=np.float32)
    stacks = write_stacks(folder, images, n_per_exposure)
    scorer.score(images[:batch_size])
    whole_s, inference_s, whole_cpu_s, inference_cpu_s = [], [], 0.0, 0.0
    for repeat in range(n_repeats):
        started, started_cpu = time.perf_counter(), time.process_time()
        for start in range(0, n_particles, batch_size):
            scorer.score(images[start : start + batch_size])
        inference_s.append(time.perf_counter() - started)
        inference_cpu_s += time.process_time() - started_cpu
        started, started_cpu = time.perf_counter(), time.process_time()
        with FeatureCache(folder / f"features{repeat}") as cache, ThreadPoolExecutor(n_callers) as callers:
            ranker = BatchingRanker(scorer, cache, batch_size=batch_size)

            def score_stack(number: int, ranker: BatchingRanker = ranker) -> int:
                path, shape = stacks[number]
                indices = np.arange(shape[0])
                uids = (indices + 1 + number * n_per_exposure).astype(np.uint64)
                found = ranker.score_images(uids, np.full(shape[0], str(path), dtype=object), indices)
                return shape[0] - found.n_excluded

            n_scored = sum(callers.map(score_stack, range(len(stacks))))
            ranker.close()
        whole_s.append(time.perf_counter() - started)
        whole_cpu_s += time.process_time() - started_cpu
    value, baseline = (n_particles / float(np.median(seconds)) for seconds in (whole_s, inference_s))
    return {
        "name": "score",
        "value": value,
        "unit": "particles/s",
        "baseline": "inference alone, same images in memory, same run",
        "baseline_value": baseline,
        "ratio": value / baseline,
        "cpu_ratio": inference_cpu_s / whole_cpu_s,
        "particles_per_cpu_s": n_particles * n_repeats / whole_cpu_s,
        "n_particles": n_particles,
        "n_scored": n_scored,
        "box_size_px": box_size_px,
        "input_size_px": scorer.info.input_size_px,
        "batch_size": batch_size,
        "n_callers": n_callers,
        "n_threads": n_threads,
        "model": scorer.model_hash,
        "provider": scorer.provider,
        "whole_s": whole_s,
        "inference_s": inference_s,
    }


def write_stacks(
    folder: Path, images: NDArray[np.float32], n_per_exposure: int
) -> list[tuple[Path, tuple[int, int, int]]]:
    """Write images `(b, n, n)` as stacks and return each one's path and shape."""
    import mrcfile

    stacks = []
    for number, start in enumerate(range(0, len(images), n_per_exposure)):
        part = images[start : start + n_per_exposure]
        path = folder / f"stack{number:04d}.mrcs"
        with mrcfile.new(path, overwrite=True) as stack:
            stack.set_data(part)
            stack.set_image_stack()
        stacks.append((path, (len(part), part.shape[1], part.shape[2])))
    return stacks
