"""Division of a subset's particles into clusters of like views, by k-means++ on their cached features."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from stream.records.commands import ClusterParticles
from stream.records.errors import InputError
from stream.records.values import ClusteringResult
from stream.sinks.exporter import read_subset, write_labels
from stream.sinks.relion_star import UID_COLUMN
from stream.store.feature_cache import FeatureCache
from stream.store.layout import OutputLayout

log = logging.getLogger(__name__)

_ROWS_PER_BLOCK = 4_096


def cluster_particles(command: ClusterParticles, layout: OutputLayout) -> ClusteringResult:
    """Cluster the subset's particles that have a feature, and write their labels.

    Rows are taken in order of uid, so that the clusters do not depend on the order of arrival. Raises
    `InputError` when fewer particles than clusters have a feature, or when features are not finite.
    """
    from models.cryoranker.clusters import cluster_features

    request = command.request
    started = time.monotonic()
    star = read_subset(layout, command.members, request.model_hash, request.subset)
    uids = np.unique(star.particles[UID_COLUMN].to_numpy(np.uint64))
    cache = FeatureCache(layout.features)
    found = np.concatenate(
        [
            cache.features(request.model_hash, uids[low : low + _ROWS_PER_BLOCK])[0]
            for low in range(0, len(uids), _ROWS_PER_BLOCK)
        ]
    )
    known = uids[found]

    def blocks() -> Iterator[NDArray[np.float16]]:
        for low in range(0, len(known), _ROWS_PER_BLOCK):
            yield cache.features(request.model_hash, known[low : low + _ROWS_PER_BLOCK])[1]

    try:
        clusters = cluster_features(blocks, request.n_clusters)
    except ValueError as error:
        raise InputError(
            request.clustering_id, "the particles have features to be clustered by", error
        ) from error
    write_labels(layout.cluster_labels(request.clustering_id), known, clusters.labels)
    sizes = tuple(int(size) for size in clusters.sizes)
    log.info("particles_clustered clustering=%s sizes=%s", request.clustering_id, sizes)
    return ClusteringResult(
        clustering_id=request.clustering_id,
        sizes=sizes,
        n_without_features=len(uids) - len(known),
        folder=layout.relative(layout.clustering(request.clustering_id)),
        seconds={"cluster": round(time.monotonic() - started, 3)},
    )
