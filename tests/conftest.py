"""What every test gets."""

from __future__ import annotations

import logging
from collections.abc import Iterator

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
