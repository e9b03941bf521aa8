"""Resampling of volumes."""

from __future__ import annotations

import pytest
import torch

from models.fourier.volumes import resample_volume


def gaussian(
    box_px: int, pixel_size_angstrom: float, centre_angstrom: tuple[float, float, float]
) -> torch.Tensor:
    axis = (torch.arange(box_px) - box_px // 2) * pixel_size_angstrom
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    d2 = (z - centre_angstrom[0]) ** 2 + (y - centre_angstrom[1]) ** 2 + (x - centre_angstrom[2]) ** 2
    return torch.exp(-d2 / (2 * 8.0**2))


@pytest.mark.parametrize(
    ("old", "new"), [((64, 1.5), (40, 2.7)), ((40, 3.0), (64, 2.1)), ((50, 2.0), (50, 2.0))]
)
def test_a_blob_keeps_its_place_and_height_on_another_grid(
    old: tuple[int, float], new: tuple[int, float]
) -> None:
    centre = (6.0, -9.0, 3.0)
    moved = resample_volume(gaussian(*old, centre), old[1], new[1], new[0])
    assert torch.allclose(moved, gaussian(*new, centre), atol=0.03)
