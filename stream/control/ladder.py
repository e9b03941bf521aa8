"""The engine's side of the controller: campaigns, their runs, and what is proposed next.

`propose` is a pure question: it returns events that are to be committed, and changes nothing. What comes back
through `take_…` is the only thing that changes the state, so that a replay starts the runs that were
started, whatever the settings say today.
"""

from __future__ import annotations

from dataclasses import replace

from stream.control.acceptance import Acceptance
from stream.control.books import ExposureBooks
from stream.control.branch import find_forecast
from stream.control.campaign import (
    CampaignRecord,
    ClusteringDraft,
    ClusteringRecord,
    Conclusion,
    request_clustering,
    request_run,
)
from stream.control.decisions import DecisionLog
from stream.control.exposures import ExposureState
from stream.control.runs import (
    IN_WORK,
    RunRecord,
    RunState,
    choose_template,
    describe_verdict,
    without_nan,
)
from stream.control.search import find_next_step
from stream.control.settings import ControllerSettings
from stream.control.triggers import (
    Due,
    Precedence,
    Standing,
    find_due,
    find_precedence,
    is_same_work,
    plan_campaign,
)
from stream.control.wishes import Wishes
from stream.control.words import (
    describe_campaign,
    describe_clustering,
    describe_comparison,
    describe_forecast,
)
from stream.records.commands import CancelRun, ClusterParticles, Command, StartRun
from stream.records.errors import InvariantError
from stream.records.events import (
    CampaignEnded,
    CampaignStarted,
    ClusteringFailed,
    ClusteringStarted,
    Event,
    ParticlesClustered,
    RunStarted,
)
from stream.records.values import (
    CampaignId,
    CampaignRequest,
    CampaignTrigger,
    ClusteringId,
    ExposureId,
    RunId,
    RunPurpose,
    RunResult,
)


class RunLadder:
    """Campaigns and runs of a session; at most one campaign is active, and the engine's slots are bounded."""

    def __init__(
        self, settings: ControllerSettings, books: ExposureBooks, wishes: Wishes, decisions: DecisionLog
    ) -> None:
        self._settings = settings
        self._policy = settings.runs
        self._books = books
        self._wishes = wishes
        self._decisions = decisions
        self.runs: dict[RunId, RunRecord] = {}
        self.campaigns: dict[CampaignId, CampaignRecord] = {}
        self.acceptance = Acceptance(self._policy, self.runs, wishes, decisions)
        self._in_work: dict[RunId, RunRecord] = {}
        self._last_members: frozenset[ExposureId] = frozenset()
        self._n_lost = 0
        self._served: frozenset[str] = frozenset()

    # --- what others may ask -------------------------------------------------------------------------

    @property
    def last(self) -> CampaignRecord | None:
        """The campaign that was started last, or None."""
        return next(reversed(self.campaigns.values()), None)

    @property
    def active(self) -> CampaignRecord | None:
        """The campaign in work, or None."""
        return self.last if self.last is not None and self.last.is_active else None

    @property
    def best(self) -> RunResult | None:
        """The accepted map, or None."""
        return self.acceptance.result

    @property
    def template(self) -> RunId | None:
        """The run whose map new micrographs are picked with, or None."""
        return choose_template(self.best, self._settings)

    @property
    def runs_in_work(self) -> list[RunRecord]:
        """The runs that the engine has, those that are being stopped, too."""
        return list(self._in_work.values())

    @property
    def has_work(self) -> bool:
        """True while the engine has a run, or particles are clustered."""
        clustering = None if self.last is None else self.last.clustering
        return bool(self._in_work) or (clustering is not None and clustering.is_in_work)

    # --- what is next --------------------------------------------------------------------------------

    def propose(self, at: float, *, is_complete: bool) -> list[Event]:
        """Return the events to commit now; `is_complete` tells that no particle can come any more."""
        active = self.active
        if active is None:
            if not self._policy.enabled:
                return []
            due = self._find_due(is_complete=is_complete)
            if due is None:
                return []
            return [CampaignStarted(at=at, request=self._plan(due, is_complete=is_complete))]
        if not self._policy.enabled:
            return [self._end(at, active, "runs are switched off")]
        if self._is_taken_back(active):
            return [self._end(at, active, "the person who asked for it took it back")]
        repeats = active.request.repeats
        step = find_next_step(active if repeats is None else self.campaigns[repeats], self._policy)
        if isinstance(step, Conclusion):
            chosen = self.acceptance.choose(active, step.chosen)
            return [
                CampaignEnded(
                    at=at,
                    campaign_id=active.request.campaign_id,
                    is_complete=True,
                    accepted=chosen,
                    reason=step.reason,
                )
            ]
        due = self._find_due(is_complete=is_complete)
        if due is not None:
            now = self._standing(is_complete=is_complete)
            precedence = find_precedence(due, now, active.request, self._policy)
            if precedence is Precedence.AT_ONCE or (
                precedence is Precedence.AFTER_RUN and not active.has_work
            ):
                return [self._end(at, active, f"superseded: {due.reason}")]
            if precedence is Precedence.AFTER_RUN:
                return []
        if isinstance(step, ClusteringDraft):
            return [ClusteringStarted(at=at, request=request_clustering(active.request, step))]
        n_free = self._policy.max_parallel_runs - len(self._in_work)
        drafts = step[: max(n_free, 0)]
        return [
            RunStarted(at=at, request=request_run(active.request, draft, len(self.runs) + 1 + i))
            for i, draft in enumerate(drafts)
        ]

    def _is_taken_back(self, campaign: CampaignRecord) -> bool:
        return bool(campaign.asked_by) and not campaign.asked_by & self._wishes.forced

    @property
    def _last_standing(self) -> CampaignRecord | None:
        """The last campaign, those that were taken back left out: what is due is as if nobody had asked for them."""
        standing = (c for c in reversed(self.campaigns.values()) if not c.is_withdrawn)
        return next(standing, None)

    def _find_due(self, *, is_complete: bool) -> Due | None:
        last = self._last_standing
        now = self._standing(is_complete=is_complete)
        due = find_due(now, None if last is None else last.request, self._policy)
        if due is None or last is None or due.trigger is not CampaignTrigger.END:
            return due
        # The end asks for nothing that the last campaign is doing, or did for the same reason.
        is_over = last.is_complete and last.request.trigger is CampaignTrigger.END
        is_known = (last.is_active or is_over) and self._has_done(
            last, self._plan(due, is_complete=is_complete)
        )
        return None if is_known else due

    def _has_done(self, campaign: CampaignRecord, request: CampaignRequest) -> bool:
        """Tell whether a campaign is of the runs from nothing that `request` asks for, on the exposures of now."""
        return is_same_work(request, campaign.request) and self._has_same_members(campaign)

    def _has_same_members(self, campaign: CampaignRecord) -> bool:
        return (
            campaign.members_version == self._books.version or campaign.members == self._books.list_members()
        )

    def _standing(self, *, is_complete: bool) -> Standing:
        books, wishes, policy = self._books, self._wishes, self._policy
        low, high = policy.bound_scores
        accepted = self.acceptance.run
        symmetry = wishes.symmetry or policy.symmetry
        fresh = [
            run.request.n_particles
            for run in self.runs.values()
            if run.result is not None and run.request.start_map is None and run.result.symmetry == symmetry
        ]
        return Standing(
            n_particles=books.n_above_threshold,
            n_at_bounds=(books.count_in_use(low), books.count_in_use(high)),
            is_ranking_flat=books.is_ranking_flat,
            n_lost=self._n_lost,
            n_from_nothing=max(fresh, default=0),
            score_threshold=books.score_threshold,
            model_hash=books.model_hash,
            is_every_score_current=books.is_every_score_current,
            symmetry=symmetry,
            mask_diameter_angstrom=wishes.mask_diameter_angstrom or policy.mask_diameter_angstrom,
            is_forced=bool(wishes.forced - self._served),
            is_complete=is_complete,
            accepted=None if accepted is None else accepted.run_id,
            is_accepted_current=accepted is not None
            and accepted.result is not None
            and accepted.result.symmetry == symmetry,
        )

    def _plan(self, due: Due, *, is_complete: bool) -> CampaignRequest:
        now = self._standing(is_complete=is_complete)
        campaign_id = CampaignId(f"campaign{len(self.campaigns) + 1:03d}")
        last = self._last_standing
        request = plan_campaign(due, now, None if last is None else last.request, campaign_id, self._policy)
        if due.trigger is CampaignTrigger.END and last is not None and last.is_complete:
            repeats = last.request.campaign_id if self._has_done(last, request) else None
            return replace(request, repeats=repeats)
        return request

    @staticmethod
    def _end(at: float, campaign: CampaignRecord, reason: str) -> CampaignEnded:
        return CampaignEnded(
            at=at, campaign_id=campaign.request.campaign_id, is_complete=False, accepted=None, reason=reason
        )

    # --- what happened -------------------------------------------------------------------------------

    def start_campaign(self, event: CampaignStarted) -> None:
        """Freeze the exposures that the campaign's runs are of."""
        request, members = event.request, self._books.list_members()
        self.campaigns[request.campaign_id] = CampaignRecord(
            request=request,
            members=members,
            members_version=self._books.version,
            asked_by=self._wishes.forced - self._served,
        )
        self._last_members, self._n_lost = frozenset(m.exposure_id for m in members), 0
        self._served |= self._wishes.forced
        self._decisions.add(event.at, f"start {describe_campaign(request)}", request.reason)

    def end_campaign(self, event: CampaignEnded) -> list[Command]:
        """Close a campaign; what the engine still does for it is stopped."""
        campaign = self.campaigns.get(event.campaign_id)
        if campaign is None or not campaign.is_active:
            return []
        campaign.is_active, campaign.is_complete, campaign.verdict = False, event.is_complete, event.reason
        if not event.is_complete and self._is_taken_back(campaign):
            campaign.is_withdrawn = True
            self._served -= campaign.asked_by
        self._decisions.add(event.at, f"end {event.campaign_id}", event.reason)
        template = self.template
        if event.accepted is not None:
            self.acceptance.take_choice(event.at, event.accepted, f"the choice of {event.campaign_id}")
        self._tell_template(event.at, template)
        if campaign.clustering is not None and campaign.clustering.is_in_work:
            campaign.clustering.failure = event.reason
        commands: list[Command] = []
        for run in campaign.runs:
            if run.state is RunState.RUNNING:
                run.state = RunState.CANCELLING
                commands.append(CancelRun(run_id=run.run_id, reason=event.reason))
        return commands

    def start_run(self, event: RunStarted) -> list[Command]:
        """Take note of a run, and ask the engine for it."""
        request = event.request
        campaign = self.campaigns.get(request.campaign_id)
        if campaign is None or not campaign.is_active or request.run_id in self.runs:
            raise InvariantError(
                request.run_id, "a run is started once, by a campaign in work", request.reason
            )
        record = RunRecord(request=request, is_rejected=request.run_id in self._wishes.rejected_runs)
        self.runs[request.run_id] = self._in_work[request.run_id] = record
        campaign.runs.append(record)
        start = "from nothing" if request.start_map is None else f"from the map of {request.start_map}"
        self._decisions.add(event.at, f"start {request.run_id} {start}", request.reason)
        return [StartRun(request=request, members=campaign.members)]

    def start_clustering(self, event: ClusteringStarted) -> list[Command]:
        """Take note of a clustering, and ask for it."""
        request = event.request
        campaign = self.campaigns.get(request.campaign_id)
        if campaign is None or not campaign.is_active or campaign.clustering is not None:
            raise InvariantError(
                request.clustering_id, "a campaign in work clusters its particles once", request.reason
            )
        campaign.clustering = ClusteringRecord(request=request)
        self._decisions.add(
            event.at, f"divide the particles of {request.campaign_id} by view", request.reason
        )
        return [ClusterParticles(request=request, members=campaign.members)]

    def take_result(self, at: float, result: RunResult) -> None:
        """Take the result of a run in work; a late or double one is dropped."""
        record = self._in_work.pop(result.run_id, None)
        if record is None:
            return
        template, before = self.template, self.best
        record.state, record.result = RunState.ENDED, without_nan(result)
        record.verdict = describe_verdict(record.result, self._policy)
        self._decisions.add(at, f"judge {result.run_id}", record.verdict)
        self._compare(at, record)
        if self._wishes.pinned_run == record.run_id:
            self.review(at, before)
        self.acceptance.offer(at, record, self._wishes.symmetry or self._policy.symmetry)
        self._tell_template(at, template)

    def take_failure(self, at: float, run_id: RunId, reason: str, state: RunState) -> None:
        """Take note that a run in work failed or was stopped; its campaign goes on without it."""
        record = self._in_work.pop(run_id, None)
        if record is None:
            return
        record.state, record.verdict = state, f"{state.value}: {reason}"
        self._decisions.add(at, f"do without {run_id}", record.verdict)

    def take_clusters(self, event: ParticlesClustered) -> None:
        """Take the sizes of the clusters."""
        clustering = self._find_clustering(event.result.clustering_id)
        if clustering is None:
            return
        clustering.result = event.result
        words = describe_clustering(event.result, self._policy.cluster_min_particles)
        self._decisions.add(event.at, f"take {event.result.clustering_id}", words)

    def take_clustering_failure(self, event: ClusteringFailed) -> None:
        """Take note that the particles cannot be divided."""
        clustering = self._find_clustering(event.clustering_id)
        if clustering is None:
            return
        clustering.failure = event.reason
        self._decisions.add(event.at, f"do without {event.clustering_id}", event.reason)

    def review(self, at: float, before: RunResult | None) -> None:
        """Take what a person says about runs; tell when the accepted map has changed (`before` is what it was)."""
        for run in self.runs.values():
            run.is_rejected = run.run_id in self._wishes.rejected_runs
        now = self.best
        if now != before:
            what = "no map is accepted" if now is None else f"accept {now.run_id}"
            self._decisions.add(at, what, "a person's word")

    def count_losses(self) -> None:
        """Count anew which particles of the last campaign are rejected now."""
        records = (self._books.records[i] for i in self._last_members)
        self._n_lost = sum(self._books.count_above(r) for r in records if r.state is ExposureState.REJECTED)

    def reopen(self) -> list[Command]:
        """Return what has to be asked for again: the engine died with the service."""
        commands: list[Command] = []
        for run in self.runs_in_work:
            campaign = self.campaigns[run.request.campaign_id]
            if run.state is RunState.CANCELLING or not self._policy.enabled:
                run.state, run.verdict = RunState.CANCELLED, "cancelled: the service ended"
                del self._in_work[run.run_id]
            else:
                commands.append(StartRun(request=run.request, members=campaign.members))
        active = self.active
        if active is not None and active.clustering is not None and active.clustering.is_in_work:
            if self._policy.enabled:
                commands.append(ClusterParticles(request=active.clustering.request, members=active.members))
            else:
                active.clustering.failure = "runs are switched off"
        return commands

    def check(self) -> None:
        """Raise `InvariantError` when campaigns and runs contradict each other."""
        active = [c.request.campaign_id for c in self.campaigns.values() if c.is_active]
        if len(active) > 1 or (active and active[0] != next(reversed(self.campaigns))):
            raise InvariantError("campaigns", "at most the last one is in work", ", ".join(active))
        for campaign in self.campaigns.values():
            if not campaign.is_active and any(r.state is RunState.RUNNING for r in campaign.runs):
                raise InvariantError(
                    campaign.request.campaign_id, "a closed campaign runs nothing", campaign.verdict
                )
            sides: dict[ExposureId, int] = {}
            for member in campaign.members:
                if sides.setdefault(member.exposure_id, member.half_set) != member.half_set:
                    raise InvariantError(
                        member.name, "an exposure is in one half", campaign.request.campaign_id
                    )
        for run in self.runs.values():
            if (run.state is RunState.ENDED) != (run.result is not None):
                raise InvariantError(run.run_id, "a run has a result when it ended", run.verdict)
            if (run.state in IN_WORK) != (run.run_id in self._in_work):
                raise InvariantError(run.run_id, "a run in work has no outcome yet", run.verdict)

    def _find_clustering(self, clustering_id: ClusteringId) -> ClusteringRecord | None:
        clustering = None if self.last is None else self.last.clustering
        if (
            clustering is None
            or clustering.request.clustering_id != clustering_id
            or not clustering.is_in_work
        ):
            return None
        return clustering

    def _compare(self, at: float, record: RunRecord) -> None:
        """Tell what a run from nothing says about the continued one, and what came of a forecast."""
        other = None if record.request.compare_with is None else self.runs.get(record.request.compare_with)
        if record.result is not None and other is not None and other.result is not None:
            what = f"compare {record.run_id} with {other.run_id}, which continued an earlier map"
            self._decisions.add(at, what, describe_comparison(record.result, other.result))
        if record.result is None or record.request.purpose is not RunPurpose.UNION:
            return
        forecast = find_forecast(self.campaigns[record.request.campaign_id], self._policy)
        if forecast is not None:
            words = describe_forecast(forecast[1], record.result)
            self._decisions.add(at, f"compare {record.run_id} with what was foretold", words)

    def _tell_template(self, at: float, before: RunId | None) -> None:
        if self.template != before:
            rule = f"its map has reached {self._settings.template_min_resolution_angstrom:g} Å"
            self._decisions.add(at, f"pick new micrographs with templates of {self.template}", rule)
