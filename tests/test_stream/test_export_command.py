"""`icestream export`, `train` and `evaluate` as a user meets them."""

import json

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

from models.cryo_ief.config import Head, VitConfig
from models.cryo_ief.vit import CryoVit
from models.cryoranker.serve import OnnxRanker
from models.weights import save_checkpoint, sha256_of_file
from stream.cli import app
from stream.records.errors import ConfigurationError, InputError

TINY = VitConfig(input_size_px=32, patch_size_px=8, width=96, depth=2, n_heads=3, head=Head.SOFTMAX2)
runner = CliRunner()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    model = CryoVit(TINY)
    model.head.linear1.weight.data.normal_()
    path = tmp_path_factory.mktemp("checkpoint") / "tiny.safetensors"
    save_checkpoint(path, model.state_dict(), {"model": TINY.to_dict()})
    return path


def test_export_prints_one_json_document_and_writes_a_ranker(checkpoint, tmp_path):
    onnx = tmp_path / "tiny.onnx"
    result = runner.invoke(
        app, ["export", str(checkpoint), "--onnx", str(onnx), "--resize", "bicubic", "--json"]
    )
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["layout"] == "cryoranker-v1"
    assert document["sha256"] == sha256_of_file(onnx)
    assert document["max_abs_score_diff"] < 1e-4
    ranker = OnnxRanker(onnx)
    assert ranker.info.resize_mode == "bicubic"
    assert ranker.info.source_sha256 == sha256_of_file(checkpoint)


def test_checkpoint_that_covers_half_the_network_is_refused_with_its_keys(checkpoint, tmp_path):
    model = CryoVit(TINY).state_dict()
    del model["blocks.1.attn.qkv.weight"]
    half = tmp_path / "half.safetensors"
    save_checkpoint(half, model, {})
    result = runner.invoke(app, ["export", str(half), "--onnx", str(tmp_path / "x.onnx")])
    assert isinstance(result.exception, InputError)
    assert "missing: [blocks.1.attn.qkv.weight]" in str(result.exception)
    assert not (tmp_path / "x.onnx").exists()


def test_another_hash_than_expected_is_refused(checkpoint, tmp_path):
    arguments = ["export", str(checkpoint), "--onnx", str(tmp_path / "x.onnx"), "--expected-sha256", "0" * 64]
    result = runner.invoke(app, arguments)
    assert isinstance(result.exception, InputError)
    assert "SHA-256" in str(result.exception)


def test_training_configuration_with_an_unknown_key_is_refused(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("seed: 1\nlearning_rat: 0.1\n")
    result = runner.invoke(app, ["train", "cryoranker", str(path), "--out", str(tmp_path / "out")])
    assert isinstance(result.exception, ConfigurationError)
    assert "learning_rat" in str(result.exception)


def test_training_writes_a_checkpoint_that_loads_and_a_curve(tmp_path):
    config = {
        "size": "nano",
        "model": {"input_size_px": 32, "patch_size_px": 16, "width": 96, "depth": 1},
        "data": {
            "n_train_phantoms": 1,
            "n_validation_phantoms": 1,
            "fields_per_structure": 4,
            "n_shapes": 1,
            "first_seed": 7,
            "cache": str(tmp_path / "cache"),
        },
        "n_steps": 4,
        "batch_size": 8,
        "warm_up_steps": 2,
        "evaluate_every": 2,
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(config))
    result = runner.invoke(app, ["train", "cryoranker", str(path), "--out", str(tmp_path / "out"), "--json"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert 0.0 <= document["metrics"]["auc"] <= 1.0
    assert len(json.loads((tmp_path / "out" / "curve.json").read_text())) == 2
    from models.cryo_ief.layouts import Layout, load_model
    from models.weights import load_checkpoint

    loaded = load_checkpoint(tmp_path / "out" / "ranker.safetensors", expected_sha256=document["sha256"])
    found = load_model(loaded.tensors, loaded.metadata["model"])
    assert found.layout is Layout.RANKER_V1
    assert found.model.config.input_size_px == 32


def test_evaluate_scores_prints_the_papers_figures(tmp_path):
    rng = np.random.default_rng(0)
    labels = rng.random(200)
    scores = labels + 0.2 * rng.normal(size=200)
    table = tmp_path / "scored.csv"
    rows = "\n".join(f"{s},{y}" for s, y in zip(scores, labels, strict=True))
    table.write_text("icestreamScore,icestreamLabel\n" + rows + "\n")
    result = runner.invoke(app, ["evaluate", "scores", str(table), "--json"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["auc"] > 0.95
    assert document["spearman"] == pytest.approx(0.8, abs=0.12)
    assert document["n_good"] + document["n_bad"] < 200


def test_evaluate_names_a_missing_column(tmp_path):
    table = tmp_path / "scored.csv"
    table.write_text("a,b\n1,2\n")
    result = runner.invoke(app, ["evaluate", "scores", str(table)])
    assert isinstance(result.exception, InputError)
    assert "icestreamScore" in str(result.exception)
