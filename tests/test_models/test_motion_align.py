"""Whole-frame and local motion on small Poisson movies whose motion is known."""

import math

import pytest
import torch

from models.fourier.filters import squared_frequencies
from models.fourier.transforms import shift_phases
from models.motion.align import (
    AlignmentSettings,
    align_whole_frames,
    crop_movie,
    find_peaks,
    find_peaks_nearby,
    path_length_angstrom,
)
from models.motion.local import estimate_local_motion, evaluate_local_motion

PIXEL = 1.5
DOSE_PER_PIXEL = 2.0


def make_specimen(n: int, generator: torch.Generator) -> torch.Tensor:
    """Blobs with texture, contrast-transferred: what a micrograph of particles looks like."""
    axis = torch.arange(n, dtype=torch.float32)
    image = torch.zeros(n, n)
    for y, x in (torch.rand(n * n // 1500, 2, generator=generator) * n).tolist():
        image += ((axis[:, None] - y) ** 2 + (axis[None, :] - x) ** 2 < 20**2).float()
    k2 = squared_frequencies((n, n), PIXEL)
    texture = torch.fft.irfft2(
        torch.fft.rfft2(torch.randn(n, n, generator=generator)) * torch.exp(-32 * k2), s=(n, n)
    )
    image = image.clamp(max=1) * (1 + 0.8 * texture / texture.std())
    ctf = torch.sin(math.pi * 0.0197 * 12000 * k2 + 0.1) * torch.exp(-20 * k2)
    image = torch.fft.irfft2(torch.fft.rfft2(image) * ctf, s=(n, n))
    return -image / image.std() * 0.12


def make_drift(n_frames: int) -> torch.Tensor:
    t = torch.arange(n_frames, dtype=torch.float32)
    return torch.stack([5 * (1 - torch.exp(-t / 4)) + 0.15 * t, -3 * (1 - torch.exp(-t / 6))], dim=1)


def make_movie(n=256, n_frames=12, seed=0, field=None):
    """Return frames and the drift (motion of the specimen, y x, in px)."""
    generator = torch.Generator().manual_seed(seed)
    specimen = make_specimen(n, generator)
    drift = make_drift(n_frames)
    spectrum = torch.fft.rfft2(specimen)
    axis = torch.arange(n, dtype=torch.float32)
    yy, xx = torch.meshgrid(axis, axis, indexing="ij")
    frames = []
    for i in range(n_frames):
        frame = torch.fft.irfft2(spectrum * shift_phases((n, n), drift[i]), s=(n, n))
        if field is not None:
            move = evaluate_local_motion(field, yy / n - 0.5, xx / n - 0.5, i)
            grid = torch.stack([xx - move[..., 1], yy - move[..., 0]], dim=-1) * (2 / (n - 1)) - 1
            frame = torch.nn.functional.grid_sample(
                frame[None, None], grid[None], mode="bicubic", padding_mode="reflection", align_corners=True
            )[0, 0]
        frames.append(torch.poisson((DOSE_PER_PIXEL * (1 + frame)).clamp(min=0), generator=generator))
    return frames, drift


def crop(frames, settings):
    return crop_movie(frames, n_frames=len(frames), pixel_size_angstrom=PIXEL, settings=settings)


def rms_without_offset(error: torch.Tensor) -> float:
    return float((error - error.mean(dim=0)).square().mean().sqrt())


def test_known_drift_is_recovered_to_a_fifth_of_a_pixel():
    frames, drift = make_movie()
    shifts = align_whole_frames(crop(frames, AlignmentSettings()), AlignmentSettings())
    assert rms_without_offset(shifts + drift) < 0.2


def test_shifts_are_corrections_relative_to_the_first_frame():
    frames, drift = make_movie()
    shifts = align_whole_frames(crop(frames, AlignmentSettings()), AlignmentSettings())
    assert shifts[0].tolist() == [0.0, 0.0]
    assert torch.allclose(shifts[-1], drift[0] - drift[-1], atol=0.4)


def test_odd_sized_frames_are_aligned_as_well():
    frames, drift = make_movie()
    odd = [frame[:251, :237] for frame in frames]
    shifts = align_whole_frames(crop(odd, AlignmentSettings()), AlignmentSettings())
    assert rms_without_offset(shifts + drift) < 0.25


def test_a_fixed_pattern_on_rows_and_columns_does_not_hold_the_frames_back():
    frames, drift = make_movie()
    dirty = [frame.clone() for frame in frames]
    for frame in dirty:
        frame[40] += 6.0
        frame[:, 99] += 6.0
    shifts = align_whole_frames(crop(dirty, AlignmentSettings()), AlignmentSettings())
    assert rms_without_offset(shifts + drift) < 0.3


def test_a_movie_of_one_frame_has_no_motion():
    frames, _ = make_movie(n=64, n_frames=1)
    assert align_whole_frames(crop(frames, AlignmentSettings()), AlignmentSettings()).tolist() == [[0.0, 0.0]]


def test_frames_of_different_shape_are_refused():
    with pytest.raises(ValueError, match="all frames have"):
        crop([torch.ones(64, 64), torch.ones(64, 60)], AlignmentSettings())


def test_a_missing_frame_is_noticed():
    with pytest.raises(ValueError, match="the movie has 3"):
        crop_movie(
            [torch.rand(64, 64)] * 2, n_frames=3, pixel_size_angstrom=1.0, settings=AlignmentSettings()
        )


def test_peaks_are_exact_to_a_hundredth_of_a_pixel_without_noise():
    generator = torch.Generator().manual_seed(3)
    n = 64
    spectrum = torch.fft.rfft2(torch.randn(n, n, generator=generator))
    spectrum = spectrum * torch.exp(-40 * squared_frequencies((n, n), 1.0))
    truth = torch.tensor([[2.37, -1.61], [-0.52, 0.29]])
    cross = spectrum.abs().square() * shift_phases((n, n), truth)
    assert torch.allclose(find_peaks(cross, (n, n), 10), truth, atol=0.01)
    assert torch.allclose(find_peaks_nearby(cross, (n, n), radius_px=3), truth, atol=0.01)


def test_path_length_adds_up_the_steps_in_angstrom():
    shifts = torch.tensor([[0.0, 0.0], [3.0, 4.0], [3.0, 5.0]])
    assert path_length_angstrom(shifts, 2.0) == pytest.approx(12.0)
    assert path_length_angstrom(shifts, 2.0, last=1) == pytest.approx(10.0)


def test_local_motion_is_recovered_at_centre_and_corners():
    n, n_frames = 384, 12
    field = torch.zeros(2, 6, 3)
    # a dome: corners move by some two pixels against the centre within the first frames
    field[0, 1] = torch.tensor([0.9, -0.07, 0.002])
    field[1, 4] = torch.tensor([1.6, -0.12, 0.003])
    frames, drift = make_movie(n=n, n_frames=n_frames, field=field)
    settings = AlignmentSettings()
    movie = crop(frames, settings)
    shifts = align_whole_frames(movie, settings)
    local = estimate_local_motion(movie, shifts, settings, patch_angstrom=150.0)
    assert local is not None
    grid = torch.linspace(-0.4, 0.4, 5)
    v, u = (axis.flatten() for axis in torch.meshgrid(grid, grid, indexing="ij"))
    with_local, without = [], []
    for i in range(n_frames):
        truth = -(drift[i] + evaluate_local_motion(field, v, u, i))
        with_local.append(shifts[i] + evaluate_local_motion(local.coefficients, v, u, i) - truth)
        without.append(shifts[i] - truth)
    assert rms_without_offset(torch.stack(with_local)) < 0.2
    assert rms_without_offset(torch.stack(with_local)) < 0.65 * rms_without_offset(torch.stack(without))


def test_pure_noise_is_not_given_a_local_model():
    generator = torch.Generator().manual_seed(5)
    frames = [torch.poisson(torch.full((256, 256), 2.0), generator=generator) for _ in range(8)]
    movie = crop(frames, AlignmentSettings())
    assert estimate_local_motion(movie, torch.zeros(8, 2), AlignmentSettings(), patch_angstrom=120.0) is None
