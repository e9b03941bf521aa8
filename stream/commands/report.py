"""`icestream report`: one HTML file that says what a session gave, for the people whose grid it was."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stream.commands.common import AsJson, print_json
from stream.records.errors import ConfigurationError

_SUFFIXES = (".html", ".htm")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        "report",
        help="Write a session's report: one HTML file that needs nothing else, while the session runs or after.\n\n"
        "Example: icestream report /data/session --html session.html",
    )(report)


def report(
    out: Annotated[Path, typer.Argument(help="A session's output folder.")],
    html: Annotated[
        Path | None,
        typer.Option(help="The file to write, in place of an earlier one; OUT/report.html if not given."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a session's report."""
    from stream.session_facts import gather_facts
    from stream.sinks.report.page import write_report
    from stream.store.layout import OutputLayout

    path = OutputLayout(out).report if html is None else html
    if path.suffix.lower() not in _SUFFIXES or path.is_dir():
        # another suffix may be a slip of the hand that would replace a session's own file
        raise ConfigurationError(path, "--html names a file that ends with .html")
    size_bytes = write_report(path, gather_facts(out))
    if as_json:
        print_json({"html": str(path), "size_bytes": size_bytes})
    else:
        typer.echo(f"{path} ({size_bytes / 2**20:.1f} MiB)")
