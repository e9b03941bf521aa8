"""What the figures of a session look like and what its limits do to them, so that a person can choose limits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from stream.control.controller import Controller
from stream.control.exposures import ExposureRecord, ExposureState
from stream.control.quality import RULES, find_breaches

PERCENTILES = (0, 5, 25, 50, 75, 95, 100)


def report_quality(controller: Controller) -> dict[str, Any]:
    """Return what is accepted and rejected by the limits in force, rule by rule, and how each figure is spread.

    An exposure that breaks several limits counts under each of them; `rejected_by` counts it once. Particles are
    those extracted, and those that score above the threshold.
    """
    records = list(controller.exposures.values())
    judged = [r for r in records if r.figures is not None and r.state is not ExposureState.QUARANTINED]
    refused = [r for r in judged if r.find_breach(controller.limits) is not None]
    is_refused = {r.exposure_id for r in refused}
    kept = [r for r in judged if r.exposure_id not in is_refused]
    return {
        "limits": asdict(controller.limits),
        "exposures": {"judged": len(judged), "accepted": len(kept), "rejected": len(refused)},
        "particles": {
            "accepted": _count(controller, kept),
            "rejected": _count(controller, refused),
            "score_threshold": controller.settings.score_threshold,
        },
        "rules": _count_by_rule(controller, judged),
        "rejected_by": count_rejected_by(controller),
        "figures": {
            figure: _describe([v for r in judged if (v := getattr(r.figures, figure)) is not None])
            for figure in dict.fromkeys(rule.figure for rule in RULES)
        },
        "without_rings": sum(r.figures is not None and r.figures.has_rings is False for r in judged),
        "overruled": list_overruled(controller),
    }


def count_rejected_by(controller: Controller) -> dict[str, int]:
    """Return how many exposures each rule has rejected; a rejected exposure counts once."""
    return {rule: n for rule, n in sorted(controller.n_rejected_by.items()) if n}


def list_overruled(controller: Controller) -> list[dict[str, Any]]:
    """Return the exposures on which a person's word stands."""
    return [
        {"name": r.name, "accepted": r.overruled_as, "reason": r.overruled_because}
        for r in controller.exposures.values()
        if r.overruled_as is not None
    ]


def list_rejected(controller: Controller) -> list[dict[str, Any]]:
    """Return every rejected exposure with its reason."""
    return [
        {"name": r.name, "rule": r.rejected_by, "reason": r.reason}
        for r in controller.exposures.values()
        if r.state is ExposureState.REJECTED
    ]


def _count(controller: Controller, records: Sequence[ExposureRecord]) -> dict[str, int]:
    return {
        "extracted": sum(r.n_particles for r in records),
        "above_threshold": sum(map(controller.count_above, records)),
    }


def _count_by_rule(controller: Controller, judged: Sequence[ExposureRecord]) -> list[dict[str, Any]]:
    exposures: Counter[str] = Counter()
    particles: Counter[str] = Counter()
    above: Counter[str] = Counter()
    for record in judged:
        if record.figures is None:
            continue
        for breach in find_breaches(record.figures, controller.limits):
            exposures[breach.rule] += 1
            particles[breach.rule] += record.n_particles
            above[breach.rule] += controller.count_above(record)
    return [
        {
            "rule": rule.limit,
            "limit": getattr(controller.limits, rule.limit),
            "exposures": exposures[rule.limit],
            "particles": {"extracted": particles[rule.limit], "above_threshold": above[rule.limit]},
        }
        for rule in RULES
        if getattr(controller.limits, rule.limit) is not None
    ]


def _describe(values: list[float]) -> dict[str, Any]:
    ordered = sorted(values)
    spread = {f"p{q}": _percentile(ordered, q) for q in PERCENTILES} if ordered else {}
    return {"n": len(ordered), **spread}


def _percentile(ordered: Sequence[float], q: float) -> float:
    """Return the q-th percentile of sorted values, between two of them in proportion."""
    position = (len(ordered) - 1) * q / 100.0
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)
