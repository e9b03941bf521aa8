"""Blob picking on synthetic micrographs."""

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from scipy.stats import norm

from models.picking.blob import BlobSettings, pick_blobs

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


@pytest.mark.parametrize("max_aspect_ratio", [1.0, 1.5])
def test_noise_gives_as_many_picks_as_the_scores_say(max_aspect_ratio):
    """Q(z) picks above z per squared diameter: 29 expected above 2.5, a Poisson count."""
    noise = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(1))
    lowest = settings(threshold=2.5, border_angstrom=0.0, max_aspect_ratio=max_aspect_ratio)
    found = len(pick_blobs(noise, 2.0 * PIXEL, lowest).scores)
    expected = (1024 * 2.0 * PIXEL / DIAMETER) ** 2 * norm.sf(2.5)
    assert 0.45 * expected < found < 1.6 * expected


def test_the_default_threshold_leaves_a_few_picks_of_noise_a_micrograph():
    empty = np.zeros((0, 2))
    counts = [len(pick_blobs(draw_micrograph(empty, seed=s), PIXEL, settings()).scores) for s in range(5)]
    # 164 particle-sized areas less their borders: 0.7 expected each
    assert np.mean(counts) <= 2.0


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


def test_elongated_particles_are_found_once_and_in_their_middle():
    generator = np.random.default_rng(8)
    truth = place(384, 18, generator, 60)
    axis = torch.arange(384, dtype=torch.float32)
    image = torch.randn(384, 384, generator=torch.Generator().manual_seed(8))
    for y, x in truth:
        angle = generator.uniform(0, np.pi)
        dy, dx = axis[:, None] - y, axis[None, :] - x
        along, across = dx * np.cos(angle) + dy * np.sin(angle), dy * np.cos(angle) - dx * np.sin(angle)
        image -= 0.55 * ((along.abs() < 25) & (across.abs() < 8)).float()
    tolerance = 0.35 * DIAMETER / PIXEL
    f1 = {}
    for ratio in (1.0, 3.0):
        picks = pick_blobs(image, PIXEL, settings(max_aspect_ratio=ratio, min_distance_angstrom=120.0))
        found, _ = match(picks.centres_yx_px, truth, tolerance)
        f1[ratio] = 2 * len(found) / (len(picks.scores) + len(truth))
    assert f1[3.0] > 0.9
    assert f1[3.0] > f1[1.0]


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


@pytest.mark.parametrize("more", [{"max_aspect_ratio": 0.5}, {"max_diameter_angstrom": 50.0}])
def test_shapes_that_no_particle_has_are_refused(more):
    with pytest.raises(ValueError, match=next(iter(more))):
        settings(**more)
