"""`icestream classify` from files to files."""

from __future__ import annotations

import json
from pathlib import Path

import mrcfile
import numpy as np
import pandas as pd
import pytest
import starfile
import torch
from PIL import Image
from typer.testing import CliRunner

from models.reconstruction.blobs import BlobPhantom, images_of, simulate_blob_images
from models.reconstruction.volume_io import write_volume
from stream.cli import app
from stream.records.errors import ConfigurationError, InputError

BOX, N = 24, 80


@pytest.fixture(scope="module")
def star(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("classes")
    generator = torch.Generator().manual_seed(1)
    phantom = BlobPhantom.random(BOX, generator, n_blobs=7, sigma_fraction=0.06)
    images = simulate_blob_images(phantom, N, generator, snr=1.0, pixel_size_angstrom=6.0)
    with mrcfile.new(root / "stack.mrcs") as handle:
        handle.set_data(images_of(images.data).numpy().astype(np.float32))
    write_volume(root / "map.mrc", phantom.volume(), 6.0)
    table = pd.DataFrame(
        {
            "rlnImageName": [f"{i + 1:06d}@stack.mrcs" for i in range(N)],
            "rlnMicrographName": [f"mic{i // 20}.mrc" for i in range(N)],
            "rlnDefocusU": images.ctf.defocus_u_angstrom.numpy(),
            "rlnDefocusV": images.ctf.defocus_v_angstrom.numpy(),
            "rlnDefocusAngle": images.ctf.astigmatism_angle_deg.numpy(),
            "rlnOpticsGroup": 1,
            "icestreamScore": np.linspace(0, 1, N),
        }
    )
    optics = pd.DataFrame(
        {
            "rlnOpticsGroup": [1], "rlnOpticsGroupName": ["o1"], "rlnVoltage": [300.0],
            "rlnSphericalAberration": [2.7], "rlnAmplitudeContrast": [0.1], "rlnImagePixelSize": [6.0],
            "rlnImageSize": [BOX], "rlnImageDimensionality": [2],
        }
    )  # fmt: skip
    starfile.write({"optics": optics, "particles": table}, root / "particles.star")
    return root / "particles.star"


def test_classes_are_written_counted_and_scored(star: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(
        app, ["classify", str(star), "--out", str(tmp_path), "--classes", "4", "--resolution-angstrom", "20",
              "--map", str(star.with_name("map.mrc")), "--json"],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert sum(row["particles"] for row in document["classes"]) == N
    with mrcfile.open(tmp_path / "classes.mrcs") as handle:
        assert handle.data.shape == (4, BOX, BOX)
        assert handle.voxel_size.x == pytest.approx(6.0)
    particles = starfile.read(tmp_path / "particles.star", always_dict=True)["particles"]
    numbers = particles["rlnClassNumber"].to_numpy()
    scores = np.linspace(0, 1, N)
    for row in document["classes"]:
        own = numbers == row["class"]
        assert int(own.sum()) == row["particles"]
        if row["particles"]:
            assert row["mean_score"] == pytest.approx(scores[own].mean(), abs=1e-6)
    model = starfile.read(tmp_path / "classes.star", always_dict=True)["model_classes"]
    assert model["rlnClassDistribution"].sum() == pytest.approx(1.0, abs=1e-4)
    with Image.open(tmp_path / "montage.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 10


def test_feature_clusters_start_the_classes_and_bring_their_scores(star: Path, tmp_path: Path) -> None:
    stack = star.with_name("stack.mrcs")
    features = np.eye(4, dtype=np.float32)[np.arange(N) % 4]
    features[5] = np.nan  # a particle that could not be scored
    scores = np.linspace(1, 0, N)
    names = [f"{i + 1:06d}@{stack}" for i in range(N)]
    order = np.random.default_rng(0).permutation(N)
    np.savez(tmp_path / "f.npz", image=np.array(names)[order], feature=features[order], score=scores[order])
    arguments = [
        "classify",
        str(star),
        "--out",
        str(tmp_path),
        "--classes",
        "4",
        "--resolution-angstrom",
        "20",
    ]
    result = CliRunner().invoke(app, [*arguments, "--features", str(tmp_path / "f.npz"), "--json"])
    assert result.exit_code == 0, result.output
    particles = starfile.read(tmp_path / "particles.star", always_dict=True)["particles"]
    for row in json.loads(result.stdout)["classes"]:
        if row["particles"]:
            own = particles["rlnClassNumber"].to_numpy() == row["class"]
            assert row["mean_score"] == pytest.approx(scores[own].mean(), abs=1e-6)
    np.savez(tmp_path / "few.npz", image=np.array(names)[:9], feature=features[:9], score=scores[:9])
    error = CliRunner().invoke(app, [*arguments, "--features", str(tmp_path / "few.npz")]).exception
    assert isinstance(error, InputError)
    assert "71 of 80 missing" in str(error)


def test_too_many_classes_a_bad_map_and_a_bad_resolution_are_named(star: Path, tmp_path: Path) -> None:
    def invoke(*arguments: str) -> Exception | None:
        found = CliRunner().invoke(app, ["classify", str(star), "--out", str(tmp_path), *arguments])
        return found.exception

    error = invoke("--classes", "60")
    assert isinstance(error, ConfigurationError)
    assert "60" in str(error)
    error = invoke("--classes", "4", "--map", str(star))
    assert isinstance(error, InputError)
    assert isinstance(invoke("--resolution-angstrom", "-1"), ConfigurationError)
