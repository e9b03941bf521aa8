"""The session's exports: which exposures, scores and poses they are made of."""

from __future__ import annotations

from stream.control.controller import Controller
from stream.sinks.exporter import ExportResult, export_session
from stream.store.layout import OutputLayout


def write_exports(layout: OutputLayout, controller: Controller) -> ExportResult:
    """Write the STAR and .cs files of the exposures in use, with the accepted map's poses when there is one."""
    best = controller.best_run
    return export_session(
        layout,
        controller.list_members(),
        model_hash=controller.model_hash,
        run_id=None if best is None else best.run_id,
    )
