"""Ice weight maps: how bright each part of a micrograph is against its brightest part.

The steps are those of CryoGEM's variant of IceBreaker (Olek et al. 2022): low pass at 22 Å, histogram equalisation, means
of 16 × 16 patches, clusters of similar patches, each cluster's mean brightness over the greatest, a broad Gaussian. The
low pass uses the true pixel size, and clusters are the exact optimum of one-dimensional k-means (Fisher 1958, by dynamic
programming) where IceBreaker starts from random centres: the same micrograph always gives the same map.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from models.fourier.filters import low_pass_filter, smooth_gaussian, squared_frequencies

N_PATCHES = 16
N_CLUSTERS = 6
MAP_PX = 64
"""Side of a stored map: its Gaussian is half a patch wide, 2 px of 64."""

_RESOLUTION_ANGSTROM = 22.0
_LEAST_WEIGHT = 0.05
"""No part of a micrograph is black: what is darker than this is foil, and would make holes in the specimen."""


def estimate_ice_weights(
    image: Float[Tensor, "h w"], pixel_size_angstrom: float, *, n_clusters: int = N_CLUSTERS
) -> Float[Tensor, "m m"]:
    """Return the weight map of a micrograph, `MAP_PX` a side over the whole frame, in (0, 1] with maximum 1."""
    height, width = (int(n) for n in image.shape)
    if min(height, width) < 2 * N_PATCHES:
        raise ValueError(f"image: {height} x {width} px, an ice map needs {2 * N_PATCHES} px a side")
    if not bool(torch.isfinite(image).all()):
        raise ValueError("image: holds NaN or infinity, a micrograph is finite")
    k2 = squared_frequencies((height, width), pixel_size_angstrom)
    smooth = torch.fft.irfft2(
        torch.fft.rfft2(image) * low_pass_filter(k2, _RESOLUTION_ANGSTROM), s=(height, width)
    )
    patches = torch.nn.functional.adaptive_avg_pool2d(_equalise(smooth)[None, None], N_PATCHES)[0, 0]
    values = patches.reshape(-1).double().numpy()
    labels = cluster_values(values, n_clusters)
    means = np.array([values[labels == label].mean() for label in range(int(labels.max()) + 1)])
    weights = torch.from_numpy(means[labels].reshape(N_PATCHES, N_PATCHES)).float()
    weights = torch.nn.functional.interpolate(weights[None, None], size=(MAP_PX, MAP_PX), mode="nearest")
    blurred = smooth_gaussian(weights[0, 0], 0.5 * MAP_PX / N_PATCHES)
    return (blurred / blurred.max()).clamp(_LEAST_WEIGHT, 1.0)


def spread_ice_weights(weights: Float[Tensor, "m m"], shape_yx: tuple[int, int]) -> Float[Tensor, "h w"]:
    """Return a stored map on a frame of `shape_yx`."""
    return torch.nn.functional.interpolate(
        weights[None, None], size=shape_yx, mode="bilinear", align_corners=False
    )[0, 0]


def cluster_values(values: NDArray[np.float64], n_clusters: int) -> NDArray[np.int64]:
    """Return labels of the clusters with the least summed squared deviation, ordered by their means.

    There are fewer clusters where there are fewer distinct values.
    """
    distinct, members = np.unique(values, return_inverse=True)
    counts = np.bincount(members).astype(np.float64)
    n, k = len(distinct), min(n_clusters, len(distinct))
    weight = np.concatenate(([0.0], np.cumsum(counts)))
    first = np.concatenate(([0.0], np.cumsum(counts * distinct)))
    second = np.concatenate(([0.0], np.cumsum(counts * distinct**2)))
    start, end = np.arange(n)[:, None], np.arange(1, n + 1)[None, :]
    mass = np.maximum(weight[end] - weight[start], 1.0)
    spread = second[end] - second[start] - (first[end] - first[start]) ** 2 / mass
    cost = np.where(end > start, np.maximum(spread, 0.0), np.inf)  # cost[i, j - 1]: values i … j - 1 together
    best = np.full((k + 1, n + 1), np.inf)
    best[0, 0] = 0.0
    cut = np.zeros((k + 1, n + 1), dtype=np.int64)
    for used in range(1, k + 1):
        total = best[used - 1, :n, None] + cost
        cut[used, 1:] = total.argmin(axis=0)
        best[used, 1:] = total.min(axis=0)
    labels = np.empty(n, dtype=np.int64)
    stop = n
    for used in range(k, 0, -1):
        begin = int(cut[used, stop])
        labels[begin:stop] = used - 1
        stop = begin
    return labels[members]


def _equalise(image: Tensor) -> Tensor:
    """Return each pixel's rank in a histogram of 256 bins, in [0, 1]."""
    low, high = float(image.min()), float(image.max())
    if high <= low:
        return torch.ones_like(image)
    counts = torch.histc(image, bins=256, min=low, max=high)
    ranks = counts.cumsum(0) / counts.sum()
    index = ((image - low) * (256.0 / (high - low))).long().clamp(0, 255)
    return ranks[index]
