"""Noise by formula, fitted to the real micrographs: Gaussian, Poisson, and both (the paper's baselines).

The share of signal and noise is fitted on ring spectra, P_real ≈ a P_phy + b, in relative least squares with a, b ≥ 0. The
paper fixes the signal-to-noise ratio at 0.1 instead (`NoiseFit.at_snr`).
Poisson's dose follows from mean and noise variance of the micrographs' own values (variance = mean × gain); in the mixture
its share follows from their third cumulant.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import nnls
from torch import Tensor

from models.cryogem.evaluation import ring_spectrum
from models.cryogem.greys import GreyStatistics, to_network_range

NoiseModel = Literal["gaussian", "poisson", "poisson_gaussian"]
NOISE_MODELS: tuple[NoiseModel, ...] = ("gaussian", "poisson", "poisson_gaussian")

_DOSE_RANGE = (0.5, 1e4)
_DEFAULT_SHARE = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseFit:
    """Fitted noise: variances of signal and noise sum to 1; `counts` per pixel give Poisson's skewness.

    `poisson_share` is the part of the noise's variance that is counting noise in the mixture, `mixed_counts` its counts.
    """

    signal_variance: float
    noise_variance: float
    counts: float
    mixed_counts: float
    poisson_share: float

    def at_snr(self, snr: float) -> NoiseFit:
        """Return the fit with another ratio of signal to noise variance; 0.1 is the paper's."""
        return replace(self, signal_variance=snr / (1.0 + snr), noise_variance=1.0 / (1.0 + snr))


def fit_noise(
    physics: Sequence[Float[Tensor, "h w"]],
    real: Sequence[Float[Tensor, "h w"]],
    greys: GreyStatistics,
    *,
    diameter_px: float,
) -> NoiseFit:
    """Fit the noise models to real micrographs (networks' range) given noise-free ones of the same session.

    Rings of waves longer than the particle's diameter are left out: ice lies there, not particles.
    """
    unit = [_standardise(image) for image in physics]
    target = ring_spectrum([_standardise(image) for image in real])
    signal = ring_spectrum(unit)
    n = len(target)
    used = np.arange(1, n + 1) * diameter_px >= 2 * n
    design = np.stack((signal / target, 1.0 / target), axis=1)[used]
    a, b = (float(value) for value in nnls(design, np.ones(len(design)))[0])
    total = a + b
    if not total > 0.0:
        raise ValueError(f"real: fitted signal {a}, noise {b}, spectra are positive")
    noise = max(b / total, 1e-3)
    variance = max(b, 1e-3) * greys.sd**2
    third = greys.skewness * greys.sd**3
    counts, mixed, share = 20.0, 20.0, _DEFAULT_SHARE
    if greys.mean > 0.0:
        counts = greys.mean**2 / variance
        if third > 0.0:
            from_skewness = float(np.sqrt(greys.mean**3 / third))
            share = float(np.clip(greys.mean**2 / from_skewness / variance, 0.05, 1.0))
        mixed = greys.mean**2 / (share * variance)
    return NoiseFit(
        signal_variance=1.0 - noise,
        noise_variance=noise,
        counts=float(np.clip(counts, *_DOSE_RANGE)),
        mixed_counts=float(np.clip(mixed, *_DOSE_RANGE)),
        poisson_share=share,
    )


def add_noise(
    physics: Float[Tensor, "h w"], model: NoiseModel, fit: NoiseFit, rng: np.random.Generator
) -> Float[Tensor, "h w"]:
    """Return a noise-free micrograph with noise, in the networks' range."""
    unit = _standardise(physics).numpy()
    ratio = fit.signal_variance / fit.noise_variance
    if model == "gaussian":
        noisy = np.sqrt(ratio) * unit + rng.standard_normal(unit.shape)
    else:
        share = 1.0 if model == "poisson" else fit.poisson_share
        counts = fit.counts if model == "poisson" else fit.mixed_counts
        contrast = np.sqrt(ratio / (share * counts))
        noisy = rng.poisson(np.clip(counts * (1.0 + contrast * unit), 0.0, None)).astype(np.float64)
        noisy = noisy + np.sqrt(counts * (1.0 / share - 1.0)) * rng.standard_normal(unit.shape)
    return to_network_range(torch.from_numpy(noisy.astype(np.float32)))


def _standardise(image: Tensor) -> Tensor:
    return (image - image.mean()) / image.std().clamp_min(1e-12)
