"""Numbers that the controller decides by; every one can be configured."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ControllerSettings:
    """Thresholds, caps and the ladder of runs.

    `score_threshold` is τ of the Cryo-IEF paper (0.4). A first run starts at `first_run_particles` above τ;
    a next one when the count has grown by `growth_factor`. Runs with a cFAR under `cfar_bound` are kept but
    never become the accepted map while another one passes (the paper's 0.15). Quality limits that are None
    are not applied.
    """

    score_threshold: float = 0.4
    first_run_particles: int = 2000
    growth_factor: float = 1.5
    rebuild_factor: float = 4.0
    final_run_min_particles: int = 200
    cfar_bound: float = 0.15
    max_in_flight_preprocess: int = 4
    max_in_flight_rank: int = 16
    max_attempts: int = 3
    max_ctf_fit_angstrom: float | None = None
    max_total_motion_angstrom: float | None = None
    runs_enabled: bool = True
