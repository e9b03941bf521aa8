"""What a campaign does next, as a function of what its runs gave (Cryo-IEF paper, Methods, CryoWizard).

light:  continue the accepted map, and from nothing where that is due ──▶ smaller parts ──▶ end
full:   continue the accepted map ──▶ from nothing on two sizes ─┬─ one passes ───────────────▶ sweep ──▶ end
                                                                 └─ none: `branch`, template ─▶ sweep ──▶ end

Failures: a run that failed counts as one without a result. Where views are few, starts may not agree and no model comes of
them: that, too, is answered by the branch; runs that only failed say nothing of views, and are not. Without any initial
model the campaign ends with no map. Where
nothing passes, not in the branch either, the sweep starts from the best resolution all the same, because more
particles may hold the views that are missing.
"""

from __future__ import annotations

from stream.control.branch import choose_cluster_map, list_branch_step
from stream.control.campaign import (
    CampaignRecord,
    Conclusion,
    RunDraft,
    Step,
    list_passed,
    subset_of,
)
from stream.control.runs import choose_best, describe_result
from stream.control.settings import RunPolicy
from stream.control.sweep import is_sweep_needed, list_sweep_runs
from stream.records.values import CampaignPlan, RunId, RunPurpose, RunResult


def find_next_step(campaign: CampaignRecord, policy: RunPolicy) -> Step:
    """Return the runs that may start now (none while those in work are waited for), a clustering, or the end."""
    if (missing := campaign.list_missing(_list_updates(campaign))) is not None:
        return missing
    if campaign.request.search_sizes:
        if (missing := campaign.list_missing(_list_searches(campaign))) is not None:
            return missing
        results = campaign.list_results(RunPurpose.INITIAL, RunPurpose.REBUILD)
        passed = list_passed(results, policy)
        resolved = [result for result in results if result.resolution_angstrom is not None]
        chosen, is_cluster = choose_best(passed) or choose_best(resolved), False
        is_divided = policy.orientation_branch and campaign.request.plan is CampaignPlan.FULL
        if results and not passed and is_divided:
            step = list_branch_step(campaign, policy)
            if step is not None:
                return step
            if (found := choose_cluster_map(campaign, policy)) is not None:
                chosen, is_cluster = found, True
        if chosen is None:
            return _conclude(campaign, policy, "no initial model")
        step = _sweep(campaign, chosen, policy, is_cluster=is_cluster)
        if step is not None:
            return step
    return _conclude(campaign, policy, "every run has an outcome")


def _list_updates(campaign: CampaignRecord) -> list[RunDraft]:
    request = campaign.request
    if request.start_map is None:
        return []
    return [
        RunDraft(
            purpose=RunPurpose.UPDATE,
            subset=subset_of(request, request.n_particles),
            n_particles=request.n_particles,
            start_map=request.start_map,
            warm_start=request.warm_start,
            reason=f"everything, continued from {request.start_map}",
        )
    ]


def _list_searches(campaign: CampaignRecord) -> list[RunDraft]:
    """Return the runs from nothing; one on everything beside an update is the rebuild that it is compared with."""
    request = campaign.request
    update = find_update(campaign)
    drafts = []
    for n in request.search_sizes:
        is_rebuild = n >= request.n_particles and request.plan is CampaignPlan.LIGHT and update is not None
        drafts.append(
            RunDraft(
                purpose=RunPurpose.REBUILD if is_rebuild else RunPurpose.INITIAL,
                subset=subset_of(request, n),
                n_particles=min(n, request.n_particles),
                compare_with=update if n >= request.n_particles else None,
                reason=f"from nothing, the best {min(n, request.n_particles)}",
            )
        )
    return drafts


def find_update(campaign: CampaignRecord) -> RunId | None:
    """Return the campaign's run that continued the accepted map, if it has a result."""
    results = campaign.list_results(RunPurpose.UPDATE)
    return results[0].run_id if results else None


def _sweep(campaign: CampaignRecord, start: RunResult, policy: RunPolicy, *, is_cluster: bool) -> Step | None:
    """Return the sweep's next step, None when it is over or none is asked for."""
    request = campaign.request
    update = find_update(campaign)
    everything = subset_of(request, request.n_particles)
    if is_cluster:
        template = RunDraft(
            purpose=RunPurpose.TEMPLATE,
            subset=everything,
            n_particles=request.n_particles,
            start_map=start.run_id,
            compare_with=update,
            reason=f"everything, refined against the isotropic map of {start.run_id}",
        )
        if (missing := campaign.list_missing([template])) is not None:
            return missing
    if not is_sweep_needed(request):
        return None
    started = next(r.request.subset for r in campaign.runs if r.run_id == start.run_id)
    drafts = list_sweep_runs(
        campaign,
        start.run_id,
        policy,
        compare_with=update,
        is_whole_known=is_cluster or started == everything,
    )
    return campaign.list_missing(drafts)


def _conclude(campaign: CampaignRecord, policy: RunPolicy, why: str) -> Conclusion:
    """Choose the campaign's map: the best of those on whole or nested sets that pass, else of the branch's.

    A cluster's map that passes says more in every direction than a streaked one of everything.
    """
    candidates = _list_candidates(campaign)
    best = choose_best(list_passed(candidates, policy)) or choose_cluster_map(campaign, policy)
    if best is not None:
        return Conclusion(chosen=best.run_id, reason=f"{why}; {best.run_id} is best: {describe_result(best)}")
    worse = choose_best(candidates)
    seen = "no run has a map" if worse is None else f"the best is {worse.run_id}: {describe_result(worse)}"
    few = ""
    if worse is not None and campaign.request.plan is CampaignPlan.LIGHT:
        few = f"; with fewer than {policy.full_min_particles} particles they are not divided by view"
    return Conclusion(chosen=None, reason=f"{why}; none passes, {seen}{few}")


def _list_candidates(campaign: CampaignRecord) -> list[RunResult]:
    """Return what the campaign chooses from: the sweep and what counts as its parts, else everything it has.

    A run that continued an earlier map is no candidate beside runs from nothing, so that the choice does not depend
    on how the session came here.
    """
    fresh = (RunPurpose.INITIAL, RunPurpose.REBUILD, RunPurpose.TEMPLATE, RunPurpose.SWEEP, RunPurpose.UNION)
    results = campaign.list_results(*fresh)
    if any(r.resolution_angstrom is not None for r in results) or campaign.request.search_sizes:
        return results
    return campaign.list_results(RunPurpose.UPDATE)
