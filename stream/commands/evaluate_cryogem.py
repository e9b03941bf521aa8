"""`icestream evaluate cryogem`: how far generated micrographs are from the session's own."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from stream.commands.common import AsJson, console, print_json
from stream.commands.evaluate import evaluate_app


def register(_app: typer.Typer) -> None:
    """Add the command beside the other evaluations, whose group is registered by their own module."""
    evaluate_app.command("cryogem")(evaluate_cryogem)


def evaluate_cryogem(
    trainings: Annotated[
        list[Path], typer.Argument(help="Folders of `icestream train cryogem`, of one session.")
    ],
    micrographs: Annotated[
        int | None, typer.Option(min=1, help="Micrographs per set; all that are held out by default.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Start of every draw.")] = 0,
    panel: Annotated[
        Path | None, typer.Option(help="Write a picture: real, physics, Gaussian, first training.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure Fréchet, spectrum and patch distances to the held-out micrographs, beside fitted noise by formula.

    An ablation is a training with `training.nce_form: unguided`, say; give its folder too.

    Example: icestream evaluate cryogem training/ ablation/ --panel panel.png
    """
    from actors.cryogem.evaluation import evaluate_trainings

    found = evaluate_trainings(
        trainings,
        n_micrographs=micrographs,
        seed=seed,
        panel=panel,
        on_progress=lambda line: console.print(line, highlight=False),
    )
    if as_json:
        print_json(asdict(found))
        return
    typer.echo(f"{found.n_micrographs} micrographs, {found.n_patches} patches of {found.patch_px} px")
    typer.echo(f"{'set':30}{'Fréchet x1000':>15}{'spectrum':>11}{'patches':>10}{'content':>10}")
    for name, d in found.distances.items():
        typer.echo(
            f"{name:30}{d.frechet_x1000:15.2f}{d.spectrum:11.3f}{d.patches:10.3f}{_number(found.content.get(name))}"
        )


def _number(value: float | None) -> str:
    return f"{'':>10}" if value is None else f"{value:10.3f}"
