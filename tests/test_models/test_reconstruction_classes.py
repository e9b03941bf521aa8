"""Class averages: the flat projector against closed forms; views told apart, averages like the truth, bad input."""

from __future__ import annotations

import pytest
import torch

from models.fourier.rotations import euler_to_matrix
from models.reconstruction.blobs import BlobPhantom, BlobSet, simulate_blob_images
from models.reconstruction.classification import Classes, ClassificationSettings, classify
from models.reconstruction.grids import random_rotations
from models.reconstruction.particle_data import ParticleData
from models.reconstruction.planes import (
    images_to_planes,
    insert_planes,
    read_planes,
    sums_to_images,
    turned_points,
)
from models.reconstruction.projector import HalfPlane, cube_half_side

BOX, N, N_VIEWS = 32, 240, 3


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


PHANTOM = BlobPhantom.random(BOX, gen(1), n_blobs=9, sigma_fraction=0.045)
VIEWS = random_rotations(N_VIEWS, gen(12))


def in_plane(psi_deg: torch.Tensor) -> torch.Tensor:
    zero = torch.zeros_like(psi_deg)
    return euler_to_matrix(torch.stack((zero, zero, psi_deg), dim=-1))


@pytest.fixture(scope="module")
def views() -> tuple[BlobSet, torch.Tensor, torch.Tensor]:
    """Images of three views, turned at random in the plane; with their view and angle."""
    own = torch.arange(N) % N_VIEWS
    psi = 360.0 * torch.rand(N, generator=gen(2))
    rotations = in_plane(psi) @ VIEWS[own]
    images = simulate_blob_images(PHANTOM, N, gen(3), snr=0.3, pixel_size_angstrom=4.0, rotations=rotations)
    return images, own, psi


@pytest.fixture(scope="module")
def classes(views) -> Classes:
    settings = ClassificationSettings(n_classes=6, n_iterations=16, max_shell=12.0)
    return classify(views[0].data, settings, gen(5))


def test_a_plane_read_at_a_turn_is_the_transform_of_the_turned_view():
    plane = HalfPlane.of(BOX, 12)
    upright = PHANTOM.slices(VIEWS[:1], plane)
    planes = images_to_planes(plane.images(upright), 12.0)
    for psi in (0.0, 30.0, 137.0):
        truth = PHANTOM.slices(in_plane(torch.tensor([psi])) @ VIEWS[:1], plane)
        points = turned_points(torch.deg2rad(torch.tensor([[psi]])), plane)
        read = read_planes(planes, points)[0, :, 0]
        error = (torch.complex(read[0], read[1]) - truth[0]).abs().norm() / truth.abs().norm()
        assert float(error) < 0.03


def test_insertion_is_the_adjoint_of_reading():
    plane, side = HalfPlane.of(16, 6), 2 * cube_half_side(6.0) + 1
    a = torch.randn((2, 2, side, side), generator=gen(1))
    points = turned_points(torch.rand((2, 5), generator=gen(2)), plane)
    b = torch.randn((2, 2, 5, len(plane)), generator=gen(3))
    left = (read_planes(a, points) * b).sum()
    right = (a * insert_planes(torch.zeros_like(a), b, points)).sum()
    assert float(left) == pytest.approx(float(right), rel=1e-4)


def test_images_survive_the_way_to_planes_and_back_up_to_the_radius():
    images = torch.randn((3, 24, 24), generator=gen(4))
    smooth = HalfPlane.of(24, 8)
    low = smooth.images(smooth.coefficients(images))
    # Reading multiplies by the window, insertion divides: planes hold both corrections.
    back = sums_to_images(images_to_planes(low, 11.0), 24)
    x = torch.sinc((torch.arange(24) - 12) / 48).square()
    window = x[:, None] * x[None, :]
    middle = slice(6, 18)
    error = (back * window**2 - low)[:, middle, middle]
    assert float(error.norm() / low[:, middle, middle].norm()) < 0.05


def test_views_are_told_apart(views, classes):
    _, own, _ = views
    pure = sum(
        int(torch.bincount(own[classes.assignment == c], minlength=N_VIEWS).max())
        for c in range(6)
        if bool((classes.assignment == c).any())
    )
    assert pure / N > 0.93
    assert classes.populations.sum() == N
    assert classes.populations.tolist() == sorted(classes.populations.tolist(), reverse=True)
    assert torch.equal(torch.bincount(classes.assignment, minlength=6), classes.populations)


def test_angles_within_a_class_are_those_of_the_truth_up_to_one_offset(views, classes):
    _, own, psi = views
    largest = classes.assignment == 0
    view = int(torch.bincount(own[largest], minlength=N_VIEWS).argmax())
    rows = largest & (own == view)
    difference = torch.deg2rad(classes.psi_deg[rows] - psi[rows])
    mean = torch.atan2(difference.sin().mean(), difference.cos().mean())
    error = torch.rad2deg(torch.atan2((difference - mean).sin(), (difference - mean).cos()).abs())
    assert float(error.median()) < 8.0


def peak_correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest normalised cross-correlation of two images over all shifts."""
    a, b = a - a.mean(), b - b.mean()
    product = torch.fft.irfft2(torch.fft.rfft2(a) * torch.fft.rfft2(b).conj(), s=a.shape)
    return float(product.max() / (a.norm() * b.norm()))


def test_the_largest_average_looks_like_its_view(views, classes):
    _, own, _ = views
    view = int(torch.bincount(own[classes.assignment == 0], minlength=N_VIEWS).argmax())
    plane = HalfPlane.of(BOX, 8)
    average = plane.images(plane.coefficients(classes.images[:1]))[0]
    psi = torch.arange(0.0, 360.0, 5.0)
    turned = plane.images(PHANTOM.slices(in_plane(psi) @ VIEWS[view], plane))
    assert max(peak_correlation(average, image) for image in turned) > 0.9


def test_projections_of_the_truth_may_seed_the_classes(views):
    images, own, _ = views
    plane = images.data.plane
    references = plane.images(PHANTOM.slices(VIEWS, plane))
    settings = ClassificationSettings(n_classes=3, n_iterations=8, max_shell=12.0)
    found = classify(images.data, settings, gen(6), references=references)
    table = torch.zeros((3, 3))
    table.index_put_((found.assignment, own), torch.ones(N), accumulate=True)
    assert float(table.max(0).values.sum()) / N > 0.9


def test_feature_clusters_may_seed_the_classes(views):
    images, own, _ = views
    settings = ClassificationSettings(n_classes=3, n_iterations=4, max_shell=10.0)
    found = classify(images.data, settings, gen(7), labels=own)
    assert found.images.shape == (3, BOX, BOX)
    assert bool(torch.isfinite(found.images).all())


def test_noise_gains_less_from_its_classes_than_particles_do(views, classes):
    plane = HalfPlane.of(BOX, BOX // 2 - 1)
    noise = torch.view_as_complex(torch.randn((N, len(plane), 2), generator=gen(8)))
    data = ParticleData(plane, 4.0, noise, views[0].data.ctf)
    found = classify(data, ClassificationSettings(n_classes=6, n_iterations=16, max_shell=12.0), gen(9))
    assert float(found.gains.median()) < 0.5 * float(classes.gains.median())


def test_more_classes_than_images_can_fill_are_refused(views):
    with pytest.raises(ValueError, match="n_classes: 130"):
        classify(views[0].data, ClassificationSettings(n_classes=130), gen())
