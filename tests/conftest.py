"""What every test gets."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _untouched_logging() -> Iterator[None]:
    """Undo what commands run in this process (a fixture of a whole module, too) did to our packages' loggers.

    `caplog` sees only what propagates.
    """
    _reset_loggers()
    yield
    _reset_loggers()


def _reset_loggers() -> None:
    for name in ("stream", "actors", "models"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [], True
        logger.setLevel(logging.NOTSET)


@pytest.fixture(scope="module")
def virtual_session(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small simulated session with a map: four micrographs of 192 by 256 px, some fifty particles."""
    from actors.cryogem.virtual_session import VirtualSessionSettings, write_virtual_session

    folder = tmp_path_factory.mktemp("session")
    settings = VirtualSessionSettings(
        n_micrographs=4,
        shape_yx_px=(192, 256),
        pixel_size_angstrom=6.0,
        structure="phantom:3:mass_kda=300",
        particles_per_micrograph=14.0,
    )
    write_virtual_session(folder, settings)
    return folder
