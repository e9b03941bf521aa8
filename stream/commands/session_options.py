"""The options that `run` and `reprocess` share, and how they become settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from stream.config import SessionSettings, load_settings, parse_settings
from stream.records.errors import ConfigurationError

SessionFile = Annotated[Path | None, typer.Argument(help="A session's YAML; instead of the options below.")]
Movies = Annotated[Path | None, typer.Option(help="Folder that movies land in.")]
Micrographs = Annotated[Path | None, typer.Option(help="Folder with aligned micrographs (MRC).")]
Particles = Annotated[Path | None, typer.Option(help="Particle stack (.star, .cs or .mrcs).")]
Out = Annotated[Path | None, typer.Option(help="Output folder; the same folder again resumes.")]
PixelSizeOption = Annotated[float | None, typer.Option("--pixel-size-angstrom", help="Of the input, Å.")]
VoltageOption = Annotated[float | None, typer.Option("--voltage-kv", help="kV.")]
CsOption = Annotated[float | None, typer.Option("--cs-mm", help="Spherical aberration, mm.")]
ContrastOption = Annotated[float, typer.Option("--amplitude-contrast", help="A fraction.")]
DoseOption = Annotated[float | None, typer.Option("--dose-e-per-angstrom2", help="Total dose, e/Å².")]
GainOption = Annotated[Path | None, typer.Option("--gain", help="Gain reference (MRC or TIFF).")]
DiameterOption = Annotated[float | None, typer.Option("--particle-diameter-angstrom", help="Å.")]
SymmetryOption = Annotated[str | None, typer.Option("--symmetry", help="C1, Cn, Dn, T, O or I.")]
ModelOption = Annotated[
    Path | None, typer.Option("--model", help="ONNX CryoRanker; default: the shipped one.")
]
RayAddressOption = Annotated[str | None, typer.Option("--ray-address", help="Join this Ray cluster.")]
PortOption = Annotated[
    int | None, typer.Option("--metrics-port", help="Prometheus port; 0 = any, -1 = none.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Any other setting, as SECTION.KEY=VALUE (repeatable)."),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionOptions:
    """What was given on the command line; None = not given."""

    session: Path | None
    inputs: Mapping[str, Path | None]
    out: Path | None
    pixel_size_angstrom: float | None
    voltage_kv: float | None
    cs_mm: float | None
    amplitude_contrast: float
    dose_e_per_angstrom2: float | None
    gain: Path | None
    particle_diameter_angstrom: float | None
    symmetry: str | None
    model: Path | None
    ray_address: str | None
    metrics_port: int | None
    assignments: tuple[str, ...]


def build_settings(options: SessionOptions) -> SessionSettings:
    """Return the session's settings from its YAML or from options.

    Raises `ConfigurationError` when both or neither are given, or when a value breaks its rule.
    """
    if options.session is not None:
        if options.out is not None or any(options.inputs.values()):
            raise ConfigurationError(
                options.session, "a session file says input and output; give no options for them"
            )
        return load_settings(options.session)
    if options.out is None:
        raise ConfigurationError("icestream", "a session file, or an input and --out, must be given")
    document: dict[str, Any] = {
        **{key: path.absolute() for key, path in options.inputs.items() if path is not None},
        "out": options.out.absolute(),
        "microscope": _given(
            voltage_kv=options.voltage_kv, cs_mm=options.cs_mm, amplitude_contrast=options.amplitude_contrast
        ),
        "acquisition": _given(
            pixel_size_angstrom=options.pixel_size_angstrom,
            dose_e_per_angstrom2=options.dose_e_per_angstrom2,
            gain=None if options.gain is None else options.gain.absolute(),
        ),
        "particle": _given(diameter_angstrom=options.particle_diameter_angstrom),
        "engine": _given(symmetry=options.symmetry),
        "ranker": _given(model=None if options.model is None else options.model.absolute()),
        "runtime": _given(ray_address=options.ray_address),
    }
    if options.metrics_port is not None:
        document["telemetry"] = {"port": None if options.metrics_port < 0 else options.metrics_port}
    for assignment in options.assignments:
        _assign(document, assignment)
    return parse_settings(document, item="command line")


def _given(**values: Any) -> dict[str, Any]:  # noqa: ANN401 - values of settings have no narrower type
    return {key: value for key, value in values.items() if value is not None}


def _assign(document: dict[str, Any], assignment: str) -> None:
    import yaml

    path, separator, text = assignment.partition("=")
    section, dot, key = path.partition(".")
    if not (separator and dot and key):
        raise ConfigurationError("--set", "a setting is SECTION.KEY=VALUE", assignment)
    document.setdefault(section, {})[key] = yaml.safe_load(text)
