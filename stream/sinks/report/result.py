"""The answer first: what the session gave, what the figures advise, and the pictures of its map."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from stream.records.advice import Advice, AdviceKind, Severity
from stream.sinks.report.charts import Axis, Canvas, linear_axis, log_axis, resolution_axis
from stream.sinks.report.facts import ReportFacts, RunFacts, SessionState
from stream.sinks.report.markup import NOTHING, Html, join, number, tag
from stream.sinks.report.run_files import Curve, Picture, RunFiles

FSC_THRESHOLD = 0.143

_LINES = {"corrected": "a thick", "unmasked": "c", "masked": "b", "phase-randomised": "c dashed"}


def compose_verdict(facts: ReportFacts) -> str:
    """Say in a sentence or two what the session gave."""
    in_work = [run for run in facts.runs if run.state == "running"]
    is_going_on = bool(in_work) and facts.state is SessionState.RUNNING
    then = (
        f" {in_work[-1].run_id} is in work on {in_work[-1].n_particles:,} particles." if is_going_on else ""
    )
    accepted = facts.accepted
    if accepted is not None:
        return _praise(accepted, facts.advice) + then
    if not facts.exposures:
        return "No exposure has arrived yet."
    if not any(facts.n_by_state.get(state) for state in ("waiting", "in_work", "done")):
        return "No exposure can be used: every one is rejected or in quarantine."
    ended = [run for run in facts.runs if run.verdict]
    if ended:
        last = ended[-1]
        return f"No map is accepted. {last.run_id}, {last.n_particles:,} particles: {last.verdict}.{then}"
    return f"No map yet: {facts.n_above_threshold:,} particles score above {facts.score_threshold:g}.{then}"


def _praise(run: RunFacts, advice: Sequence[Advice]) -> str:
    words = f"{number(run.resolution_angstrom)} Å from {run.n_particles:,} particles ({run.run_id})"
    if run.nyquist_angstrom is not None and (run.resolution_angstrom or math.inf) <= run.nyquist_angstrom:
        words += ", at the Nyquist limit of the working pixels"
    kinds = {item.kind for item in advice if item.severity is Severity.WARNING}
    if AdviceKind.PREFERRED_ORIENTATION in kinds:
        return f"{words}, but views are missing."
    if AdviceKind.JUNK in kinds:
        return f"{words}, but directions differ: junk or misaligned particles."
    if run.cfar_ratio is not None:
        words += (
            f". Directions: cFAR {number(run.cfar)}, {run.cfar_ratio:.0%} of what isotropic data would give"
        )
    return f"{words}."


def draw_tiles(facts: ReportFacts, files: RunFiles | None) -> Html:
    """Return the figures that are asked for first."""
    run = facts.shown_run
    tiles = [_tile(*line) for line in (_list_run_tiles(run, files, facts) if run is not None else ())]
    n_done, found = facts.n_by_state.get("done", 0), len(facts.exposures)
    tiles.append(_tile(f"{n_done:,}", f"of {found:,} exposures are processed and in use"))
    n_scored = sum(e.n_scored for e in facts.exposures if e.state == "done")
    words = f"particles above τ = {facts.score_threshold:g}, of {n_scored:,} scored"
    tiles.append(_tile(f"{facts.n_above_threshold:,}", words))
    return tag("div", tiles, class_="tiles")


def _list_run_tiles(run: RunFacts, files: RunFiles | None, facts: ReportFacts) -> Iterator[tuple[str, str]]:
    summary = {} if files is None else files.summary
    which = "" if run.is_accepted else f"{run.run_id}, not accepted: "
    unmasked = summary.get("unmasked_resolution_angstrom")
    beside = "" if unmasked is None else f"; without mask {number(unmasked)} Å"
    yield (
        number(run.resolution_angstrom, 2, " Å"),
        f"{which}half maps at FSC {FSC_THRESHOLD}, corrected for the mask{beside}",
    )
    null = "" if run.cfar_null is None else f"; isotropic data: {number(run.cfar_null)}"
    ratio = "" if run.cfar_ratio is None else f", ratio {run.cfar_ratio:.2f}"
    scf = "" if run.scf_star is None else f"; SCF* {number(run.scf_star)}"
    yield number(run.cfar), f"cFAR, worst over best direction{null}{ratio}{scf}"
    yield f"{run.n_particles:,}", f"particles in {run.run_id}, symmetry {run.symmetry}"
    if "b_factor_angstrom2" in summary:
        growth = summary.get("growth_b_factor_angstrom2")
        more = "" if growth is None else f"; from the number of particles {growth:.0f} Å²"
        yield number(summary["b_factor_angstrom2"], 0, " Å²"), f"B factor of the map (Guinier){more}"
    if "local_median" in summary:
        span = f"{number(summary.get('local_p10'), 1)} to {number(summary.get('local_p90'), 1)} Å"
        yield number(summary["local_median"], 1, " Å"), f"local resolution, median; 10 to 90 %: {span}"
    yield from _list_forecast(facts.advice)


def _list_forecast(advice: Sequence[Advice]) -> Iterator[tuple[str, str]]:
    """Yield what more particles are predicted to gain, from the numbers of the advice on it."""
    for item in advice:
        gain = item.numbers.get("gain_angstrom")
        if item.kind not in (AdviceKind.GROWTH, AdviceKind.STOP) or gain is None:
            continue
        low, high = item.numbers.get("gain_low_angstrom"), item.numbers.get("gain_high_angstrom")
        factor, n = item.numbers.get("factor"), item.numbers.get("n_particles")
        yield (
            number(gain, 2, " Å"),
            f"predicted gain with {factor or 0.0:.2g} times {number(n, 0)} particles; "
            f"95 % interval {number(low)} to {number(high)} Å",
        )


def _tile(value: str, words: str) -> Html:
    return tag("div", tag("b", value), tag("span", words), class_="tile")


def draw_advice(facts: ReportFacts) -> Html:
    """Return the advice and the warnings that stand, worst first."""
    notes = [
        tag("p", tag("b", _NAMES[item.kind]), item.words, class_=f"note {item.severity.value}")
        for item in facts.advice
    ]
    warnings = [tag("p", tag("b", "Note"), words, class_="note warning") for words in facts.warnings]
    if not notes and not warnings:
        return tag("p", "No advice stands, and nothing has to be warned of.", class_="soft")
    return join([notes, warnings])


_NAMES = {
    AdviceKind.PREFERRED_ORIENTATION: "Preferred orientation",
    AdviceKind.JUNK: "Junk",
    AdviceKind.GROWTH: "More particles",
    AdviceKind.STOP: "Enough",
    AdviceKind.SCORE_FALL: "Scores fall",
    AdviceKind.GAIN: "Gain reference",
    AdviceKind.FEW_PARTICLES: "Few particles",
}


# --- the map -------------------------------------------------------------------------------------------


def draw_map(facts: ReportFacts, files: RunFiles | None) -> Html:
    """Return the pictures and curves of the accepted run, or of the last one that left a map."""
    run = facts.shown_run
    if run is None or files is None:
        return tag("p", "No run has ended with a map yet.", class_="soft")
    which = (
        f"{run.run_id}, the accepted map."
        if run.is_accepted
        else f"{run.run_id}, not accepted: {run.verdict}."
    )
    notes = f" {run.note[0].upper()}{run.note[1:]}." if run.note else ""
    figures = [
        _draw_picture(files.map_picture),
        _draw_fsc(files, run),
        _draw_picture(files.orientation_picture, "wide"),
        _draw_picture(files.local_resolution_picture, "wide"),
    ]
    faults = [tag("p", f"{run.folder}/{fault}", class_="soft") for fault in files.faults]
    return join([tag("p", which, notes), tag("div", figures, class_="pair"), faults])


def _draw_picture(picture: Picture | None, class_: str | None = None) -> Html | None:
    if picture is None:
        return None
    image = tag("img", src=picture.uri, alt=picture.words)
    return tag("figure", tag("figcaption", picture.words), image, class_=class_)


def _draw_fsc(files: RunFiles, run: RunFacts) -> Html | None:
    if not files.fsc:
        return None
    k_max = max((k for curve in files.fsc.values() for k, _ in curve), default=0.0)
    if k_max <= 0.0:
        return None
    canvas = Canvas(
        x=resolution_axis(k_max),
        y=Axis(low=-0.1, high=1.02, ticks=[(v, f"{v:g}") for v in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)]),
        height_px=345.0,
    )
    fan = None if files.fan is None else canvas.area(files.fan.low, files.fan.high, "a")
    lines = [canvas.line(curve, _LINES[name]) for name, curve in reversed(list(files.fsc.items()))]
    threshold = canvas.horizontal(FSC_THRESHOLD, "threshold", f"{FSC_THRESHOLD}")
    d = run.resolution_angstrom
    crossing = None if d is None else canvas.vertical(1.0 / d, "threshold", f"{d:.2f} Å")
    plot = canvas.draw(fan, threshold, crossing, lines, title="Fourier shell correlation of the half maps")
    keys = [(_LINES[name], name) for name in files.fsc]
    legend = _legend([*keys, *([("area", "directions, least to greatest (conical FSC)")] if fan else [])])
    return tag("figure", tag("figcaption", "FSC of the half maps"), plot, legend)


def draw_growth(facts: ReportFacts, files: RunFiles | None) -> Html | None:
    """Draw resolution against particles: parts of the shown run, and every run of the session."""
    shown = facts.shown_run
    runs = [r for r in facts.runs if r.resolution_angstrom is not None and r.n_particles > 0]
    growth, predictions = ((), {}) if files is None else (files.growth, files.predicted_at_2n)
    parts: Curve = [(p.n_particles, p.resolution_angstrom) for p in growth]
    dots = [(float(r.n_particles), r.resolution_angstrom or math.nan) for r in runs]
    if len({n for n, _ in (*parts, *dots)}) < 2:
        return None
    end = max(parts, default=None)
    predicted = [] if end is None else [(2.0 * end[0], d) for d in predictions.values() if d > 0.0]
    everything = [*parts, *dots, *predicted]
    finest, coarsest = min(d for _, d in everything), max(d for _, d in everything)
    canvas = Canvas(
        x=log_axis(min(n for n, _ in everything) / 1.15, max(n for n, _ in everything) * 1.15, "particles"),
        y=_flip(linear_axis(finest * 0.97, coarsest * 1.03)),
        height_px=220.0,
    )
    marks = [canvas.line(sorted(parts), "a"), *[canvas.dot(p, "a", _say_point(p)) for p in parts]]
    marks += [canvas.line([end, p], "a dashed") for p in predicted if end is not None]
    for run, dot in zip(runs, dots, strict=True):
        class_ = "accepted" if run.is_accepted else "soft"
        marks.append(canvas.dot(dot, class_, f"{run.run_id}: {_say_point(dot)}", radius_px=4.0))
        if run is shown or len(runs) <= 4:
            marks.append(canvas.label(dot, run.run_id))
    keys = [("dot accepted", "accepted run"), ("dot", "other runs")]
    if parts and shown is not None:
        keys.append(("a", f"random parts of {shown.run_id}; dashed: predicted for twice the particles"))
    plot = canvas.draw(marks, title="resolution against the number of particles")
    caption = "Resolution / Å against the number of particles"
    return tag("figure", tag("figcaption", caption), plot, _legend(keys))


def _flip(axis: Axis) -> Axis:
    """Return the axis with the finer resolution at the top."""
    return Axis(low=axis.high, high=axis.low, ticks=axis.ticks, label=axis.label)


def _say_point(point: tuple[float, float]) -> str:
    return f"{point[0]:,.0f} particles, {number(point[1]) if point[1] else NOTHING} Å"


def _legend(keys: Sequence[tuple[str, str]]) -> Html:
    return tag("p", [tag("span", tag("i", class_=class_), words) for class_, words in keys], class_="legend")
