"""Pictures for people: the micrograph's thumbnail with its picks, and the power spectrum with its fit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

from stream.store.files import replacing

_PICK_COLOUR = (80, 220, 90)
_MASK_COLOUR = (255, 70, 60)
_TEXT_COLOUR = (255, 255, 255)
_FIT_COLOUR = (255, 90, 60)
_DATA_COLOUR = (200, 200, 200)
_SCALE_BARS_ANGSTROM = (100, 200, 500, 1000, 2000, 5000)
_PROFILE_HEIGHT_PX = 160
_PICTURE_PX = 512


def write_thumbnail(
    path: Path,
    micrograph: NDArray[np.float32],
    *,
    pixel_size_angstrom: float,
    centres_yx_px: NDArray[np.floating],
    diameter_angstrom: float,
    mask: NDArray[np.bool_] | None = None,
    size_px: int = 1024,
) -> None:
    """Write the micrograph, binned to at most `size_px` a side, with a circle per pick and a scale bar.

    `mask` is an area of the same field of view on any grid; its outline is drawn.
    """
    factor = max(1, math.ceil(max(micrograph.shape) / size_px))
    # averaging a few more pixels than the binning shows particles in a low-dose picture
    small = _block_mean(micrograph, factor)
    image = Image.fromarray(_grey(_smooth(small, 2))).convert("RGB")
    if mask is not None and mask.any():
        image.paste(_MASK_COLOUR, mask=_outline(mask, image.size))
    draw = ImageDraw.Draw(image)
    radius = 0.5 * diameter_angstrom / pixel_size_angstrom / factor
    for y, x in (np.asarray(centres_yx_px, dtype=np.float64).reshape(-1, 2) + 0.5) / factor:
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), outline=_PICK_COLOUR)
    _draw_scale_bar(draw, image.size, pixel_size_angstrom * factor)
    _save(path, image)


def _outline(mask: NDArray[np.bool_], size_xy: tuple[int, int]) -> Image.Image:
    """Return the inner rim of the mask, two pixels wide, at the picture's size."""
    area = Image.fromarray(np.where(mask, 255, 0).astype(np.uint8)).resize(size_xy)
    return ImageChops.subtract(area, area.filter(ImageFilter.MinFilter(5)))


def write_ctf_picture(
    path: Path,
    power: NDArray[np.floating],
    model: NDArray[np.floating],
    *,
    k: NDArray[np.floating],
    contrast: NDArray[np.floating],
    ctf2: NDArray[np.floating],
    lines: Sequence[str],
    shown_fraction: float = 1.0,
) -> None:
    """Write the spectrum (left half) beside the fitted CTF² (right half), and the ring profile below.

    `shown_fraction` of Nyquist is shown, so that rings that end early can be seen.

    `power` and `model` are full, centred images of the same shape, the model in [0, 1]; `contrast` (in
    local standard deviations) and `ctf2` are the profiles over the frequencies `k` in 1/Å; `lines` of text go into the corner.
    """
    n = _PICTURE_PX
    data = _zoom(_flatten_radially(np.asarray(power, dtype=np.float64)), shown_fraction)
    low, high = np.percentile(data, (2.0, 99.5))
    grey = np.clip((data - low) / max(high - low, 1e-12), 0.0, 1.0)
    fit = np.clip(_zoom(np.asarray(model, dtype=np.float64), shown_fraction), 0.0, 1.0)
    grey[:, n // 2 :] = fit[:, n // 2 :]
    canvas = np.zeros((n + _PROFILE_HEIGHT_PX, n), dtype=np.uint8)
    canvas[:n] = (255 * grey).astype(np.uint8)
    image = Image.fromarray(canvas).convert("RGB")
    draw = ImageDraw.Draw(image)
    for i, line in enumerate(lines):
        _label(draw, (6, 4 + 16 * i), line)
    top = n + 4
    shown = np.asarray(k) <= shown_fraction * float(k[-1])
    k, contrast, ctf2 = np.asarray(k)[shown], np.asarray(contrast)[shown], np.asarray(ctf2)[shown]
    height = _PROFILE_HEIGHT_PX - 20
    _draw_profile(draw, np.asarray(ctf2, dtype=np.float64), (0.0, 1.0), top, height, n, _FIT_COLOUR)
    values = np.asarray(contrast, dtype=np.float64)
    limits = (-2.0, 2.0)
    _draw_profile(draw, values, limits, top, height, n, _DATA_COLOUR)
    for fraction in (0.25, 0.5, 0.75, 1.0):
        frequency = float(k[0]) + fraction * float(k[-1] - k[0])
        position = fraction * (n - 1)
        _label(draw, (position - 36, top + height), f"{1.0 / frequency:.1f} Å")
    _save(path, image)


def _draw_profile(
    draw: ImageDraw.ImageDraw,
    values: NDArray[np.float64],
    limits: tuple[float, float],
    top: int,
    height: int,
    width: int,
    colour: tuple[int, int, int],
) -> None:
    scaled = np.clip((values - limits[0]) / max(limits[1] - limits[0], 1e-12), 0.0, 1.0)
    x = np.linspace(0, width - 1, len(values))
    points = [(float(a), float(top + height * (1.0 - b))) for a, b in zip(x, scaled, strict=True)]
    draw.line(points, fill=colour)


def _flatten_radially(power: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the logarithm less its ring mean, smoothed over rings: the falling background would hide rings."""
    n = power.shape[0]
    y, x = np.indices(power.shape)
    radius = np.hypot(y - n // 2, x - n // 2).round().astype(np.int64)
    log_power = np.log(np.maximum(power, 1e-6 * float(np.median(power)) + 1e-30))
    mean = np.bincount(radius.ravel(), log_power.ravel()) / np.maximum(np.bincount(radius.ravel()), 1)
    # wider than a ring near the centre, narrower than the background's curvature
    width = max(5, n // 16)
    kernel = np.hanning(width + 2)[1:-1]
    kernel /= kernel.sum()
    padded = np.pad(mean, (width // 2, width - 1 - width // 2), mode="edge")
    flat = log_power - np.convolve(padded, kernel, mode="valid")[radius]
    return _smooth(flat.astype(np.float32), 3).astype(np.float64)


def _block_mean(image: NDArray[np.float32], factor: int) -> NDArray[np.float32]:
    if factor == 1:
        return image
    height, width = (n // factor for n in image.shape)
    cut = image[: height * factor, : width * factor]
    mean = cut.reshape(height, factor, width, factor).mean(axis=(1, 3), dtype=np.float32)
    return np.asarray(mean, dtype=np.float32)


def _smooth(image: NDArray[np.float32], n: int) -> NDArray[np.float32]:
    """Return the image averaged over n × n pixels (n = 2 or 3), edges repeated."""
    before = (n - 1) // 2
    padded = np.pad(image, (before, n - 1 - before), mode="edge")
    height, width = image.shape
    total = np.zeros_like(image)
    for dy in range(n):
        for dx in range(n):
            total += padded[dy : dy + height, dx : dx + width]
    return np.asarray(total / (n * n), dtype=np.float32)


def _grey(image: NDArray[np.float32]) -> NDArray[np.uint8]:
    sample = image[:: max(1, image.shape[0] // 512), :: max(1, image.shape[1] // 512)]
    low, high = np.percentile(sample, (0.5, 99.5))
    scaled = np.clip((image - low) / max(float(high - low), 1e-12), 0.0, 1.0)
    return np.asarray(255 * scaled, dtype=np.uint8)


def _draw_scale_bar(draw: ImageDraw.ImageDraw, size_xy: tuple[int, int], pixel_size_angstrom: float) -> None:
    width, height = size_xy
    fitting = [b for b in _SCALE_BARS_ANGSTROM if b / pixel_size_angstrom < 0.3 * width]
    length = fitting[-1] if fitting else _SCALE_BARS_ANGSTROM[0]
    left, bottom = 10, height - 12
    draw.rectangle((left, bottom, left + length / pixel_size_angstrom, bottom + 4), fill=_TEXT_COLOUR)
    label = f"{length / 10:.0f} nm"
    _label(draw, (left, bottom - 18), label)


def _label(draw: ImageDraw.ImageDraw, xy: tuple[float, float], text: str) -> None:
    """Write text that can be read on any background."""
    font = _font()
    draw.text(xy, text, font=font, fill=_TEXT_COLOUR, stroke_width=1, stroke_fill=(0, 0, 0))


@cache
def _font() -> ImageFont.FreeTypeFont:
    """Return matplotlib's own DejaVu Sans: Pillow's built-in font has no Å."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), 12)


def _zoom(image: NDArray[np.float64], fraction: float) -> NDArray[np.float64]:
    """Return the centre of the image, enlarged to the picture's size."""
    n = image.shape[0]
    half = max(8, round(0.5 * fraction * n))
    box = (n // 2 - half, n // 2 - half, n // 2 + half, n // 2 + half)
    size = (_PICTURE_PX, _PICTURE_PX)
    part = Image.fromarray(image.astype(np.float32)).resize(size, Image.Resampling.BILINEAR, box=box)
    return np.asarray(part, dtype=np.float64)


def _save(path: Path, image: Image.Image) -> None:
    with replacing(path) as temporary:
        # level 1: thumbnails are written for every movie, and noise hardly compresses
        image.save(temporary, format="PNG", compress_level=1)
