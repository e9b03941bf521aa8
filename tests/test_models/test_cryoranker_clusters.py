"""Clusters of features: found whatever the block size, in bounded memory, with bad input refused."""

import numpy as np
import pytest

from models.cryoranker import clusters
from models.cryoranker.clusters import cluster_features


def directions(n, n_clusters=4, width=24, spread=0.15, seed=0):
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((n_clusters, width))
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    labels = rng.integers(0, n_clusters, n)
    rows = centres[labels] + spread * rng.standard_normal((n, width)) / np.sqrt(width)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows.astype(np.float16), labels


def blocks_of(rows, size):
    return lambda: (rows[i : i + size] for i in range(0, len(rows), size))


def same_partition(first, second):
    pairs = {(int(a), int(b)) for a, b in zip(first, second, strict=True)}
    return len(pairs) == len(set(first.tolist())) == len(set(second.tolist()))


@pytest.mark.parametrize("sample_rows", [100_000, 300])
def test_separate_clusters_are_found_from_a_sample_or_from_all(monkeypatch, sample_rows):
    monkeypatch.setattr(clusters, "_SAMPLE_ROWS", sample_rows)
    rows, truth = directions(3_000)
    found = cluster_features(blocks_of(rows, 256), 4)
    assert same_partition(found.labels, truth)
    assert found.sizes.sum() == 3_000
    expected = np.mean([(rows[truth == k].astype(float).var(axis=0).sum()) for k in range(4)])
    assert found.mean_squared_distance == pytest.approx(expected, rel=0.05)


def test_the_size_of_a_block_changes_no_label_when_all_fits_the_sample():
    rows, _ = directions(500)
    first = cluster_features(blocks_of(rows, 7), 5, seed=3)
    second = cluster_features(blocks_of(rows, 500), 5, seed=3)
    np.testing.assert_array_equal(first.labels, second.labels)


def test_mini_batches_come_close_to_k_means_on_everything(monkeypatch):
    rows, _ = directions(6_000, n_clusters=12, spread=0.8)
    whole = cluster_features(blocks_of(rows, 500), 8)
    monkeypatch.setattr(clusters, "_SAMPLE_ROWS", 500)
    assert (
        cluster_features(blocks_of(rows, 500), 8).mean_squared_distance < 1.03 * whole.mean_squared_distance
    )


def test_more_clusters_than_features_are_refused():
    rows, _ = directions(3)
    with pytest.raises(ValueError, match="n_clusters: 8"):
        cluster_features(blocks_of(rows, 2), 8)


def test_features_that_are_not_numbers_are_refused_with_their_rows():
    rows, _ = directions(30)
    rows[17, 0] = np.nan
    with pytest.raises(ValueError, match="rows 10 to 19"):
        cluster_features(blocks_of(rows, 10), 2)
