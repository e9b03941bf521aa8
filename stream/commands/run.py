"""`icestream run` and `icestream reprocess`: the live service, and the same stages offline."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from stream.commands import session_options as o
from stream.commands.common import AsJson, console, print_json
from stream.config import SessionSettings

if TYPE_CHECKING:
    from stream.commands.narration import EventLog, Narrator


class LogFormat(StrEnum):
    """Who reads stderr."""

    TEXT = "text"
    JSON = "json"


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command(
        "run",
        help="Run the live service on a folder. Ctrl-C drains; the same command again resumes.\n\n"
        "Example: icestream run --movies /data/movies --out /data/session --pixel-size-angstrom 0.885 "
        "--voltage-kv 200 --cs-mm 1.4 --dose-e-per-angstrom2 31 --gain /data/gain.mrc "
        "--particle-diameter-angstrom 180",
    )(run)
    app.command(
        "reprocess",
        help="Process what is in a folder and end when everything has an outcome.\n\n"
        "Example: icestream reprocess --particles particles.star --out again --pixel-size-angstrom 3.54 "
        "--voltage-kv 200 --cs-mm 1.4 --symmetry D2",
    )(with_defaults(run, until_idle=True, metrics_port=-1))


def run(
    session: o.SessionFile = None,
    movies: o.Movies = None,
    micrographs: o.Micrographs = None,
    particles: o.Particles = None,
    out: o.Out = None,
    pixel_size_angstrom: o.PixelSizeOption = None,
    voltage_kv: o.VoltageOption = None,
    cs_mm: o.CsOption = None,
    amplitude_contrast: o.ContrastOption = 0.1,
    dose_e_per_angstrom2: o.DoseOption = None,
    gain: o.GainOption = None,
    particle_diameter_angstrom: o.DiameterOption = None,
    symmetry: o.SymmetryOption = None,
    model: o.ModelOption = None,
    ray_address: o.RayAddressOption = None,
    metrics_port: o.PortOption = None,
    assignments: o.SetOption = None,
    until_idle: Annotated[
        bool,
        typer.Option("--until-idle", help="End when every file has an outcome and the last run is over."),
    ] = False,
    in_process: Annotated[
        bool, typer.Option("--in-process", help="No Ray: one thing after the other, for debugging.")
    ] = False,
    log_format: Annotated[
        LogFormat, typer.Option(help="What stderr gets: words for a person, or one JSON document per line.")
    ] = LogFormat.TEXT,
    as_json: AsJson = False,
) -> None:
    """Run the live service."""
    options = o.SessionOptions(
        session=session,
        inputs={"movies": movies, "micrographs": micrographs, "particles": particles},
        out=out,
        pixel_size_angstrom=pixel_size_angstrom,
        voltage_kv=voltage_kv,
        cs_mm=cs_mm,
        amplitude_contrast=amplitude_contrast,
        dose_e_per_angstrom2=dose_e_per_angstrom2,
        gain=gain,
        particle_diameter_angstrom=particle_diameter_angstrom,
        symmetry=symmetry,
        model=model,
        ray_address=ray_address,
        metrics_port=metrics_port,
        assignments=tuple(assignments or ()),
    )
    settings = o.build_settings(options)
    teller = set_up_logging(settings, log_format)
    run_settings(settings, teller, until_idle=until_idle, in_process=in_process, as_json=as_json)


def with_defaults(command: Callable[..., None], **defaults: object) -> Callable[..., None]:
    """Return the same command with other defaults, for a second name with the same options."""
    signature = inspect.signature(command, eval_str=True)
    changed = [p.replace(default=defaults.get(p.name, p.default)) for p in signature.parameters.values()]

    @functools.wraps(command)
    def renamed(**given: object) -> None:
        command(**given)

    renamed.__signature__ = signature.replace(parameters=changed)  # type: ignore[attr-defined]
    return renamed


def set_up_logging(settings: SessionSettings, log_format: LogFormat) -> Narrator | EventLog:
    """Send logs to stderr and return what tells of events: to a person beside warnings, or as log lines."""
    from stream.commands.narration import EventLog, Narrator
    from stream.telemetry.logs import configure_logging

    secrets = (os.environ.get("ICESTREAM_METRICS_TOKEN", ""),)
    if log_format is LogFormat.JSON:
        configure_logging(level="info", as_json=True, secrets=secrets)
        return EventLog()
    configure_logging(level="warning", secrets=secrets)
    return Narrator(console, settings.ranker.score_threshold)


def run_settings(
    settings: SessionSettings,
    teller: Narrator | EventLog,
    *,
    until_idle: bool,
    in_process: bool,
    as_json: bool,
) -> None:
    """Run a session that `teller` tells of on stderr, and print its status at the end on stdout."""
    from stream.commands.status import print_status
    from stream.wiring import run_session

    status = run_session(
        settings,
        until_idle=until_idle,
        in_process=in_process,
        on_event=teller.tell,
        on_step=teller.follow,
    )
    if as_json:
        print_json(status)
    else:
        print_status(status)
