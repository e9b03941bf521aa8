"""Unlabelled particle images for pre-training, from any number of data sets, each with its own grey-level statistics.

A set is a name, a length and a function that gives grey levels by index, so the images may lie in memory or on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

Normalisation = Literal["dataset", "pooled"]

Reader = Callable[[NDArray[np.int64]], NDArray[np.uint8]]
"""From indices `(b,)` to grey levels `(b, s, s)` at the network's input size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSet:
    """One data set; `mean` and `std` are those of grey level / 255 over all its pixels."""

    name: str
    n_images: int
    read: Reader
    mean: float
    std: float


class ImageCollection:
    """Several sets under one running index.

    Parameters
    ----------
    sets
        At least one; none of them empty, and none whose images are all one grey level.
    """

    def __init__(self, sets: Sequence[ImageSet]) -> None:
        if not sets:
            msg = "datasets: none, pre-training needs at least one"
            raise ValueError(msg)
        for each in sets:
            if each.n_images < 1:
                msg = f"{each.name}: no images, a data set has at least one"
                raise ValueError(msg)
            if not each.std > 0.0:
                msg = f"{each.name}: standard deviation {each.std} of the grey levels, must be above 0"
                raise ValueError(msg)
        self.sets = tuple(sets)
        self._starts = np.cumsum([0, *(each.n_images for each in sets)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def pooled_statistics(self) -> tuple[float, float]:
        """Return mean and standard deviation of grey level / 255 over the pixels of all sets."""
        weights = np.array([each.n_images for each in self.sets], float) / len(self)
        means = np.array([each.mean for each in self.sets])
        squares = np.array([each.std**2 + each.mean**2 for each in self.sets])
        mean = float(weights @ means)
        return mean, float(np.sqrt(weights @ squares - mean**2))

    def read(self, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return the images' grey levels in the order asked for."""
        owner = np.searchsorted(self._starts, indices, side="right") - 1
        out: NDArray[np.uint8] | None = None
        for number in np.unique(owner):
            rows = np.flatnonzero(owner == number)
            images = self.sets[number].read(indices[rows] - self._starts[number])
            if out is None:
                out = np.empty((len(indices), *images.shape[1:]), np.uint8)
            out[rows] = images
        if out is None:
            msg = "indices: none, a batch has at least one image"
            raise ValueError(msg)
        return out

    def statistics(
        self, indices: NDArray[np.int64], normalisation: Normalisation
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return each image's mean and standard deviation to normalise with: its own set's, or those of all."""
        if normalisation == "pooled":
            mean, std = self.pooled_statistics()
            return np.full(len(indices), mean, np.float32), np.full(len(indices), std, np.float32)
        owner = np.searchsorted(self._starts, indices, side="right") - 1
        means = np.array([each.mean for each in self.sets], np.float32)
        stds = np.array([each.std for each in self.sets], np.float32)
        return means[owner], stds[owner]


def image_set_of(name: str, grey: NDArray[np.uint8]) -> ImageSet:
    """Return a set of images that lie in an array `(n, s, s)` (in memory, or mapped from a file)."""
    mean, std = grey_statistics(grey)
    return ImageSet(
        name=name, n_images=len(grey), read=lambda rows: np.asarray(grey[rows]), mean=mean, std=std
    )


def grey_statistics(grey: NDArray[np.uint8], *, rows_at_once: int = 4096) -> tuple[float, float]:
    """Return mean and standard deviation of grey level / 255 over all pixels."""
    counts = np.zeros(256)
    for first in range(0, len(grey), rows_at_once):
        counts += np.bincount(np.asarray(grey[first : first + rows_at_once]).ravel(), minlength=256)
    levels = np.arange(256) / 255.0
    mean = float((counts * levels).sum() / counts.sum())
    return mean, float(np.sqrt((counts * (levels - mean) ** 2).sum() / counts.sum()))


def epoch_order(n_images: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return the order in which an epoch shows the images; it depends on seed and epoch alone."""
    return np.random.default_rng((seed, 0xE9, epoch)).permutation(n_images)


def step_generator(seed: int, step: int) -> torch.Generator:
    """Return the random stream of one step, so that a run that goes on needs no stored random state."""
    value = int(np.random.SeedSequence((seed, 0x5E, step)).generate_state(1, np.uint64)[0])
    return torch.Generator().manual_seed(value >> 1)
