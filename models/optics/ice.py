"""Ice figures from a power spectrum: how strong the ring of hexagonal ice at 3.7 Å is."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float
from torch import Tensor

from models.fourier.spectra import radial_mean

# Hexagonal ice: 3.90, 3.67 and 3.44 Å; vitreous ice a broad maximum at 3.7 Å. The band holds the strongest.
_BAND_ANGSTROM = (3.85, 3.55)
_NEIGHBOURS_ANGSTROM = ((4.6, 4.05), (3.35, 3.1))
_MIN_NYQUIST_ANGSTROM = 3.5


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
