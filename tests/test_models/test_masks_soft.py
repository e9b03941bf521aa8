"""Masks: geometry, edges, components and a robust automatic threshold."""

from __future__ import annotations

import math

import pytest
import torch

from models.reconstruction.masks import auto_threshold, gaussian_lowpass, mask_from_map, spherical_mask


def blobs(size: int, centres: list[tuple[float, float, float]], radii: list[float]) -> torch.Tensor:
    axis = torch.arange(float(size))
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    volume = torch.zeros(size, size, size)
    for (cz, cy, cx), radius in zip(centres, radii, strict=True):
        volume += (((z - cz) ** 2 + (y - cy) ** 2 + (x - cx) ** 2).sqrt() <= radius).float()
    return volume.clamp_max(1.0)


@pytest.mark.parametrize("size", [32, 33])
def test_a_sphere_is_one_inside_zero_outside_and_half_in_the_middle_of_its_edge(size):
    mask = spherical_mask(size, 8, 4)
    middle = size // 2
    line = mask[middle, middle, middle:]
    assert float(line[:9].min()) == 1.0
    assert float(line[10]) == pytest.approx(0.5)
    assert float(line[12:].max()) == 0.0
    assert float(spherical_mask(size, 8, 0).sum()) == pytest.approx(4 / 3 * math.pi * 512, rel=0.03)


def test_low_pass_leaves_one_over_e_at_its_resolution():
    x = torch.arange(64.0)
    wave = torch.cos(2 * math.pi * 8 * x / 64).expand(64, 64, 64)
    smooth = gaussian_lowpass(wave, 2.0, 16.0)
    assert float(smooth.abs().max()) == pytest.approx(math.exp(-1), rel=1e-4)


@pytest.mark.parametrize("noise_sd", [0.0, 0.5, 1.5])
def test_the_automatic_mask_holds_the_molecule_and_little_else_whatever_the_noise(noise_sd):
    truth = blobs(64, [(32, 28, 32), (34, 42, 30)], [10, 7])
    volume = truth + noise_sd * torch.randn(truth.shape, generator=torch.Generator().manual_seed(1))
    mask = mask_from_map(volume, 3.0, dilate_angstrom=3.0, soft_angstrom=9.0)
    assert float(mask.min()) >= 0.0
    assert float(mask.max()) == 1.0
    assert float(mask[truth > 0].mean()) > 0.97
    assert float(mask.sum()) < 3.5 * float(truth.sum())


def test_specks_away_from_the_molecule_are_left_out_but_a_second_large_part_stays():
    volume = blobs(64, [(20, 20, 20), (44, 44, 44), (20, 50, 20)], [8, 7, 2.0])
    mask = mask_from_map(volume, 3.0, lowpass_angstrom=6.0, threshold=0.3)
    assert float(mask[20, 20, 20]) == 1.0
    assert float(mask[44, 44, 44]) == 1.0
    assert float(mask[20, 50, 20]) == 0.0


def test_dilation_and_edge_have_the_asked_widths():
    volume = blobs(64, [(32, 32, 32)], [8])
    mask = mask_from_map(
        volume, 2.0, lowpass_angstrom=1.0, threshold=0.5, dilate_angstrom=6, soft_angstrom=10
    )
    line = mask[32, 32, 32:]
    assert float(line[11]) == 1.0
    assert float(line[17]) < 0.01
    assert 0.1 < float(line[13]) < 0.9


def test_the_threshold_does_not_depend_on_the_maps_scale_and_offsets_are_seen_as_solvent():
    volume = blobs(48, [(24, 24, 24)], [9]) + 0.1 * torch.randn(
        (48,) * 3, generator=torch.Generator().manual_seed(2)
    )
    smooth = gaussian_lowpass(volume, 3.0, 15.0)
    assert auto_threshold(smooth * 1000) == pytest.approx(1000 * auto_threshold(smooth), rel=1e-3)


def test_maps_that_cannot_be_masked_are_refused():
    with pytest.raises(ValueError, match="cube"):
        mask_from_map(torch.zeros(8, 8, 9), 1.0)
    with pytest.raises(ValueError, match="finite"):
        mask_from_map(torch.full((8, 8, 8), float("nan")), 1.0)
    with pytest.raises(ValueError, match="threshold"):
        mask_from_map(torch.zeros(8, 8, 8), 1.0, threshold=2.0)
