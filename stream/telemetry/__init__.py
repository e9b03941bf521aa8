"""Metrics and logs: what an operator sees of a running session."""

from stream.telemetry.logs import EventLogger, configure_logging, get_logger, redact
from stream.telemetry.metrics import Snapshot, Telemetry, Volume
from stream.telemetry.series import list_declared_names
from stream.telemetry.server import MetricsServer

__all__ = [
    "EventLogger",
    "MetricsServer",
    "Snapshot",
    "Telemetry",
    "Volume",
    "configure_logging",
    "get_logger",
    "list_declared_names",
    "redact",
]
