"""The augmentations do what their names say, and the whole batch's draw decides each row."""

import math
from dataclasses import replace

import pytest
import torch

from models.cryo_ief.augment import AugmentationConfig, apply_view, draw_view

STILL = AugmentationConfig(
    rotation_probability=0.0,
    crop_probability=0.0,
    jitter_probability=0.0,
    blur_probability=(0.0, 0.0),
    solarise_probability=(0.0, 0.0),
)


def random_grey(n=8, size=33):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, size, size), generator=generator).to(torch.uint8)


def view_of(grey, config, view=0, seed=3):
    return apply_view(grey, draw_view(len(grey), config, view, torch.Generator().manual_seed(seed)))


def spot(n, y, x, size=33):
    grey = torch.zeros((n, size, size), dtype=torch.uint8)
    grey[:, y - 1 : y + 2, x - 1 : x + 2] = 255
    return grey


def places(images):
    flat, size = images[:, 0].flatten(1).argmax(1), images.shape[-1]
    return torch.stack((flat // size - size // 2, flat % size - size // 2), dim=1).float()


def test_nothing_drawn_leaves_the_image():
    grey = random_grey()
    torch.testing.assert_close(view_of(grey, STILL), grey.float()[:, None] / 255, atol=1e-5, rtol=0)


def test_rotation_keeps_the_distance_from_the_centre_and_takes_every_angle():
    out = view_of(spot(300, 16, 25), replace(STILL, rotation_probability=1.0))
    found = places(out)
    assert float((found.norm(dim=1) - 9).abs().max()) < 1.6
    angles = torch.atan2(found[:, 0], found[:, 1])
    assert float(angles.min()) < -2.5
    assert float(angles.max()) > 2.5


def test_crop_magnifies_by_the_square_root_of_its_area():
    config = replace(STILL, crop_probability=1.0, crop_area=(0.25, 0.25), crop_aspect=(1.0, 1.0))
    grey = torch.zeros((64, 33, 33), dtype=torch.uint8)
    grey[:, 11:22, 11:22] = 255
    out = view_of(grey, config)
    # A square of 11 pixels covers 22 of them in each direction, as far as the crop holds it.
    side = (out > 0.5).float().sum(dim=(1, 2, 3)).sqrt()
    assert float(side.max()) == pytest.approx(22, abs=1)
    assert len({tuple(row.tolist()) for row in places(out)}) > 10


def test_blur_is_a_gaussian_of_the_drawn_width():
    config = replace(STILL, blur_probability=(1.0, 0.0), blur_sigma_px=(2.0, 2.0))
    grey = torch.zeros((1, 33, 33), dtype=torch.uint8)
    grey[:, 16, 16] = 255
    out = view_of(grey, config)[0, 0]
    assert float(out.sum()) == pytest.approx(1.0, rel=1e-3)
    assert float(out[16, 16]) == pytest.approx(1 / (2 * math.pi * 4), rel=1e-2)
    assert float(out[16, 18] / out[16, 16]) == pytest.approx(math.exp(-0.5), rel=2e-2)


def test_solarisation_inverts_bright_pixels_alone_and_in_the_second_view_alone():
    config = replace(STILL, solarise_probability=(0.0, 1.0))
    grey = random_grey()
    levels = grey.float()[:, None] / 255
    torch.testing.assert_close(view_of(grey, config, view=0), levels, atol=1e-5, rtol=0)
    expected = torch.where(grey[:, None] >= 128, 1 - levels, levels)
    # Resampling rounds: a pixel of exactly 128 may fall on either side.
    is_clear = grey[:, None] != 128
    out = view_of(grey, config, view=1)
    torch.testing.assert_close(out[is_clear], expected[is_clear], atol=1e-5, rtol=0)


def test_jitter_scales_brightness_and_contrast_by_factors_in_range():
    config = replace(STILL, jitter_probability=1.0, brightness=0.2, contrast=0.3)
    grey = torch.full((200, 17, 17), 100, dtype=torch.uint8)
    grey[:, ::2] = 120
    out = view_of(grey, config)
    mean, spread = out.mean(dim=(1, 2, 3)), out.amax(dim=(1, 2, 3)) - out.amin(dim=(1, 2, 3))
    original = grey[0].float().mean() / 255
    assert 0.8 * original <= mean.min() < 0.85 * original
    assert 1.15 * original < mean.max() <= 1.2 * original
    assert 20 / 255 * 0.8 * 0.7 <= spread.min() < spread.max() <= 20 / 255 * 1.2 * 1.3 + 1e-6


def test_two_views_of_a_batch_differ_and_the_same_stream_gives_the_same():
    grey, config = random_grey(), AugmentationConfig()
    generator = torch.Generator().manual_seed(5)
    first, second = (apply_view(grey, draw_view(len(grey), config, v, generator)) for v in (0, 1))
    assert float((first - second).abs().mean()) > 0.05
    torch.testing.assert_close(view_of(grey, config, seed=5), first, rtol=0, atol=0)
    assert float(first.min()) >= 0.0
    assert float(first.max()) <= 1.0


def test_a_workers_share_of_the_draw_gives_the_rows_of_the_whole():
    grey, config = random_grey(), AugmentationConfig()
    drawn = draw_view(len(grey), config, 1, torch.Generator().manual_seed(2))
    whole = apply_view(grey, drawn)
    torch.testing.assert_close(apply_view(grey[4:], drawn.take(slice(4, 8))), whole[4:], rtol=0, atol=1e-6)


def test_augmenting_never_writes_its_input():
    grey = random_grey()
    before = grey.clone()
    view_of(grey, AugmentationConfig())
    assert torch.equal(grey, before)


@pytest.mark.parametrize(
    "changes",
    [
        {"crop_area": (0.5, 1.2)},
        {"blur_probability": (2.0, 0.0)},
        {"crop_aspect": (2.0, 1.0)},
        {"contrast": 1.5},
    ],
)
def test_strengths_out_of_range_are_named(changes):
    with pytest.raises(ValueError, match=f"augmentation.*{next(iter(changes))}"):
        AugmentationConfig(**changes)
