"""Training a ranker: goes on where it stopped, fine-tunes a Cryo-IEF encoder, says what does not fit."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from models.cryo_ief.config import Head, vit_config
from models.cryo_ief.moco import Moco, MocoConfig
from models.cryo_ief.training_state import STATE_FILE
from models.cryo_ief.vit import CryoVit
from models.cryoranker.dataset import LabelledParticles
from models.cryoranker.train import TrainConfig, evaluate, fit, initial_model
from models.weights import load_checkpoint, save_checkpoint

MODEL = vit_config(
    "nano",
    input_size_px=16,
    patch_size_px=8,
    width=24,
    n_heads=3,
    depth=1,
    head=Head.SOFTMAX2,
    mean=0.5,
    std=0.2,
)
CONFIG = TrainConfig(
    size="nano",
    n_steps=9,
    batch_size=8,
    warm_up_steps=2,
    evaluate_every=3,
    checkpoint_every=2,
    first_least_snr=0.05,
)


def discs(n, seed):
    """Bright discs in noise (good) and noise alone (bad)."""
    rng = np.random.default_rng(seed)
    labels = (np.arange(n) % 2).astype(np.float32)
    axis = np.arange(16) - 8
    disc = np.hypot(axis[:, None], axis[None, :]) < 4
    grey = 110 + 60 * disc * labels[:, None, None] + rng.normal(0, 15, (n, 16, 16))
    return LabelledParticles(
        grey=grey.clip(0, 255).astype(np.uint8),
        labels=labels,
        kinds=np.zeros(n, np.int8),
        snr=rng.uniform(0.01, 0.2, n).astype(np.float32),
        structure=np.zeros(n, np.int16),
    )


TRAINING, VALIDATION = discs(60, 0), discs(30, 1)


class StopError(Exception):
    pass


def test_a_stopped_training_goes_on_to_the_same_weights_and_curve(tmp_path):
    undisturbed = fit(MODEL, CONFIG, TRAINING, VALIDATION)

    def stop(_point):
        raise StopError

    with pytest.raises(StopError):
        fit(MODEL, CONFIG, TRAINING, VALIDATION, tmp_path, on_progress=stop)
    assert load_checkpoint(tmp_path / STATE_FILE).metadata["step"] == 2
    resumed = fit(MODEL, CONFIG, TRAINING, VALIDATION, tmp_path)
    for (key, value), other in zip(
        undisturbed.model.state_dict().items(), resumed.model.state_dict().values(), strict=True
    ):
        assert torch.equal(value, other), key
    curves = [
        [{k: v for k, v in p.items() if k != "seconds"} for p in f.curve] for f in (undisturbed, resumed)
    ]
    assert curves[0] == curves[1]
    assert undisturbed.validation == resumed.validation


def test_a_state_of_other_data_or_settings_is_refused(tmp_path):
    fit(MODEL, replace(CONFIG, n_steps=2), TRAINING, VALIDATION, tmp_path)
    with pytest.raises(ValueError, match=r"training\.n_steps 2 then, 4 now"):
        fit(MODEL, replace(CONFIG, n_steps=4), TRAINING, VALIDATION, tmp_path)


def test_training_beats_the_untrained_network():
    config = replace(CONFIG, n_steps=60, evaluate_every=60, learning_rate=3e-3)
    untrained = evaluate(initial_model(config, MODEL), VALIDATION)
    assert fit(MODEL, config, TRAINING, VALIDATION).validation.auc > max(0.9, untrained.auc)


@pytest.mark.parametrize("head", [Head.SOFTMAX2, Head.SIGMOID1])
def test_calibration_moves_the_scores_and_keeps_their_order(head):
    model, validation = replace(MODEL, head=head), discs(200, 2)
    plain = fit(model, CONFIG, TRAINING, validation)
    config = replace(CONFIG, good_accepted=0.8, calibration_snr=(0.0, 1.0))
    moved = fit(model, config, TRAINING, validation)
    assert moved.validation.good_accepted == pytest.approx(0.8, abs=0.02)
    assert moved.validation.auc == pytest.approx(plain.validation.auc, abs=1e-6)
    assert moved.validation.good_accepted != plain.validation.good_accepted


def test_a_finished_training_is_calibrated_anew_without_training(tmp_path):
    config = replace(CONFIG, good_accepted=0.8, calibration_snr=(0.0, 1.0))
    first = fit(MODEL, config, TRAINING, discs(200, 2), tmp_path)
    again = fit(MODEL, replace(config, good_accepted=0.6), TRAINING, discs(200, 2), tmp_path)
    assert again.validation.good_accepted == pytest.approx(0.6, abs=0.02)
    assert again.curve == first.curve


def test_calibration_without_enough_good_images_is_refused():
    with pytest.raises(ValueError, match=r"calibration_snr: 5\.0-9\.0, has 0 good validation images"):
        fit(MODEL, replace(CONFIG, good_accepted=0.9, calibration_snr=(5.0, 9.0)), TRAINING, VALIDATION)


def test_bfloat16_products_train_as_well():
    config = replace(CONFIG, n_steps=60, evaluate_every=60, learning_rate=3e-3, is_bfloat16=True)
    found = fit(MODEL, config, TRAINING, VALIDATION)
    assert found.validation.auc > 0.9
    assert all(p.dtype is torch.float32 for p in found.model.parameters())


@pytest.fixture
def encoder(tmp_path):
    torch.manual_seed(5)
    model = Moco(replace(MODEL, head=Head.NONE), MocoConfig(hidden=8, dim=4))
    path = tmp_path / "cryo_ief.safetensors"
    save_checkpoint(path, model.state_dict(), {"model": model.base_encoder.config.to_dict()})
    return path, model.base_encoder


@pytest.mark.parametrize("head", [Head.SOFTMAX2, Head.SIGMOID1])
def test_fine_tuning_starts_from_the_encoder_with_a_fresh_head(encoder, head):
    path, base = encoder
    config = replace(CONFIG, initial_checkpoint=str(path))
    model = initial_model(config, replace(MODEL, head=head)).eval()
    particles = torch.randn(3, 1, 16, 16)
    with torch.no_grad():
        base.eval()
        cls_token, _ = model(particles)
        features = model.head.norm(cls_token) if head is Head.SIGMOID1 else cls_token
        torch.testing.assert_close(features, base.encode(particles))
    assert fit(replace(MODEL, head=head), config, TRAINING, VALIDATION).validation.n_good == 15


def test_a_ranker_goes_on_with_its_own_head(tmp_path):
    torch.manual_seed(6)
    given = CryoVit(MODEL)
    save_checkpoint(tmp_path / "r.safetensors", given.state_dict(), {"model": MODEL.to_dict()})
    model = initial_model(replace(CONFIG, initial_checkpoint=str(tmp_path / "r.safetensors")), MODEL)
    assert torch.equal(model.head.linear1.weight, given.head.linear1.weight)


def test_a_start_of_another_architecture_is_named(encoder):
    config = replace(CONFIG, initial_checkpoint=str(encoder[0]))
    with pytest.raises(ValueError, match=r"cryo_ief\.safetensors: .*w24-d1.*builds .*w48-d1"):
        initial_model(config, replace(MODEL, width=48))


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(ValueError, match=r"batch_size: 64, must not be larger than the data \(60 images\)"):
        fit(MODEL, replace(CONFIG, batch_size=64), TRAINING, VALIDATION)


def test_settings_below_one_are_named():
    with pytest.raises(ValueError, match="checkpoint_every: 0"):
        replace(CONFIG, checkpoint_every=0)
