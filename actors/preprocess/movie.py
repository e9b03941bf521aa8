"""From a movie to its aligned sums: frames are decoded once, aligned and summed; trajectories are written beside."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from actors.preprocess.clock import StageClock
from actors.preprocess.gain import load_session_gain
from actors.preprocess.settings import PreprocessSettings
from models.motion.align import crop_movie, path_length_angstrom
from models.motion.defects import DefectFiller, find_defects
from models.motion.dose import accumulated_exposures
from models.motion.local import MovieMotion, estimate_motion, fit_polynomial
from models.motion.summing import SummedMovie, sum_frames
from stream.ingest.movie_reader import MovieFormat, inspect_movie, iterate_frames, n_iterated_frames
from stream.records.errors import InputError
from stream.records.values import Exposure, MotionSummary
from stream.sinks.motion_star import MotionTable, write_motion_star
from stream.store.layout import OutputLayout

_EARLY_EXPOSURE_E_PER_ANGSTROM2 = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AlignedMovie:
    """A movie's sums, how far it moved (None for one frame), and what is left of the gain (None without a reference)."""

    summed: SummedMovie
    motion: MotionSummary | None
    gain_residual: float | None


def align_movie(
    exposure: Exposure, settings: PreprocessSettings, layout: OutputLayout, clock: StageClock
) -> AlignedMovie:
    """Align a movie and write its trajectories (`motion/NAME.star`)."""
    dose = settings.dose_e_per_angstrom2
    dose = exposure.metadata.dose_e_per_angstrom2 if dose is None else dose
    with clock.measure("motion"):
        frames = _Frames(exposure, settings, dose, clock)
        exposures = None
        if dose is not None:
            exposures = accumulated_exposures(frames.n_frames, dose, settings.pre_exposure_e_per_angstrom2)
        movie = crop_movie(
            frames.iterate(),
            n_frames=frames.n_frames,
            pixel_size_angstrom=settings.movie_pixel_size_angstrom,
            settings=settings.alignment,
        )
        motion = estimate_motion(
            movie,
            settings.alignment,
            exposures_e_per_angstrom2=exposures,
            voltage_kv=settings.optics.voltage_kv,
            has_local=settings.has_local_motion,
        )
        movie_yx = movie.movie_yx
        del movie
        summed = sum_frames(
            frames.iterate(),
            motion.shifts_px,
            pixel_size_angstrom=settings.movie_pixel_size_angstrom,
            accumulated_e_per_angstrom2=exposures,
            voltage_kv=settings.optics.voltage_kv,
            local=motion.local,
            binning=settings.binning,
        )
    with clock.measure("write"):
        table = replace(
            _motion_table(exposure, settings, movie_yx, motion, frames.hot, dose),
            eer_grouping=frames.eer_grouping,
            eer_upsampling=settings.eer_upsampling,
        )
        write_motion_star(layout.motion(exposure.name), table)
    summary = _summarize_motion(motion, settings, dose)
    return AlignedMovie(summed=summed, motion=summary, gain_residual=frames.gain_residual)


class _Frames:
    """The corrected frames of one movie: decoded once, gain applied and defects filled each time.

    Decoded counts are kept where they fit into bytes or half words (a quarter or half of the frames' float32 size); a
    movie of other numbers is read again. The same seed places the same pixels into defects each time.
    """

    def __init__(
        self, exposure: Exposure, settings: PreprocessSettings, dose: float | None, clock: StageClock
    ) -> None:
        self._path = exposure.file.path
        self._clock = clock
        with clock.measure("read"):
            header = inspect_movie(self._path)
        is_eer = header.format is MovieFormat.EER
        if settings.eer_upsampling != 1 and not is_eer:
            rule = f"eer_upsampling {settings.eer_upsampling} is for EER movies alone"
            raise InputError(self._path, rule, header.format.value)
        self._fractions = settings.count_eer_fractions(header.n_frames, dose) if is_eer else None
        self._upsampling = settings.eer_upsampling if is_eer else 1
        self.n_frames = n_iterated_frames(header, eer_fractions=self._fractions)
        # fractions differ by a raw frame where they do not divide the movie; RELION has one number for all of them
        self.eer_grouping = header.n_frames // self.n_frames if is_eer else None
        self._kept: list[Tensor] | None = []
        mean = self._read_mean()
        shape = (int(mean.shape[0]), int(mean.shape[1]))
        gain = load_session_gain(settings, shape, self._path, upsampling=self._upsampling)
        defects = torch.zeros(shape, dtype=torch.bool)
        self._factors: Tensor | None = None
        if gain is not None:
            defects |= torch.from_numpy(gain.reference.defect_mask)
            self._factors = torch.from_numpy(gain.reference.values)
            mean *= self._factors
        # hot pixels stand still: left in, they would hold the frames back
        self.hot = find_defects(mean) & ~defects
        self._filler = DefectFiller(defects | self.hot, np.random.default_rng(0))
        self.gain_residual = None if gain is None else gain.residual(self._filler.fill_(mean))

    def _read_mean(self) -> Tensor:
        total: Tensor | None = None
        for index, raw in enumerate(self._raw()):
            low, high = torch.aminmax(raw)
            if float(low) == float(high):
                value = f"frame {index + 1} is {float(low):g} throughout"
                raise InputError(self._path, "every frame has signal", value)
            if self._kept is not None:
                counts = _as_counts(raw, float(low), float(high))
                self._kept = None if counts is None else [*self._kept, counts]
            total = torch.zeros(raw.shape) if total is None else total
            total += raw
        if total is None:
            raise InputError(self._path, "a movie has frames", "none")
        return total / self.n_frames

    def _raw(self) -> Iterator[Tensor]:
        frames = iterate_frames(self._path, eer_fractions=self._fractions, eer_upsampling=self._upsampling)
        return self._clock.frames(torch.from_numpy(np.ascontiguousarray(frame)) for frame in frames)

    def iterate(self) -> Iterator[Tensor]:
        """Yield the corrected frames in order, each one new."""
        for raw in self._raw() if self._kept is None else self._kept:
            frame = raw.to(torch.float32, copy=True)
            if self._factors is not None:
                frame *= self._factors
            yield self._filler.fill_(frame)


def _as_counts(frame: Tensor, low: float, high: float) -> Tensor | None:
    """Return the frame in the smallest integer type that holds its values exactly, None if none does."""
    if frame.dtype == torch.uint8:
        return frame
    if low < 0 or high > 32767:
        return None
    counts = frame.to(torch.uint8 if high <= 255 else torch.int16)
    return counts if torch.equal(counts.to(frame.dtype), frame) else None


def _motion_table(
    exposure: Exposure,
    settings: PreprocessSettings,
    movie_yx: tuple[int, int],
    motion: MovieMotion,
    hot: Tensor,
    dose: float | None,
) -> MotionTable:
    local = motion.local
    return MotionTable(
        movie_name=exposure.file.path,
        gain_name=None if settings.gain is None else str(settings.gain),
        movie_shape_yx=movie_yx,
        binning=settings.binning,
        pixel_size_angstrom=settings.movie_pixel_size_angstrom,
        dose_per_frame_e_per_angstrom2=None if dose is None else dose / len(motion.shifts_px),
        pre_exposure_e_per_angstrom2=settings.pre_exposure_e_per_angstrom2,
        voltage_kv=settings.optics.voltage_kv,
        shifts_px=motion.shifts_px.numpy(),
        local_coefficients=None if local is None else fit_polynomial(local).numpy(),
        patch_centres_yx_px=None if local is None else local.patch_centres_yx_px.numpy(),
        patch_shifts_px=None if local is None else local.patch_shifts_px.numpy(),
        hot_pixels_yx=np.argwhere(hot.numpy()),
    )


def _summarize_motion(
    motion: MovieMotion, settings: PreprocessSettings, dose: float | None
) -> MotionSummary | None:
    """Return the figures of a movie; without a dose the first four frames count as early. None for one frame."""
    shifts, pixel = motion.shifts_px, settings.movie_pixel_size_angstrom
    n_frames = len(shifts)
    if n_frames < 2:
        return None
    n_early = 4 if dose is None else math.ceil(_EARLY_EXPOSURE_E_PER_ANGSTROM2 * n_frames / dose)
    early = path_length_angstrom(shifts, pixel, last=min(n_early, n_frames - 1))
    total = path_length_angstrom(shifts, pixel)
    rms = longest = 0.0 if settings.has_local_motion else None
    if motion.local is not None:
        patches = motion.local.patch_shifts_px
        rms = float(patches.square().sum(dim=-1).mean().sqrt()) * pixel
        longest = max(path_length_angstrom(patch, pixel) for patch in patches)
    return MotionSummary(
        total_motion_angstrom=total,
        early_motion_angstrom=early,
        late_motion_angstrom=total - early,
        rms_local_motion_angstrom=rms,
        max_patch_motion_angstrom=longest,
    )
