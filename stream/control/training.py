"""Training CryoGEM on a session's own data: when it is offered, whether a person wants it, what became of it.

A pure fold over the journal. The offer is made once, when there is a place for the training that is not the live stages', enough
good micrographs and an accepted map. Only a person's word starts it; taken back, it stops it.
"""

from __future__ import annotations

from dataclasses import dataclass

from stream.control.wishes import Wishes
from stream.records.events import Event, TrainingChanged
from stream.records.training import TrainingState
from stream.records.values import RunResult
from stream.records.wishes import Wish, WishKind

_ENDED = (TrainingState.DONE, TrainingState.FAILED)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingPolicy:
    """When CryoGEM is offered; `no_place` says why nothing is left for a training beside the live stages, or None."""

    min_micrographs: int = 100
    no_place: str | None = "cryogem.cpus is 0: no core is set aside for it"


class TrainingDesk:
    """What the journal says of trainings; `state` and `words` are the last one's, None before the offer."""

    def __init__(self, policy: TrainingPolicy) -> None:
        self.policy = policy
        self.state: TrainingState | None = None
        self.words = ""
        self._ended: set[str] = set()

    def take(self, event: TrainingChanged) -> None:
        """Fold in what became of a training."""
        self.state, self.words = event.state, event.words
        if event.state in _ENDED:
            self._ended.add(event.decision_id)

    def propose(self, at: float, n_good: int, accepted: RunResult | None) -> list[Event]:
        """Return the offer, once, when nothing speaks against a training."""
        if self.state is not None or accepted is None or self.find_refusal(n_good, accepted) is not None:
            return []
        resolution = accepted.resolution_angstrom
        at_resolution = "" if resolution is None else f" at {resolution:.1f} Å"
        words = (
            f"{n_good} good micrographs and a map ({accepted.run_id}{at_resolution}) are enough to learn this session's noise: "
            "icestream decide OUT --train-cryogem starts it, beside the live stages"
        )
        return [TrainingChanged(at=at, state=TrainingState.OFFERED, words=words)]

    def find_refusal(self, n_good: int, accepted: RunResult | None) -> str | None:
        """Return why no training can be started now, or None."""
        if self.policy.no_place is not None:
            return f"there is no place for it beside the live stages: {self.policy.no_place}"
        if n_good < self.policy.min_micrographs:
            return f"it takes {self.policy.min_micrographs} good micrographs (cryogem.min_micrographs), there are {n_good}"
        return "it takes an accepted map, there is none yet" if accepted is None else None

    def find_wanted(self, wishes: Wishes) -> str | None:
        """Return the decision whose training is to run: the last that stands and has not ended, or None."""
        asked = [
            d.decision_id
            for d in wishes.history
            if isinstance(d.content, Wish) and d.content.kind is WishKind.TRAIN_CRYOGEM and not d.is_undone
        ]
        return asked[-1] if asked and asked[-1] not in self._ended else None
