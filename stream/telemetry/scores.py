"""Distribution of particle scores, kept as counts per bin: adding a movie costs the bins, not the particles."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from threading import Lock

from prometheus_client.core import HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from stream.records.errors import InvariantError

N_SCORE_BINS = 100
"""`RankResult.score_histogram` has this many equal bins over [0, 1]."""

EXPORTED_EVERY = 5
"""Bins per exported bucket: edges 0.05 apart are what a heat map can show, and 20 series are cheap to keep."""


class ScoreDistribution(Collector):
    """A Prometheus histogram that takes whole histograms.

    Scores outside [0, 1] cannot occur (the record's bins cover it). The exported `_sum` takes each particle at
    the middle of its bin, so it is exact to half a bin, 0.005.

    Parameters
    ----------
    name
        Name of the exported histogram.
    text
        Its help text.
    """

    def __init__(self, name: str, text: str) -> None:
        self._name = name
        self._text = text
        self._counts = [0] * N_SCORE_BINS
        self._lock = Lock()

    def add(self, histogram: Sequence[int]) -> None:
        """Add one movie's counts."""
        check_bins(histogram)
        with self._lock:
            for index, count in enumerate(histogram):
                self._counts[index] += count

    def collect(self) -> Iterator[Metric]:
        """Yield the histogram with cumulative buckets, as Prometheus asks for it."""
        with self._lock:
            counts = list(self._counts)
        buckets: list[tuple[str, float]] = []
        running = 0
        for start in range(0, N_SCORE_BINS, EXPORTED_EVERY):
            running += sum(counts[start : start + EXPORTED_EVERY])
            buckets.append((repr((start + EXPORTED_EVERY) / N_SCORE_BINS), float(running)))
        buckets.append(("+Inf", float(running)))
        total = sum((index + 0.5) / N_SCORE_BINS * count for index, count in enumerate(counts))
        yield HistogramMetricFamily(self._name, self._text, buckets=buckets, sum_value=total)


class RecentScores:
    """Pooled scores of the last movies, for a median that follows the session.

    Parameters
    ----------
    n_movies
        How many movies back; 50 movies are minutes to an hour of a session and some 10,000 particles.
    """

    def __init__(self, n_movies: int) -> None:
        self._n_movies = n_movies
        self._recent: deque[tuple[int, ...]] = deque()
        self._pooled = [0] * N_SCORE_BINS

    def add(self, histogram: Sequence[int]) -> None:
        """Add one movie and forget the oldest when there are too many."""
        check_bins(histogram)
        self._recent.append(tuple(histogram))
        for index, count in enumerate(histogram):
            self._pooled[index] += count
        if len(self._recent) > self._n_movies:
            for index, count in enumerate(self._recent.popleft()):
                self._pooled[index] -= count

    def median(self) -> float | None:
        """Return the pooled median, interpolated within its bin, or None when nothing was scored."""
        total = sum(self._pooled)
        if not total:
            return None
        below = 0
        for index, count in enumerate(self._pooled):
            if count and below + count >= total / 2:
                return (index + (total / 2 - below) / count) / N_SCORE_BINS
            below += count
        raise InvariantError("recent scores", "half of the particles lie below the last bin's end", total)


def check_bins(histogram: Sequence[int]) -> None:
    """Refuse a histogram of another shape."""
    if len(histogram) != N_SCORE_BINS:
        raise InvariantError("score histogram", f"it has {N_SCORE_BINS} bins", len(histogram))
