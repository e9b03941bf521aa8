"""Numbers that the controller decides by; every one can be configured."""

from __future__ import annotations

from dataclasses import dataclass, field

from stream.control.advice import AdviceSettings
from stream.control.training import TrainingPolicy
from stream.records.values import ClusterSource, SweepPolicy


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPolicy:
    """When campaigns are due, what their runs are, and which map is accepted (CryoWizard's policy, incremental).

    A campaign is due at each of `rungs` (particles above τ), then whenever the count has grown by `growth_factor`;
    also when more than `rerun_loss_fraction` of the last one's particles were rejected. It is the whole search
    when it has at least `full_min_particles` and passes one of `full_rungs`, has no accepted map to continue,
    or is the last one; else it continues the accepted map, and beside that starts from nothing once the
    particles have multiplied by `rebuild_factor` since the last run from nothing. One in work is given up for
    a newer one when the particles have grown by `supersede_growth`.

    A run passes with a cFAR of at least `cfar_bound` (the paper's 0.15), or, where isotropic data of this box would
    give a low value, too, of `cfar_null_ratio` times that null value, unless the null is under `cfar_null_min`
    and cFAR can tell nothing. The ratio is 0.15 over the null of well-sampled small boxes, 0.6.
    """

    enabled: bool = True
    rungs: tuple[int, ...] = (2_000, 5_000, 10_000, 20_000, 50_000, 100_000)
    growth_factor: float = 1.5
    full_rungs: tuple[int, ...] = (10_000, 50_000)
    full_min_particles: int = 5_000
    final_min_particles: int = 200
    rebuild_factor: float = 4.0
    rerun_loss_fraction: float = 0.1
    supersede_growth: float = 2.0
    search_sizes: tuple[int, ...] = (50_000, 100_000)
    cfar_bound: float = 0.15
    cfar_null_ratio: float = 0.25
    cfar_null_min: float = 0.1
    sweep: SweepPolicy = SweepPolicy.PAPER
    n_parts: int = 4
    n_parts_light: int = 2
    part_min_particles: int = 1_000
    bound_scores: tuple[float, float] = (0.8, 0.1)
    turns: tuple[int, ...] = (8, 4, 4)
    orientation_branch: bool = True
    n_clusters: int = 8
    cluster_by: ClusterSource = ClusterSource.FEATURES
    cluster_min_particles: int = 500
    union_cfar_ratio: float = 0.5
    max_parallel_runs: int = 1
    symmetry: str = "C1"
    mask_diameter_angstrom: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ControllerSettings:
    """Thresholds and caps.

    `score_threshold` is τ of the Cryo-IEF paper (0.4). Limits on quality come by events (`QualityLimitsChanged`),
    because they change while a session runs.

    With `is_gain_orientation_sought` movies wait until the gain reference's orientation is known. The mean
    |residual| of the gain over `n_gain_residual_movies` movies is told of when it passes `max_gain_residual`.
    With `is_picking_by_template` new micrographs are picked with the accepted map once it has reached
    `template_min_resolution_angstrom`.
    """

    score_threshold: float = 0.4
    runs: RunPolicy = field(default_factory=RunPolicy)
    max_in_flight_preprocess: int = 4
    max_in_flight_rank: int = 16
    max_attempts: int = 3
    is_gain_orientation_sought: bool = False
    max_gain_residual: float = 0.2
    n_gain_residual_movies: int = 20
    is_picking_by_template: bool = False
    template_min_resolution_angstrom: float = 20.0
    advice: AdviceSettings = field(default_factory=AdviceSettings)
    training: TrainingPolicy = field(default_factory=TrainingPolicy)
