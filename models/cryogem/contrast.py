"""How plainly particles and ice show in a session's micrographs, so that frames can be made to show them as plainly.

A fixed signal-to-noise ratio (0.1 in the paper) and a fixed brightness of the ice say nothing of a session, and the translation keeps
what it is given: it is held to the particles' contrast, and its discriminator sees no more than 70 pixels at once. Measured here are the
mean radial profile of the picks and the share of the variance in waves longer than a particle. Both are of images in units of
their standard deviation. Picks on noise flatten the profile; picks on the brightest noise steepen it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from models.fourier.filters import smooth_gaussian

_N_RINGS = 12
_REACH_DIAMETERS = 0.75
_LEAST_PICKS = 20
_SMOOTHED_DIAMETERS = 0.5
_ROUNDS = 3
_NOISE_SHARE = (0.2, 0.997)
"""Part of the variance that is noise: outside of it the estimate says more of the picks than of the particles."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionContrast:
    """Mean profile of the picks, innermost ring first, less its outermost ring; part of the variance in long waves."""

    profile: tuple[float, ...]
    long_waves: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameScale:
    """What gives frames a session's contrast: the background b of the physics, variance of the noise-free frame and of the noise."""

    background: float
    signal_variance: float
    noise_variance: float


def measure_contrast(
    images: Sequence[Float[Tensor, "h w"]], centres_yx_px: Sequence[NDArray[np.floating]], diameter_px: float
) -> SessionContrast | None:
    """Measure micrographs at their picks, (y, x); None where there are too few picks to say."""
    scaled = [image / image.std() for image in images]
    profile = mean_profile(scaled, centres_yx_px, diameter_px)
    if profile is None:
        return None
    long_waves = np.mean([float(long_part(image, diameter_px).var()) for image in scaled])
    return SessionContrast(profile=tuple(profile.tolist()), long_waves=float(long_waves))


def mean_profile(
    images: Sequence[Float[Tensor, "h w"]], centres_yx_px: Sequence[NDArray[np.floating]], diameter_px: float
) -> NDArray[np.float64] | None:
    """Return the mean radial profile around centres that are far enough from the edge, less its outermost ring."""
    reach = math.ceil(_REACH_DIAMETERS * diameter_px)
    axis = torch.arange(2 * reach + 1) - reach
    radius = (axis[:, None].square() + axis[None, :].square()).double().sqrt()
    ring = (radius / (_REACH_DIAMETERS * diameter_px) * _N_RINGS).long()
    total, n = torch.zeros(radius.shape, dtype=torch.float64), 0
    for image, centres in zip(images, centres_yx_px, strict=True):
        for y, x in np.rint(np.asarray(centres, dtype=np.float64)).astype(int).reshape(-1, 2).tolist():
            if min(y, x, image.shape[0] - 1 - y, image.shape[1] - 1 - x) >= reach:
                total += image[y - reach : y + reach + 1, x - reach : x + reach + 1]
                n += 1
    if n < _LEAST_PICKS:
        return None
    rings = [float(total[ring == r].mean()) / n for r in range(_N_RINGS)]
    return np.asarray(rings, dtype=np.float64) - rings[-1]


def long_part(image: Float[Tensor, "h w"], diameter_px: float) -> Float[Tensor, "h w"]:
    """Return an image's waves that are longer than a few particles."""
    return smooth_gaussian(image, _SMOOTHED_DIAMETERS * diameter_px)


def fit_scale(
    session: SessionContrast,
    profile: NDArray[np.float64],
    without_ice: Sequence[Float[Tensor, "h w"]],
    with_ice: Sequence[Float[Tensor, "h w"]],
    diameter_px: float,
) -> FrameScale:
    """Return the scale at which frames have the session's contrast.

    The noise-free frame is A - b B: `without_ice` are A, `with_ice` A - B; `profile` is that of A. The total variance follows from
    the profiles, b from the long waves, the noise is the rest. Raises ValueError where the profiles have nothing in common.
    """
    weights = np.arange(len(profile)) + 0.5  # a ring's area
    share = float((weights * profile * session.profile).sum() / (weights * profile**2).sum())
    if not share > 0.0:
        raise ValueError(
            f"contrast of the picks: {share:.3g} of the noise-free particles', must be over 0; they are no particles of this map"
        )
    total = 1.0 / share**2
    pairs = [
        (long_part(a, diameter_px), long_part(a - c, diameter_px))
        for a, c in zip(without_ice, with_ice, strict=True)
    ]
    of_a, of_b, between = (
        float(np.mean(values))
        for values in zip(
            *(
                (
                    float(a.var()),
                    float(b.var()),
                    float(torch.cov(torch.stack((a.reshape(-1), b.reshape(-1))))[0, 1]),
                )
                for a, b in pairs
            ),
            strict=True,
        )
    )
    sigma_px = _SMOOTHED_DIAMETERS * diameter_px
    leak = 1.0 / (4.0 * math.pi * sigma_px**2)  # what is left of white noise's variance behind the Gaussian

    def signal_of(background: float) -> float:
        frames = (a - background * (a - c) for a, c in zip(without_ice, with_ice, strict=True))
        return float(np.mean([float(frame.var()) for frame in frames]))

    background, signal = 0.0, signal_of(0.0)
    for _ in range(_ROUNDS if of_b > 0.0 else 0):
        wanted = session.long_waves * total - leak * max(0.0, total - signal)
        root = between**2 - of_b * (of_a - wanted)
        background = max(0.0, (between + math.sqrt(max(0.0, root))) / of_b)
        signal = signal_of(background)
    low, high = _NOISE_SHARE
    noise = float(np.clip(total - signal, low / (1.0 - low) * signal, high / (1.0 - high) * signal))
    return FrameScale(background=background, signal_variance=signal, noise_variance=noise)
