"""The 3D FSC as a body in Fourier space, and how round it is (Tan et al. 2017, program 3DFSC 3.0).

Every Fourier voxel has the FSC of its shell in the double cone around its own direction (20°). Voxels below
the threshold are cut off, and so is everything that lies outward of a cut voxel. Sphericity is
π^(1/3) (6V)^(2/3) / A of that body, 1 for a sphere: anisotropy of any kind lowers it, and so do noisy directions.

Differences from the program: a voxel takes the value of the nearest of 3,072 directions (at most 2° away),
and the isosurface is cut by tetrahedra instead of Lewiner's marching cubes (area within 0.5 %).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from models.reconstruction.cones import DIRECTION_ORDER, half_directions, healpix_pixel
from models.reconstruction.grids import healpix_directions

BINARISE_AT = 0.5
"""The program's threshold for the body whose sphericity is reported."""

HIGH_PASS_ANGSTROM = 200.0
"""Coarser voxels always belong to the body: masks and ice gradients live there."""

_MARGIN_PX = 5
_CUBE_CORNERS = np.array(list(itertools.product((0, 1), repeat=3)))
_TETRAHEDRA = np.array(
    # Kuhn's six tetrahedra around the diagonal 0-7, one per order of the axes.
    [
        [0, a, a + b, 7] for a, b in ((4, 2), (4, 1), (2, 4), (2, 1), (1, 4), (1, 2))
    ]
)  # fmt: skip


def sphericity(
    cfsc: Float[Tensor, "d shells"],
    box_px: int,
    pixel_size_angstrom: float,
    *,
    threshold: float = BINARISE_AT,
    high_pass_angstrom: float = HIGH_PASS_ANGSTROM,
) -> float:
    """Return the sphericity of the 3D FSC body in [0, 1]; 0 where no voxel reaches the threshold."""
    body = fsc_body(
        cfsc, box_px, pixel_size_angstrom, threshold=threshold, high_pass_angstrom=high_pass_angstrom
    )
    return sphericity_of_body(body)


def fsc_body(
    cfsc: Float[Tensor, "d shells"],
    box_px: int,
    pixel_size_angstrom: float,
    *,
    threshold: float,
    high_pass_angstrom: float = HIGH_PASS_ANGSTROM,
) -> NDArray[np.bool_]:
    """Return the Fourier voxels `(n, n, n)` (zyx, zero frequency at n // 2) connected inwards at the threshold.

    `cfsc` follows `half_directions()`; undefined values (shells whose cones are too empty) count as reached.
    """
    layout = _layout(box_px)
    reached = torch.isnan(cfsc) | (cfsc >= threshold)
    shells = torch.arange(cfsc.shape[1])
    reached |= shells < box_px * pixel_size_angstrom / high_pass_angstrom - 1.0
    reached[:, 0] = True
    inside = reached.numpy()[layout.direction, layout.shell]
    body = np.zeros(box_px**3, dtype=bool)
    body[layout.centre] = True
    for start, end in itertools.pairwise(layout.level_starts):
        own = slice(start, end)
        body[layout.voxel[own]] = inside[own] & body[layout.parent[own]]
    return body.reshape((box_px,) * 3)


def sphericity_of_body(body: Bool[NDArray[np.bool_], "n n n"] | NDArray[np.bool_]) -> float:
    """Return π^(1/3) (6V)^(2/3) / A of a binary body after a Gaussian blur of one voxel, as 3DFSC measures it."""
    padded = np.pad(body.astype(np.float32), _MARGIN_PX)
    smooth = ndimage.gaussian_filter(padded, sigma=1.0)
    volume = float((smooth >= 0.5).sum())
    area = isosurface_area(smooth, 0.5)
    return min(1.0, math.pi ** (1 / 3) * (6.0 * volume) ** (2 / 3) / area) if area > 0 else 0.0


def isosurface_area(field: NDArray[np.float32], level: float) -> float:
    """Return the area (voxel faces = 1) of a field's isosurface, linear within six tetrahedra per cell."""
    above = field > level
    lowest = np.stack([above[_corner(c, above.shape)] for c in _CUBE_CORNERS])
    z, y, x = np.nonzero(lowest.any(0) & ~lowest.all(0))
    values = np.stack([field[z + c[0], y + c[1], x + c[2]] for c in _CUBE_CORNERS], axis=1).astype(float)
    f = (values[:, _TETRAHEDRA] - level).reshape(-1, 4)
    points = np.broadcast_to(_CUBE_CORNERS[_TETRAHEDRA], (len(z), 6, 4, 3)).reshape(-1, 4, 3).astype(float)
    # Vertices in falling order of value: what is above comes first.
    order = np.argsort(-f, axis=1)
    f = np.take_along_axis(f, order, axis=1)
    points = np.take_along_axis(points, order[:, :, None], axis=1)
    n_above = (f > 0).sum(axis=1)
    total = 0.0
    for n, edges in ((1, ((0, 1), (0, 2), (0, 3))), (3, ((3, 0), (3, 1), (3, 2)))):
        a, b, c = (_crossing(points[n_above == n], f[n_above == n], edge) for edge in edges)
        total += _triangles(a, b, c)
    a, b, c, d = (
        _crossing(points[n_above == 2], f[n_above == 2], edge) for edge in ((0, 2), (0, 3), (1, 3), (1, 2))
    )
    return total + _triangles(a, b, c) + _triangles(a, c, d)


def _corner(corner: NDArray[np.int64], shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(int(c), n - 1 + int(c)) for c, n in zip(corner, shape, strict=True))


def _crossing(
    points: NDArray[np.float64], values: NDArray[np.float64], edge: tuple[int, int]
) -> NDArray[np.float64]:
    i, j = edge
    share = values[:, i] / (values[:, i] - values[:, j])
    crossing: NDArray[np.float64] = points[:, i] + share[:, None] * (points[:, j] - points[:, i])
    return crossing


def _triangles(a: NDArray[np.float64], b: NDArray[np.float64], c: NDArray[np.float64]) -> float:
    return float(0.5 * np.linalg.norm(np.cross(b - a, c - a), axis=1).sum())


@dataclass(frozen=True, slots=True)
class _Layout:
    """Voxels inside Nyquist from the centre outwards, their direction, shell and next voxel inwards."""

    centre: int
    voxel: NDArray[np.int64]
    parent: NDArray[np.int64]
    direction: NDArray[np.int64]
    shell: NDArray[np.int64]
    level_starts: tuple[int, ...]


@lru_cache(maxsize=2)
def _layout(box_px: int) -> _Layout:
    axis = np.arange(box_px) - box_px // 2
    z, y, x = (c.reshape(-1) for c in np.meshgrid(axis, axis, axis, indexing="ij"))
    shell = np.round(np.sqrt(x**2 + y**2 + z**2)).astype(np.int64)
    level = np.maximum(np.maximum(np.abs(x), np.abs(y)), np.abs(z))
    used = np.flatnonzero((shell <= box_px // 2) & (level > 0))
    used = used[np.argsort(level[used], kind="stable")]
    x, y, z, shell, level = x[used], y[used], z[used], shell[used], level[used]
    half = box_px // 2
    # Of the 26 neighbours the one nearest to the centre is a step inwards along every axis.
    parent = ((z - np.sign(z) + half) * box_px + (y - np.sign(y) + half)) * box_px + (x - np.sign(x) + half)
    unit = torch.nn.functional.normalize(torch.from_numpy(np.stack((x, y, z), axis=1)).float(), dim=1)
    direction = nearest_half_direction()[healpix_pixel(unit, 2**DIRECTION_ORDER).numpy()]
    starts = np.searchsorted(level, np.arange(1, level[-1] + 2))
    return _Layout(
        centre=(half * box_px + half) * box_px + half,
        voxel=used,
        parent=parent,
        direction=direction,
        shell=shell,
        level_starts=tuple(int(s) for s in starts),
    )


@lru_cache(maxsize=1)
def nearest_half_direction() -> NDArray[np.int64]:
    """Return for each of the 3,072 HEALPix pixels the row of its direction or antipode in `half_directions()`."""
    nearest: NDArray[np.int64] = (
        (healpix_directions(DIRECTION_ORDER) @ half_directions().T).abs().argmax(1).numpy()
    )
    return nearest
