"""Exports and engine inputs hold the right particles, with the session's uids, halves and paths."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import mrcfile
import numpy as np
import pandas as pd
import pytest
import starfile

from stream.records.commands import RunMember
from stream.records.errors import InputError
from stream.records.particles import derive_particle_uid
from stream.records.values import ClusteringId, ExposureId, Optics, ParticleSubset, RunId
from stream.sinks import relion_star
from stream.sinks.exporter import export_session, write_labels, write_run_input
from stream.sinks.particle_table import concatenate, join_poses, match_uids
from stream.store.feature_cache import FeatureCache
from stream.store.layout import OutputLayout

MODEL = "model"
ABOVE_HALF = ParticleSubset(score_threshold=0.5)
N_EACH = 6


def make_session(root: Path) -> tuple[OutputLayout, list[RunMember]]:
    """Three exposures of six particles: two optics (pixel sizes); particle 5 of each has no score."""
    layout = OutputLayout(root)
    members = []
    with FeatureCache(layout.features) as cache:
        for number in range(3):
            name, exposure_id = f"exp {number}", ExposureId(f"id{number}")
            uids = np.array([derive_particle_uid(exposure_id, i) for i in range(N_EACH)], np.uint64)
            write_exposure(layout, name, uids, pixel_size_angstrom=1.5 if number < 2 else 2.0)
            scores = np.linspace(0.1, 0.9, N_EACH - 1).astype(np.float32)
            cache.append(MODEL, uids[:-1], scores, np.zeros((N_EACH - 1, 8), np.float16))
            members.append(RunMember(exposure_id=exposure_id, name=name, half_set=1 if number % 2 else 2))
    return layout, members


def write_exposure(layout: OutputLayout, name: str, uids: np.ndarray, *, pixel_size_angstrom: float) -> None:
    for path, shape in ((layout.micrograph(name), (40, 80)), (layout.particles(name), (len(uids), 8, 8))):
        path.parent.mkdir(parents=True, exist_ok=True)
        with mrcfile.new(path) as mrc:
            mrc.set_data(np.random.default_rng(0).normal(size=shape).astype(np.float32))
            mrc.voxel_size = 0.75
    table = pd.DataFrame(
        {
            "rlnImageName": [f"{i + 1:06d}@particles/{name}.mrcs" for i in range(len(uids))],
            "rlnMicrographName": f"micrographs/{name}.mrc",
            "rlnCoordinateX": np.linspace(10, 70, len(uids)),
            "rlnCoordinateY": 10.0,
            "rlnDefocusU": 10000.0,
            "rlnDefocusV": 9500.0,
            "rlnDefocusAngle": 30.0,
            "rlnPhaseShift": 0.0,
            "rlnAutopickFigureOfMerit": 1.0,
            "rlnOpticsGroup": 1,
            "icestreamUid": uids,
        }
    )
    optics = relion_star.make_particle_optics(
        Optics(voltage_kv=300, cs_mm=2.7, amplitude_contrast=0.1),
        image_pixel_size_angstrom=pixel_size_angstrom,
        image_size_px=8,
    )
    relion_star.write_particles_star(layout.particles_table(name), table, optics)
    layout.ctf_values(name).parent.mkdir(exist_ok=True)
    fit = {
        "defocus_u_angstrom": 10000.0,
        "defocus_v_angstrom": 9500.0,
        "ctf_fit_angstrom": 4.5,
        "ctf_score": None,
    }
    layout.ctf_values(name).write_text(json.dumps(fit))


def write_poses(layout: OutputLayout, run_id: RunId, uids: np.ndarray) -> None:
    poses = pd.DataFrame(
        {
            "rlnImageName": "000001@x.mrcs",
            "rlnOpticsGroup": 1,
            "rlnAngleRot": np.arange(len(uids)) * 10.0,
            "rlnAngleTilt": 90.0,
            "rlnAnglePsi": 5.0,
            "rlnOriginXAngst": 3.0,
            "rlnOriginYAngst": 0.0,
            "icestreamUid": uids,
        }
    )
    optics = relion_star.make_particle_optics(
        Optics(voltage_kv=300, cs_mm=2.7, amplitude_contrast=0.1),
        image_pixel_size_angstrom=1.5,
        image_size_px=8,
    )
    relion_star.write_particles_star(layout.run(run_id) / "poses.star", poses, optics)


def test_export_loads_in_starfile_and_cryosparc_tools_with_equal_uids(tmp_path: Path):
    dataset_module = pytest.importorskip("cryosparc.dataset")
    layout, members = make_session(tmp_path)
    result = export_session(layout, members, model_hash=MODEL)
    blocks = starfile.read(layout.exports / "particles.star", parse_as_string=["icestreamUid"])
    dataset = dataset_module.Dataset.load(layout.exports / "particles.cs")
    uids = [int(uid) for uid in blocks["particles"]["icestreamUid"]]
    assert dataset["uid"].tolist() == uids
    assert len(set(uids)) == result.n_particles == 15
    assert result.n_all_particles == 18
    assert (dataset["alignments3D/split"] + 1).tolist() == blocks["particles"]["rlnRandomSubset"].tolist()
    np.testing.assert_allclose(dataset["icestream/score"], blocks["particles"]["icestreamScore"], atol=1e-6)
    np.testing.assert_allclose(dataset["ctf/df_angle_rad"], np.deg2rad(30.0), rtol=1e-6)
    np.testing.assert_allclose(dataset["location/center_y_frac"], 0.75)
    assert (tmp_path / dataset["blob/path"][0]).is_file()
    assert (tmp_path / blocks["particles"]["rlnImageName"][0].partition("@")[2]).is_file()


def test_every_exposure_keeps_its_half_and_its_optics(tmp_path: Path):
    layout, members = make_session(tmp_path)
    export_session(layout, members, model_hash=MODEL)
    star = relion_star.read_particles_star(layout.exports / "all_particles.star")
    by_exposure = star.particles.groupby("rlnMicrographName")
    assert by_exposure["rlnRandomSubset"].unique().map(list).tolist() == [[2], [1], [2]]
    assert by_exposure["rlnOpticsGroup"].unique().map(list).tolist() == [[1], [1], [2]]
    assert star.optics["rlnImagePixelSize"].tolist() == [1.5, 2.0]
    assert star.optics["rlnOpticsGroupName"].is_unique
    assert int(star.particles["icestreamScore"].isna().sum()) == 3


def test_micrographs_have_their_fit_and_count(tmp_path: Path):
    layout, members = make_session(tmp_path)
    result = export_session(layout, members, model_hash=MODEL)
    star = relion_star.read_micrographs_star(layout.exports / "micrographs.star")
    assert star.particles["rlnCtfMaxResolution"].tolist() == [4.5] * 3
    assert result.n_micrographs == len(star.particles) == 3
    assert star.particles["rlnMicrographName"].tolist() == [f"micrographs/exp {i}.mrc" for i in range(3)]
    assert star.particles["rlnDefocusU"].tolist() == [10000.0] * 3
    assert star.particles["rlnCtfFigureOfMerit"].isna().all()
    assert star.particles["icestreamParticles"].tolist() == [6] * 3
    np.testing.assert_allclose(star.optics["rlnMicrographPixelSize"], 0.75)


def test_run_input_holds_what_is_above_the_threshold_with_halves_and_scores(tmp_path: Path):
    layout, members = make_session(tmp_path)
    path = tmp_path / "runs" / "r1" / "particles.star"
    assert write_run_input(layout, members, MODEL, ABOVE_HALF, path) == 6
    particles = relion_star.read_particles_star(path).particles
    np.testing.assert_allclose(particles["icestreamScore"], [0.7, 0.9] * 3, atol=1e-6)
    assert particles["rlnRandomSubset"].tolist() == [2, 2, 1, 1, 2, 2]
    assert particles["rlnImageName"].tolist()[:2] == [
        "000004@particles/exp 0.mrcs",
        "000005@particles/exp 0.mrcs",
    ]
    assert write_run_input(layout, members[:1], MODEL, replace(ABOVE_HALF, score_threshold=0.9), path) == 0, (
        "a score equal to the threshold is not above"
    )


def test_the_best_of_all_exposures_are_chosen_in_any_order_of_them_with_ties_by_uid(tmp_path: Path):
    layout, members = make_session(tmp_path)
    path, best = tmp_path / "p.star", replace(ABOVE_HALF, top=4)
    chosen = []
    for order in (members, members[::-1]):
        assert write_run_input(layout, order, MODEL, best, path) == 4
        particles = relion_star.read_particles_star(path).particles
        np.testing.assert_allclose(sorted(particles["icestreamScore"]), [0.7, 0.9, 0.9, 0.9], atol=1e-6)
        chosen.append(sorted(particles["icestreamUid"]))
    assert chosen[0] == chosen[1]
    tied = [derive_particle_uid(ExposureId(f"id{i}"), 3) for i in range(3)]
    assert min(tied) in chosen[0]
    assert write_run_input(layout, members, MODEL, replace(ABOVE_HALF, top=100), path) == 6


def test_a_cluster_holds_its_labels_particles_and_a_clustering_without_labels_is_named(tmp_path: Path):
    layout, members = make_session(tmp_path)
    clustering, path = ClusteringId("campaign001-clusters"), tmp_path / "p.star"
    subset = replace(ABOVE_HALF, clustering=clustering, clusters=(1, 2))
    with pytest.raises(InputError, match=r"labels\.npz"):
        write_run_input(layout, members, MODEL, subset, path)
    uids = np.array([derive_particle_uid(ExposureId("id0"), i) for i in (2, 3, 4)], np.uint64)
    write_labels(layout.cluster_labels(clustering), uids, np.array([1, 1, 0], np.int16))
    assert write_run_input(layout, members, MODEL, subset, path) == 1, "above 0.5 and in cluster 1 or 2"
    assert relion_star.read_particles_star(path).particles["icestreamUid"].tolist() == [uids[1]]


def test_a_run_selects_its_particles_and_gives_them_their_poses_by_uid(tmp_path: Path):
    layout, members = make_session(tmp_path)
    uids = np.array([derive_particle_uid(ExposureId("id1"), i) for i in (4, 2, 3)], np.uint64)
    write_poses(layout, RunId("r1"), uids)
    result = export_session(layout, members, model_hash=MODEL, run_id=RunId("r1"))
    particles = relion_star.read_particles_star(layout.exports / "particles.star").particles
    assert result.n_particles == 3
    assert particles["icestreamUid"].tolist() == [uids[1], uids[2], uids[0]]
    assert particles["rlnAngleRot"].tolist() == [10.0, 20.0, 0.0]
    rows = np.load(layout.exports / "particles.cs")
    assert rows["uid"].tolist() == particles["icestreamUid"].tolist()
    np.testing.assert_allclose(rows["alignments3D/shift"], [[2.0, 0.0]] * 3)
    assert len(relion_star.read_particles_star(layout.exports / "all_particles.star").particles) == 18


def test_an_exposure_without_particles_is_passed_over(tmp_path: Path):
    layout, members = make_session(tmp_path)
    empty = RunMember(exposure_id=ExposureId("none"), name="none", half_set=1)
    assert write_run_input(layout, [*members, empty], MODEL, ABOVE_HALF, tmp_path / "p.star") == 6
    result = export_session(layout, [empty], model_hash=MODEL)
    assert (result.particles_star, result.n_particles) == (None, 0)


def test_a_stack_whose_table_is_gone_is_an_error_and_not_an_empty_exposure(tmp_path: Path):
    layout, members = make_session(tmp_path)
    layout.particles_table("exp 1").unlink()
    with pytest.raises(InputError, match=r"exp 1\.star"):
        write_run_input(layout, members, MODEL, ABOVE_HALF, tmp_path / "p.star")


def test_a_session_of_particles_alone_exports_without_micrographs(tmp_path: Path):
    layout, members = make_session(tmp_path)
    for member in members:
        layout.micrograph(member.name).unlink()
    result = export_session(layout, members, model_hash=MODEL, score_threshold=0.5)
    assert (result.micrographs_star, result.n_particles) == (None, 6)
    assert not [
        name for name in np.load(layout.exports / "particles.cs").dtype.names if name.startswith("location")
    ]


def test_joining_changes_no_argument():
    optics = relion_star.make_particle_optics(
        Optics(voltage_kv=300, cs_mm=2.7, amplitude_contrast=0.1),
        image_pixel_size_angstrom=1.5,
        image_size_px=8,
    )
    other = optics.assign(rlnOpticsGroup=7, rlnVoltage=200.0, rlnOpticsGroupName="b")
    table = pd.DataFrame({"rlnOpticsGroup": [7, 7], "icestreamUid": np.array([1, 2], np.uint64)})
    stars = [
        relion_star.ParticleStar(optics=optics, particles=table.assign(rlnOpticsGroup=1)),
        relion_star.ParticleStar(optics=other, particles=table),
    ]
    joined = concatenate(stars)
    assert joined.particles["rlnOpticsGroup"].tolist() == [1, 1, 2, 2]
    assert table["rlnOpticsGroup"].tolist() == [7, 7]
    assert joined.particles["icestreamUid"].dtype == np.uint64


def test_poses_without_a_uid_are_refused():
    with pytest.raises(InputError, match="icestreamUid"):
        join_poses(relion_star.ParticleStar(optics=pd.DataFrame(), particles=pd.DataFrame()), pd.DataFrame())


def test_uids_match_across_the_whole_unsigned_range():
    known = np.array([2**64 - 1, 5, 2**63], np.uint64)
    rows, is_known = match_uids(known, np.array([2**63, 6, 2**64 - 1, 5], np.uint64))
    assert is_known.tolist() == [True, False, True, True]
    assert rows.tolist() == [2, 0, 0, 1]
    assert match_uids(known[:0], known)[1].tolist() == [False] * 3


def test_exposures_that_are_no_members_are_in_no_file_and_files_without_content_go(tmp_path: Path):
    layout, members = make_session(tmp_path)
    export_session(layout, members, model_hash=MODEL)
    result = export_session(layout, members[1:], model_hash=MODEL)
    assert (result.n_particles, result.n_all_particles, result.n_micrographs) == (10, 12, 2)
    for name in ("particles.star", "all_particles.star", "micrographs.star"):
        assert members[0].name not in (layout.exports / name).read_text()
    export_session(layout, [], model_hash=MODEL)
    assert list(layout.exports.iterdir()) == []
