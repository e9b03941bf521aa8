"""RELION STAR files keep uids, order and optics, and refuse what the format cannot hold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import starfile

from stream.records.errors import InputError
from stream.records.values import Optics
from stream.sinks import relion_star

OPTICS = Optics(voltage_kv=300.0, cs_mm=2.7, amplitude_contrast=0.1)
LARGEST_UID = 2**64 - 1


def particle_table(n_particles: int = 5) -> pd.DataFrame:
    rng = np.random.default_rng(7)
    uids = rng.integers(2**63, LARGEST_UID, n_particles, dtype=np.uint64, endpoint=True)
    if n_particles:
        uids[0] = LARGEST_UID
    return pd.DataFrame(
        {
            "rlnImageName": [f"{i + 1:06d}@particles/m 1.mrcs" for i in range(n_particles)],
            "rlnMicrographName": ["micrographs/m 1.mrc"] * n_particles,
            "rlnDefocusU": rng.uniform(8000, 20000, n_particles),
            "rlnOpticsGroup": np.ones(n_particles, np.int64),
            "icestreamUid": uids,
        }
    )


def optics_block() -> pd.DataFrame:
    return relion_star.make_particle_optics(OPTICS, image_pixel_size_angstrom=1.5, image_size_px=64)


def test_particles_come_back_with_every_bit_of_their_uids(tmp_path: Path):
    table = particle_table()
    path = tmp_path / "particles.star"
    relion_star.write_particles_star(path, table, optics_block())
    read = relion_star.read_particles_star(path)
    assert read.particles["icestreamUid"].dtype == np.uint64
    assert read.particles["icestreamUid"].tolist() == table["icestreamUid"].tolist()
    assert read.particles["rlnImageName"].tolist() == table["rlnImageName"].tolist()
    np.testing.assert_allclose(read.particles["rlnDefocusU"], table["rlnDefocusU"], atol=1e-6)
    assert read.optics["rlnVoltage"].tolist() == [300.0]


def test_starfile_alone_reads_what_was_written(tmp_path: Path):
    path = tmp_path / "particles.star"
    relion_star.write_particles_star(path, particle_table(), optics_block())
    blocks = starfile.read(path)
    assert set(blocks) == {"optics", "particles"}
    assert blocks["optics"]["rlnImagePixelSize"].tolist() == [1.5]


def test_same_table_gives_same_bytes(tmp_path: Path):
    for name in ("a.star", "b.star"):
        relion_star.write_particles_star(tmp_path / name, particle_table(), optics_block())
    assert (tmp_path / "a.star").read_bytes() == (tmp_path / "b.star").read_bytes()


@pytest.mark.parametrize("n_particles", [0, 1])
def test_tables_of_no_and_of_one_row_come_back(tmp_path: Path, n_particles: int):
    path = tmp_path / "particles.star"
    table = particle_table(n_particles)
    relion_star.write_particles_star(path, table, optics_block())
    read = relion_star.read_particles_star(path).particles
    assert len(read) == n_particles
    assert read["icestreamUid"].dtype == np.uint64
    assert list(read.columns) == list(table.columns)


def test_numeric_micrograph_names_stay_text(tmp_path: Path):
    table = particle_table().assign(rlnMicrographName="0012")
    relion_star.write_particles_star(tmp_path / "p.star", table, optics_block())
    assert set(relion_star.read_particles_star(tmp_path / "p.star").particles["rlnMicrographName"]) == {
        "0012"
    }


def test_uids_that_are_not_unsigned_are_refused(tmp_path: Path):
    table = particle_table().astype({"icestreamUid": np.float64})
    with pytest.raises(InputError, match="unsigned 64-bit"):
        relion_star.write_particles_star(tmp_path / "p.star", table, optics_block())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a#b.mrc", 'a"b.mrc', "a'b.mrc", "a\tb.mrc"])
def test_names_that_the_format_cannot_hold_are_refused(tmp_path: Path, name: str):
    table = particle_table().assign(rlnMicrographName=name)
    with pytest.raises(InputError, match="rlnMicrographName"):
        relion_star.write_particles_star(tmp_path / "p.star", table, optics_block())


def test_particles_of_an_unknown_optics_group_are_refused(tmp_path: Path):
    with pytest.raises(InputError, match="optics group"):
        relion_star.write_particles_star(
            tmp_path / "p.star", particle_table().assign(rlnOpticsGroup=3), optics_block()
        )


def test_picks_come_back_in_yx_order(tmp_path: Path):
    coordinates = np.array([[10.5, 200.25], [30.0, 40.0]])
    relion_star.write_picks_star(tmp_path / "picks.star", coordinates, np.array([0.5, -1.0]))
    table = starfile.read(tmp_path / "picks.star")
    assert table["rlnCoordinateX"].tolist() == [200.25, 40.0]
    read, scores = relion_star.read_picks_star(tmp_path / "picks.star")
    np.testing.assert_allclose(read, coordinates)
    np.testing.assert_allclose(scores, [0.5, -1.0])


def test_micrographs_come_back(tmp_path: Path):
    optics = relion_star.make_micrograph_optics(OPTICS, micrograph_pixel_size_angstrom=0.9)
    table = pd.DataFrame(
        {"rlnMicrographName": ["micrographs/a.mrc"], "rlnOpticsGroup": [1], "rlnDefocusU": [1e4]}
    )
    relion_star.write_micrographs_star(tmp_path / "m.star", table, optics)
    read = relion_star.read_micrographs_star(tmp_path / "m.star")
    assert read.particles["rlnDefocusU"].tolist() == [1e4]
    assert read.optics["rlnMicrographPixelSize"].tolist() == [0.9]


@pytest.mark.parametrize(
    "content", [b"", b"hello\n", b"data_particles\n\nloop_\n_rlnImageName #1\na b c\n", b"\xff\xfe\x00"]
)
def test_files_that_are_no_particle_star_name_the_file(tmp_path: Path, content: bytes):
    path = tmp_path / "broken.star"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"broken\.star"):
        relion_star.read_particles_star(path)


def test_a_missing_file_is_an_input_error(tmp_path: Path):
    with pytest.raises(InputError, match="can be read"):
        relion_star.read_particles_star(tmp_path / "absent.star")


def test_image_names_split_and_join():
    indices, stacks = relion_star.split_image_names(pd.Series(["000001@a/b.mrcs", "12@c@d.mrcs"]))
    assert indices.tolist() == [0, 11]
    assert stacks.tolist() == ["a/b.mrcs", "c@d.mrcs"]
    assert relion_star.join_image_names(indices, stacks) == ["000001@a/b.mrcs", "000012@c@d.mrcs"]


@pytest.mark.parametrize("name", ["a.mrcs", "0@a.mrcs", "x@a.mrcs"])
def test_image_names_without_a_stack_index_are_refused(name: str):
    with pytest.raises(InputError, match=r"INDEX@STACK|counts from 1"):
        relion_star.split_image_names(pd.Series([name]))
