"""`icestream generate`: annotated synthetic micrographs that look like a session's."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stream.commands.common import AsJson, console, print_json


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("generate")(generate)


def generate(
    config: Annotated[Path, typer.Argument(help="Configuration: training, out, n_micrographs, controls, …")],
    as_json: AsJson = False,
) -> None:
    """Generate micrographs with CryoGEM, with masks, particle stacks, poses and CTFs.

    Annotations are in RELION's, Topaz's and cryoDRGN's formats. The same seed gives the same bytes for any number of workers. models/cryogem/README.md lists the keys.

    Example: icestream generate models/cryogem/generate.yaml
    """
    from actors.cryogem.config import read_generate_config
    from actors.cryogem.generation import generate_micrographs

    settings = read_generate_config(config)
    with console.status("generating") as status:
        result = generate_micrographs(
            settings, on_progress=lambda done, total: status.update(f"{done} of {total} micrographs")
        )
    document = {
        "micrographs": [str(path) for path in result.micrographs],
        "annotations": str(result.annotations),
        "particles": result.n_particles,
        "border": result.n_border,
        "overlapping": result.n_overlapping,
    }
    if as_json:
        print_json(document)
    else:
        typer.echo(
            f"{len(result.micrographs)} micrographs, {result.n_particles} particles ({result.n_border} at the border,"
            f" {result.n_overlapping} overlapping): {result.annotations}"
        )
