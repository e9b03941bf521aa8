"""Whole-frame and local motion on small Poisson movies whose motion is known."""

import math

import numpy as np
import pytest
import torch

from models.fourier.filters import squared_frequencies
from models.fourier.transforms import shift_phases
from models.motion.align import (
    AlignmentSettings,
    crop_movie,
    find_peaks,
    path_length_angstrom,
)
from models.motion.defects import DefectFiller, find_defects
from models.motion.dose import accumulated_exposures
from models.motion.local import estimate_motion, evaluate_local_motion, fit_polynomial, spatial_basis
from models.motion.summing import sum_frames

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


def make_movie(n=256, n_frames=12, seed=0, field=None, dose_per_pixel=DOSE_PER_PIXEL, drift=None):
    """Return frames and the drift (motion of the specimen, y x, in px); `field` is (yx, space, frame)."""
    generator = torch.Generator().manual_seed(seed)
    specimen = make_specimen(n, generator)
    drift = make_drift(n_frames) if drift is None else drift
    spectrum = torch.fft.rfft2(specimen)
    axis = torch.arange(n, dtype=torch.float32)
    yy, xx = torch.meshgrid(axis, axis, indexing="ij")
    frames = []
    for i in range(n_frames):
        frame = torch.fft.irfft2(spectrum * shift_phases((n, n), drift[i]), s=(n, n))
        if field is not None:
            move = spatial_basis(yy / n - 0.5, xx / n - 0.5) @ field[:, :, i].T
            grid = torch.stack([xx - move[..., 1], yy - move[..., 0]], dim=-1) * (2 / (n - 1)) - 1
            frame = torch.nn.functional.grid_sample(
                frame[None, None], grid[None], mode="bicubic", padding_mode="reflection", align_corners=True
            )[0, 0]
        frames.append(torch.poisson((dose_per_pixel * (1 + frame)).clamp(min=0), generator=generator))
    return frames, drift


def make_dome(n_frames):
    """Return a field whose corners move by some two pixels against the centre within the first frames."""
    t = torch.arange(n_frames, dtype=torch.float32)
    field = torch.zeros(2, 6, n_frames)
    field[0, 1] = 4.0 * (1 - torch.exp(-t / 5))
    field[1, 4] = 6.0 * (1 - torch.exp(-t / 4))
    return field


def crop(frames, settings):
    return crop_movie(frames, n_frames=len(frames), pixel_size_angstrom=PIXEL, settings=settings)


def align(frames, settings=None):
    """Return whole-frame shifts alone."""
    settings = settings or AlignmentSettings()
    return estimate_motion(crop(frames, settings), settings, has_local=False).shifts_px


def rms_without_offset(error: torch.Tensor) -> float:
    return float((error - error.mean(dim=0)).square().mean().sqrt())


def test_known_drift_is_recovered_to_a_fifth_of_a_pixel():
    frames, drift = make_movie()
    shifts = align(frames)
    assert rms_without_offset(shifts + drift) < 0.2


def test_shifts_are_corrections_relative_to_the_first_frame():
    frames, drift = make_movie()
    shifts = align(frames)
    assert shifts[0].tolist() == [0.0, 0.0]
    assert torch.allclose(shifts[-1], drift[0] - drift[-1], atol=0.4)


def test_odd_sized_frames_are_aligned_as_well():
    frames, drift = make_movie()
    odd = [frame[:251, :237] for frame in frames]
    shifts = align(odd)
    assert rms_without_offset(shifts + drift) < 0.25


def test_a_fixed_pattern_on_rows_and_columns_does_not_hold_the_frames_back():
    frames, drift = make_movie()
    dirty = [frame.clone() for frame in frames]
    for frame in dirty:
        frame[40] += 6.0
        frame[:, 99] += 6.0
    shifts = align(dirty)
    assert rms_without_offset(shifts + drift) < 0.3


def test_a_movie_of_one_frame_has_no_motion():
    frames, _ = make_movie(n=64, n_frames=1)
    assert align(frames).tolist() == [[0.0, 0.0]]


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


def test_path_length_adds_up_the_steps_in_angstrom():
    shifts = torch.tensor([[0.0, 0.0], [3.0, 4.0], [3.0, 5.0]])
    assert path_length_angstrom(shifts, 2.0) == pytest.approx(12.0)
    assert path_length_angstrom(shifts, 2.0, last=1) == pytest.approx(10.0)


def local_error(motion, drift, field, at):
    """Return the rms trajectory error at positions (v, u), each place's mean over the frames left out."""
    v, u = torch.tensor(at).T
    found = motion.shifts_px[:, None].expand(-1, len(at), 2)
    if motion.local is not None:
        moves = [evaluate_local_motion(motion.local, v, u, i) for i in range(len(drift))]
        found = found + torch.stack(moves)
    truth = drift[:, None] + torch.einsum("ps,asf->fpa", spatial_basis(v, u), field)
    return rms_without_offset(found + truth)


CORNERS = [(-0.45, -0.45), (-0.45, 0.45), (0.45, -0.45), (0.45, 0.45)]


def test_local_motion_is_recovered_at_centre_and_corners():
    field = make_dome(12)
    frames, drift = make_movie(n=384, field=field)
    settings = AlignmentSettings(patch_angstrom=150.0)
    motion = estimate_motion(crop(frames, settings), settings)
    assert motion.local is not None
    assert local_error(motion, drift, field, [(0.0, 0.0)]) < 0.2
    assert local_error(motion, drift, field, CORNERS) < 0.2
    whole = estimate_motion(crop(frames, settings), settings, has_local=False)
    assert local_error(whole, drift, field, CORNERS) > 0.3


def test_the_uncertainty_foretells_the_error():
    field = make_dome(12)
    frames, drift = make_movie(n=384, field=field, seed=3)
    settings = AlignmentSettings(patch_angstrom=150.0)
    motion = estimate_motion(crop(frames, settings), settings)
    line = torch.linspace(-0.35, 0.35, 4).tolist()
    error = local_error(motion, drift, field, [(v, u) for v in line for u in line])
    assert 0.5 < error / motion.uncertainty_px < 2.0


def test_the_cubic_polynomial_follows_the_trajectories():
    field = make_dome(12)
    frames, _ = make_movie(n=384, field=field)
    settings = AlignmentSettings(patch_angstrom=150.0)
    local = estimate_motion(crop(frames, settings), settings).local
    t = torch.arange(12.0)
    fitted = torch.einsum("ast,ft->asf", fit_polynomial(local), torch.stack([t, t**2, t**3], dim=-1))
    v, u = torch.tensor(CORNERS).T
    basis = spatial_basis(v, u)
    error = torch.einsum("ps,asf->pfa", basis, fitted - local.amplitudes)
    assert float(error.square().mean().sqrt()) < 0.15


def test_pure_noise_is_not_given_local_motion_and_hardly_any_drift():
    generator = torch.Generator().manual_seed(5)
    frames = [torch.poisson(torch.full((256, 256), 2.0), generator=generator) for _ in range(8)]
    settings = AlignmentSettings(patch_angstrom=120.0)
    motion = estimate_motion(crop(frames, settings), settings)
    assert motion.local is None
    assert torch.isfinite(motion.shifts_px).all()


def test_a_movie_that_stands_still_stays_within_a_tenth_of_a_pixel():
    still = torch.zeros(12, 2)
    frames, _ = make_movie(n=384, drift=still)
    settings = AlignmentSettings(patch_angstrom=150.0)
    motion = estimate_motion(crop(frames, settings), settings)
    assert local_error(motion, still, torch.zeros(2, 6, 12), [(0.0, 0.0), *CORNERS]) < 0.1


def test_a_very_dim_movie_does_not_run_away():
    # 0.02 e/px a frame hardly show their drift of 6 px; peaks of noise alone lie anywhere within 67 px
    frames, drift = make_movie(n=256, dose_per_pixel=0.02)
    shifts = align(frames)
    assert float((shifts + drift).abs().max()) < 15.0


def test_hot_pixels_and_dead_columns_do_not_pin_the_frames():
    frames, drift = make_movie()
    generator = torch.Generator().manual_seed(9)
    hot = torch.randint(0, 256, (8, 2), generator=generator)
    for frame in frames:
        frame[hot[:, 0], hot[:, 1]] += torch.poisson(torch.full((8,), 40.0), generator=generator)
        frame[:, 77] = 0.0
    mean = torch.stack(frames).mean(dim=0)
    filler = DefectFiller(find_defects(mean), np.random.default_rng(0))
    assert rms_without_offset(align([filler.fill_(frame) for frame in frames]) + drift) < 0.2


@pytest.mark.parametrize("n_frames", [2, 3])
def test_movies_of_few_frames_are_aligned(n_frames):
    frames, drift = make_movie(n_frames=n_frames, dose_per_pixel=8.0)
    settings = AlignmentSettings(patch_angstrom=100.0)
    motion = estimate_motion(crop(frames, settings), settings)
    assert rms_without_offset(motion.shifts_px + drift) < 0.2


def test_exposures_say_what_late_frames_have_left():
    frames, drift = make_movie(n_frames=12)
    settings = AlignmentSettings()
    motion = estimate_motion(
        crop(frames, settings), settings, exposures_e_per_angstrom2=accumulated_exposures(12, 60.0, 0.0)
    )
    assert rms_without_offset(motion.shifts_px + drift) < 0.3


def test_everything_stays_on_the_device_of_the_frames():
    # whatever is made without a device lands on `meta` here, and cannot be mixed with frames on the CPU
    frames, _ = make_movie(n=256, n_frames=4, dose_per_pixel=8.0, field=make_dome(4))
    settings = AlignmentSettings(patch_angstrom=120.0)
    exposures = accumulated_exposures(4, 30.0, 0.0)
    with torch.device("meta"):
        motion = estimate_motion(crop(frames, settings), settings, exposures_e_per_angstrom2=exposures)
        summed = sum_frames(
            frames,
            motion.shifts_px,
            pixel_size_angstrom=PIXEL,
            accumulated_e_per_angstrom2=exposures,
            voltage_kv=300.0,
            local=motion.local,
        )
    assert summed.micrograph.device == frames[0].device
