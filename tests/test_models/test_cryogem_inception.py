"""An Inception of the user's: a stand-in ONNX network of the same outputs, timm's state dictionary, and what is refused."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from models.cryogem.inception import FEATURES, inception_features

onnx = pytest.importorskip("onnx")


def write_onnx(path, *, features=FEATURES, side=24, batch=None, channels=3):
    """Write a network whose features are its channels' means times known weights."""
    from onnx import TensorProto, helper, numpy_helper

    weights = np.random.default_rng(1).normal(size=(channels, features)).astype(np.float32)
    nodes = [
        helper.make_node("GlobalAveragePool", ["image"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weights"], ["features"]),
    ]
    graph = helper.make_graph(
        nodes,
        "standin",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [batch or "b", channels, side, side])],
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, [batch or "b", features])],
        [numpy_helper.from_array(weights, "weights")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path)
    return weights


def patches(n=5, side=40):
    return np.random.default_rng(2).uniform(-1, 1, size=(n, side, side)).astype(np.float32)


@pytest.mark.parametrize(("batch", "channels"), [(None, 3), (2, 3), (None, 1)])
def test_features_of_an_onnx_network_are_what_it_computes(tmp_path, batch, channels):
    weights = write_onnx(tmp_path / "net.onnx", batch=batch, channels=channels)
    flat = np.linspace(-0.5, 0.5, 5).astype(np.float32)[:, None, None] * np.ones((1, 40, 40), np.float32)
    found = inception_features(tmp_path / "net.onnx", batch_size=2)(flat)
    assert found.shape == (5, FEATURES)
    assert np.allclose(found, flat[:, 0, 0][:, None] * weights.sum(0), atol=1e-4)


def test_a_network_without_2048_features_is_refused(tmp_path):
    write_onnx(tmp_path / "net.onnx", features=1000)
    with pytest.raises(ValueError, match="must be \\(batch, 2048\\)"):
        inception_features(tmp_path / "net.onnx")


@pytest.mark.slow
def test_timm_weights_give_the_pooled_layer(tmp_path):
    from safetensors.torch import save_file

    from models.cryo_ief.timm_door import load_timm

    torch.manual_seed(3)
    network = load_timm().create_model("inception_v3", pretrained=False).eval()
    state = {**network.state_dict(), "AuxLogits.fc.weight": torch.zeros(2, 2)}
    save_file(state, tmp_path / "inception.safetensors")
    images = patches(2, side=64)
    found = inception_features(tmp_path / "inception.safetensors")(images)
    rows = torch.from_numpy(images)[:, None].expand(-1, 3, -1, -1)
    resized = torch.nn.functional.interpolate(rows, size=(299, 299), mode="bilinear", antialias=True)
    with torch.inference_mode():
        expected = network.forward_head(network.forward_features(resized), pre_logits=True)
    assert found.shape == (2, FEATURES)
    assert np.linalg.norm(found - expected.numpy()) < 1e-4 * np.linalg.norm(expected.numpy())


def test_other_weights_are_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"layer.weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="state dictionary of timm's inception_v3"):
        inception_features(tmp_path / "other.safetensors")


def test_programs_and_pickles_are_refused(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # such files exist, and have to be refused
        torch.jit.trace(torch.nn.Identity(), torch.zeros(1)).save(str(tmp_path / "script.pt"))
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    (tmp_path / "broken.onnx").write_bytes(b"not a network")
    for name in ("script.pt", "module.pt", "broken.onnx", "missing.onnx", "weights.npz"):
        with pytest.raises(ValueError, match=name):
            inception_features(tmp_path / name)
