"""Gain references against frames of a camera whose gain is known."""

import numpy as np
import pytest
import torch

from models.motion.gain import (
    MAX_GAIN_RESIDUAL,
    TURNS,
    GainVerdict,
    Turn,
    relative_detail,
    residual_gain,
    search_orientation,
)

SHAPE = (320, 384)
ELECTRONS_PER_PX = 12.0


def draw_gain(seed, shape=SHAPE, spread=0.03):
    """Return factors with pixel, row and column structure, and a few defects (mask of the good ones)."""
    rng = np.random.default_rng(seed)
    gain = 1 + spread * rng.standard_normal(shape)
    gain *= (1 + spread / 3 * rng.standard_normal((shape[0], 1))) * (
        1 + spread / 3 * rng.standard_normal((1, shape[1]))
    )
    is_good = rng.random(shape) > 0.002
    gain[~is_good] = 1
    return torch.from_numpy(gain.astype(np.float32)), torch.from_numpy(is_good)


def expose(gain, is_good, seed=0):
    """Return raw counts of a field with ice gradients, dark particles and hot pixels."""
    rng = np.random.default_rng((7, seed))
    y, x = np.indices(gain.shape, dtype=np.float32)
    scene = 1 + 0.2 * y / gain.shape[0]
    for cy, cx in rng.uniform(20, min(gain.shape) - 20, (25, 2)):
        scene -= 0.25 * (np.hypot(y - cy, x - cx) < 12)
    expected = ELECTRONS_PER_PX * scene.clip(0.4) / gain.numpy()
    expected[~is_good.numpy()] = 0
    hot = rng.integers(0, gain.numel(), 30)
    expected.reshape(-1)[hot] *= 20
    return torch.from_numpy(rng.poisson(expected).astype(np.float32))


@pytest.mark.parametrize("turn", TURNS, ids=str)
def test_each_of_the_eight_orientations_is_found(turn):
    gain, is_good = draw_gain(1, (352, 352))
    # the reference file lies so that `turn` brings it onto the camera
    undo = next(t for t in TURNS if torch.equal(t.apply(turn.apply(gain)), gain))
    file, file_good = undo.apply(gain).contiguous(), undo.apply(is_good).contiguous()
    found = search_orientation(expose(gain, is_good), file, file_good)
    assert found.verdict is GainVerdict.FOUND
    assert found.scores[0].turn == turn
    assert found.contrast > 15
    assert len(found.scores) == 8


def test_orientations_that_contradict_the_shape_are_left_out():
    gain, is_good = draw_gain(2)
    found = search_orientation(expose(gain, is_good), gain.T.contiguous(), is_good.T.contiguous())
    assert found.verdict is GainVerdict.FOUND
    assert len(found.scores) == 4
    assert all(score.turn.rotate_deg in (90, 270) for score in found.scores)
    with pytest.raises(ValueError, match=r"gain: shape \(320, 300\), the frames have \(320, 384\)"):
        search_orientation(expose(gain, is_good), gain[:, :300], is_good[:, :300])


@pytest.mark.parametrize("seed", range(5))
def test_a_reference_of_another_camera_is_not_taken(seed):
    frames = expose(*draw_gain(3), seed=seed)
    found = search_orientation(frames, *draw_gain(100 + seed))
    assert found.verdict is GainVerdict.UNCLEAR
    # chance alone: nothing is further out than five standard errors
    assert all(abs(score.correlation) < 5 * score.standard_error for score in found.scores)


def test_a_uniform_reference_is_told_from_one_that_does_not_fit():
    gain, is_good = draw_gain(4)
    found = search_orientation(
        expose(gain, is_good), torch.full(SHAPE, 1.7), torch.ones(SHAPE, dtype=torch.bool)
    )
    assert found.verdict is GainVerdict.UNIFORM
    assert found.contrast == 0


def test_a_reference_that_divides_is_recognised_by_its_sign():
    gain, is_good = draw_gain(5)
    found = search_orientation(expose(gain, is_good), gain.reciprocal(), is_good)
    assert found.verdict is GainVerdict.INVERTED
    assert found.scores[0].correlation < 0
    assert found.scores[0].turn == Turn()


def test_the_correlation_and_its_standard_error_are_those_of_counting_statistics():
    rng = np.random.default_rng(6)
    gain = torch.from_numpy((1 + 0.03 * rng.standard_normal((512, 512))).astype(np.float32))
    frames = torch.from_numpy(rng.poisson(10.0 / gain.numpy()).astype(np.float32))
    best = search_orientation(frames, gain, torch.ones_like(gain, dtype=torch.bool)).scores[0]
    assert best.correlation == pytest.approx(0.03 / np.sqrt(0.03**2 + 1 / 10), rel=0.06)
    assert 1 / 512 <= best.standard_error < 1.3 / 512


def test_frames_without_counts_are_refused():
    gain, is_good = draw_gain(7)
    with pytest.raises(ValueError, match="mean 0, uncorrected frames have counts"):
        search_orientation(torch.zeros(SHAPE), gain, is_good)
    with pytest.raises(ValueError, match="uncorrected frames have noise"):
        search_orientation(torch.full(SHAPE, 3.0), gain, is_good)


def test_detail_has_no_slow_structure_no_row_means_and_no_defects():
    y, x = torch.meshgrid(torch.arange(200.0), torch.arange(240.0), indexing="ij")
    slow = 1 + 0.3 * torch.sin(x / 60) + 0.2 * y / 200
    assert float(relative_detail(slow)[8:-8, 8:-8].abs().max()) < 2e-3
    gain, is_good = draw_gain(8, (200, 240))
    detail = relative_detail(slow * gain, is_good)
    assert float(detail.mean(dim=0).abs().max()) < 2e-3
    assert float(detail[~is_good].abs().max()) == 0
    assert torch.corrcoef(torch.stack([detail[is_good], gain[is_good]]))[0, 1] > 0.85


def apply_gain(frames, gain, is_good):
    """Correct the frames and fill defects with the mean, as preprocessing does."""
    corrected = frames * gain
    corrected[~is_good] = float(corrected.mean())
    return corrected


def test_the_residual_is_nothing_where_the_reference_fits_and_one_where_it_does_not():
    gain, is_good = draw_gain(9)
    frames = expose(gain, is_good)
    detail = relative_detail(gain, is_good)
    fits = residual_gain(apply_gain(frames, gain, is_good), detail)
    assert abs(fits.share) < 4 * fits.standard_error < MAX_GAIN_RESIDUAL
    uncorrected = residual_gain(frames, detail)
    assert uncorrected.share == pytest.approx(-1, abs=0.15)
    for name, (wrong, wrong_good) in {
        "flipped": (gain.flip(0), is_good.flip(0)),
        "turned": (gain.flip(0, 1), is_good.flip(0, 1)),
        "other camera": draw_gain(10),
    }.items():
        residual = residual_gain(apply_gain(frames, wrong, wrong_good), relative_detail(wrong, wrong_good))
        assert residual.share == pytest.approx(1, abs=0.15), name
        assert residual.share > MAX_GAIN_RESIDUAL + 10 * residual.standard_error, name


def test_an_outdated_reference_shows_in_proportion_to_what_has_changed():
    old, is_good = draw_gain(11)
    now = old * draw_gain(12, spread=0.02)[0]
    residual = residual_gain(apply_gain(expose(now, is_good), old, is_good), relative_detail(old, is_good))
    assert abs(residual.share) < 4 * residual.standard_error  # what is new is not in the reference
    shifted = torch.where(
        torch.rand(SHAPE, generator=torch.Generator().manual_seed(0)) < 0.5, old, torch.ones(())
    )
    residual = residual_gain(
        apply_gain(expose(shifted, is_good), old, is_good), relative_detail(old, is_good)
    )
    assert residual.share == pytest.approx(0.5, abs=0.12)


def test_a_noisy_reference_leaves_its_noise_behind():
    gain, is_good = draw_gain(16, spread=0.04)
    noise = 0.03 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    noisy = gain * (1 + noise)
    residual = residual_gain(
        apply_gain(expose(gain, is_good), noisy, is_good), relative_detail(noisy, is_good)
    )
    assert residual.share == pytest.approx(0.03**2 / (0.04**2 + 0.03**2), abs=4 * residual.standard_error)
    assert residual.share > MAX_GAIN_RESIDUAL


def test_a_residual_that_says_nothing_is_none():
    gain, is_good = draw_gain(13)
    frames = expose(gain, is_good)
    assert residual_gain(frames, torch.zeros(SHAPE)) is None
    faint, faint_good = draw_gain(14, spread=0.002)
    assert residual_gain(frames * faint, relative_detail(faint, faint_good)) is None


def test_the_standard_error_of_a_residual_is_the_spread_over_movies():
    gain, is_good = draw_gain(15, (192, 192))
    detail = relative_detail(gain, is_good)
    bright = [
        residual_gain(apply_gain(8 * expose(gain, is_good, seed), gain, is_good), 3 * detail)
        for seed in range(24)
    ]
    spread = np.std([3 * r.share for r in bright], ddof=1)
    assert spread == pytest.approx(3 * np.mean([r.standard_error for r in bright]), rel=0.35)
