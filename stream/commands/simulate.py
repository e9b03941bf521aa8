"""`icestream simulate`: the virtual microscope writes a session to disk.

`write_simulated_session(settings, ...)` is the same for callers in a thread or another process; it stops
between movies when `stop` says so.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stream.commands.common import AsJson, console, print_json
from stream.records.errors import ConfigurationError

if TYPE_CHECKING:
    from models.simulation.exposure import SimulatedExposure, VirtualMicroscope
    from models.simulation.settings import SessionSettings
    from stream.ingest.movie_writers import Frame
    from stream.ingest.simulator import SessionFiles
    from stream.ingest.simulator_truth import JunkRow, MotionTruth, ParticleTruth


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationSettings:
    """Everything that `icestream simulate` is told; defocus positive = underfocus."""

    movies: int
    structure: str = "phantom:1"
    movie_format: str = "tiff"
    rate_per_hour: float | None = None
    frames: int = 16
    size_yx_px: tuple[int, int] = (1024, 1024)
    pixel_size_angstrom: float = 1.5
    dose_e_per_angstrom2: float = 40.0
    voltage_kv: float = 300.0
    cs_mm: float = 2.7
    amplitude_contrast: float = 0.1
    defocus_um: tuple[float, float] = (0.8, 2.2)
    particles_per_movie: float = 60.0
    preferred_orientation: float = 0.0
    junk_fraction: float = 0.05
    motion_angstrom: float = 10.0
    contrast: float = 1.0
    slow_writer_s: float = 0.0
    has_gain: bool = True
    seed: int = 0
    threads: int = 1


def session_settings(settings: SimulationSettings) -> SessionSettings:
    """Return the physics' settings; a value out of range is a ConfigurationError."""
    from models.simulation.settings import MicroscopeSettings, SessionSettings, SpecimenSettings

    try:
        return SessionSettings(
            specimen=SpecimenSettings(
                particles_per_exposure=settings.particles_per_movie,
                junk_fraction=settings.junk_fraction,
                preferred_fraction=settings.preferred_orientation,
                contrast=settings.contrast,
            ),
            microscope=MicroscopeSettings(
                shape_yx_px=settings.size_yx_px,
                pixel_size_angstrom=settings.pixel_size_angstrom,
                voltage_kv=settings.voltage_kv,
                cs_mm=settings.cs_mm,
                amplitude_contrast=settings.amplitude_contrast,
                dose_e_per_angstrom2=settings.dose_e_per_angstrom2,
                n_frames=settings.frames,
                defocus_um=settings.defocus_um,
                motion_angstrom=settings.motion_angstrom,
                has_gain=settings.has_gain,
            ),
            seed=settings.seed,
        )
    except ValueError as error:
        raise ConfigurationError("simulate", str(error)) from error


def build_microscope(settings: SimulationSettings) -> VirtualMicroscope:
    """Return the virtual microscope; an unreadable structure is a ConfigurationError."""
    import torch

    from models.simulation.session import build_microscope as build

    torch.set_num_threads(settings.threads)
    try:
        return build(settings.structure, session_settings(settings))
    except ValueError as error:
        raise ConfigurationError("simulate", str(error)) from error


def write_simulated_session(
    settings: SimulationSettings,
    out: Path,
    *,
    progress: Callable[[int, Path], None] | None = None,
    stop: threading.Event | None = None,
) -> SessionFiles:
    """Write the whole session to `out`; return its files. `progress(n, path)` follows each movie."""
    from stream.ingest.movie_writers import MovieFormat
    from stream.ingest.simulator import Clock, WriterSettings, write_session
    from stream.ingest.simulator_truth import OpticsTruth

    try:
        movie_format = MovieFormat(settings.movie_format)
    except ValueError as error:
        raise ConfigurationError("--format", "must be tiff, eer or mrc", settings.movie_format) from error
    if settings.movies < 0:
        raise ConfigurationError("--movies", "must not be negative", settings.movies)
    microscope = build_microscope(settings)
    physics = microscope.settings.microscope
    stopping = stop or threading.Event()
    dose_per_px = physics.dose_per_frame_e_per_angstrom2 * physics.pixel_size_angstrom**2
    writer = WriterSettings(
        out=out,
        optics=OpticsTruth(
            pixel_size_angstrom=physics.pixel_size_angstrom,
            voltage_kv=physics.voltage_kv,
            cs_mm=physics.cs_mm,
            amplitude_contrast=physics.amplitude_contrast,
            dose_per_frame_e_per_angstrom2=physics.dose_per_frame_e_per_angstrom2,
        ),
        n_frames=physics.n_frames,
        movie_format=movie_format,
        rate_per_hour=settings.rate_per_hour,
        slow_writer_s=settings.slow_writer_s,
        # About 0.1 electrons per pixel and EER frame: few coincidences, as fast cameras are run.
        eer_sub_frames=max(8, round(dose_per_px / 0.1)),
    )
    return write_session(
        _exposures(microscope, settings.movies),
        writer,
        gain=microscope.gain if physics.has_gain else None,
        volume=microscope.truth_volume.numpy(),
        clock=Clock(now=time.monotonic, wait=stopping.wait),
        progress=progress or (lambda _count, _path: None),
    )


def exposure_name(index: int) -> str:
    """Return an EPU-like stem: `FoilHole_000012_Data_000`."""
    return f"FoilHole_{index // 4:06d}_Data_{index % 4:03d}"


def _exposures(microscope: VirtualMicroscope, n_movies: int) -> Iterator[_WrittenExposure]:
    for index in range(n_movies):
        yield _WrittenExposure(microscope.expose(index), microscope.settings.seed)


class _WrittenExposure:
    """A simulated exposure in the shape that the writer takes."""

    def __init__(self, exposure: SimulatedExposure, seed: int) -> None:
        self._exposure = exposure
        self.name = exposure_name(exposure.truth.index)
        self.seed = seed * 1_000_003 + exposure.truth.index
        ctf = exposure.truth.ctf
        self.defocus_um = 0.5e-4 * (ctf.defocus_u_angstrom + ctf.defocus_v_angstrom)
        # Four holes per stage position: four beam-shift groups.
        corner = exposure.truth.index % 4
        self.beam_shift_xy = (0.05 * (1 - 2 * (corner % 2)), 0.05 * (1 - 2 * (corner // 2)))

    def frames(self) -> Iterator[Frame]:
        return self._exposure.frames()

    def particles(self) -> list[ParticleTruth]:
        from stream.ingest.simulator_truth import ParticleTruth

        truth = self._exposure.truth
        return [
            ParticleTruth(
                exposure_name=self.name,
                coordinate_yx_px=(float(y), float(x)),
                euler_deg=(float(rot), float(tilt), float(psi)),
                defocus_u_angstrom=float(u),
                defocus_v_angstrom=float(v),
                astigmatism_angle_deg=truth.astigmatism_angle_deg,
                phase_shift_deg=truth.phase_shift_deg,
            )
            for (y, x), (rot, tilt, psi), u, v in zip(
                truth.coordinates_yx_px,
                truth.euler_deg,
                truth.defocus_u_angstrom,
                truth.defocus_v_angstrom,
                strict=True,
            )
        ]

    def junk(self) -> list[JunkRow]:
        from stream.ingest.simulator_truth import JunkRow

        return [
            JunkRow(
                exposure_name=self.name,
                label=item.kind.value,
                coordinate_yx_px=(item.y_px, item.x_px),
                radius_px=item.radius_px,
                angle_deg=item.angle_deg,
            )
            for item in self._exposure.truth.junk
        ]

    def motion(self) -> MotionTruth:
        import numpy as np

        from stream.ingest.simulator_truth import MotionTruth

        motion = self._exposure.truth.motion
        height, width = motion.shape_yx_px
        points = np.array(
            [((i + 0.5) / 5 * height, (j + 0.5) / 5 * width) for i in range(5) for j in range(5)]
        )
        return MotionTruth(
            shape_yx_px=motion.shape_yx_px,
            global_yx_px=motion.global_yx_px,
            points_yx_px=points,
            local_yx_px=motion.local_yx_px(points[:, 0], points[:, 1]),
        )


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("simulate")(simulate)


def simulate(
    out: Annotated[Path, typer.Option("--out", help="Folder to write movies/, gain.mrc and truth/ to.")],
    movies: Annotated[int, typer.Option("--movies", help="Number of movies.")],
    structure: Annotated[
        str,
        typer.Option(help="phantom:SEED[:mass_kda=M][:symmetry=S], or a .pdb/.cif/.mrc file (also .gz)."),
    ] = "phantom:1",
    movie_format: Annotated[str, typer.Option("--format", help="tiff, eer or mrc.")] = "tiff",
    rate: Annotated[float | None, typer.Option("--rate", help="Movies per hour; none = at once.")] = None,
    frames: Annotated[int, typer.Option("--frames", help="Frames per movie.")] = 16,
    size_px: Annotated[str, typer.Option("--size-px", help="N or HEIGHT,WIDTH.")] = "1024",
    pixel_size_angstrom: Annotated[float, typer.Option("--pixel-size-angstrom", help="In Å.")] = 1.5,
    dose_e_per_angstrom2: Annotated[
        float, typer.Option("--dose-e-per-angstrom2", help="Of the whole movie.")
    ] = 40.0,
    voltage_kv: Annotated[float, typer.Option("--voltage-kv", help="In kV.")] = 300.0,
    cs_mm: Annotated[float, typer.Option("--cs-mm", help="Spherical aberration in mm.")] = 2.7,
    defocus_um: Annotated[str, typer.Option("--defocus-um", help="MIN,MAX underfocus in µm.")] = "0.8,2.2",
    particles_per_movie: Annotated[
        float, typer.Option("--particles-per-movie", help="Mean; fewer where there is no room.")
    ] = 60.0,
    preferred_orientation: Annotated[
        float, typer.Option("--preferred-orientation", help="Fraction of particles in preferred views, 0-1.")
    ] = 0.0,
    junk_fraction: Annotated[
        float, typer.Option("--junk-fraction", help="Junk objects per particle, 0-1.")
    ] = 0.05,
    slow_writer_s: Annotated[
        float, typer.Option("--slow-writer-s", help="Let each movie grow for this long.")
    ] = 0.0,
    seed: Annotated[int, typer.Option("--seed", help="Start of every draw; same seed, same bytes.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Write movies, gain reference, EPU XML as a microscope would, and the truth beside.

    Example: icestream simulate --out session --structure phantom:7:mass_kda=400:symmetry=D2 --movies 20 --rate 300
    """
    settings = SimulationSettings(
        movies=movies,
        structure=structure,
        movie_format=movie_format,
        rate_per_hour=rate,
        frames=frames,
        size_yx_px=_parse_size(size_px),
        pixel_size_angstrom=pixel_size_angstrom,
        dose_e_per_angstrom2=dose_e_per_angstrom2,
        voltage_kv=voltage_kv,
        cs_mm=cs_mm,
        defocus_um=_parse_pair("--defocus-um", defocus_um),
        particles_per_movie=particles_per_movie,
        preferred_orientation=preferred_orientation,
        junk_fraction=junk_fraction,
        slow_writer_s=slow_writer_s,
        seed=seed,
    )
    files = write_simulated_session(
        settings, out, progress=lambda n, path: console.print(f"{n}/{movies} {path.name}", highlight=False)
    )
    result = {
        "movies": [str(path) for path in files.movies],
        "truth_star": str(files.truth_star),
        "gain": None if files.gain is None else str(files.gain),
    }
    if as_json:
        print_json(result)
    else:
        typer.echo(f"{len(files.movies)} movies in {out / 'movies'}; truth in {files.truth_star}")


def _parse_pair(option: str, text: str) -> tuple[float, float]:
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigurationError(option, "must be MIN,MAX", text) from error
    return low, high


def _parse_size(text: str) -> tuple[int, int]:
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigurationError("--size-px", "must be N or HEIGHT,WIDTH", text) from error
    if len(sizes) not in (1, 2):
        raise ConfigurationError("--size-px", "must be N or HEIGHT,WIDTH", text)
    return sizes[0], sizes[-1]
