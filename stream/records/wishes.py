"""What a person decided about the runs and the exposures of a session: one frozen record for every kind of wish."""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import Enum

from stream.records.errors import ConfigurationError
from stream.records.values import RunId


class WishKind(Enum):
    """What is wished for; the value names the field of `Wish` that says which, where one does."""

    PIN_RUN = "pin_run"
    REJECT_RUN = "reject_run"
    SET_SYMMETRY = "set_symmetry"
    SET_MASK_DIAMETER = "set_mask_diameter"
    SET_SCORE_THRESHOLD = "set_score_threshold"
    FORCE_RUN = "force_run"
    EXCLUDE_TIME = "exclude_time"
    TRAIN_CRYOGEM = "train_cryogem"
    UNDO = "undo"


_FIELDS: dict[WishKind, frozenset[str]] = {
    WishKind.PIN_RUN: frozenset({"run_id"}),
    WishKind.REJECT_RUN: frozenset({"run_id"}),
    WishKind.SET_SYMMETRY: frozenset({"symmetry"}),
    WishKind.SET_MASK_DIAMETER: frozenset({"mask_diameter_angstrom"}),
    WishKind.SET_SCORE_THRESHOLD: frozenset({"score_threshold"}),
    WishKind.FORCE_RUN: frozenset(),
    WishKind.EXCLUDE_TIME: frozenset({"window"}),
    WishKind.TRAIN_CRYOGEM: frozenset(),
    WishKind.UNDO: frozenset({"decision_id"}),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeWindow:
    """From one moment to another, both included; seconds since the epoch."""

    from_s: float
    to_s: float

    def __post_init__(self) -> None:
        if not self.from_s <= self.to_s:
            raise ConfigurationError(
                "time window", "it ends after it begins", f"{self.from_s} to {self.to_s}"
            )

    def holds(self, at: float) -> bool:
        """Tell whether a moment lies in the window."""
        return self.from_s <= at <= self.to_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """One wish; exactly the fields that its kind needs are given.

    `decision_id` names the decision that an undo takes back ("d3": the third one of the journal).
    """

    kind: WishKind
    run_id: RunId | None = None
    symmetry: str | None = None
    mask_diameter_angstrom: float | None = None
    score_threshold: float | None = None
    window: TimeWindow | None = None
    decision_id: str | None = None

    def __post_init__(self) -> None:
        given = {f.name for f in fields(self) if f.name != "kind" and getattr(self, f.name) is not None}
        if given != _FIELDS[self.kind]:
            rule = f"a wish of this kind gives {', '.join(sorted(_FIELDS[self.kind])) or 'nothing more'}"
            raise ConfigurationError(self.kind.value, rule, ", ".join(sorted(given)) or "nothing")
