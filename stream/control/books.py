"""The books: every exposure, the state it is in, and the counts that follow from the states.

The counts are kept, not recounted, because sessions grow to 100,000 exposures; `check` recounts and compares.
A particle counts while its exposure is done: rejecting an exposure takes its particles out, accepting it again
brings exactly those back, because scores and half-set stay with the exposure.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter

from stream.control.exposures import ExposureRecord, ExposureState
from stream.records.commands import RunMember
from stream.records.errors import InvariantError
from stream.records.values import ExposureId, HalfSet

MAX_IMBALANCE = 0.1
"""Halves of 55 : 45 differ in resolution by little; 0.05-0.3 make sense: smaller ones depend more on the arrival."""


class ExposureBooks:
    """Every exposure and what is counted over them."""

    def __init__(self, score_threshold: float) -> None:
        self.score_threshold = score_threshold
        self.model_hash = ""
        self.records: dict[ExposureId, ExposureRecord] = {}
        self.n_by_state: Counter[ExposureState] = Counter()
        self.n_rejected_by: Counter[str] = Counter()
        self.n_half_sets_by_balance = 0
        self.version = 0
        self._scores: dict[str, list[int]] = {}
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
        """Give an exposure its half-set; it never changes afterwards.

        It is a hash of the exposure's id, unless that half is ahead by more than `MAX_IMBALANCE` of all particles;
        then it is the other one. `n_half_sets_by_balance` counts these: they alone depend on the order of arrival.
        """
        if record.half_set is not None:
            return
        own = hash_half_set(record.exposure_id)
        other: HalfSet = 2 if own == 1 else 1
        sizes = self._half_sizes
        is_ahead = sizes[own] - sizes[other] > MAX_IMBALANCE * (sizes[1] + sizes[2])
        record.half_set = other if is_ahead else own
        self.n_half_sets_by_balance += is_ahead
        self._weigh(record)

    @property
    def n_above_threshold(self) -> int:
        """Particles above τ, by the scores of the model that scored last, in the exposures that count."""
        return self.count_in_use(self.score_threshold)

    @property
    def is_every_score_current(self) -> bool:
        """True when no particle that counts has only a score of an earlier model."""
        return not any(any(scores) for model, scores in self._scores.items() if model != self.model_hash)

    @property
    def is_ranking_flat(self) -> bool:
        """True when all scores above τ fall into one bin: they rank nothing."""
        scores = self._scores.get(self.model_hash, [])
        return sum(n > 0 for n in scores[_first_bin(self.score_threshold, len(scores)) :]) == 1

    def count_in_use(self, threshold: float) -> int:
        """Count the particles above a score in the exposures that count."""
        scores = self._scores.get(self.model_hash, [])
        return sum(scores[_first_bin(threshold, len(scores)) :])

    def count_above(self, record: ExposureRecord) -> int:
        """Count an exposure's particles above the threshold, whatever its state."""
        histogram: array[int] | None = record.score_histogram
        if histogram is None:
            return 0
        return sum(histogram[_first_bin(self.score_threshold, len(histogram)) :])

    def list_members(self) -> tuple[RunMember, ...]:
        """Return every done exposure with particles and its half-set, by name: not by arrival."""
        members = (
            RunMember(exposure_id=r.exposure_id, name=r.name, half_set=r.half_set)
            for r in self.records.values()
            if r.state is ExposureState.DONE and r.half_set is not None and r.n_particles
        )
        return tuple(sorted(members, key=lambda m: m.name))

    def check(self) -> None:
        """Raise `InvariantError` when a kept count differs from a recount."""
        records = self.records.values()
        counted = ExposureBooks(self.score_threshold)
        for record in records:
            if record.state is ExposureState.DONE:
                counted._add_scores(record, 1)
        rejected = [r for r in records if r.state is ExposureState.REJECTED]
        halves: dict[HalfSet, int] = {1: 0, 2: 0}
        for record in records:
            if record.half_set is not None and record.state is not ExposureState.REJECTED:
                halves[record.half_set] += record.n_particles
        pairs: tuple[tuple[str, object, object], ...] = (
            ("states", +self.n_by_state, +Counter(r.state for r in records)),
            ("rejected exposures by rule", +self.n_rejected_by, +Counter(r.rejected_by for r in rejected)),
            ("scores", _without_zeros(self._scores), _without_zeros(counted._scores)),
            ("particles in half-sets", self._half_sizes, halves),
        )
        for what, kept, recounted in pairs:
            if kept != recounted:
                raise InvariantError(what, f"kept counts equal counted ones ({recounted})", kept)

    def _count(self, record: ExposureRecord, sign: int) -> None:
        self.n_by_state[record.state] += sign
        if record.state is ExposureState.DONE:
            self.version += 1
            self._add_scores(record, sign)
        elif record.state is ExposureState.REJECTED:
            self.n_rejected_by[record.rejected_by] += sign

    def _add_scores(self, record: ExposureRecord, sign: int) -> None:
        if record.score_histogram is None:
            return
        scores = self._scores.setdefault(record.model_hash, [0] * len(record.score_histogram))
        for i, n in enumerate(record.score_histogram):
            scores[i] += sign * n

    def _weigh(self, record: ExposureRecord) -> None:
        """Let the half-sets' sizes follow an exposure: a rejected one weighs nothing."""
        if record.half_set is None:
            return
        weight = 0 if record.state is ExposureState.REJECTED else record.n_particles
        self._half_sizes[record.half_set] += weight - record.half_set_weight
        record.half_set_weight = weight


def hash_half_set(exposure_id: ExposureId) -> HalfSet:
    """Return the half-set that an exposure's id alone gives it."""
    return 1 if hashlib.blake2b(exposure_id.encode(), digest_size=1).digest()[0] % 2 else 2


def _first_bin(threshold: float, n_bins: int) -> int:
    return round(threshold * n_bins)


def _without_zeros(scores: dict[str, list[int]]) -> dict[str, list[int]]:
    return {model: counts for model, counts in scores.items() if any(counts)}
