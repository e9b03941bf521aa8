"""How the defocus varies across a micrograph: a plane (a tilted specimen), bent where the data say so.

Every tile's spectrum is compared with the fitted CTF at a range of defocus offsets: one table of d·m by (tile, offset),
with the meaning of `ctf_search.py`. The likelihood of a map of offsets is that of all tiles at once: they
share astigmatism, background and the height of the rings, so that no tile has to be fitted by itself. A map is accepted
only where its gain in log-likelihood over the flat one is beyond what noise gives; else all offsets are zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor

from models.fourier.spectra import iterate_tile_powers
from models.optics.ctf_fit import FittedCtf
from models.optics.ctf_rings import FloatArray, Microscope, RingSpectrum, ring_bins, rings_from_polar
from models.optics.ctf_search import CtfSearch, correlation_inflation, estimate_envelope, shrink_profile

_TILE_ANGSTROM = 400.0
_MIN_TILES = 9
_OFFSET_STEP_ANGSTROM = 40.0
_MAX_OFFSET_ANGSTROM = 4000.0
# Gain in log-likelihood that a plane needs over a level map, and a bent map over a plane. Flat simulated micrographs
# stay below 7, real ones whose tiles are shuffled below 9.
_MIN_GAIN = 15.0
_PLANE, _BENT = 3, 6


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalDefocus:
    """Offsets from the micrograph's mean defocus: c0 + c1 y + c2 x (+ c3 y² + c4 xy + c5 x²), in Å.

    y and x run from -1 to 1 over `half_side_px` around `centre_yx_px`. `gain` is the log-likelihood over the
    flat map's; where `is_significant` is False the coefficients are zero.
    """

    coefficients_angstrom: tuple[float, ...]
    centre_yx_px: tuple[float, float]
    half_side_px: float
    pixel_size_angstrom: float
    gain: float
    n_tiles: int
    gradient_sd_angstrom_per_um: float

    @property
    def is_significant(self) -> bool:
        """Whether the defocus varies beyond doubt."""
        return any(self.coefficients_angstrom)

    @property
    def gradient_yx(self) -> tuple[float, float]:
        """Slope of the defocus at the centre, Å per Å."""
        length = self.half_side_px * self.pixel_size_angstrom
        return self.coefficients_angstrom[1] / length, self.coefficients_angstrom[2] / length

    @property
    def gradient_angstrom_per_um(self) -> float:
        """Size of the slope at the centre."""
        return 1e4 * math.hypot(*self.gradient_yx)

    @property
    def tilt_deg(self) -> float:
        """Tilt of a plane specimen with this slope."""
        return math.degrees(math.atan(math.hypot(*self.gradient_yx)))

    def defocus_at(
        self, y_px: NDArray[np.floating] | float, x_px: NDArray[np.floating] | float
    ) -> NDArray[np.float64]:
        """Return what to add to defocus U and V at these positions, in Å."""
        y = (np.asarray(y_px, dtype=np.float64) - self.centre_yx_px[0]) / self.half_side_px
        x = (np.asarray(x_px, dtype=np.float64) - self.centre_yx_px[1]) / self.half_side_px
        return np.asarray(
            sum(c * t for c, t in zip(self.coefficients_angstrom, _terms(y, x), strict=False)) + 0.0 * y
        )


def fit_local_defocus(
    image: Float[Tensor, "h w"],
    pixel_size_angstrom: float,
    microscope: Microscope,
    fitted: FittedCtf,
    search: CtfSearch | None = None,
) -> LocalDefocus | None:
    """Fit the map of the defocus around a micrograph's fitted CTF; None without rings or with fewer than nine tiles.

    The map is flat when it does not vary significantly. The spectra are made on the image's device.
    """
    search = search or CtfSearch()
    height, width = (int(n) for n in image.shape)
    centre, half_side = (0.5 * (height - 1), 0.5 * (width - 1)), 0.5 * max(height, width)
    tile_px = max(256, 128 * math.ceil(_TILE_ANGSTROM / pixel_size_angstrom / 128))

    def result(coefficients: FloatArray, gain: float, n_tiles: int, sd: float) -> LocalDefocus:
        return LocalDefocus(
            coefficients_angstrom=tuple(float(c) for c in coefficients),
            centre_yx_px=centre,
            half_side_px=half_side,
            pixel_size_angstrom=pixel_size_angstrom,
            gain=gain,
            n_tiles=n_tiles,
            gradient_sd_angstrom_per_um=1e4 * sd / (half_side * pixel_size_angstrom),
        )

    flat = np.zeros(_PLANE)
    if not fitted.is_reliable or min(height, width) < 2 * tile_px:
        return None
    resolutions = (
        search.coarsest_resolution_angstrom,
        max(search.finest_resolution_angstrom, 2.05 * pixel_size_angstrom),
    )
    tiles = _measure_tiles(image, pixel_size_angstrom, microscope, tile_px, resolutions)
    if len(tiles.centres_yx_px) < _MIN_TILES:
        return None
    y, x = ((tiles.centres_yx_px - centre) / half_side).T
    design = np.stack(_terms(y, x), axis=1)
    table = _OffsetTable.build(tiles, fitted, estimate_envelope(tiles.rings, fitted.point))
    offsets = design[:, :_PLANE] @ _best_plane(table, design)
    # the mean spectrum of a tilted specimen hides its fine rings: measure the envelope at the tiles' own defocus
    table = _OffsetTable.build(tiles, fitted, _tile_envelope(tiles, fitted, offsets))
    level = _climb(table, design[:, :1], np.zeros(1))
    plane = _climb(table, design[:, :_PLANE], _best_plane(table, design))
    gain = table.value(design[:, :_PLANE] @ plane) - table.value(design[:, :1] @ level)
    sd = _gradient_sd(table, design[:, :_PLANE], plane)
    bent = _climb(table, design, np.concatenate([plane, np.zeros(_BENT - _PLANE)]))
    bent_gain = table.value(design @ bent) - table.value(design[:, :1] @ level)
    if bent_gain - max(gain, 0.0) > _MIN_GAIN:
        return result(bent, bent_gain, len(y), sd)
    return result(plane if gain > _MIN_GAIN else flat, gain, len(y), sd)


def _terms(y: FloatArray, x: FloatArray) -> list[FloatArray]:
    return [np.ones_like(y), y, x, y * y, x * y, x * x]


@dataclass(frozen=True, slots=True)
class _Tiles:
    rings: RingSpectrum  # of the mean spectrum
    data: FloatArray  # (tile, sector, ring), weighted, without background
    centres_yx_px: FloatArray
    noise_variance: float  # of one tile's bins


def _measure_tiles(
    image: Tensor,
    pixel: float,
    microscope: Microscope,
    tile_px: int,
    resolutions_angstrom: tuple[float, float],
) -> _Tiles:
    centres: list[FloatArray] = []
    values: list[FloatArray] = []
    bins = None
    for row_centres, powers in iterate_tile_powers(image, tile_px):
        bins = bins or ring_bins(powers[0], pixel, resolutions_angstrom)
        centres.append(row_centres)
        values.append(bins.average(powers))
    if bins is None:
        raise ValueError("image: no tile of it has signal")
    polar = np.concatenate(values)
    rings = rings_from_polar(bins, polar.mean(axis=0), microscope)
    relative = polar / rings.background
    # thicker ice and fuller tiles are brighter throughout
    relative /= np.median(relative, axis=(1, 2), keepdims=True)
    data = rings.project((relative - relative.mean(axis=(1, 2), keepdims=True)) * rings.root_weights)
    spread = 1.4826 * float(np.median(np.abs(data[..., rings.root_weights > 0])))
    data = np.clip(data, -4.0 * spread, 4.0 * spread)
    return _Tiles(rings, data, np.concatenate(centres), _tile_noise(data, rings))


def _tile_noise(data: FloatArray, rings: RingSpectrum) -> float:
    """Return the variance of a tile's bins (rings are far below it), inflated by the neighbours' correlation."""
    noise = (data - data.mean(axis=0))[..., rings.root_weights > 0]
    return float((noise**2).mean()) * correlation_inflation(noise)


@dataclass(frozen=True, slots=True)
class _OffsetTable:
    """d·m by (tile, offset) and m·m by offset, for a regular grid of defocus offsets."""

    products: FloatArray
    squares: FloatArray
    first: float
    step: float
    noise_variance: float

    @classmethod
    def build(cls, tiles: _Tiles, fitted: FittedCtf, envelope: FloatArray) -> _OffsetTable:
        reach = min(_MAX_OFFSET_ANGSTROM, 0.8 * fitted.defocus_mean_angstrom)
        n = math.ceil(reach / _OFFSET_STEP_ANGSTROM)
        offsets = _OFFSET_STEP_ANGSTROM * np.arange(-n, n + 1)
        templates = np.stack([tiles.rings.template(_shifted(fitted, o), envelope).ravel() for o in offsets])
        return cls(
            products=tiles.data.reshape(len(tiles.data), -1) @ templates.T,
            squares=(templates**2).sum(axis=1),
            first=float(offsets[0]),
            step=_OFFSET_STEP_ANGSTROM,
            noise_variance=tiles.noise_variance,
        )

    def value(self, offsets: FloatArray) -> float:
        """Return the log-likelihood of one offset per tile."""
        position = np.clip((offsets - self.first) / self.step, 0.0, len(self.squares) - 1.001)
        low = position.astype(np.int64)
        part = position - low
        tile = np.arange(len(offsets))
        product = (1.0 - part) * self.products[tile, low] + part * self.products[tile, low + 1]
        square = (1.0 - part) * self.squares[low] + part * self.squares[low + 1]
        total = float(product.sum())
        return 0.5 * total * abs(total) / (float(square.sum()) * self.noise_variance + 1e-30)

    def values(self, offsets: FloatArray) -> FloatArray:
        """Return the log-likelihoods of many maps `(map, tile)`, to the nearest offset of the table."""
        index = np.rint((offsets - self.first) / self.step).astype(np.int64)
        index = np.clip(index, 0, len(self.squares) - 1)
        total = self.products[np.arange(offsets.shape[1]), index].sum(axis=1)
        square = self.squares[index].sum(axis=1)
        return np.asarray(0.5 * total * np.abs(total) / (square * self.noise_variance + 1e-30))


def _shifted(fitted: FittedCtf, offset: float) -> FloatArray:
    point = fitted.point
    point[0] += offset
    return point


def _best_plane(table: _OffsetTable, design: FloatArray) -> FloatArray:
    """Return (level, slope y, slope x) of the best of a grid, in Å over half the field."""
    reach = -table.first
    slopes = np.arange(-reach, reach + 1.0, 200.0)
    best, best_value = np.zeros(_PLANE), -math.inf
    for level in (-400.0, -200.0, 0.0, 200.0, 400.0):
        for slope_y in slopes[np.abs(slopes) <= reach]:
            coefficients = np.stack(
                [np.full_like(slopes, level), np.full_like(slopes, slope_y), slopes], axis=1
            )
            values = table.values(coefficients @ design[:, :_PLANE].T)
            i = int(values.argmax())
            if values[i] > best_value:
                best, best_value = coefficients[i], float(values[i])
    return best


def _climb(table: _OffsetTable, design: FloatArray, start: FloatArray) -> FloatArray:
    n = design.shape[1]
    scale = 100.0
    simplex = np.vstack([np.zeros(n), np.eye(n)])
    options = {"initial_simplex": simplex, "xatol": 0.02, "fatol": 1e-3, "maxiter": 200 * n}
    found = minimize(
        lambda free: -table.value(design @ (start + scale * free)),
        np.zeros(n),
        method="Nelder-Mead",
        options=options,
    )
    return np.asarray(start + scale * found.x)


def _gradient_sd(table: _OffsetTable, design: FloatArray, plane: FloatArray) -> float:
    """Return the standard deviation of a slope (mean of both), from the curvature of the likelihood."""
    step = 2.0 * table.step
    curvatures = []
    for axis in (1, 2):
        move = np.zeros(_PLANE)
        move[axis] = step
        values = [table.value(design @ (plane + sign * move)) for sign in (-1.0, 0.0, 1.0)]
        curvatures.append((2.0 * values[1] - values[0] - values[2]) / step**2)
    mean = float(np.mean(curvatures))
    return 1.0 / math.sqrt(mean) if mean > 0.0 else math.inf


def _tile_envelope(tiles: _Tiles, fitted: FittedCtf, offsets: FloatArray) -> FloatArray:
    """Return the rings' height by ring, each tile compared at its own defocus."""
    rings = tiles.rings
    product, square = np.zeros_like(rings.k), np.zeros_like(rings.k)
    # tiles of like defocus share a template
    rounded = np.rint(offsets / _OFFSET_STEP_ANGSTROM) * _OFFSET_STEP_ANGSTROM
    for offset in np.unique(rounded):
        members = tiles.data[rounded == offset]
        trial = rings.template(_shifted(fitted, float(offset)), np.ones_like(rings.k))
        product += (members.sum(axis=0) * trial).sum(axis=0)
        square += len(members) * (trial**2).sum(axis=0)
    profile = shrink_profile(product, square, tiles.noise_variance)
    return profile / profile.max() if profile.max() > 0.0 else np.ones_like(rings.k)
