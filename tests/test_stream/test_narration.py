"""What is said while a session runs: words for a person, or lines that a program can read."""

from __future__ import annotations

import io
import json

from rich.console import Console
from story import fit, found, preprocessed, ranked

from stream.commands.narration import EventLog, Narrator, NewDecisions
from stream.control.controller import Controller
from stream.control.settings import ControllerSettings
from stream.records.events import ExposureOverruled, QualityLimitsChanged
from stream.records.values import ExposureId, QualityLimits
from stream.telemetry.logs import configure_logging


def test_an_event_becomes_one_json_line_with_its_plain_values() -> None:
    stream = io.StringIO()
    configure_logging(as_json=True, stream=stream)
    teller = EventLog()
    teller.tell(found("a"))
    teller.tell(preprocessed("a", 60, ctf=fit(resolution=3.5), ice_ratio=0.25))
    teller.tell(ranked("a"))
    documents = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [d["event"] for d in documents] == ["exposure_found", "exposure_preprocessed", "exposure_ranked"]
    assert documents[0]["fields"]["kind"] == "movie"
    fields = documents[1]["fields"]
    assert (fields["exposure_id"], fields["fit_resolution_angstrom"], fields["ice_ratio"]) == ("a", 3.5, 0.25)
    assert "score_histogram" not in documents[2]["fields"]


def test_each_decision_is_given_once_though_only_the_last_thousand_are_kept() -> None:
    controller = Controller(ControllerSettings())
    new = NewDecisions()
    assert new.take(controller) == []
    for number in range(1100):
        limits = QualityLimits(max_picks=number)
        controller.handle(QualityLimitsChanged(at=0.0, limits=limits, reason=str(number)))
        (decision,) = new.take(controller)
        assert f"max_picks {number}" in decision.what
    assert new.take(controller) == []


def test_a_long_earlier_life_is_not_told_again() -> None:
    controller = Controller(ControllerSettings())
    for number in range(60):
        controller.handle(QualityLimitsChanged(at=0.0, limits=QualityLimits(), reason=str(number)))
    assert NewDecisions().take(controller) == []


def test_a_person_reads_once_what_became_of_a_word_and_its_reason() -> None:
    stream = io.StringIO()
    narrator = Narrator(Console(file=stream, width=200), 0.4)
    controller = Controller(ControllerSettings())
    word = ExposureOverruled(at=1.0, exposure_id=ExposureId("a"), is_accepted=False, reason="[ice]")
    for event in (found("a"), word):
        controller.handle(event)
        narrator.tell(event)
    for _ in range(2):
        narrator.follow(controller)
    assert stream.getvalue().count("decided reject a: [ice]") == 1
