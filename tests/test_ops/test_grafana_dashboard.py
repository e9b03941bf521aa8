from __future__ import annotations

import importlib.util
import itertools
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from stream.telemetry.series import list_declared_names

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "ops" / "grafana"
PROCESS_SERIES = {"process_resident_memory_bytes", "process_cpu_seconds_total"}
"""prometheus_client's own, of the service process."""


def load_generator() -> ModuleType:
    name = "icestream_grafana_generate"
    spec = importlib.util.spec_from_file_location(name, FOLDER / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


GENERATOR = load_generator()
DASHBOARD = json.loads((FOLDER / "icestream.json").read_text(encoding="utf-8"))


def flatten(panels: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [p for panel in panels for p in (panel, *flatten(panel.get("panels", [])))]


PANELS = flatten(DASHBOARD["panels"])
EXPRESSIONS = [(p["title"], t["expr"]) for p in PANELS for t in p.get("targets", [])]


def metric_names(expr: str) -> set[str]:
    return set(re.findall(r"\b(?:icestream|ray|process)_\w+", re.sub(r"\{[^}]*\}", "", expr)))


def test_checked_in_dashboard_is_what_the_code_writes():
    assert (FOLDER / "icestream.json").read_text(encoding="utf-8") == GENERATOR.render()


@pytest.mark.parametrize(("title", "expr"), EXPRESSIONS)
def test_every_series_in_a_panel_is_exported(title: str, expr: str):
    names = metric_names(expr)
    assert names, title
    ours = {n for n in names if not n.startswith("ray_")}
    assert ours <= list_declared_names() | PROCESS_SERIES


def test_every_ray_series_is_one_that_rays_own_dashboards_read():
    ray = importlib.util.find_spec("ray")
    assert ray is not None
    assert ray.origin is not None
    panels = Path(ray.origin).parent / "dashboard/modules/metrics/dashboards/default_dashboard_panels.py"
    if not panels.is_file():
        pytest.skip("this Ray ships no dashboards (installed without [default])")
    known = set(re.findall(r"\bray_\w+", panels.read_text(encoding="utf-8")))
    named = set(itertools.chain.from_iterable(metric_names(expr) for _, expr in EXPRESSIONS))
    assert {n for n in named if n.startswith("ray_")} <= known
    assert sum(n.startswith("ray_") for n in named) >= 5


def test_panels_have_unique_ids_and_do_not_overlap():
    ids = [p["id"] for p in PANELS]
    assert len(set(ids)) == len(ids)
    taken: dict[tuple[int, int], str] = {}
    for panel in PANELS:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        for cell in itertools.product(range(at["x"], at["x"] + at["w"]), range(at["y"], at["y"] + at["h"])):
            assert cell not in taken, (panel["title"], taken[cell])
            taken[cell] = panel["title"]


def test_what_an_operator_asks_for_is_on_the_dashboard():
    text = " ".join(expr for _, expr in EXPRESSIONS)
    for series in (
        "icestream_particle_score_bucket", "icestream_particle_score_median", "icestream_map_resolution_angstroms",
        "icestream_cfar_ratio", "icestream_map_particles", "icestream_movies_total", "icestream_movie_latency_seconds_bucket",
        "icestream_stage_duration_seconds_bucket", "icestream_queue_depth", "icestream_quarantined_movies",
        "icestream_rejected_exposures", "icestream_gain_residual", "icestream_latest_run_cfar_ratio",
        "icestream_disk_free_bytes", "icestream_exposures", "icestream_controller_runs_total",
        "ray_object_store_memory", "ray_actors",
    ):  # fmt: skip
        assert series in text


def test_variables_in_queries_are_defined():
    defined = {v["name"] for v in DASHBOARD["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", " ".join(expr for _, expr in EXPRESSIONS)))
    assert used <= defined
    assert {"instance", "ray_session"} <= used


def test_scatter_panels_name_the_columns_that_their_queries_give():
    for panel in (p for p in PANELS if p["type"] == "xychart"):
        legends = {t["legendFormat"] for t in panel["targets"]}
        series = panel["options"]["series"][0]
        assert {series["x"]["matcher"]["options"], series["y"]["matcher"]["options"]} == legends


def test_provisioning_points_at_a_prometheus_and_at_the_folder_of_the_dashboard():
    source = yaml.safe_load((FOLDER / "provisioning/datasources/prometheus.yaml").read_text())["datasources"][
        0
    ]
    assert source["type"] == "prometheus"
    provider = yaml.safe_load((FOLDER / "provisioning/dashboards/icestream.yaml").read_text())["providers"][0]
    assert provider["options"]["path"].endswith("ops/grafana")
