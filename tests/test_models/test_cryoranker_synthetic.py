"""Generated particles in a ranker's training: labels follow the truth, parts are what was asked for, the shipped ranker is read back."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from models.cryo_ief.config import Head, vit_config
from models.cryo_ief.encode import encode_grey
from models.cryo_ief.preprocess import to_grey_levels
from models.cryoranker.serve import DEFAULT_MODEL, OnnxRanker
from models.cryoranker.simulate import Kind
from models.cryoranker.starting import DEFAULT, network_from_onnx, settle_norms, starting_network
from models.cryoranker.synthetic import (
    KnownField,
    SyntheticParticles,
    cut_labelled,
    draw_places,
    freedom,
    label_places,
    mix_sets,
    read_generated,
)
from models.cryoranker.train import TrainConfig

CONFIG = vit_config(
    "nano", input_size_px=32, patch_size_px=8, width=24, n_heads=3, depth=1, head=Head.SOFTMAX2
)


@pytest.fixture(scope="module")
def field():
    """Dark balls of 20 px on noise: three whole ones, two that overlap, one that the border cuts."""
    centres = np.array(
        [[40.0, 40.0], [40.0, 110.0], [110.0, 40.0], [120.0, 118.0], [124.0, 130.0], [80.0, 3.0]]
    )
    rows = np.arange(160)
    image = np.random.default_rng(0).normal(0.0, 1.0, (160, 160))
    for y, x in centres:
        image -= 4.0 * (np.hypot(rows[:, None] - y, rows[None, :] - x) < 10.0)
    return KnownField(
        image=image.astype(np.float32),
        centres_yx_px=centres,
        worth=np.array([1.0, 1.0, 1.0, 0.25, 0.25, 0.0]),
        diameter_px=20.0,
    )


def test_labels_follow_the_nearest_particles_truth(field):
    near, off, wrong, far, spoiled = [40.5, 40.5], [40.0, 44.0], [40.0, 50.0], [75.0, 75.0], [120.0, 118.0]
    labels, kinds = label_places(np.array([near, off, wrong, far, spoiled]), field)
    assert labels.tolist() == pytest.approx([1.0, (0.30 - 0.20) / 0.22, 0.0, 0.0, 0.25], abs=1e-6)
    assert kinds.tolist() == [Kind.PARTICLE, Kind.OFF_CENTRE, Kind.OFF_CENTRE, Kind.NOISE, Kind.CROWDED]


def test_a_neighbour_makes_a_particle_worth_less_the_nearer_it_is():
    pairs = np.array([[0.0, 0.0], [0.0, 9.0], [100.0, 0.0], [100.0, 12.5], [200.0, 0.0], [200.0, 17.0]])
    assert freedom(pairs, 20.0).tolist() == pytest.approx([0.0, 0.0, 0.5, 0.5, 1.0, 1.0])
    assert freedom(pairs[:1], 20.0).tolist() == [1.0]


def test_places_hold_every_particle_and_background_without_one(field):
    places = draw_places(field, np.random.default_rng(3))
    n = len(field.centres_yx_px)
    assert places.labels[:n].tolist() == field.worth.tolist()
    background = places.centres_yx_px[places.kinds == Kind.NOISE]
    apart = np.linalg.norm(background[:, None] - field.centres_yx_px[None], axis=-1)
    assert len(background) >= 2
    assert apart.min() > 0.6 * field.diameter_px
    assert (places.labels[places.kinds == Kind.NOISE] == 0.0).all()
    again = draw_places(field, np.random.default_rng(3))
    assert np.array_equal(places.centres_yx_px, again.centres_yx_px)


def test_boxes_show_the_particle_white_in_the_middle_even_at_the_border(field):
    places = draw_places(field, np.random.default_rng(0))
    boxes = cut_labelled(field, places, 1.5, CONFIG)
    assert boxes.grey.shape == (len(places.labels), 32, 32)
    middle = boxes.grey[:, 12:20, 12:20].astype(float).mean(axis=(1, 2))
    edge = boxes.grey[:, [0, -1]].astype(float).mean(axis=(1, 2))
    assert (middle - edge)[: len(field.centres_yx_px)].min() > 40.0
    assert np.isinf(boxes.snr).all()


@pytest.mark.parametrize("part", [0.25, 0.5, 0.8])
def test_the_mixture_has_the_part_that_was_asked_for(field, part):
    boxes = cut_labelled(field, draw_places(field, np.random.default_rng(0)), 1.5, CONFIG)
    simulated = replace(boxes, structure=np.zeros(len(boxes), np.int16))
    mixed = mix_sets(simulated, boxes, part, seed=1)
    assert (mixed.structure < 0).mean() == pytest.approx(part, abs=0.03)
    assert (mixed.structure == 0).sum() == len(simulated)
    assert len(mix_sets(simulated, boxes, 1.0, seed=1)) == len(boxes)


def test_another_folder_is_refused_by_name(tmp_path):
    with pytest.raises(
        ValueError, match=r"no particles.star, summary.json, must be a folder of `icestream generate`"
    ):
        next(read_generated(tmp_path))
    with pytest.raises(ValueError, match=r"part: 0\.0"):
        SyntheticParticles(folder="x", part=0.0)
    with pytest.raises(ValueError, match="initial_checkpoint: none"):
        TrainConfig(synthetic=SyntheticParticles(folder="x"))


def test_the_shipped_ranker_is_read_back_with_its_scores():
    images = np.random.default_rng(1).normal(0.0, 1.0, (24, 64, 64)).astype(np.float32)
    images[::2, 20:44, 20:44] += 1.0
    model = starting_network(DEFAULT)
    grey = to_grey_levels(images, model.config.input_size_px, model.config.resize_mode, is_exact=False)
    wanted = OnnxRanker(DEFAULT_MODEL).score(images)[0]
    before = encode_grey(model, grey).scores
    assert np.abs(before - wanted).max() < 1e-4
    settle_norms(model, grey)
    assert np.abs(encode_grey(model, grey).scores - wanted).max() < 1e-4


def test_settled_norms_leave_a_training_batch_its_scores():
    """Without them the batch's own scale would be taken away in training mode."""
    model = starting_network(DEFAULT)
    size = model.config.input_size_px
    grey = np.random.default_rng(2).integers(60, 200, (64, size, size)).astype(np.uint8)
    wanted = encode_grey(model, grey).scores
    images = (torch.from_numpy(grey).float()[:, None] / 255.0 - model.config.mean) / model.config.std

    def trained_scores():
        model.train()
        with torch.no_grad():
            return model.score(model(images)[1]).numpy()

    raw = np.abs(trained_scores() - wanted).max()
    model = starting_network(DEFAULT)
    settle_norms(model, grey)
    assert np.abs(trained_scores() - wanted).max() < 1e-3 < raw


def test_a_file_without_our_metadata_is_refused(tmp_path):
    path = tmp_path / "other.onnx"
    path.write_bytes(b"not a model")
    with pytest.raises(ValueError, match=r"other.onnx"):
        network_from_onnx(path)
