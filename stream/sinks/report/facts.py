"""What a session report is made of: frozen records, filled by `stream.session_facts` from journal and configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from stream.records.advice import Advice
from stream.records.figures import GrowthFigures


class SessionState(Enum):
    """What the session is doing."""

    RUNNING = "running"  # a service holds its journal
    ENDED = "ended"  # everything has an outcome
    STOPPED = "stopped"  # no service holds it, and something could still be done


@dataclass(frozen=True, slots=True, kw_only=True)
class ExposureFacts:
    """One exposure: where it is and what was measured; None = not known. `rule` is the limit that rejected it.

    `latency_s` runs from the file's last write (or the session's opening, if that was later) to its scores.
    """

    name: str
    path: str
    state: str
    rule: str
    reason: str
    has_rings: bool | None
    n_picks: int
    n_particles: int
    n_excluded: int
    n_unscored: int
    n_scored: int
    n_above: int
    ctf_fit_angstrom: float | None
    defocus_angstrom: float | None
    astigmatism_angstrom: float | None
    total_motion_angstrom: float | None
    ice_ratio: float | None
    score_median: float | None
    latency_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """One engine run: what it was for, what it gave, and what was made of it."""

    run_id: str
    campaign_id: str
    purpose: str
    state: str
    reason: str
    verdict: str
    start_map: str | None
    warm_start: str | None
    n_particles: int
    symmetry: str
    resolution_angstrom: float | None
    nyquist_angstrom: float | None
    cfar: float | None
    cfar_null: float | None
    cfar_ratio: float | None
    scf_star: float | None
    note: str
    folder: str | None
    seconds: float | None
    growth: GrowthFigures | None
    is_accepted: bool
    is_rejected_by_person: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """A line of the session's story: something decided, or something that happened."""

    at: float
    is_decision: bool
    what: str
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PersonsWord:
    """A decision of a person."""

    decision_id: str
    at: float
    what: str
    reason: str
    is_undone: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What scored: the configured file (None: the one that ships), and exposures by model hash and by provider."""

    path: str | None
    asked_for: str
    n_by_hash: Mapping[str, int]
    n_by_provider: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportFacts:
    """A whole session at one moment.

    `settings` and `changed` are lines for people: what and its value; key, value and the default that it differs
    from. `story` is in order of time. `score_histogram` counts the scores of the exposures in use in equal bins.
    """

    out: Path
    icestream_version: str
    written_at: float
    session_versions: Sequence[str]
    state: SessionState
    first_at: float | None
    last_at: float | None
    n_openings: int
    source: str
    settings: Sequence[tuple[str, str]]
    changed: Sequence[tuple[str, str, str]]
    limits: str
    session_yaml: str
    exposures: Sequence[ExposureFacts]
    n_by_state: Mapping[str, int]
    n_rejected_by: Mapping[str, int]
    score_threshold: float
    score_histogram: Sequence[int]
    n_above_threshold: int
    model: ModelFacts
    engine: str
    runs: Sequence[RunFacts]
    advice: Sequence[Advice]
    story: Sequence[Said]
    persons_words: Sequence[PersonsWord]
    warnings: Sequence[str]

    @property
    def accepted(self) -> RunFacts | None:
        """The run whose map is accepted."""
        return next((run for run in self.runs if run.is_accepted), None)

    @property
    def shown_run(self) -> RunFacts | None:
        """The accepted run, or else the last one that left a folder."""
        with_folder = [run for run in self.runs if run.folder is not None]
        return self.accepted or (with_folder[-1] if with_folder else None)
