"""`icestream score` scores every image of every kind of input by its address and writes what the suffix says."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import mrcfile
import numpy as np
import pytest
from typer.testing import CliRunner

from models.cryoranker.serve import DEFAULT_MODEL
from stream.commands.bench_score import run_score_benchmark
from stream.commands.score import score_particles
from stream.records.errors import ConfigurationError
from stream.sinks.relion_star import read_particles_star

onnx = pytest.importorskip("onnx", reason="building the test's model needs onnx")

INPUT_SIZE = 16
OPTICS = """data_optics

loop_
_rlnOpticsGroup #1
_rlnOpticsGroupName #2
_rlnVoltage #3
_rlnSphericalAberration #4
_rlnAmplitudeContrast #5
_rlnImagePixelSize #6
_rlnImageSize #7
_rlnImageDimensionality #8
1 group1 300 2.7 0.1 1.5 16 2

data_particles

loop_
_rlnImageName #1
_rlnOpticsGroup #2
_icestreamNote #3
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A ranker whose score is the image's mean grey level and whose feature is a 2 × 2 reduction of it."""
    from onnx import TensorProto, helper

    nodes = [
        helper.make_node("GlobalAveragePool", ["particles"], ["mean"]),
        helper.make_node("Flatten", ["mean"], ["flat"]),
        helper.make_node("Squeeze", ["flat", "axis"], ["score"]),
        helper.make_node("AveragePool", ["particles"], ["pooled"], kernel_shape=[8, 8], strides=[8, 8]),
        helper.make_node("Flatten", ["pooled"], ["long"]),
        helper.make_node("LpNormalization", ["long"], ["feature"], axis=1, p=2),
    ]
    graph = helper.make_graph(
        nodes,
        "mean",
        [helper.make_tensor_value_info("particles", TensorProto.FLOAT, ["b", 1, INPUT_SIZE, INPUT_SIZE])],
        [
            helper.make_tensor_value_info("score", TensorProto.FLOAT, ["b"]),
            helper.make_tensor_value_info("feature", TensorProto.FLOAT, ["b", 4]),
        ],
        [helper.make_tensor("axis", TensorProto.INT64, [1], [1])],
    )
    built = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    metadata = {
        "icestream_architecture": "test",
        "input_size": str(INPUT_SIZE),
        "mean": "0",
        "std": "1",
        "resize_mode": "hartley",
        "source_sha256": "0" * 64,
    }
    helper.set_model_props(built, metadata)
    path = tmp_path / "model.onnx"
    onnx.save(built, path)
    return path


def make_images(seed: int, n_images: int) -> np.ndarray:
    """Images of one black and one white pixel whose other pixels, and so whose mean, differ widely."""
    rng = np.random.default_rng(seed)
    images = np.repeat(rng.uniform(0, 1, (n_images, 1)), INPUT_SIZE**2, axis=1)
    images = images.reshape(n_images, INPUT_SIZE, INPUT_SIZE).astype(np.float32)
    images[:, 0, 0], images[:, 0, 1] = 0, 1
    return images


def true_scores(images: np.ndarray) -> np.ndarray:
    return (np.floor(images * 255) / 255).mean(axis=(1, 2))


def write_stack(path: Path, images: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with mrcfile.new(path) as stack:
        stack.set_data(images)
        stack.set_image_stack()
        stack.voxel_size = 1.5


def test_a_subset_of_stacks_with_equal_names_gets_each_image_its_own_score(tmp_path: Path, model: Path):
    stacks = {"job1/a.mrcs": make_images(1, 9), "job2/a.mrcs": make_images(2, 9)}
    for name, images in stacks.items():
        write_stack(tmp_path / name, images)
    rows = [
        ("job2/a.mrcs", 7),
        ("job1/a.mrcs", 7),
        ("job1/a.mrcs", 0),
        ("job2/a.mrcs", 3),
        ("job1/a.mrcs", 5),
    ]
    text = OPTICS + "".join(f"{i + 1:06d}@{name} 1 row{n}\n" for n, (name, i) in enumerate(rows))
    (tmp_path / "particles.star").write_text(text)
    document = score_particles(tmp_path / "particles.star", tmp_path / "out" / "scored.star", model=model)
    assert {"particles", "scored", "model", "particles_per_s"} <= set(document)
    assert (document["particles"], document["scored"]) == (5, 5)
    particles = read_particles_star(tmp_path / "out" / "scored.star").particles
    expected = [true_scores(stacks[name])[i] for name, i in rows]
    np.testing.assert_allclose(particles["icestreamScore"], expected, atol=2e-3)
    assert particles["icestreamNote"].tolist() == [f"row{n}" for n in range(5)]
    assert particles["icestreamUid"].is_unique
    assert not list((tmp_path / "out").glob(".tmp-*"))


def test_a_bare_stack_gives_csv_and_npz_with_the_same_uids(tmp_path: Path, model: Path):
    images = make_images(3, 6)
    images[4] = 0.5
    write_stack(tmp_path / "a.mrcs", images)
    document = score_particles(tmp_path / "a.mrcs", tmp_path / "s.csv", model=model)
    score_particles(tmp_path / "a.mrcs", tmp_path / "s.npz", model=model)
    assert (document["scored"], document["excluded"]) == (5, 1)
    with (tmp_path / "s.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    with np.load(tmp_path / "s.npz") as saved:
        assert [int(row["uid"]) for row in rows] == saved["uid"].tolist()
        assert saved["feature"].dtype == np.float16
        assert saved["feature"].shape == (6, 4)
        np.testing.assert_allclose(np.linalg.norm(saved["feature"][:4].astype(float), axis=1), 1, atol=1e-2)
        usable = [0, 1, 2, 3, 5]
        np.testing.assert_allclose(saved["score"][usable], true_scores(images)[usable], atol=2e-3)
        assert np.isnan(saved["score"][4])
    assert rows[4]["score"] == "nan"
    assert rows[0]["image"] == f"000001@{tmp_path / 'a.mrcs'}"


def test_a_cs_file_of_dark_particles_is_inverted_and_keeps_its_uids(tmp_path: Path, model: Path):
    images = make_images(4, 5)
    write_stack(tmp_path / "white.mrcs", images)
    write_stack(tmp_path / "dark.mrcs", -images)
    scores = {}
    for name, sign in (("white", 1), ("dark", -1)):
        fields = [
            ("uid", "u8"),
            ("blob/path", "S20"),
            ("blob/idx", "u4"),
            ("blob/psize_A", "f4"),
            ("blob/sign", "f4"),
        ]
        rows = np.zeros(5, fields)
        rows["uid"] = np.arange(5, dtype=np.uint64) + np.uint64(2**63)
        rows["blob/path"] = f"{name}.mrcs".encode()
        rows["blob/idx"] = np.arange(5)[::-1]
        rows["blob/psize_A"] = 1.5
        rows["blob/sign"] = sign
        with (tmp_path / f"{name}.cs").open("wb") as stream:
            np.save(stream, rows)
        score_particles(tmp_path / f"{name}.cs", tmp_path / f"{name}.star", model=model)
        particles = read_particles_star(tmp_path / f"{name}.star").particles
        assert particles["icestreamUid"].tolist() == rows["uid"].tolist()
        scores[name] = particles["icestreamScore"].to_numpy()
    np.testing.assert_allclose(scores["white"], true_scores(images)[::-1], atol=2e-3)
    np.testing.assert_allclose(scores["dark"], scores["white"], atol=5e-3)


def test_a_kept_cache_scores_nothing_again(tmp_path: Path, model: Path):
    write_stack(tmp_path / "a.mrcs", make_images(5, 6))
    arguments = {"model": model, "cache": tmp_path / "features"}
    first = score_particles(tmp_path / "a.mrcs", tmp_path / "1.csv", **arguments)
    second = score_particles(tmp_path / "a.mrcs", tmp_path / "2.csv", **arguments)
    assert (first["cache_hits"], second["cache_hits"], second["scored"]) == (0, 6, 6)
    assert (tmp_path / "1.csv").read_text() == (tmp_path / "2.csv").read_text()


def test_the_command_prints_one_json_document(tmp_path: Path, model: Path):
    import typer

    from stream.commands.score import register

    app = typer.Typer()
    register(app)
    app.callback()(lambda: None)
    write_stack(tmp_path / "a.mrcs", make_images(6, 3))
    out = tmp_path / "s.csv"
    result = CliRunner().invoke(
        app, ["score", str(tmp_path / "a.mrcs"), "--out", str(out), "--model", str(model), "--json"]
    )
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["scored"] == 3
    assert "Example: icestream score" in CliRunner().invoke(app, ["score", "--help"]).stdout


def test_a_file_that_is_no_ranker_and_a_wrong_suffix_are_configuration_errors(tmp_path: Path, model: Path):
    write_stack(tmp_path / "a.mrcs", make_images(6, 3))
    (tmp_path / "bad.onnx").write_bytes(b"not a model")
    with pytest.raises(ConfigurationError, match=r"bad\.onnx"):
        score_particles(tmp_path / "a.mrcs", tmp_path / "s.csv", model=tmp_path / "bad.onnx")
    from stream.commands.score import score

    with pytest.raises(ConfigurationError, match="--out"):
        score(tmp_path / "a.mrcs", tmp_path / "s.pdf")


def test_the_guard_scores_images_with_wild_pixels_and_is_off_by_default(tmp_path: Path, model: Path):
    images = make_images(7, 5)
    spoiled = images.copy()
    spoiled[1, 5, 5], spoiled[2, 6, 6], spoiled[3] = np.nan, 1e6, np.nan
    with mrcfile.new(tmp_path / "spoiled.mrcs") as stack:
        stack.set_data(images)
        stack.set_image_stack()
    np.memmap(tmp_path / "spoiled.mrcs", np.float32, "r+", 1024, images.shape)[:] = spoiled
    bare = score_particles(tmp_path / "spoiled.mrcs", tmp_path / "bare.npz", model=model)
    guarded = score_particles(
        tmp_path / "spoiled.mrcs", tmp_path / "guarded.npz", model=model, outlier_sigmas=1000.0
    )
    assert (bare["scored"], bare["excluded"], bare["outlier_sigmas"]) == (3, 2, None)
    assert (guarded["scored"], guarded["excluded"], guarded["outlier_sigmas"]) == (4, 1, 1000.0)
    assert bare["model"] != guarded["model"]
    with np.load(tmp_path / "bare.npz") as off, np.load(tmp_path / "guarded.npz") as on:
        np.testing.assert_allclose(on["score"][[0, 4]], off["score"][[0, 4]], atol=1e-6)
        assert np.isnan(off["score"]).tolist() == [False, True, False, True, False]
        assert np.isnan(on["score"]).tolist() == [False, False, False, True, False]
        assert off["score"][2] < 0.01  # one pixel of a million leaves the others no grey levels


def test_the_provider_in_use_is_in_the_document_and_beside_the_scores(tmp_path: Path, model: Path, caplog):
    write_stack(tmp_path / "a.mrcs", make_images(6, 3))
    document = score_particles(tmp_path / "a.mrcs", tmp_path / "s.npz", model=model, provider="cuda")
    expected = "CUDAExecutionProvider" if document["provider"].startswith("CUDA") else "CPUExecutionProvider"
    assert document["provider"] == expected
    with np.load(tmp_path / "s.npz") as saved:
        assert str(saved["provider"]) == expected
    n_warnings = sum(r.message == "ranker_provider_not_used" for r in caplog.records)
    assert n_warnings == (expected == "CPUExecutionProvider")


@pytest.mark.parametrize(
    ("option", "value"), [("provider", "tpu"), ("outlier_sigmas", 0.0), ("outlier_sigmas", -3.0)]
)
def test_settings_of_the_scorer_that_make_no_sense_are_named(tmp_path: Path, model: Path, option, value):
    with pytest.raises(ConfigurationError, match=option.replace("_", "-")):
        score_particles(tmp_path / "a.mrcs", tmp_path / "s.npz", model=model, **{option: value})


def test_the_benchmark_compares_the_whole_path_with_inference_alone(tmp_path: Path, model: Path):
    record = run_score_benchmark(tmp_path, n_particles=64, box_size_px=24, model=model, n_per_exposure=20)
    assert record["n_particles"] == 64
    assert record["value"] > 0
    assert record["ratio"] == pytest.approx(record["value"] / record["baseline_value"])


@pytest.mark.skipif(not DEFAULT_MODEL.exists(), reason="the default model is not there")
def test_the_default_model_scores_a_stack(tmp_path: Path):
    rng = np.random.default_rng(0)
    write_stack(tmp_path / "a.mrcs", rng.normal(size=(5, 64, 64)).astype(np.float32))
    document = score_particles(tmp_path / "a.mrcs", tmp_path / "s.npz")
    assert document["scored"] == 5
    with np.load(tmp_path / "s.npz") as saved:
        assert ((saved["score"] >= 0) & (saved["score"] <= 1)).all()
        np.testing.assert_allclose(np.linalg.norm(saved["feature"].astype(float), axis=1), 1, atol=1e-2)
