"""Every series that icestream exports: declared here, once, with its help text, unit and labels.

Prefix `icestream_`, base units, no label whose values are unbounded: never a movie, a particle or a run.
Label values are closed vocabularies, and every combination that can occur exists from the start at zero, so
that `rate()` sees the first increment.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Iterable
from dataclasses import fields

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector
from prometheus_client.metrics_core import Metric

from stream.records.advice import AdviceKind, Severity
from stream.records.values import CampaignTrigger, QualityLimits, RunPurpose, RunResult
from stream.telemetry.scores import ScoreDistribution

STAGES = ("ingest", "preprocess", "rank")
MOVIE_OUTCOMES = ("done", "input_error", "resource_error")
MILESTONES = ("preprocessed", "ranked")
DECISIONS = ("accepted", "below_threshold", "unscored")
RUN_KINDS = tuple(purpose.value for purpose in RunPurpose)
RUN_OUTCOMES = ("resolved", "unresolved", "failed", "cancelled")
CAMPAIGN_TRIGGERS = tuple(trigger.value for trigger in CampaignTrigger)
ADVICE_KINDS = tuple(kind.value for kind in AdviceKind)
ADVICE_LEVELS = {None: 0, Severity.INFO: 1, Severity.WARNING: 2}
STEPS = (
    "read", "motion", "ctf", "pick", "extract", "write", "import",
    "lookup", "inference", "store",
    "collect", "initial_model", "refine", "diagnostics",
    "other",
)  # fmt: skip
REJECTION_RULES = (*(field.name for field in fields(QualityLimits)), "overruled", "excluded_time")
QUARANTINE_REASONS = (
    "permission", "vanished", "truncated", "format", "dimensions", "gain", "metadata", "values", "machine", "other",
)  # fmt: skip

SECONDS_BUCKETS = (
    0.01, 0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600,
)  # fmt: skip
"""1 s to 1 h is what a session shows; the sub-second edges are for small test movies."""

_REASON_WORDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        "machine",
        ("worker", "out of memory", "no space", "disk", "time limit"),
    ),
    ("permission", ("permission", "not readable", "unreadable", "access")),
    ("vanished", ("vanish", "no such file", "does not exist", "disappeared", "gone", "missing file")),
    ("gain", ("gain",)),
    (
        "truncated",
        ("truncat", "incomplete", "ends early", "shorter", "empty", "zero bytes", "0 bytes", "missing bytes"),
    ),
    ("values", ("nan", "finite", "constant", "inf", "all zero", "saturated")),
    ("metadata", ("pixel size", "voltage", "dose", "xml", "mdoc", "metadata", "spherical")),
    ("dimensions", ("shape", "frame", "dimension", "size", "odd", "section")),
    ("format", ("magic", "format", "header", "tiff", "eer", "mrc", "decode", "parse", "not a ", "corrupt")),
)


def classify_reason(text: str) -> str:
    """Map a free-text reason to the closed vocabulary of the label `reason`; first match wins."""
    # The text opens with the file's name, which may hold any word: judge the rule behind it when there is one.
    _, _, rule = text.partition(": ")
    lowered = (rule or text).lower()
    for reason, words in _REASON_WORDS:
        if any(word in lowered for word in words):
            return reason
    # The controller's words for an item that was tried too often, whatever the last failure said.
    return "machine" if text.startswith("failed ") else "other"


class TidyRegistry(CollectorRegistry):
    """A registry without `_created` samples, which mean nothing after a replay, and without values not yet known."""

    def collect(self) -> Iterable[Metric]:
        """Yield every family of every collector."""
        for family in super().collect():
            family.samples = [
                s for s in family.samples if not s.name.endswith("_created") and not math.isnan(s.value)
            ]
            yield family


class MapGauges:
    """What a run measured, for one of two runs: the accepted map's, and the latest that ended."""

    def __init__(self, registry: CollectorRegistry, prefix: str, whose: str) -> None:
        declared = (
            (
                "resolution_angstrom",
                "map_resolution_angstroms",
                f"Resolution of {whose}: half-map FSC at 0.143.",
            ),
            ("cfar", "cfar_ratio", f"cFAR of {whose}, 0 to 1; below 0.5 suggests preferred orientation."),
            (
                "cfar_null",
                "cfar_null_ratio",
                f"cFAR that uniform views of as many particles would give at the signal of {whose}, 0 to 1.",
            ),
            ("scf_star", "scf_star_ratio", f"SCF* of {whose}; below 0.81 suggests that views are missing."),
            ("n_particles", "map_particles", f"Particles in {whose}."),
        )
        self._gauges = {
            figure: Gauge(f"{prefix}_{name}", text, ["engine"], registry=registry)
            for figure, name, text in declared
        }

    def show(self, result: RunResult, engine: str) -> None:
        """Show one run; what it could not determine is absent."""
        self.clear()
        for figure, gauge in self._gauges.items():
            value = getattr(result, figure)
            if value is not None:
                gauge.labels(engine).set(value)

    def clear(self) -> None:
        """Show none."""
        for gauge in self._gauges.values():
            gauge.clear()


class Series:
    """The declared series, registered in a registry of their own (no globals)."""

    def __init__(self, version: str) -> None:
        self.registry = TidyRegistry(auto_describe=True)
        ProcessCollector(registry=self.registry)
        self._declare_flow()
        self._declare_particles()
        self._declare_quality()
        self._declare_runs()
        self._declare_advice()
        self._declare_machine()
        self.build = Info("icestream_build", "Version of the running service.", registry=self.registry)
        self.build.info({"version": version, "python": platform.python_version()})

    def _declare_flow(self) -> None:
        self.movies = Counter(
            "icestream_movies_total",
            "Outcomes per stage, counted over the whole session: done, input_error (quarantined) or "
            "resource_error (tried again).",
            ["stage", "outcome"],
            registry=self.registry,
        )
        for stage in STAGES:
            for outcome in MOVIE_OUTCOMES:
                if stage != "ingest" or outcome != "resource_error":
                    self.movies.labels(stage, outcome)
        self.stage_seconds = Histogram(
            "icestream_stage_duration_seconds",
            "Working time of one exposure in one stage, measured where it ran; for stage=engine, of one run.",
            ["stage"],
            buckets=SECONDS_BUCKETS,
            registry=self.registry,
        )
        for stage in ("preprocess", "rank", "engine"):
            self.stage_seconds.labels(stage)
        self.step_seconds = Histogram(
            "icestream_step_duration_seconds",
            "Working time of one step within a stage (motion, ctf, pick, ...), measured where it ran.",
            ["stage", "step"],
            buckets=SECONDS_BUCKETS,
            registry=self.registry,
        )
        self.latency_seconds = Histogram(
            "icestream_movie_latency_seconds",
            "Time from a movie being found to a milestone, waiting included; only of movies followed live.",
            ["milestone"],
            buckets=SECONDS_BUCKETS,
            registry=self.registry,
        )
        for milestone in MILESTONES:
            self.latency_seconds.labels(milestone)
        self.queue_depth = Gauge(
            "icestream_queue_depth", "Exposures that wait for a stage.", ["stage"], registry=self.registry
        )
        self.inflight = Gauge(
            "icestream_inflight", "Exposures that a stage works on now.", ["stage"], registry=self.registry
        )
        self.exposures = Gauge(
            "icestream_exposures",
            "Exposures per state; each is in exactly one, so the sum equals icestream_exposures_found.",
            ["state"],
            registry=self.registry,
        )
        self.exposures_found = Gauge(
            "icestream_exposures_found",
            "Every exposure or invalid file ever noticed.",
            registry=self.registry,
        )
        self.quarantined = Gauge(
            "icestream_quarantined_movies",
            "Movies in quarantine now, by reason.",
            ["reason"],
            registry=self.registry,
        )
        for reason in QUARANTINE_REASONS:
            self.quarantined.labels(reason)
        self.ingest_bytes = Counter(
            "icestream_ingest_bytes_total", "Size of every valid input file found.", registry=self.registry
        )
        self.last_movie = Gauge(
            "icestream_last_movie_timestamp_seconds",
            "Unix time at which the newest valid input was found; 0 before the first.",
            registry=self.registry,
        )
        self.movie_interval = Gauge(
            "icestream_expected_movie_interval_seconds",
            "Time between two movies: as configured, or else the median of the latest arrivals; 0 = not known.",
            registry=self.registry,
        )
        self.session_open = Gauge(
            "icestream_session_open",
            "1 while more input is expected, 0 once the input ended or the operator drains.",
            registry=self.registry,
        )

    def _declare_particles(self) -> None:
        self.picks = Counter("icestream_picks_total", "Picked positions.", registry=self.registry)
        self.particles = Counter(
            "icestream_particles_total",
            "Particles by the ranker's decision: accepted (score at or above the threshold then in force), below_threshold, "
            "unscored (could not be scored).",
            ["decision"],
            registry=self.registry,
        )
        for decision in DECISIONS:
            self.particles.labels(decision)
        self.scores = ScoreDistribution(
            "icestream_particle_score", "CryoRanker score of every particle, 0 to 1."
        )
        self.registry.register(self.scores)
        self.score_median = Gauge(
            "icestream_particle_score_median",
            "Pooled median score of the latest movies (50 unless told otherwise), 0 to 1.",
            registry=self.registry,
        )
        self.score_median.set(math.nan)  # not shown until there is one
        self.batch_size = Histogram(
            "icestream_batch_size",
            "Particles per batch given to the ranker.",
            buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024),
            registry=self.registry,
        )
        self.cache_hits = Counter(
            "icestream_feature_cache_hits_total",
            "Particles whose score came from the cache.",
            registry=self.registry,
        )
        self.cache_misses = Counter(
            "icestream_feature_cache_misses_total", "Particles that had to be scored.", registry=self.registry
        )
        self.cache_bytes = Gauge(
            "icestream_feature_cache_bytes", "Size of the feature cache on disk.", registry=self.registry
        )
        self.particles_in_use = Gauge(
            "icestream_particles_in_use",
            "Particles at or above the threshold in exposures that are not rejected: what a run would use now.",
            registry=self.registry,
        )

    def _declare_quality(self) -> None:
        self.motion = Histogram(
            "icestream_total_motion_angstroms",
            "Path length of a movie's whole-frame motion.",
            buckets=(1, 2, 5, 10, 15, 20, 30, 50, 100, 200),
            registry=self.registry,
        )
        self.early_motion = Histogram(
            "icestream_early_motion_angstroms",
            "Path length of a movie's whole-frame motion over the first 4 e/A^2.",
            buckets=(0.5, 1, 2, 3, 5, 7.5, 10, 15, 20, 50),
            registry=self.registry,
        )
        self.ctf_fit = Histogram(
            "icestream_ctf_fit_angstroms",
            "Resolution to which a micrograph's Thon rings fit.",
            buckets=(2.5, 3, 3.5, 4, 4.5, 5, 6, 7, 8, 10, 15, 20, 30),
            registry=self.registry,
        )
        self.astigmatism = Histogram(
            "icestream_astigmatism_angstroms",
            "Defocus u less v of a micrograph with Thon rings.",
            buckets=(50, 100, 200, 300, 500, 750, 1000, 1500, 2000, 5000),
            registry=self.registry,
        )
        self.ice_ratio = Histogram(
            "icestream_ice_ratio",
            "Strength of the 3.7 A ice ring over that of the first CTF maximum; about 0 without crystals.",
            buckets=(0, 0.1, 0.25, 0.5, 0.75, 1, 1.5, 2, 5, 10),
            registry=self.registry,
        )
        self.masked = Histogram(
            "icestream_masked_field_ratio",
            "Part of a micrograph that is carbon, contamination or ice, 0 to 1.",
            buckets=(0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1),
            registry=self.registry,
        )
        self.rejected = Gauge(
            "icestream_rejected_exposures",
            "Exposures rejected now, by the limit that rejected them (overruled: a person did).",
            ["rule"],
            registry=self.registry,
        )
        for rule in REJECTION_RULES:
            self.rejected.labels(rule)
        self.gain_residual = Gauge(
            "icestream_gain_residual",
            "Part of the gain reference's detail left in the corrected frames, mean of the latest movies; 0 when it fits.",
            registry=self.registry,
        )
        self.gain_residual.set(math.nan)  # not shown until there are enough movies
        self.gain_residual_limit = Gauge(
            "icestream_gain_residual_limit",
            "The configured limit on the absolute value of icestream_gain_residual.",
            registry=self.registry,
        )
        self.gain_residual_limit.set(math.nan)
        self.gain_unknown = Gauge(
            "icestream_gain_orientation_unknown",
            "1 when no orientation of the gain reference was found and every movie is held back.",
            registry=self.registry,
        )

    def _declare_runs(self) -> None:
        self.runs = Counter(
            "icestream_controller_runs_total",
            "Engine runs by what they were for and outcome.",
            ["kind", "outcome"],
            registry=self.registry,
        )
        for kind in RUN_KINDS:
            for outcome in RUN_OUTCOMES:
                self.runs.labels(kind, outcome)
        self.campaigns = Counter(
            "icestream_campaigns_total",
            "Campaigns of engine runs that were started, by what they were due for.",
            ["trigger"],
            registry=self.registry,
        )
        for trigger in CAMPAIGN_TRIGGERS:
            self.campaigns.labels(trigger)
        # Absent, not zero, until a run has measured them: a resolution of 0 would be a lie.
        self.accepted_map = MapGauges(self.registry, "icestream", "the accepted map")
        self.latest_run = MapGauges(
            self.registry, "icestream_latest_run", "the latest run on all views that ended, accepted or not"
        )

    def _declare_advice(self) -> None:
        self.advice = Gauge(
            "icestream_advice",
            "Advice that stands, by what it is about: 0 none, 1 good to know, 2 something is wrong.",
            ["kind"],
            registry=self.registry,
        )
        for kind in ADVICE_KINDS:
            self.advice.labels(kind)
        self.predicted_gain = Gauge(
            "icestream_predicted_gain_angstroms",
            "What twice the particles are predicted to gain in resolution: expected, and low and high end of its band.",
            ["bound"],
            registry=self.registry,
        )

    def _declare_machine(self) -> None:
        self.disk_free = Gauge(
            "icestream_disk_free_bytes", "Free space of a volume in use.", ["volume"], registry=self.registry
        )
        self.disk_size = Gauge(
            "icestream_disk_size_bytes", "Size of a volume in use.", ["volume"], registry=self.registry
        )
        self.disk_low = Gauge(
            "icestream_disk_low",
            "1 while free space is under the reserve and work waits.",
            registry=self.registry,
        )
        self.worker_restarts = Counter(
            "icestream_worker_restarts_total",
            "Workers of a pool that died and were replaced.",
            ["pool"],
            registry=self.registry,
        )


def list_declared_names() -> frozenset[str]:
    """Return every sample name that the exporter can show, `_bucket`, `_sum` and `_count` included."""
    endings = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "info": ("_info",)}
    names: set[str] = set()
    for family in Series("0").registry.collect():
        names.update(family.name + ending for ending in endings.get(family.type, ("",)))
    return frozenset(names)
