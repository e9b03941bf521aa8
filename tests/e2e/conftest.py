"""One small virtual session for all end-to-end tests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import kit

N_MOVIES = 6


@pytest.fixture(scope="session")
def microscope(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Movies, gain and truth of a virtual microscope, with bad files among the movies."""
    folder = tmp_path_factory.mktemp("microscope")
    kit.simulate(folder, N_MOVIES)
    movies = folder / "movies"
    good = next(movies.glob("*.tif*")).read_bytes()
    (movies / "truncated.tiff").write_bytes(good[: len(good) // 2])
    (movies / "empty.tiff").write_bytes(b"")
    (movies / "not_a_movie.tiff").write_bytes(b"PK\x03\x04 this is no TIFF" * 50)
    return folder
