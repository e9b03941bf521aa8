"""Filters for half spectra of real images: low and high pass, B-factor, the central cross, flat fields.

Filters are real factors over the layout of `torch.fft.rfft2`; frequencies are in 1/Å.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from models.fourier.transforms import good_size


def squared_frequencies(shape_yx: tuple[int, int], pixel_size_angstrom: float) -> Float[Tensor, "h wr"]:
    """Return k² in 1/Å² for the half spectrum of an image of `shape_yx`."""
    ky = torch.fft.fftfreq(shape_yx[0], pixel_size_angstrom)
    kx = torch.fft.rfftfreq(shape_yx[1], pixel_size_angstrom)
    k2: Tensor = ky.square()[:, None] + kx.square()[None, :]
    return k2


def b_factor_filter(k2: Float[Tensor, "h wr"], b_factor_angstrom2: float) -> Float[Tensor, "h wr"]:
    """Return exp(−B k² / 4)."""
    return torch.exp(-0.25 * b_factor_angstrom2 * k2)


def low_pass_filter(
    k2: Float[Tensor, "h wr"], resolution_angstrom: float, *, relative_width: float = 0.1
) -> Float[Tensor, "h wr"]:
    """Return 1 below 1/resolution, falling as a raised cosine over `relative_width` of that frequency."""
    edge = 1.0 / resolution_angstrom
    position = (k2.sqrt() / edge - 1.0) / relative_width
    return 0.5 + 0.5 * torch.cos(math.pi * position.clamp(0.0, 1.0))


def high_pass_filter(k2: Float[Tensor, "h wr"], resolution_angstrom: float) -> Float[Tensor, "h wr"]:
    """Return 1 − exp(−(k d)² / 2) for d = `resolution_angstrom`: zero at the origin, one far from it."""
    return 1.0 - torch.exp(-0.5 * k2 * resolution_angstrom**2)


def smooth_gaussian(image: Float[Tensor, "h w"], sigma_px: float) -> Float[Tensor, "h w"]:
    """Return the image convolved with a Gaussian, edges reflected (no dark rim)."""
    height, width = (int(n) for n in image.shape)
    # four sigma hold all but 1e-4 of the kernel; a reflection cannot be wider than the image
    pad = min(math.ceil(4.0 * sigma_px), height - 1, width - 1)
    shape = (good_size(height + 2 * pad), good_size(width + 2 * pad))
    pads = (pad, shape[1] - width - pad, pad, shape[0] - height - pad)
    pads = (pads[0], min(pads[1], width - 1), pads[2], min(pads[3], height - 1))
    padded = torch.nn.functional.pad(image[None, None], pads, mode="reflect")[0, 0]
    size = (int(padded.shape[0]), int(padded.shape[1]))
    kernel = torch.exp(-2.0 * (math.pi * sigma_px) ** 2 * squared_frequencies(size, 1.0))
    smooth: Tensor = torch.fft.irfft2(torch.fft.rfft2(padded) * kernel, s=size)
    return smooth[pad : pad + height, pad : pad + width]
