"""The search for the CTF that explains the rings: exhaustive scan, climb, and the width of the optimum.

The data are compared with trials by a calibrated log-likelihood: with d the data and m a trial (both without
background), L = (d·m)² / (2 m·m s²) for d·m > 0, the amplitude being fitted, and s² the variance of the noise,
inflated by the correlation of neighbouring bins. √(2 L) is a significance in standard deviations. A prior on the astigmatism A in
units of the same likelihood, -1.5 ln(1 + A²/τ²) (Student's t in two dimensions), makes weak data lean towards none and is
overruled by strong data, at any A.

The scan needs one matrix product per envelope: a table of d·m by sector and defocus; every point
(defocus, astigmatism, angle, phase shift) is then a sum over sectors of table entries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter1d
from scipy.optimize import minimize

from models.optics.ctf_rings import FloatArray, RingSpectrum


@dataclass(frozen=True, slots=True, kw_only=True)
class CtfSearch:
    """What is searched: defocus in Å (underfocus positive), resolutions in Å, phase shift in degrees.

    `finest_resolution_angstrom` is the limit of the fit (never beyond Nyquist); `max_astigmatism_angstrom` is
    u - v, `astigmatism_scale_angstrom` the scale τ of its prior. `phase_shift_range_deg` None keeps the phase
    shift at zero. `max_thickness_angstrom` is the thickest ice whose node is looked for; None looks for none.
    """

    min_defocus_angstrom: float = 2000.0
    max_defocus_angstrom: float = 50000.0
    coarsest_resolution_angstrom: float = 30.0
    finest_resolution_angstrom: float = 4.0
    max_astigmatism_angstrom: float = 5000.0
    astigmatism_scale_angstrom: float = 150.0
    phase_shift_range_deg: tuple[float, float] | None = None
    max_thickness_angstrom: float | None = None

    def log_prior(self, astigmatism_angstrom: FloatArray | float) -> FloatArray:
        """Return the logarithm of the prior on the astigmatism, 0 at none."""
        ratio = np.asarray(astigmatism_angstrom, dtype=np.float64) / self.astigmatism_scale_angstrom
        return np.asarray(-1.5 * np.log1p(ratio**2))


PHASE_SHIFT_RANGE_DEG = (0.0, 175.0)
"""What is searched where a phase shift is asked for; 180° more is the same CTF²."""

# How far rings reach: amplitude falls to 1/e at these resolutions (None: not within the range).
_ENVELOPES_ANGSTROM = (None, 7.0, 12.0)
_ASTIGMATISM_GRID = (
    (400.0, 6),
    (900.0, 8),
    (1500.0, 10),
    (2200.0, 12),
    (3000.0, 14),
    (4000.0, 18),
    (5000.0, 22),
)
_PHASE_STEP_DEG = 10.0


@dataclass(frozen=True, slots=True)
class Likelihood:
    """The log-likelihood of points, given the rings' envelope and the variance of the noise."""

    rings: RingSpectrum
    envelope: FloatArray  # (ring) or (sector, ring)
    noise_variance: float

    def correlate(self, point: FloatArray) -> tuple[float, float]:
        """Return (d·m, m·m)."""
        trial = self.rings.template(point, self.envelope)
        return float(np.vdot(trial, self.rings.data)), float(np.vdot(trial, trial)) + 1e-30

    def __call__(self, point: FloatArray) -> float:
        """Return L, negative where rings would have to be reversed."""
        product, square = self.correlate(point)
        return 0.5 * product * abs(product) / (square * self.noise_variance)


def scan(rings: RingSpectrum, search: CtfSearch, *, n_keep: int = 4) -> list[tuple[FloatArray, FloatArray]]:
    """Return distinct candidates (point, envelope) from the whole range of the search."""
    candidates: list[tuple[FloatArray, FloatArray]] = []
    for resolution in _ENVELOPES_ANGSTROM:
        envelope = np.ones_like(rings.k) if resolution is None else np.exp(-((rings.k * resolution) ** 2))
        candidates += [(point, envelope) for point in _scan_envelope(rings, envelope, search, n_keep)]
    return candidates


def _scan_envelope(
    rings: RingSpectrum, envelope: FloatArray, search: CtfSearch, n_keep: int
) -> list[FloatArray]:
    # a tenth of a ring at the edge of where the envelope leaves rings
    depth = float(rings.chi_defocus[envelope > 0.1][-1])
    step = max(25.0, 0.1 * math.pi / depth)
    margin = 0.5 * search.max_astigmatism_angstrom
    low = max(step, search.min_defocus_angstrom - margin)
    table_z = np.arange(low, search.max_defocus_angstrom + margin + step, step)
    first = int(np.searchsorted(table_z, search.min_defocus_angstrom))
    last = max(first, int(np.searchsorted(table_z, search.max_defocus_angstrom, side="right")) - 1)
    defoci = np.arange(first, last + 1)
    phases = np.zeros(1)
    if search.phase_shift_range_deg is not None:
        start, stop = search.phase_shift_range_deg
        phases = np.arange(start, stop + 0.5 * _PHASE_STEP_DEG, _PHASE_STEP_DEG)
    has_sine = search.phase_shift_range_deg is not None
    dots, norms = _tables(rings, envelope, table_z, has_sine=has_sine)
    cosine, sine = np.cos(np.deg2rad(2.0 * phases)), np.sin(np.deg2rad(2.0 * phases))
    best = np.full(len(defoci), -np.inf)
    points = np.zeros((len(defoci), 4))
    variance = rings.spread**2
    sectors = np.arange(len(rings.cos_2))[:, None]
    for amplitude, direction in _astigmatisms(search):
        c, s = amplitude * math.cos(direction), amplitude * math.sin(direction)
        shifts = np.round(0.5 * (c * rings.cos_2 + s * rings.sin_2) / step).astype(np.int64)
        index = np.clip(defoci[None, :] + shifts[:, None], 0, len(table_z) - 1)
        product = [dot[sectors, index].sum(axis=0) for dot in dots]
        square = [norm[index].sum(axis=0) for norm in norms]
        for phase, cos_2, sin_2 in zip(phases, cosine, sine, strict=True):
            along, length = product[0], square[0]
            if has_sine:
                along = cos_2 * product[0] + sin_2 * product[1]
                length = cos_2**2 * square[0] + 2.0 * cos_2 * sin_2 * square[1] + sin_2**2 * square[2]
            gain = 0.5 * along * np.abs(along) / ((length + 1e-30) * variance) + search.log_prior(amplitude)
            # astigmatism cannot exceed twice the defocus
            is_better = (gain > best) & (table_z[defoci] > 0.6 * amplitude)
            best[is_better] = gain[is_better]
            points[is_better, 1:] = (c, s, phase)
    points[:, 0] = table_z[defoci]
    return _distinct_maxima(best, points, n_keep)


def _tables(
    rings: RingSpectrum, envelope: FloatArray, table_z: FloatArray, *, has_sine: bool
) -> tuple[list[FloatArray], list[FloatArray]]:
    """Return d·m by (sector, defocus) for the parts of the modulation, and m·m by defocus for their pairs.

    -cos(2χ + 2φ) = cos 2φ (-cos 2χ) + sin 2φ (sin 2χ).
    """
    shape = (rings.blur(table_z) * envelope * rings.root_weights).T
    argument = 2.0 * (rings.chi_defocus[:, None] * table_z[None, :] + rings.chi_fixed[:, None])
    parts = [-np.cos(argument) * shape]
    if has_sine:
        parts.append(np.sin(argument) * shape)
    slow = [rings.basis.T @ part for part in parts]
    pairs = [(0, 0), (0, 1), (1, 1)] if has_sine else [(0, 0)]
    norms = [(parts[i] * parts[j]).sum(axis=0) - (slow[i] * slow[j]).sum(axis=0) for i, j in pairs]
    return [rings.data @ part for part in parts], norms


def _astigmatisms(search: CtfSearch) -> list[tuple[float, float]]:
    """Return (A, 2 α in rad) on rings of the plane of astigmatism."""
    grid = [(0.0, 0.0)]
    for amplitude, n in _ASTIGMATISM_GRID:
        if amplitude <= search.max_astigmatism_angstrom:
            grid += [(amplitude, 2.0 * math.pi * i / n) for i in range(n)]
    return grid


def _distinct_maxima(gain: FloatArray, points: FloatArray, n_keep: int) -> list[FloatArray]:
    padded = np.pad(gain, 1, constant_values=-np.inf)
    is_peak = (gain >= padded[:-2]) & (gain >= padded[2:]) & np.isfinite(gain)
    order = np.flatnonzero(is_peak)
    order = order[np.argsort(gain[order])[::-1]]
    return [points[i] for i in order[:n_keep]]


def climb(likelihood: Likelihood, start: FloatArray, search: CtfSearch) -> tuple[FloatArray, float]:
    """Return the point of highest posterior near a start, and its logarithm, by Nelder-Mead."""
    n_free, scales = _free(search)
    low, high = search.phase_shift_range_deg or (0.0, 0.0)

    def loss(free: FloatArray) -> float:
        point = start.copy()
        point[:n_free] += free * scales
        amplitude = math.hypot(point[1], point[2])
        excess = max(0.0, amplitude - search.max_astigmatism_angstrom)
        below = max(0.0, 0.9 * search.min_defocus_angstrom - point[0])
        above = max(0.0, point[0] - 1.1 * search.max_defocus_angstrom)
        outside = max(0.0, low - point[3], point[3] - high) if n_free == 4 else 0.0
        # walls, steeper than any likelihood
        penalty = 10.0 * (excess + below + above) + 1e3 * outside
        return penalty - likelihood(point) - float(search.log_prior(amplitude))

    simplex = np.vstack([np.zeros(n_free), np.eye(n_free)])
    options = {"initial_simplex": simplex, "xatol": 0.01, "fatol": 1e-4, "maxiter": 400}
    result = minimize(loss, np.zeros(n_free), method="Nelder-Mead", options=options)
    point = start.copy()
    point[:n_free] += result.x * scales
    point[3] = min(max(point[3], low), high)
    return point, -float(result.fun)


def _free(search: CtfSearch) -> tuple[int, FloatArray]:
    scales = np.array([100.0, 100.0, 100.0, 10.0])
    n_free = 3 if search.phase_shift_range_deg is None else 4
    return n_free, scales[:n_free]


def estimate_envelope(
    rings: RingSpectrum, point: FloatArray, polarity: FloatArray | None = None
) -> FloatArray:
    """Return how high the rings of a point stand by (sector, ring): smooth, noise taken off, not negative.

    A product of a radial profile and a factor 1 + a cos 2θ + b sin 2θ: drift blurs rings along one direction.
    `polarity` (ring) is -1 where thick ice reverses the rings; the envelope is negative there.
    """
    upright = np.ones_like(rings.k) if polarity is None else polarity
    trial = rings.template(point, upright)
    product, square = trial * rings.data, trial**2
    profile = shrink_profile(product.sum(axis=0), square.sum(axis=0), rings.spread**2)
    if not profile.max() > 0.0:
        return upright
    heights = (product * profile).sum(axis=1) / ((square * profile**2).sum(axis=1) + 1e-12)
    design = np.stack([np.ones_like(rings.cos_2), rings.cos_2, rings.sin_2], axis=1)
    mean, cosine, sine = np.linalg.lstsq(design, heights, rcond=None)[0]
    factor = 1.0 + (cosine * rings.cos_2 + sine * rings.sin_2) / max(mean, 1e-6)
    return np.asarray(np.clip(factor, 0.2, 1.8)[:, None] * (upright * profile / profile.max()))


def shrink_profile(product: FloatArray, square: FloatArray, variance: float) -> FloatArray:
    """Return the smoothed height d·m / m·m by ring, not negative, shrunk where it drowns in the noise."""
    sigma = max(3.0, 0.06 * len(product))
    square = gaussian_filter1d(square, sigma, mode="nearest") + 1e-12
    height = gaussian_filter1d(product, sigma, mode="nearest") / square
    # what noise alone leaves in a mean under a Gaussian of this width
    noise = variance / (2.0 * math.sqrt(math.pi) * sigma * square)
    kept = np.clip(1.0 - 2.0 * noise / (height**2 + 1e-20), 0.02, 1.0)
    return np.asarray(np.maximum(height, 0.0) * kept)


def noise_variance(rings: RingSpectrum, point: FloatArray, envelope: FloatArray) -> float:
    """Return the variance of what the point leaves, inflated by the correlation of neighbouring bins."""
    trial = rings.template(point, envelope)
    height = max(0.0, float(np.vdot(trial, rings.data))) / (float(np.vdot(trial, trial)) + 1e-30)
    residual = (rings.data - height * trial)[:, rings.root_weights > 0]
    spread = 1.4826 * float(np.median(np.abs(residual))) + 1e-20
    residual = np.clip(residual, -4.0 * spread, 4.0 * spread)
    power = float((residual**2).mean())
    return max(spread**2, power) * correlation_inflation(residual)


def correlation_inflation(noise: FloatArray) -> float:
    """Return by how much neighbours' correlation inflates the variance of sums over bins `(…, sector, ring)`."""
    power = float((noise**2).mean())
    along = [float((noise[..., i:] * noise[..., :-i]).mean()) / power for i in (1, 2)]
    across = float((noise * np.roll(noise, 1, axis=-2)).mean()) / power
    return (1.0 + 2.0 * sum(max(0.0, r) for r in along)) * (1.0 + 2.0 * max(0.0, across))


def covariance(likelihood: Likelihood, point: FloatArray, search: CtfSearch) -> FloatArray:
    """Return the covariance (free, free) of the point from the curvature of the posterior at its maximum."""
    n_free, scales = _free(search)
    steps = 0.3 * scales

    def value(offset: FloatArray) -> float:
        moved = point.copy()
        moved[:n_free] += offset
        amplitude = math.hypot(moved[1], moved[2])
        return -likelihood(moved) - float(search.log_prior(amplitude))

    unit = np.diag(steps)
    centre = value(np.zeros(n_free))
    hessian = np.zeros((n_free, n_free))
    for i in range(n_free):
        hessian[i, i] = value(unit[i]) + value(-unit[i]) - 2.0 * centre
        for j in range(i):
            mixed = value(unit[i] + unit[j]) + value(-unit[i] - unit[j])
            mixed -= value(unit[i] - unit[j]) + value(unit[j] - unit[i])
            hessian[i, j] = hessian[j, i] = 0.25 * mixed
    eigenvalues, vectors = np.linalg.eigh(hessian)
    # a direction without curvature is not known better than to ten thousand steps
    inverse = 1.0 / np.maximum(eigenvalues, 1e-8)
    return np.asarray((vectors * inverse) @ vectors.T * np.outer(steps, steps))
