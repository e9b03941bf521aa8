"""`icestream demo`: a virtual microscope writes movies while the live service turns them into a map."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stream.commands.common import AsJson, console, print_json
from stream.config import SessionSettings, parse_settings
from stream.records.errors import ConfigurationError, ResourceError
from stream.records.events import ExposureFound, ExposureRanked

if TYPE_CHECKING:
    from torch import Tensor

# A session that two cores can follow within a quarter of an hour; everything else is as at a microscope.
MOVIE_SIZE_PX = 1024
N_FRAMES = 16
PIXEL_SIZE_ANGSTROM = 1.5
DOSE_E_PER_ANGSTROM2 = 40.0
VOLTAGE_KV = 300.0
CS_MM = 2.7
PARTICLES_PER_MOVIE = 70
DIAMETER_ANGSTROM = 150.0
EXTRACT_BOX_PX = 64
EXTRACT_PIXEL_SIZE_ANGSTROM = 3.0
MOVIES_PER_HOUR = 900.0
PREFERRED_FRACTION = 0.95


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        "demo",
        help="Watch a virtual microscope's movies become a map, on this machine, in minutes.\n\n"
        "Example: icestream demo --out demo-out --movies 40 --seed 1",
    )(demo)


def demo(
    out: Annotated[Path, typer.Option(help="Folder for movies, truth and results; must be new or a demo's.")],
    movies: Annotated[int, typer.Option(min=2, help="How many movies.")] = 40,
    seed: Annotated[int, typer.Option(help="Same seed, same movies.")] = 1,
    preferred_orientation: Annotated[
        bool, typer.Option("--preferred-orientation", help="Most particles lie on one face.")
    ] = False,
    metrics_port: Annotated[int, typer.Option(help="Prometheus port; 0 = any free, -1 = none.")] = 9464,
    as_json: AsJson = False,
) -> None:
    """Run the demo."""
    from stream.commands.narration import Narrator
    from stream.commands.status import print_status
    from stream.telemetry.logs import configure_logging
    from stream.wiring import run_session

    configure_logging(level="warning")

    started = time.monotonic()
    microscope, session = out / "microscope", out / "session"
    _prepare(out, microscope, session)
    simulator = subprocess.Popen(
        _simulate_command(microscope, movies, seed, preferred_orientation=preferred_orientation),
        stdout=subprocess.DEVNULL,
    )
    try:
        _wait_for_gain(microscope, simulator)
        settings = _settings(microscope, session, metrics_port)
        narrator = Narrator(console, settings.ranker.score_threshold)
        status = run_session(
            settings,
            until_idle=True,
            has_input_ended=lambda: simulator.poll() is not None,
            on_event=narrator.tell,
            on_step=narrator.follow,
        )
    finally:
        if simulator.poll() is None:
            simulator.terminate()
        simulator.wait()
    if simulator.returncode:
        raise ResourceError(
            "microscope", "the virtual microscope ends well", f"exit code {simulator.returncode}"
        )
    document = _report(status, session, microscope, time.monotonic() - started)
    if as_json:
        print_json(document)
        return
    print_status(status)
    _print_summary(document, session)


def _prepare(out: Path, microscope: Path, session: Path) -> None:
    is_demo = microscope.is_dir() and session.is_dir()
    if out.exists() and any(out.iterdir()) and not is_demo:
        raise ConfigurationError(out, "the demo's folder is new, empty, or an earlier demo's")
    for folder in (microscope, session):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    (microscope / "movies").mkdir()


def _simulate_command(out: Path, movies: int, seed: int, *, preferred_orientation: bool) -> list[str]:
    command = [sys.executable, "-m", "stream", "simulate", "--out", str(out), "--movies", str(movies)]
    command += [
        "--structure",
        f"phantom:{seed}:mass_kda=400",
        "--seed",
        str(seed),
        "--rate",
        str(MOVIES_PER_HOUR),
    ]
    command += ["--size-px", str(MOVIE_SIZE_PX), "--frames", str(N_FRAMES)]
    command += ["--pixel-size-angstrom", str(PIXEL_SIZE_ANGSTROM), "--voltage-kv", str(VOLTAGE_KV)]
    command += ["--dose-e-per-angstrom2", str(DOSE_E_PER_ANGSTROM2)]
    command += ["--particles-per-movie", str(PARTICLES_PER_MOVIE)]
    return command + (["--preferred-orientation", str(PREFERRED_FRACTION)] if preferred_orientation else [])


def _wait_for_gain(microscope: Path, simulator: subprocess.Popen[bytes]) -> None:
    """Wait until the microscope has written its gain reference: a session is configured with it."""
    while not (microscope / "gain.mrc").is_file():
        if simulator.poll() is not None:
            raise ResourceError(
                "microscope", "the virtual microscope writes a gain", f"exit code {simulator.returncode}"
            )
        time.sleep(0.2)


def _settings(microscope: Path, session: Path, metrics_port: int) -> SessionSettings:
    document: dict[str, Any] = {
        "movies": (microscope / "movies").absolute(),
        "out": session.absolute(),
        "microscope": {"voltage_kv": VOLTAGE_KV, "cs_mm": CS_MM, "amplitude_contrast": 0.1},
        "acquisition": {
            "pixel_size_angstrom": PIXEL_SIZE_ANGSTROM,
            "dose_e_per_angstrom2": DOSE_E_PER_ANGSTROM2,
            "gain": (microscope / "gain.mrc").absolute(),
        },
        "ingest": {"settle_s": 1.0, "poll_interval_s": 1.0},
        "particle": {
            "diameter_angstrom": DIAMETER_ANGSTROM,
            "box_size_px": EXTRACT_BOX_PX,
            "extract_pixel_size_angstrom": EXTRACT_PIXEL_SIZE_ANGSTROM,
        },
        "policy": {"rungs": [500], "growth_factor": 2.0},
        "runtime": {"min_free_disk_bytes": 2**29},
        "telemetry": {"port": None if metrics_port < 0 else metrics_port},
    }
    return parse_settings(document, item="demo")


def _report(status: dict[str, Any], session: Path, microscope: Path, wall_s: float) -> dict[str, Any]:
    latencies = measure_latencies(session)
    truth = None
    if status["accepted_run"] is not None:
        truth = measure_truth_resolution(
            session / "runs" / status["accepted_run"], microscope / "truth" / "map.mrc"
        )
    return {
        "movies": status["movies"]["found"],
        "particles": status["particles"]["scored"],
        "accepted_particles": status["particles"]["above_threshold"],
        "resolution_angstrom": status["resolution_angstrom"],
        "cfar": status["cfar"],
        "truth_resolution_angstrom": truth,
        "latency_p50_s": _quantile(latencies, 0.5),
        "latency_p95_s": _quantile(latencies, 0.95),
        "wall_s": wall_s,
        "states": {k: v for k, v in status["movies"].items() if k != "found"},
        "balanced": status["balanced"],
    }


def measure_latencies(session: Path) -> list[float]:
    """Return, for each movie, the seconds from its last write to its particles' scores in the cache."""
    from stream.store.journal import read_journal

    landed: dict[str, float] = {}
    latencies = []
    for event in read_journal(session / "journal.sqlite"):
        if isinstance(event, ExposureFound):
            landed[event.exposure.exposure_id] = event.exposure.file.mtime_ns / 1e9
        elif isinstance(event, ExposureRanked):
            latencies.append(event.at - landed[event.result.exposure_id])
    return latencies


def measure_truth_resolution(run: Path, truth: Path) -> float | None:
    """Return where the FSC of a run's map with the aligned true density falls to 0.5, in Å.

    0.5 against a noiseless truth corresponds to 0.143 between two half maps (Rosenthal & Henderson 2003).
    """
    resolution, _ = compare_with_truth(run, truth)
    return resolution


def compare_with_truth(run: Path, truth: Path) -> tuple[float | None, Tensor]:
    """Return the resolution at FSC 0.5 of a run's masked map with the aligned true density, and the curve."""
    import mrcfile
    import torch

    from models.fourier.volumes import resample_volume
    from models.reconstruction.alignment import align_volumes, apply_alignment, truth_resolution

    with mrcfile.open(run / "map.mrc") as handle:
        volume = torch.from_numpy(handle.data.astype("float32"))
        pixel = float(handle.voxel_size.x)
    with mrcfile.open(run / "mask.mrc") as handle:
        mask = torch.from_numpy(handle.data.astype("float32"))
    with mrcfile.open(truth) as handle:
        density = torch.from_numpy(handle.data.astype("float32"))
        truth_pixel = float(handle.voxel_size.x)
    reference = resample_volume(density, truth_pixel, pixel, int(volume.shape[0]))
    alignment = align_volumes(reference, volume, pixel, generator=torch.Generator().manual_seed(0))
    aligned = apply_alignment(reference, alignment)
    return truth_resolution(volume, aligned, pixel, mask)


def _quantile(values: Sequence[float], q: float) -> float | None:
    if not values:
        return None
    return median(values) if q == 0.5 else sorted(values)[min(len(values) - 1, int(q * len(values)))]


def _print_summary(document: dict[str, Any], session: Path) -> None:
    def shown(value: float | None, unit: str) -> str:
        return "-" if value is None else f"{value:.2f} {unit}"

    typer.echo(
        f"demo       {document['movies']} movies → {document['particles']} particles → "
        f"{shown(document['resolution_angstrom'], 'Å')} (half maps), "
        f"{shown(document['truth_resolution_angstrom'], 'Å')} (against the truth)"
    )
    typer.echo(
        f"latency    landing to score: median {shown(document['latency_p50_s'], 's')}, "
        f"95 % within {shown(document['latency_p95_s'], 's')}; {document['wall_s'] / 60:.1f} min in all"
    )
    typer.echo(f"look at    {session}/runs/*/map.png, {session}/micrographs/*.png, {session}/export/")
    typer.echo(f"report     {session}/report.html")
