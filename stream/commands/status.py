"""`icestream status`: where every movie and particle is, and what was decided and why."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from stream.commands.common import AsJson, print_json


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        "status",
        help="Show where every movie and particle is, the runs, and the last decisions.\n\n"
        "Example: icestream status /data/session --json",
    )(status)


def status(
    out: Annotated[Path, typer.Argument(help="A session's output folder.")],
    as_json: AsJson = False,
) -> None:
    """Show a session's status, while it runs or after."""
    from stream.status import load_status

    document = load_status(out)
    if as_json:
        print_json(document)
    else:
        print_status(document)


def print_status(document: Mapping[str, Any]) -> None:
    """Print a status document for a person on stdout."""
    console = Console(highlight=False, soft_wrap=True)
    movies, particles = document["movies"], document["particles"]
    states = " · ".join(
        f"{count} {name.replace('_', ' ')}" for name, count in movies.items() if name != "found"
    )
    balance = "balanced" if document["balanced"] else "[red]NOT BALANCED[/red]"
    console.print(f"exposures  {movies['found']} found = {states} ({balance})")
    console.print(
        f"particles  {particles['extracted']} extracted · {particles['scored']} scored · "
        f"{particles['above_threshold']} above {particles['score_threshold']} · {particles['excluded']} excluded · "
        f"{particles['rejected']} in rejected exposures"
    )
    gain = document["gain"]
    if gain["orientation"] is not None:
        turned = (
            ", ".join(f"{key} {value}" for key, value in gain["orientation"].items() if value) or "as it is"
        )
        console.print(f"gain       orientation found: {turned}")
    if gain["residual"] is not None:
        console.print(f"gain       residual {gain['residual']:+.3f} over the last movies")
    for stage, why in document["holds"].items():
        console.print(f"[yellow]waiting[/yellow]    {stage}: {escape(why)}")
    for name, value in document["wishes"].items():
        if value not in (None, []):
            console.print(f"by hand    {name.replace('_', ' ')}: {_say_wish(value)}")
    if document["runs"]:
        console.print(_run_table(document["runs"]))
    if document["resolution_angstrom"] is not None:
        cfar = "?" if document["cfar"] is None else f"{document['cfar']:.2f}"
        console.print(
            f"map        {document['accepted_run']}: {document['resolution_angstrom']:.2f} Å (FSC 0.143), cFAR {cfar}"
        )
    else:
        console.print("map        none accepted yet")
    if document["cryogem"]["state"] is not None:
        console.print(f"CryoGEM    {document['cryogem']['state']}: {escape(document['cryogem']['words'])}")
    for item in document["advice"]:
        colour = "yellow" if item["severity"] == "warning" else "blue"
        console.print(f"[{colour}]advice[/{colour}]     {escape(item['words'])}")
    for item in document["quarantine"]:
        console.print(f"[yellow]quarantine[/yellow] {escape(item['name'])}: {escape(item['reason'])}")
    if document["rejected_by"]:
        counts = " · ".join(f"{n} by {rule}" for rule, n in document["rejected_by"].items())
        console.print(f"rejected   {counts}")
    for item in document["rejected"]:
        console.print(f"[yellow]rejected[/yellow]   {escape(item['name'])}: {escape(item['reason'])}")
    for decision in document["decisions"]:
        clock = time.strftime("%H:%M:%S", time.localtime(decision["at"]))
        console.print(f"[dim]{clock}[/dim] {decision['what']}: {decision['why']}")


def _say_wish(value: object) -> str:
    return escape(", ".join(map(str, value)) if isinstance(value, list) else str(value))


def _run_table(runs: list[dict[str, Any]]) -> Table:
    table = Table("run", "state", "particles", "resolution Å", "cFAR", "cFAR null", "SCF*", "verdict")
    for run in runs:
        numbers = (run["resolution_angstrom"], run["cfar"], run["cfar_null"], run["scf_star"])
        cells = ["-" if n is None else f"{n:.2f}" for n in numbers]
        table.add_row(
            run["run_id"], run["state"], str(run["particles"]), *cells, run["verdict"] or run["reason"]
        )
    return table
