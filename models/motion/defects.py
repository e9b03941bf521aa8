"""Defective pixels: finding hot ones in the movie's mean, and filling all of them from their neighbourhood."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

# A defect is filled from a good pixel within this many pixels, if there is one.
_REACH_PX = 4
_HOT_SD = 6.0


def find_hot_pixels(mean_frame: Float[Tensor, "y x"]) -> Bool[Tensor, "y x"]:
    """Return the pixels of the mean frame that lie over six robust SD from their surroundings (15 px).

    The spread is that of the whole field, so that an ice edge or a gradient is not taken for hot pixels.
    """
    image = mean_frame.numpy()
    rest = image - ndimage.uniform_filter(image, 15, mode="reflect")
    spread = float(rest.std())
    centre = np.abs(rest) < 4.0 * spread
    spread = float(rest[centre].std()) if centre.any() else spread
    return torch.from_numpy(np.abs(rest) > max(_HOT_SD * spread, 1e-12))


class DefectFiller:
    """Fills defects with the value of one random good pixel near by: noise and mean stay as they are.

    The choice is drawn once (from the generator), so that a movie read twice gives the same frames.
    """

    def __init__(self, mask: Bool[Tensor, "y x"], generator: np.random.Generator) -> None:
        bad = mask.numpy()
        if bad.all():
            raise ValueError("mask: every pixel is a defect, at least one must be good")
        self._targets = torch.from_numpy(np.flatnonzero(bad))
        self._sources = torch.from_numpy(_choose_sources(bad, generator))

    def fill(self, frame: Float[Tensor, "y x"]) -> Float[Tensor, "y x"]:
        """Return the frame with its defects filled."""
        if not len(self._targets):
            return frame
        flat = frame.flatten().clone()
        flat[self._targets] = flat[self._sources]
        return flat.reshape(frame.shape)

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
