"""Benchmark of features at session size: append to the cache, then k-means++ over all, in bounded memory."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stream.commands.bench_features import anonymous_bytes
from stream.store.feature_cache import FeatureCache

_MODEL = "benchmark"
_BLOCK_ROWS = 8_192
_N_DIRECTIONS = 32


def run_cluster_benchmark(
    folder: Path,
    *,
    n_particles: int = 1_000_000,
    n_features: int = 768,
    n_per_append: int = 3_000,
    n_clusters: int = 8,
    seed: int = 0,
) -> dict[str, Any]:
    """Append unit features that scatter about 32 directions, cluster them; the baseline is reading them once.

    `peak_private_mib` is the most memory, beyond mapped files, that clustering added to the process.
    """
    from models.cryoranker.clusters import cluster_features

    directions = np.random.default_rng(seed).standard_normal((_N_DIRECTIONS, n_features))
    with FeatureCache(folder / "features") as cache:
        started = time.perf_counter()
        for number, first in enumerate(range(0, n_particles, n_per_append)):
            n = min(n_per_append, n_particles - first)
            rows = _draw_features(directions, n, seed + 1 + number)
            uids = np.arange(first + 1, first + n + 1, dtype=np.uint64)
            cache.append(_MODEL, uids, np.full(n, 0.5, np.float32), rows)
        append_s = time.perf_counter() - started
        before = peak = anonymous_bytes()

        def blocks() -> Iterator[NDArray[Any]]:
            nonlocal peak
            for _, features in cache.iterate_features(_MODEL, _BLOCK_ROWS):
                yield features
                peak = max(peak, anonymous_bytes())

        started = time.perf_counter()
        for features in blocks():
            np.isfinite(features).all()
        read_s = time.perf_counter() - started
        started, started_cpu = time.perf_counter(), time.process_time()
        found = cluster_features(blocks, n_clusters, seed=seed)
        cluster_s, cluster_cpu_s = time.perf_counter() - started, time.process_time() - started_cpu
    return {
        "name": "features",
        "value": n_particles / cluster_s,
        "unit": f"particles/s clustered into {n_clusters}",
        "baseline": "reading every feature once, same run",
        "baseline_value": n_particles / read_s,
        "ratio": read_s / cluster_s,
        "n_particles": n_particles,
        "n_features": n_features,
        "append_particles_per_s": n_particles / append_s,
        "cluster_s": cluster_s,
        "cluster_cpu_s": cluster_cpu_s,
        "peak_private_mib": (peak - before) / 2**20,
        "features_mib": n_particles * n_features * 2 / 2**20,
        "mean_squared_distance": found.mean_squared_distance,
        "smallest_cluster": int(found.sizes.min()),
        "largest_cluster": int(found.sizes.max()),
    }


def _draw_features(directions: NDArray[np.float64], n: int, seed: int) -> NDArray[np.float16]:
    rng = np.random.default_rng(seed)
    chosen = directions[rng.integers(0, len(directions), n)].astype(np.float32)
    rows = chosen + rng.standard_normal(chosen.shape, dtype=np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows.astype(np.float16)
