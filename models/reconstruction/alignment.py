"""Alignment of one map to another: rotation, translation and hand, without a starting guess.

The search runs on Fourier coefficients. At low radius every rotation of a 15° grid is scored at all
translations at once (a small FFT), for the map and for its mirror image; the best distinct candidates are then
refined together by gradient ascent while the radius grows to `lowpass_angstrom`. Both maps are whitened per
shell, so that the score is a mean shell correlation and no shell outweighs the rest by power alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Complex, Float
from scipy import ndimage
from torch import Tensor

from models.fourier.transforms import centred_rfft3
from models.reconstruction.fsc import fourier_shell_correlation, resolution_at, shell_index, shell_sum
from models.reconstruction.grids import rotation_angle_deg, rotation_vector_to_matrix, so3_grid
from models.reconstruction.masks import gaussian_lowpass, spherical_mask

_COARSE_RADIUS = 7
"""Shells of the global search: at 15° spacing higher shells of a particle that fills its box lose phase."""

_COARSE_ORDER = 2
_ROTATIONS_PER_BLOCK = 256
_N_CANDIDATES = 16
"""Distinct starts per hand; symmetric and head-to-tail molecules have many near-equal ones."""

_DISTINCT_DEG = 18.0
_REFINEMENT_STEPS = (40, 50, 70)
_STEP_RAD = 0.03
_TRUTH_THRESHOLD = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Alignment:
    """How the moving map goes onto the reference.

    A point p (xyz, in pixels from the middle voxel) of the moving map, mirrored first (z → −z) if
    `is_mirrored`, comes to lie at `rotation` p + shift. `shift_zyx_px` is in (z, y, x) order, in pixels of
    the maps. `correlation` is the mean shell correlation to `lowpass_angstrom`, in [−1, 1].
    `correlation_other_hand` is the best found for the opposite hand, None if it was not tried.
    """

    rotation: Float[Tensor, "3 3"]
    shift_zyx_px: Float[Tensor, "3"]
    is_mirrored: bool
    correlation: float
    correlation_other_hand: float | None = None


@dataclass(frozen=True, slots=True)
class _Pair:
    """Whitened spectra of both maps, ready for evaluation at rotated points."""

    moving: Float[Tensor, "1 2 d h w"]  # oversampled, centred, real and imaginary part
    reference: Complex[Tensor, "n n nr"]
    size_px: int


def align_volumes(
    moving: Float[Tensor, "n n n"],
    reference: Float[Tensor, "n n n"],
    pixel_size_angstrom: float,
    *,
    generator: torch.Generator,
    lowpass_angstrom: float = 15.0,
    try_mirror: bool = True,
) -> Alignment:
    """Find rotation, translation and (optionally) hand that put `moving` onto `reference`.

    Parameters
    ----------
    moving, reference
        Cubes of one size and pixel size, the molecule within the inscribed sphere.
    pixel_size_angstrom
        Pixel size of both.
    generator
        Turns the search grid by one random rotation, so that no orientation is privileged.
    lowpass_angstrom
        Finest resolution used; 12-15 Å suits proteins of usual size.
    try_mirror
        Search the mirror image as well and keep the better hand.
    """
    if moving.ndim != 3 or len(set(moving.shape)) != 1 or moving.shape != reference.shape:
        shapes = f"{tuple(moving.shape)} and {tuple(reference.shape)}"
        raise ValueError(f"moving, reference: shapes {shapes}, must be equal cubes")
    size = int(moving.shape[0])
    radius = min(size * pixel_size_angstrom / lowpass_angstrom, size / 2 - 1)
    radius = max(radius, min(_COARSE_RADIUS, size / 2 - 1))
    grid = so3_grid(_COARSE_ORDER) @ _random_rotation(generator)
    results = []
    for is_mirrored in (False, True) if try_mirror else (False,):
        oriented = mirror(moving) if is_mirrored else moving
        pair = _prepare(oriented, reference, radius)
        rotations, shifts_px = _search(pair, grid, min(_COARSE_RADIUS, radius))
        rotation, shift_px, score = _refine(pair, rotations, shifts_px, radius)
        results.append((score, is_mirrored, rotation, shift_px))
    results.sort(key=lambda result: -result[0])
    score, is_mirrored, rotation, shift_px = results[0]
    return Alignment(
        rotation=rotation,
        shift_zyx_px=shift_px.flip(0),
        is_mirrored=is_mirrored,
        correlation=score,
        correlation_other_hand=results[1][0] if try_mirror else None,
    )


def apply_alignment(volume: Float[Tensor, "n n n"], alignment: Alignment) -> Float[Tensor, "n n n"]:
    """Return the volume where `alignment` puts it (quintic spline; voxels from outside are 0)."""
    oriented = mirror(volume) if alignment.is_mirrored else volume
    # Array coordinates are zyx: reversing both axes of R turns it from xyz to zyx.
    inverse = alignment.rotation.flip(0, 1).T.double().numpy()
    centre = np.full(3, volume.shape[0] // 2, dtype=np.float64)
    offset = centre - inverse @ (centre + alignment.shift_zyx_px.double().numpy())
    out = ndimage.affine_transform(oriented.cpu().numpy(), inverse, offset=offset, order=5, mode="constant")
    placed: Tensor = torch.from_numpy(out).to(volume)
    return placed


def mirror(volume: Float[Tensor, "n n n"]) -> Float[Tensor, "n n n"]:
    """Return the mirror image z → −z about the middle voxel n // 2 (opposite hand)."""
    flipped = volume.flip(0)
    return torch.roll(flipped, 1, dims=0) if volume.shape[0] % 2 == 0 else flipped


def map_correlation(
    a: Float[Tensor, "n n n"],
    b: Float[Tensor, "n n n"],
    mask: Float[Tensor, "n n n"],
    pixel_size_angstrom: float,
    lowpass_angstrom: float,
) -> float:
    """Return Pearson's correlation of two low-passed maps with the mask as weight, in [−1, 1]."""
    x = gaussian_lowpass(a, pixel_size_angstrom, lowpass_angstrom).double()
    y = gaussian_lowpass(b, pixel_size_angstrom, lowpass_angstrom).double()
    weight = mask.double() / mask.double().sum()
    x, y = x - (weight * x).sum(), y - (weight * y).sum()
    covariance = (weight * x * y).sum()
    return float(covariance / ((weight * x * x).sum() * (weight * y * y).sum()).sqrt().clamp_min(1e-300))


def truth_resolution(
    volume: Float[Tensor, "n n n"],
    truth: Float[Tensor, "n n n"],
    pixel_size_angstrom: float,
    mask: Float[Tensor, "n n n"] | None = None,
) -> tuple[float | None, Float[Tensor, " shells"]]:
    """Return the resolution at FSC 0.5 against a noise-free truth, and the curve, for maps already aligned.

    FSC = 0.5 against the truth is where half-maps cross 0.143, so the two numbers are to be compared as they
    are. The resolution is Nyquist where the curve never falls and None where there is no correlation. Align with
    `align_volumes` first: no search happens here.
    """
    a, b = (volume, truth) if mask is None else (volume * mask, truth * mask)
    curve = fourier_shell_correlation(a, b)
    return resolution_at(curve, _TRUTH_THRESHOLD, pixel_size_angstrom, int(volume.shape[0])), curve


def _random_rotation(generator: torch.Generator) -> Float[Tensor, "3 3"]:
    rotation, _ = torch.linalg.qr(torch.randn((3, 3), generator=generator))
    proper: Tensor = rotation * torch.sign(torch.linalg.det(rotation))
    return proper


def _prepare(moving: Tensor, reference: Tensor, radius: float) -> _Pair:
    """Mask, whiten up to `radius` and oversample the moving map twice for trilinear reading."""
    size = int(moving.shape[0])
    ball = spherical_mask(size, 0.5 * size - 3, 3.0)
    whitened = [_whiten(volume.cpu().float() * ball, radius) for volume in (moving, reference)]
    # The moving map is read off the grid: band-limit, crop its box in Fourier space, oversample, undo the
    # fall-off that trilinear reading causes.
    coarse = _crop_cube(whitened[0], size, _even(2 * math.ceil(radius) + 4, size))
    n = int(coarse.shape[0])
    axis = torch.arange(n, dtype=torch.float32) - n // 2
    line = torch.sinc(axis / (2 * n)) ** 2
    coarse = coarse / (line[:, None, None] * line[None, :, None] * line[None, None, :])
    padded = torch.zeros((2 * n,) * 3)
    low = n - n // 2
    padded[low : low + n, low : low + n, low : low + n] = coarse
    spectrum = torch.fft.fftshift(torch.fft.fftn(torch.fft.ifftshift(padded)))
    grid = torch.stack((spectrum.real, spectrum.imag))[None]
    return _Pair(moving=grid, reference=whitened[1], size_px=size)


def _even(n: int, limit: int) -> int:
    n = n + n % 2
    return n if n <= limit else limit - limit % 2


def _whiten(volume: Float[Tensor, "n n n"], radius: float) -> Complex[Tensor, "n n nr"]:
    """Return the centred half spectrum with unit mean power in each shell up to `radius`, 0 beyond and at 0."""
    size = int(volume.shape[0])
    spectrum = centred_rfft3(volume)
    counts = shell_sum(torch.ones(spectrum.shape), size)
    power = shell_sum(spectrum.abs().square(), size) / counts
    gain = power.clamp_min(float(power.max()) * 1e-12 + 1e-30).rsqrt().float()
    gain[0] = 0.0
    gain[torch.arange(len(gain)) > radius] = 0.0
    index = shell_index(size)
    return spectrum * torch.where(index < len(gain), gain[index.clamp_max(len(gain) - 1)], 0.0)


def _crop_cube(spectrum: Complex[Tensor, "n n nr"], size: int, new_size: int) -> Float[Tensor, "m m m"]:
    """Return the real cube of `new_size` voxels with the low frequencies of a centred half spectrum."""
    h = new_size // 2
    rows = torch.cat((torch.arange(h), torch.arange(size - h, size)))
    cropped = spectrum[rows][:, rows][:, :, : h + 1]
    cube: Tensor = torch.fft.fftshift(torch.fft.irfftn(cropped, s=(new_size,) * 3))
    return cube


def _points(
    pair: _Pair, radius: float
) -> tuple[Float[Tensor, "k 3"], Complex[Tensor, " k"], Float[Tensor, " k"]]:
    """Return frequencies (xyz) with kx ≥ 0 inside the radius, the reference there, and multiplicities (1, 2)."""
    n = pair.size_px
    full, half = torch.fft.fftfreq(n) * n, torch.arange(n // 2 + 1.0)
    kz, ky, kx = torch.meshgrid(full, full, half, indexing="ij")
    square = kx**2 + ky**2 + kz**2
    at = (square <= radius**2) & (square > 0)
    k = torch.stack((kx[at], ky[at], kz[at]), dim=-1)
    return k, pair.reference[at], torch.where(kx[at] > 0, 2.0, 1.0)


def _read(pair: _Pair, k: Float[Tensor, "*b 3"]) -> Complex[Tensor, "*b"]:
    """Return the moving map's spectrum at off-grid frequencies (trilinear on the twice oversampled grid)."""
    n = pair.moving.shape[-1]
    # align_corners=True: index i lies at −1 + 2 i / (n − 1); frequency k has index 2 k + n / 2.
    where = (2.0 * k + n // 2) * (2.0 / (n - 1)) - 1.0
    values = torch.nn.functional.grid_sample(
        pair.moving, where.reshape(1, 1, 1, -1, 3), align_corners=True, padding_mode="zeros"
    )
    return torch.complex(values[0, 0], values[0, 1]).reshape(k.shape[:-1])


def _search(
    pair: _Pair, grid: Float[Tensor, "j 3 3"], radius: float
) -> tuple[Float[Tensor, "c 3 3"], Float[Tensor, "c 3"]]:
    """Score all rotations at all translations; return the best distinct rotations and their shifts (xyz, px)."""
    k, reference, _ = _points(pair, radius)
    m = 2 * math.ceil(radius) + 2
    index = k.long()
    flat = ((index[:, 2] % m) * m + index[:, 1] % m) * (m // 2 + 1) + index[:, 0]
    scores, peaks = [], []
    for rotations in torch.split(grid, _ROTATIONS_PER_BLOCK):
        # The map turned by R has spectrum M(Rᵀ k).
        moved = _read(pair, torch.einsum("jab,ka->jkb", rotations, k))
        product = torch.zeros((len(rotations), m * m * (m // 2 + 1)), dtype=torch.complex64)
        product[:, flat] = reference * moved.conj()
        # Σ ref M* exp(2πi k·t) peaks at the t that M has to be moved by.
        correlation = torch.fft.irfftn(product.reshape(-1, m, m, m // 2 + 1), s=(m, m, m)).flatten(1)
        best = correlation.max(dim=1)
        scores.append(best.values)
        peaks.append(best.indices)
    score, peak = torch.cat(scores), torch.cat(peaks)
    chosen = _distinct(grid, score)
    zyx = torch.stack((peak[chosen] // (m * m), peak[chosen] // m % m, peak[chosen] % m), dim=-1)
    wrapped = torch.where(zyx > m // 2, zyx - m, zyx)
    return grid[chosen], wrapped.flip(-1).float() * (pair.size_px / m)


def _distinct(grid: Float[Tensor, "j 3 3"], score: Float[Tensor, " j"]) -> list[int]:
    """Return the highest-scoring rotations that lie apart from each other."""
    kept: list[int] = []
    for j in score.argsort(descending=True).tolist():
        if not kept or float(rotation_angle_deg(grid[kept], grid[j]).min()) > _DISTINCT_DEG:
            kept.append(j)
        if len(kept) == _N_CANDIDATES:
            break
    return kept


def _refine(
    pair: _Pair, rotations: Float[Tensor, "c 3 3"], shifts_px: Float[Tensor, "c 3"], radius: float
) -> tuple[Float[Tensor, "3 3"], Float[Tensor, "3"], float]:
    """Climb from all candidates at growing radius; keep a quarter of them at each stage."""
    start = min(_COARSE_RADIUS, radius)
    score = torch.zeros(len(rotations))
    for stage, n_steps in enumerate(_REFINEMENT_STEPS):
        at_radius = start + (radius - start) * stage / (len(_REFINEMENT_STEPS) - 1)
        rotations, shifts_px, score = _climb(pair, rotations, shifts_px, at_radius, n_steps)
        n_kept = max(1, len(rotations) // 4)
        order = score.argsort(descending=True)[:n_kept]
        rotations, shifts_px, score = rotations[order], shifts_px[order], score[order]
    return rotations[0], shifts_px[0], float(score[0])


def _climb(
    pair: _Pair, rotations: Tensor, shifts_px: Tensor, radius: float, n_steps: int
) -> tuple[Float[Tensor, "c 3 3"], Float[Tensor, "c 3"], Float[Tensor, " c"]]:
    """Adam on rotation vectors and shifts, all candidates at once; steps shrink to zero as a cosine."""
    k, reference, multiplicity = _points(pair, radius)
    reference_power = (multiplicity * reference.abs().square()).sum()
    # Angles and shifts get like-sized gradients in units of radians at the particle's edge.
    px_per_unit = pair.size_px / 4.0
    vector = torch.zeros((len(rotations), 3), requires_grad=True)
    move = torch.zeros((len(rotations), 3), requires_grad=True)
    optimiser = torch.optim.Adam([vector, move], lr=_STEP_RAD * _COARSE_RADIUS / max(radius, _COARSE_RADIUS))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, n_steps)

    def evaluate() -> tuple[Tensor, Tensor, Tensor]:
        turned = rotation_vector_to_matrix(vector) @ rotations
        shift = shifts_px + move * px_per_unit
        moved = _read(pair, torch.einsum("jab,ka->jkb", turned, k))
        angle = (-2.0 * math.pi / pair.size_px) * (shift @ k.T)
        moved = moved * torch.polar(torch.ones_like(angle), angle)
        cross = (multiplicity * (reference * moved.conj()).real).sum(dim=1)
        power = (multiplicity * moved.abs().square()).sum(dim=1)
        return cross / (power * reference_power).clamp_min(1e-30).sqrt(), turned, shift

    for _ in range(n_steps):
        optimiser.zero_grad()
        torch.autograd.backward(-evaluate()[0].sum())
        optimiser.step()
        schedule.step()
    with torch.no_grad():
        score, turned, shift = evaluate()
    return turned.detach(), shift.detach(), score.detach()
