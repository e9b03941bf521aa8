"""`icestream orientation`: keys, files, and one clear line for each kind of bad input."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

import mrcfile
import numpy as np
import pandas as pd
import pytest
import starfile
import typer
from typer.testing import CliRunner

from stream.commands import orientation
from stream.records.errors import ConfigurationError, InputError

DATA = Path(os.environ.get("ICESTREAM_TEST_DATA", Path(__file__).parents[2] / "../shared/data"))
SIZE = 32


def write_map(path: Path, data: np.ndarray, pixel: float = 3.0) -> Path:
    with mrcfile.new(path, overwrite=True) as mrc, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # mrcfile warns of the NaN that a test asks for
        mrc.set_data(data.astype(np.float32))
        mrc.voxel_size = pixel
    return path


def ball(radius: float) -> np.ndarray:
    z, y, x = np.indices((SIZE,) * 3) - SIZE // 2
    return (np.sqrt(z**2 + y**2 + x**2) < radius).astype(np.float32)


@pytest.fixture
def halves(tmp_path) -> tuple[Path, Path]:
    rng = np.random.default_rng(1)
    molecule = 4.0 * ball(7) * (1 + rng.standard_normal((SIZE,) * 3))
    return tuple(
        write_map(tmp_path / f"half{h}.mrc", molecule + 0.3 * rng.standard_normal((SIZE,) * 3))
        for h in (1, 2)
    )


@pytest.fixture
def poses(tmp_path) -> Path:
    rng = np.random.default_rng(2)
    n = 500
    table = pd.DataFrame(
        {
            "rlnAngleRot": rng.uniform(-180, 180, n),
            "rlnAngleTilt": np.degrees(np.arccos(rng.uniform(-1, 1, n))),
            "rlnAnglePsi": rng.uniform(-180, 180, n),
        }
    )
    path = tmp_path / "poses.star"
    starfile.write({"particles": table}, path)
    return path


def invoke(*arguments: str | Path):
    app = typer.Typer()

    @app.callback()
    def main() -> None:
        """Make `orientation` a subcommand, as it is in icestream."""

    orientation.register(app)
    return CliRunner().invoke(app, ["orientation", *map(str, arguments)])


def test_json_has_the_contracts_keys_and_poses_give_scf_star(halves, poses):
    result = invoke(*halves, "--poses", poses, "--n-null", "2", "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert {"resolution_angstrom", "cfar", "cfsc_min", "cfsc_max", "scf_star"} <= set(document)
    assert 6.0 <= document["resolution_angstrom"] < 12.0
    assert 0.0 < document["cfar"] <= 1.0
    assert document["cfar_ratio"] == pytest.approx(document["cfar"] / document["cfar_null"])
    assert len(document["cfsc_min"]) == SIZE // 2 + 1
    assert document["cfsc_min"][1] is None
    assert document["scf_star"] > 0.85
    assert document["views"]["recommended_tilt_deg"] is None
    assert [t["tilt_deg"] for t in document["views"]["tilts"]] == [0.0, 20.0, 30.0, 40.0]


def test_files_are_written_and_the_table_has_relions_columns(halves, tmp_path):
    out = tmp_path / "out"
    result = invoke(
        *halves, "--mask", write_map(tmp_path / "mask.mrc", ball(10)), "--n-null", "0", "--out", out
    )
    assert result.exit_code == 0, result.output
    assert "cFAR" in result.stdout
    assert {p.name for p in out.iterdir()} == {
        "fsc.star", "orientation.json", "mask.mrc", "map.png", "fsc.png", "orientation.png",
        "orientation.html",
    }  # fmt: skip
    table = starfile.read(out / "fsc.star")
    assert len(table) == SIZE // 2 + 1
    assert table["rlnAngstromResolution"][2] == pytest.approx(48.0, rel=1e-3)
    assert table["rlnFourierShellCorrelationCorrected"][3] > 0.9
    document = json.loads((out / "orientation.json").read_text())
    assert document["scf_star"] is None
    assert document["views"] is None
    with mrcfile.open(out / "mask.mrc") as mrc:
        assert float(mrc.voxel_size.x) == pytest.approx(3.0)
        np.testing.assert_array_equal(mrc.data, ball(10))


def test_the_same_seed_gives_the_same_numbers(halves):
    first = orientation.measure_orientation(*halves, n_null=2, seed=5)
    assert first == orientation.measure_orientation(*halves, n_null=2, seed=5)


def test_pure_noise_has_no_resolution(tmp_path):
    rng = np.random.default_rng(3)
    paths = [write_map(tmp_path / f"noise{h}.mrc", rng.standard_normal((SIZE,) * 3)) for h in (1, 2)]
    document = orientation.measure_orientation(*paths, n_null=0)
    assert document["resolution_angstrom"] is None
    assert document["cfar"] < 0.05
    result = invoke(*paths, "--n-null", "0")
    assert "do not correlate" in result.stdout


@pytest.mark.parametrize(
    ("make_other", "words"),
    [
        (lambda p: write_map(p, np.random.default_rng(1).random((24, 24, 24))), "32 × 32 × 32.*24 × 24 × 24"),
        (lambda p: write_map(p, np.random.default_rng(1).random((SIZE, SIZE, 20))), "cube.*32 × 32 × 20"),
        (lambda p: write_map(p, np.random.default_rng(1).random((SIZE,) * 3), 2.5), "pixel size.*3 Å.*2.5 Å"),
        (lambda p: write_map(p, np.full((SIZE,) * 3, np.nan)), "finite"),
        (lambda p: write_map(p, np.ones((SIZE,) * 3)), "constant"),
        (lambda p: write_map(p, np.random.default_rng(1).random((SIZE, SIZE))), "cube"),
        (lambda p: p, "no such file"),
    ],
)
def test_a_second_half_map_that_does_not_fit_is_named_with_the_rule(halves, tmp_path, make_other, words):
    other = make_other(tmp_path / "other.mrc")
    with pytest.raises(InputError, match=f"other.mrc: .*{words}"):
        orientation.measure_orientation(halves[0], other)


def test_a_file_that_is_no_mrc_is_named(halves, tmp_path):
    other = tmp_path / "text.mrc"
    other.write_text("not a map" * 300)
    with pytest.raises(InputError, match=r"text\.mrc: is a readable MRC volume"):
        orientation.measure_orientation(halves[0], other)


def test_a_mask_of_another_shape_or_range_is_named(halves, tmp_path):
    other = write_map(tmp_path / "mask.mrc", np.random.default_rng(1).random((24, 24, 24)))
    with pytest.raises(InputError, match=r"mask\.mrc: has the shape"):
        orientation.measure_orientation(*halves, mask=other)
    bright = write_map(tmp_path / "bright.mrc", 7 * ball(9))
    with pytest.raises(InputError, match=r"bright\.mrc: has values from 0 to 1 \(found: 0 to 7\)"):
        orientation.measure_orientation(*halves, mask=bright)


def test_an_option_that_contradicts_the_headers_is_an_error_that_names_both(halves):
    with pytest.raises(InputError, match=r"--pixel-size-angstrom, 1\.5 Å \(found: 3 Å\)"):
        orientation.measure_orientation(*halves, pixel_size_angstrom=1.5)


def test_headers_without_a_pixel_size_ask_for_the_option_and_then_work(tmp_path):
    rng = np.random.default_rng(1)
    molecule = 4.0 * ball(7) * (1 + rng.standard_normal((SIZE,) * 3))
    paths = [
        write_map(tmp_path / f"h{h}.mrc", molecule + rng.standard_normal((SIZE,) * 3), 0.0) for h in (1, 2)
    ]
    with pytest.raises(ConfigurationError, match="--pixel-size-angstrom"):
        orientation.measure_orientation(*paths)
    assert (
        orientation.measure_orientation(*paths, pixel_size_angstrom=2.0, n_null=0)["pixel_size_angstrom"]
        == 2.0
    )


def test_poses_without_angles_and_unknown_symmetry_are_named(halves, tmp_path):
    path = tmp_path / "noangles.star"
    starfile.write({"particles": pd.DataFrame({"rlnAngleRot": [1.0, 2.0]})}, path)
    with pytest.raises(InputError, match=r"noangles\.star: has a table with rlnAngleRot"):
        orientation.measure_orientation(*halves, poses=path)
    with pytest.raises(ConfigurationError, match="--symmetry"):
        orientation.measure_orientation(*halves, symmetry="Q7")


def test_symmetry_reaches_the_diagnostics(halves, poses):
    document = orientation.measure_orientation(*halves, poses=poses, symmetry="d2", n_null=0)
    assert document["symmetry"] == "D2"
    assert document["n_symmetry"] == 4
    assert document["n_views"] == 2000


def test_help_ends_with_an_example():
    result = invoke("--help")
    assert "Example: icestream orientation" in " ".join(result.stdout.split())


@pytest.mark.realdata
def test_public_half_maps_give_their_published_resolution_before_masking():
    paths = [DATA / f"maps/3D_density_map_h{h}.mrc.gz" for h in (1, 2)]
    if not all(path.exists() for path in paths):
        pytest.skip(f"needs {paths[0]}")
    document = orientation.measure_orientation(*paths, n_null=0)
    assert document["unmasked_resolution_angstrom"] == pytest.approx(9.8, abs=0.15)
