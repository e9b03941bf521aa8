"""Fourier shell correlation of two half-maps: plain, masked and corrected by phase randomisation.

Shell s holds the Fourier coefficients with round(|k|) = s, s = 0 … n // 2; shell s has resolution
`box_px * pixel_size_angstrom / s`. Both published correction rules are offered (Chen et al. 2013 as RELION and
as CryoSPARC apply it) and a result says which one it used. A resolution is only reported where the shells
below the crossing are, taken together, significantly correlated: two independent noise maps have none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

FscRule = Literal["relion", "cryosparc"]

GOLD_STANDARD_THRESHOLD = 0.143
"""Crossing of half-map FSC (Rosenthal and Henderson 2003); it corresponds to 0.5 against the truth."""

FIRST_SHELL = 2
"""Shell 1 is one period per box: masks and background normalisation live there, no detail of a particle."""

MINIMUM_Z = 3.0
"""Evidence (in standard deviations) below which shells above the threshold are called chance; safe 2.5-4."""

_RELION_RANDOMISATION_START = 0.8
RANDOM_SD = 0.02
"""Standard deviation of the random-phase curve that is aimed at, where it begins; RELION's single draw has no such aim."""

MAX_RANDOM_DRAWS = 16

_CORRECTION_MARGIN_SHELLS = 2
"""Shells next to the randomisation edge still see unrandomised neighbours through the mask (RELION's rule)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Crossing:
    """Where a curve first falls to its threshold.

    Attributes
    ----------
    resolution_angstrom
        Interpolated between shells; the Nyquist resolution if the curve never falls; None if there is no
        significant correlation at all.
    is_at_nyquist
        True when the curve stays above the threshold to the last shell: the true resolution may be better.
    """

    resolution_angstrom: float | None
    is_at_nyquist: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class FscCurves:
    """The four curves of a half-map comparison, one value per shell (0 … n // 2), and their resolution.

    `corrected` = (masked − random) / (1 − random) from two shells beyond `randomised_from_shell` on, `masked`
    below. `unmasked_resolution_angstrom` needs no mask and bounds `resolution_angstrom` from above.
    """

    unmasked: Float[Tensor, " shells"]
    masked: Float[Tensor, " shells"]
    random: Float[Tensor, " shells"]
    corrected: Float[Tensor, " shells"]
    resolution_angstrom: float | None
    unmasked_resolution_angstrom: float | None
    is_at_nyquist: bool
    threshold: float
    rule: FscRule
    randomised_from_shell: int | None
    box_px: int
    pixel_size_angstrom: float

    @property
    def frequencies_per_angstrom(self) -> Float[Tensor, " shells"]:
        """Spatial frequency of every shell in 1/Å."""
        shells = torch.arange(self.box_px // 2 + 1, dtype=torch.float32)
        return shells / (self.box_px * self.pixel_size_angstrom)


@lru_cache(maxsize=8)
def shell_index(size_px: int) -> Int[Tensor, "d h wr"]:
    """Return round(|k|) of every coefficient of `rfftn` of a cube; corners beyond Nyquist are included."""
    full = torch.fft.fftfreq(size_px) * size_px
    half = torch.arange(size_px // 2 + 1, dtype=torch.float32)
    radius = torch.sqrt(full[:, None, None] ** 2 + full[None, :, None] ** 2 + half[None, None, :] ** 2)
    return torch.round(radius).to(torch.int64)


def hermitian_weights(size_px: int) -> Float[Tensor, " wr"]:
    """Return how many coefficients of the full transform each column of a half spectrum stands for (1 or 2)."""
    weights = torch.full((size_px // 2 + 1,), 2.0)
    weights[0] = 1.0
    if size_px % 2 == 0:
        weights[-1] = 1.0
    return weights


def shell_sum(values: Float[Tensor, "d h wr"], size_px: int) -> Float[Tensor, " shells"]:
    """Sum a half spectrum over shells 0 … n // 2 with each conjugate pair counted twice."""
    n_shells = size_px // 2 + 1
    index = shell_index(size_px).to(values.device).flatten()
    weighted = (values.double() * hermitian_weights(size_px).to(values.device)).flatten()
    return torch.bincount(index, weights=weighted, minlength=n_shells)[:n_shells]


def fourier_shell_correlation(
    a: Float[Tensor, "n n n"], b: Float[Tensor, "n n n"]
) -> Float[Tensor, " shells"]:
    """Return Re Σ A B* / √(Σ|A|² Σ|B|²) for shells 0 … n // 2 (0 where a shell carries no power)."""
    _require_cubes(a, b)
    return _correlate(torch.fft.rfftn(a.float()), torch.fft.rfftn(b.float()), int(a.shape[0]))


def _correlate(
    a: Complex[Tensor, "d h wr"], b: Complex[Tensor, "d h wr"], size_px: int
) -> Float[Tensor, " shells"]:
    cross = shell_sum((a * b.conj()).real, size_px)
    power = shell_sum(a.abs().square(), size_px) * shell_sum(b.abs().square(), size_px)
    # Power lost to rounding (a shell emptied by a filter) must not become a correlation of ±1.
    floor = 1e-20 * power.max()
    fsc = torch.where(power > floor, cross / torch.sqrt(power.clamp_min(1e-300)), torch.zeros_like(cross))
    return fsc.float()


def find_crossing(
    fsc: Float[Tensor, " shells"],
    threshold: float,
    pixel_size_angstrom: float,
    box_px: int,
    *,
    independent_fraction: float = 1.0,
) -> Crossing:
    """Return the first crossing of `threshold`, linearly interpolated between shells.

    Parameters
    ----------
    fsc
        One value per shell 0 … box_px // 2; shells 0 and 1 are not looked at.
    threshold
        For example 0.143 (half-maps) or 0.5 (map against truth).
    pixel_size_angstrom, box_px
        Sampling of the maps.
    independent_fraction
        Share of a shell's coefficients that are independent, in (0, 1]; a mask makes neighbours depend on each
        other, see `independent_fraction_of_mask`.
    """
    values = [float(v) for v in fsc]
    box_angstrom = box_px * pixel_size_angstrom
    shell = next((s for s in range(FIRST_SHELL, len(values)) if not values[s] > threshold), None)
    end = len(values) if shell is None else shell
    if not _is_significant(values[FIRST_SHELL:end], independent_fraction):
        return Crossing(resolution_angstrom=None, is_at_nyquist=False)
    if shell is None:
        return Crossing(resolution_angstrom=box_angstrom / (len(values) - 1), is_at_nyquist=True)
    above, below = values[shell - 1], values[shell]
    position = shell - 1 + (above - threshold) / (above - below) if math.isfinite(below) else shell - 1
    return Crossing(resolution_angstrom=box_angstrom / position, is_at_nyquist=False)


def resolution_at(
    fsc: Float[Tensor, " shells"],
    threshold: float,
    pixel_size_angstrom: float,
    box_px: int,
    *,
    independent_fraction: float = 1.0,
) -> float | None:
    """Return the resolution in Å of `find_crossing`: Nyquist if the curve never falls, None if it is noise."""
    crossing = find_crossing(
        fsc, threshold, pixel_size_angstrom, box_px, independent_fraction=independent_fraction
    )
    return crossing.resolution_angstrom


def _is_significant(values: list[float], independent_fraction: float) -> bool:
    """Say whether shells FIRST_SHELL … taken together correlate beyond chance (Fisher's z on all of them)."""
    if not values:
        return False
    # A shell of radius s holds about 4πs² coefficients, half of them independent of their Friedel mates.
    counts = [2.0 * math.pi * (FIRST_SHELL + i) ** 2 * independent_fraction for i in range(len(values))]
    total = sum(counts)
    mean = sum(c * v for c, v in zip(counts, values, strict=True)) / total
    return math.atanh(min(max(mean, -0.999999), 0.999999)) * math.sqrt(total) > MINIMUM_Z


def _require_unmasked_evidence(
    crossing: Crossing,
    unmasked: Float[Tensor, " shells"],
    halves: tuple[Tensor, Tensor],
    pixel_size_angstrom: float,
) -> Crossing:
    """Withdraw a resolution whose shells do not correlate at all without the mask.

    A mask cut from the half-maps' own noise selects where both happen to be high and correlates them by that;
    phase randomisation does not see it (5 % of pure-noise pairs "resolved" in small boxes without this rule).
    """
    if crossing.resolution_angstrom is None:
        return crossing
    size = int(halves[0].shape[0])
    last = math.ceil(size * pixel_size_angstrom / crossing.resolution_angstrom)
    values = [float(v) for v in unmasked[FIRST_SHELL : last + 1]]
    # Half-maps may come masked already; Gaussian noise tells by its kurtosis what share of the box it fills.
    fraction = min(1.0, *(3.0 * independent_fraction_of_mask(half) for half in halves))
    if _is_significant(values, fraction):
        return crossing
    return Crossing(resolution_angstrom=None, is_at_nyquist=False)


def independent_fraction_of_mask(mask: Float[Tensor, "n n n"]) -> float:
    """Return (Σm²)² / (V Σm⁴): the share of Fourier coefficients of masked white noise that are independent."""
    square = mask.double().square()
    return float(square.sum().square() / (mask.numel() * square.square().sum()).clamp_min(1e-300))


def randomise_phases(
    volume: Float[Tensor, "n n n"], from_shell: int, generator: torch.Generator
) -> Float[Tensor, "n n n"]:
    """Give every coefficient at or beyond `from_shell` a random phase; amplitudes stay as they are."""
    size = int(volume.shape[0])
    spectrum = torch.fft.rfftn(volume.float())
    # Phases of the transform of real noise obey Friedel's law; independent draws per coefficient would not.
    noise = torch.fft.rfftn(torch.randn(volume.shape, generator=generator, device=generator.device))
    phases = (noise / noise.abs().clamp_min(1e-20)).to(spectrum.device)
    is_kept = (shell_index(size) < from_shell).to(spectrum.device)
    mixed = torch.where(is_kept, spectrum, spectrum.abs() * phases)
    randomised: Tensor = torch.fft.irfftn(mixed, s=(size, size, size))
    return randomised


def masked_fsc(
    half1: Float[Tensor, "n n n"],
    half2: Float[Tensor, "n n n"],
    mask: Float[Tensor, "n n n"],
    pixel_size_angstrom: float,
    *,
    rule: FscRule = "relion",
    generator: torch.Generator,
    threshold: float = GOLD_STANDARD_THRESHOLD,
) -> FscCurves:
    """Return the FSC with a mask, corrected for what the mask itself adds.

    Rule "relion" randomises phases from the first shell whose unmasked FSC is below 0.8, rule "cryosparc" from
    where it crosses 0.143; with both, the correction applies two shells further on. In a small mask a single draw
    of phases correlates by 0.1 either way, which goes into the corrected curve: as many are averaged as bring that
    to `RANDOM_SD`, and what is below 0 counts as 0. Values of the mask lie in [0, 1]. The resolution is the crossing
    of `corrected` at `threshold`.
    """
    _require_cubes(half1, half2)
    if mask.shape != half1.shape:
        raise ValueError(
            f"mask: shape {tuple(mask.shape)}, must be that of the half-maps {tuple(half1.shape)}"
        )
    if not float(mask.abs().sum()) > 0:
        raise ValueError("mask: is zero everywhere, must leave some voxels")
    size = int(half1.shape[0])
    fraction = independent_fraction_of_mask(mask)
    unmasked = fourier_shell_correlation(half1, half2)
    masked = fourier_shell_correlation(half1 * mask, half2 * mask)
    start_value = _RELION_RANDOMISATION_START if rule == "relion" else GOLD_STANDARD_THRESHOLD
    start = next((s for s in range(1, len(unmasked)) if float(unmasked[s]) < start_value), None)
    if start is None:
        random, corrected = torch.zeros_like(masked), masked.clone()
    else:
        random = _random_curve(half1, half2, mask, start, fraction, generator)
        corrected = correct_by_random(masked, random, start)
    crossing = find_crossing(corrected, threshold, pixel_size_angstrom, size, independent_fraction=fraction)
    crossing = _require_unmasked_evidence(crossing, unmasked, (half1, half2), pixel_size_angstrom)
    return FscCurves(
        unmasked=unmasked,
        masked=masked,
        random=random,
        corrected=corrected,
        resolution_angstrom=crossing.resolution_angstrom,
        unmasked_resolution_angstrom=resolution_at(unmasked, threshold, pixel_size_angstrom, size),
        is_at_nyquist=crossing.is_at_nyquist,
        threshold=threshold,
        rule=rule,
        randomised_from_shell=start,
        box_px=size,
        pixel_size_angstrom=pixel_size_angstrom,
    )


def _random_curve(
    half1: Float[Tensor, "n n n"],
    half2: Float[Tensor, "n n n"],
    mask: Float[Tensor, "n n n"],
    from_shell: int,
    independent_fraction: float,
    generator: torch.Generator,
) -> Float[Tensor, " shells"]:
    """Return the mean masked FSC of half-maps with random phases beyond a shell, at least 0.

    A mask correlates what it cuts and does not anti-correlate it: a mean below 0 is chance, and would raise the
    corrected curve above the masked one.
    """
    variance = 1.0 / (2.0 * math.pi * from_shell**2 * independent_fraction)
    n_draws = min(MAX_RANDOM_DRAWS, max(1, math.ceil(variance / RANDOM_SD**2)))
    draws = [
        fourier_shell_correlation(*(randomise_phases(half, from_shell, generator) * mask for half in (half1, half2)))
        for _ in range(n_draws)
    ]  # fmt: skip
    return torch.stack(draws).mean(0).clamp_min(0.0)


def correct_by_random(
    masked: Float[Tensor, " shells"], random: Float[Tensor, " shells"], randomised_from_shell: int
) -> Float[Tensor, " shells"]:
    """Return (masked − random) / (1 − random) from two shells beyond the edge on (≥ −1), `masked` below."""
    shells = torch.arange(len(masked))
    corrected = ((masked - random) / (1.0 - random).clamp_min(1e-6)).clamp_min(-1.0)
    return torch.where(shells >= randomised_from_shell + _CORRECTION_MARGIN_SHELLS, corrected, masked)


def fsc_table(curves: FscCurves) -> dict[str, list[float]]:
    """Return the columns of RELION's `data_fsc` block; row 0 (zero frequency) has resolution 999 Å as there."""
    frequency: list[float] = curves.frequencies_per_angstrom.tolist()
    spectral_index: list[float] = [*range(len(frequency))]
    return {
        "rlnSpectralIndex": spectral_index,
        "rlnResolution": frequency,
        "rlnAngstromResolution": [999.0 if f == 0 else 1.0 / f for f in frequency],
        "rlnFourierShellCorrelationCorrected": curves.corrected.tolist(),
        "rlnFourierShellCorrelationUnmaskedMaps": curves.unmasked.tolist(),
        "rlnFourierShellCorrelationMaskedMaps": curves.masked.tolist(),
        "rlnCorrectedFourierShellCorrelationPhaseRandomizedMaskedMaps": curves.random.tolist(),
    }


def _require_cubes(a: Tensor, b: Tensor) -> None:
    if a.ndim != 3 or len(set(a.shape)) != 1:
        raise ValueError(f"map: shape {tuple(a.shape)}, must be a cube")
    if a.shape != b.shape:
        raise ValueError(f"map: shapes {tuple(a.shape)} and {tuple(b.shape)}, must be equal")
