"""Soft masks: a sphere, or the molecule's own outline taken from a low-passed map.

All masks are in [0, 1] with a raised-cosine edge: a hard edge would correlate half-maps by itself.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

_KEPT_COMPONENT_FRACTION = 0.1
"""Components smaller than this share of the largest are noise specks or detached micelle shreds."""

_MINIMUM_EDGE_PX = 3.0
"""A cosine edge narrower than this rings in Fourier space whatever the pixel size."""


def spherical_mask(
    box_px: int, radius_px: float, soft_px: float, *, device: torch.device | None = None
) -> Float[Tensor, "n n n"]:
    """Return 1 within `radius_px` of the middle voxel (n // 2), falling as a cosine to 0 over `soft_px`."""
    axis = torch.arange(box_px, dtype=torch.float32, device=device) - box_px // 2
    radius = torch.sqrt(axis[:, None, None] ** 2 + axis[None, :, None] ** 2 + axis[None, None, :] ** 2)
    return _cosine_edge(radius - radius_px, soft_px)


def solvent_sphere(box_px: int, diameter_fraction: float) -> Float[Tensor, "n n n"]:
    """Return the sphere that a search is confined to: a diameter in boxes, an edge of 6 % of the box."""
    return spherical_mask(box_px, 0.5 * diameter_fraction * box_px, 0.06 * box_px)


def mask_from_map(
    volume: Float[Tensor, "n n n"],
    pixel_size_angstrom: float,
    *,
    lowpass_angstrom: float = 15.0,
    threshold: float | Literal["auto"] = "auto",
    dilate_angstrom: float = 6.0,
    soft_angstrom: float = 8.0,
) -> Float[Tensor, "n n n"]:
    """Return a soft mask around the molecule in a map whose protein is positive.

    Parameters
    ----------
    volume
        The map; it may be noisy, it is low-passed first.
    pixel_size_angstrom
        Pixel size.
    lowpass_angstrom
        Resolution of the Gaussian low-pass (amplitude 1/e there) before the threshold.
    threshold
        A level of the low-passed map, or "auto": 0.7 of Otsu's level inside the box's sphere, raised to three
        standard deviations of the voxels outside it. Weak domains stay in, solvent noise stays out.
    dilate_angstrom
        How far the binary outline grows before the edge begins.
    soft_angstrom
        Width of the cosine edge; never less than 3 px.
    """
    if volume.ndim != 3 or len(set(volume.shape)) != 1:
        raise ValueError(f"volume: shape {tuple(volume.shape)}, must be a cube")
    if not bool(torch.isfinite(volume).all()):
        raise ValueError("volume: holds NaN or infinite values, must be finite")
    smooth = gaussian_lowpass(volume, pixel_size_angstrom, lowpass_angstrom)
    level = auto_threshold(smooth) if threshold == "auto" else float(threshold)
    is_molecule = _largest_components((smooth > level).cpu().numpy())
    if not is_molecule.any():
        raise ValueError(f"threshold: {level:.4g}, no voxel of the low-passed map lies above it")
    distance_px = torch.from_numpy(ndimage.distance_transform_edt(~is_molecule).astype(np.float32))
    soft_px = max(soft_angstrom / pixel_size_angstrom, _MINIMUM_EDGE_PX)
    return _cosine_edge(distance_px - dilate_angstrom / pixel_size_angstrom, soft_px).to(volume.device)


def gaussian_lowpass(
    volume: Float[Tensor, "n n n"], pixel_size_angstrom: float, resolution_angstrom: float
) -> Float[Tensor, "n n n"]:
    """Multiply the spectrum by exp(−(k d)²) with d the resolution: 1/e at 1/d."""
    size = int(volume.shape[0])
    full = torch.fft.fftfreq(size, d=pixel_size_angstrom, device=volume.device)
    half = torch.fft.rfftfreq(size, d=pixel_size_angstrom, device=volume.device)
    square = full[:, None, None] ** 2 + full[None, :, None] ** 2 + half[None, None, :] ** 2
    spectrum = torch.fft.rfftn(volume.float()) * torch.exp(-square * resolution_angstrom**2)
    smooth: Tensor = torch.fft.irfftn(spectrum, s=(size, size, size))
    return smooth


def auto_threshold(smooth: Float[Tensor, "n n n"]) -> float:
    """Return the level that separates molecule from solvent in a low-passed map (see `mask_from_map`)."""
    size = int(smooth.shape[0])
    inside = spherical_mask(size, size / 2 - 1, 0.0, device=smooth.device) > 0.5
    values = smooth[inside].cpu().numpy()
    outside = smooth[~inside].cpu().numpy()
    noise_level = float(outside.mean() + 3.0 * outside.std()) if outside.size else -math.inf
    level = max(0.7 * _otsu(values), noise_level)
    # A map with wild corners (unmasked refinement) must not lose its molecule to them.
    return min(level, float(np.quantile(values, 0.995)))


def _otsu(values: NDArray[np.float32]) -> float:
    """Return the level that maximises the variance between two classes (Otsu 1979), 256 bins."""
    counts, edges = np.histogram(values, bins=256)
    centres = 0.5 * (edges[1:] + edges[:-1])
    below = np.cumsum(counts)
    above = below[-1] - below
    sum_below = np.cumsum(counts * centres)
    mean_below = sum_below / np.maximum(below, 1)
    mean_above = (sum_below[-1] - sum_below) / np.maximum(above, 1)
    between = below.astype(float) * above * (mean_below - mean_above) ** 2
    return float(edges[1 + int(np.argmax(between))])


def _largest_components(is_inside: NDArray[np.bool_]) -> NDArray[np.bool_]:
    labels, n_components = ndimage.label(is_inside)
    if n_components <= 1:
        return is_inside
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    kept: NDArray[np.bool_] = (sizes >= _KEPT_COMPONENT_FRACTION * sizes.max())[labels]
    return kept & is_inside


def _cosine_edge(distance_px: Float[Tensor, "n n n"], soft_px: float) -> Float[Tensor, "n n n"]:
    """Return 1 where the distance is ≤ 0, 0 where it is ≥ `soft_px`, a raised cosine between."""
    if soft_px <= 0:
        return (distance_px <= 0).float()
    return 0.5 + 0.5 * torch.cos(math.pi * (distance_px / soft_px).clamp(0.0, 1.0))
