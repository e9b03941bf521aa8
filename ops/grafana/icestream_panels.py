"""The dashboard's rows and panels as values: title, query, unit, size. `generate.py` turns them into Grafana's JSON.

Window lengths are fixed (10 min for rates, 30 min for quantiles) because a session gives some 300 movies an
hour, which Grafana's own `$__rate_interval` of a minute would turn into noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

ME = 'instance=~"$instance"'
RAY = 'SessionName=~"$ray_session"'


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """One PromQL expression with its legend; `kind` is Grafana's result format."""

    expr: str
    legend: str = ""
    kind: str = "time_series"


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One panel: what it shows, in which unit, how wide (of 24) and high."""

    title: str
    about: str
    queries: tuple[Query, ...]
    kind: str = "timeseries"
    unit: str = "short"
    width: int = 8
    height: int = 8
    minimum: float | None = None
    maximum: float | None = None
    decimals: int | None = None
    is_stacked: bool = False
    thresholds: tuple[tuple[float | None, str], ...] = ()
    mappings: tuple[tuple[str, str, str], ...] = ()
    axes: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A titled row of panels; a collapsed one loads when it is opened."""

    title: str
    panels: tuple[Panel, ...]
    is_collapsed: bool = False


def stat(title: str, about: str, expr: str, **more: Any) -> Panel:  # noqa: ANN401 - passed on to Panel
    """Return a single figure."""
    return Panel(
        title=title, about=about, queries=(Query(expr=expr),), kind="stat", width=3, height=4, **more
    )


def quantiles(metric: str, labels: str, by: str) -> tuple[Query, ...]:
    """Return p50 and p95 of a histogram over half an hour, per value of label `by` ("" = none)."""
    legend = f"{{{{{by}}}}} " if by else ""
    grouped = f"le, instance, {by}" if by else "le, instance"
    return tuple(
        Query(
            expr=f"histogram_quantile({q}, sum by ({grouped}) (rate({metric}_bucket{{{labels}}}[30m])))",
            legend=f"{legend}p{round(100 * q)}",
        )
        for q in (0.5, 0.95)
    )


OVERVIEW = Row(
    title="Now",
    panels=(
        stat(
            "Session", "Is more input expected?", f"icestream_session_open{{{ME}}}",
            mappings=(("0", "closed", "text"), ("1", "open", "green")),
        ),
        stat("Movies done", "Ranked, or without particles.", f'icestream_exposures{{{ME}, state="done"}}'),
        stat(
            "Movies per hour", "Found, over 10 minutes.",
            f'3600 * sum by (instance) (rate(icestream_movies_total{{{ME}, stage="ingest", outcome="done"}}[10m]))',
            decimals=0,
        ),
        stat(
            "Waiting", "Exposures in all queues.", f"sum by (instance) (icestream_queue_depth{{{ME}}})",
            thresholds=((None, "green"), (20, "orange"), (200, "red")),
        ),
        stat(
            "Accepted particles", "Scored at or above the threshold.",
            f'icestream_particles_total{{{ME}, decision="accepted"}}',
        ),
        stat(
            "Resolution", "Accepted map, FSC 0.143.", f"icestream_map_resolution_angstroms{{{ME}}}",
            unit="suffix: Å", decimals=2,
        ),
        stat(
            "cFAR", "Accepted map; below 0.5 suggests preferred orientation.", f"icestream_cfar_ratio{{{ME}}}",
            unit="none", decimals=2, thresholds=((None, "red"), (0.5, "green")),
        ),
        stat(
            "Quarantined", "Share of all exposures found.",
            f'sum by (instance) (icestream_exposures{{{ME}, state="quarantined"}})'
            f" / (sum by (instance) (icestream_exposures_found{{{ME}}}) > 0)",
            unit="percentunit", decimals=1, thresholds=((None, "green"), (0.02, "red")),
        ),
    ),
)  # fmt: skip

PARTICLES = Row(
    title="Particles",
    panels=(
        Panel(
            title="Score distribution over time",
            about="CryoRanker score of the particles of each interval. Two bands: particles and junk.",
            queries=(
                Query(
                    expr=f"sum by (le) (increase(icestream_particle_score_bucket{{{ME}}}[10m]))",
                    legend="{{le}}", kind="heatmap",
                ),
            ),
            kind="heatmap", unit="none", width=12,
        ),
        Panel(
            title="Score distribution, whole session",
            about="Particles per score interval of 0.05; the label is the upper edge.",
            queries=(
                Query(expr=f"sum by (le) (icestream_particle_score_bucket{{{ME}}})", legend="{{le}}", kind="heatmap"),
            ),
            kind="bargauge", width=6,
        ),
        Panel(
            title="Median score",
            about="Of the latest 50 movies. A fall means worse ice, focus or drift.",
            queries=(Query(expr=f"icestream_particle_score_median{{{ME}}}", legend="{{instance}}"),),
            unit="none", width=6, minimum=0, maximum=1,
        ),
        Panel(
            title="Particles per hour", about="By the ranker's decision, over 10 minutes.",
            queries=(
                Query(
                    expr=f"3600 * sum by (decision) (rate(icestream_particles_total{{{ME}}}[10m]))",
                    legend="{{decision}}",
                ),
            ),
            is_stacked=True,
        ),
        Panel(
            title="Particles", about="In all, by decision, and picks.",
            queries=(
                Query(expr=f"sum by (decision) (icestream_particles_total{{{ME}}})", legend="{{decision}}"),
                Query(expr=f"sum(icestream_picks_total{{{ME}}})", legend="picks"),
            ),
        ),
    ),
)  # fmt: skip


def median(metric: str, legend: str) -> Query:
    """Return the median of a histogram over half an hour."""
    return Query(
        expr=f"histogram_quantile(0.5, sum by (le) (rate({metric}_bucket{{{ME}}}[30m])))", legend=legend
    )


QUALITY = Row(
    title="Quality of exposures",
    panels=(
        Panel(
            title="CTF fit and motion (median)",
            about="Fit limit of the Thon rings, and path length of the motion: in all, and over the first 4 e/Å².",
            queries=(
                median("icestream_ctf_fit_angstroms", "CTF fit"),
                median("icestream_total_motion_angstroms", "total motion"),
                median("icestream_early_motion_angstroms", "early motion"),
            ),
            unit="suffix: Å", minimum=0,
        ),
        Panel(
            title="Astigmatism (median)", about="Defocus u less v. A step means that the column changed.",
            queries=(median("icestream_astigmatism_angstroms", "astigmatism"),), unit="suffix: Å", minimum=0,
        ),
        Panel(
            title="Ice and mask (median)",
            about="Ice ratio, and the part of the field that is carbon, contamination or ice.",
            queries=(
                median("icestream_ice_ratio", "ice ratio"),
                median("icestream_masked_field_ratio", "masked part"),
            ),
            unit="none", minimum=0,
        ),
        Panel(
            title="Rejected by rule", about="Exposures rejected now, by the limit that rejected them.",
            queries=(
                Query(expr=f"sum by (rule) (icestream_rejected_exposures{{{ME}}})", legend="{{rule}}"),
            ),
            is_stacked=True, minimum=0,
        ),
        Panel(
            title="Particles in use", about="At or above the threshold in exposures that are not rejected.",
            queries=(Query(expr=f"icestream_particles_in_use{{{ME}}}", legend="{{instance}}"),), minimum=0,
        ),
        Panel(
            title="Gain residual", about="Part of the gain reference's detail left in the corrected frames; 0 when it fits.",
            queries=(
                Query(expr=f"icestream_gain_residual{{{ME}}}", legend="residual"),
                Query(expr=f"icestream_gain_residual_limit{{{ME}}}", legend="limit"),
            ),
            unit="none",
        ),
    ),
)  # fmt: skip

MAP = Row(
    title="Map",
    panels=(
        Panel(
            title="Resolution over time", about="Accepted map and latest run: corrected half-map FSC at 0.143.",
            queries=(
                Query(expr=f"icestream_map_resolution_angstroms{{{ME}}}", legend="accepted"),
                Query(expr=f"icestream_latest_run_map_resolution_angstroms{{{ME}}}", legend="latest run"),
            ),
            unit="suffix: Å", width=6, minimum=0,
        ),
        Panel(
            title="Resolution over particles", about="Each run is a point; the slope is the B-factor.",
            queries=(
                Query(expr=f"icestream_latest_run_map_particles{{{ME}}}", legend="particles"),
                Query(expr=f"icestream_latest_run_map_resolution_angstroms{{{ME}}}", legend="resolution"),
            ),
            kind="xychart", unit="suffix: Å", width=6, axes=("particles", "resolution"),
        ),
        Panel(
            title="cFAR and SCF*",
            about="Of the latest run, accepted or not. cFAR under 0.5 or half of its null value suggests preferred orientation; so does SCF* under 0.81. "
            "Low cFAR with high SCF* means junk.",
            queries=(
                Query(expr=f"icestream_latest_run_cfar_ratio{{{ME}}}", legend="cFAR"),
                Query(expr=f"icestream_latest_run_cfar_null_ratio{{{ME}}}", legend="cFAR of uniform views"),
                Query(expr=f"icestream_latest_run_scf_star_ratio{{{ME}}}", legend="SCF*"),
            ),
            unit="none", width=6, minimum=0, maximum=1,
        ),
        Panel(
            title="cFAR over particles", about="Each run is a point.",
            queries=(
                Query(expr=f"icestream_latest_run_map_particles{{{ME}}}", legend="particles"),
                Query(expr=f"icestream_latest_run_cfar_ratio{{{ME}}}", legend="cFAR"),
            ),
            kind="xychart", unit="none", width=6, axes=("particles", "cFAR"),
        ),
        Panel(
            title="Particles in the map", about="Of the accepted map, beside what a run would use now.",
            queries=(
                Query(expr=f"icestream_map_particles{{{ME}}}", legend="in the map"),
                Query(expr=f"icestream_particles_in_use{{{ME}}}", legend="in use"),
            ),
        ),
        Panel(
            title="Controller runs", about="Engine runs by what they were for and outcome.",
            queries=(
                Query(
                    expr=f"sum by (kind, outcome) (icestream_controller_runs_total{{{ME}}}) > 0",
                    legend="{{kind}} {{outcome}}",
                ),
            ),
        ),
        Panel(
            title="Campaigns", about="Rows of runs that were started, by what they were due for.",
            queries=(
                Query(expr=f"sum by (trigger) (icestream_campaigns_total{{{ME}}})", legend="{{trigger}}"),
            ),
        ),
        Panel(
            title="Advice", about="What stands now: 1 good to know, 2 something is wrong. icestream status has the words.",
            queries=(Query(expr=f"max by (kind) (icestream_advice{{{ME}}})", legend="{{kind}}"),),
            minimum=0, maximum=2,
        ),
        Panel(
            title="Predicted gain", about="What twice the particles would gain in resolution: expected, low and high end.",
            queries=(Query(expr=f"icestream_predicted_gain_angstroms{{{ME}}}", legend="{{bound}}"),),
            unit="suffix: Å", minimum=0,
        ),
        Panel(
            title="Run time", about="Mean duration of the engine runs of the last 6 hours.",
            queries=(
                Query(
                    expr=f'rate(icestream_stage_duration_seconds_sum{{{ME}, stage="engine"}}[6h])'
                    f' / rate(icestream_stage_duration_seconds_count{{{ME}, stage="engine"}}[6h])',
                    legend="mean",
                ),
            ),
            unit="s", minimum=0,
        ),
    ),
)  # fmt: skip

FLOW = Row(
    title="Throughput and latency",
    panels=(
        Panel(
            title="Throughput", about="Exposures that a stage finished, over 10 minutes.",
            queries=(
                Query(
                    expr=f'3600 * sum by (stage) (rate(icestream_movies_total{{{ME}, outcome="done"}}[10m]))',
                    legend="{{stage}}",
                ),
            ),
            unit="suffix: /h", minimum=0,
        ),
        Panel(
            title="Latency from found to milestone", about="Waiting included; movies followed live.",
            queries=quantiles("icestream_movie_latency_seconds", ME, "milestone"), unit="s", minimum=0,
        ),
        Panel(
            title="Time since last movie", about="The alert fires at three times the expected interval.",
            queries=(
                Query(
                    expr=f"time() - (icestream_last_movie_timestamp_seconds{{{ME}}} > 0)", legend="since last movie"
                ),
                Query(
                    expr=f"3 * clamp_min(icestream_expected_movie_interval_seconds{{{ME}}}, 60)", legend="alert limit"
                ),
            ),
            unit="s", minimum=0,
        ),
        Panel(
            title="Stage time", about="Working time per exposure (engine: per run), p50 and p95 over 30 minutes.",
            queries=quantiles("icestream_stage_duration_seconds", f'{ME}, stage!="engine"', "stage"),
            unit="s", minimum=0,
        ),
        Panel(
            title="Step time p95", about="Steps within the stages.",
            queries=(
                Query(
                    expr="histogram_quantile(0.95, sum by (le, stage, step) "
                    f"(rate(icestream_step_duration_seconds_bucket{{{ME}}}[30m])))",
                    legend="{{stage}} {{step}}",
                ),
            ),
            unit="s", minimum=0,
        ),
        Panel(
            title="Input", about="Bytes of valid input files found.",
            queries=(Query(expr=f"rate(icestream_ingest_bytes_total{{{ME}}}[10m])", legend="{{instance}}"),),
            unit="Bps", minimum=0,
        ),
    ),
)  # fmt: skip

BOOKS = Row(
    title="Backlog and books",
    panels=(
        Panel(
            title="Backlog", about="Exposures that wait for a stage.",
            queries=(Query(expr=f"icestream_queue_depth{{{ME}}}", legend="{{stage}}"),), minimum=0,
        ),
        Panel(
            title="In flight", about="Exposures that a stage works on.",
            queries=(Query(expr=f"icestream_inflight{{{ME}}}", legend="{{stage}}"),), minimum=0,
        ),
        Panel(
            title="Every exposure in one state", about="The states, stacked, reach what was found.",
            queries=(
                Query(expr=f"sum by (state) (icestream_exposures{{{ME}}})", legend="{{state}}"),
            ),
            is_stacked=True, minimum=0,
        ),
        Panel(
            title="Exposures not accounted for", about="Found less the sum of all states: always 0.",
            queries=(
                Query(
                    expr=f"sum by (instance) (icestream_exposures_found{{{ME}}})"
                    f" - sum by (instance) (icestream_exposures{{{ME}}})",
                    legend="{{instance}}",
                ),
            ),
            thresholds=((None, "green"), (1, "red")),
        ),
        Panel(
            title="Quarantine by reason", about="In quarantine now.",
            queries=(
                Query(expr=f"sum by (reason) (icestream_quarantined_movies{{{ME}}})", legend="{{reason}}"),
            ),
            is_stacked=True, minimum=0,
        ),
        Panel(
            title="Failures per hour", about="By stage and owner: the input's, or the machine's (tried again).",
            queries=(
                Query(
                    expr=f'3600 * sum by (stage, outcome) (rate(icestream_movies_total{{{ME}, outcome!="done"}}[10m]))',
                    legend="{{stage}} {{outcome}}",
                ),
            ),
            minimum=0,
        ),
    ),
)  # fmt: skip

MACHINE = Row(
    title="Machine",
    panels=(
        Panel(
            title="Disk free", about="And where it will be in four hours at the rate of the last one.",
            queries=(
                Query(expr=f"icestream_disk_free_bytes{{{ME}}}", legend="{{volume}}"),
                Query(
                    expr=f"clamp_min(predict_linear(icestream_disk_free_bytes{{{ME}}}[1h], 4 * 3600), 0)",
                    legend="{{volume}} in 4 h",
                ),
            ),
            unit="bytes", minimum=0,
        ),
        Panel(
            title="Disk free, share", about="The alert fires under 10 %.",
            queries=(
                Query(
                    expr=f"icestream_disk_free_bytes{{{ME}}} / icestream_disk_size_bytes{{{ME}}}", legend="{{volume}}"
                ),
            ),
            unit="percentunit", width=4, minimum=0, maximum=1,
        ),
        Panel(
            title="Feature cache", about="Share of scores that were known already.",
            queries=(
                Query(
                    expr=f"icestream_feature_cache_hits_total{{{ME}}} / ((icestream_feature_cache_hits_total{{{ME}}}"
                    f" + icestream_feature_cache_misses_total{{{ME}}}) > 0)",
                    legend="hits",
                ),
            ),
            unit="percentunit", width=4, minimum=0, maximum=1,
        ),
        Panel(
            title="Feature cache size", about="On disk.",
            queries=(Query(expr=f"icestream_feature_cache_bytes{{{ME}}}", legend="{{instance}}"),),
            unit="bytes", width=4, minimum=0,
        ),
        Panel(
            title="Ranker batch", about="Particles per batch; small ones waste the GPU.",
            queries=quantiles("icestream_batch_size", ME, ""), width=4, minimum=0,
        ),
        Panel(
            title="Service memory", about="Resident memory of the service process.",
            queries=(Query(expr=f'process_resident_memory_bytes{{job="icestream", {ME}}}', legend="{{instance}}"),),
            unit="bytes", minimum=0,
        ),
        Panel(
            title="Service CPU", about="Cores used by the service process.",
            queries=(
                Query(expr=f'rate(process_cpu_seconds_total{{job="icestream", {ME}}}[5m])', legend="{{instance}}"),
            ),
            unit="none", minimum=0,
        ),
        Panel(
            title="Worker restarts per hour", about="Workers that died and were replaced.",
            queries=(
                Query(
                    expr=f"sum by (pool) (increase(icestream_worker_restarts_total{{{ME}}}[1h]))", legend="{{pool}}"
                ),
            ),
            minimum=0,
        ),
    ),
)  # fmt: skip

RAY_ROW = Row(
    title="Ray",
    is_collapsed=True,
    panels=(
        Panel(
            title="Actors", about="By state.",
            queries=(Query(expr=f"sum by (State) (ray_actors{{{RAY}}})", legend="{{State}}"),), minimum=0,
        ),
        Panel(
            title="Tasks", about="By state, finished ones left out.",
            queries=(
                Query(
                    expr=f'sum by (State) (ray_tasks{{{RAY}, State!~"FINISHED|FAILED"}})', legend="{{State}}"
                ),
            ),
            minimum=0,
        ),
        Panel(
            title="Object store", about="By place; anything SPILLED is a fault, only small records travel through it.",
            queries=(
                Query(expr=f"sum by (Location) (ray_object_store_memory{{{RAY}}})", legend="{{Location}}"),
            ),
            unit="bytes", is_stacked=True, minimum=0,
        ),
        Panel(
            title="Resources in use", about="Logical resources.",
            queries=(
                Query(expr=f'sum by (Name) (ray_resources{{{RAY}, State="USED", Name=~"CPU|GPU"}})', legend="{{Name}}"),
            ),
            minimum=0,
        ),
        Panel(
            title="Node CPU", about="Per node.",
            queries=(Query(expr=f"ray_node_cpu_utilization{{{RAY}}}", legend="{{instance}}"),),
            unit="percent", minimum=0, maximum=100,
        ),
        Panel(
            title="GPU use", about="Per device.",
            queries=(Query(expr=f"ray_node_gpus_utilization{{{RAY}}}", legend="{{instance}} {{GpuIndex}}"),),
            unit="percent", minimum=0, maximum=100,
        ),
    ),
)  # fmt: skip

ROWS = (OVERVIEW, PARTICLES, QUALITY, MAP, FLOW, BOOKS, MACHINE, RAY_ROW)
