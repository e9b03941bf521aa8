"""Preprocessing of one exposure: from its file to a micrograph, a CTF, picks and extracted particles.

No Ray here: an actor, a command and a test call `preprocess_exposure` alike. Everything is written under a
temporary name and renamed, so that a stage that runs twice leaves one result. What is wrong with the file
raises `InputError`; what is wrong with the machine (a full disk) comes through as it is. An exposure without
Thon rings ends with a micrograph, picks and an unreliable CTF, but without particles: they would enter a
reconstruction with a CTF that means nothing.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from actors.preprocess.clock import StageClock
from actors.preprocess.ctf import measure_ctf
from actors.preprocess.movie import align_movie
from actors.preprocess.particles import write_particles
from actors.preprocess.picking import name_picker, pick_particles, write_picks
from actors.preprocess.settings import PreprocessSettings
from models.motion.summing import SummedMovie
from stream.ingest.movie_reader import read_micrograph
from stream.records.errors import ConfigurationError, InputError
from stream.records.values import (
    Exposure,
    GainOrientation,
    InputKind,
    MotionSummary,
    PreprocessResult,
    RunId,
)
from stream.sinks.mrc_images import write_micrograph
from stream.store.layout import OutputLayout

# Grey values further out than this, in robust SD, are X-rays and dead pixels of the camera.
_OUTLIER_SD = 12.0


def preprocess_exposure(
    exposure: Exposure,
    settings: PreprocessSettings,
    layout: OutputLayout,
    *,
    gain_orientation: GainOrientation | None = None,
    template_run: RunId | None = None,
    clock: StageClock | None = None,
) -> PreprocessResult:
    """Take a movie or a micrograph from its file to extracted particles; write all files of the exposure.

    A `gain_orientation` that was found over the first movies replaces that of the settings; with a
    `template_run`, projections of that run's map are the picking templates. Seconds are those of `clock`: of wall
    time, unless it is given another.
    """
    if gain_orientation is not None:
        settings = replace(
            settings,
            gain_flip_x=gain_orientation.flip_x,
            gain_flip_y=gain_orientation.flip_y,
            gain_rotate_deg=gain_orientation.rotate_deg,
        )
    torch.set_num_threads(settings.n_threads)
    clock = clock or StageClock()
    try:
        return _preprocess(exposure, settings, layout, clock, template_run)
    except ConfigurationError as error:
        # a gain of another shape: this movie cannot be corrected, the next one may
        raise InputError(exposure.file.path, error.rule, f"{error.item}: {error.value}") from error
    except ValueError as error:
        raise InputError(exposure.file.path, str(error)) from error


def _preprocess(
    exposure: Exposure,
    settings: PreprocessSettings,
    layout: OutputLayout,
    clock: StageClock,
    template_run: RunId | None,
) -> PreprocessResult:
    name = exposure.name
    pixel = settings.micrograph_pixel_size_angstrom
    motion: MotionSummary | None = None
    gain_residual: float | None = None
    if exposure.kind is InputKind.MOVIE:
        aligned = align_movie(exposure, settings, layout, clock)
        summed, motion, gain_residual = aligned.summed, aligned.motion, aligned.gain_residual
    elif exposure.kind is InputKind.MICROGRAPH:
        summed = _read_single(exposure, clock)
        pixel = settings.pixel_size_angstrom
    else:
        raise InputError(
            exposure.file.path, "preprocessing takes movies and micrographs", exposure.kind.value
        )
    with clock.measure("write"):
        write_micrograph(layout.micrograph(name), summed.micrograph.numpy(), pixel)
        if settings.keeps_unweighted and exposure.kind is InputKind.MOVIE:
            write_micrograph(layout.unweighted(name), summed.unweighted.numpy(), pixel)
    measured = measure_ctf(summed.unweighted, pixel, settings, layout, name, clock)
    picks = pick_particles(name, summed.micrograph, pixel, settings, measured, layout, template_run, clock)
    with clock.measure("write"):
        write_picks(layout, name, summed.micrograph, pixel, picks, settings)
    n_particles = 0
    if measured.fit.is_reliable:
        n_particles = write_particles(exposure, summed.micrograph, picks, measured, settings, layout, clock)
    n_picks = len(picks.scores)
    return PreprocessResult(
        exposure_id=exposure.exposure_id,
        micrograph=layout.relative(layout.micrograph(name)),
        thumbnail=layout.relative(layout.thumbnail(name)),
        particles=layout.relative(layout.particles_table(name)) if n_particles else None,
        n_picks=n_picks,
        n_particles=n_particles,
        n_excluded_particles=n_picks - n_particles,
        box_size_px=settings.boxes.extract_box_px,
        pixel_size_angstrom=settings.particle_pixel_size_angstrom,
        motion=motion,
        ctf=measured.fit,
        ice_ratio=measured.ice_ratio,
        seconds=clock.seconds,
        crystalline_ice=measured.crystalline_ice,
        masked_fraction=picks.excluded_fraction,
        gain_residual=gain_residual,
        picker=name_picker(settings, measured, template_run),
    )


def _read_single(exposure: Exposure, clock: StageClock) -> SummedMovie:
    with clock.measure("read"):
        image = torch.from_numpy(read_micrograph(exposure.file.path))
    low, high = torch.aminmax(image)
    if float(low) == float(high):
        raise InputError(exposure.file.path, "a micrograph has signal", f"{float(low):g} throughout")
    image = clip_outliers(image)
    return SummedMovie(micrograph=image, unweighted=image)


def clip_outliers(image: Tensor) -> Tensor:
    """Return the image with grey values beyond twelve robust SD cut to that."""
    centre = image.median()
    spread = float(1.4826 * (image - centre).abs().median()) or float(image.std())
    return image.clamp(float(centre) - _OUTLIER_SD * spread, float(centre) + _OUTLIER_SD * spread)
