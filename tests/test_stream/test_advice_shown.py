"""Advice where people meet it: in the status, and once while a session runs."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
from rich.console import Console
from story import play, rank_one, run_result

from stream.commands.narration import EventLog, Narrator, NewAdvice
from stream.commands.status import print_status
from stream.config import AdviceChoice, parse_settings
from stream.control.advice import AdviceSettings
from stream.control.controller import Controller
from stream.control.settings import ControllerSettings, RunPolicy
from stream.records.advice import AdviceKind
from stream.records.errors import ConfigurationError
from stream.records.events import Event, InputEnded, RunEnded, SessionDecided
from stream.records.figures import GrowthFigures, RunFigures
from stream.records.values import RunId
from stream.records.wishes import Wish, WishKind
from stream.status import advise_session, summarize
from stream.telemetry.logs import configure_logging

SETTINGS = ControllerSettings(runs=RunPolicy(rungs=(100,), final_min_particles=50))


def ended(run_id: str, *, gain: float = 0.3, cfar: float = 0.6, scf_star: float = 0.9) -> RunEnded:
    growth = GrowthFigures(
        n_particles=100.0,
        resolution_angstrom=8.0,
        slope_per_ln_n=0.0,
        slope_sd=0.0,
        ssnr_angstrom_at_2n=8.0 - 2 * gain,
    )
    result = replace(run_result(run_id, cfar=cfar), scf_star=scf_star, figures=RunFigures(growth=growth))
    return RunEnded(at=5.0, result=result)


def session(*runs: RunEnded) -> Controller:
    controller = Controller(SETTINGS)
    rank_one(controller, "a", 60)
    rank_one(controller, "b", 60)
    play(controller, *runs)
    return controller


def kinds(controller: Controller) -> list[str]:
    return [a.kind.value for a in advise_session(controller)]


def test_the_status_gives_advice_in_words_and_numbers() -> None:
    controller = session(ended("run001"))
    (item,) = summarize(controller)["advice"]
    assert (item["kind"], item["severity"]) == ("growth", "info")
    assert item["words"].startswith("doubling the 100 particles is predicted to gain 0.30 Å")
    assert item["numbers"]["gain_angstrom"] == pytest.approx(0.3)
    json.dumps(item)


def test_a_person_reads_advice_and_what_was_decided_by_hand(capsys) -> None:
    controller = session(ended("run001", cfar=0.05, scf_star=0.3))
    wish = Wish(kind=WishKind.SET_SYMMETRY, symmetry="D2")
    controller.handle(SessionDecided(at=6.0, wish=wish, reason="seen"))
    print_status(summarize(controller))
    shown = capsys.readouterr().out
    assert "advice     cFAR 0.05 (isotropic: 0.60) at 100 particles: preferred orientation" in shown
    assert "by hand    symmetry: D2" in shown
    assert "pinned run" not in shown


def test_a_run_that_a_person_rejected_has_no_say() -> None:
    controller = session(ended("run001", cfar=0.05, scf_star=0.3))
    assert kinds(controller) == ["preferred_orientation", "growth"]
    wish = Wish(kind=WishKind.REJECT_RUN, run_id=RunId("run001"))
    controller.handle(SessionDecided(at=6.0, wish=wish, reason="junk"))
    assert kinds(controller) == []


def test_particles_are_counted_at_the_threshold_in_force() -> None:
    controller = session()
    assert summarize(controller)["particles"]["above_threshold"] == 120
    wish = Wish(kind=WishKind.SET_SCORE_THRESHOLD, score_threshold=0.95)
    controller.handle(SessionDecided(at=6.0, wish=wish, reason="strict"))
    particles = summarize(controller)["particles"]
    assert (particles["score_threshold"], particles["above_threshold"]) == (0.95, 0)


def test_a_threshold_of_nothing_is_a_threshold() -> None:
    controller = session()
    wish = Wish(kind=WishKind.SET_SCORE_THRESHOLD, score_threshold=0.0)
    controller.handle(SessionDecided(at=6.0, wish=wish, reason="all of them"))
    assert controller.score_threshold == 0.0


def test_empty_micrographs_count_as_micrographs_with_few_particles() -> None:
    controller = Controller(SETTINGS)
    for number in range(30):
        rank_one(controller, f"m{number}", 0)
    assert kinds(controller) == ["few_particles"]


def test_advice_is_told_when_it_begins_to_stand_and_when_a_run_changes_it() -> None:
    controller, new = session(ended("run001")), NewAdvice()

    def told(*events: Event) -> list[AdviceKind]:
        for event in events:
            play(controller, event)
            new.note_event()
        return [a.kind for a in new.take(controller)]

    assert told() == [AdviceKind.GROWTH]
    assert told(SessionDecided(at=6.0, wish=Wish(kind=WishKind.FORCE_RUN), reason="")) == []
    assert told(ended("run002", gain=0.5)) == [AdviceKind.GROWTH]
    assert told() == []


def test_what_changes_with_every_movie_is_told_once() -> None:
    controller, new = Controller(SETTINGS), NewAdvice()
    told = []
    for number in range(40):
        rank_one(controller, f"m{number}", number % 5)
        new.note_event()
        told += new.take(controller)
    assert [a.kind for a in told] == [AdviceKind.FEW_PARTICLES]


def test_narrator_and_log_tell_advice() -> None:
    controller = session(ended("run001"))
    words, lines = io.StringIO(), io.StringIO()
    narrator = Narrator(Console(file=words, width=200), 0.4)
    configure_logging(as_json=True, stream=lines)
    log = EventLog()
    for teller in (narrator, log):
        teller.tell(InputEnded(at=7.0))
        teller.follow(controller)
        teller.follow(controller)
    assert words.getvalue().count("advice doubling the 100 particles") == 1
    documents = [json.loads(line) for line in lines.getvalue().splitlines()]
    (advice,) = [d["fields"] for d in documents if d["event"] == "advice"]
    assert (advice["kind"], advice["gain_angstrom"]) == ("growth", pytest.approx(0.3))


def test_the_configuration_has_every_number_that_advice_goes_by() -> None:
    assert AdviceSettings(**AdviceChoice().model_dump()) == AdviceSettings()
    with pytest.raises(ConfigurationError, match=r"unknown key advice\.min_gain_angstroms"):
        parse_settings({"advice": {"min_gain_angstroms": 0.2}}, item="test")
