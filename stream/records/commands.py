"""Commands: what the controller wants done; each is answered by exactly one event.

`CancelRun` has no answer of its own: the event that answers its `StartRun` answers both.
"""

from __future__ import annotations

from dataclasses import dataclass

from stream.records.values import (
    ClusteringRequest,
    Exposure,
    ExposureId,
    GainOrientation,
    HalfSet,
    PreprocessResult,
    RunId,
    RunRequest,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Preprocess:
    """Take one exposure from its file to extracted particles.

    `gain_orientation` is what was found over the first movies (None: as the settings say); `template_run`
    names the run whose map gives the picking templates (None: blobs).
    """

    exposure: Exposure
    gain_orientation: GainOrientation | None = None
    template_run: RunId | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class OrientGain:
    """Find how the gain reference fits these movies."""

    exposures: tuple[Exposure, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rank:
    """Score one exposure's particles."""

    exposure_id: ExposureId
    name: str
    preprocessed: PreprocessResult


@dataclass(frozen=True, slots=True, kw_only=True)
class RunMember:
    """One exposure's share in a run."""

    exposure_id: ExposureId
    name: str
    half_set: HalfSet


@dataclass(frozen=True, slots=True, kw_only=True)
class StartRun:
    """Run the engine on the request's subset of these exposures' particles."""

    request: RunRequest
    members: tuple[RunMember, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CancelRun:
    """Stop a run whose result is no longer wanted, unless it has been answered already."""

    run_id: RunId
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterParticles:
    """Divide the particles of the request's subset into clusters of like views."""

    request: ClusteringRequest
    members: tuple[RunMember, ...]


Command = Preprocess | OrientGain | Rank | StartRun | CancelRun | ClusterParticles
