"""Division of a subset's particles into clusters of like views: by their cached features, or by class averages.

The paper clusters features. Those of a small ranker hardly tell views apart (`ops/benchmarks/views.md`). Class averages that
begin with the features' clusters do, because images are turned in the plane and shifted onto each other; without the
features as a start a rare view is found in one run of three.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from stream.records.commands import ClusterParticles
from stream.records.errors import InputError
from stream.records.values import ClusteringRequest, ClusteringResult, ClusterSource
from stream.sinks.exporter import read_subset, write_labels
from stream.sinks.relion_star import UID_COLUMN, ParticleStar, write_particles_star
from stream.store.feature_cache import FeatureCache
from stream.store.layout import OutputLayout

log = logging.getLogger(__name__)

_ROWS_PER_BLOCK = 4_096

_CLASS_ITERATIONS = 14

_CLASS_SHELLS = 10.0
"""Cycles per box that classes are told apart by: views differ in their outlines, and finer shells are noise."""

_CLASS_BOX_PX = 48


def cluster_particles(command: ClusterParticles, layout: OutputLayout) -> ClusteringResult:
    """Divide the subset's particles as the request says, and write their labels.

    Raises `InputError` when fewer particles than clusters have a feature (or an image that can be used), or when
    features are not finite.
    """
    request = command.request
    started = time.monotonic()
    star = read_subset(layout, command.members, request.model_hash, request.subset)
    uids = np.unique(star.particles[UID_COLUMN].to_numpy(np.uint64))
    try:
        if request.source is ClusterSource.CLASSES:
            known, labels = _by_classes(request, layout, star, uids)
        else:
            known, labels = _by_features(request, layout, uids)
    except ValueError as error:
        raise InputError(request.clustering_id, "the particles can be told apart by view", error) from error
    write_labels(layout.cluster_labels(request.clustering_id), known, labels)
    sizes = tuple(int(size) for size in np.bincount(labels, minlength=request.n_clusters))
    log.info("particles_clustered clustering=%s sizes=%s", request.clustering_id, sizes)
    return ClusteringResult(
        clustering_id=request.clustering_id,
        sizes=sizes,
        n_without_features=len(uids) - len(known),
        folder=layout.relative(layout.clustering(request.clustering_id)),
        seconds={"cluster": round(time.monotonic() - started, 3)},
    )


def _by_features(
    request: ClusteringRequest, layout: OutputLayout, uids: NDArray[np.uint64]
) -> tuple[NDArray[np.uint64], NDArray[np.int16]]:
    """Cluster by k-means++; rows are taken in order of uid, so that the order of arrival does not matter."""
    from models.cryoranker.clusters import cluster_features

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

    return known, cluster_features(blocks, request.n_clusters).labels


def _by_classes(
    request: ClusteringRequest, layout: OutputLayout, star: ParticleStar, uids: NDArray[np.uint64]
) -> tuple[NDArray[np.uint64], NDArray[np.int16]]:
    """Polish the features' clusters by class averages of the images, reduced to 48 px; in order of uid, as above.

    An image without a feature begins in the first class; where nothing has features, classes begin at random.
    """
    import torch

    from actors.engines.particle_images import load_particles
    from models.reconstruction.classification import ClassificationSettings, classify

    path = layout.clustering(request.clustering_id) / "particles.star"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_particles_star(path, star.particles.sort_values(UID_COLUMN, kind="stable"), star.optics)
    particles = load_particles(path, layout.root, max_box_px=_CLASS_BOX_PX)
    if len(particles.data) < 2 * request.n_clusters:
        msg = f"n_clusters: {request.n_clusters}, there are two usable images for each, of {len(particles.data)}"
        raise ValueError(msg)
    settings = ClassificationSettings(
        n_classes=request.n_clusters,
        n_iterations=_CLASS_ITERATIONS,
        max_shell=min(_CLASS_SHELLS, particles.data.box_size_px / 2 - 1),
    )
    own = np.asarray(particles.table.uids, np.uint64)[particles.rows]
    start = _start_classes(request, layout, uids, own)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        generator = torch.Generator().manual_seed(0)
        classes = classify(
            particles.data, settings, generator, labels=None if start is None else torch.from_numpy(start)
        )
    finally:
        torch.set_num_threads(threads)
    path.unlink()
    return own, classes.assignment.numpy().astype(np.int16)


def _start_classes(
    request: ClusteringRequest, layout: OutputLayout, uids: NDArray[np.uint64], own: NDArray[np.uint64]
) -> NDArray[np.int64] | None:
    """Return the class that each of `own` begins with: its features' cluster; None where too few have features."""
    cache = FeatureCache(layout.features)
    if int(cache.features(request.model_hash, uids)[0].sum()) < request.n_clusters:
        return None
    known, labels = _by_features(request, layout, uids)
    start = np.zeros(len(own), np.int64)
    places = np.searchsorted(known, own).clip(max=len(known) - 1)
    is_known = known[places] == own
    start[is_known] = labels[places[is_known]]
    return start
