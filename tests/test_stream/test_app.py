"""The service's loop with a fake source and a fake runtime: what is committed, resumed, refused."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import pytest

from stream.app import Service, write_session
from stream.config import SessionSettings, parse_settings
from stream.control.controller import Controller
from stream.control.exposures import ExposureState
from stream.records.commands import Command, Preprocess, Rank, StartRun
from stream.records.errors import ResourceError
from stream.records.events import (
    DiskSpaceChanged,
    Event,
    ExposureFound,
    ExposurePreprocessed,
    ExposureRanked,
    RunEnded,
    StageFailed,
)
from stream.records.values import (
    AcquisitionMetadata,
    Exposure,
    ExposureId,
    FailureKind,
    FileIdentity,
    InputKind,
    PreprocessResult,
    RankResult,
    RunResult,
    Stage,
)
from stream.status import load_status, summarize
from stream.store.journal import Journal
from stream.store.layout import OutputLayout
from stream.telemetry.metrics import Telemetry


def make_found(name: str) -> ExposureFound:
    exposure = Exposure(
        exposure_id=ExposureId(name),
        name=name,
        kind=InputKind.MOVIE,
        file=FileIdentity(path=f"/in/{name}", size_bytes=10, mtime_ns=0, inode=1, fingerprint=name),
        n_frames=4,
        shape_yx=(8, 8),
        metadata=AcquisitionMetadata(),
    )
    return ExposureFound(at=1.0, exposure=exposure)


class ListSource:
    """Gives the events it was made with, one per poll."""

    problem = None

    def __init__(self, events: Sequence[Event]) -> None:
        self._events = deque(events)

    def poll(self, now: float) -> list[Event]:
        return [self._events.popleft()] if self._events else []

    @property
    def is_quiet(self) -> bool:
        return not self._events

    def take_dropped(self) -> list[str]:
        return []

    def close(self) -> None:
        self._events.clear()


class PromptRuntime:
    """Answers every command at the next poll; `broken` names fail as bad input; `mute` holds answers back."""

    worker_restarts: ClassVar[dict[str, int]] = {}

    def __init__(self, broken: Sequence[str] = (), *, mute: bool = False) -> None:
        self.commands: list[Command] = []
        self._queue: deque[Command] = deque()
        self._broken = set(broken)
        self._mute = mute

    def submit(self, command: Command) -> None:
        self.commands.append(command)
        self._queue.append(command)

    def poll(self, timeout_s: float) -> list[Event]:
        if self._mute:
            return []
        answers = [self._answer(c) for c in self._queue]
        self._queue.clear()
        return answers

    def close(self) -> None:
        self._queue.clear()

    def _answer(self, command: Command) -> Event:
        match command:
            case Preprocess(exposure=exposure) if exposure.name in self._broken:
                return StageFailed(
                    at=2.0,
                    exposure_id=exposure.exposure_id,
                    stage=Stage.PREPROCESS,
                    kind=FailureKind.INPUT,
                    reason=f"{exposure.name}: truncated",
                )
            case Preprocess(exposure=exposure):
                return ExposurePreprocessed(at=2.0, result=preprocessed(exposure.exposure_id))
            case Rank(exposure_id=exposure_id):
                return ExposureRanked(at=3.0, result=ranked(exposure_id))
            case StartRun(request=request):
                return RunEnded(
                    at=4.0,
                    result=RunResult(
                        run_id=request.run_id,
                        engine="fake",
                        n_particles=request.n_particles,
                        symmetry="C1",
                        resolution_angstrom=9.0,
                        cfar=0.5,
                        cfar_null=0.6,
                        scf_star=0.9,
                        note="",
                        folder=f"runs/{request.run_id}",
                        seconds={"refine": 1.0},
                    ),
                )
        raise AssertionError(command)


def preprocessed(exposure_id: ExposureId) -> PreprocessResult:
    return PreprocessResult(
        exposure_id=exposure_id,
        micrograph="m.mrc",
        thumbnail=None,
        particles="p.mrcs",
        n_picks=50,
        n_particles=50,
        n_excluded_particles=0,
        box_size_px=32,
        pixel_size_angstrom=2.0,
        motion=None,
        ctf=None,
        ice_ratio=None,
        seconds={"read": 0.1},
    )


def ranked(exposure_id: ExposureId) -> RankResult:
    histogram = [0] * 100
    histogram[90] = 50
    return RankResult(
        exposure_id=exposure_id,
        model_hash="m",
        n_scored=50,
        n_excluded=0,
        n_cache_hits=0,
        score_histogram=tuple(histogram),
        seconds={"rank": 0.1},
    )


def make_settings(folder: Path, **runtime: int) -> SessionSettings:
    (folder / "in").mkdir(exist_ok=True)
    document = {
        "movies": folder / "in",
        "out": folder / "out",
        "microscope": {"voltage_kv": 300, "cs_mm": 2.7},
        "acquisition": {"pixel_size_angstrom": 1.0, "dose_e_per_angstrom2": 30},
        "policy": {"rungs": [100], "final_min_particles": 50},
        "runtime": {"preprocess_workers": 2, "min_free_disk_bytes": 0, **runtime},
    }
    return parse_settings(document, item="test")


def open_service(settings: SessionSettings, source: ListSource, runtime: PromptRuntime) -> Service:
    layout = OutputLayout(settings.out)
    journal = Journal(layout.journal)
    write_session(settings, layout)
    controller = Controller(settings.controller_settings(n_preprocess_workers=2))
    telemetry = Telemetry("test")
    for event in journal.replay():
        controller.handle(event)
        telemetry.observe(event, replay=True)
    service = Service(
        settings,
        controller=controller,
        journal=journal,
        source=source,
        runtime=runtime,
        telemetry=telemetry,
        clock=lambda: 10.0,
    )
    service.open()
    return service


def run_until_finished(service: Service, n_steps: int = 100) -> None:
    for _ in range(n_steps):
        service.step(0.0)
        if service.is_input_quiet:
            service.end_input()
        if service.controller.is_finished:
            return
    raise AssertionError("the session did not end")


def test_a_session_ends_with_every_movie_accounted_for_and_a_map(tmp_path: Path) -> None:
    settings = make_settings(tmp_path)
    source = ListSource([make_found(n) for n in ("a", "b", "bad", "c")])
    service = open_service(settings, source, PromptRuntime(broken=["bad"]))
    run_until_finished(service)
    live = summarize(service.controller)
    service.close()
    assert live["movies"] == {
        "found": 4,
        "waiting": 0,
        "in_work": 0,
        "done": 3,
        "rejected": 0,
        "quarantined": 1,
    }
    assert live["balanced"]
    assert live["resolution_angstrom"] == 9.0
    assert live["quarantine"] == [{"name": "bad", "path": "/in/bad", "reason": "bad: truncated"}]
    assert load_status(settings.out) == live


def test_work_without_an_outcome_is_done_once_more_after_a_restart_and_nothing_else(tmp_path: Path) -> None:
    settings = make_settings(tmp_path)
    first = open_service(settings, ListSource([make_found("a"), make_found("b")]), PromptRuntime(mute=True))
    first.step(0.0)
    first.step(0.0)
    first.close()
    runtime = PromptRuntime()
    second = open_service(settings, ListSource([]), runtime)
    assert [c.exposure.name for c in runtime.commands if isinstance(c, Preprocess)] == ["a", "b"]
    run_until_finished(second)
    second.close()
    third_runtime = PromptRuntime()
    third = open_service(settings, ListSource([]), third_runtime)
    third.step(0.0)
    third.close()
    assert third_runtime.commands == []


def test_nothing_starts_while_free_space_is_under_the_reserve(tmp_path: Path) -> None:
    settings = make_settings(tmp_path, min_free_disk_bytes=2**60)
    runtime = PromptRuntime()
    told: list[Event] = []
    service = open_service(settings, ListSource([make_found("a")]), runtime)
    service._on_event = told.append
    service.step(0.0)
    service.step(0.0)
    assert runtime.commands == []
    assert [e.is_low for e in told if isinstance(e, DiskSpaceChanged)] == [True]
    assert service.controller.n_by_state[ExposureState.WAITING] == 1
    service.close()


def test_an_event_that_cannot_be_written_stops_the_service_before_its_command_runs(tmp_path: Path) -> None:
    settings = make_settings(tmp_path)
    runtime = PromptRuntime()
    service = open_service(settings, ListSource([make_found("a")]), runtime)
    service._journal._connection.execute("PRAGMA query_only=ON")
    with pytest.raises(ResourceError, match="must be on disk before it takes effect"):
        service.step(0.0)
    assert runtime.commands == []
    service.close()


def test_draining_lets_work_end_and_starts_nothing(tmp_path: Path) -> None:
    settings = make_settings(tmp_path)
    runtime = PromptRuntime()
    service = open_service(settings, ListSource([make_found(n) for n in "abcdefg"]), runtime)
    service.step(0.0)
    service.drain()
    while service.has_stage_in_work:
        service.step(0.0)
    assert service.controller.n_by_state[ExposureState.IN_WORK] == 0
    assert len(service.controller.exposures) == 1
    service.close()
