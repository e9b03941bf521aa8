"""`icestream decide`: a person's decisions reach the journal whoever holds it, are listed, and can be taken back."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from still_service import open_service
from story import fit, found, make_settings, moved, preprocessed, ranked, run_result, tell
from typer.testing import CliRunner

from stream.app import write_session
from stream.cli import app
from stream.commands.decide import decide_session, parse_window, tighten
from stream.control.controller import Controller
from stream.records.errors import ConfigurationError, IcestreamError
from stream.records.events import RunEnded, SessionDecided
from stream.records.values import QualityLimits
from stream.records.wishes import Wish, WishKind
from stream.status import load_status
from stream.store.inbox import Inbox
from stream.store.journal import Journal, read_journal
from stream.store.layout import OutputLayout

SYMMETRY = Wish(kind=WishKind.SET_SYMMETRY, symmetry="D2")


@pytest.fixture
def layout(tmp_path: Path) -> OutputLayout:
    """A finished session of three exposures, taken at 10, 20 and 30 s; CTF fits to 3, 4 and 5 Å."""
    settings = make_settings(tmp_path)
    layout = OutputLayout(settings.out)
    with Journal(layout.journal) as journal:
        write_session(settings, layout)
        for name, resolution, taken_s in (("a", 3.0, 10), ("b", 4.0, 20), ("c", 5.0, 30)):
            journal.append(
                [
                    found(name, taken_s * 10**9),
                    preprocessed(name, 10, ctf=fit(resolution=resolution), motion=moved(2.0)),
                    ranked(name, 6, 4),
                ]
            )
    return layout


def run(*arguments: str) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["decide", *arguments, "--json"])
    assert result.exit_code == 0, (result.output, result.exception)
    document: dict[str, Any] = json.loads(result.stdout)
    return document


def refused(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["decide", *arguments])
    assert isinstance(result.exception, IcestreamError), result.output
    return str(result.exception)


def decisions(layout: OutputLayout) -> list[SessionDecided]:
    return [e for e in read_journal(layout.journal) if isinstance(e, SessionDecided)]


def test_a_decision_is_committed_listed_and_taken_back(layout: OutputLayout) -> None:
    out = str(layout.root)
    document = run(out, "--symmetry", "d2", "--mask-diameter-angstrom", "180", "--reason", "two-fold axes")
    assert document["delivered"] == "journal"
    assert [d["what"] for d in document["made"]] == ["set symmetry D2", "set mask diameter 180 Å"]
    assert document["in_force"]["symmetry"] == "D2"
    assert [e.reason for e in decisions(layout)] == ["two-fold axes", "two-fold axes"]
    document = run(out, "--undo", "d1", "--reason", "it was C1 after all")
    assert document["in_force"]["symmetry"] is None
    assert document["in_force"]["mask_diameter_angstrom"] == 180.0
    listed = run(out, "--list")["decisions"]
    assert [(d["id"], d["taken_back_by"]) for d in listed] == [("d1", "d3"), ("d2", None), ("d3", None)]


def test_an_exclusion_by_a_figure_tightens_the_limits_and_its_undo_loosens_them(layout: OutputLayout) -> None:
    out = str(layout.root)
    run(out, "--exclude", "ctf>4.5", "--exclude", "motion > 10")
    assert load_status(layout.root)["movies"]["rejected"] == 1
    document = run(out, "--exclude", "ctf>3.5")
    assert document["in_force"]["limits"]["max_ctf_fit_angstrom"] == 3.5
    assert load_status(layout.root)["particles"]["above_threshold"] == 6
    document = run(out, "--undo", "d2")
    assert document["in_force"]["limits"]["max_ctf_fit_angstrom"] == 4.5
    assert document["in_force"]["limits"]["max_total_motion_angstrom"] == 10.0
    run(out, "--undo", "d1")
    assert load_status(layout.root)["movies"]["rejected"] == 0


def test_a_word_by_quality_is_listed_and_taken_back_here_too(layout: OutputLayout) -> None:
    out = str(layout.root)
    result = CliRunner().invoke(app, ["quality", out, "--reject", "b", "--reason", "ice", "--json"])
    assert result.exit_code == 0
    (decision,) = run(out, "--list")["decisions"]
    assert (decision["id"], decision["what"], decision["reason"]) == ("d1", "reject exposure b", "ice")
    run(out, "--undo", "d1")
    assert load_status(layout.root)["movies"]["rejected"] == 0


def test_a_person_reads_what_was_decided(layout: OutputLayout) -> None:
    out = str(layout.root)
    said = CliRunner().invoke(app, ["decide", out, "--score-threshold", "0.5", "--reason", "too much junk"])
    assert "set score threshold 0.5: too much junk" in said.stdout
    assert "written to the journal" in said.stdout
    run(out, "--undo", "d1")
    listed = CliRunner().invoke(app, ["decide", out, "--list"]).stdout.splitlines()
    assert "(taken back by d2)" in listed[0]
    assert "take back d1" in listed[1]


def test_mistakes_are_refused_before_anything_is_written(layout: OutputLayout) -> None:
    out = str(layout.root)
    for arguments, words in (
        (["--pin", "run007"], "it names a run of this session (it has none yet) (found: run007)"),
        (["--reject-run", "x"], "it names a run of this session"),
        (["--symmetry", "Q4"], "engine.symmetry is a point group: Cn, Dn, T, O or I (found: Q4)"),
        (["--mask-diameter-angstrom", "-3"], "engine.mask_diameter_angstrom: Input should be greater than 0"),
        (["--score-threshold", "40"], "ranker.score_threshold: Input should be less than or equal to 1"),
        (["--exclude", "ctf<6"], "a condition is one of ctf>NUMBER"),
        (["--exclude", "ctf>six"], "a condition is one of"),
        (["--exclude", "ctf>nan"], "a condition is one of"),
        (["--exclude", "masked>7"], "quality.max_masked_fraction"),
        (["--exclude-time", "yesterday", "now"], "a time is written as"),
        (["--exclude-time", "2026-03-02", "2026-03-01"], "it ends after it begins"),
        (["--undo", "d1"], "an undo names a decision of this session (it has none yet) (found: d1)"),
        (["--symmetry", "D2", "--undo", "d9"], "found: d9"),
        (["--run"], "a run needs the service, and none runs here"),
        ([], "it is told what to decide"),
    ):
        assert words in refused(out, *arguments)
    assert decisions(layout) == []
    assert "no session was started here" in refused(str(layout.root.parent), "--run")


def test_what_was_taken_back_is_not_taken_back_again(layout: OutputLayout) -> None:
    out = str(layout.root)
    run(out, "--symmetry", "D2")
    run(out, "--undo", "d1")
    assert "d1: it was taken back by d2; undo that to bring it back" in refused(out, "--undo", "d1")
    assert run(out, "--undo", "d2")["in_force"]["symmetry"] == "D2"


def test_a_looser_exclusion_than_the_limit_in_force_is_refused() -> None:
    limits = QualityLimits(max_ctf_fit_angstrom=5.0, min_defocus_angstrom=4000.0)
    assert tighten(limits, ["ctf>4", "defocus<5000"])["max_ctf_fit_angstrom"] == 4.0
    for condition in ("ctf>6", "defocus<3000"):
        with pytest.raises(ConfigurationError, match="leaves these out already"):
            tighten(limits, [condition])


def test_a_moment_with_a_zone_is_that_moment() -> None:
    window = parse_window("2026-03-01T12:00:00+01:00", "2026-03-01T11:00:10Z")
    assert (window.from_s, window.to_s) == (1772362800.0, 1772362810.0)


def add_runs(layout: OutputLayout, folder: Path) -> None:
    """Two runs, of which the second has the finer map, and a third one in work."""
    settings = make_settings(folder, policy={"rungs": [50], "final_min_particles": 50})
    write_session(settings, layout)
    with Journal(layout.journal) as journal:
        controller = Controller(settings.controller_settings(n_preprocess_workers=2))
        for event in journal.replay():
            controller.handle(event)
        more = [found("d", 40 * 10**9), preprocessed("d", 60), ranked("d", 60)]
        force = SessionDecided(at=3.0, wish=Wish(kind=WishKind.FORCE_RUN), reason="look again")
        for event in (
            *more,
            RunEnded(at=4.0, result=run_result("run001", resolution=8.0)),
            force,
            RunEnded(at=5.0, result=run_result("run002", resolution=7.0)),
            force,
        ):
            journal.append(tell(controller, event)[1])


def test_a_run_is_pinned_and_another_rejected_until_it_is_taken_back(
    layout: OutputLayout, tmp_path: Path
) -> None:
    add_runs(layout, tmp_path)
    out = str(layout.root)
    assert load_status(layout.root)["accepted_run"] == "run002"
    assert "it names a run of this session (run001, run002" in refused(out, "--pin", "run9")
    assert "run003 has not (found: running)" in refused(out, "--pin", "run003")
    run(out, "--pin", "run001", "--reason", "run002 has streaks")
    assert load_status(layout.root)["accepted_run"] == "run001"
    run(out, "--undo", "d3")
    assert load_status(layout.root)["accepted_run"] == "run002"
    document = run(out, "--reject-run", "run002", "--reason", "streaks")
    assert document["in_force"]["rejected_runs"] == ["run002"]
    assert load_status(layout.root)["accepted_run"] == "run001"
    assert "its runs (run002) are over" in refused(out, "--undo", "d1")


def test_exposures_of_a_time_are_left_out_until_it_is_taken_back(layout: OutputLayout) -> None:
    out = str(layout.root)
    document = run(
        out, "--exclude-time", "1970-01-01T00:00:15Z", "1970-01-01T00:00:25Z", "--reason", "refill"
    )
    assert document["in_force"]["excluded_times"] == [
        "from 1970-01-01T00:00:15+00:00 to 1970-01-01T00:00:25+00:00"
    ]
    status = load_status(layout.root)
    assert [item["name"] for item in status["rejected"]] == ["b"]
    assert status["rejected_by"] == {"excluded_time": 1}
    run(out, "--undo", "d1")
    assert load_status(layout.root)["movies"]["rejected"] == 0


def test_a_running_service_takes_decisions_from_its_inbox_each_once(
    layout: OutputLayout, tmp_path: Path
) -> None:
    service = open_service(layout, tmp_path)
    told: dict[str, Any] = {}
    wishes = [SYMMETRY, Wish(kind=WishKind.FORCE_RUN)]
    asker = threading.Thread(target=lambda: told.update(decide_session(layout, wishes, reason="now")))
    asker.start()
    while asker.is_alive():
        service.step(0.0)
        asker.join(0.01)
    assert told["delivered"] == "service"
    assert (service.controller.wishes.symmetry, service.controller.wishes.forced) == ("D2", {"d2"})
    service.close()
    first, second = decisions(layout)
    assert first.request_id
    assert second.request_id
    assert first.request_id != second.request_id


def test_the_service_refuses_a_wish_that_cannot_be(layout: OutputLayout, tmp_path: Path) -> None:
    service = open_service(layout, tmp_path)
    layout.inbox.mkdir(exist_ok=True)
    documents = {
        "a.json": {"type": "wish", "wish": {"kind": "set_symmetry"}},
        "b.json": {"type": "wish", "wish": {"kind": "pin_run", "run_id": "run009"}},
        "c.json": {"type": "wish", "wish": {"kind": "dance"}},
    }
    for name, document in documents.items():
        (layout.inbox / name).write_text(json.dumps(document))
    service.step(0.0)
    inbox = Inbox(layout.inbox)
    assert "a wish of this kind gives symmetry (found: nothing)" in (inbox.find_outcome("a.json") or "")
    assert "it names a run of this session" in (inbox.find_outcome("b.json") or "")
    assert "dance" in (inbox.find_outcome("c.json") or "")
    service.close()
    assert decisions(layout) == []
