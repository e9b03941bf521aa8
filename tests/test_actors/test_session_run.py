"""One engine run of a session: a refusal is a result without a resolution; an earlier attempt's work is found again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mrcfile
import numpy as np
import pytest

from actors.engines import session_run
from actors.engines.base import EngineInput, EngineOutput, EngineSettings, EngineStopped, SeedRefused
from stream.records.commands import StartRun
from stream.records.errors import InputError
from stream.records.values import (
    CampaignId,
    ClusteringId,
    ParticleSubset,
    RunId,
    RunPurpose,
    RunRequest,
    RunResult,
)
from stream.store.layout import OutputLayout


class RefusingEngine:
    """Says of any particles that they determine nothing."""

    name = "embedded"

    def initial_model(
        self, source: EngineInput, settings: EngineSettings, out: Path, **_more: object
    ) -> Path:
        assert source.particles_star == out / "particles.star"
        (out / "initial.json").write_text("{}")
        raise SeedRefused(source.particles_star, "the particles determine a map; they fit noise as well", 300)


@pytest.fixture
def command() -> StartRun:
    request = RunRequest(
        run_id=RunId("run-0001"),
        campaign_id=CampaignId("campaign001"),
        purpose=RunPurpose.UPDATE,
        subset=ParticleSubset(score_threshold=0.4),
        n_particles=300,
        model_hash="m",
        symmetry="C1",
        mask_diameter_angstrom=None,
        start_map=None,
        warm_start=None,
        compare_with=None,
        reason="test",
    )
    return StartRun(request=request, members=())


def test_a_refused_seed_is_a_result_without_a_resolution(
    command: StartRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_run, "make_engine", lambda _: RefusingEngine())
    monkeypatch.setattr(
        session_run, "write_run_input", lambda *arguments: arguments[-1].write_text("data_\n") and 300
    )
    layout = OutputLayout(tmp_path)
    result = session_run.run_engine(command, layout, engine_name="embedded", settings=EngineSettings())
    assert result.resolution_angstrom is None
    assert result.cfar is None
    assert result.note.startswith("refused: the particles determine a map")
    assert result.n_particles == 300
    assert (layout.run(RunId("run-0001")) / "initial.json").is_file()
    assert "initial_model" in result.seconds


class MapEngine:
    """Writes maps of one value, with the figures that a run folder has; keeps what it was asked."""

    name = "embedded"

    def __init__(self, value: float = 1.0, *, seconds: float = 0.0) -> None:
        self.value = value
        self.seconds = seconds
        self.source: EngineInput | None = None
        self.settings: EngineSettings | None = None

    def initial_model(
        self, source: EngineInput, settings: EngineSettings, out: Path, **_more: object
    ) -> Path:
        return out / "initial.mrc"

    def refine(
        self,
        source: EngineInput,
        initial_map: Path,
        settings: EngineSettings,
        out: Path,
        should_stop: Callable[[], bool],
        **_more: object,
    ) -> EngineOutput:
        self.source, self.settings = source, settings
        if self.seconds and should_stop():
            raise EngineStopped(out, "the run was asked to stop before it was done")
        paths = {name: out / f"{name}.mrc" for name in ("map", "half1", "half2", "mask")}
        for path in paths.values():
            with mrcfile.new(path, overwrite=True) as volume:
                volume.set_data(np.ones((8, 8, 8), np.float32))
            with mrcfile.mmap(path, mode="r+") as volume:
                volume.data[0, 0, 0] = self.value
        return EngineOutput(
            folder=out,
            **paths,
            fsc_star=out / "fsc.star",
            poses_star=out / "poses.star",
            resolution_angstrom=8.0,
            cfar=0.5,
            cfar_null=0.6,
            scf_star=0.9,
            n_particles=300,
            n_excluded=0,
            note="",
            provenance={"pixel_size_angstrom": 3.0},
        )


def run(
    engine: MapEngine, command: StartRun, out: Path, monkeypatch: pytest.MonkeyPatch, **more: Any
) -> RunResult:
    monkeypatch.setattr(session_run, "make_engine", lambda _: engine)
    monkeypatch.setattr(
        session_run, "write_run_input", lambda *arguments: arguments[-1].write_text("data_\n") and 300
    )
    return session_run.run_engine(
        command, OutputLayout(out), engine_name="embedded", settings=EngineSettings(), **more
    )


def changed(command: StartRun, **changes: Any) -> StartRun:
    return replace(command, request=replace(command.request, **changes))


def test_symmetry_and_mask_are_the_requests_and_nyquist_is_told(
    command: StartRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = MapEngine()
    wanted = changed(command, symmetry="D2", mask_diameter_angstrom=120.0)
    result = run(engine, wanted, tmp_path, monkeypatch)
    assert engine.settings is not None
    assert (engine.settings.symmetry, engine.settings.mask_diameter_angstrom) == ("D2", 120.0)
    assert (result.symmetry, result.nyquist_angstrom, result.union) == ("D2", 6.0, None)


def test_half_maps_with_nan_are_no_result(
    command: StartRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match=r"half1\.mrc.*finite number"):
        run(MapEngine(float("nan")), command, tmp_path, monkeypatch)
    assert not (tmp_path / "runs" / "run-0001").exists()


def test_a_run_that_takes_too_long_stops_itself_and_says_how_long_it_had(
    command: StartRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(EngineStopped, match="a run ends within 0 s"):
        run(MapEngine(seconds=1.0), command, tmp_path, monkeypatch, timeout_s=0.0)


def test_sums_are_kept_by_cluster_only_where_the_subset_is_all_of_a_clustering(
    command: StartRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = MapEngine()
    survey = ParticleSubset(score_threshold=0.4, clustering=ClusteringId("k"))
    run(engine, changed(command, subset=survey), tmp_path, monkeypatch)
    assert engine.source is not None
    assert (engine.source.clustering, engine.source.clusters) == (
        "k",
        tmp_path / "clusters" / "k" / "labels.npz",
    )
    run(engine, changed(command, subset=replace(survey, clusters=(1,))), tmp_path, monkeypatch)
    assert engine.source.clusters is None


@pytest.mark.parametrize(
    ("text", "is_forecast"),
    [
        (
            '{"best": {"clustering": "k", "clusters": [0, 2], "n_particles": 9, "resolution_angstrom": 7.0, '
            '"cfar": 0.3, "scf_star": 0.9, "cfar_null": 0.6}}',
            True,
        ),
        ('{"best": null}', False),
        ('{"best": {"clusters": [1]}}', False),
        ("not json", False),
    ],
)
def test_a_forecast_is_read_and_one_that_says_too_little_is_left_aside(
    text: str, is_forecast: bool, tmp_path: Path
) -> None:
    path = tmp_path / "unions.json"
    assert session_run.read_union(path) is None
    path.write_text(text)
    forecast = session_run.read_union(path)
    assert (forecast is not None) == is_forecast
    if forecast is not None:
        assert (forecast.clusters, forecast.cfar) == ((0, 2), 0.3)
