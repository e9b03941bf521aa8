"""`icestream bench NAME`: rerun a benchmark and print its figure and its ratio to a baseline of the same run."""

from __future__ import annotations

import contextlib
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
        help=f"Rerun a benchmark: {', '.join((*BENCHMARKS, *LONG_BENCHMARKS))}.\n\nExample: icestream bench journal --json",
    )(bench)


def bench(
    name: Annotated[str, typer.Argument(help="Which benchmark.")],
    size: Annotated[
        int | None,
        typer.Option(help="Movies, files, particles, pixels or seeds; default: the recorded size."),
    ] = None,
    folder: Annotated[Path | None, typer.Option(help="Where to work; default: a temporary folder.")] = None,
    part: Annotated[
        str | None,
        typer.Option(
            help="convergence: structures and seeds (rod:0-3,antibody); engine: sets (ribozyme,betagal); "
            "honesty: set0-4,noise,views; cryogem: cryogem,no-guidance,cut; views: clusters, with, without; junk: with, without."
        ),
    ] = None,
    box_px: Annotated[int | None, typer.Option(help="engine: side of the images.")] = None,
    limit_s: Annotated[
        float | None,
        typer.Option(
            help="engine: seconds after which RELION is stopped; cryogem: CPU seconds of this call."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Rerun one benchmark; convergence, cryogem, engine, honesty, incremental, junk and views keep what they did in --folder and go on from there."""
    if name not in (*BENCHMARKS, *LONG_BENCHMARKS):
        known = ", ".join((*BENCHMARKS, *LONG_BENCHMARKS))
        raise ConfigurationError("bench", f"a benchmark is one of {known}", name)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        if name in LONG_BENCHMARKS and folder is not None:
            work = folder
        else:
            work = Path(
                stack.enter_context(tempfile.TemporaryDirectory(prefix="icestream-bench-", dir=folder))
            )
        if name in LONG_BENCHMARKS:
            figures = LONG_BENCHMARKS[name](work, size, part, box_px, limit_s)
        else:
            figures = BENCHMARKS[name](work, size)
    if as_json:
        print_json(figures[0] if len(figures) == 1 else {"name": name, "figures": figures, **figures[0]})
        return
    for figure in figures:
        typer.echo(f"{figure['name']}: {figure['value']:.4g} {figure['unit']}")
        typer.echo(f"  against {figure['baseline']}: ratio {figure['ratio']:.3g}")
        rest = {k: v for k, v in figure.items() if k not in ("name", "value", "unit", "baseline", "ratio")}
        for key, value in rest.items():
            typer.echo(f"  {key}: {value:.6g}" if isinstance(value, float) else f"  {key}: {value}")


def _ingest(folder: Path, size: int | None) -> Figures:
    from stream.commands.bench_ingest import run_ingest_benchmark

    return [run_ingest_benchmark(size or 10_000, folder)]


def _journal(folder: Path, size: int | None) -> Figures:
    from stream.commands.bench_journal import run_journal_benchmark

    return run_journal_benchmark(folder, n_movies=size or 100_000)


def _controller(folder: Path, size: int | None) -> Figures:
    from stream.commands.bench_controller import run_controller_benchmark

    return run_controller_benchmark(folder, n_movies=size or 100_000)


def _stream(folder: Path, size: int | None) -> Figures:
    from stream.commands.bench_stream import run_stream_benchmark

    return [run_stream_benchmark(folder, n_movies=size or 24)]


def _score(folder: Path, size: int | None) -> Figures:
    from stream.commands.bench_score import run_score_benchmark

    return [run_score_benchmark(folder, n_particles=size or 4_000)]


def _vit_b(folder: Path, size: int | None) -> Figures:
    from stream.commands.bench_vit import run_vit_benchmark

    return run_vit_benchmark(folder, n_particles=size or 48)


def _feature_cache(folder: Path, size: int | None) -> Figures:
    from stream.commands.bench_features import run_feature_cache_benchmark

    return run_feature_cache_benchmark(folder, n_particles=size or 120_000)


def _features(folder: Path, size: int | None) -> Figures:
    from stream.commands.bench_clusters import run_cluster_benchmark

    return [run_cluster_benchmark(folder, n_particles=size or 1_000_000)]


def _preprocess(folder: Path, size: int | None) -> Figures:
    from stream.commands.bench_preprocess import run_preprocess_benchmark

    return run_preprocess_benchmark(folder, n_frames=size or 40)


def _motion(folder: Path, size: int | None) -> Figures:
    from stream.commands.bench_motion import run_motion_benchmark

    return run_motion_benchmark(folder, side_px=size or 2048)


def _picking(folder: Path, size: int | None) -> Figures:
    from stream.commands.bench_picking import run_picking_benchmark

    del folder  # everything stays in memory
    return run_picking_benchmark(n_micrographs=size or 4)


def _honesty(
    folder: Path, size: int | None, part: str | None, box_px: int | None, limit_s: float | None
) -> Figures:
    from stream.commands.bench_honesty import run_honesty_benchmark

    if size is not None or box_px is not None or limit_s is not None:
        raise ConfigurationError("--size, --box-px, --limit-s", "the sets are given", "honesty")
    return run_honesty_benchmark(folder, part=part)


BENCHMARKS: dict[str, Callable[[Path, int | None], Figures]] = {
    "ingest": _ingest,
    "preprocess": _preprocess,
    "motion": _motion,
    "journal": _journal,
    "controller": _controller,
    "stream": _stream,
    "score": _score,
    "vit-b": _vit_b,
    "feature-cache": _feature_cache,
    "picking": _picking,
    "features": _features,
}


def _convergence(
    folder: Path, size: int | None, part: str | None, box_px: int | None, limit_s: float | None
) -> Figures:
    from stream.commands.bench_convergence import run_convergence_benchmark

    if box_px is not None or limit_s is not None:
        raise ConfigurationError("--box-px, --limit-s", "they belong to `bench engine`", "convergence")
    return run_convergence_benchmark(folder, n_seeds=size or 10, part=part)


def _engine(
    folder: Path, size: int | None, part: str | None, box_px: int | None, limit_s: float | None
) -> Figures:
    from stream.commands.bench_engine import (
        DEFAULT_BOX_PX,
        DEFAULT_LIMIT_S,
        DEFAULT_SIZE,
        run_engine_benchmark,
    )

    return run_engine_benchmark(
        folder,
        n_particles=size or DEFAULT_SIZE,
        box_px=box_px or DEFAULT_BOX_PX,
        limit_s=limit_s or DEFAULT_LIMIT_S,
        part=part,
    )


def _views(
    folder: Path, size: int | None, part: str | None, box_px: int | None, limit_s: float | None
) -> Figures:
    from stream.commands.bench_views import N_PARTICLES, run_views_benchmark

    if limit_s is not None:
        raise ConfigurationError("--limit-s", "it belongs to `bench engine`", "views")
    return run_views_benchmark(folder, n_particles=size or N_PARTICLES, part=part, box_px=box_px)


def _junk(
    folder: Path, size: int | None, part: str | None, box_px: int | None, limit_s: float | None
) -> Figures:
    from stream.commands.bench_junk import N_GOOD, run_junk_benchmark

    if limit_s is not None or box_px is not None:
        raise ConfigurationError("--limit-s, --box-px", "they belong to `bench engine`", "junk")
    return run_junk_benchmark(folder, n_good=size or N_GOOD, part=part)


def _cryogem(
    folder: Path, size: int | None, part: str | None, box_px: int | None, limit_s: float | None
) -> Figures:
    from stream.commands.bench_cryogem import run_cryogem_benchmark

    if box_px is not None:
        raise ConfigurationError("--box-px", "cryogem.yaml in --folder says what is trained", "cryogem")
    return run_cryogem_benchmark(folder, n_seeds=size or 3, part=part, limit_s=limit_s)


def _incremental(
    folder: Path, size: int | None, part: str | None, box_px: int | None, limit_s: float | None
) -> Figures:
    from stream.commands.bench_incremental import DEFAULT_BOX_PX, DEFAULT_SIZE, run_incremental_benchmark

    if limit_s is not None:
        raise ConfigurationError("--limit-s", "it belongs to `bench engine`", "incremental")
    return run_incremental_benchmark(
        folder, n_particles=size or DEFAULT_SIZE, box_px=box_px or DEFAULT_BOX_PX, part=part
    )


LONG_BENCHMARKS: dict[str, Callable[[Path, int | None, str | None, int | None, float | None], Figures]] = {
    "convergence": _convergence,
    "cryogem": _cryogem,
    "engine": _engine,
    "honesty": _honesty,
    "incremental": _incremental,
    "junk": _junk,
    "views": _views,
}
