"""Where every exposure and particle is: nothing is lost, and the counts say so themselves."""

from __future__ import annotations

import re
from collections.abc import Sequence

from stream.sinks.report.charts import Canvas, linear_axis
from stream.sinks.report.facts import ExposureFacts, ReportFacts
from stream.sinks.report.markup import Html, join, table, tag
from stream.sinks.report.run_files import read_thumbnail
from stream.sinks.report.trends import TRENDS, describe_thinning, draw_trend
from stream.store.layout import OutputLayout

MAX_ROWS = 200

_STATE_WORDS = {
    "done": "processed, in use",
    "in_work": "in work",
    "waiting": "waiting",
    "rejected": "rejected",
    "quarantined": "in quarantine",
}
_FOUND = re.compile(r"(?P<rule>.*) \(found: (?P<value>.*)\)", re.DOTALL)


def draw_exposures(facts: ReportFacts) -> Html:
    """Return where the exposures are: a bar, the sum, the rejected by rule."""
    found, counts = len(facts.exposures), facts.n_by_state
    if not found:
        return tag("p", "No exposure has been found yet.", class_="soft")
    bars = [
        tag("i", class_=state, style=f"width:{100 * counts.get(state, 0) / found:.2f}%")
        for state in _STATE_WORDS
        if counts.get(state)
    ]
    keys = [
        tag("span", tag("i", class_=state), f"{counts.get(state, 0):,} {words}")
        for state, words in _STATE_WORDS.items()
    ]
    total = sum(counts.values())
    addends = " + ".join(f"{counts.get(state, 0):,} {words}" for state, words in _STATE_WORDS.items())
    balance = (
        f"{found:,} found = {addends}: none is lost."
        if total == found
        else f"{found:,} found, but the states hold {total:,}: {addends}."
    )
    return join(
        [
            tag("p", balance),
            tag("div", bars, class_="shares"),
            tag("p", keys, class_="legend"),
            _draw_rejected(facts),
        ]
    )


def draw_particles(facts: ReportFacts) -> Html:
    """Return the particles from picks to those above τ, in use and not; and how their scores are spread."""
    used = [e for e in facts.exposures if e.state in {"done", "in_work", "waiting"}]
    unused = [e for e in facts.exposures if e.state in {"rejected", "quarantined"}]
    columns = [_count(part) for part in (used, unused, facts.exposures)]
    rows = [
        [words, *(f"{column[i]:,}" for column in columns)]
        for i, words in enumerate(
            (
                "picked",
                "− left out at extraction (edge, mask, bad pixels)",
                "= extracted",
                "− not scored yet",
                "− could not be scored",
                "= scored",
                f"− below τ = {facts.score_threshold:g}",
                "= above τ",
            )
        )
    ]
    head = ["particles", "in use", "not in use", "all"]
    funnel = table(head, rows, numbers=(1, 2, 3))
    return tag("div", funnel, _draw_scores(facts), class_="pair")


def _count(exposures: Sequence[ExposureFacts]) -> list[int]:
    """Return the lines of the table; each sum is the one above it less what was left out."""
    picked = sum(e.n_picks for e in exposures)
    extracted = sum(e.n_particles for e in exposures)
    scored = sum(e.n_scored for e in exposures)
    unscored = sum(e.n_unscored for e in exposures)
    above = sum(e.n_above for e in exposures)
    missing = extracted - scored - unscored
    return [picked, picked - extracted, extracted, missing, unscored, scored, scored - above, above]


def _draw_scores(facts: ReportFacts) -> Html | None:
    counts = list(facts.score_histogram)
    if not sum(counts):
        return None
    n = len(counts)
    canvas = Canvas(
        x=linear_axis(0.0, 1.0, "score", n_ticks=5),
        y=linear_axis(0.0, float(max(counts)), n_ticks=3),
        height_px=170.0,
    )
    first = round(facts.score_threshold * n)
    bars = [
        canvas.bar(i / n, (i + 1) / n, float(count), "a" if i >= first else "", f"{i / n:.2f}: {count:,}")
        for i, count in enumerate(counts)
        if count
    ]
    tau = canvas.vertical(facts.score_threshold, "threshold", f"τ = {facts.score_threshold:g}")
    plot = canvas.draw(bars, tau, title="scores of the particles in use")
    return tag("figure", tag("figcaption", "Scores of the particles in use"), plot)


def _draw_rejected(facts: ReportFacts) -> Html | None:
    rejected = [e for e in facts.exposures if e.state == "rejected"]
    if not rejected:
        return None
    counts = ", ".join(f"{n:,} by {rule}" for rule, n in facts.n_rejected_by.items())
    rows = [[e.name, e.rule, e.reason, f"{e.n_particles:,}"] for e in rejected[:MAX_ROWS]]
    listed = table(["exposure", "rule", "why", "particles"], rows, numbers=(3,))
    return join(
        [
            tag("p", f"Rejected: {counts}. Limits in force: {facts.limits}."),
            tag("details", tag("summary", _say_rows(len(rejected), "rejected exposures")), listed),
        ]
    )


def draw_quarantine(facts: ReportFacts) -> Html:
    """Return every file in quarantine with the rule that it breaks and the value that was found."""
    held = [e for e in facts.exposures if e.state == "quarantined"]
    if not held:
        return tag("p", "No file is in quarantine.", class_="soft")
    rows = []
    for exposure in held[:MAX_ROWS]:
        rule, value = split_reason(exposure)
        rows.append([tag("div", exposure.path, class_="path"), tag("div", rule, class_="words"), value])
    note = tag("p", _say_rows(len(held), "files") + ". A file is taken again when it changes.")
    return join([note, table(["file", "rule", "found"], rows)])


def split_reason(exposure: ExposureFacts) -> tuple[str, str]:
    """Return rule and value of an error's line ("item: rule (found: value)"); the value may be missing."""
    words = exposure.reason
    for item in (exposure.path, exposure.name):
        words = words.removeprefix(f"{item}: ")
    match = _FOUND.fullmatch(words)
    return (match["rule"], match["value"]) if match else (words, "")


def draw_trends(facts: ReportFacts) -> Html:
    """Return the plots of every figure over the exposures, and three micrographs."""
    plots = [plot for trend in TRENDS if (plot := draw_trend(facts.exposures, trend)) is not None]
    if not plots:
        return tag("p", "Nothing has been measured yet.", class_="soft")
    said = (
        f"{describe_thinning(len(facts.exposures))} Outliers are red and lie more than six robust standard deviations "
        "from the median; a triangle stands for a value beyond the plot. The time from landing to score begins with "
        "the session for files that were there before it."
    )
    return join([tag("p", said, class_="soft"), tag("div", plots, class_="pair"), _draw_examples(facts)])


def _draw_examples(facts: ReportFacts) -> Html | None:
    """Show the micrographs with the best, the median and the worst CTF fit."""
    fitted = sorted(
        (e for e in facts.exposures if e.ctf_fit_angstrom is not None),
        key=lambda e: e.ctf_fit_angstrom or 0.0,
    )
    if len(fitted) < 3:
        return None
    chosen = (("best", fitted[0]), ("median", fitted[len(fitted) // 2]), ("worst", fitted[-1]))
    layout = OutputLayout(facts.out)
    figures = []
    for words, exposure in chosen:
        uri = read_thumbnail(layout.thumbnail(exposure.name))
        if uri is not None:
            caption = f"{words} CTF fit, {exposure.ctf_fit_angstrom:.1f} Å: {exposure.name}"
            image = tag("img", src=uri, alt=caption, class_="micrograph")
            figures.append(tag("figure", tag("figcaption", caption), image))
    return join([tag("h3", "Micrographs"), tag("div", figures, class_="thirds")]) if figures else None


def _say_rows(n: int, what: str) -> str:
    return f"{n:,} {what}" if n <= MAX_ROWS else f"{n:,} {what}, the first {MAX_ROWS} of them"
