"""`icestream train`: training a model from a YAML configuration, here or as a Ray job."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from stream.commands.common import AsJson, console, print_json
from stream.records.errors import ConfigurationError

train_app = typer.Typer(help="Train a model from a YAML configuration.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.add_typer(train_app, name="train")


@train_app.command("cryoranker")
def train_cryoranker(
    config: Annotated[Path, typer.Argument(help="Configuration (models/cryoranker/default.yaml is one).")],
    out: Annotated[Path, typer.Option("--out", help="Folder for checkpoint and curve.")] = Path("training"),
    seed: Annotated[int | None, typer.Option(help="Instead of the configuration's.")] = None,
    as_json: AsJson = False,
) -> None:
    """Train a ranker on simulated particles and junk: L_MR + L_CE, the whole network.

    Example: icestream train cryoranker models/cryoranker/default.yaml --out training/
    """
    from dataclasses import replace

    from models.cryoranker.train import read_train_config, train_ranker

    try:
        settings = read_train_config(config)
        if seed is not None:
            settings = replace(settings, seed=seed)
        result = train_ranker(
            settings, out, on_progress=lambda point: console.print(json.dumps(point), highlight=False)
        )
    except (ValueError, TypeError) as error:
        raise ConfigurationError(config, "a training configuration", error) from error
    if as_json:
        print_json(
            {
                "checkpoint": result.checkpoint,
                "metrics": {**asdict(result.validation), "seconds": result.seconds},
                "sha256": result.sha256,
            }
        )
    else:
        console.print(f"{result.checkpoint}: validation AUC {result.validation.auc:.3f}")
