"""The journal: order, durability, one writer."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from stream.records.errors import ConfigurationError, InvariantError
from stream.records.events import DiskSpaceChanged, ExposureFound, RunEnded
from stream.records.values import (
    AcquisitionMetadata,
    Exposure,
    ExposureId,
    FileIdentity,
    InputKind,
    RunId,
    RunResult,
)
from stream.store.journal import Journal, read_journal

EVENTS = (
    ExposureFound(
        at=1.5,
        exposure=Exposure(
            exposure_id=ExposureId("e1"),
            name="Å movie",
            kind=InputKind.MOVIE,
            file=FileIdentity(path="/x", size_bytes=2**40, mtime_ns=2**62, inode=7, fingerprint="ff"),
            n_frames=3,
            shape_yx=(10, 12),
            metadata=AcquisitionMetadata(pixel_size_angstrom=0.885),
        ),
    ),
    RunEnded(
        at=2.5,
        result=RunResult(
            run_id=RunId("run001"),
            engine="embedded",
            n_particles=5,
            symmetry="D2",
            resolution_angstrom=None,
            cfar=0.25,
            cfar_null=None,
            scf_star=None,
            note="",
            folder="runs/run001",
            seconds={"refine": 1.0},
        ),
    ),
)


def test_events_come_back_equal_and_in_order(tmp_path: Path) -> None:
    with Journal(tmp_path / "journal.sqlite") as journal:
        journal.append(EVENTS)
        assert tuple(journal.replay()) == EVENTS
    assert tuple(read_journal(tmp_path / "journal.sqlite")) == EVENTS


def test_a_second_service_on_the_same_folder_is_refused_with_the_holder_named(tmp_path: Path) -> None:
    rule = f"one service at a time.*pid {os.getpid()}"
    with Journal(tmp_path / "journal.sqlite"), pytest.raises(ConfigurationError, match=rule):
        Journal(tmp_path / "journal.sqlite")
    Journal(tmp_path / "journal.sqlite").close()


def test_a_reader_sees_events_while_the_service_writes(tmp_path: Path) -> None:
    with Journal(tmp_path / "journal.sqlite") as journal:
        journal.append(EVENTS[:1])
        assert len(list(read_journal(tmp_path / "journal.sqlite"))) == 1


def test_a_killed_writer_loses_nothing_that_append_confirmed(tmp_path: Path) -> None:
    program = textwrap.dedent(
        """
        import sys
        from pathlib import Path
        from stream.records.events import DiskSpaceChanged
        from stream.store.journal import Journal
        journal = Journal(Path(sys.argv[1]))
        n = 0
        while True:
            journal.append([DiskSpaceChanged(at=float(n), is_low=False, free_bytes=n)])
            n += 1
            print(n, flush=True)
        """
    )
    path = tmp_path / "journal.sqlite"
    process = subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    confirmed = 0
    for line in process.stdout:
        confirmed = int(line)
        if confirmed >= 50:
            break
    process.send_signal(signal.SIGKILL)
    rest = process.stdout.read().split()
    process.stdout.close()
    process.wait()
    confirmed = int(rest[-1]) if rest else confirmed
    with Journal(path) as journal:
        events = list(journal.replay())
    assert len(events) >= confirmed
    assert [e.free_bytes for e in events if isinstance(e, DiskSpaceChanged)] == list(range(len(events)))


def test_a_folder_without_a_journal_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="holds a journal"):
        list(read_journal(tmp_path / "journal.sqlite"))


def test_a_file_that_is_no_journal_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    path.write_bytes(b"not a database" * 100)
    with pytest.raises(ConfigurationError, match="readable SQLite file"):
        Journal(path)


def test_an_event_of_another_version_stops_the_replay(tmp_path: Path) -> None:
    with Journal(tmp_path / "journal.sqlite") as journal:
        journal.append(EVENTS)
        journal._connection.execute("UPDATE events SET kind = 'Unheard' WHERE seq = 2")
        journal._connection.commit()
        with pytest.raises(InvariantError, match=r"event 2.*Unheard"):
            list(journal.replay())


def test_a_journal_of_an_earlier_schema_is_refused_with_the_remedy(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    with Journal(path) as journal:
        journal.append(EVENTS)
        journal._connection.execute("PRAGMA user_version=1")
    with pytest.raises(ConfigurationError, match=r"process its input anew.*schema 1"):
        Journal(path)
    with pytest.raises(ConfigurationError, match="go on with the version that wrote it"):
        list(read_journal(path))


def test_a_journal_that_is_just_being_made_has_no_events_yet(tmp_path: Path) -> None:
    (tmp_path / "journal.sqlite").touch()
    assert list(read_journal(tmp_path / "journal.sqlite")) == []
