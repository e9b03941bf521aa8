"""How a gain reference lies on the camera, and whether it fits: its fine detail against that of the frames.

Uncorrected frames show the inverse of the gain at every pixel, the same in each movie; the specimen, the ice and
the beam vary slowly from pixel to pixel or differ between movies. *Relative detail* (a pixel over the mean of its
surroundings, minus one, without rows' and columns' own means) keeps the first and drops most of the second. The
sums need no logarithms, so that pixels without a single count are no trouble, and a reference is recognised from
a few electrons per pixel: with a gain that varies by σ (3 % on counting cameras), N electrons per pixel and n
pixels, the correlation is σ / √(σ² + 1/N) and its standard error 1/√n: 0.09 against 0.0003 for N = 10 and a
4k camera.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy import ndimage
from torch import Tensor

MIN_CONTRAST_SE = 6.0
"""Standard errors by which the best orientation has to lead the second (safe: 5-20).

By chance the lead of the best of eight reaches 2; on a reference that fits it is hundreds on a full-size frame.
"""

MAX_GAIN_RESIDUAL = 0.2
"""Residuals beyond this, up or down, over several movies mean that the reference does not fit (safe: 0.1-0.5).

A reference that fits gives 0, one that is turned the wrong way or of another camera 1, no correction at all −1. A
reference of the right camera that is noisy by ε gives ε² / (σ² + ε²) on a gain that varies by σ: one of 2,000 e/px
(2.2 %) 0.16 where the gain varies by 5 %.
"""

MAX_RESIDUAL_SE = 0.05
"""A residual less certain than this is no figure: the reference has too little detail, or the movie too few counts."""

# Wide enough to keep a pixel's own value (80/81 of it), narrow enough to drop particles and Thon rings' coarse part.
_SURROUNDINGS_PX = 9
_OUTLIER_SD = 6.0
# Detail below this is rounding of float32, not a camera.
_MIN_DETAIL = 1e-5
_TILES_PER_SIDE = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """A rotation counter-clockwise (row 0 at the top), then flips: the order in which references are turned."""

    rotate_deg: int = 0
    flip_x: bool = False
    flip_y: bool = False

    def apply(self, image: Float[Tensor, "a b"]) -> Float[Tensor, "y x"]:
        """Return the image turned (a view)."""
        turned = torch.rot90(image, self.rotate_deg // 90, dims=(0, 1))
        axes = [axis for axis, is_flipped in ((0, self.flip_y), (1, self.flip_x)) if is_flipped]
        return turned.flip(axes) if axes else turned

    def __str__(self) -> str:
        parts = [f"turned by {self.rotate_deg}°"] if self.rotate_deg else []
        parts += ["flipped in x"] if self.flip_x else []
        parts += ["flipped in y"] if self.flip_y else []
        return ", ".join(parts) or "as it is"


TURNS = (
    *(Turn(rotate_deg=degrees) for degrees in (0, 90, 180, 270)),
    *(
        Turn(rotate_deg=degrees, flip_x=is_x, flip_y=not is_x)
        for degrees in (0, 90)
        for is_x in (True, False)
    ),
)
"""The eight ways in which a rectangle lies, each with at most one flip."""


class GainVerdict(Enum):
    """What the eight scores say."""

    FOUND = "found"
    INVERTED = "inverted"
    UNIFORM = "uniform"
    UNCLEAR = "unclear"


@dataclass(frozen=True, slots=True, kw_only=True)
class GainScore:
    """Correlation of the uncorrected frames' detail with that of 1/gain in one orientation, and its standard error.

    Positive where the reference multiplies as it should, negative where it is the inverse of that.
    """

    turn: Turn
    correlation: float
    standard_error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class GainSearch:
    """All orientations that fit the frames' shape, the best first, and the lead of the best in standard errors."""

    verdict: GainVerdict
    scores: tuple[GainScore, ...]
    contrast: float


@dataclass(frozen=True, slots=True, kw_only=True)
class GainResidual:
    """The part of the applied reference's detail that is still in the corrected frames, and its standard error."""

    share: float
    standard_error: float


def relative_detail(
    image: Float[Tensor, "y x"], is_good: Bool[Tensor, "y x"] | None = None
) -> Float[Tensor, "y x"]:
    """Return pixel / mean of its surroundings − 1, less rows' and columns' means; 0 at bad pixels and outliers.

    Rows' and columns' own means go because readout patterns survive half of the flips and would pass for a fit.
    """
    values = image.numpy()
    if is_good is None or bool(is_good.all()):
        surroundings = ndimage.uniform_filter(values, _SURROUNDINGS_PX, mode="reflect")
        weights = np.ones((1, 1), dtype=np.float32)
    else:
        weights = is_good.numpy().astype(np.float32)
        density = ndimage.uniform_filter(weights, _SURROUNDINGS_PX, mode="reflect")
        surroundings = ndimage.uniform_filter(values * weights, _SURROUNDINGS_PX, mode="reflect")
        surroundings /= np.maximum(density, 1e-6)
    floor = np.finfo(np.float32).tiny
    detail = np.where(surroundings > floor, values / np.maximum(surroundings, floor) - 1.0, 0.0)
    detail = (detail * weights).astype(np.float32)
    # twice, because the spread that decides what an outlier is has the outliers in it
    for _ in range(2):
        detail[np.abs(detail) > _OUTLIER_SD * detail.std()] = 0.0
    detail -= detail.mean(axis=0, keepdims=True)
    detail -= detail.mean(axis=1, keepdims=True)
    return torch.from_numpy(detail * (weights > 0))


def search_orientation(
    mean_frame: Float[Tensor, "y x"], gain: Float[Tensor, "a b"], is_good: Bool[Tensor, "a b"]
) -> GainSearch:
    """Try a multiplicative gain reference in all orientations that have the frames' shape.

    Parameters
    ----------
    mean_frame
        Mean (or sum) of uncorrected frames, of one movie or of many.
    gain, is_good
        The reference as it was read, positive; pixels that are no defects.

    Raises
    ------
    ValueError
        No orientation has the frames' shape, or the frames are empty.
    """
    shape = tuple(mean_frame.shape)
    turns = [turn for turn in TURNS if tuple(turn.apply(gain).shape) == shape]
    if not turns:
        raise ValueError(f"gain: shape {tuple(gain.shape)}, the frames have {shape}")
    if not float(mean_frame.mean()) > 0:
        raise ValueError(f"mean_frame: mean {float(mean_frame.mean()):g}, uncorrected frames have counts")
    wanted = relative_detail(gain.reciprocal(), is_good)
    if float(wanted.std()) < _MIN_DETAIL:
        return GainSearch(verdict=GainVerdict.UNIFORM, scores=(), contrast=0.0)
    seen = relative_detail(mean_frame)
    norm = math.sqrt(float(wanted.square().mean()) * float(seen.square().mean()))
    if norm == 0.0:
        raise ValueError("mean_frame: every pixel has one value, uncorrected frames have noise")
    tiles = {turn: _tile_means(seen * turn.apply(wanted)) / norm for turn in turns}
    least = 1.0 / math.sqrt(seen.numel())
    scores = [
        GainScore(
            turn=turn,
            correlation=float(parts.mean()),
            standard_error=max(least, _standard_error(parts)),
        )
        for turn, parts in tiles.items()
    ]
    scores.sort(key=lambda score: -abs(score.correlation))
    best, second = scores[0], scores[1]
    sign_best, sign_second = (math.copysign(1.0, score.correlation) for score in (best, second))
    lead = sign_best * tiles[best.turn] - sign_second * tiles[second.turn]
    contrast = float(lead.mean()) / max(math.sqrt(2.0) * least, _standard_error(lead))
    verdict = GainVerdict.UNCLEAR
    if contrast >= MIN_CONTRAST_SE:
        verdict = GainVerdict.FOUND if sign_best > 0 else GainVerdict.INVERTED
    return GainSearch(verdict=verdict, scores=tuple(scores), contrast=contrast)


def residual_gain(
    corrected_mean: Float[Tensor, "y x"], gain_detail: Float[Tensor, "y x"]
) -> GainResidual | None:
    """Return the regression of the corrected frames' mean detail on that of the reference that was applied.

    With c the detail of the corrected mean and g that of the gain (`relative_detail`), the share is Σcg / Σg² and
    its standard error σ(c) / (σ(g) √n) for n pixels. Unlike a correlation it depends neither on the dose nor on
    how much the gain varies; share / standard error says it in sigmas. None where the standard error is above
    `MAX_RESIDUAL_SE`, as with a uniform reference.
    """
    power = float(gain_detail.square().sum())
    if power < gain_detail.numel() * _MIN_DETAIL**2:
        return None
    seen = relative_detail(corrected_mean)
    error = math.sqrt(float(seen.square().mean()) / power)
    if error > MAX_RESIDUAL_SE:
        return None
    return GainResidual(share=float((seen * gain_detail).sum()) / power, standard_error=error)


def _tile_means(product: Float[Tensor, "y x"]) -> Float[Tensor, "tile"]:
    return torch.stack([tile.mean() for tile in _tiles(product)])


def _tiles(image: Float[Tensor, "y x"]) -> Iterator[Tensor]:
    # equal tiles, so that their means average to the whole's; what is left over at the far edges is dropped
    y, x = (max(1, int(n) // _TILES_PER_SIDE) for n in image.shape)
    for top in range(0, y * _TILES_PER_SIDE, y):
        for left in range(0, x * _TILES_PER_SIDE, x):
            yield image[top : top + y, left : left + x]


def _standard_error(parts: Float[Tensor, "tile"]) -> float:
    """Standard error of the mean of tiles: it has in it what pixels next to each other share."""
    return float(parts.std()) / math.sqrt(len(parts))
