"""Benchmark of ingest: files noticed per second, latency from close to event, start on a full folder.

Four measurements in one run on one folder tree: a burst seen by a bare watchdog handler (the baseline) and by
`FolderWatcher`; a paced stream for latency, at the rate of many microscopes; the first scan of a full folder
against `os.scandir` + `stat`; and the whole way of a backlog to validated `ExposureFound` events.
"""

from __future__ import annotations

import os
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from stream.ingest.source import ExposureSource, SourceSettings
from stream.ingest.watcher import FolderWatcher, NoticeKind
from stream.records.events import ExposureFound
from stream.records.values import InputKind

PACED_FILES_PER_S = 100.0
"""More than two hundred microscopes at 1,600 movies/h each; far above what one service sees."""

SETTLE_S = 0.2
POLL_PAUSE_S = 0.01
TIMEOUT_S = 300.0


def make_movie(seed: int) -> bytes:
    """Return a small but whole MRC movie: 2 frames of 16 x 16 bytes."""
    header = bytearray(1024)
    struct.pack_into("<4i", header, 0, 16, 16, 2, 0)
    struct.pack_into("<3i", header, 28, 16, 16, 2)
    header[208:216] = b"MAP DD\0\0"
    frames = np.random.default_rng(seed).poisson(2, (2, 16, 16)).astype(np.int8)
    return bytes(header) + frames.tobytes()


def run_ingest_benchmark(n_files: int, folder: Path) -> dict[str, Any]:
    """Measure ingest with `n_files` files below `folder`; the ratio is that to a bare watchdog handler."""
    data = make_movie(0)
    bare = _measure_burst(folder / "bare", n_files, data, _watch_bare)
    ours = _measure_burst(folder / "ours", n_files, data, _watch_ours)
    paced = _measure_latency(folder / "paced", min(n_files, 1000), data)
    scan = _measure_scan(folder / "ours")
    backlog = _measure_backlog(folder / "ours", n_files)
    return {
        "name": "ingest",
        "value": ours["files_per_s"],
        "unit": "files/s noticed",
        "baseline": f"a watchdog handler that does nothing but note the path: {bare['files_per_s']:.0f} files/s",
        "ratio": ours["files_per_s"] / bare["files_per_s"],
        "n_files": n_files,
        "n_missed": n_files - int(ours["n_noticed"]),
        "write_files_per_s": ours["write_files_per_s"],
        **paced,
        **scan,
        **backlog,
    }


def _write_files(
    folder: Path, n_files: int, data: bytes, per_s: float | None, closed_at: dict[str, float]
) -> None:
    """Write files into ten sub-folders, noting when each was closed."""
    pause = threading.Event()
    started = time.monotonic()
    for number in range(n_files):
        path = folder / f"GridSquare_{number % 10}" / f"m{number:05d}.mrc"
        with path.open("wb") as stream:
            stream.write(data)
        closed_at[str(path)] = time.monotonic()
        if per_s is not None:
            pause.wait(max(0.0, started + (number + 1) / per_s - time.monotonic()))


def _prepare(folder: Path) -> None:
    for number in range(10):
        (folder / f"GridSquare_{number}").mkdir(parents=True)


Noticer = Callable[[Path, int, threading.Event], dict[str, float]]


def _measure_burst(folder: Path, n_files: int, data: bytes, watch: Noticer) -> dict[str, float]:
    """Write as fast as the disk takes it, and see when the last file has been noticed."""
    _prepare(folder)
    is_watching = threading.Event()
    closed_at: dict[str, float] = {}

    def write() -> None:
        is_watching.wait(TIMEOUT_S)
        _write_files(folder, n_files, data, None, closed_at)

    writer = threading.Thread(target=write)
    writer.start()
    noticed_at = watch(folder, n_files, is_watching)
    writer.join()
    first = min(closed_at.values())
    return {
        "files_per_s": len(noticed_at) / (max(noticed_at.values()) - first),
        "write_files_per_s": n_files / (max(closed_at.values()) - first),
        "n_noticed": len(noticed_at),
    }


def _watch_bare(folder: Path, n_files: int, is_watching: threading.Event) -> dict[str, float]:
    from watchdog.events import FileClosedEvent, FileSystemEventHandler
    from watchdog.observers import Observer

    noticed_at: dict[str, float] = {}
    is_done = threading.Event()

    class Handler(FileSystemEventHandler):
        def on_closed(self, event: FileClosedEvent) -> None:
            noticed_at[os.fsdecode(event.src_path)] = time.monotonic()
            if len(noticed_at) == n_files:
                is_done.set()

    observer = Observer()
    observer.schedule(Handler(), str(folder), recursive=True)
    observer.start()
    is_watching.set()
    is_done.wait(TIMEOUT_S)
    observer.stop()
    observer.join()
    return noticed_at


def _watch_ours(folder: Path, n_files: int, is_watching: threading.Event) -> dict[str, float]:
    watcher = FolderWatcher(folder, include=("*.mrc",), observer="inotify")
    watcher.start()
    is_watching.set()
    noticed_at: dict[str, float] = {}
    pause = threading.Event()
    deadline = time.monotonic() + TIMEOUT_S
    while len(noticed_at) < n_files and time.monotonic() < deadline:
        for notice in watcher.poll(time.monotonic()):
            if notice.kind in {NoticeKind.CLOSED, NoticeKind.FOUND}:
                noticed_at.setdefault(notice.path, time.monotonic())
        pause.wait(POLL_PAUSE_S)
    watcher.close()
    return noticed_at


def _measure_latency(folder: Path, n_files: int, data: bytes) -> dict[str, float]:
    """Latency from close to `ExposureFound`, less the settle time, which is a choice."""
    _prepare(folder)
    source = _make_source(folder)
    source.poll(time.time())
    closed_at: dict[str, float] = {}
    writer = threading.Thread(target=_write_files, args=(folder, n_files, data, PACED_FILES_PER_S, closed_at))
    writer.start()
    found_at = _poll_until(source, n_files)
    writer.join()
    source.close()
    latencies = np.asarray([found_at[path] - closed_at[path] for path in found_at])
    return {
        "settle_s": SETTLE_S,
        "paced_files_per_s": PACED_FILES_PER_S,
        "latency_p50_s": float(np.quantile(latencies, 0.5)),
        "latency_p95_s": float(np.quantile(latencies, 0.95)),
        "latency_beyond_settle_p50_s": float(np.quantile(latencies, 0.5)) - SETTLE_S,
        "latency_beyond_settle_p95_s": float(np.quantile(latencies, 0.95)) - SETTLE_S,
    }


def _make_source(folder: Path) -> ExposureSource:
    return ExposureSource(
        SourceSettings(
            root=folder, kind=InputKind.MOVIE, settle_s=SETTLE_S, observer="inotify", max_in_check=64
        )
    )


def _poll_until(source: ExposureSource, n_files: int) -> dict[str, float]:
    found_at: dict[str, float] = {}
    pause = threading.Event()
    deadline = time.monotonic() + TIMEOUT_S
    while len(found_at) < n_files and time.monotonic() < deadline:
        for event in source.poll(time.time()):
            if isinstance(event, ExposureFound):
                found_at[event.exposure.file.path] = time.monotonic()
        pause.wait(POLL_PAUSE_S)
    return found_at


def _measure_scan(folder: Path) -> dict[str, float]:
    """The first look at a full folder, against the calls that it cannot do without."""
    started = time.monotonic()
    n_plain = sum(_scan_plain(str(folder)))
    plain_s = time.monotonic() - started
    started = time.monotonic()
    watcher = FolderWatcher(folder, include=("*.mrc",), observer="inotify")
    watcher.start()
    n_found = len(watcher.poll(time.monotonic()))
    scan_s = time.monotonic() - started
    watcher.close()
    return {
        "first_scan_s": scan_s,
        "first_scan_files": n_found,
        "scandir_stat_s": plain_s,
        "first_scan_ratio": plain_s / scan_s * (n_found / max(n_plain, 1)),
    }


def _scan_plain(folder: str) -> list[int]:
    counts: list[int] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                counts.extend(_scan_plain(entry.path))
            else:
                entry.stat()
                counts.append(1)
    return counts


def _measure_backlog(folder: Path, n_files: int) -> dict[str, float]:
    """Files that were there before the start, to validated events: opened, decoded, fingerprinted."""
    source = _make_source(folder)
    started = time.monotonic()
    found_at = _poll_until(source, n_files)
    seconds = max(found_at.values()) - started
    source.close()
    return {"backlog_files_per_s": len(found_at) / seconds, "backlog_found": len(found_at)}
