"""Seconds per stage of one exposure."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor


class StageClock:
    """Seconds per stage by the clock `now`; what reading takes inside another stage counts as reading."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self.seconds = dict.fromkeys(("read", "motion", "ctf", "pick", "extract", "write"), 0.0)

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        """Count what runs inside as this stage's time, less the reading within it."""
        started, read_before = self._now(), self.seconds["read"]
        try:
            yield
        finally:
            nested = self.seconds["read"] - read_before
            self.seconds[stage] += self._now() - started - nested

    def frames(self, frames: Iterator[Tensor]) -> Iterator[Tensor]:
        """Pass frames on, counting the time that it takes to get them."""
        while True:
            started = self._now()
            frame = next(frames, None)
            self.seconds["read"] += self._now() - started
            if frame is None:
                return
            yield frame
