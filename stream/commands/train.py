"""`icestream train`: training a model from a YAML configuration, here or on the workers of a Ray cluster."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stream.commands.common import AsJson, console, print_json

if TYPE_CHECKING:
    from actors.jobs.launch import TrainingJob

train_app = typer.Typer(help="Train a model from a YAML configuration.", no_args_is_help=True)

Out = Annotated[
    Path,
    typer.Option("--out", help="Folder for checkpoint, curves and state; a killed training goes on there."),
]
Seed = Annotated[int | None, typer.Option(help="Instead of the configuration's.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.add_typer(train_app, name="train")


@train_app.command("cryo-ief")
def train_cryo_ief(
    config: Annotated[Path, typer.Argument(help="Configuration (models/cryo_ief/small.yaml is one).")],
    out: Out = Path("training"),
    seed: Seed = None,
    as_json: AsJson = False,
) -> None:
    """Pre-train a Cryo-IEF encoder on unlabelled particles: MoCo v3 as the paper changes it.

    Example: icestream train cryo-ief models/cryo_ief/small.yaml --out pretraining/
    """
    from actors.jobs.cryo_ief import read_job

    _run(read_job(config, seed), out, as_json=as_json)


@train_app.command("cryoranker")
def train_cryoranker(
    config: Annotated[Path, typer.Argument(help="Configuration (models/cryoranker/default.yaml is one).")],
    out: Out = Path("training"),
    seed: Seed = None,
    as_json: AsJson = False,
) -> None:
    """Train a ranker on simulated particles and junk: L_MR + L_CE, the whole network.

    `initial_checkpoint` in the configuration fine-tunes a Cryo-IEF encoder.

    Example: icestream train cryoranker models/cryoranker/default.yaml --out training/
    """
    from actors.jobs.cryoranker import read_job

    _run(read_job(config, seed), out, as_json=as_json)


@train_app.command("cryogem")
def train_cryogem(
    config: Annotated[Path, typer.Argument(help="Configuration (models/cryogem/session.yaml is one).")],
    out: Out = Path("training"),
    seed: Seed = None,
    as_json: AsJson = False,
) -> None:
    """Learn a session's noise from its micrographs: contrastive noise translation, guided by particle masks.

    Example: icestream train cryogem models/cryogem/session.yaml --out training/
    """
    from actors.jobs.cryogem import read_job

    _run(read_job(config, seed), out, as_json=as_json)


def _run(job: TrainingJob, out: Path, *, as_json: bool) -> None:
    from actors.jobs.launch import run_training

    with console.status("preparing data, then training"):
        document = run_training(
            job, out, on_progress=lambda point: console.print(json.dumps(point), highlight=False)
        )
    if as_json:
        print_json(document)
    else:
        figures = ", ".join(
            f"{name} {value:.4g}" for name, value in document["metrics"].items() if isinstance(value, float)
        )
        console.print(f"{document['checkpoint']}: {figures}", highlight=False)
