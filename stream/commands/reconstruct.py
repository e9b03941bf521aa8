"""`icestream reconstruct`: particles to initial model, refined map and diagnostics, with the chosen engine."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from stream.commands.common import AsJson, console, print_json

HELP = """Reconstruct a map from particles: initial model, gold-standard refinement, orientation diagnostics.

Half sets are taken from rlnRandomSubset where the file has it and assigned per micrograph otherwise. Particles that do
not determine a map (noise, featureless blobs) are refused before anything is built on them: exit code 1.

Example: icestream reconstruct particles.star --out run --symmetry D2 --mask-diameter-angstrom 200
"""


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("reconstruct", help=HELP)(reconstruct)


def reconstruct(
    particles: Annotated[Path, typer.Argument(help="Particles: .star or .cs with CTF.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for map, half maps, FSC, poses and pictures.")],
    engine: Annotated[str, typer.Option(help="Engine.")] = "embedded",
    symmetry: Annotated[str, typer.Option(help="Point group: C1, Cn, Dn, T, O or I.")] = "C1",
    initial: Annotated[
        Path | None, typer.Option(help="Start from this map (MRC) instead of from nothing.")
    ] = None,
    poses: Annotated[Path | None, typer.Option(help="Poses of an earlier run (with --initial).")] = None,
    mask_diameter: Annotated[
        float | None, typer.Option("--mask-diameter-angstrom", help="Diameter of the spherical mask in Å.")
    ] = None,
    mask: Annotated[
        Path | None, typer.Option(help="Solvent mask (MRC, 0 to 1, the particles' box) instead of our own.")
    ] = None,
    refine_defocus: Annotated[
        bool, typer.Option("--refine-defocus", help="Search every particle's defocus around the given one.")
    ] = False,
    clusters: Annotated[
        Path | None, typer.Option(help="Feature clusters by uid (.npz: uids, labels): writes unions.json.")
    ] = None,
    root: Annotated[
        Path | None, typer.Option(help="Folder that image paths are relative to; the file's own by default.")
    ] = None,
    n_starts: Annotated[
        int, typer.Option("--starts", min=1, help="Independent starts of the initial model.")
    ] = 4,
    effort: Annotated[str, typer.Option(help="quick, normal or thorough.")] = "normal",
    threads: Annotated[int, typer.Option(min=1, help="Threads; starts and halves run side by side.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of every draw.")] = 0,
    max_box: Annotated[
        int, typer.Option("--max-box-px", min=24, help="Larger images are reduced to this.")
    ] = 96,
    as_json: AsJson = False,
) -> None:
    """Run the engine from particles to diagnostics and print the result."""
    from actors.engines.base import EngineInput, EngineProgress, EngineSettings, SeedRefused
    from actors.engines.session_run import make_engine
    from stream.records.errors import ConfigurationError

    if effort not in ("quick", "normal", "thorough"):
        raise ConfigurationError("--effort", "effort is quick, normal or thorough", effort)
    if poses is not None and initial is None:
        raise ConfigurationError("--poses", "poses need the map they belong to (--initial)")
    settings = EngineSettings(
        symmetry=symmetry,
        mask_diameter_angstrom=mask_diameter,
        n_threads=threads,
        seed=seed,
        n_starts=n_starts,
        effort=effort,  # type: ignore[arg-type]
        max_box_px=max_box,
        mask=mask,
        refine_defocus=refine_defocus,
    )
    source = EngineInput(
        particles_star=particles,
        root=particles.absolute().parent if root is None else root,
        clusters=clusters,
        clustering=None if clusters is None else clusters.stem,
    )
    out.mkdir(parents=True, exist_ok=True)

    def show(step: EngineProgress) -> None:
        if step.iteration % 10 == 0 or step.phase == "refine":
            console.print(step.text, highlight=False)

    chosen = make_engine(engine)
    started = time.monotonic()
    seconds: dict[str, float] = {}
    start_map = initial
    if start_map is None:
        try:
            start_map = chosen.initial_model(source, settings, out, progress=show)
        except SeedRefused as refusal:
            if as_json:
                print_json({"resolution_angstrom": None, "is_refused": True, "note": refusal.rule})
            raise
        seconds["initial_model"] = round(time.monotonic() - started, 3)
    output = chosen.refine(source, start_map, settings, out, warm_start_poses=poses, progress=show)
    seconds |= dict(output.seconds)
    seconds["total"] = round(time.monotonic() - started, 3)
    document: dict[str, Any] = {
        "resolution_angstrom": output.resolution_angstrom,
        "cfar": output.cfar,
        "cfar_null": output.cfar_null,
        "scf_star": output.scf_star,
        "fsc_curve": _read_fsc(output.fsc_star),
        "map": output.map,
        "half1": output.half1,
        "half2": output.half2,
        "mask": output.mask,
        "poses_star": output.poses_star,
        "particles": output.n_particles,
        "excluded": output.n_excluded,
        "note": output.note,
        "seconds": seconds,
    }
    if as_json:
        print_json(document)
        return
    resolution = "none" if output.resolution_angstrom is None else f"{output.resolution_angstrom:.2f} Å"
    sys.stdout.write(f"resolution (FSC 0.143): {resolution}\n")
    sys.stdout.write(f"cFAR: {_number(output.cfar)} (isotropic: {_number(output.cfar_null)})  ")
    sys.stdout.write(f"SCF*: {_number(output.scf_star)}\n")
    sys.stdout.write(f"particles: {output.n_particles} ({output.n_excluded} left out)\n")
    sys.stdout.write(f"map: {output.map}\nnote: {output.note}\nseconds: {seconds['total']:.1f}\n")


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"


def _read_fsc(path: Path) -> dict[str, list[float]]:
    import starfile

    table = starfile.read(path)
    return {
        "frequency_per_angstrom": table["rlnResolution"].tolist(),
        "fsc": table["rlnFourierShellCorrelationCorrected"].tolist(),
    }
