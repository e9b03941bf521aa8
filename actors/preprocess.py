"""Preprocessing of one exposure: from its file to a micrograph, a CTF, picks and extracted particles.

No Ray here: an actor, a command and a test call `preprocess_exposure` alike. Everything is written under a
temporary name and renamed, so that a stage that runs twice leaves one result. What is wrong with the file
raises `InputError`; what is wrong with the machine (a full disk) comes through as it is. An exposure without
Thon rings ends with a micrograph, picks and an unreliable CTF, but without particles: they would enter a
reconstruction with a CTF that means nothing.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from models.fourier.spectra import centred_from_half
from models.fourier.transforms import good_size
from models.motion.align import AlignmentSettings, align_whole_frames, crop_movie, path_length_angstrom
from models.motion.defects import DefectFiller, find_hot_pixels
from models.motion.dose import accumulated_exposures
from models.motion.local import LocalMotion, estimate_local_motion
from models.motion.summing import SummedMovie, sum_frames
from models.optics.ctf import electron_wavelength_angstrom, evaluate_ctf
from models.optics.ctf_fit import CtfSearch, FittedCtf, Microscope, fit_ctf, profile_ctf
from models.optics.ice import estimate_ice_ratio, first_maximum_angstrom
from models.picking.blob import BlobSettings, Picks, pick_blobs
from models.picking.extract import BoxSettings, boxes_inside, extract_particles
from stream.ingest.gain import GainReference, check_gain, orient_gain, read_gain
from stream.ingest.movie_reader import (
    MovieFormat,
    inspect_movie,
    iterate_frames,
    n_iterated_frames,
    read_micrograph,
)
from stream.records.errors import ConfigurationError, InputError
from stream.records.particles import derive_particle_uid
from stream.records.values import CtfFit, Exposure, InputKind, MotionSummary, Optics, PreprocessResult
from stream.sinks.motion_star import MotionTable, write_motion_star
from stream.sinks.mrc_images import write_micrograph, write_stack
from stream.sinks.pictures import write_ctf_picture, write_thumbnail
from stream.sinks.relion_star import make_particle_optics, write_particles_star, write_picks_star
from stream.store.files import replacing
from stream.store.layout import OutputLayout

# What a box of the default size is rescaled to at most: the embedded engine's range is 64-96 pixels.
_DEFAULT_MAX_BOX_PX = 96
_EARLY_EXPOSURE_E_PER_ANGSTROM2 = 4.0
# Grey values further out than this, in robust SD, are X-rays and dead pixels of the camera.
_OUTLIER_SD = 12.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PreprocessSettings:
    """How exposures are preprocessed; the pixel size is the movie's (or the input micrograph's).

    `dose_e_per_angstrom2` is the movie's total (None: what the microscope's metadata say, else no dose
    weighting). `box_size_px` and `extract_pixel_size_angstrom` speak of the extracted particles; None derives
    a box of 1.5 diameters, rescaled to at most 96 pixels. Defocus is searched between the two limits, in Å.
    `pick_threshold_sd` is a z-score, `pick_diameter_tolerance` the half width of the picked diameters.
    """

    pixel_size_angstrom: float
    optics: Optics
    dose_e_per_angstrom2: float | None = None
    pre_exposure_e_per_angstrom2: float = 0.0
    gain: Path | None = None
    gain_flip_x: bool = False
    gain_flip_y: bool = False
    gain_rotate_deg: int = 0
    binning: float = 1.0
    eer_fractions: int = 40
    has_local_motion: bool = True
    alignment: AlignmentSettings = field(default_factory=AlignmentSettings)
    ctf_search: CtfSearch = field(default_factory=CtfSearch)
    particle_diameter_angstrom: float = 150.0
    pick_diameter_tolerance: float = 0.15
    pick_threshold_sd: float = 4.5
    max_picks: int = 2000
    box_size_px: int | None = None
    extract_pixel_size_angstrom: float | None = None
    is_float16: bool = True
    n_threads: int = 1

    @property
    def micrograph_pixel_size_angstrom(self) -> float:
        """Pixel size of the aligned micrograph."""
        return self.pixel_size_angstrom * self.binning

    @property
    def boxes(self) -> BoxSettings:
        """Box sizes in pixels of the micrograph and of the extracted particle, and the background's radius."""
        pixel = self.micrograph_pixel_size_angstrom
        box_angstrom = 1.5 * self.particle_diameter_angstrom
        target = self.extract_pixel_size_angstrom
        if target is None:
            size_angstrom = box_angstrom if self.box_size_px is None else 0.0
            target = max(pixel, size_angstrom / _DEFAULT_MAX_BOX_PX)
        size = self.box_size_px or min(good_size(math.ceil(box_angstrom / target)), 4096)
        size += size % 2
        box = max(size, 2 * round(size * target / pixel / 2.0))
        radius = 0.575 * self.particle_diameter_angstrom / (pixel * box / size)
        return BoxSettings(
            box_size_px=box, extract_box_px=size, background_radius_px=min(radius, 0.45 * size)
        )

    @property
    def particle_pixel_size_angstrom(self) -> float:
        """Pixel size of the extracted particles: as asked for, to the nearest that an even box allows."""
        boxes = self.boxes
        return self.micrograph_pixel_size_angstrom * boxes.box_size_px / boxes.extract_box_px


def preprocess_exposure(
    exposure: Exposure, settings: PreprocessSettings, layout: OutputLayout
) -> PreprocessResult:
    """Take a movie or a micrograph from its file to extracted particles; write all files of the exposure."""
    torch.set_num_threads(settings.n_threads)
    clock = _Clock()
    try:
        return _preprocess(exposure, settings, layout, clock)
    except ConfigurationError as error:
        # a gain of another shape: this movie cannot be corrected, the next one may
        raise InputError(exposure.file.path, error.rule, f"{error.item}: {error.value}") from error
    except ValueError as error:
        raise InputError(exposure.file.path, str(error)) from error


def _preprocess(
    exposure: Exposure, settings: PreprocessSettings, layout: OutputLayout, clock: _Clock
) -> PreprocessResult:
    name = exposure.name
    pixel = settings.micrograph_pixel_size_angstrom
    motion: MotionSummary | None = None
    if exposure.kind is InputKind.MOVIE:
        summed, motion = _align_movie(exposure, settings, layout, clock)
    elif exposure.kind is InputKind.MICROGRAPH:
        summed = _read_single(exposure, clock)
        pixel = settings.pixel_size_angstrom
    else:
        raise InputError(
            exposure.file.path, "preprocessing takes movies and micrographs", exposure.kind.value
        )
    with clock.measure("write"):
        write_micrograph(layout.micrograph(name), summed.micrograph.numpy(), pixel)
    ctf, ice_ratio = measure_ctf(summed.unweighted, pixel, settings, layout, name, clock)
    picks = _pick(summed.micrograph, pixel, settings, clock)
    with clock.measure("write"):
        _write_picks(layout, name, summed.micrograph, pixel, picks, settings)
    n_particles = 0
    if ctf.is_reliable:
        n_particles = _extract(exposure, summed.micrograph, picks, ctf, settings, layout, clock)
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
        ctf=ctf,
        ice_ratio=ice_ratio,
        seconds=clock.seconds,
    )


class _Clock:
    """Seconds per stage; what reading takes inside another stage counts as reading."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(("read", "motion", "ctf", "pick", "extract", "write"), 0.0)

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        started, read_before = time.perf_counter(), self.seconds["read"]
        try:
            yield
        finally:
            nested = self.seconds["read"] - read_before
            self.seconds[stage] += time.perf_counter() - started - nested

    def frames(self, frames: Iterator[Tensor]) -> Iterator[Tensor]:
        """Pass frames on, counting the time that it takes to get them."""
        while True:
            started = time.perf_counter()
            frame = next(frames, None)
            self.seconds["read"] += time.perf_counter() - started
            if frame is None:
                return
            yield frame


@lru_cache(maxsize=2)
def _load_gain(path: Path, mtime_ns: int, *, flip_x: bool, flip_y: bool, rotate_deg: int) -> GainReference:
    """Read and turn a gain reference; kept between exposures until the file changes."""
    del mtime_ns  # part of the cache's key alone
    return orient_gain(read_gain(path), flip_x=flip_x, flip_y=flip_y, rotate_deg=rotate_deg)


def _read_gain(settings: PreprocessSettings, shape_yx: tuple[int, int], item: str) -> GainReference | None:
    if settings.gain is None:
        return None
    gain = _load_gain(
        settings.gain,
        settings.gain.stat().st_mtime_ns,
        flip_x=settings.gain_flip_x,
        flip_y=settings.gain_flip_y,
        rotate_deg=settings.gain_rotate_deg,
    )
    check_gain(gain, shape_yx, item)
    return gain


def _align_movie(
    exposure: Exposure, settings: PreprocessSettings, layout: OutputLayout, clock: _Clock
) -> tuple[SummedMovie, MotionSummary | None]:
    path = exposure.file.path
    with clock.measure("read"):
        header = inspect_movie(path)
        gain = _read_gain(settings, header.shape_yx, path)
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


def _read_single(exposure: Exposure, clock: _Clock) -> SummedMovie:
    with clock.measure("read"):
        image = torch.from_numpy(read_micrograph(exposure.file.path))
    low, high = torch.aminmax(image)
    if float(low) == float(high):
        raise InputError(exposure.file.path, "a micrograph has signal", f"{float(low):g} throughout")
    centre = image.median()
    spread = float(1.4826 * (image - centre).abs().median()) or float(image.std())
    image = image.clamp(float(centre) - _OUTLIER_SD * spread, float(centre) + _OUTLIER_SD * spread)
    return SummedMovie(micrograph=image, unweighted=image)


def measure_ctf(
    image: Tensor,
    pixel: float,
    settings: PreprocessSettings,
    layout: OutputLayout,
    name: str,
    clock: _Clock | None = None,
) -> tuple[CtfFit, float | None]:
    """Fit the CTF of a micrograph, write its picture and values, return it with the ice ratio."""
    clock = clock or _Clock()
    microscope = make_microscope(settings.optics)
    with clock.measure("ctf"):
        fitted, power = fit_ctf(image, pixel, microscope, settings.ctf_search)
        ice_ratio = judge_ice(power, pixel, microscope, fitted)
    with clock.measure("write"):
        write_ctf_files(layout, name, power, pixel, microscope, fitted, ice_ratio)
    return to_record(fitted), ice_ratio


def make_microscope(optics: Optics) -> Microscope:
    """Return the optics in the mathematics' own record."""
    return Microscope(
        voltage_kv=optics.voltage_kv, cs_mm=optics.cs_mm, amplitude_contrast=optics.amplitude_contrast
    )


def to_record(fitted: FittedCtf) -> CtfFit:
    """Return the fit as the record that travels."""
    return CtfFit(
        defocus_u_angstrom=fitted.defocus_u_angstrom,
        defocus_v_angstrom=fitted.defocus_v_angstrom,
        astigmatism_angle_deg=fitted.astigmatism_angle_deg,
        phase_shift_deg=fitted.phase_shift_deg,
        fit_resolution_angstrom=fitted.fit_resolution_angstrom,
        score=fitted.score,
        is_reliable=fitted.is_reliable,
    )


def judge_ice(power: Tensor, pixel: float, microscope: Microscope, fitted: FittedCtf) -> float | None:
    """Return the ice ratio against the fitted CTF's first maximum; None without rings."""
    if not fitted.is_reliable:
        return None
    mean = 0.5 * (fitted.defocus_u_angstrom + fitted.defocus_v_angstrom)
    wavelength = electron_wavelength_angstrom(microscope.voltage_kv)
    return estimate_ice_ratio(
        power, pixel, first_maximum_angstrom(mean, wavelength, microscope.amplitude_contrast)
    )


def write_ctf_files(
    layout: OutputLayout,
    name: str,
    power: Tensor,
    pixel: float,
    microscope: Microscope,
    fitted: FittedCtf,
    ice_ratio: float | None,
) -> None:
    """Write ctf/NAME.png and ctf/NAME.json."""
    n = int(power.shape[0])
    k = torch.fft.fftshift(torch.fft.fftfreq(n, pixel))
    model = evaluate_ctf(
        k[:, None].expand(n, n),
        k[None, :].expand(n, n),
        defocus_u_angstrom=fitted.defocus_u_angstrom,
        defocus_v_angstrom=fitted.defocus_v_angstrom,
        astigmatism_angle_deg=fitted.astigmatism_angle_deg,
        voltage_kv=microscope.voltage_kv,
        cs_mm=microscope.cs_mm,
        amplitude_contrast=microscope.amplitude_contrast,
        phase_shift_deg=fitted.phase_shift_deg,
    ).square()
    profile = profile_ctf(power, pixel, microscope, fitted)
    rings = f"rings to {fitted.fit_resolution_angstrom:.1f} Å" if fitted.is_reliable else "no rings found"
    write_ctf_picture(
        layout.ctf_picture(name),
        centred_from_half(power).numpy(),
        model.numpy(),
        k=profile.k,
        contrast=profile.contrast,
        ctf2=profile.ctf2,
        lines=(
            f"defocus {fitted.defocus_u_angstrom:.0f} / {fitted.defocus_v_angstrom:.0f} Å",
            f"angle {fitted.astigmatism_angle_deg:.0f} deg, score {fitted.score:.2f}",
            rings,
        ),
        # half as far again as rings are seen, but no less than 8 Å and no more than Nyquist
        shown_fraction=min(1.0, 2.0 * pixel * 1.5 / min(fitted.fit_resolution_angstrom, 8.0)),
    )
    document = {**asdict(fitted), "ice_ratio": ice_ratio, "pixel_size_angstrom": pixel}
    plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in document.items()}
    with replacing(layout.ctf_values(name)) as temporary:
        temporary.write_text(json.dumps(plain, indent=2) + "\n")


def _pick(image: Tensor, pixel: float, settings: PreprocessSettings, clock: _Clock) -> Picks:
    diameter = settings.particle_diameter_angstrom
    blobs = BlobSettings(
        min_diameter_angstrom=diameter * (1.0 - settings.pick_diameter_tolerance),
        max_diameter_angstrom=diameter * (1.0 + settings.pick_diameter_tolerance),
        threshold=settings.pick_threshold_sd,
        max_picks=settings.max_picks,
        border_angstrom=0.5 * diameter,
    )
    with clock.measure("pick"):
        return pick_blobs(image, pixel, blobs)


def _write_picks(
    layout: OutputLayout, name: str, image: Tensor, pixel: float, picks: Picks, settings: PreprocessSettings
) -> None:
    write_picks_star(layout.picks(name), picks.centres_yx_px, picks.scores)
    write_thumbnail(
        layout.thumbnail(name),
        image.numpy(),
        pixel_size_angstrom=pixel,
        centres_yx_px=picks.centres_yx_px,
        diameter_angstrom=settings.particle_diameter_angstrom,
    )


def _extract(
    exposure: Exposure,
    image: Tensor,
    picks: Picks,
    ctf: CtfFit,
    settings: PreprocessSettings,
    layout: OutputLayout,
    clock: _Clock,
) -> int:
    """Write the stack and its table; return how many boxes lay inside the micrograph."""
    boxes = settings.boxes
    shape_yx = (int(image.shape[0]), int(image.shape[1]))
    kept = np.flatnonzero(boxes_inside(picks.centres_yx_px, shape_yx, boxes.box_size_px))
    if not len(kept):
        return 0
    batches = (b.numpy() for b in extract_particles(image, picks.centres_yx_px[kept], boxes))
    with clock.measure("extract"):
        write_stack(
            layout.particles(exposure.name),
            batches,
            n_images=len(kept),
            box_size_px=boxes.extract_box_px,
            pixel_size_angstrom=settings.particle_pixel_size_angstrom,
            is_float16=settings.is_float16,
        )
    with clock.measure("write"):
        _write_particles_table(exposure, picks, kept, ctf, settings, layout)
    return len(kept)


def _write_particles_table(
    exposure: Exposure,
    picks: Picks,
    kept: np.ndarray[tuple[int], np.dtype[np.int64]],
    ctf: CtfFit,
    settings: PreprocessSettings,
    layout: OutputLayout,
) -> None:
    stack = layout.relative(layout.particles(exposure.name))
    uids = [derive_particle_uid(exposure.exposure_id, int(index)) for index in kept]
    table = pd.DataFrame(
        {
            "rlnImageName": [f"{row + 1:06d}@{stack}" for row in range(len(kept))],
            "rlnMicrographName": layout.relative(layout.micrograph(exposure.name)),
            "rlnCoordinateX": picks.centres_yx_px[kept, 1].astype(np.float64),
            "rlnCoordinateY": picks.centres_yx_px[kept, 0].astype(np.float64),
            "rlnDefocusU": ctf.defocus_u_angstrom,
            "rlnDefocusV": ctf.defocus_v_angstrom,
            "rlnDefocusAngle": ctf.astigmatism_angle_deg,
            "rlnPhaseShift": ctf.phase_shift_deg,
            "rlnAutopickFigureOfMerit": picks.scores[kept].astype(np.float64),
            "rlnOpticsGroup": 1,
            "icestreamUid": np.array(uids, dtype=np.uint64),
        }
    )
    optics = make_particle_optics(
        settings.optics,
        image_pixel_size_angstrom=settings.particle_pixel_size_angstrom,
        image_size_px=settings.boxes.extract_box_px,
    )
    write_particles_star(layout.particles_table(exposure.name), table, optics)
