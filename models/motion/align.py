"""Whole-frame motion: every frame against the sum of all others, sub-pixel, on Fourier-cropped frames.

A movie is read twice: `crop_movie` keeps only each frame's spectrum up to the working resolution (about a
tenth of the movie's float32 size), `align_spectra` finds the shifts, and `models.motion.summing` reads the
frames again. The method is that of Grant & Grigorieff 2015 (Unblur): iterate the cross-correlation of a frame
with the sum that leaves that frame out, damped by a B-factor. Peaks are found exactly, by Newton steps on the
Fourier sum, not by interpolation.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from models.fourier.filters import b_factor_filter, high_pass_filter, squared_frequencies
from models.fourier.transforms import crop_rfft2, good_size, shift_phases

# Single pixels further out than this are detector faults or X-rays; 8 SD of Poisson counts never is signal.
_CLIP_SD = 8.0
# A Newton step starts within half a pixel of the integer peak; a longer one has left the peak.
_MAX_NEWTON_STEP_PX = 0.75
_NEWTON_STEPS = 6
# Frames that are correlated in one go: bounds the scratch memory to a few cropped spectra.
_CHUNK_FRAMES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class AlignmentSettings:
    """How frames are aligned.

    `resolution_angstrom` is the Nyquist limit of the cropped frames (safe: 4-10 Å). `b_factor_angstrom2` damps
    exp(−B k²/4): CryoSPARC's 500 Å² for whole frames; patches want more. `high_pass_angstrom` removes what
    the beam and the gain leave at the same place in every frame. `max_shift_angstrom` bounds the first search
    in each axis; `tolerance_px` is in cropped pixels.
    """

    resolution_angstrom: float = 6.0
    b_factor_angstrom2: float = 500.0
    high_pass_angstrom: float = 400.0
    max_shift_angstrom: float = 100.0
    max_iterations: int = 12
    tolerance_px: float = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class CroppedMovie:
    """Spectra of padded, Fourier-cropped frames.

    `cropped_yx` is the shape of a cropped frame, `scale_yx` the movie pixels per cropped pixel, and
    `mean_frame` the plain mean of the frames as read (for hot pixels and pictures).
    """

    spectra: Complex[Tensor, "frame h wr"]
    cropped_yx: tuple[int, int]
    scale_yx: tuple[float, float]
    movie_yx: tuple[int, int]
    pixel_size_angstrom: float
    mean_frame: Float[Tensor, "y x"]


def crop_movie(
    frames: Iterable[Float[Tensor, "y x"]],
    *,
    n_frames: int,
    pixel_size_angstrom: float,
    settings: AlignmentSettings,
) -> CroppedMovie:
    """Read frames once and keep their spectra up to the working resolution; `pixel_size_angstrom` is the movie's."""
    spectra: Tensor | None = None
    mean_frame = torch.zeros(0)
    padded = cropped = movie_yx = (0, 0)
    n_read = 0
    for frame in frames:
        if spectra is None:
            movie_yx = (int(frame.shape[0]), int(frame.shape[1]))
            padded = (good_size(movie_yx[0]), good_size(movie_yx[1]))
            cropped = _cropped_shape(padded, pixel_size_angstrom, settings.resolution_angstrom)
            spectra = torch.empty((n_frames, cropped[0], cropped[1] // 2 + 1), dtype=torch.complex64)
            mean_frame = torch.zeros(movie_yx)
        if tuple(frame.shape) != movie_yx:
            raise ValueError(f"frame {n_read + 1}: shape {tuple(frame.shape)}, all frames have {movie_yx}")
        if n_read >= n_frames:
            raise ValueError(f"frames: more than n_frames = {n_frames}")
        mean_frame += frame / n_frames
        spectrum = torch.fft.rfft2(without_outliers(frame), s=padded)
        spectra[n_read] = crop_rfft2(spectrum, padded, cropped)
        n_read += 1
    if spectra is None or n_read != n_frames:
        raise ValueError(f"frames: {n_read}, the movie has {n_frames}")
    return CroppedMovie(
        spectra=spectra,
        cropped_yx=cropped,
        scale_yx=(padded[0] / cropped[0], padded[1] / cropped[1]),
        movie_yx=movie_yx,
        pixel_size_angstrom=pixel_size_angstrom,
        mean_frame=mean_frame,
    )


def without_outliers(frame: Float[Tensor, "y x"]) -> Float[Tensor, "y x"]:
    """Return the frame less its mean, clipped at 8 standard deviations."""
    deviation, mean = torch.std_mean(frame)
    limit = float(_CLIP_SD * deviation)
    return (frame - mean).clamp_(-limit, limit)


def _cropped_shape(
    padded: tuple[int, int], pixel_size_angstrom: float, resolution_angstrom: float
) -> tuple[int, int]:
    factor = min(1.0, 2.0 * pixel_size_angstrom / resolution_angstrom)
    y, x = (min(n, good_size(max(32, math.ceil(n * factor)))) for n in padded)
    return y, x


def align_whole_frames(movie: CroppedMovie, settings: AlignmentSettings) -> Float[Tensor, "frame 2"]:
    """Return the correction (y, x) in movie pixels to add to each frame's content; the first frame's is zero."""
    if len(movie.spectra) == 1:
        return torch.zeros(1, 2)
    pixel_yx = (
        movie.pixel_size_angstrom * movie.scale_yx[0],
        movie.pixel_size_angstrom * movie.scale_yx[1],
    )
    shifts = align_spectra(movie.spectra, movie.cropped_yx, pixel_yx, settings)
    shifts = shifts * torch.tensor(movie.scale_yx)
    return shifts - shifts[:1]


def correlation_weights(
    shape_yx: tuple[int, int], pixel_size_angstrom: float, settings: AlignmentSettings
) -> Float[Tensor, "h wr"]:
    """Return the weights of a cross-spectrum: B-factor × high pass, zero on the axes and the Nyquist terms.

    Faults of whole detector rows and columns lie on the axes and would pull every shift towards zero.
    """
    k2 = squared_frequencies(shape_yx, pixel_size_angstrom)
    weights = b_factor_filter(k2, settings.b_factor_angstrom2)
    weights *= high_pass_filter(k2, settings.high_pass_angstrom)
    weights[0, :] = 0.0
    weights[:, 0] = 0.0
    weights[shape_yx[0] // 2, :] = 0.0
    weights[:, -1] = 0.0
    return weights


def align_spectra(
    spectra: Complex[Tensor, "frame h wr"],
    shape_yx: tuple[int, int],
    pixel_size_yx_angstrom: tuple[float, float],
    settings: AlignmentSettings,
) -> Float[Tensor, "frame 2"]:
    """Return the shifts (y, x) in pixels of these spectra that align every frame with the sum of all others.

    The mean shift is arbitrary. Iterates until no shift changes by more than the tolerance.
    """
    pixel = math.sqrt(pixel_size_yx_angstrom[0] * pixel_size_yx_angstrom[1])
    weights = correlation_weights(shape_yx, pixel, settings)
    weighted = spectra * weights.sqrt()
    radius = max(2, math.ceil(settings.max_shift_angstrom / pixel))
    shifts = torch.zeros(len(spectra), 2)
    for iteration in range(settings.max_iterations):
        total = sum_shifted(weighted, shape_yx, shifts)
        updated = torch.empty_like(shifts)
        for start in range(0, len(spectra), _CHUNK_FRAMES):
            part = slice(start, start + _CHUNK_FRAMES)
            own = weighted[part] * shift_phases(shape_yx, shifts[part])
            cross = (total - own) * own.conj()
            # the first search sees the whole field; later ones only refine
            steps = (
                find_peaks(cross, shape_yx, radius)
                if iteration == 0
                else find_peaks_nearby(cross, shape_yx, radius_px=3)
            )
            updated[part] = shifts[part] + steps
        updated = updated - updated.mean(dim=0)
        change = float((updated - shifts).abs().max())
        shifts = updated
        if change < settings.tolerance_px:
            break
    return shifts


def sum_shifted(
    spectra: Complex[Tensor, "frame h wr"], shape_yx: tuple[int, int], shifts: Float[Tensor, "frame 2"]
) -> Complex[Tensor, "h wr"]:
    """Return the sum of spectra after moving each frame's content by its shift (y, x) in pixels."""
    total = torch.zeros_like(spectra[0])
    for spectrum, shift in zip(spectra, shifts, strict=True):
        total += spectrum * shift_phases(shape_yx, shift)
    return total


def find_peaks(
    cross: Complex[Tensor, "frame h wr"], shape_yx: tuple[int, int], radius_px: int
) -> Float[Tensor, "frame 2"]:
    """Return sub-pixel peaks (y, x) of the correlations of these cross-spectra within ± radius of zero."""
    correlation = torch.fft.irfft2(cross, s=shape_yx)
    ry, rx = (min(radius_px, n // 2 - 1) for n in shape_yx)
    near = torch.roll(correlation, (ry, rx), dims=(-2, -1))[:, : 2 * ry + 1, : 2 * rx + 1]
    best = near.flatten(1).argmax(dim=1)
    peaks = torch.stack([best // (2 * rx + 1) - ry, best % (2 * rx + 1) - rx], dim=1)
    return refine_peaks(cross, shape_yx, peaks.to(torch.float32))


def find_peaks_nearby(
    cross: Complex[Tensor, "frame h wr"], shape_yx: tuple[int, int], *, radius_px: int
) -> Float[Tensor, "frame 2"]:
    """Return sub-pixel peaks like `find_peaks`, for a small radius and without a whole inverse transform."""
    offsets = torch.arange(-radius_px, radius_px + 1, dtype=torch.float32)
    window = correlation_window(cross, shape_yx, offsets)
    best = window.flatten(1).argmax(dim=1)
    n = len(offsets)
    peaks = torch.stack([offsets[best // n], offsets[best % n]], dim=1)
    return refine_peaks(cross, shape_yx, peaks)


def correlation_window(
    cross: Complex[Tensor, "frame h wr"], shape_yx: tuple[int, int], offsets: Float[Tensor, "s"]
) -> Float[Tensor, "frame s s"]:
    """Return the correlation on the square grid of `offsets` (y) × `offsets` (x), up to a constant factor.

    A matrix-multiply Fourier transform (Guizar-Sicairos et al. 2008), exact at any sub-pixel offset.
    """
    fy = torch.fft.fftfreq(shape_yx[0])
    fx = torch.fft.rfftfreq(shape_yx[1])
    rows = _unit(2.0 * math.pi * offsets[:, None] * fy[None, :])
    columns = _unit(2.0 * math.pi * fx[:, None] * offsets[None, :])
    return torch.matmul(torch.matmul(rows, cross), columns).real


def refine_peaks(
    cross: Complex[Tensor, "frame h wr"], shape_yx: tuple[int, int], peaks: Float[Tensor, "frame 2"]
) -> Float[Tensor, "frame 2"]:
    """Climb to the exact maximum of c(d) = Re Σ_k A(k) exp(2πi k·d) by Newton steps from integer peaks.

    A step is taken only where the curvature is that of a maximum; a peak that wanders off by more than a
    pixel goes back to where it started.
    """
    fy = 2.0 * math.pi * torch.fft.fftfreq(shape_yx[0])
    fx = 2.0 * math.pi * torch.fft.rfftfreq(shape_yx[1])
    powers_y = torch.stack([torch.ones_like(fy), fy, fy.square()])
    powers_x = torch.stack([torch.ones_like(fx), fx, fx.square()])
    current = peaks.clone()
    for _ in range(_NEWTON_STEPS):
        phases_y = _unit(current[:, 0, None] * fy)[:, None, :] * powers_y
        phases_x = _unit(current[:, 1, None] * fx)[:, None, :] * powers_x
        moments = torch.einsum("fai,fij,fbj->fab", phases_y, cross, phases_x)
        gradient = torch.stack([-moments[:, 1, 0].imag, -moments[:, 0, 1].imag], dim=1)
        hyy, hxx, hxy = -moments[:, 2, 0].real, -moments[:, 0, 2].real, -moments[:, 1, 1].real
        determinant = hyy * hxx - hxy.square()
        is_maximum = (hyy < 0) & (determinant > 0)
        safe = torch.where(is_maximum, determinant, torch.ones_like(determinant))
        step_y = -(hxx * gradient[:, 0] - hxy * gradient[:, 1]) / safe
        step_x = -(hyy * gradient[:, 1] - hxy * gradient[:, 0]) / safe
        step = torch.stack([step_y, step_x], dim=1).clamp(-_MAX_NEWTON_STEP_PX, _MAX_NEWTON_STEP_PX)
        current = current + torch.where(is_maximum[:, None], step, torch.zeros_like(step))
    has_left = (current - peaks).abs().amax(dim=1, keepdim=True) > 1.0
    return torch.where(has_left, peaks, current)


def _unit(angle: Tensor) -> Tensor:
    return torch.polar(torch.ones_like(angle), angle)


def path_length_angstrom(
    shifts_px: Float[Tensor, "frame 2"],
    pixel_size_angstrom: float,
    *,
    first: int = 0,
    last: int | None = None,
) -> float:
    """Return the length of the trajectory between frames `first` and `last` (inclusive) in Å."""
    part = shifts_px[first : None if last is None else last + 1]
    return float(part.diff(dim=0).norm(dim=1).sum()) * pixel_size_angstrom
