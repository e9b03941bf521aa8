"""k-means of features that do not fit into memory: k-means++ on a sample, mini-batches over the rest.

The Cryo-IEF paper splits high-scoring particles into clusters of like views by k-means++ on their features
(Methods, "Implementation of CryoWizard"). Features are unit vectors, so the distance is that of directions.
scikit-learn's MiniBatchKMeans does the work; at any time one block of features is in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Blocks = Callable[[], Iterator[NDArray[Any]]]

_SAMPLE_ROWS = 20_000
_BATCH_ROWS = 8_192


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureClusters:
    """Centres `(cluster, d)`, each row's cluster in the order of the blocks, and the mean squared distance."""

    centres: NDArray[np.float32]
    labels: NDArray[np.int16]
    mean_squared_distance: float

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Rows per cluster."""
        return np.bincount(self.labels, minlength=len(self.centres)).astype(np.int64)


def cluster_features(
    blocks: Blocks, n_clusters: int, *, n_epochs: int = 2, n_starts: int = 3, seed: int = 0
) -> FeatureClusters:
    """Cluster the rows of `blocks()`, which is called once per pass and must give the same rows each time.

    Parameters
    ----------
    blocks
        Returns an iterator of features `(b, d)`, any float type; a block should hold a few thousand rows.
    n_clusters
        At least 1 and at most the number of rows.
    n_epochs
        Passes of mini-batches; one more pass assigns the labels.
    n_starts
        k-means++ seedings of the sample; the one with the least inertia is used.

    Raises
    ------
    ValueError
        Fewer rows than clusters, or features that are not finite.
    """
    from sklearn.cluster import KMeans, MiniBatchKMeans

    n_rows = 0
    for block in blocks():
        if not np.isfinite(block).all():
            msg = f"features: rows {n_rows} to {n_rows + len(block) - 1} are not all finite, clusters need numbers"
            raise ValueError(msg)
        n_rows += len(block)
    if not 1 <= n_clusters <= n_rows:
        msg = f"n_clusters: {n_clusters}, must lie between 1 and the number of features ({n_rows})"
        raise ValueError(msg)
    sample = _draw_sample(blocks, n_rows, seed)
    start = KMeans(n_clusters, init="k-means++", n_init=n_starts, random_state=seed).fit(sample)
    if n_rows == len(sample):
        centres = np.asarray(start.cluster_centers_, np.float32)
    else:
        mini = MiniBatchKMeans(
            n_clusters, init=start.cluster_centers_, n_init=1, batch_size=_BATCH_ROWS, random_state=seed
        )
        for _ in range(n_epochs):
            for block in blocks():
                mini.partial_fit(np.asarray(block, np.float32))
        centres = np.asarray(mini.cluster_centers_, np.float32)
    labels = np.empty(n_rows, np.int16)
    squares, done = 0.0, 0
    for block in blocks():
        rows = np.asarray(block, np.float32)
        distances = _squared_distances(rows, centres)
        labels[done : done + len(rows)] = distances.argmin(axis=1)
        squares += float(distances.min(axis=1).sum(dtype=np.float64))
        done += len(rows)
    return FeatureClusters(centres=centres, labels=labels, mean_squared_distance=squares / n_rows)


def _draw_sample(blocks: Blocks, n_rows: int, seed: int) -> NDArray[np.float32]:
    """Return at most 20,000 rows drawn without replacement, in their order."""
    if n_rows <= _SAMPLE_ROWS:
        return np.concatenate([np.asarray(block, np.float32) for block in blocks()])
    chosen = np.sort(np.random.default_rng(seed).choice(n_rows, _SAMPLE_ROWS, replace=False))
    parts, done = [], 0
    for block in blocks():
        inside = chosen[(chosen >= done) & (chosen < done + len(block))] - done
        parts.append(np.asarray(block[inside], np.float32))
        done += len(block)
    return np.concatenate(parts)


def _squared_distances(rows: NDArray[np.float32], centres: NDArray[np.float32]) -> NDArray[np.float32]:
    squares = (rows**2).sum(axis=1)[:, None] + (centres**2).sum(axis=1)[None, :]
    return np.maximum(squares - 2.0 * rows @ centres.T, 0.0)
