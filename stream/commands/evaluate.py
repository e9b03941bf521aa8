"""`icestream evaluate`: judging scores against labels, and features against known classes."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    table: Annotated[Path, typer.Argument(help="STAR or CSV with one row per particle.")],
    score_column: Annotated[str, typer.Option(help="Column of scores.")] = "icestreamScore",
    label_column: Annotated[str, typer.Option(help="Column of labels in [0, 1].")] = "icestreamLabel",
    threshold: Annotated[float, typer.Option(help="Accepted above this score.")] = 0.4,
    curves: Annotated[
        Path | None,
        typer.Option(help="Precision, recall and ROC at every threshold: .csv, or .png to look at."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compute AUC, average precision, Spearman and Pearson of scores against labels.

    AUC and AP take labels above 0.7 as good and up to 0.3 as bad; the correlations take all rows.

    Example: icestream evaluate scores scored_with_labels.star --label-column classScore --curves curves.png
    """
    from models.cryoranker.metrics import score_quality

    if curves is not None and curves.suffix not in CURVE_SUFFIXES:
        raise ConfigurationError("--curves", f"the file ends in {', '.join(CURVE_SUFFIXES)}", curves)
    columns = _read_columns(table, (score_column, label_column))
    scores, labels = columns[score_column], columns[label_column]
    try:
        quality = score_quality(scores, labels, threshold=threshold)
    except ValueError as error:
        raise InputError(table, "labels have good and bad particles", error) from error
    if curves is not None:
        _write_curves(curves, scores, labels)
    if as_json:
        print_json(asdict(quality))
    else:
        console.print(
            f"AUC {quality.auc:.4f}  AP {quality.ap:.4f}  Spearman {quality.spearman:.4f}"
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
