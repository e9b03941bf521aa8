"""`icestream report`: one file, at any moment of a session, in which the counts add up and no name is markup."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from still_service import open_service
from story import fit, found, make_settings, moved, preprocessed, ranked, run_result
from typer.testing import CliRunner

from stream.app import write_session
from stream.cli import app
from stream.commands.bench_journal import make_events
from stream.control.controller import Controller
from stream.records.errors import InputError, ResourceError
from stream.records.events import (
    Event,
    ExposureOverruled,
    ExposureRanked,
    FileRejected,
    InputEnded,
    QualityLimitsChanged,
    RunEnded,
    SessionOpened,
    StageFailed,
)
from stream.records.values import ExposureId, FailureKind, FileIdentity, QualityLimits, Stage
from stream.session_facts import gather_facts
from stream.sinks.report.facts import SessionState
from stream.sinks.report.page import render, write_report
from stream.sinks.report.trends import MAX_DOTS, N_GROUPS
from stream.store.journal import Journal
from stream.store.layout import OutputLayout

HOSTILE = "<script>alert(1)</script>\"'&\u202egnp"
"""A file's name may be all of this."""

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """What a browser makes of the page: its elements, their attributes, its text; fails on unclosed elements."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def list_addresses(self) -> Iterator[str]:
        for _, attributes in self.elements:
            for key in ("src", "href", "srcset", "data", "action", "xlink:href"):
                if attributes.get(key) is not None:
                    yield str(attributes[key])


def write_journal(folder: Path, *events: Event, **sections: Any) -> OutputLayout:
    settings = make_settings(folder, **sections)
    layout = OutputLayout(settings.out)
    with Journal(layout.journal) as journal:
        write_session(settings, layout)
        journal.append(events)
    return layout


def play_session(folder: Path, *events: Event, **sections: Any) -> OutputLayout:
    """Write the journal of a session that had these events, with everything that its controller decided."""
    settings = make_settings(folder, **sections)
    controller = Controller(settings.controller_settings(n_preprocess_workers=1))
    log: list[Event] = []
    for event in events:
        pending = [event]
        while pending:
            for one in pending:
                controller.handle(one)
                log.append(one)
            pending = controller.propose(event.at)
    return write_journal(folder, *log, **sections)


def page_of(layout: OutputLayout) -> Page:
    return Page(render(gather_facts(layout.root)))


def exposure(name: str, n_good: int = 60, n_bad: int = 10, **figures: Any) -> list[Event]:
    return [found(name), preprocessed(name, n_good + n_bad, **figures), ranked(name, n_good, n_bad)]


def opened(at: float = 0.0) -> SessionOpened:
    return SessionOpened(at=at, settings_digest="d", version="0.1.0")


SMALL_RUNS = {"policy": {"rungs": [100], "final_min_particles": 50, "n_parts_light": 1}}


def session_with_map(folder: Path, *, cfar: float = 0.5) -> OutputLayout:
    """Write a session of two exposures whose first run has ended; its folder holds what the engine writes."""
    events = [opened(), *exposure("a"), *exposure("b")]
    result = replace(run_result("run001", resolution=6.17, cfar=cfar, n=120), seconds={"refine": 90.0})
    layout = play_session(folder, *events, RunEnded(at=9.0, result=result), **SMALL_RUNS)
    run = layout.run(result.run_id)
    run.mkdir(parents=True)
    Image.new("L", (8, 8)).save(run / "map.png")
    shells = [None, 0.9, 0.5, 0.1]
    (run / "orientation.json").write_text(
        json.dumps({"cfsc_min": shells, "cfsc_max": shells, "box_px": 8, "pixel_size_angstrom": 2.0})
    )
    (run / "summary.json").write_text(
        json.dumps(
            {
                "unmasked_resolution_angstrom": 7.41,
                "b_factor_angstrom2": -271.0,
                "growth": {
                    "points": [
                        {"n_particles": 60.0, "resolution_angstrom": 7.0},
                        {"n_particles": 120.0, "resolution_angstrom": 6.2},
                    ],
                    "predicted_angstrom_at_2n": {"line": 5.8, "ssnr": None},
                },
            }
        )
    )
    (run / "fsc.star").write_text(
        "data_fsc\n\nloop_\n_rlnResolution #1\n_rlnFourierShellCorrelationCorrected #2\n"
        "0.0 1.0\n0.06 0.9\n0.12 0.4\n0.18 0.05\n"
    )
    return layout


def test_the_accepted_map_is_the_first_thing_that_is_said(tmp_path: Path) -> None:
    page = page_of(session_with_map(tmp_path))
    verdict = next(i for i, (_, a) in enumerate(page.elements) if a.get("class") == "verdict")
    assert page.elements[verdict][0] == "p"
    assert "6.17 Å from 120 particles (run001)" in page.text
    assert "83% of what isotropic data would give" in page.text  # 0.5 over the null of 0.6
    for words in (
        "without mask 7.41 Å",
        "−271 Å²",
        "isotropic data: 0.60, ratio 0.83",
        "from nothing 1 90 s",
    ):
        assert words in page.text


def test_pictures_and_curves_of_the_run_are_in_the_file(tmp_path: Path) -> None:
    layout = session_with_map(tmp_path)
    page = page_of(layout)
    [source] = [a["src"] for name, a in page.elements if name == "img"]
    assert source is not None
    kind, content = source.split(",", 1)
    assert kind == "data:image/png;base64"
    assert base64.b64decode(content) == (layout.root / "runs/run001/map.png").read_bytes()
    assert "FSC of the half maps" in page.text
    assert "directions, least to greatest" in page.text
    assert "random parts of run001" in page.text


def test_the_curve_crosses_the_threshold_where_the_resolution_is_drawn(tmp_path: Path) -> None:
    text = render(gather_facts(session_with_map(tmp_path).root))
    [curve] = re.findall(r'<polyline points="([^"]*)" class="line a thick">', text)
    points = [tuple(map(float, pair.split(","))) for pair in curve.split()]
    # x is linear in 1/Å: the shells of the file lie at 0, 1/3, 2/3 and 1 of the axis
    x = [p[0] for p in points]
    assert (x[1] - x[0]) == pytest.approx(x[2] - x[1], abs=0.11)
    assert (x[2] - x[1]) == pytest.approx(x[3] - x[2], abs=0.11)
    # y falls on the screen as the correlation does: 0.5 of correlation is five times 0.1
    y = [p[1] for p in points]
    assert (y[2] - y[1]) / (y[1] - y[0]) == pytest.approx(5.0, rel=0.02)


def test_files_of_a_run_that_cannot_be_read_are_named_and_the_rest_is_shown(tmp_path: Path) -> None:
    layout = session_with_map(tmp_path)
    run = layout.root / "runs/run001"
    (run / "summary.json").write_text("{")
    (run / "map.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    (run / "fsc.star").write_text("data_other\n\n_a 1\n")
    text = page_of(layout).text
    assert "6.17 Å from 120 particles" in text
    for name in ("summary.json", "map.png", "fsc.star"):
        assert f"runs/run001/{name} cannot be read" in text


def test_a_run_whose_folder_is_gone_is_still_told_of(tmp_path: Path) -> None:
    layout = session_with_map(tmp_path)
    for path in (layout.root / "runs/run001").iterdir():
        path.unlink()
    (layout.root / "runs/run001").rmdir()
    assert "6.17 Å from 120 particles" in page_of(layout).text


def test_without_an_accepted_map_the_last_run_and_its_verdict_are_shown(tmp_path: Path) -> None:
    page = page_of(session_with_map(tmp_path, cfar=0.05))
    assert "No map is accepted. run001, 120 particles: not accepted: 6.17 Å, cFAR 0.05" in page.text
    assert "preferred orientation" in page.text
    assert [a for name, a in page.elements if name == "img"], "the refused map is shown, too"


def test_a_session_with_no_run_yet_says_what_there_is(tmp_path: Path) -> None:
    text = page_of(write_journal(tmp_path, opened(), *exposure("a", 30, 5))).text
    assert "No map yet: 30 particles score above 0.4." in text
    assert "No run was started yet." in text


def test_a_session_in_which_nothing_has_happened_has_a_report(tmp_path: Path) -> None:
    text = page_of(write_journal(tmp_path)).text
    assert "No exposure has arrived yet." in text
    assert "Nothing has been measured yet." in text


def test_a_session_of_rejected_exposures_says_by_which_rule(tmp_path: Path) -> None:
    limits = QualityLimitsChanged(at=3.0, limits=QualityLimits(max_ctf_fit_angstrom=4.0), reason="strict")
    events = [e for n in "abc" for e in exposure(n, ctf=fit(resolution=5.0 + ord(n) / 1000))]
    text = page_of(write_journal(tmp_path, opened(), *events, limits)).text
    assert "No exposure can be used" in text
    assert "Rejected: 3 by max_ctf_fit_angstrom." in text
    assert "CTF fit to 5.1 Å (rule: at most 4 Å)" in text


def test_every_exposure_and_particle_is_accounted_for(tmp_path: Path) -> None:
    bad = FileRejected(
        at=3.0,
        exposure_id=ExposureId("q"),
        name="q",
        file=FileIdentity(path="/in/q.tiff", size_bytes=1, mtime_ns=0, inode=9, fingerprint="f"),
        reason="/in/q.tiff: a movie has at least two frames (found: 1)",
    )
    layout = write_journal(
        tmp_path,
        opened(),
        *exposure("a", 40, 20, n_picks=70, n_excluded_particles=10),
        *exposure("b", 25, 5),
        ExposureOverruled(at=4.0, exposure_id=ExposureId("b"), is_accepted=False, reason="ice"),
        found("c"),
        preprocessed("c", 7),
        found("d"),
        bad,
    )
    page = page_of(layout)
    assert (
        "5 found = 1 processed, in use + 2 in work + 0 waiting + 1 rejected + 1 in quarantine: none is lost."
        in page.text
    )
    rows = "picked 77 30 107 − left out at extraction (edge, mask, bad pixels) 10 0 10 = extracted 67 30 97 "
    rows += "− not scored yet 7 0 7 − could not be scored 0 0 0 = scored 60 30 90 − below τ = 0.4 20 5 25 = above τ 40 25 65"
    assert rows in page.text
    assert "/in/q.tiff a movie has at least two frames 1" in page.text  # file, rule, value


def test_outliers_are_named_and_ordinary_exposures_are_not(tmp_path: Path) -> None:
    events = [e for i in range(30) for e in exposure(f"m{i:02d}", motion=moved(5.0 + 0.1 * (i % 7)))]
    events += exposure("shaken", motion=moved(80.0))
    text = page_of(write_journal(tmp_path, opened(), *events)).text
    assert re.search(r"outliers shaken \(80\.0\)(?! and)", text)
    assert "total motion median 5.3 Å, 5.0 to 80.0 Å (31 exposures)" in text


def test_exposures_without_rings_are_warned_of_and_in_no_plot_of_the_fit(tmp_path: Path) -> None:
    events = [*exposure("a", ctf=fit()), *exposure("b", ctf=fit(rings=False, resolution=99.0))]
    text = page_of(write_journal(tmp_path, opened(), *events)).text
    assert "1 exposures show no Thon rings" in text
    assert "99.0" not in text


def test_latency_counts_from_the_last_write_or_the_opening_of_the_session(tmp_path: Path) -> None:
    late = found("late")
    file = replace(late.exposure.file, mtime_ns=int(107e9))
    events = [
        opened(100.0),
        replace(found("early"), at=101.0),
        replace(late, at=108.0, exposure=replace(late.exposure, file=file)),
        preprocessed("early"),
        preprocessed("late"),
        replace(ranked("early"), at=105.0),
        replace(ranked("late"), at=115.0),
    ]
    exposures = gather_facts(write_journal(tmp_path, *events).root).exposures
    assert {e.name: e.latency_s for e in exposures} == {"early": 5.0, "late": 8.0}


def test_what_ran_on_another_provider_than_was_asked_for_is_warned_of(tmp_path: Path) -> None:
    events = exposure("a")
    scored = events[-1]
    assert isinstance(scored, ExposureRanked)
    events[-1] = replace(scored, result=replace(scored.result, provider="CPUExecutionProvider"))
    layout = write_journal(tmp_path, opened(), *events, ranker={"provider": "cuda"})
    assert "ranker.provider cuda could not be had for 1 exposures: CPUExecutionProvider scored them" in (
        page_of(layout).text
    )


def test_failures_of_the_machine_are_counted_with_the_last_reason(tmp_path: Path) -> None:
    failed = StageFailed(
        at=1.0,
        exposure_id=ExposureId("a"),
        stage=Stage.PREPROCESS,
        kind=FailureKind.RESOURCE,
        reason="disk full",
    )
    text = page_of(write_journal(tmp_path, opened(), found("a"), failed, *exposure("a")[1:])).text
    assert "preprocess failed 1 times for the machine's sake and was tried again; last: disk full" in text


def test_settings_that_differ_from_the_defaults_are_listed_with_both(tmp_path: Path) -> None:
    layout = write_journal(tmp_path, ranker={"score_threshold": 0.55})
    facts = gather_facts(layout.root)
    assert ("ranker.score_threshold", "0.55", "0.4") in facts.changed
    assert not any(key.startswith("quality.") for key, _, _ in facts.changed)
    assert "score_threshold: 0.55" in page_of(layout).text  # the configuration itself


def test_persons_words_are_listed_with_what_became_of_them(tmp_path: Path) -> None:
    events = [
        *exposure("a"),
        ExposureOverruled(
            at=4.0, exposure_id=ExposureId("a"), is_accepted=False, reason="crack", request_id="r"
        ),
        ExposureOverruled(
            at=5.0, exposure_id=ExposureId("a"), is_accepted=None, reason="no crack", undoes="d1"
        ),
    ]
    text = page_of(write_journal(tmp_path, opened(), *events)).text
    assert re.search(r"d1 1970-01-01 \S+ reject exposure crack taken back", text)
    assert re.search(r"d2 1970-01-01 \S+ take back d1 no crack stands", text)


def test_running_stopped_and_ended_are_told_apart(tmp_path: Path) -> None:
    layout = write_journal(tmp_path, opened(), *exposure("a", 1, 0))
    assert gather_facts(layout.root).state is SessionState.STOPPED
    service = open_service(layout, tmp_path)
    assert gather_facts(layout.root).state is SessionState.RUNNING
    service.close()
    with Journal(layout.journal) as journal:
        journal.append([InputEnded(at=9.0)])
    assert gather_facts(layout.root).state is SessionState.ENDED


def test_asking_whether_a_service_runs_leaves_its_lock_alone(tmp_path: Path) -> None:
    layout = write_journal(tmp_path, opened())
    gather_facts(layout.root)
    with Journal(layout.journal) as journal:
        gather_facts(layout.root)
        journal.append([InputEnded(at=1.0)])


# --- what names may hold -------------------------------------------------------------------------------


def test_names_reasons_and_settings_are_never_markup(tmp_path: Path) -> None:
    folder = tmp_path / "a<b>&'c"
    folder.mkdir()
    held = FileRejected(
        at=3.0,
        exposure_id=ExposureId("q"),
        name=HOSTILE,
        file=FileIdentity(path=f"/in/{HOSTILE}", size_bytes=1, mtime_ns=0, inode=9, fingerprint="f"),
        reason=f"/in/{HOSTILE}: {HOSTILE} (found: {HOSTILE})",
    )
    events = [replace(e, exposure=replace(e.exposure, name=HOSTILE)) for e in [found("a")]]
    word = ExposureOverruled(at=4.0, exposure_id=ExposureId("a"), is_accepted=False, reason=HOSTILE)
    layout = write_journal(
        folder,
        opened(),
        *events,
        preprocessed("a", 70, ctf=fit(), motion=moved(3.0), picker=HOSTILE),
        ranked("a", 60, 10),
        word,
        held,
        ingest={"include": [HOSTILE.replace("\u202e", "")]},
    )
    page = page_of(layout)
    names = {name for name, _ in page.elements}
    assert not names & {"script", "iframe", "object", "embed", "link", "form", "base", "b><"}
    assert not [key for _, attributes in page.elements for key in attributes if key.startswith("on")]
    assert page.text.count("<script>alert(1)</script>") >= 5, "names are shown as they are"
    assert "\u202e" not in "".join(page.words), "what turns the direction of writing is replaced"


def test_the_file_needs_nothing_else(tmp_path: Path) -> None:
    layout = session_with_map(tmp_path)
    text = render(gather_facts(layout.root))
    page = Page(text)
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in page.list_addresses())
    anchors = {str(a["id"]) for _, a in page.elements if "id" in a}
    assert {address[1:] for address in page.list_addresses() if address.startswith("#")} <= anchors
    assert "@import" not in text
    assert "url(" not in text
    policies = [a for name, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert [p["content"] for p in policies] == [
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    ]


# --- size ----------------------------------------------------------------------------------------------


def test_a_long_session_gives_a_small_report_that_says_how_it_is_thinned(tmp_path: Path) -> None:
    n = 3 * MAX_DOTS
    layout = write_journal(tmp_path, opened(), *make_events(n))
    text = render(gather_facts(layout.root))
    assert len(text.encode()) < 200_000
    size = -(-n // N_GROUPS)
    assert f"up to {size} in a group" in text
    assert f"({n:,} exposures)" in text
    # no dot for every exposure
    assert text.count("<circle") < 100


def test_a_short_session_shows_every_exposure_by_name(tmp_path: Path) -> None:
    events = [e for i in range(20) for e in exposure(f"mov{i}", motion=moved(3.0 + i % 3))]
    text = render(gather_facts(write_journal(tmp_path, opened(), *events).root))
    assert all(f"<title>mov{i}: " in text for i in range(20))


# --- the command ---------------------------------------------------------------------------------------


def run(*arguments: str, exit_code: int = 0) -> str:
    result = CliRunner().invoke(app, ["report", *arguments])
    assert result.exit_code == exit_code, result.output
    return result.stdout


def test_the_command_writes_the_file_and_names_it(tmp_path: Path) -> None:
    layout = write_journal(tmp_path, opened(), *exposure("a"))
    target = tmp_path / "not" / "yet" / "there.html"
    document = json.loads(run(str(layout.root), "--html", str(target), "--json"))
    assert document == {"html": str(target), "size_bytes": target.stat().st_size}
    assert Page(target.read_text()).text
    assert [p.name for p in target.parent.iterdir()] == ["there.html"], "no temporary file is left"


def test_an_earlier_report_is_replaced_and_the_default_lies_in_the_session(tmp_path: Path) -> None:
    layout = write_journal(tmp_path, opened(), *exposure("a"))
    (layout.root / "report.html").write_text("old")
    assert str(layout.root / "report.html") in run(str(layout.root)).replace("\n", "")
    assert (layout.root / "report.html").read_text() != "old"


def test_a_folder_without_a_session_is_refused_by_name_and_nothing_is_written(tmp_path: Path) -> None:
    target = tmp_path / "r.html"
    with pytest.raises(InputError, match=r"nothing.*holds journal\.sqlite.*no such folder"):
        gather_facts(tmp_path / "nothing")
    result = CliRunner().invoke(app, ["report", str(tmp_path), "--html", str(target)])
    assert isinstance(result.exception, InputError)
    assert "no journal.sqlite" in str(result.exception)
    assert not target.exists()


@pytest.mark.parametrize("name", ["out/journal.sqlite", "out", "r.txt", "folder.html"])
def test_a_target_that_is_no_html_file_is_refused(tmp_path: Path, name: str) -> None:
    layout = write_journal(tmp_path, opened(), *exposure("a"))
    (tmp_path / "folder.html").mkdir()
    before = layout.journal.read_bytes()
    result = CliRunner().invoke(app, ["report", str(layout.root), "--html", str(tmp_path / name)])
    assert "--html names a file that ends with .html" in str(result.exception)
    assert layout.journal.read_bytes() == before


def test_a_place_that_cannot_be_written_is_an_error_that_names_it(tmp_path: Path) -> None:
    facts = gather_facts(write_journal(tmp_path, opened()).root)
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match=r"file/r\.html: the report must be writable"):
        write_report(tmp_path / "file" / "r.html", facts)


def test_thumbnails_are_made_small_and_broken_ones_left_out(tmp_path: Path) -> None:
    events = [e for i in range(3) for e in exposure(f"m{i}", ctf=fit(resolution=3.0 + i))]
    layout = write_journal(tmp_path, opened(), *events)
    layout.thumbnail("m0").parent.mkdir()
    Image.effect_noise((1024, 900), 60).save(layout.thumbnail("m0"))
    layout.thumbnail("m2").write_bytes(b"no picture")
    page = page_of(layout)
    [image] = [a for name, a in page.elements if name == "img"]
    assert image["alt"] == "best CTF fit, 3.0 Å: m0"
    with Image.open(io.BytesIO(base64.b64decode(str(image["src"]).split(",", 1)[1]))) as small:
        assert max(small.size) == 420


@pytest.mark.slow
def test_twenty_thousand_exposures_with_everything_that_can_be_long_stay_under_ten_megabytes(
    tmp_path: Path,
) -> None:
    n = 20_000
    long = "x" * 150
    words = [
        ExposureOverruled(at=2.0 * n, exposure_id=ExposureId("x"), is_accepted=False, reason=f"{long} {i}")
        for i in range(2_000)
    ]
    refused = [
        FileRejected(
            at=2.0 * n,
            exposure_id=ExposureId(f"q{i}"),
            name=f"{long}{i}",
            file=FileIdentity(path=f"/in/{long}{i}", size_bytes=1, mtime_ns=0, inode=i, fingerprint="f"),
            reason=f"/in/{long}{i}: {long} (found: {long})",
        )
        for i in range(2_000)
    ]
    limits = QualityLimitsChanged(
        at=2.0 * n, limits=QualityLimits(min_picks=1_000), reason="all are rejected"
    )
    found_x = [found("x"), preprocessed("x"), ranked("x")]
    layout = write_journal(tmp_path, opened(), *make_events(n), *found_x, *words, *refused, limits)
    assert write_report(layout.report, gather_facts(layout.root)) < 1_000_000
    text = Page(layout.report.read_text()).text
    assert "22,001 found = 0 processed, in use" in text
    assert "20,001 rejected exposures, the first 200 of them" in text
    assert "2,000 files, the first 200 of them" in text
    assert "lines in the middle are left out" in text
