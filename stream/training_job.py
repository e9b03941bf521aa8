"""The training of CryoGEM that a person asked a live session for: a process of its own, watched by the service.

It runs on `cryogem.cpus` cores that preprocessing does not use, at a low priority, and on its own GPU if one is named. Its folder is
`trainings/cryogem-ID/`. Failure: whatever ends it ends as a `TrainingChanged` event, the session goes on. The folder is locked
through a file that the process inherits: after a kill of the service alone the training is found still running and let end, after a
kill of both it goes on from its checkpoint when the service is back. A service that closes ends it likewise.
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import yaml

from stream.config import SessionSettings
from stream.control.controller import Controller
from stream.records.errors import IcestreamError
from stream.records.events import Event, TrainingChanged
from stream.records.training import TrainingState
from stream.store.files import replacing
from stream.store.layout import OutputLayout
from stream.store.yaml_files import read_mapping

PROGRAM = (sys.executable, "-m", "actors.jobs.cryogem")
CONFIG_FILE, LOG_FILE, RESULT_FILE = "cryogem.yaml", "training.log", "result.json"
_LOCK_FILE, _PART_FILE = "training.lock", "result.part"
_NICENESS = 10
_TOLD_FRACTION = 0.1
_TAIL_BYTES = 4096
_STOP_TIMEOUT_S = 10.0


class TrainingRunner:
    """Starts, watches and stops at most one training; `program` takes a configuration and `--out FOLDER`."""

    def __init__(self, settings: SessionSettings, *, program: Sequence[str] = PROGRAM) -> None:
        self._settings = settings
        self._layout = OutputLayout(settings.out)
        self._program = tuple(program)
        self._process: subprocess.Popen[bytes] | None = None
        self._decision_id = ""
        self._told = 0.0

    def poll(self, at: float, controller: Controller) -> list[Event]:
        """Start, stop or look at the training; return what there is to be known."""
        wanted = controller.training.find_wanted(controller.wishes)
        if self._process is None:
            if wanted is None or controller.is_draining:
                return []
            return self._start(at, wanted, is_known=controller.training.state is TrainingState.RUNNING)
        if wanted != self._decision_id:
            self.close()
            return [self._event(at, TrainingState.STOPPED, "taken back; its checkpoint is kept")]
        code = self._process.poll()
        if code is None:
            return self._tell_progress(at)
        self._process = None
        return [self._end(at, code)]

    def close(self) -> None:
        """End the process, if there is one; its checkpoint lets it go on another time."""
        process, self._process = self._process, None
        if process is None or process.poll() is not None:
            return
        process.terminate()
        try:
            process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    @property
    def _folder(self) -> Path:
        return self._layout.training(self._decision_id)

    def _start(self, at: float, decision_id: str, *, is_known: bool) -> list[Event]:
        self._decision_id, self._told = decision_id, 0.0
        folder = self._folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = (folder / _LOCK_FILE).open("w")
        except OSError as error:
            return [self._event(at, TrainingState.FAILED, f"{folder}: {error.strerror}")]
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                # one that an earlier service left running; it is looked for again at the next poll
                return []
            try:
                with replacing(folder / CONFIG_FILE) as temporary:
                    temporary.write_text(yaml.safe_dump(self._configuration(), sort_keys=False))
                self._process = self._launch(folder, lock)
            except (OSError, IcestreamError) as error:
                return [self._event(at, TrainingState.FAILED, f"it could not be started: {error}")]
        if is_known:
            return []
        choice = self._settings.cryogem
        where = f"{choice.cpus} core{'s' if choice.cpus > 1 else ''}"
        where += "" if choice.gpu is None else f" and GPU {choice.gpu}"
        words = f"on {where}, in {self._layout.relative(folder)}"
        return [self._event(at, TrainingState.RUNNING, words)]

    def _configuration(self) -> dict[str, Any]:
        """Return the training's configuration: the session's choice of sizes, this session as its source."""
        choice = self._settings.cryogem
        document = {} if choice.config is None else dict(read_mapping(choice.config))
        source = document.get("source")
        document["source"] = {
            **(source if isinstance(source, dict) else {}),
            "session": str(self._layout.root.absolute()),
        }
        document["cpus"] = choice.cpus
        training = document.get("training")
        device = "cpu" if choice.gpu is None else "cuda"
        document["training"] = {**(training if isinstance(training, dict) else {}), "device": device}
        return document

    def _launch(self, folder: Path, lock: IO[str]) -> subprocess.Popen[bytes]:
        choice = self._settings.cryogem
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(choice.cpus),
            "CUDA_VISIBLE_DEVICES": "" if choice.gpu is None else str(choice.gpu),
        }
        with (folder / _PART_FILE).open("wb") as out, (folder / LOG_FILE).open("ab") as log:
            process = subprocess.Popen(
                [*self._program, str(folder / CONFIG_FILE), "--out", str(folder)],
                stdout=out,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env=environment,
                pass_fds=(lock.fileno(),),
                start_new_session=True,  # Ctrl-C in the service's terminal is for the service alone
            )
        cores = sorted(os.sched_getaffinity(0))[-choice.cpus :]
        try:
            os.sched_setaffinity(process.pid, cores)
            os.setpriority(os.PRIO_PROCESS, process.pid, _NICENESS)
        except ProcessLookupError:  # it has ended already; the next poll says how
            pass
        return process

    def _end(self, at: float, code: int) -> TrainingChanged:
        folder = self._folder
        if code != 0:
            reason = _last_line(folder / LOG_FILE) or f"exit status {code}"
            return self._event(
                at, TrainingState.FAILED, f"{reason} ({self._layout.relative(folder / LOG_FILE)})"
            )
        (folder / _PART_FILE).replace(folder / RESULT_FILE)
        words = f"the generator is in {self._layout.relative(folder)}; icestream generate and train cryoranker --synthetic use it"
        return self._event(at, TrainingState.DONE, words)

    def _tell_progress(self, at: float) -> list[Event]:
        done = _read_progress(self._folder / LOG_FILE)
        if done is None or done[0] < (self._told + _TOLD_FRACTION) * done[1]:
            return []
        self._told = done[0] / done[1]
        return [self._event(at, TrainingState.RUNNING, f"step {done[0]:.0f} of {done[1]:.0f}")]

    def _event(self, at: float, state: TrainingState, words: str) -> TrainingChanged:
        return TrainingChanged(at=at, state=state, words=words, decision_id=self._decision_id)


def _last_line(path: Path) -> str:
    lines = _tail(path).strip().splitlines()
    return lines[-1] if lines else ""


def _read_progress(log: Path) -> tuple[float, float] | None:
    """Return steps done and steps in all from the last whole line of a training's log that has them."""
    for line in reversed(_tail(log).splitlines()):
        _, brace, rest = line.partition("{")
        try:
            point = json.loads(brace + rest)
        except ValueError:
            continue
        if isinstance(point, dict) and {"step", "n_steps"} <= set(point):
            return float(point["step"]) + 1.0, float(point["n_steps"])
    return None


def _tail(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            stream.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            return stream.read().decode("utf-8", errors="replace")
    except OSError:
        return ""
