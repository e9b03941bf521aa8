"""Ice figures from a power spectrum: the ring at 3.7 Å, and the sharp spots and rings of crystalline ice."""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from models.fourier.spectra import radial_mean

# Hexagonal ice: 3.90, 3.67 and 3.44 Å; vitreous ice a broad maximum at 3.7 Å. The band holds the strongest.
_BAND_ANGSTROM = (3.85, 3.55)
_NEIGHBOURS_ANGSTROM = ((4.6, 4.05), (3.35, 3.1))
_MIN_NYQUIST_ANGSTROM = 3.5
# Hexagonal ice 3.90, 3.67, 3.44, 2.67, 2.25 Å and cubic ice 3.67, 2.25 Å (Dubochet et al. 1988), each with the
# distance, as a part of it, over which a magnification that is off by 1.5 % may place it.
_LATTICE_ANGSTROM = (3.90, 3.67, 3.44, 2.67, 2.25)
_LATTICE_TOLERANCE = 0.02
_NEEDED_ANGSTROM = 3.4
# A ring's level is compared with a parabola through its neighbours this many Fourier pixels off on both sides:
# it follows the halo of vitreous ice (some 20 wide) and Thon rings, but not a lattice's ring of one to three.
_NEIGHBOURS_PX = (3, 4, 5)
# What the parabola may miss of the halo's peak, in cube roots of power.
_MIN_RING_EXCESS = 0.015
# Robust standard deviations of a Fourier pixel, and of a ring's level, beyond which they are a lattice's: of
# 10^4 Gaussian values the greatest is at 3.9 (safe: 5-8).
_LIMIT_SD = 6.0


def estimate_ice_ratio(
    power: Float[Tensor, "n nr"], pixel_size_angstrom: float, first_maximum_angstrom: float
) -> float | None:
    """Return the excess amplitude of the 3.7 Å band over that of the first CTF maximum, or None.

    Amplitudes are roots of ring means of the power spectrum. The band's excess is its mean over a straight
    line through its neighbours; the first maximum's excess is over the level of the neighbours of the band
    (where there are hardly any rings). About 0 without an ice ring; SIMPLE rejects micrographs above 1. None
    when Nyquist does not hold the band, or when the first maximum does not rise above the background.
    """
    if 2.0 * pixel_size_angstrom > _MIN_NYQUIST_ANGSTROM:
        return None
    amplitude = np.sqrt(radial_mean(power))
    k = np.arange(len(amplitude)) / (int(power.shape[0]) * pixel_size_angstrom)
    positions, levels = [], []
    for coarse, fine in _NEIGHBOURS_ANGSTROM:
        part = (k >= 1.0 / coarse) & (k <= min(1.0 / fine, k[-1]))
        if not part.any():
            # just below Nyquist only the inner neighbour is left: a level line through it
            continue
        positions.append(float(k[part].mean()))
        levels.append(float(np.median(amplitude[part])))
    band = (k >= 1.0 / _BAND_ANGSTROM[0]) & (k <= 1.0 / _BAND_ANGSTROM[1])
    if not band.any() or not levels:
        return None
    excess = float(np.mean(amplitude[band] - np.interp(k[band], positions, levels)))
    centre = round(int(power.shape[0]) * pixel_size_angstrom / first_maximum_angstrom)
    around = amplitude[max(1, centre - 1) : centre + 2]
    reference = float(around.mean() - np.mean(levels)) if len(around) else 0.0
    return excess / reference if reference > 0.0 else None


def first_maximum_angstrom(
    defocus_angstrom: float, wavelength_angstrom: float, amplitude_contrast: float
) -> float:
    """Return the resolution of the CTF's first maximum, π λ z k² + asin(amplitude contrast) = π / 2."""
    k2 = (0.5 - math.asin(amplitude_contrast) / math.pi) / (wavelength_angstrom * defocus_angstrom)
    return 1.0 / math.sqrt(k2)


def estimate_crystalline_ice(power: Float[Tensor, "n nr"], pixel_size_angstrom: float) -> float | None:
    """Return the fraction of the power at ice's lattice spacings that is in sharp spots or rings, or None.

    Vitreous ice has a broad halo and gives 0; a single crystal gives spots, many small ones give rings. The
    cube root of the power is nearly Gaussian about the level of its ring (Wilson & Hilferty 1931), whatever the
    number of averaged tiles; Fourier pixels over `_LIMIT_SD` robust standard deviations are spots, rings whose
    median stands out likewise from its neighbours are a lattice's rings. The axes are left
    out: what is fixed to the detector's rows and columns lies there. None when Nyquist is below 3.4 Å.
    """
    if 2.0 * pixel_size_angstrom > _NEEDED_ANGSTROM:
        return None
    n = int(power.shape[0])
    fy = (torch.fft.fftfreq(n) * n)[:, None].numpy()
    fx = np.arange(n // 2 + 1, dtype=np.float64)[None, :]
    radius = np.hypot(fy, fx)
    ring = np.rint(radius).astype(np.int64)
    last = n // 2 - 1
    first = max(2, math.floor(n * pixel_size_angstrom / (_LATTICE_ANGSTROM[0] * 1.3)))
    is_used = (ring >= first) & (ring <= last) & (np.abs(fy) > 1) & (fx > 1) & (fx < n // 2)
    values = np.cbrt(power.double().numpy()[is_used].clip(min=0.0))
    rings = ring[is_used] - first
    levels = _ring_medians(values, rings, last - first + 1)
    expected = ndimage.correlate1d(levels, _parabola_weights(), mode="nearest")
    ratio, level_ratio = values / levels[rings], levels / np.maximum(expected, 0.5 * levels)
    d = n * pixel_size_angstrom / (radius[is_used])
    in_lattice = np.zeros(len(values), dtype=bool)
    for spacing in _LATTICE_ANGSTROM:
        in_lattice |= np.abs(d / spacing - 1.0) < _LATTICE_TOLERANCE
    spread = _robust_sd(ratio[~in_lattice])
    is_sharp_ring = level_ratio > 1.0 + max(_LIMIT_SD * _robust_sd(level_ratio), _MIN_RING_EXCESS)
    is_spot = ratio > 1.0 + _LIMIT_SD * spread
    is_crystal = in_lattice & (is_spot | is_sharp_ring[rings])
    if not is_crystal.any():
        return 0.0
    excess = np.clip(values**3 - np.minimum(levels, expected)[rings].clip(min=0.0) ** 3, 0.0, None)
    return float(excess[is_crystal].sum() / (values[in_lattice] ** 3).sum())


def _parabola_weights() -> NDArray[np.float64]:
    """Return the weights that give, from the neighbours' levels, the value at 0 of their parabola."""
    offsets = np.array([-x for x in reversed(_NEIGHBOURS_PX)] + list(_NEIGHBOURS_PX))
    at_zero = np.linalg.pinv(np.stack([np.ones(len(offsets)), offsets, offsets**2], axis=1))[0]
    weights = np.zeros(2 * max(_NEIGHBOURS_PX) + 1)
    weights[offsets + max(_NEIGHBOURS_PX)] = at_zero
    return weights


def _ring_medians(values: NDArray[np.float64], rings: NDArray[np.int64], n_rings: int) -> NDArray[np.float64]:
    medians = np.asarray(ndimage.median(values, rings, np.arange(n_rings)), dtype=np.float64)
    return np.maximum(medians, 1e-12 * max(float(medians.max()), 1e-300))


def _robust_sd(values: NDArray[np.float64]) -> float:
    return max(1.4826 * float(np.median(np.abs(values - np.median(values)))), 1e-9)
