"""Clusters of like views: by features of the cache, whatever the order of the exposures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import mrcfile
import numpy as np
import pandas as pd
import pytest

from actors.clustering import cluster_particles
from stream.records.commands import ClusterParticles, RunMember
from stream.records.errors import InputError
from stream.records.particles import derive_particle_uid
from stream.records.values import (
    CampaignId,
    ClusteringId,
    ClusteringRequest,
    ClusterSource,
    ExposureId,
    Optics,
    ParticleSubset,
)
from stream.sinks.exporter import read_labels, write_run_input
from stream.sinks.relion_star import make_particle_optics, read_particles_star, write_particles_star
from stream.store.feature_cache import FeatureCache
from stream.store.layout import OutputLayout

N_EACH = 40
REQUEST = ClusteringRequest(
    clustering_id=ClusteringId("campaign001-clusters"),
    campaign_id=CampaignId("campaign001"),
    model_hash="m",
    subset=ParticleSubset(score_threshold=0.2),
    n_clusters=2,
    reason="",
)


def make_session(layout: OutputLayout, *, n_without: int = 3) -> tuple[RunMember, ...]:
    """Three exposures; a particle's view is its index modulo 2; the last `n_without` of each have no feature."""
    rng = np.random.default_rng(0)
    optics = make_particle_optics(
        Optics(voltage_kv=300.0, cs_mm=2.7, amplitude_contrast=0.1),
        image_pixel_size_angstrom=1.0,
        image_size_px=8,
    )
    members = []
    with FeatureCache(layout.features) as cache:
        for number in range(3):
            name, exposure_id = f"e{number}", ExposureId(f"id{number}")
            uids = np.array([derive_particle_uid(exposure_id, i) for i in range(N_EACH)], np.uint64)
            table = pd.DataFrame({
                "rlnImageName": [f"{i + 1:06d}@particles/{name}.mrcs" for i in range(N_EACH)],
                "rlnOpticsGroup": 1, "rlnDefocusU": 1e4, "rlnDefocusV": 1e4, "rlnDefocusAngle": 0.0,
                "rlnPhaseShift": 0.0, "icestreamUid": uids,
            })  # fmt: skip
            layout.particles_table(name).parent.mkdir(parents=True, exist_ok=True)
            write_particles_star(layout.particles_table(name), table, optics)
            views = np.eye(4)[np.arange(N_EACH) % 2] + 0.05 * rng.normal(size=(N_EACH, 4))
            n = N_EACH - n_without
            scores = np.where(np.arange(n) < 4, 0.1, 0.9).astype(np.float32)
            cache.append("m", uids[:n], scores, views[:n].astype(np.float16))
            members.append(RunMember(exposure_id=exposure_id, name=name, half_set=1))
    return tuple(members)


def test_views_are_told_apart_and_a_clusters_run_has_its_particles(tmp_path: Path) -> None:
    layout = OutputLayout(tmp_path)
    members = make_session(layout)
    result = cluster_particles(ClusterParticles(request=REQUEST, members=members), layout)
    n_good = N_EACH - 3 - 4
    assert sorted(result.sizes) == sorted([3 * (n_good // 2), 3 * (n_good - n_good // 2)])
    uids, labels = read_labels(layout.cluster_labels(REQUEST.clustering_id))
    views = {derive_particle_uid(m.exposure_id, i): i % 2 for m in members for i in range(N_EACH)}
    assert len({(views[int(u)], int(label)) for u, label in zip(uids, labels, strict=True)}) == 2
    subset = replace(REQUEST.subset, clustering=REQUEST.clustering_id, clusters=(0,))
    path = tmp_path / "p.star"
    assert write_run_input(layout, members, "m", subset, path) == result.sizes[0]
    chosen = read_particles_star(path).particles["icestreamUid"].tolist()
    assert len({views[int(u)] for u in chosen}) == 1


def test_the_order_of_the_exposures_does_not_change_the_clusters(tmp_path: Path) -> None:
    layout = OutputLayout(tmp_path)
    members = make_session(layout)
    found = []
    for order in (members, members[::-1]):
        cluster_particles(ClusterParticles(request=REQUEST, members=order), layout)
        found.append(read_labels(layout.cluster_labels(REQUEST.clustering_id)))
    assert np.array_equal(found[0][0], found[1][0])
    assert np.array_equal(found[0][1], found[1][1])


def test_particles_without_a_row_in_the_cache_are_in_no_cluster(tmp_path: Path) -> None:
    layout = OutputLayout(tmp_path)
    members = make_session(layout)
    everything = replace(REQUEST, subset=ParticleSubset(score_threshold=-1.0))
    result = cluster_particles(ClusterParticles(request=everything, members=members), layout)
    assert sum(result.sizes) == 3 * (N_EACH - 3)
    assert result.n_without_features == 0, "a particle without a score is in no subset"


def test_fewer_features_than_clusters_are_an_error_that_names_the_clustering(tmp_path: Path) -> None:
    layout = OutputLayout(tmp_path)
    members = make_session(layout)
    command = ClusterParticles(request=replace(REQUEST, n_clusters=500), members=members)
    with pytest.raises(InputError, match=r"campaign001-clusters.*n_clusters: 500"):
        cluster_particles(command, layout)


def test_class_averages_tell_a_minority_of_other_views_from_the_majority(tmp_path: Path) -> None:
    """Two outlines, turned in the plane and shifted, in noise: one in five shows the bar; features hardly tell."""
    layout = OutputLayout(tmp_path)
    members, is_bar = make_outlines(layout, n=200)
    request = replace(REQUEST, n_clusters=4, source=ClusterSource.CLASSES)
    result = cluster_particles(ClusterParticles(request=request, members=members), layout)
    assert (sum(result.sizes), result.n_without_features) == (200, 0)
    uids, labels = read_labels(layout.cluster_labels(REQUEST.clustering_id))
    share = np.array([np.mean([is_bar[int(u)] for u in uids[labels == k]]) for k in np.unique(labels)])
    sizes = np.array([(labels == k).sum() for k in np.unique(labels)])
    assert sizes[share > 0.9].sum() >= 30, "most of the 40 bars are in clusters of their own"
    assert not (layout.clustering(REQUEST.clustering_id) / "particles.star").exists()


def test_fewer_images_than_twice_the_classes_are_an_error_that_names_the_clustering(tmp_path: Path) -> None:
    layout = OutputLayout(tmp_path)
    members, _ = make_outlines(layout, n=60)
    request = replace(REQUEST, n_clusters=31, source=ClusterSource.CLASSES)
    with pytest.raises(InputError, match=r"campaign001-clusters.*two usable images for each, of 60"):
        cluster_particles(ClusterParticles(request=request, members=members), layout)


def make_outlines(layout: OutputLayout, n: int) -> tuple[tuple[RunMember, ...], dict[int, bool]]:
    """Two exposures with `n` images of 32 px in all: every fifth a bar, the others a disk of the same mass, SNR about 1."""
    rng = np.random.default_rng(1)
    y, x = np.mgrid[-16:16, -16:16].astype(np.float64)
    images, bars = [], np.arange(n) % 5 == 0
    for is_bar in bars:
        angle, (dy, dx) = rng.uniform(0, np.pi), rng.normal(0, 0.7, 2)
        u = (x - dx) * np.cos(angle) + (y - dy) * np.sin(angle)
        v = (y - dy) * np.cos(angle) - (x - dx) * np.sin(angle)
        sigma_u, sigma_v = (7.0, 1.75) if is_bar else (3.5, 3.5)
        images.append(
            2.0 * np.exp(-0.5 * ((u / sigma_u) ** 2 + (v / sigma_v) ** 2)) + rng.normal(size=(32, 32))
        )
    optics = make_particle_optics(
        Optics(voltage_kv=300.0, cs_mm=2.7, amplitude_contrast=0.1),
        image_pixel_size_angstrom=4.0,
        image_size_px=32,
    )
    members, truth = [], dict[int, bool]()
    with FeatureCache(layout.features) as cache:
        for half_set in (1, 2):
            name, exposure_id = f"e{half_set}", ExposureId(f"id{half_set}")
            own = np.arange(n) % 2 == half_set - 1
            uids = np.array([derive_particle_uid(exposure_id, i) for i in range(int(own.sum()))], np.uint64)
            stack = layout.root / "particles" / f"{name}.mrcs"
            stack.parent.mkdir(parents=True, exist_ok=True)
            with mrcfile.new(stack) as handle:
                handle.set_data(np.array(images, np.float32)[own])
                handle.voxel_size = 4.0
            table = pd.DataFrame({
                "rlnImageName": [f"{i + 1:06d}@particles/{name}.mrcs" for i in range(len(uids))],
                "rlnOpticsGroup": 1, "rlnDefocusU": 1e4, "rlnDefocusV": 1e4, "rlnDefocusAngle": 0.0,
                "rlnPhaseShift": 0.0, "icestreamUid": uids,
            })  # fmt: skip
            layout.particles_table(name).parent.mkdir(parents=True, exist_ok=True)
            write_particles_star(layout.particles_table(name), table, optics)
            weak = np.outer(bars[own], np.eye(4)[0]) + rng.normal(size=(len(uids), 4))
            cache.append("m", uids, np.full(len(uids), 0.9, np.float32), weak.astype(np.float16))
            members.append(RunMember(exposure_id=exposure_id, name=name, half_set=half_set))
            truth |= {int(u): bool(b) for u, b in zip(uids, bars[own], strict=True)}
    return tuple(members), truth
