"""Judging a ranker: on the picks of a session whose truth is known, and on held-out boxes."""

from types import SimpleNamespace

import mrcfile
import numpy as np
import pandas as pd
import pytest
import starfile

from models.cryo_ief.preprocess import to_grey_levels
from models.cryoranker.dataset import LabelledParticles
from models.cryoranker.held_out import HeldOutBoxes, HeldOutSpec
from models.cryoranker.judge import judge
from models.cryoranker.judge_session import judge_session
from models.cryoranker.simulate import Kind


class MiddleRanker:
    """Scores an image by its middle's brightness."""

    model_hash = "0" * 64
    info = SimpleNamespace(input_size_px=16, resize_mode="hartley")

    def score(self, images):
        return images[:, 6:10, 6:10].mean(axis=(1, 2)) / 10.0, np.zeros((len(images), 1), np.float16)


def _table(**columns):
    return pd.DataFrame(columns)


def _spots(brightness, seed):
    rng = np.random.default_rng(seed)
    images = rng.normal(0.0, 0.5, (len(brightness), 16, 16)).astype(np.float32)
    images[:, 6:10, 6:10] += np.asarray(brightness, np.float32)[:, None, None]
    return images


@pytest.fixture
def session(tmp_path):
    """Five picks on known ground (two good, one off centre, one far away, one true but in a crystal), one elsewhere."""
    (tmp_path / "export").mkdir()
    (tmp_path / "particles").mkdir()
    for name, brightness in (("a", [8.0, 7.0, 1.0, 2.0, 9.0]), ("b", [9.0])):
        with mrcfile.new(tmp_path / "particles" / f"{name}.mrcs") as file:
            file.set_data(_spots(brightness, 0))
    picks = _table(
        rlnImageName=[f"{i + 1:06d}@particles/a.mrcs" for i in range(5)] + ["000001@particles/b.mrcs"],
        rlnMicrographName=["micrographs/a.mrc"] * 5 + ["micrographs/b.mrc"],
        rlnCoordinateX=[101.0, 300.0, 500.0, 900.0, 700.0, 100.0],
        rlnCoordinateY=[100.0, 302.0, 530.0, 900.0, 700.0, 100.0],
        rlnAutopickFigureOfMerit=[3.0, 4.0, 5.0, 6.0, 7.0, 3.0],
    )
    starfile.write({"particles": picks}, tmp_path / "export" / "all_particles.star")
    truth = _table(
        rlnMicrographName=["micrographs/a.mrc"] * 4,
        rlnCoordinateX=[100.0, 300.0, 500.0, 700.0],
        rlnCoordinateY=[100.0, 300.0, 500.0, 700.0],
    )
    optics = _table(rlnOpticsGroup=[1], rlnMicrographPixelSize=[1.5])
    starfile.write({"optics": optics, "particles": truth}, tmp_path / "particles.star")
    junk = _table(
        rlnMicrographName=["micrographs/a.mrc"] * 2,
        rlnCoordinateX=[710.0, 100.0],
        rlnCoordinateY=[710.0, 100.0],
        icestreamJunkLabel=["ice_crystal", "carbon"],
        icestreamJunkRadius=[40.0, 500.0],
    )
    starfile.write({"junk": junk}, tmp_path / "junk.star")
    return tmp_path


def test_a_sessions_picks_are_judged_by_the_distance_to_the_truth(session):
    found = judge_session(MiddleRanker(), session, session, diameter_angstrom=150.0)
    assert found["particles"] == 5, "a micrograph that the truth does not know is left out"
    assert (found["ranker"]["n_good"], found["ranker"]["n_bad"]) == (2, 2)
    assert found["ranker"]["auc"] == 1.0
    assert found["ranker"]["good_accepted"] == 1.0
    assert found["picker"]["auc"] == 0.0


def test_a_judgement_sets_the_ranker_beside_baseline_picker_and_templates():
    rng = np.random.default_rng(1)
    labels = np.tile(np.float32([1.0, 0.0]), 40)
    bad = np.where(np.arange(80) % 4 == 1, Kind.NOISE, Kind.CARBON)
    kinds = np.where(labels > 0, Kind.PARTICLE, bad).astype(np.int8)
    boxes = HeldOutBoxes(
        images=_spots(8.0 * labels, 2).astype(np.float16),
        labels=labels,
        kinds=kinds,
        structure=np.repeat(np.int16([0, 1]), 40),
        picker_scores=rng.normal(size=80).astype(np.float32),
        template_scores=(labels - 0.5).astype(np.float32),
    )
    spec = HeldOutSpec(structures=("first", "folder/second.pdb"), snr=0.05, box_size_px=16)
    grey = to_grey_levels(_spots(8.0 * labels, 3), 16, is_exact=False)
    training = LabelledParticles(
        grey=grey,
        labels=labels,
        kinds=kinds,
        snr=np.ones(80, np.float32),
        structure=np.zeros(80, np.int16),
    )
    found = judge(MiddleRanker(), spec, boxes, training)
    assert found.ranker.auc == 1.0
    assert found.baseline.auc > 0.9
    assert 0.3 < found.picker.auc < 0.7
    assert found.limit.templates.auc == 1.0
    assert found.limit.ranker.n_bad < found.ranker.n_bad, "templates know no carbon"
    assert found.auc_by_structure == {"first": 1.0, "second.pdb": 1.0}
    assert found.accepted_by_kind["particle"] == 1.0
    assert found.accepted_by_kind["noise"] == 0.0
