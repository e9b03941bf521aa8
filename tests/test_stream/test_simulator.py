"""The simulator's writer: pace, slow files, truth; with a fake microscope."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import starfile

from stream.ingest.epu_xml import EpuExposure, format_epu_xml
from stream.ingest.metadata import parse_epu_xml, read_sidecar
from stream.ingest.movie_writers import MovieFormat
from stream.ingest.simulator import Clock, WriterSettings, write_session
from stream.ingest.simulator_truth import JunkRow, MotionTruth, OpticsTruth, ParticleTruth

OPTICS = OpticsTruth(
    pixel_size_angstrom=1.5,
    voltage_kv=200.0,
    cs_mm=1.4,
    amplitude_contrast=0.1,
    dose_per_frame_e_per_angstrom2=2.0,
)


@dataclass
class FakeExposure:
    index: int
    seed: int = 1
    defocus_um: float = 1.25
    beam_shift_xy: tuple[float, float] = (0.05, -0.05)
    name: str = field(init=False)

    def __post_init__(self) -> None:
        self.name = f"shot_{self.index}"

    def frames(self):
        rng = np.random.default_rng(self.index)
        yield from (rng.poisson(0.8, (24, 32)).astype(np.uint8) for _ in range(4))

    def particles(self):
        return [
            ParticleTruth(
                exposure_name=self.name,
                coordinate_yx_px=(10.5, 20.25),
                euler_deg=(1.0, 2.0, 3.0),
                defocus_u_angstrom=12600.0,
                defocus_v_angstrom=12400.0,
                astigmatism_angle_deg=30.0,
                phase_shift_deg=0.0,
            )
        ] * self.index

    def junk(self):
        return [
            JunkRow(
                exposure_name=self.name,
                label="carbon",
                coordinate_yx_px=(1.0, 2.0),
                radius_px=9.0,
                angle_deg=45.0,
            )
        ]

    def motion(self):
        shifts = np.array([[0.0, 0.0], [0.5, -1.0], [1.0, -1.5], [1.25, -2.0]])
        return MotionTruth(
            shape_yx_px=(24, 32),
            global_yx_px=shifts,
            points_yx_px=np.array([[6.0, 8.0]]),
            local_yx_px=0.1 * shifts[:, None],
        )


class FakeClock:
    """Time that only passes while somebody waits; stops the session at `stop_at`."""

    def __init__(self, stop_at: float = float("inf")) -> None:
        self.time, self.stop_at = 0.0, stop_at
        self.clock = Clock(now=lambda: self.time, wait=self.wait)

    def wait(self, seconds: float) -> bool:
        self.time += seconds
        return self.time >= self.stop_at


def run(out: Path, clock: FakeClock, n: int = 3, **values):
    seen = []
    files = write_session(
        (FakeExposure(i) for i in range(n)),
        WriterSettings(out=out, optics=OPTICS, n_frames=4, **values),
        gain=np.ones((24, 32), dtype=np.float32),
        volume=np.zeros((4, 4, 4), dtype=np.float32),
        clock=clock.clock,
        progress=lambda count, path: seen.append((count, path.name, clock.time)),
    )
    return files, seen


def test_movies_come_at_their_rate(tmp_path):
    _, seen = run(tmp_path, FakeClock(), rate_per_hour=1200.0)
    assert [(count, time) for count, _, time in seen] == [(1, 0.0), (2, 3.0), (3, 6.0)]


def test_a_stopped_session_leaves_whole_movies_and_their_truth(tmp_path):
    files, _ = run(tmp_path, FakeClock(stop_at=5.0), rate_per_hour=1200.0)
    assert [path.name for path in files.movies] == ["shot_0.tiff", "shot_1.tiff"]
    assert sorted(p.name for p in (tmp_path / "movies").iterdir()) == [
        "shot_0.tiff", "shot_0.xml", "shot_1.tiff", "shot_1.xml",
    ]  # fmt: skip


def test_slow_writer_takes_its_time_and_leaves_no_copy(tmp_path):
    clock = FakeClock()
    files, _ = run(tmp_path, clock, n=1, slow_writer_s=4.0)
    assert clock.time == pytest.approx(4.0, rel=0.1)
    assert sorted(p.name for p in (tmp_path / "movies").iterdir()) == ["shot_0.tiff", "shot_0.xml"]
    assert files.movies[0].stat().st_size > 0


@pytest.mark.parametrize("movie_format", list(MovieFormat))
def test_our_own_readers_take_the_movies_and_their_metadata(tmp_path, movie_format):
    from stream.ingest.movie_reader import iterate_frames

    files, _ = run(tmp_path, FakeClock(), n=2, movie_format=movie_format, eer_sub_frames=10)
    stack = np.stack(list(iterate_frames(files.movies[1]))).astype(np.int64)
    expected = np.stack(list(FakeExposure(1).frames()))
    if movie_format is MovieFormat.EER:
        stack = stack.reshape(4, 10, 24, 32).sum(1)
    assert np.array_equal(stack, expected)
    sidecar = read_sidecar(files.movies[1])
    assert sidecar.metadata.pixel_size_angstrom == pytest.approx(1.5)
    assert sidecar.metadata.dose_e_per_angstrom2 == pytest.approx(8.0)
    assert sidecar.metadata.voltage_kv == pytest.approx(200.0)
    assert sidecar.metadata.beam_shift_group == "0.0500,-0.0500"
    assert sidecar.n_frames == (None if movie_format is MovieFormat.EER else 4)


def test_truth_reads_as_relion_star(tmp_path):
    files, _ = run(tmp_path, FakeClock())
    blocks = starfile.read(files.truth_star)
    particles, optics = blocks["particles"], blocks["optics"]
    assert len(particles) == 3
    row = particles.iloc[0]
    assert (row.rlnCoordinateX, row.rlnCoordinateY) == (20.25, 10.5)
    assert (row.rlnAngleRot, row.rlnAngleTilt, row.rlnAnglePsi) == (1.0, 2.0, 3.0)
    assert (row.rlnDefocusU, row.rlnDefocusV, row.rlnDefocusAngle) == (12600.0, 12400.0, 30.0)
    assert row.rlnMicrographName == "micrographs/shot_1.mrc"
    assert isinstance(optics, pd.DataFrame)
    assert optics.rlnSphericalAberration[0] == 1.4
    junk = starfile.read(tmp_path / "truth" / "junk.star")
    assert junk.icestreamJunkLabel.tolist() == ["carbon"] * 3


def test_motion_star_holds_the_corrections_of_relion(tmp_path):
    run(tmp_path, FakeClock(), n=1)
    blocks = starfile.read(tmp_path / "truth" / "motion" / "shot_0.star")
    # RELION's shifts are what has to be added: minus the displacement.
    assert blocks["global_shift"].rlnMicrographShiftX.tolist() == [0.0, 1.0, 1.5, 2.0]
    assert blocks["global_shift"].rlnMicrographShiftY.tolist() == [0.0, -0.5, -1.0, -1.25]
    assert blocks["local_shift"].rlnMicrographShiftX.tolist() == pytest.approx([0.0, 0.1, 0.15, 0.2])
    assert blocks["general"]["rlnImageSizeX"] == 32
    assert blocks["general"]["rlnMicrographDoseRate"] == 2.0


def test_no_movies_still_give_readable_truth(tmp_path):
    files, _ = run(tmp_path, FakeClock(), n=0)
    assert files.movies == ()
    assert files.truth_star.exists()


def test_epu_xml_reads_back_in_our_units():
    exposure = EpuExposure(
        unique_name="a", acquired_at=0.0, pixel_size_angstrom=0.83, dose_e_per_angstrom2=51.5, voltage_kv=300.0,
        defocus_um=1.4, n_fractions=40, shape_yx_px=(2046, 2880), beam_shift_xy=(0.25, -0.04),
    )  # fmt: skip
    document = format_epu_xml(exposure)
    assert document == format_epu_xml(exposure)
    sidecar = parse_epu_xml(document.decode(), "a.xml")
    assert sidecar.n_frames == 40
    assert sidecar.metadata.pixel_size_angstrom == pytest.approx(0.83)
    assert sidecar.metadata.dose_e_per_angstrom2 == pytest.approx(51.5)
    assert sidecar.metadata.acquired_at == "1970-01-01T00:00:00.000000+00:00"
