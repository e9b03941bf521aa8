from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

UNIT = Path(__file__).resolve().parents[2] / "ops" / "systemd" / "icestream@.service"


def settings() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in UNIT.read_text(encoding="utf-8").splitlines():
        if "=" in line and not line.startswith("#"):
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


def test_stopping_drains_and_only_a_crash_restarts():
    unit = settings()
    assert unit["KillSignal"] == ["SIGINT"]
    assert unit["Restart"] == ["on-failure"]
    assert unit["RestartPreventExitStatus"] == ["2"]
    assert int(unit["TimeoutStopSec"][0]) >= 600


def test_the_command_is_one_that_exists():
    import typer
    from typer.testing import CliRunner

    from stream.commands import run

    app = typer.Typer()
    run.register(app)
    (command,) = settings()["ExecStart"]
    words = command.split()
    assert words[0].endswith("/bin/icestream")
    assert CliRunner().invoke(app, [words[1], "--help"]).exit_code == 0


def test_the_service_cannot_write_where_it_need_not():
    unit = settings()
    assert unit["ProtectSystem"] == ["strict"]
    assert unit["NoNewPrivileges"] == ["yes"]
    assert unit["CapabilityBoundingSet"] == [""]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_finds_nothing_to_complain_of(tmp_path: Path):
    # The executable does not exist here; anything else that is said is about the unit.
    text = UNIT.read_text(encoding="utf-8").replace("/opt/icestream/.venv/bin/icestream", "/bin/true")
    unit = tmp_path / "icestream@test.service"
    unit.write_text(text, encoding="utf-8")
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    about_us = [line for line in done.stderr.splitlines() if "icestream" in line]
    assert about_us == []
