"""Training CryoGEM beside a session: where it stands."""

from __future__ import annotations

from enum import Enum


class TrainingState(Enum):
    """Where the training of CryoGEM on a session stands; a session may have several, one after another."""

    OFFERED = "offered"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    STOPPED = "stopped"
