"""Fitting the CTF to a power spectrum: defocus U/V, angle, optionally phase shift, and how far the rings reach.

The mean power spectrum is resampled to sectors and rings (`ctf_rings.py`) and searched exhaustively, whatever
the first guess would be; the best distinct candidates are climbed, once with a general envelope of the rings
and once with their measured one (`ctf_search.py`). Uncertainties come from the calibrated likelihood's curvature.
Method: Rohou & Grigorieff 2015 (CTFFIND4), with Gctf's background (Zhang 2016) made part of the comparison.

No rings is a status, not a number: `FittedCtf.status` says whether the values mean anything.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

import numpy as np
from jaxtyping import Float
from torch import Tensor

from models.fourier.spectra import average_tile_power
from models.optics.ctf_reach import (
    count_rings,
    equiphase_profiles,
    estimate_thickness,
    fit_resolution,
    normalised_profile,
    sinc_thickness,
)
from models.optics.ctf_rings import FloatArray, Microscope, RingSpectrum, build_rings
from models.optics.ctf_search import (
    CtfSearch,
    Likelihood,
    climb,
    covariance,
    estimate_envelope,
    noise_variance,
    scan,
)

__all__ = [
    "CtfProfile",
    "CtfSearch",
    "CtfStatus",
    "FittedCtf",
    "Microscope",
    "fit_ctf",
    "fit_ctf_spectrum",
    "profile_ctf",
    "score_ctf_spectrum",
]

# Rings are held to be there when their significance exceeds this: the best of a whole search of pure noise
# stays below 5.5 (tests/test_models/test_optics_ctf_fit.py).
RELIABLE_SIGNIFICANCE = 8.0
_NOISE_SIGNIFICANCE = 5.5
_COARSEST_RELIABLE_ANGSTROM = 15.0
_CLEAR_CONFIDENCE = 0.95
_CLEAR_SIGNIFICANCE = 12.0
# With fewer rings than this a fit leans on the shape of background and envelope, which noise does not tell.
_CLEAR_RINGS = 3.0
# Log-likelihoods are halved before they compare distant optima: the model's own errors do not average out.
_TEMPERATURE = 2.0
# A tile this wide resolves the rings of 3 µm defocus up to 4 Å.
_TILE_ANGSTROM = 640.0


class CtfStatus(Enum):
    """`RINGS`: trust the values; `WEAK`: rings are there, their values are uncertain; `NO_RINGS`: no values.

    Weak is a confidence below 0.95, a significance below 12, a defocus that is not known to 1 % (or 100 Å), an astigmatism that
    the data leave to its prior, or fewer than three rings.
    """

    RINGS = "rings"
    WEAK = "weak"
    NO_RINGS = "no_rings"


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedCtf:
    """A fitted CTF: u ≥ v, angle from x to u in [-90, 90).

    `score` is the correlation of data and fit in [-1, 1]; `significance` the height of the rings in standard deviations of the noise;
    `confidence` in [0, 1] the probability, tempered for the model's own errors, that this optimum is the right one, against
    the best distinct other optimum and against noise. Standard deviations are those of the mean
    defocus, of u - v, and of the angle (52° = unknown); they hold the prior on the astigmatism.
    """

    defocus_u_angstrom: float
    defocus_v_angstrom: float
    astigmatism_angle_deg: float
    phase_shift_deg: float
    fit_resolution_angstrom: float
    score: float
    significance: float
    confidence: float
    defocus_sd_angstrom: float
    astigmatism_sd_angstrom: float
    angle_sd_deg: float
    phase_shift_sd_deg: float
    thickness_angstrom: float | None
    status: CtfStatus

    @property
    def is_reliable(self) -> bool:
        """Whether there are rings at all."""
        return self.status is not CtfStatus.NO_RINGS

    @property
    def defocus_mean_angstrom(self) -> float:
        """Mean of u and v."""
        return 0.5 * (self.defocus_u_angstrom + self.defocus_v_angstrom)

    @property
    def point(self) -> FloatArray:
        """The point of the search: (mean defocus, A cos 2α, A sin 2α, phase shift)."""
        astigmatism = self.defocus_u_angstrom - self.defocus_v_angstrom
        angle = math.radians(2.0 * self.astigmatism_angle_deg)
        cosine, sine = astigmatism * math.cos(angle), astigmatism * math.sin(angle)
        return np.array([self.defocus_mean_angstrom, cosine, sine, self.phase_shift_deg])


def fit_ctf(
    image: Float[Tensor, "h w"],
    pixel_size_angstrom: float,
    microscope: Microscope,
    search: CtfSearch | None = None,
    *,
    tile_px: int | None = None,
) -> tuple[FittedCtf, Float[Tensor, "t tr"]]:
    """Fit the CTF of a micrograph; return it with the mean tile power spectrum that it was fitted to.

    The spectrum is made on the image's device, the search runs on the CPU.
    """
    if not bool(image.isfinite().all()):
        raise ValueError(f"image: {int((~image.isfinite()).sum())} pixels are not finite, all must be")
    power = average_tile_power(image, tile_px or choose_tile_px(image, pixel_size_angstrom))
    return fit_ctf_spectrum(power, pixel_size_angstrom, microscope, search), power


def choose_tile_px(image: Float[Tensor, "h w"], pixel_size_angstrom: float) -> int:
    """Return the side of tiles: at least 512 px and 640 Å, less in fields that do not hold two of them abreast."""
    smallest = min(int(n) for n in image.shape)
    tile_px = max(512, 128 * math.ceil(_TILE_ANGSTROM / pixel_size_angstrom / 128))
    while tile_px > 128 and smallest < 2 * tile_px:
        tile_px -= 128
    return min(tile_px, smallest - smallest % 2)


def fit_ctf_spectrum(
    power: Float[Tensor, "n nr"],
    pixel_size_angstrom: float,
    microscope: Microscope,
    search: CtfSearch | None = None,
) -> FittedCtf:
    """Fit the CTF to a half power (or amplitude) spectrum, zero frequency first, of square tiles."""
    search = search or CtfSearch()
    rings = _build(power, pixel_size_angstrom, microscope, search)
    climbed: list[tuple[FloatArray, float]] = []
    for start, envelope in scan(rings, search):
        # candidates compete under the same, generous estimate of the noise
        likelihood = Likelihood(rings, envelope, rings.spread**2)
        climbed.append(climb(likelihood, start, search))
    climbed.sort(key=lambda item: -item[1])
    refined = [_refine(rings, point, search) for point in _distinct(climbed)]
    best = max(refined, key=lambda item: item.value)
    others = [r for r in refined if not _is_same(r.point, best.point)]
    # rings may be visible beyond the limit of the fit: their reach and nodes are looked for up to Nyquist
    wide = _build_wide(power, pixel_size_angstrom, microscope, search)
    thickness = _find_thickness(wide, best.point, search)
    if thickness is not None:
        best = _refine(rings, best.point, search, thickness)
        thickness = _find_thickness(wide, best.point, search)
    return _describe(rings, wide, best, others, search, thickness)


def score_ctf_spectrum(
    power: Float[Tensor, "n nr"],
    pixel_size_angstrom: float,
    microscope: Microscope,
    fitted: FittedCtf,
    search: CtfSearch | None = None,
) -> FittedCtf:
    """Judge somebody else's CTF values on a spectrum: the same record with our figures."""
    search = search or CtfSearch()
    rings = _build(power, pixel_size_angstrom, microscope, search)
    wide = _build_wide(power, pixel_size_angstrom, microscope, search)
    thickness = _find_thickness(wide, fitted.point, search)
    judged = _judge(rings, fitted.point, search, thickness)
    return _describe(rings, wide, judged, [], search, thickness)


@dataclass(frozen=True, slots=True)
class CtfProfile:
    """Ring profiles to Nyquist along lines of equal phase.

    `contrast` is the data less their local mean over one and a half rings, over their local height, so that
    clear rings run from about -1 to 1; `ctf2` is the fit in [0, 1] (of rings that a thickness reverses: 1 less).
    """

    k: FloatArray
    contrast: FloatArray
    ctf2: FloatArray


def profile_ctf(
    power: Float[Tensor, "n nr"],
    pixel_size_angstrom: float,
    microscope: Microscope,
    fitted: FittedCtf,
    *,
    coarsest_resolution_angstrom: float = 30.0,
) -> CtfProfile:
    """Return the data's and the fit's ring profiles, for pictures and reports."""
    wide = build_rings(
        power, pixel_size_angstrom, microscope, (coarsest_resolution_angstrom, 2.05 * pixel_size_angstrom)
    )
    _, ctf2 = equiphase_profiles(wide, fitted.point)
    reverse = np.sign(sinc_thickness(wide, fitted.thickness_angstrom))
    return CtfProfile(wide.k, normalised_profile(wide, fitted.point), 0.5 + (ctf2 - 0.5) * reverse)


def _build(power: Tensor, pixel: float, microscope: Microscope, search: CtfSearch) -> RingSpectrum:
    finest = max(search.finest_resolution_angstrom, 2.05 * pixel)
    return build_rings(power, pixel, microscope, (search.coarsest_resolution_angstrom, finest))


def _build_wide(power: Tensor, pixel: float, microscope: Microscope, search: CtfSearch) -> RingSpectrum:
    return build_rings(power, pixel, microscope, (search.coarsest_resolution_angstrom, 2.05 * pixel))


@dataclass(frozen=True, slots=True)
class _Optimum:
    point: FloatArray
    value: float  # logarithm of the posterior
    likelihood: Likelihood


def _refine(
    rings: RingSpectrum, start: FloatArray, search: CtfSearch, thickness: float | None = None
) -> _Optimum:
    """Climb under the envelope that the data show at the start, twice."""
    point = start
    for _ in range(2):
        point, _ = climb(_likelihood(rings, point, thickness), point, search)
    return _judge(rings, point, search, thickness)


def _judge(
    rings: RingSpectrum, point: FloatArray, search: CtfSearch, thickness: float | None = None
) -> _Optimum:
    likelihood = _likelihood(rings, point, thickness)
    prior = float(search.log_prior(math.hypot(point[1], point[2])))
    return _Optimum(point, likelihood(point) + prior, likelihood)


def _likelihood(rings: RingSpectrum, point: FloatArray, thickness: float | None) -> Likelihood:
    envelope = estimate_envelope(rings, point, np.sign(sinc_thickness(rings, thickness)))
    return Likelihood(rings, envelope, noise_variance(rings, point, envelope))


def _find_thickness(wide: RingSpectrum, point: FloatArray, search: CtfSearch) -> float | None:
    if search.max_thickness_angstrom is None:
        return None
    noise = noise_variance(wide, point, estimate_envelope(wide, point))
    return estimate_thickness(wide, point, search.max_thickness_angstrom, noise)


def _is_same(a: FloatArray, b: FloatArray) -> bool:
    # phase shifts repeat after 180°
    phase = abs((a[3] - b[3] + 90.0) % 180.0 - 90.0)
    return abs(a[0] - b[0]) < 0.05 * max(a[0], b[0]) and bool(phase < 30.0)


def _distinct(climbed: list[tuple[FloatArray, float]], *, n_keep: int = 4) -> list[FloatArray]:
    kept: list[FloatArray] = []
    for point, _ in climbed:
        close = [math.dist(point[:3], other[:3]) < 150.0 and abs(point[3] - other[3]) < 5.0 for other in kept]
        if not any(close):
            kept.append(point)
        if len(kept) == n_keep:
            break
    return kept


def _describe(
    rings: RingSpectrum,
    wide: RingSpectrum,
    best: _Optimum,
    others: list[_Optimum],
    search: CtfSearch,
    thickness: float | None,
) -> FittedCtf:
    point, likelihood = best.point, best.likelihood
    resolution = fit_resolution(wide, point, thickness)
    flat = np.ones_like(rings.k)
    product, square = Likelihood(rings, flat, 1.0).correlate(point)
    score = product / math.sqrt(square * float(np.vdot(rings.data, rings.data)))
    gain = likelihood(point)
    significance = math.copysign(math.sqrt(2.0 * abs(gain)), gain)
    amplitude = math.hypot(point[1], point[2])
    spreads = _spreads(covariance(likelihood, point, search), point)
    confidence = _confidence(gain, best.value, others)
    status = CtfStatus.RINGS
    if significance < RELIABLE_SIGNIFICANCE or resolution > _COARSEST_RELIABLE_ANGSTROM:
        status = CtfStatus.NO_RINGS
    elif (
        confidence < _CLEAR_CONFIDENCE
        or significance < _CLEAR_SIGNIFICANCE
        or spreads[0] > max(0.01 * point[0], 100.0)
        or spreads[1] > max(0.5 * search.astigmatism_scale_angstrom, 0.25 * amplitude)
        or count_rings(wide, point, resolution) < _CLEAR_RINGS
    ):
        status = CtfStatus.WEAK
    return FittedCtf(
        defocus_u_angstrom=float(point[0]) + 0.5 * amplitude,
        defocus_v_angstrom=float(point[0]) - 0.5 * amplitude,
        astigmatism_angle_deg=0.5 * math.degrees(math.atan2(point[2], point[1])),
        phase_shift_deg=float(point[3]),
        fit_resolution_angstrom=resolution,
        score=score,
        significance=significance,
        confidence=confidence,
        defocus_sd_angstrom=spreads[0],
        astigmatism_sd_angstrom=spreads[1],
        angle_sd_deg=spreads[2],
        phase_shift_sd_deg=spreads[3],
        thickness_angstrom=thickness,
        status=status,
    )


def _spreads(matrix: FloatArray, point: FloatArray) -> tuple[float, float, float, float]:
    """Return the standard deviations of mean defocus, astigmatism, angle (deg) and phase shift (deg)."""
    amplitude = math.hypot(point[1], point[2])
    plane = matrix[1:3, 1:3]
    along = np.array([point[1], point[2]]) / amplitude if amplitude > 1e-6 else np.array([1.0, 0.0])
    across = np.array([-along[1], along[0]])
    radial, tangential = (math.sqrt(max(0.0, float(d @ plane @ d))) for d in (along, across))
    # a direction that is uniform over 180° has a standard deviation of 180 / √12
    angle = min(180.0 / math.sqrt(12.0), 0.5 * math.degrees(tangential / max(amplitude, 1e-6)))
    phase = math.sqrt(max(0.0, float(matrix[3, 3]))) if len(matrix) > 3 else 0.0
    return math.sqrt(max(0.0, float(matrix[0, 0]))), radial, angle, phase


def _confidence(gain: float, value: float, others: list[_Optimum]) -> float:
    rivals = [gain - 0.5 * _NOISE_SIGNIFICANCE**2, *(value - other.value for other in others)]
    return 1.0 / (1.0 + sum(math.exp(-max(-60.0, min(60.0, r / _TEMPERATURE))) for r in rivals))
