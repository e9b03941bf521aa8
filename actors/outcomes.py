"""From what a worker gave back to the event that answers the command."""

from __future__ import annotations

from typing import assert_never

from actors.handlers import Failure
from actors.preprocess.gain import OrientedGain
from stream.records.commands import ClusterParticles, OrientGain, Preprocess, Rank, StartRun
from stream.records.events import (
    ClusteringFailed,
    Event,
    ExposurePreprocessed,
    ExposureRanked,
    GainOriented,
    ParticlesClustered,
    RunEnded,
    RunFailed,
    StageFailed,
)
from stream.records.values import ClusteringResult, PreprocessResult, RankResult, RunResult, Stage

WorkCommand = Preprocess | OrientGain | Rank | StartRun | ClusterParticles
WorkOutcome = PreprocessResult | OrientedGain | RankResult | RunResult | ClusteringResult | Failure


def event_for(command: WorkCommand, outcome: WorkOutcome, at: float) -> Event:
    """Return the one event that answers `command`; `at` is the service's own clock."""
    match outcome:
        case Failure():
            return _failure_event(command, outcome, at)
        case PreprocessResult():
            return ExposurePreprocessed(at=at, result=outcome)
        case OrientedGain():
            return GainOriented(
                at=at,
                orientation=outcome.orientation,
                contrast=outcome.contrast,
                n_movies=outcome.n_movies,
                note=outcome.note,
            )
        case RankResult():
            return ExposureRanked(at=at, result=outcome)
        case RunResult():
            return RunEnded(at=at, result=outcome)
        case ClusteringResult():
            return ParticlesClustered(at=at, result=outcome)
        case _:
            assert_never(outcome)


def _failure_event(command: WorkCommand, failure: Failure, at: float) -> Event:
    match command:
        case Preprocess(exposure=exposure):
            exposure_id, stage = exposure.exposure_id, Stage.PREPROCESS
        case OrientGain(exposures=exposures):
            # the question has no item of its own: it fails in the name of the first movie that it was asked about
            exposure_id, stage = exposures[0].exposure_id, Stage.PREPROCESS
        case Rank():
            exposure_id, stage = command.exposure_id, Stage.RANK
        case StartRun(request=request):
            return RunFailed(at=at, run_id=request.run_id, reason=failure.reason)
        case ClusterParticles(request=clustering):
            return ClusteringFailed(at=at, clustering_id=clustering.clustering_id, reason=failure.reason)
        case _:
            assert_never(command)
    return StageFailed(at=at, exposure_id=exposure_id, stage=stage, kind=failure.kind, reason=failure.reason)


def item_of(command: WorkCommand) -> str:
    """Return the name that messages about `command` carry."""
    match command:
        case Preprocess(exposure=exposure):
            return exposure.name
        case OrientGain(exposures=exposures):
            return f"gain orientation on {', '.join(exposure.name for exposure in exposures)}"
        case Rank(name=name):
            return name
        case StartRun(request=request):
            return request.run_id
        case ClusterParticles(request=clustering):
            return clustering.clustering_id
        case _:
            assert_never(command)
