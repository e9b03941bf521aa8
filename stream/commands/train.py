"""`icestream train`: training a model from a YAML configuration, here or on the workers of a Ray cluster."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import models.cryoranker
from stream.commands.common import AsJson, console, print_json
from stream.records.errors import ConfigurationError

if TYPE_CHECKING:
    from actors.jobs.launch import TrainingJob

_SYNTHETIC_CONFIG = Path(models.cryoranker.__file__).with_name("synthetic.yaml")
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
    config: Annotated[
        Path | None,
        typer.Argument(
            help="Configuration (models/cryoranker/default.yaml is one; synthetic.yaml there is taken with --synthetic)."
        ),
    ] = None,
    synthetic: Annotated[
        Path | None,
        typer.Option(
            help="A folder of `icestream generate`, mixed in; goes on from the shipped ranker if no other is named."
        ),
    ] = None,
    synthetic_part: Annotated[
        float | None,
        typer.Option(
            help="With --synthetic: the part of the training images that is generated; 0.5 by default."
        ),
    ] = None,
    held_out: Annotated[
        Path | None,
        typer.Option(
            help="With --synthetic: a session with truth/particles.star that no training saw; its picks are judged before and after."
        ),
    ] = None,
    out: Out = Path("training"),
    seed: Seed = None,
    as_json: AsJson = False,
) -> None:
    """Train a ranker on simulated particles and junk: L_MR + L_CE, the whole network.

    `initial_checkpoint` in the configuration fine-tunes a Cryo-IEF encoder, or goes on from a ranker ("default": the shipped one).
    With --synthetic, labelled particles that CryoGEM generated for a session are mixed in, and the table of the ranker's figures
    before and after is printed and kept.

    Example: icestream train cryoranker models/cryoranker/default.yaml --out training/

    Example: icestream train cryoranker --synthetic synthetic/ --held-out other-session/ --out fine-tuned/
    """
    from actors.jobs.cryoranker import read_job, with_synthetic

    if config is None and synthetic is None:
        raise ConfigurationError("CONFIG", "a configuration, or --synthetic DIR, is given")
    if synthetic is None and (held_out is not None or synthetic_part is not None):
        raise ConfigurationError("--synthetic", "--held-out and --synthetic-part speak of --synthetic")
    job = read_job(config or _SYNTHETIC_CONFIG, seed)
    if synthetic is not None:
        job = with_synthetic(job, synthetic, part=synthetic_part, held_out=held_out)
    document = _run(job, out, as_json=as_json)
    if not as_json and "effect" in document:
        from actors.jobs.synthetic_effect import describe_effect

        for line in describe_effect(document["effect"]):
            typer.echo(line)


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


def _run(job: TrainingJob, out: Path, *, as_json: bool) -> dict[str, Any]:
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
    return document
