"""The command `icestream`: exit code 0 = done, 1 = failed, 2 = usage or configuration."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from stream import __version__
from stream.commands import REGISTERS
from stream.commands.common import console
from stream.records.errors import ConfigurationError, IcestreamError
from stream.telemetry.logs import configure_logging

app = typer.Typer(
    name="icestream",
    help="Streaming service for live cryo-EM single-particle sessions.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for _register in REGISTERS:
    _register(app)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"icestream {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    *,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Take the options that stand before a command's name."""


def main() -> None:
    """Run the command line; our own errors become one line on stderr, warnings a line each with their fields."""
    configure_logging(level="warning")
    try:
        app()
    except ConfigurationError as error:
        console.print(f"[red]error:[/red] {error}", highlight=False, soft_wrap=True)
        sys.exit(2)
    except IcestreamError as error:
        console.print(f"[red]error:[/red] {error}", highlight=False, soft_wrap=True)
        sys.exit(1)
