"""`icestream bench NAME`: rerun a benchmark and print its figure and its ratio to a baseline of the same run."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from stream.commands.common import AsJson, print_json
from stream.records.errors import ConfigurationError

Figures = list[dict[str, Any]]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        "bench",
        help=f"Rerun a benchmark: {', '.join(BENCHMARKS)}.\n\nExample: icestream bench journal --json",
    )(bench)


def bench(
    name: Annotated[str, typer.Argument(help="Which benchmark.")],
    size: Annotated[
        int | None, typer.Option(help="Movies, files or particles; default: the recorded size.")
    ] = None,
    folder: Annotated[Path | None, typer.Option(help="Where to work; default: a temporary folder.")] = None,
    as_json: AsJson = False,
) -> None:
    """Rerun one benchmark."""
    if name not in BENCHMARKS:
        raise ConfigurationError("bench", f"a benchmark is one of {', '.join(BENCHMARKS)}", name)
    with tempfile.TemporaryDirectory(prefix="icestream-bench-", dir=folder) as work:
        figures = BENCHMARKS[name](Path(work), size)
    if as_json:
        print_json(figures[0] if len(figures) == 1 else {"name": name, "figures": figures, **figures[0]})
        return
    for figure in figures:
        typer.echo(f"{figure['name']}: {figure['value']:.4g} {figure['unit']}")
        typer.echo(f"  against {figure['baseline']}: ratio {figure['ratio']:.3g}")
        rest = {k: v for k, v in figure.items() if k not in ("name", "value", "unit", "baseline", "ratio")}
        for key, value in rest.items():
            typer.echo(f"  {key}: {value:.6g}" if isinstance(value, float) else f"  {key}: {value}")


def _journal(folder: Path, size: int | None) -> Figures:
    from stream.commands.bench_journal import run_journal_benchmark

    return run_journal_benchmark(folder, **({} if size is None else {"n_movies": size}))


def _stream(folder: Path, size: int | None) -> Figures:
    from stream.commands.bench_stream import run_stream_benchmark

    return [run_stream_benchmark(folder, **({} if size is None else {"n_movies": size}))]


BENCHMARKS: dict[str, Callable[[Path, int | None], Figures]] = {"journal": _journal, "stream": _stream}
