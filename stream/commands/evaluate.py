"""`icestream evaluate`: judging scores against labels."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from stream.commands.common import AsJson, console, print_json
from stream.records.errors import InputError

evaluate_app = typer.Typer(help="Judge scores and features against labels.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.add_typer(evaluate_app, name="evaluate")


@evaluate_app.command("scores")
def evaluate_scores(
    table: Annotated[Path, typer.Argument(help="STAR or CSV with one row per particle.")],
    score_column: Annotated[str, typer.Option(help="Column of scores.")] = "icestreamScore",
    label_column: Annotated[str, typer.Option(help="Column of labels in [0, 1].")] = "icestreamLabel",
    threshold: Annotated[float, typer.Option(help="Accepted above this score.")] = 0.4,
    as_json: AsJson = False,
) -> None:
    """Compute AUC, average precision, Spearman and Pearson of scores against labels.

    AUC and AP take labels above 0.7 as good and up to 0.3 as bad; the correlations take all rows.

    Example: icestream evaluate scores scored_with_labels.star --label-column classScore
    """
    from models.cryoranker.metrics import score_quality

    columns = _read_columns(table, (score_column, label_column))
    try:
        quality = score_quality(columns[score_column], columns[label_column], threshold=threshold)
    except ValueError as error:
        raise InputError(table, "labels have good and bad particles", error) from error
    if as_json:
        print_json(asdict(quality))
    else:
        console.print(
            f"AUC {quality.auc:.4f}  AP {quality.ap:.4f}  Spearman {quality.spearman:.4f}"
            f"  Pearson {quality.pearson:.4f}  ({quality.n_good} good, {quality.n_bad} bad)"
        )


def _read_columns(table: Path, names: tuple[str, ...]) -> dict[str, Any]:
    import numpy as np
    import pandas as pd
    import starfile

    if not table.is_file():
        raise InputError(table, "a STAR or CSV file that exists")
    try:
        if table.suffix == ".csv":
            frames = [pd.read_csv(table)]
        else:
            frames = [
                f for f in starfile.read(table, always_dict=True).values() if isinstance(f, pd.DataFrame)
            ]
    except (ValueError, OSError) as error:
        raise InputError(table, "a readable STAR or CSV file", error) from error
    for frame in frames:
        if set(names) <= set(frame.columns):
            values = {name: frame[name].to_numpy(np.float64) for name in names}
            if not all(np.isfinite(column).all() for column in values.values()):
                raise InputError(table, f"columns {names} are finite")
            return values
    raise InputError(table, f"has the columns {names}", [list(frame.columns) for frame in frames])
