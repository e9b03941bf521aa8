"""How the specimen moves during an exposure: whole-frame drift and smooth beam-induced motion.

Displacements are of the specimen, (y, x) in px, relative to the first frame (whose coordinates the truth
uses). RELION's `rlnMicrographShiftX/Y` are the corrections, that is minus these.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from models.simulation.settings import MicroscopeSettings

FloatArray = npt.NDArray[np.float64]

BEAM_INDUCED_DECAY_E_PER_ANGSTROM2 = 5.0
"""Beam-induced motion settles with this dose (most of it happens within the first 5-10 e/Å²)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Motion:
    """One exposure's motion.

    `global_yx_px` is (frame, yx); `local_coefficients_yx_px` is (yx, 5): factors of x, x², y, y², xy with x
    and y in [-0.5, 0.5] across the frame; `local_progress` (frame,) goes from 0 to at most 1.
    """

    global_yx_px: FloatArray
    local_coefficients_yx_px: FloatArray
    local_progress: FloatArray
    shape_yx_px: tuple[int, int]

    def local_yx_px(self, y_px: npt.ArrayLike, x_px: npt.ArrayLike) -> FloatArray:
        """Return the local displacement (frame, point, yx) at positions in the frame."""
        y = np.atleast_1d(np.asarray(y_px, dtype=np.float64)) / self.shape_yx_px[0] - 0.5
        x = np.atleast_1d(np.asarray(x_px, dtype=np.float64)) / self.shape_yx_px[1] - 0.5
        terms = np.stack((x, x * x, y, y * y, x * y), axis=-1)
        field = terms @ self.local_coefficients_yx_px.T
        return np.asarray(self.local_progress[:, None, None] * field[None], dtype=np.float64)


def draw_motion(settings: MicroscopeSettings, rng: np.random.Generator) -> Motion:
    """Draw drift (a decaying start, a steady part, jitter) and a quadratic field that decays with dose."""
    n = settings.n_frames
    dose = (np.arange(n) + 0.5) * settings.dose_per_frame_e_per_angstrom2
    settled = 1.0 - np.exp(-dose / BEAM_INDUCED_DECAY_E_PER_ANGSTROM2)
    fraction = dose / max(settings.dose_e_per_angstrom2, 1e-9)
    angles = rng.uniform(0.0, 2.0 * math.pi, size=2)
    early = rng.uniform(0.2, 0.7)
    path = settings.motion_angstrom * rng.uniform(0.6, 1.4)
    smooth = early * settled[:, None] * _unit(angles[0]) + (1.0 - early) * fraction[:, None] * _unit(
        angles[1]
    )
    jitter = 0.02 * settings.motion_angstrom * rng.normal(size=(n, 2))
    displacement = path * smooth + jitter
    displacement -= displacement[0]
    # At the edge (|x| = 0.5) linear terms give half and quadratic terms a quarter of their coefficient.
    scale = settings.local_motion_angstrom * np.array([1.2, 2.0, 1.2, 2.0, 2.0])
    coefficients = rng.normal(size=(2, 5)) * scale
    return Motion(
        global_yx_px=displacement / settings.pixel_size_angstrom,
        local_coefficients_yx_px=coefficients / settings.pixel_size_angstrom,
        local_progress=settled - settled[0],
        shape_yx_px=settings.shape_yx_px,
    )


def _unit(angle_rad: float) -> FloatArray:
    return np.array([math.sin(angle_rad), math.cos(angle_rad)])
