"""The streaming service: records, controller, ingest, store, exports, telemetry and commands."""

__version__ = "0.1.0"
