"""What a score means: raw responses on the scale of a single trial of Gaussian noise per particle-sized area.

A calibrated score z says: on white noise as many picks with a score of z or more are expected per area of one
squared diameter as a Gaussian exceeds z, Q(z) = ½ erfc(z / √2). A micrograph that holds 500 squared diameters
has 0.7 false picks above 3, 0.02 above 4. The scale is the same for three balls and for a thousand views and
turns, although the greatest of a thousand responses to noise is greater than that of three.

How the raw response exceeds u on noise is measured on noise drawn once with a fixed seed and correlated with
the same bank. Beyond what the draw holds, the tail goes on as that of a smooth Gaussian field and of families
of them (Adler & Taylor 2007, ch. 11), density = u^p · exp(a − t(u)), with p and a fitted to the draw. For a
Gaussian t = u² / 2; a correlation over n pixels cannot exceed √n, and t = −(n / 2) ln(1 − u² / n).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from scipy import ndimage, special
from torch import Tensor

# Powers of u: 1 for a plane field, one more for each further continuous parameter (turn, two of view).
_POWERS = (1.0, 4.0)
# The tail is fitted where the draw has this many peaks: fewer are chance, more are not yet a tail.
_FITTED_PEAKS = (12, 400)


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Peaks of noise per squared diameter above u: u^power · exp(offset + (n / 2) ln(1 − u² / n))."""

    power: float
    offset: float
    n_support_px: float

    def log_density(self, raw: NDArray[np.floating]) -> NDArray[np.float64]:
        """Return the logarithm of the expected number of noise peaks per squared diameter above `raw`."""
        u = np.maximum(np.asarray(raw, dtype=np.float64), 1.0)
        return np.asarray(self.offset + self.power * np.log(u) - _tail(u, self.n_support_px))

    def calibrate(self, raw: NDArray[np.floating]) -> NDArray[np.float64]:
        """Return the scores z with Q(z) = the expected noise peaks per squared diameter above `raw`."""
        log_density = np.minimum(self.log_density(raw), math.log(0.999))
        return np.asarray(-special.ndtri_exp(log_density))

    def raw_threshold(self, z: float) -> float:
        """Return the raw response whose calibrated score is `z`."""
        grid = np.linspace(1.0, math.sqrt(self.n_support_px), 4000)
        return float(np.interp(z, self.calibrate(grid), grid))


def calibrate_on_noise(
    respond: Callable[[Float[Tensor, "h w"]], Float[Tensor, "h w"]],
    *,
    diameter_px: float,
    n_support_px: float,
    side_px: int,
    device: torch.device | None = None,
) -> Calibration:
    """Measure the peaks of `respond` on white noise of `side_px` squared and fit their tail."""
    generator = torch.Generator().manual_seed(0x1CE)
    noise = torch.randn(side_px, side_px, generator=generator).to(device or torch.device("cpu"))
    response = respond(noise).cpu().numpy()
    is_peak = response == ndimage.maximum_filter(response, size=max(3, round(diameter_px)))
    peaks = np.sort(response[is_peak])[::-1].astype(np.float64)
    n_areas = side_px**2 / diameter_px**2
    first, last = _FITTED_PEAKS[0], min(_FITTED_PEAKS[1], len(peaks) // 3)
    if last < first + 20:
        raise ValueError(f"side_px: {side_px}, holds too few peaks ({len(peaks)}) of {diameter_px:.0f} px")
    u = peaks[first:last]
    counts = np.arange(first, last) + 0.5
    # log count + t(u) is a line in log u; few peaks count less
    target = np.log(counts / n_areas) + _tail(u, n_support_px)
    weights = np.sqrt(counts)
    design = np.stack([np.log(u), np.ones_like(u)], axis=1) * weights[:, None]
    power = float(np.clip(np.linalg.lstsq(design, target * weights, rcond=None)[0][0], *_POWERS))
    offset = float(np.average(target - power * np.log(u), weights=counts))
    return Calibration(power=power, offset=offset, n_support_px=n_support_px)


def _tail(u: NDArray[np.float64], n_support_px: float) -> NDArray[np.float64]:
    # responses near √n are certain whatever the noise; the limit keeps the logarithm finite
    part = np.minimum(u * u / n_support_px, 0.999)
    return np.asarray(-0.5 * n_support_px * np.log1p(-part))
