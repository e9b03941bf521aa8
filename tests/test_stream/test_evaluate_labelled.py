"""`icestream evaluate` on a set that somebody labelled: STAR and .cs, classes, poses, scores of a model, wrong input named."""

import json

import mrcfile
import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

from models.cryo_ief.config import Head, vit_config
from models.cryo_ief.vit import CryoVit
from models.cryoranker.serve import DEFAULT_MODEL, OnnxRanker
from models.weights import save_checkpoint
from stream.commands import evaluate
from stream.commands.evaluate_labelled import judge_labelled_set, read_labelled_set
from stream.commands.evaluate_models import EncodingModel
from stream.records.errors import ConfigurationError, InputError

SMALL = {"input_size_px": 16, "patch_size_px": 8, "width": 24, "n_heads": 3, "depth": 1}
N = 40
HEADER = """data_optics

loop_
_rlnOpticsGroup #1
_rlnVoltage #2
_rlnSphericalAberration #3
_rlnAmplitudeContrast #4
_rlnImagePixelSize #5
1 300 2.7 0.1 2.0

data_particles

loop_
_rlnImageName #1
_rlnOpticsGroup #2
_rlnMicrographName #3
_classScore #4
_structure #5
_rlnAngleRot #6
_rlnAngleTilt #7
_rlnAnglePsi #8
"""


def invoke(*arguments: object):
    app = typer.Typer()
    evaluate.register(app)
    app.callback()(lambda: None)
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    config = vit_config("nano", **SMALL, head=Head.NONE)
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model") / "m.safetensors"
    save_checkpoint(path, CryoVit(config).state_dict(), {"model": config.to_dict()})
    return path


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """Bright discs (good, two structures: large and small) and noise (bad), in one STAR and one .cs file."""
    folder = tmp_path_factory.mktemp("set")
    rng = np.random.default_rng(0)
    images = rng.normal(size=(N, 32, 32)).astype(np.float32)
    radius = np.hypot(*(np.mgrid[:32, :32] - 16))
    labels = np.where(np.arange(N) % 2 == 0, 0.9, 0.1)
    structure = np.where(np.arange(N) % 4 < 2, "large", "small")
    for i in range(0, N, 2):
        images[i] += 8.0 * (radius < (12 if structure[i] == "large" else 5))
    images[5] = 1.0
    with mrcfile.new(folder / "a.mrcs") as stack:
        stack.set_data(images)
        stack.set_image_stack()
        stack.voxel_size = 2.0
    rows = [
        f"{i + 1:06d}@a.mrcs 1 m{i // 10}.mrc {labels[i]} {structure[i]} {9 * i} {4 * i} 0" for i in range(N)
    ]
    (folder / "set.star").write_text(HEADER + "\n".join(rows) + "\n")
    fields = [
        ("uid", "u8"),
        ("blob/path", "S20"),
        ("blob/idx", "u4"),
        ("blob/psize_A", "f4"),
        ("quality", "f4"),
    ]
    table = np.zeros(N, fields)
    table["uid"], table["blob/path"], table["blob/idx"] = np.arange(1, N + 1), b"a.mrcs", np.arange(N)
    table["blob/psize_A"], table["quality"] = 2.0, labels
    with (folder / "set.cs").open("wb") as stream:
        np.save(stream, table)
    return folder


def test_features_are_judged_on_a_users_star_with_structures(labelled, checkpoint):
    result = invoke(
        "features", checkpoint, "--particles", labelled / "set.star", "--label-column", "classScore",
        "--class-column", "structure", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert {"knn", "auc", "ap", "spearman", "pearson"} <= document.keys()
    assert (document["particles"], document["judged"], document["excluded"]) == (N, N - 1, 1)
    assert document["knn"]["quality"] > document["guessing"]["quality"] + 0.2
    assert document["knn"]["pose"] is None  # twenty good views are too few for twelve classes
    assert document["knn"]["structure"] > document["guessing"]["structure"]
    assert document["ranked_by"] == "probe"


def test_a_cs_file_gives_the_same_quality_as_its_star(labelled, checkpoint):
    found = []
    for name, column in (("set.star", "classScore"), ("set.cs", "quality")):
        result = invoke(
            "features", checkpoint, "--particles", labelled / name, "--label-column", column, "--json"
        )
        assert result.exit_code == 0, result.output
        found.append(json.loads(result.stdout))
    assert found[0]["knn"]["quality"] == found[1]["knn"]["quality"] > 0.9
    assert found[0]["knn"]["structure"] is None
    assert min(each["auc"] for each in found) > 0.9


def test_the_table_for_a_person_leaves_out_what_the_set_does_not_say(labelled, checkpoint):
    result = invoke("features", checkpoint, "--particles", labelled / "set.cs", "--label-column", "quality")
    assert result.exit_code == 0, result.output


def test_poses_of_a_users_set_fall_into_view_classes(labelled):
    """A model that sees the view direction itself finds every neighbour in its own class; one that sees noise does not."""
    given = read_labelled_set(labelled / "set.star", label_column="classScore")
    rng = np.random.default_rng(1)
    n = 2000
    table = given.table.take(np.arange(n) % 4)
    euler = np.stack(
        [rng.uniform(-180, 180, n), np.rad2deg(np.arccos(rng.uniform(-1, 1, n))), np.zeros(n)], 1
    )
    rot, tilt = np.deg2rad(euler[:, 0]), np.deg2rad(euler[:, 1])
    views = np.stack([np.sin(tilt) * np.cos(rot), np.sin(tilt) * np.sin(rot), np.cos(tilt)], 1)
    from dataclasses import replace
    from types import SimpleNamespace

    set_of = replace(given, table=replace(table, euler_deg=euler), labels=np.resize([0.9, 0.9, 0.9, 0.1], n))

    def judge(features):
        # images are read stack by stack, index by index: features go along
        order = np.lexsort((table.stack_indices, table.stack_paths.astype(str)))
        encode = lambda _grey: SimpleNamespace(features=features[order], scores=None)  # noqa: E731
        model = EncodingModel(name="views", encode=encode, input_size_px=16, resize_mode="hartley")
        return judge_labelled_set(model, set_of)["knn"]["pose"]

    assert judge(views.astype(np.float32)) > 0.95
    assert judge(rng.normal(size=(n, 8)).astype(np.float32)) < 0.2


def test_scores_of_a_users_set_are_made_and_judged_in_one_go(labelled):
    result = invoke(
        "scores", labelled / "set.star", "--label-column", "classScore", "--model", DEFAULT_MODEL, "--json"
    )
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert (document["particles"], document["scored"]) == (N, N - 1)
    with mrcfile.open(labelled / "a.mrcs") as stack:
        scores = OnnxRanker().score(stack.data)[0]
    usable = np.arange(N) != 5
    good, bad = scores[usable & (np.arange(N) % 2 == 0)], scores[usable & (np.arange(N) % 2 == 1)]
    greater = (good[:, None] > bad[None, :]).mean() + 0.5 * (good[:, None] == bad[None, :]).mean()
    assert document["auc"] == pytest.approx(greater, abs=0.01)
    assert (document["n_good"], document["n_bad"]) == (20, 19)


def test_scores_and_labels_are_read_from_a_cs_file_too(labelled, tmp_path):
    table = np.load(labelled / "set.cs")
    named = np.zeros(N, [*table.dtype.descr, ("rank", "f4")])
    for name in table.dtype.names:
        named[name] = table[name]
    named["rank"] = table["quality"]
    with (tmp_path / "ranked.cs").open("wb") as stream:
        np.save(stream, named)
    result = invoke(
        "scores", tmp_path / "ranked.cs", "--label-column", "quality", "--score-column", "rank", "--json"
    )
    assert json.loads(result.stdout)["auc"] == 1.0


def test_what_is_wrong_with_a_users_set_is_named(labelled, checkpoint, tmp_path):
    def error_of(*arguments: object):
        return invoke("features", checkpoint, *arguments).exception

    star = labelled / "set.star"
    for arguments, kind, words in (
        (("--particles", star), InputError, "icestreamLabel"),
        (("--particles", star, "--label-column", "rlnAngleRot"), InputError, r"[0, 1]"),
        (("--particles", star, "--label-column", "structure"), InputError, "structure holds numbers"),
        (("--particles", star, "--label-column", "classScore", "--class-column", "nothing"), InputError, "nothing"),
        (("--particles", tmp_path / "none.star"), InputError, "none.star"),
        (("--particles", star, "--snr", 0.1), ConfigurationError, "--snr"),
        (("--class-column", "structure"), ConfigurationError, "--particles"),
    ):  # fmt: skip
        error = error_of(*arguments)
        assert isinstance(error, kind), error
        assert words in str(error)
    one_kind = tmp_path / "good.star"
    lines = star.read_text().splitlines(keepends=True)
    one_kind.write_text("".join(line for line in lines if " 0.1 " not in line or "@" not in line))
    error = error_of("--particles", one_kind, "--label-column", "classScore", "--root", labelled)
    assert "good (above 0.7) and bad" in str(error)
