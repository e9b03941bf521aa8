"""Who owns a failure: the input, or the machine."""

from __future__ import annotations

import errno
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.handlers import Failure, attempt
from actors.outcomes import event_for
from stream.records.commands import StartRun
from stream.records.errors import InputError, ResourceError
from stream.records.events import RunFailed
from stream.records.values import (
    CampaignId,
    FailureKind,
    ParticleSubset,
    RunId,
    RunPurpose,
    RunRequest,
)
from stream.store.files import replacing


def failing_with(error: Exception) -> Failure:
    def process() -> int:
        raise error

    outcome = attempt(process, "movie_7")
    assert isinstance(outcome, Failure)
    return outcome


def test_bad_input_belongs_to_the_item_and_keeps_its_line() -> None:
    failure = failing_with(InputError("movie_7.tif", "a movie has at least one frame", 0))
    assert failure == Failure(
        kind=FailureKind.INPUT, reason="movie_7.tif: a movie has at least one frame (found: 0)"
    )


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ResourceError("gpu", "memory suffices"), "gpu: memory suffices"),
        (OSError(errno.ENOSPC, "No space left on device"), "movie_7: the disk is full"),
        (OSError(errno.EIO, "Input/output error", "/data/x"), r"movie_7: Input/output error \(/data/x\)"),
        (MemoryError(), "movie_7: MemoryError"),
        (ZeroDivisionError("a bug"), "movie_7: ZeroDivisionError: a bug"),
    ],
)
def test_everything_else_belongs_to_the_machine_and_names_the_item(error: Exception, words: str) -> None:
    failure = failing_with(error)
    assert failure.kind is FailureKind.RESOURCE
    assert re.search(words, failure.reason)


def test_a_failed_run_is_answered_with_its_reason() -> None:
    request = RunRequest(
        run_id=RunId("run001"),
        campaign_id=CampaignId("campaign001"),
        purpose=RunPurpose.UPDATE,
        subset=ParticleSubset(score_threshold=0.4),
        n_particles=5,
        model_hash="m",
        symmetry="C1",
        mask_diameter_angstrom=None,
        start_map=None,
        warm_start=None,
        compare_with=None,
        reason="",
    )
    failure = Failure(kind=FailureKind.RESOURCE, reason="too few particles")
    event = event_for(StartRun(request=request, members=()), failure, 7.0)
    assert event == RunFailed(at=7.0, run_id=RunId("run001"), reason="too few particles")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a small file system cannot be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_fills_up_leaves_the_old_file_and_no_half_written_one(small_disk: Path) -> None:
    target = small_disk / "stack.mrcs"
    target.write_bytes(b"old")

    def process() -> None:
        with replacing(target) as temporary:
            temporary.write_bytes(b"x" * 2**21)

    outcome = attempt(process, "movie_7")
    assert isinstance(outcome, Failure)
    assert outcome.kind is FailureKind.RESOURCE
    assert "the disk is full" in outcome.reason
    assert [p.name for p in small_disk.iterdir()] == ["stack.mrcs"]
    assert target.read_bytes() == b"old"
