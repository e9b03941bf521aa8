"""What images say about themselves once their poses are known: noise per group, scale per micrograph, weight.

Everything follows from three sums per image and ring between an image F and its projection c P: Re⟨F, c P⟩, |c P|²
and |F|². With noise of variance σ² per complex coefficient, the likelihood of a scale s is
exp(−(s² |cP|² − 2 s Re⟨F, cP⟩) / σ²): a Gaussian of variance σ² / (2 |cP|²).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from models.reconstruction.particle_data import ParticleData
from models.reconstruction.projector import extract_slices
from models.reconstruction.sufficient import ring_mean

SCALE_PRIOR_SD = 0.2
"""Micrographs of one session differ in contrast by 10-20 %; one with few particles stays near 1."""

SCALE_BOUNDS = (0.25, 4.0)
"""Beyond a factor of four a micrograph is not thin or thick but wrong (RELION stops at 0.2 and 5)."""

MIN_GROUP_IMAGES = 50
"""An optics group with fewer images in a half shares the noise of all: a spectrum needs some hundred values per ring."""

MIN_MIXTURE_IMAGES = 100
"""Fewer amplitudes do not show two populations."""

SEPARATION = 2.0
"""Ashman's D (Ashman et al. 1994) from which two populations count as two; below, all weigh the same."""

_MAX_JUNK_SHARE = 0.7
_OUTLIER_SD = 4.0
_N_BANDS = 3
_BLOCK = 512


@dataclass(frozen=True, slots=True)
class ImageGroups:
    """Of every image its micrograph and its optics group, numbered from 0; micrograph −1 = not known."""

    micrograph: Int[Tensor, " b"]
    optics: Int[Tensor, " b"]

    @classmethod
    def single(cls, n_images: int) -> ImageGroups:
        """Return images of which nothing is known."""
        zeros = torch.zeros(n_images, dtype=torch.long)
        return cls(zeros - 1, zeros)

    def take(self, index: Tensor) -> ImageGroups:
        """Return the groups of the images at `index`."""
        return ImageGroups(self.micrograph[index], self.optics[index])


@dataclass(frozen=True, slots=True)
class RingFit:
    """Sums over each ring up to a radius, per image: Re⟨F, c P⟩, |c P|², |F|²; and how many coefficients a ring has."""

    cross: Float[Tensor, "b s"]
    model: Float[Tensor, "b s"]
    power: Float[Tensor, "b s"]
    counts: Float[Tensor, " s"]

    def unscaled(self, scales: Float[Tensor, " b"]) -> RingFit:
        """Return the sums with projections divided by `scales`, which their CTF had in it."""
        s = scales[:, None]
        return RingFit(self.cross / s, self.model / s.square(), self.power, self.counts)

    def residual(self, scales: Float[Tensor, " b"]) -> Float[Tensor, "b s"]:
        """Return the mean |F − s c P|² per ring."""
        s = scales[:, None]
        return (self.power - 2.0 * s * self.cross + s.square() * self.model) / self.counts

    def totals(
        self, inverse_noise: Float[Tensor, "b s"], max_shell: float
    ) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        """Return Re⟨F, c P⟩/σ² and |c P|²/σ² of each image from ring 1 up to a radius."""
        upto = min(int(max_shell) + 1, self.cross.shape[1])
        inverse = inverse_noise[:, 1:upto]
        return (self.cross[:, 1:upto] * inverse).sum(1), (self.model[:, 1:upto] * inverse).sum(1)


def fit_rings(
    data: ParticleData,
    cube: Float[Tensor, "2 d d d"],
    rotations: Float[Tensor, "b 3 3"],
    shifts_xy_px: Float[Tensor, "b 2"],
    max_shell: float,
) -> RingFit:
    """Compare images with their projections up to a radius."""
    near = data.within(max_shell)
    shell = near.plane.shell
    n_shells = int(shell.max()) + 1
    counts = torch.bincount(shell, minlength=n_shells).float().clamp_min(1.0)
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for index in torch.arange(len(near)).split(_BLOCK):
        few = near.take(index)
        slices = few.ctf * extract_slices(cube, rotations[index], near.plane)
        centred = few.coefficients * near.plane.phases(shifts_xy_px[index])
        values = (
            (centred.conj() * slices).real,
            slices.abs().square(),
            few.coefficients.abs().square(),
        )
        empty = torch.zeros((len(few), n_shells))
        sums = [empty.index_add(1, shell, v) for v in values]
        parts.append((sums[0], sums[1], sums[2]))
    cross, model, power = (torch.cat(p) for p in zip(*parts, strict=True))
    return RingFit(cross, model, power, counts)


def noise_per_group(
    fit: RingFit,
    data: ParticleData,
    optics: Int[Tensor, " b"],
    scales: Float[Tensor, " b"],
    weights: Float[Tensor, " b"],
) -> Float[Tensor, "g s"]:
    """Return σ² per optics group and ring: the mean residual up to the fit's radius, the mean power beyond."""
    n_groups, n_shells = int(optics.max()) + 1, int(data.plane.shell.max()) + 1
    residual, everyone = fit.residual(scales), torch.ones(len(data), dtype=torch.bool)
    rows: list[Tensor] = []
    for number in range(-1, n_groups):
        own = everyone if number < 0 else optics == number
        if int(own.sum()) < MIN_GROUP_IMAGES and rows:
            rows.append(rows[0])
            continue
        share = weights[own] / weights[own].sum().clamp_min(1e-6)
        inner = (share[:, None] * residual[own]).sum(0)
        power = data.coefficients[own].abs().square()
        outer = ring_mean(power, data.plane.shell, n_shells)
        outer[: inner.numel()] = inner
        rows.append(outer.clamp_min(1e-20))
    return torch.stack(rows[1:]) if n_groups > 1 else rows[0][None]


def micrograph_scales(
    fit: RingFit,
    inverse_noise: Float[Tensor, "b s"],
    micrograph: Int[Tensor, " b"],
    weights: Float[Tensor, " b"],
    max_shell: float,
) -> Float[Tensor, " b"]:
    """Return each image's scale: that of its micrograph against the mean of all, which is 1.

    The most probable scale under a Gaussian prior around 1 (`SCALE_PRIOR_SD`), within `SCALE_BOUNDS`. The map's own
    amplitude takes what all micrographs have in common. Images without a micrograph have 1.
    """
    is_known = micrograph >= 0
    scales = torch.ones(len(micrograph))
    cross, model = (weights * t for t in fit.totals(inverse_noise, max_shell))
    common = float(cross.sum() / model.sum().clamp_min(1e-30))
    if not bool(is_known.any()) or common <= 0:
        return scales
    own = micrograph[is_known]
    n = int(own.max()) + 1
    precision = 1.0 / SCALE_PRIOR_SD**2
    up = 2.0 * common * torch.zeros(n).index_add_(0, own, cross[is_known]) + precision
    down = 2.0 * common**2 * torch.zeros(n).index_add_(0, own, model[is_known]) + precision
    scales[is_known] = (up / down)[own].clamp(*SCALE_BOUNDS)
    mean = float((weights * scales).sum() / weights.sum().clamp_min(1e-6))
    return (scales / mean).clamp(*SCALE_BOUNDS)


def image_weights(
    fit: RingFit,
    inverse_noise: Float[Tensor, "b s"],
    scales: Float[Tensor, " b"],
    max_shell: float,
) -> Float[Tensor, " b"]:
    """Return weights in [0, 1]: the probability of showing the particle, lowered where the residual is an outlier.

    Contaminations leave more residual than noise in the inner, the middle or the outer rings: an image that is more
    than four robust standard deviations above the median in one of the three bands counts with the noise that it
    has there, median / residual. Noise and wrong objects match a projection with a smaller amplitude than particles
    do: where amplitudes fall into two populations (`particle_probability`) an image weighs as much
    as it is likely to be of the larger amplitude.
    """
    cross, model = fit.totals(inverse_noise, max_shell)
    upto = min(int(max_shell) + 1, fit.cross.shape[1])
    residual = (fit.residual(scales) * inverse_noise[:, : fit.cross.shape[1]] * fit.counts)[:, 1:upto]
    counts, penalty = fit.counts[1:upto], torch.ones(len(scales))
    for ring in torch.arange(upto - 1).tensor_split(_N_BANDS):
        if not ring.numel():
            continue
        mean = residual[:, ring].sum(1) / counts[ring].sum()
        middle = mean.median()
        spread = 1.4826 * (mean - middle).abs().median()
        is_outlier = mean > middle + _OUTLIER_SD * spread
        penalty = torch.where(is_outlier, torch.minimum(penalty, middle / mean.clamp_min(1e-30)), penalty)
    amplitude = cross / (scales * model).clamp_min(1e-30)
    return particle_probability(amplitude) * penalty


def particle_probability(amplitude: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    """Return the probability of belonging to the population of larger amplitudes; 1 where there is but one.

    Two Gaussians are fitted by expectation maximisation. They count as two populations if they explain the values
    better than one does (by the Bayesian information criterion) and are `SEPARATION` apart; an even or merely skewed
    distribution leaves every weight at 1.
    """
    ones = torch.ones_like(amplitude)
    n = len(amplitude)
    if n < MIN_MIXTURE_IMAGES:
        return ones
    x = amplitude.double()
    variance_floor = 1e-4 * float(x.var())
    if variance_floor <= 0.0:
        return ones
    mean = torch.quantile(x, torch.tensor([0.1, 0.7], dtype=torch.float64))
    variance, share = x.var().expand(2) / 4.0, torch.tensor([0.3, 0.7], dtype=torch.float64)
    log_density = torch.zeros((n, 2), dtype=torch.float64)
    for _ in range(200):
        log_density = share.log() - 0.5 * ((x[:, None] - mean).square() / variance + variance.log())
        belongs = log_density.softmax(1)
        total = belongs.sum(0).clamp_min(1e-6)
        share, mean = total / n, (belongs * x[:, None]).sum(0) / total
        variance = (belongs * (x[:, None] - mean).square()).sum(0) / total
        variance = variance.clamp_min(variance_floor)
    gain = float(log_density.logsumexp(1).sum()) + 0.5 * n * (math.log(float(x.var())) + 1.0)
    low, high = (0, 1) if mean[0] < mean[1] else (1, 0)
    distance = float((mean[high] - mean[low]) * math.sqrt(2.0) / variance.sum().sqrt())
    is_two = 2.0 * gain > 3.0 * math.log(n) + 10.0 and distance > SEPARATION and float(mean[high]) > 0
    if not is_two or float(share[low]) > _MAX_JUNK_SHARE:
        return ones
    probability = log_density.softmax(1)[:, high]
    # The wider Gaussian wins far out on both sides: an amplitude above the particles' mean is no junk.
    return torch.where(x >= mean[high], torch.ones_like(x), probability).to(amplitude.dtype)
