"""What somebody could say of a box who knows the structure, its views, the optics and the noise: a ranker's upper limit.

Every view of the pool that the field was made from is taken through the field's CTF and correlated with the box, both
whitened by the noise's expected spectrum. For a template t at shift s and white noise, log p(x | t, s) - log p(x | noise) =
<x, t_s> - <t, t>/2. The log odds compare "one whole particle within `OFFSET_GOOD` of the centre" with "noise, a whole
particle off the centre, or a broken piece", each summed over views and shifts. Crystals, carbon, aggregates and
neighbours are not among the alternatives, so the odds are a limit for the other kinds alone (`MODELLED_KINDS`).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from models.cryo_ief.preprocess import replace_outliers
from models.cryoranker.simulate import (
    OFFSET_BAD,
    OFFSET_GOOD,
    FieldConditions,
    Kind,
    LabelledBoxes,
    shot_amplitude,
    through_ctf,
    transfer,
    view_size_px,
)
from models.cryoranker.specimen import ViewPool
from models.fourier.transforms import fourier_resize

MODELLED_KINDS = (Kind.PARTICLE, Kind.OFF_CENTRE, Kind.NOISE, Kind.FRAGMENT)
_PRIORS = {"good": 0.4, "noise": 0.3, "off_centre": 0.2, "fragment": 0.1}
"""About the held-out sets' shares; AUC hardly feels them."""
_FARTHEST_OFFSET = 0.45
_HOT_SIGMAS = 5.0


def template_log_odds(boxes: LabelledBoxes, pool: ViewPool) -> NDArray[np.float32]:
    """Return the log odds of each box of a field for being good, from the pool that the field was made from."""
    conditions = boxes.conditions
    n = conditions.box_size_px
    whitening = noise_power(conditions, n, boxes.pixel_size_angstrom).rsqrt()
    whole = _spectra(boxes, pool.views) * whitening
    broken = _spectra(boxes, pool.fragments) * whitening
    clean = torch.from_numpy(replace_outliers(boxes.images.numpy(), _HOT_SIGMAS))
    distance = _distance(n) / conditions.diameter_px
    near = distance <= OFFSET_GOOD
    off = (distance >= 0.5 * (OFFSET_GOOD + OFFSET_BAD)) & (distance <= _FARTHEST_OFFSET)
    around = distance <= OFFSET_BAD
    odds = np.empty(len(clean), np.float32)
    for index, spectrum in enumerate(torch.fft.rfft2(clean) * whitening):
        of_whole, of_broken = _log_ratio(spectrum, whole, n), _log_ratio(spectrum, broken, n)
        bad = [
            torch.tensor(math.log(_PRIORS["noise"])),
            math.log(_PRIORS["off_centre"]) + _mean_evidence(of_whole, off),
            math.log(_PRIORS["fragment"]) + _mean_evidence(of_broken, around),
        ]
        good = math.log(_PRIORS["good"]) + _mean_evidence(of_whole, near)
        odds[index] = float(good - torch.logsumexp(torch.stack(bad), dim=0))
    return odds


def noise_power(conditions: FieldConditions, n: int, pixel_size_angstrom: float) -> Float[Tensor, "n m"]:
    """Return the expected power of a field's noise per pixel (half spectrum): shot noise, ice, slow background.

    The background is taken as spread over the frequencies up to 1.5 per box.
    """
    c = conditions
    doubled = torch.ones(n // 2 + 1)
    doubled[1 : n // 2] = 2.0
    seen = transfer(c, n, pixel_size_angstrom).square()
    seen = seen / ((seen * doubled).sum() / (n * n))
    power = (1.0 - c.structural_fraction) * shot_amplitude(n, c.noise_slope).square()
    power = power + c.structural_fraction * seen
    ky = torch.fft.fftfreq(n)[:, None] * n
    kx = torch.fft.rfftfreq(n)[None, :] * n
    is_slow = (torch.hypot(ky, kx) <= 1.5).float()
    power = power + c.background_sigma**2 * n * n * is_slow / (is_slow * doubled).sum()
    return power / c.snr


def _spectra(boxes: LabelledBoxes, views: Float[Tensor, "v m m"]) -> Tensor:
    """Return the half spectra of views as the field shows them, centred in a box."""
    n, m = boxes.conditions.box_size_px, view_size_px(boxes.conditions.diameter_px)
    resized = fourier_resize(views, (m, m)) * boxes.signal_scale
    canvas = torch.zeros((len(views), 2 * n, 2 * n))  # room for what the CTF spreads
    start = n - m // 2
    canvas[:, start : start + m, start : start + m] = resized
    seen = through_ctf(canvas, boxes.conditions, boxes.pixel_size_angstrom)
    box = seen[:, n - n // 2 : n - n // 2 + n, n - n // 2 : n - n // 2 + n]
    spectra: Tensor = torch.fft.rfft2(box)
    return spectra


def _log_ratio(spectrum: Tensor, templates: Tensor, n: int) -> Float[Tensor, "t n n"]:
    """Return log p(x | t, s) - log p(x | noise) for every template and (cyclic) shift."""
    correlation: Tensor = torch.fft.irfft2(spectrum * templates.conj(), s=(n, n))
    energy = torch.fft.irfft2(templates * templates.conj(), s=(n, n))[:, :1, :1]
    return correlation - 0.5 * energy


def _mean_evidence(log_ratio: Float[Tensor, "t n n"], shifts: Bool[Tensor, "n n"]) -> Tensor:
    chosen = log_ratio[:, shifts].flatten()
    return torch.logsumexp(chosen, dim=0) - math.log(len(chosen))


def _distance(n: int) -> Float[Tensor, "n n"]:
    """Return each cyclic shift's length in pixels."""
    axis = torch.fft.fftfreq(n) * n
    return torch.hypot(axis[:, None], axis[None, :])
