"""Extraction: centring, normalisation, rescaling, borders."""

import numpy as np
import pytest
import torch

from models.picking.extract import (
    BoxSettings,
    background_mask,
    boxes_inside,
    extract_particles,
    normalise_background,
)


def dark_spot(shape, y, x, sigma=4.0, depth=50.0):
    rows = torch.arange(shape[0], dtype=torch.float32)[:, None]
    columns = torch.arange(shape[1], dtype=torch.float32)[None, :]
    spot = torch.exp(-((rows - y) ** 2 + (columns - x) ** 2) / (2 * sigma**2))
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return 200.0 - depth * spot + 0.5 * noise


def centre_of_mass(image):
    weights = (image - 3.0).clamp(min=0)
    axis = torch.arange(image.shape[-1], dtype=torch.float32)
    return float((weights.sum(1) * axis).sum() / weights.sum()), float(
        (weights.sum(0) * axis).sum() / weights.sum()
    )


BOXES = BoxSettings(box_size_px=64, extract_box_px=32, background_radius_px=12.0)


@pytest.mark.parametrize(("y", "x"), [(50.0, 70.0), (50.3, 70.8), (61.5, 40.49)])
@pytest.mark.parametrize("size", [64, 32])
def test_a_particle_anywhere_is_centred_in_its_box(y, x, size):
    boxes = BoxSettings(box_size_px=64, extract_box_px=size, background_radius_px=0.375 * size)
    (batch,) = extract_particles(dark_spot((120, 130), y, x), np.array([[y, x]]), boxes)
    assert centre_of_mass(batch[0]) == pytest.approx((size // 2, size // 2), abs=0.1)


def test_protein_comes_out_white_with_a_normalised_background():
    image = dark_spot((120, 130), 60, 60) + torch.linspace(0, 40, 130)
    (batch,) = extract_particles(image, np.array([[60.0, 60.0]]), BOXES)
    background = batch[0][background_mask(32, 12.0)]
    assert float(batch[0][16, 16]) > 10
    assert float(background.mean()) == pytest.approx(0.0, abs=1e-4)
    assert float(background.std(correction=0)) == pytest.approx(1.0, abs=1e-4)


def test_a_ramp_is_taken_away_with_the_background():
    axis = torch.arange(32, dtype=torch.float32)
    noise = torch.randn(1, 32, 32, generator=torch.Generator().manual_seed(1))
    ramp = 0.7 * axis[:, None] - 0.3 * axis[None, :] + 11.0
    mask = background_mask(32, 12.0)
    assert torch.allclose(
        normalise_background(noise + ramp, mask), normalise_background(noise, mask), atol=1e-3
    )


def test_order_and_number_are_those_of_the_centres_over_batches():
    centres = np.stack([np.full(200, 60.0), np.linspace(40, 80, 200)], axis=1)
    batches = list(extract_particles(dark_spot((120, 130), 60, 60), centres, BOXES))
    assert [len(b) for b in batches] == [128, 72]
    positions = [centre_of_mass(image)[1] for image in torch.cat(batches)[::40]]
    assert positions == sorted(positions, reverse=True)


def test_boxes_that_cross_the_border_are_told():
    centres = np.array([[32.0, 32.0], [31.4, 40.0], [88.0, 98.0], [88.6, 60.0]])
    assert boxes_inside(centres, (120, 130), 64).tolist() == [True, False, True, False]


def test_extraction_refuses_a_box_across_the_border():
    with pytest.raises(ValueError, match="boxes_inside"):
        list(extract_particles(torch.zeros(100, 100), np.array([[5.0, 50.0]]), BOXES))


@pytest.mark.parametrize(("box", "size"), [(63, 32), (64, 31), (32, 64), (4, 4)])
def test_odd_small_or_growing_boxes_are_refused(box, size):
    with pytest.raises(ValueError, match="box"):
        BoxSettings(box_size_px=box, extract_box_px=size, background_radius_px=10.0)


def test_a_circle_that_fills_the_box_is_refused():
    with pytest.raises(ValueError, match="no background"):
        background_mask(32, 30.0)
