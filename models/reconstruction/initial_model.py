"""The initial model: several starts of the online EM, ranked by held-out likelihood, then symmetry.

Starts differ in seed and, every second one, in the radius they begin with: dwelling at low resolution helps most
structures and traps those that are nearly symmetric there. All of them search in C1 and run to half time; the
likeliest of each kind go on to the end. Where images have other poses in the one than in the other, both go on: while
their evidence rises, then with fine poses (`fine_em`). Where that does not help the others join and as many new ones, one by
one, and the likeliest two go on, until a second map agrees with the best. With a point group all starts go to the end and agreement is not
asked for: the group is imposed on several candidate frames of the maps, each polished by EM within the group, and
again the held-out likelihood chooses: it knows the images, the symmetry score only the map.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from models.reconstruction.acceptance import MINIMUM_AGREEMENT, SeedAcceptance, agreement_of, judge_seed
from models.reconstruction.fine_em import Finalist, FineEm
from models.reconstruction.online_em import EmProgress, EmResult, OnlineEm, OnlineEmSettings, run_start
from models.reconstruction.particle_data import ParticleData
from models.reconstruction.projector import cube_to_volume
from models.reconstruction.scoring import fast_products
from models.reconstruction.symmetry import find_frames

TRIAL_FRACTION = 0.5
"""The share of its run after which a start is compared with the others."""

SECOND_FIRST_SHELL = 7.0
"""The radius that every second start begins with: 4 shells converged most often, but not for every shape."""


FINE_BLOCK = 5
"""Iterations with fine poses between two comparisons: most of a pass over 3,000 images."""

ROUNDS_OF_TWO = 2
"""Rounds in which two starts go on (while they rise; a block) before another joins in every other one."""

MAX_FINE_STEPS = 80
"""Of one start; ClpB's mixture of two registers came apart within ten, a rod's head and tail within 60 to 80."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StartReport:
    """One start, or one symmetric frame polished: what it was and its mean held-out log evidence in nats.

    `fine_score` is the held-out images' mean log likelihood at their best fine poses, None where none were searched.
    """

    name: str
    log_evidence: float
    fine_score: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class InitialModel:
    """The chosen map on the images' box, with what was tried.

    `evidence_spread` is the gap between the best two starts in nats per image: two starts that agree within
    about 0.3 are the usual sign of a solved set. `symmetry_score` is the mean correlation with rotated copies
    that the C1 map had; below 0.5 the map does not show the group.
    """

    volume: Tensor
    reports: tuple[StartReport, ...]
    evidence_spread: float | None
    symmetry_score: float | None
    acceptance: SeedAcceptance


def find_initial_model(
    data: ParticleData,
    settings: OnlineEmSettings,
    group: Float[Tensor, "g 3 3"],
    *,
    n_starts: int,
    seed: int,
    n_threads: int = 1,
    on_progress: Callable[[str, EmProgress], None] | None = None,
) -> InitialModel:
    """Return the likeliest map of `n_starts` (twice as many where no two of them agree), in the group's setting."""
    names = [f"start {i + 1}" for i in range(2 * n_starts)]

    def begin(index: int) -> OnlineEm:
        first = settings.first_shell if index % 2 == 0 else min(SECOND_FIRST_SHELL, settings.last_shell)
        own = replace(settings, first_shell=first)
        em = OnlineEm(data, own, torch.Generator().manual_seed(seed * 1000 + index))
        em.run_to(round(TRIAL_FRACTION * settings.n_iterations), _named(names[index], on_progress))
        return em

    def finish(index: int) -> EmResult:
        starts[index].run_to_end(_named(names[index], on_progress))
        return starts[index].result()

    def compare(index: int) -> Finalist:
        starts[index].run_to(settings.n_iterations, _named(names[index], on_progress))
        fines[index] = FineEm(starts[index])
        return fines[index].finalist()

    def go_on(index: int) -> Finalist:
        if index not in extended:
            extended.add(index)
            starts[index].run_to_end(_named(names[index], on_progress))
        else:
            fines[index].run(FINE_BLOCK, _named(names[index], on_progress))
        return fines[index].finalist()

    def judge() -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    fines, finalists, extended = dict[int, FineEm](), dict[int, Finalist](), set[int]()
    with fast_products(), ThreadPoolExecutor(max_workers=max(1, n_threads)) as pool:
        starts = dict(enumerate(pool.map(begin, range(n_starts))))
        early = list(pool.map(lambda em: float(em.held_out_evidence().double().mean()), starts.values()))
        order = _alternate(sorted(starts, key=lambda i: -early[i]))
        # In C1 a symmetric particle's starts need not look alike: every one is polished within the group instead.
        chosen = order[:2] if len(group) == 1 else order
        agreement = None
        if len(group) > 1:
            finished = dict(zip(chosen, pool.map(finish, chosen), strict=True))
        else:
            finalists |= dict(zip(chosen, pool.map(compare, chosen), strict=True))
            if len(chosen) == 1:
                finalists[chosen[0]] = go_on(chosen[0])
            agreement = _agreement(finalists)
            more_starts, n_rounds = [*order[2:], *range(n_starts, 2 * n_starts)], 0
            while agreement is not None and agreement < MINIMUM_AGREEMENT:
                likeliest = _by_score(finalists)[:2]
                if not judge_seed(data, finalists[likeliest[0]].result, settings, judge()).is_accepted:
                    break
                unfinished = [i for i in likeliest if fines[i].n_steps < MAX_FINE_STEPS]
                is_joining = n_rounds >= ROUNDS_OF_TWO and (n_rounds - ROUNDS_OF_TWO) % 2 == 0
                if more_starts and (is_joining or not unfinished):
                    index = more_starts.pop(0)
                    if index not in starts:
                        starts[index] = begin(index)
                    finalists[index] = compare(index)
                elif not unfinished:
                    break
                finalists |= dict(zip(unfinished, pool.map(go_on, unfinished), strict=True))
                agreement = _agreement(finalists)
                n_rounds += 1
            finished = {i: finalists[i].result for i in _by_score(finalists)}
    ranked = list(finished) if finalists else sorted(finished, key=lambda i: -finished[i].log_evidence)
    results = [finished[i] for i in ranked]
    reports = [
        StartReport(
            name=names[i],
            log_evidence=finished[i].log_evidence,
            fine_score=finalists[i].score if i in finalists else None,
        )
        for i in ranked
    ] + [
        StartReport(name=f"{names[i]}, left at half time", log_evidence=early[i])
        for i in order
        if i not in finished
    ]
    spread = results[0].log_evidence - results[1].log_evidence if len(results) > 1 else None
    box = data.box_size_px
    best, more, score = results[0], list[StartReport](), None
    if len(group) > 1:
        polished, more, score = _impose(
            data, settings, group, results, seed=seed, n_threads=n_threads, on_progress=on_progress
        )
        best = polished[0]
    return InitialModel(
        volume=cube_to_volume(best.cube, box),
        reports=(*reports, *more),
        evidence_spread=spread,
        symmetry_score=score,
        acceptance=judge_seed(data, best, settings, judge(), agreement),
    )


def _alternate(ranked: list[int]) -> list[int]:
    """Put the best start that began at the other radius second: maps that two kinds of start agree on are worth more."""
    other = next((i for i in ranked[1:] if i % 2 != ranked[0] % 2), None)
    return ranked if other is None else [ranked[0], other, *(i for i in ranked[1:] if i != other)]


def _by_score(finalists: dict[int, Finalist]) -> list[int]:
    """Return which finalists there are, the likeliest first."""
    return sorted(finalists, key=lambda i: -finalists[i].score)


def _agreement(finalists: dict[int, Finalist]) -> float | None:
    """Return the best map's highest agreement with another one; None where there is no other."""
    first, *others = (finalists[i] for i in _by_score(finalists))
    return max((agreement_of(first, other) for other in others), default=None)


def _impose(
    data: ParticleData,
    settings: OnlineEmSettings,
    group: Tensor,
    starts: list[EmResult],
    *,
    seed: int,
    n_threads: int,
    on_progress: Callable[[str, EmProgress], None] | None,
) -> tuple[list[EmResult], list[StartReport], float]:
    """Polish the best frame of every start within the group; return them, likeliest first, and the best one's score.

    Every start, because a C1 map that is less likely as it stands may be nearer to a symmetric one.
    """
    frames = [
        (f"map {i + 1}, frame {j + 1}", fit)
        for i, start in enumerate(starts)
        for j, fit in enumerate(find_frames(start.volume, group, max_shell=9.0, n_best=2 if i == 0 else 1))
    ]
    short = replace(settings, n_iterations=max(2, settings.n_iterations // 2))

    def polish(index: int) -> EmResult:
        name, fit = frames[index]
        generator = torch.Generator().manual_seed(seed * 1000 + 500 + index)
        return run_start(
            data, short, generator, _named(name, on_progress), group=group, start=fit.symmetrised
        )

    with fast_products(), ThreadPoolExecutor(max_workers=max(1, n_threads)) as pool:
        results = list(pool.map(polish, range(len(frames))))
    order = sorted(range(len(frames)), key=lambda i: -results[i].log_evidence)
    reports = [
        StartReport(name=f"{name} (score {fit.score:.2f})", log_evidence=result.log_evidence)
        for (name, fit), result in zip(frames, results, strict=True)
    ]
    return [results[i] for i in order], reports, frames[order[0]][1].score


def _named(
    name: str, on_progress: Callable[[str, EmProgress], None] | None
) -> Callable[[EmProgress], None] | None:
    return None if on_progress is None else lambda progress: on_progress(name, progress)
