"""A session on real Ray: bad files, a service killed at any moment, a second service, a drain."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import kit
import mrcfile
import numpy as np
import pytest

from stream.records.events import Event, ExposurePreprocessed, ExposureRanked
from stream.store.feature_cache import FeatureCache
from stream.store.journal import read_journal

pytestmark = pytest.mark.ray
N_GOOD = 6
N_BAD = 3


def start(microscope: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    """Start the live service in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "stream",
        "run",
        *map(str, kit.session_options(microscope, out)),
        *more,
    ]
    return subprocess.Popen(
        command,
        env=kit.environment(),
        cwd=kit.REPOSITORY,
        text=True,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


def events_of(out: Path) -> list[Event]:
    journal = out / "journal.sqlite"
    return list(read_journal(journal)) if journal.is_file() else []


def wait_for(
    out: Path, kind: type[Event], count: int, process: subprocess.Popen[str], limit_s: float = 150
) -> None:
    """Wait until the journal has `count` events of a kind."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise AssertionError(
                f"the service ended with {process.returncode}: {process.communicate()[1][-3000:]}"
            )
        if sum(isinstance(e, kind) for e in events_of(out)) >= count:
            return
        time.sleep(0.1)
    raise AssertionError(f"no {count} {kind.__name__} within {limit_s} s")


def scores_of(out: Path) -> dict[int, float]:
    """Return the score of every particle in the feature cache, by uid."""
    cache = FeatureCache(out / "features")
    (model_hash,) = cache.models()
    uids, scores = cache.scores(model_hash)
    return dict(zip(uids.tolist(), scores.tolist(), strict=True))


def kill_family(process: subprocess.Popen[str]) -> None:
    """SIGKILL the service alone; what it started must not get in the way of the next one."""
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()


@pytest.fixture(scope="module")
def undisturbed(microscope: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same movies, reprocessed in one process without Ray and without accidents."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    kit.icestream("reprocess", *kit.session_options(microscope, out), "--in-process")
    return out


def test_a_service_that_is_killed_again_and_again_ends_with_the_undisturbed_result(
    microscope: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for n_done in (1, 3):
        process = start(microscope, out)
        wait_for(out, ExposurePreprocessed, n_done, process)
        kill_family(process)
    done = kit.icestream("run", *kit.session_options(microscope, out), "--until-idle", "--json")
    status = json.loads(done.stdout)
    assert status["balanced"]
    assert (status["movies"]["done"], status["movies"]["quarantined"]) == (N_GOOD, N_BAD)
    for kind in (ExposurePreprocessed, ExposureRanked):
        outcomes = Counter(e.result.exposure_id for e in events_of(out) if isinstance(e, kind))
        assert len(outcomes) == N_GOOD
        assert set(outcomes.values()) == {1}, "no movie is processed twice"
    assert status["particles"] == kit.status(undisturbed)["particles"]
    stacks = sorted(p.name for p in (undisturbed / "particles").glob("*.mrcs"))
    assert stacks
    for name in stacks:
        # Not to the last bit: MKL's order of summation follows the alignment of memory.
        images, expected = (
            mrcfile.read(o / "particles" / name).astype(np.float32) for o in (out, undisturbed)
        )
        np.testing.assert_allclose(images, expected, atol=0.02)
    assert scores_of(out) == pytest.approx(scores_of(undisturbed), abs=0.02)
    assert not list(out.rglob(".tmp-*"))


def test_each_bad_file_is_in_quarantine_with_its_reason(undisturbed: Path) -> None:
    reasons = {item["name"]: item["reason"] for item in kit.status(undisturbed)["quarantine"]}
    assert set(reasons) == {"truncated", "empty", "not_a_movie"}
    for name, reason in reasons.items():
        assert f"{name}.tiff" in reason
        assert "\n" not in reason


def test_exports_of_a_session_load_in_starfile_and_hold_every_scored_particle(undisturbed: Path) -> None:
    import starfile

    table = starfile.read(undisturbed / "export" / "particles.star")
    assert isinstance(table, dict)
    status = kit.status(undisturbed)
    assert len(table["particles"]) == status["particles"]["scored"]
    assert set(table["particles"]["rlnRandomSubset"]) == {1, 2}


def test_a_second_service_is_refused_and_ctrl_c_drains_the_first(microscope: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = start(microscope, out)
    wait_for(out, ExposurePreprocessed, 1, first)
    second = kit.icestream("run", *kit.session_options(microscope, out), check=False)
    assert second.returncode == 2
    assert "one service at a time" in second.stderr
    assert str(first.pid) in second.stderr
    first.send_signal(signal.SIGINT)
    _, errors = first.communicate(timeout=120)
    assert first.returncode == 0, errors[-2000:]
    status = kit.status(out)
    assert status["movies"]["in_work"] == 0
    assert status["balanced"]
