"""Grey values: the paper's 150/40 rule, made robust, and micrographs as bytes.

CryoGEM (appendix B) scales every micrograph to mean 150 and standard deviation 40 of 255 and clips. Mean and
deviation are taken here of values clipped at the 0.01 % and 99.99 % quantiles, so that one hot pixel does not rescale
a micrograph. Networks see those greys mapped from [0, 255] to [-1, 1].
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from models.fourier.transforms import fourier_resize

MEAN_GREY, SD_GREY, MAX_GREY = 150.0, 40.0, 255.0
_TAIL = 1e-4
_SAMPLED_PX = 1_000_000
"""Pixels that the quantiles are taken of: a million give the 0.01 % quantile within 10 % of its rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GreyStatistics:
    """Mean, standard deviation and skewness of a micrograph's values, without its outermost 0.02 %."""

    mean: float
    sd: float
    skewness: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedMicrograph:
    """A micrograph as bytes at the working pixel size, and the statistics of the values that it had there."""

    levels: UInt8[Tensor, "h w"]
    statistics: GreyStatistics


def measure_greys(image: Float[Tensor, "h w"]) -> GreyStatistics:
    """Return robust statistics; raise ValueError where the image holds NaN or infinity, or is constant."""
    if not bool(torch.isfinite(image).all()):
        n_bad = int((~torch.isfinite(image)).sum())
        raise ValueError(f"image: {n_bad} pixels are NaN or infinite, a micrograph is finite")
    values = _clip_tails(image).double()
    mean, sd = float(values.mean()), float(values.std())
    if sd <= 1e-6 * max(abs(mean), 1e-30):
        raise ValueError(f"image: standard deviation {sd} at mean {mean}, a micrograph is not constant")
    return GreyStatistics(mean=mean, sd=sd, skewness=float(((values - mean) / sd).pow(3).mean()))


def to_network_range(image: Float[Tensor, "*b h w"]) -> Float[Tensor, "*b h w"]:
    """Return each image with the 150/40 rule applied, clipped, in [-1, 1]."""
    flat = image.reshape(-1, *image.shape[-2:])
    ranged = []
    for one in flat:
        found = measure_greys(one)
        ranged.append(scale_to_network_range(one, mean=found.mean, sd=found.sd))
    return torch.stack(ranged).reshape(image.shape)


def scale_to_network_range(
    image: Float[Tensor, "*b h w"], *, mean: float, sd: float
) -> Float[Tensor, "*b h w"]:
    """Return images by the 150/40 rule, clipped, in [-1, 1], where mean and deviation are those of a whole frame."""
    levels = (image - mean) * (SD_GREY / sd) + MEAN_GREY
    return levels.clamp(0.0, MAX_GREY) / (0.5 * MAX_GREY) - 1.0


def from_network_range(image: Float[Tensor, "*b h w"], statistics: GreyStatistics) -> Float[Tensor, "*b h w"]:
    """Return grey values of the session's scale for a network's output in [-1, 1]."""
    z = ((image + 1.0) * (0.5 * MAX_GREY) - MEAN_GREY) / SD_GREY
    return z * statistics.sd + statistics.mean


def levels_to_network_range(levels: UInt8[Tensor, "*b h w"]) -> Float[Tensor, "*b h w"]:
    """Return bytes as the networks see them, in [-1, 1]."""
    return levels.float() / (0.5 * MAX_GREY) - 1.0


def working_shape(shape_yx: tuple[int, int], short_side_px: int) -> tuple[int, int]:
    """Return the even shape whose short side is `short_side_px`; micrographs are never enlarged.

    Rounding the long side to an even length makes the two pixel sizes differ by at most 1/side.
    """
    short = min(shape_yx)
    scale = min(1.0, short_side_px / short)
    height, width = (max(2, 2 * round(0.5 * scale * n)) for n in shape_yx)
    return min(height, shape_yx[0] // 2 * 2), min(width, shape_yx[1] // 2 * 2)


def prepare_micrograph(image: Float[Tensor, "h w"], short_side_px: int) -> PreparedMicrograph:
    """Return a raw micrograph Fourier-cropped to the working shape and as bytes by the 150/40 rule."""
    measure_greys(image)  # before the transform, which would spread a NaN over everything
    height, width = (int(n) for n in image.shape)
    even = _clip_tails(image[: height // 2 * 2, : width // 2 * 2])
    small = fourier_resize(even, working_shape((height, width), short_side_px))
    statistics = measure_greys(small)
    levels = _scale(small, statistics).clamp(0.0, MAX_GREY).round().to(torch.uint8)
    return PreparedMicrograph(levels=levels, statistics=statistics)


def _scale(image: Tensor, statistics: GreyStatistics) -> Tensor:
    return (image - statistics.mean) * (SD_GREY / statistics.sd) + MEAN_GREY


def _clip_tails(image: Tensor) -> Tensor:
    flat = image.detach().reshape(-1)
    step = max(1, flat.numel() // _SAMPLED_PX)
    low, high = np.quantile(flat[::step].cpu().numpy(), (_TAIL, 1.0 - _TAIL))
    return image.clamp(float(low), float(high))
