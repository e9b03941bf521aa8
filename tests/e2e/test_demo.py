"""The demo, start to map, watched by a real Prometheus: what the README promises."""

from __future__ import annotations

import importlib.util
import json
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import kit
import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.ray,
    pytest.mark.prometheus,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed"),
]
N_MOVIES = 32
RAY_ROW = "Ray"


def load_harness() -> ModuleType:
    path = kit.REPOSITORY / "tests" / "integration" / "prometheus_harness.py"
    spec = importlib.util.spec_from_file_location("prometheus_harness", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_the_demo_ends_with_a_map_that_is_as_good_as_it_says_and_every_panel_has_shown_data(
    tmp_path: Path,
) -> None:
    harness = load_harness()
    port = free_port()
    command = [sys.executable, "-m", "stream", "demo", "--out", str(tmp_path / "demo"), "--json"]
    command += ["--movies", str(N_MOVIES), "--metrics-port", str(port)]
    errors: dict[str, str] = {}
    panels: set[tuple[str, str]] = set()
    shown: set[tuple[str, str]] = set()
    with (
        (tmp_path / "log").open("w") as log,
        subprocess.Popen(
            command, env=kit.environment(), cwd=kit.REPOSITORY, stdout=subprocess.PIPE, stderr=log, text=True
        ) as process,
        harness.Prometheus.scraping(f"http://127.0.0.1:{port}/metrics") as prometheus,
    ):
        while process.poll() is None:
            for report in harness.check_dashboard(prometheus):
                if report.is_ray:
                    continue
                panels.add((report.row, report.panel))
                if report.error:
                    errors[report.expr] = report.error
                if report.values:
                    shown.add((report.row, report.panel))
            time.sleep(2.0)
        assert process.stdout is not None
        output = process.stdout.read()
    assert process.returncode == 0, (tmp_path / "log").read_text()[-3000:]
    document: dict[str, Any] = json.loads(output)
    assert document["balanced"]
    assert document["movies"] == document["states"]["done"] == N_MOVIES
    assert document["accepted_particles"] > 0.7 * document["particles"] > 0
    assert document["resolution_angstrom"] < 10.0
    assert document["truth_resolution_angstrom"] == pytest.approx(document["resolution_angstrom"], rel=0.2)
    assert document["cfar"] >= 0.15
    assert not errors
    assert panels == shown
