"""Export and serving: ONNX agrees with torch, and files that are not rankers are refused."""

import copy
import json
import logging
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch

from models.cryo_ief.config import Head, VitConfig
from models.cryo_ief.encode import encode_grey
from models.cryo_ief.export import ExportedVit, export_onnx, fold_batch_norm, smooth_activations
from models.cryo_ief.preprocess import preprocess_particles
from models.cryo_ief.vit import CryoVit, unit_feature
from models.cryoranker.serve import OnnxRanker
from models.cryoranker.starting import network_from_onnx, settle_norms

TINY = VitConfig(
    input_size_px=32, patch_size_px=8, width=96, depth=2, n_heads=3, head=Head.SOFTMAX2, mean=0.5, std=0.2
)


def random_model(config=TINY, seed=0):
    torch.manual_seed(seed)
    model = CryoVit(config).eval()
    generator = torch.Generator().manual_seed(seed)
    for block in model.blocks:
        block.norm2.running_mean.normal_(generator=generator)
        block.norm2.running_var.uniform_(0.5, 2.0, generator=generator)
        block.norm2.weight.data.normal_(1.0, 0.3, generator=generator)
        block.norm2.bias.data.normal_(generator=generator)
    if config.head is not Head.NONE:
        for parameter in model.head.parameters():
            parameter.data.normal_(std=0.3, generator=generator)
    return model


@pytest.fixture(scope="module")
def model():
    return random_model()


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "ranker.onnx"
    report = export_onnx(model, path, layout="cryoranker-v1", source_sha256="ab" * 32)
    return path, report


def test_folding_batch_norm_changes_no_output(model):
    particles = torch.randn((3, 1, 32, 32), generator=torch.Generator().manual_seed(0))
    folded = fold_batch_norm(model)
    with torch.inference_mode():
        torch.testing.assert_close(folded(particles), model(particles), atol=2e-5, rtol=1e-4)
    assert not any("norm2" in name for name in folded.state_dict())
    assert any("norm2" in name for name in model.state_dict())


def test_a_network_with_a_stem_is_exported_folded_and_read_back(tmp_path):
    model = random_model(replace(TINY, stem_channels=(4, 8, 16)))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():  # equal constants would be stored once
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator) * parameter.requires_grad)
        for norm in model.patch_embed.norms:
            norm.running_mean.normal_(generator=generator)
            norm.running_var.uniform_(0.5, 2.0, generator=generator)
    path = tmp_path / "stem.onnx"
    report = export_onnx(model, path, layout="cryoranker-v1", source_sha256="ab" * 32)
    assert report.max_abs_score_diff < 1e-5
    assert "BatchNormalization" not in {node.op_type for node in onnx.load(path).graph.node}
    grey = np.random.default_rng(4).integers(0, 256, (32, 32, 32)).astype(np.uint8)
    again = network_from_onnx(path)
    wanted = encode_grey(model, grey).scores
    np.testing.assert_allclose(encode_grey(again, grey).scores, wanted, atol=1e-5)
    settle_norms(again, grey)
    np.testing.assert_allclose(encode_grey(again, grey).scores, wanted, atol=1e-5)
    assert float(again.patch_embed.norms[0].running_var.min()) != 1.0


def test_smoothing_activations_changes_no_output_and_shares_the_channels_ranges(model):
    particles = torch.randn((4, 1, 32, 32), generator=torch.Generator().manual_seed(0))
    wide = copy.deepcopy(model)
    wide.blocks[0].norm1.weight.data[5] = 60.0
    smooth = smooth_activations(wide, particles)
    seen = []
    with torch.inference_mode():
        for net in (wide, smooth):
            hook = net.blocks[0].attn.qkv.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
            net.encode(particles)
            hook.remove()
        torch.testing.assert_close(smooth(particles), wide(particles), atol=1e-4, rtol=1e-3)
    before, after = (x.abs().amax(dim=(0, 1)) for x in seen)
    assert before.max() / before.median() > 20
    assert after.max() / after.median() < 0.3 * before.max() / before.median()


def test_export_reports_parity_within_tolerance(exported):
    _, report = exported
    assert report.max_abs_score_diff < 1e-4
    assert report.min_feature_cosine > 0.9999


def test_onnx_scores_and_features_are_torchs_for_any_batch(model, exported):
    path, _ = exported
    ranker = OnnxRanker(path, batch_size=4)
    images = np.random.default_rng(0).normal(size=(7, 48, 48)).astype(np.float32)
    scores, features = ranker.score(images)
    particles = torch.from_numpy(preprocess_particles(images, 32, 0.5, 0.2))
    with torch.inference_mode():
        cls_token, logits = model(particles)
    np.testing.assert_allclose(scores, model.score(logits).numpy(), atol=1e-4)
    np.testing.assert_allclose(features, unit_feature(cls_token).numpy(), atol=2e-3)
    assert features.dtype == np.float16
    np.testing.assert_allclose(np.linalg.norm(features.astype(np.float64), axis=1), 1.0, atol=2e-3)


def test_a_last_batch_of_one_is_scored(exported):
    ranker = OnnxRanker(exported[0], batch_size=2)
    scores, features = ranker.score(np.random.default_rng(1).normal(size=(3, 32, 32)).astype(np.float32))
    assert scores.shape == (3,)
    assert features.shape == (3, 96)


def test_a_run_of_the_graph_stays_in_the_cache_and_int8_goes_alone(exported):
    from models.cryoranker.serve import RankerInfo, _images_at_once

    def images_at_once(architecture, width, size, *, precision="fp32", is_on_gpu=False):
        info = RankerInfo(
            architecture=architecture, input_size_px=size, mean=0.5, std=0.2, resize_mode="hartley",
            source_sha256="0", precision=precision,
        )  # fmt: skip
        return _images_at_once(info, width, is_on_gpu=is_on_gpu)

    base, small = "vit-w768-d12-h12-p14-224-v1.5", "vit-w128-d4-h4-p8-64-v1"
    assert images_at_once(base, 768, 224) == 1
    assert images_at_once(small, 128, 64) == 15
    assert images_at_once(small, 128, 64, precision="int8") == 1
    assert images_at_once(base, 768, 224, is_on_gpu=True) is None
    assert images_at_once("test", 4, 16) is None
    ranker = OnnxRanker(exported[0])
    images = np.random.default_rng(0).normal(size=(7, 32, 32)).astype(np.float32)
    expected = ranker.score(images)[0]
    ranker.images_at_once = 2
    np.testing.assert_allclose(ranker.score(images)[0], expected, atol=1e-6)


def test_no_images_give_no_scores(exported):
    scores, features = OnnxRanker(exported[0]).score(np.zeros((0, 32, 32), np.float32))
    assert scores.shape == (0,)
    assert features.shape == (0, 96)


def test_image_with_nan_has_no_score_and_spoils_no_other(exported):
    ranker = OnnxRanker(exported[0])
    images = np.random.default_rng(2).normal(size=(3, 32, 32)).astype(np.float32)
    clean, _ = ranker.score(images)
    images[1, 3, 3] = np.nan
    scores, features = ranker.score(images)
    assert np.isnan(scores[1])
    assert (features[1] == 0).all()
    np.testing.assert_allclose(scores[[0, 2]], clean[[0, 2]], rtol=1e-5)


def test_guard_scores_images_with_defects_and_has_a_hash_of_its_own(exported):
    bare, guarded = OnnxRanker(exported[0]), OnnxRanker(exported[0], outlier_sigmas=10.0)
    assert bare.model_hash != guarded.model_hash
    assert guarded.model_hash != OnnxRanker(exported[0], outlier_sigmas=12.0).model_hash
    images = np.random.default_rng(0).normal(size=(4, 40, 40)).astype(np.float32)
    clean = bare.score(images)[0]
    spoiled = images.copy()
    spoiled[1, 5, 5], spoiled[2, 6, 6], spoiled[3] = np.nan, 500.0, np.nan
    scores = guarded.score(spoiled)[0]
    assert np.isnan(bare.score(spoiled)[0][[1, 3]]).all()
    assert np.isfinite(scores[:3]).all()
    assert np.isnan(scores[3])
    assert scores[0] == clean[0]


def test_metadata_says_how_to_prepare_the_input(exported):
    ranker = OnnxRanker(exported[0])
    assert ranker.info.input_size_px == 32
    assert (ranker.info.mean, ranker.info.std) == (0.5, 0.2)
    assert ranker.info.resize_mode == "hartley"
    assert ranker.info.source_sha256 == "ab" * 32
    assert ranker.info.architecture == "vit-w96-d2-h3-p8-32-v1"
    assert ranker.provider == "CPUExecutionProvider"


def test_another_files_bytes_give_another_model_hash(exported, tmp_path):
    other = tmp_path / "other.onnx"
    graph = onnx.load(exported[0])
    graph.doc_string = "the same weights in another file"
    onnx.save(graph, other)
    assert OnnxRanker(other).model_hash != OnnxRanker(exported[0]).model_hash


def test_half_precision_export_stays_within_its_tolerance(tmp_path):
    report = export_onnx(
        random_model(replace(TINY, head=Head.SIGMOID1)),
        tmp_path / "half.onnx",
        layout="x",
        source_sha256="0" * 64,
        precision="fp16",
    )
    assert report.max_abs_score_diff <= 5e-3
    scores, _ = OnnxRanker(tmp_path / "half.onnx").score(np.zeros((1, 32, 32), np.float32))
    assert np.isfinite(scores).all()


def test_int8_export_ranks_like_torch_and_says_so(tmp_path):
    # Random weights quantise worse than trained ones; what is tested is that the figure is measured and kept.
    path = tmp_path / "int8.onnx"
    log_level = logging.getLogger().level
    report = export_onnx(
        random_model(),
        path,
        layout="x",
        source_sha256="0" * 64,
        precision="int8",
        check_particles=torch.from_numpy(preprocess_particles(graded_images(64), 32, 0.5, 0.2)),
        min_int8_spearman=0.9,
    )
    assert logging.getLogger().level == log_level, "the process's own warnings are still to be heard"
    assert 0.9 <= report.score_spearman < 1.0
    assert OnnxRanker(path).info.precision == "int8"
    graph = onnx.load(path)
    large = [w for w in graph.graph.initializer if np.prod(w.dims) >= TINY.width**2]
    assert {onnx.TensorProto.DataType.Name(w.data_type) for w in large} == {"INT8"}
    assert len({w.name for w in large}) == 4 * TINY.depth + 1  # the last block's query lies by itself
    stored = {prop.key: prop.value for prop in graph.metadata_props}
    assert json.loads(stored["parity"])["score_spearman"] == report.score_spearman
    # One scale serves all that an int8 product is shown: images go one by one, so neighbours do not matter.
    images = graded_images(6)
    together = OnnxRanker(path, batch_size=6).score(images)[0]
    alone = np.concatenate([OnnxRanker(path).score(images[i : i + 1])[0] for i in range(6)])
    np.testing.assert_array_equal(together, alone)


def test_int8_export_that_ranks_otherwise_is_refused_and_not_written(tmp_path):
    path = tmp_path / "int8.onnx"
    with pytest.raises(ValueError, match="rank correlation"):
        export_onnx(
            random_model(),
            path,
            layout="x",
            source_sha256="0" * 64,
            precision="int8",
            min_int8_spearman=1.01,
        )
    assert not path.exists()


def graded_images(n):
    """Noise with a stripe that grows from image to image, so that scores spread."""
    images = np.random.default_rng(3).normal(size=(n, 32, 32)) * 0.3
    images += np.linspace(0, 8, n)[:, None, None] * np.hanning(32)[None, :, None]
    return images.astype(np.float32)


def test_export_beyond_tolerance_is_refused_and_leaves_no_file(model, tmp_path, monkeypatch):
    monkeypatch.setattr("models.cryo_ief.export.MAX_SCORE_DIFF", {"fp32": -1.0})
    path = tmp_path / "bad.onnx"
    with pytest.raises(ValueError, match="differ from torch"):
        export_onnx(model, path, layout="x", source_sha256="0" * 64)
    assert list(tmp_path.iterdir()) == []


def test_encoder_exports_its_feature_alone_and_is_refused_as_a_ranker(tmp_path):
    path = tmp_path / "encoder.onnx"
    model = random_model(replace(TINY, head=Head.NONE))
    assert not ExportedVit(model).has_score
    export_onnx(model, path, layout="cryo-ief-bare", source_sha256="0" * 64)
    with pytest.raises(ValueError, match="not a ranker"):
        OnnxRanker(path)


def test_onnx_file_that_is_not_a_ranker_is_refused(tmp_path):
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "g", [x], [y])
    path = tmp_path / "identity.onnx"
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9), path
    )
    with pytest.raises(ValueError, match=r"identity\.onnx: not a ranker"):
        OnnxRanker(path)


def test_file_that_is_no_onnx_is_refused(tmp_path):
    path = tmp_path / "page.onnx"
    path.write_text("<html>404</html>")
    with pytest.raises(ValueError, match="not a readable ONNX file"):
        OnnxRanker(path)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"none\.onnx: cannot be read"):
        OnnxRanker(tmp_path / "none.onnx")


def test_boxes_that_are_not_square_are_refused(exported):
    with pytest.raises(ValueError, match="square"):
        OnnxRanker(exported[0]).score(np.zeros((2, 32, 33), np.float32))
