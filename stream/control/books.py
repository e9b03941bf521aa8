"""The books: every exposure, the state it is in, and the counts that follow from the states.

The counts are kept, not recounted, because sessions grow to 100,000 exposures; `check` recounts and compares.
A particle counts while its exposure is done: rejecting an exposure takes its particles out, accepting it again
brings exactly those back, because scores and half-set stay with the exposure.
"""

from __future__ import annotations

from array import array
from collections import Counter

from stream.control.exposures import ExposureRecord, ExposureState
from stream.records.commands import RunMember
from stream.records.errors import InvariantError
from stream.records.values import ExposureId, HalfSet


class ExposureBooks:
    """Every exposure and what is counted over them."""

    def __init__(self, score_threshold: float) -> None:
        self._score_threshold = score_threshold
        self.records: dict[ExposureId, ExposureRecord] = {}
        self.n_by_state: Counter[ExposureState] = Counter()
        self.n_rejected_by: Counter[str] = Counter()
        self.n_above_threshold = 0
        self._half_sizes: dict[HalfSet, int] = {1: 0, 2: 0}

    def add(self, record: ExposureRecord) -> None:
        """Take a new exposure in the state it has."""
        self.records[record.exposure_id] = record
        self.n_by_state[record.state] += 1

    def move(self, record: ExposureRecord, target: ExposureState, reason: str = "", rule: str = "") -> None:
        """Change an exposure's state and every count that follows from it; `rule` is what rejected it."""
        self._count(record, -1)
        record.move(target, reason)
        record.rejected_by = rule
        self._count(record, 1)
        self._weigh(record)

    def assign_half_set(self, record: ExposureRecord) -> None:
        """Give an exposure its half-set, the smaller one of those in use; it never changes afterwards."""
        if record.half_set is None:
            record.half_set = 1 if self._half_sizes[1] <= self._half_sizes[2] else 2
            self._weigh(record)

    def count_above(self, record: ExposureRecord) -> int:
        """Count an exposure's particles above the threshold, whatever its state."""
        histogram: array[int] | None = record.score_histogram
        if histogram is None:
            return 0
        return sum(histogram[round(self._score_threshold * len(histogram)) :])

    def list_members(self) -> tuple[RunMember, ...]:
        """Return every done exposure with particles and its half-set, in order of arrival."""
        return tuple(
            RunMember(exposure_id=r.exposure_id, name=r.name, half_set=r.half_set)
            for r in self.records.values()
            if r.state is ExposureState.DONE and r.half_set is not None and r.n_particles
        )

    @property
    def model_hash(self) -> str:
        """The model that scored last, "" before any did."""
        return next((r.model_hash for r in reversed(self.records.values()) if r.model_hash), "")

    def check(self) -> None:
        """Raise `InvariantError` when a kept count differs from a recount."""
        records = self.records.values()
        done = [r for r in records if r.state is ExposureState.DONE]
        rejected = [r for r in records if r.state is ExposureState.REJECTED]
        halves: dict[HalfSet, int] = {1: 0, 2: 0}
        for record in records:
            if record.half_set is not None and record.state is not ExposureState.REJECTED:
                halves[record.half_set] += record.n_particles
        pairs: tuple[tuple[str, object, object], ...] = (
            ("states", +self.n_by_state, +Counter(r.state for r in records)),
            ("rejected exposures by rule", +self.n_rejected_by, +Counter(r.rejected_by for r in rejected)),
            ("particles above threshold", self.n_above_threshold, sum(map(self.count_above, done))),
            ("particles in half-sets", self._half_sizes, halves),
        )
        for what, kept, counted in pairs:
            if kept != counted:
                raise InvariantError(what, f"kept counts equal counted ones ({counted})", kept)

    def _count(self, record: ExposureRecord, sign: int) -> None:
        self.n_by_state[record.state] += sign
        if record.state is ExposureState.DONE:
            self.n_above_threshold += sign * self.count_above(record)
        elif record.state is ExposureState.REJECTED:
            self.n_rejected_by[record.rejected_by] += sign

    def _weigh(self, record: ExposureRecord) -> None:
        """Let the half-sets' sizes follow an exposure: a rejected one weighs nothing."""
        if record.half_set is None:
            return
        weight = 0 if record.state is ExposureState.REJECTED else record.n_particles
        self._half_sizes[record.half_set] += weight - record.half_set_weight
        record.half_set_weight = weight
