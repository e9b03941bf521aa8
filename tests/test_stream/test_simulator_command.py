"""`icestream simulate` from settings to files."""

from __future__ import annotations

import json
import threading

import mrcfile
import numpy as np
import pytest
import starfile
import typer
from typer.testing import CliRunner

from stream.commands.simulate import SimulationSettings, register, write_simulated_session
from stream.records.errors import ConfigurationError

SMALL = {
    "structure": "phantom:3:mass_kda=25",
    "frames": 3,
    "size_yx_px": (96, 128),
    "pixel_size_angstrom": 4.0,
    "particles_per_movie": 4.0,
}


def test_same_seed_writes_the_same_files(tmp_path):
    contents = []
    for name in ("a", "b"):
        write_simulated_session(SimulationSettings(movies=2, seed=3, **SMALL), tmp_path / name)
        root = tmp_path / name
        contents.append(
            {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}
        )
    assert set(contents[0]) >= {
        "gain.mrc",
        "movies/FoilHole_000000_Data_000.tiff",
        "movies/FoilHole_000000_Data_001.xml",
        "truth/particles.star",
        "truth/junk.star",
        "truth/map.mrc",
        "truth/motion/FoilHole_000000_Data_001.star",
    }
    assert contents[0] == contents[1]


def test_command_prints_one_json_document(tmp_path):
    app = typer.Typer()
    register(app)
    arguments = [
        "--out", str(tmp_path / "s"), "--movies", "1", "--structure", "phantom:3:mass_kda=25", "--frames", "2",
        "--size-px", "96,128", "--pixel-size-angstrom", "4", "--particles-per-movie", "4", "--format", "eer",
        "--dose-e-per-angstrom2", "10", "--json",
    ]  # fmt: skip
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert set(document) == {"movies", "truth_star", "gain"}
    assert document["movies"][0].endswith(".eer")
    truth = starfile.read(document["truth_star"])
    assert "particles" in truth
    assert mrcfile.read(document["gain"]).shape == (96, 128)


def test_truth_map_is_the_particle_at_the_microscopes_pixel_size(tmp_path):
    write_simulated_session(SimulationSettings(movies=0, **SMALL), tmp_path)
    with mrcfile.open(tmp_path / "truth" / "map.mrc") as handle:
        volume = np.asarray(handle.data)
        assert float(handle.voxel_size.x) == pytest.approx(4.0)
    assert volume.ndim == 3
    assert volume.max() > 1.0


def test_stopping_ends_before_the_next_movie(tmp_path):
    stop = threading.Event()
    files = write_simulated_session(
        SimulationSettings(movies=50, **SMALL), tmp_path, stop=stop, progress=lambda *_: stop.set()
    )
    assert len(files.movies) == 1


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"structure": "phantom:x"}, "phantom"),
        ({"structure": "missing.cif"}, r"missing\.cif"),
        ({"movie_format": "jpeg"}, "tiff, eer or mrc"),
        ({"defocus_um": (3.0, 1.0)}, "defocus_um"),
        ({"movies": -1}, "movies"),
        ({"junk_fraction": 2.0}, "junk_fraction"),
    ],
)
def test_wrong_settings_are_configuration_errors(tmp_path, values, word):
    with pytest.raises(ConfigurationError, match=word):
        write_simulated_session(SimulationSettings(**({"movies": 1} | SMALL | values)), tmp_path)
