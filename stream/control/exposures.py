"""Life of an exposure: where each one is, and which moves are legal.

waiting ──▶ in work ──▶ waiting (next stage) ──▶ … ──▶ done
▲  │        │  │                                       ▲ │
│  └────────┼──┴────────▶ rejected (a limit or a word) ┴─┘
└───────────┴───────────▶ quarantined (bad input, or a stage that failed too often)

A rejected exposure that is accepted again goes on where it was: back to done with its scores, or to be ranked.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from enum import Enum

from stream.control.quality import OVERRULED, Breach, QualityFigures, judge
from stream.records.errors import InvariantError
from stream.records.values import (
    Exposure,
    ExposureId,
    FileIdentity,
    HalfSet,
    PreprocessResult,
    QualityLimits,
    Stage,
)


class ExposureState(Enum):
    """Where an exposure is; each is in exactly one state."""

    WAITING = "waiting"
    IN_WORK = "in_work"
    DONE = "done"
    REJECTED = "rejected"
    QUARANTINED = "quarantined"


LEGAL_MOVES: dict[ExposureState, frozenset[ExposureState]] = {
    ExposureState.WAITING: frozenset(
        {ExposureState.IN_WORK, ExposureState.REJECTED, ExposureState.QUARANTINED}
    ),
    ExposureState.IN_WORK: frozenset(
        {ExposureState.WAITING, ExposureState.DONE, ExposureState.REJECTED, ExposureState.QUARANTINED}
    ),
    ExposureState.DONE: frozenset({ExposureState.WAITING, ExposureState.REJECTED}),
    ExposureState.REJECTED: frozenset({ExposureState.WAITING, ExposureState.REJECTED, ExposureState.DONE}),
    ExposureState.QUARANTINED: frozenset({ExposureState.WAITING, ExposureState.QUARANTINED}),
}


@dataclass(slots=True, kw_only=True)
class ExposureRecord:
    """What the controller knows of one exposure.

    `preprocessed` is dropped once it is ranked; `figures` stay, so that it can be judged again. `file_in_work`
    is the version of the file that preprocessing was given, `half_set_weight` the particles it counts with in
    its half-set. `overruled_as` is a person's word (True = accepted), which wins over every limit.
    """

    exposure_id: ExposureId
    name: str
    file: FileIdentity
    exposure: Exposure | None
    state: ExposureState
    file_in_work: FileIdentity | None = None
    stage: Stage = Stage.PREPROCESS
    attempts: int = 0
    reason: str = ""
    half_set: HalfSet | None = None
    preprocessed: PreprocessResult | None = None
    n_particles: int = 0
    n_excluded: int = 0
    n_unscored: int = 0
    model_hash: str = ""
    score_histogram: array[int] | None = None
    pixel_size_angstrom: float | None = None
    half_set_weight: int = 0
    figures: QualityFigures | None = None
    rejected_by: str = ""
    overruled_as: bool | None = None
    overruled_because: str = ""

    def find_breach(self, limits: QualityLimits) -> Breach | None:
        """Return why the exposure is not to be used, or None: a person's word first, then the limits."""
        if self.overruled_as is not None:
            if self.overruled_as:
                return None
            return Breach(rule=OVERRULED, reason=f"rejected by hand: {self.overruled_because}")
        return None if self.figures is None else judge(self.figures, limits)

    def move(self, target: ExposureState, reason: str = "") -> None:
        """Change state, or raise with the item's story when the move is not legal."""
        if target not in LEGAL_MOVES[self.state]:
            raise InvariantError(
                self.name, f"an exposure that is {self.state.value} cannot become {target.value}", self.reason
            )
        self.state = target
        self.reason = reason
