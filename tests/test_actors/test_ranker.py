"""The ranker batches across exposures, scores nothing twice and accounts for every image."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mrcfile
import numpy as np
import pandas as pd
import pytest

from actors.ranker import BatchingRanker, ImageScores, count_scores
from actors.stack_images import find_mendable_images, read_images
from stream.records.commands import Rank
from stream.records.errors import ConfigurationError, InputError, ResourceError
from stream.records.particles import derive_particle_uid
from stream.records.values import ExposureId, Optics, PreprocessResult
from stream.sinks import relion_star
from stream.store.feature_cache import FeatureCache
from stream.store.layout import OutputLayout

BOX = 16


class MeanScorer:
    """Scores an image by its first pixel and keeps the sizes of its batches."""

    model_hash = "mean"
    provider = "NumPy"

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.boxes: set[int] = set()

    def prepare(self, images: np.ndarray) -> np.ndarray:
        return images

    def infer(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        self.batches.append(len(images))
        self.boxes.add(images.shape[1])
        scores = images[:, 0, 0]
        return scores, np.repeat(scores[:, None], 4, axis=1)


@pytest.fixture
def layout(tmp_path: Path) -> OutputLayout:
    return OutputLayout(tmp_path)


@pytest.fixture
def cache(layout: OutputLayout) -> Iterator[FeatureCache]:
    with FeatureCache(layout.features) as opened:
        yield opened


def true_scores(number: int, n_particles: int) -> np.ndarray:
    return np.random.default_rng(number).uniform(0, 1, n_particles).astype(np.float32)


def make_exposure(
    layout: OutputLayout, number: int, n_particles: int, *, box: int = BOX, spoil: bool = False
) -> Rank:
    """Write a stack whose images carry their score in the first pixel, and its table."""
    name, exposure_id = f"m{number}", ExposureId(f"exposure{number}")
    images = np.random.default_rng(number + 1000).normal(size=(n_particles, box, box)).astype(np.float32)
    images[:, 0, 0] = true_scores(number, n_particles)
    layout.particles(name).parent.mkdir(exist_ok=True)
    with mrcfile.new(layout.particles(name), overwrite=True) as stack:
        stack.set_data(images)
        stack.set_image_stack()
    if spoil:
        on_disk = np.memmap(layout.particles(name), np.float32, mode="r+", offset=1024, shape=images.shape)
        on_disk[1, 3, 3] = np.nan
        on_disk[2] = 0.5
        on_disk[4, 2, 2] = np.inf
        on_disk.flush()
    table = pd.DataFrame(
        {
            "rlnImageName": [f"{i + 1:06d}@particles/{name}.mrcs" for i in range(n_particles)],
            "rlnOpticsGroup": np.ones(n_particles, np.int64),
            "icestreamUid": uids_of(exposure_id, n_particles),
        }
    )
    optics = relion_star.make_particle_optics(
        Optics(voltage_kv=300, cs_mm=2.7, amplitude_contrast=0.1),
        image_pixel_size_angstrom=2.0,
        image_size_px=box,
    )
    relion_star.write_particles_star(layout.particles_table(name), table, optics)
    preprocessed = PreprocessResult(
        exposure_id=exposure_id,
        micrograph=None,
        thumbnail=None,
        particles=f"particles/{name}.mrcs" if n_particles else None,
        n_picks=n_particles,
        n_particles=n_particles,
        n_excluded_particles=0,
        box_size_px=box,
        pixel_size_angstrom=2.0,
        motion=None,
        ctf=None,
        ice_ratio=None,
        seconds={},
    )
    return Rank(exposure_id=exposure_id, name=name, preprocessed=preprocessed)


def uids_of(exposure_id: ExposureId, n_particles: int) -> np.ndarray:
    return np.array([derive_particle_uid(exposure_id, i) for i in range(n_particles)], np.uint64)


def test_every_image_gets_its_own_score_and_feature_under_its_uid(layout: OutputLayout, cache: FeatureCache):
    ranker = BatchingRanker(MeanScorer(), cache, batch_size=8)
    result = ranker.rank(make_exposure(layout, 1, 21), layout)
    uids = uids_of(ExposureId("exposure1"), 21)
    np.testing.assert_array_equal(cache.lookup("mean", uids)[1], true_scores(1, 21))
    np.testing.assert_array_equal(
        cache.features("mean", uids)[1][:, 3], true_scores(1, 21).astype(np.float16)
    )
    assert (result.n_scored, result.n_excluded, result.n_cache_hits) == (21, 0, 0)
    assert sum(result.score_histogram) == 21
    assert result.provider == "NumPy"
    assert result.seconds["total"] > 0


def test_many_callers_share_a_batch_and_each_gets_its_own(layout: OutputLayout, cache: FeatureCache):
    scorer = MeanScorer()
    commands = [make_exposure(layout, number, 10 + number) for number in range(8)]
    n_all = sum(10 + number for number in range(8))
    ranker = BatchingRanker(scorer, cache, batch_size=n_all, max_wait_s=60)
    with ranker._changed:
        ranker._n_reading += 1  # somebody else reads, so that the batch goes when it is full and not before
    with ThreadPoolExecutor(8) as callers:
        results = list(callers.map(lambda command: ranker.rank(command, layout), commands))
    assert scorer.batches == [n_all]
    for number, result in enumerate(results):
        uids = uids_of(ExposureId(f"exposure{number}"), 10 + number)
        np.testing.assert_array_equal(cache.lookup("mean", uids)[1], true_scores(number, 10 + number))
        assert result.n_scored == 10 + number


def test_many_callers_at_once_lose_and_mix_nothing(layout: OutputLayout, cache: FeatureCache):
    scorer = MeanScorer()
    ranker = BatchingRanker(scorer, cache, batch_size=16, max_wait_s=0.01)
    commands = [make_exposure(layout, number, 10 + number) for number in range(16)]
    with ThreadPoolExecutor(8) as callers:
        results = list(callers.map(lambda command: ranker.rank(command, layout), commands))
    assert sum(scorer.batches) == sum(result.n_scored for result in results)
    for number in range(16):
        uids = uids_of(ExposureId(f"exposure{number}"), 10 + number)
        np.testing.assert_array_equal(cache.lookup("mean", uids)[1], true_scores(number, 10 + number))


def test_a_known_model_scores_nothing_again_and_does_not_read_the_stack(
    layout: OutputLayout, cache: FeatureCache
):
    scorer = MeanScorer()
    command = make_exposure(layout, 1, 12)
    first = BatchingRanker(scorer, cache).rank(command, layout)
    layout.particles("m1").unlink()
    second = BatchingRanker(scorer, cache).rank(command, layout)
    assert sum(scorer.batches) == 12
    assert second.n_cache_hits == 12
    assert (second.n_scored, second.score_histogram) == (first.n_scored, first.score_histogram)


def test_a_new_model_scores_again_from_the_same_stack(layout: OutputLayout, cache: FeatureCache):
    command = make_exposure(layout, 1, 12)
    BatchingRanker(MeanScorer(), cache).rank(command, layout)
    other = MeanScorer()
    other.model_hash = "other"
    assert BatchingRanker(other, cache).rank(command, layout).n_cache_hits == 0
    assert sum(other.batches) == 12
    assert cache.models() == ["mean", "other"]


def test_only_what_the_cache_lacks_is_scored(layout: OutputLayout, cache: FeatureCache):
    scorer = MeanScorer()
    command = make_exposure(layout, 1, 12)
    uids = uids_of(ExposureId("exposure1"), 12)
    cache.append("mean", uids[3:7], np.full(4, 0.5, np.float32), np.zeros((4, 4), np.float16))
    result = BatchingRanker(scorer, cache).rank(command, layout)
    assert (result.n_cache_hits, result.n_scored, sum(scorer.batches)) == (4, 12, 8)
    expected = true_scores(1, 12)
    expected[3:7] = 0.5
    np.testing.assert_array_equal(cache.lookup("mean", uids)[1], expected)


def test_images_without_a_signal_are_excluded_and_counted(layout: OutputLayout, cache: FeatureCache):
    result = BatchingRanker(MeanScorer(), cache, batch_size=3).rank(
        make_exposure(layout, 1, 9, spoil=True), layout
    )
    assert (result.n_scored, result.n_excluded) == (6, 3)
    is_found, scores = cache.lookup("mean", uids_of(ExposureId("exposure1"), 9))
    assert np.flatnonzero(~is_found).tolist() == [1, 2, 4]
    np.testing.assert_array_equal(scores[[0, 3, 5, 6, 7, 8]], true_scores(1, 9)[[0, 3, 5, 6, 7, 8]])


def test_a_scorer_that_mends_pixels_is_shown_every_image_with_two_finite_values(
    layout: OutputLayout, cache: FeatureCache
):
    scorer = MeanScorer()
    ranker = BatchingRanker(scorer, cache, batch_size=3, mends_pixels=True)
    result = ranker.rank(make_exposure(layout, 1, 9, spoil=True), layout)
    assert (result.n_scored, result.n_excluded, sum(scorer.batches)) == (8, 1, 8)
    images = np.full((4, 2, 2), np.nan, np.float32)
    images[1, 0], images[2, 0], images[3, 0, 0] = 3.0, [1, 2], 4.0
    assert find_mendable_images(images).tolist() == [False, False, True, False]
    assert find_mendable_images(images[:0]).tolist() == []


def test_scores_that_are_no_numbers_are_counted_as_excluded(layout: OutputLayout, cache: FeatureCache):
    class Broken(MeanScorer):
        def infer(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            scores, features = super().infer(images)
            return np.where(scores > 0.5, np.nan, scores), features

    result = BatchingRanker(Broken(), cache).rank(make_exposure(layout, 1, 40), layout)
    n_broken = int((true_scores(1, 40) > 0.5).sum())
    assert (result.n_scored, result.n_excluded) == (40 - n_broken, n_broken)


def test_an_exposure_without_particles_has_a_result(layout: OutputLayout, cache: FeatureCache):
    result = BatchingRanker(MeanScorer(), cache).rank(make_exposure(layout, 1, 0), layout)
    assert (result.n_scored, result.n_excluded, sum(result.score_histogram)) == (0, 0, 0)


def test_a_partial_batch_waits_for_a_reader_no_longer_than_allowed(layout: OutputLayout, cache: FeatureCache):
    ranker = BatchingRanker(MeanScorer(), cache, batch_size=64, max_wait_s=0.05)
    with ranker._changed:
        ranker._n_reading += 1  # somebody reads and never comes to an end
    started = time.monotonic()
    assert ranker.rank(make_exposure(layout, 1, 5), layout).n_scored == 5
    assert time.monotonic() - started < 30


def test_too_large_a_batch_is_halved_for_good(layout: OutputLayout, cache: FeatureCache):
    class Small(MeanScorer):
        def infer(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            if len(images) > 5:
                raise RuntimeError(
                    "[ONNXRuntimeError] BFCArena: Failed to allocate memory for requested buffer"
                )
            return super().infer(images)

    scorer = Small()
    ranker = BatchingRanker(scorer, cache, batch_size=16)
    ranker.rank(make_exposure(layout, 1, 40), layout)
    assert ranker.batch_size == 4
    assert sum(scorer.batches) == 40
    np.testing.assert_array_equal(
        cache.lookup("mean", uids_of(ExposureId("exposure1"), 40))[1], true_scores(1, 40)
    )


def test_a_batch_that_cannot_be_prepared_at_once_is_prepared_in_parts(
    layout: OutputLayout, cache: FeatureCache
):
    class Narrow(MeanScorer):
        def prepare(self, images: np.ndarray) -> np.ndarray:
            if len(images) > 5:
                raise RuntimeError("CUDA error: out of memory")
            return images

    scorer = Narrow()
    ranker = BatchingRanker(scorer, cache, batch_size=16)
    assert ranker.rank(make_exposure(layout, 1, 40), layout).n_scored == 40
    assert ranker.batch_size == 4
    assert max(scorer.batches) <= 5
    uids = uids_of(ExposureId("exposure1"), 40)
    np.testing.assert_array_equal(cache.lookup("mean", uids)[1], true_scores(1, 40))


def test_reading_resizing_inference_and_writing_go_on_side_by_side(
    layout: OutputLayout, cache: FeatureCache, monkeypatch
):
    """Each of the four steps waits until the next two batches have begun the step before it, which only a pipeline can do."""
    n_batches, lag = 8, 10.0
    begun = {step: threading.Semaphore(0) for step in ("read", "prepare", "infer")}
    late: list[str] = []

    def wait_for(step: str) -> None:
        if not begun[step].acquire(timeout=lag):
            late.append(step)

    class Watched(MeanScorer):
        def prepare(self, images: np.ndarray) -> np.ndarray:
            begun["prepare"].release()
            return images

        def infer(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            begun["infer"].release()
            if len(self.batches) == 1:  # while the second batch is inferred …
                wait_for("prepare")
                wait_for("prepare")
                wait_for("prepare")  # … the third is resized …
                for _ in range(4):
                    wait_for("read")  # … and the fourth is read
            return super().infer(images)

    def read(*arguments: object, chunk: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for part in read_images(*arguments, chunk=chunk):  # type: ignore[arg-type]
            begun["read"].release()
            yield part

    appended = []
    append = cache.append

    def store(*arguments: object) -> None:
        if not appended:  # the first rows are stored while later batches are still to be inferred
            for _ in range(4):
                wait_for("infer")
            appended.append(True)
        append(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("actors.ranker.read_images", read)
    monkeypatch.setattr("actors.ranker._ROWS_PER_APPEND", 4)
    monkeypatch.setattr(cache, "append", store)
    ranker = BatchingRanker(Watched(), cache, batch_size=4)
    result = ranker.rank(make_exposure(layout, 1, 4 * n_batches), layout)
    assert result.n_scored == 4 * n_batches
    assert not late


def test_one_image_that_does_not_fit_is_the_machines_failure(layout: OutputLayout, cache: FeatureCache):
    class Tiny(MeanScorer):
        def infer(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            raise MemoryError

    with pytest.raises(ResourceError, match="fits into memory"):
        BatchingRanker(Tiny(), cache, batch_size=4).rank(make_exposure(layout, 1, 5), layout)


def test_an_error_of_the_model_reaches_every_caller_and_the_ranker_goes_on(
    layout: OutputLayout, cache: FeatureCache
):
    class Moody(MeanScorer):
        is_well = False

        def infer(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            if not self.is_well:
                raise ValueError("bad graph")
            return super().infer(images)

    scorer = Moody()
    ranker = BatchingRanker(scorer, cache, batch_size=64)
    commands = [make_exposure(layout, number, 5) for number in range(3)]
    with ThreadPoolExecutor(3) as callers:
        futures = [callers.submit(ranker.rank, command, layout) for command in commands]
        assert [type(future.exception(20)) for future in futures] == [ValueError] * 3
    scorer.is_well = True
    assert ranker.rank(commands[0], layout).n_scored == 5


def test_a_truncated_stack_fails_its_own_exposure_alone(layout: OutputLayout, cache: FeatureCache):
    ranker = BatchingRanker(MeanScorer(), cache)
    good, bad = make_exposure(layout, 1, 5), make_exposure(layout, 2, 5)
    path = layout.particles("m2")
    path.write_bytes(path.read_bytes()[:-700])
    with pytest.raises(InputError, match=r"m2\.mrcs"):
        ranker.rank(bad, layout)
    assert ranker.rank(good, layout).n_scored == 5


def test_a_table_that_disagrees_with_preprocessing_is_an_input_error(
    layout: OutputLayout, cache: FeatureCache
):
    command = make_exposure(layout, 1, 5)
    make_exposure(layout, 1, 4)
    with pytest.raises(InputError, match="5 rows"):
        BatchingRanker(MeanScorer(), cache).rank(command, layout)


def test_boxes_of_different_sizes_go_in_different_batches(layout: OutputLayout, cache: FeatureCache):
    scorer = MeanScorer()
    ranker = BatchingRanker(scorer, cache, batch_size=64)
    commands = [make_exposure(layout, 1, 5), make_exposure(layout, 2, 6, box=24)]
    with ThreadPoolExecutor(2) as callers:
        results = list(callers.map(lambda command: ranker.rank(command, layout), commands))
    assert [result.n_scored for result in results] == [5, 6]
    assert scorer.boxes == {16, 24}


def test_callers_hold_a_bounded_number_of_images(layout: OutputLayout, cache: FeatureCache):
    """A slow model makes the reader wait instead of reading the whole stack into memory."""
    released = threading.Event()

    class Slow(MeanScorer):
        def infer(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            released.wait(20)
            return super().infer(images)

    ranker = BatchingRanker(Slow(), cache, batch_size=4)
    command = make_exposure(layout, 1, 200)
    n_put = 0
    put = ranker._put

    def count(request, rows, images):
        nonlocal n_put
        put(request, rows, images)
        n_put += len(rows)

    ranker._put = count
    with ThreadPoolExecutor(1) as callers:
        future = callers.submit(ranker.rank, command, layout)
        deadline = time.monotonic() + 10
        while n_put < 8 and time.monotonic() < deadline:
            released.wait(0.02)
        released.wait(0.3)  # time enough to read everything, were it not held back
        n_put_while_stuck = n_put
        released.set()
        assert future.result(20).n_scored == 200
    assert 0 < n_put_while_stuck <= 24


def test_images_are_read_by_stack_and_index(layout: OutputLayout):
    make_exposure(layout, 1, 6)
    make_exposure(layout, 2, 6)
    paths = np.array([str(layout.particles(f"m{1 + i % 2}")) for i in range(6)], dtype=object)
    indices = np.array([5, 0, 3, 4, 1, 2])
    seen = {}
    for rows, images in read_images(paths, indices, np.array([0, 1, 2, 3, 5]), chunk=2):
        assert len(rows) <= 2
        seen |= dict(zip(rows.tolist(), images[:, 0, 0].tolist(), strict=True))
    expected = {i: float(true_scores(1 + i % 2, 6)[indices[i]]) for i in (0, 1, 2, 3, 5)}
    assert seen == expected
    with pytest.raises(InputError, match="stack of 6"):
        list(read_images(paths, indices + 1, np.array([0]), chunk=2))


def test_histogram_has_a_hundred_bins_with_the_ends_closed():
    histogram = count_scores(np.array([0.0, 0.005, 0.405, 0.999, 1.0, 1.2, -0.1], np.float32))
    assert len(histogram) == 100
    assert (histogram[0], histogram[40], histogram[99]) == (3, 1, 3)


def test_settings_that_make_no_sense_are_refused(cache: FeatureCache):
    with pytest.raises(ConfigurationError, match="batch_size"):
        BatchingRanker(MeanScorer(), cache, batch_size=0)


def test_scores_come_back_in_the_order_asked_for(layout: OutputLayout, cache: FeatureCache):
    make_exposure(layout, 1, 30)
    order = np.random.default_rng(3).permutation(30)
    paths = np.array([str(layout.particles("m1"))] * 30, dtype=object)
    found: ImageScores = BatchingRanker(MeanScorer(), cache, batch_size=7).score_images(
        (order + 1).astype(np.uint64), paths, order
    )
    np.testing.assert_array_equal(found.scores, true_scores(1, 30)[order])


def test_dark_particles_are_inverted_before_they_are_scored(layout: OutputLayout, cache: FeatureCache):
    make_exposure(layout, 1, 5)
    paths = np.array([str(layout.particles("m1"))] * 5, dtype=object)
    signs = np.array([1, -1, 1, -1, -1], np.int8)
    found = BatchingRanker(MeanScorer(), cache, batch_size=2).score_images(
        np.arange(1, 6, dtype=np.uint64), paths, np.arange(5), contrast_signs=signs
    )
    np.testing.assert_array_equal(found.scores, true_scores(1, 5) * signs)
