"""Topaz as a program: a small stand-in checks its arguments and writes the real output format."""

import stat
from pathlib import Path

import mrcfile
import numpy as np
import pytest

from actors.topaz import TopazSettings, run_topaz
from stream.records.errors import ConfigurationError, ResourceError

# The options and the table are those of tbepler/topaz: commands/preprocess.py, commands/extract.py, extract.py.
FAKE = """#!/usr/bin/env python3
import argparse, pathlib, shutil, sys

parser = argparse.ArgumentParser()
commands = parser.add_subparsers(dest="command", required=True)
preprocess = commands.add_parser("preprocess")
preprocess.add_argument("files", nargs="+")
preprocess.add_argument("-s", "--scale", default=4, type=int)
preprocess.add_argument("-o", "--destdir", required=True)
extract = commands.add_parser("extract")
extract.add_argument("paths", nargs="*")
extract.add_argument("-m", "--model", default="resnet16")
extract.add_argument("-r", "--radius", type=int)
extract.add_argument("-t", "--threshold", default=-6, type=float)
extract.add_argument("-x", "--up-scale", type=float, default=1)
extract.add_argument("-o", "--output")
args = parser.parse_args()
if args.command == "preprocess":
    (path,) = map(pathlib.Path, args.files)
    folder = pathlib.Path(args.destdir)
    shutil.copy(path, folder / (path.stem + ".tiff"))
    (folder / "metadata.json").write_text("{}")
    sys.exit(0)
print("# Loading model:", args.model, file=sys.stderr)
if args.model == "broken.sav":
    sys.exit("RuntimeError: CUDA out of memory")
(path,) = map(pathlib.Path, args.paths)
assert path.exists()
print("image_name\\tx_coord\\ty_coord\\tscore")
for x, y, score in ((10, 20, 1.5), (31, 7, 3.25), (50, 60, -0.5)):
    if score >= args.threshold:
        print(path.stem, round(x * args.up_scale), round(y * args.up_scale), score, sep="\\t")
print(args.radius, args.up_scale, args.model, file=open(%r, "w"))
"""


@pytest.fixture
def micrograph(tmp_path):
    path = tmp_path / "exposure_1.mrc"
    with mrcfile.new(path) as mrc:
        mrc.set_data(np.zeros((64, 64), dtype=np.float32))
    return path


@pytest.fixture
def program(tmp_path):
    return write_program(tmp_path, FAKE % str(tmp_path / "arguments"))


def write_program(folder: Path, text: str) -> Path:
    path = folder / "topaz"
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_coordinates_come_back_in_pixels_of_the_micrograph_best_first(micrograph, program, tmp_path):
    settings = TopazSettings(executable=program, model=Path("my.sav"), diameter_angstrom=144.0)
    centres, scores = run_topaz(micrograph, 1.5, settings)
    # 96 px a diameter are binned by 4 to 24 px, of which 9 are the radius of suppression
    assert (tmp_path / "arguments").read_text().split() == ["9", "4.0", "my.sav"]
    assert centres.tolist() == [[28.0, 124.0], [80.0, 40.0]]
    assert scores.tolist() == [3.25, 1.5]


def test_a_lower_threshold_gives_more(micrograph, program):
    settings = TopazSettings(executable=program, diameter_angstrom=144.0, threshold=-6.0)
    assert len(run_topaz(micrograph, 1.5, settings)[1]) == 3


def test_a_program_that_is_not_there_is_a_matter_of_configuration(micrograph, tmp_path):
    settings = TopazSettings(executable=tmp_path / "none", diameter_angstrom=144.0)
    with pytest.raises(ConfigurationError, match="topaz is installed"):
        run_topaz(micrograph, 1.5, settings)


def test_a_failing_program_is_quoted(micrograph, program):
    settings = TopazSettings(executable=program, model=Path("broken.sav"), diameter_angstrom=144.0)
    with pytest.raises(ResourceError, match=r"topaz extract ends well.*CUDA out of memory"):
        run_topaz(micrograph, 1.5, settings)


@pytest.mark.parametrize(
    ("table", "rule"),
    [
        ("x y score\\n1 2 3", "prints a table"),
        ("image_name\\tx_coord\\ty_coord\\tscore\\na\\t1\\tb\\t2", "numbers"),
    ],
)
def test_another_table_is_refused(micrograph, tmp_path, table, rule):
    text = f"#!/bin/sh\nif [ $1 = preprocess ]; then cp $6 $5/exposure_1.mrc; else printf '{table}\\n'; fi\n"
    settings = TopazSettings(executable=write_program(tmp_path, text), diameter_angstrom=144.0)
    with pytest.raises(ResourceError, match=rule):
        run_topaz(micrograph, 1.5, settings)


def test_a_program_that_hangs_is_ended(micrograph, tmp_path):
    hanging = write_program(tmp_path, "#!/bin/sh\nexec sleep 30\n")
    settings = TopazSettings(executable=hanging, diameter_angstrom=144.0, timeout_s=0.2)
    with pytest.raises(ResourceError, match=r"ends within 0\.2 s"):
        run_topaz(micrograph, 1.5, settings)


def test_no_picks_are_no_error(micrograph, tmp_path):
    text = "#!/bin/sh\nif [ $1 = preprocess ]; then cp $6 $5/exposure_1.mrc; else printf 'image_name\\tx_coord\\ty_coord\\tscore\\n'; fi\n"
    settings = TopazSettings(executable=write_program(tmp_path, text), diameter_angstrom=144.0)
    centres, scores = run_topaz(micrograph, 1.5, settings)
    assert centres.shape == (0, 2)
    assert scores.shape == (0,)
