"""`icestream quality`: which exposures are used, by which limits, and what other limits would change."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from stream.commands.common import AsJson, print_json
from stream.commands.delivery import deliver
from stream.records.errors import ConfigurationError
from stream.records.values import QualityLimits
from stream.store.inbox import LimitsRequest, OverruleRequest, Request
from stream.store.layout import OutputLayout

_LIMITS = tuple(field.name for field in fields(QualityLimits))
_Limit = Annotated[float | None, typer.Option(help="At most; Å.")]
_Names = list[str] | None


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        "quality",
        help="Show how the quality figures of a session are spread and which limits are in force; change limits, or "
        "accept and reject single exposures, while the session runs or after. Nothing is processed again, and "
        "everything can be taken back.\n\n"
        "Example: icestream quality /data/session --max-ctf-fit-angstrom 6 --max-ice-ratio 2 --dry-run",
    )(quality)


def quality(
    out: Annotated[Path, typer.Argument(help="A session's output folder.")],
    max_ctf_fit_angstrom: _Limit = None,
    max_astigmatism_angstrom: _Limit = None,
    min_defocus_angstrom: Annotated[float | None, typer.Option(help="At least; Å.")] = None,
    max_defocus_angstrom: _Limit = None,
    max_total_motion_angstrom: _Limit = None,
    max_early_motion_angstrom: Annotated[
        float | None, typer.Option(help="At most, over the first 4 e/Å²; Å.")
    ] = None,
    max_ice_ratio: Annotated[float | None, typer.Option(help="At most.")] = None,
    max_crystalline_ice: Annotated[float | None, typer.Option(help="At most; robust sd.")] = None,
    max_masked_fraction: Annotated[float | None, typer.Option(help="At most, 0 to 1.")] = None,
    min_picks: Annotated[int | None, typer.Option(help="At least.")] = None,
    max_picks: Annotated[int | None, typer.Option(help="At most.")] = None,
    clear: Annotated[_Names, typer.Option(help="A limit to apply no more, or: all (repeatable).")] = None,
    accept: Annotated[_Names, typer.Option(help="Use this exposure whatever the limits say.")] = None,
    reject: Annotated[_Names, typer.Option(help="Do not use this exposure; say why by --reason.")] = None,
    undo: Annotated[_Names, typer.Option(help="Judge this exposure by the limits again.")] = None,
    reason: Annotated[str, typer.Option(help="Why; kept in the journal.")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Change nothing, show what would.")] = False,
    list_all: Annotated[bool, typer.Option("--list", help="List every rejected exposure.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show or change which exposures are used."""
    given = {name: value for name, value in locals().items() if name in _LIMITS and value is not None}
    words = ((accept, True), (reject, False), (undo, None))
    overrules = [
        OverruleRequest(name=name, is_accepted=word, reason=reason)
        for names, word in words
        for name in names or ()
    ]
    document = change_quality(
        OutputLayout(out),
        given,
        cleared=tuple(clear or ()),
        overrules=overrules,
        reason=reason,
        dry_run=dry_run,
        list_all=list_all,
    )
    if as_json:
        print_json(document)
    else:
        print_quality(document)


def change_quality(
    layout: OutputLayout,
    given: Mapping[str, float],
    *,
    cleared: Sequence[str] = (),
    overrules: Sequence[OverruleRequest] = (),
    reason: str = "",
    dry_run: bool = False,
    list_all: bool = False,
) -> dict[str, Any]:
    """Change limits and words on exposures as asked for, and return the report of what is so afterwards.

    A running service gets the requests through its inbox; without one they are committed here. With `dry_run`
    the report is that of a replay to which the changes were made in memory alone.
    """
    from stream.quality_report import list_rejected, report_quality
    from stream.requests import event_for_request
    from stream.status import load_controller

    controller = load_controller(layout.root)
    before = report_quality(controller)
    requests: list[Request] = []
    if given or cleared:
        limits = _merge(asdict(controller.limits), given, cleared)
        requests.append(LimitsRequest(limits=limits, reason=reason))
    requests += overrules
    for request in requests:
        controller.handle(event_for_request(request, controller, time.time()))
    delivered = "dry run" if dry_run else deliver(layout, requests) if requests else None
    document = report_quality(controller)
    document["before"] = {key: before[key] for key in ("limits", "exposures", "particles", "rejected_by")}
    document["delivered"] = delivered
    if list_all:
        document["rejected"] = list_rejected(controller)
    return document


def _merge(
    limits: dict[str, float | int | None], given: Mapping[str, float], cleared: Sequence[str]
) -> dict[str, float | int | None]:
    for key in cleared:
        name = key.replace("-", "_")
        if name not in (*_LIMITS, "all"):
            raise ConfigurationError("--clear", f"a limit is one of {', '.join(_LIMITS)}, or all", key)
        limits = {k: None if name in (k, "all") else v for k, v in limits.items()}
    return limits | dict(given)


def print_quality(document: Mapping[str, Any]) -> None:
    """Print the report for a person on stdout."""
    console = Console(highlight=False, soft_wrap=True)
    for state in ("accepted", "rejected"):
        particles, before = document["particles"][state], document["before"]
        console.print(
            f"{state}   {document['exposures'][state]} exposures (before: {before['exposures'][state]}), "
            f"{particles['extracted']} particles, {particles['above_threshold']} of them above "
            f"{document['particles']['score_threshold']}"
        )
    rules = _table("limit", "value", "broken by", "particles", "above threshold")
    for rule in document["rules"]:
        particles = rule["particles"]
        rules.add_row(
            rule["rule"],
            f"{rule['limit']:g}",
            str(rule["exposures"]),
            str(particles["extracted"]),
            str(particles["above_threshold"]),
        )
    console.print(rules if document["rules"] else "limits     none in force")
    if document["without_rings"]:
        console.print(f"no rings   {document['without_rings']} exposures (they break any limit on the CTF)")
    from stream.quality_report import PERCENTILES

    figures = _table("figure", "known", *(f"{q} %" for q in PERCENTILES))
    for name, figure in document["figures"].items():
        cells = [_short(figure[f"p{q}"]) if figure["n"] else "-" for q in PERCENTILES]
        figures.add_row(name, str(figure["n"]), *cells)
    console.print(figures)
    for item in document["overruled"]:
        verb = "accepted" if item["accepted"] else "rejected"
        console.print(
            f"by hand    {escape(item['name'])} {verb}: {escape(item['reason'] or 'no reason given')}"
        )
    for item in document.get("rejected", ()):
        console.print(f"rejected   {escape(item['name'])}: {escape(item['reason'])}")
    if document["delivered"] is not None:
        said = {"dry run": "nothing was changed (dry run)", "service": "taken by the running service"}
        console.print(said.get(document["delivered"], "written to the journal"))


def _table(first: str, *others: str) -> Table:
    """Return a table whose first column is never cut, for terminals of 80 columns."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), collapse_padding=True)
    table.add_column(first, no_wrap=True)
    for other in others:
        table.add_column(other, justify="right", no_wrap=True)
    return table


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100.0 else f"{value:.2f}"
