"""From a movie to its aligned sums: two passes over the frames, trajectories written beside."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from actors.preprocess.clock import StageClock
from actors.preprocess.gain import read_session_gain
from actors.preprocess.settings import PreprocessSettings
from models.motion.align import align_whole_frames, crop_movie, path_length_angstrom
from models.motion.defects import DefectFiller, find_hot_pixels
from models.motion.dose import accumulated_exposures
from models.motion.local import LocalMotion, estimate_local_motion
from models.motion.summing import SummedMovie, sum_frames
from stream.ingest.gain import GainReference
from stream.ingest.movie_reader import MovieFormat, inspect_movie, iterate_frames, n_iterated_frames
from stream.records.errors import InputError
from stream.records.values import Exposure, MotionSummary
from stream.sinks.motion_star import MotionTable, write_motion_star
from stream.store.layout import OutputLayout

_EARLY_EXPOSURE_E_PER_ANGSTROM2 = 4.0


def align_movie(
    exposure: Exposure, settings: PreprocessSettings, layout: OutputLayout, clock: StageClock
) -> tuple[SummedMovie, MotionSummary | None]:
    """Align a movie, write its trajectories, return its sums and how far it moved (None for one frame)."""
    path = exposure.file.path
    with clock.measure("read"):
        header = inspect_movie(path)
        gain = read_session_gain(settings, header.shape_yx, path)
    is_eer = header.format is MovieFormat.EER
    fractions = settings.eer_fractions if is_eer else None
    n_frames = n_iterated_frames(header, eer_fractions=fractions)
    defects = torch.zeros(header.shape_yx, dtype=torch.bool)
    if gain is not None:
        defects |= torch.from_numpy(gain.defect_mask)

    def frames(mask: Tensor) -> Iterator[Tensor]:
        # the same seed in both passes: both see the same pixels in place of a defect
        filler = DefectFiller(mask, np.random.default_rng(0))
        return clock.frames(_corrected(path, fractions, gain, filler))

    with clock.measure("motion"):
        alignment = settings.alignment
        movie = crop_movie(
            frames(defects),
            n_frames=n_frames,
            pixel_size_angstrom=settings.pixel_size_angstrom,
            settings=alignment,
        )
        hot = find_hot_pixels(movie.mean_frame) & ~defects
        shifts = align_whole_frames(movie, alignment)
        local = estimate_local_motion(movie, shifts, alignment) if settings.has_local_motion else None
        movie_yx = movie.movie_yx
        del movie
        dose = _total_dose(exposure, settings)
        exposures = None
        if dose is not None:
            exposures = accumulated_exposures(n_frames, dose, settings.pre_exposure_e_per_angstrom2)
        summed = sum_frames(
            frames(defects | hot),
            shifts,
            pixel_size_angstrom=settings.pixel_size_angstrom,
            accumulated_e_per_angstrom2=exposures,
            voltage_kv=settings.optics.voltage_kv,
            local=local,
            binning=settings.binning,
        )
    table = _motion_table(exposure, settings, movie_yx, shifts, local, hot, dose)
    with clock.measure("write"):
        write_motion_star(layout.motion(exposure.name), table)
    return summed, _summarize_motion(shifts, settings.pixel_size_angstrom, dose)


def _corrected(
    path: str, fractions: int | None, gain: GainReference | None, filler: DefectFiller
) -> Iterator[Tensor]:
    factors = None if gain is None else torch.from_numpy(gain.values)
    for index, raw in enumerate(iterate_frames(path, eer_fractions=fractions)):
        frame = torch.from_numpy(np.ascontiguousarray(raw)).to(torch.float32)
        low, high = torch.aminmax(frame)
        if float(low) == float(high):
            raise InputError(
                path, "every frame has signal", f"frame {index + 1} is {float(low):g} throughout"
            )
        yield filler.fill(frame if factors is None else frame * factors)


def _total_dose(exposure: Exposure, settings: PreprocessSettings) -> float | None:
    dose = settings.dose_e_per_angstrom2
    return exposure.metadata.dose_e_per_angstrom2 if dose is None else dose


def _motion_table(
    exposure: Exposure,
    settings: PreprocessSettings,
    movie_yx: tuple[int, int],
    shifts: Tensor,
    local: LocalMotion | None,
    hot: Tensor,
    dose: float | None,
) -> MotionTable:
    return MotionTable(
        movie_name=exposure.file.path,
        gain_name=None if settings.gain is None else str(settings.gain),
        movie_shape_yx=movie_yx,
        binning=settings.binning,
        pixel_size_angstrom=settings.pixel_size_angstrom,
        dose_per_frame_e_per_angstrom2=None if dose is None else dose / len(shifts),
        pre_exposure_e_per_angstrom2=settings.pre_exposure_e_per_angstrom2,
        voltage_kv=settings.optics.voltage_kv,
        shifts_px=shifts.numpy(),
        local_coefficients=None if local is None else local.coefficients.numpy(),
        patch_centres_yx_px=None if local is None else local.patch_centres_yx_px.numpy(),
        patch_shifts_px=None if local is None else local.patch_shifts_px.numpy(),
        hot_pixels_yx=np.argwhere(hot.numpy()),
    )


def _summarize_motion(shifts: Tensor, pixel: float, dose: float | None) -> MotionSummary | None:
    """Return the path lengths; without a dose the first four frames count as early. None for one frame."""
    n_frames = len(shifts)
    if n_frames < 2:
        return None
    n_early = 4 if dose is None else math.ceil(_EARLY_EXPOSURE_E_PER_ANGSTROM2 * n_frames / dose)
    early = path_length_angstrom(shifts, pixel, last=min(n_early, n_frames - 1))
    total = path_length_angstrom(shifts, pixel)
    return MotionSummary(
        total_motion_angstrom=total, early_motion_angstrom=early, late_motion_angstrom=total - early
    )
