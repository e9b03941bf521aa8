"""A real Ray's own exporter: the series that our alerts and the dashboard's Ray row read are there."""

from __future__ import annotations

import importlib.util
import os
import socket
import sys
from pathlib import Path
from types import ModuleType

import pytest


def load_harness() -> ModuleType:
    name = "prometheus_harness"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).resolve().with_name(f"{name}.py"))
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


harness = load_harness()

pytestmark = [
    pytest.mark.ray,
    pytest.mark.prometheus,
    pytest.mark.skipif(
        not harness.has_prometheus(), reason="prometheus is not installed (apt-get install prometheus)"
    ),
]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_rays_exporter_shows_the_series_of_the_ray_row_with_the_labels_that_queries_use(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_EXPORT_COUNTER_AS_GAUGE", "0")
    import ray

    port = free_port()
    ray.init(
        address="local",
        num_cpus=1,
        include_dashboard=False,
        object_store_memory=200 * 2**20,
        namespace=f"metrics-{os.getpid()}",
        _metrics_export_port=port,
        log_to_driver=False,
    )
    try:

        @ray.remote(num_cpus=1)
        class Holder:
            def ping(self) -> int:
                return 1

        holder = Holder.remote()
        assert ray.get(holder.ping.remote()) == 1
        with harness.Prometheus.scraping(
            f"http://127.0.0.1:{port}/metrics", job="ray", interval_s=2.0
        ) as prometheus:
            prometheus.wait_for('ray_actors{State="ALIVE"} > 0', patience_s=120)
            prometheus.wait_for('ray_resources{State="USED", Name="CPU"} > 0', patience_s=60)
            prometheus.wait_for('ray_object_store_memory{Location="SPILLED"}', patience_s=60)
            reports = {r.panel: r for r in harness.check_dashboard(prometheus) if r.is_ray}
            assert [r for r in reports.values() if r.error is not None] == []
            assert reports["Actors"].values["State=ALIVE"] == 1
            assert reports["Resources in use"].values["Name=CPU"] == 1
            assert "Location=SPILLED" in reports["Object store"].values
            assert prometheus.value("count(ray_actors) by (SessionName)") is not None
    finally:
        ray.shutdown()
