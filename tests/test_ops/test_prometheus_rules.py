from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from stream.telemetry.series import list_declared_names

ROOT = Path(__file__).resolve().parents[2]
RULES = ROOT / "ops" / "prometheus"

RAY_SERIES = {"ray_actors", "ray_object_store_memory"}
"""Used in alerts; documented in Ray's reference of system metrics."""

OTHER_SERIES = {"up", "process_start_time_seconds"}


def load(name: str) -> Any:
    return yaml.safe_load((RULES / name).read_text(encoding="utf-8"))


def rules(name: str) -> list[dict[str, Any]]:
    return [rule for group in load(name)["groups"] for rule in group["rules"]]


ALERTS = rules("alerts.yml")
NAMES = [rule["alert"] for rule in ALERTS]


def cases(alert: str) -> list[dict[str, Any]]:
    tests = load("alerts_test.yml")["tests"]
    return [c for t in tests for c in t.get("alert_rule_test", []) if c["alertname"] == alert]


def named_series(expression: str) -> set[str]:
    """Names before `{`, `[` or an operator; words in label matchers and functions are not series."""
    bare = re.sub(r"\{[^}]*\}|\"[^\"]*\"|\b(?:by|without|on|ignoring)\s*\([^)]*\)", " ", expression)
    words = re.findall(r"(?<![\w:.])[a-zA-Z_:][\w:]*(?![\w:(])(?!\s*\()", bare)
    return {
        w
        for w in words
        if w not in {"and", "or", "unless", "bool", "sum", "by", "without", "on"} and "_" in w
    } | ({"up"} if re.search(r"(?<![\w:])up\b", expression) else set())


@pytest.mark.parametrize("rule", ALERTS, ids=NAMES)
def test_every_alert_has_a_severity_a_summary_and_a_runbook_with_the_three_answers(rule: dict[str, Any]):
    assert rule["labels"]["severity"] in {"warning", "critical"}
    assert rule["annotations"]["summary"]
    page = ROOT / rule["annotations"]["runbook"]
    assert page.stem == rule["alert"]
    text = page.read_text(encoding="utf-8")
    assert text.startswith(f"# {rule['alert']}\n")
    for heading in ("## What it means", "## What to look at", "## What to do"):
        assert heading in text


def test_every_runbook_belongs_to_an_alert():
    pages = {p.stem for p in (ROOT / "ops" / "runbooks").glob("*.md")} - {"README"}
    assert pages == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_alert_is_tested_firing_and_silent(name: str):
    fires = [bool(case["exp_alerts"]) for case in cases(name)]
    assert True in fires
    assert False in fires


@pytest.mark.parametrize("rule", ALERTS + rules("recording.yml"), ids=lambda r: r.get("alert") or r["record"])
def test_every_series_in_a_rule_is_exported_by_someone(rule: dict[str, Any]):
    recorded = {r["record"] for r in rules("recording.yml")}
    known = list_declared_names() | RAY_SERIES | OTHER_SERIES | recorded
    named = named_series(rule["expr"])
    assert named
    assert named <= known


def test_the_check_of_series_names_sees_a_wrong_one():
    assert named_series(
        'sum by (a) (rate(icestream_moves_total{stage="x"}[5m])) > 1 and on (job) up == 0'
    ) == {
        "icestream_moves_total",
        "up",
    }


def test_scrape_configuration_points_at_the_service_default_port():
    from stream.config import TelemetrySettings

    jobs = {job["job_name"]: job for job in load("prometheus.yml")["scrape_configs"]}
    targets = jobs["icestream"]["static_configs"][0]["targets"]
    assert targets == [f"{TelemetrySettings().host}:{TelemetrySettings().port}"]
    assert "file_sd_configs" in jobs["ray"]


@pytest.mark.prometheus
@pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed (apt-get install prometheus)"
)
@pytest.mark.parametrize(
    "command",
    [
        ["check", "config", "prometheus.yml"],
        ["check", "rules", "recording.yml", "alerts.yml"],
        ["test", "rules", "alerts_test.yml"],
    ],
    ids=" ".join,
)
def test_promtool_passes(command: list[str]):
    done = subprocess.run(
        ["promtool", *command], cwd=RULES, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.prometheus
@pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed (apt-get install prometheus)"
)
def test_promtool_finds_nothing_to_complain_of_in_our_exposition():
    from prometheus_client import generate_latest

    from stream.telemetry import Snapshot, Telemetry, Volume

    telemetry = Telemetry("1.0")
    telemetry.set_gauges(
        Snapshot(
            n_found=0,
            states={"done": 0},
            queue_depth={"rank": 1},
            inflight={"rank": 1},
            volumes={"output": Volume(free_bytes=1, size_bytes=2)},
            worker_restarts={"rank": 1},
        )
    )
    exposition = generate_latest(telemetry.registry)
    assert b"icestream_worker_restarts_total" in exposition
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=exposition, capture_output=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stderr
