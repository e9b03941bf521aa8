"""The Ray runtime: pools of actors, one command in work per preprocessing actor, results as they come.

Policy: only small records travel through Ray; movies and stacks travel by file. A dead actor is replaced
and its command answered with a resource failure, so the controller decides whether to try again. A
command that runs longer than the timeout costs its actor's life. Ray's token authentication is set on both
sides; a Ray started here listens on the loopback address alone.
"""

from __future__ import annotations

import logging
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray
from ray.exceptions import RayError

from actors.handlers import (
    Failure,
    PreprocessHandler,
    RankHandler,
    RunHandler,
    WorkerSpec,
    attempt,
)
from actors.outcomes import WorkCommand, WorkOutcome, event_for, item_of
from stream.huge_pages import TUNABLE, VARIABLE
from stream.records.commands import (
    CancelRun,
    ClusterParticles,
    Command,
    OrientGain,
    Preprocess,
    Rank,
    StartRun,
)
from stream.records.events import Event, RunCancelled
from stream.records.values import FailureKind
from stream.telemetry.logs import configure_logging

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSettings:
    """How many actors there are and what each asks of the cluster.

    `engine_niceness` keeps the live stages' share of a machine that the engine shares with them. There are
    `n_engines` engine workers, each with `engine_threads`; a run longer than `run_timeout_s` costs its worker's life.
    """

    n_preprocess_workers: int
    n_rank_callers: int
    ray_address: str | None = None
    ranker_gpus: float = 0.0
    engine_gpus: float = 0.0
    engine_threads: int = 1
    engine_niceness: int = 5
    n_engines: int = 1
    stage_timeout_s: float = 1800.0
    run_timeout_s: float = 86_400.0
    ray_metrics_port: int | None = None
    object_store_bytes: int = 300 * 2**20


class _Worker:
    """The body of every actor: one handler, made where it runs."""

    def __init__(self, kind: str, spec: WorkerSpec, niceness: int) -> None:
        makers: dict[str, Callable[[WorkerSpec], Any]] = {
            "preprocess": PreprocessHandler,
            "rank": RankHandler,
            "engine": RunHandler,
        }
        os.nice(niceness)
        configure_logging(level="warning")  # the process is this actor's alone
        self._handler = makers[kind](spec)

    def health(self) -> int:
        """Answer with the process id: the actor is up."""
        return os.getpid()

    def process(self, command: WorkCommand) -> WorkOutcome:
        """Do one command."""
        outcome: WorkOutcome = attempt(lambda: self._handler.process(command), item_of(command))
        return outcome


@dataclass(frozen=True, slots=True)
class _InWork:
    command: WorkCommand
    actor: Any
    since: float


class RayRuntime:
    """Runs commands on Ray actors, on this machine or on a cluster that is already there."""

    def __init__(
        self, spec: WorkerSpec, pools: PoolSettings, *, clock: Callable[[], float] = time.time
    ) -> None:
        self._clock = clock
        self._pools = pools
        self._owns_ray = not ray.is_initialized()
        if self._owns_ray:
            _connect(pools)
        self._spec = spec
        self._preprocessors = [self._start("preprocess") for _ in range(pools.n_preprocess_workers)]
        self._ranker = self._start("rank")
        self._engines = [self._start("engine") for _ in range(pools.n_engines)]
        self._idle = {"preprocess": deque(self._preprocessors), "engine": deque(self._engines)}
        self._waiting: dict[str, deque[WorkCommand]] = {"preprocess": deque(), "engine": deque()}
        self._in_work: dict[Any, _InWork] = {}
        self._answers: list[Event] = []
        self._restarts = Counter(preprocess=0, rank=0, engine=0)

    def submit(self, command: Command) -> None:
        """Send a command to an actor, or hold it until one of its pool is idle."""
        match command:
            case Rank():
                self._send(command, self._ranker)
            case CancelRun():
                self._cancel(command)
            case _:
                self._waiting[_pool_of(command)].append(command)
                self._feed()

    def poll(self, timeout_s: float) -> list[Event]:
        """Return the events that answer commands."""
        if self._in_work and not self._answers:
            ready, _ = ray.wait(list(self._in_work), num_returns=1, timeout=timeout_s)
            if ready:  # take along whatever else is ready
                ready, _ = ray.wait(list(self._in_work), num_returns=len(self._in_work), timeout=0)
            for reference in ready:
                self._collect(reference)
        elif not self._answers:
            time.sleep(timeout_s)
        self._kill_overdue()
        self._feed()
        answers, self._answers = self._answers, []
        return answers

    @property
    def worker_restarts(self) -> Mapping[str, int]:
        """How often workers of each pool died or were killed for being overdue."""
        return self._restarts

    def close(self) -> None:
        """Kill the actors, and Ray if it was started here."""
        for actor in (*self._preprocessors, self._ranker, *self._engines):
            ray.kill(actor)
        self._in_work.clear()
        if self._owns_ray:
            ray.shutdown()

    def _feed(self) -> None:
        for pool, waiting in self._waiting.items():
            while waiting and self._idle[pool]:
                self._send(waiting.popleft(), self._idle[pool].popleft())

    def _cancel(self, command: CancelRun) -> None:
        """Answer a run's command with its cancellation: kill its worker, or forget it if it has none yet."""
        answer = RunCancelled(at=self._clock(), run_id=command.run_id, reason=command.reason)
        waiting = self._waiting["engine"]
        for queued in list(waiting):
            if isinstance(queued, StartRun) and queued.request.run_id == command.run_id:
                waiting.remove(queued)
                self._answers.append(answer)
        for reference, work in list(self._in_work.items()):
            if isinstance(work.command, StartRun) and work.command.request.run_id == command.run_id:
                del self._in_work[reference]
                self._idle["engine"].append(self._replace(work, is_restart=False).actor)
                self._answers.append(answer)

    def _send(self, command: WorkCommand, actor: Any) -> None:  # noqa: ANN401 - Ray's handles have no public type
        reference = actor.process.remote(command)
        self._in_work[reference] = _InWork(command, actor, time.monotonic())

    def _collect(self, reference: Any) -> None:  # noqa: ANN401
        work = self._in_work.pop(reference)
        try:
            outcome: WorkOutcome = ray.get(reference)
        except RayError as error:
            work = self._replace(work)
            text = f"{item_of(work.command)}: its worker died ({type(error).__name__})"
            outcome = Failure(kind=FailureKind.RESOURCE, reason=text)
        self._answer(work, outcome)

    def _answer(self, work: _InWork, outcome: WorkOutcome) -> None:
        pool = _pool_of(work.command)
        if pool in self._idle:
            self._idle[pool].append(work.actor)
        self._answers.append(event_for(work.command, outcome, self._clock()))

    def _replace(self, work: _InWork, *, is_restart: bool = True) -> _InWork:
        """Put a new actor in the place of one that is dead or has to die; return the work with the new one.

        Ray's own restarts are not used: for a while after a death they refuse calls, and each refusal would
        cost an item one of its attempts. A worker that was killed on purpose is no restart that anybody counts.
        """
        pool = _pool_of(work.command)
        current = {"rank": [self._ranker], "engine": self._engines}.get(pool, self._preprocessors)
        if work.actor not in current:  # replaced already, by another of its commands
            return work
        ray.kill(work.actor)
        self._restarts[pool] += is_restart
        fresh = self._start(pool)
        if pool == "preprocess":
            self._preprocessors[self._preprocessors.index(work.actor)] = fresh
        elif pool == "rank":
            self._ranker = fresh
        else:
            self._engines[self._engines.index(work.actor)] = fresh
        return replace(work, actor=fresh)

    def _start(self, pool: str) -> Any:  # noqa: ANN401
        """Start an actor of a pool; calls to it wait until it is up."""
        pools = self._pools
        cpus = 0.0 if pools.ray_address is None else 1.0
        n_threads = pools.engine_threads if pool == "engine" else 1
        options: dict[str, Any] = {"num_cpus": cpus * n_threads}
        if pool == "rank":
            options |= {"max_concurrency": pools.n_rank_callers, "num_gpus": pools.ranker_gpus}
        elif pool == "engine":
            options |= {"num_gpus": pools.engine_gpus}
        environment = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(n_threads))
        environment[VARIABLE] = os.environ.get(VARIABLE) or f"{TUNABLE}=1"
        niceness = pools.engine_niceness if pool == "engine" else 0
        actor_class = ray.remote(_Worker)
        return actor_class.options(runtime_env={"env_vars": environment}, **options).remote(
            pool, self._spec, niceness
        )

    def _kill_overdue(self) -> None:
        now = time.monotonic()
        for reference, work in list(self._in_work.items()):
            is_engine = _pool_of(work.command) == "engine"
            limit = self._pools.run_timeout_s if is_engine else self._pools.stage_timeout_s
            if now - work.since < limit:
                continue
            del self._in_work[reference]
            reason = f"{item_of(work.command)}: no outcome within {limit:.0f} s"
            self._answer(self._replace(work), Failure(kind=FailureKind.RESOURCE, reason=reason))


def _pool_of(command: WorkCommand) -> str:
    match command:
        case Preprocess() | OrientGain():
            return "preprocess"
        case Rank():
            return "rank"
        case StartRun() | ClusterParticles():
            return "engine"


def _connect(pools: PoolSettings) -> None:
    if pools.ray_address is not None:
        ray.init(address=pools.ray_address, logging_level=logging.WARNING, namespace="icestream")
        return
    ray.init(
        address="local",  # without it Ray joins whatever cluster it finds on this machine
        num_cpus=pools.n_preprocess_workers + 2,
        include_dashboard=False,
        object_store_memory=pools.object_store_bytes,
        logging_level=logging.WARNING,
        namespace="icestream",
        _node_ip_address="127.0.0.1",
        _metrics_export_port=pools.ray_metrics_port,
    )
