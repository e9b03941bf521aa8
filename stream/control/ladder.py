"""The ladder of engine runs: which one works, which one waits, and what became of the others."""

from __future__ import annotations

from dataclasses import replace

from stream.control.books import ExposureBooks
from stream.control.decisions import DecisionLog
from stream.control.exposures import ExposureState
from stream.control.runs import (
    RunRecord,
    RunState,
    choose_template,
    choose_warm_start,
    describe_verdict,
    find_reason_for_final_run,
    find_reason_to_rerun,
    find_reason_to_run,
    select_best,
)
from stream.control.settings import ControllerSettings
from stream.records.commands import StartRun
from stream.records.values import (
    CampaignId,
    ExposureId,
    ParticleSubset,
    RunId,
    RunPurpose,
    RunRequest,
    RunResult,
)


class RunLadder:
    """Runs of a session: one in work, at most one queued; what is running is let finish."""

    def __init__(self, settings: ControllerSettings, books: ExposureBooks, decisions: DecisionLog) -> None:
        self._settings = settings
        self._books = books
        self._decisions = decisions
        self.runs: dict[RunId, RunRecord] = {}
        self.active: StartRun | None = None
        self.queued: RunRequest | None = None
        self._last_members: frozenset[ExposureId] = frozenset()
        self._n_lost = 0

    @property
    def best(self) -> RunResult | None:
        """The accepted map, or None."""
        results = [r.result for r in self.runs.values() if r.result is not None]
        return select_best(results, self._settings)

    @property
    def template(self) -> RunId | None:
        """The run whose map new micrographs are picked with, or None."""
        return choose_template(self.best, self._settings)

    def count_losses(self) -> None:
        """Count anew which particles of the last run that started are rejected now."""
        records = (self._books.records[i] for i in self._last_members)
        self._n_lost = sum(self._books.count_above(r) for r in records if r.state is ExposureState.REJECTED)

    def request_if_due(self, at: float) -> None:
        """Queue a run when the particles have grown enough, or too many of the last run's were rejected."""
        n, n_last = self._books.n_above_threshold, self._n_last_requested()
        reason = find_reason_to_run(n, n_last, self._settings)
        if reason is None and self.queued is None:
            reason = find_reason_to_rerun(self._n_lost, n, n_last, self._settings)
        if reason:
            self._request(at, reason)

    def request_last_if_due(self, at: float) -> None:
        """Queue the run that uses everything, once no more particles can come."""
        if self.queued is not None or self.active is not None:
            return
        n = self._books.n_above_threshold
        if reason := find_reason_for_final_run(n, self._n_last_requested(), self._settings):
            self._request(at, reason)

    def start(self, at: float) -> list[StartRun]:
        """Start the queued run when the engine is free."""
        if self.queued is None or self.active is not None:
            return []
        request, self.queued = self.queued, None
        record, n_now = self.runs[request.run_id], self._books.n_above_threshold
        if n_now < request.n_particles:
            # Exposures were rejected while the run waited.
            record.request = request = replace(request, n_particles=n_now)
            if n_now < self._settings.final_run_min_particles:
                record.state, record.verdict = RunState.SUPERSEDED, "too few particles were left to start it"
                self._decisions.add(at, f"drop {request.run_id}", f"only {n_now} particles are left")
                return []
        members = self._books.list_members()
        self.active = StartRun(request=request, members=members)
        self._last_members, self._n_lost = frozenset(m.exposure_id for m in members), 0
        record.state = RunState.RUNNING
        start = f"warm start from {request.warm_start}" if request.warm_start else "from nothing"
        self._decisions.add(at, f"start {request.run_id} {start}", request.reason)
        return [self.active]

    def take_result(self, at: float, result: RunResult) -> None:
        """Take the result of the run in work; a late or double one is dropped."""
        if self.active is None or self.active.request.run_id != result.run_id:
            return
        self.active = None
        record, template = self.runs[result.run_id], self.template
        record.state, record.result = RunState.ENDED, result
        record.verdict = describe_verdict(result, self._settings)
        self._decisions.add(at, f"judge {result.run_id}", record.verdict)
        if self.template != template:
            rule = f"its map has reached {self._settings.template_min_resolution_angstrom:g} Å"
            self._decisions.add(at, f"pick new micrographs with templates of {self.template}", rule)

    def take_failure(self, at: float, run_id: RunId, reason: str) -> None:
        """Take note that the run in work failed; the next rung tries again."""
        if self.active is None or self.active.request.run_id != run_id:
            return
        self.active = None
        record = self.runs[run_id]
        record.state, record.verdict = RunState.FAILED, f"failed: {reason}"
        self._decisions.add(at, f"give up {run_id}", reason)

    def _n_last_requested(self) -> int | None:
        """Return the size of the last set that a run was asked for; a failed run waits for more particles, too."""
        runs = [r for r in self.runs.values() if r.state is not RunState.SUPERSEDED]
        return runs[-1].request.n_particles if runs else None

    def _request(self, at: float, reason: str) -> None:
        if not self._settings.runs_enabled:
            return
        n = self._books.n_above_threshold
        run_id = RunId(f"run{len(self.runs) + 1:03d}")
        request = RunRequest(
            run_id=run_id,
            campaign_id=CampaignId(f"campaign{len(self.runs) + 1:03d}"),
            purpose=RunPurpose.UPDATE,
            subset=ParticleSubset(score_threshold=self._settings.score_threshold),
            n_particles=n,
            model_hash=self._books.model_hash,
            symmetry="C1",
            mask_diameter_angstrom=None,
            start_map=None,
            warm_start=choose_warm_start(list(self.runs.values()), n, self._settings),
            compare_with=None,
            reason=reason,
        )
        if self.queued is not None:
            older = self.runs[self.queued.run_id]
            older.state, older.verdict = RunState.SUPERSEDED, f"superseded by {run_id} before it started"
            self._decisions.add(at, f"drop {older.request.run_id}", f"{run_id} has more particles")
        self.queued = request
        self.runs[run_id] = RunRecord(request=request, state=RunState.QUEUED)
        self._decisions.add(at, f"queue {run_id}", reason)
