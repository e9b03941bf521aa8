"""Summing movies: shifts, dose weights, binning, local warps, defects."""

import numpy as np
import pytest
import torch

from models.fourier.filters import squared_frequencies
from models.fourier.transforms import shift_phases
from models.motion.defects import DefectFiller, find_defects
from models.motion.dose import accumulated_exposures
from models.motion.local import LocalMotion
from models.motion.summing import padded_shape, sum_frames
from models.motion.tiles import TileGrid, mirrored


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
    inside = slice(8, -8)
    assert torch.allclose(summed[inside, inside], 3 * image[inside, inside], atol=0.02)


def test_nothing_of_the_far_side_shows_at_the_edge():
    image = smooth_image()
    image[:, -6:] = 50.0
    moved = plain([image, image], torch.tensor([[0.0, 0.0], [0.0, 4.3]])).micrograph
    # content moves right by 4 px: what is missing on the left is mirrored, the bright rim on the right stays there
    assert float(moved[:, :40].abs().max()) < 5.0
    assert float(moved[:, -2:].mean()) > 80.0


def test_tiles_make_up_the_image_they_were_cut_from():
    image = torch.randn(150, 211, generator=torch.Generator().manual_seed(8))
    for core in (50, 300):
        grid = TileGrid((150, 211), core, image.device)
        same = grid.blend(torch.stack(list(grid.move(image, torch.zeros(len(grid.centres), 2)))))
        assert torch.allclose(same, image, atol=1e-4)


def test_mirroring_continues_an_image_however_far():
    line = torch.tensor([[1.0, 2.0, 3.0]])
    assert mirrored(line, 0, 4).tolist() == [[3, 3, 2, 1, 1, 2, 3, 3, 2, 1, 1]]


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


def test_local_motion_is_undone_everywhere_in_the_coordinates_of_the_first_frame():
    n, n_frames = 384, 4
    image = smooth_image(n)
    amplitudes = torch.zeros(2, 6, n_frames)
    amplitudes[0, 1] = torch.tensor([0.0, 2.0, 3.0, 4.0])  # a shear: down on the right, up on the left
    amplitudes[1, 3] = torch.tensor([0.0, -1.0, -2.0, -2.5])
    local = LocalMotion(
        amplitudes=amplitudes,
        patch_centres_yx_px=torch.zeros(0, 2),
        patch_shifts_px=torch.zeros(0, n_frames, 2),
        prior_angstrom=1.0,
    )
    axis = torch.arange(n, dtype=torch.float32)
    yy, xx = torch.meshgrid(axis, axis, indexing="ij")
    frames = []
    for i in range(n_frames):
        # what the correction moves to (y, x) was at (y, x) - correction
        y = yy + amplitudes[0, 1, i] * (xx / n - 0.5)
        x = xx + amplitudes[1, 3, i] * (yy / n - 0.5)
        grid = torch.stack([x, y], dim=-1) * (2 / (n - 1)) - 1
        frames.append(
            torch.nn.functional.grid_sample(
                image[None, None], grid[None], mode="bicubic", padding_mode="reflection", align_corners=True
            )[0, 0]
        )
    summed = plain(frames, torch.zeros(n_frames, 2), local=local).micrograph
    inside = slice(12, -12)
    error = (summed / n_frames - image)[inside, inside]
    unmoved = (sum(frames) / n_frames - image)[inside, inside]
    assert float(error.std()) < 0.06 * float(image.std())
    assert float(error.std()) < 0.2 * float(unmoved.std())


def test_a_number_of_frames_that_is_not_that_of_the_shifts_is_refused():
    with pytest.raises(ValueError, match="there are 3 shifts"):
        plain([torch.ones(16, 16)] * 2, torch.zeros(3, 2))


def test_hot_pixels_are_found_and_gradients_are_not():
    generator = torch.Generator().manual_seed(4)
    mean = 1.0 + 0.01 * torch.randn(100, 120, generator=generator) + torch.linspace(0, 1, 120)
    mean[30, 40] += 0.3
    mean[70, 5] -= 0.3
    assert torch.nonzero(find_defects(mean)).tolist() == [[30, 40], [70, 5]]


def test_defects_are_filled_from_good_neighbours_the_same_way_every_time():
    generator = torch.Generator().manual_seed(4)
    frame = torch.randn(60, 60, generator=generator)
    mask = torch.zeros(60, 60, dtype=torch.bool)
    mask[10, 10] = mask[0, 0] = mask[30, :] = mask[40:52, 20:32] = True
    dirty = torch.where(mask, torch.full_like(frame, 1e6), frame)
    filled = DefectFiller(mask, np.random.default_rng(0)).fill_(dirty.clone())
    again = DefectFiller(mask, np.random.default_rng(0)).fill_(dirty.clone())
    assert float(filled.max()) < 10
    assert torch.equal(filled[~mask], frame[~mask])
    assert torch.equal(filled, again)


def test_a_frame_of_nothing_but_defects_is_refused():
    with pytest.raises(ValueError, match="every pixel"):
        DefectFiller(torch.ones(4, 4, dtype=torch.bool), np.random.default_rng(0))
