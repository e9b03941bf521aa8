"""Picks of a micrograph, with their files."""

from __future__ import annotations

from torch import Tensor

from actors.preprocess.clock import StageClock
from actors.preprocess.ctf import CtfMeasurement
from actors.preprocess.settings import PreprocessSettings
from models.picking.blob import BlobSettings, Picks, pick_blobs
from stream.records.values import RunId
from stream.sinks.pictures import write_thumbnail
from stream.sinks.relion_star import write_picks_star
from stream.store.layout import OutputLayout


def pick_particles(
    image: Tensor,
    pixel: float,
    settings: PreprocessSettings,
    measured: CtfMeasurement,
    layout: OutputLayout,
    template_run: RunId | None,
    clock: StageClock,
) -> Picks:
    """Pick particles of the session's diameter on a micrograph."""
    del measured, layout, template_run
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


def write_picks(
    layout: OutputLayout, name: str, image: Tensor, pixel: float, picks: Picks, settings: PreprocessSettings
) -> None:
    """Write the picks and the micrograph's picture with them drawn in."""
    write_picks_star(layout.picks(name), picks.centres_yx_px, picks.scores)
    write_thumbnail(
        layout.thumbnail(name),
        image.numpy(),
        pixel_size_angstrom=pixel,
        centres_yx_px=picks.centres_yx_px,
        diameter_angstrom=settings.particle_diameter_angstrom,
    )
