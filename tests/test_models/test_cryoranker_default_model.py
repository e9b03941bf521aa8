"""The shipped ranker: small, quick, and right about what it was not trained on."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from models.cryo_ief.config import SIZES
from models.cryoranker.metrics import score_quality
from models.cryoranker.serve import DEFAULT_MODEL, OnnxRanker
from models.cryoranker.simulate import simulate_boxes
from models.cryoranker.specimen import render_pool, structure_named

_DATA = Path(os.environ.get("ICESTREAM_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))


@pytest.fixture(scope="module")
def ranker():
    return OnnxRanker()


def test_default_model_is_small_and_says_what_it_is(ranker):
    assert DEFAULT_MODEL.stat().st_size < 8_000_000
    assert ranker.info.architecture.startswith("vit-")
    assert ranker.info.input_size_px <= SIZES["base"].input_size_px
    assert len(ranker.model_hash) == 64


def test_default_model_tells_particles_from_junk_on_a_phantom_never_trained_on(ranker):
    structure = structure_named("phantom:900002:mass_kda=70")
    pool = render_pool(structure, n_views=32, n_fragments=6, generator=torch.Generator().manual_seed(0))
    boxes = list(simulate_boxes([pool], np.random.default_rng(0), n_fields=14, snr=0.2, box_size_px=64))
    scores = np.concatenate([ranker.score(part.images.numpy())[0] for part in boxes])
    labels = np.concatenate([part.labels for part in boxes])
    quality = score_quality(scores, labels)
    assert quality.auc > 0.85
    assert quality.good_accepted > 2 * quality.bad_accepted


def test_scores_do_not_depend_on_brightness_or_on_the_contrasts_scale(ranker):
    images = np.random.default_rng(1).normal(size=(4, 80, 80)).astype(np.float32)
    first, _ = ranker.score(images)
    second, _ = ranker.score(images * 3.0 + 100.0)
    np.testing.assert_allclose(first, second, atol=0.02)


@pytest.mark.realdata
def test_real_particles_are_mostly_accepted_and_the_same_moved_off_centre_mostly_not(ranker):
    stacks = sorted((_DATA / "particles" / "betagal_empiar10204" / "stacks").glob("*.mrcs"))
    if not stacks:
        pytest.skip(f"no real particles under {_DATA}")
    import mrcfile

    with mrcfile.open(stacks[0], permissive=True) as stack:
        images = np.asarray(stack.data, np.float32)
    centred, _ = ranker.score(images)
    moved, _ = ranker.score(np.roll(images, (20, 10), axis=(1, 2)))
    assert np.median(centred) > 0.4
    assert (moved > 0.4).mean() < 0.5 * (centred > 0.4).mean()
