"""When a campaign is due and what it holds; whether it goes before one that is in work.

Order of the triggers: a person, the end of the input, changed symmetry, mask or τ, scores of another model, a
rung, particles lost. What is due is found anew at every event and never queued, so that the newest reason
replaces an older one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

from stream.control.settings import RunPolicy
from stream.control.sweep import find_count_range, list_parts
from stream.records.values import (
    CampaignId,
    CampaignPlan,
    CampaignRequest,
    CampaignTrigger,
    RunId,
    SweepPolicy,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """What the session has and wants now, as far as campaigns follow from it.

    `n_at_bounds` are the counts at the two scores of a search by turns. `is_ranking_flat` tells that all
    scores above τ fall into one bin. `n_lost` are particles of the last campaign that are rejected now,
    `n_from_nothing` the greatest number that a run from nothing has had. `accepted` is the map to continue,
    `is_accepted_current` tells whether it has today's symmetry.
    """

    n_particles: int
    n_at_bounds: tuple[int, int]
    is_ranking_flat: bool
    n_lost: int
    n_from_nothing: int
    score_threshold: float
    model_hash: str
    is_every_score_current: bool
    symmetry: str
    mask_diameter_angstrom: float | None
    is_forced: bool
    is_complete: bool
    accepted: RunId | None
    is_accepted_current: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Due:
    """A campaign that is due, and why."""

    trigger: CampaignTrigger
    reason: str


class Precedence(Enum):
    """What a campaign that is due does to the one in work."""

    WAIT = "wait"
    AFTER_RUN = "after_run"
    AT_ONCE = "at_once"


def find_due(now: Standing, last: CampaignRequest | None, policy: RunPolicy) -> Due | None:
    """Return the campaign that is due, or None; `last` is the last one that was started.

    At the end of the input (`is_complete`) one is due whatever the last one had; the caller knows whether that would
    be the same work again.
    """
    n, tau = now.n_particles, now.score_threshold
    if n < policy.final_min_particles:
        return None
    if now.is_forced:
        return Due(trigger=CampaignTrigger.USER, reason=f"asked for by hand: {n} particles above {tau:g}")
    if now.is_complete:
        had = 0 if last is None else last.n_particles
        words = f"no more input: all {n} particles above {tau:g} (last campaign: {had})"
        return Due(trigger=CampaignTrigger.END, reason=words)
    if last is not None and (words := _describe_changes(now, last)):
        return Due(trigger=CampaignTrigger.SETTINGS, reason=words)
    if last is not None and now.model_hash != last.model_hash:
        if now.is_every_score_current or n >= policy.rungs[0]:
            words = f"scores are of model {now.model_hash} now ({last.model_hash} before): {n} above {tau:g}"
            return Due(trigger=CampaignTrigger.RESCORED, reason=words)
    elif (rung := _find_rung(n, tau, last, policy)) is not None:
        return Due(trigger=CampaignTrigger.RUNG, reason=rung)
    elif last is not None and now.n_lost > policy.rerun_loss_fraction * last.n_particles:
        words = (
            f"{now.n_lost} of the last campaign's {last.n_particles} particles have been rejected since "
            f"(rule: more than {policy.rerun_loss_fraction:g} of them), {n} are left"
        )
        return Due(trigger=CampaignTrigger.LOSS, reason=words)
    return None


def _describe_changes(now: Standing, last: CampaignRequest) -> str:
    pairs = (
        ("symmetry", last.symmetry, now.symmetry),
        ("mask diameter", last.mask_diameter_angstrom, now.mask_diameter_angstrom),
        ("score threshold", last.score_threshold, now.score_threshold),
    )
    return "; ".join(f"{name} is now {new} ({old} before)" for name, old, new in pairs if old != new)


def find_next_rung(n_last: int | None, policy: RunPolicy) -> int:
    """Return the number of particles at which a campaign is due after one of `n_last` (None = there was none)."""
    above = [rung for rung in policy.rungs if n_last is None or rung > n_last]
    if above:
        return above[0]
    return -int(-policy.growth_factor * (n_last or 0) // 1)


def _find_rung(n: int, tau: float, last: CampaignRequest | None, policy: RunPolicy) -> str | None:
    n_last = None if last is None else last.n_particles
    rung = find_next_rung(n_last, policy)
    if n < rung:
        return None
    if n_last is None:
        return f"{n} particles score above {tau:g}: the first rung is {rung}"
    return f"{n} particles score above {tau:g}: {n / n_last:.2f} times the last campaign's {n_last} (rung {rung})"


def find_precedence(due: Due, now: Standing, active: CampaignRequest, policy: RunPolicy) -> Precedence:
    """Return what a due campaign does to the one in work.

    A person, another symmetry or mask, or other scores stop the run at once: its result would be of no use. Lost
    particles, another τ and the end of the input let the run finish and drop the rest. A rung waits
    unless the particles have grown by `supersede_growth`.
    """
    geometry = (now.symmetry, now.mask_diameter_angstrom)
    if geometry != (active.symmetry, active.mask_diameter_angstrom):
        return Precedence.AT_ONCE
    match due.trigger:
        case CampaignTrigger.USER | CampaignTrigger.RESCORED:
            return Precedence.AT_ONCE
        case CampaignTrigger.SETTINGS | CampaignTrigger.LOSS | CampaignTrigger.END:
            return Precedence.AFTER_RUN
        case CampaignTrigger.RUNG:
            has_outgrown = now.n_particles >= policy.supersede_growth * active.n_particles
            return Precedence.AFTER_RUN if has_outgrown else Precedence.WAIT


def plan_campaign(
    due: Due, now: Standing, last: CampaignRequest | None, campaign_id: CampaignId, policy: RunPolicy
) -> CampaignRequest:
    """Return the campaign, every number in it.

    The last one starts from nothing on everything, so that it is what an offline run would do; in light form it does
    not continue the accepted map, too. A flat ranking has no best part: one size and no sweep. After another symmetry
    the map is continued and the poses are not, because the axes may have moved.
    """
    n = now.n_particles
    is_whole = due.trigger in (CampaignTrigger.END, CampaignTrigger.USER)
    is_full = n >= policy.full_min_particles and (
        is_whole or now.accepted is None or _passes_full_rung(n, last, policy)
    )
    is_from_nothing = (
        is_full or is_whole or now.accepted is None or n >= policy.rebuild_factor * max(now.n_from_nothing, 1)
    )
    start = now.accepted if is_full or not is_whole else None
    is_bounds = policy.sweep is SweepPolicy.BOUNDS and is_full and not now.is_ranking_flat
    count_range = find_count_range(*now.n_at_bounds, policy.part_min_particles) if is_bounds else None
    n_parts = 1
    if not now.is_ranking_flat and count_range is None and (is_full or is_whole):
        n_parts = policy.n_parts if is_full else policy.n_parts_light
        n_parts = n_parts if len(list_parts(n, n_parts, policy.part_min_particles)) > 1 else 1
    sizes: tuple[int, ...] = ()
    if is_from_nothing:
        sizes = _list_sizes(n, policy) if is_full and not now.is_ranking_flat else (n,)
    flat = "; every score lies in one bin: no ranking, no sweep" if now.is_ranking_flat else ""
    return CampaignRequest(
        campaign_id=campaign_id,
        trigger=due.trigger,
        plan=CampaignPlan.FULL if is_full else CampaignPlan.LIGHT,
        sweep=SweepPolicy.PAPER if count_range is None else SweepPolicy.BOUNDS,
        n_particles=n,
        score_threshold=now.score_threshold,
        model_hash=now.model_hash,
        symmetry=now.symmetry,
        mask_diameter_angstrom=now.mask_diameter_angstrom,
        start_map=start,
        warm_start=start if now.is_accepted_current else None,
        search_sizes=sizes,
        n_parts=n_parts,
        turns=policy.turns if count_range is not None else (),
        count_range=count_range,
        repeats=None,
        reason=due.reason + flat,
    )


def _passes_full_rung(n: int, last: CampaignRequest | None, policy: RunPolicy) -> bool:
    had = 0 if last is None else last.n_particles
    return any(had < rung <= n for rung in policy.full_rungs)


def _list_sizes(n: int, policy: RunPolicy) -> tuple[int, ...]:
    """Return the sizes of the runs from nothing: the paper's, or even fractions of what there is, each once.

    With the paper's two sizes these are min(50,000, n/2) and min(100,000, n).
    """
    sizes = sorted(policy.search_sizes)
    return tuple(sorted({min(size, n * (i + 1) // len(sizes)) for i, size in enumerate(sizes)}))


def is_same_work(one: CampaignRequest, other: CampaignRequest) -> bool:
    """Tell whether two campaigns start the same runs from nothing, whatever triggered them."""
    return _work_of(one) == _work_of(other)


def _work_of(request: CampaignRequest) -> CampaignRequest:
    return replace(
        request,
        campaign_id=CampaignId(""),
        trigger=CampaignTrigger.END,
        start_map=None,
        warm_start=None,
        repeats=None,
        reason="",
    )
