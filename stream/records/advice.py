"""Advice: what a session's figures suggest to the person at the microscope, with the numbers that say so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum


class AdviceKind(Enum):
    """What an advice is about; at most one of a kind stands at a time."""

    PREFERRED_ORIENTATION = "preferred_orientation"
    JUNK = "junk"
    GROWTH = "growth"
    STOP = "stop"
    SCORE_FALL = "score_fall"
    GAIN = "gain"
    FEW_PARTICLES = "few_particles"


class Severity(Enum):
    """Whether something is wrong (warning) or merely good to know (info)."""

    INFO = "info"
    WARNING = "warning"


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """One suggestion in words, and the numbers behind it (None = not known)."""

    kind: AdviceKind
    severity: Severity
    words: str
    numbers: Mapping[str, float | None]
