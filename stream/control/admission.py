"""Backpressure: small policies, each able to say "not now" and why.

A policy sees a few counts and answers None (go) or the reason to wait. One item may always move when
nothing is in work, except while draining, while the disk is full, or while the gain reference's orientation is
not known.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from stream.control.settings import ControllerSettings
from stream.records.values import Stage


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What admission may look at; `gain_hold` is why the gain reference cannot be used yet."""

    n_in_flight: int
    n_waiting_downstream: int
    is_draining: bool
    is_disk_low: bool
    gain_hold: str | None = None


Policy = Callable[[Stage, Load, ControllerSettings], str | None]


def refuse_while_draining(stage: Stage, load: Load, settings: ControllerSettings) -> str | None:  # noqa: ARG001
    """Start nothing new once the operator asked to stop."""
    return "draining" if load.is_draining else None


def refuse_while_disk_is_low(stage: Stage, load: Load, settings: ControllerSettings) -> str | None:  # noqa: ARG001
    """Write nothing while free space is under the reserve."""
    return "free disk space is under the reserve" if load.is_disk_low else None


def refuse_while_gain_is_unknown(stage: Stage, load: Load, settings: ControllerSettings) -> str | None:  # noqa: ARG001
    """Preprocess no movie before it is known how its gain reference is turned."""
    return load.gain_hold if stage is Stage.PREPROCESS else None


def refuse_over_cap(stage: Stage, load: Load, settings: ControllerSettings) -> str | None:
    """Keep at most the configured number of items in flight per stage."""
    caps = {
        Stage.PREPROCESS: settings.max_in_flight_preprocess,
        Stage.RANK: settings.max_in_flight_rank,
    }
    return f"{load.n_in_flight} in flight (cap {caps[stage]})" if load.n_in_flight >= caps[stage] else None


def refuse_while_downstream_is_full(stage: Stage, load: Load, settings: ControllerSettings) -> str | None:
    """Preprocess nothing more while more than four times the rank cap waits to be ranked."""
    limit = 4 * settings.max_in_flight_rank
    if stage is Stage.PREPROCESS and load.n_in_flight > 0 and load.n_waiting_downstream >= limit:
        return f"{load.n_waiting_downstream} exposures wait to be ranked (limit {limit})"
    return None


POLICIES: tuple[Policy, ...] = (
    refuse_while_draining,
    refuse_while_disk_is_low,
    refuse_while_gain_is_unknown,
    refuse_over_cap,
    refuse_while_downstream_is_full,
)


def find_reason_to_wait(stage: Stage, load: Load, settings: ControllerSettings) -> str | None:
    """Return the first policy's reason to wait, or None when an item may move."""
    return next((reason for policy in POLICIES if (reason := policy(stage, load, settings))), None)
