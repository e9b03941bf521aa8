"""From a map of scores to picks: local maxima, one per particle, away from masked areas and the border."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import cKDTree
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Picks:
    """Centres `(pick yx)` in pixels of the micrograph, best first; `scores` are calibrated (`calibration.py`).

    `diameters_angstrom` are those of the best templates. `template_index` and `in_plane_deg` say which view of
    a map and which turn of it fitted best (None for blobs). `mask` is the excluded area on the picker's coarse
    grid, over the same field of view.
    """

    centres_yx_px: NDArray[np.float32]
    scores: NDArray[np.float32]
    diameters_angstrom: NDArray[np.float32]
    mask: NDArray[np.bool_]
    template_index: NDArray[np.int64] | None = None
    in_plane_deg: NDArray[np.float32] | None = None

    @property
    def excluded_fraction(self) -> float:
        """Part of the micrograph's area that was masked."""
        return float(self.mask.mean())


def leave_out(picks: Picks, shape_yx: tuple[int, int], *, border_px: float, max_picks: int) -> Picks:
    """Return an external picker's picks without those in masked areas, near the border or beyond the best ones."""
    centres = picks.centres_yx_px
    limits = np.asarray(shape_yx)
    cells = np.floor(centres * (np.asarray(picks.mask.shape) / limits)).astype(np.int64)
    cells = np.clip(cells, 0, np.asarray(picks.mask.shape) - 1)
    inside = ((centres >= border_px) & (centres <= limits - 1 - border_px)).all(axis=1)
    kept = np.flatnonzero(inside & ~picks.mask[cells[:, 0], cells[:, 1]])[:max_picks]
    return Picks(
        centres_yx_px=centres[kept],
        scores=picks.scores[kept],
        diameters_angstrom=picks.diameters_angstrom[kept],
        mask=picks.mask,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Maxima:
    """Positions `(n yx)` to a fraction of a pixel, the pixels they are in, and their values; best first."""

    centres_yx: NDArray[np.float64]
    pixels_yx: NDArray[np.int64]
    values: NDArray[np.float64]


def find_maxima(
    scores: Float[Tensor, "h w"],
    mask: Bool[Tensor, "h w"],
    *,
    threshold: float,
    min_distance_px: float,
    border_px: float,
    max_picks: int,
) -> Maxima:
    """Return maxima of their 3 × 3 neighbourhood, thinned greedily by distance, best first."""
    best, masked = scores.numpy(), mask.numpy()
    border = max(1, math.ceil(border_px))
    is_peak = (best == ndimage.maximum_filter(best, size=3)) & (best >= threshold) & ~masked
    is_peak[:border] = is_peak[-border:] = False
    is_peak[:, :border] = is_peak[:, -border:] = False
    rows, columns = np.nonzero(is_peak)
    order = np.argsort(-best[rows, columns], kind="stable")
    pixels = np.stack([rows, columns], axis=1)[order].astype(np.int64)
    kept = _thin(pixels, min_distance_px, max_picks)
    chosen = pixels[kept]
    refined = [_vertex(best, int(y), int(x)) for y, x in chosen]
    return Maxima(
        centres_yx=np.array(refined, dtype=np.float64).reshape(-1, 2),
        pixels_yx=chosen,
        values=best[chosen[:, 0], chosen[:, 1]].astype(np.float64),
    )


def _thin(pixels: NDArray[np.int64], min_distance_px: float, max_picks: int) -> list[int]:
    """Return the rows that stay when each takes away the later ones within the distance."""
    if not len(pixels):
        return []
    neighbours = cKDTree(pixels).query_ball_point(pixels, min_distance_px)
    is_free = np.ones(len(pixels), dtype=bool)
    kept: list[int] = []
    for i in range(len(pixels)):
        if is_free[i]:
            kept.append(i)
            is_free[neighbours[i]] = False
            if len(kept) == max_picks:
                break
    return kept


def _vertex(image: NDArray[np.float32], y: int, x: int) -> tuple[float, float]:
    """Return the vertex of the parabolas through a maximum and its neighbours along each axis."""

    def offset(low: float, middle: float, high: float) -> float:
        curvature = low - 2.0 * middle + high
        return 0.0 if curvature >= 0.0 else max(-0.5, min(0.5, 0.5 * (low - high) / curvature))

    dy = offset(float(image[y - 1, x]), float(image[y, x]), float(image[y + 1, x]))
    dx = offset(float(image[y, x - 1]), float(image[y, x]), float(image[y, x + 1]))
    return y + dy, x + dx
