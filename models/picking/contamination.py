"""Where not to pick: carbon, holes, ice crystals, ethane drops and aggregates, found on the binned micrograph.

Nothing here is trained. An area is contamination when it is unlike most of its micrograph, in brightness or
in texture, and larger (or much stronger) than a particle. What it cannot see: a micrograph that is spoiled
throughout, because there is nothing left to compare with (ice and CTF figures judge those).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from models.fourier.filters import smooth_gaussian

# Two halves of an even slope are 3.5 of their standard deviations apart; an edge is more (safe: 4-6).
_EDGE_SEPARATION = 4.5
_MIN_EDGE_FRACTION = 0.08
# Of the smaller side's area, at most this much may lie between the two values: a dome is not an edge.
_MAX_BETWEEN = 0.3
# What is larger than this many particles is none; nor is what is this much over the limit, however small
# (isolated particles of ferritin reach 0.8 of the limit; safe: 1.3-3).
_LARGE, _STRONG = 1.2, 1.5
# With this many odd areas, those up to some particles in size have to be twice as strong as the usual one.
_POPULATION, _HUGE = 8, 4.0
# Found areas reach down to this part of the limit or of their own peak, whichever is more: half of the peak is
# where a smoothed edge lies, and what is uneven inside needs some room below (safe: 0.25-0.5, and 0.5-0.7 of a logarithm).
_REACH, _REACH_OF_PEAK, _REACH_OF_LOG_PEAK = 0.5, 0.35, 0.6
# Spreads of the two maps below which differences are noise: in grey SD, and in log variance.
_MIN_SPREAD, _MIN_LOG_SPREAD = 0.05, 0.15
# Squares count up to this many times the variance (safe: 9-25).
_OUTLIER_VARIANCE = 16.0


def find_contamination(
    image: Float[Tensor, "h w"], diameter_px: float, limit_sd: float
) -> Bool[Tensor, "h w"]:
    """Return the masked area of a binned micrograph (sign and scale do not matter) that was not flattened.

    In order: the smaller side of a sharp edge between two brightnesses or textures (carbon, holes); areas whose local mean
    (over a third of a diameter, less a plane) or local log variance (over one and a half) is off by more than
    `limit_sd` robust standard deviations. Such an area counts when it is larger than a particle, or half as
    strong again; it is followed out to half the limit (or a third of its own peak), filled and grown by a quarter of a diameter.
    """
    particle_px = math.pi * (0.5 * diameter_px) ** 2
    mean = smooth_gaussian(image, max(1.0, 0.35 * diameter_px))
    residual = image - mean
    # a few columns of the detector that are far off must not spread over a diameter and a half
    typical = 2.2 * float(residual.square().median())
    squares = residual.square().clamp(max=_OUTLIER_VARIANCE * max(typical, 1e-30))
    texture_sd = float(residual.std())
    if texture_sd <= 0.0:
        return torch.zeros(image.shape, dtype=torch.bool)
    mask = _smaller_side_of_an_edge(smooth_gaussian(image, 1.5 * diameter_px).numpy())
    if not mask.any():
        mask = _smaller_side_of_an_edge(_log_variance(squares, diameter_px))
    level = mean.numpy() - _plane_of(mean.numpy(), ~mask)
    found = _odd_areas(level, mask, _MIN_SPREAD * texture_sd, limit_sd, particle_px, _REACH_OF_PEAK)
    # what is odd in brightness must not lend its variance, least of all its rim's, to its surroundings
    lent = torch.from_numpy(grow(mask | found, 0.75 * diameter_px))
    squares = torch.where(lent, typical, squares)
    found |= _odd_areas(
        _log_variance(squares, diameter_px),
        mask | found,
        _MIN_LOG_SPREAD,
        limit_sd,
        particle_px,
        _REACH_OF_LOG_PEAK,
    )
    return torch.from_numpy(grow(ndimage.binary_fill_holes(mask | found), 0.25 * diameter_px))


def grow(mask: NDArray[np.bool_], distance_px: float) -> NDArray[np.bool_]:
    """Return the mask and everything within a distance of it."""
    if not mask.any():
        return mask
    return np.asarray(ndimage.distance_transform_edt(~mask) <= distance_px)


def _log_variance(squares: Tensor, diameter_px: float) -> NDArray[np.float32]:
    variance = smooth_gaussian(squares, 1.5 * diameter_px)
    return np.asarray(variance.clamp(min=1e-6 * float(squares.mean())).log().numpy())


def _smaller_side_of_an_edge(values: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Return the smaller of two areas when a sharp edge parts the map's values in two, else nothing."""
    threshold = _otsu_threshold(values)
    is_high = values > threshold
    fraction = float(is_high.mean())
    nothing = np.zeros(values.shape, dtype=bool)
    if not _MIN_EDGE_FRACTION <= fraction <= 1.0 - _MIN_EDGE_FRACTION:
        return nothing
    high, low = values[is_high], values[~is_high]
    spread = math.sqrt(0.5 * (float(high.var()) + float(low.var())))
    top, bottom = float(np.median(high)), float(np.median(low))
    if top - bottom < _EDGE_SEPARATION * max(spread, 1e-12):
        return nothing
    part = (values - bottom) / (top - bottom)
    if float(((part > 0.3) & (part < 0.7)).mean()) > _MAX_BETWEEN * min(fraction, 1.0 - fraction):
        return nothing
    return np.asarray(is_high if fraction < 0.5 else ~is_high)


def _otsu_threshold(values: NDArray[np.float32]) -> float:
    """Return the grey value that parts the histogram with the greatest variance between its parts."""
    counts, edges = np.histogram(values, bins=256)
    centres = 0.5 * (edges[:-1] + edges[1:])
    below = np.cumsum(counts)
    above = below[-1] - below
    sums = np.cumsum(counts * centres)
    usable = (below > 0) & (above > 0)
    difference = sums / np.maximum(below, 1) - (sums[-1] - sums) / np.maximum(above, 1)
    between = np.where(usable, below * above * difference**2, -1.0)
    return float(edges[int(between.argmax()) + 1])


def _plane_of(values: NDArray[np.float32], is_used: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return the plane through the used pixels that outliers do not bend (Tukey's biweight, ten rounds)."""
    height, width = values.shape
    y = np.linspace(-1.0, 1.0, height)[:, None] * np.ones((1, width))
    x = np.linspace(-1.0, 1.0, width)[None, :] * np.ones((height, 1))
    step = max(1, round(math.sqrt(values.size / 40_000)))
    used = is_used[::step, ::step]
    columns = [np.ones_like(y), y, x]
    design = np.stack([c[::step, ::step][used] for c in columns], axis=1)
    target = values[::step, ::step][used].astype(np.float64)
    coefficients = np.array([np.median(target), 0.0, 0.0])
    for _ in range(10):
        error = target - design @ coefficients
        scale = max(4.685 * 1.4826 * float(np.median(np.abs(error))), 1e-12)
        weight = np.square(np.clip(1.0 - np.square(error / scale), 0.0, None))
        weighted = design * weight[:, None]
        coefficients = np.linalg.lstsq(weighted.T @ design, weighted.T @ target, rcond=None)[0]
    return np.asarray(sum(c * column for c, column in zip(coefficients, columns, strict=True)))


def _odd_areas(
    values: NDArray[np.floating],
    is_ignored: NDArray[np.bool_],
    min_spread: float,
    limit_sd: float,
    particle_px: float,
    reach_of_peak: float,
) -> NDArray[np.bool_]:
    """Return the areas of values off by more than the limit that are large or strong, out to half the limit."""
    kept = values[~is_ignored]
    centre = float(np.median(kept))
    spread = max(1.4826 * float(np.median(np.abs(kept - centre))), min_spread)
    z = np.where(is_ignored, 0.0, np.abs(values - centre) / spread)
    seeds, n_seeds = ndimage.label(z > limit_sd)
    if n_seeds == 0:
        return np.zeros(values.shape, dtype=bool)
    index = np.arange(1, n_seeds + 1)
    areas = np.bincount(seeds.ravel(), minlength=n_seeds + 1)[1:]
    peaks = ndimage.maximum(z, seeds, index)
    grown, n_grown = ndimage.label(z > _REACH * limit_sd)
    heights = np.concatenate([[0.0], ndimage.maximum(z, grown, np.arange(1, n_grown + 1))])
    # many things of a particle's size and like strength are the particles
    sizes = np.bincount(grown.ravel(), minlength=n_grown + 1)
    population = heights[1:][sizes[1:] > 0.25 * particle_px]
    usual = float(np.median(population)) if len(population) >= _POPULATION else 0.0
    is_seed = (areas > _LARGE * particle_px) | ((areas > 0.5 * particle_px) & (peaks > _STRONG * limit_sd))
    is_seed &= (areas > _HUGE * particle_px) | (peaks > 2.0 * usual)
    seed_mask = np.isin(seeds, index[is_seed])
    touched = np.unique(grown[seed_mask])
    is_near = np.isin(grown, touched[touched > 0])
    return np.asarray(is_near & (z > reach_of_peak * heights[grown]))
