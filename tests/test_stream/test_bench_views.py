"""The benchmarks of preferred orientation and of junk: their parts, and which figures speak for a session."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from stream.commands import bench_junk, bench_views
from stream.commands.bench_junk import JUNK, run_junk_benchmark
from stream.commands.bench_views import run_views_benchmark
from stream.records.errors import ConfigurationError


@pytest.mark.parametrize(("run", "parts"), [(run_views_benchmark, "clusters"), (run_junk_benchmark, "with")])
def test_another_part_is_refused_and_those_that_exist_are_named(run: Any, parts: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=f"{parts}.*found: half"):
        run(tmp_path, part="half")


def test_where_no_map_is_accepted_the_finest_speaks_and_of_equals_the_one_of_more_particles() -> None:
    runs = [
        {"run_id": "run001", "resolution_angstrom": None, "particles": 900},
        {"run_id": "run002", "resolution_angstrom": 9.0, "particles": 400},
        {"run_id": "run003", "resolution_angstrom": 9.0, "particles": 800},
    ]
    assert bench_views._find_finest(runs)["run_id"] == "run003"
    assert bench_views._find_finest(runs[:1]) == {}


@pytest.mark.parametrize("n_good", [4, 6, 24])
def test_there_are_as_many_junk_exposures_as_good_ones(
    n_good: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pretend_to_write(bench_junk, monkeypatch)
    bench_junk.write_exposures(tmp_path, "with", n_good)
    names = [path.name.split("_")[0] for path in (tmp_path / "with" / "movies").iterdir()]
    assert names.count("good") == n_good
    assert len(names) == 2 * n_good
    assert set(names) == {"good", *JUNK}
    bench_junk.write_exposures(tmp_path, "without", n_good)
    assert len(list((tmp_path / "without" / "movies").iterdir())) == n_good


def pretend_to_write(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let empty files stand for the virtual microscope's movies."""

    def write(settings: Any, out: Path) -> None:
        for name in ("movies", "truth"):
            (out / name).mkdir(parents=True)
        (out / "truth" / "map.mrc").touch()
        for number in range(settings.movies):
            (out / "movies" / f"movie_{number}.tiff").touch()

    monkeypatch.setattr(module, "write_simulated_session", write)
