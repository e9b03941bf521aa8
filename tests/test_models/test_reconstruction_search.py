"""Pose search, refinement and the initial model on sets with known truth."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch

from models.fourier.point_groups import symmetry_matrices
from models.reconstruction.blobs import BlobPhantom, BlobSet, pose_errors_deg, simulate_blob_images
from models.reconstruction.grids import random_rotations, rotation_vector_to_matrix
from models.reconstruction.half_set import WarmPoses, match_scale
from models.reconstruction.online_em import OnlineEm, OnlineEmSettings
from models.reconstruction.pose_schedule import RefinementSettings
from models.reconstruction.projector import volume_to_cube
from models.reconstruction.refinement import Refinement
from models.reconstruction.scoring import fast_products
from models.reconstruction.sufficient import ReconstructionGrid, correlate_shells
from models.reconstruction.symmetry import find_frames, symmetry_score, turn_volume

C1 = torch.eye(3)[None]


@pytest.fixture(scope="module")
def blob_set() -> tuple[BlobPhantom, BlobSet]:
    generator = torch.Generator().manual_seed(11)
    phantom = BlobPhantom.random(32, generator, n_blobs=9, sigma_fraction=0.05)
    return phantom, simulate_blob_images(phantom, 240, generator, snr=0.5, pixel_size_angstrom=6.0)


def _halves(n: int) -> torch.Tensor:
    return torch.arange(n) % 2 + 1


def _refinement(blob_set: tuple[BlobPhantom, BlobSet], **changes: object) -> Refinement:
    phantom, images = blob_set
    settings = RefinementSettings(initial_resolution_angstrom=40.0, grid_order=1, **changes)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    return Refinement(images.data, _halves(240), phantom.volume(), settings, C1, generator)


def test_refinement_recovers_poses_from_a_low_passed_start(blob_set: tuple[BlobPhantom, BlobSet]) -> None:
    phantom, images = blob_set
    refinement = _refinement(blob_set, n_global=2, n_local=2)
    while not refinement.is_done:
        progress = refinement.step()
    result = refinement.result()
    errors = pose_errors_deg(result.rotations, images.rotations, is_hand_free=False)
    assert float(errors.median()) < 5.0  # 2.3 against the true map; a half has 120 images
    assert float((result.shifts_xy_px - images.origin_xy_px).norm(dim=1).median()) < 0.3
    truth = volume_to_cube(phantom.volume(), 15)
    fsc = correlate_shells(volume_to_cube(result.half1, 15), truth, ReconstructionGrid(15))
    assert float(fsc[1:6].min()) > 0.9  # beyond, blobs of this width carry little power
    assert progress.resolution_angstrom < 24.0


def test_a_warm_start_searches_known_poses_locally(blob_set: tuple[BlobPhantom, BlobSet]) -> None:
    phantom, images = blob_set
    generator = torch.Generator().manual_seed(3)
    turns = rotation_vector_to_matrix(torch.randn((240, 3), generator=generator) * math.radians(3.0))
    is_known = torch.arange(240) % 10 != 0
    rotations = torch.where(is_known[:, None, None], turns @ images.rotations, torch.eye(3))
    warm = WarmPoses(rotations, images.origin_xy_px + 0.5, is_known)
    settings = RefinementSettings(n_global=1, n_local=1, initial_resolution_angstrom=40.0, grid_order=1)
    refinement = Refinement(images.data, _halves(240), phantom.volume(), settings, C1, generator, warm)
    before = pose_errors_deg(rotations[is_known], images.rotations[is_known], is_hand_free=False)
    while not refinement.is_done:
        refinement.step()
    result = refinement.result()
    after = pose_errors_deg(result.rotations, images.rotations, is_hand_free=False)
    assert float(after[is_known].median()) < 0.7 * float(before.median())
    assert float(after[~is_known].median()) < 6.0  # newcomers had no pose and were searched globally


def test_the_halves_are_never_mixed(blob_set: tuple[BlobPhantom, BlobSet]) -> None:
    phantom, images = blob_set
    settings = RefinementSettings(n_global=1, n_local=0, initial_resolution_angstrom=40.0, grid_order=1)

    def half_map(data: object) -> torch.Tensor:
        refinement = Refinement(
            data,
            _halves(240),
            phantom.volume(),
            settings,
            C1,
            torch.Generator().manual_seed(0),  # type: ignore[arg-type]
        )
        refinement.step()
        return refinement.halves[0].volume(torch.full((16,), 10.0))

    original = half_map(images.data)
    second = (_halves(240) == 2).nonzero()[:, 0]
    # The other half's images are replaced by copies in another order: same statistics, other poses.
    coefficients = images.data.coefficients.clone()
    coefficients[second] = coefficients[second.flip(0)]
    changed = type(images.data)(
        images.data.plane, images.data.pixel_size_angstrom, coefficients, images.data.ctf
    )
    assert torch.allclose(half_map(changed), original, rtol=1e-3, atol=1e-3 * float(original.abs().max()))
    own = (_halves(240) == 1).nonzero()[:, 0]
    coefficients = images.data.coefficients.clone()
    coefficients[own[:75]] = 0
    changed = type(images.data)(
        images.data.plane, images.data.pixel_size_angstrom, coefficients, images.data.ctf
    )
    assert not torch.allclose(half_map(changed), original, rtol=1e-3, atol=1e-3 * float(original.abs().max()))


def test_an_empty_half_is_refused(blob_set: tuple[BlobPhantom, BlobSet]) -> None:
    phantom, images = blob_set
    with pytest.raises(ValueError, match="half set 2"):
        Refinement(
            images.data, torch.ones(240, dtype=torch.long), phantom.volume(), RefinementSettings(), C1,
            torch.Generator().manual_seed(0),
        )  # fmt: skip


def test_a_map_of_unknown_units_is_scaled_to_the_images(blob_set: tuple[BlobPhantom, BlobSet]) -> None:
    phantom, images = blob_set
    volume, grid = phantom.volume(), ReconstructionGrid(15)
    scaled = match_scale(137.0 * volume, images.data, grid)
    assert float(scaled.norm() / volume.norm()) == pytest.approx(1.0, abs=0.3)
    with pytest.raises(ValueError, match="contrast"):
        match_scale(-volume, images.data, grid)


def test_online_em_finds_the_structure_from_nothing(blob_set: tuple[BlobPhantom, BlobSet]) -> None:
    _, images = blob_set
    settings = OnlineEmSettings(
        n_iterations=40, last_shell=8.0, mask_diameter_fraction=0.8, fine_grid_from_shell=99.0
    )
    evidence, errors = [], []
    for seed in range(2):
        em = OnlineEm(images.data, settings, torch.Generator().manual_seed(seed))
        while em.iteration < settings.n_iterations:
            progress = em.step()
        result = em.result()
        settings_local = RefinementSettings(
            n_global=1, n_local=0, initial_resolution_angstrom=30.0, grid_order=1
        )
        start = em.full_size_volume()
        refinement = Refinement(
            images.data, _halves(240), start, settings_local, C1, torch.Generator().manual_seed(0)
        )
        refinement.step()
        error = pose_errors_deg(refinement.result().rotations, images.rotations)
        evidence.append(result.log_evidence)
        errors.append(float(error.median()))
        assert progress.inverse_temperature == 1.0
    # The likelier start is the right one: that is what the ranking stands on.
    best = max(range(2), key=lambda i: evidence[i])
    assert errors[best] < 10.0, (evidence, errors)


@pytest.mark.parametrize("name", ["C3", "D2"])
def test_symmetry_axes_are_found_and_snapped(name: str) -> None:
    generator = torch.Generator().manual_seed(5)
    group = symmetry_matrices(name).float()
    phantom = BlobPhantom.random(32, generator, n_blobs=6, group=group, sigma_fraction=0.05)
    turn = random_rotations(1, generator)[0]
    moved = turn_volume(
        turn_volume(phantom.volume(), turn, torch.zeros(3)), torch.eye(3), torch.tensor([1.0, -1.5, 0.5])
    )
    assert symmetry_score(moved, group, max_shell=8.0) < 0.8
    fit = find_frames(moved, group, max_shell=9.0, n_best=1, n_refined=3)[0]
    assert fit.score > 0.97
    assert symmetry_score(fit.symmetrised, group, max_shell=8.0) > 0.98
    assert float(fit.fsc[1:9].min()) > 0.97


def test_of_overlapping_users_of_fast_products_the_last_restores_the_precision():
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    first, second = fast_products(), fast_products()
    with contextlib.ExitStack() as outer:
        outer.enter_context(first)
        with contextlib.ExitStack() as inner:
            inner.enter_context(second)
            # Left in the order of entry, as two threads may.
            moved = outer.pop_all()
            moved.close()
            assert matmul.fp32_precision == "bf16"
        assert matmul.fp32_precision == before
