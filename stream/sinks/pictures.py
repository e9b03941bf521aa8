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
_GRID_COLOUR = (70, 70, 70)
_ARC_DEG = 3.0
_PROFILE_HEIGHT_PX = 230
_PICTURE_PX = 640
_TICKS_ANGSTROM = (20, 10, 7, 5, 4, 3.5, 3, 2.5, 2.2, 2, 1.8, 1.6, 1.4, 1.2, 1)


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
    fit_resolution_angstrom: float | None,
    pixel_size_angstrom: float,
) -> None:
    """Write the spectrum (left half) beside the fitted CTF² (right half), and the ring profile below.

    `power` and `model` are full, centred images of the same shape, the model in [0, 1]; `contrast` (rings from
    about -1 to 1) and `ctf2` are the profiles over the frequencies `k` in 1/Å; `lines` of text go into the corner.
    Beyond `fit_resolution_angstrom` the model is pale; without rings (None) there is no model. Half as far again
    as that is shown, at least to 6 Å and at most to Nyquist.
    """
    n = _PICTURE_PX
    reach = fit_resolution_angstrom or 6.0
    k_max = min(0.5 / pixel_size_angstrom, 1.5 / min(reach, 6.0))
    fraction = 2.0 * pixel_size_angstrom * k_max
    data = _average_arcs(_zoom(_flatten_radially(np.asarray(power, dtype=np.float64)), fraction))
    grey = np.clip(0.5 + 0.25 * data, 0.0, 1.0)
    fit = np.clip(_zoom(np.asarray(model, dtype=np.float64), fraction), 0.0, 1.0)
    y, x = np.indices((n, n)) - n // 2
    if fit_resolution_angstrom is None:
        fit = np.full_like(fit, 0.2)
    else:
        is_beyond = np.hypot(y, x) > 0.5 * n / k_max / reach
        fit = np.where(is_beyond, 0.4 + 0.2 * fit, fit)
    grey[:, n // 2 :] = fit[:, n // 2 :]
    canvas = np.zeros((n + _PROFILE_HEIGHT_PX, n), dtype=np.uint8)
    canvas[:n] = (255 * grey).astype(np.uint8)
    image = Image.fromarray(canvas).convert("RGB")
    draw = ImageDraw.Draw(image)
    for i, line in enumerate(lines):
        _label(draw, (6, 4 + 16 * i), line)
    _label(draw, (6, n - 18), f"data, means over {2 * _ARC_DEG:.0f}° of arc")
    curves = [(np.asarray(contrast, dtype=np.float64), _DATA_COLOUR, "data")]
    if fit_resolution_angstrom is not None:
        curves.insert(0, (2.0 * np.asarray(ctf2, dtype=np.float64) - 1.0, _FIT_COLOUR, "fit"))
        _label(draw, (n - 6, n - 18), "fit", anchor="ra")
        radius = 0.5 * n / k_max / fit_resolution_angstrom
        box = (n / 2 - radius, n / 2 - radius, n / 2 + radius, n / 2 + radius)
        draw.arc(box, -90, 90, fill=_FIT_COLOUR)
    shown = np.asarray(k) <= k_max
    _draw_ring_profile(
        draw,
        np.asarray(k, dtype=np.float64)[shown],
        [(values[shown], colour, name) for values, colour, name in curves],
        k_max,
        fit_resolution_angstrom,
    )
    _save(path, image)


def _draw_ring_profile(
    draw: ImageDraw.ImageDraw,
    k: NDArray[np.float64],
    curves: Sequence[tuple[NDArray[np.float64], tuple[int, int, int], str]],
    k_max: float,
    fit_resolution_angstrom: float | None,
) -> None:
    """Draw curves in [-1.5, 1.5] over frequency, with axes, ticks and a legend."""
    left, right, top, bottom = 44, _PICTURE_PX - 12, _PICTURE_PX + 26, _PICTURE_PX + _PROFILE_HEIGHT_PX - 38
    limit = 1.5

    def place(frequency: float, value: float) -> tuple[float, float]:
        height = (limit - max(-limit, min(limit, value))) / (2.0 * limit)
        return left + (right - left) * frequency / k_max, top + (bottom - top) * height

    for value in (-1, 0, 1):
        _, y = place(0.0, value)
        draw.line(((left, y), (right, y)), fill=_GRID_COLOUR)
        _label(draw, (left - 6, y), f"{value:d}", anchor="rm")
    last = -math.inf
    for resolution in _TICKS_ANGSTROM:
        x, _ = place(1.0 / resolution, 0.0)
        if x > right or x < last + 34:
            continue
        last = x
        draw.line(((x, bottom), (x, bottom + 4)), fill=_TEXT_COLOUR)
        _label(draw, (x, bottom + 6), f"{resolution:g}", anchor="ma")
    if fit_resolution_angstrom is not None:
        x, _ = place(1.0 / fit_resolution_angstrom, 0.0)
        for y in range(top, bottom, 8):
            draw.line(((x, y), (x, y + 4)), fill=_FIT_COLOUR)
    for values, colour, _ in curves:
        points = [place(float(f), float(v)) for f, v in zip(k, values, strict=True)]
        draw.line(points, fill=colour, width=2 if colour == _FIT_COLOUR else 1)
    draw.rectangle((left, top, right, bottom), outline=_TEXT_COLOUR)
    _label(draw, (left, top - 18), "ring contrast, over its local height")
    _label(draw, (0.5 * (left + right), bottom + 21), "resolution (Å)", anchor="ma")
    x = float(right)
    for _, colour, name in curves:
        _label(draw, (x, top - 18), name, anchor="ra", colour=colour)
        x -= 36.0


def _flatten_radially(power: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the logarithm less its smooth ring mean: the falling background would hide the rings."""
    n = power.shape[0]
    y, x = np.indices(power.shape)
    radius = np.hypot(y - n // 2, x - n // 2).round().astype(np.int64)
    log_power = np.log(np.maximum(power, 1e-6 * float(np.median(power)) + 1e-30))
    mean = np.bincount(radius.ravel(), log_power.ravel()) / np.maximum(np.bincount(radius.ravel()), 1)
    # wider than a ring near the centre, narrower than the background's curvature
    flat = log_power - _smooth_profile(mean, max(5, n // 16))[radius]
    return _smooth(flat.astype(np.float32), 3).astype(np.float64)


def _average_arcs(flat: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the means over short arcs, over their ring-wise spread: far out, single pixels show only noise."""
    picture = Image.fromarray(flat.astype(np.float32))
    # the middle pixel is where the frequency is zero
    middle = (flat.shape[1] / 2.0, flat.shape[0] / 2.0)
    angles = np.linspace(-_ARC_DEG, _ARC_DEG, 13)
    turned = [picture.rotate(a, resample=Image.Resampling.BILINEAR, center=middle) for a in angles]
    mean = np.mean([np.asarray(t, dtype=np.float64) for t in turned], axis=0)
    y, x = np.indices(mean.shape)
    radius = np.hypot(y - middle[1], x - middle[0]).astype(np.int64)
    counts = np.maximum(np.bincount(radius.ravel()), 1)
    variance = _smooth_profile(np.bincount(radius.ravel(), (mean**2).ravel()) / counts, len(counts) // 10)
    return np.asarray(mean / np.sqrt(np.maximum(variance, 1e-12))[radius])


def _smooth_profile(profile: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    kernel = np.hanning(width + 2)[1:-1]
    kernel /= kernel.sum()
    # the zero frequency and its neighbours are no background
    kept = profile.copy()
    kept[:3] = profile[3]
    padded = np.pad(kept, (width // 2, width - 1 - width // 2), mode="edge")
    return np.asarray(np.convolve(padded, kernel, mode="valid"), dtype=np.float64)


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


def _label(
    draw: ImageDraw.ImageDraw,
    xy: tuple[float, float],
    text: str,
    *,
    anchor: str = "la",
    colour: tuple[int, int, int] = (255, 255, 255),
) -> None:
    """Write text that can be read on any background; `anchor` is Pillow's."""
    draw.text(xy, text, font=_font(), fill=colour, stroke_width=1, stroke_fill=(0, 0, 0), anchor=anchor)


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
