"""Structured logs on the standard library's `logging`: an event's name and its fields, one line each.

    log = get_logger(__name__)
    log.info("movie_aligned", movie="FoilHole_1", seconds=3.2)

gives `2026-01-01T12:00:00.000Z info stream.app movie_aligned movie=FoilHole_1 seconds=3.2` on stderr, or one
JSON document per line. Everything passes `redact`, so a secret in a field, a text or a traceback becomes
`***`. Nothing is configured on import; the process that owns stderr calls `configure_logging` once.
"""

from __future__ import annotations

import json
import logging
import math
import re
import sys
from datetime import UTC, datetime
from typing import Any, TextIO

_ROOT_NAMES = ("stream", "actors", "models")
_FIELDS = "icestream_fields"
_HIDDEN = "***"
_RECORD_NAMES = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName", _FIELDS}
"""What `logging` itself puts on a record; anything else is a field that a plain call gave by `extra`, but for private
names, which libraries put there (Ray stamps every record of the process)."""

_SECRET_NAME = re.compile(
    r"(?:^|_)(?:token|secret|password|passwd|passphrase|api_?key|license_?id|authorization|credentials?|cookie)(?:_|$)",
    re.IGNORECASE,
)
_SECRET_TEXT = (
    (re.compile(r"\b(bearer|basic)\s+[\w.~+/=-]{4,}", re.IGNORECASE), rf"\1 {_HIDDEN}"),
    (re.compile(r"(://[^/\s:@]*):[^/\s@]+@"), rf"\1:{_HIDDEN}@"),
    (
        re.compile(
            r"([\w-]*(?:token|secret|password|passwd|api[_-]?key|license[_-]?id))([\"']?\s*[=:]\s*[\"']?)[^\s\"',;&}]+",
            re.IGNORECASE,
        ),
        rf"\1\2{_HIDDEN}",
    ),
)
_NEEDS_QUOTES = re.compile(r"[\s=\"\\]|^$")


class EventLogger:
    """Logs events by name with fields; a thin face of one `logging.Logger`."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger

    def debug(self, event: str, **fields: object) -> None:
        """Log a detail that only a developer wants."""
        self._log(logging.DEBUG, event, fields)

    def info(self, event: str, **fields: object) -> None:
        """Log something that happened as it should."""
        self._log(logging.INFO, event, fields)

    def warning(self, event: str, **fields: object) -> None:
        """Log something that an operator should know; the stream goes on."""
        self._log(logging.WARNING, event, fields)

    def error(self, event: str, **fields: object) -> None:
        """Log a failure."""
        self._log(logging.ERROR, event, fields)

    def exception(self, event: str, **fields: object) -> None:
        """Log a failure with the exception that is being handled."""
        self._log(logging.ERROR, event, fields, is_handling=True)

    def _log(self, level: int, event: str, fields: dict[str, object], *, is_handling: bool = False) -> None:
        if self._logger.isEnabledFor(level):
            # stacklevel 3 points the record at the caller of debug/info/…, past the two frames here.
            self._logger.log(level, event, exc_info=is_handling, extra={_FIELDS: fields}, stacklevel=3)


def get_logger(name: str) -> EventLogger:
    """Return the event logger of a module."""
    return EventLogger(logging.getLogger(name))


def configure_logging(
    *,
    level: str = "info",
    as_json: bool = False,
    stream: TextIO | None = None,
    secrets: tuple[str, ...] = (),
) -> None:
    """Send our packages' logs to `stream` (stderr unless given); calling again replaces the former set-up.

    Parameters
    ----------
    level
        Lowest level shown: debug, info, warning or error.
    as_json
        One JSON document per line in place of `key=value`.
    stream
        Where to write.
    secrets
        Values (tokens, licence ids) that must not appear in any line, wherever they come from.
    """
    handler = logging.StreamHandler(stream if stream is not None else sys.stderr)
    handler.setFormatter(_JsonFormatter(secrets) if as_json else _KeyValueFormatter(secrets))
    for name in _ROOT_NAMES:
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(level.upper())
        logger.propagate = False


def redact(text: str, secrets: tuple[str, ...] = ()) -> str:
    """Replace known secret values, bearer tokens, passwords in URLs and `token=…` pairs by `***`."""
    for secret in secrets:
        if secret:
            text = text.replace(secret, _HIDDEN)
    for pattern, replacement in _SECRET_TEXT:
        text = pattern.sub(replacement, text)
    return text


class _EventFormatter(logging.Formatter):
    def __init__(self, secrets: tuple[str, ...]) -> None:
        super().__init__()
        self._secrets = secrets

    def fields(self, record: logging.LogRecord) -> dict[str, Any]:
        """Return the record's fields with secrets replaced; values are JSON's own types."""
        raw: dict[str, object] = {
            k: v for k, v in vars(record).items() if k not in _RECORD_NAMES and k[0] != "_"
        }
        raw |= getattr(record, _FIELDS, {})
        if record.exc_info and record.exc_info[1] is not None:
            raw["error"] = f"{type(record.exc_info[1]).__name__}: {record.exc_info[1]}"
            raw["traceback"] = self.formatException(record.exc_info)
        return {name: self._clean(name, value) for name, value in raw.items()}

    def event(self, record: logging.LogRecord) -> str:
        """Return the event's name, or the message of a plain `logging` call."""
        return redact(record.getMessage(), self._secrets)

    def _clean(self, name: str, value: object) -> object:
        if _SECRET_NAME.search(name):
            return _HIDDEN
        if value is None or isinstance(value, (bool, int)):
            return value
        if isinstance(value, float):
            return value if math.isfinite(value) else str(value)
        return redact(str(value), self._secrets)


class _KeyValueFormatter(_EventFormatter):
    def format(self, record: logging.LogRecord) -> str:
        """Return `time level logger event key=value …` on one line."""
        fields = self.fields(record)
        # A traceback is for the JSON log; here the error's own line names item, value and rule.
        fields.pop("traceback", None)
        pairs = [f"{name}={_quote(value)}" for name, value in fields.items()]
        head = [_utc(record), record.levelname.lower(), record.name, _quote_event(self.event(record))]
        return " ".join(head + pairs)


class _JsonFormatter(_EventFormatter):
    def format(self, record: logging.LogRecord) -> str:
        """Return one JSON document on one line."""
        document = {
            "at": _utc(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": self.event(record),
            "fields": self.fields(record),
        }
        return json.dumps(document, ensure_ascii=False)


def _utc(record: logging.LogRecord) -> str:
    moment = datetime.fromtimestamp(record.created, UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.") + f"{int(record.msecs):03d}Z"


def _quote(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.6g}"
    text = "null" if value is None else str(value)
    return json.dumps(text, ensure_ascii=False) if _NEEDS_QUOTES.search(text) else text


def _quote_event(text: str) -> str:
    """Keep the event readable but on one line."""
    return text.replace("\r", "\\r").replace("\n", "\\n")
