"""From what a person asks for to the event that makes it so."""

from __future__ import annotations

from collections.abc import Callable

from stream.config import parse_engine_choice, parse_limits, parse_score_threshold
from stream.control.controller import Controller
from stream.control.exposures import ExposureState
from stream.control.runs import RunRecord
from stream.control.wishes import LimitsChange, OverruleChange
from stream.records.errors import ConfigurationError, IcestreamError, InputError
from stream.records.events import Event, ExposureOverruled, QualityLimitsChanged, SessionDecided
from stream.records.values import RunId
from stream.records.wishes import Wish, WishKind
from stream.store.inbox import Inbox, Letter, LimitsRequest, OverruleRequest, Request
from stream.telemetry.logs import get_logger

log = get_logger(__name__)


def event_for_request(request: Request, controller: Controller, at: float, *, request_id: str = "") -> Event:
    """Return the event that a request asks for, or raise with the name or key, the value and the rule."""
    if isinstance(request, LimitsRequest):
        limits = parse_limits(request.limits, item="limits")
        return QualityLimitsChanged(at=at, limits=limits, reason=request.reason, request_id=request_id)
    if isinstance(request, OverruleRequest):
        return _overrule(request, controller, at, request_id)
    wish = request.wish
    if wish.kind is WishKind.UNDO:
        return _undo(wish.decision_id or "", controller, at, request.reason, request_id)
    _check_wish(wish, controller)
    return SessionDecided(at=at, wish=wish, reason=request.reason, request_id=request_id)


def _overrule(request: OverruleRequest, controller: Controller, at: float, request_id: str) -> Event:
    if request.is_accepted is False and not request.reason.strip():
        raise ConfigurationError(request.name, "an exposure is rejected for a reason that is said")
    records = controller.exposures.values()
    found = next((r for r in records if request.name in (r.name, r.exposure_id)), None)
    if found is None:
        raise ConfigurationError(request.name, "an exposure of this name is in the session")
    return ExposureOverruled(
        at=at,
        exposure_id=found.exposure_id,
        is_accepted=request.is_accepted,
        reason=request.reason,
        request_id=request_id,
    )


def _check_wish(wish: Wish, controller: Controller) -> None:
    """Raise when a wish names a run that is not there, or a value outside of its range."""
    match wish.kind:
        case WishKind.PIN_RUN:
            run = _require_run(wish.run_id, controller)
            if run.result is None or run.result.resolution_angstrom is None:
                rule = (
                    f"a run that is pinned has ended with a map that has a resolution; {wish.run_id} has not"
                )
                raise ConfigurationError("decide", rule, run.state.value)
        case WishKind.REJECT_RUN:
            _require_run(wish.run_id, controller)
        case WishKind.SET_SYMMETRY | WishKind.SET_MASK_DIAMETER:
            given = {"symmetry": wish.symmetry, "mask_diameter_angstrom": wish.mask_diameter_angstrom}
            parse_engine_choice({k: v for k, v in given.items() if v is not None}, item="decide")
        case WishKind.SET_SCORE_THRESHOLD if wish.score_threshold is not None:
            parse_score_threshold(wish.score_threshold, item="decide")
        case WishKind.TRAIN_CRYOGEM:
            n_good = controller.n_by_state[ExposureState.DONE]
            refusal = controller.training.find_refusal(n_good, controller.best_run)
            if refusal is None and controller.training.find_wanted(controller.wishes) is not None:
                refusal = "one is running, or about to"
            if refusal is not None:
                raise ConfigurationError("--train-cryogem", refusal)
        case _:
            pass


def _require_run(run_id: RunId | None, controller: Controller) -> RunRecord:
    run = None if run_id is None else controller.runs.get(run_id)
    if run is None:
        known = ", ".join(controller.runs) or "it has none yet"
        raise ConfigurationError("decide", f"it names a run of this session ({known})", run_id)
    return run


def _undo(decision_id: str, controller: Controller, at: float, reason: str, request_id: str) -> Event:
    """Return the event that says what was before a decision."""
    wishes = controller.wishes
    decision = wishes.find(decision_id)
    if decision is None:
        known = f"d1 to d{len(wishes.history)}" if wishes.history else "it has none yet"
        raise ConfigurationError("decide", f"an undo names a decision of this session ({known})", decision_id)
    if (undo := wishes.find_undo_of(decision_id)) is not None:
        rule = f"it was taken back by {undo.decision_id}; undo that to bring it back"
        raise ConfigurationError(decision_id, rule)
    content = decision.content
    if isinstance(content, LimitsChange):
        return QualityLimitsChanged(
            at=at,
            limits=wishes.limits_without(decision_id),
            reason=reason,
            request_id=request_id,
            undoes=decision_id,
        )
    if isinstance(content, OverruleChange):
        word = wishes.word_without(content.exposure_id, decision_id)
        return ExposureOverruled(
            at=at,
            exposure_id=content.exposure_id,
            is_accepted=word.is_accepted,
            reason=reason or word.reason,
            request_id=request_id,
            undoes=decision_id,
        )
    if content.kind is WishKind.FORCE_RUN:
        _require_unfinished(decision_id, controller)
    return SessionDecided(
        at=at,
        wish=Wish(kind=WishKind.UNDO, decision_id=decision_id),
        reason=reason,
        request_id=request_id,
    )


def _require_unfinished(decision_id: str, controller: Controller) -> None:
    """Raise when the runs that a decision asked for are over: there is nothing left to stop."""
    for campaign in controller.campaigns.values():
        if decision_id in campaign.asked_by and not campaign.is_active:
            runs = ", ".join(run.run_id for run in campaign.runs) or "none"
            rule = f"a run is taken back while it is in work; its runs ({runs}) are over: --reject-run leaves a map out"
            raise ConfigurationError(decision_id, rule)


def take_inbox(inbox: Inbox, controller: Controller, at: float, commit: Callable[[Event], None]) -> None:
    """Commit the event of every request that waits, each once; what cannot be taken is refused.

    `commit` writes an event to the journal and gives it to the controller before it returns.
    """
    for letter in inbox.read():
        if letter.request_id not in controller.request_ids:
            try:
                event = _event_for_letter(letter, controller, at)
            except IcestreamError as error:
                log.warning("request_refused", file=letter.path.name, reason=str(error))
                inbox.refuse(letter, str(error))
                continue
            commit(event)
        inbox.accept(letter)


def _event_for_letter(letter: Letter, controller: Controller, at: float) -> Event:
    if letter.request is None:
        raise InputError(letter.path.name, letter.fault)
    return event_for_request(letter.request, controller, at, request_id=letter.request_id)
