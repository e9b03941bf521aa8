"""How a person's requests reach a session: by the inbox of the service that runs, or else straight to the journal."""

from __future__ import annotations

import time
from collections.abc import Sequence

from stream.records.errors import ConfigurationError, InputError
from stream.records.wishes import WishKind
from stream.store.inbox import Inbox, Request, WishRequest
from stream.store.layout import OutputLayout

ANSWER_TIMEOUT_S = 10.0
"""The service looks into its inbox once a second, between two turns of its loop."""


def deliver(layout: OutputLayout, requests: Sequence[Request]) -> str:
    """Commit the requests and write the exports anew, or leave it to the service that holds the journal.

    Return which of the two it was.
    """
    from stream.control.controller import Controller
    from stream.exports import write_exports
    from stream.records.events import Event
    from stream.requests import event_for_request, take_inbox
    from stream.status import read_controller_settings
    from stream.store.journal import Journal, JournalInUseError

    inbox = Inbox(layout.inbox)
    try:
        journal = Journal(layout.journal)
    except JournalInUseError:
        _post(inbox, requests)
        return "service"
    with journal:
        if any(_needs_service(request) for request in requests):
            rule = (
                f"a run needs the service, and none runs here: icestream run {layout.session}, then ask again"
            )
            raise ConfigurationError(layout.root, rule)
        controller = Controller(read_controller_settings(layout))
        for event in journal.replay():
            controller.handle(event)

        def commit(event: Event) -> None:
            journal.append([event])
            controller.handle(event)

        # What was asked for earlier and never taken comes first, so that the last word is the last event.
        take_inbox(inbox, controller, time.time(), commit)
        for request in requests:
            commit(event_for_request(request, controller, time.time()))
        if layout.exports.is_dir():
            write_exports(layout, controller)
    return "journal"


def _needs_service(request: Request) -> bool:
    return isinstance(request, WishRequest) and request.wish.kind is WishKind.FORCE_RUN


def _post(inbox: Inbox, requests: Sequence[Request]) -> None:
    """Leave requests for the service and wait for its answer to each."""
    waiting = [inbox.post(request) for request in requests]
    deadline = time.monotonic() + ANSWER_TIMEOUT_S
    while waiting:
        outcomes = {name: inbox.find_outcome(name) for name in waiting}
        for name, outcome in outcomes.items():
            if outcome:
                raise InputError(name, f"the service refused it: {outcome}")
        waiting = [name for name, outcome in outcomes.items() if outcome is None]
        if waiting and time.monotonic() > deadline:
            rule = f"the service takes requests within {ANSWER_TIMEOUT_S:g} s; they wait for it in the inbox"
            raise InputError(waiting[0], rule)
        time.sleep(0.1)
