"""The settle guard with a clock handed in."""

import pytest

from stream.ingest.settle import FileStat, FileState, SettleGuard


def look(guard, path, size, now, mtime=1, inode=1):
    return guard.observe(path, size, mtime, inode, now)


def test_a_file_settles_after_two_equal_looks_that_far_apart():
    guard = SettleGuard(2.0)
    look(guard, "a", 10, 0.0)
    assert guard.due(1.9) == []
    look(guard, "a", 10, 1.9)
    assert guard.settled(1.9) == []
    assert guard.settled(2.5) == []  # nobody has looked since the quiet time was over
    assert guard.due(2.5) == ["a"]
    look(guard, "a", 10, 2.5)
    assert guard.settled(2.5) == [("a", FileStat(10, 1, 1))]
    assert guard.settled(9.0) == []  # handed out once
    assert guard.n_unsettled == 1
    assert guard.accept("a", FileStat(10, 1, 1))
    assert guard.n_unsettled == 0


@pytest.mark.parametrize("change", [{"size": 11}, {"mtime": 2}, {"inode": 2}])
def test_any_change_starts_the_wait_anew(change):
    guard = SettleGuard(2.0)
    values = {"size": 10, "mtime": 1, "inode": 1}
    guard.observe("a", 10, 1, 1, 0.0)
    values |= change
    guard.observe("a", values["size"], values["mtime"], values["inode"], 1.5)
    guard.observe("a", values["size"], values["mtime"], values["inode"], 2.5)
    assert guard.settled(2.5) == []
    guard.observe("a", values["size"], values["mtime"], values["inode"], 3.5)
    assert len(guard.settled(3.5)) == 1


def test_an_mtime_in_the_future_settles_like_any_other():
    guard = SettleGuard(1.0)
    far = 4_000_000_000 * 10**9
    guard.observe("a", 10, far, 1, 0.0)
    guard.observe("a", 10, far, 1, 1.0)
    assert [path for path, _ in guard.settled(1.0)] == ["a"]


def test_an_incomplete_file_is_judged_again_with_growing_pauses_and_then_rejected_with_the_readers_reason():
    guard = SettleGuard(1.0, give_up_s=10.0)
    stat = FileStat(10, 1, 1)
    look(guard, "a", 10, 0.0)
    judged = []
    for tenth in range(10, 200):
        now = tenth / 10
        for path in guard.due(now):
            look(guard, path, 10, now)
        for path, _ in guard.settled(now):
            judged.append(now)
            if guard.refuse(path, stat, "2 of 3 frames", now):
                assert guard.state("a") is FileState.REJECTED
                assert guard.reason("a") == "2 of 3 frames"
                assert judged == [1.0, 3.0, 7.0, 10.0]
                return
    pytest.fail("never rejected")


def test_growth_puts_off_the_rejection():
    guard = SettleGuard(1.0, give_up_s=5.0)
    for second in range(20):
        look(guard, "a", second, float(second))
    look(guard, "a", 19, 20.0)
    ((path, stat),) = guard.settled(20.0)
    assert not guard.refuse(path, stat, "incomplete", 20.0)


def test_a_file_that_changes_while_it_is_read_gets_no_verdict():
    guard = SettleGuard(0.0)
    look(guard, "a", 10, 0.0)
    look(guard, "a", 10, 0.1)
    ((path, stat),) = guard.settled(0.1)
    look(guard, "a", 12, 0.2)
    assert not guard.accept(path, stat)
    assert not guard.reject(path, stat, "x")
    assert not guard.refuse(path, stat, "x", 99.0)
    assert guard.state("a") is FileState.WAITING


@pytest.mark.parametrize("verdict", ["accept", "reject"])
def test_a_change_after_the_verdict_offers_the_file_again(verdict):
    guard = SettleGuard(1.0)
    look(guard, "a", 10, 0.0)
    look(guard, "a", 10, 1.0)
    ((path, stat),) = guard.settled(1.0)
    assert guard.accept(path, stat) if verdict == "accept" else guard.reject(path, stat, "bad")
    look(guard, "a", 10, 5.0)
    assert guard.settled(5.0) == []
    look(guard, "a", 99, 6.0)
    look(guard, "a", 99, 7.0)
    assert guard.settled(7.0) == [("a", FileStat(99, 1, 1))]


def test_vanished_files_are_forgotten_and_may_come_back():
    guard = SettleGuard(1.0)
    look(guard, "a", 10, 0.0)
    assert guard.vanish("a") is FileState.WAITING
    assert guard.vanish("a") is None
    assert guard.n_unsettled == 0
    look(guard, "a", 10, 5.0)
    look(guard, "a", 10, 6.0)
    assert len(guard.settled(6.0)) == 1


def test_files_come_oldest_first():
    guard = SettleGuard(0.0)
    for path, mtime in (("c", 3), ("a", 2), ("b", 1)):
        look(guard, path, 1, 0.0, mtime=mtime)
        look(guard, path, 1, 0.0, mtime=mtime)
    assert [path for path, _ in guard.settled(0.0)] == ["b", "a", "c"]


def test_times_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match=r"0 <= settle_s <= give_up_s"):
        SettleGuard(10.0, give_up_s=5.0)
