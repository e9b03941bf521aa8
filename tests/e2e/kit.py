"""What end-to-end tests share: small virtual sessions and the command line in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
SIZE_PX = 512
PIXEL_SIZE_ANGSTROM = 2.5


def environment() -> dict[str, str]:
    """Return an environment in which Ray is quiet and each process keeps to one thread."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": str(REPOSITORY),
    }


def icestream(
    *arguments: object, check: bool = True, timeout_s: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run the command line and return what it printed."""
    command = [sys.executable, "-m", "stream", *map(str, arguments)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env=environment(),
        cwd=REPOSITORY,
        check=False,
    )
    if check and done.returncode:
        raise AssertionError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return done


def simulate(out: Path, movies: int, *, seed: int = 3) -> None:
    """Write a small session as a microscope would, at once."""
    icestream(
        "simulate", "--out", out, "--movies", movies, "--seed", seed, "--size-px", SIZE_PX, "--frames", 6,
        "--pixel-size-angstrom", PIXEL_SIZE_ANGSTROM, "--particles-per-movie", 8, "--structure", "phantom:3:mass_kda=300",
        "--json",
    )  # fmt: skip


def session_options(microscope: Path, out: Path) -> list[object]:
    """Return the options of `run` for a session that `simulate` wrote."""
    return [
        "--movies", microscope / "movies", "--out", out, "--pixel-size-angstrom", PIXEL_SIZE_ANGSTROM,
        "--voltage-kv", 300, "--cs-mm", 2.7, "--dose-e-per-angstrom2", 40, "--gain", microscope / "gain.mrc",
        "--particle-diameter-angstrom", 140, "--metrics-port", -1, "--set", "ingest.settle_s=0.2",
        "--set", "ingest.poll_interval_s=0.5", "--set", "ingest.give_up_s=1.5", "--set", "policy.enabled=false",
        "--set", "particle.box_size_px=48", "--set", "particle.extract_pixel_size_angstrom=4.5",
        "--set", "runtime.min_free_disk_bytes=0",
    ]  # fmt: skip


def status(out: Path) -> dict[str, Any]:
    """Return `icestream status --json`."""
    document: dict[str, Any] = json.loads(icestream("status", out, "--json").stdout)
    return document
