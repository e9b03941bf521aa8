"""Defective pixels: finding them in the movie's mean, and filling all of them from their neighbourhood."""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

# A defect is filled from a good pixel within this many pixels, if there is one.
_REACH_PX = 4
_HOT_SD = 6.0
# Rows and columns whose mean is out of this range of those around them are dead, or hot; a gain differs by 10 %.
_LINE_RANGE = (0.5, 2.0)
_LINES_AROUND = 31
# With at most this many expected by chance in the whole field, a pixel without a count is dead.
_CHANCE_ZEROS = 0.5

MAX_DEFECT_FRACTION = 0.1
"""Above this a camera's block has failed or the beam was cut off: what is filled in would be most of a region."""


def find_defects(mean_frame: Float[Tensor, "y x"]) -> Bool[Tensor, "y x"]:
    """Return the defects of a mean frame: hot and dead pixels, and rows and columns that are dead or hot.

    *Hot* (or cold) is more than six robust SD from the surroundings (15 px); the spread is that of the whole
    field, so that an ice edge or a gradient is not taken for hot pixels. *Dead* is a pixel without a single count
    where chance would leave none: at (mean / spread)² = N counts per pixel a share of exp(−N) is empty. A *line* is
    a defect when its mean is below half or above twice the median of the 31 lines around it.

    Raises
    ------
    ValueError
        More than a tenth of the pixels are defects.
    """
    image = mean_frame.numpy()
    lines = _find_lines(image)
    if lines.any():
        image = np.where(lines, np.median(image[~lines]), image)
    rest = image - ndimage.uniform_filter(image, 15, mode="reflect")
    spread = float(rest.std())
    centre = np.abs(rest) < 4.0 * spread
    spread = float(rest[centre].std()) if centre.any() else spread
    defects = lines | (np.abs(rest) > max(_HOT_SD * spread, 1e-12))
    n_counts = (float(image.mean()) / max(spread, 1e-12)) ** 2
    if image.size * math.exp(-min(n_counts, 700.0)) < _CHANCE_ZEROS:
        defects |= image == 0.0
    share = float(defects.mean())
    if share > MAX_DEFECT_FRACTION:
        raise ValueError(
            f"frames: {share:.0%} of the pixels are dead or hot, at most {MAX_DEFECT_FRACTION:.0%}"
        )
    return torch.from_numpy(defects)


def _find_lines(image: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Return the pixels of dead and hot rows and columns."""
    lines = np.zeros(image.shape, dtype=bool)
    for axis in (0, 1):
        means = image.mean(axis=1 - axis, dtype=np.float64)
        around = ndimage.median_filter(means, min(_LINES_AROUND, len(means)), mode="reflect")
        is_bad = (means < _LINE_RANGE[0] * around) | (means > _LINE_RANGE[1] * around)
        lines |= is_bad[:, None] if axis == 0 else is_bad[None, :]
    return lines


class DefectFiller:
    """Fills defects with the value of one random good pixel near by: noise and mean stay as they are.

    The choice is drawn once (from the generator), so that frames are the same each time they are read.
    """

    def __init__(self, mask: Bool[Tensor, "y x"], generator: np.random.Generator) -> None:
        bad = mask.numpy()
        if bad.all():
            raise ValueError("mask: every pixel is a defect, at least one must be good")
        self._targets = torch.from_numpy(np.flatnonzero(bad))
        self._sources = torch.from_numpy(_choose_sources(bad, generator))

    def fill_(self, frame: Float[Tensor, "y x"]) -> Float[Tensor, "y x"]:
        """Fill the defects of a (contiguous) frame in place, and return it."""
        if len(self._targets):
            flat = frame.view(-1)
            flat[self._targets] = flat[self._sources]
        return frame

    @property
    def targets(self) -> Int[Tensor, "n"]:
        """Flat indices of the defects."""
        return self._targets


def _choose_sources(bad: NDArray[np.bool_], generator: np.random.Generator) -> NDArray[np.int64]:
    height, width = bad.shape
    rows, columns = np.nonzero(bad)
    sources = np.full(len(rows), -1, dtype=np.int64)
    for _ in range(8):
        todo = np.flatnonzero(sources < 0)
        if not len(todo):
            return sources
        y = rows[todo] + generator.integers(-_REACH_PX, _REACH_PX + 1, len(todo))
        x = columns[todo] + generator.integers(-_REACH_PX, _REACH_PX + 1, len(todo))
        is_inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
        y, x = np.clip(y, 0, height - 1), np.clip(x, 0, width - 1)
        is_good = is_inside & ~bad[y, x]
        sources[todo[is_good]] = y[is_good] * width + x[is_good]
    todo = np.flatnonzero(sources < 0)
    if len(todo):
        # wide defects (dead rows and columns): the nearest good pixel
        nearest = ndimage.distance_transform_edt(bad, return_distances=False, return_indices=True)
        sources[todo] = nearest[0, rows[todo], columns[todo]] * width + nearest[1, rows[todo], columns[todo]]
    return sources
