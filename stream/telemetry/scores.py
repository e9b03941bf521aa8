"""Distribution of particle scores, kept as counts per bin: adding a movie costs the bins, not the particles."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from threading import Lock

import numpy as np
import numpy.typing as npt
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from stream.records.errors import InvariantError

N_SCORE_BINS = 100
"""`RankResult.score_histogram` has this many equal bins over [0, 1]."""

Bins = npt.NDArray[np.int64]

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
        self._counts = np.zeros(N_SCORE_BINS, np.int64)
        self._lock = Lock()

    def add(self, histogram: Sequence[int]) -> None:
        """Add one movie's counts."""
        added = as_bins(histogram)
        with self._lock:
            self._counts += added

    def collect(self) -> Iterator[Metric]:
        """Yield the histogram with cumulative buckets, as Prometheus asks for it."""
        with self._lock:
            counts = self._counts.copy()
        cumulative = counts.cumsum()[EXPORTED_EVERY - 1 :: EXPORTED_EVERY]
        edges = [(index + 1) * EXPORTED_EVERY / N_SCORE_BINS for index in range(len(cumulative))]
        buckets = [(repr(edge), float(count)) for edge, count in zip(edges, cumulative, strict=True)]
        buckets.append(("+Inf", float(cumulative[-1])))
        middles = (np.arange(N_SCORE_BINS) + 0.5) / N_SCORE_BINS
        total = float((middles * counts).sum())
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
        self._recent: deque[Bins] = deque()
        self._pooled = np.zeros(N_SCORE_BINS, np.int64)

    def add(self, histogram: Sequence[int]) -> None:
        """Add one movie and forget the oldest when there are too many."""
        added = as_bins(histogram)
        self._recent.append(added)
        self._pooled += added
        if len(self._recent) > self._n_movies:
            self._pooled -= self._recent.popleft()

    def median(self) -> float | None:
        """Return the pooled median, interpolated within its bin, or None when nothing was scored."""
        cumulative = self._pooled.cumsum()
        half = int(cumulative[-1]) / 2
        if not half:
            return None
        index = int(np.searchsorted(cumulative, half))
        count = int(self._pooled[index])
        return (index + (half - (int(cumulative[index]) - count)) / count) / N_SCORE_BINS


def as_bins(histogram: Sequence[int]) -> Bins:
    """Return a histogram as an array, or refuse one of another shape."""
    if len(histogram) != N_SCORE_BINS:
        raise InvariantError("score histogram", f"it has {N_SCORE_BINS} bins", len(histogram))
    return np.asarray(histogram, np.int64)
