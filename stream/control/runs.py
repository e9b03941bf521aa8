"""One engine run: where it is, what its result is worth, and which of several is the best.

Edge cases, each with one rule: no resolution, or a cFAR that could not be determined, never passes. A
resolution at Nyquist is a bound and no measurement: such results are equal. Of equal resolutions the one with more
particles is better, then the earlier one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from stream.control.settings import ControllerSettings, RunPolicy
from stream.records.values import RunId, RunRequest, RunResult


class RunState(Enum):
    """Where a run is."""

    RUNNING = "running"
    CANCELLING = "cancelling"
    ENDED = "ended"
    FAILED = "failed"
    CANCELLED = "cancelled"


IN_WORK = frozenset({RunState.RUNNING, RunState.CANCELLING})


@dataclass(slots=True, kw_only=True)
class RunRecord:
    """One run's story; `verdict` says in words what the controller made of its result.

    `is_rejected` is a person's word: the run is never accepted and nothing starts from it.
    """

    request: RunRequest
    state: RunState = RunState.RUNNING
    result: RunResult | None = None
    verdict: str = ""
    is_rejected: bool = False

    @property
    def run_id(self) -> RunId:
        """The run's id."""
        return self.request.run_id


def without_nan(result: RunResult) -> RunResult:
    """Return the result with None for every figure that is not a finite number."""
    figures = ("resolution_angstrom", "cfar", "cfar_null", "scf_star", "nyquist_angstrom", "correlation")
    bad: dict[str, Any] = {n: None for n in figures if not math.isfinite(getattr(result, n) or 0.0)}
    return replace(result, **bad)


def find_cfar_bound(result: RunResult, policy: RunPolicy) -> float:
    """Return the cFAR that a result must reach, from the bound and from what isotropic data would give."""
    null = result.cfar_null
    if null is None or null < policy.cfar_null_min:
        return policy.cfar_bound
    return min(policy.cfar_bound, policy.cfar_null_ratio * null)


def share_of_null(result: RunResult) -> float:
    """Return cFAR over what isotropic data would give, 0 where either is unknown."""
    if result.cfar is None or not result.cfar_null:
        return 0.0
    return result.cfar / result.cfar_null


def has_passed(result: RunResult | None, policy: RunPolicy) -> bool:
    """Tell whether a result may become the accepted map: resolved, and not below the cFAR that it must reach."""
    if result is None or result.resolution_angstrom is None or result.cfar is None:
        return False
    return result.cfar >= find_cfar_bound(result, policy)


def honest_resolution(result: RunResult) -> float:
    """Return the resolution in Å, never finer than Nyquist; infinity where there is none."""
    if result.resolution_angstrom is None:
        return float("inf")
    return max(result.resolution_angstrom, result.nyquist_angstrom or 0.0)


def is_better(one: RunResult, other: RunResult) -> bool:
    """Tell whether the first is better than the second: finer resolution, then more particles."""
    return _rank(one) < _rank(other)


def choose_best(results: Iterable[RunResult]) -> RunResult | None:
    """Return the best of results in order of time, or None."""
    return min(results, key=_rank, default=None)


def _rank(result: RunResult) -> tuple[float, int]:
    return honest_resolution(result), -result.n_particles


def choose_template(accepted: RunResult | None, settings: ControllerSettings) -> RunId | None:
    """Return the run whose map new micrographs are picked with, or None while blobs have to do."""
    if accepted is None or accepted.resolution_angstrom is None or not settings.is_picking_by_template:
        return None
    limit = settings.template_min_resolution_angstrom
    return accepted.run_id if accepted.resolution_angstrom <= limit else None


def describe_result(result: RunResult) -> str:
    """Say resolution and cFAR in words."""
    if result.resolution_angstrom is None:
        return "no resolution"
    cfar = "unknown" if result.cfar is None else f"{result.cfar:.2f}"
    null = "" if result.cfar_null is None else f" (isotropic: {result.cfar_null:.2f})"
    return f"{result.resolution_angstrom:.2f} Å, cFAR {cfar}{null}"


def describe_verdict(result: RunResult, policy: RunPolicy) -> str:
    """Say in words what a result means."""
    if result.resolution_angstrom is None:
        reason = "the half maps do not agree at any resolution"
        return f"not accepted: {reason} ({result.note})" if result.note else f"not accepted: {reason}"
    words = describe_result(result)
    if result.cfar is None:
        return f"not accepted: {words}: without a cFAR nobody knows whether views are missing"
    bound = find_cfar_bound(result, policy)
    if result.cfar < bound:
        return f"not accepted: {words} is under {bound:.2f}: preferred orientation"
    if result.nyquist_angstrom is not None and result.resolution_angstrom <= result.nyquist_angstrom:
        words += ", at Nyquist: smaller pixels would show more"
    return f"passed: {words}"
