"""Seconds per stage of one exposure."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor


class StageClock:
    """Seconds per stage; what reading takes inside another stage counts as reading."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(("read", "motion", "ctf", "pick", "extract", "write"), 0.0)

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        """Count what runs inside as this stage's time, less the reading within it."""
        started, read_before = time.perf_counter(), self.seconds["read"]
        try:
            yield
        finally:
            nested = self.seconds["read"] - read_before
            self.seconds[stage] += time.perf_counter() - started - nested

    def frames(self, frames: Iterator[Tensor]) -> Iterator[Tensor]:
        """Pass frames on, counting the time that it takes to get them."""
        while True:
            started = time.perf_counter()
            frame = next(frames, None)
            self.seconds["read"] += time.perf_counter() - started
            if frame is None:
                return
            yield frame
