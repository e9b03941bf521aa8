"""Fourier transforms whose origin is the middle pixel (index n // 2), cropping, shifting and good sizes.

Half spectra are those of `torch.fft.rfftn`, zero frequency first. Nothing here writes into an argument.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Complex, Float
from scipy.fft import next_fast_len
from torch import Tensor


def good_size(n: int, *, even: bool = True) -> int:
    """Return the smallest 2-3-5-7-smooth (by default even) length ≥ n; others cost two to four times more."""
    size = n
    while True:
        size = int(next_fast_len(size, real=True))
        if _largest_prime_factor(size) <= 7 and not (even and size % 2):
            return size
        size += 1


def _largest_prime_factor(n: int) -> int:
    largest = 1
    for p in (2, 3, 5, 7, 11, 13):
        while n % p == 0:
            n //= p
            largest = p
    return max(largest, n)


def centred_rfft2(image: Float[Tensor, "*b h w"]) -> Complex[Tensor, "*b h wr"]:
    """Return the half spectrum with the image's origin at its middle pixel (phases of centred objects ≈ 0)."""
    return torch.fft.rfft2(torch.fft.ifftshift(image, dim=(-2, -1)))


def centred_irfft2(
    spectrum: Complex[Tensor, "*b h wr"], shape_yx: tuple[int, int]
) -> Float[Tensor, "*b h w"]:
    """Invert `centred_rfft2`."""
    return torch.fft.fftshift(torch.fft.irfft2(spectrum, s=shape_yx), dim=(-2, -1))


def centred_rfft3(volume: Float[Tensor, "d h w"]) -> Complex[Tensor, "d h wr"]:
    """Return the half spectrum of a volume with its origin at its middle voxel."""
    return torch.fft.rfftn(torch.fft.ifftshift(volume, dim=(-3, -2, -1)), dim=(-3, -2, -1))


def centred_irfft3(spectrum: Complex[Tensor, "d h wr"], size_px: int) -> Float[Tensor, "d h w"]:
    """Invert `centred_rfft3` for a cube of `size_px`."""
    volume = torch.fft.irfftn(spectrum, s=(size_px, size_px, size_px), dim=(-3, -2, -1))
    return torch.fft.fftshift(volume, dim=(-3, -2, -1))


def crop_rfft2(
    spectrum: Complex[Tensor, "*b h wr"], shape_yx: tuple[int, int], new_shape_yx: tuple[int, int]
) -> Complex[Tensor, "*b h2 wr2"]:
    """Crop or zero-pad a half spectrum of an image of `shape_yx` to `new_shape_yx`, keeping mean grey values.

    Values are scaled by the ratio of areas, so that `irfft2` of the result has the image's mean. Both shapes
    must be even, or equal to each other along an axis, for the Nyquist terms to make sense.
    """
    (h, w), (h2, w2) = shape_yx, new_shape_yx
    rows = min(h, h2)
    n_positive, n_negative = (rows + 1) // 2, rows // 2
    columns = min(w, w2) // 2 + 1
    out = spectrum.new_zeros((*spectrum.shape[:-2], h2, w2 // 2 + 1))
    out[..., :n_positive, :columns] = spectrum[..., :n_positive, :columns]
    if n_negative:
        out[..., h2 - n_negative :, :columns] = spectrum[..., h - n_negative :, :columns]
    return out * ((h2 * w2) / (h * w))


def fourier_resize(
    image: Float[Tensor, "*b h w"], new_shape_yx: tuple[int, int]
) -> Float[Tensor, "*b h2 w2"]:
    """Resample an image by Fourier cropping or padding; its grey values keep their mean."""
    shape_yx = (int(image.shape[-2]), int(image.shape[-1]))
    if shape_yx == new_shape_yx:
        return image.clone()
    return torch.fft.irfft2(crop_rfft2(torch.fft.rfft2(image), shape_yx, new_shape_yx), s=new_shape_yx)


def shift_phases(shape_yx: tuple[int, int], shift_yx_px: Float[Tensor, "*b 2"]) -> Complex[Tensor, "*b h wr"]:
    """Return factors that move an image by `shift_yx_px` (content goes towards larger y, x) on multiplication."""
    height, width = shape_yx
    fy = torch.fft.fftfreq(height, device=shift_yx_px.device)
    fx = torch.fft.rfftfreq(width, device=shift_yx_px.device)
    angle = shift_yx_px[..., 0, None, None] * fy[:, None] + shift_yx_px[..., 1, None, None] * fx[None, :]
    return torch.polar(torch.ones_like(angle), -2.0 * math.pi * angle)
