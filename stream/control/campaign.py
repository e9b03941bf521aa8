"""A campaign: a row of runs on one set of exposures, and the words for its next step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from stream.control.runs import IN_WORK, RunRecord, has_passed
from stream.control.settings import RunPolicy
from stream.records.commands import RunMember
from stream.records.values import (
    CampaignRequest,
    ClusteringId,
    ClusteringRequest,
    ClusteringResult,
    ClusterSource,
    ParticleSubset,
    RunId,
    RunPurpose,
    RunRequest,
    RunResult,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunDraft:
    """A run that the campaign wants; its id, model, symmetry and mask come from the campaign."""

    purpose: RunPurpose
    subset: ParticleSubset
    n_particles: int
    reason: str
    start_map: RunId | None = None
    warm_start: RunId | None = None
    compare_with: RunId | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusteringDraft:
    """A clustering that the campaign wants."""

    subset: ParticleSubset
    n_clusters: int
    source: ClusterSource
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Conclusion:
    """The campaign has nothing left to do; `chosen` is the run that it would accept."""

    chosen: RunId | None
    reason: str


Step = tuple[RunDraft, ...] | ClusteringDraft | Conclusion
"""What is next: runs that may start now (none: wait for those in work), a clustering, or the end."""


@dataclass(slots=True, kw_only=True)
class ClusteringRecord:
    """A clustering's story; it is in work until it has a result or a failure."""

    request: ClusteringRequest
    result: ClusteringResult | None = None
    failure: str = ""

    @property
    def is_in_work(self) -> bool:
        """True until it has an outcome."""
        return self.result is None and not self.failure


@dataclass(slots=True, kw_only=True)
class CampaignRecord:
    """One campaign's story. `members` are frozen when it starts; `is_complete` tells that it was not given up.

    `asked_by` are the decisions of a person that it answers, `is_withdrawn` when it ended because all were taken back.
    """

    request: CampaignRequest
    members: tuple[RunMember, ...]
    members_version: int
    runs: list[RunRecord] = field(default_factory=list)
    clustering: ClusteringRecord | None = None
    is_active: bool = True
    is_complete: bool = False
    verdict: str = ""
    asked_by: frozenset[str] = frozenset()
    is_withdrawn: bool = False

    @property
    def has_work(self) -> bool:
        """True while a run or the clustering is in work."""
        is_clustering = self.clustering is not None and self.clustering.is_in_work
        return is_clustering or any(run.state in IN_WORK for run in self.runs)

    def list_runs(self, *purposes: RunPurpose) -> list[RunRecord]:
        """Return the runs for these purposes, in order."""
        return [run for run in self.runs if run.request.purpose in purposes]

    def list_results(self, *purposes: RunPurpose) -> list[RunResult]:
        """Return the results of the runs for these purposes, in order; those that a person rejected are left out."""
        runs = self.list_runs(*purposes)
        return [run.result for run in runs if run.result is not None and not run.is_rejected]

    def find(self, draft: RunDraft) -> RunRecord | None:
        """Return the run that this draft became, or None."""
        wanted = (draft.purpose, draft.subset, draft.start_map)
        return next((r for r in self.runs if _key_of(r) == wanted), None)

    def list_missing(self, drafts: Iterable[RunDraft]) -> tuple[RunDraft, ...] | None:
        """Return which of the drafts are no run yet, none when all are in work, None when all have an outcome."""
        runs = [(draft, self.find(draft)) for draft in drafts]
        if all(run is not None and run.state not in IN_WORK for _, run in runs):
            return None
        return tuple(draft for draft, run in runs if run is None)


def _key_of(run: RunRecord) -> tuple[RunPurpose, ParticleSubset, RunId | None]:
    return run.request.purpose, run.request.subset, run.request.start_map


def subset_of(request: CampaignRequest, n_particles: int) -> ParticleSubset:
    """Return the best `n_particles` of those above τ; all of them where the campaign has no more."""
    top = None if n_particles >= request.n_particles else n_particles
    return ParticleSubset(score_threshold=request.score_threshold, top=top)


def list_passed(results: Sequence[RunResult], policy: RunPolicy) -> list[RunResult]:
    """Return the results that pass."""
    return [result for result in results if has_passed(result, policy)]


def request_run(request: CampaignRequest, draft: RunDraft, number: int) -> RunRequest:
    """Return the whole request of a campaign's run; `number` is its place among all runs of the session."""
    return RunRequest(
        run_id=RunId(f"run{number:03d}"),
        campaign_id=request.campaign_id,
        purpose=draft.purpose,
        subset=draft.subset,
        n_particles=draft.n_particles,
        model_hash=request.model_hash,
        symmetry=request.symmetry,
        mask_diameter_angstrom=request.mask_diameter_angstrom,
        start_map=draft.start_map,
        warm_start=draft.warm_start,
        compare_with=draft.compare_with,
        reason=draft.reason,
    )


def request_clustering(request: CampaignRequest, draft: ClusteringDraft) -> ClusteringRequest:
    """Return the whole request of a campaign's clustering."""
    return ClusteringRequest(
        clustering_id=ClusteringId(f"{request.campaign_id}-clusters"),
        campaign_id=request.campaign_id,
        model_hash=request.model_hash,
        subset=draft.subset,
        n_clusters=draft.n_clusters,
        source=draft.source,
        reason=draft.reason,
    )
