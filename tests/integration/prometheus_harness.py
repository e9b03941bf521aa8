"""A real Prometheus beside a metrics endpoint, and every panel's query run against it.

In a test: `with Prometheus.scraping(url) as prometheus: …; reports = check_dashboard(prometheus)`, so that it
scrapes while something happens. For an endpoint that is there already: `check_dashboard_against(url)`. By hand:

    python tests/integration/prometheus_harness.py http://127.0.0.1:9464/metrics --scrapes 30
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DASHBOARD = ROOT / "ops" / "grafana" / "icestream.json"
RULES = ROOT / "ops" / "prometheus"
PATIENCE_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PanelReport:
    """What one query of one panel gave: `error` is Prometheus' own; `values` are the latest finite ones by labels."""

    row: str
    panel: str
    expr: str
    error: str | None
    n_series: int
    values: Mapping[str, float]

    @property
    def is_ray(self) -> bool:
        """Tell whether the query reads Ray's series, which a run without Ray does not have."""
        return "ray_" in self.expr.replace("$ray_session", "")


class Prometheus:
    """A running Prometheus on a free loopback port; its data dies with it."""

    def __init__(self, base_url: str, log: Path) -> None:
        self.base_url = base_url
        self._log = log

    @classmethod
    @contextmanager
    def scraping(
        cls, url: str, *, job: str = "icestream", interval_s: float = 1.0, token: str | None = None
    ) -> Iterator[Prometheus]:
        """Start one that scrapes `url` and evaluates our rules at `interval_s`; stop it afterwards."""
        parts = urllib.parse.urlsplit(url)
        with tempfile.TemporaryDirectory(prefix="icestream-prometheus-") as name:
            folder = Path(name)
            # JSON is YAML; the rules are the ones that ship, evaluated faster than a group's own interval.
            for rules in ("recording.yml", "alerts.yml"):
                text = (RULES / rules).read_text(encoding="utf-8")
                (folder / rules).write_text(re.sub(r"(?m)^    interval: .*\n", "", text), encoding="utf-8")
            pace = f"{round(1000 * interval_s)}ms"
            scrape: dict[str, Any] = {
                "job_name": job,
                "metrics_path": parts.path or "/metrics",
                "static_configs": [{"targets": [parts.netloc]}],
            }
            if token is not None:
                scrape["authorization"] = {"credentials": token}
            document = {
                "global": {"scrape_interval": pace, "scrape_timeout": pace, "evaluation_interval": pace},
                "rule_files": ["recording.yml", "alerts.yml"],
                "scrape_configs": [scrape],
            }
            (folder / "prometheus.yml").write_text(json.dumps(document), encoding="utf-8")
            port = _free_port()
            command = [
                "prometheus",
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
                "--log.level=warn",
            ]
            log = folder / "log.txt"
            with (
                log.open("wb") as sink,
                subprocess.Popen(
                    command, stdout=sink, stderr=sink, env={**os.environ, "GOMAXPROCS": "1"}
                ) as process,
            ):
                try:
                    server = cls(f"http://127.0.0.1:{port}", log)
                    server._wait_until_ready(process)
                    yield server
                finally:
                    process.terminate()
                    process.wait(timeout=30)

    def query(self, expr: str) -> tuple[str | None, list[tuple[dict[str, str], float]]]:
        """Return Prometheus' error, or None and every sample of an instant query."""
        error, data = self._get("/api/v1/query", query=expr)
        if error is not None:
            return error, []
        if data["resultType"] == "scalar":
            return None, [({}, float(data["result"][1]))]
        return None, [(sample["metric"], float(sample["value"][1])) for sample in data["result"]]

    def value(self, expr: str) -> float | None:
        """Return the only sample of a query, or None when there is none."""
        error, samples = self.query(expr)
        if error is not None:
            raise ValueError(f"{expr}: {error}")
        if len(samples) > 1:
            raise ValueError(f"{expr}: one sample, not {len(samples)}")
        return samples[0][1] if samples else None

    def wait_for(self, expr: str, *, patience_s: float = PATIENCE_S) -> None:
        """Wait until a query returns something (a comparison returns nothing while it is false)."""
        deadline = time.monotonic() + patience_s
        while not self.query(expr)[1]:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{expr}: nothing within {patience_s} s; {self._tail()}")
            time.sleep(0.1)

    def wait_for_scrapes(self, n: int) -> None:
        """Wait until the target was scraped `n` more times than now."""
        before = self.value("sum(count_over_time(up[1h]))") or 0.0
        self.wait_for(f"sum(count_over_time(up[1h])) >= {before + n}", patience_s=PATIENCE_S + 2 * n)

    def unhealthy_rules(self) -> list[str]:
        """Return name and error of every rule that could not be evaluated."""
        _, data = self._get("/api/v1/rules")
        rules = [rule for group in data["groups"] for rule in group["rules"]]
        return [f"{r['name']}: {r.get('lastError', '')}" for r in rules if r["health"] != "ok"]

    def _get(self, path: str, **parameters: str) -> tuple[str | None, Any]:
        url = f"{self.base_url}{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=20) as answer:
                document = json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                document = json.load(error)
        return (None, document["data"]) if document["status"] == "success" else (document["error"], None)

    def _wait_until_ready(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise RuntimeError(f"prometheus ended with {process.returncode}: {self._tail()}")
            try:
                with urllib.request.urlopen(f"{self.base_url}/-/ready", timeout=5):
                    return
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.1)
        raise TimeoutError(f"prometheus was not ready within {PATIENCE_S} s: {self._tail()}")

    def _tail(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")[-2000:]


def has_prometheus() -> bool:
    """Tell whether the binary is there (Debian: apt-get install prometheus)."""
    return shutil.which("prometheus") is not None


def list_panel_queries(dashboard: Path = DASHBOARD) -> list[tuple[str, str, str]]:
    """Return (row, panel, expression) for every query of a dashboard, collapsed rows included."""
    found: list[tuple[str, str, str]] = []
    row = ""

    def visit(panels: list[dict[str, Any]]) -> None:
        nonlocal row
        for panel in panels:
            if panel["type"] == "row":
                row = panel["title"]
            found.extend((row, panel["title"], target["expr"]) for target in panel.get("targets", []))
            visit(panel.get("panels", []))

    visit(json.loads(dashboard.read_text(encoding="utf-8"))["panels"])
    return found


def fill_variables(expr: str) -> str:
    """Replace Grafana's variables as it does with everything selected."""
    return re.sub(r"\$(?:\w+|\{\w+\})", ".*", expr)


def check_dashboard(prometheus: Prometheus, dashboard: Path = DASHBOARD) -> list[PanelReport]:
    """Run every panel's queries and say what each gave."""
    reports = []
    for row, panel, expr in list_panel_queries(dashboard):
        error, samples = prometheus.query(fill_variables(expr))
        values = {_labels(labels): value for labels, value in samples if math.isfinite(value)}
        reports.append(
            PanelReport(row=row, panel=panel, expr=expr, error=error, n_series=len(samples), values=values)
        )
    return reports


def check_dashboard_against(
    url_of_metrics: str, *, n_scrapes: int = 5, token: str | None = None, dashboard: Path = DASHBOARD
) -> list[PanelReport]:
    """Scrape a live endpoint `n_scrapes` times, a second apart, and run every panel's queries."""
    with Prometheus.scraping(url_of_metrics, token=token) as prometheus:
        prometheus.wait_for("up == 1")
        prometheus.wait_for_scrapes(n_scrapes)
        return check_dashboard(prometheus, dashboard)


def format_reports(reports: list[PanelReport]) -> str:
    """Return a table for people: what each panel would show now."""
    lines = []
    for report in reports:
        shown = ", ".join(
            f"{labels or 'value'} {value:.6g}" for labels, value in list(report.values.items())[:8]
        )
        if report.error is not None:
            shown = f"ERROR {report.error}"
        elif not report.values:
            shown = "(not a number)" if report.n_series else "(no data)"
        lines.append(f"{report.row:>24} | {report.panel:<34} | {shown}")
    return "\n".join(lines)


def _labels(labels: Mapping[str, str]) -> str:
    return ",".join(f"{k}={v}" for k, v in sorted(labels.items()) if k not in {"__name__", "instance", "job"})


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> int:
    """Print what the dashboard would show of a running service; 1 when a query is wrong."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("url")
    parser.add_argument("--scrapes", type=int, default=5)
    arguments = parser.parse_args()
    token = os.environ.get("ICESTREAM_METRICS_TOKEN")
    reports = check_dashboard_against(arguments.url, n_scrapes=arguments.scrapes, token=token)
    sys.stdout.write(format_reports(reports) + "\n")
    return int(any(report.error for report in reports))


if __name__ == "__main__":
    sys.exit(main())
