"""Evaluation by use: known micrographs, the arms, Topaz as a program, and the command's document."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from actors.cryogem.arms import make_arms
from actors.cryogem.downstream import DownstreamSettings, evaluate_downstream
from actors.cryogem.evaluation import evaluate_trainings
from actors.cryogem.step_cost import measure_step
from actors.cryogem.topaz_training import TopazTraining, train_topaz
from actors.cryogem.truth import read_truth
from actors.cryogem.virtual_session import TRUTH_STAR
from actors.jobs.cryogem import read_job
from models.cryogem.bank import load_bank
from models.cryogem.networks import NetworkSettings
from models.cryogem.picker import LabelledMicrograph
from models.cryogem.settings import TrainingSettings
from models.weights import sha256_of_file
from models.workers import Workers
from stream.records.errors import ConfigurationError, InputError, ResourceError
from stream.sinks.relion_star import read_particles_star, write_particles_star

CONFIG = {
    "networks": {
        "depth": 4,
        "generator_filters": 4,
        "discriminator_filters": 4,
        "discriminator_layers": 2,
        "nce_levels": [1, 2, 3],
        "head_width": 16,
    },
    "training": {
        "n_simulated": 2,
        "crop_px": 64,
        "constant_epochs": 1,
        "decay_epochs": 0,
        "n_queries": 16,
        "n_validated": 1,
        "device": "cpu",
    },
}


@pytest.fixture(scope="module")
def session(virtual_session) -> Path:
    return virtual_session


@pytest.fixture(scope="module")
def trained(session, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("training")
    source = {"session": str(session), "short_side_px": 128, "n_micrographs": 3}
    path = folder / "train.yaml"
    path.write_text(yaml.safe_dump({"source": source, **CONFIG}))
    read_job(path, None).train(folder / "small", Workers(), lambda _point: None)
    return folder / "small"


def test_known_micrographs_are_those_never_trained_on(session, trained):
    bank = load_bank(trained / "bank.safetensors")
    unseen = read_truth(session / TRUTH_STAR, bank)
    labelled = read_truth(session / TRUTH_STAR, bank, is_training=True)
    assert {m.name for m in labelled} == set(bank.facts.names[:2])
    # one that the bank holds out, and one that it never read
    assert {m.name for m in unseen} == {f"virtual_{i:04d}" for i in range(4)} - {m.name for m in labelled}
    table = read_particles_star(session / TRUTH_STAR).particles
    for micrograph in unseen:
        rows = table[table["rlnMicrographName"].str.contains(micrograph.name)]
        # micrographs of 192 px are worked on at 128 px
        assert np.allclose(micrograph.centres_yx_px[:, 0] * 1.5, rows["rlnCoordinateY"], atol=1e-3)
        assert micrograph.image.shape == bank.shape_yx
        assert micrograph.ctf.shape == (len(rows), 4)
        # protein is dark where the truth says it is
        y, x = micrograph.centres_yx_px.round().astype(int).T
        inside = micrograph.image[np.clip(y, 0, 127), np.clip(x, 0, 169)].mean()
        assert float(inside) < float(micrograph.image.mean()) - 0.05


def test_origins_move_centres_the_other_way(session, trained, tmp_path):
    star = read_particles_star(session / TRUTH_STAR)
    bank = load_bank(trained / "bank.safetensors")
    moved = star.particles.assign(rlnOriginXAngst=12.0, rlnOriginYAngst=-6.0)
    path = session / "truth" / "moved.star"
    write_particles_star(path, moved, star.optics)
    before, after = (read_truth(p, bank)[0].centres_yx_px for p in (session / TRUTH_STAR, path))
    assert np.allclose((after - before) * bank.facts.pixel_size_angstrom, [6.0, -12.0], atol=1e-6)


def test_arms_share_particles_and_differ_in_noise(trained):
    bank = load_bank(trained / "bank.safetensors")
    arms = make_arms(bank, [trained], 1, 5)
    assert [a.name for a in arms] == [
        "gaussian at SNR 0.1",
        "poisson at SNR 0.1",
        "poisson_gaussian at SNR 0.1",
        "small, untranslated",
        "small",
    ]
    assert all(a.frames is arms[0].frames for a in arms)
    images = [a.image(0) for a in arms]
    assert torch.equal(images[4], arms[4].image(0))
    assert not torch.equal(images[4], images[3])
    assert not torch.equal(images[0], images[1])
    clean = arms[0].frames[0].image.reshape(-1)
    found = [float(torch.corrcoef(torch.stack((clean, i.reshape(-1))))[0, 1]) for i in images[:2]]
    # SNR 0.1: √(0.1 / 1.1)
    assert found == pytest.approx([0.30, 0.30], abs=0.06)


def test_the_command_prints_its_contract(session, trained):
    from typer.testing import CliRunner

    from stream.cli import app

    arguments = ["evaluate", "cryogem", trained, "--picking", "--poses", "--truth", session / TRUTH_STAR]
    arguments += ["--generated", 2, "--epochs", 1, "--json"]
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    formulas = {f"{m} at SNR 0.1" for m in ("gaussian", "poisson", "poisson_gaussian")}
    trainings = formulas | {"small", "small, untranslated"}
    picking, poses = found["picking"], found["poses"]
    assert set(picking["auprc"]) == {"blobs", "session, true labels", *trainings}
    assert all(0.0 <= value <= 1.0 for value in picking["auprc"].values())
    assert picking["n_micrographs"] == 2
    assert picking["n_particles"] > 5
    assert set(poses["errors"]) == {"true poses", "random poses", *trainings}
    assert poses["errors"]["true poses"]["view_error_deg"] == pytest.approx(0.0, abs=0.1)
    assert poses["errors"]["true poses"]["shift_error_px"] == 0.0
    assert 40.0 < poses["errors"]["random poses"]["view_error_deg"] < 140.0


def test_a_users_inception_takes_the_rankers_place(trained, tmp_path):
    onnx = pytest.importorskip("onnx")
    weights = np.random.default_rng(1).normal(size=(3, 2048)).astype(np.float32)
    shape = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("GlobalAveragePool", ["image"], ["pooled"]),
            onnx.helper.make_node("Flatten", ["pooled"], ["flat"]),
            onnx.helper.make_node("MatMul", ["flat", "weights"], ["features"]),
        ],
        "standin",
        [shape("image", onnx.TensorProto.FLOAT, ["b", 3, 32, 32])],
        [shape("features", onnx.TensorProto.FLOAT, ["b", 2048])],
        [onnx.numpy_helper.from_array(weights, "weights")],
    )
    path = tmp_path / "inception.onnx"
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8), path
    )
    ours = evaluate_trainings([trained], n_micrographs=1)
    theirs = evaluate_trainings([trained], n_micrographs=1, inception=path)
    assert ours.features == "ranker"
    assert theirs.features == f"inception {sha256_of_file(path)}"
    assert theirs.distances["small"].frechet_x1000 != ours.distances["small"].frechet_x1000
    assert theirs.distances["small"].spectrum == ours.distances["small"].spectrum
    path.write_bytes(b"no network")
    with pytest.raises(InputError, match="the file of an Inception v3"):
        evaluate_trainings([trained], inception=path)


def test_what_cannot_be_measured_is_refused(session, trained, tmp_path):
    from typer.testing import CliRunner

    from stream.cli import app

    command, known = ["evaluate", "cryogem", str(trained)], ["--truth", str(session / TRUTH_STAR)]
    for wrong in (["--picking"], ["--poses", *known, "--panel", "p.png"], [*known, "--topaz", "topaz"]):
        assert CliRunner().invoke(app, [*command, *wrong]).exit_code != 0
    star = read_particles_star(session / TRUTH_STAR)
    settings = DownstreamSettings(is_picking=False, is_poses=True, n_poses=1)
    placeless = star.particles.drop(columns=["rlnCoordinateX"])
    write_particles_star(tmp_path / "placeless.star", placeless, star.optics)
    with pytest.raises(InputError, match="rlnCoordinateX"):
        evaluate_downstream([trained], tmp_path / "placeless.star", settings)
    poseless = star.particles.drop(columns=["rlnAngleRot"])
    write_particles_star(session / "truth" / "poseless.star", poseless, star.optics)
    with pytest.raises(InputError, match="angles and defocus"):
        evaluate_downstream([trained], session / "truth" / "poseless.star", settings)
    seen = load_bank(trained / "bank.safetensors").facts.names[:2]
    rows = star.particles[star.particles["rlnMicrographName"].str.contains("|".join(seen))]
    write_particles_star(tmp_path / "seen.star", rows, star.optics)
    with pytest.raises(InputError, match="did not see"):
        evaluate_downstream([trained], tmp_path / "seen.star", settings)


# The options are those of tbepler/topaz: commands/preprocess.py and commands/train.py.
FAKE = """#!/usr/bin/env python3
import argparse, json, pathlib, shutil, sys

parser = argparse.ArgumentParser()
commands = parser.add_subparsers(dest="command", required=True)
preprocess = commands.add_parser("preprocess")
preprocess.add_argument("files", nargs="+")
preprocess.add_argument("-s", "--scale", default=4, type=int)
preprocess.add_argument("-o", "--destdir", required=True)
train = commands.add_parser("train")
for name in ("--train-images", "--train-targets", "--method", "--save-prefix", "--output"):
    train.add_argument(name, required=True)
for name in ("--pi", "--minibatch-balance"):
    train.add_argument(name, type=float, required=True)
for name in ("--radius", "--num-epochs", "--epoch-size", "--minibatch-size", "--device", "--num-workers"):
    train.add_argument(name, type=int)
args = parser.parse_args()
if args.command == "preprocess":
    for path in args.files:
        shutil.copy(path, args.destdir)
    print(args.scale, file=open(pathlib.Path(args.destdir).parent / "scale", "w"))
    sys.exit(0)
if args.num_epochs == 3:
    sys.exit("RuntimeError: out of memory")
images = {path.stem for path in pathlib.Path(args.train_images).iterdir()}
rows = [line.split("\\t") for line in open(args.train_targets)][1:]
assert {row[0] for row in rows} <= images
pathlib.Path(f"{args.save_prefix}_epoch{args.num_epochs}.sav").write_text(json.dumps(vars(args)))
"""


def labelled() -> LabelledMicrograph:
    return LabelledMicrograph(
        image=torch.zeros(96, 128),
        centres_yx_px=np.array([[10.0, 20.0], [50.0, 101.0], [95.9, 127.9], [200.0, 5.0]]),
        pixel_size_angstrom=2.0,
        diameter_angstrom=96.0,
    )


def program(folder: Path) -> Path:
    path = folder / "topaz"
    path.write_text(FAKE)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_topaz_is_trained_on_binned_coordinates_with_the_share_of_labelled_pixels(tmp_path):
    (tmp_path / "work").mkdir()
    model = train_topaz(program(tmp_path), [labelled()], tmp_path / "work", TopazTraining(epochs=2))
    used = json.loads(model.read_text())
    # 48 px to a diameter are binned twice; the last centre lies outside
    assert (tmp_path / "work" / "scale").read_text().strip() == "2"
    rows = (tmp_path / "work" / "targets.txt").read_text().splitlines()
    assert rows[1:] == ["training_0000\t10\t5", "training_0000\t50\t25", "training_0000\t63\t47"]
    assert used["method"] == "PN"
    assert used["pi"] == pytest.approx(3 * 29 / (48 * 64), abs=1e-6)


def test_topaz_that_fails_or_is_not_there_is_named(tmp_path):
    (tmp_path / "work").mkdir()
    with pytest.raises(ResourceError, match="out of memory"):
        train_topaz(program(tmp_path), [labelled()], tmp_path / "work", TopazTraining(epochs=3))
    (tmp_path / "again").mkdir()
    with pytest.raises(ConfigurationError, match="topaz is installed"):
        train_topaz(tmp_path / "nothing", [labelled()], tmp_path / "again", TopazTraining())


def test_a_larger_crop_costs_more():
    networks = NetworkSettings(
        depth=4, generator_filters=8, discriminator_filters=8, nce_levels=(1, 2), head_width=16
    )
    cheap, dear = (
        measure_step(networks, TrainingSettings(device="cpu", crop_px=side, n_queries=16))
        for side in (64, 512)
    )
    assert dear["cpu_s"] > 3.0 * cheap["cpu_s"] > 0.0
    assert cheap["peak_gb"] > 0.05
