"""What the controller decided, and why, in words for a person."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """Something the controller decided, and why."""

    at: float
    what: str
    why: str


class DecisionLog:
    """The last thousand decisions; `n_decided` counts all of them, so that a reader knows what is new."""

    def __init__(self) -> None:
        self._kept: deque[Decision] = deque(maxlen=1000)
        self.n_decided = 0

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self) -> Iterator[Decision]:
        return iter(self._kept)

    def add(self, at: float, what: str, why: str) -> None:
        """Take note of a decision."""
        self._kept.append(Decision(at=at, what=what, why=why))
        self.n_decided += 1
