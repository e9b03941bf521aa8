"""From extracted particles to the network's input, byte for byte as the released models expect it.

The order is fixed: resize the box to the input size, stretch each image's minimum and maximum to 0 and 255, truncate to
bytes, then subtract the mean and divide by the standard deviation of the training grey levels. There is no CTF
correction, inversion, filter or mask, and the pixel size plays no part.

Resizing is a crop in centred Hartley space (`hartley`, upstream since July 2025) for boxes above the input size and a
cubic spline below it, or Pillow's antialiased bicubic (`bicubic`, upstream before that). The Hartley crop is not
the usual Fourier crop: they differ in the new Nyquist row and column.
Needs NumPy, SciPy and Pillow alone. Pure functions; the FFTs use as many threads as asked for.
"""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import scipy.fft
import scipy.ndimage
from numpy.typing import NDArray

from models.cryo_ief.config import RELEASED_MEAN, RELEASED_STD, ResizeMode

_SIGMA_PER_MAD = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation."""

Real = TypeVar("Real", np.float32, np.float64)


def preprocess_particles(
    images: NDArray[Any],
    input_size_px: int = 224,
    mean: float = RELEASED_MEAN,
    std: float = RELEASED_STD,
    resize_mode: ResizeMode = "hartley",
    *,
    is_exact: bool = False,
    n_threads: int = 1,
    outlier_sigmas: float | None = None,
) -> NDArray[np.float32]:
    """Return the network's input `(b, 1, s, s)` from images `(b, n, n)`, protein white.

    `outlier_sigmas` turns the guard of `replace_outliers` on; the released models were trained without. `is_exact` asks for the Hartley crop in float64, as upstream computes it; float32 differs by at most one grey
    level in a few pixels per thousand and is twice as fast.
    """
    grey = to_grey_levels(
        images,
        input_size_px,
        resize_mode,
        is_exact=is_exact,
        n_threads=n_threads,
        outlier_sigmas=outlier_sigmas,
    )
    return normalise_grey_levels(grey, mean, std)


def to_grey_levels(
    images: NDArray[Any],
    input_size_px: int = 224,
    resize_mode: ResizeMode = "hartley",
    *,
    is_exact: bool = True,
    n_threads: int = 1,
    outlier_sigmas: float | None = None,
) -> NDArray[np.uint8]:
    """Return resized images as bytes `(b, s, s)`: each image's minimum becomes 0 and its maximum 255."""
    if images.ndim != 3 or images.shape[1] != images.shape[2]:
        msg = f"images: shape {images.shape}, must be (b, n, n) with square boxes"
        raise ValueError(msg)
    if resize_mode not in ("hartley", "bicubic"):
        msg = f"resize_mode: {resize_mode!r}, must be 'hartley' or 'bicubic'"
        raise ValueError(msg)
    stack = np.ascontiguousarray(images, dtype=np.float32)
    if outlier_sigmas is not None:
        stack = replace_outliers(stack, outlier_sigmas)
    box = stack.shape[1]
    if len(stack) == 0:
        return np.zeros((0, input_size_px, input_size_px), np.uint8)
    if box == input_size_px:
        return _to_bytes(stack)
    if resize_mode == "bicubic":
        return _to_bytes(_resize_bicubic(stack, input_size_px))
    if box < input_size_px:
        return _to_bytes(_resize_spline(stack, input_size_px))
    cropped = hartley_crop(stack, input_size_px, is_exact=is_exact, n_threads=n_threads)
    return _to_bytes(cropped, is_scaled_first=True)


def replace_outliers(images: NDArray[np.float32], n_sigmas: float) -> NDArray[np.float32]:
    """Return images whose NaN, infinite, hot and dead pixels hold the image's median.

    A pixel is hot or dead when it is farther than `n_sigmas` standard deviations from the median, the deviation taken from
    the median absolute one, which a few wild pixels do not move; 10 and more spares ice crystals. One such pixel of
    500 σ squeezes all others into a few grey levels, one NaN makes the image 0. An image without a finite pixel stays.
    """
    if not n_sigmas > 0.0:
        msg = f"outlier_sigmas: {n_sigmas}, must be above 0"
        raise ValueError(msg)
    out = images.copy()
    for image in out:
        is_finite = np.isfinite(image)
        if not is_finite.any():
            continue
        median = np.median(image[is_finite])
        deviation = _SIGMA_PER_MAD * np.median(np.abs(image[is_finite] - median))
        with np.errstate(invalid="ignore"):
            is_wild = ~is_finite | ((np.abs(image - median) > n_sigmas * deviation) & (deviation > 0.0))
        image[is_wild] = median
    return out


def normalise_grey_levels(grey: NDArray[np.uint8], mean: float, std: float) -> NDArray[np.float32]:
    """Return `(grey/255 − mean)/std` as float32 `(b, 1, s, s)`."""
    scaled = grey[:, None].astype(np.float32)
    scaled /= np.float32(255.0)
    scaled -= np.float32(mean)
    scaled /= np.float32(std)
    return scaled


def hartley_crop(
    images: NDArray[np.float32], size_px: int, *, is_exact: bool = True, n_threads: int = 1
) -> NDArray[np.float32]:
    """Return images `(b, n, n)` cropped to the lowest `size_px` (even) frequencies of centred Hartley space.

    With F the centred spectrum and H = Re F − Im F, the result is T/s² with T the same transform of the crop
    of H. Both transforms are of real arrays, so half spectra suffice: H at −k is Re F + Im F at k.
    """
    box = images.shape[1]
    if size_px % 2 or size_px >= box:
        msg = f"size_px: {size_px}, must be even and smaller than the box ({box})"
        raise ValueError(msg)
    stack = images.astype(np.float64) if is_exact else images
    half = size_px // 2
    # Centred rows and columns of the crop, as indices of the uncentred spectrum.
    kept = (np.arange(size_px) - half) % box
    crop = _hartley(scipy.fft.ifftshift(stack, axes=(1, 2)), kept, n_threads)
    inner = (np.arange(size_px) - half) % size_px
    out = _hartley(scipy.fft.ifftshift(crop, axes=(1, 2)), inner, n_threads)
    return np.asarray(out / (size_px * size_px), dtype=np.float32)


def _hartley(stack: NDArray[Real], kept: NDArray[np.intp], n_threads: int) -> NDArray[Real]:
    """Return Re F − Im F at the rows and columns `kept` (indices of the full, uncentred spectrum)."""
    n = stack.shape[1]
    spectrum = scipy.fft.rfft2(stack, axes=(1, 2), workers=n_threads)
    is_direct = kept <= n // 2
    direct, mirrored = kept[is_direct], kept[~is_direct]
    out = np.empty((len(stack), len(kept), len(kept)), stack.dtype)
    at_k = spectrum[:, kept[:, None], direct[None, :]]
    out[:, :, is_direct] = at_k.real - at_k.imag
    at_minus_k = spectrum[:, (-kept[:, None]) % n, (n - mirrored)[None, :]]
    out[:, :, ~is_direct] = at_minus_k.real + at_minus_k.imag
    return out


def _resize_spline(stack: NDArray[np.float32], size_px: int) -> NDArray[np.float32]:
    zoom = size_px / stack.shape[1]
    return np.stack([scipy.ndimage.zoom(image, (zoom, zoom), order=3) for image in stack])


def _resize_bicubic(stack: NDArray[np.float32], size_px: int) -> NDArray[np.float32]:
    from PIL import Image

    size = (size_px, size_px)
    return np.stack(
        [np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)) for image in stack]
    )


def _to_bytes(stack: NDArray[np.float32], *, is_scaled_first: bool = False) -> NDArray[np.uint8]:
    """Stretch each image to [0, 255] and truncate; a constant image keeps its value, one with NaN becomes 0.

    Truncation makes the order of the float32 operations visible in about one byte of 50,000. The orders taken
    here (Hartley: times 255/span; otherwise: divided by the span, then times 255) give upstream's bytes in all of the
    published vectors.
    """
    low = stack.min(axis=(1, 2), keepdims=True)
    high = stack.max(axis=(1, 2), keepdims=True)
    is_flat = (high == low)[:, 0, 0]
    is_finite = np.isfinite(low + high)[:, 0, 0]
    span = np.where((high > low) & np.isfinite(high - low), high - low, np.float32(1.0))
    with np.errstate(invalid="ignore"):
        if is_scaled_first:
            scaled = (stack - low) * (np.float32(255.0) / span)
        else:
            scaled = (stack - low) / span * np.float32(255.0)
    scaled[is_flat] = np.clip(stack[is_flat], 0.0, 255.0)
    scaled[~is_finite] = 0.0
    grey: NDArray[np.uint8] = scaled.astype(np.uint8)
    return grey
