"""Exported blocks: the pruned last block is the block's CLS row, two digits are the layer in float32 and precise in int8."""

import copy

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from torch import nn

from models.cryo_ief.config import Head, VitConfig
from models.cryo_ief.export import _quiet
from models.cryo_ief.exported_blocks import (
    ClsInTwoDigits,
    LastBlock,
    TwoDigitLinear,
    prune_last_block,
    refine_cls_token,
)
from models.cryo_ief.vit import CryoVit

CONFIG = VitConfig(
    input_size_px=32, patch_size_px=8, width=96, depth=3, n_heads=3, head=Head.SIGMOID1, mean=0.5, std=0.2
)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = CryoVit(CONFIG).eval()
    for block in model.blocks:
        block.norm2.running_mean.normal_()
        block.norm2.running_var.uniform_(0.5, 2.0)
    return model


def test_the_last_block_gives_the_cls_row_of_the_whole_block(model):
    tokens = torch.randn((4, 17, 96), generator=torch.Generator().manual_seed(0))
    block = model.blocks[-1]
    with torch.inference_mode():
        pruned = LastBlock(block)(tokens)
        assert pruned.shape == (4, 1, 96)
        torch.testing.assert_close(pruned[:, 0], block(tokens)[:, 0], atol=1e-6, rtol=1e-5)


def test_a_network_with_pruned_and_refined_blocks_gives_the_same_logits(model):
    particles = torch.randn((3, 1, 32, 32), generator=torch.Generator().manual_seed(1))
    changed = copy.deepcopy(model)
    with torch.inference_mode():
        expected = model(particles)
        prune_last_block(changed.blocks)
        torch.testing.assert_close(changed(particles), expected, atol=1e-5, rtol=1e-4)
        refine_cls_token(changed.blocks)
        torch.testing.assert_close(changed(particles), expected, atol=1e-5, rtol=1e-4)


def test_the_cls_row_of_a_refined_layer_is_the_layers(model):
    tokens = torch.randn((2, 17, 96), generator=torch.Generator().manual_seed(2))
    layer = model.blocks[0].mlp.fc1
    with torch.inference_mode():
        torch.testing.assert_close(ClsInTwoDigits(layer)(tokens), layer(tokens), atol=1e-5, rtol=1e-4)
        zero = torch.zeros(1, 1, 96)
        torch.testing.assert_close(TwoDigitLinear(layer)(zero), layer(zero), atol=1e-6, rtol=1e-5)


class Both(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.linear, self.precise = linear, TwoDigitLinear(linear)

    def forward(self, row):
        return self.linear(row), self.precise(row)


@pytest.mark.parametrize("n", [1, 3])
def test_two_digits_survive_int8(tmp_path, n):
    """Weights that int8 holds exactly leave the rounding of the input alone: two digits make it 100 times smaller."""
    torch.manual_seed(3)
    linear = nn.Linear(64, 48)
    linear.weight.data = torch.randint(-127, 128, (48, 64)).float()
    linear.weight.data[:, 0] = 127.0
    linear.weight.data /= 500.0
    path = tmp_path / "both.onnx"
    row = torch.randn((n, 1, 64))
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(Both(linear), (row,), dynamo=True, opset_version=18, input_names=["row"])
        program.save(str(path))
        graph = onnx.load(path)
        del graph.graph.value_info[:]
        onnx.save(graph, path)
        quantize_dynamic(
            path, path, weight_type=QuantType.QInt8, per_channel=True, op_types_to_quantize=["MatMul", "Gemm"]
        )
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    plain, precise = session.run(None, {"row": row.numpy()})
    with torch.inference_mode():
        expected = linear(row).numpy()
    error, refined = (np.abs(found - expected).max() for found in (plain, precise))
    assert error > 1e-3
    assert refined < error / 100
