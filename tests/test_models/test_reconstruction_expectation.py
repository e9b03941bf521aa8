"""The E-step in two steps gives the sums of the exact one; starts that agree are told from those that do not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from models.reconstruction.acceptance import MINIMUM_AGREEMENT, SeedAcceptance, correlate_maps
from models.reconstruction.blobs import BlobPhantom, BlobSet, simulate_blob_images
from models.reconstruction.expectation import CoarseSearch, sum_slices
from models.reconstruction.grids import random_rotations, shift_grid, so3_grid
from models.reconstruction.online_em import EmResult
from models.reconstruction.particle_data import ParticleData
from models.reconstruction.projector import insert_slices, volume_to_cube
from models.reconstruction.scoring import Projections, ShiftSearch
from models.reconstruction.sufficient import ReconstructionGrid
from models.reconstruction.symmetry import turn_volume

BOX, SHELL = 32, 11.0
PHANTOM = BlobPhantom.random(BOX, torch.Generator().manual_seed(4), n_blobs=9, sigma_fraction=0.04)


@pytest.fixture(scope="module")
def images() -> BlobSet:
    return simulate_blob_images(
        PHANTOM, 40, torch.Generator().manual_seed(5), snr=0.1, pixel_size_angstrom=6.0
    )


def sums_of(data: ParticleData, coarse: CoarseSearch | None, beta: float) -> tuple[torch.Tensor, int]:
    """Return what the batch adds to the accumulator, and at how many rotations."""
    near = data.within(SHELL)
    inverse_noise = (1.0 / near.mean_power())[near.plane.shell]
    rotations = so3_grid(2)
    projections = Projections.of_grid(volume_to_cube(PHANTOM.volume(), SHELL), rotations, near.plane)
    search = ShiftSearch.gaussian(shift_grid(2, 1.0), 1.5)
    found = sum_slices(near, inverse_noise, projections, search, beta, coarse)
    used = (found[2].amax(1) > 0).nonzero()[:, 0]
    zeros = ReconstructionGrid(SHELL).zeros()
    return insert_slices(zeros, found[:, used], rotations[used], near.plane), len(used)


def test_two_steps_give_the_sums_of_one(images: BlobSet) -> None:
    n_coefficients = images.data.plane.count_within(9.0)
    coarse = CoarseSearch(ShiftSearch.gaussian(shift_grid(1, 1.5), 1.5), n_coefficients)
    exact, n_exact = sums_of(images.data, None, 1.0)
    pruned, n_pruned = sums_of(images.data, coarse, 1.0)
    assert n_pruned <= n_exact
    difference = (pruned - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
    assert float(difference.max()) < 0.25
    # Every image is counted once whatever was left out: the weights' sum is the images' own.
    assert float(pruned[2].sum()) == pytest.approx(float(exact[2].sum()), rel=1e-3)


def test_two_steps_at_the_same_radius_and_shifts_are_exact_for_a_peaked_posterior(images: BlobSet) -> None:
    n_coefficients = images.data.plane.count_within(SHELL)
    coarse = CoarseSearch(ShiftSearch.gaussian(shift_grid(2, 1.0), 1.5), n_coefficients)
    clean = simulate_blob_images(
        PHANTOM, 20, torch.Generator().manual_seed(6), snr=5.0, pixel_size_angstrom=6.0
    )
    exact, _ = sums_of(clean.data, None, 1.0)
    pruned, _ = sums_of(clean.data, coarse, 1.0)
    assert float((pruned - exact).norm() / exact.norm()) < 0.02


def result_of(volume: torch.Tensor) -> EmResult:
    nothing = torch.zeros(1)
    return EmResult(
        volume=volume,
        cube=volume_to_cube(volume, SHELL),
        max_shell=SHELL,
        evidence=nothing,
        inverse_noise=nothing,
        fsc=nothing,
    )


def test_a_map_agrees_with_itself_turned_and_mirrored_and_not_with_another() -> None:
    volume = PHANTOM.volume()
    turned = turn_volume(volume, random_rotations(1, torch.Generator().manual_seed(7))[0], torch.zeros(3))
    other = BlobPhantom.random(BOX, torch.Generator().manual_seed(8), n_blobs=9, sigma_fraction=0.04).volume()
    assert correlate_maps(result_of(volume), result_of(turned.flip(0).roll(1, 0))) > 0.95
    assert correlate_maps(result_of(volume), result_of(other)) < MINIMUM_AGREEMENT


def test_a_map_that_no_other_start_came_to_is_refused() -> None:
    passed = SeedAcceptance(
        log_evidence=10.0,
        log_evidence_noise=-5.0,
        log_evidence_ball=3.0,
        z_signal=20.0,
        z_shape=10.0,
        n_held_out=200,
    )
    assert passed.is_accepted  # one start: nothing to compare
    assert replace(passed, agreement=0.95).is_accepted
    refused = replace(passed, agreement=0.4).reason
    assert refused is not None
    assert "no second start" in refused
    assert "0.40" in refused
