"""Ring contrast by sector and ring, ready to be compared with trial CTFs.

Contrast is P / B - 1 with B the smooth radial background. A smooth background is projected out of the data
*and* of every trial, so that slow trends in either count for nothing (the background of Zhang 2016, Gctf, made
part of the comparison). Thon rings are modulations -cos 2χ of CTF² = (1 - cos 2χ) / 2.

A *point* of the search is (mean defocus, A cos 2α, A sin 2α, phase shift in degrees) with A = u - v in Å: in these
coordinates zero astigmatism is no special place.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from scipy.interpolate import BSpline
from torch import Tensor

from models.fourier.spectra import PolarBins
from models.optics.ctf import electron_wavelength_angstrom

FloatArray = NDArray[np.float64]

# Variance in Fourier pixels² of what blurs rings: the ring's own width (1/12) and a Hann window's spectrum (1/3).
_BLUR_PX2 = 1.0 / 12.0 + 1.0 / 3.0
# Where ice crystals diffract; a peak there that stands out is taken out.
_ICE_ANGSTROM = ((3.98, 3.35), (2.32, 2.18))


@dataclass(frozen=True, slots=True, kw_only=True)
class Microscope:
    """Voltage, spherical aberration and amplitude contrast (a fraction)."""

    voltage_kv: float
    cs_mm: float
    amplitude_contrast: float


@dataclass(frozen=True, slots=True)
class RingSpectrum:
    """The contrast of one frequency range and the projector that removes smooth backgrounds."""

    data: FloatArray  # (sector, ring): weighted contrast, background projected out, tails clipped
    contrast: FloatArray  # (sector, ring): P / B - 1
    background: FloatArray  # (ring): B
    root_weights: FloatArray  # (ring): root of the number of Fourier pixels, largest 1; 0 on ice rings
    basis: FloatArray  # (ring, background term), orthonormal
    k: FloatArray  # (ring) in 1/Å
    k_step: float
    wavelength_angstrom: float
    chi_defocus: FloatArray  # (ring): π λ k²
    chi_fixed: FloatArray  # (ring): spherical aberration and amplitude contrast
    cos_2: FloatArray  # (sector)
    sin_2: FloatArray  # (sector)

    @property
    def spread(self) -> float:
        """Robust standard deviation of the data, rings included."""
        used = self.data[:, self.root_weights > 0]
        return 1.4826 * float(np.median(np.abs(used))) + 1e-20

    def sector_defocus(self, point: FloatArray) -> FloatArray:
        """Return the defocus of each sector."""
        return np.asarray(point[0] + 0.5 * (point[1] * self.cos_2 + point[2] * self.sin_2))

    def modulation(self, point: FloatArray) -> FloatArray:
        """Return -cos 2χ on (sector, ring)."""
        phase = 2.0 * (self.chi_fixed + math.radians(float(point[3])))
        return np.asarray(-np.cos(2.0 * self.sector_defocus(point)[:, None] * self.chi_defocus + phase))

    def blur(self, defocus_angstrom: FloatArray | float) -> FloatArray:
        """Return what rings keep of their height in a spectrum of this sampling: `(…, ring)`."""
        defocus = np.asarray(defocus_angstrom, dtype=np.float64)[..., None]
        # d(2χ)/dk is 4 π λ z k to good approximation: the fixed part varies far more slowly
        slope = 4.0 * math.pi * self.wavelength_angstrom * defocus * self.k * self.k_step
        return np.asarray(np.exp(-0.5 * _BLUR_PX2 * slope**2))

    def project(self, weighted: FloatArray) -> FloatArray:
        """Remove the smooth background from weighted values `(…, ring)`."""
        return weighted - (weighted @ self.basis) @ self.basis.T

    def template(self, point: FloatArray, envelope: FloatArray) -> FloatArray:
        """Return the trial on (sector, ring), weighted and without background; envelope `(ring)` or `(sector ring)`."""
        shape = envelope * self.blur(float(point[0])) * self.root_weights
        return self.project(self.modulation(point) * shape)


def build_rings(
    power: Float[Tensor, "n nr"],
    pixel_size_angstrom: float,
    microscope: Microscope,
    resolutions_angstrom: tuple[float, float],
) -> RingSpectrum:
    """Return the rings between two resolutions (coarse, fine) of a half power or amplitude spectrum.

    Raises ValueError for spectra that are not square half spectra, or hold values that no power has.
    """
    check_spectrum(power)
    bins = ring_bins(power, pixel_size_angstrom, resolutions_angstrom)
    return rings_from_polar(bins, bins.average(power[None])[0], microscope)


def ring_bins(
    power: Float[Tensor, "n nr"], pixel_size_angstrom: float, resolutions_angstrom: tuple[float, float]
) -> PolarBins:
    """Return the sectors and rings between two resolutions."""
    coarse, fine = resolutions_angstrom
    return PolarBins(
        int(power.shape[0]), pixel_size_angstrom, k_range=(1.0 / coarse, 1.0 / fine), device=power.device
    )


def check_spectrum(power: Tensor) -> None:
    """Raise ValueError unless this is the half spectrum of a square image, finite and nowhere negative."""
    n, half = (int(i) for i in power.shape)
    if half != n // 2 + 1 or n % 2:
        raise ValueError(
            f"power: {n} x {half}, must be the half spectrum (n x n/2+1) of a square, even image"
        )
    n_bad = int((~power.isfinite()).sum())
    if n_bad:
        raise ValueError(f"power: {n_bad} values are not finite, a power spectrum has none of these")
    if float(power.min()) < 0.0:
        raise ValueError(f"power: {float(power.min()):.3g} is its minimum, a power spectrum is not negative")
    if float(power.max()) == float(power.min()):
        raise ValueError(f"power: {float(power.max()):.3g} throughout, a power spectrum varies")


def rings_from_polar(bins: PolarBins, values: FloatArray, microscope: Microscope) -> RingSpectrum:
    """Return the rings of a spectrum that is binned already, `(sector, ring)`."""
    k = bins.k
    counts = bins.counts.sum(axis=0)
    root_weights = np.sqrt(counts / counts.max())
    background = _smooth_background(values, k, counts)
    contrast = values / background[None, :] - 1.0
    root_weights = root_weights * _without_ice(contrast, k)
    basis = _background_basis(k, root_weights)
    weighted = contrast * root_weights
    data = weighted - (weighted @ basis) @ basis.T
    # heavy tails (crystal spots, what is left of ice rings) must not decide: clip at five robust SD
    spread = 1.4826 * float(np.median(np.abs(data[:, root_weights > 0]))) + 1e-20
    data = np.clip(data, -5.0 * spread, 5.0 * spread)
    wavelength = electron_wavelength_angstrom(microscope.voltage_kv)
    angles = np.deg2rad(2.0 * bins.angles_deg)
    cs = microscope.cs_mm * 1e7
    return RingSpectrum(
        data=data,
        contrast=contrast,
        background=background,
        root_weights=root_weights,
        basis=basis,
        k=k,
        k_step=float(k[-1] - k[0]) / (len(k) - 1),
        wavelength_angstrom=wavelength,
        chi_defocus=math.pi * wavelength * k**2,
        chi_fixed=math.asin(microscope.amplitude_contrast) - 0.5 * math.pi * cs * wavelength**3 * k**4,
        cos_2=np.cos(angles),
        sin_2=np.sin(angles),
    )


def _background_basis(k: FloatArray, root_weights: FloatArray) -> FloatArray:
    """Return an orthonormal basis (ring, term) of smooth functions of k, weighted."""
    n_terms = 7
    knots = np.linspace(k[0], k[-1], n_terms - 2)
    padded = np.concatenate([[k[0]] * 3, knots, [k[-1]] * 3])
    design = BSpline.design_matrix(np.clip(k, k[0], k[-1]), padded, 3).toarray()
    return np.linalg.qr(design * root_weights[:, None])[0]


def _smooth_background(values: FloatArray, k: FloatArray, counts: FloatArray) -> FloatArray:
    """Return the smooth radial background, fitted robustly to the logarithm of ring means."""
    ring_mean = (values * np.maximum(counts, 1)).sum(axis=0) / np.maximum(counts, 1) / len(values)
    log_mean = np.log(np.maximum(ring_mean, 1e-30 + 1e-12 * float(ring_mean.max())))
    weights = np.sqrt(counts / counts.max())
    basis = _background_basis(k, np.ones_like(weights))
    robust = weights.copy()
    smooth = log_mean
    for _ in range(5):
        solution = np.linalg.lstsq(basis * robust[:, None], log_mean * robust, rcond=None)[0]
        smooth = basis @ solution
        residual = log_mean - smooth
        spread = 1.4826 * float(np.median(np.abs(residual))) + 1e-12
        robust = weights / np.maximum(1.0, np.abs(residual) / (2.0 * spread))
    return np.asarray(np.exp(smooth))


def _without_ice(contrast: FloatArray, k: FloatArray) -> FloatArray:
    """Return 0 on the bands of ice where the contrast there stands out from all other fine rings, else 1."""
    kept = np.ones(len(k))
    profile = np.abs(contrast.mean(axis=0))
    bands = [(k >= 1.0 / coarse) & (k <= 1.0 / fine) for coarse, fine in _ICE_ANGSTROM]
    elsewhere = (k > 0.1) & ~np.any(bands, axis=0)
    if not elsewhere.any():
        return kept
    limit = 2.0 * float(np.quantile(profile[elsewhere], 0.98))
    for band in bands:
        if band.any() and float(profile[band].max()) > limit:
            kept[band] = 0.0
    return kept
