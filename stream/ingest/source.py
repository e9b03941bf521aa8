"""Where exposures come from: watcher, settle guard and readers behind one call, `poll`.

`poll(now)` never waits for a file: it drains the watcher, looks again at files whose quiet time is over, hands
a bounded number of them to reader threads and returns the events of those that are done. Clocks: `now` is
wall-clock time and only stamps events; settling is measured by a monotonic clock handed in at the start. Failure: a bad file is a `FileRejected` with one
line; a file that vanishes before its verdict is dropped (it never was an exposure); a watched folder that
vanishes shows in `problem` until it is back.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from stream.ingest.eer import EerUpsampling
from stream.ingest.files import fingerprint_file, translate_os_error
from stream.ingest.gain import GainConvention
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

SourceEvent = ExposureFound | FileRejected

DEFAULT_INCLUDE: dict[InputKind, tuple[str, ...]] = {
    InputKind.MOVIE: ("*.tif", "*.tiff", "*.mrc", "*.mrcs", "*.eer", "*.st"),
    InputKind.MICROGRAPH: ("*.mrc",),
    InputKind.PARTICLES: (),
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
    paths in it are relative, where that is not one of its parents; without `require_ctf` particles are taken that
    can be scored but not reconstructed (bare stacks). `metadata_wait_s` is how long a movie waits
    for its EPU XML or mdoc. Where the gain's orientation is sought, its shape may be the movie's turned by 90 degrees.
    `n_readers` threads judge files, at most `max_in_check` at a time.
    """

    root: Path
    kind: InputKind
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    recursive: bool = True
    observer: ObserverKind = "auto"
    settle_s: float = 5.0
    give_up_s: float = 60.0
    poll_interval_s: float = 5.0
    rescan_interval_s: float = 30.0
    metadata_wait_s: float = 0.0
    pixel_size_angstrom: float | None = None
    voltage_kv: float | None = None
    dose_e_per_angstrom2: float | None = None
    is_super_resolution: bool = False
    gain: Path | None = None
    gain_flip_x: bool = False
    gain_flip_y: bool = False
    gain_rotate_deg: int = 0
    gain_convention: GainConvention = "auto"
    is_gain_orientation_sought: bool = False
    eer_upsampling: EerUpsampling = 1
    particle_root: Path | None = None
    require_ctf: bool = True
    n_readers: int = 2
    max_in_check: int = 16

    @property
    def expected(self) -> ExpectedAcquisition:
        """What each movie's own metadata must agree with."""
        return ExpectedAcquisition(
            pixel_size_angstrom=self.pixel_size_angstrom,
            voltage_kv=self.voltage_kv,
            dose_e_per_angstrom2=self.dose_e_per_angstrom2,
            allow_factor_two=self.is_super_resolution,
        )

    @property
    def gain_settings(self) -> GainSettings | None:
        """How the gain reference lies; None without one, and for input that is corrected already."""
        if self.gain is None or self.kind is not InputKind.MOVIE:
            return None
        return GainSettings(
            path=self.gain,
            flip_x=self.gain_flip_x,
            flip_y=self.gain_flip_y,
            rotate_deg=self.gain_rotate_deg,
            convention=self.gain_convention,
            is_orientation_sought=self.is_gain_orientation_sought,
            eer_upsampling=self.eer_upsampling,
        )


@dataclass(frozen=True, slots=True)
class KnownFile:
    """What the journal already has: found or rejected, under this name, with this file.

    `is_offered_again` keeps the name but judges the file anew (see `is_about_settings`).
    """

    exposure_id: ExposureId
    name: str
    file: FileIdentity
    is_offered_again: bool = False


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
    monotonic
        The clock by which files settle.
    """

    def __init__(
        self,
        settings: SourceSettings,
        *,
        known: Iterable[KnownFile] = (),
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._monotonic = monotonic
        self._is_file = settings.kind is InputKind.PARTICLES
        self._root = settings.root.absolute()
        self._base = self._root.parent if self._is_file else self._root
        self._guard = SettleGuard(settings.settle_s, give_up_s=max(settings.give_up_s, settings.settle_s))
        gain = settings.gain_settings
        self._gain = None if gain is None else GainCheck(gain)
        self._names: dict[str, ExposureId] = {}
        self._name_of: dict[ExposureId, str] = {}
        self._offered: dict[str, FileStat] = {}
        self._unreadable: set[str] = set()
        self._known_files: dict[ExposureId, FileStat] = {}
        for item in known:
            self._names[item.name] = item.exposure_id
            self._name_of[item.exposure_id] = item.name
            if item.is_offered_again:
                continue
            self._known_files[item.exposure_id] = _stat_of(item.file)
            if not self._is_file:  # of a particle file, the journal may have only some of its exposures
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
        self._is_started = False

    def _make_watcher(self) -> FolderWatcher:
        s = self._settings
        exclude = (*DEFAULT_EXCLUDE, *s.exclude)
        if s.gain is not None and s.gain.absolute().is_relative_to(self._root):
            exclude = (*exclude, "./" + s.gain.absolute().relative_to(self._root).as_posix())
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
    def is_quiet(self) -> bool:
        """Whether the first scan is over and every file that has been noticed has its verdict."""
        return self._has_polled and self._problem is None and self.n_pending == 0

    def start(self) -> None:
        """Begin to watch; files that are already there come with the first polls. The first `poll` does it, too.

        Raises
        ------
        ConfigurationError
            The folder (or particle file) does not exist, or the gain reference is not there.
        """
        if self._is_started:
            return
        gain = self._settings.gain_settings
        if gain is not None and not gain.path.is_file():
            raise ConfigurationError(gain.path, "the gain reference is a file that exists")
        if self._watcher is not None:
            self._watcher.start()
        elif not self._root.is_file():
            raise ConfigurationError(self._root, "the particle file exists")
        self._is_started = True

    def poll(self, now: float) -> list[SourceEvent]:
        """Return what has become certain since the last call, stamped with `now` (seconds since the epoch)."""
        at, now = now, self._monotonic()
        self.start()
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
            self._known_files.pop(derive_exposure_id(Path(path).relative_to(self._base).as_posix()), None)
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
        except OSError as error:
            # A stale handle or an I/O error says nothing about the file: it is looked at again later.
            if not isinstance(translate_os_error(path, error), ResourceError):
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
                exposures = validate_particle_file(
                    path,
                    relative,
                    self._settings.expected,
                    root=self._settings.particle_root,
                    require_ctf=self._settings.require_ctf,
                )
                return _Verdict(tuple(exposures))
            exposure = validate_image_file(
                path,
                relative,
                self._settings.kind,
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
        new = [e for e in exposures if self._known_files.get(e.exposure_id) != stat]
        self._known_files.update({exposure.exposure_id: stat for exposure in new})
        return [ExposureFound(at=at, exposure=self._named(exposure)) for exposure in new]

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
        if self._known_files.get(exposure_id) == stat:
            return []
        self._known_files[exposure_id] = stat
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


def is_about_settings(reason: str) -> bool:
    """Return whether a rejection speaks of the settings, so that a restart with others may take the file."""
    return "agrees with the configuration" in reason or "gain reference" in reason


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
