"""Slicing against closed-form projections, its adjoint, and reconstruction from true poses."""

from __future__ import annotations

import pytest
import torch

from models.fourier.rotations import euler_to_matrix
from models.reconstruction.blobs import BlobPhantom, simulate_blob_images
from models.reconstruction.grids import (
    asymmetric_unit,
    grid_spacing_deg,
    healpix_directions,
    random_rotations,
    rotation_angle_deg,
    rotation_vector_to_matrix,
    so3_grid,
)
from models.reconstruction.projector import (
    HalfPlane,
    cube_to_volume,
    extract_slices,
    insert_slices,
    read_cube,
    slice_points,
    sums_to_volume,
    volume_to_cube,
)
from models.reconstruction.scoring import weighted_images
from models.reconstruction.sufficient import ReconstructionGrid, accumulate_posed, correlate_shells, solve_map


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_insertion_is_the_adjoint_of_slicing() -> None:
    g = _generator()
    plane, rotations = HalfPlane.of(32, 13), random_rotations(15, g)
    grid = ReconstructionGrid(13)
    cube = torch.randn(grid.zeros(3).shape, generator=g)
    weights = torch.randn((3, 15, len(plane)), generator=g)
    forward = (read_cube(cube, slice_points(rotations, plane)) * weights).sum(dtype=torch.float64)
    backward = (cube * insert_slices(grid.zeros(3), weights, rotations, plane)).sum(dtype=torch.float64)
    scale = weights.norm() * cube.norm()
    assert abs(float(forward - backward)) / float(scale) < 1e-5


def test_slices_equal_closed_form_projections() -> None:
    g = _generator(1)
    phantom = BlobPhantom.random(48, g, sigma_fraction=0.04)
    plane, rotations = HalfPlane.of(48, 20), random_rotations(12, g)
    exact = phantom.slices(rotations, plane)
    sliced = extract_slices(volume_to_cube(phantom.volume(), 20), rotations, plane)
    assert float((sliced - exact).norm() / exact.norm()) < 0.03


def test_projection_along_the_beam_at_identity_is_the_sum_over_z() -> None:
    phantom = BlobPhantom.random(32, _generator(2), sigma_fraction=0.06)
    volume, plane = phantom.volume(), HalfPlane.of(32, 12)
    sliced = extract_slices(volume_to_cube(volume, 12), torch.eye(3)[None], plane)
    summed = plane.coefficients(volume.sum(0)[None])
    # Points on the grid itself are where the gridding correction is furthest off (it is right on average).
    assert float((sliced - summed).norm() / summed.norm()) < 0.05


def test_an_in_plane_turn_moves_the_slice_as_relion_says() -> None:
    phantom = BlobPhantom.random(32, _generator(3), sigma_fraction=0.06)
    plane = HalfPlane.of(32, 10)
    turned = extract_slices(
        volume_to_cube(phantom.volume(), 10), euler_to_matrix(torch.tensor([[0.0, 0.0, 90.0]])), plane
    )
    # At psi = 90° a point (x, y) of the specimen appears at R (x, y) = (y, −x) in the image (RELION's A matrix).
    image = phantom.volume().sum(0)
    shown = torch.zeros_like(image)
    index = torch.arange(1, 32)
    rows, columns = torch.meshgrid(index, index, indexing="ij")
    shown[32 - columns, rows] = image[rows, columns]
    expected = plane.coefficients(shown[None])
    assert float((turned - expected).norm() / expected.norm()) < 0.05


def test_cube_and_volume_invert_each_other() -> None:
    volume = BlobPhantom.random(32, _generator(4), sigma_fraction=0.06).volume()
    again = cube_to_volume(volume_to_cube(volume, 15), 32)
    assert float((again - volume).norm() / volume.norm()) < 0.02


def test_reconstruction_from_true_poses_agrees_with_the_truth() -> None:
    g = _generator(5)
    phantom = BlobPhantom.random(48, g)
    images = simulate_blob_images(phantom, 500, g, snr=0.5)
    grid = ReconstructionGrid(23)
    data = images.data
    noise = (1.0 / data.mean_power())[data.plane.shell]
    weighted, weights = weighted_images(data, noise)
    weighted = weighted * data.plane.phases(images.origin_xy_px)
    sums = accumulate_posed(grid.zeros(), weighted, weights, images.rotations, data.plane, torch.eye(3)[None])
    volume = sums_to_volume(solve_map(sums, torch.full((grid.n_shells,), 20.0), grid), 48)
    fsc = correlate_shells(volume_to_cube(volume, 23), volume_to_cube(phantom.volume(), 23), grid)
    assert float(fsc[1:12].min()) > 0.9
    scale = float((volume * phantom.volume()).sum() / phantom.volume().square().sum())
    assert scale == pytest.approx(1.0, abs=0.15)


def test_a_box_must_be_even_and_the_radius_below_nyquist() -> None:
    with pytest.raises(ValueError, match="box_size_px"):
        HalfPlane.of(33, 10)
    with pytest.raises(ValueError, match="max_shell"):
        HalfPlane.of(32, 16)


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_healpix_centres_are_unit_vectors_that_sum_to_zero(order: int) -> None:
    directions = healpix_directions(order)
    assert directions.shape == (12 * 4**order, 3)
    assert torch.allclose(directions.norm(dim=1), torch.ones(len(directions)), atol=1e-6)
    assert float(directions.mean(0).abs().max()) < 1e-6
    second_moment = directions.T @ directions / len(directions)
    # HEALPix is isotropic to second order only in the limit: the deviation falls as the pixel area.
    assert torch.allclose(second_moment, torch.eye(3) / 3, atol=0.04 / 4**order)


def test_every_rotation_has_a_neighbour_on_the_grid_within_its_spacing() -> None:
    grid, any_rotations = so3_grid(1), random_rotations(200, _generator(6))
    nearest = rotation_angle_deg(any_rotations[:, None], grid[None]).min(1).values
    assert float(nearest.max()) < grid_spacing_deg(1)


def test_the_asymmetric_unit_holds_one_of_each_set_of_equivalent_views() -> None:
    group = torch.stack([euler_to_matrix(torch.tensor([90.0 * i, 0.0, 0.0])) for i in range(4)])
    grid = so3_grid(2) @ random_rotations(1, _generator(7))[0]
    unit = asymmetric_unit(grid, group)
    assert len(grid) / 4 == pytest.approx(len(unit), rel=0.1)
    covered = (unit[:, None] @ group[None]).reshape(-1, 3, 3)
    nearest = rotation_angle_deg(grid[::40, None], covered[None]).min(1).values
    assert float(nearest.max()) < grid_spacing_deg(2)


def test_rotation_vectors_give_their_angle() -> None:
    vector = torch.tensor([[0.0, 0.0, 0.1], [0.3, -0.2, 0.1], [0.0, 0.0, 0.0]])
    angle = rotation_angle_deg(rotation_vector_to_matrix(vector), torch.eye(3))
    assert torch.allclose(angle, torch.rad2deg(vector.norm(dim=1)), atol=0.05)
