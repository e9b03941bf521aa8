"""`.cs` files load in cryosparc-tools and convert angles, shifts and coordinates rightly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from models.fourier.rotations import euler_to_matrix
from stream.ingest.particle_sets import read_particle_table
from stream.records.errors import InputError
from stream.records.values import Optics
from stream.sinks.cryosparc_cs import (
    MicrographPlace,
    build_particles_cs,
    euler_to_rotation_vector,
    write_particles_cs,
)
from stream.sinks.relion_star import ParticleStar, make_particle_optics

PLACES = {"micrographs/a.mrc": MicrographPlace(uid=77, shape_yx=(200, 400), pixel_size_angstrom=0.75)}


def make_star(n_particles: int = 4) -> ParticleStar:
    rng = np.random.default_rng(3)
    particles = pd.DataFrame(
        {
            "rlnImageName": [f"{i + 1:06d}@particles/a.mrcs" for i in range(n_particles)],
            "rlnMicrographName": ["micrographs/a.mrc"] * n_particles,
            "rlnCoordinateX": 100.0,
            "rlnCoordinateY": 50.0,
            "rlnDefocusU": 12000.0,
            "rlnDefocusV": 11000.0,
            "rlnDefocusAngle": 45.0,
            "rlnPhaseShift": 90.0,
            "rlnOpticsGroup": 1,
            "rlnRandomSubset": [1 + i % 2 for i in range(n_particles)],
            "icestreamScore": rng.uniform(size=n_particles),
            "icestreamUid": rng.integers(2**63, 2**64 - 1, n_particles, dtype=np.uint64),
            "rlnAngleRot": rng.uniform(-180, 180, n_particles),
            "rlnAngleTilt": rng.uniform(0, 180, n_particles),
            "rlnAnglePsi": rng.uniform(-180, 180, n_particles),
            "rlnOriginXAngst": 3.0,
            "rlnOriginYAngst": -1.5,
        }
    )
    optics = make_particle_optics(
        Optics(voltage_kv=200.0, cs_mm=1.4, amplitude_contrast=0.07),
        image_pixel_size_angstrom=1.5,
        image_size_px=64,
    )
    return ParticleStar(optics=optics, particles=particles)


def test_cryosparc_tools_loads_every_column_with_its_converted_value(tmp_path: Path):
    dataset_module = pytest.importorskip("cryosparc.dataset")
    star = make_star()
    write_particles_cs(tmp_path / "particles.cs", star, PLACES)
    dataset = dataset_module.Dataset.load(tmp_path / "particles.cs")
    assert len(dataset) == 4
    assert dataset["uid"].tolist() == star.particles["icestreamUid"].tolist()
    assert dataset["blob/path"].tolist() == ["particles/a.mrcs"] * 4
    assert dataset["blob/idx"].tolist() == [0, 1, 2, 3]
    assert dataset["blob/shape"].tolist() == [[64, 64]] * 4
    np.testing.assert_allclose(dataset["ctf/df_angle_rad"], np.pi / 4, rtol=1e-6)
    np.testing.assert_allclose(dataset["ctf/phase_shift_rad"], np.pi / 2, rtol=1e-6)
    np.testing.assert_allclose(dataset["ctf/df1_A"], 12000.0)
    np.testing.assert_allclose(dataset["ctf/df2_A"], 11000.0)
    np.testing.assert_allclose(dataset["ctf/accel_kv"], 200.0)
    assert dataset["ctf/exp_group_id"].tolist() == [0] * 4
    assert dataset["ctf/type"].tolist() == ["imported"] * 4
    assert dataset["alignments3D/split"].tolist() == [0, 1, 0, 1]
    np.testing.assert_allclose(dataset["alignments3D/shift"], [[2.0, -1.0]] * 4)
    np.testing.assert_allclose(dataset["location/center_x_frac"], 0.25)
    np.testing.assert_allclose(dataset["location/center_y_frac"], 0.75)
    assert dataset["location/micrograph_shape"].tolist() == [[200, 400]] * 4
    np.testing.assert_allclose(dataset["icestream/score"], star.particles["icestreamScore"], rtol=1e-6)
    assert len(dataset.query({"uid": dataset["uid"][1:3].tolist()})) == 2


def test_rotation_vectors_are_the_same_rotations_as_relions_angles():
    """The matrix exp([v]×), by Rodrigues' formula, turns the specimen and RELION's the frame: transposes."""
    euler = np.random.default_rng(0).uniform((-180, 0, -180), (180, 180, 180), (200, 3))
    vectors = euler_to_rotation_vector(euler).astype(np.float64)
    angle = np.linalg.norm(vectors, axis=1)[:, None, None]
    x, y, z = (vectors / angle[:, 0]).T
    zero = np.zeros_like(x)
    cross = np.stack((zero, -z, y, z, zero, -x, -y, x, zero), axis=-1).reshape(-1, 3, 3)
    matrices = np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
    ours = euler_to_matrix(torch.from_numpy(euler)).numpy()
    np.testing.assert_allclose(matrices, ours.transpose(0, 2, 1), atol=1e-5)


def test_what_was_written_reads_back_in_relions_units(tmp_path: Path):
    import mrcfile

    star = make_star()
    (tmp_path / "particles").mkdir()
    with mrcfile.new(tmp_path / "particles" / "a.mrcs") as stack:
        stack.set_data(np.random.default_rng(0).normal(size=(4, 64, 64)).astype(np.float32))
        stack.set_image_stack()
    write_particles_cs(tmp_path / "particles.cs", star, PLACES)
    table = read_particle_table(tmp_path / "particles.cs")
    particles = star.particles
    assert table.uids is not None
    assert table.half_sets is not None
    assert table.euler_deg is not None
    assert table.origin_xy_angstrom is not None
    assert table.uids.tolist() == particles["icestreamUid"].tolist()
    assert table.half_sets.tolist() == particles["rlnRandomSubset"].tolist()
    np.testing.assert_allclose(table.astigmatism_angle_deg, 45.0, rtol=1e-6)
    np.testing.assert_allclose(table.coordinate_y_px, 50.0, rtol=1e-5)
    np.testing.assert_allclose(table.coordinate_x_px, 100.0, rtol=1e-5)
    np.testing.assert_allclose(table.origin_xy_angstrom, [[3.0, -1.5]] * 4, rtol=1e-6)
    wanted = particles[["rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"]].to_numpy()
    np.testing.assert_allclose(table.euler_deg, wanted, atol=1e-3)


def test_without_poses_and_micrographs_there_are_no_such_columns_but_halves_stay():
    star = make_star()
    bare = ParticleStar(
        optics=star.optics,
        particles=star.particles.drop(columns=["rlnAngleRot", "icestreamScore", "rlnPhaseShift"]),
    )
    rows = build_particles_cs(bare, {})
    names = rows.dtype.names
    assert "alignments3D/pose" not in names
    assert not [name for name in names if name.startswith("location/")]
    assert rows["alignments3D/split"].tolist() == [0, 1, 0, 1]
    assert rows["ctf/phase_shift_rad"].tolist() == [0.0] * 4


def test_no_particles_give_an_empty_array_with_all_columns():
    star = make_star()
    rows = build_particles_cs(ParticleStar(optics=star.optics, particles=star.particles.head(0)), PLACES)
    assert len(rows) == 0
    assert "alignments3D/pose" in rows.dtype.names


def test_a_uid_that_occurs_twice_is_refused():
    star = make_star()
    twice = pd.concat([star.particles, star.particles.head(1)], ignore_index=True)
    with pytest.raises(InputError, match="one particle"):
        build_particles_cs(ParticleStar(optics=star.optics, particles=twice), PLACES)


def test_missing_columns_are_named():
    star = make_star()
    with pytest.raises(InputError, match="without rlnDefocusU"):
        build_particles_cs(
            ParticleStar(optics=star.optics, particles=star.particles.drop(columns="rlnDefocusU")), PLACES
        )
