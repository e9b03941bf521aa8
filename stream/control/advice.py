"""What a session's figures suggest: tilt, stop, clean, look at the microscope; pure rules, each with its numbers.

Sources: cFAR beside its isotropic null and SCF* (CryoSPARC's table: both low = views are missing, cFAR low alone =
junk or misaligned particles); ResLog and scaling of the signal-to-noise ratio, which bracket what more particles
give; and the rule to stop of this project, which asks for all of (a) little to gain, (b) even views, (c) pixels
that are not the limit, (d) the same map twice from nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from stream.control.trend import N_RECENT, ScoreTrend
from stream.records.advice import Advice, AdviceKind, Severity
from stream.records.figures import GrowthFigures, ViewFigures
from stream.records.values import RunPurpose, RunRequest, RunResult

SCF_LIMIT = 0.81
"""8/π²: SCF* of ideal side views; below it views are missing."""

_PARTIAL = frozenset({RunPurpose.CLUSTER, RunPurpose.UNION})
"""Runs on chosen views say little about the specimen's views as a whole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdviceSettings:
    """Numbers that advice goes by.

    cFAR is low under `low_cfar_ratio` of its null (without a null: under `low_cfar`) and good from `even_cfar_ratio`
    on. Little is to be gained when doubling the particles is predicted to gain less than `min_gain_angstrom` or
    `min_gain_fraction` of the resolution. A fall of the scores is told of when the median lost `min_score_fall`
    of its value, and four standard errors. Fewer than `min_particles_per_exposure` good particles are few.
    `planned_exposures` is how many the session is to have: what is left of them then takes the place of doubling.
    """

    low_cfar: float = 0.5
    low_cfar_ratio: float = 0.5
    even_cfar_ratio: float = 0.8
    max_cfar_drift: float = 0.05
    min_gain_angstrom: float = 0.1
    min_gain_fraction: float = 0.03
    nyquist_margin: float = 1.05
    min_score_fall: float = 0.2
    min_particles_per_exposure: float = 10.0
    planned_exposures: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EndedRun:
    """A run that gave a result, and what it was asked for."""

    request: RunRequest
    result: RunResult


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionFacts:
    """What advice is derived from; `runs` in order of their results, without those that a person rejected."""

    runs: Sequence[EndedRun]
    trend: ScoreTrend
    score_threshold: float
    n_exposures: int = 0
    gain_residual: float | None = None
    gain_residual_limit: float | None = None
    gain_hold: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GainForecast:
    """What more particles are predicted to gain in Å: the mean of both models, and their band.

    The band holds the 95 % interval of the line through 1/d² against ln N and the value by scaling of the SSNR.
    """

    expected_angstrom: float
    low_angstrom: float
    high_angstrom: float


def advise(facts: SessionFacts, settings: AdviceSettings) -> tuple[Advice, ...]:
    """Return the advice that stands now, warnings first."""
    run = _largest_late_run(facts.runs)
    found = [
        _advise_gain(facts),
        _advise_scores(facts.trend, settings),
        _advise_count(facts, settings),
        None if run is None else _advise_views(run.result, settings),
        None if run is None else _advise_growth(run, facts, settings),
    ]
    advice = [item for item in found if item is not None]
    return tuple(sorted(advice, key=lambda item: item.severity is not Severity.WARNING))


def _largest_late_run(runs: Sequence[EndedRun]) -> EndedRun | None:
    """Return the last campaign's largest run with a resolution that was not on views chosen for their likeness.

    Of runs on equally many particles the last one; a sweep's smaller parts say less about the session.
    """
    whole = [
        run
        for run in runs
        if run.result.resolution_angstrom is not None and run.request.purpose not in _PARTIAL
    ]
    if not whole:
        return None
    campaign = [run for run in whole if run.request.campaign_id == whole[-1].request.campaign_id]
    return max(reversed(campaign), key=lambda run: run.result.n_particles)


# --- views ---------------------------------------------------------------------------------------------


def cfar_ratio(result: RunResult) -> float | None:
    """Return cFAR over what isotropic data of this signal would give, None where one of them is not known."""
    return result.cfar / result.cfar_null if result.cfar is not None and result.cfar_null else None


def _advise_views(result: RunResult, settings: AdviceSettings) -> Advice | None:
    if result.cfar is None:
        return None
    ratio = cfar_ratio(result)
    is_low = result.cfar < settings.low_cfar if ratio is None else ratio < settings.low_cfar_ratio
    is_even = ratio is not None and ratio >= settings.even_cfar_ratio
    are_views_missing = result.scf_star is not None and result.scf_star < SCF_LIMIT
    if is_even or not (is_low or are_views_missing):
        return None
    null = "" if result.cfar_null is None else f" (isotropic: {result.cfar_null:.2f})"
    opening = f"cFAR {result.cfar:.2f}{null} at {result.n_particles:,} particles"
    numbers = {
        "cfar": result.cfar,
        "cfar_null": result.cfar_null,
        "scf_star": result.scf_star,
        "n_particles": float(result.n_particles),
    }
    if result.scf_star is not None and not are_views_missing:
        words = (
            f"{opening} though SCF* {result.scf_star:.2f} says that views are even: junk or misaligned particles; "
            "raise the score threshold, look at the picks"
        )
        return Advice(kind=AdviceKind.JUNK, severity=Severity.WARNING, words=words, numbers=numbers)
    views = None if result.figures is None else result.figures.views
    said, more = _describe_views(views)
    return Advice(
        kind=AdviceKind.PREFERRED_ORIENTATION,
        severity=Severity.WARNING if is_low else Severity.INFO,
        words=f"{opening}: preferred orientation{said}",
        numbers=numbers | more,
    )


def _describe_views(views: ViewFigures | None) -> tuple[str, dict[str, float | None]]:
    """Say where views are missing and what a tilt would do."""
    if views is None:
        return "", {}
    numbers = {
        "view_efficiency": views.efficiency,
        "missing_fraction": views.missing_fraction,
        "missing_rot_deg": views.missing_rot_deg,
        "missing_tilt_deg": views.missing_tilt_deg,
        "recommended_tilt_deg": views.recommended_tilt_deg,
    }
    said = ""
    if views.missing_rot_deg is not None and views.missing_tilt_deg is not None:
        said += (
            f"; {views.missing_fraction:.0%} of the views are missing, most around rot {views.missing_rot_deg:.0f}°, "
            f"tilt {views.missing_tilt_deg:.0f}°"
        )
    if views.efficiency is not None:
        said += f"; efficiency {views.efficiency:.2f}"
    now = next((t for t in views.tilts if t.tilt_deg == 0.0), None)
    best = next((t for t in views.tilts if t.tilt_deg == views.recommended_tilt_deg), None)
    if now is None:
        return said, numbers
    if best is None:
        return f"{said}; a stage tilt would help little: another grid, buffer or detergent", numbers
    numbers |= {
        "scf_star_tilted": best.scf_star,
        "scf_star_mixed": best.scf_star_mixed,
        "unsampled_fraction": now.unsampled_fraction,
        "unsampled_fraction_tilted": best.unsampled_fraction,
    }
    said += (
        f"; collect at {best.tilt_deg:.0f}° tilt (unsampled Fourier space {now.unsampled_fraction:.0%} would become "
        f"{best.unsampled_fraction:.0%}, SCF* {now.scf_star:.2f} would become {best.scf_star:.2f}, or "
        f"{best.scf_star_mixed:.2f} with as many untilted particles)"
    )
    return said, numbers


# --- growth --------------------------------------------------------------------------------------------


def forecast_gain(
    growth: GrowthFigures, *, factor: float = 2.0, nyquist_angstrom: float | None = None
) -> GainForecast | None:
    """Return what `factor` times the particles are predicted to gain; at least nothing, and no more than Nyquist.

    Scaling of the SSNR is known for twice the particles; in between 1/d² is taken to grow with ln N.
    """
    d = growth.resolution_angstrom
    finest = nyquist_angstrom or 0.0

    def gain_of(slope: float) -> float:
        inverse_square = 1.0 / d**2 + math.log(factor) * max(slope, 0.0)
        return max(0.0, d - max(1.0 / math.sqrt(inverse_square), finest))

    spread = 1.96 * growth.slope_sd
    line = gain_of(growth.slope_per_ln_n)
    ends = [gain_of(growth.slope_per_ln_n - spread), gain_of(growth.slope_per_ln_n + spread)]
    both = [line]
    if growth.ssnr_angstrom_at_2n is not None:
        scaled = gain_of((1.0 / growth.ssnr_angstrom_at_2n**2 - 1.0 / d**2) / math.log(2.0))
        both.append(scaled)
        ends.append(scaled)
    if not all(math.isfinite(value) for value in ends):
        return None
    return GainForecast(
        expected_angstrom=sum(both) / len(both), low_angstrom=min(ends), high_angstrom=max(ends)
    )


def _advise_growth(run: EndedRun, facts: SessionFacts, settings: AdviceSettings) -> Advice | None:
    result = run.result
    growth = None if result.figures is None else result.figures.growth
    if growth is None or result.resolution_angstrom is None:
        return None
    factor = _find_factor(facts.n_exposures, settings)
    forecast = forecast_gain(growth, factor=factor or 2.0, nyquist_angstrom=result.nyquist_angstrom)
    if forecast is None:
        return None
    numbers: dict[str, float | None] = {
        "n_particles": growth.n_particles,
        "factor": factor or 2.0,
        "resolution_angstrom": growth.resolution_angstrom,
        "gain_angstrom": forecast.expected_angstrom,
        "gain_low_angstrom": forecast.low_angstrom,
        "gain_high_angstrom": forecast.high_angstrom,
        "nyquist_angstrom": result.nyquist_angstrom,
    }
    more = (
        f"doubling the {growth.n_particles:,.0f} particles"
        if factor is None
        else f"what is left of {settings.planned_exposures:,} exposures ({factor:.1f} times the particles)"
    )
    prediction = (
        f"{more} is predicted to gain {forecast.expected_angstrom:.2f} Å "
        f"(95 % interval {forecast.low_angstrom:.2f} to {forecast.high_angstrom:.2f} Å)"
    )
    if _is_at_nyquist(result, settings):
        words = f"{result.resolution_angstrom:.2f} Å is what the working pixels can show: take a larger box before more data"
        return Advice(kind=AdviceKind.GROWTH, severity=Severity.INFO, words=words, numbers=numbers)
    is_flat = forecast.high_angstrom < max(
        settings.min_gain_angstrom, settings.min_gain_fraction * growth.resolution_angstrom
    )
    if not is_flat:
        return Advice(kind=AdviceKind.GROWTH, severity=Severity.INFO, words=prediction, numbers=numbers)
    missing = _find_reasons_to_go_on(run, facts.runs, settings)
    if missing:
        words = f"resolution gains flatten: {prediction}; but do not stop yet: {'; '.join(missing)}"
        return Advice(kind=AdviceKind.GROWTH, severity=Severity.INFO, words=words, numbers=numbers)
    words = f"resolution gains flatten: {prediction}; consider stopping"
    return Advice(kind=AdviceKind.STOP, severity=Severity.INFO, words=words, numbers=numbers)


def _find_factor(n_exposures: int, settings: AdviceSettings) -> float | None:
    """Return how many times today's particles the planned session would have; None without a plan, or at its end."""
    planned = settings.planned_exposures
    return planned / n_exposures if planned is not None and 0 < n_exposures < planned else None


def _is_at_nyquist(result: RunResult, settings: AdviceSettings) -> bool:
    finest, resolution = result.nyquist_angstrom, result.resolution_angstrom
    return finest is not None and resolution is not None and resolution <= settings.nyquist_margin * finest


def _find_reasons_to_go_on(run: EndedRun, runs: Sequence[EndedRun], settings: AdviceSettings) -> list[str]:
    """Return which conditions of the rule to stop do not hold, beside what is to be gained."""
    reasons = []
    ratios = [
        ratio
        for r in runs
        if r.request.purpose not in _PARTIAL and (ratio := cfar_ratio(r.result)) is not None
    ]
    ratio = cfar_ratio(run.result)
    if ratio is None:
        reasons.append("cFAR or its null is not known")
    elif ratio < settings.even_cfar_ratio:
        reasons.append(f"cFAR is {ratio:.2f} of its null (rule: at least {settings.even_cfar_ratio:g})")
    elif len(ratios) < 2 or abs(ratios[-1] - ratios[-2]) > settings.max_cfar_drift:
        reasons.append("cFAR has not settled over two runs")
    if run.result.nyquist_angstrom is None:
        reasons.append("whether the pixels are the limit is not known")
    n_seeds = sum(r.request.start_map is None and r.result.resolution_angstrom is not None for r in runs)
    if n_seeds < 2:
        reasons.append(f"{n_seeds} of 2 runs from nothing gave a map")
    return reasons


# --- the microscope ------------------------------------------------------------------------------------


def _advise_scores(trend: ScoreTrend, settings: AdviceSettings) -> Advice | None:
    fall = trend.compare()
    if fall is None:
        return None
    lost = fall.before - fall.latest
    if lost < settings.min_score_fall * fall.before or lost < 4.0 * fall.error:
        return None
    goes_with = (
        ""
        if fall.cause is None or fall.correlation is None
        else f" (goes with {fall.cause}: rank correlation {fall.correlation:.2f})"
    )
    words = (
        f"score median fell from {fall.before:.2f} to {fall.latest:.2f} over the last {N_RECENT} movies: grid square "
        f"or focus problem{goes_with}"
    )
    numbers = {
        "before": fall.before,
        "latest": fall.latest,
        "error": fall.error,
        "correlation": fall.correlation,
    }
    return Advice(kind=AdviceKind.SCORE_FALL, severity=Severity.WARNING, words=words, numbers=numbers)


def _advise_count(facts: SessionFacts, settings: AdviceSettings) -> Advice | None:
    above, picks = facts.trend.mean_above(facts.score_threshold), facts.trend.mean_picks()
    least = settings.min_particles_per_exposure
    if above is None or facts.trend.n_latest < N_RECENT // 2 or above >= least:
        return None
    if picks is None:
        why = ""
    elif picks < least:
        why = f", {picks:.1f} picked: concentration, or the picker's diameter and threshold"
    else:
        why = f", {picks:.1f} picked: most of them look like junk or ice"
    rate = f"; 10,000 take {10_000 / above:,.0f} micrographs" if above > 0 else ""
    words = (
        f"{above:.1f} particles per micrograph score at least {facts.score_threshold:g} over the last "
        f"{facts.trend.n_latest}{why}{rate}"
    )
    numbers = {"above_threshold_per_exposure": above, "picks_per_exposure": picks}
    return Advice(kind=AdviceKind.FEW_PARTICLES, severity=Severity.WARNING, words=words, numbers=numbers)


def _advise_gain(facts: SessionFacts) -> Advice | None:
    residual, limit = facts.gain_residual, facts.gain_residual_limit
    numbers: dict[str, float | None] = {"residual": residual, "limit": limit}
    if facts.gain_hold is not None:
        return Advice(kind=AdviceKind.GAIN, severity=Severity.WARNING, words=facts.gain_hold, numbers=numbers)
    if residual is None or limit is None or abs(residual) <= limit:
        return None
    words = (
        f"the corrected frames show {abs(residual):.0%} of the gain reference's detail (limit {limit:.0%}): "
        "take a new reference"
    )
    return Advice(kind=AdviceKind.GAIN, severity=Severity.WARNING, words=words, numbers=numbers)
