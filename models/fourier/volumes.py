"""Bringing a volume onto another grid."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from models.fourier.transforms import good_size


def resample_volume(
    volume: Float[Tensor, "n n n"],
    pixel_size_angstrom: float,
    new_pixel_size_angstrom: float,
    new_box_px: int,
) -> Float[Tensor, "m m m"]:
    """Return the volume on another grid about the same centre (middle voxel n // 2).

    It is padded, cropped or padded in Fourier space, and cut or zero-padded to the new box; the new pixel
    size is met within 0.2 %.
    """
    n = int(volume.shape[-1])
    ratio = pixel_size_angstrom / new_pixel_size_angstrom
    if n == new_box_px and abs(ratio - 1.0) < 1e-4:
        return volume
    padded_size = good_size(n + n // 2) if abs(ratio - 1.0) > 1e-4 else n
    # The padded size whose Fourier-cropped counterpart is an even integer keeps the pixel size within 0.2 %.
    best = min(
        range(padded_size, padded_size + 40, 2),
        key=lambda size: abs(size * ratio / 2 - round(size * ratio / 2)) / size,
    )
    source = _centred(volume, best)
    target_size = 2 * round(best * ratio / 2)
    spectrum = torch.fft.fftshift(torch.fft.fftn(torch.fft.ifftshift(source)))
    resized = _centred(spectrum, target_size)
    out = torch.fft.fftshift(torch.fft.ifftn(torch.fft.ifftshift(resized)).real) * (target_size / best) ** 3
    return _centred(out, new_box_px)


def _centred(array: Tensor, size: int) -> Tensor:
    """Cut or zero-pad a cube about its middle sample (n // 2)."""
    n = int(array.shape[-1])
    out = array.new_zeros((size,) * 3)
    low = size // 2 - n // 2
    source = slice(max(0, -low), max(0, -low) + min(n, size))
    target = slice(max(0, low), max(0, low) + min(n, size))
    out[target, target, target] = array[source, source, source]
    return out
