"""Training: losses fall, a killed training goes on as if nothing had happened, bad input is refused."""

from __future__ import annotations

import csv
import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from models.cryogem.bank import BankFacts, SessionBank, save_bank
from models.cryogem.greys import GreyStatistics
from models.cryogem.networks import NetworkSettings
from models.cryogem.pairs import PairSource
from models.cryogem.physics import PhysicsSettings, build_physics
from models.cryogem.settings import CryogemSettings, TrainingSettings
from models.cryogem.specimen import CountDistribution
from models.cryogem.trainer import CryogemTrainer
from models.cryogem.training import train_cryogem
from models.cryogem.translation import load_generator, translate
from models.optics.ctf_fit import Microscope
from models.weights import load_checkpoint, save_checkpoint
from models.workers import Workers

_ROOT = Path(__file__).parents[2]
SETTINGS = CryogemSettings(
    physics=PhysicsSettings(),
    networks=NetworkSettings(
        depth=4,
        generator_filters=4,
        discriminator_filters=4,
        discriminator_layers=2,
        nce_levels=(1, 2, 3),
        head_width=16,
    ),
    training=TrainingSettings(
        n_simulated=2,
        crop_px=64,
        constant_epochs=2,
        decay_epochs=2,
        n_queries=16,
        checkpoint_every=2,
        validate_every=4,
        n_validated=1,
        device="cpu",
        learning_rate=1e-3,
    ),
)


def make_bank(*, n_micrographs: int = 3, count: float = 8.0) -> SessionBank:
    line = torch.arange(16, dtype=torch.float32) - 8
    volume = torch.exp(-(line[:, None, None] ** 2 + line[:, None] ** 2 + line**2) / 8.0)
    facts = BankFacts(
        pixel_size_angstrom=8.0,
        micrograph_pixel_size_angstrom=2.0,
        diameter_angstrom=80.0,
        symmetry="C1",
        microscope=Microscope(voltage_kv=300.0, cs_mm=2.7, amplitude_contrast=0.1),
        counts=CountDistribution(mean=count, sd=0.0),
        spacing_px=12.0,
        greys=GreyStatistics(mean=40.0, sd=5.0, skewness=0.1),
        names=tuple(f"m{i}" for i in range(n_micrographs)),
        n_held_out=min(1, n_micrographs - 1),
        skipped={},
        sources=(),
    )
    noise = torch.randn(n_micrographs, 1, 96, 80, generator=torch.Generator().manual_seed(7))
    smooth = torch.nn.functional.avg_pool2d(noise, 3, 1, 1)[:, 0] * 3.0
    return SessionBank(
        facts=facts,
        volumes=volume[None],
        ctfs=torch.tensor([[15200.0, 14800.0, 30.0, 0.0]], dtype=torch.float64),
        ice_maps=torch.ones(1, 64, 64),
        micrographs=(150 + 40 * smooth).clamp(0, 255).to(torch.uint8),
    )


def changed(**training) -> CryogemSettings:
    return dataclasses.replace(SETTINGS, training=dataclasses.replace(SETTINGS.training, **training))


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_training_leaves_generator_losses_and_samples(tmp_path):
    seen = []
    result = train_cryogem(make_bank(), SETTINGS, tmp_path, on_progress=seen.append)
    rows = read_rows(tmp_path / "losses.csv")
    assert [int(r["step"]) for r in rows] == list(range(8)) == [int(p["step"]) for p in seen]
    rates = [float(r["learning_rate"]) for r in rows[::2]]
    assert rates == pytest.approx([1e-3, 1e-3, 2e-3 / 3, 1e-3 / 3])
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == ["step_000004.png", "step_000008.png"]
    assert len(read_rows(tmp_path / "validation.csv")) == 2
    network, physics = load_generator(result.generator)
    assert physics == SETTINGS.physics
    out = translate(network, torch.randn(50, 70, generator=torch.Generator().manual_seed(1)))
    assert out.shape == (50, 70)
    assert result.step in (4, 8)
    assert result.n_skipped == 0


def test_learning_rate_is_constant_then_falls_linearly():
    schedule = TrainingSettings(constant_epochs=25, decay_epochs=75)
    assert [schedule.learning_rate_at(e) for e in (0, 24 - 1)] == [1e-4, 1e-4]
    assert schedule.learning_rate_at(25 + 37) == pytest.approx(1e-4 * (1 - 38 / 76))
    assert 0 < schedule.learning_rate_at(99) < 2e-6
    assert schedule.n_steps == 10_000


def test_a_repeated_pair_is_learned():
    """On one pair, over and over, the contrastive loss falls below that of chance (ln 17)."""
    source = PairSource(build_physics(make_bank(), SETTINGS.physics), SETTINGS.training)
    trainer = CryogemTrainer(SETTINGS)
    trainer.set_learning_rate(2e-3)
    pair = source.pair(0)
    losses = [trainer.step(pair, trainer.draw_places(pair.mask, step))["nce"] for step in range(60)]
    assert np.mean(losses[-5:]) < min(0.7 * losses[0], np.log(17.0))


def test_noise_is_drawn_anew_each_step_and_pairs_are_repeatable():
    def pairs():
        return PairSource(build_physics(make_bank(), SETTINGS.physics), SETTINGS.training)

    first, second = pairs(), pairs()
    second.pair(1)  # what was asked before does not matter
    assert torch.equal(first.pair(5).source, second.pair(5).source)
    assert torch.equal(first.pair(5).real, second.pair(5).real)
    assert not torch.equal(first.pair(4).source, first.pair(6).source)


def test_augmentation_turns_image_and_mask_together():
    """The mask's pixels are darker than the rest, whatever the turn."""
    source = PairSource(build_physics(make_bank(), SETTINGS.physics), SETTINGS.training)
    for step in range(8):
        pair = source.pair(step)
        image = pair.physics[0, 0]
        assert float(image[pair.mask].mean()) < float(image[~pair.mask].mean()) - 0.03


@pytest.mark.parametrize("form", ["paper", "released", "unguided"])
@pytest.mark.parametrize("gan", ["lsgan", "log"])
def test_every_form_of_the_losses_trains(form, gan):
    settings = changed(nce_form=form, gan_form=gan)
    source = PairSource(build_physics(make_bank(), settings.physics), settings.training)
    trainer = CryogemTrainer(settings)
    pair = source.pair(0)
    losses = trainer.step(pair, trainer.draw_places(pair.mask, 0))
    assert all(np.isfinite(v) for v in losses.values())


def test_bf16_and_channels_last_agree_with_fp32():
    found = []
    for extra in ({}, {"precision": "bf16", "is_channels_last": True}):
        settings = changed(**extra)
        source = PairSource(build_physics(make_bank(), settings.physics), settings.training)
        trainer = CryogemTrainer(settings)
        pair = source.pair(0)
        found.append(trainer.step(pair, trainer.draw_places(pair.mask, 0)))
    assert found[1]["nce"] == pytest.approx(found[0]["nce"], rel=0.05)
    assert found[1]["discriminator"] == pytest.approx(found[0]["discriminator"], rel=0.05)


_WORKER = """
import sys, torch
import torch.distributed as dist
from pathlib import Path
from models.cryogem.bank import load_bank
from models.cryogem.training import train_cryogem
from models.workers import Workers
sys.path.insert(0, {tests!r})
import test_cryogem_training as t
torch.set_num_threads(1)
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + {store!r}, rank=rank, world_size=2)
bank = load_bank(Path({bank!r}))
train_cryogem(bank, t.SETTINGS, Path({out!r}), workers=Workers.of_process_group(torch.device("cpu")))
"""


def test_two_workers_bring_a_pair_each_to_every_update(tmp_path):
    bank, out = make_bank(), tmp_path / "out"
    save_bank(tmp_path / "bank.safetensors", bank)
    script = _WORKER.format(
        tests=str(Path(__file__).parent),
        store=str(tmp_path / "store"),
        bank=str(tmp_path / "bank.safetensors"),
        out=str(out),
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    both = [
        subprocess.Popen([sys.executable, "-c", script, str(rank)], cwd=_ROOT, env=environment)
        for rank in (0, 1)
    ]
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    rows = read_rows(out / "losses.csv")
    assert [int(r["step"]) for r in rows] == [0, 2, 4, 6]
    assert len(read_rows(out / "validation.csv")) == 2
    assert load_checkpoint(out / "checkpoint.safetensors").metadata["next_step"] == 8
    # Before anything is learned, the losses are means of those that each pair has alone.
    source = PairSource(build_physics(bank, SETTINGS.physics), SETTINGS.training)
    alone = []
    for step in (0, 1):
        trainer = CryogemTrainer(SETTINGS)
        pair = source.pair(step)
        alone.append(trainer.step(pair, trainer.draw_places(pair.mask, step)))
    for name in ("discriminator", "nce"):
        mean = (alone[0][name] + alone[1][name]) / 2
        assert float(rows[0][name]) == pytest.approx(mean, rel=1e-5)
        assert alone[0][name] != pytest.approx(alone[1][name], rel=1e-3)


def test_workers_share_the_frames_evenly(tmp_path):
    with pytest.raises(ValueError, match="n_simulated: 2, must be a multiple of the 3 workers"):
        train_cryogem(make_bank(), SETTINGS, tmp_path, workers=Workers(size=3))


_KILLED = """
import sys, torch
from pathlib import Path
from models.cryogem.bank import load_bank
from models.cryogem.training import train_cryogem
sys.path.insert(0, {tests!r})
import test_cryogem_training as t
def announce(row):
    Path({mark!r}).write_text(str(int(row["step"])))
    if row["step"] == 4: import time; time.sleep(60)
train_cryogem(load_bank(Path({bank!r})), t.SETTINGS, Path({out!r}), on_progress=announce)
"""


def test_a_killed_training_goes_on_with_the_same_losses(tmp_path):
    bank = make_bank()
    save_bank(tmp_path / "bank.safetensors", bank)
    mark, killed = tmp_path / "mark", tmp_path / "killed"
    script = _KILLED.format(
        tests=str(Path(__file__).parent),
        mark=str(mark),
        bank=str(tmp_path / "bank.safetensors"),
        out=str(killed),
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=_ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    deadline = time.monotonic() + 120
    while not (mark.is_file() and mark.read_text() == "4"):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=30)
    # step 4 is in the losses but not in the checkpoint of step 4 (steps 0 … 3)
    assert len(read_rows(killed / "losses.csv")) == 5
    train_cryogem(bank, SETTINGS, killed)
    train_cryogem(bank, SETTINGS, tmp_path / "undisturbed")
    for name in ("losses.csv", "validation.csv"):
        assert (killed / name).read_text() == (tmp_path / "undisturbed" / name).read_text()
    a, b = (
        load_generator(f / "generator.safetensors")[0].state_dict()
        for f in (killed, tmp_path / "undisturbed")
    )
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_finished_training_is_not_trained_again(tmp_path):
    first = train_cryogem(make_bank(), SETTINGS, tmp_path)
    again = train_cryogem(make_bank(), SETTINGS, tmp_path)
    assert again.sha256 == first.sha256
    assert len(read_rows(tmp_path / "losses.csv")) == 8


def test_another_configuration_does_not_go_on_in_the_same_folder(tmp_path):
    train_cryogem(make_bank(), SETTINGS, tmp_path)
    with pytest.raises(ValueError, match=r"training\.seed 0 → 5"):
        train_cryogem(make_bank(), changed(seed=5), tmp_path)


def test_a_checkpoint_from_before_a_setting_goes_on_with_its_default(tmp_path):
    train_cryogem(make_bank(), SETTINGS, tmp_path)
    path = tmp_path / "checkpoint.safetensors"
    loaded = load_checkpoint(path)
    metadata = dict(loaded.metadata)
    del metadata["settings"]["networks"]["output"]
    del metadata["cpu_s"]
    save_checkpoint(path, loaded.tensors, metadata)
    assert train_cryogem(make_bank(), SETTINGS, tmp_path).step > 0
    other = dataclasses.replace(SETTINGS, networks=dataclasses.replace(SETTINGS.networks, output="change"))
    with pytest.raises(ValueError, match=r"networks\.output 'image' → 'change'"):
        train_cryogem(make_bank(), other, tmp_path)


def test_a_generator_that_gives_a_change_begins_as_the_identity_and_leaves_it():
    networks = dataclasses.replace(SETTINGS.networks, output="change")
    settings = dataclasses.replace(SETTINGS, networks=networks)
    trainer = CryogemTrainer(settings)
    source = PairSource(build_physics(make_bank(), PhysicsSettings()), settings.training)
    pair = source.pair(0)
    assert torch.equal(translate(trainer.generator, pair.source[0, 0]), pair.source[0, 0].clamp(-1.0, 1.0))
    trainer.step(pair, trainer.draw_places(pair.mask, 0))
    moved = translate(trainer.generator, pair.source[0, 0]) - pair.source[0, 0]
    assert float(moved.abs().max()) > 1e-4
    assert not torch.equal(
        translate(CryogemTrainer(SETTINGS).generator, pair.source[0, 0]), pair.source[0, 0]
    )
    with pytest.raises(ValueError, match="output: 'sum'"):
        NetworkSettings(output="sum")


def test_processor_time_is_counted_over_a_stop(tmp_path):
    first = train_cryogem(make_bank(), SETTINGS, tmp_path)
    again = train_cryogem(make_bank(), SETTINGS, tmp_path)
    assert first.cpu_s > 0.05
    assert again.cpu_s >= 0.9 * first.cpu_s


def test_a_checkpoint_cut_short_is_an_error_that_names_it(tmp_path):
    train_cryogem(make_bank(), SETTINGS, tmp_path)
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors: not a whole"):
        train_cryogem(make_bank(), SETTINGS, tmp_path)


def test_one_micrograph_is_too_few(tmp_path):
    with pytest.raises(ValueError, match="micrographs: 1, training needs two"):
        train_cryogem(make_bank(n_micrographs=1), SETTINGS, tmp_path)


def test_crops_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ValueError, match="crop_px: 72, must be a multiple"):
        train_cryogem(make_bank(), changed(crop_px=72), tmp_path)
    with pytest.raises(ValueError, match="crop_px: 96, must not exceed"):
        train_cryogem(make_bank(), changed(crop_px=96), tmp_path)


def test_frames_without_particles_are_skipped_and_an_empty_set_is_refused():
    stage = build_physics(make_bank(), SETTINGS.physics)
    source = PairSource(stage, SETTINGS.training)
    source._frames[0] = None  # a frame of which every draw was empty
    assert bool(source.pair(0).mask.any())
    source._frames = {0: None, 1: None}
    with pytest.raises(ValueError, match="none has particles"):
        source.pair(0)


def test_a_crop_without_particles_trains_without_the_contrastive_term():
    trainer = CryogemTrainer(SETTINGS)
    source = PairSource(build_physics(make_bank(), SETTINGS.physics), SETTINGS.training)
    pair = source.pair(0)
    empty = torch.zeros_like(pair.mask)
    assert trainer.draw_places(empty, 0) is None
    losses = trainer.step(pair, None)
    assert np.isnan(losses["nce"])
    assert np.isfinite(losses["generator"])
