"""Preprocessing on a GPU: the same steps as `preprocess.py`, as tensor operations on the images' own device.

Covers what a GPU is worth using for: the Hartley crop of boxes above the input size, and boxes that have it already.
Float32 throughout, so at most one grey level in a few pixels per thousand differs from the NumPy path, like its own
float32 mode. Everything else (bicubic, spline, the outlier guard) is the NumPy path's.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from models.cryo_ief.config import ResizeMode


def is_covered(box_size_px: int, input_size_px: int, resize_mode: ResizeMode) -> bool:
    """Return whether boxes of this size are prepared here."""
    return box_size_px == input_size_px or (resize_mode == "hartley" and box_size_px > input_size_px)


def preprocess_tensor(
    images: Float[Tensor, "b n n"], input_size_px: int, mean: float, std: float, resize_mode: ResizeMode
) -> Float[Tensor, "b 1 s s"]:
    """Return the network's input from images, protein white, on their device; see `preprocess_particles`."""
    grey = to_grey_tensor(images, input_size_px, resize_mode)
    return (grey[:, None].to(torch.float32) / 255.0 - mean) / std


def to_grey_tensor(
    images: Float[Tensor, "b n n"], input_size_px: int, resize_mode: ResizeMode
) -> UInt8[Tensor, "b s s"]:
    """Return resized images as bytes: each image's minimum becomes 0 and its maximum 255.

    A constant image keeps its value (0 to 255), one with NaN or infinity becomes 0. Raises `ValueError` for boxes that
    `is_covered` does not name.
    """
    box = images.shape[-1]
    if not is_covered(box, input_size_px, resize_mode):
        msg = (
            f"images: boxes of {box} px to {input_size_px} px by {resize_mode!r}, are prepared without a GPU"
        )
        raise ValueError(msg)
    stack = images if box == input_size_px else hartley_crop_tensor(images, input_size_px)
    flat = stack.flatten(1)
    low, high = (edge[:, None, None] for edge in (flat.amin(dim=1), flat.amax(dim=1)))
    span = torch.where((high > low) & torch.isfinite(high - low), high - low, torch.ones_like(low))
    # The order of these operations shows in the last byte: see preprocess.py.
    is_resized = box != input_size_px
    scaled = (stack - low) * (255.0 / span) if is_resized else (stack - low) / span * 255.0
    scaled = torch.where(high == low, stack.clamp(0.0, 255.0), scaled)
    scaled = torch.where(torch.isfinite(low + high), scaled, torch.zeros_like(scaled))
    return scaled.to(torch.uint8)


def hartley_crop_tensor(images: Float[Tensor, "b n n"], size_px: int) -> Float[Tensor, "b s s"]:
    """Return images cropped to the lowest `size_px` (even) frequencies of centred Hartley space."""
    box = images.shape[-1]
    if size_px % 2 or size_px >= box:
        msg = f"size_px: {size_px}, must be even and smaller than the box ({box})"
        raise ValueError(msg)
    centred = torch.arange(size_px, device=images.device) - size_px // 2
    crop = _hartley(torch.fft.ifftshift(images, dim=(1, 2)), centred % box)
    out = _hartley(torch.fft.ifftshift(crop, dim=(1, 2)), centred % size_px)
    return out / (size_px * size_px)


def _hartley(stack: Float[Tensor, "b n n"], kept: Tensor) -> Float[Tensor, "b s s"]:
    """Return Re F − Im F at the rows and columns `kept` (indices of the full, uncentred spectrum)."""
    n = stack.shape[1]
    spectrum = torch.fft.rfft2(stack)
    is_direct = kept <= n // 2
    at_k = spectrum[:, kept][:, :, torch.where(is_direct, kept, 0)]
    at_minus_k = spectrum[:, (-kept) % n][:, :, torch.where(is_direct, 0, n - kept)]
    return torch.where(is_direct, at_k.real - at_k.imag, at_minus_k.real + at_minus_k.imag)
