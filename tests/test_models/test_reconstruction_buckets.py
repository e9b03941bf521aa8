"""Bucketed sums: linear in what goes in and out, equal to what `sufficient` accumulates, and self-checking."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from models.fourier.point_groups import symmetry_matrices
from models.reconstruction.blobs import BlobPhantom, simulate_blob_images
from models.reconstruction.buckets import SUM_TOLERANCE, Bucket, BucketSums, Inserted, random_groups
from models.reconstruction.grids import random_rotations
from models.reconstruction.particle_data import ParticleData
from models.reconstruction.projector import symmetrise_friedel
from models.reconstruction.sufficient import accumulate_posed

BOX, N, SHELL = 24, 60, 10.0


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def images() -> ParticleData:
    phantom = BlobPhantom.random(BOX, gen(1), n_blobs=6, sigma_fraction=0.05)
    return simulate_blob_images(phantom, N, gen(2), snr=0.5).data


def records(n: int = N, seed: int = 3) -> Inserted:
    return Inserted(
        half=torch.arange(n) % 2 + 1,
        group=torch.arange(n) // 2 % 2,
        cluster=torch.arange(n) // 4 % 3,
        rotations=random_rotations(n, gen(seed)),
        shifts_xy_px=torch.randn((n, 2), generator=gen(seed + 1)),
        weights=0.5 + torch.rand(n, generator=gen(seed + 2)),
        scales=0.8 + 0.4 * torch.rand(n, generator=gen(seed + 3)),
    )


def everything(bucket: Bucket) -> bool:
    return True


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("group", ["C1", "D2"])
def test_a_union_of_all_buckets_is_the_plain_accumulator(images, group):
    symmetry = symmetry_matrices(group).float()
    buckets = BucketSums(SHELL, BOX, symmetry)
    rows = records()
    buckets.take(images, rows)
    near = images.within(SHELL)
    weight, ctf = rows.weights[:, None], near.ctf * rows.scales[:, None]
    weighted = weight * ctf * near.coefficients * near.plane.phases(rows.shifts_xy_px)
    plain = accumulate_posed(
        buckets.grid.zeros(), weighted, weight * ctf.square(), rows.rotations, near.plane,
        symmetry,
    )  # fmt: skip
    assert relative(buckets.union(everything), symmetrise_friedel(plain)) < 1e-6
    assert len(buckets.sums) == 12


def test_after_a_thousand_revisions_the_sums_are_those_made_from_scratch(images):
    buckets, rows = BucketSums(SHELL, BOX), records()
    buckets.take(images, rows)
    turns, moves = random_rotations(1000, gen(7)), torch.randn((1000, 2), generator=gen(8))
    for step in range(1000):
        at = torch.tensor([step * 7 % N])
        old = rows.take(at)
        new = rows.at(at, turns[step : step + 1], moves[step : step + 1])
        buckets.revise(images.take(at), old, new)
        rows.rotations[at], rows.shifts_xy_px[at] = new.rotations, new.shifts_xy_px
    scratch = BucketSums(SHELL, BOX)
    scratch.take(images, rows)
    for bucket, sums in scratch.sums.items():
        assert relative(buckets.sums[bucket], sums) < 1e-4
        assert float((buckets.sums[bucket] - sums).abs().max() / sums.abs().max()) < 1e-4


def test_dropping_what_was_taken_leaves_the_others_alone(images):
    buckets, rows = BucketSums(SHELL, BOX), records()
    buckets.take(images, rows)
    gone, kept = torch.arange(20), torch.arange(20, N)
    buckets.drop(images.take(gone), rows.take(gone))
    scratch = BucketSums(SHELL, BOX)
    scratch.take(images.take(kept), rows.take(kept))
    assert relative(buckets.union(everything), scratch.union(everything)) < 1e-5


def test_a_particle_may_move_to_another_bucket(images):
    buckets, rows = BucketSums(SHELL, BOX), records()
    buckets.take(images, rows)
    moved = replace(rows, cluster=(rows.cluster + 1) % 3)
    before = buckets.union(everything)
    buckets.revise(images, rows, moved)
    assert relative(buckets.union(everything), before) < 1e-5
    scratch = BucketSums(SHELL, BOX)
    scratch.take(images, moved)
    one = Bucket(1, 0, 2)
    assert relative(buckets.sums[one], scratch.sums[one]) < 1e-5


def test_a_lost_or_doubled_particle_is_noticed(images):
    buckets, rows = BucketSums(SHELL, BOX, symmetry_matrices("C3").float()), records()
    buckets.take(images, rows)
    power = buckets.ctf_power_of(images)
    assert buckets.check_sums(power, rows) < 1e-5
    few = torch.arange(1, N)
    assert buckets.check_sums(power[few], rows.take(few)) > SUM_TOLERANCE
    buckets.take(images.take(torch.tensor([5])), rows.take(torch.tensor([5])))
    assert buckets.check_sums(power, rows) > SUM_TOLERANCE


def test_halves_never_meet_in_a_map(images):
    buckets, rows = BucketSums(SHELL, BOX), records()
    buckets.take(images, rows)
    first = buckets.union(lambda b: b.half == 1)
    only = torch.nonzero(rows.half == 1)[:, 0]
    scratch = BucketSums(SHELL, BOX)
    scratch.take(images.take(only), rows.take(only))
    assert relative(first, scratch.union(everything)) < 1e-6
    flat = torch.full((buckets.grid.n_shells,), 10.0)
    a, b = buckets.maps(lambda b: b.cluster == 1, flat, BOX)
    assert a.shape == b.shape == (BOX,) * 3
    assert relative(a, b) > 0.1


def test_images_of_another_box_or_number_are_refused(images):
    buckets = BucketSums(SHELL, BOX + 2)
    with pytest.raises(ValueError, match="box 24 px"):
        buckets.take(images, records())
    with pytest.raises(ValueError, match="records: 60 for 59"):
        BucketSums(SHELL, BOX).take(images.take(torch.arange(59)), records())


def test_random_groups_are_even_and_the_same_in_any_order():
    uids = torch.arange(4_000) * 1024 + (1 << 62)
    groups = random_groups(uids, 8)
    counts = torch.bincount(groups, minlength=8)
    assert int(counts.min()) > 400
    order = torch.randperm(4_000, generator=gen())
    assert torch.equal(random_groups(uids[order], 8), groups[order])
    assert groups.unique().tolist() == list(range(8))
