"""What a session's figures suggest: each rule at values that can be worked out by hand."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest

from stream.control.advice import AdviceSettings, EndedRun, SessionFacts, advise, forecast_gain
from stream.control.quality import QualityFigures
from stream.control.trend import N_RECENT, ScoreTrend, median_of, rank_correlation
from stream.records.advice import Advice, AdviceKind, Severity
from stream.records.figures import GrowthFigures, RunFigures, TiltFigures, ViewFigures
from stream.records.values import (
    CampaignId,
    ParticleSubset,
    RunId,
    RunPurpose,
    RunRequest,
    RunResult,
)

SETTINGS = AdviceSettings()

GROWTH = GrowthFigures(
    n_particles=20_000.0,
    resolution_angstrom=4.0,
    slope_per_ln_n=0.01,
    slope_sd=0.001,
    ssnr_angstrom_at_2n=3.9,
)
FLAT = replace(GROWTH, slope_per_ln_n=0.002, slope_sd=0.0003, ssnr_angstrom_at_2n=3.96)

TOP_VIEWS = ViewFigures(
    efficiency=0.42,
    missing_fraction=0.87,
    missing_rot_deg=10.0,
    missing_tilt_deg=85.0,
    tilts=(
        TiltFigures(tilt_deg=0.0, scf_star=0.05, scf_star_mixed=0.05, unsampled_fraction=0.5),
        TiltFigures(tilt_deg=30.0, scf_star=0.83, scf_star_mixed=0.7, unsampled_fraction=0.02),
    ),
    recommended_tilt_deg=30.0,
)


def ended(
    run_id: str = "run001",
    *,
    purpose: RunPurpose = RunPurpose.INITIAL,
    start_map: str | None = None,
    resolution: float | None = 4.0,
    cfar: float | None = 0.6,
    cfar_null: float | None = 0.6,
    scf_star: float | None = 0.95,
    nyquist: float | None = 2.0,
    figures: RunFigures | None = None,
) -> EndedRun:
    request = RunRequest(
        run_id=RunId(run_id),
        campaign_id=CampaignId("c001"),
        purpose=purpose,
        subset=ParticleSubset(score_threshold=0.4),
        n_particles=20_000,
        model_hash="m",
        symmetry="C1",
        mask_diameter_angstrom=None,
        start_map=None if start_map is None else RunId(start_map),
        warm_start=None,
        compare_with=None,
        reason="",
    )
    result = RunResult(
        run_id=RunId(run_id),
        engine="embedded",
        n_particles=20_000,
        symmetry="C1",
        resolution_angstrom=resolution,
        cfar=cfar,
        cfar_null=cfar_null,
        scf_star=scf_star,
        note="",
        folder=f"runs/{run_id}",
        seconds={},
        nyquist_angstrom=nyquist,
        figures=figures,
    )
    return EndedRun(request=request, result=result)


def facts(*runs: EndedRun, trend: ScoreTrend | None = None, **more: float | str | None) -> SessionFacts:
    given = SessionFacts(runs=runs, trend=trend or ScoreTrend(), score_threshold=0.4)
    return replace(given, **more)  # type: ignore[arg-type]


def only(advice: tuple[Advice, ...]) -> Advice:
    assert len(advice) == 1, advice
    return advice[0]


# --- views


def test_missing_views_are_told_with_their_place_and_the_tilt_that_brings_them() -> None:
    run = ended(cfar=0.09, scf_star=0.05, figures=RunFigures(views=TOP_VIEWS))
    advice = only(advise(facts(run), SETTINGS))
    assert (advice.kind, advice.severity) == (AdviceKind.PREFERRED_ORIENTATION, Severity.WARNING)
    assert advice.words == (
        "cFAR 0.09 (isotropic: 0.60) at 20,000 particles: preferred orientation; 87% of the views are missing, most "
        "around rot 10°, tilt 85°; efficiency 0.42; collect at 30° tilt (unsampled Fourier space 50% would become 2%, SCF* "
        "0.05 would become 0.83, or 0.70 with as many untilted particles)"
    )
    assert advice.numbers["recommended_tilt_deg"] == 30.0
    assert advice.numbers["scf_star_tilted"] == 0.83


def test_where_no_tilt_helps_another_preparation_is_advised() -> None:
    views = replace(TOP_VIEWS, recommended_tilt_deg=None)
    advice = only(advise(facts(ended(cfar=0.09, scf_star=0.05, figures=RunFigures(views=views))), SETTINGS))
    assert "a stage tilt would help little: another grid, buffer or detergent" in advice.words


def test_a_low_cfar_with_even_views_is_junk_and_not_orientation() -> None:
    advice = only(advise(facts(ended(cfar=0.2, scf_star=0.95)), SETTINGS))
    assert advice.kind is AdviceKind.JUNK
    assert "raise the score threshold" in advice.words


@pytest.mark.parametrize(
    ("cfar", "null", "scf_star", "expected"),
    [
        (0.5, 0.6, 0.6, None),  # 0.83 of the null: as even as a map of this size can be
        (0.4, 0.6, 0.6, Severity.INFO),  # 0.67 of it, and views are missing
        (0.4, 0.6, 0.9, None),
        (0.29, 0.6, 0.6, Severity.WARNING),  # 0.48 of it
        (0.45, None, 0.6, Severity.WARNING),  # no null: the usual 0.5
        (0.55, None, 0.9, None),
        (None, 0.6, 0.6, None),
    ],
)
def test_cfar_is_judged_by_its_null(
    cfar: float | None, null: float | None, scf_star: float, expected: Severity | None
) -> None:
    advice = advise(facts(ended(cfar=cfar, cfar_null=null, scf_star=scf_star)), SETTINGS)
    assert [a.severity for a in advice] == ([] if expected is None else [expected])


def test_the_latest_run_on_all_views_speaks_and_not_one_on_a_cluster() -> None:
    whole = ended("run001", cfar=0.6)
    cluster = ended("run002", purpose=RunPurpose.CLUSTER, cfar=0.05, scf_star=0.02)
    unresolved = ended("run003", resolution=None, cfar=0.0, scf_star=0.02)
    assert advise(facts(whole, cluster, unresolved), SETTINGS) == ()
    assert advise(facts(), SETTINGS) == ()


# --- growth


def test_a_sweeps_smaller_part_does_not_speak_for_the_session() -> None:
    part = ended("run002", purpose=RunPurpose.SWEEP, cfar=0.09, scf_star=0.05)
    part = replace(part, result=replace(part.result, n_particles=10_000))
    assert advise(facts(ended("run001"), part), SETTINGS) == ()
    assert advise(facts(part, ended("run001")), SETTINGS) == ()


def test_the_gain_of_doubling_is_worked_out_by_both_models() -> None:
    # 1/16 + 0.01 ln 2 = 0.0694315 → 3.79510 Å; the slope ± 1.96 · 0.001 → 3.83279 and 3.75849 Å; scaling: 3.9 Å.
    forecast = forecast_gain(GROWTH)
    assert forecast is not None
    assert forecast.expected_angstrom == pytest.approx((0.20490 + 0.1) / 2, abs=1e-4)
    assert forecast.low_angstrom == pytest.approx(0.1, abs=1e-9)
    assert forecast.high_angstrom == pytest.approx(0.24151, abs=1e-4)
    line_alone = forecast_gain(replace(GROWTH, ssnr_angstrom_at_2n=None))
    assert line_alone is not None
    assert line_alone.low_angstrom == pytest.approx(0.16721, abs=1e-4)


def test_what_is_left_of_a_planned_session_takes_the_place_of_doubling() -> None:
    # A quarter more: 1/16 + 0.01 ln 1.25 = 0.0647314 → 3.93048 Å; scaling: 1/16 + (1/3.9² − 1/16) ln 1.25 / ln 2.
    scaled = (1 / 16 + (1 / 3.9**2 - 1 / 16) * math.log(1.25) / math.log(2)) ** -0.5
    forecast = forecast_gain(GROWTH, factor=1.25)
    assert forecast is not None
    assert forecast.expected_angstrom == pytest.approx((0.06952 + 4 - scaled) / 2, abs=1e-4)
    run = ended(figures=RunFigures(growth=GROWTH))
    settings = replace(SETTINGS, planned_exposures=500)
    advice = only(advise(facts(run, n_exposures=400), settings))
    assert advice.words.startswith(
        "resolution gains flatten: what is left of 500 exposures (1.2 times the particles) is predicted to gain 0.05 Å"
    )
    assert advice.numbers["factor"] == 1.25
    at_the_end = only(advise(facts(run, n_exposures=500), settings))
    assert at_the_end.words.startswith("doubling the 20,000 particles")


def test_no_gain_goes_beyond_nyquist_or_under_nothing() -> None:
    at_nyquist = forecast_gain(GROWTH, nyquist_angstrom=3.95)
    assert at_nyquist is not None
    assert at_nyquist.high_angstrom == pytest.approx(0.05)
    falling = forecast_gain(replace(GROWTH, slope_per_ln_n=-0.01, ssnr_angstrom_at_2n=4.2))
    assert falling is not None
    assert (falling.low_angstrom, falling.high_angstrom) == (0.0, 0.0)


def test_a_growing_map_is_told_what_doubling_gives() -> None:
    advice = only(advise(facts(ended(figures=RunFigures(growth=GROWTH))), SETTINGS))
    assert (advice.kind, advice.severity) == (AdviceKind.GROWTH, Severity.INFO)
    assert advice.words == (
        "doubling the 20,000 particles is predicted to gain 0.15 Å (95 % interval 0.10 to 0.24 Å)"
    )


def flat_runs() -> list[EndedRun]:
    """(a) to (d) hold: little to gain, even and settled, pixels finer than the map, two maps from nothing."""
    figures = RunFigures(growth=FLAT)
    return [ended("run001", cfar=0.58), ended("run002", cfar=0.6, figures=figures)]


def test_stopping_is_advised_when_all_four_conditions_hold() -> None:
    # 1/16 + 0.002 ln 2 = 0.0638863 → 3.95634 Å; the upper end: 0.0642938 → 3.94378 Å, 0.056 Å; rule: 0.12 Å (3 %).
    advice = only(advise(facts(*flat_runs()), SETTINGS))
    assert advice.kind is AdviceKind.STOP
    assert advice.numbers["gain_high_angstrom"] == pytest.approx(0.05622, abs=1e-4)
    assert advice.words == (
        "resolution gains flatten: doubling the 20,000 particles is predicted to gain 0.04 Å (95 % interval 0.03 to "
        "0.06 Å); consider stopping"
    )


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"cfar": 0.45}, "cFAR is 0.75 of its null"),
        ({"cfar_null": None}, "cFAR or its null is not known"),
        ({"cfar": 0.55, "cfar_null": 0.5}, "cFAR has not settled over two runs"),
        ({"nyquist": None}, "whether the pixels are the limit is not known"),
        ({"start_map": "run001"}, "1 of 2 runs from nothing gave a map"),
    ],
)
def test_each_condition_alone_holds_stopping_back(change: dict[str, float], why: str) -> None:
    first, _ = flat_runs()
    last = ended("run002", figures=RunFigures(growth=FLAT), **{"cfar": 0.6, **change})  # type: ignore[arg-type]
    advice = only(advise(facts(first, last), SETTINGS))
    assert advice.kind is AdviceKind.GROWTH
    assert f"do not stop yet: {why}" in advice.words


def test_a_map_at_nyquist_needs_pixels_and_not_particles() -> None:
    advice = only(advise(facts(ended(nyquist=3.9, figures=RunFigures(growth=FLAT))), SETTINGS))
    assert "take a larger box before more data" in advice.words


# --- scores


def figures(ctf_fit: float | None = 4.0, ice: float = 0.1, n_picks: int = 100) -> QualityFigures:
    return QualityFigures(
        has_rings=ctf_fit is not None,
        ctf_fit_angstrom=ctf_fit,
        astigmatism_angstrom=None,
        defocus_angstrom=None,
        total_motion_angstrom=5.0,
        early_motion_angstrom=None,
        ice_ratio=ice,
        crystalline_ice=None,
        masked_fraction=None,
        n_picks=n_picks,
    )


def scores(centre: float, n: int = 100) -> list[int]:
    """A histogram whose median is the middle of the bin at `centre`."""
    histogram = [0] * 100
    histogram[int(centre * 100)] = n
    return histogram


def trend_of(*parts: tuple[int, float, float | None], seed: int = 1) -> ScoreTrend:
    """Exposures by (how many, score, CTF fit), each spread a little."""
    trend, draw = ScoreTrend(), random.Random(seed)
    for n, score, ctf_fit in parts:
        for _ in range(n):
            spread = draw.uniform(-0.03, 0.03)
            trend.add(
                figures(None if ctf_fit is None else ctf_fit - 10 * spread, ice=draw.uniform(0, 1)),
                scores(score + spread),
            )
    return trend


def test_a_fall_of_the_scores_is_told_with_what_it_goes_with() -> None:
    advice = only(advise(facts(trend=trend_of((100, 0.61, 4.0), (50, 0.38, 7.0))), SETTINGS))
    assert (advice.kind, advice.severity) == (AdviceKind.SCORE_FALL, Severity.WARNING)
    before, latest = advice.numbers["before"], advice.numbers["latest"]
    assert before == pytest.approx(0.61, abs=0.015)
    assert latest == pytest.approx(0.38, abs=0.015)
    assert advice.words.startswith("score median fell from 0.6")
    assert "grid square or focus problem (goes with the CTF fit: rank correlation -0.9" in advice.words


def test_a_fall_without_any_figure_that_follows_it_names_none() -> None:
    trend = ScoreTrend()
    for n, score in ((100, 0.6), (50, 0.4)):
        for _ in range(n):
            trend.add(figures(), scores(score))
    (advice,) = advise(facts(trend=trend), SETTINGS)
    assert advice.words.endswith("grid square or focus problem")
    assert advice.numbers["correlation"] is None


def test_lost_rings_count_as_the_worst_fit() -> None:
    advice = only(advise(facts(trend=trend_of((100, 0.61, 4.0), (50, 0.45, None))), SETTINGS))
    assert "goes with the CTF fit" in advice.words


@pytest.mark.parametrize(
    "parts",
    [
        ((49, 0.61, 4.0), (50, 0.45, 7.0)),  # too few before
        ((100, 0.61, 4.0), (50, 0.52, 4.0)),  # 15 %: less than the rule
        ((100, 0.38, 4.0), (50, 0.61, 4.0)),  # a rise
        ((100, 0.61, 4.0), (20, 0.45, 7.0)),  # most of the latest are as before
    ],
)
def test_what_is_no_fall_is_not_told(parts: tuple[tuple[int, float, float | None], ...]) -> None:
    assert advise(facts(trend=trend_of(*parts)), SETTINGS) == ()


def test_a_median_is_interpolated_within_its_bin() -> None:
    assert median_of([0] * 100) is None
    assert median_of(scores(0.5)) == pytest.approx(0.505)
    histogram = [0] * 100
    histogram[20], histogram[70] = 50, 50
    assert median_of(histogram) == pytest.approx(0.21)


def test_rank_correlation_is_spearmans() -> None:
    assert rank_correlation([1, 2, 3, 4], [10, 20, 30, 400]) == pytest.approx(1.0)
    assert rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1.0)
    # Ranks 0 1 2 3 against 0.5 0.5 2 3: covariance 4.5, powers 5 and 4.5.
    assert rank_correlation([1, 2, 3, 4], [5, 5, 6, 7]) == pytest.approx(4.5 / math.sqrt(5 * 4.5))
    assert rank_correlation([1, 2, 3], [1, 1, 1]) == 0.0


# --- the microscope


def test_few_particles_per_micrograph_are_told_with_what_is_missing() -> None:
    trend = ScoreTrend()
    for _ in range(N_RECENT):
        trend.add(figures(n_picks=8), scores(0.8, n=5))
    advice = only(advise(facts(trend=trend), SETTINGS))
    assert advice.kind is AdviceKind.FEW_PARTICLES
    assert advice.words == (
        "5.0 particles per micrograph score at least 0.4 over the last 50, 8.0 picked: concentration, or the picker's "
        "diameter and threshold; 10,000 take 2,000 micrographs"
    )


def test_many_picks_with_few_good_particles_look_like_junk_and_none_at_all_is_told_too() -> None:
    trend = ScoreTrend()
    for _ in range(N_RECENT):
        trend.add(figures(n_picks=300), scores(0.1, n=300))
    advice = only(advise(facts(trend=trend), SETTINGS))
    assert advice.words.endswith("300.0 picked: most of them look like junk or ice")
    empty = ScoreTrend()
    for _ in range(N_RECENT):
        empty.add(figures(n_picks=0), ())
    assert only(advise(facts(trend=empty), SETTINGS)).kind is AdviceKind.FEW_PARTICLES


def test_a_reference_that_no_longer_fits_is_told_and_warnings_come_first() -> None:
    run = ended(figures=RunFigures(growth=GROWTH))
    advice = advise(facts(run, gain_residual=-0.3, gain_residual_limit=0.2), SETTINGS)
    assert [a.kind for a in advice] == [AdviceKind.GAIN, AdviceKind.GROWTH]
    assert "30% of the gain reference's detail (limit 20%)" in advice[0].words
    assert advise(facts(gain_residual=0.1, gain_residual_limit=0.2), SETTINGS) == ()
    held = only(advise(facts(gain_hold="no orientation fits"), SETTINGS))
    assert held.words == "no orientation fits"
