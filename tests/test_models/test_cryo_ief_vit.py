"""The Vision Transformer is the released one: same keys, same values from the same weights."""

import json

import numpy as np
import pytest
import torch

from models.cryo_ief.config import Head, VitConfig, vit_config
from models.cryo_ief.layouts import Layout, detect_layout, load_model
from models.cryo_ief.preprocess import preprocess_particles
from models.cryo_ief.stem import ConvolutionalStem
from models.cryo_ief.vit import CryoVit, TokenBatchNorm, sincos_position_embedding, unit_feature

TINY = {"input_size_px": 32, "patch_size_px": 8, "width": 96, "depth": 2, "n_heads": 3}


def fill_as_published(model):
    """Fill every entry by the rule of facts/cryo_ief.md §2."""
    state = model.state_dict()
    for k, key in enumerate(sorted(state)):
        value = state[key]
        if not value.is_floating_point() or key == "pos_embed":
            continue
        a = torch.sin(0.37 * torch.arange(value.numel(), dtype=torch.float64) + k).reshape(value.shape)
        if key.endswith("running_var"):
            value.copy_(1.0 + 0.5 * a.abs())
        elif key.endswith("weight") and "norm" in key:
            value.copy_(1.0 + 0.1 * a)
        else:
            value.copy_(0.05 * a)
    return model.eval()


def parity_particles():
    i, j = np.meshgrid(np.arange(320), np.arange(320), indexing="ij")
    image = np.sin(0.11 * i) + np.cos(0.07 * j) + 0.5 * np.sin(0.9 * ((i * j) % 97))
    return torch.from_numpy(preprocess_particles(image.astype(np.float32)[None], is_exact=True))


@pytest.mark.parametrize(
    ("head", "logits", "score", "feature", "length"),
    [
        (Head.SIGMOID1, [0.531906], 0.629928, [-0.061599, -0.051015, 0.002036], 518.296),
        (Head.SOFTMAX2, [0.531906, 0.759481], 0.556650, [-0.065964, -0.053288, 0.004060], 27.8170),
    ],
)
def test_base_model_gives_the_published_parity_vector(head, logits, score, feature, length):
    model = fill_as_published(CryoVit(vit_config("base", head=head)))
    with torch.inference_mode():
        cls_token, found = model(parity_particles())
    assert found[0].tolist() == pytest.approx(logits, abs=2e-5)
    assert float(model.score(found)[0]) == pytest.approx(score, abs=5e-6)
    assert unit_feature(cls_token)[0, :3].tolist() == pytest.approx(feature, abs=2e-6)
    assert float(cls_token.norm()) == pytest.approx(length, rel=1e-5)


def test_base_ranker_has_the_released_entries():
    with torch.device("meta"):
        state = CryoVit(vit_config("base")).state_dict()
    assert len(state) == 188
    assert state["blocks.11.attn.qkv.weight"].shape == (2304, 768)
    assert state["blocks.0.norm2.running_var"].shape == (768,)
    assert state["pos_embed"].shape == (1, 257, 768)
    assert "norm.weight" not in state
    assert state["head.mlp_classifier.0.weight"].shape == (1, 768)


def test_batch_norm_in_evaluation_is_an_affine_map_of_each_channel():
    norm = TokenBatchNorm(3).eval()
    norm.running_mean.copy_(torch.tensor([1.0, 2.0, 3.0]))
    norm.running_var.copy_(torch.tensor([4.0, 1.0, 9.0]))
    tokens = torch.tensor([[[5.0, 2.0, 0.0], [1.0, 4.0, 3.0]]])
    expected = torch.tensor([[[2.0, 0.0, -1.0], [0.0, 2.0, 0.0]]])
    torch.testing.assert_close(norm(tokens), expected, atol=1e-4, rtol=1e-4)


def test_batch_norm_in_training_averages_over_batch_and_tokens():
    tokens = torch.randn((4, 5, 3), generator=torch.Generator().manual_seed(0)) * 3.0 + 2.0
    out = TokenBatchNorm(3).train()(tokens)
    torch.testing.assert_close(out.mean(dim=(0, 1)), torch.zeros(3), atol=1e-5, rtol=0.0)
    torch.testing.assert_close(out.var(dim=(0, 1), unbiased=False), torch.ones(3), atol=1e-3, rtol=0.0)


def test_position_embedding_is_rows_first_and_zero_for_the_cls_token():
    embedding = sincos_position_embedding(grid=4, width=16)[0]
    assert embedding.shape == (17, 16)
    assert (embedding[0] == 0).all()
    omega = 10000.0 ** (-torch.arange(4) / 4)
    row, column = 3, 1
    expected = torch.cat(
        ((row * omega).sin(), (row * omega).cos(), (column * omega).sin(), (column * omega).cos())
    )
    torch.testing.assert_close(embedding[1 + 4 * row + column], expected)


def test_encoder_without_head_gives_no_score():
    model = CryoVit(VitConfig(**TINY, head=Head.NONE))
    _, logits = model(torch.zeros((1, 1, 32, 32)))
    with pytest.raises(ValueError, match="no ranking head"):
        model.score(logits)


def test_gradients_reach_every_trained_weight():
    model = CryoVit(VitConfig(**TINY, head=Head.SOFTMAX2))
    _, logits = model(torch.randn((4, 1, 32, 32), generator=torch.Generator().manual_seed(0)))
    model.score(logits).sum().backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
    assert not model.pos_embed.requires_grad


@pytest.mark.parametrize(
    ("head", "layout"), [(Head.SOFTMAX2, Layout.RANKER_V1), (Head.SIGMOID1, Layout.RANKER_V15)]
)
def test_ranker_layout_is_detected_and_loaded_from_shapes(head, layout):
    model = CryoVit(VitConfig(**TINY, head=head)).eval()
    found = load_model(model.state_dict())
    assert found.layout is layout
    assert found.model.config.depth == 2
    assert found.model.config.input_size_px == 32
    particles = torch.randn((2, 1, 32, 32), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        torch.testing.assert_close(found.model(particles), model(particles))


def test_a_stem_gives_one_token_per_patch_and_is_read_back_from_its_keys():
    model = CryoVit(VitConfig(**TINY, head=Head.SOFTMAX2, stem_channels=(4, 8, 16))).eval()
    particles = torch.randn((2, 1, 32, 32), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        assert model.patch_embed(particles).shape == (2, 16, 96)
        found = load_model(model.state_dict())
        assert found.model.config == model.config
        torch.testing.assert_close(found.model(particles), model(particles))


def test_a_stems_tokens_are_in_the_order_of_the_position_embedding():
    """A token sees the 15 pixels about its patch's first one: a spot there, in the third row of patches, moves it the most."""
    torch.manual_seed(0)
    stem = CryoVit(VitConfig(**TINY, stem_channels=(4, 8, 16))).eval().patch_embed
    particles = torch.zeros(1, 1, 32, 32)
    spot = particles.clone()
    spot[..., 15:18, 0:2] = 1.0
    with torch.inference_mode():
        change = (stem(spot) - stem(particles)).norm(dim=-1)[0]
    assert int(change.argmax()) == 2 * 4 + 0


def test_a_folded_stem_is_the_same_function():
    stem = ConvolutionalStem((4, 8), 12)
    particles = torch.randn((16, 1, 16, 16), generator=torch.Generator().manual_seed(2)) + 0.5
    stem.train()(particles)  # statistics other than the initial ones
    with torch.no_grad():
        stem.norms[0].bias += 0.3
    stem.eval()
    with torch.inference_mode():
        torch.testing.assert_close(stem.folded()(particles), stem(particles), atol=1e-5, rtol=1e-4)


def test_a_stem_that_does_not_end_at_the_patch_is_refused():
    with pytest.raises(ValueError, match=r"stem_channels: \[4, 8\]"):
        VitConfig(**TINY, stem_channels=(4, 8))


@pytest.mark.parametrize("prefix", ["", "base_encoder."])
def test_cryo_ief_loads_bare_and_from_its_moco_prefix_without_companions(prefix):
    encoder = CryoVit(VitConfig(**TINY, head=Head.NONE)).eval()
    tensors = {prefix + key: value for key, value in encoder.state_dict().items()}
    tensors[f"{prefix}head.0.weight"] = torch.zeros(4, 4)
    tensors["momentum_encoder.cls_token"] = torch.ones(1, 1, 96)
    tensors["predictor.0.weight"] = torch.zeros(4, 4)
    found = load_model(tensors)
    assert found.layout is (Layout.CRYO_IEF_MOCO if prefix else Layout.CRYO_IEF_BARE)
    torch.testing.assert_close(found.model.cls_token, encoder.cls_token)


def test_partial_checkpoint_is_refused_with_the_missing_and_unknown_keys():
    tensors = dict(CryoVit(VitConfig(**TINY, head=Head.SIGMOID1)).state_dict())
    del tensors["blocks.1.norm2.running_mean"]
    tensors["blocks.1.gamma"] = torch.zeros(3)
    with pytest.raises(
        ValueError, match=r"missing: \[blocks.1.norm2.running_mean\].*unknown: \[blocks.1.gamma\]"
    ):
        load_model(tensors)


def test_ranker_v15_that_still_has_a_final_norm_is_refused():
    tensors = dict(CryoVit(VitConfig(**TINY, head=Head.SIGMOID1)).state_dict())
    tensors["norm.weight"] = torch.ones(96)
    with pytest.raises(ValueError, match=r"unknown: \[norm.weight\]"):
        load_model(tensors)


def test_misshapen_entry_is_named():
    tensors = dict(CryoVit(VitConfig(**TINY, head=Head.SIGMOID1)).state_dict())
    tensors["blocks.0.mlp.fc2.bias"] = torch.zeros(95)
    with pytest.raises(ValueError, match=r"misshapen: \[blocks.0.mlp.fc2.bias\]"):
        load_model(tensors)


def test_checkpoint_of_another_architecture_is_refused():
    with pytest.raises(ValueError, match="none of the known layouts"):
        detect_layout({"conv1.weight": torch.zeros(1), "fc.weight": torch.zeros(1)})


def test_metadata_that_contradicts_the_keys_is_refused():
    config = VitConfig(**TINY, head=Head.SIGMOID1)
    written = {**config.to_dict(), "head": "v1"}
    with pytest.raises(ValueError, match="its metadata"):
        load_model(CryoVit(config).state_dict(), written)


def test_config_survives_its_dictionary_and_refuses_unknown_keys():
    config = VitConfig(**TINY, head=Head.SOFTMAX2, mean=0.5, stem_channels=(4, 8, 16))
    assert VitConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match="depht"):
        VitConfig.from_dict({"depht": 3})


def test_size_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="giant"):
        vit_config("giant")
