"""Scores belong to (stack, index): subsets, several jobs, stacks of equal names and a last batch of one."""

import mrcfile
import numpy as np
import pytest

from models.cryoranker.serve import OnnxRanker
from stream.commands.score import score_particles
from stream.sinks.relion_star import read_particles_star

N_PER_STACK = 9


@pytest.fixture(scope="module")
def stacks(tmp_path_factory):
    """Three jobs, two of them with stacks of the same name, and every image's score by itself."""
    root = tmp_path_factory.mktemp("project")
    ranker, rng, truth = OnnxRanker(), np.random.default_rng(0), {}
    for job, name in (("J1", "mic.mrcs"), ("J2", "mic.mrcs"), ("J3", "other.mrcs")):
        path = root / job / "extract" / name
        path.parent.mkdir(parents=True)
        images = rng.normal(size=(N_PER_STACK, 64, 64)).astype(np.float32)
        # Blobs of very different clearness, so that scores differ by more than rounding.
        y, x = np.mgrid[:64, :64] - 32
        blob = np.exp(-(y**2 + (x / 1.4) ** 2) / (2 * 8.0**2)).astype(np.float32)
        images += np.linspace(0.3, 1.5, N_PER_STACK, dtype=np.float32)[:, None, None] * blob
        with mrcfile.new(path) as stack:
            stack.set_data(images)
            stack.set_image_stack()
            stack.voxel_size = 2.0
        for index in range(N_PER_STACK):
            truth[f"{job}/extract/{name}", index] = float(ranker.score(images[index : index + 1])[0][0])
    assert len({round(score, 4) for score in truth.values()}) > 20
    return root, truth


def write_cs(path, rows):
    fields = [("uid", "u8"), ("blob/path", "S40"), ("blob/idx", "u4"), ("blob/psize_A", "f4")]
    table = np.zeros(len(rows), fields)
    table["uid"] = 1000 + np.arange(len(rows))
    table["blob/path"] = [name.encode() for name, _ in rows]
    table["blob/idx"] = [index for _, index in rows]
    table["blob/psize_A"] = 2.0
    with path.open("wb") as stream:
        np.save(stream, table)


def check(stacks, rows, name, tmp_path, **options):
    root, truth = stacks
    write_cs(root / name, rows)
    document = score_particles(root / name, tmp_path / "scored.star", **options)
    particles = read_particles_star(tmp_path / "scored.star").particles
    assert document["scored"] == len(rows)
    assert particles["icestreamUid"].tolist() == [1000 + n for n in range(len(rows))]
    np.testing.assert_allclose(particles["icestreamScore"], [truth[row] for row in rows], atol=1e-4)


def test_half_of_a_stack_is_scored_row_for_row(stacks, tmp_path):
    check(stacks, [("J1/extract/mic.mrcs", i) for i in (8, 1, 4, 6)], "half.cs", tmp_path)


def test_stacks_of_several_jobs_may_be_interleaved(stacks, tmp_path):
    names = ("J3/extract/other.mrcs", "J1/extract/mic.mrcs")
    rows = [(names[n % 2], n // 2) for n in range(2 * N_PER_STACK)]
    check(stacks, rows, "interleaved.cs", tmp_path)


def test_stacks_of_equal_names_stay_apart(stacks, tmp_path):
    rows = [(f"{job}/extract/mic.mrcs", i) for i in range(N_PER_STACK) for job in ("J2", "J1")]
    check(stacks, rows, "equal.cs", tmp_path)


def test_a_last_batch_of_one_is_scored(stacks, tmp_path):
    rows = [("J2/extract/mic.mrcs", i) for i in range(N_PER_STACK)]
    check(stacks, rows, "last.cs", tmp_path, batch_size=4)
