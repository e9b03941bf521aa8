"""The feature cache loses nothing that was acknowledged, whatever is killed, and never loads everything."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from stream.records.errors import InputError, ResourceError
from stream.store import feature_cache
from stream.store.feature_cache import FeatureCache

MODEL = "a" * 64
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[FeatureCache]:
    with FeatureCache(tmp_path / "features") as opened:
        yield opened


def rows(first_uid: int, n_rows: int, *, n_features: int = 16, scale: float = 1.0):
    """Rows whose score and feature are functions of the uid, so that any mix-up shows."""
    uids = np.arange(first_uid, first_uid + n_rows, dtype=np.uint64)
    scores = (scale * (uids % 1000) / 1000).astype(np.float32)
    features = (scale * (uids[:, None] % 997 + np.arange(n_features)) / 1024).astype(np.float16)
    return uids, scores, features


def segment_names(cache: FeatureCache, model: str = MODEL) -> list[str]:
    return sorted(path.name for path in (cache.folder / model).iterdir())


def test_scores_and_features_come_back_by_uid_in_any_order(cache: FeatureCache):
    uids, scores, features = rows(2**63 - 5, 40)
    shuffled = np.random.default_rng(0).permutation(40)
    cache.append(MODEL, uids[shuffled], scores[shuffled], features[shuffled])
    wanted = np.concatenate([uids[::-1], np.array([3, 2**64 - 1], np.uint64)])
    is_found, found_scores = cache.lookup(MODEL, wanted)
    assert is_found.tolist() == [True] * 40 + [False] * 2
    np.testing.assert_array_equal(found_scores[:40], scores[::-1])
    assert np.isnan(found_scores[40:]).all()
    is_found, found_features = cache.features(MODEL, wanted)
    np.testing.assert_array_equal(found_features[:40], features[::-1])
    assert np.isnan(found_features[40:]).all()


def test_a_new_model_shares_nothing_with_the_old_one(cache: FeatureCache):
    cache.append(MODEL, *rows(1, 10))
    assert not cache.lookup("other", rows(1, 10)[0])[0].any()
    cache.append("other", *rows(1, 10, n_features=4, scale=0.5))
    assert cache.models() == [MODEL, "other"]
    assert cache.features("other", rows(1, 1)[0])[1].shape == (1, 4)
    np.testing.assert_array_equal(cache.lookup(MODEL, rows(1, 10)[0])[1], rows(1, 10)[1])


def test_the_last_append_of_a_uid_wins_before_and_after_compaction(cache: FeatureCache):
    cache.append(MODEL, *rows(1, 100))
    cache.append(MODEL, *rows(50, 10, scale=0.25))
    uids, scores, features = rows(55, 1, scale=0.5)
    cache.append(
        MODEL, np.repeat(uids, 2), np.array([0.9, scores[0]], np.float32), np.repeat(features, 2, axis=0)
    )

    def check() -> None:
        assert cache.count(MODEL) == 100
        expected = rows(1, 100)[1]
        expected[49:59] = rows(50, 10, scale=0.25)[1]
        expected[54] = scores[0]
        np.testing.assert_array_equal(cache.lookup(MODEL, rows(1, 100)[0])[1], expected)
        seen = np.concatenate([batch for batch, _ in cache.iterate_features(MODEL, 7)])
        assert sorted(seen.tolist()) == list(range(1, 101))
        for batch, batch_features in cache.iterate_features(MODEL, 7):
            assert len(batch) <= 7
            np.testing.assert_array_equal(cache.features(MODEL, batch)[1], batch_features)

    check()
    assert len(segment_names(cache)) == 3
    cache.compact(MODEL)
    assert len(segment_names(cache)) == 1
    check()


def test_many_small_appends_are_merged_and_lose_nothing(cache: FeatureCache, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(feature_cache, "_SMALL_ROWS", 200)
    monkeypatch.setattr(feature_cache, "_SMALL_COUNT", 4)
    monkeypatch.setattr(feature_cache, "_SEALED_ROWS", 900)
    monkeypatch.setattr(feature_cache, "_ROWS_PER_BATCH", 64)
    order = np.random.default_rng(1).permutation(3000).astype(np.uint64)
    for start in range(0, 3000, 30):
        uids = order[start : start + 30] + np.uint64(1)
        cache.append(
            MODEL, uids, (uids / 4000).astype(np.float32), np.tile(uids[:, None] % 512, 3).astype(np.float16)
        )
    assert len(segment_names(cache)) < 16
    uids, scores = cache.scores(MODEL)
    assert uids.tolist() == list(range(1, 3001))
    np.testing.assert_array_equal(scores, (uids / 4000).astype(np.float32))
    is_found, features = cache.features(MODEL, order + np.uint64(1))
    assert is_found.all()
    np.testing.assert_array_equal(features[:, 2], ((order + np.uint64(1)) % 512).astype(np.float16))


def test_a_kill_between_merging_and_removing_is_seen_by_nobody(
    cache: FeatureCache, monkeypatch: pytest.MonkeyPatch
):
    for start in range(5):
        cache.append(MODEL, *rows(1 + 10 * start, 10))
    before = segment_names(cache)
    monkeypatch.setattr(Path, "unlink", lambda *_arguments, **_options: None)
    cache.compact(MODEL)
    assert len(segment_names(cache)) == len(before) + 1
    monkeypatch.undo()
    (cache.folder / MODEL / ".tmp-0badf00d-segment").write_bytes(b"half")
    reader = FeatureCache(cache.folder)
    assert reader.scores(MODEL)[0].tolist() == list(range(1, 51))
    cache.close()
    with FeatureCache(cache.folder) as writer:
        writer.append(MODEL, *rows(51, 1))
        assert segment_names(writer) == [
            "segment-0000000001-0000000005.arrow",
            "segment-0000000006-0000000006.arrow",
        ]


def test_a_reader_sees_an_append_at_once_and_keeps_its_arrays_after_compaction(cache: FeatureCache):
    reader = FeatureCache(cache.folder)
    assert reader.count(MODEL) == 0
    cache.append(MODEL, *rows(1, 20))
    assert reader.count(MODEL) == 20
    walk = reader.iterate_features(MODEL, 20)
    _, held = next(walk)
    cache.append(MODEL, *rows(21, 20))
    cache.compact(MODEL)
    np.testing.assert_array_equal(held, rows(1, 20)[2])
    assert reader.count(MODEL) == 40


def test_readers_in_threads_never_miss_a_row_while_the_writer_merges(
    cache: FeatureCache, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(feature_cache, "_SMALL_COUNT", 3)
    n_done = [0]
    is_over = threading.Event()
    missing: list[int] = []

    def read() -> None:
        reader = FeatureCache(cache.folder)
        while not is_over.is_set():
            n_expected = n_done[0]
            is_found, _ = reader.lookup(MODEL, np.arange(1, n_expected + 1, dtype=np.uint64))
            missing.append(n_expected - int(is_found.sum()))

    readers = [threading.Thread(target=read) for _ in range(2)]
    for thread in readers:
        thread.start()
    for start in range(60):
        cache.append(MODEL, *rows(1 + 10 * start, 10))
        n_done[0] = 10 * (start + 1)
    is_over.set()
    for thread in readers:
        thread.join(30)
    assert len(missing) > 10
    assert set(missing) == {0}


def test_a_second_writer_is_refused_until_the_first_closes(cache: FeatureCache):
    cache.append(MODEL, *rows(1, 2))
    with FeatureCache(cache.folder, lock_timeout_s=0.1) as second:
        with pytest.raises(ResourceError, match="one process at a time"):
            second.append(MODEL, *rows(3, 2))
        cache.close()
        second.append(MODEL, *rows(3, 2))
        assert second.count(MODEL) == 4


def test_a_new_writer_waits_for_one_that_is_about_to_let_go(cache: FeatureCache):
    cache.append(MODEL, *rows(1, 2))
    letting_go = threading.Timer(0.2, cache.close)
    letting_go.start()
    with FeatureCache(cache.folder, lock_timeout_s=20) as second:
        second.append(MODEL, *rows(3, 2))
        assert second.count(MODEL) == 4
    letting_go.join()


def test_features_of_another_length_are_refused(cache: FeatureCache):
    cache.append(MODEL, *rows(1, 2))
    with pytest.raises(InputError, match="16 dimensions"):
        cache.append(MODEL, *rows(3, 2, n_features=8))


@pytest.mark.parametrize(
    "change",
    [
        lambda u, s, f: (u.astype(np.int64), s, f),
        lambda u, s, f: (u, s[:-1], f),
        lambda u, s, f: (u, s, f.astype(np.float32)),
        lambda u, s, f: (u, s * np.float32(np.nan), f),
        lambda u, s, f: (u, s, f[:, :0]),
    ],
)
def test_rows_of_the_wrong_kind_are_refused_and_leave_nothing(cache: FeatureCache, change):
    with pytest.raises(InputError):
        cache.append(MODEL, *change(*rows(1, 3)))
    assert cache.models() == []


@pytest.mark.parametrize("model", ["", "../x", "a/b", ".hidden", "x" * 129])
def test_model_hashes_that_are_no_folder_names_are_refused(cache: FeatureCache, model: str):
    with pytest.raises(InputError, match="model hash"):
        cache.append(model, *rows(1, 1))


def test_a_damaged_segment_is_named(cache: FeatureCache):
    cache.append(MODEL, *rows(1, 5))
    path = cache.folder / MODEL / segment_names(cache)[0]
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ResourceError, match="segment-0000000001"):
        FeatureCache(cache.folder).count(MODEL)


def test_features_are_walked_without_being_loaded(cache: FeatureCache):
    uids, scores, features = rows(1, 50_000, n_features=128)
    cache.append(MODEL, uids, scores, features)
    del features
    reader = FeatureCache(cache.folder)
    before = pa.total_allocated_bytes()
    n_rows = 0
    for batch, block in reader.iterate_features(MODEL, 4096):
        assert not block.flags.owndata
        assert not block.flags.writeable
        n_rows += len(batch)
    assert n_rows == 50_000
    assert pa.total_allocated_bytes() - before < 2**20


WRITER = """
    import sys
    from pathlib import Path
    import numpy as np
    from stream.store import feature_cache
    feature_cache._SMALL_COUNT = 3
    cache = feature_cache.FeatureCache(Path(sys.argv[1]))
    number = int(sys.argv[2])
    while True:
        uids = np.arange(number * 50, number * 50 + 50, dtype=np.uint64) + np.uint64(1)
        cache.append("model", uids, (uids % 7 / 8).astype(np.float32), np.tile(uids[:, None] % 512, 64).astype(np.float16))
        number += 1
        print(number, flush=True)
"""


def test_sigkill_of_the_writer_loses_no_acknowledged_row(tmp_path: Path):
    folder = tmp_path / "features"
    n_acknowledged = 0
    for n_more in (1, 4, 9, 6):
        child = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(WRITER), str(folder), str(n_acknowledged)],
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert child.stdout is not None
        target = n_acknowledged + n_more
        while n_acknowledged < target:
            n_acknowledged = int(child.stdout.readline())
        child.kill()
        rest = child.stdout.read().splitlines()
        child.wait()
        child.stdout.close()
        n_acknowledged = max([n_acknowledged, *(int(line) for line in rest if line)])
        reader = FeatureCache(folder)
        uids = np.arange(1, n_acknowledged * 50 + 1, dtype=np.uint64)
        is_found, scores = reader.lookup("model", uids)
        assert is_found.all()
        np.testing.assert_array_equal(scores, (uids % 7 / 8).astype(np.float32))
        np.testing.assert_array_equal(
            reader.features("model", uids)[1][:, 63], (uids % 512).astype(np.float16)
        )
    with FeatureCache(folder) as writer:
        writer.append("model", *rows(1, 1, n_features=64))
        assert not [name for name in segment_names(writer, "model") if name.startswith(".tmp-")]
