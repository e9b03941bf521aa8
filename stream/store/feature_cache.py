"""The feature cache: score and feature of every particle, by uid and model hash (ADR 0004).

One folder per model holds Arrow IPC files, the *segments*, named `segment-FIRST-LAST.arrow` after the appends
that they hold. A segment's rows are sorted by uid, each uid once, in record batches of at most 8,192 rows:
`uid` uint64, `score` float32, `feature` fixed-size list of float16. Segments never change.

Durability: an append writes a temporary file, syncs, renames and syncs the folder; it is there when `append`
returns, and a killed writer leaves a `.tmp-` file that readers ignore and the next writer removes.
Compaction writes the union of neighbouring segments under their joint range and then removes them; a segment
whose range lies in another's is superseded, so a kill between the two steps is seen by nobody. The later
append wins where a uid occurs twice.

Processes: one writer (held by a file lock from the first append to `close`), any number of readers, which see
each append as soon as it is durable. Threads may share an instance. Features stay memory-mapped; uids and
scores (12 bytes a particle) are held in memory once asked for.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stream.records.errors import InputError, ResourceError
from stream.store.files import replacing, sync_folder

log = logging.getLogger(__name__)

Uids = NDArray[np.uint64]
Scores = NDArray[np.float32]
Features = NDArray[np.float16]

_ROWS_PER_BATCH = 8_192  # 12 MiB of 768 fp16: the unit that compaction and iteration hold in memory
_SMALL_ROWS = 8_192  # below this a segment is small; 32 small ones in a row are merged
_SMALL_COUNT = 32  # 8-128 make sense: fewer rewrites against fewer files to search
_SEALED_ROWS = 131_072  # about 200 MB of 768 fp16: never rewritten, so that a merge stays near a second
_SEGMENT_NAME = re.compile(r"segment-(\d{10})-(\d{10})\.arrow")
_MODEL_NAME = re.compile(r"[0-9A-Za-z][0-9A-Za-z._-]{0,127}")


@dataclass(frozen=True, slots=True)
class _Segment:
    """One immutable file: rows sorted by uid; `parts` are memory-mapped feature blocks in row order."""

    path: Path
    first: int
    last: int
    uids: Uids
    scores: Scores
    parts: tuple[Features, ...]

    def gather(self, rows: NDArray[np.intp]) -> Features:
        """Return the features of ascending `rows`, copied."""
        starts = np.arange(len(self.parts) + 1) * _ROWS_PER_BATCH
        edges = np.searchsorted(rows, starts)
        blocks = [
            part[rows[low:high] - start]
            for part, start, low, high in zip(self.parts, starts[:-1], edges[:-1], edges[1:], strict=True)
        ]
        return np.concatenate(blocks)


class FeatureCache:
    """Scores and features by (model hash, particle uid) in `folder`; see the module's docstring.

    Parameters
    ----------
    lock_timeout_s
        How long the first append waits for another writer, which may be dying, to let go.
    """

    def __init__(self, folder: Path, *, lock_timeout_s: float = 5.0) -> None:
        self.folder = folder
        self._lock_timeout_s = lock_timeout_s
        self._lock = threading.RLock()
        self._segments: dict[str, tuple[_Segment, ...]] = {}
        self._release: weakref.finalize[[int], FeatureCache] | None = None
        self._cleaned: set[str] = set()

    def append(self, model_hash: str, uids: Uids, scores: Scores, features: Features) -> None:
        """Store rows, durable on return; uids [n], scores [n] finite, features [n, d] with the model's d."""
        _check_rows(model_hash, uids, scores, features)
        if len(uids) == 0:
            return
        with self._lock:
            self._become_writer()
            segments = self._refresh(model_hash)
            self._clean(model_hash, segments)
            if segments and segments[-1].parts[0].shape[1] != features.shape[1]:
                rule = f"features of model {model_hash} have {segments[-1].parts[0].shape[1]} dimensions"
                raise InputError(self.folder, rule, features.shape[1])
            # np.unique keeps the first of equals, so reversing makes the last row of a uid win.
            unique, first = np.unique(uids[::-1], return_index=True)
            order = len(uids) - 1 - first
            number = segments[-1].last + 1 if segments else 1
            rows = ((uids[part], scores[part], features[part]) for part in _split(order))
            self._write(model_hash, number, number, rows, n_features=features.shape[1])
            log.debug("features_appended", extra={"model": model_hash, "n_particles": len(unique)})
            try:
                self._compact_tail(model_hash)
            except ResourceError as error:  # the rows are safe already; the next append tries again
                log.warning("feature_compaction_failed", extra={"reason": str(error)})

    def lookup(self, model_hash: str, uids: Uids) -> tuple[NDArray[np.bool_], Scores]:
        """Return (is_found [n], scores [n]); the score of a uid that is not there is NaN."""
        is_found = np.zeros(len(uids), dtype=bool)
        scores = np.full(len(uids), np.nan, dtype=np.float32)
        for segment, places, rows in self._find(model_hash, uids):
            is_found[places] = True
            scores[places] = segment.scores[rows]
        return is_found, scores

    def features(self, model_hash: str, uids: Uids) -> tuple[NDArray[np.bool_], Features]:
        """Return (is_found [n], features [n, d]); rows that are not there are NaN; d is 0 for an unknown model."""
        segments = self._refresh(model_hash)
        n_features = segments[0].parts[0].shape[1] if segments else 0
        is_found = np.zeros(len(uids), dtype=bool)
        features = np.full((len(uids), n_features), np.nan, dtype=np.float16)
        for segment, places, rows in self._find(model_hash, uids):
            order = np.argsort(rows, kind="stable")
            is_found[places] = True
            features[places[order]] = segment.gather(rows[order])
        return is_found, features

    def scores(self, model_hash: str) -> tuple[Uids, Scores]:
        """Return every (uid, score) of a model, in order of uid."""
        segments = self._refresh(model_hash)
        if not segments:
            return np.empty(0, np.uint64), np.empty(0, np.float32)
        newest_first = segments[::-1]
        uids, first = np.unique(np.concatenate([s.uids for s in newest_first]), return_index=True)
        return uids, np.concatenate([s.scores for s in newest_first])[first]

    def iterate_features(self, model_hash: str, batch: int) -> Iterator[tuple[Uids, Features]]:
        """Yield (uids, features) of at most `batch` rows, each uid once, read-only where no copy was needed."""
        if batch < 1:
            raise InputError(self.folder, "a batch has at least one row", batch)
        segments = self._refresh(model_hash)
        for segment, is_live in zip(segments, _live_rows(segments), strict=True):
            for index, part in enumerate(segment.parts):
                start = index * _ROWS_PER_BATCH
                for low in range(0, len(part), batch):
                    high = min(low + batch, len(part))
                    live = is_live[start + low : start + high]
                    uids = segment.uids[start + low : start + high]
                    if live.all():
                        yield uids, part[low:high]
                    elif live.any():
                        yield uids[live], part[low:high][live]

    def models(self) -> list[str]:
        """Return the hashes of the models that have rows, sorted."""
        if not self.folder.is_dir():
            return []
        return sorted(p.name for p in self.folder.iterdir() if p.is_dir() and _list_segments(p))

    def count(self, model_hash: str) -> int:
        """Return how many particles have a row."""
        return len(self.scores(model_hash)[0])

    def compact(self, model_hash: str) -> None:
        """Merge every segment that is not sealed yet into one; safe at any time, for the writer only."""
        with self._lock:
            self._become_writer()
            segments = self._refresh(model_hash)
            self._clean(model_hash, segments)
            tail = _tail_below(segments, _SEALED_ROWS)
            if len(tail) > 1:
                self._merge(model_hash, tail)

    def close(self) -> None:
        """Give up the writer's lock and the mapped files (arrays handed out stay valid)."""
        with self._lock:
            if self._release is not None:
                self._release()
                self._release = None
            self._segments.clear()
            self._cleaned.clear()

    def __enter__(self) -> FeatureCache:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def _find(
        self, model_hash: str, uids: Uids
    ) -> Iterator[tuple[_Segment, NDArray[np.intp], NDArray[np.intp]]]:
        """Yield (segment, places in `uids`, rows in the segment), newest segment first, each place once."""
        wanted = np.asarray(uids, dtype=np.uint64)
        missing = np.arange(len(wanted))
        for segment in reversed(self._refresh(model_hash)):
            if not len(missing):
                return
            rows = np.searchsorted(segment.uids, wanted[missing])
            rows[rows == len(segment.uids)] = 0
            is_here = segment.uids[rows] == wanted[missing]
            if is_here.any():
                yield segment, missing[is_here], rows[is_here]
                missing = missing[~is_here]

    def _refresh(self, model_hash: str) -> tuple[_Segment, ...]:
        """Return the live segments in order of append, opening those that are new since the last call."""
        _check_model(self.folder, model_hash)
        folder = self.folder / model_hash
        with self._lock:
            known = {segment.path.name: segment for segment in self._segments.get(model_hash, ())}
            while True:
                live = _drop_superseded(_list_segments_twice(folder))
                try:
                    segments = tuple(
                        known.get(name) or _open_segment(folder / name, first, last, model_hash)
                        for first, last, name in live
                    )
                except FileNotFoundError:
                    continue  # merged away between listing and opening: the union is there now
                self._segments[model_hash] = segments
                return segments

    def _become_writer(self) -> None:
        if self._release is not None and self._release.alive:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.folder / ".writer.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        deadline = time.monotonic() + self._lock_timeout_s
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if time.monotonic() >= deadline:
                    os.close(descriptor)
                    rule = "one process at a time writes the feature cache"
                    raise ResourceError(self.folder, rule, error) from error
            time.sleep(0.05)
        self._release = weakref.finalize(self, os.close, descriptor)

    def _clean(self, model_hash: str, segments: Sequence[_Segment]) -> None:
        """Remove what a killed writer left: temporary files and superseded segments."""
        if model_hash in self._cleaned:
            return
        folder = self.folder / model_hash
        folder.mkdir(exist_ok=True)
        sync_folder(self.folder)
        live = {segment.path.name for segment in segments}
        for path in folder.iterdir():
            is_leftover = path.name.startswith(".tmp-")
            if is_leftover or (_SEGMENT_NAME.fullmatch(path.name) and path.name not in live):
                path.unlink(missing_ok=True)
        self._cleaned.add(model_hash)

    def _compact_tail(self, model_hash: str) -> None:
        segments = self._refresh(model_hash)
        open_tail = _tail_below(segments, _SEALED_ROWS)
        small_tail = _tail_below(segments, _SMALL_ROWS)
        if len(open_tail) > 1 and sum(len(s.uids) for s in open_tail) >= _SEALED_ROWS:
            self._merge(model_hash, open_tail)
        elif len(small_tail) >= _SMALL_COUNT:
            self._merge(model_hash, small_tail)

    def _merge(self, model_hash: str, segments: Sequence[_Segment]) -> None:
        rows = _merged_rows(segments)
        n_features = segments[0].parts[0].shape[1]
        self._write(model_hash, segments[0].first, segments[-1].last, rows, n_features=n_features)
        for segment in segments:
            segment.path.unlink(missing_ok=True)
        sync_folder(self.folder / model_hash)

    def _write(
        self,
        model_hash: str,
        first: int,
        last: int,
        rows: Iterator[tuple[Uids, Scores, Features]],
        *,
        n_features: int,
    ) -> None:
        path = self.folder / model_hash / f"segment-{first:010d}-{last:010d}.arrow"
        metadata = {"icestream_model_hash": model_hash, "icestream_format": "1"}
        fields = [
            ("uid", pa.uint64()),
            ("score", pa.float32()),
            ("feature", pa.list_(pa.float16(), n_features)),
        ]
        schema = pa.schema(fields, metadata=metadata)
        try:
            with (
                replacing(path) as temporary,
                pa.OSFile(str(temporary), "wb") as sink,
                pa.ipc.new_file(sink, schema) as writer,
            ):
                for uids, scores, features in rows:
                    flat = pa.array(np.ascontiguousarray(features).reshape(-1))
                    columns = [
                        pa.array(uids),
                        pa.array(scores),
                        pa.FixedSizeListArray.from_arrays(flat, n_features),
                    ]
                    writer.write_batch(pa.record_batch(columns, schema=schema))
        except OSError as error:
            raise ResourceError(path, "the disk takes the feature cache's segment", error) from error


def _check_model(folder: Path, model_hash: str) -> None:
    if not _MODEL_NAME.fullmatch(model_hash):
        raise InputError(folder, "a model hash is 1-128 letters, digits, dots, dashes", repr(model_hash))


def _check_rows(model_hash: str, uids: Uids, scores: Scores, features: Features) -> None:
    item = f"rows for model {model_hash}"
    for name, array, dtype, n_dimensions in (
        ("uids", uids, np.uint64, 1),
        ("scores", scores, np.float32, 1),
        ("features", features, np.float16, 2),
    ):
        if array.dtype != dtype or array.ndim != n_dimensions or len(array) != len(uids):
            rule = f"{name} are {np.dtype(dtype)} with {n_dimensions} axes and one row for each uid"
            raise InputError(item, rule, f"{array.dtype}{array.shape}")
    if features.shape[1] == 0:
        raise InputError(item, "a feature has at least one dimension", features.shape)
    if not np.isfinite(scores).all():
        raise InputError(item, "scores are finite", scores[~np.isfinite(scores)][0])


def _split(order: NDArray[np.intp]) -> Iterator[NDArray[np.intp]]:
    for start in range(0, len(order), _ROWS_PER_BATCH):
        yield order[start : start + _ROWS_PER_BATCH]


def _list_segments(folder: Path) -> list[tuple[int, int, str]]:
    with contextlib.suppress(FileNotFoundError):
        matches = (_SEGMENT_NAME.fullmatch(path.name) for path in folder.iterdir())
        return sorted((int(match[1]), int(match[2]), match[0]) for match in matches if match)
    return []


def _list_segments_twice(folder: Path) -> list[tuple[int, int, str]]:
    """List until two listings agree: one alone, taken while segments are merged, may miss old and new."""
    listing = _list_segments(folder)
    while (again := _list_segments(folder)) != listing:
        listing = again
    return listing


def _drop_superseded(listing: list[tuple[int, int, str]]) -> list[tuple[int, int, str]]:
    """Keep the segments whose range lies in no other's, in order of append."""
    live: list[tuple[int, int, str]] = []
    for first, last, name in sorted(listing, key=lambda entry: (entry[0], -entry[1])):
        if not live or last > live[-1][1]:
            live.append((first, last, name))
    return live


def _open_segment(path: Path, first: int, last: int, model_hash: str) -> _Segment:
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        batches = [reader.get_batch(index) for index in range(reader.num_record_batches)]
        found = (reader.schema.metadata or {}).get(b"icestream_model_hash", b"").decode()
    except pa.ArrowInvalid as error:
        raise ResourceError(path, "a segment of the feature cache is a whole Arrow file", error) from error
    if found != model_hash:
        raise ResourceError(path, f"the segment is of model {model_hash}", found)
    columns = [(_column(b, "uid"), _column(b, "score"), _features_of(b)) for b in batches]
    return _Segment(
        path=path,
        first=first,
        last=last,
        uids=np.concatenate([uids for uids, _, _ in columns]),
        scores=np.concatenate([scores for _, scores, _ in columns]),
        parts=tuple(features for _, _, features in columns),
    )


def _column(batch: pa.RecordBatch, name: str) -> NDArray[np.generic]:
    values: NDArray[np.generic] = batch.column(name).to_numpy(zero_copy_only=True)
    return values


def _features_of(batch: pa.RecordBatch) -> Features:
    column = batch.column("feature")
    flat: Features = column.flatten().to_numpy(zero_copy_only=True)
    return flat.reshape(len(column), column.type.list_size)


def _tail_below(segments: Sequence[_Segment], n_rows: int) -> Sequence[_Segment]:
    """Return the longest run at the end of segments that have fewer than `n_rows` rows each."""
    start = len(segments)
    while start > 0 and len(segments[start - 1].uids) < n_rows:
        start -= 1
    return segments[start:]


def _live_rows(segments: Sequence[_Segment]) -> list[NDArray[np.bool_]]:
    """Return, for each segment, which rows no later segment replaces."""
    if not segments:
        return []
    sizes = [len(segment.uids) for segment in reversed(segments)]
    _, first = np.unique(np.concatenate([s.uids for s in reversed(segments)]), return_index=True)
    is_live = np.zeros(sum(sizes), dtype=bool)
    is_live[first] = True
    return np.split(is_live, np.cumsum(sizes)[:-1])[::-1]


def _merged_rows(segments: Sequence[_Segment]) -> Iterator[tuple[Uids, Scores, Features]]:
    """Yield the union in order of uid, the later segment winning, one record batch at a time."""
    newest_first = segments[::-1]
    uids, first = np.unique(np.concatenate([s.uids for s in newest_first]), return_index=True)
    scores = np.concatenate([s.scores for s in newest_first])
    owner = np.repeat(np.arange(len(newest_first)), [len(s.uids) for s in newest_first])
    row = np.concatenate([np.arange(len(s.uids)) for s in newest_first])
    n_features = segments[0].parts[0].shape[1]
    for part in _split(np.arange(len(uids))):
        source = first[part]
        features = np.empty((len(part), n_features), np.float16)
        for index in np.unique(owner[source]):
            is_from = owner[source] == index
            # Rows of one segment ascend here, because the union is in order of uid as the segment is.
            features[is_from] = newest_first[index].gather(row[source[is_from]])
        yield uids[part], scores[source], features
