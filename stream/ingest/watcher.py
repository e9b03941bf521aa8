"""Which files appear, change and go below a folder: watchdog's observers behind a queue that is pulled.

Threads: the observer's own, and one for rescans; both only put notices into a queue. `poll` never waits for
the file system, apart from one `stat` of the root. Nothing here judges a file: two notices for one event, or
a notice for a file that is gone again, are normal. A rescan at intervals is the safety net under both
observers (lost inotify events, folders moved in whole, files written before their folder was watched).

Failure: a root that is missing at `start` is a `ConfigurationError`; one that vanishes later (unmounted
share) is a `ResourceError` from each `poll` until it is back, and then it is watched and scanned anew.
"""

from __future__ import annotations

import fnmatch
import os
import queue
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Literal

from watchdog.events import FileSystemEvent, FileSystemEventHandler
from watchdog.observers.api import BaseObserver
from watchdog.observers.polling import PollingObserver

from stream.ingest.mounts import find_file_system, is_network_file_system
from stream.ingest.settle import UNREADABLE_STAT, FileStat
from stream.records.errors import ConfigurationError, ResourceError

ObserverKind = Literal["auto", "inotify", "polling"]

_TEMPORARY_SUFFIXES = (
    ".tmp",
    ".temp",
    ".part",
    ".partial",
    ".filepart",
    ".crdownload",
    ".incomplete",
    ".lock",
    "~",
)
_TEMPORARY_PREFIXES = (".", "~")


class NoticeKind(Enum):
    """What was noticed; FOUND comes from a scan, MOVED carries the new path."""

    FOUND = "found"
    CREATED = "created"
    MODIFIED = "modified"
    CLOSED = "closed"
    MOVED = "moved"
    DELETED = "deleted"


@dataclass(frozen=True, slots=True, kw_only=True)
class FileNotice:
    """One file that may have changed; `stat` is set when a scan saw it."""

    path: str
    kind: NoticeKind
    stat: FileStat | None = None


def is_temporary_name(name: str) -> bool:
    """Return whether a name is hidden or one that programs give to files they have not finished."""
    return name.startswith(_TEMPORARY_PREFIXES) or name.lower().endswith(_TEMPORARY_SUFFIXES)


class PathFilter:
    """Glob patterns over paths below a root; case does not matter (microscopes write `.TIF`, too).

    A pattern with a slash is matched against the path relative to the root (a leading `./` says so for a file
    in the root itself), one without against the name.
    """

    def __init__(self, root: Path, include: Sequence[str], exclude: Sequence[str]) -> None:
        # Strings and compiled patterns: this runs for every event of the folder, in the observer's thread.
        self._prefix = f"{str(root).rstrip('/')}/"
        self._include = _compile(include)
        self._exclude = _compile(exclude)

    def is_wanted(self, path: str) -> bool:
        """Return whether the file is an input by its name."""
        if not path.startswith(self._prefix):
            return False
        relative = path[len(self._prefix) :]
        if any(is_temporary_name(part) for part in relative.split("/")):
            return False
        text = relative.lower()
        name = text.rsplit("/", 1)[-1]
        return _is_any(self._include, name, text) and not _is_any(self._exclude, name, text)


_Patterns = tuple[re.Pattern[str] | None, re.Pattern[str] | None]


def _compile(patterns: Sequence[str]) -> _Patterns:
    """One expression for names and one for relative paths; None where there is no such pattern."""
    lowered = [pattern.lower() for pattern in patterns]
    names = [fnmatch.translate(pattern) for pattern in lowered if "/" not in pattern]
    paths = [fnmatch.translate(pattern.removeprefix("./")) for pattern in lowered if "/" in pattern]
    return (re.compile("|".join(names)) if names else None, re.compile("|".join(paths)) if paths else None)


def _is_any(patterns: _Patterns, name: str, text: str) -> bool:
    for_names, for_paths = patterns
    return bool((for_names and for_names.match(name)) or (for_paths and for_paths.match(text)))


class _Handler(FileSystemEventHandler):
    """Turn watchdog's events into notices; runs in the observer's thread."""

    def __init__(
        self, notices: queue.SimpleQueue[FileNotice], wanted: PathFilter, rescan: threading.Event
    ) -> None:
        self._notices = notices
        self._wanted = wanted
        self._rescan = rescan

    def on_any_event(self, event: FileSystemEvent) -> None:
        if event.is_directory:
            # A folder that arrives whole brings files for which no event of their own comes.
            if event.event_type in {"created", "moved", "deleted"}:
                self._rescan.set()
            return
        source, target = os.fsdecode(event.src_path), os.fsdecode(event.dest_path or b"")
        match event.event_type:
            case "moved":
                self._put(source, NoticeKind.DELETED)
                self._put(target, NoticeKind.MOVED)
            case "created":
                self._put(source, NoticeKind.CREATED)
            case "modified":
                self._put(source, NoticeKind.MODIFIED)
            case "closed":
                self._put(source, NoticeKind.CLOSED)
            case "deleted":
                self._put(source, NoticeKind.DELETED)
            case _:
                pass  # opened, closed without writing: nothing changed

    def _put(self, path: str, kind: NoticeKind) -> None:
        if path and self._wanted.is_wanted(path):
            self._notices.put(FileNotice(path=path, kind=kind))


class FolderWatcher:
    """Watch a folder; pull what was noticed with `poll`.

    Parameters
    ----------
    include, exclude
        Glob patterns (see `PathFilter`).
    observer
        "inotify" (local disks), "polling" (anything), or "auto": polling on network file systems.
    poll_interval_s
        Seconds between two looks of the polling observer.
    rescan_interval_s
        Seconds between two rescans of the whole tree.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        recursive: bool = True,
        observer: ObserverKind = "auto",
        poll_interval_s: float = 2.0,
        rescan_interval_s: float = 30.0,
    ) -> None:
        self._root = Path(root).absolute()
        self._wanted = PathFilter(self._root, include, exclude)
        self._recursive = recursive
        self._requested = observer
        self._poll_interval_s = poll_interval_s
        self._rescan_interval_s = rescan_interval_s
        self._notices: queue.SimpleQueue[FileNotice] = queue.SimpleQueue()
        self._rescan_wanted = threading.Event()
        self._observer: BaseObserver | None = None
        self._observer_kind: ObserverKind = observer
        self._scanner: threading.Thread | None = None
        self._seen: dict[str, FileStat] = {}
        self._root_inode: int | None = None
        self._next_rescan: float | None = None
        self._is_closed = False

    @property
    def observer_kind(self) -> ObserverKind:
        """The observer in use ("auto" until `start`)."""
        return self._observer_kind

    def start(self) -> None:
        """Begin to watch, then scan what is already there (in this thread, so that the first poll has it)."""
        try:
            if not self._root.is_dir():
                rule = (
                    "the watched folder is a folder" if self._root.exists() else "the watched folder exists"
                )
                raise ConfigurationError(self._root, rule)
            self._root_inode = self._root.stat().st_ino
        except OSError as error:
            raise ConfigurationError(self._root, "the watched folder can be read", error.strerror) from error
        self._start_observer()
        self._scan()

    def poll(self, now: float) -> list[FileNotice]:
        """Return what was noticed since the last call, at most one notice per path: the last one.

        Raises
        ------
        ResourceError
            The root is gone (share unmounted, folder removed).
        """
        self._check_root()
        self._rescan_when_due(now)
        last: dict[str, FileNotice] = {}
        while True:
            try:
                notice = self._notices.get_nowait()
            except queue.Empty:
                return list(last.values())
            last[notice.path] = notice

    def request_rescan(self) -> None:
        """Have the next `poll` start a rescan."""
        self._rescan_wanted.set()

    def close(self) -> None:
        """Stop watching and end both threads."""
        self._is_closed = True
        self._stop_observer()
        if self._scanner is not None:
            self._scanner.join(timeout=10)

    def _start_observer(self) -> None:
        kind = self._requested
        if kind == "auto":
            kind = "polling" if is_network_file_system(find_file_system(self._root)) else "inotify"
        handler = _Handler(self._notices, self._wanted, self._rescan_wanted)
        try:
            observer = self._make_observer(kind, handler)
        except OSError as error:
            if self._requested == "inotify":
                rule = "the kernel has inotify watches left (fs.inotify.max_user_watches); or use polling"
                raise ResourceError(self._root, rule, error.strerror) from error
            kind = "polling"
            observer = self._make_observer(kind, handler)
        self._observer, self._observer_kind = observer, kind

    def _make_observer(self, kind: ObserverKind, handler: _Handler) -> BaseObserver:
        observer: BaseObserver
        if kind == "inotify":
            from watchdog.observers.inotify import InotifyObserver

            observer = InotifyObserver()
        else:
            observer = PollingObserver(timeout=self._poll_interval_s)
        observer.daemon = True
        observer.schedule(handler, str(self._root), recursive=self._recursive)
        observer.start()
        return observer

    def _stop_observer(self) -> None:
        observer, self._observer = self._observer, None
        if observer is not None and observer.is_alive():
            observer.stop()
            observer.join(timeout=10)

    def _check_root(self) -> None:
        try:
            inode = self._root.stat().st_ino
        except OSError as error:
            self._root_inode = None
            raise ResourceError(self._root, "the watched folder is there", error.strerror) from error
        if inode != self._root_inode:
            # The folder came back, or another one took its place: the old watch holds a dead inode.
            self._root_inode = inode
            self._stop_observer()
            self._start_observer()
            self._rescan_wanted.set()

    def _rescan_when_due(self, now: float) -> None:
        if self._next_rescan is None:
            self._next_rescan = now + self._rescan_interval_s
        is_due = now >= self._next_rescan or self._rescan_wanted.is_set()
        if not is_due or self._is_closed or (self._scanner is not None and self._scanner.is_alive()):
            return
        self._rescan_wanted.clear()
        self._next_rescan = now + self._rescan_interval_s
        self._scanner = threading.Thread(target=self._scan, name="icestream-rescan", daemon=True)
        self._scanner.start()

    def _scan(self) -> None:
        """Note every file that is new, changed or gone since the last scan; only one scan runs at a time."""
        current: dict[str, FileStat] = {}
        for path, stat in _walk(self._root, self._wanted, is_recursive=self._recursive):
            current[path] = stat
            if self._seen.get(path) != stat:
                self._notices.put(FileNotice(path=path, kind=NoticeKind.FOUND, stat=stat))
        if not self._root.is_dir():
            return  # an unmounted share is no reason to forget its files
        for path in self._seen.keys() - current.keys():
            self._notices.put(FileNotice(path=path, kind=NoticeKind.DELETED))
        self._seen = current


def _walk(root: Path, wanted: PathFilter, *, is_recursive: bool) -> Iterator[tuple[str, FileStat]]:
    """Yield wanted files with their stat; folders and files that vanish meanwhile are passed over.

    Symbolic links to files are followed (facilities link movies in); links to folders are not, as they may loop.
    """
    folders = [str(root)]
    while folders:
        try:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    try:
                        if entry.is_dir(follow_symlinks=False):
                            if is_recursive and not is_temporary_name(entry.name):
                                folders.append(entry.path)
                        elif wanted.is_wanted(entry.path):
                            status = entry.stat()
                            yield entry.path, FileStat(status.st_size, status.st_mtime_ns, status.st_ino)
                    except OSError:
                        # A link that leads nowhere or in circles is the reader's to name; give it no stat.
                        if entry.is_symlink():
                            yield entry.path, UNREADABLE_STAT
        except OSError:
            continue
