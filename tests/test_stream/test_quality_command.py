"""`icestream quality`: what a person sees, and that a word reaches the journal whoever holds it."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from still_service import open_service
from story import fit, found, make_settings, moved, preprocessed, ranked
from typer.testing import CliRunner

from stream.app import write_session
from stream.cli import app
from stream.commands.quality import change_quality
from stream.records.errors import ConfigurationError, InputError
from stream.records.events import ExposureOverruled, QualityLimitsChanged
from stream.status import load_status
from stream.store.inbox import Inbox, LimitsRequest, OverruleRequest
from stream.store.journal import Journal, read_journal
from stream.store.layout import OutputLayout

EXPOSURES = {"a": (3.0, 2.0), "b": (4.0, 6.0), "c": (5.0, 10.0), "d": (None, 4.0)}
"""CTF fit (None: no rings) and motion; each has 10 particles, 6 of them above the threshold."""


@pytest.fixture
def layout(tmp_path: Path) -> OutputLayout:
    """A finished session of four exposures."""
    settings = make_settings(tmp_path)
    layout = OutputLayout(settings.out)
    with Journal(layout.journal) as journal:
        write_session(settings, layout)
        for name, (resolution, motion) in EXPOSURES.items():
            ctf = fit(rings=False) if resolution is None else fit(resolution=resolution)
            journal.append(
                [found(name), preprocessed(name, 10, ctf=ctf, motion=moved(motion)), ranked(name, 6, 4)]
            )
    return layout


def run(*arguments: str, exit_code: int = 0) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["quality", *arguments, "--json"])
    assert result.exit_code == exit_code, result.output
    document: dict[str, Any] = json.loads(result.stdout)
    return document


def quality_events(layout: OutputLayout) -> list[QualityLimitsChanged | ExposureOverruled]:
    events = read_journal(layout.journal)
    return [e for e in events if isinstance(e, (QualityLimitsChanged, ExposureOverruled))]


def test_a_dry_run_tells_what_each_rule_would_reject_and_changes_nothing(layout: OutputLayout) -> None:
    report = run(
        str(layout.root), "--max-ctf-fit-angstrom", "4.5", "--max-total-motion-angstrom", "5", "--dry-run"
    )
    assert report["exposures"] == {"judged": 4, "accepted": 1, "rejected": 3}
    assert report["before"]["exposures"]["rejected"] == 0
    assert report["particles"]["rejected"] == {"extracted": 30, "above_threshold": 18}
    assert [(r["rule"], r["exposures"], r["particles"]["above_threshold"]) for r in report["rules"]] == [
        ("max_ctf_fit_angstrom", 2, 12),
        ("max_total_motion_angstrom", 2, 12),
    ]
    assert report["rejected_by"] == {"max_ctf_fit_angstrom": 2, "max_total_motion_angstrom": 1}
    assert report["without_rings"] == 1
    assert report["delivered"] == "dry run"
    assert quality_events(layout) == []


def test_the_spread_of_each_figure_is_shown(layout: OutputLayout) -> None:
    figures = run(str(layout.root))["figures"]
    assert figures["ctf_fit_angstrom"] == {
        "n": 3, "p0": 3.0, "p5": 3.1, "p25": 3.5, "p50": 4.0, "p75": 4.5, "p95": 4.9, "p100": 5.0,
    }  # fmt: skip
    assert figures["total_motion_angstrom"]["p50"] == 5.0
    assert figures["ice_ratio"] == {"n": 0}


def test_limits_are_committed_merged_with_those_in_force_and_cleared_again(layout: OutputLayout) -> None:
    out = str(layout.root)
    assert run(out, "--max-ctf-fit-angstrom", "4.5", "--reason", "bad focus")["delivered"] == "journal"
    report = run(out, "--max-total-motion-angstrom", "5", "--list")
    assert report["limits"]["max_ctf_fit_angstrom"] == 4.5
    assert [item["name"] for item in report["rejected"]] == ["b", "c", "d"]
    assert load_status(layout.root)["rejected_by"] == report["rejected_by"]
    assert load_status(layout.root)["particles"]["above_threshold"] == 6
    assert load_status(layout.root)["particles"]["rejected"] == 30
    assert run(out, "--clear", "max-ctf-fit-angstrom")["exposures"]["rejected"] == 2
    assert run(out, "--clear", "all")["exposures"]["rejected"] == 0
    assert [e.reason for e in quality_events(layout)] == ["bad focus", "", "", ""]


def test_a_word_on_one_exposure_stands_until_it_is_undone(layout: OutputLayout) -> None:
    out = str(layout.root)
    report = run(out, "--reject", "a", "--reject", "b", "--reason", "ice")
    assert report["rejected_by"] == {"overruled": 2}
    assert report["overruled"][0] == {"name": "a", "accepted": False, "reason": "ice"}
    assert run(out, "--undo", "a", "--accept", "b")["exposures"]["rejected"] == 0


def test_mistakes_are_refused_before_anything_is_written(layout: OutputLayout) -> None:
    for given, overrules, words in (
        ({"max_masked_fraction": 30.0}, [], "not per cent"),
        ({}, [OverruleRequest(name="nobody", is_accepted=True)], "nobody: an exposure of this name"),
        ({}, [OverruleRequest(name="a", is_accepted=False)], "for a reason that is said"),
    ):
        with pytest.raises(ConfigurationError, match=words):
            change_quality(layout, given, overrules=overrules)
    with pytest.raises(ConfigurationError, match="a limit is one of"):
        change_quality(layout, {}, cleared=["max_everything"])
    assert quality_events(layout) == []


def test_the_tables_for_people_name_limits_and_figures(layout: OutputLayout) -> None:
    result = CliRunner().invoke(
        app, ["quality", str(layout.root), "--max-ctf-fit-angstrom", "4.5", "--dry-run", "--list"]
    )
    assert result.exit_code == 0
    for words in (
        "rejected   2 exposures (before: 0)",
        "max_ctf_fit_angstrom",
        "CTF fit to 5.0 Å",
        "nothing was changed",
    ):
        assert words in result.stdout


# --- with a service that runs ----------------------------------------------------------------------


def test_a_running_service_takes_the_word_from_its_inbox(layout: OutputLayout, tmp_path: Path) -> None:
    service = open_service(layout, tmp_path)
    told: dict[str, Any] = {}

    def ask() -> None:
        told.update(change_quality(layout, {"max_total_motion_angstrom": 5.0}, reason="drift"))

    asker = threading.Thread(target=ask)
    asker.start()
    while asker.is_alive():
        service.step(0.0)
        asker.join(0.01)
    assert told["delivered"] == "service"
    assert told["exposures"]["rejected"] == service.controller.n_rejected_by["max_total_motion_angstrom"] == 2
    service.close()
    (event,) = quality_events(layout)
    assert isinstance(event, QualityLimitsChanged)
    assert event.request_id


def test_a_service_that_does_not_answer_is_said_and_the_request_waits(
    layout: OutputLayout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stream.commands.delivery.ANSWER_TIMEOUT_S", 0.05)
    service = open_service(layout, tmp_path)
    with pytest.raises(InputError, match="they wait for it in the inbox"):
        change_quality(layout, {"max_picks": 5})
    service.close()
    # The next command finds the journal free and takes what waited first.
    assert change_quality(layout, {"max_picks": 50})["delivered"] == "journal"
    limits = [e.limits.max_picks for e in quality_events(layout) if isinstance(e, QualityLimitsChanged)]
    assert limits == [5, 50]


def test_a_request_that_the_service_refuses_is_an_error(layout: OutputLayout, tmp_path: Path) -> None:
    service = open_service(layout, tmp_path)
    inbox = Inbox(layout.inbox)
    name = inbox.post(LimitsRequest(limits={"max_picks": -1}))
    service.step(0.0)
    assert "max_picks" in (inbox.find_outcome(name) or "")
    service.close()
