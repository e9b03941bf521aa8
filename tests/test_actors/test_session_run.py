"""One engine run of a session: a refusal is a result without a resolution; an earlier attempt's work is found again."""

from __future__ import annotations

from pathlib import Path

import pytest

from actors.engines import session_run
from actors.engines.base import EngineInput, EngineSettings, SeedRefused
from stream.records.commands import StartRun
from stream.records.values import CampaignId, ParticleSubset, RunId, RunPurpose, RunRequest
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
