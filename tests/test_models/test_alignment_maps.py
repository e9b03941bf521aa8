"""Alignment: a turned, shifted, mirrored, noisy map comes back; conventions; comparison with a truth."""

from __future__ import annotations

import math
import os
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import torch

from models.fourier.point_groups import symmetry_matrices
from models.fourier.rotations import euler_to_matrix
from models.reconstruction.alignment import (
    Alignment,
    align_volumes,
    apply_alignment,
    map_correlation,
    mirror,
    truth_resolution,
)
from models.reconstruction.grids import random_rotations, rotation_angle_deg
from models.reconstruction.masks import gaussian_lowpass, spherical_mask

DATA = Path(os.environ.get("ICESTREAM_TEST_DATA", Path(__file__).parents[2] / "../shared/data"))
SIZE, PIXEL = 48, 3.0


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sum_of_gaussians(centres_xyz: torch.Tensor, sigma_px: float, size: int = SIZE) -> torch.Tensor:
    axis = torch.arange(float(size)) - size // 2
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    volume = torch.zeros(size, size, size)
    for cx, cy, cz in centres_xyz.tolist():
        volume += torch.exp(-((x - cx) ** 2 + (y - cy) ** 2 + (z - cz) ** 2) / (2 * sigma_px**2))
    return volume


def molecule(
    seed: int, group: str = "C1", extent_px: tuple[float, float, float] = (4.0, 5.0, 6.0)
) -> torch.Tensor:
    centres = torch.randn((24, 3), generator=gen(seed)) * torch.tensor(extent_px)
    images = torch.einsum("gij,nj->gni", symmetry_matrices(group), centres).reshape(-1, 3)
    return sum_of_gaussians(images, 1.8)


def displaced(volume: torch.Tensor, seed: int, *, is_mirrored: bool, shift_px: float = 2.0) -> torch.Tensor:
    move = Alignment(
        rotation=random_rotations(1, gen(seed))[0],
        shift_zyx_px=shift_px * torch.randn(3, generator=gen(seed + 50)),
        is_mirrored=is_mirrored,
        correlation=1.0,
    )
    return apply_alignment(volume, move)


def test_a_point_goes_to_rotation_times_point_plus_shift():
    rotation = euler_to_matrix(torch.tensor([20.0, 50.0, -70.0]))
    point = torch.tensor([[6.0, -4.0, 9.0]])
    shift_zyx = torch.tensor([1.0, -2.0, 3.0])
    move = Alignment(rotation=rotation, shift_zyx_px=shift_zyx, is_mirrored=False, correlation=1.0)
    expected = sum_of_gaussians((rotation @ point[0])[None] + shift_zyx.flip(0), 2.0)
    torch.testing.assert_close(
        apply_alignment(sum_of_gaussians(point, 2.0), move), expected, atol=0.02, rtol=0
    )


@pytest.mark.parametrize("size", [16, 17])
def test_the_mirror_keeps_the_middle_voxel_and_undoes_itself(size):
    volume = torch.zeros(size, size, size)
    volume[size // 2, size // 2, size // 2] = 1.0
    assert torch.equal(mirror(volume), volume)
    noise = torch.randn(size, size, size, generator=gen())
    assert torch.equal(mirror(mirror(noise)), noise)


def test_an_identical_map_needs_no_move():
    volume = molecule(1)
    found = align_volumes(volume, volume, PIXEL, generator=gen(), try_mirror=False)
    assert float(rotation_angle_deg(found.rotation, torch.eye(3))) < 1.0
    assert float(found.shift_zyx_px.abs().max()) < 0.1
    assert found.correlation > 0.97
    assert found.correlation_other_hand is None


@pytest.mark.parametrize(
    ("seed", "is_mirrored", "noise"),
    [
        pytest.param(1, False, 0.0, marks=pytest.mark.slow),
        pytest.param(2, True, 0.0, marks=pytest.mark.slow),
        (3, True, 0.4),
    ],
)
def test_a_turned_shifted_and_mirrored_map_is_recovered(seed, is_mirrored, noise):
    reference = molecule(seed)
    clean = displaced(reference, seed, is_mirrored=is_mirrored)
    moving = clean + noise * torch.randn(clean.shape, generator=gen(seed))
    found = align_volumes(moving, reference, PIXEL, generator=gen(seed))
    assert found.is_mirrored is is_mirrored
    assert found.correlation > found.correlation_other_hand + 0.1
    back = apply_alignment(clean, found)
    ball = spherical_mask(SIZE, 20, 3)
    assert map_correlation(back, reference, ball, PIXEL, 10.0) > 0.99


@pytest.mark.slow
def test_a_d2_symmetric_map_is_recovered_up_to_its_own_symmetry():
    reference = molecule(4, "D2", (3.0, 5.0, 7.0))
    moving = displaced(reference, 4, is_mirrored=False)
    found = align_volumes(moving, reference, PIXEL, generator=gen(2), try_mirror=False)
    assert (
        map_correlation(apply_alignment(moving, found), reference, spherical_mask(SIZE, 20, 3), PIXEL, 10)
        > 0.99
    )


@pytest.mark.slow
def test_a_head_to_tail_near_symmetric_rod_is_put_the_right_way_round():
    rod = molecule(5, "D2", (2.0, 2.5, 8.0)) + 0.25 * molecule(6, "C1", (2.0, 2.5, 8.0))
    moving = displaced(rod, 9, is_mirrored=False)
    found = align_volumes(moving, rod, PIXEL, generator=gen(), try_mirror=False)
    assert map_correlation(apply_alignment(moving, found), rod, spherical_mask(SIZE, 20, 3), PIXEL, 10) > 0.99


@pytest.mark.slow
def test_two_unrelated_noise_maps_align_badly():
    a, b = (torch.randn(32, 32, 32, generator=gen(s)) for s in (1, 2))
    assert align_volumes(a, b, PIXEL, generator=gen(), try_mirror=False).correlation < 0.5


def test_correlation_of_maps_is_one_with_itself_whatever_scale_and_offset_and_zero_with_noise():
    volume = molecule(7)
    ball = spherical_mask(SIZE, 20, 3)
    assert map_correlation(volume, 3 * volume + 5, ball, PIXEL, 10) == pytest.approx(1.0, abs=1e-4)
    assert map_correlation(volume, -volume, ball, PIXEL, 10) == pytest.approx(-1.0, abs=1e-4)
    assert abs(map_correlation(volume, torch.randn(volume.shape, generator=gen()), ball, PIXEL, 10)) < 0.2


def test_resolution_against_the_truth_is_where_the_low_pass_meets_the_noise():
    truth = torch.randn(64, 64, 64, generator=gen(1))
    # FSC = 1 / √(1 + 1 / SNR(k)) with SNR = exp(−2 (k d)²); it is 0.5 where SNR = 1/3.
    smooth = gaussian_lowpass(truth, 2.0, 10.0)
    resolution, curve = truth_resolution(smooth + torch.randn(truth.shape, generator=gen(2)), truth, 2.0)
    assert curve.shape == (33,)
    assert resolution == pytest.approx(10.0 / math.sqrt(math.log(3.0) / 2), rel=0.05)
    assert truth_resolution(torch.randn(truth.shape, generator=gen(3)), truth, 2.0)[0] is None
    assert truth_resolution(truth, truth, 2.0)[0] == pytest.approx(4.0)


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match="equal cubes"):
        align_volumes(torch.zeros(8, 8, 8), torch.zeros(9, 9, 9), 1.0, generator=gen())


@pytest.mark.realdata
@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_a_noisy_real_ribosome_comes_back_with_its_hand(seed):
    path = DATA / "maps/clean70SRibosome_vol_65p.mrc.gz"
    if not path.exists():
        pytest.skip(f"needs {path}")
    with mrcfile.open(path) as file:
        reference = torch.from_numpy(np.array(file.data, dtype=np.float32))
    clean = displaced(reference, seed, is_mirrored=bool(seed))
    moving = clean + 2 * clean.std() * torch.randn(clean.shape, generator=gen(seed))
    found = align_volumes(moving, reference, 5.0, generator=gen(seed))
    assert found.is_mirrored is bool(seed)
    ball = spherical_mask(65, 27, 3)
    assert map_correlation(apply_alignment(clean, found), reference, ball, 5.0, 15) > 0.98
