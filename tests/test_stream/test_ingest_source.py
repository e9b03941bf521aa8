"""The source of exposures end to end: real files, real threads, settling by a clock handed in."""

import os
import re
import threading
import time
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import tifffile

from stream.config import parse_settings
from stream.ingest.movie_reader import iterate_frames
from stream.ingest.movie_writers import write_eer
from stream.ingest.source import UNREADABLE, ExposureSource, KnownFile, SourceSettings, is_about_settings
from stream.records.errors import ConfigurationError
from stream.records.events import ExposureFound, FileRejected
from stream.records.particles import derive_exposure_id
from stream.records.values import InputKind


class Clock:
    """A monotonic clock that moves when it is told to."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


class Harness:
    """A source with its clock; `run` polls until a condition holds."""

    def __init__(self, root, *, known=(), clock=None, **options):
        options.setdefault("kind", InputKind.MOVIE)
        options.setdefault("settle_s", 1.0)
        options.setdefault("give_up_s", 5.0)
        options.setdefault("poll_interval_s", 0.05)
        options.setdefault("rescan_interval_s", 2.0)
        self.clock = clock or Clock()
        self.source = ExposureSource(SourceSettings(root=root, **options), known=known, monotonic=self.clock)
        self.events = []

    def run(self, is_enough=None, timeout_s=20.0):
        """Poll and move the clock until `is_enough(events)`; by default until the source is quiet."""
        tick, deadline = threading.Event(), time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            self.events += self.source.poll(1e9 + len(self.events))
            if self.source.is_quiet if is_enough is None else is_enough(self.events):
                return self.events
            tick.wait(0.002)
            if isinstance(self.clock, Clock):
                self.clock.now += 0.05
        pytest.fail(f"not within {timeout_s} s: {self.events}")

    @property
    def found(self):
        return [event.exposure for event in self.events if isinstance(event, ExposureFound)]

    @property
    def rejected(self):
        return [event for event in self.events if isinstance(event, FileRejected)]

    def known(self):
        items = [KnownFile(e.exposure_id, e.name, e.file) for e in self.found]
        return items + [KnownFile(e.exposure_id, e.name, e.file) for e in self.rejected]


@pytest.fixture
def harness():
    made = []

    def make(root, **options):
        made.append(Harness(root, **options))
        return made[-1]

    yield make
    for item in made:
        item.source.close()


def movie_bytes(tmp_path, seed=0, shape=(3, 32, 32)):
    path = tmp_path / f".movie{seed}"
    frames = np.random.default_rng(seed).poisson(1, shape).astype(np.uint8)
    tifffile.imwrite(path, frames, compression="lzw", photometric="minisblack")
    return path.read_bytes()


def write_mrc(path, data):
    with mrcfile.new(path, overwrite=True) as mrc:
        mrc.set_data(data)
        if data.ndim == 3:
            mrc.set_image_stack()
    return path


def test_good_and_bad_files_each_get_one_verdict_and_the_stream_goes_on(tmp_path, harness):
    root = tmp_path / "movies"
    root.mkdir()
    data = movie_bytes(tmp_path)
    (root / "good.tif").write_bytes(data)
    (root / "truncated.tif").write_bytes(data[:-700])
    (root / "empty.tif").touch()
    (root / "magic.eer").write_bytes(b"not a movie at all" * 100)
    (root / "zero_frames.tif").write_bytes(b"II*\0" + bytes(4))
    (root / "odd.tif").write_bytes(movie_bytes(tmp_path, 1, (3, 31, 33)))
    write_mrc(root / "dark.mrc", np.zeros((3, 16, 16), np.float32))
    (root / "folder.tif").mkdir()
    (root / "link.tif").symlink_to(root / "link.tif")
    (root / "notes.txt").write_text("no movie")
    h = harness(root)
    h.run()
    assert {e.name: (e.n_frames, e.shape_yx) for e in h.found} == {
        "good": (3, (32, 32)),
        "odd": (3, (31, 33)),
    }
    reasons = {event.name: event.reason for event in h.rejected}
    rules = {
        "truncated": "file truncated",
        "empty": "a movie is not empty (found: 0 bytes)",
        "magic": "magic",
        "zero_frames": "0 frames",
        "dark": "all zero",
        "link": "loop of symbolic links",
    }
    assert set(reasons) == set(rules)
    for name, rule in rules.items():
        assert rule in reasons[name]
        assert reasons[name].startswith(str(root / name))
        assert "\n" not in reasons[name]
    assert {e.file.fingerprint == UNREADABLE for e in h.rejected if e.name == "link"} == {True}
    assert h.source.is_quiet


def test_a_rejected_file_is_offered_again_when_it_changes(tmp_path, harness):
    data = movie_bytes(tmp_path)
    root = tmp_path / "movies"
    root.mkdir()
    (root / "a.tif").write_bytes(data[:900])
    h = harness(root)
    h.run()
    assert len(h.rejected) == 1
    (root / "a.tif").write_bytes(data)
    h.run(lambda events: len(events) == 2)
    assert h.found[0].exposure_id == h.rejected[0].exposure_id
    assert h.found[0].name == h.rejected[0].name


def test_a_replaced_movie_is_offered_again_under_its_name_with_a_new_identity(tmp_path, harness):
    root = tmp_path / "movies"
    root.mkdir()
    (root / "a.tif").write_bytes(movie_bytes(tmp_path, 0))
    h = harness(root)
    h.run()
    (tmp_path / "b").write_bytes(movie_bytes(tmp_path, 1))
    (tmp_path / "b").replace(root / "a.tif")
    h.run(lambda events: len(events) == 2)
    first, second = h.found
    assert first.exposure_id == second.exposure_id
    assert first.name == second.name
    assert first.file.fingerprint != second.file.fingerprint


@pytest.mark.parametrize("observer", ["inotify", "polling"])
def test_a_slow_writer_is_waited_for_and_its_movie_taken_once_and_whole(tmp_path, harness, observer):
    root = tmp_path / "movies"
    root.mkdir()
    data = movie_bytes(tmp_path, 0, (20, 64, 64))
    tick, done = threading.Event(), threading.Event()

    def write_slowly():
        with (root / "slow.tif").open("wb", buffering=0) as stream:
            for start in range(0, len(data), len(data) // 12):
                stream.write(data[start : start + len(data) // 12])
                tick.wait(0.06)
        done.set()

    h = harness(root, clock=time.monotonic, settle_s=0.3, give_up_s=5.0, observer=observer)
    writer = threading.Thread(target=write_slowly)
    writer.start()

    def is_enough(events):
        if events:
            assert done.is_set(), "offered before the writer had closed it"
        return bool(events)

    h.run(is_enough)
    writer.join()
    h.run()
    assert [(e.name, e.n_frames, e.file.size_bytes) for e in h.found] == [("slow", 20, len(data))]


def test_a_writer_that_pauses_longer_than_the_settle_time_is_not_rejected(tmp_path, harness):
    root = tmp_path / "movies"
    root.mkdir()
    data = movie_bytes(tmp_path, 0, (6, 64, 64))
    h = harness(root, settle_s=0.5, give_up_s=1e6)
    (root / "a.tif").write_bytes(data[: len(data) // 2])
    h.source.poll(0.0)
    h.run(lambda _: h.clock.now > 1010)  # far beyond settle_s: the reader has refused it by now
    assert h.events == []
    assert h.source.n_pending == 1
    with (root / "a.tif").open("ab") as stream:
        stream.write(data[len(data) // 2 :])
    h.run(lambda events: len(events) == 1)
    assert h.found[0].n_frames == 6


def test_movies_renamed_into_place_are_taken_and_temporary_names_are_not(tmp_path, harness):
    root = tmp_path / "movies"
    root.mkdir()
    h = harness(root)
    h.run()
    (root / ".tmp-a.tif").write_bytes(movie_bytes(tmp_path))
    (root / "a.tif.part").write_bytes(movie_bytes(tmp_path))
    h.run(lambda _: h.clock.now > 1005)
    assert h.events == []
    (root / ".tmp-a.tif").rename(root / "a.tif")
    h.run(lambda events: len(events) == 1)
    assert h.found[0].name == "a"


def test_equal_names_in_two_folders_are_two_exposures_with_two_names(tmp_path, harness):
    root = tmp_path / "movies"
    for seed, folder in enumerate(("", "grid1", "grid2")):
        (root / folder).mkdir(parents=True, exist_ok=True)
        (root / folder / "movie_1.tif").write_bytes(movie_bytes(tmp_path, seed))
    h = harness(root)
    h.run()
    ids = {derive_exposure_id(p): p for p in ("movie_1.tif", "grid1/movie_1.tif", "grid2/movie_1.tif")}
    names = {ids[e.exposure_id]: e.name for e in h.found}
    assert names["movie_1.tif"] == "movie_1"
    for path in ("grid1/movie_1.tif", "grid2/movie_1.tif"):
        assert names[path] == f"movie_1_{derive_exposure_id(path)[:6]}"


def test_equal_stems_with_different_suffixes_get_different_names(tmp_path, harness):
    root = tmp_path / "movies"
    root.mkdir()
    (root / "a.tif").write_bytes(movie_bytes(tmp_path))
    write_mrc(root / "a.mrc", np.random.default_rng(0).normal(size=(3, 16, 16)).astype(np.float32))
    h = harness(root)
    h.run()
    assert len({e.name for e in h.found}) == 2


def test_a_restart_offers_nothing_that_is_known_and_everything_that_changed(tmp_path, harness):
    root = tmp_path / "movies"
    (root / "deep").mkdir(parents=True)
    for number in range(4):
        (root / f"m{number}.tif").write_bytes(movie_bytes(tmp_path, number))
    (root / "deep/m0.tif").write_bytes(movie_bytes(tmp_path, 9))
    (root / "bad.tif").write_bytes(b"bad")
    first = harness(root)
    first.run()
    assert len(first.events) == 6
    (root / "m2.tif").write_bytes(movie_bytes(tmp_path, 77, (4, 32, 32)))
    (root / "m4.tif").write_bytes(movie_bytes(tmp_path, 5))
    second = harness(root, known=first.known())
    second.run()
    assert sorted(e.name for e in second.found) == ["m2", "m4"]
    assert second.rejected == []
    third = harness(root, known=[*first.known(), *second.known()])
    third.run()
    assert third.events == []


def test_a_file_that_vanishes_before_its_verdict_is_dropped_with_a_line(tmp_path, harness):
    root = tmp_path / "movies"
    root.mkdir()
    (root / "a.tif").write_bytes(movie_bytes(tmp_path))
    h = harness(root, settle_s=1e3, give_up_s=1e4)
    h.source.poll(0.0)
    assert h.source.n_pending == 1
    (root / "a.tif").unlink()
    h.run()
    assert h.events == []
    assert h.source.take_dropped() == [f"{root / 'a.tif'}: the file vanished before it had settled"]


def test_a_wrong_gain_rejects_the_movie_at_once_with_gain_shapes_and_remedy(tmp_path, harness):
    root = tmp_path / "movies"
    root.mkdir()
    (root / "a.tif").write_bytes(movie_bytes(tmp_path, 0, (3, 20, 32)))
    gain = write_mrc(root / "reference.mrc", np.ones((32, 20), np.float32))
    h = harness(root, gain=gain, give_up_s=1e6)
    h.run()
    (event,) = h.rejected
    assert event.reason == (
        f"{gain}: the gain reference has the movie's shape ({root / 'a.tif'}) "
        "(found: gain 32 x 20, movie 20 x 32; it would fit turned by 90 or 270 degrees)"
    )
    for options in ({"gain_rotate_deg": 90}, {"is_gain_orientation_sought": True}):
        taken = harness(root, gain=gain, **options)
        taken.run()
        assert [e.name for e in taken.found] == ["a"]  # and the gain itself is no movie


def test_a_gain_of_the_sensor_passes_for_up_sampled_events_and_one_of_the_wrong_shape_does_not(
    tmp_path, harness
):
    root = tmp_path / "movies"
    root.mkdir()
    write_eer(root / "a.eer", (np.random.default_rng(0).random((4, 32, 48)) < 0.1).astype(np.uint8))
    for shape, n_found in (((32, 48), 1), ((64, 96), 1), ((96, 64), 0)):
        gain = write_mrc(tmp_path / "reference.mrc", np.ones(shape, np.float32))
        h = harness(root, gain=gain, eer_upsampling=2)
        h.run()
        assert len(h.found) == n_found
    assert "gain 96 x 64, movie 64 x 96" in h.rejected[0].reason


def test_a_saturated_movie_is_rejected_with_the_share_of_its_pixels(tmp_path, harness):
    root = tmp_path / "movies"
    root.mkdir()
    frames = np.random.default_rng(0).poisson(200, (3, 32, 32)).clip(0, 210).astype(np.uint8)
    frames[-1][frames[-1] > 200] = 255
    tifffile.imwrite(root / "a.tif", frames, photometric="minisblack")
    h = harness(root)
    h.run()
    assert re.search(r"a\.tif: .*saturated.*frame 3: 4\d\.\d% at 255", h.rejected[0].reason)


def test_a_dose_of_zero_in_the_configuration_is_refused_with_the_key():
    document = {
        "movies": "m", "out": "o", "microscope": {"voltage_kv": 300, "cs_mm": 2.7},
        "acquisition": {"pixel_size_angstrom": 1, "dose_e_per_angstrom2": 0},
    }  # fmt: skip
    with pytest.raises(
        ConfigurationError, match=r"acquisition\.dose_e_per_angstrom2.*greater than 0.*found: 0"
    ):
        parse_settings(document, item="session.yaml")


def test_a_rejection_for_the_settings_sake_is_judged_anew_by_a_restart_that_asks_for_it(tmp_path, harness):
    root = tmp_path / "movies"
    root.mkdir()
    for name in ("a_fractions.tiff", "broken.tif"):
        (root / name).write_bytes(movie_bytes(tmp_path)[: None if name.startswith("a") else 300])
    (root / "a.xml").write_text(EPU.format(pixel="0.85"))
    first = harness(root, pixel_size_angstrom=1.1)
    first.run()
    known = [
        KnownFile(e.exposure_id, e.name, e.file, is_offered_again=is_about_settings(e.reason))
        for e in first.rejected
    ]
    assert [k.is_offered_again for k in sorted(known, key=lambda k: k.name)] == [True, False]
    second = harness(root, pixel_size_angstrom=0.85, known=known)
    second.run()
    assert [event.exposure.name for event in second.events] == ["a_fractions"]


def test_a_gain_that_is_not_there_is_a_configuration_error_at_the_start(tmp_path, harness):
    with pytest.raises(ConfigurationError, match=r"gone\.mrc: the gain reference is a file that exists"):
        harness(tmp_path, gain=tmp_path / "gone.mrc").source.poll(0.0)


EPU = (
    "<MicroscopeImage><SpatialScale><pixelSize><x><numericValue>{pixel}E-10</numericValue></x></pixelSize>"
    "</SpatialScale><microscopeData><gun><AccelerationVoltage>300000</AccelerationVoltage></gun>"
    "<acquisition><acquisitionDateTime>2024-01-01T00:00:00</acquisitionDateTime></acquisition>"
    "<optics><BeamShift><_x>0.12345</_x><_y>-0.5</_y></BeamShift></optics></microscopeData></MicroscopeImage>"
)


def test_metadata_travel_with_the_exposure_and_disagreement_names_both_sides(tmp_path, harness):
    root = tmp_path / "movies"
    root.mkdir()
    for name, pixel in (("a", "0.85"), ("b", "1.20")):
        (root / f"{name}_fractions.tiff").write_bytes(movie_bytes(tmp_path))
        (root / f"{name}.xml").write_text(EPU.format(pixel=pixel))
    h = harness(root, pixel_size_angstrom=0.85, voltage_kv=300, give_up_s=1e6)
    h.run()
    (exposure,) = h.found
    assert exposure.metadata.pixel_size_angstrom == pytest.approx(0.85)
    assert exposure.metadata.beam_shift_group in ("0.1235,-0.5000", "0.1234,-0.5000")
    assert exposure.metadata.acquired_at == "2024-01-01T00:00:00"
    (event,) = h.rejected
    assert f"1.2 Å in {root / 'b.xml'}, 0.85 Å in the configuration" in event.reason


def test_a_movie_with_fewer_frames_than_its_mdoc_promises_is_incomplete(tmp_path, harness):
    root = tmp_path / "movies"
    root.mkdir()
    (root / "a.tif").write_bytes(movie_bytes(tmp_path, 0, (3, 32, 32)))
    (root / "a.tif.mdoc").write_text("[FrameSet = 0]\nNumSubFrames = 5\n")
    h = harness(root)
    h.run()
    assert f"3 frames, 5 by {root / 'a.tif.mdoc'}" in h.rejected[0].reason


def test_a_movie_waits_for_metadata_that_come_late_and_goes_without_when_they_do_not(tmp_path, harness):
    root = tmp_path / "movies"
    root.mkdir()
    for name in ("late", "never"):
        (root / f"{name}.tif").write_bytes(movie_bytes(tmp_path))
    h = harness(root, metadata_wait_s=30.0, give_up_s=1e3)
    h.source.poll(0.0)
    h.run(lambda _: h.clock.now > 1008)
    assert h.events == []
    (root / "late.xml").write_text(EPU.format(pixel="0.85"))
    h.run(lambda events: len(events) == 1)
    assert h.found[0].metadata.source == str(root / "late.xml")
    h.run()
    assert h.found[1].name == "never"
    assert h.clock.now > 1030


def test_micrographs_are_taken_as_such_and_movies_among_them_refused(tmp_path, harness):
    rng = np.random.default_rng(0)
    write_mrc(tmp_path / "good.mrc", rng.normal(size=(48, 40)).astype(np.float32))
    write_mrc(tmp_path / "movie.mrc", rng.normal(size=(3, 48, 40)).astype(np.float32))
    broken = rng.normal(size=(48, 40)).astype(np.float32)
    write_mrc(tmp_path / "nan.mrc", broken)
    with mrcfile.mmap(tmp_path / "nan.mrc", mode="r+") as mrc:
        mrc.data[5, 5] = np.nan
    h = harness(tmp_path, kind=InputKind.MICROGRAPH)
    h.run()
    assert [(e.name, e.kind, e.n_frames) for e in h.found] == [("good", InputKind.MICROGRAPH, 1)]
    reasons = {event.name: event.reason for event in h.rejected}
    assert "a micrograph is a single image" in reasons["movie"]
    assert "1 NaN or infinite" in reasons["nan"]


def test_particles_become_one_exposure_per_micrograph_and_a_restart_completes_a_partial_journal(
    tmp_path, harness
):
    write_mrc(tmp_path / "a.mrcs", np.random.default_rng(0).normal(size=(4, 16, 16)).astype(np.float32))
    star = tmp_path / "p.star"
    rows = "".join(f"{i + 1}@a.mrcs mics/m{i % 2}.mrc 10000 9000 0 300 2.7 0.1 2.0\n" for i in range(4))
    names = "ImageName MicrographName DefocusU DefocusV DefocusAngle Voltage SphericalAberration AmplitudeContrast"
    header = "".join(f"_rln{n} #{i + 1}\n" for i, n in enumerate([*names.split(), "PixelSize"]))
    star.write_text(f"data_\n\nloop_\n{header}{rows}")
    h = harness(star, kind=InputKind.PARTICLES, voltage_kv=300)
    h.run()
    assert [(e.name, e.micrograph_name, e.n_frames) for e in h.found] == [
        ("m0", "mics/m0.mrc", 2),
        ("m1", "mics/m1.mrc", 2),
    ]
    assert len({e.exposure_id for e in h.found}) == 2
    again = harness(star, kind=InputKind.PARTICLES, voltage_kv=300, known=h.known()[:1])
    again.run()
    assert [e.name for e in again.found] == ["m1"]
    wrong = harness(star, kind=InputKind.PARTICLES, voltage_kv=200)
    wrong.run()
    assert "300 kV in" in wrong.rejected[0].reason
    assert "200 kV in the configuration" in wrong.rejected[0].reason


def test_a_vanished_root_is_told_and_ends_when_it_is_back(tmp_path, harness):
    root = tmp_path / "movies"
    root.mkdir()
    h = harness(root)
    h.run()
    root.rename(tmp_path / "away")
    h.run(lambda _: h.source.problem is not None)
    assert str(root) in h.source.problem
    assert not h.source.is_quiet
    (tmp_path / "away").rename(root)
    (root / "a.tif").write_bytes(movie_bytes(tmp_path))
    h.run(lambda events: len(events) == 1)
    assert h.source.problem is None


def test_a_file_whose_permission_comes_later_is_offered_again(tmp_path, harness, monkeypatch):
    root = tmp_path / "movies"
    root.mkdir()
    (root / "a.tif").write_bytes(movie_bytes(tmp_path))
    is_forbidden, real_open = True, Path.open

    def guarded(self, *args: object, **options: object):
        if is_forbidden and self.name == "a.tif":
            raise PermissionError(13, "Permission denied", str(self))
        return real_open(self, *args, **options)

    monkeypatch.setattr(Path, "open", guarded)
    h = harness(root)
    h.run()
    assert "permission" in h.rejected[0].reason
    assert h.rejected[0].file.fingerprint == UNREADABLE
    is_forbidden = False
    h.run(lambda events: len(events) == 2)
    assert h.found[0].name == "a"


def test_polling_does_not_wait_for_a_file_that_takes_long_to_read(tmp_path, harness, monkeypatch):
    root = tmp_path / "movies"
    root.mkdir()
    for number in range(3):
        (root / f"m{number}.tif").write_bytes(movie_bytes(tmp_path, number))
    release, entered = threading.Event(), threading.Event()
    from stream.ingest import source as module

    real = module.validate_image_file

    def stuck(path, *args: object, **options: object):
        if path.name == "m0.tif":
            entered.set()
            release.wait(20)
        return real(path, *args, **options)

    monkeypatch.setattr(module, "validate_image_file", stuck)
    h = harness(root)
    h.run(lambda events: len(events) == 2 and entered.is_set())
    started = time.monotonic()
    for _ in range(20):
        h.events += h.source.poll(0.0)
    assert time.monotonic() - started < 2.0
    assert sorted(e.name for e in h.found) == ["m1", "m2"]
    release.set()
    h.run(lambda events: len(events) == 3)


def test_a_clock_that_runs_ahead_on_the_microscope_does_not_hold_files_back(tmp_path, harness):
    (tmp_path / "a.mrc").touch()
    write_mrc(tmp_path / "a.mrc", np.random.default_rng(0).normal(size=(3, 16, 16)).astype(np.float32))
    future = 4_000_000_000
    os.utime(tmp_path / "a.mrc", (future, future))
    h = harness(tmp_path)
    h.run()
    assert [e.name for e in h.found] == ["a"]


def test_an_io_error_neither_rejects_a_file_nor_offers_it_twice(tmp_path, harness, monkeypatch):
    root = tmp_path / "movies"
    root.mkdir()
    (root / "a.tif").write_bytes(movie_bytes(tmp_path))
    h = harness(root)
    h.run()
    is_stale, real_stat = True, Path.stat

    def guarded(self, **options: object):
        if is_stale and self.name == "a.tif":
            raise OSError(116, "Stale file handle", str(self))
        return real_stat(self, **options)

    monkeypatch.setattr(Path, "stat", guarded)
    os.utime(root / "a.tif")  # a notice, and a look that fails
    h.run(lambda _: h.clock.now > 1030)
    assert len(h.events) == 1
    is_stale = False
    h.run(lambda events: len(events) == 2)  # the touch is a change, and comes through now
    assert [e.name for e in h.found] == ["a", "a"]
    assert h.rejected == []


@pytest.mark.parametrize("movie_format", ["tiff", "eer", "mrc"])
def test_what_the_virtual_microscope_writes_is_taken_with_its_metadata(tmp_path, harness, movie_format):
    from stream.ingest.epu_xml import EpuExposure, format_epu_xml
    from stream.ingest.movie_writers import MovieFormat, write_gain_reference, write_movie

    root = tmp_path / "movies"
    root.mkdir()
    exposure = EpuExposure(
        unique_name="x", acquired_at=1.7e9, pixel_size_angstrom=0.9, dose_e_per_angstrom2=40.0, voltage_kv=200.0,
        defocus_um=1.5, n_fractions=None if movie_format == "eer" else 4, shape_yx_px=(48, 64), beam_shift_xy=(0.1, -0.2),
    )  # fmt: skip
    (root / "m_0001_fractions.xml").write_bytes(format_epu_xml(exposure))
    frames = np.random.default_rng(0).poisson(1, (4, 48, 64)).astype(np.uint8)
    path = root / f"m_0001_fractions.{movie_format}"
    write_movie(path, iter(frames), MovieFormat(movie_format), pixel_size_angstrom=0.9, eer_sub_frames=16)
    write_gain_reference(tmp_path / "gain.mrc", np.ones((48, 64), np.float32))
    h = harness(
        root,
        pixel_size_angstrom=0.9,
        voltage_kv=200,
        dose_e_per_angstrom2=40,
        gain=tmp_path / "gain.mrc",
        give_up_s=1e6,
    )
    h.run()
    (found,) = h.found
    assert (found.n_frames, found.shape_yx) == (64 if movie_format == "eer" else 4, (48, 64))
    assert found.metadata.dose_e_per_angstrom2 == pytest.approx(40)
    assert found.metadata.beam_shift_group == "0.1000,-0.2000"
    fractions = np.stack(list(iterate_frames(path, eer_fractions=4)))
    if (
        movie_format == "eer"
    ):  # at most one event per pixel and frame: a few counts are lost, none is invented
        assert 0.9 * frames.sum() < fractions.sum() <= frames.sum()
    else:
        np.testing.assert_array_equal(fractions, frames)
