"""`icestream bench cryogem` goes on where it was stopped, even in a training, and judges only what is new."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import yaml

from actors.cryogem.config import read_train_config
from models.cryogem.networks import NetworkSettings
from stream.commands import bench_cryogem
from stream.commands.bench_cryogem import run_cryogem_benchmark, summarise, table, variant
from stream.records.errors import ConfigurationError

NETWORKS = {
    "depth": 4,
    "generator_filters": 4,
    "discriminator_filters": 4,
    "discriminator_layers": 2,
    "nce_levels": [1, 2],
    "head_width": 8,
    "output": "change",
}
TRAINING = {
    "n_simulated": 2,
    "crop_px": 64,
    "constant_epochs": 3,
    "decay_epochs": 3,
    "n_queries": 16,
    "checkpoint_every": 1,
    "validate_every": 12,
    "n_validated": 1,
    "device": "cpu",
}


@pytest.fixture(scope="module")
def session(virtual_session) -> Path:
    return virtual_session


@pytest.fixture
def folder(session, tmp_path) -> Path:
    document = {
        "source": {"session": str(session), "short_side_px": 128},
        "networks": NETWORKS,
        "training": TRAINING,
    }
    (tmp_path / "cryogem.yaml").write_text(yaml.safe_dump(document))
    return tmp_path


@pytest.mark.parametrize(("name", "n_steps"), [("bench.yaml", 1000), ("fields.yaml", 3000)])
def test_the_shipped_configurations_are_small_and_begin_as_the_identity(name, n_steps):
    import models.cryogem

    config = read_train_config(Path(models.cryogem.__file__).with_name(name))
    assert config.networks.output == "change"
    assert config.training.n_steps == n_steps
    assert NetworkSettings().output == "image"


def test_arms_differ_in_what_they_are_named_for(folder):
    config = read_train_config(folder / "cryogem.yaml")
    own, without, cut = (variant(config, arm, 2) for arm in bench_cryogem.ARMS)
    assert {c.training.seed for c in (own, without, cut)} == {2}
    assert [c.training.nce_form for c in (own, without, cut)] == ["paper", "unguided", "unguided"]
    assert [c.physics.imaging for c in (own, without, cut)] == ["physics", "physics", "projection"]
    with pytest.raises(ConfigurationError, match="cryogem and then of"):
        run_cryogem_benchmark(folder, part="cut")


def test_a_stopped_benchmark_goes_on_and_judges_once(folder, monkeypatch):
    with pytest.raises(ConfigurationError, match="the same command goes on"):
        run_cryogem_benchmark(folder, n_seeds=1, part="cryogem,no-guidance", limit_s=0.0)
    assert not (folder / "cryogem-0/result.json").exists()
    begun = (folder / "cryogem-0/checkpoint.safetensors").stat().st_mtime_ns
    figures = run_cryogem_benchmark(folder, n_seeds=1, part="cryogem,no-guidance")
    assert (folder / "cryogem-0/checkpoint.safetensors").stat().st_mtime_ns > begun
    rows = (folder / "cryogem-0/losses.csv").read_text().splitlines()
    assert len(rows) == 1 + 12
    by_name = {f["name"].removeprefix("cryogem, "): f for f in figures}
    assert {"cryogem", "no-guidance", "gaussian at SNR 0.1", "poisson", "physics"} <= set(by_name)
    assert by_name["cryogem"]["ratio"] == 1.0
    assert by_name["cryogem"]["cpu_minutes"] > 0.0
    assert by_name["gaussian"]["ratio"] == by_name["gaussian"]["value"] / by_name["cryogem"]["value"]
    assert (folder / "panel.png").is_file()
    lines = (folder / "table.md").read_text().splitlines()
    assert len(lines) == 2 + len(figures)

    started = time.perf_counter()
    monkeypatch.setattr(bench_cryogem, "N_DRAWS", 0)  # judging again would have nothing to average
    assert run_cryogem_benchmark(folder, n_seeds=1, part="cryogem,no-guidance") == figures
    assert time.perf_counter() - started < 5.0
    key = json.loads((folder / "results-0.json").read_text())["key"]
    assert len(key["generators"]) == 2


def test_the_spread_is_that_of_the_seeds():
    def result(own, gaussian):
        measures = {"spectrum": 0.1, "patches": 0.2, "content": None}
        return {
            "features": "ranker abc",
            "sets": {
                "gaussian": {"frechet_x1000": gaussian, **measures},
                "cryogem": {"frechet_x1000": own, **measures},
            },
        }

    figures = summarise([result(6.0, 30.0), result(8.0, 34.0)], {"cryogem": [60.0, 120.0]})
    gaussian, own = figures
    assert (own["value"], own["sd"], own["cpu_minutes"]) == (7.0, pytest.approx(2.0**0.5), 1.5)
    assert gaussian["ratio"] == pytest.approx(32.0 / 7.0)
    assert table(figures)[2] == "| gaussian | 32.0 ± 2.8 | 0.100 | 0.200 |  |  |"
