"""Pre-training: learns, goes on where it was killed, and says what is wrong with its data."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from models.cryo_ief.augment import AugmentationConfig
from models.cryo_ief.image_sets import ImageCollection, ImageSet, epoch_order, image_set_of
from models.cryo_ief.layouts import Layout, load_model
from models.cryo_ief.moco import MocoConfig
from models.cryo_ief.pretrain import PretrainConfig, initial_encoder, pretrain
from models.cryo_ief.settings import parse_settings, split_document
from models.cryo_ief.training_state import STATE_FILE
from models.weights import load_checkpoint

_ROOT = Path(__file__).parents[2]
CONFIG = PretrainConfig(
    size="nano",
    model={"input_size_px": 16, "patch_size_px": 8, "width": 24, "n_heads": 3, "depth": 1},
    moco=MocoConfig(hidden=16, dim=8),
    n_epochs=4,
    batch_size=8,
    base_learning_rate=0.02,
    warm_up_epochs=1.0,
    report_every=2,
    checkpoint_every=3,
)


def grey_images(n=35, seed=0, size=16):
    return np.random.default_rng(seed).integers(0, 256, (n, size, size)).astype(np.uint8)


def collection():
    return ImageCollection([image_set_of("a", grey_images(20)), image_set_of("b", grey_images(15, 1) // 2)])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    points = []
    result = pretrain(CONFIG, collection(), folder, on_progress=points.append)
    return result, points


def assert_same_training(first, second):
    a, b = load_checkpoint(first.checkpoint), load_checkpoint(second.checkpoint)
    assert a.metadata == b.metadata
    assert a.tensors.keys() == b.tensors.keys()
    for key, value in a.tensors.items():
        assert torch.equal(value, b.tensors[key]), key
    times = ("seconds", "images_per_s", "waited_for_data_s")
    curves = [[{k: v for k, v in p.items() if k not in times} for p in r.curve] for r in (first, second)]
    assert curves[0] == curves[1]


def test_training_writes_a_checkpoint_of_the_released_layout_with_its_data_statistics(undisturbed):
    result, points = undisturbed
    loaded = load_checkpoint(result.checkpoint)
    found = load_model(loaded.tensors, loaded.metadata["model"])
    assert found.layout is Layout.CRYO_IEF_MOCO
    assert result.n_steps == 4 * (35 // 8)
    assert [int(p["step"]) for p in points] == list(range(2, 17, 2))
    assert found.model.config.mean == pytest.approx(collection().pooled_statistics()[0])
    assert [d["name"] for d in loaded.metadata["datasets"]] == ["a", "b"]
    assert loaded.metadata["datasets"][1]["mean"] == pytest.approx((grey_images(15, 1) // 2 / 255).mean())
    start = initial_encoder(CONFIG, found.model.config).state_dict()
    moved = [k for k, v in found.model.state_dict().items() if not torch.equal(v, start[k])]
    assert "blocks.0.mlp.fc1.weight" in moved
    assert "pos_embed" not in moved


class StopError(Exception):
    pass


@pytest.mark.parametrize("stop_at", [4, 10])
def test_a_stopped_training_goes_on_to_the_same_bytes(undisturbed, tmp_path, stop_at):
    def stop(point):
        if point["step"] >= stop_at:
            raise StopError

    with pytest.raises(StopError):
        pretrain(CONFIG, collection(), tmp_path, on_progress=stop)
    state = load_checkpoint(tmp_path / STATE_FILE)
    assert 0 < state.metadata["step"] < 16
    assert_same_training(undisturbed[0], pretrain(CONFIG, collection(), tmp_path))


def test_a_killed_process_leaves_a_state_that_goes_on_to_the_same_bytes(undisturbed, tmp_path):
    program = f"""
import os, signal, sys, torch
sys.path.insert(0, {str(Path(__file__).parent)!r})
torch.set_num_threads({torch.get_num_threads()})
from test_cryo_ief_pretrain import CONFIG, collection
from pathlib import Path
from models.cryo_ief.pretrain import pretrain
def kill(point):
    if point["step"] >= 8:
        os.kill(os.getpid(), signal.SIGKILL)
pretrain(CONFIG, collection(), Path({str(tmp_path)!r}), on_progress=kill)
"""
    finished = subprocess.run(
        [sys.executable, "-c", program],
        cwd=_ROOT,
        env={**os.environ},
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert finished.returncode == -signal.SIGKILL, finished.stderr[-2000:]
    assert load_checkpoint(tmp_path / STATE_FILE).metadata["step"] == 6
    assert not list(tmp_path.glob("*.part"))
    assert_same_training(undisturbed[0], pretrain(CONFIG, collection(), tmp_path))


def test_a_finished_training_is_not_run_again(undisturbed, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(undisturbed[0].checkpoint.parent, folder)
    points = []
    result = pretrain(CONFIG, collection(), folder, on_progress=points.append)
    assert points == []
    assert_same_training(undisturbed[0], result)


def test_a_state_of_another_configuration_is_refused_with_what_differs(undisturbed):
    changed = replace(CONFIG, base_learning_rate=0.01)
    with pytest.raises(ValueError, match=r"training\.base_learning_rate 0\.02 then, 0\.01 now"):
        pretrain(changed, collection(), undisturbed[0].checkpoint.parent)


def test_a_truncated_state_is_named(tmp_path, undisturbed):
    source = undisturbed[0].checkpoint.parent / STATE_FILE
    (tmp_path / STATE_FILE).write_bytes(source.read_bytes()[:-100])
    with pytest.raises(ValueError, match=STATE_FILE):
        pretrain(CONFIG, collection(), tmp_path)


def test_loss_falls_below_guessing_on_images_that_can_be_told_apart(tmp_path):
    # Each image is a bright disc of its own radius and brightness: nothing that rotation hides.
    axis = np.arange(16) - 8
    radius = np.hypot(axis[:, None], axis[None, :])
    grey = np.stack([np.where(radius < 1.5 + i % 6, 90 + 20 * (i // 6), 30) for i in range(32)]).astype(
        np.uint8
    )
    mild = AugmentationConfig(
        crop_area=(0.95, 1.0), brightness=0.02, contrast=0.02, blur_probability=(0.0, 0.0)
    )
    config = replace(
        CONFIG,
        n_epochs=50,
        batch_size=16,
        augmentation=mild,
        base_learning_rate=0.05,
        checkpoint_every=1000,
    )
    result = pretrain(config, ImageCollection([image_set_of("discs", grey)]), tmp_path)
    guessing = 2 * np.log(16)
    assert result.curve[0]["loss"] > 0.9 * guessing
    assert result.curve[-1]["loss"] < 0.75 * guessing
    assert result.curve[-1]["accuracy"] > 4 / 16


def test_bf16_gives_nearly_the_same_loss(undisturbed, tmp_path):
    result = pretrain(replace(CONFIG, precision="bf16", n_epochs=1), collection(), tmp_path)
    exact = pretrain(replace(CONFIG, n_epochs=1), collection(), tmp_path / "exact")
    assert result.curve[0]["loss"] == pytest.approx(exact.curve[0]["loss"], rel=0.05)


def test_a_batch_larger_than_the_data_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"batch_size: 8, must not be larger than the data \(5 images\)"):
        pretrain(CONFIG, ImageCollection([image_set_of("few", grey_images(5))]), tmp_path)


def test_a_set_without_contrast_or_images_is_refused():
    with pytest.raises(ValueError, match=r"flat: standard deviation 0\.0"):
        ImageCollection([image_set_of("flat", np.full((4, 8, 8), 7, np.uint8))])
    with pytest.raises(ValueError, match="empty: no images"):
        ImageCollection([ImageSet(name="empty", n_images=0, read=lambda rows: rows, mean=0.5, std=0.1)])
    with pytest.raises(ValueError, match="at least one"):
        ImageCollection([])


def test_a_loss_that_is_not_finite_stops_the_training_and_keeps_the_last_state(tmp_path):
    config = replace(CONFIG, base_learning_rate=1e30, warm_up_epochs=0.0, checkpoint_every=1)
    with pytest.raises(ValueError, match=r"loss: .* at step"):
        pretrain(config, collection(), tmp_path)
    state = load_checkpoint(tmp_path / STATE_FILE)
    assert np.isfinite(state.metadata["numbers"]["loss_sum"])


def test_images_of_several_sets_come_in_the_order_asked_for_with_their_own_statistics():
    images = collection()
    rows = np.array([34, 0, 19, 20])
    expected = [
        grey_images(15, 1)[14] // 2,
        grey_images(20)[0],
        grey_images(20)[19],
        grey_images(15, 1)[0] // 2,
    ]
    np.testing.assert_array_equal(images.read(rows), np.stack(expected))
    mean, std = images.statistics(rows, "dataset")
    assert mean[0] == mean[3] == pytest.approx((grey_images(15, 1) // 2 / 255).mean(), rel=1e-6)
    assert std[1] == std[2] == pytest.approx((grey_images(20) / 255).std(), rel=1e-5)
    pooled = np.concatenate([grey_images(20), grey_images(15, 1) // 2]) / 255
    assert images.pooled_statistics() == pytest.approx((pooled.mean(), pooled.std()))
    assert set(images.statistics(rows, "pooled")[0].tolist()) == {np.float32(pooled.mean())}


def test_every_epoch_shows_each_image_once_in_an_order_of_its_own():
    orders = [epoch_order(50, 3, epoch) for epoch in (0, 1)]
    assert all(sorted(order.tolist()) == list(range(50)) for order in orders)
    assert (orders[0] != orders[1]).any()
    np.testing.assert_array_equal(orders[0], epoch_order(50, 3, 0))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n_epoch": 3}, "unknown key n_epoch, did you mean n_epochs?"),
        ({"moco": {"temprature": 0.2}}, "unknown key moco.temprature, did you mean temperature?"),
        ({"moco": {"momentum": 2.0}}, "moco.momentum: 2.0, must be in"),
        ({"batch_size": "many"}, "batch_size: 'many'"),
        ({"batch_size": 1}, "batch_size: 1, contrastive"),
        ({"normalisation": "none"}, "normalisation: 'none'"),
        ({"augmentation": {"crop_area": [0.5]}}, "augmentation.crop_area"),
    ],
)
def test_a_wrong_configuration_names_the_key_and_the_value(values, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the whole message is compared
        parse_settings(PretrainConfig, values)
    assert message in str(caught.value)


def test_a_flat_document_is_shared_out_and_a_key_that_nobody_has_is_named():
    with pytest.raises(ValueError, match=r"unknown key bach_size, did you mean batch_size\?"):
        split_document({"bach_size": 3}, (PretrainConfig, MocoConfig))
    assert split_document({"seed": 3, "dim": 4}, (PretrainConfig, MocoConfig)) == [{"seed": 3}, {"dim": 4}]


def test_model_changes_that_an_encoder_cannot_take_are_named():
    for changes in ({"head": "v1"}, {"widht": 3}):
        with pytest.raises(ValueError, match=next(iter(changes))):
            PretrainConfig(model=changes).vit()


def test_the_curve_is_also_a_file(undisturbed):
    result, points = undisturbed
    assert json.loads((result.checkpoint.parent / "curve.json").read_text()) == points
