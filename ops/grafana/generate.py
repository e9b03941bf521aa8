"""Write `icestream.json`, the Grafana dashboard, from the panels in `icestream_panels.py`.

    python ops/grafana/generate.py            # writes the file
    python ops/grafana/generate.py --check    # exit 1 when the checked-in file is not what this would write

Plain dictionaries, no builder library: the panels differ in their query, unit and type alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Beside this file, which is a script and no package: tests load it by its path.
sys.path.insert(0, str(Path(__file__).resolve().parent))

from icestream_panels import ROWS, Panel, Row

TARGET = Path(__file__).with_name("icestream.json")
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
WIDTH = 24

Json = dict[str, Any]


def build_dashboard() -> Json:
    """Return the whole dashboard in Grafana's JSON model."""
    return {
        "uid": "icestream-session",
        "title": "icestream session",
        "description": "A live cryo-EM session from the first movie to a judged map. Generated: edit generate.py.",
        "tags": ["icestream", "cryo-em"],
        "schemaVersion": 39,
        "version": 1,
        "editable": False,
        "graphTooltip": 1,
        "refresh": "15s",
        "timezone": "browser",
        "time": {"from": "now-6h", "to": "now"},
        "templating": {"list": _variables()},
        "annotations": {"list": [_alert_annotation()]},
        "links": [],
        "panels": _place_rows(ROWS),
    }


def _variables() -> list[Json]:
    def label_values(name: str, label: str, metric: str, text: str) -> Json:
        query = f"label_values({metric}, {label})"
        return {
            "type": "query", "name": name, "label": text, "datasource": SOURCE,
            "query": {"query": query, "refId": name}, "refresh": 2, "includeAll": True, "multi": True,
            "allValue": ".*", "current": {"text": "All", "value": "$__all"}, "sort": 1,
        }  # fmt: skip

    source = {"type": "datasource", "name": "datasource", "label": "Prometheus", "query": "prometheus"}
    return [
        source,
        label_values("instance", "instance", "icestream_build_info", "Service"),
        label_values("ray_session", "SessionName", "ray_actors", "Ray"),
    ]


def _alert_annotation() -> Json:
    return {
        "name": "Alerts", "datasource": SOURCE, "enable": True, "iconColor": "red",
        "target": {"refId": "Alerts", "expr": 'ALERTS{alertname=~"Icestream.*", alertstate="firing"}'},
    }  # fmt: skip


def _place_rows(rows: Sequence[Row]) -> list[Json]:
    placed: list[Json] = []
    y = 0
    for row in rows:
        header: Json = {
            "type": "row", "id": len(placed) + 1000, "title": row.title, "collapsed": row.is_collapsed,
            "gridPos": {"x": 0, "y": y, "w": WIDTH, "h": 1}, "panels": [],
        }  # fmt: skip
        y += 1
        panels, y = _place_panels(row.panels, y)
        placed.append(header)
        (header["panels"] if row.is_collapsed else placed).extend(panels)
    ids = _number(placed, 1)
    if ids - 1 != sum(1 + len(row.panels) for row in rows):
        msg = "every panel has an id of its own"
        raise RuntimeError(msg)
    return placed


def _number(panels: Sequence[Json], first: int) -> int:
    for panel in panels:
        panel["id"] = first
        first = _number(panel.get("panels", []), first + 1)
    return first


def _place_panels(panels: Sequence[Panel], y: int) -> tuple[list[Json], int]:
    """Fill lines of 24 units from left to right; a line is as high as its highest panel."""
    placed: list[Json] = []
    x = line_height = 0
    for panel in panels:
        if x + panel.width > WIDTH:
            x, y, line_height = 0, y + line_height, 0
        position = {"x": x, "y": y, "w": panel.width, "h": panel.height}
        placed.append({**_panel_json(panel), "gridPos": position})
        x, line_height = x + panel.width, max(line_height, panel.height)
    return placed, y + line_height


def _panel_json(panel: Panel) -> Json:
    built: Json = {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.about,
        "datasource": SOURCE,
        "targets": [
            {
                "refId": chr(ord("A") + index), "datasource": SOURCE, "expr": query.expr, "format": query.kind,
                "legendFormat": query.legend, "range": panel.kind != "bargauge", "instant": panel.kind == "bargauge",
            }
            for index, query in enumerate(panel.queries)
        ],
        "fieldConfig": {"defaults": _field_defaults(panel), "overrides": []},
        "options": _options(panel),
    }  # fmt: skip
    if panel.axes is not None:
        # One frame with a column per query, so that a point has both values of one moment.
        built["transformations"] = [{"id": "joinByField", "options": {"byField": "Time", "mode": "inner"}}]
    return built


def _field_defaults(panel: Panel) -> Json:
    defaults: Json = {"unit": panel.unit, "noValue": "-"}
    limits = {"min": panel.minimum, "max": panel.maximum, "decimals": panel.decimals}
    defaults |= {key: value for key, value in limits.items() if value is not None}
    if panel.thresholds:
        steps = [{"value": value, "color": color} for value, color in panel.thresholds]
        defaults |= {"thresholds": {"mode": "absolute", "steps": steps}, "color": {"mode": "thresholds"}}
    if panel.mappings:
        options = {
            value: {"text": text, "color": color, "index": index}
            for index, (value, text, color) in enumerate(panel.mappings)
        }
        defaults["mappings"] = [{"type": "value", "options": options}]
    if panel.kind == "timeseries":
        stacking = {"mode": "normal" if panel.is_stacked else "none", "group": "A"}
        fill = 30 if panel.is_stacked else 5
        defaults["custom"] = {
            "lineWidth": 1,
            "fillOpacity": fill,
            "showPoints": "never",
            "stacking": stacking,
        }
    if panel.kind == "xychart":
        defaults["custom"] = {"show": "points", "pointSize": {"fixed": 8}}
    return defaults


def _options(panel: Panel) -> Json:
    reduce = {"calcs": ["lastNotNull"], "fields": "", "values": False}
    match panel.kind:
        case "stat":
            return {"reduceOptions": reduce, "colorMode": "value", "graphMode": "area", "textMode": "value"}
        case "bargauge":
            return {
                "reduceOptions": reduce,
                "orientation": "horizontal",
                "displayMode": "basic",
                "showUnfilled": False,
            }
        case "heatmap":
            return {
                "calculate": False, "cellGap": 1, "color": {"mode": "scheme", "scheme": "Viridis", "steps": 64},
                "yAxis": {"axisPlacement": "left", "unit": "none"}, "legend": {"show": True},
                "tooltip": {"mode": "single", "yHistogram": True},
            }  # fmt: skip
        case "xychart":
            names = panel.axes or ("", "")
            series = {
                "name": {"fixed": panel.title},
                "x": {"matcher": {"id": "byName", "options": names[0]}},
                "y": {"matcher": {"id": "byName", "options": names[1]}},
            }
            return {"mapping": "manual", "series": [series], "legend": {"showLegend": False}}
        case _:
            legend = {
                "displayMode": "table",
                "placement": "bottom",
                "calcs": ["lastNotNull"],
                "showLegend": True,
            }
            return {"legend": legend, "tooltip": {"mode": "multi", "sort": "desc"}}


def render() -> str:
    """Return the file's text."""
    return json.dumps(build_dashboard(), indent=2, ensure_ascii=False) + "\n"


def main() -> int:
    """Write or check the file."""
    parser = argparse.ArgumentParser(description="Write ops/grafana/icestream.json.")
    parser.add_argument("--check", action="store_true", help="only compare")
    if parser.parse_args().check:
        return int(not TARGET.is_file() or TARGET.read_text(encoding="utf-8") != render())
    TARGET.write_text(render(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
