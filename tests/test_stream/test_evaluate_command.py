"""`icestream evaluate`: features against known classes with maps, scores against labels with curves, wrong input named."""

import csv
import json
import re

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from models.cryo_ief.config import Head, vit_config
from models.cryo_ief.image_sets import ImageCollection, image_set_of
from models.cryo_ief.moco import MocoConfig
from models.cryo_ief.pretrain import PretrainConfig, pretrain
from models.cryo_ief.vit import CryoVit
from models.weights import save_checkpoint
from stream.commands import evaluate
from stream.commands.evaluate_features import find_structures
from stream.commands.evaluate_models import load_encoding_model, load_untrained
from stream.commands.feature_maps import FeatureMap, choose_embedding, embed, write_html, write_png
from stream.records.errors import ConfigurationError, InputError

SMALL = {"input_size_px": 16, "patch_size_px": 8, "width": 24, "n_heads": 3, "depth": 1}


def invoke(*arguments: object):
    app = typer.Typer()
    evaluate.register(app)
    app.callback()(lambda: None)
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    config = PretrainConfig(
        size="nano",
        model=SMALL,
        moco=MocoConfig(hidden=8, dim=4),
        n_epochs=1,
        batch_size=8,
        base_learning_rate=0.01,
    )
    grey = np.random.default_rng(0).integers(0, 256, (16, 16, 16)).astype(np.uint8)
    images = ImageCollection([image_set_of("a", grey)])
    return pretrain(config, images, tmp_path_factory.mktemp("trained")).checkpoint


@pytest.fixture
def two_structures(monkeypatch):
    """Two phantoms instead of twelve: the simulation is the slow part."""
    names = ("phantom:7:mass_kda=60", "phantom:8:mass_kda=60")
    monkeypatch.setattr("stream.commands.evaluate_features.find_structures", lambda _folder: names)
    return names


def test_features_are_judged_against_the_untrained_network_with_maps(checkpoint, two_structures, tmp_path):
    arguments = [
        "features", checkpoint, "--data", tmp_path / "data", "--images-per-class", 3, "--fields", 4, "--snr", 1.0,
        "--compare", "untrained", "--plot", tmp_path / "f.png", "--html", tmp_path / "f.html", "--embedding", "pca", "--json",
    ]  # fmt: skip
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert {"knn", "auc", "ap", "spearman", "pearson"} <= document.keys()
    assert document["compared"]["model"] == "untrained"
    assert document["n_images"]["structure_and_pose"] == 2 * 12 * 3
    for found in (document, document["compared"]):
        assert all(0.0 <= found["knn"][name] <= 1.0 for name in ("structure", "pose", "quality"))
        assert set(found["knn"]["pose_by_structure"]) == set(two_structures)
    assert document["knn"] != document["compared"]["knn"] or document["auc"] != document["compared"]["auc"]
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "f.html").read_text()
    assert not re.search(r"https?://|src=|@import", page)
    n_kept = len(list((tmp_path / "data").iterdir()))
    again = invoke(*arguments)
    assert json.loads(again.stdout) == document
    assert len(list((tmp_path / "data").iterdir())) == n_kept == 2


def test_figures_come_for_every_snr_down_to_the_papers(checkpoint, two_structures, tmp_path):
    options = ("--data", tmp_path, "--images-per-class", 2, "--fields", 4)
    result = invoke("features", checkpoint, *options, "--snr", 0.005, "--snr", 0.1, "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert [each["snr"] for each in document["by_snr"]] == [0.005, 0.1]
    assert document["knn"] == document["by_snr"][0]["knn"]
    assert all(0.0 <= each["auc"] <= 1.0 for each in document["by_snr"])
    shown = invoke("features", checkpoint, *options, "--snr", 0.005, "--snr", 0.1)
    assert shown.exit_code == 0, shown.output


def test_the_untrained_network_is_the_one_that_training_started_from(checkpoint):
    trained, untrained = load_encoding_model(checkpoint), load_untrained(checkpoint)
    grey = np.random.default_rng(1).integers(0, 256, (4, 16, 16)).astype(np.uint8)
    first, again = untrained.encode(grey).features, load_untrained(checkpoint).encode(grey).features
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - trained.encode(grey).features).max() > 1e-4


def test_a_checkpoint_without_its_training_has_no_untrained_network(tmp_path):
    config = vit_config("nano", **SMALL, head=Head.NONE)
    save_checkpoint(tmp_path / "m.safetensors", CryoVit(config).state_dict(), {"model": config.to_dict()})
    with pytest.raises(InputError, match=r"m\.safetensors: 'untrained' needs a checkpoint"):
        load_untrained(tmp_path / "m.safetensors")
    assert load_encoding_model(tmp_path / "m.safetensors").input_size_px == 16


def test_a_shipped_ranker_in_onnx_gives_features_and_scores():
    from models.cryoranker.serve import DEFAULT_MODEL

    model = load_encoding_model(DEFAULT_MODEL)
    shape = (65, model.input_size_px, model.input_size_px)
    encoded = model.encode(np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8))
    assert encoded.features.shape[0] == len(encoded.scores) == 65


def test_files_that_are_no_models_are_named(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    (tmp_path / "x.onnx").write_bytes(b"nothing")
    for name in ("x.safetensors", "x.onnx", "missing.pt"):
        with pytest.raises(InputError, match=re.escape(name)):
            load_encoding_model(tmp_path / name)


def test_structures_are_the_folders_models_filled_up_with_held_out_phantoms(tmp_path):
    for name in ("b.pdb", "a.cif.gz", "notes.txt"):
        (tmp_path / name).write_text("")
    names = find_structures(tmp_path)
    assert len(names) == 12
    assert [n.rpartition("/")[2] for n in names[:2]] == ["a.cif.gz", "b.pdb"]
    assert all(n.startswith("phantom:5000") for n in names[2:])
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "missing"):
        with pytest.raises(InputError, match=folder):
            find_structures(tmp_path / folder)


def test_outputs_with_the_wrong_suffix_are_refused(tmp_path):
    result = invoke("features", tmp_path / "m.pt", "--plot", tmp_path / "f.pdf")
    assert isinstance(result.exception, ConfigurationError)


def test_umap_is_asked_for_only_where_it_is_installed(monkeypatch):
    monkeypatch.setattr("stream.commands.feature_maps.importlib.util.find_spec", lambda _name: None)
    assert choose_embedding(None) == "tsne"
    assert choose_embedding("pca") == "pca"
    with pytest.raises(ConfigurationError, match="umap-learn"):
        choose_embedding("umap")


@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_maps_keep_clusters_apart_and_are_the_same_again(method):
    rng = np.random.default_rng(0)
    centres = 5 * np.eye(3, 8)
    features = np.concatenate([centre + 0.1 * rng.normal(size=(20, 8)) for centre in centres]).astype(
        np.float32
    )
    points = embed(features, method)
    np.testing.assert_array_equal(points, embed(features, method))
    middles = points.reshape(3, 20, 2).mean(axis=1)
    spread = np.linalg.norm(points.reshape(3, 20, 2) - middles[:, None], axis=-1).max()
    assert min(np.linalg.norm(middles[i] - middles[i - 1]) for i in range(3)) > 2 * spread


def test_a_page_holds_every_point_and_no_name_ends_its_script(tmp_path):
    each = FeatureMap(
        title="</script><b>",
        points=np.array([[0, 0], [1, 2], [3, 1]], np.float32),
        classes={"kind": ["a", "</script>", "a"]},
    )
    write_html(tmp_path / "f.html", [each], "pca")
    write_png(tmp_path / "f.png", [each], "pca")
    page = (tmp_path / "f.html").read_text()
    assert page.count("</script>") == 1
    (data,) = json.loads(re.search(r"const DATA=(.*);\n", page)[1])
    assert data["points"] == [[0.0, 0.0], [0.3333, 1.0], [1.0, 0.5]]
    assert data["classes"]["kind"] == {"names": ["</script>", "a"], "of": [1, 0, 1]}


def test_scores_are_judged_with_curves(tmp_path):
    table = tmp_path / "scored.csv"
    rows = [(0.9, 1.0), (0.8, 0.0), (0.8, 0.9), (0.1, 0.1), (0.5, 0.5)]
    table.write_text("icestreamScore,icestreamLabel\n" + "".join(f"{s},{y}\n" for s, y in rows))
    result = invoke("scores", table, "--curves", tmp_path / "c.csv", "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    # Good 0.9 and 0.8, bad 0.8 and 0.1: three ordered pairs and one tie.
    assert document["auc"] == pytest.approx(3.5 / 4)
    assert document["ap"] == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    with (tmp_path / "c.csv").open() as stream:
        curve = list(csv.DictReader(stream))
    assert [float(row["recall"]) for row in curve] == [0.5, 1.0, 1.0]
    assert invoke("scores", table, "--curves", tmp_path / "c.png").exit_code == 0
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    assert isinstance(invoke("scores", table, "--curves", tmp_path / "c.pdf").exception, ConfigurationError)
