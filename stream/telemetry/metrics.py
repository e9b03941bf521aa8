"""Metrics of a session, fed by the events that the journal commits.

Restarts: the journal is replayed with `observe(event, replay=True)` before `serve`. Counters and duration
histograms are functions of the journal, so they come back to the value they had and a scrape never sees them
fall. Latencies are not restored: across a restart they would measure the downtime; Prometheus takes their
return to zero for what it is, a counter reset. Gauges come from `set_gauges`, from the controller's own books.

Clock: event times are this machine's wall clock; durations were measured by the worker and ride on results.
Threads: one thread observes, the endpoint's threads only read. Failure: a snapshot that does not balance
raises `InvariantError`.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import assert_never

from prometheus_client import CollectorRegistry

from stream.records.advice import Advice, AdviceKind
from stream.records.errors import InvariantError
from stream.records.events import (
    CampaignEnded,
    CampaignStarted,
    ClusteringFailed,
    ClusteringStarted,
    DiskSpaceChanged,
    DrainRequested,
    Event,
    ExposureFound,
    ExposureOverruled,
    ExposurePreprocessed,
    ExposureRanked,
    FileRejected,
    GainOriented,
    InputEnded,
    ParticlesClustered,
    QualityLimitsChanged,
    RunCancelled,
    RunEnded,
    RunFailed,
    RunStarted,
    SessionDecided,
    SessionOpened,
    StageFailed,
    TrainingChanged,
)
from stream.records.values import (
    Exposure,
    ExposureId,
    FailureKind,
    InputKind,
    PreprocessResult,
    RankResult,
    RunId,
    RunPurpose,
    RunResult,
)
from stream.telemetry.scores import N_SCORE_BINS, RecentScores
from stream.telemetry.series import (
    ADVICE_LEVELS,
    QUARANTINE_REASONS,
    REJECTION_RULES,
    STEPS,
    Series,
    classify_reason,
)
from stream.telemetry.server import MetricsServer

MAX_FOLLOWED = 100_000
"""Movies followed at once for their latency; ten days at 400 an hour, about 20 MB. The oldest is dropped."""

_CHOSEN_VIEWS = frozenset({RunPurpose.CLUSTER, RunPurpose.UNION})
"""Runs on views that were chosen for their likeness: their cFAR says nothing about the specimen."""

_GAIN_BOUNDS = {"expected": "gain_angstrom", "low": "gain_low_angstrom", "high": "gain_high_angstrom"}
_ENGINES = ("embedded", "cryosparc", "relion")


@dataclass(frozen=True, slots=True, kw_only=True)
class Volume:
    """Space on one volume."""

    free_bytes: int
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """What is true now, from the controller's books and the machine.

    `states` holds every exposure once and adds up to `n_found`; `rejected_by` counts the rejected ones by rule.
    `is_gain_unknown` says that movies are held back for the gain reference's sake. `quarantine_reasons` counts the free-text
    reasons of what is in quarantine now. Volumes have short fixed names ("output"), not paths.
    `worker_restarts` counts per pool since this process started. Without an
    accepted map its gauges are absent; otherwise None or an absent key leaves a gauge as it was.
    """

    n_found: int
    states: Mapping[str, int]
    rejected_by: Mapping[str, int] = field(default_factory=dict)
    n_particles_in_use: int = 0
    advice: Sequence[Advice] = ()
    accepted_map: RunResult | None = None
    gain_residual: float | None = None
    gain_residual_limit: float | None = None
    is_gain_unknown: bool = False
    queue_depth: Mapping[str, int] = field(default_factory=dict)
    inflight: Mapping[str, int] = field(default_factory=dict)
    quarantine_reasons: Mapping[str, int] | None = None
    volumes: Mapping[str, Volume] = field(default_factory=dict)
    feature_cache_bytes: int | None = None
    worker_restarts: Mapping[str, int] = field(default_factory=dict)


class Telemetry:
    """The one exporter of a service.

    Parameters
    ----------
    version
        Version of icestream, for `icestream_build_info`.
    score_threshold
        τ as configured: particles scored at or above it count as accepted, unless `observe` is told another.
    expected_interval_s
        Time between two movies as configured; None = follow the median of the latest arrivals.
    n_recent_movies
        How many movies the score median looks back.
    """

    def __init__(
        self,
        version: str,
        *,
        score_threshold: float = 0.4,
        expected_interval_s: float | None = None,
        n_recent_movies: int = 50,
    ) -> None:
        self._series = Series(version)
        self._score_threshold = score_threshold
        self._recent = RecentScores(n_recent_movies)
        self._known: set[ExposureId] = set()
        self._found_at: OrderedDict[ExposureId, float] = OrderedDict()
        self._gaps: deque[float] = deque(maxlen=49)
        self._last_arrival: float | None = None
        self._particle_files: set[str] = set()
        self._expected_interval_s = expected_interval_s
        self._purposes: dict[RunId, RunPurpose] = {}
        self._shown_map: RunResult | None = None
        self._worker_restarts: Counter[str] = Counter()
        self._server: MetricsServer | None = None
        if expected_interval_s is not None:
            self._series.movie_interval.set(expected_interval_s)

    @property
    def registry(self) -> CollectorRegistry:
        """The registry with every series."""
        return self._series.registry

    # --- events --------------------------------------------------------------------------------------

    def observe(self, event: Event, *, replay: bool = False, score_threshold: float | None = None) -> None:
        """Count one committed event; with `replay`, one of an earlier life, which gives no latency.

        `score_threshold` is the τ in force (a person may have set one). A counter never goes back, so that particles
        scored earlier stay counted by the τ of their time.
        """
        series = self._series
        if score_threshold is not None:
            self._score_threshold = score_threshold
        match event:
            case SessionOpened():
                series.session_open.set(1)
            case ExposureFound():
                self._take_found(event.at, event.exposure)
            case FileRejected():
                self._known.add(event.exposure_id)
                series.movies.labels("ingest", "input_error").inc()
            case ExposurePreprocessed():
                self._take_preprocessed(event.result)
                self._take_milestone(event.result.exposure_id, "preprocessed", event.at, replay=replay)
                if not event.result.n_particles:
                    self._found_at.pop(event.result.exposure_id, None)
            case ExposureRanked():
                self._take_ranked(event.result)
                self._take_milestone(event.result.exposure_id, "ranked", event.at, replay=replay)
                self._found_at.pop(event.result.exposure_id, None)
            case StageFailed():
                is_input = event.kind is FailureKind.INPUT
                outcome = "input_error" if is_input else "resource_error"
                series.movies.labels(event.stage.value, outcome).inc()
                if is_input:
                    self._found_at.pop(event.exposure_id, None)
            case CampaignStarted(request=campaign):
                series.campaigns.labels(campaign.trigger.value).inc()
            case RunStarted(request=run):
                self._purposes[run.run_id] = run.purpose
            case RunEnded():
                self._take_run(event.result)
            case RunFailed():
                self._count_run(event.run_id, "failed")
            case DiskSpaceChanged():
                series.disk_low.set(event.is_low)
            case InputEnded() | DrainRequested():
                series.session_open.set(0)
            case RunCancelled():
                self._count_run(event.run_id, "cancelled")
            case (
                GainOriented()
                | QualityLimitsChanged()
                | ExposureOverruled()
                | SessionDecided()
                | CampaignEnded()
                | ClusteringStarted()
                | ParticlesClustered()
                | ClusteringFailed()
                | TrainingChanged()
            ):
                pass  # what follows from them is in the controller's books
            case _:
                assert_never(event)

    def _take_found(self, at: float, exposure: Exposure) -> None:
        series = self._series
        series.movies.labels("ingest", "done").inc()
        series.last_movie.set(at)
        if self._count_bytes_once(exposure):
            series.ingest_bytes.inc(exposure.file.size_bytes)
        self._known.add(exposure.exposure_id)
        self._found_at[exposure.exposure_id] = at
        if len(self._found_at) > MAX_FOLLOWED:
            self._found_at.popitem(last=False)
        if self._expected_interval_s is None and self._last_arrival is not None:
            self._gaps.append(max(0.0, at - self._last_arrival))
            series.movie_interval.set(median(self._gaps))
        self._last_arrival = at

    def _count_bytes_once(self, exposure: Exposure) -> bool:
        """Tell whether the file's size still has to be counted: a particle file comes once per micrograph."""
        if exposure.kind is not InputKind.PARTICLES:
            return True
        is_new = exposure.file.fingerprint not in self._particle_files
        self._particle_files.add(exposure.file.fingerprint)
        return is_new

    def _take_preprocessed(self, result: PreprocessResult) -> None:
        series = self._series
        series.movies.labels("preprocess", "done").inc()
        series.picks.inc(result.n_picks)
        self._take_seconds("preprocess", result.seconds)
        if result.motion is not None:
            series.motion.observe(result.motion.total_motion_angstrom)
            series.early_motion.observe(result.motion.early_motion_angstrom)
        if result.ctf is not None and result.ctf.is_reliable:
            series.ctf_fit.observe(result.ctf.fit_resolution_angstrom)
            series.astigmatism.observe(result.ctf.defocus_u_angstrom - result.ctf.defocus_v_angstrom)
        if result.ice_ratio is not None:
            series.ice_ratio.observe(result.ice_ratio)
        if result.masked_fraction is not None:
            series.masked.observe(result.masked_fraction)

    def _take_ranked(self, result: RankResult) -> None:
        series = self._series
        histogram = result.score_histogram
        series.scores.add(histogram)
        self._recent.add(histogram)
        centre = self._recent.median()
        if centre is not None:
            series.score_median.set(centre)
        series.movies.labels("rank", "done").inc()
        # The controller counts above its threshold by the same rounding to a bin edge.
        first = round(self._score_threshold * N_SCORE_BINS)
        series.particles.labels("accepted").inc(sum(histogram[first:]))
        series.particles.labels("below_threshold").inc(sum(histogram[:first]))
        series.particles.labels("unscored").inc(result.n_excluded)
        for size in result.batch_sizes:
            series.batch_size.observe(size)
        series.cache_hits.inc(result.n_cache_hits)
        series.cache_misses.inc(max(0, result.n_scored - result.n_cache_hits))
        self._take_seconds("rank", result.seconds)

    def _take_seconds(self, stage: str, seconds: Mapping[str, float]) -> None:
        """Record a stage's time and its steps'; without a "total" the steps add up to it."""
        steps = {step: value for step, value in seconds.items() if step != "total"}
        for step, value in steps.items():
            label = step if step in STEPS else "other"
            self._series.step_seconds.labels(stage, label).observe(value)
        if seconds:
            self._series.stage_seconds.labels(stage).observe(seconds.get("total", sum(steps.values())))

    def _take_milestone(self, exposure_id: ExposureId, milestone: str, at: float, *, replay: bool) -> None:
        found_at = self._found_at.get(exposure_id)
        if found_at is not None and not replay:
            self._series.latency_seconds.labels(milestone).observe(max(0.0, at - found_at))

    def _take_run(self, result: RunResult) -> None:
        series = self._series
        purpose = self._purposes.get(result.run_id)
        self._count_run(result.run_id, "unresolved" if result.resolution_angstrom is None else "resolved")
        self._take_seconds("engine", result.seconds)
        if purpose not in _CHOSEN_VIEWS:
            series.latest_run.show(result, _label_engine(result))

    def _count_run(self, run_id: RunId, outcome: str) -> None:
        purpose = self._purposes.get(run_id)
        if purpose is not None:
            self._series.runs.labels(purpose.value, outcome).inc()

    # --- gauges --------------------------------------------------------------------------------------

    def set_gauges(self, snapshot: Snapshot) -> None:
        """Show what is true now.

        The states come from the controller's books, the number found from the events seen here: two counts
        that must agree, or `InvariantError` is raised.
        """
        series = self._series
        if sum(snapshot.states.values()) != snapshot.n_found:
            rule = f"every exposure is in exactly one state ({snapshot.n_found} found)"
            raise InvariantError("exposures", rule, dict(snapshot.states))
        if snapshot.n_found != len(self._known):
            rule = f"the controller knows each exposure of the journal ({len(self._known)} in events)"
            raise InvariantError("exposures", rule, snapshot.n_found)
        series.exposures_found.set(snapshot.n_found)
        for gauge, counts in (
            (series.exposures, snapshot.states),
            (series.queue_depth, snapshot.queue_depth),
            (series.inflight, snapshot.inflight),
        ):
            for label, count in counts.items():
                gauge.labels(label).set(count)
        for rule in REJECTION_RULES:
            series.rejected.labels(rule).set(snapshot.rejected_by.get(rule, 0))
        series.particles_in_use.set(snapshot.n_particles_in_use)
        self._show_advice(snapshot.advice)
        series.gain_unknown.set(snapshot.is_gain_unknown)
        if snapshot.gain_residual is not None:
            series.gain_residual.set(snapshot.gain_residual)
        if snapshot.gain_residual_limit is not None:
            series.gain_residual_limit.set(snapshot.gain_residual_limit)
        if snapshot.accepted_map != self._shown_map:
            self._show_map(snapshot.accepted_map)
        if snapshot.quarantine_reasons is not None:
            by_reason = Counter(dict.fromkeys(QUARANTINE_REASONS, 0))
            for text, count in snapshot.quarantine_reasons.items():
                by_reason[classify_reason(text)] += count
            for reason, count in by_reason.items():
                series.quarantined.labels(reason).set(count)
        for name, volume in snapshot.volumes.items():
            series.disk_free.labels(name).set(volume.free_bytes)
            series.disk_size.labels(name).set(volume.size_bytes)
        if snapshot.feature_cache_bytes is not None:
            series.cache_bytes.set(snapshot.feature_cache_bytes)
        for pool, count in snapshot.worker_restarts.items():
            series.worker_restarts.labels(pool).inc(max(0, count - self._worker_restarts[pool]))
            self._worker_restarts[pool] = count

    def _show_map(self, accepted: RunResult | None) -> None:
        """Show the accepted map; a person may have rejected the only one."""
        self._shown_map = accepted
        self._series.accepted_map.clear()
        if accepted is not None:
            self._series.accepted_map.show(accepted, _label_engine(accepted))

    def _show_advice(self, advice: Sequence[Advice]) -> None:
        by_kind = {item.kind: item for item in advice}
        for kind in AdviceKind:
            standing = by_kind.get(kind)
            level = ADVICE_LEVELS[None if standing is None else standing.severity]
            self._series.advice.labels(kind.value).set(level)
        growth = by_kind.get(AdviceKind.STOP) or by_kind.get(AdviceKind.GROWTH)
        self._series.predicted_gain.clear()
        for bound, number in _GAIN_BOUNDS.items():
            value = None if growth is None else growth.numbers.get(number)
            if value is not None:
                self._series.predicted_gain.labels(bound).set(value)

    # --- the endpoint --------------------------------------------------------------------------------

    def serve(self, host: str = "127.0.0.1", port: int = 0, *, token: str | None = None) -> MetricsServer:
        """Start the endpoint and return it; `port` 0 takes a free one, an open address needs a token."""
        self.close()
        self._server = MetricsServer(self.registry, host, port, token)
        return self._server

    def close(self) -> None:
        """Stop the endpoint, if there is one."""
        if self._server is not None:
            self._server.close()
            self._server = None


def _label_engine(result: RunResult) -> str:
    return result.engine if result.engine in _ENGINES else "other"
