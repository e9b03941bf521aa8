"""What was decided and why: runs, what they cost, the session's story, a person's words."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from stream.sinks.report.facts import ReportFacts, RunFacts, Said
from stream.sinks.report.markup import NOTHING, Child, Html, join, number, table, tag

MAX_RUNS = 200
N_FIRST, N_LAST = 50, 350
"""Lines of the story that are kept of a long one."""

_COMPARE = "compare "


def draw_runs(facts: ReportFacts, growth: Html | None) -> Html:
    """Return every run with its figures and what was made of it, what runs cost, and beside it the plot `growth`."""
    if not facts.runs:
        return tag("p", "No run was started yet.", class_="soft")
    head = ["run", "for", "particles", "Å", "cFAR", "null", "ratio", "SCF*", "state", "time", "verdict"]
    rows = [_run_row(run) for run in facts.runs[-MAX_RUNS:]]
    n = len(facts.runs)
    thinned = tag("p", f"The last {MAX_RUNS} of {n:,} runs.", class_="soft") if n > MAX_RUNS else None
    below = tag("div", tag("div", _draw_costs(facts)), growth, class_="pair")
    return join([thinned, table(head, rows, numbers=(2, 3, 4, 5, 6, 7)), below])


def _run_row(run: RunFacts) -> list[Child]:
    state = run.state + (", rejected by hand" if run.is_rejected_by_person else "")
    if run.warm_start is not None:
        start = f", continues {run.warm_start}"
    else:
        start = "" if run.start_map is None else f", from the map of {run.start_map}"
    name = [run.run_id, " ", tag("span", "accepted", class_="mark")] if run.is_accepted else run.run_id
    figures = (run.cfar, run.cfar_null, run.cfar_ratio, run.scf_star)
    return [
        name,
        f"{run.purpose}{start}",
        f"{run.n_particles:,}",
        number(run.resolution_angstrom),
        *(number(figure) for figure in figures),
        state,
        _duration(run.seconds),
        tag("div", run.verdict or run.reason, class_="words"),
    ]


def _draw_costs(facts: ReportFacts) -> Html | None:
    """Return what runs from nothing, from a map and continued ones took, and the comparisons that were recorded."""
    kinds = (
        ("from nothing", [r for r in facts.runs if r.start_map is None and r.warm_start is None]),
        ("from an earlier map", [r for r in facts.runs if r.start_map is not None and r.warm_start is None]),
        ("continued from an earlier run's sums", [r for r in facts.runs if r.warm_start is not None]),
    )
    rows = [_cost_row(kind, runs) for kind, runs in kinds if any(r.seconds is not None for r in runs)]
    compared = [said for said in facts.story if said.is_decision and said.what.startswith(_COMPARE)]
    if not rows and not compared:
        return None
    costs = table(["runs", "ended", "engine time", "per 1,000 particles"], rows, numbers=(1, 2, 3))
    comparisons = [tag("p", tag("b", said.what), ": ", said.why) for said in compared]
    return join([tag("h3", "What the runs cost"), costs, comparisons])


def _cost_row(kind: str, runs: Sequence[RunFacts]) -> list[Child]:
    timed = [(run.seconds, run.n_particles) for run in runs if run.seconds is not None]
    seconds, n = sum(s for s, _ in timed), sum(n for _, n in timed)
    return [kind, f"{len(timed):,}", _duration(seconds), _duration(1000.0 * seconds / n) if n else NOTHING]


def draw_story(facts: ReportFacts) -> Html:
    """Return what happened and what was decided, in order."""
    if not facts.story:
        return tag("p", "Nothing has happened yet.", class_="soft")
    first, last = facts.story[0].at, facts.story[-1].at
    has_days = when(first).date() != when(last).date()
    lines, n_left_out = _thin(facts.story)
    rows = [
        [
            tag("span", _clock(said.at, has_days=has_days), class_="clock"),
            tag("div", said.what, class_="soft" if not said.is_decision else None),
            tag("div", said.why, class_="words"),
        ]
        for said in lines
    ]
    words = f"Times are {when(first).tzname()}."
    if n_left_out:
        words += f" {n_left_out:,} lines in the middle are left out: the first {N_FIRST} and the last {N_LAST} are shown."
    return join([tag("p", words, class_="soft"), table(["time", "what", "why"], rows)])


def _thin(story: Sequence[Said]) -> tuple[Sequence[Said], int]:
    n_left_out = len(story) - N_FIRST - N_LAST
    return (story, 0) if n_left_out <= 0 else ([*story[:N_FIRST], *story[-N_LAST:]], n_left_out)


def draw_persons_words(facts: ReportFacts) -> Html:
    """Return what people decided."""
    if not facts.persons_words:
        return tag("p", "Nobody decided anything by hand.", class_="soft")
    kept = facts.persons_words[-N_LAST:]
    rows = [
        [
            word.decision_id,
            tag("span", f"{when(word.at):%Y-%m-%d %H:%M:%S}", class_="clock"),
            word.what,
            tag("div", word.reason or "no reason given", class_="words"),
            "taken back" if word.is_undone else "stands",
        ]
        for word in kept
    ]
    n = len(facts.persons_words)
    thinned = tag("p", f"The last {N_LAST} of {n:,}.", class_="soft") if n > len(kept) else None
    return join([thinned, table(["id", "time", "what", "why", ""], rows)])


def when(at: float) -> datetime:
    """Return a moment in the local time of the machine that writes the report."""
    return datetime.fromtimestamp(at).astimezone()


def _clock(at: float, *, has_days: bool) -> str:
    return f"{when(at):%m-%d %H:%M:%S}" if has_days else f"{when(at):%H:%M:%S}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return NOTHING
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
