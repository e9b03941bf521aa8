"""The benchmark of movie alignment says what it needs."""

import pytest

from stream.commands.bench_motion import run_motion_benchmark
from stream.records.errors import ConfigurationError


def test_without_relion_the_benchmark_names_the_package(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigurationError, match="apt-get install relion"):
        run_motion_benchmark(tmp_path, side_px=256)
