"""Trainings as jobs: particle files in, one document out; wrong input is named; several workers train as one does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import yaml

from actors.jobs.cryo_ief import read_job
from actors.jobs.cryoranker import read_job as read_ranker_job
from actors.jobs.curves import METRICS_FILE, TENSORBOARD_FOLDER, TrainingCurves
from actors.jobs.launch import run_training
from actors.jobs.particle_data import DatasetSettings, DataSettings, build_image_sets, read_grey_levels
from models.cryo_ief.config import vit_config
from models.cryo_ief.image_sets import ImageCollection
from models.cryo_ief.layouts import Layout, load_model
from models.cryo_ief.preprocess import to_grey_levels
from models.weights import load_checkpoint
from stream.ingest.particle_sets import read_particle_table
from stream.records.errors import ConfigurationError, InputError

_ROOT = Path(__file__).parents[2]
MODEL = vit_config("nano", input_size_px=16, patch_size_px=8)
HEADER = """data_particles

loop_
_rlnImageName #1
"""


def write_stack(path, images):
    path.parent.mkdir(parents=True, exist_ok=True)
    with mrcfile.new(path) as stack:
        stack.set_data(images.astype(np.float32))
        stack.set_image_stack()
        stack.voxel_size = 1.5


def images_of(seed, n=12, size=20):
    return np.random.default_rng(seed).normal(size=(n, size, size)).astype(np.float32)


def write_star(path, rows):
    path.write_text(HEADER + "".join(f"{index + 1:06d}@{name}\n" for name, index in rows))


def configuration(tmp_path, **changes):
    write_stack(tmp_path / "data" / "a.mrcs", images_of(0, 24))
    values = {
        "size": "nano",
        "model": {"input_size_px": 16, "patch_size_px": 8, "width": 24, "n_heads": 3, "depth": 1},
        "moco": {"hidden": 16, "dim": 8},
        "datasets": [{"particles": str(tmp_path / "data" / "a.mrcs")}],
        "cache": str(tmp_path / "cache"),
        "n_epochs": 2,
        "batch_size": 8,
        "base_learning_rate": 0.01,
        "warm_up_epochs": 1,
        "report_every": 2,
        "checkpoint_every": 2,
        **changes,
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_training_from_a_particle_file_leaves_checkpoint_curves_and_metrics(tmp_path):
    out = tmp_path / "out"
    points = []
    document = run_training(read_job(configuration(tmp_path)), out, on_progress=points.append)
    loaded = load_checkpoint(Path(document["checkpoint"]))
    assert load_model(loaded.tensors, loaded.metadata["model"]).layout is Layout.CRYO_IEF_MOCO
    assert loaded.sha256 == document["sha256"]
    assert (document["n_steps"], document["n_images"], len(points)) == (6, 24, 3)
    text = (out / METRICS_FILE).read_text()
    assert 'icestream_training_step{model="cryo_ief"} 6.0' in text
    assert f'icestream_training_loss{{model="cryo_ief"}} {points[-1]["loss"]}' in text
    assert scalars(out)["loss"] == [(p["step"], pytest.approx(p["loss"], rel=1e-6)) for p in points]


def scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / TENSORBOARD_FOLDER))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_what_a_killed_run_reported_twice_is_in_the_curve_once(tmp_path):
    with TrainingCurves(tmp_path, "cryo_ief") as curves:
        for step in (2, 4, 6):
            curves.report({"step": step, "loss": 1.0})
    with TrainingCurves(tmp_path, "cryo_ief") as curves:
        for step in (4, 6, 8):
            curves.report({"step": step, "loss": 2.0})
    assert scalars(tmp_path)["loss"] == [(2, 1.0), (4, 2.0), (6, 2.0), (8, 2.0)]


def test_subsets_of_several_jobs_with_equal_file_names_are_read_by_address(tmp_path):
    stacks = {name: images_of(seed) for seed, name in enumerate(("job1/a.mrcs", "job2/a.mrcs"))}
    for name, images in stacks.items():
        write_stack(tmp_path / name, images)
    # Interleaved, out of order, and half of each stack.
    rows = [(name, index) for index in (7, 2, 11, 0, 5, 4) for name in ("job2/a.mrcs", "job1/a.mrcs")]
    write_star(tmp_path / "p.star", rows)
    data = DataSettings(
        datasets=(DatasetSettings(particles=str(tmp_path / "p.star")),), cache=str(tmp_path / "cache")
    )
    expected = to_grey_levels(np.stack([stacks[name][i] for name, i in rows]), 16, is_exact=False)
    for _ in range(2):  # made, then found in the cache
        (found,) = build_image_sets(data, MODEL)
        np.testing.assert_array_equal(found.read(np.arange(12)), expected)
        np.testing.assert_array_equal(found.read(np.array([9, 0])), expected[[9, 0]])
    assert (found.mean, found.std) == pytest.approx(((expected / 255).mean(), (expected / 255).std()))


def test_the_cache_follows_the_stacks_and_the_preprocessing(tmp_path):
    path = tmp_path / "a.mrcs"
    write_stack(path, images_of(0))
    settings = DatasetSettings(particles=str(path))
    data = DataSettings(datasets=(settings,), cache=str(tmp_path / "cache"))
    first = build_image_sets(data, MODEL)[0].read(np.arange(12))
    path.unlink()
    images = images_of(1)
    images[3, 0, 0] = 1000.0
    write_stack(path, images)
    os.utime(path, ns=(1, 1))
    second = build_image_sets(data, MODEL)[0].read(np.arange(12))
    guarded = build_image_sets(
        DataSettings(datasets=(settings,), cache=data.cache, outlier_sigmas=20.0), MODEL
    )[0].read(np.arange(12))
    assert (first != second).any()
    spread = [np.ptp(np.quantile(grey[3], (0.1, 0.9))) for grey in (second, guarded)]
    assert spread[0] < 5 < 50 < spread[1]
    np.testing.assert_array_equal(np.delete(second, 3, axis=0), np.delete(guarded, 3, axis=0))
    assert len(list((tmp_path / "cache").iterdir())) == 3


def test_dark_particles_are_inverted(tmp_path):
    images = images_of(0, 4)
    write_stack(tmp_path / "dark.mrcs", -images)
    fields = [
        ("uid", "u8"),
        ("blob/path", "S20"),
        ("blob/idx", "u4"),
        ("blob/psize_A", "f4"),
        ("blob/sign", "f4"),
    ]
    rows = np.zeros(4, fields)
    rows["uid"] = np.arange(1, 5)
    rows["blob/path"] = b"dark.mrcs"
    rows["blob/idx"] = np.arange(4)
    rows["blob/sign"] = -1
    with (tmp_path / "dark.cs").open("wb") as stream:
        np.save(stream, rows)
    table = read_particle_table(tmp_path / "dark.cs", require_ctf=False)
    found = read_grey_levels(table, np.array([2, 0]), MODEL)
    np.testing.assert_array_equal(found, to_grey_levels(images[[2, 0]], 16, is_exact=False))


def test_a_star_without_images_is_named(tmp_path):
    (tmp_path / "p.star").write_text("data_particles\n\nloop_\n_rlnMicrographName #1\nmic1.mrc\nmic2.mrc\n")
    path = configuration(tmp_path, datasets=[{"particles": str(tmp_path / "p.star")}])
    with pytest.raises(InputError, match=r"p\.star.*rlnImageName"):
        run_training(read_job(path), tmp_path / "out")


def test_a_truncated_stack_is_named(tmp_path):
    path = configuration(tmp_path)
    stack = tmp_path / "data" / "a.mrcs"
    stack.write_bytes(stack.read_bytes()[:-500])
    with pytest.raises(InputError, match=r"a\.mrcs"):
        run_training(read_job(path), tmp_path / "out")


def test_a_set_of_a_single_image_is_refused(tmp_path):
    write_stack(tmp_path / "one.mrcs", images_of(0, 1))
    path = configuration(tmp_path, datasets=[{"particles": str(tmp_path / "one.mrcs")}])
    with pytest.raises(InputError, match=r"one\.mrcs: a data set has at least two particles \(found: 1\)"):
        run_training(read_job(path), tmp_path / "out")


def test_a_batch_larger_than_the_data_is_refused(tmp_path):
    path = configuration(tmp_path, batch_size=64)
    with pytest.raises(ConfigurationError, match=r"batch_size: 64, must not be larger than the data \(24"):
        run_training(read_job(path), tmp_path / "out")


def test_particles_without_contrast_are_refused(tmp_path):
    write_stack(tmp_path / "flat.mrcs", np.full((12, 20, 20), 3.0))
    path = configuration(tmp_path, datasets=[{"particles": str(tmp_path / "flat.mrcs"), "name": "flat"}])
    with pytest.raises(ConfigurationError, match="flat: standard deviation"):
        run_training(read_job(path), tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bach_size": 3}, "unknown key bach_size, did you mean batch_size?"),
        ({"datasets": [{"partcles": "x"}]}, "unknown key datasets.0.partcles, did you mean particles?"),
        ({"datasets": [{}]}, "either particles (a file) or simulated"),
        ({"datasets": []}, "datasets has at least one entry"),
        ({"workers": 3}, "batch_size: 8, must be a multiple of the 3 workers"),
        ({"workers": 0}, "workers, cpus_per_worker: 0, 1, must be 1 or more"),
        ({"model": {"widht": 3}}, "widht"),
    ],
)
def test_a_wrong_configuration_names_file_key_and_rule(tmp_path, changes, message):
    with pytest.raises(ConfigurationError) as caught:
        read_job(configuration(tmp_path, **changes))
    assert message in str(caught.value)
    assert "config.yaml" in str(caught.value)


def test_a_file_that_is_no_configuration_is_named(tmp_path):
    (tmp_path / "list.yaml").write_text("- 1\n")
    for name in ("list.yaml", "missing.yaml"):
        for read in (read_job, read_ranker_job):
            with pytest.raises(ConfigurationError, match=name):
                read(tmp_path / name)


def test_a_rankers_unknown_key_is_named(tmp_path):
    (tmp_path / "r.yaml").write_text("data: {n_phantoms: 3}\n")
    with pytest.raises(ConfigurationError, match=r"unknown key data\.n_phantoms"):
        read_ranker_job(tmp_path / "r.yaml")


def test_the_seed_of_the_command_line_counts(tmp_path):
    path = configuration(tmp_path)
    assert (read_job(path).training.seed, read_job(path, 9).training.seed) == (1, 9)


@pytest.mark.ray
def test_two_workers_train_as_one_does(tmp_path, run_job):
    alone = run_training(read_job(configuration(tmp_path)), tmp_path / "alone")
    path = configuration(tmp_path / "two", workers=2)
    document = run_job("cryo_ief", path, tmp_path / "shared")
    assert document["n_steps"] == alone["n_steps"]
    curves = [json.loads((tmp_path / name / "curve.json").read_text()) for name in ("alone", "shared")]
    # The same losses up to the order of sums, which AdamW's first steps magnify.
    for one, two in zip(*curves, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=2e-3)
    loaded = load_checkpoint(Path(document["checkpoint"]))
    assert load_model(loaded.tensors, loaded.metadata["model"]).layout is Layout.CRYO_IEF_MOCO
    assert (tmp_path / "shared" / METRICS_FILE).is_file()


_DYING_ONCE = """
import json, os, signal, sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from actors.jobs.cryo_ief import read_job
from actors.jobs.launch import run_training

@dataclass(frozen=True)
class DyingOnce:
    job: Any
    died: Path

    @property
    def model_name(self):
        return self.job.model_name

    @property
    def resources(self):
        return self.job.resources

    def train(self, folder, workers, on_progress):
        def report(point):
            on_progress(point)
            if workers.is_first and point["step"] >= 4 and not self.died.exists():
                self.died.touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return self.job.train(folder, workers, report)

config, out, died = map(Path, sys.argv[1:])
print(json.dumps(run_training(DyingOnce(read_job(config), died), out)))
"""


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_group_whose_worker_is_killed_is_started_again_and_goes_on_from_its_state(tmp_path):
    path = configuration(tmp_path, workers=2, n_epochs=3)
    alone = run_training(read_job(configuration(tmp_path / "one", n_epochs=3)), tmp_path / "alone")
    out, died = tmp_path / "shared", tmp_path / "died"
    finished = subprocess.run(
        [sys.executable, "-c", _DYING_ONCE, str(path), str(out), str(died)],
        cwd=_ROOT,
        env={k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"},
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert died.exists()
    assert json.loads(finished.stdout.splitlines()[-1])["n_steps"] == alone["n_steps"] == 9
    curves = [json.loads((folder / "curve.json").read_text()) for folder in (tmp_path / "alone", out)]
    assert [point["step"] for point in curves[1]] == [point["step"] for point in curves[0]]
    for one, two in zip(*curves, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=2e-3)
    # What was reported twice, before the kill and after it, is in TensorBoard's curve once.
    steps = [step for step, _ in scalars(out)["loss"]]
    assert steps == sorted(set(steps))
    assert 'icestream_training_step{model="cryo_ief"} 9.0' in (out / METRICS_FILE).read_text()


def test_sets_of_different_kinds_make_one_collection(tmp_path):
    write_stack(tmp_path / "a.mrcs", images_of(0))
    simulated = {"n_phantoms": 1, "fields_per_structure": 2, "first_seed": 7}
    job = read_job(
        configuration(
            tmp_path,
            datasets=[{"particles": str(tmp_path / "a.mrcs")}, {"simulated": simulated, "name": "sim"}],
        )
    )
    sets = build_image_sets(job.data, MODEL)
    assert [each.name for each in sets] == ["a", "sim"]
    assert ImageCollection(sets).read(np.array([0, 12])).shape == (2, 16, 16)
