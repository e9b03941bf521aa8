"""How scores go with time: the latest exposures beside everything before them, at a cost that does not grow."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from operator import add
from statistics import fmean, stdev

from stream.control.quality import QualityFigures

N_RECENT = 50
"""Exposures that count as the latest: some 10,000 particles, minutes to an hour of a session."""

N_SCORE_BINS = 100

CAUSES = {
    "ctf_fit_angstrom": "the CTF fit",
    "astigmatism_angstrom": "astigmatism",
    "total_motion_angstrom": "motion",
    "ice_ratio": "ice",
    "crystalline_ice": "crystalline ice",
    "masked_fraction": "carbon or contamination",
}
"""Figures that are worse when they are larger, and what they are called."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seen:
    figures: QualityFigures | None
    histogram: tuple[int, ...]

    @property
    def median(self) -> float | None:
        """The exposure's own median, worked out when somebody asks: few of the exposures ever are."""
        return median_of(self.histogram)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreFall:
    """Pooled median before and over the latest exposures; `error` is the standard error of the latter.

    `correlation` is the strongest negative rank correlation of an exposure's median with a figure (`cause`), None
    where none stands out.
    """

    before: float
    latest: float
    error: float
    cause: str | None
    correlation: float | None


class ScoreTrend:
    """The latest exposures' scores and figures, and the pooled scores of all that came before."""

    def __init__(self) -> None:
        self._latest: deque[_Seen] = deque(maxlen=N_RECENT)
        self._previous: deque[_Seen] = deque(maxlen=N_RECENT)
        self._before = [0] * N_SCORE_BINS
        self._n_before = 0

    def add(self, figures: QualityFigures | None, histogram: Sequence[int]) -> None:
        """Take one exposure that was scored, or that has no particles (an empty histogram)."""
        if len(self._latest) == N_RECENT:
            oldest = self._latest[0]
            self._previous.append(oldest)
            if oldest.histogram:
                self._before = list(map(add, self._before, oldest.histogram))
                self._n_before += 1
        self._latest.append(_Seen(figures=figures, histogram=tuple(histogram)))

    @property
    def n_latest(self) -> int:
        """Exposures among the latest."""
        return len(self._latest)

    def mean_above(self, score_threshold: float) -> float | None:
        """Return the latest exposures' mean number of particles at or above the threshold."""
        if not self._latest:
            return None
        first = round(score_threshold * N_SCORE_BINS)
        return fmean(sum(seen.histogram[first:]) for seen in self._latest)

    def mean_picks(self) -> float | None:
        """Return the latest exposures' mean number of picks, None where it is not known."""
        known = [seen.figures.n_picks for seen in self._latest if seen.figures is not None]
        return fmean(known) if known else None

    def compare(self) -> ScoreFall | None:
        """Compare the latest exposures with all before them, or None while there are too few of either."""
        before = median_of(self._before)
        medians = [median for seen in self._latest if (median := seen.median) is not None]
        if before is None or self._n_before < N_RECENT or len(medians) < N_RECENT // 2:
            return None
        pooled = [
            sum(column) for column in zip(*(s.histogram for s in self._latest if s.histogram), strict=True)
        ]
        latest = median_of(pooled)
        if latest is None:
            return None
        cause, correlation = self._find_cause()
        return ScoreFall(
            before=before,
            latest=latest,
            error=stdev(medians) / math.sqrt(len(medians)),
            cause=cause,
            correlation=correlation,
        )

    def _find_cause(self) -> tuple[str | None, float | None]:
        """Return the figure with which scores fell together, over the latest exposures and those just before."""
        seen = [
            (s.figures, median)
            for s in (*self._previous, *self._latest)
            if s.figures is not None and (median := s.median) is not None
        ]
        found: tuple[str | None, float | None] = (None, None)
        for name, words in CAUSES.items():
            pairs = [(value, median) for f, median in seen if (value := _figure(f, name)) is not None]
            if len(pairs) < N_RECENT // 2:
                continue
            rho = rank_correlation([a for a, _ in pairs], [b for _, b in pairs])
            # Three standard deviations of chance; and weaker ones explain less than a quarter of the spread.
            if rho < -max(0.5, 3.0 / math.sqrt(len(pairs) - 1)) and (found[1] is None or rho < found[1]):
                found = (words, rho)
        return found


def _figure(figures: QualityFigures, name: str) -> float | None:
    if name == "ctf_fit_angstrom" and figures.has_rings is False:
        return math.inf  # no rings at all is worse than any fit
    value: float | None = getattr(figures, name)
    return value


def median_of(histogram: Sequence[int]) -> float | None:
    """Return the median of scores counted in equal bins over [0, 1], interpolated within its bin."""
    total = sum(histogram)
    if not total:
        return None
    below = 0
    for index, count in enumerate(histogram):
        if count and below + count >= total / 2:
            return (index + (total / 2 - below) / count) / len(histogram)
        below += count
    return None


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Return Spearman's rank correlation; equal values share their mean rank, constants correlate with nothing."""
    a, b = _ranks(x), _ranks(y)
    mean_a, mean_b = fmean(a), fmean(b)
    cross = sum((p - mean_a) * (q - mean_b) for p, q in zip(a, b, strict=True))
    power = sum((p - mean_a) ** 2 for p in a) * sum((q - mean_b) ** 2 for q in b)
    return cross / math.sqrt(power) if power > 0 else 0.0


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end + 1 < len(order) and values[order[end + 1]] == values[order[start]]:
            end += 1
        for place in order[start : end + 1]:
            ranks[place] = (start + end) / 2
        start = end + 1
    return ranks
