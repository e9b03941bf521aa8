"""Poses: the loss of eq. 11 and the errors of eq. 13 by hand, symmetric targets, and a network that learns."""

from __future__ import annotations

import math

import pytest
import torch

from models.cryogem.pose_map import resolve_poses
from models.cryogem.pose_network import (
    PosedParticles,
    PoseNetwork,
    PoseTraining,
    predict_poses,
    train_pose_network,
    turn_particles,
)
from models.cryogem.poses import (
    nearest_equivalents,
    pose_loss,
    rotation_errors_deg,
    rotation_from_six,
    view_errors_deg,
)
from models.fourier.point_groups import symmetry_matrices
from models.fourier.rotations import euler_to_matrix
from models.reconstruction.grids import random_rotations
from models.reconstruction.particle_data import particle_data
from models.simulation.projection import Projector

ALONE = symmetry_matrices("C1")


def euler(*angles: float) -> torch.Tensor:
    return euler_to_matrix(torch.tensor([angles], dtype=torch.float64)).float()


def particle(size: int = 32) -> torch.Tensor:
    """Return an object of four balls about its centre of mass, of no symmetry."""
    axis = torch.arange(size).float() - size // 2
    volume = torch.zeros(size, size, size)
    weights = torch.tensor([1.0, 2.0, 0.7, 1.4])
    places = torch.tensor([[4.0, 0.0, 0.0], [-3.0, 4.0, 1.0], [0.0, -4.0, 3.0], [1.0, 1.0, -6.0]])
    places = places - (weights[:, None] * places).sum(0) / weights.sum()
    for (z, y, x), weight in zip(places.tolist(), weights.tolist(), strict=True):
        square = (axis - z)[:, None, None] ** 2 + (axis - y)[None, :, None] ** 2 + (axis - x) ** 2
        volume += weight * torch.exp(-0.5 * square / 1.5**2)
    return volume


def posed(n: int, seed: int, *, size: int = 32, noise: float = 0.0) -> PosedParticles:
    generator = torch.Generator().manual_seed(seed)
    rotations = random_rotations(n, generator)
    shifts = 0.1 * (torch.rand(n, 2, generator=generator) - 0.5)
    images = Projector(particle(size), 1.0).project(rotations, shifts * size)
    images = images / images.std()
    return PosedParticles(
        images=images + noise * torch.randn(images.shape, generator=generator),
        rotations=rotations,
        shifts=shifts,
    )


def test_six_numbers_become_a_rotation():
    found = rotation_from_six(torch.randn(50, 6, generator=torch.Generator().manual_seed(1)))
    assert torch.allclose(found @ found.mT, torch.eye(3).expand(50, 3, 3), atol=1e-5)
    assert torch.allclose(torch.linalg.det(found), torch.ones(50), atol=1e-5)
    wanted = euler(10, 50, -70)
    assert torch.allclose(rotation_from_six(3.0 * wanted[:, :2].reshape(1, 6)), wanted, atol=1e-5)


def test_loss_is_equation_11():
    truth, turned = torch.eye(3)[None], euler(90, 0, 0)
    shift, far = torch.zeros(1, 2), torch.tensor([[0.1, -0.3]])
    # a quarter turn about z: ‖R - R̂‖² = 6 - 2 tr(R) = 4; |0.1| + |-0.3| over two
    assert float(pose_loss(turned, far, truth, shift, ALONE)) == pytest.approx(4 / 9 + 0.2, abs=1e-6)
    batch = pose_loss(
        torch.cat((turned, truth)), torch.cat((far, shift)), truth.repeat(2, 1, 1), shift.repeat(2, 1), ALONE
    )
    assert float(batch) == pytest.approx(0.5 * (4 / 9 + 0.2), abs=1e-6)


@pytest.mark.parametrize("symmetry", ["C4", "D2", "O"])
def test_equivalent_poses_cost_nothing(symmetry):
    group = symmetry_matrices(symmetry)
    truth = random_rotations(5, torch.Generator().manual_seed(3))
    shift = torch.zeros(5, 2)
    for element in group:
        assert float(pose_loss(truth @ element, shift, truth, shift, group)) == pytest.approx(0.0, abs=1e-5)
    other = truth @ group[-1]
    assert float(pose_loss(other, shift, truth, shift, ALONE)) > 0.3


def test_the_loss_pulls_to_the_nearest_equivalent():
    group = symmetry_matrices("C2")
    truth = torch.eye(3)[None]
    six = euler(170, 0, 0)[:, :2].reshape(1, 6).clone().requires_grad_()
    loss = pose_loss(rotation_from_six(six), torch.zeros(1, 2), truth, torch.zeros(1, 2), group)
    loss.backward()
    moved = rotation_from_six((six - 0.1 * six.grad).detach())
    # towards 180°, which C2 has, and away from 0°
    assert float(rotation_errors_deg(moved, euler(180, 0, 0), ALONE)) < 10.0 - 1e-3
    nearest = nearest_equivalents(euler(170, 0, 0), truth, group)
    assert torch.allclose(nearest, euler(180, 0, 0), atol=1e-5)


def test_view_error_is_the_angle_between_views():
    truth = euler(20, 40, 60)
    assert float(view_errors_deg(euler(20, 40, 150), truth, ALONE)) == pytest.approx(0.0, abs=0.05)
    assert float(rotation_errors_deg(euler(20, 40, 150), truth, ALONE)) == pytest.approx(90.0, abs=0.05)
    assert float(view_errors_deg(euler(20, 70, 60), truth, ALONE)) == pytest.approx(30.0, abs=0.05)
    # half a turn about the symmetry axis is another name for the same view
    assert float(view_errors_deg(euler(200, 40, 60), truth, symmetry_matrices("C2"))) == pytest.approx(
        0.0, abs=0.05
    )


def test_guessing_is_90_degrees_off():
    a, b = (random_rotations(4000, torch.Generator().manual_seed(i)) for i in range(2))
    assert float(view_errors_deg(a, b, ALONE).mean()) == pytest.approx(90.0, abs=2.0)


@pytest.mark.parametrize("is_mirrored", [False, True])
@pytest.mark.parametrize("quarter_turns", [0, 1, 2, 3])
def test_a_turned_image_is_the_projection_at_the_turned_pose(quarter_turns, is_mirrored):
    particles = posed(6, 5)
    turned = turn_particles(particles, quarter_turns=quarter_turns, is_mirrored=is_mirrored)
    expected = Projector(particle(), 1.0).project(turned.rotations, turned.shifts * 32)
    for image, wanted in zip(turned.images, expected, strict=True):
        both = torch.stack((image[2:-2, 2:-2].reshape(-1), wanted[2:-2, 2:-2].reshape(-1)))
        assert float(torch.corrcoef(both)[0, 1]) > 0.999
    assert torch.allclose(torch.linalg.det(turned.rotations), torch.ones(6), atol=1e-5)


def train(n: int, epochs: int) -> tuple[PoseNetwork, list[float]]:
    settings = PoseTraining(epochs=epochs, width=8, learning_rate=3e-3, batch_size=32)
    losses: list[float] = []
    network = train_pose_network(
        posed(n, 1, size=16), ALONE, settings, on_epoch=lambda _epoch, loss: losses.append(loss)
    )
    return network, losses


def test_training_finds_centres():
    network, losses = train(600, 12)
    unseen = posed(100, 2, size=16)
    shifts = predict_poses(network, unseen.images)[1]
    assert losses[-1] < 0.9 * losses[0]
    error, spread = ((s - unseen.shifts).norm(dim=-1).mean() for s in (shifts, torch.zeros(100, 2)))
    assert float(error) < 0.8 * float(spread)


@pytest.mark.slow
def test_training_makes_views_of_unseen_particles_better_than_chance():
    network, _ = train(2000, 25)
    unseen = posed(200, 2, size=16)
    rotations = predict_poses(network, unseen.images)[0]
    assert float(view_errors_deg(rotations, unseen.rotations, ALONE).mean()) < 60.0


def test_the_same_seed_gives_the_same_network():
    settings = PoseTraining(epochs=1, width=8, batch_size=16, seed=4)
    particles = posed(32, 1, size=16)
    first, again = (train_pose_network(particles, ALONE, settings) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))


def test_true_poses_resolve_what_random_ones_do_not():
    particles = posed(200, 7, noise=1.0)
    data = particle_data(particles.images, 4.0, None)
    shifts = particles.shifts * 32
    good = resolve_poses(data, particles.rotations, shifts, ALONE, diameter_angstrom=80.0)
    bad = resolve_poses(
        data, random_rotations(200, torch.Generator().manual_seed(9)), shifts, ALONE, diameter_angstrom=80.0
    )
    assert good.resolution_angstrom is not None
    assert good.resolution_angstrom < 16.0
    assert good.resolution_px == pytest.approx(good.resolution_angstrom / 4.0)
    assert bad.resolution_angstrom is None or bad.resolution_angstrom > 1.5 * good.resolution_angstrom
    assert sum(bad.fsc[3:10]) < 0.5 * sum(good.fsc[3:10])
    wrong = resolve_poses(data, particles.rotations, -shifts, ALONE, diameter_angstrom=80.0)
    assert sum(wrong.fsc[3:12]) < sum(good.fsc[3:12])
    assert math.isfinite(sum(bad.fsc))


def test_wrong_sizes_are_refused():
    with pytest.raises(ValueError, match="box_px: 20"):
        PoseNetwork(20)
    with pytest.raises(ValueError, match="width: 12"):
        PoseTraining(width=12)
    bad = posed(2, 1, size=16)
    bad.images[0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="must be one or more, and finite"):
        train_pose_network(bad, ALONE, PoseTraining(epochs=1))
