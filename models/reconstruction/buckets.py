"""Accumulators per half, random group and feature cluster, into which particles go and come out again.

Insertion is linear, so that taking particles in, moving them to a better pose (old pose with −1, new with +1) or
dropping them costs those particles alone, and any union of buckets is a map for the price of one transform.
Sums are not divided by the noise: in A / (W + W̄/SSNR) a noise that all particles share per shell cancels, so a new
estimate of it needs no re-insertion. Particles of another noise level enter with a `weight`, those of another
contrast with a `scale` that multiplies their CTF.

What was inserted is remembered per particle; Σ W over a bucket equals Σ weight · (scale · CTF)² of its records (trilinear
weights add up to one), which `check_sums` uses to notice what was lost or counted twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from models.reconstruction.particle_data import ParticleData
from models.reconstruction.projector import HalfPlane, sums_to_volume, symmetrise_friedel
from models.reconstruction.sufficient import ReconstructionGrid, accumulate_posed, solve_map

SUM_TOLERANCE = 1e-3
"""Relative; float32 rounding of a thousand revisions stays below 1e-5, one lost particle of 500 is 2e-3."""

_IMAGES_PER_BLOCK = 1024
"""Bounds the copies made on insertion: 60 MB at 96 px."""


@dataclass(frozen=True, slots=True, order=True)
class Bucket:
    """Half set 1 or 2, random group and cluster, both from 0."""

    half: int
    group: int
    cluster: int


@dataclass(frozen=True, slots=True)
class Inserted:
    """What went in, one row per particle: address, pose, shift (px, applied to the image), weight and scale."""

    half: Int[Tensor, " b"]
    group: Int[Tensor, " b"]
    cluster: Int[Tensor, " b"]
    rotations: Float[Tensor, "b 3 3"]
    shifts_xy_px: Float[Tensor, "b 2"]
    weights: Float[Tensor, " b"]
    scales: Float[Tensor, " b"]

    def __len__(self) -> int:
        return int(self.half.numel())

    def take(self, index: Tensor) -> Inserted:
        """Return the rows at `index`."""
        return Inserted(*(getattr(self, f.name)[index] for f in fields(self)))

    @classmethod
    def joined(cls, parts: Iterable[Inserted]) -> Inserted:
        """Return all rows of `parts` in order."""
        rows = list(parts)
        return cls(*(torch.cat([getattr(p, f.name) for p in rows]) for f in fields(cls)))

    def at(self, index: Tensor, rotations: Tensor, shifts_xy_px: Tensor) -> Inserted:
        """Return the rows at `index` moved to other poses."""
        return replace(self.take(index), rotations=rotations, shifts_xy_px=shifts_xy_px)

    def buckets(self) -> list[Bucket]:
        """Return every row's address."""
        columns = (self.half.tolist(), self.group.tolist(), self.cluster.tolist())
        return [Bucket(*row) for row in zip(*columns, strict=True)]


class BucketSums:
    """Sums (re A, im A, W) per bucket up to a radius; Friedel mates are added up, so half a cube is kept."""

    def __init__(
        self, max_shell: float, box_size_px: int, symmetry: Float[Tensor, "g 3 3"] | None = None
    ) -> None:
        self.grid = ReconstructionGrid(max_shell)
        self.plane = HalfPlane.of(box_size_px, max_shell)
        self.symmetry = torch.eye(3)[None] if symmetry is None else symmetry
        self.sums: dict[Bucket, Tensor] = {}

    @property
    def box_size_px(self) -> int:
        """The images' box; a map may be asked on a smaller one of the same extent."""
        return self.plane.box_size_px

    def empty(self) -> Float[Tensor, "3 d d h"]:
        """Return a bucket that holds nothing."""
        h = self.grid.half_side
        return torch.zeros((3, 2 * h + 1, 2 * h + 1, h + 1))

    def take(self, data: ParticleData, records: Inserted) -> None:
        """Insert images with what `records` says of them."""
        self._insert(data, records, 1.0)

    def drop(self, data: ParticleData, records: Inserted) -> None:
        """Take images out again; `records` are those they went in with."""
        self._insert(data, records, -1.0)

    def revise(self, data: ParticleData, old: Inserted, new: Inserted) -> None:
        """Replace what was inserted: images leave their old pose and bucket and enter at the new ones."""
        self._insert(data, old, -1.0)
        self._insert(data, new, 1.0)

    def _insert(self, data: ParticleData, records: Inserted, sign: float) -> None:
        if len(data) != len(records):
            raise ValueError(f"records: {len(records)} for {len(data)} images, one for each")
        near = data.within(self.grid.max_shell)
        if len(near.plane) != len(self.plane) or near.box_size_px != self.box_size_px:
            raise ValueError(f"data: box {near.box_size_px} px, the buckets have {self.box_size_px} px")
        of_bucket: dict[Bucket, list[int]] = {}
        for row, bucket in enumerate(records.buckets()):
            of_bucket.setdefault(bucket, []).append(row)
        for bucket, members in of_bucket.items():
            full = self.grid.zeros()
            for index in torch.tensor(members).split(_IMAGES_PER_BLOCK):
                few, own = near.take(index), records.take(index)
                weight, ctf = (sign * own.weights)[:, None], few.ctf * own.scales[:, None]
                images = weight * ctf * few.coefficients * self.plane.phases(own.shifts_xy_px)
                weights = weight * ctf.square()
                full = accumulate_posed(full, images, weights, own.rotations, self.plane, self.symmetry)
            folded = symmetrise_friedel(full)[..., self.grid.half_side :]
            self.sums[bucket] = self.sums.get(bucket, self.empty()) + folded

    def union(self, wanted: Callable[[Bucket], bool]) -> Float[Tensor, "3 d d d"]:
        """Return the sums of all buckets that are wanted, as one accumulator of `sufficient`."""
        total = self.empty()
        for bucket, sums in self.sums.items():
            if wanted(bucket):
                total = total + sums
        # The half x < 0 is the mirrored half's conjugate.
        mate = total[..., 1:].flip(1, 2, 3) * torch.tensor([1.0, -1.0, 1.0])[:, None, None, None]
        return torch.cat((mate, total), dim=-1)

    def maps(
        self, wanted: Callable[[Bucket], bool], ssnr: Float[Tensor, "s"], box_px: int
    ) -> tuple[Float[Tensor, "n n n"], Float[Tensor, "n n n"]]:
        """Return both halves' maps of a union under a radial prior, on a box of the same extent."""
        return self.half_map(1, ssnr, box_px, wanted), self.half_map(2, ssnr, box_px, wanted)

    def half_map(
        self,
        half: int,
        ssnr: Float[Tensor, "s"],
        box_px: int,
        wanted: Callable[[Bucket], bool] | None = None,
    ) -> Float[Tensor, "n n n"]:
        """Return one half's map of a union (all of its buckets by default)."""
        sums = self.union(lambda b: b.half == half and (wanted is None or wanted(b)))
        return sums_to_volume(solve_map(sums, ssnr, self.grid), box_px)

    def check_sums(self, ctf_power: Float[Tensor, " b"], records: Inserted) -> float:
        """Return the largest relative gap between a bucket's Σ W and what its records amount to.

        `ctf_power` is Σ CTF² of every record's image within the radius (`ctf_power_of`). Zero up to rounding;
        beyond `SUM_TOLERANCE` the state does not belong to these records.
        """
        expected: dict[Bucket, float] = dict.fromkeys(self.sums, 0.0)
        amounts = (records.weights * records.scales.square() * ctf_power).double() * 2.0 * len(self.symmetry)
        for bucket, amount in zip(records.buckets(), amounts.tolist(), strict=True):
            expected[bucket] = expected.get(bucket, 0.0) + amount
        scale = max(max(expected.values(), default=0.0), 1e-12)
        gaps = [abs(self._total_weight(b) - amount) / scale for b, amount in expected.items()]
        return max(gaps, default=0.0)

    def _total_weight(self, bucket: Bucket) -> float:
        """Return Σ W over the whole cube: columns x > 0 stand for x < 0 as well."""
        if bucket not in self.sums:
            return 0.0
        weight = self.sums[bucket][2].double()
        return float(2.0 * weight.sum() - weight[..., 0].sum())

    def ctf_power_of(self, data: ParticleData) -> Float[Tensor, " b"]:
        """Return Σ CTF² of every image within the radius."""
        return data.within(self.grid.max_shell).ctf.square().sum(1)


def random_groups(uids: Int[Tensor, " b"], n_groups: int) -> Int[Tensor, " b"]:
    """Return each particle's random group: a mix of its uid's bits, the same in every run and order."""
    # SplitMix64's finaliser (Steele et al. 2014) in two's complement: neighbours of one micrograph are spread.
    z = uids.long()
    z = (z ^ _shift_right(z, 30)) * -4658895280553007687
    z = (z ^ _shift_right(z, 27)) * -7723592293110705685
    z = z ^ _shift_right(z, 31)
    return _shift_right(z, 1) % n_groups


def _shift_right(z: Int[Tensor, " b"], n_bits: int) -> Int[Tensor, " b"]:
    """Shift as if unsigned."""
    return (z >> n_bits) & ((1 << (64 - n_bits)) - 1)
