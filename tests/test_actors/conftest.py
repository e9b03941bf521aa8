"""What tests of the training jobs share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

_ROOT = Path(__file__).parents[2]


@pytest.fixture
def run_job() -> Callable[[str, Path, Path], dict[str, Any]]:
    """Run `python -m actors.jobs.NAME CONFIG --out OUT` to its end, outside of any cluster, and return its document."""

    def run(name: str, config: Path, out: Path) -> dict[str, Any]:
        finished = subprocess.run(
            [sys.executable, "-m", f"actors.jobs.{name}", str(config), "--out", str(out)],
            cwd=_ROOT,
            env={k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=500,
            check=False,
        )
        assert finished.returncode == 0, finished.stderr[-2000:]
        document: dict[str, Any] = json.loads(finished.stdout)
        return document

    return run
