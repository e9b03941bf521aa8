"""`icestream classify`: two-dimensional class averages of particles."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stream.commands.common import AsJson, console, print_json
from stream.records.errors import ConfigurationError

if TYPE_CHECKING:
    from models.reconstruction.classification import ClassificationProgress

HELP = """Sort particles into two-dimensional class averages: the quickest look at what was picked.

Writes montage.png (most populated first; particles, resolution and mean score under each), classes.mrcs, classes.star
and particles.star with rlnClassNumber. Scores are taken from a column icestreamScore (`icestream score`) if there.

Example: icestream classify particles.star --out classes --classes 50
"""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("classify", help=HELP)(classify)


def classify(
    particles: Annotated[Path, typer.Argument(help="Particles: .star or .cs with CTF.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for averages, montage and tables.")],
    n_classes: Annotated[int, typer.Option("--classes", min=1, help="Number of classes.")] = 50,
    seed_map: Annotated[
        Path | None, typer.Option("--map", help="Start from projections of this map (MRC).")
    ] = None,
    features: Annotated[
        Path | None,
        typer.Option(
            help="Start from clusters of features: the .npz of `icestream score`; gives scores too."
        ),
    ] = None,
    resolution: Annotated[
        float, typer.Option("--resolution-angstrom", help="Finest wave used for alignment, in Å.")
    ] = 10.0,
    mask_diameter: Annotated[
        float | None, typer.Option("--mask-diameter-angstrom", help="Diameter of the circular mask in Å.")
    ] = None,
    root: Annotated[
        Path | None, typer.Option(help="Folder that image paths are relative to; the file's own by default.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of every draw.")] = 0,
    max_box: Annotated[
        int, typer.Option("--max-box-px", min=24, help="Larger images are reduced to this.")
    ] = 96,
    as_json: AsJson = False,
) -> None:
    """Classify the particles of a table and print one line per class."""
    import torch

    from actors.engines.base import EngineInput
    from actors.engines.class_run import run_classification

    if not resolution > 0:
        raise ConfigurationError("--resolution-angstrom", "is positive", resolution)
    # One worker, one thread: spin-waiting threads halve the throughput of a shared machine.
    torch.set_num_threads(1)

    def show(step: ClassificationProgress) -> None:
        if step.iteration % 4 == 0 or step.iteration == step.n_iterations:
            console.print(
                f"iteration {step.iteration}/{step.n_iterations}: {step.n_occupied} classes with members",
                highlight=False,
            )

    run = run_classification(
        EngineInput(particles_star=particles, root=particles.absolute().parent if root is None else root),
        out,
        n_classes=n_classes,
        seed=seed,
        max_box_px=max_box,
        mask_diameter_angstrom=mask_diameter,
        resolution_angstrom=resolution,
        seed_map=seed_map,
        features=features,
        on_progress=show,
    )
    document: dict[str, Any] = {
        "classes": list(run.rows),
        "particles": run.n_particles,
        "excluded": run.n_excluded,
        "averages": run.averages,
        "montage": run.montage,
        "classes_star": run.classes_star,
        "particles_star": run.particles_star,
        "seconds": run.seconds,
    }
    if as_json:
        print_json(document)
        return
    for row in run.rows:
        if row["particles"]:
            limit = row["resolution_angstrom"]
            score = row["mean_score"]
            typer.echo(
                f"class {row['class']:3d}  {row['particles']:6d} particles  "
                + ("   none" if limit is None else f"{limit:5.1f} Å")
                + ("" if score is None else f"  score {score:.2f}")
            )
    typer.echo(f"montage: {run.montage}")
