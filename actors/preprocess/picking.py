"""Picks of a micrograph, with their files: by blobs, by templates from a run's map, or by Topaz."""

from __future__ import annotations

from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from torch import Tensor

from actors.preprocess.clock import StageClock
from actors.preprocess.ctf import CtfMeasurement
from actors.preprocess.settings import PreprocessSettings
from actors.topaz import TopazSettings, run_topaz
from models.optics.ctf import evaluate_ctf
from models.picking.blob import BlobSettings, pick_blobs
from models.picking.correlation import mask_micrograph
from models.picking.maxima import Picks, leave_out
from models.picking.template import MapTemplates, TemplatePickSettings, make_templates, pick_templates
from models.reconstruction.volume_io import read_volume
from stream.records.errors import ConfigurationError
from stream.records.values import CtfFit, Optics, RunId
from stream.sinks.pictures import write_thumbnail
from stream.sinks.relion_star import write_picks_star
from stream.store.layout import OutputLayout


def name_picker(settings: PreprocessSettings, measured: CtfMeasurement, template_run: RunId | None) -> str:
    """Return what picks this micrograph: "topaz", "template:RUN" or "blob".

    Without Thon rings nobody knows how a template looks in the micrograph, and blobs pick.
    """
    if settings.picker == "topaz":
        return "topaz"
    if template_run is not None and measured.fit.is_reliable:
        return f"template:{template_run}"
    return "blob"


def pick_particles(
    name: str,
    image: Tensor,
    pixel: float,
    settings: PreprocessSettings,
    measured: CtfMeasurement,
    layout: OutputLayout,
    template_run: RunId | None,
    clock: StageClock,
) -> Picks:
    """Pick particles of the session's diameter on a micrograph that has been written; see `name_picker`."""
    picker = name_picker(settings, measured, template_run)
    with clock.measure("pick"):
        if picker == "topaz":
            return _pick_by_topaz(layout.micrograph(name), image, pixel, settings)
        if template_run is not None and picker != "blob":
            path = layout.run(template_run) / "map.mrc"
            return _pick_by_templates(image, pixel, settings, measured.fit, path)
        return _pick_blobs(image, pixel, settings)


def _pick_blobs(image: Tensor, pixel: float, settings: PreprocessSettings) -> Picks:
    diameter = settings.particle_diameter_angstrom
    blobs = BlobSettings(
        min_diameter_angstrom=diameter * (1.0 - settings.pick_diameter_tolerance),
        max_diameter_angstrom=diameter * (1.0 + settings.pick_diameter_tolerance),
        threshold=settings.pick_threshold_sd,
        max_picks=settings.max_picks,
        border_angstrom=0.5 * diameter,
    )
    return pick_blobs(image, pixel, blobs)


def _pick_by_templates(
    image: Tensor, pixel: float, settings: PreprocessSettings, fit: CtfFit, path: Path
) -> Picks:
    diameter = settings.particle_diameter_angstrom
    try:
        mtime_ns = path.stat().st_mtime_ns
    except FileNotFoundError as error:
        raise ConfigurationError(path, "the run that gives templates has a map") from error
    picking = TemplatePickSettings(
        threshold=settings.pick_threshold_sd, max_picks=settings.max_picks, border_angstrom=0.5 * diameter
    )
    templates = _load_templates(path, mtime_ns, diameter)
    return pick_templates(image, pixel, templates, _ctf(fit, settings.optics), picking)


@lru_cache(maxsize=1)
def _load_templates(path: Path, mtime_ns: int, diameter_angstrom: float) -> MapTemplates:
    """Read and project a map; kept between exposures until the file changes or another run takes over."""
    del mtime_ns  # part of the cache's key alone
    volume, pixel = read_volume(path)
    return make_templates(volume, pixel, diameter_angstrom=diameter_angstrom)


def _ctf(fit: CtfFit, optics: Optics) -> partial[Tensor]:
    return partial(
        evaluate_ctf,
        defocus_u_angstrom=fit.defocus_u_angstrom,
        defocus_v_angstrom=fit.defocus_v_angstrom,
        astigmatism_angle_deg=fit.astigmatism_angle_deg,
        phase_shift_deg=fit.phase_shift_deg,
        voltage_kv=optics.voltage_kv,
        cs_mm=optics.cs_mm,
        amplitude_contrast=optics.amplitude_contrast,
    )


def _pick_by_topaz(path: Path, image: Tensor, pixel: float, settings: PreprocessSettings) -> Picks:
    """Run Topaz on the written micrograph; its picks leave contamination and the border out as ours do."""
    if settings.topaz_executable is None:
        raise ConfigurationError("topaz_executable", "the picker topaz needs its program")
    diameter = settings.particle_diameter_angstrom
    topaz = TopazSettings(
        executable=settings.topaz_executable, model=settings.topaz_model, diameter_angstrom=diameter
    )
    centres, scores = run_topaz(path, pixel, topaz)
    picks = Picks(
        centres_yx_px=centres,
        scores=scores,
        diameters_angstrom=np.full(len(scores), diameter, dtype=np.float32),
        mask=mask_micrograph(image, pixel, diameter_angstrom=diameter),
    )
    shape_yx = (int(image.shape[0]), int(image.shape[1]))
    return leave_out(picks, shape_yx, border_px=0.5 * diameter / pixel, max_picks=settings.max_picks)


def write_picks(
    layout: OutputLayout, name: str, image: Tensor, pixel: float, picks: Picks, settings: PreprocessSettings
) -> None:
    """Write the picks and the micrograph's picture with them, and with the outline of what was masked."""
    write_picks_star(layout.picks(name), picks.centres_yx_px, picks.scores)
    write_thumbnail(
        layout.thumbnail(name),
        image.numpy(),
        pixel_size_angstrom=pixel,
        centres_yx_px=picks.centres_yx_px,
        diameter_angstrom=settings.particle_diameter_angstrom,
        mask=picks.mask,
    )
