"""Projections against analytic Gaussians."""

from __future__ import annotations

import math

import pytest
import torch

from models.fourier.rotations import euler_to_matrix
from models.simulation.projection import Projector

SIZE, PIXEL = 48, 2.0
CENTRES = ((10.0, -6.0, 4.0), (-8.0, 12.0, -14.0), (2.0, 9.0, 17.0))
SIGMAS = (6.0, 5.0, 7.0)


def gaussians_volume() -> torch.Tensor:
    line = (torch.arange(SIZE) - SIZE // 2) * PIXEL
    z, y, x = torch.meshgrid(line, line, line, indexing="ij")
    return sum(
        torch.exp(-((x - cx) ** 2 + (y - cy) ** 2 + (z - cz) ** 2) / (2 * s * s))
        for (cx, cy, cz), s in zip(CENTRES, SIGMAS, strict=True)
    )


def analytic(matrix: torch.Tensor, shift_yx_px: tuple[float, float]) -> torch.Tensor:
    line = (torch.arange(SIZE) - SIZE // 2) * PIXEL
    total = torch.zeros(SIZE, SIZE)
    for centre, s in zip(CENTRES, SIGMAS, strict=True):
        x, y, _ = (matrix @ torch.tensor(centre)).tolist()
        x, y = x + shift_yx_px[1] * PIXEL, y + shift_yx_px[0] * PIXEL
        spot = torch.exp(-((line[None] - x) ** 2 + (line[:, None] - y) ** 2) / (2 * s * s))
        total += math.sqrt(2 * math.pi) * s * spot
    return total


def test_projections_equal_analytic_ones_at_any_pose_and_shift():
    euler = torch.tensor([[0.0, 0.0, 0.0], [30.0, 50.0, -70.0], [120.0, 90.0, 10.0], [-40.0, 180.0, 33.0]])
    matrices = euler_to_matrix(euler)
    shifts = torch.tensor([[0.0, 0.0], [1.5, -2.25], [0.3, 0.7], [-2.0, 0.5]])
    found = Projector(gaussians_volume(), PIXEL).project(matrices, shifts)
    for image, matrix, shift in zip(found, matrices, shifts.tolist(), strict=True):
        expected = analytic(matrix, (shift[0], shift[1]))
        assert float((image - expected).norm() / expected.norm()) < 0.002


def test_projection_keeps_the_total():
    volume = gaussians_volume()
    image = Projector(volume, PIXEL).project(euler_to_matrix(torch.tensor([[10.0, 20.0, 30.0]])))
    assert float(image.sum()) == pytest.approx(float(volume.sum()) * PIXEL, rel=1e-3)


def test_odd_boxes_are_refused():
    with pytest.raises(ValueError, match="even"):
        Projector(torch.zeros(7, 7, 7), 1.0)
