"""Projections of a volume by the central-slice theorem, batched."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from models.fourier.transforms import centred_irfft2, centred_rfft3, shift_phases


class Projector:
    """Projects one cube at any pose: slices of the transform of the volume padded twofold.

    Slices are interpolated trilinearly; the interpolation's effect in real space (sinc²) is divided out of
    the volume beforehand. The object has to lie within the sphere inscribed in the box.

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
        line = torch.sinc((torch.arange(size) - size // 2) / (2.0 * size)).square()
        window = line[:, None, None] * line[None, :, None] * line[None, None, :]
        padded = torch.zeros(2 * size, 2 * size, 2 * size)
        start = size - size // 2
        padded[start : start + size, start : start + size, start : start + size] = volume / window
        spectrum = centred_rfft3(padded)
        # Rows and planes in order of frequency, so that trilinear neighbours are neighbours in memory.
        self._table = torch.fft.fftshift(spectrum, dim=(0, 1)).contiguous()

    def project(
        self, matrices: Float[Tensor, "n 3 3"], shift_yx_px: Float[Tensor, "n 2"] | None = None
    ) -> Float[Tensor, "n d d"]:
        """Return projections P(x, y) = ∫ V(Rᵀ(x, y, z)) dz, moved by `shift_yx_px`, in volume units times Å."""
        size = self.box_px
        ky = torch.fft.fftfreq(size) * size
        kx = torch.fft.rfftfreq(size) * size
        spectra = []
        for matrix in matrices:
            # Rᵀ (kx, ky, 0) needs the first two rows of R; two grid steps per frequency (twofold padding).
            k = 2.0 * (kx[None, :, None] * matrix[0] + ky[:, None, None] * matrix[1])
            spectra.append(self._interpolate(k))
        stack = torch.stack(spectra)
        if shift_yx_px is not None:
            stack = stack * shift_phases((size, size), shift_yx_px)
        return centred_irfft2(stack, (size, size)) * self.pixel_size_angstrom

    def _interpolate(self, k_xyz: Float[Tensor, "h w 3"]) -> Tensor:
        """Return the transform at `k_xyz` grid steps; negative kx by Friedel's law; 0 beyond Nyquist's sphere."""
        size = self._table.shape[0]
        half = size // 2
        is_friedel = k_xyz[..., 0] < 0
        k = torch.where(is_friedel[..., None], -k_xyz, k_xyz)
        base = k.floor()
        fraction = k - base
        index = base.long()
        is_inside = k.square().sum(-1) < (half - 1) ** 2
        flat = torch.view_as_real(self._table).reshape(-1, 2)
        value = k.new_zeros((*k.shape[:-1], 2))
        for corner in range(8):
            step = [(corner >> axis) & 1 for axis in range(3)]
            weight = torch.ones_like(fraction[..., 0])
            for axis in range(3):
                weight = weight * (fraction[..., axis] if step[axis] else 1.0 - fraction[..., axis])
            x = (index[..., 0] + step[0]).clamp(0, half)
            y = (index[..., 1] + step[1] + half).clamp(0, size - 1)
            z = (index[..., 2] + step[2] + half).clamp(0, size - 1)
            value = value + flat[(z * size + y) * (half + 1) + x] * (weight * is_inside)[..., None]
        result = torch.view_as_complex(value)
        return torch.where(is_friedel, result.conj(), result)
