"""What people decided, folded: each decision, what is in force of it now, and what an undo takes back.

A pure fold over the journal's events. A decision's id is its place among all decisions ("d3": the third), which
never changes because the journal only grows. An undo is a decision itself: taken back, it brings back what it
took. Of several words on the same thing the last one that stands counts.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime

from stream.control.quality import describe_limits
from stream.records.events import (
    BY_CONFIGURATION,
    Event,
    ExposureOverruled,
    QualityLimitsChanged,
    SessionDecided,
)
from stream.records.values import Exposure, ExposureId, QualityLimits, RunId
from stream.records.wishes import TimeWindow, Wish, WishKind


@dataclass(frozen=True, slots=True, kw_only=True)
class OverruleWord:
    """A person's word on one exposure; None = none."""

    is_accepted: bool | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitsChange:
    """Limits before and after."""

    before: QualityLimits
    after: QualityLimits

    def apply(self, limits: QualityLimits) -> QualityLimits:
        """Return other limits with the same change."""
        given = {f.name: getattr(self.after, f.name) for f in fields(QualityLimits)}
        changed = {name: value for name, value in given.items() if value != getattr(self.before, name)}
        return replace(limits, **changed)


@dataclass(frozen=True, slots=True, kw_only=True)
class OverruleChange:
    """What a person said of one exposure."""

    exposure_id: ExposureId
    word: OverruleWord


@dataclass(slots=True, kw_only=True)
class PersonsDecision:
    """One decision of a person; `is_undone` when a later one that stands took it back."""

    decision_id: str
    at: float
    what: str
    reason: str
    content: Wish | LimitsChange | OverruleChange
    undoes: str = ""
    is_undone: bool = False


class Wishes:
    """What is in force of everything that people decided.

    `symmetry`, `mask_diameter_angstrom` and `score_threshold` are None where nobody set them: the configuration's
    count then. `pinned_run` is the accepted map whatever other runs give; `rejected_runs` are never accepted nor
    started from. `forced` are the decisions that asked for a run.
    """

    def __init__(self) -> None:
        self.history: list[PersonsDecision] = []
        self._limits = QualityLimits()
        self._changes: list[tuple[str, LimitsChange]] = []
        self._reset()

    def _reset(self) -> None:
        self.symmetry: str | None = None
        self.mask_diameter_angstrom: float | None = None
        self.score_threshold: float | None = None
        self.pinned_run: RunId | None = None
        self.rejected_runs: frozenset[RunId] = frozenset()
        self.forced: frozenset[str] = frozenset()
        self.excluded_windows: tuple[TimeWindow, ...] = ()

    def take(self, event: Event) -> None:
        """Fold one event in; those that are no decision of a person change nothing."""
        match event:
            case SessionDecided(wish=wish):
                what = describe_wish(wish)
                self._add(event.at, what, event.reason, wish, undoes=wish.decision_id or "")
            case QualityLimitsChanged():
                change = LimitsChange(before=self._limits, after=event.limits)
                self._limits = event.limits
                if event.request_id == BY_CONFIGURATION:
                    self._changes.append(("", change))
                    return
                what = f"set quality limits: {describe_limits(event.limits)}"
                self._add(event.at, what, event.reason, change, undoes=event.undoes)
                if not event.undoes:
                    self._changes.append((self.history[-1].decision_id, change))
            case ExposureOverruled(exposure_id=exposure_id):
                word = OverruleWord(is_accepted=event.is_accepted, reason=event.reason)
                words = OverruleChange(exposure_id=exposure_id, word=word)
                verb = {True: "accept", False: "reject", None: "judge by the limits again:"}
                what = f"{verb[event.is_accepted]} exposure"
                self._add(event.at, what, event.reason, words, undoes=event.undoes)
            case _:
                pass

    def find(self, decision_id: str) -> PersonsDecision | None:
        """Return a decision by its id, or None."""
        number = decision_id.removeprefix("d")
        if not number.isdecimal() or not 1 <= int(number) <= len(self.history):
            return None
        return self.history[int(number) - 1]

    def find_undo_of(self, decision_id: str) -> PersonsDecision | None:
        """Return the decision that stands and that took this one back, or None."""
        return next((d for d in self.history if d.undoes == decision_id and not d.is_undone), None)

    def limits_without(self, decision_id: str) -> QualityLimits:
        """Return what the limits would be if this decision were taken back now: all other changes, in order."""
        undone = self._find_undone(decision_id)
        limits = QualityLimits()
        for changed_by, change in self._changes:
            if changed_by not in undone:
                limits = change.apply(limits)
        return limits

    def word_without(self, exposure_id: ExposureId, decision_id: str) -> OverruleWord:
        """Return what would be said of an exposure if this decision were taken back now: the last word that stands."""
        undone = self._find_undone(decision_id)
        standing = (
            d.content.word
            for d in reversed(self.history)
            if isinstance(d.content, OverruleChange)
            and d.content.exposure_id == exposure_id
            and not d.undoes
            and d.decision_id not in undone
        )
        return next(standing, OverruleWord())

    def is_excluded(self, exposure: Exposure) -> bool:
        """Tell whether an exposure was taken in a time that a person excluded."""
        return bool(self.excluded_windows) and any(
            window.holds(time_taken(exposure)) for window in self.excluded_windows
        )

    def _add(
        self,
        at: float,
        what: str,
        reason: str,
        content: Wish | LimitsChange | OverruleChange,
        *,
        undoes: str,
    ) -> None:
        decision = PersonsDecision(
            decision_id=f"d{len(self.history) + 1}",
            at=at,
            what=f"take back {undoes}" if undoes else what,
            reason=reason,
            content=content,
            undoes=undoes,
        )
        self.history.append(decision)
        if undoes:
            self._fold_again()
        elif isinstance(content, Wish):
            self._apply(content, decision.decision_id)

    def _fold_again(self) -> None:
        """Find from the last decision to the first which ones stand, and apply those in order."""
        self._reset()
        undone = self._find_undone()
        for decision in self.history:
            decision.is_undone = decision.decision_id in undone
        for decision in self.history:
            if isinstance(decision.content, Wish) and not decision.is_undone:
                self._apply(decision.content, decision.decision_id)

    def _find_undone(self, also: str = "") -> set[str]:
        """Return the decisions that later ones took back, as if `also` were taken back now, too."""
        undone = {also} - {""}
        for decision in reversed(self.history):
            if decision.undoes and decision.decision_id not in undone:
                undone.add(decision.undoes)
        return undone

    def _apply(self, wish: Wish, decision_id: str) -> None:
        match wish.kind:
            case WishKind.PIN_RUN:
                self.pinned_run = wish.run_id
                self.rejected_runs -= {wish.run_id}
            case WishKind.REJECT_RUN if wish.run_id is not None:
                self.rejected_runs |= {wish.run_id}
                if self.pinned_run == wish.run_id:
                    self.pinned_run = None
            case WishKind.SET_SYMMETRY:
                self.symmetry = wish.symmetry
            case WishKind.SET_MASK_DIAMETER:
                self.mask_diameter_angstrom = wish.mask_diameter_angstrom
            case WishKind.SET_SCORE_THRESHOLD:
                self.score_threshold = wish.score_threshold
            case WishKind.FORCE_RUN:
                self.forced |= {decision_id}
            case WishKind.EXCLUDE_TIME if wish.window is not None:
                self.excluded_windows += (wish.window,)
            case _:
                pass


def describe_wish(wish: Wish) -> str:
    """Say in words what is wished for."""
    match wish.kind:
        case WishKind.PIN_RUN:
            return f"use the map of {wish.run_id}"
        case WishKind.REJECT_RUN:
            return f"never use the map of {wish.run_id}"
        case WishKind.SET_SYMMETRY:
            return f"set symmetry {wish.symmetry}"
        case WishKind.SET_MASK_DIAMETER:
            return f"set mask diameter {wish.mask_diameter_angstrom:g} Å"
        case WishKind.SET_SCORE_THRESHOLD:
            return f"set score threshold {wish.score_threshold:g}"
        case WishKind.FORCE_RUN:
            return "run now"
        case WishKind.EXCLUDE_TIME:
            return f"exclude exposures taken {describe_window(wish.window)}"
        case WishKind.TRAIN_CRYOGEM:
            return "train CryoGEM"
        case WishKind.UNDO:
            return f"take back {wish.decision_id}"


def describe_window(window: TimeWindow | None) -> str:
    """Say from when to when, in UTC."""
    if window is None:
        return "never"
    moments = (
        datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds") for at in (window.from_s, window.to_s)
    )
    return "from {} to {}".format(*moments)


def time_taken(exposure: Exposure) -> float:
    """Return when an exposure was taken, in seconds since the epoch.

    What the microscope says counts where it says it with its time zone (EPU does), else the file's time.
    """
    said = exposure.metadata.acquired_at
    if said is not None:
        try:
            moment = datetime.fromisoformat(said)
        except ValueError:
            moment = None
        if moment is not None and moment.tzinfo is not None:
            return moment.timestamp()
    return exposure.file.mtime_ns / 1e9
