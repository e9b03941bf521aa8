"""Every decision can be taken back: a session whose decisions were all undone is as if nobody had decided."""

from __future__ import annotations

import random
from dataclasses import asdict

from hypothesis import given, settings
from hypothesis import strategies as st
from story import fit, found, moved, play, preprocessed, ranked

from stream.control.controller import Controller
from stream.control.settings import ControllerSettings, RunPolicy
from stream.records.values import QualityLimits
from stream.records.wishes import TimeWindow, Wish, WishKind
from stream.requests import event_for_request
from stream.store.inbox import LimitsRequest, OverruleRequest, Request, WishRequest

QUIET = ControllerSettings(runs=RunPolicy(enabled=False))
NAMES = "abcdef"


def session() -> Controller:
    """Six exposures taken at 0 to 5 s, with CTF fits to 3 to 8 Å, half of their scores at 0.8."""
    controller = Controller(QUIET)
    for number, name in enumerate(NAMES):
        ctf = fit(resolution=3.0 + number)
        play(
            controller,
            found(name, number * 10**9),
            preprocessed(name, 10 + number, ctf=ctf, motion=moved(5.0 - number)),
            ranked(name, 5 + number, 5),
        )
    return controller


def limits(**given: float) -> LimitsRequest:
    return LimitsRequest(limits=asdict(QualityLimits()) | given)


def wish(**given: object) -> WishRequest:
    return WishRequest(wish=Wish(**given))  # type: ignore[arg-type]


REQUESTS: st.SearchStrategy[Request] = st.one_of(
    st.floats(3.0, 8.0).map(lambda v: limits(max_ctf_fit_angstrom=v)),
    st.floats(0.5, 5.0).map(lambda v: limits(max_total_motion_angstrom=v)),
    st.builds(
        OverruleRequest,
        name=st.sampled_from(NAMES),
        is_accepted=st.sampled_from([True, False, None]),
        reason=st.just("seen"),
    ),
    st.tuples(st.integers(0, 5), st.integers(0, 5)).map(
        lambda t: wish(
            kind=WishKind.EXCLUDE_TIME, window=TimeWindow(from_s=float(min(t)), to_s=float(max(t)))
        )
    ),
    st.sampled_from(["C2", "D2"]).map(lambda g: wish(kind=WishKind.SET_SYMMETRY, symmetry=g)),
    st.sampled_from([0.2, 0.6, 0.9]).map(
        lambda t: wish(kind=WishKind.SET_SCORE_THRESHOLD, score_threshold=t)
    ),
)


def outcome(controller: Controller) -> object:
    records = controller.exposures.values()
    return (
        [(r.name, r.state, r.reason, r.half_set, r.overruled_as) for r in records],
        controller.n_above_threshold,
        controller.score_threshold,
        controller.limits,
        controller.wishes.symmetry,
        dict(+controller.n_rejected_by),
    )


@settings(max_examples=40, deadline=None)
@given(requests=st.lists(REQUESTS, max_size=6), order=st.randoms(use_true_random=False))
def test_a_session_whose_decisions_were_all_undone_is_as_before(
    requests: list[Request], order: random.Random
) -> None:
    controller = session()
    before = outcome(controller)
    for request in requests:
        play(controller, event_for_request(request, controller, 9.0))
    ids = [f"d{number + 1}" for number in range(len(requests))]
    order.shuffle(ids)
    for decision_id in ids:
        play(
            controller, event_for_request(wish(kind=WishKind.UNDO, decision_id=decision_id), controller, 9.0)
        )
    assert outcome(controller) == before
