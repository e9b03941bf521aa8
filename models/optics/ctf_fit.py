"""Fitting the CTF to a power spectrum: defocus U/V, angle, optionally phase shift, and how far the rings reach.

The mean power spectrum is resampled to sectors and rings, divided by its smooth radial background, and a
smooth background is projected out of the data *and* of every trial CTF², so that slow trends in either count
for nothing. The score is the correlation of the two, weighted by the Fourier pixels behind each bin. The
search is exhaustive over defocus and a coarse grid of astigmatism, in two frequency ranges, and the best
distinct starts are climbed by Nelder-Mead: no trial depends on a first guess. Method: Rohou & Grigorieff 2015
(CTFFIND4), with the background of Zhang 2016 (Gctf) made part of the correlation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from scipy.interpolate import BSpline
from scipy.optimize import minimize
from torch import Tensor

from models.fourier.spectra import PolarSpectrum, average_tile_power, polar_spectrum
from models.optics.ctf import electron_wavelength_angstrom

# Rings are held to be there when the score exceeds that many times its spread on pure noise (calibrated on
# simulated noise spectra: their best score stays below 5.5; see tests/test_models/test_optics_ctf_fit.py).
RELIABLE_SIGNIFICANCE = 8.0
# Rings count as visible while data and fit correlate better than this over about one and a half rings.
RING_CORRELATION = 0.5
_FLOAT = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class CtfSearch:
    """What is searched: defocus in Å (underfocus positive), resolutions in Å, phase shift in degrees.

    `finest_resolution_angstrom` is the limit of the fit (never beyond Nyquist); `max_astigmatism_angstrom` is
    u − v; the astigmatism prior is a soft penalty with that standard deviation. `phase_shift_range_deg` None
    keeps the phase shift at zero.
    """

    min_defocus_angstrom: float = 2000.0
    max_defocus_angstrom: float = 50000.0
    coarsest_resolution_angstrom: float = 30.0
    finest_resolution_angstrom: float = 4.0
    max_astigmatism_angstrom: float = 5000.0
    phase_shift_range_deg: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedCtf:
    """A fitted CTF: u ≥ v, angle from x to u in [−90, 90); `significance` is the score over its noise spread."""

    defocus_u_angstrom: float
    defocus_v_angstrom: float
    astigmatism_angle_deg: float
    phase_shift_deg: float
    fit_resolution_angstrom: float
    score: float
    significance: float
    is_reliable: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Microscope:
    """Voltage, spherical aberration and amplitude contrast (a fraction)."""

    voltage_kv: float
    cs_mm: float
    amplitude_contrast: float


def fit_ctf(
    image: Float[Tensor, "h w"],
    pixel_size_angstrom: float,
    microscope: Microscope,
    search: CtfSearch | None = None,
    *,
    tile_px: int = 512,
) -> tuple[FittedCtf, Float[Tensor, "t tr"]]:
    """Fit the CTF of a micrograph; return it with the mean tile power spectrum that it was fitted to.

    Tiles shrink (512, 384, 256, …) until an axis holds at least three of them half-overlapping.
    """
    smallest = min(int(n) for n in image.shape)
    while tile_px > 128 and smallest < 2 * tile_px:
        tile_px -= 128
    power = average_tile_power(image, min(tile_px, smallest - smallest % 2))
    return fit_ctf_spectrum(power, pixel_size_angstrom, microscope, search), power


def fit_ctf_spectrum(
    power: Float[Tensor, "n nr"],
    pixel_size_angstrom: float,
    microscope: Microscope,
    search: CtfSearch | None = None,
) -> FittedCtf:
    """Fit the CTF to a half power (or amplitude) spectrum, zero frequency first, of square tiles."""
    search = search or CtfSearch()
    finest = max(search.finest_resolution_angstrom, 2.05 * pixel_size_angstrom)
    coarsest = search.coarsest_resolution_angstrom
    full = _Correlator.build(power, pixel_size_angstrom, microscope, (coarsest, finest))
    # the wide rings at low resolution bear large astigmatism and poor spectra; the fine ones give precision
    middle = max(finest, min(8.0, 0.5 * (coarsest + finest)))
    ranges = [full]
    if middle > 1.3 * finest:
        ranges.append(_Correlator.build(power, pixel_size_angstrom, microscope, (coarsest, middle)))
    starts: list[_FLOAT] = []
    for correlator in ranges:
        starts += _scan(correlator, search)
    climbed = [_climb(full, start, search) for start in starts]
    best = max(climbed, key=lambda item: item[1])[0]
    return _describe(full, _to_nyquist(power, pixel_size_angstrom, microscope, coarsest), best)


def score_ctf_spectrum(
    power: Float[Tensor, "n nr"],
    pixel_size_angstrom: float,
    microscope: Microscope,
    fitted: FittedCtf,
    search: CtfSearch | None = None,
) -> FittedCtf:
    """Judge somebody else's CTF values on a spectrum: the same record with our score and resolution."""
    search = search or CtfSearch()
    finest = max(search.finest_resolution_angstrom, 2.05 * pixel_size_angstrom)
    limits = (search.coarsest_resolution_angstrom, finest)
    correlator = _Correlator.build(power, pixel_size_angstrom, microscope, limits)
    wide = _to_nyquist(power, pixel_size_angstrom, microscope, search.coarsest_resolution_angstrom)
    return _describe(correlator, wide, _point(fitted))


@dataclass(frozen=True, slots=True)
class CtfProfile:
    """Ring profiles to Nyquist along lines of equal phase.

    `contrast` is the data less their local mean over one and a half rings, over their local spread; `ctf2`
    is the fit.
    """

    k: _FLOAT
    contrast: _FLOAT
    ctf2: _FLOAT


def profile_ctf(
    power: Float[Tensor, "n nr"],
    pixel_size_angstrom: float,
    microscope: Microscope,
    fitted: FittedCtf,
    *,
    coarsest_resolution_angstrom: float = 30.0,
) -> CtfProfile:
    """Return the data's and the fit's ring profiles, for pictures and reports."""
    wide = _to_nyquist(power, pixel_size_angstrom, microscope, coarsest_resolution_angstrom)
    rings, ctf2 = _equiphase_profiles(wide, _point(fitted))
    half = _half_windows(wide, 0.5 * (fitted.defocus_u_angstrom + fitted.defocus_v_angstrom))
    windows = [slice(max(0, i - h), i + h + 1) for i, h in enumerate(half)]
    centred = rings - np.array([rings[w].mean() for w in windows])
    spread = np.array([centred[w].std() for w in windows])
    return CtfProfile(wide.k, centred / np.maximum(spread, 1e-12), ctf2)


def _point(fitted: FittedCtf) -> _FLOAT:
    astigmatism = fitted.defocus_u_angstrom - fitted.defocus_v_angstrom
    angle = math.radians(2.0 * fitted.astigmatism_angle_deg)
    mean = 0.5 * (fitted.defocus_u_angstrom + fitted.defocus_v_angstrom)
    cosine, sine = astigmatism * math.cos(angle), astigmatism * math.sin(angle)
    return np.array([mean, cosine, sine, fitted.phase_shift_deg])


def _to_nyquist(
    power: Tensor, pixel_size_angstrom: float, microscope: Microscope, coarsest: float
) -> _Correlator:
    """Rings may be visible beyond the limit of the fit: their reach is judged up to Nyquist."""
    return _Correlator.build(power, pixel_size_angstrom, microscope, (coarsest, 2.05 * pixel_size_angstrom))


@dataclass(frozen=True, slots=True)
class _Correlator:
    """The flattened data of one frequency range and the projector that removes smooth backgrounds.

    A point of the search is (mean defocus, A cos 2α, A sin 2α, phase shift) with A = u − v.
    """

    data: _FLOAT  # (sector, ring), normalised to unit weighted length, background projected out
    root_weights: _FLOAT  # (sector, ring)
    basis: _FLOAT  # (ring, background term), orthonormal
    ring_weights: _FLOAT  # (ring)
    chi_defocus: _FLOAT  # (ring): π λ k²
    chi_fixed: _FLOAT  # (ring): spherical aberration and amplitude contrast
    cos_2: _FLOAT  # (sector)
    sin_2: _FLOAT
    k: _FLOAT
    contrast: _FLOAT  # (sector, ring): P / background − 1, for reports
    n_independent: float

    @classmethod
    def build(
        cls,
        power: Tensor,
        pixel_size_angstrom: float,
        microscope: Microscope,
        resolutions_angstrom: tuple[float, float],
    ) -> _Correlator:
        k_range = (1.0 / resolutions_angstrom[0], 1.0 / resolutions_angstrom[1])
        polar = polar_spectrum(power, pixel_size_angstrom, k_range=k_range)
        wavelength = electron_wavelength_angstrom(microscope.voltage_kv)
        k2 = polar.k**2
        chi_fixed = math.asin(microscope.amplitude_contrast) - 0.5 * math.pi * (
            microscope.cs_mm * 1e7 * wavelength**3 * k2**2
        )
        counts = polar.counts.sum(axis=0)
        ring_weights = np.sqrt(counts / counts.max())
        basis = _background_basis(polar.k, ring_weights)
        contrast = _contrast(polar, counts)
        angles = np.deg2rad(2.0 * polar.angles_deg)
        weights = np.broadcast_to(ring_weights, contrast.shape)
        weighted = contrast * weights
        data = weighted - (weighted @ basis) @ basis.T
        # heavy tails (ice rings, crystal spots) must not decide: clip at five robust SD
        spread = 1.4826 * float(np.median(np.abs(data))) + 1e-20
        data = np.clip(data, -5.0 * spread, 5.0 * spread)
        data /= math.sqrt(float((data**2).sum())) + 1e-20
        return cls(
            data=data,
            root_weights=weights,
            basis=basis,
            ring_weights=ring_weights,
            chi_defocus=math.pi * wavelength * k2,
            chi_fixed=chi_fixed,
            cos_2=np.cos(angles),
            sin_2=np.sin(angles),
            k=polar.k,
            contrast=contrast,
            n_independent=float(contrast.size),
        )

    def ctf2(self, point: _FLOAT) -> _FLOAT:
        """Return sin² χ on (sector, ring)."""
        z = point[0] + 0.5 * (point[1] * self.cos_2 + point[2] * self.sin_2)
        phase = self.chi_fixed + math.radians(float(point[3]))
        return np.asarray(np.sin(z[:, None] * self.chi_defocus + phase) ** 2)

    def score(self, point: _FLOAT) -> float:
        """Return the correlation of data and trial, both without background, in [−1, 1]."""
        trial = (self.ctf2(point) - 0.5) * self.root_weights
        trial -= (trial @ self.basis) @ self.basis.T
        length = math.sqrt(float(np.vdot(trial, trial)))
        return float(np.vdot(trial, self.data)) / (length + 1e-20)


def _background_basis(k: _FLOAT, ring_weights: _FLOAT) -> _FLOAT:
    """Return an orthonormal basis (ring, term) of smooth functions of k, weighted."""
    n_terms = 7
    knots = np.linspace(k[0], k[-1], n_terms - 2)
    padded = np.concatenate([[k[0]] * 3, knots, [k[-1]] * 3])
    design = BSpline.design_matrix(np.clip(k, k[0], k[-1]), padded, 3).toarray()
    return np.linalg.qr(design * ring_weights[:, None])[0]


def _contrast(polar: PolarSpectrum, counts: _FLOAT) -> _FLOAT:
    """Return P / B − 1 with B the smooth radial background, fitted robustly to the logarithm of ring means."""
    ring_mean = (polar.values * polar.counts).sum(axis=0) / np.maximum(counts, 1)
    log_mean = np.log(np.maximum(ring_mean, 1e-30 + 1e-12 * float(ring_mean.max())))
    weights = np.sqrt(counts / counts.max())
    basis = _background_basis(polar.k, np.ones_like(weights))
    robust = weights.copy()
    smooth = log_mean
    for _ in range(5):
        solution = np.linalg.lstsq(basis * robust[:, None], log_mean * robust, rcond=None)[0]
        smooth = basis @ solution
        residual = log_mean - smooth
        spread = 1.4826 * float(np.median(np.abs(residual))) + 1e-12
        robust = weights / np.maximum(1.0, np.abs(residual) / (2.0 * spread))
    return np.asarray(polar.values / np.exp(smooth)[None, :] - 1.0)


def _scan(correlator: _Correlator, search: CtfSearch, *, n_keep: int = 4) -> list[_FLOAT]:
    """Return the best distinct points of a grid over mean defocus, astigmatism, angle and phase shift."""
    depth = float(correlator.chi_defocus[-1])
    # a quarter of a ring at the edge of the range: no optimum lies between two grid points
    step = max(40.0, 0.5 / depth)
    defoci = np.arange(search.min_defocus_angstrom, search.max_defocus_angstrom + step, step)
    phases = [0.0]
    if search.phase_shift_range_deg is not None:
        phases = list(np.arange(*search.phase_shift_range_deg, 15.0)) or [search.phase_shift_range_deg[0]]
    astigmatisms = [(0.0, 0.0)]
    for amplitude in (600.0, 1800.0):
        if amplitude <= search.max_astigmatism_angstrom:
            directions = np.deg2rad(np.arange(0.0, 360.0, 60.0))
            astigmatisms += [(amplitude * math.cos(a), amplitude * math.sin(a)) for a in directions]
    found: list[tuple[float, _FLOAT]] = []
    for phase in phases:
        for cosine, sine in astigmatisms:
            points = [np.array([z, cosine, sine, phase]) for z in defoci if z > math.hypot(cosine, sine)]
            scores = np.array([correlator.score(p) for p in points])
            for i in np.argsort(scores)[::-1][:n_keep]:
                found.append((float(scores[i]), points[int(i)]))
    found.sort(key=lambda item: -item[0])
    kept: list[_FLOAT] = []
    for _, point in found:
        if all(abs(point[0] - other[0]) > 2.0 * step or abs(point[3] - other[3]) > 20 for other in kept):
            kept.append(point)
        if len(kept) == n_keep:
            break
    return kept


def _climb(correlator: _Correlator, start: _FLOAT, search: CtfSearch) -> tuple[_FLOAT, float]:
    """Maximise the score from a start by Nelder-Mead in scaled coordinates."""
    has_phase = search.phase_shift_range_deg is not None
    scales = np.array([100.0, 100.0, 100.0, 10.0])
    n_free = 4 if has_phase else 3
    low, high = search.phase_shift_range_deg or (0.0, 0.0)

    def loss(free: _FLOAT) -> float:
        point = start.copy()
        point[:n_free] += free * scales[:n_free]
        excess = max(0.0, math.hypot(point[1], point[2]) - search.max_astigmatism_angstrom)
        outside = max(0.0, low - point[3], point[3] - high) if has_phase else 0.0
        below = max(0.0, 0.5 * search.min_defocus_angstrom - point[0])
        return float(-correlator.score(point) + 1e-3 * (excess + below) + 1e-2 * outside)

    simplex = np.vstack([np.zeros(n_free), 1.5 * np.eye(n_free)])
    options = {"initial_simplex": simplex, "xatol": 0.01, "fatol": 1e-6, "maxiter": 400}
    result = minimize(loss, np.zeros(n_free), method="Nelder-Mead", options=options)
    point = start.copy()
    point[:n_free] += result.x * scales[:n_free]
    return point, -float(result.fun)


def _describe(correlator: _Correlator, wide: _Correlator, point: _FLOAT) -> FittedCtf:
    score = correlator.score(point)
    significance = score * math.sqrt(correlator.n_independent)
    resolution = _fit_resolution(wide, point)
    amplitude = math.hypot(point[1], point[2])
    angle = 0.5 * math.degrees(math.atan2(point[2], point[1]))
    return FittedCtf(
        defocus_u_angstrom=float(point[0]) + 0.5 * amplitude,
        defocus_v_angstrom=float(point[0]) - 0.5 * amplitude,
        astigmatism_angle_deg=angle,
        phase_shift_deg=float(point[3]),
        fit_resolution_angstrom=resolution,
        score=score,
        significance=significance,
        is_reliable=significance >= RELIABLE_SIGNIFICANCE and resolution <= 15.0,
    )


def _fit_resolution(correlator: _Correlator, point: _FLOAT) -> float:
    """Return the resolution in Å up to which data and CTF² correlate better than `RING_CORRELATION`.

    Both are averaged over sectors along lines of equal phase, and correlated in a window of one and a half
    rings (at least seven Fourier pixels) around each shell; the limit is the last shell before the
    correlation has stayed below the threshold for a whole window.
    """
    rings, trial = _equiphase_profiles(correlator, point)
    k = correlator.k
    half = _half_windows(correlator, float(point[0]))
    is_good = np.zeros(len(k), dtype=bool)
    for i in range(len(k)):
        part = slice(max(0, i - half[i]), i + half[i] + 1)
        is_good[i] = _correlation(rings[part], trial[part]) >= RING_CORRELATION
    last = -1
    for i in range(len(k)):
        if is_good[i]:
            last = i
        elif last >= 0 and i - last > 2 * half[i]:
            break
    return math.inf if last < 0 else 1.0 / float(k[last])


def _half_windows(correlator: _Correlator, defocus_angstrom: float) -> list[int]:
    """Return for each shell the half width, in shells, of a window of one and a half rings, at least three."""
    k = correlator.k
    slope = np.gradient(defocus_angstrom * correlator.chi_defocus + correlator.chi_fixed, k)
    periods = math.pi / np.maximum(np.abs(slope), 1e-9)
    spacing = float(k[1] - k[0])
    return [max(3, min(len(k), math.ceil(0.75 * float(p) / spacing))) for p in periods]


def _equiphase_profiles(correlator: _Correlator, point: _FLOAT) -> tuple[_FLOAT, _FLOAT]:
    """Return (contrast, CTF²) over the rings of the mean defocus, each sector stretched to the same phase."""
    mean = np.array([point[0], 0.0, 0.0, point[3]])
    trial = correlator.ctf2(mean)[0]
    z = point[0] + 0.5 * (point[1] * correlator.cos_2 + point[2] * correlator.sin_2)
    # χ depends on z k² (spherical aberration changes far less): equal phase lies at k √(z̄ / z)
    stretch = np.sqrt(np.maximum(point[0], 1.0) / np.maximum(z, 1.0))
    smooth = correlator.contrast
    rows = [np.interp(correlator.k * s, correlator.k, row) for s, row in zip(stretch, smooth, strict=True)]
    return np.mean(rows, axis=0), trial


def _correlation(a: _FLOAT, b: _FLOAT) -> float:
    x = np.arange(len(a), dtype=np.float64)
    x -= x.mean()
    # remove the window's mean and slope, so that a background that is left does not count as a ring
    a = a - a.mean() - x * (x @ (a - a.mean())) / (x @ x)
    b = b - b.mean() - x * (x @ (b - b.mean())) / (x @ x)
    return float(a @ b / (math.sqrt(float(a @ a) * float(b @ b)) + 1e-20))
