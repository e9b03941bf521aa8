"""RELION as a peer: a program that runs for hours beside the benchmark, stops at a limit, and goes on from its last files.

A run's folder says in `progress.json` how long RELION had taken when it last wrote its optimiser. A run that was killed, or stopped at its
limit, continues from there (`--continue`); what it had done since is done again and counted once.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from stream.records.errors import ConfigurationError

POLL_S = 2.0

OPTIMISER = re.compile(r"run_it(\d+)_optimiser\.star")

LEADER = b"OMPI_COMM_WORLD_RANK=0"


@dataclass(frozen=True, slots=True)
class TimedRun:
    """Seconds of a program, whether it came to its end, and the iterations it had done."""

    wall_s: float
    cpu_s: float
    is_finished: bool
    n_iterations: int


def run_relion(
    command: list[str],
    out: Path,
    limit_s: float,
    *,
    launcher: tuple[str, ...] = (),
    resume: tuple[str, ...] = (),
) -> TimedRun:
    """Run one of RELION's programs from the folder above `out` until `limit_s` wall seconds are spent; it writes to `out/run`.

    `launcher` is put before the command (mpirun), `resume` are the options of it that a continued run needs again.
    CPU seconds leave out the MPI leader, which waits.
    """
    program = launcher[0] if launcher else command[0]
    if shutil.which(program) is None or shutil.which(command[0]) is None:
        raise ConfigurationError("engine", "RELION and mpirun are installed (relion_refine on PATH)", program)
    out.mkdir(parents=True, exist_ok=True)
    begun = read_progress(out)
    if begun.is_finished or begun.wall_s >= limit_s:
        return begun
    optimiser = out / f"run_it{begun.n_iterations:03d}_optimiser.star"
    if begun.n_iterations > 0 and optimiser.is_file():
        command = [command[0], "--continue", str(optimiser), *resume]
    else:
        begun = TimedRun(0.0, 0.0, False, 0)
    run = _run([*launcher, *command, "--o", str(out / "run")], out, begun, limit_s)
    if run.is_finished:
        _write_progress(out, run)
    return run


def _run(command: list[str], out: Path, begun: TimedRun, limit_s: float) -> TimedRun:
    before, started = _children_cpu_s(), time.perf_counter()
    log_path = out / "log.txt"
    with log_path.open("w" if begun.n_iterations == 0 else "a") as log:
        child = subprocess.Popen(
            command, cwd=out.parent, stdout=log, stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True,
        )  # fmt: skip
        known, leader_s = begun.n_iterations, 0.0
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(timeout=POLL_S)
                wall_s = begun.wall_s + time.perf_counter() - started
                session = _session_processes(child.pid)
                leader_s = max([leader_s, *(p.cpu_s for p in session if p.is_leader)])
                # A finished mpirun has waited for its ranks, a living one has not.
                all_s = max(_children_cpu_s() - before, sum(p.cpu_s for p in session))
                cpu_s = begun.cpu_s + all_s - leader_s
                written = _last_written(out)
                if written > known:
                    known = written
                    _write_progress(out, TimedRun(wall_s, cpu_s, False, known))
                if child.poll() is not None or wall_s >= limit_s:
                    break
        finally:
            if child.poll() is None:
                _stop(child)
    if child.returncode == 0:
        return TimedRun(wall_s, cpu_s, True, _n_begun(log_path))
    if wall_s < limit_s:
        raise RuntimeError(f"{command[0]}: exit code {child.returncode}, see {log_path}")
    return TimedRun(wall_s, cpu_s, False, max(_n_begun(log_path) - 1, 0))


def read_progress(out: Path) -> TimedRun:
    """Return the time and iterations of a run's last written files (of nothing: zeros)."""
    path = out / "progress.json"
    return TimedRun(**json.loads(path.read_text())) if path.is_file() else TimedRun(0.0, 0.0, False, 0)


def _write_progress(out: Path, run: TimedRun) -> None:
    new = out / "progress.json.new"
    new.write_text(json.dumps(asdict(run)))
    new.replace(out / "progress.json")


def _last_written(out: Path) -> int:
    return max((int(m.group(1)) for p in out.iterdir() if (m := OPTIMISER.fullmatch(p.name))), default=0)


def _n_begun(log: Path) -> int:
    begun = re.findall(r"(?:Gradient Descent|Expectation) iteration (\d+)", log.read_text())
    return max((int(number) for number in begun), default=0)


def _stop(child: subprocess.Popen[bytes]) -> None:
    os.killpg(child.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(timeout=20.0)
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def _children_cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@dataclass(frozen=True, slots=True)
class _Process:
    cpu_s: float
    is_leader: bool


def _session_processes(session: int) -> list[_Process]:
    """Return the living processes of a session (Linux; none elsewhere); the MPI leader yields the core to its followers."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[3]) != session:
                continue
            is_leader = LEADER in (stat.parent / "environ").read_bytes().split(b"\0")
            if is_leader:
                # It polls for messages without pause, and would take a third of a core that it shares.
                os.setpriority(os.PRIO_PROCESS, int(stat.parent.name), 19)
            found.append(_Process((int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"), is_leader))
    return found
