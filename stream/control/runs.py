"""When an engine run is due, which of two is wanted, and which result is the accepted map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from stream.control.settings import ControllerSettings
from stream.records.values import RunId, RunRequest, RunResult


class RunState(Enum):
    """Where a run is."""

    QUEUED = "queued"
    RUNNING = "running"
    ENDED = "ended"
    FAILED = "failed"
    SUPERSEDED = "superseded"


@dataclass(slots=True, kw_only=True)
class RunRecord:
    """One run's story; `verdict` says in words what the controller made of its result."""

    request: RunRequest
    state: RunState
    result: RunResult | None = None
    verdict: str = ""


def find_reason_to_run(n_particles: int, n_last_run: int | None, settings: ControllerSettings) -> str | None:
    """Return why a run is due at `n_particles` above the threshold, or None."""
    if n_last_run is None:
        if n_particles < settings.first_run_particles:
            return None
        rule = f"the first rung is {settings.first_run_particles}"
        return f"{n_particles} particles score above {settings.score_threshold}: {rule}"
    if n_particles < settings.growth_factor * n_last_run:
        return None
    return (
        f"{n_particles} particles score above {settings.score_threshold}: {n_particles / n_last_run:.2f} times "
        f"the last run's {n_last_run} (rule: {settings.growth_factor})"
    )


def find_reason_to_rerun(
    n_lost: int, n_particles: int, n_last_run: int | None, settings: ControllerSettings
) -> str | None:
    """Return why a run is due because particles of the last one were rejected since, or None.

    `n_lost` are those that the last run used and that count no more, `n_particles` those that count now. What
    was accepted again needs no rule of its own: it is growth.
    """
    if not n_last_run or n_lost <= settings.rerun_loss_fraction * n_last_run:
        return None
    if n_particles < settings.final_run_min_particles:
        return None
    return (
        f"{n_lost} of the last run's {n_last_run} particles have been rejected since "
        f"(rule: more than {settings.rerun_loss_fraction:g} of them), {n_particles} are left"
    )


def find_reason_for_final_run(
    n_particles: int, n_last_run: int | None, settings: ControllerSettings
) -> str | None:
    """Return why a last run is due when no more input comes, or None."""
    if n_particles < settings.final_run_min_particles or n_particles <= (n_last_run or 0):
        return None
    return f"no more input: all {n_particles} particles above {settings.score_threshold} (last run: {n_last_run or 0})"


def is_accepted(result: RunResult, settings: ControllerSettings) -> bool:
    """Tell whether a result may become the accepted map: resolved, and not below the cFAR bound."""
    return result.resolution_angstrom is not None and (result.cfar or 0.0) >= settings.cfar_bound


def choose_template(best: RunResult | None, settings: ControllerSettings) -> RunId | None:
    """Return the run whose map new micrographs are picked with, or None while blobs have to do."""
    if best is None or best.resolution_angstrom is None or not settings.is_picking_by_template:
        return None
    limit = settings.template_min_resolution_angstrom
    return best.run_id if best.resolution_angstrom <= limit else None


def select_best(results: Sequence[RunResult], settings: ControllerSettings) -> RunResult | None:
    """Return the accepted result of best resolution (ties: the later one), or None."""
    accepted = [r for r in results if is_accepted(r, settings)]
    return min(reversed(accepted), key=lambda r: r.resolution_angstrom or 0.0, default=None)


def choose_warm_start(
    runs: Sequence[RunRecord], n_particles: int, settings: ControllerSettings
) -> RunId | None:
    """Return the run to start from: the best accepted one, unless the count calls for a rebuild from nothing.

    A rebuild is due when the particles have multiplied by `rebuild_factor` since the last run from nothing,
    because an accumulated answer can drift.
    """
    results = [r.result for r in runs if r.result is not None]
    best = select_best(results, settings)
    if best is None:
        return None
    cold = [r.request.n_particles for r in runs if r.result is not None and r.request.warm_start is None]
    if cold and n_particles >= settings.rebuild_factor * max(cold):
        return None
    return best.run_id


def describe_verdict(result: RunResult, settings: ControllerSettings) -> str:
    """Say in words what a result means."""
    if result.resolution_angstrom is None:
        reason = "the half maps do not agree at any resolution"
        return f"not accepted: {reason} ({result.note})" if result.note else f"not accepted: {reason}"
    cfar = "unknown" if result.cfar is None else f"{result.cfar:.2f}"
    if not is_accepted(result, settings):
        return (
            f"kept, not accepted: {result.resolution_angstrom:.2f} Å but cFAR {cfar} is under "
            f"{settings.cfar_bound}: preferred orientation"
        )
    return f"accepted: {result.resolution_angstrom:.2f} Å, cFAR {cfar}"
