"""`ray job submit` reprocesses a folder on a real local Ray head."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import kit
import pytest

pytestmark = pytest.mark.ray
RAY = Path(sys.executable).with_name("ray")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def head() -> Iterator[tuple[str, dict[str, str]]]:
    """Start a Ray head with a dashboard (jobs need it) and token authentication; end it afterwards."""
    port, dashboard = free_port(), free_port()
    environment = {**kit.environment(), "RAY_AUTH_MODE": "token"}
    generate = [str(RAY), "get-auth-token", "--generate"]
    subprocess.run(generate, env=environment, check=True, capture_output=True, timeout=120)
    command = [
        str(RAY), "start", "--head", "--block", "--num-cpus=6", f"--port={port}", "--node-ip-address=127.0.0.1",
        "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", "--object-store-memory=200000000",
    ]  # fmt: skip
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{dashboard}"
    try:
        wait_until_up(address)
        yield address, environment
    finally:
        process.terminate()
        process.wait(timeout=60)


def wait_until_up(address: str, limit_s: float = 120) -> None:
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        try:
            urllib.request.urlopen(f"{address}/api/version", timeout=5)
        except urllib.error.HTTPError:  # 401: it is up, and asks for the token
            return
        except OSError:
            time.sleep(0.5)
        else:
            return
    raise AssertionError(f"no Ray dashboard at {address} within {limit_s} s")


def submit(
    command: list[str], environment: dict[str, str], limit_s: float = 120
) -> subprocess.CompletedProcess[str]:
    """Submit a job; the dashboard answers before the head's job agent is up, and then asks to try again."""
    deadline = time.monotonic() + limit_s
    while True:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=400, check=False
        )
        if "No available agent" not in done.stderr + done.stdout or time.monotonic() > deadline:
            return done
        time.sleep(2.0)


def test_a_folder_is_reprocessed_as_a_ray_job(
    head: tuple[str, dict[str, str]], microscope: Path, tmp_path: Path
) -> None:
    address, environment = head
    out = tmp_path / "out"
    options = list(map(str, kit.session_options(microscope, out)))
    command = [str(RAY), "job", "submit", "--address", address, "--working-dir", str(kit.REPOSITORY), "--"]
    command += [sys.executable, "-m", "actors.jobs.reprocess", *options]
    environment = {k: v for k, v in environment.items() if k != "PYTHONPATH"}
    environment["PATH"] = os.environ["PATH"]
    done = submit(command, environment)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    status = kit.status(out)
    assert status["balanced"]
    assert status["movies"]["done"] == 6
    assert status["movies"]["quarantined"] == 3
