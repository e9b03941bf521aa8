"""How many particles give the best map: nested parts (the paper), or turns between two bounds (upstream later).

Cryo-IEF paper, Methods, "Implementation of CryoWizard", eq. 12: k = #{s > τ}, n nested parts of the ranked
particles, each refined from the initial model. Here the last part is all k (the paper's floor(k/n) leaves up to n − 1
out), and parts under `part_min_particles` are left out.

Upstream's later search: the first turn takes the centres of equal bins between two counts, each further turn
divides the bin of the best so far by one more than its number of runs and leaves the centre out. Counts
that round to one another, or to one that was tried, are run once.
"""

from __future__ import annotations

from stream.control.campaign import CampaignRecord, RunDraft, list_passed, subset_of
from stream.control.runs import IN_WORK, choose_best
from stream.control.settings import RunPolicy
from stream.records.values import CampaignRequest, ParticleSubset, RunId, RunPurpose, SweepPolicy


def list_parts(n_particles: int, n_parts: int, min_particles: int) -> tuple[int, ...]:
    """Return the sizes of the nested parts, ascending; the last one is everything."""
    size = n_particles // n_parts
    smaller = [j * size for j in range(1, n_parts) if j * size >= min_particles]
    return (*smaller, n_particles)


def list_turn(
    turn: int, turns: tuple[int, ...], count_range: tuple[int, int], best: int | None
) -> tuple[int, ...]:
    """Return the counts of one turn (the first is 0) around the `best` count so far, ascending.

    A bin of the first turn is as wide as the range over its number of runs; turn t divides the bin of the turn
    before by its number of runs plus one.
    """
    low, high = count_range
    width = (high - low) / turns[0]
    if turn == 0:
        centres = [low + (i + 0.5) * width for i in range(turns[0])]
        return _distinct(centres, count_range)
    if best is None:
        return ()
    for n_runs in turns[1:turn]:
        width /= n_runs + 1
    n_bins = turns[turn] + 1
    start = best - width / 2
    centres = [start + (i + 0.5) * width / n_bins for i in range(n_bins) if 2 * i + 1 != n_bins]
    return _distinct(centres, count_range)


def _distinct(counts: list[float], count_range: tuple[int, int]) -> tuple[int, ...]:
    low, high = count_range
    return tuple(sorted({min(max(round(count), low), high) for count in counts}))


def list_sweep_runs(
    campaign: CampaignRecord,
    start_map: RunId,
    policy: RunPolicy,
    *,
    compare_with: RunId | None,
    is_whole_known: bool,
) -> list[RunDraft]:
    """Return the sweep's runs as far as they can be said now; those of later turns follow from the earlier ones'.

    `is_whole_known` leaves the last part out: a run of the campaign has refined everything from this start.
    """
    request = campaign.request
    if request.sweep is SweepPolicy.PAPER:
        parts = list_parts(request.n_particles, request.n_parts, policy.part_min_particles)
        wanted = [(n, f"part {i + 1} of {len(parts)}") for i, n in enumerate(parts)]
        if is_whole_known:
            wanted = wanted[:-1]
        subsets = [(subset_of(request, n), n, words) for n, words in wanted]
    else:
        subsets = [
            (_best_of_any_score(n), n, words) for n, words in _list_counts(campaign, start_map, policy)
        ]
    return [
        RunDraft(
            purpose=RunPurpose.SWEEP,
            subset=subset,
            n_particles=n,
            start_map=start_map,
            compare_with=compare_with if subset.top is None else None,
            reason=f"sweep over the number of particles, {words}: the best {n}",
        )
        for subset, n, words in subsets
    ]


def _best_of_any_score(n_particles: int) -> ParticleSubset:
    return ParticleSubset(score_threshold=0.0, top=n_particles)


def _list_counts(campaign: CampaignRecord, start_map: RunId, policy: RunPolicy) -> list[tuple[int, str]]:
    """Return the counts of every turn that can be said now, each once."""
    request = campaign.request
    if request.count_range is None:
        return []
    listed: dict[int, str] = {}
    best = None
    for turn in range(len(request.turns)):
        counts = list_turn(turn, request.turns, request.count_range, best)
        for n in counts:
            listed.setdefault(n, f"turn {turn + 1} of {len(request.turns)}")
        sweep = [r for r in campaign.list_runs(RunPurpose.SWEEP) if r.request.start_map == start_map]
        tried = [r for r in sweep if r.request.subset.top in listed]
        if len(tried) < len(listed) or any(r.state in IN_WORK for r in tried):
            break
        results = [r.result for r in tried if r.result is not None]
        winner = choose_best(list_passed(results, policy)) or choose_best(results)
        best = None if winner is None else _count_of(winner.run_id, campaign)
    return list(listed.items())


def _count_of(run_id: RunId, campaign: CampaignRecord) -> int | None:
    return next((r.request.subset.top for r in campaign.runs if r.run_id == run_id), None)


def find_count_range(n_low: int, n_high: int, min_particles: int) -> tuple[int, int] | None:
    """Return the bounds of a search by turns, None where they leave no room."""
    low = max(n_low, min_particles)
    return (low, n_high) if n_high > low else None


def is_sweep_needed(request: CampaignRequest) -> bool:
    """Tell whether the campaign looks for the best number of particles at all."""
    return request.n_parts > 1 or request.count_range is not None
