"""Fine-tuning a ranker on generated particles: the command trains, judges before and after, and keeps the table."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

from actors.cryogem.virtual_session import VirtualSessionSettings, write_virtual_session
from actors.jobs.cryoranker import read_job, with_synthetic
from actors.jobs.synthetic_effect import EFFECT_FILE, PHANTOMS, SESSION_PICKS, read_picks
from models.cryo_ief.config import Head, vit_config
from models.cryo_ief.vit import CryoVit
from models.weights import save_checkpoint
from stream.cli import app
from stream.records.errors import ConfigurationError, InputError
from stream.records.values import Optics
from stream.sinks.relion_star import make_particle_optics, read_particles_star, write_particles_star

SIZES = {"input_size_px": 32, "patch_size_px": 8, "width": 24, "n_heads": 3, "depth": 1}
MODEL = vit_config("nano", **SIZES, head=Head.SOFTMAX2, mean=0.5, std=0.2)
PIXEL_ANGSTROM = 6.0


def write_session(folder: Path, seed: int) -> Path:
    settings = VirtualSessionSettings(
        n_micrographs=2,
        shape_yx_px=(192, 256),
        pixel_size_angstrom=PIXEL_ANGSTROM,
        structure="phantom:3:mass_kda=300",
        particles_per_micrograph=14.0,
        seed=seed,
    )
    write_virtual_session(folder, settings)
    return folder


@pytest.fixture(scope="module")
def held_out(tmp_path_factory) -> Path:
    return write_session(tmp_path_factory.mktemp("held-out"), 12)


@pytest.fixture(scope="module")
def generated(tmp_path_factory) -> Path:
    """A session's micrographs with their truth, as `icestream generate` leaves its own."""
    folder = write_session(tmp_path_factory.mktemp("generated"), 11)
    table = read_particles_star(folder / "truth/particles.star").particles.drop(columns="rlnOpticsGroup")
    table = table.assign(icestreamBorder=0, icestreamOverlap=0, rlnOpticsGroup=1)
    optics = Optics(voltage_kv=300.0, cs_mm=2.7, amplitude_contrast=0.1)
    write_particles_star(
        folder / "particles.star",
        table,
        make_particle_optics(optics, image_pixel_size_angstrom=PIXEL_ANGSTROM, image_size_px=32),
    )
    diameter = yaml.safe_load((folder / "session.yaml").read_text())["particle"]["diameter_angstrom"]
    summary = {"diameter_angstrom": diameter, "pixel_size_angstrom": PIXEL_ANGSTROM}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


@pytest.fixture
def config(tmp_path) -> Path:
    torch.manual_seed(0)
    save_checkpoint(tmp_path / "ranker.safetensors", CryoVit(MODEL).state_dict(), {"model": MODEL.to_dict()})
    document = {
        "data": {
            "n_train_phantoms": 1,
            "n_validation_phantoms": 1,
            "fields_per_structure": 4,
            "n_shapes": 1,
            "first_seed": 7,
            "cache": str(tmp_path / "cache"),
        },
        "n_steps": 4,
        "batch_size": 8,
        "warm_up_steps": 1,
        "evaluate_every": 4,
        "initial_checkpoint": str(tmp_path / "ranker.safetensors"),
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def test_the_command_prints_and_keeps_the_figures_before_and_after(config, generated, held_out, tmp_path):
    arguments = ["train", "cryoranker", str(config), "--synthetic", str(generated), "--synthetic-part", "0.4"]
    arguments += ["--held-out", str(held_out), "--out", str(tmp_path / "out"), "--json"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    effect = json.loads(done.stdout)["effect"]
    assert effect == json.loads((tmp_path / "out" / EFFECT_FILE).read_text())
    assert effect["synthetic"]["part"] == 0.4
    for name in (SESSION_PICKS, PHANTOMS):
        before, after = effect["sets"][name]["before"], effect["sets"][name]["after"]
        assert before["n_good"] == after["n_good"] >= 3
        assert before["auc"] != after["auc"]


def test_picks_are_labelled_by_the_sessions_truth(held_out):
    picks = read_picks(held_out, MODEL, 1.5)
    assert picks.grey.shape[1:] == (32, 32)
    is_good, is_bad = picks.labels > 0.7, picks.labels <= 0.3
    assert is_good.sum() >= 5
    assert is_bad.sum() >= 5
    middle = picks.grey[:, 12:20, 12:20].astype(float).mean(axis=(1, 2)) - picks.grey.mean(axis=(1, 2))
    assert middle[is_good].mean() > 10.0


def test_a_session_without_truth_or_diameter_is_refused_by_name(held_out, tmp_path):
    (tmp_path / "truth").mkdir()
    (tmp_path / "truth/particles.star").write_bytes((held_out / "truth/particles.star").read_bytes())
    (tmp_path / "session.yaml").write_text("microscope: {voltage_kv: 300}\n")
    with pytest.raises(InputError, match=r"session.yaml.*particle.diameter_angstrom"):
        read_picks(tmp_path, MODEL, 1.5)


def test_options_without_generated_particles_are_a_usage_error(config, held_out, tmp_path):
    done = CliRunner().invoke(app, ["train", "cryoranker", str(config), "--held-out", str(held_out)])
    assert isinstance(done.exception, ConfigurationError)
    assert "--synthetic" in str(done.exception)
    with pytest.raises(ConfigurationError, match=r"part: 1\.5"):
        with_synthetic(read_job(config), tmp_path, part=1.5)


def test_without_a_configuration_the_shipped_one_goes_on_from_the_shipped_ranker(tmp_path):
    from stream.commands.train import _SYNTHETIC_CONFIG

    job = with_synthetic(read_job(_SYNTHETIC_CONFIG), tmp_path, part=0.3)
    assert job.training.initial_checkpoint == "default"
    assert job.training.synthetic is not None
    assert job.training.synthetic.part == 0.3
    assert np.isclose(job.training.synthetic.box_per_diameter, 1.5)
