"""Extracted particles of a micrograph: the stack and its table."""

from __future__ import annotations

import numpy as np
import pandas as pd
from torch import Tensor

from actors.preprocess.clock import StageClock
from actors.preprocess.ctf import CtfMeasurement
from actors.preprocess.settings import PreprocessSettings
from models.picking.extract import boxes_inside, extract_particles
from models.picking.maxima import Picks
from stream.records.particles import derive_particle_uid
from stream.records.values import Exposure
from stream.sinks.mrc_images import write_stack
from stream.sinks.relion_star import make_particle_optics, write_particles_star
from stream.store.layout import OutputLayout


def write_particles(
    exposure: Exposure,
    image: Tensor,
    picks: Picks,
    ctf: CtfMeasurement,
    settings: PreprocessSettings,
    layout: OutputLayout,
    clock: StageClock,
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
    measured: CtfMeasurement,
    settings: PreprocessSettings,
    layout: OutputLayout,
) -> None:
    stack = layout.relative(layout.particles(exposure.name))
    ctf, offsets = measured.fit, measured.defocus_offsets_angstrom(picks.centres_yx_px[kept])
    uids = [derive_particle_uid(exposure.exposure_id, int(index)) for index in kept]
    table = pd.DataFrame(
        {
            "rlnImageName": [f"{row + 1:06d}@{stack}" for row in range(len(kept))],
            "rlnMicrographName": layout.relative(layout.micrograph(exposure.name)),
            "rlnCoordinateX": picks.centres_yx_px[kept, 1].astype(np.float64),
            "rlnCoordinateY": picks.centres_yx_px[kept, 0].astype(np.float64),
            "rlnDefocusU": ctf.defocus_u_angstrom + offsets,
            "rlnDefocusV": ctf.defocus_v_angstrom + offsets,
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
