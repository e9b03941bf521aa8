"""Writes simulated exposures as a microscope would, at its pace, and the truth beside them.

Knows nothing of how exposures are made: it takes any object with the shape of `Exposure`. The clock and the
waiting are handed in. Movies appear by rename (or grow, with a slow writer); the truth of a movie is on disk
just after the movie. A folder that holds a session already is written anew, with the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from stream.ingest.epu_xml import EpuExposure, format_epu_xml
from stream.ingest.movie_writers import (
    Frame,
    MovieFormat,
    copy_slowly,
    write_gain_reference,
    write_movie,
    write_volume,
)
from stream.ingest.simulator_truth import (
    JunkRow,
    MotionTruth,
    OpticsTruth,
    ParticleTruth,
    write_junk_star,
    write_motion_star,
    write_particles_star,
)


class Exposure(Protocol):
    """One exposure as the writer needs it."""

    @property
    def name(self) -> str:
        """Stem of every file of the exposure."""

    @property
    def defocus_um(self) -> float:
        """Defocus that the microscope was set to."""

    @property
    def beam_shift_xy(self) -> tuple[float, float]:
        """Beam shift as the microscope reports it."""

    @property
    def seed(self) -> int:
        """Seed of the writer's own draws (EER sub-pixels)."""

    def frames(self) -> Iterator[Frame]:
        """Raw frames in order."""

    def particles(self) -> Sequence[ParticleTruth]:
        """Particles whose centre lies in the frame."""

    def junk(self) -> Sequence[JunkRow]:
        """Junk objects."""

    def motion(self) -> MotionTruth:
        """True motion."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WriterSettings:
    """How the microscope writes; `rate_per_hour` None = as fast as the frames come.

    `slow_writer_s` > 0 lets each movie grow under its final name for that long; `eer_sub_frames` is how many
    EER frames share one frame's electrons.
    """

    out: Path
    optics: OpticsTruth
    n_frames: int
    movie_format: MovieFormat = MovieFormat.TIFF
    rate_per_hour: float | None = None
    slow_writer_s: float = 0.0
    eer_sub_frames: int = 16
    has_epu_xml: bool = True
    started_at: float = 1_700_000_000.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionFiles:
    """Where a session's files lie."""

    movies: tuple[Path, ...]
    truth_star: Path
    gain: Path | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Clock:
    """Monotonic time and waiting; `wait` returns True when the session should stop early."""

    now: Callable[[], float]
    wait: Callable[[float], bool]


def write_session(
    exposures: Iterable[Exposure],
    settings: WriterSettings,
    *,
    gain: npt.NDArray[np.float32] | None,
    volume: npt.NDArray[np.float32],
    clock: Clock,
    progress: Callable[[int, Path], None],
) -> SessionFiles:
    """Write every exposure at its time and the truth so far; return where everything lies.

    The truth table is rewritten after each movie, so that it always describes the movies that exist.
    """
    truth = settings.out / "truth"
    movies_folder = settings.out / "movies"
    for folder in (movies_folder, truth / "motion"):
        folder.mkdir(parents=True, exist_ok=True)
    gain_path = settings.out / "gain.mrc" if gain is not None else None
    if gain is not None and gain_path is not None:
        write_gain_reference(gain_path, gain)
    write_volume(truth / "map.mrc", volume, pixel_size_angstrom=settings.optics.pixel_size_angstrom)
    star = truth / "particles.star"
    particles: list[ParticleTruth] = []
    junk: list[JunkRow] = []
    movies: list[Path] = []
    start = clock.now()
    for index, exposure in enumerate(exposures):
        if settings.rate_per_hour is not None:
            due = start + index * 3600.0 / settings.rate_per_hour
            if clock.wait(max(0.0, due - clock.now())):
                break
        elif clock.wait(0.0):
            break
        path = movies_folder / f"{exposure.name}.{settings.movie_format.value}"
        _write_exposure(exposure, path, index, settings, clock)
        write_motion_star(
            truth / "motion" / f"{exposure.name}.star",
            exposure.motion(),
            optics=settings.optics,
            movie=f"movies/{path.name}",
            gain=None if gain_path is None else gain_path.name,
        )
        particles.extend(exposure.particles())
        junk.extend(exposure.junk())
        movies.append(path)
        write_particles_star(star, particles, settings.optics)
        write_junk_star(truth / "junk.star", junk)
        progress(index + 1, path)
    if not movies:
        write_particles_star(star, particles, settings.optics)
        write_junk_star(truth / "junk.star", junk)
    return SessionFiles(movies=tuple(movies), truth_star=star, gain=gain_path)


def _write_exposure(
    exposure: Exposure, path: Path, index: int, settings: WriterSettings, clock: Clock
) -> None:
    """Write one movie and, before it as EPU does, its XML."""
    if settings.has_epu_xml:
        optics = settings.optics
        is_eer = settings.movie_format is MovieFormat.EER
        shape = exposure.motion().shape_yx_px
        document = format_epu_xml(
            EpuExposure(
                unique_name=f"{exposure.name}/{exposure.seed}",
                acquired_at=settings.started_at + index * 3600.0 / (settings.rate_per_hour or 300.0),
                pixel_size_angstrom=optics.pixel_size_angstrom,
                dose_e_per_angstrom2=optics.dose_per_frame_e_per_angstrom2 * settings.n_frames,
                voltage_kv=optics.voltage_kv,
                defocus_um=exposure.defocus_um,
                n_fractions=None if is_eer else settings.n_frames,
                shape_yx_px=shape,
                beam_shift_xy=exposure.beam_shift_xy,
            )
        )
        path.with_suffix(".xml").write_bytes(document)
    target = settings.out / f".whole-{path.name}" if settings.slow_writer_s > 0 else path
    write_movie(
        target,
        exposure.frames(),
        settings.movie_format,
        pixel_size_angstrom=settings.optics.pixel_size_angstrom,
        eer_sub_frames=settings.eer_sub_frames,
        seed=exposure.seed,
    )
    if target != path:
        try:
            copy_slowly(target, path, duration_s=settings.slow_writer_s, wait=_discard(clock.wait))
        finally:
            target.unlink(missing_ok=True)


def _discard(wait: Callable[[float], Any]) -> Callable[[float], None]:
    def waiting(seconds: float) -> None:
        wait(seconds)

    return waiting
