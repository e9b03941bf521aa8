"""`icestream evaluate cryogem`: how far generated micrographs are from the session's own."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from stream.commands.common import AsJson, console, print_json
from stream.commands.evaluate import evaluate_app
from stream.records.errors import ConfigurationError


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
    inception: Annotated[
        Path | None,
        typer.Option(
            help="Inception v3 of your own for the Fréchet distance (.onnx, or timm's .safetensors); the ranker's features else."
        ),
    ] = None,
    picking: Annotated[
        bool, typer.Option("--picking", help="Train pickers on generated data; AUPRC. Needs --truth.")
    ] = False,
    poses: Annotated[
        bool, typer.Option("--poses", help="Train pose networks on generated particles. Needs --truth.")
    ] = False,
    truth: Annotated[
        Path | None,
        typer.Option(
            help="Particle STAR with true centres (and poses, CTFs) of micrographs never trained on."
        ),
    ] = None,
    generated: Annotated[
        int | None, typer.Option(min=1, help="Generated micrographs per training set; 10 and 40 by default.")
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Passes over the generated data; 20 and 8 by default.")
    ] = None,
    topaz: Annotated[
        Path | None, typer.Option(help="With --picking: Topaz's program, trained on the same data too.")
    ] = None,
    device: Annotated[str, typer.Option(help="Where pickers and pose networks are trained.")] = "cpu",
    as_json: AsJson = False,
) -> None:
    """Measure Fréchet, spectrum and patch distances to the held-out micrographs, beside fitted noise by formula.

    With --picking or --poses measure instead what pickers and pose networks learn from generated data, beside noise by formula
    at the paper's signal-to-noise ratio. An ablation is a training with `training.nce_form: unguided`, say; give its folder too.

    Example: icestream evaluate cryogem training/ ablation/ --panel panel.png
    """
    if topaz is not None and not picking:
        raise ConfigurationError("--topaz", "Topaz is trained with --picking", topaz)
    if picking or poses:
        if truth is None:
            raise ConfigurationError("--truth", "--picking and --poses need a STAR of known particles", None)
        if panel is not None or inception is not None:
            rule = "distances and their picture are measured without --picking and --poses"
            raise ConfigurationError("--panel, --inception", rule, panel or inception)
        _evaluate_use(
            trainings,
            truth,
            is_picking=picking,
            is_poses=poses,
            sizes=_Sizes(unseen=micrographs, generated=generated, epochs=epochs),
            seed=seed,
            topaz=topaz,
            device=device,
            as_json=as_json,
        )
        return
    from actors.cryogem.evaluation import evaluate_trainings

    found = evaluate_trainings(
        trainings,
        n_micrographs=micrographs,
        seed=seed,
        panel=panel,
        inception=inception,
        on_progress=lambda line: console.print(line, highlight=False),
    )
    if as_json:
        print_json(asdict(found))
        return
    typer.echo(
        f"{found.n_micrographs} micrographs, {found.n_patches} patches of {found.patch_px} px; {found.n_made} frames a set"
    )
    typer.echo(f"{'set':30}{'Fréchet x1000':>15}{'spectrum':>11}{'patches':>10}{'content':>10}")
    for name, d in found.distances.items():
        typer.echo(
            f"{name:30}{d.frechet_x1000:15.2f}{d.spectrum:11.3f}{d.patches:10.3f}{_number(found.content.get(name))}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sizes:
    """What was asked for; None takes the defaults."""

    unseen: int | None
    generated: int | None
    epochs: int | None


def _evaluate_use(
    trainings: list[Path],
    truth: Path,
    *,
    is_picking: bool,
    is_poses: bool,
    sizes: _Sizes,
    seed: int,
    topaz: Path | None,
    device: str,
    as_json: bool,
) -> None:
    from actors.cryogem.downstream import DownstreamSettings, evaluate_downstream
    from models.cryogem.picker import PickerTraining
    from models.cryogem.pose_network import PoseTraining

    asked = {} if sizes.epochs is None else {"epochs": sizes.epochs}
    frames = {} if sizes.generated is None else {"n_picking": sizes.generated, "n_poses": sizes.generated}
    found = evaluate_downstream(
        trainings,
        truth,
        DownstreamSettings(
            is_picking=is_picking,
            is_poses=is_poses,
            n_unseen=sizes.unseen,
            seed=seed,
            topaz=topaz,
            picker=PickerTraining(seed=seed, device=device, **asked),
            poses=PoseTraining(seed=seed, device=device, **asked),
            **frames,
        ),
        on_progress=lambda line: console.print(line, highlight=False),
    )
    if as_json:
        print_json(asdict(found))
        return
    if found.picking is not None:
        p = found.picking
        typer.echo(
            f"picking: {p.n_particles} particles in {p.n_micrographs} unseen micrographs, "
            f"{p.n_training_micrographs} to train on"
        )
        for name, value in p.auprc.items():
            typer.echo(f"{name:34}{value:10.3f}")
    if found.poses is not None:
        q = found.poses
        typer.echo(f"poses: {q.n_particles} unseen particles, {q.n_training_particles} to train on")
        typer.echo(f"{'trained on':34}{'view, deg':>10}{'rotation':>10}{'shift, px':>10}{'FSC 0.5, Å':>12}")
        for name, e in q.errors.items():
            resolution = "none" if e.resolution_angstrom is None else f"{e.resolution_angstrom:.1f}"
            typer.echo(
                f"{name:34}{e.view_error_deg:10.1f}{e.rotation_error_deg:10.1f}{e.shift_error_px:10.2f}{resolution:>12}"
            )


def _number(value: float | None) -> str:
    return f"{'':>10}" if value is None else f"{value:10.3f}"
