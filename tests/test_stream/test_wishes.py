"""What people decided: ids that stay, the last word that stands counts, and every word can be taken back."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from story import make_exposure

from stream.control.wishes import LimitsChange, Wishes, describe_wish, time_taken
from stream.records.errors import ConfigurationError
from stream.records.events import (
    BY_CONFIGURATION,
    Event,
    ExposureOverruled,
    InputEnded,
    QualityLimitsChanged,
    SessionDecided,
)
from stream.records.values import AcquisitionMetadata, ExposureId, QualityLimits, RunId
from stream.records.wishes import TimeWindow, Wish, WishKind


def decided(wish: Wish, at: float = 1.0) -> SessionDecided:
    return SessionDecided(at=at, wish=wish, reason="because")


def pin(run: str) -> Wish:
    return Wish(kind=WishKind.PIN_RUN, run_id=RunId(run))


def reject(run: str) -> Wish:
    return Wish(kind=WishKind.REJECT_RUN, run_id=RunId(run))


def symmetry(group: str) -> Wish:
    return Wish(kind=WishKind.SET_SYMMETRY, symmetry=group)


def undo(decision_id: str) -> Wish:
    return Wish(kind=WishKind.UNDO, decision_id=decision_id)


def folded(*given: Wish | Event) -> Wishes:
    wishes = Wishes()
    for item in given:
        wishes.take(decided(item) if isinstance(item, Wish) else item)
    return wishes


def test_nothing_is_in_force_before_anybody_decides() -> None:
    wishes = folded(InputEnded(at=0.0))
    assert wishes.history == []
    assert (wishes.symmetry, wishes.mask_diameter_angstrom, wishes.score_threshold) == (None, None, None)
    assert (wishes.pinned_run, wishes.rejected_runs, wishes.forced) == (None, frozenset(), frozenset())


def test_the_last_word_counts_and_an_undo_brings_back_the_one_before() -> None:
    wishes = folded(symmetry("C2"), symmetry("D2"))
    assert wishes.symmetry == "D2"
    wishes.take(decided(undo("d2")))
    assert wishes.symmetry == "C2"
    assert [d.is_undone for d in wishes.history] == [False, True, False]
    wishes.take(decided(undo("d1")))
    assert wishes.symmetry is None


def test_an_older_word_that_is_taken_back_leaves_the_later_one() -> None:
    assert folded(symmetry("C2"), symmetry("D2"), undo("d1")).symmetry == "D2"


def test_an_undo_that_is_taken_back_brings_the_decision_back() -> None:
    wishes = folded(pin("run001"), undo("d1"), undo("d2"))
    assert wishes.pinned_run == "run001"
    assert wishes.find_undo_of("d1") is None
    undo_of_the_undo = wishes.find_undo_of("d2")
    assert undo_of_the_undo is not None
    assert undo_of_the_undo.decision_id == "d3"


def test_of_pin_and_reject_the_later_one_stands() -> None:
    wishes = folded(pin("run001"), reject("run001"))
    assert (wishes.pinned_run, wishes.rejected_runs) == (None, {"run001"})
    wishes.take(decided(pin("run001")))
    assert (wishes.pinned_run, wishes.rejected_runs) == ("run001", frozenset())
    assert folded(pin("run001"), reject("run002")).pinned_run == "run001"


def test_every_run_that_is_asked_for_counts() -> None:
    assert folded(Wish(kind=WishKind.FORCE_RUN), Wish(kind=WishKind.FORCE_RUN)).forced == {"d1", "d2"}


def test_limits_of_the_configuration_are_nobodys_decision() -> None:
    event = QualityLimitsChanged(
        at=0.0, limits=QualityLimits(max_picks=9), reason="", request_id=BY_CONFIGURATION
    )
    wishes = folded(event, QualityLimitsChanged(at=1.0, limits=QualityLimits(max_picks=5), reason="few"))
    (decision,) = wishes.history
    assert decision.content == LimitsChange(
        before=QualityLimits(max_picks=9), after=QualityLimits(max_picks=5)
    )


def limits_changed(**given: float) -> QualityLimitsChanged:
    return QualityLimitsChanged(at=0.0, limits=QualityLimits(**given), reason="")  # type: ignore[arg-type]


def test_limits_that_are_taken_back_leave_what_others_changed() -> None:
    wishes = folded(
        limits_changed(max_picks=5, max_ice_ratio=2.0),
        limits_changed(max_picks=5, max_ice_ratio=1.0),
        limits_changed(max_picks=5, max_ice_ratio=1.0, max_masked_fraction=0.5),
    )
    assert wishes.limits_without("d1") == QualityLimits(max_ice_ratio=1.0, max_masked_fraction=0.5)
    assert wishes.limits_without("d2") == QualityLimits(
        max_picks=5, max_ice_ratio=2.0, max_masked_fraction=0.5
    )
    wishes.take(replace(limits_changed(max_ice_ratio=1.0, max_masked_fraction=0.5), undoes="d1"))
    # The older value, taken back as well, does not come back with the later one's undo.
    assert wishes.limits_without("d2") == QualityLimits(max_masked_fraction=0.5)
    assert wishes.limits_without("d4") == QualityLimits(
        max_picks=5, max_ice_ratio=1.0, max_masked_fraction=0.5
    )


def test_limits_of_the_configuration_stay_when_a_persons_are_taken_back() -> None:
    configured = replace(limits_changed(max_picks=9), request_id=BY_CONFIGURATION)
    assert folded(configured, limits_changed(max_picks=5)).limits_without("d1") == QualityLimits(max_picks=9)


def test_a_word_on_an_exposure_is_taken_back_to_the_last_one_that_stands() -> None:
    def overruled(is_accepted: bool | None, reason: str, undoes: str = "") -> ExposureOverruled:
        return ExposureOverruled(
            at=0.0, exposure_id=ExposureId("a"), is_accepted=is_accepted, reason=reason, undoes=undoes
        )

    wishes = folded(overruled(True, "fine"), overruled(False, "ice"))
    word = wishes.word_without(ExposureId("a"), "d2")
    assert (word.is_accepted, word.reason) == (True, "fine")
    assert wishes.word_without(ExposureId("a"), "d1").is_accepted is False
    wishes.take(overruled(False, "ice", undoes="d1"))
    assert wishes.word_without(ExposureId("a"), "d2").is_accepted is None
    assert wishes.word_without(ExposureId("a"), "d3").is_accepted is False


@pytest.mark.parametrize(
    ("said", "mtime_s", "expected"),
    [
        ("2026-03-01T12:00:00.1234567Z", 5.0, 1772366400.123456),
        ("2026-03-01T12:00:00+01:00", 5.0, 1772362800.0),
        ("2026-03-01T12:00:00", 5.0, 5.0),
        ("01-Mar-26  12:00:00", 5.0, 5.0),
        (None, 5.0, 5.0),
    ],
)
def test_an_exposure_was_taken_when_the_microscope_says_so_or_else_when_its_file_was_written(
    said: str | None, mtime_s: float, expected: float
) -> None:
    exposure = make_exposure("a", version=int(mtime_s * 1e9))
    exposure = replace(exposure, metadata=AcquisitionMetadata(acquired_at=said))
    assert time_taken(exposure) == pytest.approx(expected, abs=1e-6)


def test_exposures_of_an_excluded_time_are_excluded_until_it_is_taken_back() -> None:
    window = TimeWindow(from_s=4.0, to_s=5.0)
    wishes = folded(Wish(kind=WishKind.EXCLUDE_TIME, window=window))
    inside, outside = make_exposure("a", 5_000_000_000), make_exposure("b", 5_100_000_000)
    assert (wishes.is_excluded(inside), wishes.is_excluded(outside)) == (True, False)
    wishes.take(decided(undo("d1")))
    assert not wishes.is_excluded(inside)


def test_a_wish_gives_what_its_kind_needs_and_nothing_else() -> None:
    with pytest.raises(ConfigurationError, match=r"set_symmetry: .*symmetry \(found: nothing\)"):
        Wish(kind=WishKind.SET_SYMMETRY)
    with pytest.raises(ConfigurationError, match="force_run"):
        Wish(kind=WishKind.FORCE_RUN, symmetry="C1")
    with pytest.raises(ConfigurationError, match="it ends after it begins"):
        TimeWindow(from_s=2.0, to_s=1.0)


ANY_WISH = st.one_of(
    st.sampled_from(["run001", "run002"]).map(pin),
    st.sampled_from(["run001", "run002"]).map(reject),
    st.sampled_from(["C1", "C2", "D2"]).map(symmetry),
    st.floats(0.0, 1.0).map(lambda t: Wish(kind=WishKind.SET_SCORE_THRESHOLD, score_threshold=t)),
    st.floats(1.0, 500.0).map(lambda d: Wish(kind=WishKind.SET_MASK_DIAMETER, mask_diameter_angstrom=d)),
    st.just(Wish(kind=WishKind.EXCLUDE_TIME, window=TimeWindow(from_s=1.0, to_s=2.0))),
    st.integers(1, 12).map(lambda n: undo(f"d{n}")),
)


def in_force(wishes: Wishes) -> tuple[object, ...]:
    return (
        wishes.symmetry, wishes.mask_diameter_angstrom, wishes.score_threshold, wishes.pinned_run,
        wishes.rejected_runs, wishes.forced, wishes.excluded_windows,
    )  # fmt: skip


@given(st.lists(ANY_WISH, max_size=12))
def test_any_history_equals_the_history_without_what_was_taken_back(given_wishes: list[Wish]) -> None:
    # As in a session, only decisions that are there and stand are taken back.
    wishes = Wishes()
    for wish in given_wishes:
        target = wish.decision_id
        if target and (wishes.find(target) is None or wishes.find_undo_of(target) is not None):
            continue
        event = decided(wish)
        wishes.take(msgspec.json.decode(msgspec.json.encode(event), type=SessionDecided))
    standing = [d.content for d in wishes.history if not d.is_undone and not d.undoes]
    assert in_force(wishes) == in_force(folded(*(c for c in standing if isinstance(c, Wish))))
    assert all(describe_wish(d.content) for d in wishes.history if isinstance(d.content, Wish))
