"""Projections of a volume by the central-slice theorem, batched."""

from __future__ import annotations

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from models.fourier.transforms import centred_irfft2, centred_rfft3, shift_phases

_REACH = 2
"""Columns of negative kx kept: the spline reaches one point further than the largest negative step, 0."""

_BATCH = 8
"""Slices interpolated at once: eight 256 px slices need about 40 MB of temporaries."""


class Projector:
    """Projects one cube at any pose: slices of the transform of the volume padded twofold.

    Slices are interpolated with cubic B-splines (64 taps as eight trilinear look-ups, Ruijters et al. 2008);
    the spline's effect in real space (sinc⁴) is divided out of the volume beforehand. Errors are 0.1 % for
    an object half as wide as the box and 1 % at the box's faces. The object has to lie within the sphere
    inscribed in the box.

    Parameters
    ----------
    volume
        Density (z, y, x) with its origin at the middle voxel; an even side.
    pixel_size_angstrom
        Voxel size; projections are integrals over z, that is volume units times Å.
    """

    def __init__(self, volume: Float[Tensor, "d d d"], pixel_size_angstrom: float) -> None:
        size = int(volume.shape[0])
        if size % 2:
            raise ValueError(f"volume: side {size}, must be even")
        self.box_px = size
        self.pixel_size_angstrom = pixel_size_angstrom
        line = torch.sinc((torch.arange(size) - size // 2) / (2.0 * size)).pow(4)
        window = line[:, None, None] * line[None, :, None] * line[None, None, :]
        padded = torch.zeros(2 * size, 2 * size, 2 * size)
        start = size - size // 2
        padded[start : start + size, start : start + size, start : start + size] = volume / window
        # Rows and planes in order of frequency, and two columns of negative kx for the spline's reach.
        ordered = torch.fft.fftshift(centred_rfft3(padded), dim=(0, 1))
        mirrored = ordered[:, :, 1 : 1 + _REACH].flip((0, 1, 2)).roll((1, 1), dims=(0, 1)).conj()
        table = torch.cat((mirrored, ordered), dim=2)
        self._table = torch.stack((table.real, table.imag))[None].contiguous()

    def project(
        self, matrices: Float[Tensor, "n 3 3"], shift_yx_px: Float[Tensor, "n 2"] | None = None
    ) -> Float[Tensor, "n d d"]:
        """Return projections P(x, y) = ∫ V(Rᵀ(x, y, z)) dz, moved by `shift_yx_px`, in volume units times Å."""
        size = self.box_px
        ky = (torch.fft.fftfreq(size) * size)[:, None].expand(size, size // 2 + 1)
        kx = (torch.fft.rfftfreq(size) * size).expand(size, size // 2 + 1)
        is_inside = ky.square() + kx.square() < (size // 2 - 1) ** 2
        stack = torch.zeros(len(matrices), size, size // 2 + 1, dtype=torch.complex64)
        for start in range(0, len(matrices), _BATCH):
            rows = matrices[start : start + _BATCH]
            # Rᵀ (kx, ky, 0) needs the first two rows of R; two grid steps per frequency (twofold padding).
            k = kx[is_inside][:, None] * rows[:, None, 0] + ky[is_inside][:, None] * rows[:, None, 1]
            stack[start : start + _BATCH, is_inside] = self._interpolate(2.0 * k)
        if shift_yx_px is not None:
            stack = stack * shift_phases((size, size), shift_yx_px)
        return centred_irfft2(stack, (size, size)) * self.pixel_size_angstrom

    def _interpolate(self, k_xyz: Float[Tensor, "n m 3"]) -> Complex[Tensor, "n m"]:
        """Return the transform at `k_xyz` grid steps within Nyquist's sphere; negative kx by Friedel's law."""
        half = self.box_px
        is_friedel = k_xyz[..., 0] < 0
        k = torch.where(is_friedel[..., None], -k_xyz, k_xyz)
        origin = torch.tensor([_REACH, half, half])
        sizes = torch.tensor(self._table.shape[2:]).flip(0)
        place = k + origin
        base = place.floor()
        t = place - base
        u = 1.0 - t
        low = u**3 / 6.0 + (2.0 / 3.0 - t.square() + 0.5 * t**3)  # the weights of the points at -1 and 0
        near = base - 1.0 + (2.0 / 3.0 - t.square() + 0.5 * t**3) / low
        far = base + 1.0 + (t**3 / 6.0) / (1.0 - low)
        value = k.new_zeros((*k.shape[:-1], 2))
        for corner in range(8):
            pick = torch.tensor([corner & 1, (corner >> 1) & 1, (corner >> 2) & 1], dtype=torch.bool)
            weight = torch.where(pick, 1.0 - low, low).prod(-1)
            grid = torch.where(pick, far, near) * (2.0 / (sizes - 1)) - 1.0
            found = torch.nn.functional.grid_sample(
                self._table, grid[None, None], mode="bilinear", padding_mode="zeros", align_corners=True
            )
            value = value + found[0, :, 0].movedim(0, -1) * weight[..., None]
        result = torch.view_as_complex(value)
        return torch.where(is_friedel, result.conj(), result)
