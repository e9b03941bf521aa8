"""The gain reference in the controller: asked before any movie is aligned, watched while the session runs."""

from __future__ import annotations

from dataclasses import replace

import pytest
from story import found, make_exposure, play, preprocessed

from stream.control.controller import Controller
from stream.control.settings import ControllerSettings
from stream.records.commands import Command, OrientGain, Preprocess
from stream.records.events import Event, GainOriented, InputEnded, SessionOpened, StageFailed
from stream.records.values import ExposureId, FailureKind, GainOrientation, Stage

AUTO = ControllerSettings(max_in_flight_preprocess=20, is_gain_orientation_sought=True)
TURNED = GainOrientation(rotate_deg=90, flip_x=True)


def answered(
    orientation: GainOrientation | None, n_movies: int = 1, note: str = "low contrast"
) -> GainOriented:
    return GainOriented(at=3.0, orientation=orientation, contrast=1.0, n_movies=n_movies, note=note)


def failed(name: str, kind: FailureKind) -> StageFailed:
    return StageFailed(
        at=4.0, exposure_id=ExposureId(name), stage=Stage.PREPROCESS, kind=kind, reason=f"{name}: broken"
    )


def asked(commands: list[Command]) -> list[str]:
    (command,) = commands
    assert isinstance(command, OrientGain)
    return [exposure.name for exposure in command.exposures]


def reopened() -> SessionOpened:
    return SessionOpened(at=9.0, settings_digest="", version="")


def told(controller: Controller, words: str) -> int:
    return sum(words in f"{d.what}: {d.why}" for d in controller.decisions)


def refuse_to_the_end(controller: Controller) -> None:
    play(controller, *[found(f"m{i}") for i in range(9)])
    for n in (1, 2, 4, 8):
        play(controller, answered(None, n))


def test_no_movie_is_preprocessed_before_the_first_one_has_told_the_orientation() -> None:
    controller = Controller(AUTO)
    assert asked(play(controller, found("a"))) == ["a"]
    assert play(controller, found("b")) == []
    assert "not known yet" in (controller.find_hold(Stage.PREPROCESS) or "")
    commands = play(controller, answered(TURNED))
    assert commands == [Preprocess(exposure=make_exposure(n), gain_orientation=TURNED) for n in "ab"]
    assert play(controller, found("c")) == [Preprocess(exposure=make_exposure("c"), gain_orientation=TURNED)]
    assert told(controller, "turned by 90°, flipped in x") == 1


def test_low_contrast_is_asked_again_with_two_four_and_eight_movies() -> None:
    controller = Controller(AUTO)
    sizes = []
    for number in range(12):
        if commands := play(controller, found(f"m{number}")):
            names = asked(commands)
            sizes.append((number + 1, len(names)))
            assert play(controller, answered(None, len(names))) == []
    assert sizes == [(1, 1), (2, 2), (4, 4), (8, 8)]
    hold = controller.find_hold(Stage.PREPROCESS) or ""
    assert "gain_orientation: given" in hold
    assert "low contrast" in hold
    assert told(controller, "hold every movie back") == 1


def test_the_end_of_input_asks_with_what_there_is_and_then_ends_the_session() -> None:
    controller = Controller(AUTO)
    play(controller, found("a"), answered(None), found("b"), answered(None, 2), found("c"))
    assert asked(play(controller, InputEnded(at=5.0))) == ["a", "b", "c"]
    assert not controller.is_finished
    assert play(controller, answered(None, 3)) == []
    assert controller.is_finished
    assert controller.count_waiting(Stage.PREPROCESS) == 3
    assert told(controller, "hold every movie back") == 1


def test_a_question_in_flight_is_asked_again_after_a_crash() -> None:
    controller = Controller(AUTO)
    play(controller, found("a"), found("b"))
    assert asked(play(controller, reopened())) == ["a"]


def test_a_restart_after_giving_up_tries_once_more() -> None:
    controller = Controller(AUTO)
    refuse_to_the_end(controller)
    assert asked(play(controller, reopened())) == ["m0"]
    assert len(play(controller, answered(TURNED))) == 9


def test_a_bad_first_movie_is_quarantined_and_the_next_one_asked() -> None:
    controller = Controller(AUTO)
    play(controller, found("a"), found("b"))
    assert asked(play(controller, failed("a", FailureKind.INPUT))) == ["b"]
    assert controller.exposures[ExposureId("a")].reason == "a: broken"


def test_a_machine_that_fails_three_times_holds_movies_back_with_its_reason() -> None:
    controller = Controller(AUTO)
    play(controller, found("a"))
    death = failed("a", FailureKind.RESOURCE)
    assert asked(play(controller, death)) == ["a"]
    assert asked(play(controller, death)) == ["a"]
    assert play(controller, death) == []
    assert "failed 3 times, last: a: broken" in (controller.find_hold(Stage.PREPROCESS) or "")
    assert told(controller, "hold every movie back") == 1


def test_an_answer_nobody_asked_for_changes_nothing() -> None:
    controller = Controller(replace(AUTO, is_gain_orientation_sought=False))
    (command,) = play(controller, answered(TURNED), found("a"))
    assert command == Preprocess(exposure=make_exposure("a"))


def test_a_replayed_session_that_now_says_given_uses_what_is_given() -> None:
    story: list[Event] = [found("a"), answered(TURNED)]
    controller = Controller(replace(AUTO, is_gain_orientation_sought=False))
    play(controller, *story)
    assert play(controller, reopened()) == [Preprocess(exposure=make_exposure("a"))]


def test_a_gain_that_fits_no_more_is_told_once_per_crossing() -> None:
    controller = Controller(
        ControllerSettings(max_in_flight_preprocess=500, n_gain_residual_movies=5, max_gain_residual=0.05)
    )
    residuals = [0.0] * 6 + [0.2] * 8 + [0.045] * 8 + [0.0] * 6 + [-0.2] * 6
    means = []
    for number, residual in enumerate(residuals):
        name = f"m{number}"
        play(controller, found(name), preprocessed(name, 0, gain_residual=residual))
        means.append(controller.gain_residual.mean)
    assert means[3] is None
    assert means[13] == pytest.approx(0.2)
    assert told(controller, "no longer fits") == 2
    assert told(controller, "fits again") == 1
