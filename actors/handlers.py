"""What a worker does with a command, with no word of where it runs.

`WorkerSpec` is everything that a worker needs to know and travels to it once; a handler is made in the
worker's own process, because it holds model sessions, memory maps and thread settings.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from actors.engines.base import EngineSettings
from actors.preprocess.gain import OrientedGain, orient_session_gain
from actors.preprocess.settings import PreprocessSettings
from models.cryoranker.providers import ProviderChoice
from stream.records.commands import ClusterParticles, OrientGain, Preprocess, Rank, StartRun
from stream.records.errors import IcestreamError, InputError
from stream.records.values import (
    ClusteringResult,
    FailureKind,
    InputKind,
    PreprocessResult,
    RankResult,
    RunResult,
)
from stream.store.layout import OutputLayout

log = logging.getLogger(__name__)
Outcome = TypeVar("Outcome")


@dataclass(frozen=True, slots=True, kw_only=True)
class RankerOptions:
    """Which model scores (None = the shipped one), on what, and how many images it takes at once."""

    model: Path | None
    batch_size: int
    max_wait_s: float
    n_threads: int
    n_callers: int
    provider: ProviderChoice = "auto"
    outlier_sigmas: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSpec:
    """Everything a worker is told when it starts; picklable."""

    out: Path
    source: Path
    preprocess: PreprocessSettings
    ranker: RankerOptions
    engine_name: str
    engine: EngineSettings
    run_timeout_s: float = 86_400.0

    @property
    def layout(self) -> OutputLayout:
        """The output folder."""
        return OutputLayout(self.out)


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a command has no result."""

    kind: FailureKind
    reason: str


class PreprocessHandler:
    """Takes one exposure from its file to extracted particles, or finds how the gain reference lies."""

    def __init__(self, spec: WorkerSpec) -> None:
        self._spec = spec

    def process(self, command: Preprocess | OrientGain) -> PreprocessResult | OrientedGain:
        """Do what is asked: preprocess an exposure, or orient the gain reference on movies."""
        match command:
            case Preprocess():
                return self._preprocess(command)
            case OrientGain(exposures=exposures):
                return orient_session_gain(exposures, self._spec.preprocess)

    def _preprocess(self, command: Preprocess) -> PreprocessResult:
        """Preprocess a movie or a micrograph, or take over one micrograph's share of a particle file."""
        exposure, spec = command.exposure, self._spec
        if exposure.kind is InputKind.PARTICLES:
            from actors.particle_import import import_particles

            return import_particles(exposure, spec.source, spec.preprocess, spec.layout)
        from actors.preprocess.exposure import preprocess_exposure

        return preprocess_exposure(
            exposure,
            spec.preprocess,
            spec.layout,
            gain_orientation=command.gain_orientation,
            template_run=command.template_run,
        )


class RankHandler:
    """Scores particles in batches that may span exposures; `process` may be called from many threads."""

    def __init__(self, spec: WorkerSpec) -> None:
        from actors.ranker import BatchingRanker
        from models.cryoranker.serve import DEFAULT_MODEL, OnnxRanker
        from stream.store.feature_cache import FeatureCache

        options = spec.ranker
        self._layout = spec.layout
        self._cache = FeatureCache(spec.layout.features)
        self._ranker = BatchingRanker(
            OnnxRanker(
                options.model or DEFAULT_MODEL,
                provider=options.provider,
                n_threads=options.n_threads,
                batch_size=options.batch_size,
                outlier_sigmas=options.outlier_sigmas,
            ),
            self._cache,
            batch_size=options.batch_size,
            max_wait_s=options.max_wait_s,
            mends_pixels=options.outlier_sigmas is not None,
        )

    def process(self, command: Rank) -> RankResult:
        """Score one exposure's particles."""
        return self._ranker.rank(command, self._layout)

    def close(self) -> None:
        """End the inference thread and let another process write the cache."""
        self._ranker.close()
        self._cache.close()


class RunHandler:
    """Runs the chosen engine on the particles of a subset, and divides particles by view."""

    def __init__(self, spec: WorkerSpec) -> None:
        self._spec = spec

    def process(self, command: StartRun | ClusterParticles) -> RunResult | ClusteringResult:
        """Reconstruct and judge, or cluster."""
        spec = self._spec
        if isinstance(command, ClusterParticles):
            from actors.clustering import cluster_particles

            return cluster_particles(command, spec.layout)
        from actors.engines.session_run import run_engine

        return run_engine(
            command,
            spec.layout,
            engine_name=spec.engine_name,
            settings=spec.engine,
            timeout_s=spec.run_timeout_s,
        )


def attempt(process: Callable[[], Outcome], item: str) -> Outcome | Failure:
    """Call `process`; what it raises becomes a `Failure`, so that the stream goes on.

    This is the one place where any exception is caught (failure table in stream/README.md): an `InputError`
    belongs to the item, everything else to the machine, which tries again before it gives the item up.
    """
    started = time.monotonic()
    try:
        return process()
    except InputError as error:
        return Failure(kind=FailureKind.INPUT, reason=str(error))
    except IcestreamError as error:
        return Failure(kind=FailureKind.RESOURCE, reason=str(error))
    except OSError as error:
        text = "the disk is full" if error.errno == errno.ENOSPC else f"{error.strerror or error}"
        where = f" ({error.filename})" if error.filename else ""
        return Failure(kind=FailureKind.RESOURCE, reason=f"{item}: {text}{where}")
    except Exception as error:
        log.exception("stage_failed item=%s seconds=%.1f", item, time.monotonic() - started)
        return Failure(kind=FailureKind.RESOURCE, reason=f"{item}: {type(error).__name__}: {error}")
