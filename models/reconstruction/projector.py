"""Central slices of a volume and their adjoint, in Fourier space with trilinear interpolation.

A volume of n³ voxels lives in Fourier space as a *cube*: the samples of its twofold zero-padded transform up to a
radius, zero frequency in the middle, real and imaginary parts as two channels. A slice is read at the points
Rᵀ(kx, ky, 0) (`models.fourier.rotations`), where trilinear interpolation multiplies the volume in real space
by sinc² along each axis; `volume_to_cube` divides that out beforehand, `sums_to_volume` after insertion.
Insertion is the exact adjoint of slicing. Transforms are unnormalised, so that a slice at shell s equals the
DFT of the projection (the sum of the voxels along the beam). Radii are in shells, 1 / (n · pixel size).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Complex, Float, Int
from scipy.sparse import csc_array
from torch import Tensor
from torch.nn import functional

PADDING = 2
"""Zero padding of the volume: 2 keeps trilinear errors near 1 % inside 70 % of the box; 1 would alias."""

MAX_POINTS = 6_000_000
"""Points read per call; bounds the working memory to a few hundred MB."""

MAX_INSERTED = 800_000
"""Points inserted per call: 64 MB of cells and weights."""


@dataclass(frozen=True, slots=True)
class HalfPlane:
    """The independent Fourier coefficients of a real square image inside a radius, sorted by radius.

    `kx` and `ky` are integer frequencies (cycles per box); `shell` is round(|k|). The first coefficient is the
    mean (k = 0), which no likelihood uses.
    """

    box_size_px: int
    kx: Tensor
    ky: Tensor
    shell: Tensor
    radius: Tensor

    @classmethod
    def of(cls, box_size_px: int, max_shell: float) -> HalfPlane:
        """Return the coefficients with |k| ≤ `max_shell` of an even box; `max_shell` < n/2 avoids Nyquist's ties."""
        if box_size_px % 2 or max_shell >= box_size_px / 2:
            msg = f"box_size_px, max_shell: {box_size_px}, {max_shell}, the box is even and the radius below its half"
            raise ValueError(msg)
        extent = int(max_shell)
        ky, kx = torch.meshgrid(torch.arange(-extent, extent + 1), torch.arange(0, extent + 1), indexing="ij")
        radius = torch.sqrt((kx.square() + ky.square()).float())
        is_independent = (radius <= max_shell) & ((kx > 0) | (ky >= 0))
        kx, ky, radius = kx[is_independent], ky[is_independent], radius[is_independent]
        order = torch.argsort(radius, stable=True)
        kx, ky, radius = kx[order], ky[order], radius[order]
        return cls(box_size_px, kx.float(), ky.float(), radius.round().long(), radius)

    def __len__(self) -> int:
        return int(self.kx.numel())

    def count_within(self, max_shell: float) -> int:
        """Return how many leading coefficients have |k| ≤ `max_shell`."""
        return int(torch.searchsorted(self.radius, torch.tensor(float(max_shell) + 1e-4)))

    def cropped(self, n_coefficients: int) -> HalfPlane:
        """Return the leading coefficients alone."""
        n = n_coefficients
        return HalfPlane(self.box_size_px, self.kx[:n], self.ky[:n], self.shell[:n], self.radius[:n])

    def coefficients(self, images: Float[Tensor, "b n n"]) -> Complex[Tensor, "b k"]:
        """Return the images' DFT at these frequencies, with the origin at the middle pixel."""
        spectrum = torch.fft.rfft2(torch.fft.ifftshift(images, dim=(-2, -1)))
        return spectrum[:, self.ky.long() % self.box_size_px, self.kx.long()]

    def images(self, coefficients: Complex[Tensor, "b k"]) -> Float[Tensor, "b n n"]:
        """Invert `coefficients`: images that hold nothing beyond the radius."""
        n, ky, kx = self.box_size_px, self.ky.long(), self.kx.long()
        full = torch.zeros((len(coefficients), n, n), dtype=torch.complex64)
        full[:, (-ky) % n, (-kx) % n] = coefficients.conj()
        full[:, ky % n, kx % n] = coefficients
        return torch.fft.fftshift(torch.fft.ifft2(full).real, dim=(-2, -1))

    def phases(self, shift_xy_px: Float[Tensor, "*b 2"]) -> Complex[Tensor, "*b k"]:
        """Return the factors that move an image's content by (x, y) pixels on multiplication."""
        angle = shift_xy_px[..., :1] * self.kx + shift_xy_px[..., 1:] * self.ky
        angle = angle * (-2.0 * torch.pi / self.box_size_px)
        return torch.polar(torch.ones_like(angle), angle)


def gridding_window(box_size_px: int, padding: int = PADDING) -> Float[Tensor, "n n n"]:
    """Return ∏ sinc²(x / (padding · n)): what trilinear interpolation does to a volume in real space."""
    x = (torch.arange(box_size_px) - box_size_px // 2) / (padding * box_size_px)
    window = torch.sinc(x).square()
    return window[:, None, None] * window[None, :, None] * window[None, None, :]


def cube_half_side(max_shell: float, padding: int = PADDING) -> int:
    """Return h for a cube of 2h + 1 samples per side that holds every neighbour of points up to `max_shell`."""
    return int(padding * max_shell) + 1


def volume_to_cube(
    volume: Float[Tensor, "n n n"], max_shell: float, padding: int = PADDING
) -> Float[Tensor, "2 c c c"]:
    """Return the padded, gridding-corrected transform of `volume` up to `max_shell` (channels re, im)."""
    n = volume.shape[-1]
    m = padding * n
    h = cube_half_side(max_shell, padding)
    if 2 * h + 1 > m:
        raise ValueError(f"max_shell: {max_shell}, it is below half of the box ({n} px) by a voxel or more")
    low = m // 2 - n // 2
    padded = torch.zeros((m, m, m))
    padded[low : low + n, low : low + n, low : low + n] = volume / gridding_window(n, padding)
    spectrum = torch.fft.fftn(torch.fft.ifftshift(padded))
    index = torch.arange(-h, h + 1) % m
    cube = spectrum[index][:, index][:, :, index]
    return torch.stack((cube.real, cube.imag)).contiguous()


def cube_to_volume(
    cube: Float[Tensor, "2 c c c"], box_size_px: int, padding: int = PADDING
) -> Float[Tensor, "n n n"]:
    """Invert `volume_to_cube` (up to the shells that the cube does not hold)."""
    return samples_to_volume(cube, box_size_px, padding) * gridding_window(box_size_px, padding)


def sums_to_volume(
    cube: Float[Tensor, "2 c c c"], box_size_px: int, padding: int = PADDING
) -> Float[Tensor, "n n n"]:
    """Return the volume of a cube of solved sums: insertion spread each value over its neighbours, so divide."""
    return samples_to_volume(cube, box_size_px, padding) / gridding_window(box_size_px, padding)


def samples_to_volume(
    cube: Float[Tensor, "2 c c c"], box_size_px: int, padding: int = PADDING
) -> Float[Tensor, "n n n"]:
    """Return the volume whose transform takes these values on the padded grid (Hermitian is the caller's)."""
    n, m = box_size_px, padding * box_size_px
    h = (cube.shape[-1] - 1) // 2
    index = torch.arange(-h, h + 1) % m
    half = torch.zeros((m, m, m // 2 + 1), dtype=torch.complex64)
    values = torch.complex(cube[0, :, :, h:], cube[1, :, :, h:])
    half[index[:, None, None], index[None, :, None], torch.arange(h + 1)] = values
    padded = torch.fft.fftshift(torch.fft.irfftn(half, s=(m, m, m)))
    low = m // 2 - n // 2
    return padded[low : low + n, low : low + n, low : low + n]


def slice_points(rotations: Float[Tensor, "j 3 3"], plane: HalfPlane) -> Float[Tensor, "j k 3"]:
    """Return the frequencies Rᵀ(kx, ky, 0) as (x, y, z) in cycles per box."""
    # One component at a time (broadcasting over three is several times slower); no product, which might be rounded.
    points = torch.empty((len(rotations), len(plane), 3))
    for i in range(3):
        torch.add(
            rotations[:, 0, i, None] * plane.kx, rotations[:, 1, i, None] * plane.ky, out=points[..., i]
        )
    return points


def read_cube(cube: Float[Tensor, "c d d d"], points: Float[Tensor, "j k 3"]) -> Float[Tensor, "c j k"]:
    """Interpolate every channel of a cube at points in cycles per box of the unpadded volume."""
    h = (cube.shape[-1] - 1) // 2
    grid = points[None, None] * (PADDING / h)
    return functional.grid_sample(cube[None], grid, mode="bilinear", align_corners=True)[0, :, 0]


def extract_slices(
    cube: Float[Tensor, "2 d d d"], rotations: Float[Tensor, "j 3 3"], plane: HalfPlane
) -> Complex[Tensor, "j k"]:
    """Return the central slices of a cube at rotations R."""
    step = max(1, MAX_POINTS // max(1, len(plane)))
    parts = [read_cube(cube, slice_points(part, plane)) for part in rotations.split(step)]
    values = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
    return torch.complex(values[0], values[1])


def insert_slices(
    accumulator: Float[Tensor, "c d d d"],
    values: Float[Tensor, "c j k"],
    rotations: Float[Tensor, "j 3 3"],
    plane: HalfPlane,
) -> Float[Tensor, "c d d d"]:
    """Return the accumulator plus the adjoint of `read_cube` applied to `values`.

    A product with the sparse matrix of trilinear weights: its columns are the points, eight cells each. More channels
    cost little, so halves that share rotations are inserted together.
    """
    side = accumulator.shape[-1]
    step = max(1, MAX_INSERTED // max(1, len(plane)))
    total = accumulator.flatten(1).T.contiguous().numpy()
    for part, channels in zip(rotations.split(step), values.split(step, dim=1), strict=True):
        points = slice_points(part, plane).reshape(-1, 3).mul_(PADDING).add_((side - 1) // 2)
        cells, weights = _trilinear(points, side)
        starts = np.arange(0, cells.numel() + 1, 8, dtype=np.int32)
        entries = (weights.reshape(-1).numpy(), cells.reshape(-1).numpy(), starts)
        spread = csc_array(entries, shape=(side**3, len(points)))
        total = total + spread @ channels.flatten(1).T.contiguous().numpy()
    return torch.from_numpy(total).T.reshape(accumulator.shape).contiguous()


def _trilinear(points: Float[Tensor, "p 3"], side: int) -> tuple[Int[Tensor, "p 8"], Float[Tensor, "p 8"]]:
    """Return the flat cells around points (x, y, z) in cells of a cube, and their weights."""
    low = points.floor()
    x, y, z = (points - low).T.contiguous()
    first = (low.to(torch.int32) * torch.tensor([1, side, side * side], dtype=torch.int32)).sum(
        1, dtype=torch.int32
    )
    cells = [first + (dz * side + dy) * side + dx for dz in (0, 1) for dy in (0, 1) for dx in (0, 1)]
    planes = ((1 - z), z)
    lines = [wz * wy for wz in planes for wy in (1 - y, y)]
    weights = [w * wx for w in lines for wx in (1 - x, x)]
    return torch.stack(cells, dim=1), torch.stack(weights, dim=1)


def symmetrise_friedel(accumulator: Float[Tensor, "3 d d d"]) -> Float[Tensor, "3 d d d"]:
    """Add each coefficient's Friedel mate: channels (re, im, weight), of which im changes its sign."""
    mate = accumulator.flip(1, 2, 3)
    sign = torch.tensor([1.0, -1.0, 1.0])[:, None, None, None]
    return accumulator + sign * mate


def cube_shells(half_side: int, padding: int = PADDING) -> tuple[Tensor, Tensor]:
    """Return (shell, radius) of every sample of a cube: round(|k|) and |k| in cycles per unpadded box."""
    x = torch.arange(-half_side, half_side + 1).float() / padding
    radius = torch.sqrt(x[:, None, None].square() + x[None, :, None].square() + x[None, None, :].square())
    return radius.round().long(), radius
