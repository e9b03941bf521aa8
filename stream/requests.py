"""From what a person asks for to the event that makes it so."""

from __future__ import annotations

from collections.abc import Callable

from stream.config import parse_limits
from stream.control.controller import Controller
from stream.records.errors import ConfigurationError, IcestreamError, InputError
from stream.records.events import Event, ExposureOverruled, QualityLimitsChanged
from stream.store.inbox import Inbox, Letter, LimitsRequest, Request
from stream.telemetry.logs import get_logger

log = get_logger(__name__)


def event_for_request(request: Request, controller: Controller, at: float, *, request_id: str = "") -> Event:
    """Return the event that a request asks for, or raise with the name or key, the value and the rule."""
    if isinstance(request, LimitsRequest):
        limits = parse_limits(request.limits, item="limits")
        return QualityLimitsChanged(at=at, limits=limits, reason=request.reason, request_id=request_id)
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
