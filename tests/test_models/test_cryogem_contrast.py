"""A session's contrast: measured at picks, and given back to frames of whatever scale they were."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from models.cryogem.contrast import SessionContrast, fit_scale, mean_profile, measure_contrast
from models.cryogem.physics import PhysicsSettings
from models.fourier.filters import smooth_gaussian

DIAMETER_PX = 20.0


def make_frames(n: int = 4, *, is_hollow: bool = False):
    """Noise-free frames: dark particles A, ice B, and the places of the particles."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.arange(256).float()
    without, ice, places = [], [], []
    for index in range(n):
        rng = np.random.default_rng(index)
        centres = np.stack(np.meshgrid(np.arange(32, 256, 48), np.arange(32, 256, 48)), axis=-1).reshape(
            -1, 2
        )
        centres = centres + rng.integers(-4, 5, centres.shape)
        frame = torch.zeros(256, 256)
        for y, x in centres.tolist():
            distance = torch.hypot(rows[:, None] - y, rows[None, :] - x)
            frame -= (distance < 9.0).float() - (1.5 * (distance < 5.0).float() if is_hollow else 0.0)
        without.append(frame)
        ice.append(smooth_gaussian(torch.randn((256, 256), generator=generator), 24.0) * 20.0)
        places.append(centres.astype(float))
    return without, ice, places, generator


@pytest.mark.parametrize("is_hollow", [False, True])
@pytest.mark.parametrize(("background", "noise_sd"), [(1.5, 1.2), (0.4, 2.5)])
def test_frames_get_back_the_scale_that_a_session_was_made_with(background, noise_sd, is_hollow):
    without, ice, places, generator = make_frames(is_hollow=is_hollow)
    real = [
        300.0 + 7.0 * (a - background * b + noise_sd * torch.randn(a.shape, generator=generator))
        for a, b in zip(without, ice, strict=True)
    ]
    session = measure_contrast(real, places, DIAMETER_PX)
    assert session is not None
    profile = mean_profile(without, places, DIAMETER_PX)
    assert profile is not None
    scale = fit_scale(
        session, profile, without, [a - b for a, b in zip(without, ice, strict=True)], DIAMETER_PX
    )
    assert scale.background == pytest.approx(background, rel=0.15)
    assert scale.noise_variance == pytest.approx(noise_sd**2, rel=0.15)


def test_a_profile_is_dark_inside_and_nothing_outside():
    without, _, places, _ = make_frames()
    profile = mean_profile(without, places, DIAMETER_PX)
    assert profile is not None
    assert profile[:6] == pytest.approx(-1.0, abs=0.02)
    assert profile[9:] == pytest.approx(0.0, abs=0.02)


def test_few_picks_and_picks_of_something_else_are_told():
    without, ice, places, generator = make_frames(1)
    noisy = [without[0] + torch.randn((256, 256), generator=generator)]
    assert measure_contrast(noisy, [places[0][:19]], DIAMETER_PX) is None
    profile = mean_profile(without, places, DIAMETER_PX)
    assert profile is not None
    bright = SessionContrast(profile=tuple((-profile).tolist()), long_waves=0.1)
    with pytest.raises(ValueError, match="they are no particles of this map"):
        fit_scale(bright, profile, without, [without[0] - ice[0]], DIAMETER_PX)
    with pytest.raises(ValueError, match="contrast: 'picks'"):
        PhysicsSettings(contrast="picks")
