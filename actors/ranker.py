"""The ranker: scores particles in batches that may span exposures.

Threads: any number of callers in `rank`, one that resizes, one that runs the model. A caller reads its own stack, a batch of
images at a time, and lays the images into the open batch, and stores what comes back; so reading, resizing, inference and
writing go on at the same time. A batch is sent off when it is full, when nobody is reading who could fill it, or when its
first image has waited `max_wait_s`. At most three batches are resized, inferred or wait for it, and a caller holds at
most four batches of images unscored, so memory does not grow with the stack.

Images with NaN, infinities or one single value are excluded and counted; where the scorer mends single pixels, only those
without two different finite values. Scores are in the feature cache,
durably, when `rank` returns; particles that the cache knows for this model are not read. When memory does not
suffice the batch is halved, for good.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from actors.stack_images import Images, find_mendable_images, find_usable_images, read_images
from stream.records.commands import Rank
from stream.records.errors import ConfigurationError, InputError, ResourceError
from stream.records.values import RankResult
from stream.sinks.relion_star import UID_COLUMN, read_particles_star, split_image_names
from stream.store.feature_cache import FeatureCache
from stream.store.layout import OutputLayout

log = logging.getLogger(__name__)

N_HISTOGRAM_BINS = 100

_MAX_QUEUED_BATCHES = 3  # one resized, one inferred, one that waits
_MAX_HELD_BATCHES = 4
_ROWS_PER_APPEND = 8_192  # a large stack is stored in parts, so that a crash costs no more than this
_MEMORY_WORDS = ("failed to allocate", "out of memory", "bad_alloc", "cudaerrormemoryallocation", "bfcarena")


class Scorer(Protocol):
    """A model that judges particles; `models.cryoranker.serve.OnnxRanker` is one."""

    @property
    def model_hash(self) -> str:
        """Identity of the model's file: the key of the feature cache."""

    @property
    def provider(self) -> str:
        """What runs the model, as its session says."""

    def prepare(self, images: Images) -> Any:  # noqa: ANN401 - an array or a tensor on the scorer's device
        """Return what `infer` takes for extracted particles [b, n, n]; it can be sliced along b."""

    def infer(self, prepared: Any) -> tuple[NDArray[Any], NDArray[Any]]:  # noqa: ANN401 - as above
        """Return (scores [b], features [b, d]); called from one thread, `prepare` from another."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageScores:
    """Scores in the order of the images asked for; NaN where an image was excluded."""

    scores: NDArray[np.float32]
    n_excluded: int
    n_cache_hits: int
    seconds: dict[str, float]
    batch_sizes: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class _Scored:
    scores: NDArray[np.float32]
    features: NDArray[np.float16]
    seconds: dict[str, float]


@dataclass(slots=True)
class _Batch:
    """Images from any number of callers; `work` is set, once, when the batch goes to the model."""

    images: Images
    opened_at: float
    n_images: int = 0
    work: Future[_Scored] | None = None


@dataclass(frozen=True, slots=True)
class _Share:
    """A caller's part of a batch, and the caller's rows that it holds."""

    batch: _Batch
    start: int
    rows: NDArray[np.intp]


@dataclass(slots=True)
class _Request:
    """What one call has read and not yet stored."""

    uids: NDArray[np.uint64]
    scores: NDArray[np.float32]
    shares: deque[_Share] = field(default_factory=deque)
    unsaved: list[tuple[NDArray[np.intp], NDArray[np.float16]]] = field(default_factory=list)
    batch_sizes: list[int] = field(default_factory=list)
    n_held: int = 0
    n_unsaved: int = 0
    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("lookup", "read", "prepare", "inference", "store"), 0.0)
    )


class BatchingRanker:
    """Scores the particles of many exposures at once with one model; see the module's docstring.

    Parameters
    ----------
    batch_size
        Images per call of the model.
    max_wait_s
        How long an image may wait for its batch to fill while others are still reading.
    mends_pixels
        Whether the scorer replaces NaN and infinite pixels (its outlier guard is on).
    """

    def __init__(
        self,
        scorer: Scorer,
        cache: FeatureCache,
        *,
        batch_size: int = 64,
        max_wait_s: float = 0.5,
        mends_pixels: bool = False,
    ) -> None:
        if batch_size < 1 or max_wait_s < 0:
            value = f"batch_size {batch_size}, max_wait_s {max_wait_s}"
            raise ConfigurationError(
                "ranker", "batch_size is at least 1 and max_wait_s is not negative", value
            )
        self._scorer = scorer
        self._cache = cache
        self._batch_size = batch_size
        self._max_wait_s = max_wait_s
        self._find_usable = find_mendable_images if mends_pixels else find_usable_images
        self._changed = threading.Condition()
        self._open: dict[int, _Batch] = {}
        self._n_reading = 0
        self._queue_slots = threading.BoundedSemaphore(_MAX_QUEUED_BATCHES)
        self._prepare_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ranker-prepare")
        self._model_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ranker-model")

    @property
    def model_hash(self) -> str:
        """The model's identity in the feature cache."""
        return self._scorer.model_hash

    @property
    def batch_size(self) -> int:
        """Images per call of the model now: less than was asked for once memory ran out."""
        return self._batch_size

    def rank(self, command: Rank, layout: OutputLayout) -> RankResult:
        """Score one exposure's particles; blocks until every score is in the cache."""
        n_given = command.preprocessed.n_particles
        if n_given == 0 or command.preprocessed.particles is None:
            found = ImageScores(scores=np.empty(0, np.float32), n_excluded=0, n_cache_hits=0, seconds={})
        else:
            path = layout.particles_table(command.name)
            table = read_particles_star(path).particles
            if len(table) != n_given or UID_COLUMN not in table.columns:
                rule = f"the particle table has {n_given} rows with {UID_COLUMN}"
                raise InputError(path, rule, f"{len(table)} rows, columns {', '.join(table.columns)}")
            indices, stacks = split_image_names(table["rlnImageName"])
            paths = np.array([str(layout.root / stack) for stack in stacks], dtype=object)
            found = self.score_images(table[UID_COLUMN].to_numpy(np.uint64), paths, indices)
        is_scored = np.isfinite(found.scores)
        return RankResult(
            exposure_id=command.exposure_id,
            model_hash=self.model_hash,
            n_scored=int(is_scored.sum()),
            n_excluded=found.n_excluded,
            n_cache_hits=found.n_cache_hits,
            score_histogram=count_scores(found.scores[is_scored]),
            seconds=found.seconds,
            batch_sizes=found.batch_sizes,
            provider=self._scorer.provider,
        )

    def score_images(
        self,
        uids: NDArray[np.uint64],
        stack_paths: NDArray[np.object_],
        stack_indices: NDArray[np.int64],
        *,
        contrast_signs: NDArray[np.int8] | None = None,
    ) -> ImageScores:
        """Score images addressed by (absolute stack path, 0-based index); stored durably under `uids`.

        A contrast sign of -1 says that protein is dark in the stack: the image is inverted first.
        """
        started = time.monotonic()
        is_known, scores = self._cache.lookup(self.model_hash, uids)
        request = _Request(uids=uids, scores=scores)
        request.seconds["lookup"] = time.monotonic() - started
        wanted = np.flatnonzero(~is_known)
        chunks = read_images(stack_paths, stack_indices, wanted, chunk=self._batch_size)
        if contrast_signs is not None:
            chunks = ((rows, images * contrast_signs[rows, None, None]) for rows, images in chunks)
        self._read_into_batches(request, chunks)
        while request.shares:
            self._collect_oldest(request)
        self._store(request)
        # The model may give no finite number; such an image has no score, like one that was not shown to it.
        n_excluded = int(np.isnan(scores).sum())
        request.seconds["total"] = time.monotonic() - started
        return ImageScores(
            scores=scores,
            n_excluded=n_excluded,
            n_cache_hits=int(is_known.sum()),
            seconds=request.seconds,
            batch_sizes=tuple(request.batch_sizes),
        )

    def close(self) -> None:
        """Finish what is queued and end the threads."""
        self._prepare_thread.shutdown(wait=True)
        self._model_thread.shutdown(wait=True)

    def _read_into_batches(
        self, request: _Request, chunks: Iterator[tuple[NDArray[np.intp], Images]]
    ) -> None:
        """Read images, chunk by chunk, and hand those that are usable to batches."""
        with self._changed:
            self._n_reading += 1
        try:
            while True:
                started = time.monotonic()
                chunk = next(chunks, None)
                if chunk is None:
                    break
                rows, images = chunk
                is_usable = self._find_usable(images)
                request.seconds["read"] += time.monotonic() - started
                self._put(request, rows[is_usable], images[is_usable])
                while request.n_held > _MAX_HELD_BATCHES * self._batch_size:
                    self._collect_oldest(request)
        finally:
            with self._changed:
                self._n_reading -= 1
                if self._n_reading == 0:
                    for box in list(self._open):
                        self._dispatch(box)

    def _put(self, request: _Request, rows: NDArray[np.intp], images: Images) -> None:
        """Copy images into the open batch of their box size, sending each batch that fills."""
        done = 0
        while done < len(rows):
            box = images.shape[1]
            with self._changed:
                batch = self._open.get(box)
                if batch is None:
                    room = np.empty((self._batch_size, box, box), np.float32)
                    batch = self._open[box] = _Batch(images=room, opened_at=time.monotonic())
                start = batch.n_images
                n_taken = min(len(batch.images) - start, len(rows) - done)
                batch.images[start : start + n_taken] = images[done : done + n_taken]
                batch.n_images += n_taken
                request.shares.append(_Share(batch, start, rows[done : done + n_taken]))
                request.n_held += n_taken
                if batch.n_images == len(batch.images):
                    self._dispatch(box)
            done += n_taken

    def _dispatch(self, box: int) -> None:
        """Send the open batch of this box size to the model; the caller holds the condition."""
        batch = self._open.pop(box)
        self._queue_slots.acquire()
        images = batch.images[: batch.n_images]
        prepared = self._prepare_thread.submit(self._prepare, images)
        batch.work = self._model_thread.submit(self._score, images, prepared)
        batch.work.add_done_callback(lambda _: self._queue_slots.release())
        self._changed.notify_all()

    def _collect_oldest(self, request: _Request) -> None:
        """Wait for the request's oldest share and take its scores."""
        share = request.shares.popleft()
        batch, n_images = share.batch, len(share.rows)
        with self._changed:
            while batch.work is None:
                left_s = batch.opened_at + self._max_wait_s - time.monotonic()
                if left_s <= 0:
                    self._dispatch(batch.images.shape[1])
                else:
                    self._changed.wait(left_s)
        scored = batch.work.result()
        part = slice(share.start, share.start + n_images)
        scores, features = scored.scores[part], scored.features[part]
        is_finite = np.isfinite(scores)
        request.scores[share.rows[is_finite]] = scores[is_finite]
        request.unsaved.append((share.rows[is_finite], features[is_finite]))
        if share.start == 0:
            request.batch_sizes.append(len(scored.scores))
        request.n_held -= n_images
        request.n_unsaved += n_images
        for step, seconds in scored.seconds.items():
            request.seconds[step] += seconds * n_images / len(scored.scores)
        if request.n_unsaved >= _ROWS_PER_APPEND:
            self._store(request)

    def _store(self, request: _Request) -> None:
        if not request.unsaved:
            return
        started = time.monotonic()
        rows = np.concatenate([rows for rows, _ in request.unsaved])
        features = np.concatenate([features for _, features in request.unsaved])
        self._cache.append(self.model_hash, request.uids[rows], request.scores[rows], features)
        request.unsaved.clear()
        request.n_unsaved = 0
        request.seconds["store"] += time.monotonic() - started

    def _prepare(self, images: Images) -> tuple[Any, float]:
        """Resize (in its own thread) and say how long it took."""
        started = time.monotonic()
        prepared = self._scorer.prepare(images)
        return prepared, time.monotonic() - started

    def _score(self, images: Images, preparing: Future[tuple[Any, float]]) -> _Scored:
        """Run the model (in the inference thread), halving the batch when memory does not suffice."""
        try:
            prepared, prepare_s = preparing.result()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            prepared, prepare_s = None, 0.0  # too much at once for the device: part by part below
        started = time.monotonic()
        parts: list[tuple[NDArray[Any], NDArray[Any]]] = []
        start, limit = 0, self._batch_size
        while start < len(images):
            part = slice(start, min(start + limit, len(images)))
            try:
                shown = self._scorer.prepare(images[part]) if prepared is None else prepared[part]
                parts.append(self._scorer.infer(shown))
            except Exception as error:  # ONNX Runtime's own errors have no common base but this
                if not is_out_of_memory(error):
                    raise
                n_shown = part.stop - part.start
                if n_shown == 1:
                    raise ResourceError(self.model_hash, "one image fits into memory", error) from error
                limit = self._batch_size = max(1, n_shown // 2)
                log.warning("ranker_batch_halved", extra={"batch_size": limit, "reason": str(error)})
                continue
            start = part.stop
        scores = np.concatenate([np.asarray(s, np.float32).reshape(-1) for s, _ in parts])
        features = np.concatenate([np.asarray(f, np.float16) for _, f in parts])
        if len(scores) != len(images) or len(features) != len(images):
            value = f"{len(images)} images, {len(scores)} scores, {len(features)} features"
            raise ResourceError(self.model_hash, "the model gives one score and one feature an image", value)
        return _Scored(scores, features, {"prepare": prepare_s, "inference": time.monotonic() - started})


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error means that the batch was too large for the memory."""
    return isinstance(error, MemoryError) or any(word in str(error).lower() for word in _MEMORY_WORDS)


def count_scores(scores: NDArray[np.float32]) -> tuple[int, ...]:
    """Return the histogram of scores in 100 equal bins over [0, 1]; what lies outside counts at the ends."""
    bins = np.clip((scores * N_HISTOGRAM_BINS).astype(np.int64), 0, N_HISTOGRAM_BINS - 1)
    return tuple(np.bincount(bins, minlength=N_HISTOGRAM_BINS).tolist())
