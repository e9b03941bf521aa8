"""What a start makes of a configuration."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from story import make_settings

from stream.commands.quality import change_quality
from stream.config import SessionSettings, load_settings
from stream.records.events import QualityLimitsChanged
from stream.status import load_controller
from stream.store.journal import read_journal
from stream.store.layout import OutputLayout
from stream.wiring import build_worker_spec, open_service, run_session


def start(settings: SessionSettings) -> None:
    open_service(settings, in_process=True).close()


@pytest.fixture
def layout(tmp_path: Path) -> OutputLayout:
    return OutputLayout(tmp_path / "out")


def limits_of(layout: OutputLayout) -> list[float | None]:
    events = read_journal(layout.journal)
    return [e.limits.max_ctf_fit_angstrom for e in events if isinstance(e, QualityLimitsChanged)]


def test_limits_of_the_configuration_are_an_event_once(tmp_path: Path, layout: OutputLayout) -> None:
    for _ in range(2):
        start(make_settings(tmp_path, quality={"max_ctf_fit_angstrom": 6}))
    assert limits_of(layout) == [6.0]
    assert load_controller(layout.root).limits.max_ctf_fit_angstrom == 6.0


def test_limits_set_by_hand_stay_over_a_restart_until_the_configuration_says_something_else(
    tmp_path: Path, layout: OutputLayout
) -> None:
    six = make_settings(tmp_path, quality={"max_ctf_fit_angstrom": 6})
    start(six)
    change_quality(layout, {"max_ctf_fit_angstrom": 4.0})
    start(six)
    assert load_controller(layout.root).limits.max_ctf_fit_angstrom == 4.0
    start(make_settings(tmp_path, quality={"max_ctf_fit_angstrom": 8}))
    assert limits_of(layout) == [6.0, 4.0, 8.0]


def test_a_configuration_that_lies_in_the_output_folder_is_heeded_too(
    tmp_path: Path, layout: OutputLayout
) -> None:
    start(make_settings(tmp_path))
    assert limits_of(layout) == []
    text = layout.session.read_text().replace("max_ctf_fit_angstrom: null", "max_ctf_fit_angstrom: 5.0")
    layout.session.write_text(text)
    start(load_settings(layout.session))
    assert limits_of(layout) == [5.0]


def test_workers_are_told_who_picks(tmp_path: Path) -> None:
    model, program = tmp_path / "topaz.sav", Path(sys.executable)
    settings = make_settings(
        tmp_path, particle={"picker": "topaz", "topaz_executable": program, "topaz_model": model}
    )
    told = build_worker_spec(settings).preprocess
    assert (told.picker, told.topaz_executable, told.topaz_model) == ("topaz", program, model)


def test_a_start_removes_what_killed_stages_left_and_nothing_else(
    tmp_path: Path, layout: OutputLayout
) -> None:
    left = [folder / ".tmp-6538eaff-a.png" for folder in layout.stage_folders]
    kept = [layout.micrograph("a"), layout.thumbnail("a"), layout.root / "runs" / ".tmp-run001" / "map.mrc"]
    for path in [*left, *kept]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half")
    start(make_settings(tmp_path))
    assert [path for path in left if path.exists()] == []
    assert [path for path in kept if not path.exists()] == []


def test_a_session_that_ends_leaves_its_report(tmp_path: Path, layout: OutputLayout) -> None:
    settings = make_settings(tmp_path)
    settings.movies.mkdir(exist_ok=True)
    run_session(settings, until_idle=True, in_process=True)
    assert "<html" in layout.report.read_text()


def test_a_report_that_cannot_be_written_spoils_no_session(tmp_path: Path, layout: OutputLayout) -> None:
    settings = make_settings(tmp_path)
    settings.movies.mkdir(exist_ok=True)
    layout.report.mkdir(parents=True)
    assert run_session(settings, until_idle=True, in_process=True)["finished"]
