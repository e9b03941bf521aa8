"""Events of a session told in few words, for tests of the controller and of what stands on it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from stream.config import SessionSettings, parse_settings
from stream.control.controller import Controller
from stream.control.settings import ControllerSettings
from stream.records.commands import Command
from stream.records.events import Event, ExposureFound, ExposurePreprocessed, ExposureRanked
from stream.records.values import (
    AcquisitionMetadata,
    CtfFit,
    Exposure,
    ExposureId,
    FileIdentity,
    InputKind,
    MotionSummary,
    PreprocessResult,
    RankResult,
    RunId,
    RunResult,
)


def make_file(name: str, version: int = 0) -> FileIdentity:
    return FileIdentity(
        path=f"/in/{name}", size_bytes=10, mtime_ns=version, inode=1, fingerprint=f"{name}{version}"
    )


def make_exposure(name: str, version: int = 0) -> Exposure:
    return Exposure(
        exposure_id=ExposureId(name),
        name=name,
        kind=InputKind.MOVIE,
        file=make_file(name, version),
        n_frames=4,
        shape_yx=(8, 8),
        metadata=AcquisitionMetadata(),
    )


def found(name: str, version: int = 0) -> ExposureFound:
    return ExposureFound(at=0.0, exposure=make_exposure(name, version))


def preprocessed(name: str, n_particles: int = 60, **more: Any) -> ExposurePreprocessed:
    result = PreprocessResult(
        exposure_id=ExposureId(name),
        micrograph=f"micrographs/{name}.mrc",
        thumbnail=None,
        particles=f"particles/{name}.mrcs" if n_particles else None,
        n_picks=n_particles,
        n_particles=n_particles,
        n_excluded_particles=0,
        box_size_px=32,
        pixel_size_angstrom=2.0,
        motion=None,
        ctf=None,
        ice_ratio=None,
        seconds={},
    )
    return ExposurePreprocessed(at=1.0, result=replace(result, **more))


def ranked(name: str, n_good: int = 60, n_bad: int = 0) -> ExposureRanked:
    histogram = [0] * 100
    histogram[80], histogram[10] = n_good, n_bad
    if n_good > 1:  # two values, so that the scores rank something
        histogram[80], histogram[90] = n_good - n_good // 2, n_good // 2
    result = RankResult(
        exposure_id=ExposureId(name),
        model_hash="m",
        n_scored=n_good + n_bad,
        n_excluded=0,
        n_cache_hits=0,
        score_histogram=tuple(histogram),
        seconds={},
    )
    return ExposureRanked(at=2.0, result=result)


def run_result(
    run_id: str, *, resolution: float | None = 8.0, cfar: float | None = 0.6, n: int = 100
) -> RunResult:
    return RunResult(
        run_id=RunId(run_id),
        engine="embedded",
        n_particles=n,
        symmetry="C1",
        resolution_angstrom=resolution,
        cfar=cfar,
        cfar_null=0.6,
        scf_star=0.9,
        note="",
        folder=f"runs/{run_id}",
        seconds={},
    )


def fit(
    *, resolution: float = 4.0, defocus: float = 12_000.0, astigmatism: float = 200.0, rings: bool = True
) -> CtfFit:
    return CtfFit(
        defocus_u_angstrom=defocus + astigmatism / 2,
        defocus_v_angstrom=defocus - astigmatism / 2,
        astigmatism_angle_deg=0.0,
        phase_shift_deg=0.0,
        fit_resolution_angstrom=resolution,
        score=0.1,
        is_reliable=rings,
    )


def moved(total: float, early: float = 1.0) -> MotionSummary:
    return MotionSummary(total_motion_angstrom=total, early_motion_angstrom=early, late_motion_angstrom=1.0)


def play(controller: Controller, *events: Event) -> list[Command]:
    """Handle events and, after each, what the controller proposes; return the commands of the last one."""
    commands: list[Command] = []
    for event in events:
        commands = tell(controller, event)[0]
    return commands


def tell(controller: Controller, event: Event) -> tuple[list[Command], list[Event]]:
    """Handle an event and all that the controller proposes; return the commands and what was committed."""
    committed, commands, pending = list[Event](), list[Command](), [event]
    while pending:
        for one in pending:
            commands += controller.handle(one)
            committed.append(one)
            controller.check_invariants()
        pending = controller.propose(event.at)
        assert len(committed) < 100, "the controller proposes for ever"
    return commands, committed


def replay(settings: ControllerSettings, log: Iterable[Event]) -> Controller:
    """Return a controller that has handled a journal's events, and proposed nothing."""
    controller = Controller(settings)
    for event in log:
        controller.handle(event)
    return controller


def rank_one(controller: Controller, name: str, n_good: int) -> list[Command]:
    return play(controller, found(name), preprocessed(name, n_good), ranked(name, n_good))


def make_settings(folder: Path, **sections: Any) -> SessionSettings:
    """Settings of a session on movies in folder/in with its output in folder/out, without metrics."""
    (folder / "in").mkdir(exist_ok=True)
    document = {
        "movies": folder / "in",
        "out": folder / "out",
        "microscope": {"voltage_kv": 300, "cs_mm": 2.7},
        "acquisition": {"pixel_size_angstrom": 1.0, "dose_e_per_angstrom2": 30},
        "runtime": {"preprocess_workers": 1, "min_free_disk_bytes": 0},
        "telemetry": {"port": None},
        **sections,
    }
    return parse_settings(document, item="test")
