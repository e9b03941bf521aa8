"""What `icestream score` and `export` make of input that is wrong: a clear error, or quarantine with scored + excluded = given."""

import hashlib
import struct
from pathlib import Path

import mrcfile
import numpy as np
import onnx
import pytest
import torch

from models.cryo_ief.config import vit_config
from models.cryo_ief.vit import CryoVit
from models.cryoranker.serve import DEFAULT_MODEL, OnnxRanker
from models.weights import save_checkpoint
from stream.commands.export import export_checkpoint
from stream.commands.score import score_particles
from stream.config import SessionSettings
from stream.records.errors import ConfigurationError, InputError
from stream.wiring import build_worker_spec

BOX = 32


def write_stack(path: Path, images: np.ndarray) -> Path:
    with mrcfile.new(path, overwrite=True) as stack:
        stack.set_data(images)
        stack.set_image_stack()
        stack.voxel_size = 2.0
    return path


def images_of(n: int, *, box: int = BOX, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, box, box)).astype(np.float32)


def scores_of(particles: Path, **options) -> tuple[dict, np.ndarray]:
    out = particles.with_suffix(".npz")
    document = score_particles(particles, out, **options)
    with np.load(out) as saved:
        return document, saved["score"]


def test_every_particle_given_is_scored_or_excluded(tmp_path):
    images = images_of(23)
    path = write_stack(tmp_path / "a.mrcs", images)
    mapped = np.memmap(path, np.float32, "r+", 1024, images.shape)
    mapped[2, 5, 5], mapped[9, 0, 0], mapped[10, 1, 1] = np.nan, np.inf, -np.inf
    mapped[4], mapped[20] = 0.0, 3.5
    mapped.flush()
    document, scores = scores_of(path, batch_size=5)
    assert np.flatnonzero(np.isnan(scores)).tolist() == [2, 4, 9, 10, 20]
    assert (document["scored"], document["excluded"]) == (18, 5)
    assert document["scored"] + document["excluded"] == document["particles"] == 23
    np.testing.assert_allclose(scores[0], OnnxRanker().score(images[:1])[0][0], atol=1e-5)


def test_a_stack_of_nothing_usable_is_written_without_scores(tmp_path):
    document, scores = scores_of(write_stack(tmp_path / "a.mrcs", np.ones((3, BOX, BOX), np.float32)))
    assert (document["scored"], document["excluded"]) == (0, 3)
    assert np.isnan(scores).all()


@pytest.mark.parametrize("dtype", ["<i1", "<i2", ">i2", "<u2", ">u2", "<f2", ">f2", ">f4"])
def test_every_mode_and_byte_order_gives_the_scores_of_the_same_numbers(tmp_path, dtype):
    whole = np.round(20 * images_of(4)).clip(-100, 100)
    if dtype[1] == "u":
        whole += 100
    modes = {"i1": 0, "i2": 1, "u2": 6, "f2": 12, "f4": 2}
    order = dtype[0]
    header = bytearray(write_stack(tmp_path / "a.mrcs", whole.astype(np.float32)).read_bytes()[:1024])
    words = np.frombuffer(bytes(header), "<i4").copy()
    words[3] = modes[dtype[1:]]
    head = bytearray(words.astype(order + "i4").tobytes())
    head[104:112] = bytes(8)
    head[208:212] = b"MAP "
    head[212:216] = b"\x44\x44\x00\x00" if order == "<" else b"\x11\x11\x00\x00"
    (tmp_path / "b.mrcs").write_bytes(bytes(head) + whole.astype(dtype).tobytes())
    expected = scores_of(tmp_path / "a.mrcs")[1]
    document, scores = scores_of(tmp_path / "b.mrcs")
    assert document["scored"] == 4
    np.testing.assert_array_equal(scores, expected)


def with_mode(path: Path, mode: int) -> Path:
    content = bytearray(path.read_bytes())
    content[12:16] = struct.pack("<i", mode)
    path.write_bytes(bytes(content))
    return path


def spoil_mode(path: Path) -> Path:
    return with_mode(write_stack(path, images_of(3)), 4)


def spoil_shape(path: Path) -> Path:
    return write_stack(path, np.zeros((3, BOX, BOX + 2), np.float32))


def spoil_end(path: Path) -> Path:
    path.write_bytes(write_stack(path, images_of(3)).read_bytes()[:-100])
    return path


def spoil_head(path: Path) -> Path:
    path.write_bytes(b"\x00" * 300)
    return path


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (spoil_mode, "mode 4"),
        (spoil_shape, "boxes are square"),
        (spoil_end, "truncated"),
        (spoil_head, "1024 bytes"),
        (lambda path: path, "a.mrcs"),
    ],
    ids=["complex-numbers", "not-square", "truncated", "no-header", "missing"],
)
def test_a_stack_that_cannot_be_read_is_named_and_nothing_is_written(tmp_path, spoil, words):
    path = spoil(tmp_path / "a.mrcs")
    with pytest.raises(InputError, match=words) as caught:
        score_particles(path, tmp_path / "s.csv")
    assert "a.mrcs" in str(caught.value)
    assert not (tmp_path / "s.csv").exists()
    assert not list(tmp_path.glob(".tmp-*"))


def test_a_table_whose_stack_is_missing_names_both(tmp_path):
    text = "data_\n\nloop_\n_rlnImageName #1\n000001@nowhere.mrcs\n"
    (tmp_path / "p.star").write_text(text)
    with pytest.raises(InputError, match=r"p\.star.*nowhere\.mrcs"):
        score_particles(tmp_path / "p.star", tmp_path / "s.csv")


def test_an_onnx_file_of_another_trade_is_refused(tmp_path):
    path = write_stack(tmp_path / "a.mrcs", images_of(2))
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "g", [x], [y])
    built = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(built, tmp_path / "identity.onnx")
    with pytest.raises(ConfigurationError, match=r"identity\.onnx.*not a ranker"):
        score_particles(path, tmp_path / "s.csv", model=tmp_path / "identity.onnx")


def test_a_changed_model_is_refused_where_its_hash_was_named(tmp_path):
    path = write_stack(tmp_path / "a.mrcs", images_of(2))
    model = tmp_path / "ranker.onnx"
    model.write_bytes(DEFAULT_MODEL.read_bytes())
    sha256 = hashlib.sha256(model.read_bytes()).hexdigest()
    document = score_particles(path, tmp_path / "s.csv", model=model, expected_sha256=sha256.upper())
    assert document["model"] == sha256
    session = {
        "out": tmp_path / "out",
        "movies": tmp_path,
        "microscope": {"voltage_kv": 300, "cs_mm": 2.7},
        "acquisition": {"pixel_size_angstrom": 1.0, "dose_e_per_angstrom2": 40},
        "ranker": {"model": model, "model_sha256": sha256},
    }
    assert build_worker_spec(SessionSettings.model_validate(session)).ranker.model == model
    graph = onnx.load(model)
    graph.doc_string = "changed"
    onnx.save(graph, model)
    with pytest.raises(ConfigurationError, match=rf"ranker\.onnx.*expected {sha256}"):
        score_particles(path, tmp_path / "s.csv", model=model, expected_sha256=sha256)
    with pytest.raises(ConfigurationError, match=f"model_sha256 {sha256}"):
        build_worker_spec(SessionSettings.model_validate(session))


def test_a_changed_model_finds_none_of_the_old_ones_scores_in_the_cache(tmp_path):
    path = write_stack(tmp_path / "a.mrcs", images_of(4))
    model = tmp_path / "ranker.onnx"
    model.write_bytes(DEFAULT_MODEL.read_bytes())
    options = {"model": model, "cache": tmp_path / "features"}
    assert scores_of(path, **options)[0]["cache_hits"] == 0
    assert scores_of(path, **options)[0]["cache_hits"] == 4
    graph = onnx.load(model)
    graph.doc_string = "changed"
    onnx.save(graph, model)
    assert scores_of(path, **options)[0]["cache_hits"] == 0


def test_a_checkpoint_of_another_architecture_is_refused_with_its_keys(tmp_path):
    torch.manual_seed(0)
    other = {f"layer{i}.conv.weight": torch.zeros(4, 4, 3, 3) for i in range(3)}
    save_checkpoint(tmp_path / "resnet.safetensors", other, {})
    with pytest.raises(InputError, match=r"resnet\.safetensors.*layer0\.conv\.weight"):
        export_checkpoint(tmp_path / "resnet.safetensors", tmp_path / "x.onnx")
    small = vit_config("nano", input_size_px=16, patch_size_px=8, width=24, n_heads=3, depth=1)
    wide = vit_config("nano", input_size_px=16, patch_size_px=8, width=48, n_heads=3, depth=1)
    save_checkpoint(tmp_path / "m.safetensors", CryoVit(small).state_dict(), {"model": wide.to_dict()})
    with pytest.raises(InputError, match=r"m\.safetensors"):
        export_checkpoint(tmp_path / "m.safetensors", tmp_path / "x.onnx")
    assert not (tmp_path / "x.onnx").exists()
