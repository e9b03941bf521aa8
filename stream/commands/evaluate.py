"""`icestream evaluate`: judging scores against labels, and features against known classes."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stream.commands import evaluate_features, evaluate_ranking
from stream.commands.common import AsJson, console, print_json
from stream.records.errors import ConfigurationError, InputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

CURVE_SUFFIXES = (".csv", ".png")

evaluate_app = typer.Typer(help="Judge scores and features against labels.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    evaluate_features.register(evaluate_app)
    evaluate_ranking.register(evaluate_app)
    app.add_typer(evaluate_app, name="evaluate")


@evaluate_app.command("scores")
def evaluate_scores(
    table: Annotated[Path, typer.Argument(help="STAR, .cs or CSV with one row per particle.")],
    score_column: Annotated[str, typer.Option(help="Column of scores.")] = "icestreamScore",
    label_column: Annotated[str, typer.Option(help="Column of labels in [0, 1].")] = "icestreamLabel",
    threshold: Annotated[float, typer.Option(help="Accepted above this score.")] = 0.4,
    model: Annotated[
        Path | None,
        typer.Option(
            help="Score the table's particles (STAR or .cs) with this ranker, instead of --score-column."
        ),
    ] = None,
    root: Annotated[
        Path | None, typer.Option(help="With --model: folder to which the stacks' paths are relative.")
    ] = None,
    curves: Annotated[
        Path | None,
        typer.Option(help="Precision, recall and ROC at every threshold: .csv, or .png to look at."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compute AUC, average precision, Spearman and Pearson of scores against labels.

    AUC and AP take labels above 0.7 as good and up to 0.3 as bad; the correlations take all rows. With --model, images
    without a signal have no score and are left out and counted.

    Example: icestream evaluate scores labelled.star --label-column classScore --model ranker.onnx --curves curves.png
    """
    import numpy as np

    from models.cryoranker.metrics import score_quality
    from stream.commands.evaluate_labelled import read_numbers, score_labelled

    if curves is not None and curves.suffix not in CURVE_SUFFIXES:
        raise ConfigurationError("--curves", f"the file ends in {', '.join(CURVE_SUFFIXES)}", curves)
    if model is None:
        columns = read_numbers(table, (score_column, label_column))
        scores, labels = columns[score_column], columns[label_column]
    else:
        labels = read_numbers(table, (label_column,))[label_column]
        scores = score_labelled(table, model, root=root).astype(np.float64)
    is_scored = np.isfinite(scores)
    n_given, scores, labels = len(scores), scores[is_scored], labels[is_scored]
    try:
        quality = score_quality(scores, labels, threshold=threshold)
    except ValueError as error:
        raise InputError(table, "labels have good and bad particles", error) from error
    if curves is not None:
        _write_curves(curves, scores, labels)
    if as_json:
        print_json({"particles": n_given, "scored": len(scores), **asdict(quality)})
    else:
        console.print(
            f"{len(scores)} of {n_given} particles scored  AUC {quality.auc:.4f}  AP {quality.ap:.4f}  Spearman {quality.spearman:.4f}"
            f"  Pearson {quality.pearson:.4f}  ({quality.n_good} good, {quality.n_bad} bad)"
        )


def _write_curves(path: Path, scores: NDArray[np.float64], labels: NDArray[np.float64]) -> None:
    import pandas as pd

    from models.cryoranker.metrics import threshold_curves
    from stream.store.files import replacing

    is_clear = (labels > 0.7) | (labels <= 0.3)
    found = threshold_curves(scores[is_clear], labels[is_clear] > 0.7)
    if path.suffix == ".csv":
        with replacing(path) as temporary:
            pd.DataFrame(asdict(found)).to_csv(temporary, index=False, float_format="%.6f")
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.0, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    left.step([0.0, *found.recall], [1.0, *found.precision], where="pre")
    left.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02), title="Precision and recall")
    right.plot([0.0, *found.false_positive_rate], [0.0, *found.recall])
    right.plot([0.0, 1.0], [0.0, 1.0], ":", color="grey")
    right.set(
        xlabel="false positive rate", ylabel="true positive rate", title="ROC", xlim=(0, 1), ylim=(0, 1.02)
    )
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
