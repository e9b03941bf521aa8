"""Blob picking on synthetic micrographs."""

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from models.picking.blob import BlobSettings, find_contamination, flatten_background, pick_blobs

PIXEL = 4.0
DIAMETER = 120.0


def place(n_pixels, n_particles, generator, min_distance):
    """Return centres (y, x) that keep a distance from each other and the edge."""
    centres = []
    while len(centres) < n_particles:
        candidate = generator.uniform(30, n_pixels - 30, 2)
        if all(np.hypot(*(candidate - c)) > min_distance for c in centres):
            centres.append(candidate)
    return np.array(centres)


def draw_micrograph(centres, n=384, *, signal=0.9, diameter=DIAMETER, seed=0):
    """Dark balls on noise and a gradient."""
    axis = torch.arange(n, dtype=torch.float32)
    radius = 0.5 * diameter / PIXEL
    image = torch.randn(n, n, generator=torch.Generator().manual_seed(seed))
    for y, x in centres:
        r2 = (axis[:, None] - y) ** 2 + (axis[None, :] - x) ** 2
        image -= signal * (1 - r2 / radius**2).clamp(min=0).sqrt()
    return 100.0 + 3.0 * image + axis[None, :] * 0.05


def settings(**more):
    return BlobSettings(
        **{
            "min_diameter_angstrom": 0.85 * DIAMETER,
            "max_diameter_angstrom": 1.15 * DIAMETER,
            "border_angstrom": 0.5 * DIAMETER,
            **more,
        }
    )


def match(found, truth, tolerance):
    distance = np.linalg.norm(found[:, None] - truth[None], axis=-1)
    rows, columns = linear_sum_assignment(np.where(distance <= tolerance, distance, 1e6))
    good = distance[rows, columns] <= tolerance
    return rows[good], columns[good]


def test_blobs_are_found_with_high_precision_and_recall():
    truth = place(384, 45, np.random.default_rng(0), 36)
    picks = pick_blobs(draw_micrograph(truth), PIXEL, settings())
    found, _ = match(picks.centres_yx_px, truth, 0.35 * DIAMETER / PIXEL)
    precision, recall = len(found) / len(picks.scores), len(found) / len(truth)
    assert 2 * precision * recall / (precision + recall) > 0.9


def test_picks_are_centred_to_a_fraction_of_the_binned_pixel():
    truth = place(384, 20, np.random.default_rng(1), 45)
    picks = pick_blobs(draw_micrograph(truth, signal=3.0), PIXEL, settings())
    found, of = match(picks.centres_yx_px, truth, 0.35 * DIAMETER / PIXEL)
    error = picks.centres_yx_px[found] - truth[of]
    assert len(found) == 20
    assert np.abs(error.mean(axis=0)).max() < 0.3
    assert np.sqrt((error**2).mean()) < 0.8


def test_pure_noise_gives_next_to_no_picks():
    empty = np.zeros((0, 2))
    counts = [len(pick_blobs(draw_micrograph(empty, seed=s), PIXEL, settings()).scores) for s in range(5)]
    assert np.mean(counts) < 3.0


def test_scores_do_not_depend_on_brightness_or_contrast_of_the_image():
    truth = place(384, 15, np.random.default_rng(2), 45)
    image = draw_micrograph(truth)
    first = pick_blobs(image, PIXEL, settings())
    second = pick_blobs(0.01 * image - 5.0, PIXEL, settings())
    assert len(first.scores) == len(second.scores)
    assert second.scores == pytest.approx(first.scores, rel=0.02)


def test_bright_blobs_are_not_particles():
    truth = place(384, 15, np.random.default_rng(3), 60)
    picks = pick_blobs(200.0 - draw_micrograph(truth, signal=1.5), PIXEL, settings())
    found, _ = match(picks.centres_yx_px, truth, 0.35 * DIAMETER / PIXEL) if len(picks.scores) else ([], [])
    assert len(found) == 0


def test_an_ice_crystal_is_masked_and_not_picked():
    truth = place(384, 15, np.random.default_rng(4), 45)
    image = draw_micrograph(truth)
    image[150:230, 140:220] -= 60.0
    picks = pick_blobs(image, PIXEL, settings())
    inside = (np.abs(picks.centres_yx_px - [190, 180]) < 40).all(axis=1)
    assert picks.excluded_fraction > 0.02
    assert not inside.any()


def test_an_even_field_of_particles_is_not_contamination():
    truth = place(384, 40, np.random.default_rng(5), 36)
    flat = flatten_background(-draw_micrograph(truth), DIAMETER / PIXEL)
    assert float(find_contamination(flat, DIAMETER / PIXEL, 6.0).float().mean()) < 0.02


def test_picks_keep_the_minimum_distance_and_the_maximum_number():
    truth = place(384, 30, np.random.default_rng(6), 40)
    picks = pick_blobs(draw_micrograph(truth), PIXEL, settings(min_distance_angstrom=200.0, max_picks=7))
    distance = np.linalg.norm(picks.centres_yx_px[:, None] - picks.centres_yx_px[None], axis=-1)
    assert len(picks.scores) == 7
    assert distance[np.triu_indices(7, 1)].min() >= 200.0 / PIXEL - 2
    assert (np.diff(picks.scores) <= 0).all()


def test_a_diameter_of_a_few_pixels_is_refused():
    with pytest.raises(ValueError, match="min_diameter_angstrom"):
        pick_blobs(torch.randn(64, 64), 10.0, settings(min_diameter_angstrom=30.0))
