"""What the service asks of whatever runs its commands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from stream.records.commands import Command
from stream.records.events import Event


class Runtime(Protocol):
    """Where commands run. `submit` returns at once; `poll` gives the events that answer commands."""

    def submit(self, command: Command) -> None:
        """Take a command; it is answered by exactly one event."""

    def poll(self, timeout_s: float) -> list[Event]:
        """Return the outcomes that have come in, waiting at most `timeout_s` for a first one."""

    @property
    def worker_restarts(self) -> Mapping[str, int]:
        """How often workers of each pool were restarted since this process started."""

    def close(self) -> None:
        """Stop all work at once; what is unanswered is issued again by the next session."""
