"""The one interface of every reconstruction engine, and the record that all of them return.

An engine takes a particle table (RELION STAR: optics and particles blocks, rlnRandomSubset where halves are fixed)
and writes a run folder: map.mrc half1.mrc half2.mrc mask.mrc fsc.star poses.star orientation.json summary.json
and pictures. Half sets, once given, are never changed. An engine raises `IcestreamError` for bad input and
`EngineStopped` when its caller's `should_stop` said so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from stream.records.errors import IcestreamError

Effort = Literal["quick", "normal", "thorough"]
"""How long the search for an initial model may take: about 1 : 2 : 4 in time."""


STATE_NAME = "refinement.state"
"""Beside poses.star in the folder of a run that later runs may continue."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """What the user may choose.

    `mask_diameter_angstrom` None = 85 % of the box; `max_box_px` bounds the working box (larger images are
    Fourier-cropped); `n_starts` counts independent starts of the initial model. `mask` is a solvent mask in [0, 1]
    on the particles' box, used instead of the sphere and of the mask made from the map. `refine_defocus` searches
    every particle's defocus around the given one.
    """

    symmetry: str = "C1"
    mask_diameter_angstrom: float | None = None
    n_threads: int = 1
    seed: int = 0
    n_starts: int = 2
    effort: Effort = "normal"
    max_box_px: int = 96
    mask: Path | None = None
    refine_defocus: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInput:
    """The particle table, and the folder that its image paths are relative to.

    `clusters` names each particle's feature cluster (labels by uid, `stream.sinks.exporter.write_labels`) and
    `clustering` what they are called: sums are then kept per cluster, and unions.json tells which union is best.
    """

    particles_star: Path
    root: Path
    clusters: Path | None = None
    clustering: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineProgress:
    """One iteration done; `resolution_angstrom` is the finest wave in use, not a claim about the map."""

    phase: Literal["initial_model", "refine"]
    iteration: int
    n_iterations: int
    resolution_angstrom: float
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOutput:
    """What a run gave; None = could not be determined. All files lie in `folder`."""

    folder: Path
    map: Path
    half1: Path
    half2: Path
    mask: Path
    fsc_star: Path
    poses_star: Path
    resolution_angstrom: float | None
    cfar: float | None
    cfar_null: float | None
    scf_star: float | None
    n_particles: int
    n_excluded: int
    note: str
    seconds: Mapping[str, float] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)


class EngineStopped(IcestreamError):  # noqa: N818 - it is a request fulfilled, not a fault
    """The caller asked the engine to stop before it was done."""


class SeedRefused(IcestreamError):  # noqa: N818 - a finding about the particles, not a fault
    """The particles do not determine a map: nothing was built on them, and more or better ones are needed."""


ProgressCallback = Callable[[EngineProgress], None]
StopCheck = Callable[[], bool]


class Engine(Protocol):
    """What the service asks of an engine."""

    @property
    def name(self) -> str:
        """The engine's name in settings and records."""
        ...

    def initial_model(
        self,
        source: EngineInput,
        settings: EngineSettings,
        out: Path,
        progress: ProgressCallback | None = None,
        should_stop: StopCheck | None = None,
    ) -> Path:
        """Find a map from nothing; return its file in `out`, or raise `SeedRefused` where there is none to be found."""
        ...

    def refine(
        self,
        source: EngineInput,
        initial_map: Path,
        settings: EngineSettings,
        out: Path,
        warm_start_poses: Path | None = None,
        progress: ProgressCallback | None = None,
        should_stop: StopCheck | None = None,
    ) -> EngineOutput:
        """Refine with fixed half sets from a map (and poses of an earlier run); write the run folder."""
        ...

    def orientation_diagnostics(self, out: Path) -> Mapping[str, Any]:
        """Measure (again) the orientation diagnostics of a finished run folder."""
        ...
