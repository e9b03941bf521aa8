"""How far the rings of a fitted CTF reach, and the thickness of the ice where a node of the rings shows it.

In ice of thickness t the rings' height is multiplied by sinc ξ = sin ξ / ξ, ξ = π λ k² t: they vanish at the node
k = 1 / √(λ t) and come back reversed beyond it (McMullan et al. 2015; Elferich et al. 2024, CTFFIND5).
"""

from __future__ import annotations

import math

import numpy as np
from scipy.ndimage import gaussian_filter1d

from models.optics.ctf_rings import FloatArray, RingSpectrum

# Rings count as visible while data and fit correlate better than this over about one and a half rings (as in CTFFIND4).
RING_CORRELATION = 0.5
# A node is believed when the rings beyond it stand reversed by this many standard deviations, and those
# before it upright by as much.
_NODE_SIGNIFICANCE = 4.5
_MIN_THICKNESS_ANGSTROM = 200.0
_FALLOFFS_ANGSTROM2 = (0.0, 10.0, 20.0, 40.0, 80.0, 160.0)


def sinc_thickness(rings: RingSpectrum, thickness_angstrom: float | None) -> FloatArray:
    """Return sin ξ / ξ by ring; 1 without a thickness."""
    if thickness_angstrom is None:
        return np.ones_like(rings.k)
    # numpy's sinc x is sin πx / πx
    return np.asarray(np.sinc(rings.wavelength_angstrom * rings.k**2 * thickness_angstrom))


def estimate_thickness(
    rings: RingSpectrum, point: FloatArray, max_thickness_angstrom: float, noise_variance: float
) -> float | None:
    """Return the thickness in Å whose node lies inside the range, or None.

    The rings' signed height by shell is compared with a · exp(-b k²) · sinc ξ over t and b, a in closed form; then,
    around the node alone, with (a + b k) · sinc ξ: where the height changes its sign does not depend on
    how the envelope falls.
    """
    trial = rings.template(point, np.ones_like(rings.k))
    product = (trial * rings.data).sum(axis=0)
    square = (trial**2).sum(axis=0)
    thinnest = max(_MIN_THICKNESS_ANGSTROM, 1.0 / (rings.wavelength_angstrom * (0.95 * rings.k[-1]) ** 2))
    if thinnest >= max_thickness_angstrom:
        return None
    thicknesses = np.arange(thinnest, max_thickness_angstrom + 1.0, 5.0)
    nodes = np.sinc(rings.wavelength_angstrom * rings.k**2 * thicknesses[:, None])
    best_gain, best = -math.inf, 0
    for falloff in _FALLOFFS_ANGSTROM2:
        model = nodes * np.exp(-falloff * rings.k**2)
        along = model @ product
        gain = 0.5 * along * np.abs(along) / (model**2 @ square + 1e-30)
        i = int(gain.argmax())
        if gain[i] > best_gain:
            best_gain, best = float(gain[i]), i
    node = 1.0 / math.sqrt(rings.wavelength_angstrom * thicknesses[best])
    shape = np.abs(nodes[best])

    def significance(part: FloatArray) -> float:
        weight = shape * part
        return float(weight @ product) / math.sqrt(float(weight**2 @ square) * noise_variance + 1e-30)

    upright = significance((rings.k < node).astype(np.float64))
    # reversed rings lie between the first and the second node
    is_reversed = (rings.k > node) & (rings.k < math.sqrt(2.0) * node)
    reversed_ = -significance(is_reversed.astype(np.float64))
    if min(upright, reversed_) < _NODE_SIGNIFICANCE:
        return None
    return _refine_thickness(rings, product, square, float(thicknesses[best]))


def _refine_thickness(
    rings: RingSpectrum, product: FloatArray, square: FloatArray, thickness_angstrom: float
) -> float:
    for _ in range(2):
        node = 1.0 / math.sqrt(rings.wavelength_angstrom * thickness_angstrom)
        near = (rings.k > 0.65 * node) & (rings.k < 1.3 * node)
        k = rings.k[near]
        tried = thickness_angstrom * np.linspace(0.85, 1.15, 61)
        gains = np.zeros(len(tried))
        for i, thickness in enumerate(tried):
            shape = np.sinc(rings.wavelength_angstrom * k**2 * thickness)
            design = np.stack([shape, shape * (k - node)])
            along = design @ product[near]
            normal = (design * square[near]) @ design.T
            gains[i] = along @ np.linalg.lstsq(normal, along, rcond=None)[0]
        thickness_angstrom = float(tried[int(gains.argmax())])
    return thickness_angstrom


def fit_resolution(rings: RingSpectrum, point: FloatArray, thickness_angstrom: float | None = None) -> float:
    """Return the resolution in Å up to which data and fit correlate better than `RING_CORRELATION`.

    Both are averaged over sectors along lines of equal phase, and correlated in a window of one and a half
    rings (at least nine Fourier pixels) around each shell; a stretch of shells counts when it is half a window
    long, and the limit is the last of these before the correlation has stayed below the threshold for
    a whole window. The surroundings of a node, where no rings are to be seen, do not end it.
    """
    data, trial = equiphase_profiles(rings, point)
    trial = trial * np.sign(sinc_thickness(rings, thickness_angstrom))
    k = rings.k
    # ξ / π of the ice's thickness: the first node is at 1
    nodes = rings.wavelength_angstrom * k**2 * (thickness_angstrom or 0.0)
    is_blind = (nodes > 0.8) & (nodes < 1.25)
    half = half_windows(rings, float(point[0]))
    last, n_good, n_bad = -1, 0, 0
    for i in range(len(k)):
        part = slice(max(0, i - half[i]), i + half[i] + 1)
        if _correlation(data[part], trial[part]) >= RING_CORRELATION:
            n_good += 1
            if n_good > half[i]:
                last, n_bad = i, 0
        else:
            n_good = 0
        # a stretch that is still too short counts against the rings until it is long enough
        if last < i and not is_blind[i]:
            n_bad += 1
        if last >= 0 and n_bad > 2 * half[i] + 1:
            break
    return math.inf if last < 0 else 1.0 / float(k[last])


def count_rings(rings: RingSpectrum, point: FloatArray, resolution_angstrom: float) -> float:
    """Return how many rings lie between the origin and a resolution: the number of zeros passed, |χ| / π."""
    if not math.isfinite(resolution_angstrom):
        return 0.0
    chi = point[0] * rings.chi_defocus + rings.chi_fixed + math.radians(float(point[3]))
    return float(np.interp(1.0 / resolution_angstrom, rings.k, np.abs(chi))) / math.pi


def half_windows(rings: RingSpectrum, defocus_angstrom: float) -> list[int]:
    """Return for each shell the half width, in shells, of a window of one and a half rings, at least four."""
    slope = np.gradient(defocus_angstrom * rings.chi_defocus + rings.chi_fixed, rings.k)
    periods = math.pi / np.maximum(np.abs(slope), 1e-9)
    return [max(4, min(len(rings.k), math.ceil(0.75 * float(p) / rings.k_step))) for p in periods]


def equiphase_profiles(rings: RingSpectrum, point: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return (contrast, CTF²) over the rings of the mean defocus, each sector stretched to the same phase."""
    mean = np.array([point[0], 0.0, 0.0, point[3]])
    trial = 0.5 + 0.5 * rings.modulation(mean)[0]
    # χ depends on z k² (spherical aberration changes far less): equal phase lies at k √(z̄ / z)
    stretch = np.sqrt(max(point[0], 1.0) / np.maximum(rings.sector_defocus(point), 1.0))
    rows = [np.interp(rings.k * s, rings.k, row) for s, row in zip(stretch, rings.contrast, strict=True)]
    return np.mean(rows, axis=0), trial


def normalised_profile(rings: RingSpectrum, point: FloatArray) -> FloatArray:
    """Return the equal-phase contrast less its local mean, over its local spread (both over some rings)."""
    data, _ = equiphase_profiles(rings, point)
    half = half_windows(rings, float(point[0]))
    windows = [slice(max(0, i - h), i + h + 1) for i, h in enumerate(half)]
    centred = data - np.array([data[w].mean() for w in windows])
    spread = gaussian_filter1d(np.array([centred[w].std() for w in windows]), 2.0, mode="nearest")
    # the spread of a sine is 1/√2 of its height
    return np.asarray(centred / np.maximum(math.sqrt(2.0) * spread, 1e-12))


def _correlation(a: FloatArray, b: FloatArray) -> float:
    x = np.arange(len(a), dtype=np.float64)
    x -= x.mean()
    # remove the window's mean and slope, so that a background that is left does not count as a ring
    a = a - a.mean() - x * (x @ (a - a.mean())) / (x @ x)
    b = b - b.mean() - x * (x @ (b - b.mean())) / (x @ x)
    return float(a @ b / (math.sqrt(float(a @ a) * float(b @ b)) + 1e-20))
