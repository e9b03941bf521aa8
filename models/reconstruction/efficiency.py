"""The efficiency of an orientation distribution, E_od (Naydenova & Russo 2017, program cryoEF), by own code.

The views' slabs add up to S(k); with a decay of the images' signal the map's transfer is √S(k) · exp(−B k²/4) and
its transform the point spread function. R(u) is where that falls to 1/e² of its peak along direction u, and
E_od = 1 − 2 σ(R) / ⟨R⟩ over all directions: 1 for even views; the authors call 0.8 and more good, below 0.5 bad.

Differences from the program: σ and mean are over equal solid angles, not over the surface's voxels; slabs are one
Fourier voxel thick (1/101 Å at B = 160 Å², where the program takes 1/diameter) and count views binned to 3.7°.
Against counting every view at every voxel: 0.01 apart for even views and cones, 0.02 for side views that scatter by
3° or more; for exact side views, whose common axis is a singular line, 0.67 instead of 0.80. Not compared with the
program itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from scipy import ndimage
from torch import Tensor

from models.reconstruction.cones import half_directions, healpix_pixel
from models.reconstruction.grids import healpix_directions
from models.reconstruction.sampling import symmetric_views
from models.reconstruction.sphericity import nearest_half_direction

B_FACTOR_ANGSTROM2 = 160.0
"""The program's default. Here it only sets the unit of the widths: the grid scales with it."""

_GRID_PX = 64
_K_MAX = 4.0 / math.sqrt(B_FACTOR_ANGSTROM2)
"""1/Å; the decay is e⁻⁴ there and what lies beyond has no weight."""

_K_STEP = _K_MAX / (_GRID_PX // 2)
_BIN_ORDER = 4
_N_COSINE_BINS = 512
_REACH_STEP = 0.25
"""Voxels between samples along a direction; the width is interpolated between them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewEfficiency:
    """E_od with the widths R(u) of the point spread function behind it (`half_directions()`, Å)."""

    efficiency: float
    widths_angstrom: Float[Tensor, " d"]
    worst_direction: tuple[float, float, float]


def view_efficiency(
    views: Float[Tensor, "n 3"], *, group: Float[Tensor, "g 3 3"] | None = None
) -> ViewEfficiency:
    """Measure E_od of a set of view directions (unit vectors of the specimen's frame) and their images."""
    if views.shape[0] == 0:
        raise ValueError("views: none, need at least one")
    unit = torch.nn.functional.normalize(views.float(), dim=-1)
    everything = unit if group is None or len(group) == 1 else symmetric_views(unit, group)
    widths = _widths(_transfer(_views_within(everything)))
    spread = float(widths.std(correction=0) / widths.mean())
    x, y, z = (float(c) for c in half_directions()[int(widths.argmax())])
    return ViewEfficiency(efficiency=1.0 - 2.0 * spread, widths_angstrom=widths, worst_direction=(x, y, z))


def _views_within(views: Float[Tensor, "n 3"]) -> Float[Tensor, "d c"]:
    """Return for each direction u the share of views with |v·u| ≤ (i + 1) / bins, in column i."""
    upper = torch.where(views[:, 2:] < 0, -views, views)  # a view and its opposite have the same slab
    counts = torch.bincount(healpix_pixel(upper, 2**_BIN_ORDER), minlength=12 * 4**_BIN_ORDER).float()
    used = torch.nonzero(counts)[:, 0]
    cosine = (half_directions() @ healpix_directions(_BIN_ORDER)[used].T).abs()
    n_directions = cosine.shape[0]
    column = (cosine * _N_COSINE_BINS).long().clamp_max(_N_COSINE_BINS - 1)
    flat = column + _N_COSINE_BINS * torch.arange(n_directions)[:, None]
    weights = counts[used].expand(n_directions, -1)
    histogram = torch.bincount(
        flat.flatten(), weights=weights.flatten(), minlength=n_directions * _N_COSINE_BINS
    )
    return (histogram.reshape(n_directions, -1).cumsum(1) / counts.sum()).float()


def _transfer(within: Float[Tensor, "d c"]) -> Float[Tensor, "m m m"]:
    """Return √S(k) exp(−B k²/4) on the grid, zero frequency at m // 2."""
    axis = (torch.arange(_GRID_PX).float() - _GRID_PX // 2) * _K_STEP
    kz, ky, kx = torch.meshgrid(axis, axis, axis, indexing="ij")
    k = torch.stack((kx, ky, kz), dim=-1).reshape(-1, 3)
    radius = k.norm(dim=1)
    middle = (_GRID_PX // 2) * (_GRID_PX**2 + _GRID_PX + 1)
    k[middle] = torch.tensor([0.0, 0.0, 1.0])
    direction = torch.from_numpy(nearest_half_direction())[
        healpix_pixel(torch.nn.functional.normalize(k, dim=1), 16)
    ]
    # A slab half a voxel to either side holds k where |v·u| ≤ step / (2 k).
    cosine = (0.5 * _K_STEP / radius.clamp_min(1e-9)).clamp_max(1.0)
    position = (cosine * _N_COSINE_BINS - 1.0).clamp(0.0, _N_COSINE_BINS - 1.0)
    low = position.floor().long()
    high = (low + 1).clamp_max(_N_COSINE_BINS - 1)
    share = position - low
    sampled = within[direction, low] * (1 - share) + within[direction, high] * share
    transfer = sampled.sqrt() * torch.exp(-0.25 * B_FACTOR_ANGSTROM2 * radius.square()) * (radius <= _K_MAX)
    return transfer.reshape((_GRID_PX,) * 3)


def _widths(transfer: Float[Tensor, "m m m"]) -> Float[Tensor, " d"]:
    """Return the distance at which the point spread function falls to 1/e² of its peak, per direction, in Å."""
    size = 2 * _GRID_PX
    padded = torch.zeros((size,) * 3)
    low = _GRID_PX // 2
    padded[low : low + _GRID_PX, low : low + _GRID_PX, low : low + _GRID_PX] = transfer
    # Real and even: the half with kx ≥ 0 is a Hermitian spectrum, whose transform is real.
    half = torch.fft.ifftshift(padded)[..., : size // 2 + 1]
    psf = torch.fft.fftshift(torch.fft.irfftn(half.to(torch.complex64), s=(size,) * 3)).abs()
    voxel_angstrom = 1.0 / (size * _K_STEP)
    reach = torch.arange(0.0, size // 2 - 1, _REACH_STEP)
    points = half_directions()[:, None, :] * reach[None, :, None] + size // 2
    values = ndimage.map_coordinates(
        (psf / psf.max()).numpy(), points.flip(-1).permute(2, 0, 1).numpy(), order=1
    )
    is_below = values < math.exp(-2.0)
    first = np.where(is_below.any(1), is_below.argmax(1), len(reach) - 1)
    rows = np.arange(len(first))
    above, below = values[rows, np.maximum(first - 1, 0)], values[rows, first]
    step = (above - math.exp(-2.0)) / np.maximum(above - below, 1e-12)
    return torch.from_numpy((first - 1 + step) * _REACH_STEP * voxel_angstrom).float()
