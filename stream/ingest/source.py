"""Where exposures come from: watcher, settle guard and readers behind one call, `poll`.

`poll(now)` never waits for a file: it drains the watcher, looks again at files whose quiet time is over, hands
a bounded number of them to reader threads and returns the events of those that are done. Clock: `now` is
monotonic and handed in; `at` of the events is wall-clock time. Failure: a bad file is a `FileRejected` with one
line; a file that vanishes before its verdict is dropped (it never was an exposure); a watched folder that
vanishes shows in `problem` until it is back.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from stream.ingest.files import fingerprint_file
from stream.ingest.settle import UNREADABLE_STAT, FileStat, FileState, SettleGuard
from stream.ingest.validation import (
    ExpectedAcquisition,
    GainCheck,
    GainSettings,
    validate_image_file,
    validate_particle_file,
)
from stream.ingest.watcher import FolderWatcher, NoticeKind, ObserverKind
from stream.records.errors import ConfigurationError, IcestreamError, InputError, ResourceError
from stream.records.events import ExposureFound, FileRejected
from stream.records.particles import derive_exposure_id
from stream.records.values import Exposure, ExposureId, FileIdentity, InputKind

SourceKind = Literal["movies", "micrographs", "particles"]
SourceEvent = ExposureFound | FileRejected

DEFAULT_INCLUDE: dict[str, tuple[str, ...]] = {
    "movies": ("*.tif", "*.tiff", "*.mrc", "*.mrcs", "*.eer", "*.st"),
    "micrographs": ("*.mrc",),
    "particles": (),
}
DEFAULT_EXCLUDE = (
    "CountRef_*",
    "SuperRef_*",
    "*GainReference*",
    "*_gain.mrc",
    "gain.mrc",
    "gain.tif",
    "gain.tiff",
)
"""References that SerialEM, EPU and our simulator leave among the movies."""

UNREADABLE = "unreadable"
"""Fingerprint of a file that could not be read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceSettings:
    """What to watch and how; empty `include` means the usual names of this kind of input.

    `root` is a folder, or for particles the STAR, .cs or .mrcs file; `particle_root` is the folder to which
    paths in it are relative, where that is not one of its parents. `metadata_wait_s` is how long a movie waits
    for its EPU XML or mdoc. `n_readers` threads judge files, at most `max_in_check` at a time.
    """

    root: Path
    kind: SourceKind
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    recursive: bool = True
    observer: ObserverKind = "auto"
    settle_s: float = 5.0
    give_up_s: float = 60.0
    poll_interval_s: float = 5.0
    rescan_interval_s: float = 30.0
    metadata_wait_s: float = 0.0
    expected: ExpectedAcquisition = field(default_factory=ExpectedAcquisition)
    gain: GainSettings | None = None
    particle_root: Path | None = None
    n_readers: int = 2
    max_in_check: int = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownExposure:
    """What the journal already has: found or rejected, under this name, with this file."""

    exposure_id: ExposureId
    name: str
    file: FileIdentity


@dataclass(frozen=True, slots=True)
class _Verdict:
    exposures: tuple[Exposure, ...] = ()
    error: IcestreamError | None = None


class ExposureSource:
    """Offer each valid exposure once, and each change of a file again.

    Parameters
    ----------
    known
        What earlier runs of the service were offered; a file that has not changed since is not offered again.
    """

    def __init__(self, settings: SourceSettings, *, known: Iterable[KnownExposure] = ()) -> None:
        self._settings = settings
        self._is_file = settings.kind == "particles"
        self._root = settings.root.absolute()
        self._base = self._root.parent if self._is_file else self._root
        self._guard = SettleGuard(settings.settle_s, give_up_s=max(settings.give_up_s, settings.settle_s))
        self._gain = None if settings.gain is None else GainCheck(settings.gain)
        self._names: dict[str, ExposureId] = {}
        self._name_of: dict[ExposureId, str] = {}
        self._offered: dict[str, FileStat] = {}
        self._unreadable: set[str] = set()
        for item in known:
            self._names[item.name] = item.exposure_id
            self._name_of[item.exposure_id] = item.name
            self._offered[item.file.path] = _stat_of(item.file)
            if item.file.fingerprint == UNREADABLE:
                self._unreadable.add(item.file.path)
        self._watcher = None if self._is_file else self._make_watcher()
        self._pool = ThreadPoolExecutor(max_workers=settings.n_readers, thread_name_prefix="icestream-ingest")
        self._queue: list[tuple[str, FileStat]] = []
        self._in_check: dict[str, tuple[FileStat, Future[_Verdict]]] = {}
        self._problem: str | None = None
        self._dropped: list[str] = []
        self._next_retry = 0.0
        self._has_polled = False

    def _make_watcher(self) -> FolderWatcher:
        s = self._settings
        exclude = (*DEFAULT_EXCLUDE, *s.exclude)
        if s.gain is not None and s.gain.path.absolute().is_relative_to(self._root):
            exclude = (*exclude, s.gain.path.absolute().relative_to(self._root).as_posix())
        return FolderWatcher(
            self._root,
            include=s.include or DEFAULT_INCLUDE[s.kind],
            exclude=exclude,
            recursive=s.recursive,
            observer=s.observer,
            poll_interval_s=s.poll_interval_s,
            rescan_interval_s=s.rescan_interval_s,
        )

    @property
    def problem(self) -> str | None:
        """Why nothing can be noticed now (the watched folder is gone), None when all is well."""
        return self._problem

    @property
    def observer_kind(self) -> str:
        """The observer in use."""
        return "file" if self._watcher is None else self._watcher.observer_kind

    @property
    def n_pending(self) -> int:
        """Number of files without a verdict: settling, queued or being read."""
        return self._guard.n_unsettled

    @property
    def is_idle(self) -> bool:
        """Whether every file that has been noticed has its verdict."""
        return self._has_polled and self._problem is None and self.n_pending == 0

    def start(self) -> None:
        """Begin to watch; files that are already there come with the first polls.

        Raises
        ------
        ConfigurationError
            The folder (or particle file) does not exist, or the gain reference is not there.
        """
        gain = self._settings.gain
        if gain is not None and not gain.path.is_file():
            raise ConfigurationError(gain.path, "the gain reference is a file that exists")
        if self._watcher is not None:
            self._watcher.start()
        elif not self._root.is_file():
            raise ConfigurationError(self._root, "the particle file exists")

    def poll(self, now: float, *, at: float | None = None) -> list[SourceEvent]:
        """Return what has become certain since the last call.

        Parameters
        ----------
        now
            Monotonic seconds.
        at
            Seconds since the epoch for the events; the system's clock when None.
        """
        at = time.time() if at is None else at
        self._notice(now)
        self._retry_unreadable(now)
        for path in self._guard.due(now):
            self._look(path, now)
        self._queue.extend(self._guard.settled(now))
        events = self._collect(now, at)
        self._submit(now)
        self._has_polled = True
        return events

    def take_dropped(self) -> list[str]:
        """Return one line for each file that vanished before its verdict, since the last call."""
        dropped, self._dropped = self._dropped, []
        return dropped

    def close(self) -> None:
        """Stop watching and reading; files without a verdict are found again by the next start."""
        if self._watcher is not None:
            self._watcher.close()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _notice(self, now: float) -> None:
        if self._watcher is None:
            self._look(str(self._root), now)
            return
        try:
            notices = self._watcher.poll(now)
        except ResourceError as error:
            self._problem = str(error)
            return
        self._problem = None
        for notice in notices:
            if notice.kind is NoticeKind.DELETED:
                self._look(notice.path, now)
            elif notice.stat is not None:
                self._observe(notice.path, notice.stat, now)
            else:
                self._look(notice.path, now)

    def _retry_unreadable(self, now: float) -> None:
        """Offer rejected files anew that can be opened by now: a changed permission shows in no size or mtime."""
        if now < self._next_retry:
            return
        self._next_retry = now + self._settings.rescan_interval_s
        for path in sorted(self._unreadable):
            try:
                Path(path).open("rb").close()
            except OSError:
                continue
            self._unreadable.discard(path)
            self._offered.pop(path, None)
            self._guard.vanish(path)
            self._look(path, now)

    def _look(self, path: str, now: float) -> None:
        try:
            status = Path(path).stat()
        except (FileNotFoundError, NotADirectoryError):
            if Path(path).is_symlink():
                self._observe(path, UNREADABLE_STAT, now)
                return
            if self._guard.vanish(path) in {FileState.WAITING, FileState.CHECKING}:
                self._dropped.append(f"{path}: the file vanished before it had settled")
            return
        except OSError:
            self._observe(path, UNREADABLE_STAT, now)  # the reader names the reason
            return
        self._observe(path, FileStat(status.st_size, status.st_mtime_ns, status.st_ino), now)

    def _observe(self, path: str, stat: FileStat, now: float) -> None:
        if self._offered.get(path) == stat and self._guard.state(path) is None:
            return  # the journal has this very file
        self._guard.observe(path, stat.size_bytes, stat.mtime_ns, stat.inode, now)

    def _submit(self, now: float) -> None:
        free = self._settings.max_in_check - len(self._in_check)
        for path, stat in self._queue[:free]:
            is_awaited = self._guard.quiet_s(path, now) < self._settings.metadata_wait_s
            future = self._pool.submit(self._validate, Path(path), is_metadata_awaited=is_awaited)
            self._in_check[path] = (stat, future)
        del self._queue[:free]

    def _validate(self, path: Path, *, is_metadata_awaited: bool) -> _Verdict:
        """Judge one file; runs in a reader thread."""
        relative = path.relative_to(self._base).as_posix()
        try:
            if self._is_file:
                return _Verdict(
                    tuple(validate_particle_file(path, relative, root=self._settings.particle_root))
                )
            kind = InputKind.MOVIE if self._settings.kind == "movies" else InputKind.MICROGRAPH
            exposure = validate_image_file(
                path,
                relative,
                kind,
                expected=self._settings.expected,
                gain=self._gain,
                is_metadata_awaited=is_metadata_awaited,
            )
        except IcestreamError as error:
            return _Verdict(error=error)
        except OSError as error:
            return _Verdict(error=ResourceError(path, "the file system answers when the file is read", error))
        return _Verdict((exposure,))

    def _collect(self, now: float, at: float) -> list[SourceEvent]:
        events: list[SourceEvent] = []
        for path in [path for path, (_, future) in self._in_check.items() if future.done()]:
            stat, future = self._in_check.pop(path)
            verdict = future.result()
            if verdict.error is None:
                events.extend(self._accept(path, stat, verdict.exposures, at))
            else:
                events.extend(self._refuse(path, stat, verdict.error, now, at))
        return events

    def _accept(
        self, path: str, stat: FileStat, exposures: tuple[Exposure, ...], at: float
    ) -> list[SourceEvent]:
        # A file that changed while it was read has an identity other than the one that settled.
        read = _stat_of(exposures[0].file)
        if read != stat:
            self._guard.postpone(path, stat, 0.0)
            return []
        if not self._guard.accept(path, stat):
            return []
        self._offered[path] = stat
        return [ExposureFound(at=at, exposure=self._named(exposure)) for exposure in exposures]

    def _refuse(
        self, path: str, stat: FileStat, error: IcestreamError, now: float, at: float
    ) -> list[SourceEvent]:
        if isinstance(error, InputError):
            is_final = self._guard.refuse(path, stat, str(error), now)
        elif isinstance(error, ConfigurationError):
            is_final = self._guard.reject(path, stat, str(error))
        else:
            self._guard.postpone(path, stat, now)
            return []
        if not is_final:
            return []
        self._offered[path] = stat
        exposure_id = derive_exposure_id(Path(path).relative_to(self._base).as_posix())
        name = self._unique_name(exposure_id, Path(path).stem, is_nested=Path(path).parent != self._base)
        identity = _identify_rejected(path, stat)
        if identity.fingerprint == UNREADABLE:
            self._unreadable.add(path)
        return [FileRejected(at=at, exposure_id=exposure_id, name=name, file=identity, reason=str(error))]

    def _named(self, exposure: Exposure) -> Exposure:
        is_nested = not self._is_file and Path(exposure.file.path).parent != self._base
        name = self._unique_name(exposure.exposure_id, exposure.name, is_nested=is_nested)
        return replace(exposure, name=name)

    def _unique_name(self, exposure_id: ExposureId, stem: str, *, is_nested: bool) -> str:
        """The stem where it is free and the file lies directly in the root, else with six digits of the id."""
        if exposure_id in self._name_of:
            return self._name_of[exposure_id]
        name = stem
        if is_nested or name in self._names:
            name = f"{stem}_{exposure_id[:6]}"
        if name in self._names:
            name = f"{stem}_{exposure_id}"
        self._names[name] = exposure_id
        self._name_of[exposure_id] = name
        return name


def _stat_of(file: FileIdentity) -> FileStat:
    return FileStat(file.size_bytes, file.mtime_ns, file.inode)


def _identify_rejected(path: str, stat: FileStat) -> FileIdentity:
    """The identity that was judged; its fingerprint where the file can be read at all."""
    try:
        fingerprint = fingerprint_file(path)
    except IcestreamError:
        fingerprint = UNREADABLE
    return FileIdentity(
        path=path,
        size_bytes=stat.size_bytes,
        mtime_ns=stat.mtime_ns,
        inode=stat.inode,
        fingerprint=fingerprint,
    )
