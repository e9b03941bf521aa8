"""Summing movies: shifts, dose weights, binning, local warps, defects."""

import numpy as np
import pytest
import torch

from models.fourier.filters import squared_frequencies
from models.fourier.transforms import shift_phases
from models.motion.defects import DefectFiller, find_hot_pixels
from models.motion.dose import accumulated_exposures
from models.motion.local import LocalMotion
from models.motion.summing import padded_shape, sum_frames


def smooth_image(n=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.fft.rfft2(torch.randn(n, n, generator=generator))
    return torch.fft.irfft2(spectrum * torch.exp(-60 * squared_frequencies((n, n), 1.0)), s=(n, n))


def noise_frames(n=128, n_frames=10, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, n, generator=generator) + 5.0 for _ in range(n_frames)]


def plain(frames, shifts, **more):
    arguments = {"pixel_size_angstrom": 1.0, "accumulated_e_per_angstrom2": None, "voltage_kv": 300.0, **more}
    return sum_frames(frames, shifts, **arguments)


def test_frames_that_moved_add_up_to_the_image_in_place():
    image = smooth_image()
    moves = torch.tensor([[0.0, 0.0], [1.3, -2.6], [-0.4, 3.7]])
    spectrum = torch.fft.rfft2(image)
    frames = [torch.fft.irfft2(spectrum * shift_phases((64, 64), m), s=(64, 64)) for m in moves]
    summed = plain(frames, -moves).micrograph
    assert torch.allclose(summed, 3 * image, atol=1e-4)


def test_dose_weighting_keeps_noise_power_and_mean():
    frames = noise_frames()
    shifts = torch.zeros(10, 2)
    weighted = plain(frames, shifts, accumulated_e_per_angstrom2=accumulated_exposures(10, 40.0, 0.0))
    reference = plain(frames, shifts)
    assert float(weighted.micrograph.mean()) == pytest.approx(50.0, abs=0.05)
    ratio = float(weighted.micrograph.var() / reference.micrograph.var())
    assert ratio == pytest.approx(1.0, abs=0.05)
    assert torch.allclose(weighted.unweighted, reference.micrograph, atol=1e-3)


def test_dose_weighting_prefers_early_frames_at_high_resolution():
    generator = torch.Generator().manual_seed(2)
    fine = torch.fft.irfft2(
        torch.fft.rfft2(torch.randn(64, 64, generator=generator))
        * (squared_frequencies((64, 64), 1.0) > 0.3**2),
        s=(64, 64),
    )
    nothing = torch.zeros(64, 64)
    exposures = accumulated_exposures(2, 40.0, 0.0)
    early = plain([fine, nothing], torch.zeros(2, 2), accumulated_e_per_angstrom2=exposures)
    late = plain([nothing, fine], torch.zeros(2, 2), accumulated_e_per_angstrom2=exposures)
    assert float(early.micrograph.std()) > 5 * float(late.micrograph.std())


def test_binning_crops_in_fourier_space_and_keeps_grey_values():
    image = smooth_image(64) + 7.0
    summed = plain([image, image], torch.zeros(2, 2), binning=2.0).micrograph
    assert tuple(summed.shape) == (32, 32)
    assert torch.allclose(summed, 2 * image[::2, ::2], atol=2e-2)


def test_padded_lengths_are_good_and_divide_by_the_binning():
    for n in (200, 1000, 3838, 3710):
        for binning in (1.0, 1.5, 2.0, 3.0):
            size = padded_shape((n, n), binning)[0]
            assert size >= n
            assert (size / binning) % 2 == pytest.approx(0.0, abs=1e-6)


def test_a_local_model_moves_content_by_its_field():
    n = 128
    image = smooth_image(n)
    coefficients = torch.zeros(2, 6, 3)
    coefficients[0, 0, 0] = 1.5  # every frame: 1.5 px further down than the one before
    local = LocalMotion(
        coefficients=coefficients,
        patch_centres_yx_px=torch.zeros(0, 2),
        patch_shifts_px=torch.zeros(0, 2, 2),
        residual_rms_px=0.0,
        gain_held_out=1.0,
    )
    up = torch.fft.irfft2(torch.fft.rfft2(image) * shift_phases((n, n), torch.tensor([-1.5, 0.0])), s=(n, n))
    summed = plain([image, up], torch.zeros(2, 2), local=local).micrograph
    inside = slice(8, -8)
    assert torch.allclose(summed[inside, inside], 2 * image[inside, inside], atol=0.02)


def test_a_number_of_frames_that_is_not_that_of_the_shifts_is_refused():
    with pytest.raises(ValueError, match="there are 3 shifts"):
        plain([torch.ones(16, 16)] * 2, torch.zeros(3, 2))


def test_hot_pixels_are_found_and_gradients_are_not():
    generator = torch.Generator().manual_seed(4)
    mean = 1.0 + 0.01 * torch.randn(100, 120, generator=generator) + torch.linspace(0, 1, 120)
    mean[30, 40] += 0.3
    mean[70, 5] -= 0.3
    assert torch.nonzero(find_hot_pixels(mean)).tolist() == [[30, 40], [70, 5]]


def test_defects_are_filled_from_good_neighbours_the_same_way_every_time():
    generator = torch.Generator().manual_seed(4)
    frame = torch.randn(60, 60, generator=generator)
    mask = torch.zeros(60, 60, dtype=torch.bool)
    mask[10, 10] = mask[0, 0] = mask[30, :] = mask[40:52, 20:32] = True
    dirty = torch.where(mask, torch.full_like(frame, 1e6), frame)
    filled = DefectFiller(mask, np.random.default_rng(0)).fill(dirty)
    again = DefectFiller(mask, np.random.default_rng(0)).fill(dirty)
    assert float(filled.max()) < 10
    assert torch.equal(filled[~mask], frame[~mask])
    assert torch.equal(filled, again)


def test_a_frame_of_nothing_but_defects_is_refused():
    with pytest.raises(ValueError, match="every pixel"):
        DefectFiller(torch.ones(4, 4, dtype=torch.bool), np.random.default_rng(0))
