"""Whole-frame motion: every frame against the sum of all others, sub-pixel, on Fourier-cropped frames.

Frames are iterated over twice: `crop_movie` keeps only each frame's spectrum up to the working resolution (a fifth of
the movie's float32 size for 0.9 Å pixels), `align_spectra` finds the shifts, `models.motion.local` refines them, and
`models.motion.summing` needs the frames again. The method is that of Grant & Grigorieff 2015 (Unblur): iterate the cross-correlation of a frame
with the sum that leaves that frame out, damped by a B-factor. Correlations are in nats (`models.motion.likelihood`), so
that they compete with a prior on the shift: a frame that shows nothing stays where it is. Peaks are found
exactly, by Newton steps on the Fourier sum, not by interpolation.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from models.fourier.transforms import crop_rfft2, good_size, shift_phases
from models.motion.likelihood import make_rings, shrink_power

# Single pixels further out than this are detector faults or X-rays; 8 SD of Poisson counts never is signal.
_CLIP_SD = 8.0
# A Newton step starts within half a pixel of the integer peak; a longer one has left the peak.
_MAX_NEWTON_STEP_PX = 0.75
_NEWTON_STEPS = 6
# Frames that are correlated in one go: bounds the scratch memory to a few cropped spectra.
_CHUNK_FRAMES = 4
# The first search needs no more than a part of a pixel, which 8 Å give; what follows starts from there.
_SEARCH_RESOLUTION_ANGSTROM = 8.0
_SEARCH_TOLERANCE_PX = 0.1
_SEARCH_ITERATIONS = 5
# Prior spread of a frame's shift in each axis, against the mean of the movie: stages drift 10-20 Å, a 100 Å jump
# costs 12 nats, which is little where a movie shows anything.
_DRIFT_ANGSTROM = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AlignmentSettings:
    """How frames are aligned.

    `resolution_angstrom` is the Nyquist limit of the cropped frames (safe: 3-10 Å; 4 Å is worth a fifth in accuracy
    over 6 Å). `b_factor_angstrom2` damps exp(−B k²/4) in the first search of whole frames: CryoSPARC's 500 Å².
    `high_pass_angstrom` removes what the beam and the gain leave at the same place in every frame.
    `max_shift_angstrom` bounds the first search in each axis. `patch_angstrom` is the target width of a patch; the
    grid has 3 to 8 along an axis. `tolerance_px` is in cropped pixels.
    """

    resolution_angstrom: float = 4.0
    b_factor_angstrom2: float = 500.0
    high_pass_angstrom: float = 400.0
    max_shift_angstrom: float = 100.0
    patch_angstrom: float = 300.0
    max_iterations: int = 12
    tolerance_px: float = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class CroppedMovie:
    """Spectra of padded, Fourier-cropped frames.

    `cropped_yx` is the shape of a cropped frame, `scale_yx` the movie pixels per cropped pixel.
    """

    spectra: Complex[Tensor, "frame h wr"]
    cropped_yx: tuple[int, int]
    scale_yx: tuple[float, float]
    movie_yx: tuple[int, int]
    pixel_size_angstrom: float

    @property
    def cropped_pixel_yx_angstrom(self) -> tuple[float, float]:
        """Pixel size of a cropped frame along y and x."""
        return self.pixel_size_angstrom * self.scale_yx[0], self.pixel_size_angstrom * self.scale_yx[1]


def crop_movie(
    frames: Iterable[Float[Tensor, "y x"]],
    *,
    n_frames: int,
    pixel_size_angstrom: float,
    settings: AlignmentSettings,
) -> CroppedMovie:
    """Read frames once and keep their spectra up to the working resolution; `pixel_size_angstrom` is the movie's."""
    spectra: Tensor | None = None
    padded = cropped = movie_yx = (0, 0)
    n_read = 0
    for frame in frames:
        if spectra is None:
            movie_yx = (int(frame.shape[0]), int(frame.shape[1]))
            padded = (good_size(movie_yx[0]), good_size(movie_yx[1]))
            cropped = _cropped_shape(padded, pixel_size_angstrom, settings.resolution_angstrom)
            shape = (n_frames, cropped[0], cropped[1] // 2 + 1)
            spectra = torch.empty(shape, dtype=torch.complex64, device=frame.device)
        if tuple(frame.shape) != movie_yx:
            raise ValueError(f"frame {n_read + 1}: shape {tuple(frame.shape)}, all frames have {movie_yx}")
        if n_read >= n_frames:
            raise ValueError(f"frames: more than n_frames = {n_frames}")
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
    )


def without_outliers(frame: Float[Tensor, "y x"]) -> Float[Tensor, "y x"]:
    """Return the frame less its mean, clipped at 8 standard deviations (from every seventh pixel: a limit needs no more)."""
    limit = float(_CLIP_SD * frame.flatten()[::7].std())
    return (frame - frame.mean()).clamp_(-limit, limit)


def _cropped_shape(
    padded: tuple[int, int], pixel_size_angstrom: float, resolution_angstrom: float
) -> tuple[int, int]:
    factor = min(1.0, 2.0 * pixel_size_angstrom / resolution_angstrom)
    y, x = (min(n, good_size(max(32, math.ceil(n * factor)))) for n in padded)
    return y, x


def align_whole_frames(movie: CroppedMovie, settings: AlignmentSettings) -> Float[Tensor, "frame 2"]:
    """Return the correction (y, x) in movie pixels to add to each frame's content; the first frame's is zero.

    To a tenth of a pixel at 8 Å: `models.motion.local.estimate_motion` starts from here.
    """
    if len(movie.spectra) == 1:
        return torch.zeros(1, 2, device=movie.spectra.device)
    padded = [round(n * scale) for n, scale in zip(movie.cropped_yx, movie.scale_yx, strict=True)]
    resolution = max(settings.resolution_angstrom, _SEARCH_RESOLUTION_ANGSTROM)
    wanted = _cropped_shape((padded[0], padded[1]), movie.pixel_size_angstrom, resolution)
    shape = min(wanted[0], movie.cropped_yx[0]), min(wanted[1], movie.cropped_yx[1])
    spectra = crop_rfft2(movie.spectra, movie.cropped_yx, shape)
    scale = (padded[0] / shape[0], padded[1] / shape[1])
    pixel_yx = (movie.pixel_size_angstrom * scale[0], movie.pixel_size_angstrom * scale[1])
    shifts = align_spectra(spectra, shape, pixel_yx, settings)
    shifts = shifts * shifts.new_tensor(scale)
    return shifts - shifts[:1]


def align_spectra(
    spectra: Complex[Tensor, "frame h wr"],
    shape_yx: tuple[int, int],
    pixel_size_yx_angstrom: tuple[float, float],
    settings: AlignmentSettings,
) -> Float[Tensor, "frame 2"]:
    """Return the shifts (y, x) in pixels of these spectra that align every frame with the sum of all others.

    The mean shift is zero. Iterates until no shift changes by more than a tenth of a pixel.
    """
    pixel = math.sqrt(pixel_size_yx_angstrom[0] * pixel_size_yx_angstrom[1])
    whitened, weights = _whiten(spectra, shape_yx, pixel_size_yx_angstrom, settings)
    radius = max(2, math.ceil(settings.max_shift_angstrom / pixel))
    sd_px = _DRIFT_ANGSTROM / pixel
    shifts = torch.zeros(len(spectra), 2, device=spectra.device)
    for _ in range(_SEARCH_ITERATIONS):
        total = sum_shifted(whitened, shape_yx, shifts)
        updated = torch.empty_like(shifts)
        for start in range(0, len(spectra), _CHUNK_FRAMES):
            part = slice(start, start + _CHUNK_FRAMES)
            own = whitened[part]
            others = total - own * shift_phases(shape_yx, shifts[part])
            updated[part] = find_peaks(others * own.conj() * weights, shape_yx, radius, prior_sd_px=sd_px)
        updated = updated - updated.mean(dim=0)
        change = float((updated - shifts).abs().max())
        shifts = updated
        if change < _SEARCH_TOLERANCE_PX:
            break
    return shifts


def _whiten(
    spectra: Complex[Tensor, "frame h wr"],
    shape_yx: tuple[int, int],
    pixel_size_yx_angstrom: tuple[float, float],
    settings: AlignmentSettings,
) -> tuple[Complex[Tensor, "frame h wr"], Float[Tensor, "h wr"]]:
    """Return spectra in units of their noise, and the weights of their cross-spectra in nats.

    The signal is measured between neighbouring frames, which have hardly moved against each other.
    """
    rings = make_rings(
        shape_yx,
        pixel_size_yx_angstrom,
        high_pass_angstrom=settings.high_pass_angstrom,
        device=spectra.device,
    )
    n_frames = len(spectra)
    power = torch.view_as_real(spectra).square().sum(dim=(0, -1)) / n_frames
    whitened = spectra * rings.spread(rings.average(power).clamp(min=1e-20).rsqrt())
    neighbours = (whitened[1:] * whitened[:-1].conj()).real.mean(dim=0)
    variance = 0.5 / (rings.n_terms * (n_frames - 1))
    signal = shrink_power(rings.average(neighbours), variance)
    damping = torch.exp(-0.25 * settings.b_factor_angstrom2 * rings.frequency.square())
    return whitened, rings.spread(damping * signal / (1.0 + n_frames * signal))


def sum_shifted(
    spectra: Complex[Tensor, "frame h wr"], shape_yx: tuple[int, int], shifts: Float[Tensor, "frame 2"]
) -> Complex[Tensor, "h wr"]:
    """Return the sum of spectra after moving each frame's content by its shift (y, x) in pixels."""
    total = torch.zeros_like(spectra[0])
    for spectrum, shift in zip(spectra, shifts, strict=True):
        total += spectrum * shift_phases(shape_yx, shift)
    return total


def find_peaks(
    cross: Complex[Tensor, "frame h wr"],
    shape_yx: tuple[int, int],
    radius_px: int,
    *,
    prior_sd_px: float = math.inf,
) -> Float[Tensor, "frame 2"]:
    """Return sub-pixel peaks (y, x) of the correlations of these cross-spectra within ± radius of zero.

    With a finite `prior_sd_px` the correlation (in nats) less d² / 2 SD² is searched.
    """
    correlation = torch.fft.irfft2(cross, s=shape_yx) * (shape_yx[0] * shape_yx[1])
    ry, rx = (min(radius_px, n // 2 - 1) for n in shape_yx)
    near = torch.roll(correlation, (ry, rx), dims=(-2, -1))[:, : 2 * ry + 1, : 2 * rx + 1]
    y = torch.arange(-ry, ry + 1, device=cross.device)
    x = torch.arange(-rx, rx + 1, device=cross.device)
    near = near - 0.5 * (y.square()[:, None] + x.square()[None, :]) / prior_sd_px**2
    best = near.flatten(1).argmax(dim=1)
    peaks = torch.stack([y[best // len(x)], x[best % len(x)]], dim=1)
    return refine_peaks(cross, shape_yx, peaks.to(torch.float32))


def refine_peaks(
    cross: Complex[Tensor, "frame h wr"], shape_yx: tuple[int, int], peaks: Float[Tensor, "frame 2"]
) -> Float[Tensor, "frame 2"]:
    """Climb to the exact maximum of c(d) = Re Σ_k A(k) exp(2πi k·d) by Newton steps from integer peaks.

    A step is taken only where the curvature is that of a maximum; a peak that wanders off by more than a
    pixel goes back to where it started.
    """
    fy = 2.0 * math.pi * torch.fft.fftfreq(shape_yx[0], device=cross.device)
    fx = 2.0 * math.pi * torch.fft.rfftfreq(shape_yx[1], device=cross.device)
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
