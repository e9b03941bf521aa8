"""A growing set: newcomers find their poses, old ones are revisited, unions of buckets say what more data would give."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from models.reconstruction.blobs import BlobPhantom, BlobSet, pose_errors_deg, simulate_blob_images
from models.reconstruction.grids import random_rotations, rotation_vector_to_matrix
from models.reconstruction.incremental import (
    IncrementalState,
    Newcomers,
    ParticleRecords,
    advance,
    half_maps,
    start_state,
)
from models.reconstruction.masks import mask_from_map, spherical_mask
from models.reconstruction.particle_data import ParticleData
from models.reconstruction.pose_schedule import RefinementSettings
from models.reconstruction.pose_search import Hypotheses
from models.reconstruction.unions import best_union, growth_curve, leave_one_out

BOX, PIXEL, N = 32, 4.0, 280


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


PHANTOM = BlobPhantom.random(BOX, gen(1), n_blobs=9, sigma_fraction=0.045)


def state_at(images: BlobSet, rows: torch.Tensor, cluster: torch.Tensor, *, jitter_deg: float, n_groups: int):
    """A base with the true poses of `rows`, each turned by a random angle of that size."""
    n = len(rows)
    noise = rotation_vector_to_matrix(math.radians(jitter_deg) / 1.7 * torch.randn((n, 3), generator=gen(9)))
    rotations = noise @ images.rotations[rows]
    poses = Hypotheses(rotations[:, None], images.origin_xy_px[rows][:, None], torch.zeros(n, 1))
    return start_state(
        images.data.take(rows), rows + 100, rows % 2 + 1, cluster, poses,
        scales=torch.ones(n), weights=torch.ones(n), symmetry=torch.eye(3)[None],
        settings=RefinementSettings(grid_order=1), n_groups=n_groups,
    )  # fmt: skip


@pytest.fixture(scope="module")
def images() -> BlobSet:
    return simulate_blob_images(PHANTOM, N, gen(2), snr=0.4, pixel_size_angstrom=PIXEL)


def newcomers(images: BlobSet, rows: torch.Tensor) -> Newcomers:
    cluster = torch.zeros(len(rows), dtype=torch.long)
    return Newcomers(
        data=images.data.take(rows), uids=rows + 100, half=rows % 2 + 1, cluster=cluster,
        micrograph=rows // 20, scales=torch.full((len(rows),), float("nan")),
    )  # fmt: skip


def errors(state: IncrementalState, images: BlobSet, records: ParticleRecords) -> torch.Tensor:
    return pose_errors_deg(records.inserted.rotations, images.rotations[records.uids - 100])


def test_newcomers_find_poses_the_old_are_revisited_and_the_dropped_leave(images):
    old, new = torch.arange(200), torch.arange(200, N)
    state = state_at(images, old, torch.zeros(200, dtype=torch.long), jitter_deg=8.0, n_groups=2)
    before = float(errors(state, images, state.records).median())
    gone = torch.arange(100, 120)
    report = advance(
        state, newcomers(images, new), lambda uids: images.data.take(uids - 100),
        generator=gen(3), dropped_uids=gone, quota=100,
    )  # fmt: skip
    assert (report.n_new, report.n_revisited, report.n_dropped) == (80, 100, 20)
    assert len(state.records) == 260
    assert not torch.isin(state.records.uids, gone).any()
    found = errors(state, images, state.records)
    is_new = state.records.uids >= 300
    assert float(found[is_new].median()) < 6.0
    # The hundred longest unvisited are the first hundred of the old: better than they were, the rest as before.
    assert float(found[:100].median()) < 0.75 * before
    assert state.records.aligned_at.tolist() == [1] * 100 + [0] * 80 + [1] * 80
    assert state.sums.check_sums(state.records.ctf_power, state.records.inserted) < 1e-5


def test_a_set_that_doubles_asks_for_a_full_refinement(images):
    state = state_at(images, torch.arange(60), torch.zeros(60, dtype=torch.long), jitter_deg=3.0, n_groups=2)
    state.base_resolution_angstrom = 1.0  # so that only the number can ask

    def load(uids: torch.Tensor):
        return images.data.take(uids - 100)

    first = advance(state, newcomers(images, torch.arange(60, 100)), load, generator=gen(4), quota=0)
    assert not first.needs_rebase
    second = advance(state, newcomers(images, torch.arange(100, 125)), load, generator=gen(5), quota=0)
    assert second.needs_rebase


def test_a_finer_map_asks_for_a_full_refinement(images):
    state = state_at(
        images, torch.arange(100), torch.zeros(100, dtype=torch.long), jitter_deg=3.0, n_groups=2
    )
    state.base_resolution_angstrom = 60.0
    none = newcomers(images, torch.arange(0))
    report = advance(state, none, lambda uids: images.data.take(uids - 100), generator=gen(6))
    assert report.n_revisited == 0
    assert report.needs_rebase


def test_newcomers_take_their_micrographs_scale_and_empty_boxes_count_for_little(images):
    old, new = torch.arange(140), torch.arange(140, N)
    state = state_at(images, old, torch.zeros(140, dtype=torch.long), jitter_deg=3.0, n_groups=2)
    coming = newcomers(images, new)
    known = coming.scales.clone()
    known[:40] = 0.7
    is_empty = torch.arange(140) % 4 == 3
    plane = images.data.plane
    signal = images.data.ctf * PHANTOM.slices(images.rotations, plane) * plane.phases(-images.origin_xy_px)
    coefficients = coming.data.coefficients - is_empty[:, None] * signal[new]
    data = ParticleData(plane, PIXEL, coefficients, coming.data.ctf)
    coming = replace(coming, data=data, scales=known, half=torch.ones(140, dtype=torch.long))
    advance(state, coming, lambda uids: images.data.take(uids - 100), generator=gen(3), quota=0)
    rows = state.records.rows_of(new + 100)
    inserted = state.records.inserted.take(rows)
    assert torch.equal(inserted.scales[:40], known[:40])
    assert float((inserted.scales[40:] - 1.0).abs().max()) < 0.3
    assert float(inserted.weights[is_empty].mean()) < 0.3
    assert float(inserted.weights[~is_empty].mean()) > 0.9
    assert state.sums.check_sums(state.records.ctf_power, state.records.inserted) < 1e-4


def test_repeated_uids_are_refused(images):
    rows = torch.tensor([1, 2, 2, 3])
    with pytest.raises(ValueError, match="uids: 1 are repeated"):
        state_at(images, rows, torch.zeros(4, dtype=torch.long), jitter_deg=0.0, n_groups=2)


def test_half_maps_of_the_state_look_like_the_truth(images):
    state = state_at(images, torch.arange(N), torch.zeros(N, dtype=torch.long), jitter_deg=0.0, n_groups=4)
    a, b = half_maps(state)
    mask = mask_from_map(PHANTOM.volume(), PIXEL)
    both = torch.stack(((a + b)[mask > 0.5], PHANTOM.volume()[mask > 0.5]))
    assert float(torch.corrcoef(both)[0, 1]) > 0.85


def test_the_growth_curve_predicts_what_more_particles_give():
    """Poses are true, so that SSNR grows with N; the curve of a quarter is asked about the whole."""
    n = 1_600
    images = simulate_blob_images(PHANTOM, n, gen(5), snr=0.02, pixel_size_angstrom=PIXEL)
    mask = spherical_mask(BOX, 11, 4)
    zero = torch.zeros(n, dtype=torch.long)
    part = state_at(images, torch.arange(n // 4), zero[: n // 4], jitter_deg=0.0, n_groups=4)
    curve = growth_curve(part, mask)
    assert [point.n_unions for point in curve.points] == [4, 4, 1]
    assert curve.slope > 0
    whole = growth_curve(state_at(images, torch.arange(n), zero, jitter_deg=0.0, n_groups=4), mask)
    line, scaled = curve.predict(n)
    truth = whole.points[-1].resolution_angstrom
    low, high = sorted((line, scaled))
    assert 0.85 * low < truth < 1.15 * high
    assert whole.b_factor_angstrom2 > 0


def test_the_best_union_leaves_the_cluster_out_that_piles_up_one_view():
    """Cluster 2 holds side-on noise in one direction: junk that only adds to a narrow cone of views."""
    n = 300
    rotations = random_rotations(n, gen(7))
    images = simulate_blob_images(PHANTOM, n, gen(8), snr=0.4, pixel_size_angstrom=PIXEL, rotations=rotations)
    cluster = torch.arange(n) % 3
    junk = cluster == 2
    noise = torch.view_as_complex(torch.randn((*images.data.coefficients.shape, 2), generator=gen(10)))
    scale = images.data.coefficients.abs().square().mean().sqrt()
    coefficients = torch.where(junk[:, None], noise * scale, images.data.coefficients)
    dirty = BlobSet(
        type(images.data)(images.data.plane, PIXEL, coefficients, images.data.ctf),
        torch.where(junk[:, None, None], torch.eye(3), rotations), images.origin_xy_px, images.ctf,
    )  # fmt: skip
    state = state_at(dirty, torch.arange(n), cluster, jitter_deg=0.0, n_groups=2)
    mask = spherical_mask(BOX, 12, 3)
    everything, *without = leave_one_out(state, (0, 1, 2), mask, generator=gen(1))
    assert everything.n_particles == 300
    assert without[2].clusters == (0, 1)
    assert without[2].cfar > everything.cfar
    assert without[2].resolution_angstrom < 1.05 * everything.resolution_angstrom
    best, measured = best_union(state, mask, generator=gen(1))
    assert len(measured) == 7
    assert 2 not in best.clusters
