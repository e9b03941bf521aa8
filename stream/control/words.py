"""Campaigns, comparisons and clusterings in words, for decisions."""

from __future__ import annotations

from stream.control.runs import describe_result
from stream.records.values import (
    CampaignPlan,
    CampaignRequest,
    ClusteringResult,
    RunResult,
    UnionForecast,
)


def describe_campaign(request: CampaignRequest) -> str:
    """Say what a campaign is going to do."""
    if request.repeats is not None:
        return f"{request.campaign_id}: {request.repeats} has had the same particles"
    parts = []
    if request.start_map is not None:
        parts.append(f"continue {request.start_map}")
    if request.search_sizes:
        sizes = " and ".join(str(n) for n in request.search_sizes)
        parts.append(f"from nothing on {sizes} particles")
    if request.count_range is not None:
        low, high = request.count_range
        parts.append(f"search between {low} and {high} particles")
    elif request.n_parts > 1:
        parts.append(f"{request.n_parts} nested parts")
    size = "full" if request.plan is CampaignPlan.FULL else "light"
    return f"{request.campaign_id} ({size}): {', '.join(parts)}"


def describe_comparison(fresh: RunResult, continued: RunResult) -> str:
    """Say how a run from nothing differs from one that continued an earlier map, and what each cost."""
    words = [
        f"from nothing {describe_result(fresh)} on {fresh.n_particles} particles",
        f"continued {describe_result(continued)} on {continued.n_particles}",
    ]
    if fresh.resolution_angstrom is not None and continued.resolution_angstrom is not None:
        difference = fresh.resolution_angstrom - continued.resolution_angstrom
        words.append(f"difference {difference:+.2f} Å")
    if fresh.correlation is not None:
        words.append(f"correlation of the maps {fresh.correlation:.3f}")
    cost, cost_continued = sum(fresh.seconds.values()), sum(continued.seconds.values())
    if cost > 0:
        ratio = cost_continued / cost
        words.append(f"{cost:.0f} s from nothing, {cost_continued:.0f} s continued (ratio {ratio:.2f})")
    return "; ".join(words)


def describe_clustering(result: ClusteringResult, min_particles: int) -> str:
    """Say how large the clusters are, and which are left out."""
    small = [str(i + 1) for i, size in enumerate(result.sizes) if size < min_particles]
    words = f"clusters of {', '.join(str(size) for size in result.sizes)} particles"
    if small:
        words += f"; left out for fewer than {min_particles}: {', '.join(small)}"
    if result.n_without_features:
        words += f"; {result.n_without_features} particles without features are in none"
    return words


def describe_forecast(forecast: UnionForecast, result: RunResult) -> str:
    """Say what was foretold of a union of clusters, and what it gave."""
    cfar = "unknown" if forecast.cfar is None else f"{forecast.cfar:.2f}"
    resolution = (
        "unknown" if forecast.resolution_angstrom is None else f"{forecast.resolution_angstrom:.2f} Å"
    )
    return f"foretold {resolution}, cFAR {cfar}; obtained {describe_result(result)}"
