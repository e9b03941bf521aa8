"""Preprocessing gives upstream's bytes."""

import numpy as np
import pytest

from models.cryo_ief.preprocess import (
    hartley_crop,
    normalise_grey_levels,
    preprocess_particles,
    replace_outliers,
    to_grey_levels,
)

_PLACES = ((0, 0), (10, 20), (111, 112), (200, 37), (223, 223))
# Byte sum and bytes at _PLACES, generated with upstream's code (facts/cryo_ief.md §2).
_VECTORS = {
    (320, "hartley"): (6296228, (156, 135, 63, 68, 61)),
    (301, "hartley"): (6412970, (147, 138, 67, 63, 172)),
    (256, "hartley"): (6544799, (179, 156, 132, 95, 179)),
    (224, "hartley"): (6429310, (179, 162, 135, 85, 71)),
    (160, "hartley"): (6280772, (178, 213, 210, 112, 60)),
    (320, "bicubic"): (6446818, (182, 136, 66, 74, 66)),
    (301, "bicubic"): (6556749, (181, 158, 78, 50, 155)),
    (256, "bicubic"): (6447250, (179, 161, 144, 93, 173)),
    (160, "bicubic"): (6283753, (178, 211, 214, 107, 59)),
}


def parity_image(n):
    i, j = np.meshgrid(np.arange(n), np.arange(n), indexing="ij")
    return (np.sin(0.11 * i) + np.cos(0.07 * j) + 0.5 * np.sin(0.9 * ((i * j) % 97))).astype(np.float32)


@pytest.mark.parametrize(("size", "mode"), _VECTORS)
def test_grey_levels_are_those_of_upstream(size, mode):
    grey = to_grey_levels(parity_image(size)[None], 224, mode)[0]
    total, values = _VECTORS[size, mode]
    assert int(grey.astype(int).sum()) == total
    assert tuple(int(grey[place]) for place in _PLACES) == values


@pytest.mark.parametrize("size", [320, 301, 256])
def test_float32_path_differs_by_at_most_one_grey_level_in_few_pixels(size):
    rng = np.random.default_rng(0)
    images = np.stack([parity_image(size), rng.normal(size=(size, size)).astype(np.float32)])
    exact = to_grey_levels(images, 224).astype(int)
    fast = to_grey_levels(images, 224, is_exact=False).astype(int)
    assert np.abs(exact - fast).max() <= 1
    assert (exact != fast).mean() < 2e-3


@pytest.mark.parametrize(("box", "size"), [(96, 64), (81, 64), (100, 64)])
def test_hartley_crop_equals_the_full_transforms_definition(box, size):
    image = np.random.default_rng(1).normal(size=(box, box))

    def transform(x):
        spectrum = np.fft.fftshift(np.fft.fft2(np.fft.ifftshift(x)))
        return spectrum.real - spectrum.imag

    low, high = int(box / 2 - size / 2), int(box / 2 + size / 2)
    expected = transform(transform(image)[low:high, low:high]) / size**2
    found = hartley_crop(image[None].astype(np.float32), size)[0]
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_normalised_input_has_upstream_values():
    particles = preprocess_particles(parity_image(320)[None], is_exact=True)
    assert particles.shape == (1, 1, 224, 224)
    assert particles.dtype == np.float32
    assert particles[0, 0, 0, 0] == pytest.approx(0.626110, abs=1e-6)
    assert particles[0, 0, 111, 112] == pytest.approx(-2.463746, abs=1e-6)


def test_batch_gives_what_single_images_give():
    images = np.random.default_rng(2).normal(size=(5, 90, 90)).astype(np.float32)
    whole = to_grey_levels(images, 64)
    parts = np.concatenate([to_grey_levels(image[None], 64) for image in images])
    np.testing.assert_array_equal(whole, parts)


def test_every_image_spans_all_grey_levels():
    grey = to_grey_levels(np.random.default_rng(3).normal(size=(4, 64, 64)).astype(np.float32), 64)
    assert (grey.min(axis=(1, 2)) == 0).all()
    assert (grey.max(axis=(1, 2)) == 255).all()


def test_constant_image_keeps_its_value_and_nan_image_becomes_zero():
    images = np.random.default_rng(4).normal(size=(3, 64, 64)).astype(np.float32)
    images[0] = 7.0
    images[1, 5, 5] = np.nan
    grey = to_grey_levels(images, 64)
    assert (grey[0] == 7).all()
    assert (grey[1] == 0).all()
    assert grey[2].max() == 255


def test_empty_batch_gives_an_empty_batch():
    assert preprocess_particles(np.zeros((0, 96, 96), np.float32), 64).shape == (0, 1, 64, 64)


def test_boxes_that_are_not_square_are_refused():
    with pytest.raises(ValueError, match="square"):
        to_grey_levels(np.zeros((2, 64, 66), np.float32))


def test_unknown_resize_mode_is_refused():
    with pytest.raises(ValueError, match="resize_mode"):
        to_grey_levels(np.zeros((1, 64, 64), np.float32), 32, "nearest")


def test_normalising_does_not_write_into_its_argument():
    grey = np.full((1, 4, 4), 128, np.uint8)
    normalise_grey_levels(grey, 0.5, 0.1)
    assert (grey == 128).all()


def noisy_with_defects():
    images = np.random.default_rng(3).normal(size=(4, 32, 32)).astype(np.float32)
    images[0, 3, 4] = 500.0
    images[1, 5, 6] = np.nan
    images[2, 7, 8] = -np.inf
    return images


def test_guard_replaces_hot_and_missing_pixels_by_the_median_and_nothing_else():
    images = noisy_with_defects()
    out = replace_outliers(images, 10.0)
    changed = np.argwhere(out != images)
    assert changed.tolist() == [[0, 3, 4], [1, 5, 6], [2, 7, 8]]
    assert out[1, 5, 6] == np.median(np.delete(images[1].ravel(), 5 * 32 + 6))
    assert np.isfinite(out).all()
    assert np.isnan(images[1, 5, 6])


def test_guard_keeps_contrast_that_one_hot_pixel_would_take():
    images = noisy_with_defects()
    bare, guarded = to_grey_levels(images, 32), to_grey_levels(images, 32, outlier_sigmas=10.0)
    assert np.median(np.abs(bare[0].astype(int) - np.median(bare[0]))) < 3
    assert bare[1].max() == 0
    for grey in guarded[:3]:
        assert np.median(np.abs(grey.astype(int) - np.median(grey))) > 20
    np.testing.assert_array_equal(bare[3], guarded[3])


def test_guard_leaves_what_it_cannot_judge():
    images = np.stack([np.full((8, 8), np.nan), np.full((8, 8), 3.0)]).astype(np.float32)
    images[1, 0, 0] = 900.0  # all others are equal: no deviation to measure by
    np.testing.assert_array_equal(replace_outliers(images, 5.0), images)


def test_guard_needs_a_positive_bound():
    with pytest.raises(ValueError, match=r"outlier_sigmas: 0\.0"):
        replace_outliers(np.zeros((1, 4, 4), np.float32), 0.0)
