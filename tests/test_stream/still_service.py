"""A service that runs on a finished session, with nothing coming in: what a person's request meets."""

from __future__ import annotations

from pathlib import Path

from story import make_settings

from stream.app import Service
from stream.control.controller import Controller
from stream.records.events import Event
from stream.store.journal import Journal
from stream.store.layout import OutputLayout
from stream.telemetry.metrics import Telemetry


class StillSource:
    problem = None
    is_quiet = True

    def poll(self, now: float) -> list[Event]:
        return []

    def take_dropped(self) -> list[str]:
        return []

    def close(self) -> None:
        pass


class StillRuntime:
    worker_restarts: dict[str, int] = {}  # noqa: RUF012 - never written

    def submit(self, command: object) -> None:
        pass

    def poll(self, timeout_s: float) -> list[Event]:
        return []

    def close(self) -> None:
        pass


def open_service(layout: OutputLayout, folder: Path) -> Service:
    """Return a service on the session of `layout`; its clock goes a second further at every look."""
    settings = make_settings(folder)
    journal = Journal(layout.journal)
    controller = Controller(settings.controller_settings(n_preprocess_workers=1))
    telemetry = Telemetry("test")
    for event in journal.replay():
        controller.handle(event)
        telemetry.observe(event, replay=True)
    ticks = iter(range(1_000_000))
    service = Service(
        settings,
        controller=controller,
        journal=journal,
        source=StillSource(),
        runtime=StillRuntime(),
        telemetry=telemetry,
        clock=lambda: float(next(ticks)),
    )
    service.open()
    return service
