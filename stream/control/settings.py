"""Numbers that the controller decides by; every one can be configured."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ControllerSettings:
    """Thresholds, caps and the ladder of runs.

    `score_threshold` is τ of the Cryo-IEF paper (0.4). A first run starts at `first_run_particles` above τ;
    a next one when the count has grown by `growth_factor`, or when more than `rerun_loss_fraction` of the last
    run's particles have been rejected since it started. Runs with a cFAR under `cfar_bound` are kept but never
    become the accepted map while another one passes (the paper's 0.15). Limits on quality come by events
    (`QualityLimitsChanged`), because they change while a session runs.

    With `is_gain_orientation_sought` movies wait until the gain reference's orientation is known. The mean
    |residual| of the gain over `n_gain_residual_movies` movies is told of when it passes `max_gain_residual`.
    With `is_picking_by_template` new micrographs are picked with the accepted map once it has reached
    `template_min_resolution_angstrom`.
    """

    score_threshold: float = 0.4
    first_run_particles: int = 2000
    growth_factor: float = 1.5
    rebuild_factor: float = 4.0
    rerun_loss_fraction: float = 0.1
    final_run_min_particles: int = 200
    cfar_bound: float = 0.15
    max_in_flight_preprocess: int = 4
    max_in_flight_rank: int = 16
    max_attempts: int = 3
    runs_enabled: bool = True
    is_gain_orientation_sought: bool = False
    max_gain_residual: float = 0.2
    n_gain_residual_movies: int = 20
    is_picking_by_template: bool = False
    template_min_resolution_angstrom: float = 20.0
