"""Benchmark of the feature cache against other stores: rates, size, and what a kill -9 during append leaves.

Every store appends the same rows with the same promise, durable on return, and is read through the page cache.
The kill test starts a writer process that reports each append after it is durable, kills it at a random
moment and then opens the store: acknowledged rows must be there, whole and right.
"""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from stream.records.errors import ConfigurationError
from stream.store.feature_cache import FeatureCache, Features, Scores, Uids

_MODEL = "benchmark"
_ITERATION_ROWS = 8_192


class Store(Protocol):
    """What is measured of a format."""

    def append(self, uids: Uids, scores: Scores, features: Features) -> None:
        """Store rows, durable on return."""

    def lookup(self, uids: Uids) -> Scores:
        """Return the scores of uids that are there."""

    def iterate(self) -> Iterator[tuple[Uids, Features]]:
        """Yield all rows, in blocks."""

    def close(self) -> None:
        """Release files and locks."""


class ArrowStore:
    """The feature cache itself."""

    def __init__(self, folder: Path, n_features: int) -> None:
        del n_features
        self._cache = FeatureCache(folder)

    def append(self, uids: Uids, scores: Scores, features: Features) -> None:
        """Append a segment."""
        self._cache.append(_MODEL, uids, scores, features)

    def lookup(self, uids: Uids) -> Scores:
        """Search the segments, newest first."""
        return self._cache.lookup(_MODEL, uids)[1]

    def iterate(self) -> Iterator[tuple[Uids, Features]]:
        """Walk the memory maps."""
        return self._cache.iterate_features(_MODEL, _ITERATION_ROWS)

    def close(self) -> None:
        """Close the cache."""
        self._cache.close()


class LmdbStore:
    """LMDB: uid (big-endian) to score and feature, one synced transaction an append."""

    def __init__(self, folder: Path, n_features: int) -> None:
        import lmdb

        self._n_features = n_features
        self._environment = lmdb.open(str(folder), map_size=2**36, writemap=False, sync=True)

    def append(self, uids: Uids, scores: Scores, features: Features) -> None:
        """Put rows in one transaction."""
        with self._environment.begin(write=True) as transaction:
            for key, score, feature in zip(_keys(uids), scores, features, strict=True):
                transaction.put(key, score.tobytes() + feature.tobytes())

    def lookup(self, uids: Uids) -> Scores:
        """Get row by row."""
        with self._environment.begin(buffers=True) as transaction:
            values = [transaction.get(key) for key in _keys(uids)]
            missing = bytes(np.float32(np.nan).tobytes())
            return np.array(
                [np.frombuffer(value or missing, np.float32, 1)[0] for value in values], np.float32
            )

    def iterate(self) -> Iterator[tuple[Uids, Features]]:
        """Walk the tree with a cursor."""
        with self._environment.begin(buffers=True) as transaction:
            keys: list[bytes] = []
            values: list[bytes] = []
            for key, value in transaction.cursor():
                keys.append(bytes(key))
                values.append(bytes(value[4:]))
                if len(keys) == _ITERATION_ROWS:
                    yield self._block(keys, values)
                    keys, values = [], []
            if keys:
                yield self._block(keys, values)

    def _block(self, keys: list[bytes], values: list[bytes]) -> tuple[Uids, Features]:
        uids = np.frombuffer(b"".join(keys), ">u8").astype(np.uint64)
        return uids, np.frombuffer(b"".join(values), np.float16).reshape(-1, self._n_features)

    def close(self) -> None:
        """Close the environment."""
        self._environment.close()


def _keys(uids: Uids) -> list[bytes]:
    return [uid.to_bytes(8, "big") for uid in uids.tolist()]


class Hdf5Store:
    """HDF5: three growing datasets, flushed and synced after each append."""

    def __init__(self, folder: Path, n_features: int, mode: str = "a") -> None:
        import h5py

        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "features.h5"
        self._file = h5py.File(self._path, mode)
        for name, dtype, tail in (("uid", "u8", ()), ("score", "f4", ()), ("feature", "f2", (n_features,))):
            if name not in self._file:
                shape, limits, chunk = (0, *tail), (None, *tail), (1024, *tail)
                self._file.create_dataset(name, shape, dtype, maxshape=limits, chunks=chunk)

    def append(self, uids: Uids, scores: Scores, features: Features) -> None:
        """Grow, write, flush, sync."""
        start = len(self._file["uid"])
        for name, rows in (("uid", uids), ("score", scores), ("feature", features)):
            self._file[name].resize(start + len(rows), axis=0)
            self._file[name][start:] = rows
        self._file.flush()
        descriptor = os.open(self._path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)

    def lookup(self, uids: Uids) -> Scores:
        """Read the whole uid column: the format has no index."""
        known = self._file["uid"][:]
        order = np.argsort(known)
        rows = order[np.minimum(np.searchsorted(known, uids, sorter=order), len(known) - 1)]
        scores: Scores = np.where(known[rows] == uids, self._file["score"][:][rows], np.float32(np.nan))
        return scores

    def iterate(self) -> Iterator[tuple[Uids, Features]]:
        """Read block by block."""
        for start in range(0, len(self._file["uid"]), _ITERATION_ROWS):
            stop = start + _ITERATION_ROWS
            yield self._file["uid"][start:stop], self._file["feature"][start:stop]

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class SqliteStore:
    """SQLite: one row a particle, WAL, synchronous = FULL."""

    def __init__(self, folder: Path, n_features: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._n_features = n_features
        self._connection = sqlite3.connect(folder / "features.sqlite", isolation_level=None)
        for statement in (
            "PRAGMA journal_mode = WAL",
            "PRAGMA synchronous = FULL",
            "CREATE TABLE IF NOT EXISTS particle (uid INTEGER PRIMARY KEY, score REAL, feature BLOB)",
        ):
            self._connection.execute(statement)

    def append(self, uids: Uids, scores: Scores, features: Features) -> None:
        """Insert rows in one transaction."""
        rows = zip(uids.view(np.int64).tolist(), scores.tolist(), map(bytes, features), strict=True)
        self._connection.execute("BEGIN IMMEDIATE")
        self._connection.executemany("INSERT OR REPLACE INTO particle VALUES (?, ?, ?)", rows)
        self._connection.execute("COMMIT")

    def lookup(self, uids: Uids) -> Scores:
        """Select row by row."""
        statement = "SELECT score FROM particle WHERE uid = ?"
        keys = uids.view(np.int64).tolist()
        found = (self._connection.execute(statement, (key,)).fetchone() for key in keys)
        return np.array([np.nan if row is None else row[0] for row in found], np.float32)

    def iterate(self) -> Iterator[tuple[Uids, Features]]:
        """Select everything, block by block."""
        cursor = self._connection.execute("SELECT uid, feature FROM particle")
        while rows := cursor.fetchmany(_ITERATION_ROWS):
            uids = np.array([row[0] for row in rows], np.int64).view(np.uint64)
            joined = np.frombuffer(b"".join(row[1] for row in rows), np.float16)
            yield uids, joined.reshape(-1, self._n_features)

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


STORES: dict[str, Callable[[Path, int], Store]] = {
    "arrow": ArrowStore,
    "lmdb": LmdbStore,
    "hdf5": Hdf5Store,
    "sqlite": SqliteStore,
}


def run_feature_cache_benchmark(
    folder: Path | None = None,
    *,
    n_particles: int = 120_000,
    n_per_append: int = 300,
    n_features: int = 768,
    n_kills: int = 20,
    stores: Sequence[str] = ("arrow", "lmdb", "hdf5", "sqlite"),
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Measure each store in a fresh folder below `folder` (a temporary one by default); one record a store.

    The figure is particles appended per second; its baseline is the same bytes appended to a plain file and
    synced, which no store that promises as much can beat by far.
    """
    unknown = [name for name in stores if name not in STORES]
    if unknown:
        raise ConfigurationError("stores", f"a store is one of {', '.join(STORES)}", ", ".join(unknown))
    records = []
    with tempfile.TemporaryDirectory(dir=folder, prefix="bench-features-") as scratch:
        plain = _measure_plain(Path(scratch) / "plain", n_particles, n_per_append, n_features)
        for name in stores:
            try:
                record = _measure_rates(name, Path(scratch) / name, n_particles, n_per_append, n_features)
                record |= _measure_kills(name, Path(scratch) / f"{name}-killed", n_kills, n_features, seed)
            except ModuleNotFoundError as error:
                raise ConfigurationError(name, "the store's package is installed", error.name) from error
            value = record["append_particles_per_s"]
            figure = {"name": f"feature_cache.{name}", "value": value, "unit": "particles/s appended durably"}
            baseline = {
                "baseline": "plain file, write and fsync",
                "baseline_value": plain,
                "ratio": value / plain,
            }
            records.append(figure | baseline | record)
            shutil.rmtree(Path(scratch) / name)
    return records


def _measure_plain(path: Path, n_particles: int, n_per_append: int, n_features: int) -> float:
    elapsed_s = 0.0
    with path.open("wb", buffering=0) as stream:
        for number in range(n_particles // n_per_append):
            content = b"".join(column.tobytes() for column in _make_rows(number, n_per_append, n_features))
            started = time.perf_counter()
            stream.write(content)
            os.fsync(stream.fileno())
            elapsed_s += time.perf_counter() - started
    path.unlink()
    return n_particles // n_per_append * n_per_append / elapsed_s


def _measure_rates(
    name: str, folder: Path, n_particles: int, n_per_append: int, n_features: int
) -> dict[str, Any]:
    warm_up = STORES[name](folder.with_name(f"{name}-warm-up"), n_features)
    warm_up.append(*_make_rows(0, n_per_append, n_features))
    warm_up.close()
    store = STORES[name](folder, n_features)
    n_appends = n_particles // n_per_append
    append_s = np.empty(n_appends)
    for number in range(n_appends):
        rows = _make_rows(number, n_per_append, n_features)
        started = time.perf_counter()
        store.append(*rows)
        append_s[number] = time.perf_counter() - started
    is_readable = _run_child("peek", name, folder, n_features, 1) == "whole"
    store.close()
    store = STORES[name](folder, n_features)
    wanted = [_make_uids(number, n_per_append) for number in range(0, n_appends, max(1, n_appends // 50))]
    store.lookup(wanted[0])
    started = time.perf_counter()
    n_missing = sum(int(np.isnan(store.lookup(uids)).sum()) for uids in wanted)
    lookup_s = (time.perf_counter() - started) / len(wanted)
    anonymous = anonymous_bytes()
    peak, n_read = anonymous, 0
    started = time.perf_counter()
    for uids, features in store.iterate():
        # A sum over the raw words touches every byte without the cost of half-precision arithmetic.
        np.bitwise_xor.reduce(features.view(np.uint16), axis=None)
        n_read += len(uids)
        peak = max(peak, anonymous_bytes())
    read_s = time.perf_counter() - started
    store.close()
    n_rows = n_appends * n_per_append
    tenth = max(1, n_appends // 10)
    return {
        "store": name,
        "n_particles": n_rows,
        "append_particles_per_s": n_rows / append_s.sum(),
        "append_p50_ms": 1e3 * float(np.median(append_s)),
        "append_max_ms": 1e3 * float(append_s.max()),
        "append_mean_last_to_first_tenth": float(append_s[-tenth:].mean() / append_s[:tenth].mean()),
        "lookup_ms": 1e3 * lookup_s,
        "read_particles_per_s": n_read / read_s,
        "read_mib_per_s": n_read * 2 * n_features / read_s / 2**20,
        "read_private_mib": (peak - anonymous) / 2**20,
        "bytes_per_particle": _folder_bytes(folder) / n_rows,
        "n_missing": n_missing + n_rows - n_read,
        "is_readable_beside_writer": is_readable,
    }


def _measure_kills(name: str, folder: Path, n_kills: int, n_features: int, seed: int) -> dict[str, Any]:
    """Kill a writer `n_kills` times, each in a fresh folder; count the folders that lost or damaged rows."""
    chance = random.Random(seed)  # noqa: S311 - moments of a kill, not secrets
    outcomes = {"n_kills": n_kills, "n_unreadable": 0, "n_lost_rows": 0, "n_not_appendable": 0}
    n_left = 0
    for trial in range(n_kills):
        trial_folder = folder / str(trial)
        n_done = _kill_writer(name, trial_folder, n_features, after_s=chance.uniform(0.02, 0.4))
        n_left += sum(path.name.startswith(".tmp-") for path in trial_folder.rglob("*"))
        outcome = _run_child("check", name, trial_folder, n_features, n_done)
        outcomes["n_unreadable"] += outcome == "unreadable"
        outcomes["n_lost_rows"] += outcome == "lost"
        outcomes["n_not_appendable"] += outcome == "not appendable"
        shutil.rmtree(trial_folder)
    return outcomes | {"n_leftover_files": n_left}


def _kill_writer(name: str, folder: Path, n_features: int, *, after_s: float) -> int:
    """Start a writer, kill it `after_s` after its first append; return how many appends it acknowledged."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        "-m",
        "stream.commands.bench_features",
        "write",
        name,
        str(folder),
        str(n_features),
        "0",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        lines = child.stdout
        if lines is None or not lines.readline():
            raise ConfigurationError(name, "the store's writer starts")
        killer = threading.Timer(after_s, child.kill)
        killer.start()
        return max([1, *(int(line) for line in lines if line.endswith("\n"))])


def _run_child(mode: str, name: str, folder: Path, n_features: int, n_done: int) -> str:
    command = [
        sys.executable, "-m", "stream.commands.bench_features", mode, name, str(folder), str(n_features), str(n_done)
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    return done.stdout.strip() or "unreadable"


def _write_forever(store: Store, n_features: int) -> None:
    number = 0
    while True:
        store.append(*_make_rows(number, 300, n_features))
        number += 1
        print(number, flush=True)


def _check(store: Store, n_features: int, n_done: int) -> str:
    scores = [store.lookup(_make_uids(number, 300)) for number in range(n_done)]
    expected = [_make_rows(number, 300, n_features)[1] for number in range(n_done)]
    if not np.array_equal(np.concatenate(scores), np.concatenate(expected)):
        return "lost"
    for uids, features in store.iterate():
        if not np.array_equal(features, _features_of(uids, n_features)):
            return "lost"
    try:
        store.append(*_make_rows(n_done + 10, 300, n_features))
    except (OSError, RuntimeError, ValueError):
        return "not appendable"
    return "whole"


def _make_uids(number: int, n_rows: int) -> Uids:
    """Scattered uids, as hashes are: an odd multiplier is a bijection of the 64-bit integers."""
    with np.errstate(over="ignore"):
        counter = np.arange(number * n_rows, (number + 1) * n_rows, dtype=np.uint64)
        return counter * np.uint64(0x9E3779B97F4A7C15) + np.uint64(1)


def _make_rows(number: int, n_rows: int, n_features: int) -> tuple[Uids, Scores, Features]:
    uids = _make_uids(number, n_rows)
    return (
        uids,
        (uids % np.uint64(1000)).astype(np.float32) / np.float32(1000),
        _features_of(uids, n_features),
    )


def _features_of(uids: Uids, n_features: int) -> Features:
    """Incompressible-looking features that follow from the uid."""
    with np.errstate(over="ignore"):
        mixed = uids[:, None] * (2 * np.arange(n_features, dtype=np.uint64) + np.uint64(1))
    return ((mixed >> np.uint64(40)) % np.uint64(2048)).astype(np.float16) / np.float16(2048)


def anonymous_bytes() -> int:
    """Return the private memory of this process: mapped files do not count."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


def _peek(store: Store, n_features: int) -> str:
    rows = next(iter(store.iterate()), None)
    return (
        "whole" if rows is not None and np.array_equal(rows[1], _features_of(rows[0], n_features)) else "lost"
    )


def _main(mode: str, name: str, folder: Path, n_features: int, n_done: int) -> None:
    """Be the child process of a measurement."""
    is_reader = mode == "peek" and name == "hdf5"
    store = Hdf5Store(folder, n_features, mode="r") if is_reader else STORES[name](folder, n_features)
    if mode == "write":
        _write_forever(store, n_features)
    print(_peek(store, n_features) if mode == "peek" else _check(store, n_features, n_done))


if __name__ == "__main__":
    _main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))
