"""The page: one HTML file, everything inline, no script, nothing that is fetched; written whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from stream.records.errors import ResourceError
from stream.sinks.report.account import draw_exposures, draw_particles, draw_quarantine, draw_trends
from stream.sinks.report.facts import ReportFacts, RunFacts, SessionState
from stream.sinks.report.markup import Child, Html, join, table, tag
from stream.sinks.report.result import compose_verdict, draw_advice, draw_growth, draw_map, draw_tiles
from stream.sinks.report.run_files import RunFiles, read_run
from stream.sinks.report.story import draw_persons_words, draw_runs, draw_story, when
from stream.sinks.report.style import CSS
from stream.store.files import replacing
from stream.store.layout import OutputLayout

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""A browser runs no script and fetches nothing on this page, whatever a file's name says."""

_STATE_WORDS = {
    SessionState.RUNNING: "running",
    SessionState.ENDED: "ended: everything has an outcome",
    SessionState.STOPPED: "stopped: no service runs here",
}
_FILES = {
    "export/particles.star": "scored particles; with an accepted map those that it used, with poses (RELION)",
    "export/particles.cs": "the same (CryoSPARC)",
    "export/all_particles.star": "every particle, scored or not",
    "export/micrographs.star": "micrographs with their CTF fits",
    "map.mrc": "the map: both halves, weighted by the FSC, sharpened where it is fine enough",
    "half1.mrc": "unfiltered half map",
    "half2.mrc": "unfiltered half map",
    "mask.mrc": "the mask of the FSC",
    "fsc.star": "FSC curves",
    "poses.star": "particles with poses",
    "locres.mrc": "local resolution in Å",
    "orientation.html": "orientation diagnostics, to point at",
    "orientation.json": "orientation diagnostics in numbers",
    "summary.json": "the run in numbers",
}
"""What users take with them; the engine's own state and input are left out."""


def write_report(path: Path, facts: ReportFacts) -> int:
    """Write the page in place of what is there; return its size in bytes.

    Raises `ResourceError` when the file cannot be written.
    """
    content = render(facts).encode("utf-8")
    try:
        with replacing(path) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        raise ResourceError(path, f"the report must be writable: {error.strerror}") from error
    return len(content)


def render(facts: ReportFacts) -> Html:
    """Return the whole page."""
    run = facts.shown_run
    files = None if run is None or run.folder is None else read_run(facts.out / run.folder)
    title = f"{facts.out.resolve().name}: icestream session report"
    sections = (
        ("map", "Map", draw_map(facts, files)),
        ("exposures", "Exposures and particles", [draw_exposures(facts), draw_particles(facts)]),
        ("trends", "Over the session", draw_trends(facts)),
        ("runs", "Runs", draw_runs(facts, draw_growth(facts, files))),
        ("decisions", "Decisions", draw_story(facts)),
        ("words", "Decided by hand", draw_persons_words(facts)),
        ("quarantine", "Quarantine", draw_quarantine(facts)),
        ("settings", "Settings", _draw_settings(facts, files)),
        ("again", "Files, and how to reproduce", _draw_again(facts, run)),
    )
    body = tag(
        "body",
        _draw_head(facts),
        tag("nav", [tag("a", heading, href=f"#{name}") for name, heading, _ in sections]),
        tag("p", compose_verdict(facts), class_="verdict"),
        draw_tiles(facts, files),
        draw_advice(facts),
        [tag("section", tag("h2", heading), content, id=name) for name, heading, content in sections],
        tag("footer", f"icestream {facts.icestream_version}, {when(facts.written_at):%Y-%m-%d %H:%M:%S %Z}"),
    )
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width,initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("title", title),
        tag("style", Html(CSS)),
    )
    return Html(f"<!doctype html>\n{tag('html', head, body, lang='en')}\n")


def _draw_head(facts: ReportFacts) -> Html:
    pill = tag("span", _STATE_WORDS[facts.state], class_=f"pill {facts.state.value}")
    return join(
        [
            tag("header", tag("h1", facts.out.resolve().name), pill),
            tag("p", " · ".join(_list_spans(facts)), class_="soft spans"),
        ]
    )


def _list_spans(facts: ReportFacts) -> Iterator[str]:
    yield f"{facts.out.resolve()}, from {facts.source}"
    if facts.first_at is not None and facts.last_at is not None:
        first, last = when(facts.first_at), when(facts.last_at)
        end = f"{last:%H:%M}" if first.date() == last.date() else f"{last:%Y-%m-%d %H:%M}"
        hours = (facts.last_at - facts.first_at) / 3600.0
        length = f"{hours:.1f} h" if hours >= 1.0 else f"{60.0 * hours:.0f} min"
        yield f"{first:%Y-%m-%d %H:%M} to {end} {last:%Z} ({length})"
    if facts.n_openings > 1:
        yield f"opened {facts.n_openings} times"
    yield f"icestream {', '.join(facts.session_versions) or facts.icestream_version}"
    yield f"report of {when(facts.written_at):%Y-%m-%d %H:%M}"


def _draw_settings(facts: ReportFacts, files: RunFiles | None) -> Html:
    model = facts.model
    hashes = [tag("div", tag("code", h), f" ({n:,} exposures)") for h, n in model.n_by_hash.items()]
    providers = ", ".join(f"{name} ({n:,} exposures)" for name, n in model.n_by_provider.items())
    rows: list[list[Child]] = [[what, value] for what, value in facts.settings]
    rows += [
        ["model", model.path or "the ranker that ships with icestream"],
        ["model hash", hashes or "nothing is scored yet"],
        ["run by", f"{providers or 'nothing is scored yet'}; asked for: {model.asked_for}"],
        ["score threshold τ", f"{facts.score_threshold:g}"],
        ["engine", facts.engine],
    ]
    if files is not None and files.provenance:
        words = ", ".join(f"{key} {value}" for key, value in files.provenance.items() if key != "particles")
        rows.append(["the run above was made with", words])
    changed = table(
        ["setting", "value", "default"], [[tag("code", key), value, was] for key, value, was in facts.changed]
    )
    return join(
        [
            table(["", ""], rows, class_="keys"),
            tag("h3", "Other than the defaults"),
            changed if facts.changed else tag("p", "Nothing.", class_="soft"),
        ]
    )


def _draw_again(facts: ReportFacts, run: RunFacts | None) -> Html:
    files = list(_list_files(facts.out, run))
    listed = (
        table(["file", "size", "holds"], files, numbers=(1,))
        if files
        else tag("p", "Nothing is exported yet.", class_="soft")
    )
    words = (
        "Save the configuration below as again.yaml, give it another out, and run: icestream reprocess again.yaml. What was "
        "decided by hand is not part of it."
    )
    return join(
        [
            tag("p", f"Files below {facts.out.resolve()}:"),
            listed,
            tag("p", words),
            tag("details", tag("summary", "Configuration as used"), tag("pre", facts.session_yaml)),
        ]
    )


def _list_files(out: Path, run: RunFacts | None) -> Iterator[list[Child]]:
    """Yield what users take with them: the exports and the shown run's files, with their sizes."""
    layout = OutputLayout(out)
    places = [(layout.exports / Path(name).name, words) for name, words in _FILES.items() if "/" in name]
    if run is not None and run.folder is not None:
        places += [(out / run.folder / name, words) for name, words in _FILES.items() if "/" not in name]
    for path, words in places:
        if path.is_file():
            yield [tag("code", layout.relative(path)), _size(path.stat().st_size), words]


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:.1f} MiB" if n_bytes >= 2**20 else f"{n_bytes / 2**10:.0f} KiB"
