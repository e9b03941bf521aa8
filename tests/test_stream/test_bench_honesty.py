"""The benchmark of honesty: its parts, what it keeps, and the figures it draws from its rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stream.commands import bench_honesty
from stream.commands.bench_honesty import run_honesty_benchmark, summarise
from stream.records.errors import ConfigurationError


def _set(number: int, difference: float | None) -> dict[str, Any]:
    return {"key": f"set{number}", "difference": difference, "resolution_angstrom": 8.0}


def _views(limit: int, cfar: float) -> dict[str, Any]:
    return {"key": f"views{limit}", "limit_deg": limit, "removed": {"cfar": cfar}}


def test_figures_are_the_largest_difference_noise_with_a_resolution_and_cfar_that_rises():
    rows = [_set(0, -0.12), _set(1, 0.05), _set(2, None), _views(60, 0.2), _views(90, 0.6), _views(30, 0.3)]
    rows += [{"key": "noise0", "resolution_angstrom": None}, {"key": "noise1", "resolution_angstrom": 20.0}]
    sets, noise, views = summarise(rows)
    assert sets["value"] == pytest.approx(12.0)
    assert sets["ratio"] == pytest.approx(1.2)
    assert sets["without_resolution"] == 1
    assert noise["value"] == 1
    assert views["unit"].startswith("at the last of 3 steps, 1 of them upwards")
    assert views["ratio"] == pytest.approx(0.5)
    assert summarise([]) == []


def test_what_is_there_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def measure(one: object, seed: int) -> dict[str, Any]:
        asked.append(seed)
        return {"difference": 0.01, "resolution_angstrom": 9.0}

    monkeypatch.setattr(bench_honesty, "refine_set", measure)
    run_honesty_benchmark(tmp_path, part="set1-2")
    figures = run_honesty_benchmark(tmp_path, part="set0-2")
    assert asked == [1, 2, 0]
    assert figures[0]["unit"].endswith("of 3 sets")
    lines = (tmp_path / "honesty.jsonl").read_text().splitlines()
    assert [json.loads(line)["key"] for line in lines] == ["set1", "set2", "set0"]


@pytest.mark.parametrize("part", ["sets", "set77", "views-x", ""])
def test_a_part_that_does_not_exist_is_refused(tmp_path: Path, part: str) -> None:
    with pytest.raises(ConfigurationError, match="set0-4"):
        run_honesty_benchmark(tmp_path, part=part)
