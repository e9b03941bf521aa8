"""Preferred orientation: no run from nothing passes the cFAR bound, so the particles are divided by view.

cluster ──▶ survey: the best search run continued, its sums kept by cluster ──▶ the union that they foretell to pass
        ──▶ where there is none, or its cFAR is under `union_cfar_ratio` of its null: each cluster from nothing

A union costs a short run and a refinement, the clusters eight initial models. But its poses are those of the map that
did not pass: where that map is wrong so is the union's, and may pass the bound by a little all the same. Of what
passes the best resolution is the map that everything is refined against, of equals (2 %) the more isotropic one.

Clusters under `cluster_min_particles` are left out; with fewer than two such clusters' worth of particles there
is nothing to divide. A clustering that fails (no features, say) ends the branch; without a survey there is no union.
"""

from __future__ import annotations

from dataclasses import replace

from stream.control.campaign import CampaignRecord, ClusteringDraft, RunDraft, Step, list_passed, subset_of
from stream.control.runs import choose_best, find_cfar_bound, honest_resolution, share_of_null
from stream.control.settings import RunPolicy
from stream.records.values import ParticleSubset, RunPurpose, RunResult, UnionForecast

FROM_BRANCH = (RunPurpose.UNION, RunPurpose.CLUSTER)

EQUAL_RESOLUTION = 0.02
"""Relative: a smaller difference in resolution does not tell which of two clusters' maps is right."""


def list_branch_step(campaign: CampaignRecord, policy: RunPolicy) -> Step | None:
    """Return the branch's next step, None when it has nothing left to try."""
    request = campaign.request
    if request.n_particles < 2 * policy.cluster_min_particles:
        return None
    if campaign.clustering is None:
        return ClusteringDraft(
            subset=subset_of(request, policy.n_clusters * max(policy.search_sizes)),
            n_clusters=policy.n_clusters,
            source=policy.cluster_by,
            reason=f"no run from nothing gives a map that reaches the cFAR bound of {policy.cfar_bound:g}: preferred "
            "orientation",
        )
    if campaign.clustering.is_in_work:
        return ()
    if campaign.clustering.result is None:
        return None
    for draft in (_draft_survey(campaign), _draft_union(campaign, policy)):
        if draft is not None and (missing := campaign.list_missing([draft])) is not None:
            return missing
    unions = list_passed(campaign.list_results(RunPurpose.UNION), policy)
    if any(share_of_null(union) >= policy.union_cfar_ratio for union in unions):
        return None
    return campaign.list_missing(list_cluster_runs(campaign, policy))


def choose_cluster_map(campaign: CampaignRecord, policy: RunPolicy) -> RunResult | None:
    """Return the best of the branch's maps that pass, or None."""
    passed = list_passed(campaign.list_results(*FROM_BRANCH), policy)
    finest = min(map(honest_resolution, passed), default=0.0)
    equals = [run for run in passed if honest_resolution(run) <= finest * (1.0 + EQUAL_RESOLUTION)]
    return max(equals, key=share_of_null, default=None)


def list_cluster_runs(campaign: CampaignRecord, policy: RunPolicy) -> list[RunDraft]:
    """Return one run from nothing for each cluster that is large enough."""
    clustering = campaign.clustering
    if clustering is None or clustering.result is None:
        return []
    request, subset = clustering.request, clustering.request.subset
    return [
        RunDraft(
            purpose=RunPurpose.CLUSTER,
            subset=ParticleSubset(
                score_threshold=subset.score_threshold,
                top=subset.top,
                clustering=request.clustering_id,
                clusters=(label,),
            ),
            n_particles=size,
            reason=f"cluster {label + 1} of {len(clustering.result.sizes)}, {size} particles, from nothing",
        )
        for label, size in enumerate(clustering.result.sizes)
        if size >= policy.cluster_min_particles
    ]


def find_forecast(campaign: CampaignRecord, policy: RunPolicy) -> tuple[RunResult, UnionForecast] | None:
    """Return the survey whose sums foretell a union that passes, with the forecast, or None."""
    for run in campaign.list_results(RunPurpose.SURVEY):
        if run.union is not None and _would_pass(run, run.union, policy):
            return run, run.union
    return None


def _would_pass(run: RunResult, forecast: UnionForecast, policy: RunPolicy) -> bool:
    if forecast.cfar is None or forecast.resolution_angstrom is None or not forecast.clusters:
        return False
    return (
        forecast.cfar >= find_cfar_bound(run, policy) and forecast.n_particles >= policy.cluster_min_particles
    )


def _draft_survey(campaign: CampaignRecord) -> RunDraft | None:
    """Return the run that continues the best search run with its particles in clusters."""
    best = choose_best(campaign.list_results(RunPurpose.INITIAL, RunPurpose.REBUILD))
    if best is None or best.resolution_angstrom is None or campaign.clustering is None:
        return None
    source = next(r.request for r in campaign.runs if r.run_id == best.run_id)
    return RunDraft(
        purpose=RunPurpose.SURVEY,
        subset=replace(source.subset, clustering=campaign.clustering.request.clustering_id),
        n_particles=source.n_particles,
        start_map=best.run_id,
        warm_start=best.run_id,
        reason=f"sums of {best.run_id} by cluster, to foretell their unions",
    )


def _draft_union(campaign: CampaignRecord, policy: RunPolicy) -> RunDraft | None:
    found = find_forecast(campaign, policy)
    if found is None:
        return None
    run, forecast = found
    source = next(r.request.subset for r in campaign.runs if r.run_id == run.run_id)
    names = ", ".join(str(label + 1) for label in forecast.clusters)
    return RunDraft(
        purpose=RunPurpose.UNION,
        subset=replace(source, clusters=forecast.clusters),
        n_particles=forecast.n_particles,
        start_map=run.run_id,
        reason=f"clusters {names} together: the sums of {run.run_id} foretell a cFAR of {forecast.cfar:.2f}",
    )
