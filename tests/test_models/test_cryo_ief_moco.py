"""MoCo v3: the loss by hand, gradients to the query encoder alone, the key encoder as an exact moving average."""

import math

import numpy as np
import pytest
import torch

from models.cryo_ief.config import Head, vit_config
from models.cryo_ief.layouts import Layout, load_model
from models.cryo_ief.moco import Moco, MocoConfig, info_nce, momentum_at
from models.cryo_ief.pretrain import PretrainConfig, learning_rate_at

VIT = vit_config("nano", input_size_px=16, patch_size_px=8, width=24, n_heads=3, depth=2, head=Head.NONE)


def moco(**changes):
    torch.manual_seed(0)
    return Moco(VIT, MocoConfig(hidden=16, dim=8, **changes)).train()


def views(n=6):
    generator = torch.Generator().manual_seed(1)
    return torch.randn((n, 1, 16, 16), generator=generator), torch.randn((n, 1, 16, 16), generator=generator)


def test_loss_equals_the_hand_computed_value():
    # Unit vectors along x and y: the own key is at cosine 1, the other at 0, so at τ = 0.5 each query gives
    # −log(e² / (e² + e⁰)); lengths do not matter.
    query = torch.tensor([[3.0, 0.0], [0.0, 0.5]])
    key = torch.tensor([[1.0, 0.0], [0.0, 7.0]])
    found = info_nce(query, key, 0.5)
    assert float(found.loss) == pytest.approx(-math.log(math.exp(2) / (math.exp(2) + 1)), rel=1e-6)
    assert float(found.accuracy) == 1.0


def test_loss_of_swapped_keys_and_another_temperature_is_scaled_by_two_tau():
    query, key = torch.eye(2), torch.eye(2).flip(0)
    # The own key is at cosine 0, the other at 1: −log(1 / (1 + e⁵)) times 2 · 0.2.
    found = info_nce(query, key, 0.2)
    assert float(found.loss) == pytest.approx(0.4 * math.log(1 + math.exp(5)), rel=1e-6)
    assert float(found.accuracy) == 0.0


def test_loss_over_a_batch_of_three_counts_every_other_key_as_negative():
    query = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    key = torch.tensor([[0.8, 0.6], [1.0, 0.0], [0.0, -1.0]])
    cosine = np.array([[0.8, 1.0, 0.0], [0.96, 0.6, -0.8], [0.6, 0.0, -1.0]])
    weights = np.exp(cosine / 0.5)
    expected = -np.log(np.diag(weights) / weights.sum(axis=1)).mean()
    assert float(info_nce(query, key, 0.5).loss) == pytest.approx(expected, rel=1e-6)


def test_the_loss_is_symmetric_in_the_two_views():
    model, (first, second) = moco(), views()
    torch.testing.assert_close(model(first, second)[0], model(second, first)[0])


def test_gradients_reach_the_query_side_alone():
    model = moco()
    model(*views())[0].backward()
    for name, parameter in model.named_parameters():
        if name.startswith("momentum_encoder.") or name.endswith("pos_embed"):
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None, name
            assert bool(torch.isfinite(parameter.grad).all()), name
    heads = ("base_encoder.head.0.weight", "predictor.3.weight", "base_encoder.blocks.0.mlp.fc1.weight")
    named = dict(model.named_parameters())
    assert all(float(named[name].grad.abs().max()) > 0 for name in heads)


def test_no_gradient_passes_to_the_keys():
    query, key = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    info_nce(query, key, 0.5).loss.backward()
    assert key.grad is None
    assert query.grad is not None


def test_key_encoder_follows_the_moving_average_exactly():
    model = moco()
    with torch.no_grad():
        for parameter in model.base_encoder.parameters():
            parameter.add_(0.1)
    before = [p.clone() for p in model.momentum_encoder.parameters()]
    model.update_momentum_encoder(0.99)
    model.update_momentum_encoder(0.99)
    pairs = zip(before, model.base_encoder.parameters(), model.momentum_encoder.parameters(), strict=True)
    for key, query, after in pairs:
        torch.testing.assert_close(after, 0.9801 * key + 0.0199 * query, rtol=1e-5, atol=1e-6)


def test_momentum_is_the_papers_constant_or_rises_to_one():
    assert [momentum_at(MocoConfig(), p) for p in (0.0, 0.5, 1.0)] == [0.99] * 3
    rising = MocoConfig(momentum_schedule="cosine")
    assert [momentum_at(rising, p) for p in (0.0, 0.5, 1.0)] == pytest.approx([0.99, 0.995, 1.0])


def test_a_frozen_patch_projection_gets_no_gradient():
    model = moco(is_patch_embedding_frozen=True)
    model(*views())[0].backward()
    assert model.base_encoder.patch_embed.proj.weight.grad is None
    assert model.base_encoder.cls_token.grad is not None


def test_keys_are_those_of_a_released_checkpoint_and_our_loader_detects_them():
    model = moco()
    state = model.state_dict()
    keys = set(state)
    assert {
        "base_encoder.head.0.weight",
        "base_encoder.head.1.weight",
        "base_encoder.head.7.running_mean",
    } <= keys
    assert {"predictor.0.weight", "predictor.1.bias", "predictor.3.weight", "predictor.4.running_var"} <= keys
    assert not {"base_encoder.head.0.bias", "base_encoder.head.7.weight", "predictor.4.weight"} & keys
    assert {k.replace("base_", "momentum_") for k in keys if k.startswith("base_")} <= keys
    loaded = load_model(state, VIT.to_dict())
    assert loaded.layout is Layout.CRYO_IEF_MOCO
    particles = views()[0]
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded.model.encode(particles), model.base_encoder.encode(particles))


def test_paper_sized_heads_have_the_papers_widths():
    model = Moco(VIT, MocoConfig())
    shapes = {
        name: tuple(p.shape) for name, p in model.named_parameters() if p.ndim == 2 and "block" not in name
    }
    assert shapes["base_encoder.head.3.weight"] == (4096, 4096)
    assert shapes["base_encoder.head.6.weight"] == (256, 4096)
    assert shapes["predictor.0.weight"] == (4096, 256)
    assert shapes["predictor.3.weight"] == (256, 4096)


def test_learning_rate_follows_the_papers_rule():
    config = PretrainConfig(n_epochs=25)
    peak = 1e-5 * 2048 / 256
    assert learning_rate_at(config, 0.0) == 0.0
    assert learning_rate_at(config, 2.5) == pytest.approx(peak / 2)
    assert learning_rate_at(config, 5.0) == pytest.approx(peak)
    assert learning_rate_at(config, 15.0) == pytest.approx(peak / 2)
    assert learning_rate_at(config, 25.0) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(
    ("changes", "name"),
    [({"temperature": 0.0}, "temperature"), ({"momentum": 1.5}, "momentum"), ({"dim": 0}, "dim")],
)
def test_settings_that_make_no_sense_are_named(changes, name):
    with pytest.raises(ValueError, match=f"moco.{name}"):
        MocoConfig(**changes)


def test_a_model_with_a_ranking_head_is_not_pretrained():
    with pytest.raises(ValueError, match="without a head"):
        Moco(vit_config("nano"), MocoConfig(hidden=8, dim=8))
