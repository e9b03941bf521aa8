"""When a file has come to rest: a pure state machine over what was seen of it.

A file has settled when two looks at it, at least `settle_s` apart by the caller's monotonic clock, agree in
size, mtime and inode. Only *change* counts: clocks of microscope, file server and this machine may differ,
and mtimes may lie in the future. A settled file is handed out once, for its reader to judge; a file that the
reader finds incomplete goes on waiting and is judged again after pauses that double, until it has not
changed for `give_up_s`: then the reader's reason stands. A file that changes after its verdict starts anew.

No clock, no file system, no thread in here.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


@dataclass(frozen=True, slots=True)
class FileStat:
    """What `stat` says of a file, as far as a change shows in it."""

    size_bytes: int
    mtime_ns: int
    inode: int


UNREADABLE_STAT = FileStat(-1, 0, 0)
"""Stands for a file that is there and whose `stat` fails (a loop of links, a forbidden folder)."""


class FileState(Enum):
    """Where a file is on its way."""

    WAITING = "waiting"
    CHECKING = "checking"
    ACCEPTED = "accepted"
    REJECTED = "rejected"


@dataclass(slots=True)
class _Entry:
    stat: FileStat
    state: FileState
    changed_at: float
    observed_at: float
    check_after: float
    n_refusals: int = 0
    reason: str | None = None


class SettleGuard:
    """Follow files until they rest.

    Parameters
    ----------
    settle_s
        Seconds for which size, mtime and inode must not change (0 = hand out at the second look).
    give_up_s
        Seconds without change after which an incomplete file is rejected; at least `settle_s`.
    """

    def __init__(self, settle_s: float, *, give_up_s: float = 60.0) -> None:
        if settle_s < 0 or give_up_s < settle_s:
            msg = f"settle_s: {settle_s}, give_up_s: {give_up_s}, rule 0 <= settle_s <= give_up_s"
            raise ValueError(msg)
        self._settle_s = settle_s
        self._give_up_s = give_up_s
        self._entries: dict[str, _Entry] = {}
        self._waiting: dict[str, _Entry] = {}
        self._checking: set[str] = set()

    def observe(self, path: str, size_bytes: int, mtime_ns: int, inode: int, now: float) -> FileState:
        """Take note of what a look at the file showed, and return where the file is now."""
        stat = FileStat(size_bytes, mtime_ns, inode)
        entry = self._entries.get(path)
        if entry is None:
            entry = _Entry(stat, FileState.WAITING, now, now, now + self._settle_s)
            self._entries[path] = entry
            self._waiting[path] = entry
        elif entry.stat != stat:
            entry.stat = stat
            entry.state = FileState.WAITING
            entry.changed_at = entry.observed_at = now
            entry.check_after = now + self._settle_s
            entry.n_refusals = 0
            entry.reason = None
            self._waiting[path] = entry
            self._checking.discard(path)
        else:
            entry.observed_at = now
        return entry.state

    def vanish(self, path: str) -> FileState | None:
        """Forget a file that is gone; return the state in which it was, None when it was not known."""
        self._waiting.pop(path, None)
        self._checking.discard(path)
        entry = self._entries.pop(path, None)
        return None if entry is None else entry.state

    def due(self, now: float) -> list[str]:
        """Return the waiting files whose quiet time is over: look at each again, then ask `settled`."""
        return [path for path, entry in self._waiting.items() if now >= entry.check_after]

    def settled(self, now: float) -> list[tuple[str, FileStat]]:
        """Return files at rest, oldest mtime first; each is in the reader's hands until `accept` or `refuse`."""
        found = [
            (path, entry)
            for path, entry in self._waiting.items()
            if now >= entry.check_after and entry.observed_at >= entry.check_after
        ]
        found.sort(key=lambda pair: (pair[1].stat.mtime_ns, pair[0]))
        for path, entry in found:
            entry.state = FileState.CHECKING
            del self._waiting[path]
            self._checking.add(path)
        return [(path, entry.stat) for path, entry in found]

    def accept(self, path: str, stat: FileStat) -> bool:
        """Note that the reader took the file; False when it has changed or gone since (then it starts anew)."""
        entry = self._judged(path, stat)
        if entry is None:
            return False
        entry.state = FileState.ACCEPTED
        return True

    def reject(self, path: str, stat: FileStat, reason: str) -> bool:
        """Note a verdict that waiting will not change; False when the file has changed or gone since."""
        entry = self._judged(path, stat)
        if entry is None:
            return False
        entry.state = FileState.REJECTED
        entry.reason = reason
        return True

    def refuse(self, path: str, stat: FileStat, reason: str, now: float) -> bool:
        """Note that the file is not (yet) valid; True when it has been so for `give_up_s`: it is rejected."""
        entry = self._judged(path, stat)
        if entry is None:
            return False
        entry.reason = reason
        quiet_s = now - entry.changed_at
        if quiet_s >= self._give_up_s:
            entry.state = FileState.REJECTED
            return True
        entry.n_refusals += 1
        pause = max(self._settle_s, 0.05) * 2.0 ** min(entry.n_refusals, 16)
        entry.check_after = min(now + pause, entry.changed_at + self._give_up_s)
        entry.state = FileState.WAITING
        self._waiting[path] = entry
        return False

    def postpone(self, path: str, stat: FileStat, now: float) -> None:
        """Take a file back that could not be judged (the machine's fault); it is handed out again later."""
        entry = self._judged(path, stat)
        if entry is not None:
            entry.state = FileState.WAITING
            entry.check_after = now + max(self._settle_s, 0.05)
            self._waiting[path] = entry

    def quiet_s(self, path: str, now: float) -> float:
        """Return for how long the file has not changed."""
        entry = self._entries.get(path)
        return 0.0 if entry is None else now - entry.changed_at

    def reason(self, path: str) -> str | None:
        """Return why the file was refused last, None when it was not."""
        entry = self._entries.get(path)
        return None if entry is None else entry.reason

    def state(self, path: str) -> FileState | None:
        """Return where the file is, None when it is not known."""
        entry = self._entries.get(path)
        return None if entry is None else entry.state

    @property
    def n_unsettled(self) -> int:
        """Number of files without a verdict."""
        return len(self._waiting) + len(self._checking)

    def _judged(self, path: str, stat: FileStat) -> _Entry | None:
        entry = self._entries.get(path)
        if entry is None or entry.stat != stat or entry.state is not FileState.CHECKING:
            return None
        self._checking.discard(path)
        return entry
