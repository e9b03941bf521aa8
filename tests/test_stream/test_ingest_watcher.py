"""The folder watcher on a real file system, with both observers."""

import shutil
import threading
import time

import pytest

from stream.ingest.mounts import find_file_system, is_network_file_system
from stream.ingest.watcher import FolderWatcher, NoticeKind, PathFilter, is_temporary_name
from stream.records.errors import ConfigurationError, ResourceError

OBSERVERS = ["inotify", "polling"]


@pytest.fixture
def watch():
    watchers = []

    def start(root, **options):
        options.setdefault("poll_interval_s", 0.05)
        watcher = FolderWatcher(root, **options)
        watcher.start()
        watchers.append(watcher)
        return watcher

    yield start
    for watcher in watchers:
        watcher.close()


def collect(watcher, is_enough, timeout_s=15.0, clock=time.monotonic):
    """Poll until `is_enough(notices by name)`; the newest notice of each path counts."""
    found, tick, deadline = {}, threading.Event(), time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        for notice in watcher.poll(clock()):
            found[notice.path.rsplit("/", 1)[-1]] = notice
        if is_enough(found):
            return found
        tick.wait(0.01)
    pytest.fail(f"not noticed within {timeout_s} s; found {found}")


@pytest.mark.parametrize("observer", OBSERVERS)
def test_files_that_were_there_before_come_with_the_first_poll(tmp_path, watch, observer):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.tif").write_bytes(b"12")
    (tmp_path / "sub/b.tif").write_bytes(b"345")
    watcher = watch(tmp_path, observer=observer)
    found = {notice.path: notice for notice in watcher.poll(0.0)}
    assert set(found) == {str(tmp_path / "a.tif"), str(tmp_path / "sub/b.tif")}
    assert {notice.kind for notice in found.values()} == {NoticeKind.FOUND}
    assert found[str(tmp_path / "sub/b.tif")].stat.size_bytes == 3
    assert watcher.observer_kind == observer


@pytest.mark.parametrize("observer", OBSERVERS)
def test_new_changed_moved_and_deleted_files_are_noticed(tmp_path, watch, observer):
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    root.mkdir()
    elsewhere.mkdir()
    watcher = watch(root, observer=observer)
    (root / "new.mrc").write_bytes(b"1")
    (elsewhere / "moved_in.mrc").write_bytes(b"1")
    (elsewhere / "moved_in.mrc").rename(root / "moved_in.mrc")
    collect(watcher, lambda found: {"new.mrc", "moved_in.mrc"} <= set(found))
    (root / "new.mrc").write_bytes(b"12")
    collect(watcher, lambda found: "new.mrc" in found and found["new.mrc"].kind is not NoticeKind.DELETED)
    (root / "new.mrc").rename(root / "renamed.mrc")
    found = collect(watcher, lambda found: {"new.mrc", "renamed.mrc"} <= set(found))
    assert found["new.mrc"].kind is NoticeKind.DELETED
    (root / "renamed.mrc").unlink()
    collect(watcher, lambda found: "renamed.mrc" in found and found["renamed.mrc"].kind is NoticeKind.DELETED)


@pytest.mark.parametrize("observer", OBSERVERS)
def test_a_folder_that_is_moved_in_whole_brings_its_files(tmp_path, watch, observer):
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "grid/deep").mkdir(parents=True)
    for number in range(5):
        (tmp_path / f"grid/deep/m{number}.tif").write_bytes(b"1")
    watcher = watch(root, observer=observer)
    (tmp_path / "grid").rename(root / "grid")
    collect(watcher, lambda found: {f"m{number}.tif" for number in range(5)} <= set(found))


def test_closing_a_written_file_is_noticed_at_once_by_inotify(tmp_path, watch):
    watcher = watch(tmp_path, observer="inotify", rescan_interval_s=3600)
    with (tmp_path / "a.tif").open("wb") as stream:
        stream.write(b"1")
        collect(watcher, lambda found: "a.tif" in found)
    collect(watcher, lambda found: "a.tif" in found and found["a.tif"].kind is NoticeKind.CLOSED)


def test_the_rescan_finds_what_the_observer_missed(tmp_path, watch):
    watcher = watch(tmp_path, observer="polling", poll_interval_s=3600, rescan_interval_s=5)
    watcher.poll(0.0)
    (tmp_path / "a.tif").write_bytes(b"1")
    assert watcher.poll(4.0) == []
    collect(watcher, lambda found: "a.tif" in found, clock=lambda: 5.1)
    (tmp_path / "a.tif").unlink()
    watcher.request_rescan()
    found = collect(watcher, lambda found: "a.tif" in found, clock=lambda: 5.2)
    assert found["a.tif"].kind is NoticeKind.DELETED


def test_without_recursion_only_the_root_counts(tmp_path, watch):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/b.tif").touch()
    (tmp_path / "a.tif").touch()
    watcher = watch(tmp_path, recursive=False)
    assert [notice.path for notice in watcher.poll(0.0)] == [str(tmp_path / "a.tif")]


def test_linked_movies_are_followed_and_loops_of_links_are_shown_not_hidden(tmp_path, watch):
    (tmp_path / "store").mkdir()
    (tmp_path / "store/a.tif").write_bytes(b"123")
    (tmp_path / "root").mkdir()
    (tmp_path / "root/a.tif").symlink_to(tmp_path / "store/a.tif")
    (tmp_path / "root/loop.tif").symlink_to(tmp_path / "root/loop.tif")
    found = {n.path.rsplit("/", 1)[-1]: n.stat for n in watch(tmp_path / "root").poll(0.0)}
    assert found["a.tif"].size_bytes == 3
    assert found["loop.tif"].size_bytes == -1


def test_a_missing_root_or_one_that_is_a_file_is_a_configuration_error(tmp_path, watch):
    with pytest.raises(ConfigurationError, match=r"gone: the watched folder exists"):
        watch(tmp_path / "gone")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match=r"file: the watched folder is a folder"):
        watch(tmp_path / "file")


@pytest.mark.parametrize("observer", OBSERVERS)
def test_a_root_that_vanishes_is_a_resource_error_until_it_is_back(tmp_path, watch, observer):
    root = tmp_path / "root"
    root.mkdir()
    watcher = watch(root, observer=observer)
    shutil.rmtree(root)
    with pytest.raises(ResourceError, match=r"root: the watched folder is there"):
        watcher.poll(0.0)
    root.mkdir()
    (root / "early.tif").touch()
    collect(watcher, lambda found: "early.tif" in found)
    (root / "late.tif").touch()
    collect(watcher, lambda found: "late.tif" in found)


def test_names_are_filtered_by_globs_and_case_does_not_matter(tmp_path):
    wanted = PathFilter(tmp_path, ("*.tif", "Images-Disc1/*/Data/*.mrc"), ("*_gain*", "./ref.tif"))
    accepted = ["a.tif", "B.TIF", "deep/er/a.tif", "Images-Disc1/GridSquare_1/Data/x.mrc", "sub/ref.tif"]
    refused = ["x.mrc", "a_gain.tif", ".tmp-1-a.tif", ".hidden/a.tif", "a.tif.part", "~a.tif", "ref.tif"]
    assert [name for name in accepted + refused if wanted.is_wanted(str(tmp_path / name))] == accepted
    assert not wanted.is_wanted("/elsewhere/a.tif")


@pytest.mark.parametrize(
    "name", [".tmp-3f-a.mrc", "a.mrc.tmp", "a.mrc~", ".a.mrc.Xy12z", "a.tif.filepart", "~$a.tif"]
)
def test_unfinished_names_of_common_programs_are_known(name):
    assert is_temporary_name(name)


def test_network_file_systems_are_told_from_the_mount_table(tmp_path):
    mounts = tmp_path / "mounts"
    mounts.write_text(
        "/dev/vda / ext4 rw 0 0\nserver:/export /data nfs4 rw 0 0\n//k3/frames /data/k3\\040frames cifs rw 0 0\n"
        "tmpfs /data/local tmpfs rw 0 0\nsshfs /remote fuse.sshfs rw 0 0\n"
    )
    from pathlib import Path

    kinds = {
        "/home/x": ("ext4", False),
        "/data/session1": ("nfs4", True),
        "/data/k3 frames/a": ("cifs", True),
        "/data/local/a": ("tmpfs", False),
        "/remote/a": ("fuse.sshfs", True),
    }
    for folder, (kind, is_network) in kinds.items():
        assert find_file_system(Path(folder), mounts) == kind
        assert is_network_file_system(kind) is is_network
    assert find_file_system(Path("/home"), tmp_path / "no such table") is None


def test_auto_takes_polling_on_a_network_file_system(tmp_path, watch, monkeypatch):
    monkeypatch.setattr("stream.ingest.watcher.find_file_system", lambda _folder: "lustre")
    assert watch(tmp_path).observer_kind == "polling"
    monkeypatch.setattr("stream.ingest.watcher.find_file_system", lambda _folder: "ext4")
    assert watch(tmp_path).observer_kind == "inotify"


def test_auto_falls_back_to_polling_when_the_kernel_has_no_watches_left(tmp_path, watch, monkeypatch):
    from watchdog.observers import inotify

    def refuse(*_args: object, **_options: object):
        raise OSError(28, "inotify watch limit reached")

    monkeypatch.setattr(inotify.InotifyObserver, "schedule", refuse)
    monkeypatch.setattr("stream.ingest.watcher.find_file_system", lambda _folder: "ext4")
    assert watch(tmp_path).observer_kind == "polling"
    with pytest.raises(ResourceError, match=r"max_user_watches.*inotify watch limit reached"):
        watch(tmp_path, observer="inotify")
