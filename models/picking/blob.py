"""Blob picking: balls and shells of a range of diameters, and ellipses where asked for, on a binned micrograph.

Protein is dark in a micrograph; the picker works on its negative. Scores are calibrated on noise (`calibration.py`),
so that one threshold serves every dose, thickness and number of templates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from models.picking.calibration import Calibration, calibrate_on_noise
from models.picking.correlation import (
    CONTAMINATION_SD,
    PIXELS_PER_DIAMETER,
    TemplateBank,
    coarsen_micrograph,
    correlate,
)
from models.picking.maxima import Picks, find_maxima

# A template's surround, in radii, and the radii of the hollow in its shells (0: a ball; 0.66: a ferritin). The
# wide surround of a Laplacian of Gaussian reaches into the neighbours of a dense field.
_SUPPORT = 1.3
_HOLLOWS = (0.0, 0.66)
# Turns of an ellipse and steps of its aspect ratio: half a step changes the response by less than 5 %.
_TURN_STEP_DEG = 22.5
_ASPECT_STEP = 1.4
# Noise drawn once a session: 1,600 particle-sized areas settle the calibration to 0.05.
_NOISE_SIDE_PX = 640
DEFAULT_THRESHOLD = 2.5
"""Calibrated score of a pick: noise gives one in 160 particle-sized areas, a few a micrograph."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobSettings:
    """What a particle looks like and how many there may be.

    Diameters are in Å; `n_scales` are spread evenly over the range. `max_aspect_ratio` above 1 adds ellipses up
    to that ratio of length to width, every 22.5° (the diameters are then those of circles of the same area;
    1.4 adds 8 templates a scale, 2.0 adds 16; only for particles known to be elongated, since every template
    more also fits noise and neighbours). `min_distance_angstrom` separates picks (None: 0.75 of the mean
    diameter). `threshold` is a calibrated z-score (safe: 2-4). `border_angstrom` keeps picks away from the
    edge. `contamination_sd` is the limit of the contamination mask in robust standard deviations.
    """

    min_diameter_angstrom: float
    max_diameter_angstrom: float
    n_scales: int = 3
    max_aspect_ratio: float = 1.0
    min_distance_angstrom: float | None = None
    threshold: float = DEFAULT_THRESHOLD
    max_picks: int = 2000
    border_angstrom: float = 0.0
    contamination_sd: float = CONTAMINATION_SD

    def __post_init__(self) -> None:
        """Refuse shapes that no particle has."""
        if not 1.0 <= self.max_aspect_ratio <= 4.0:
            raise ValueError(f"max_aspect_ratio: {self.max_aspect_ratio}, must lie in [1, 4]")
        if self.max_diameter_angstrom < self.min_diameter_angstrom:
            raise ValueError(
                f"max_diameter_angstrom: {self.max_diameter_angstrom}, must not be below "
                f"{self.min_diameter_angstrom}"
            )


def pick_blobs(micrograph: Float[Tensor, "h w"], pixel_size_angstrom: float, settings: BlobSettings) -> Picks:
    """Pick dark blobs of the given diameters."""
    if settings.min_diameter_angstrom <= 4.0 * pixel_size_angstrom:
        raise ValueError(
            f"min_diameter_angstrom: {settings.min_diameter_angstrom}, must be over four pixels "
            f"({pixel_size_angstrom} Å each)"
        )
    mean_diameter = 0.5 * (settings.min_diameter_angstrom + settings.max_diameter_angstrom)
    coarse = coarsen_micrograph(
        micrograph,
        pixel_size_angstrom,
        coarse_pixel_angstrom=settings.min_diameter_angstrom / PIXELS_PER_DIAMETER,
        diameter_angstrom=mean_diameter,
        contamination_sd=settings.contamination_sd,
    )
    pixel = coarse.pixel_size_angstrom
    shapes = blob_shapes(settings)
    banks = _blob_banks(shapes, pixel)
    calibration = _calibrate_blobs(shapes, pixel, mean_diameter / pixel)
    response, which = (found.cpu() for found in _best_response(coarse.flat, banks))
    maxima = find_maxima(
        response,
        coarse.mask,
        threshold=calibration.raw_threshold(settings.threshold),
        min_distance_px=(settings.min_distance_angstrom or 0.75 * mean_diameter) / pixel,
        border_px=settings.border_angstrom / pixel,
        max_picks=settings.max_picks,
    )
    diameters = np.array([shape.diameter_angstrom for shape in shapes], dtype=np.float32)
    best = which.numpy()[maxima.pixels_yx[:, 0], maxima.pixels_yx[:, 1]]
    return Picks(
        centres_yx_px=(maxima.centres_yx * np.asarray(coarse.scale_yx)).astype(np.float32),
        scores=calibration.calibrate(maxima.values).astype(np.float32),
        diameters_angstrom=diameters[best],
        mask=coarse.mask.numpy(),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobShape:
    """An ellipsoid of revolution seen from the side, less `hollow` of its radii; the angle is from x to its length."""

    diameter_angstrom: float
    hollow: float
    aspect_ratio: float
    angle_deg: float


def blob_shapes(settings: BlobSettings) -> tuple[BlobShape, ...]:
    """Return the shapes that the settings ask for."""
    n_scales = settings.n_scales if settings.max_diameter_angstrom > settings.min_diameter_angstrom else 1
    diameters = np.linspace(settings.min_diameter_angstrom, settings.max_diameter_angstrom, n_scales)
    if n_scales == 1:
        diameters = np.array([0.5 * (settings.min_diameter_angstrom + settings.max_diameter_angstrom)])
    n_aspects = max(0, round(math.log(settings.max_aspect_ratio) / math.log(_ASPECT_STEP)))
    if settings.max_aspect_ratio > 1.0:
        n_aspects = max(1, n_aspects)
    shapes = []
    for diameter in diameters.tolist():
        shapes += [
            BlobShape(diameter_angstrom=diameter, hollow=hollow, aspect_ratio=1.0, angle_deg=0.0)
            for hollow in _HOLLOWS
        ]
        shapes += [
            BlobShape(
                diameter_angstrom=diameter,
                hollow=0.0,
                aspect_ratio=settings.max_aspect_ratio ** ((i + 1) / n_aspects),
                angle_deg=angle,
            )
            for i in range(n_aspects)
            for angle in np.arange(0.0, 180.0, _TURN_STEP_DEG).tolist()
        ]
    return tuple(shapes)


def _blob_banks(shapes: tuple[BlobShape, ...], pixel: float) -> tuple[TemplateBank, ...]:
    return tuple(_blob_bank(shape, pixel) for shape in shapes)


def _blob_bank(shape: BlobShape, pixel: float) -> TemplateBank:
    """Return the projection of an ellipsoid and its support, which ends at 1.3 radii."""
    radius = 0.5 * shape.diameter_angstrom / pixel
    long, short = radius * math.sqrt(shape.aspect_ratio), radius / math.sqrt(shape.aspect_ratio)
    half = math.ceil(_SUPPORT * long)
    axis = torch.arange(-half, half + 1, dtype=torch.float32)
    y, x = axis[:, None], axis[None, :]
    angle = math.radians(shape.angle_deg)
    along = x * math.cos(angle) + y * math.sin(angle)
    across = y * math.cos(angle) - x * math.sin(angle)
    r2 = (along / long).square() + (across / short).square()
    ball = (1.0 - r2).clamp(min=0.0).sqrt()
    if shape.hollow > 0.0:
        ball = ball - shape.hollow * (1.0 - r2 / shape.hollow**2).clamp(min=0.0).sqrt()
    return TemplateBank(templates=ball[None], support=r2 <= _SUPPORT**2)


def _best_response(flat: Tensor, banks: tuple[TemplateBank, ...]) -> tuple[Tensor, Tensor]:
    best, _ = correlate(flat, banks[0])
    which = torch.zeros_like(best, dtype=torch.int64)
    for index, bank in enumerate(banks[1:], start=1):
        response, _ = correlate(flat, bank)
        which = torch.where(response > best, index, which)
        best = torch.maximum(best, response)
    return best, which


@lru_cache(maxsize=8)
def _calibrate_blobs(shapes: tuple[BlobShape, ...], pixel: float, diameter_px: float) -> Calibration:
    """Measure noise peaks of the blobs; kept, because a session's micrographs share pixel and shapes."""
    banks = _blob_banks(shapes, pixel)
    return calibrate_on_noise(
        lambda noise: _best_response(noise, banks)[0],
        diameter_px=diameter_px,
        n_support_px=float(np.mean([float(bank.support.sum()) for bank in banks])),
        side_px=_NOISE_SIDE_PX,
    )
