"""The accepted map: the one that a person pinned, else the last one accepted that no person rejected.

While a campaign is in work a run's map is accepted when it passes and is better than the accepted one, or when
that one has another symmetry than is wanted now. At its end the campaign's choice is compared with it: the last
campaign's choice is accepted whatever came before, so that the session's result is that of an offline run; an
earlier one's when it is better, or stands where a part of its own search stood.
"""

from __future__ import annotations

from collections.abc import Mapping

from stream.control.campaign import CampaignRecord
from stream.control.decisions import DecisionLog
from stream.control.runs import (
    RunRecord,
    choose_best,
    describe_result,
    has_passed,
    is_better,
)
from stream.control.settings import RunPolicy
from stream.control.wishes import Wishes
from stream.records.values import CampaignTrigger, RunId, RunPurpose, RunResult

_PARTIAL = (RunPurpose.INITIAL, RunPurpose.CLUSTER, RunPurpose.UNION)


class Acceptance:
    """Which map is accepted now, and the words for every change."""

    def __init__(
        self,
        policy: RunPolicy,
        runs: Mapping[RunId, RunRecord],
        wishes: Wishes,
        decisions: DecisionLog,
    ) -> None:
        self._policy = policy
        self._runs = runs
        self._wishes = wishes
        self._decisions = decisions
        self._accepted: list[RunId] = []

    @property
    def result(self) -> RunResult | None:
        """The accepted map's figures, or None."""
        return None if self.run is None else self.run.result

    @property
    def run(self) -> RunRecord | None:
        """The run with the accepted map, or None."""
        return self._pinned or self._latest

    @property
    def _pinned(self) -> RunRecord | None:
        """The run that a person pinned, once it has a map."""
        run_id = self._wishes.pinned_run
        run = None if run_id is None else self._runs.get(run_id)
        has_map = run is not None and run.result is not None and run.result.resolution_angstrom is not None
        return run if has_map else None

    @property
    def _latest(self) -> RunRecord | None:
        """The last one accepted that no person rejected; where all were, the best of the others that pass."""
        kept = [run_id for run_id in self._accepted if not self._runs[run_id].is_rejected]
        if kept:
            return self._runs[kept[-1]]
        if not self._accepted:
            return None
        others = [r.result for r in self._runs.values() if self.is_eligible(r) and r.result is not None]
        best = choose_best(others)
        return None if best is None else self._runs[best.run_id]

    def is_eligible(self, run: RunRecord) -> bool:
        """Tell whether a run's map may be accepted: it passes, and no person rejected it."""
        return has_passed(run.result, self._policy) and not run.is_rejected

    def offer(self, at: float, run: RunRecord, symmetry: str) -> None:
        """Accept a run's map when it is better than the accepted one; `symmetry` is the one wanted now."""
        held = self.run
        if run.result is None or not self.is_eligible(run) or run.result.symmetry != symmetry:
            return
        if held is None or held.result is None:
            self._accept(at, run, "the first map that passes")
        elif held.result.symmetry != symmetry:
            self._accept(
                at, run, f"symmetry is {symmetry} now, that of {held.run_id} is {held.result.symmetry}"
            )
        elif is_better(run.result, held.result):
            self._accept(at, run, f"better than {held.run_id}: {describe_result(held.result)}")

    def choose(self, campaign: CampaignRecord, chosen: RunId | None) -> RunId | None:
        """Return the run that the end of a campaign accepts, None when the accepted map stays."""
        run, held = None if chosen is None else self._runs[chosen], self.run
        if run is None or run.result is None or not self.is_eligible(run) or held is run:
            return None
        if held is None or held.result is None or campaign.request.trigger is CampaignTrigger.END:
            return run.run_id
        is_own_part = held in campaign.list_runs(*_PARTIAL) and held.request.subset != run.request.subset
        has_other_symmetry = held.result.symmetry != run.result.symmetry
        if is_own_part or has_other_symmetry or is_better(run.result, held.result):
            return run.run_id
        return None

    def take_choice(self, at: float, run_id: RunId, reason: str) -> None:
        """Accept what a campaign's end says."""
        run, held = self._runs.get(run_id), self.result
        if run is None or (held is not None and held.run_id == run_id):
            return
        before = "" if held is None else f" (before: {held.run_id}, {describe_result(held)})"
        self._accept(at, run, reason + before)

    def _accept(self, at: float, run: RunRecord, reason: str) -> None:
        self._accepted.append(run.run_id)
        words = "" if run.result is None else f": {describe_result(run.result)}"
        pinned = self._pinned
        if pinned is not None and pinned is not run:
            self._decisions.add(
                at, f"hold {run.run_id} in reserve{words}", f"{pinned.run_id} is pinned; {reason}"
            )
        else:
            self._decisions.add(at, f"accept {run.run_id}{words}", reason)
