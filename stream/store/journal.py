"""The journal: every event of a session in one SQLite file, and nothing else is the truth.

Policy: one writer (guarded by a lock file), any number of readers (WAL). `append` returns when the events
are committed to disk; what the controller derives from them is never stored. Payloads are JSON so that a
person with `sqlite3` can read a session; `kind` names the event's class.
"""

from __future__ import annotations

import fcntl
import os
import socket
import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import get_args

import msgspec

from stream.records.errors import ConfigurationError, InvariantError, ResourceError
from stream.records.events import Event

SCHEMA_VERSION = 2
"""2: runs are events. Journals of schema 1 told runs only by their results, and half-sets by the order of arrival."""
_LOCK_NAME = ".icestream.lock"
_EVENT_TYPES = {event_type.__name__: event_type for event_type in get_args(Event)}
_SCHEMA = """
CREATE TABLE IF NOT EXISTS events (
    seq INTEGER PRIMARY KEY,
    at REAL NOT NULL,
    kind TEXT NOT NULL,
    payload TEXT NOT NULL
) STRICT;
"""


class JournalInUseError(ConfigurationError):
    """Another process writes this journal now."""


class Journal:
    """The session's one writer of events.

    Raises `JournalInUseError` while another process holds it.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._lock = _WriterLock(path.parent / _LOCK_NAME)
        try:
            self._connection = _connect(path)
        except sqlite3.DatabaseError as error:
            self._lock.release()
            raise ConfigurationError(path, f"the journal must be a readable SQLite file: {error}") from error
        self._encoder = msgspec.json.Encoder()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def append(self, events: Iterable[Event]) -> None:
        """Commit `events` in order; when this returns they survive a crash.

        Raises `ResourceError` when the disk refuses (full, read-only, gone): the service must then stop,
        because nothing may run whose event is not on disk.
        """
        rows = [(e.at, type(e).__name__, self._encoder.encode(e).decode()) for e in events]
        try:
            with self._connection:
                self._connection.executemany("INSERT INTO events (at, kind, payload) VALUES (?, ?, ?)", rows)
        except sqlite3.OperationalError as error:
            rule = f"an event must be on disk before it takes effect: {error}"
            raise ResourceError(self._path, rule) from error

    def replay(self) -> Iterator[Event]:
        """Yield every event in order of commit."""
        yield from _read_events(self._connection, self._path)

    def close(self) -> None:
        """Close the file and let another service write."""
        self._connection.close()
        self._lock.release()


def read_journal(path: Path) -> Iterator[Event]:
    """Yield every event of a journal that may be in use by a running service."""
    if not path.is_file():
        raise ConfigurationError(path, "an output folder holds a journal (start a session there first)")
    connection = sqlite3.connect(path, timeout=30)
    try:
        # A service that is just starting has made the file and not yet the table.
        if connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'events'").fetchone():
            _check_schema(connection, path)
            yield from _read_events(connection, path)
    except sqlite3.DatabaseError as error:
        raise ConfigurationError(path, f"the journal must be a readable SQLite file: {error}") from error
    finally:
        connection.close()


def is_journal_held(path: Path) -> bool:
    """Tell whether a service writes this journal now.

    The question takes the lock for an instant: a service that starts in that very instant is refused.
    """
    try:
        descriptor = os.open(path.parent / _LOCK_NAME, os.O_RDONLY)
    except OSError:  # nobody has ever written here, or nobody may look
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=30)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    connection.executescript(_SCHEMA)
    try:
        _check_schema(connection, path)
    except ConfigurationError:
        connection.close()
        raise
    connection.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
    return connection


def _check_schema(connection: sqlite3.Connection, path: Path) -> None:
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version not in (0, SCHEMA_VERSION):
        rule = (
            f"this version reads journals of schema {SCHEMA_VERSION}: go on with the version that wrote it, or "
            "process its input anew into another folder"
        )
        raise ConfigurationError(path, rule, f"schema {version}")


def _read_events(connection: sqlite3.Connection, path: Path) -> Iterator[Event]:
    decoders = {name: msgspec.json.Decoder(event_type) for name, event_type in _EVENT_TYPES.items()}
    for seq, kind, payload in connection.execute("SELECT seq, kind, payload FROM events ORDER BY seq"):
        try:
            yield decoders[kind].decode(payload)
        except (KeyError, msgspec.MsgspecError) as error:
            rule = f"event {seq} must be one that this version knows: {error}"
            raise InvariantError(path, rule, kind) from error


class _WriterLock:
    """An advisory lock that the kernel drops when its process dies, however it dies."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(self._descriptor, 200).decode(errors="replace").strip() or "another process"
            os.close(self._descriptor)
            raise JournalInUseError(
                path.parent, "one output folder is written by one service at a time", f"held by {holder}"
            ) from error
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"pid {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def release(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
