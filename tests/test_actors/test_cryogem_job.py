"""A session folder becomes a bank, a training, and annotated micrographs."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from actors.cryogem.config import GenerateConfig, SourceConfig, read_generate_config, read_train_config
from actors.cryogem.generation import generate_micrographs
from actors.cryogem.session_bank import read_session_bank
from actors.jobs.cryogem import prepare_bank, read_job
from models.cryogem.bank import load_bank
from models.cryogem.physics import image_specimen
from models.cryogem.translation import load_generator
from models.fourier.rotations import euler_to_matrix
from models.simulation.imaging import CtfTruth
from models.simulation.projection import Projector
from models.workers import Workers
from stream.records.errors import ConfigurationError, InputError
from stream.sinks.mrc_images import write_micrograph
from stream.sinks.relion_star import read_micrographs_star, read_particles_star, write_picks_star
from stream.store.layout import OutputLayout

_ROOT = Path(__file__).parents[2]
NETWORKS = {
    "depth": 4,
    "generator_filters": 4,
    "discriminator_filters": 4,
    "discriminator_layers": 2,
    "nce_levels": [1, 2, 3],
    "head_width": 16,
}
TRAINING = {
    "n_simulated": 2,
    "crop_px": 64,
    "constant_epochs": 1,
    "decay_epochs": 1,
    "n_queries": 16,
    "checkpoint_every": 2,
    "validate_every": 4,
    "n_validated": 1,
    "device": "cpu",
}


def write_config(folder: Path, session: Path, **changes) -> Path:
    document = {
        "source": {"session": str(session), "short_side_px": 128},
        "networks": NETWORKS,
        "training": TRAINING,
    }
    for key, value in changes.items():
        document[key] = {**document.get(key, {}), **value} if isinstance(value, dict) else value
    path = folder / "cryogem.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


@pytest.fixture(scope="module")
def session(virtual_session) -> Path:
    return virtual_session


@pytest.fixture(scope="module")
def trained(session, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("training")
    points = []
    document = read_job(write_config(folder, session), None).train(folder / "out", Workers(), points.append)
    assert document["metrics"]["n_steps"] == 4
    assert points
    return folder / "out"


def copied(session: Path, tmp_path: Path) -> OutputLayout:
    shutil.copytree(session, tmp_path / "session")
    return OutputLayout(tmp_path / "session")


def source(layout: OutputLayout, **changes) -> SourceConfig:
    return SourceConfig(session=layout.root, **{"short_side_px": 128, **changes})


def test_a_session_fills_in_everything(session):
    bank = read_session_bank(source(OutputLayout(session)))
    facts = bank.facts
    assert bank.shape_yx == (128, 170)
    assert facts.pixel_size_angstrom == pytest.approx(9.0)
    assert facts.micrograph_pixel_size_angstrom == pytest.approx(6.0)
    assert facts.microscope.voltage_kv == 300.0
    assert len(bank.training_micrographs) == 3
    assert len(bank.held_out_micrographs) == 1
    assert 5 < facts.counts.mean < 25
    assert facts.spacing_px * 9.0 > 0.3 * facts.diameter_angstrom
    assert facts.skipped == {}
    assert facts.sources == (str(session / "runs" / "run-truth" / "map.mrc"),)
    levels = bank.micrographs.float()
    assert float(levels.mean()) == pytest.approx(150, abs=1.5)
    defocus = bank.ctfs[:, :2].mean(1)
    assert bool(((defocus > 14_800) & (defocus < 28_200)).all())


def test_what_cannot_be_used_is_skipped_and_counted(session, tmp_path):
    layout = copied(session, tmp_path)
    names = sorted(p.stem for p in (layout.root / "micrographs").glob("*.mrc"))
    whole = np.random.default_rng(2).normal(size=(192, 256)).astype(np.float32)
    extra = {
        "nan": whole,
        "flat": np.full((192, 256), 3.0, np.float32),
        "small": np.random.default_rng(1).normal(size=(64, 64)).astype(np.float32),
        "noctf": whole,
        "nopicks": whole,
        "norings": whole,
    }
    for name, image in extra.items():
        write_micrograph(layout.micrograph(name), image, 6.0)
        shutil.copy(layout.ctf_values(names[0]), layout.ctf_values(name))
        shutil.copy(layout.picks(names[0]), layout.picks(name))
    with mrcfile.mmap(layout.micrograph("nan"), mode="r+") as handle:
        handle.data[4, 5] = np.nan
    layout.ctf_values("noctf").unlink()
    write_picks_star(layout.picks("nopicks"), np.empty((0, 2)), np.empty(0))
    values = json.loads(layout.ctf_values("norings").read_text())
    layout.ctf_values("norings").write_text(json.dumps({**values, "ctf_is_reliable": False}))
    bank = read_session_bank(source(layout))
    assert sorted(bank.facts.names) == names
    assert bank.facts.skipped == {
        "no CTF": 1,
        "no picks": 1,
        "unreliable CTF": 1,
        "another shape or pixel size": 1,
        "not a finite, varied image": 2,
    }


def test_one_usable_micrograph_is_too_few(session, tmp_path):
    layout = copied(session, tmp_path)
    for path in sorted((layout.root / "micrographs").glob("*.mrc"))[1:]:
        path.unlink()
    with pytest.raises(InputError, match="at least 2 micrographs"):
        read_session_bank(source(layout))


def test_contradicting_scales_are_refused_with_both_names(session, tmp_path):
    layout = copied(session, tmp_path)
    path = layout.root / "runs" / "run-truth" / "map.mrc"
    with mrcfile.open(path, mode="r+") as handle:
        handle.voxel_size = 3.0 * float(handle.voxel_size.x)
    with pytest.raises(
        InputError, match=r"map\.mrc: map and micrograph have one scale.*virtual_000\d\.mrc has 6\.000"
    ):
        read_session_bank(source(layout))


def test_a_micrograph_and_its_ctf_with_other_pixel_sizes_are_refused(session, tmp_path):
    layout = copied(session, tmp_path)
    path = next((layout.root / "ctf").glob("*.json"))
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "pixel_size_angstrom": 1.5}))
    with pytest.raises(
        InputError, match=rf"{path.stem}\.mrc: .*{path.name} \(found: 6\.0000 Å and 1\.5000 Å\)"
    ):
        read_session_bank(source(layout))


def test_a_session_without_a_map_says_so(session, tmp_path):
    layout = copied(session, tmp_path)
    shutil.rmtree(layout.root / "runs")
    with pytest.raises(InputError, match=r"source\.maps names one"):
        read_session_bank(source(layout))


def test_a_runs_mask_is_applied_and_must_fit(session, tmp_path):
    layout = copied(session, tmp_path)
    path = layout.root / "runs" / "run-truth" / "map.mrc"
    with mrcfile.open(path) as handle:
        size, pixel = handle.data.shape[0], float(handle.voxel_size.x)
    x = np.arange(size) - size // 2
    ball = (x[:, None, None] ** 2 + x[:, None] ** 2 + x**2 < (0.3 * size) ** 2).astype(np.float32)
    for shape, is_good in ((ball, True), (ball[:-2, :-2, :-2], False)):
        with mrcfile.new(path.with_name("mask.mrc"), shape, overwrite=True) as handle:
            handle.voxel_size = pixel
        if is_good:
            inside = read_session_bank(source(layout))
            whole = read_session_bank(source(OutputLayout(session)))
            assert inside.facts.diameter_angstrom < 0.9 * whole.facts.diameter_angstrom
            continue
        with pytest.raises(InputError, match=r"map\.mrc: a map and its mask mask\.mrc have one shape"):
            read_session_bank(source(layout))


def test_several_maps_are_conformations_of_one_box(session, tmp_path):
    layout = copied(session, tmp_path)
    first = layout.root / "runs" / "run-truth" / "map.mrc"
    bank = read_session_bank(source(layout, maps=(first, first), symmetry="c3"))
    assert len(bank.volumes) == 2
    assert bank.facts.symmetry == "C3"


def test_the_bank_is_read_once(session, tmp_path):
    layout = copied(session, tmp_path)
    config = read_train_config(write_config(tmp_path, layout.root))
    first = prepare_bank(config, tmp_path / "out")
    shutil.rmtree(layout.root)
    again = prepare_bank(config, tmp_path / "out")
    assert torch.equal(first.micrographs, again.micrographs)
    assert first.facts == again.facts
    changed = write_config(tmp_path, layout.root, source={"n_micrographs": 3})
    with pytest.raises(ConfigurationError, match="take another folder"):
        prepare_bank(read_train_config(changed), tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trainign": {}}, "unknown key trainign, did you mean training"),
        ({"training": {"sede": 3}}, "unknown key training.sede, did you mean training.seed"),
        ({"training": {"n_simulated": "many"}}, "training.n_simulated: Input should be a valid integer"),
        ({"physics": {"snr": -1.0}}, "snr: -1.0, must be over 0"),
        ({"source": {"session": None}}, "source.session"),
        ({"source": {"n_micrographs": 1}}, "n_micrographs: 1, must be 2 or more"),
        ({"source": {"held_out_fraction": 1.0}}, "held_out_fraction: 1.0"),
        ({"cpus": 0}, "cpus: 0, must be 1 or more"),
    ],
)
def test_wrong_configurations_name_the_key(session, tmp_path, change, message):
    with pytest.raises(ConfigurationError) as caught:
        read_train_config(write_config(tmp_path, session, **change))
    assert message in str(caught.value)
    assert "cryogem.yaml" in str(caught.value)


def generate(trained: Path, out: Path, **changes):
    return generate_micrographs(
        GenerateConfig(training=trained, out=out, **{"n_micrographs": 3, "seed": 5, **changes})
    )


@pytest.fixture(scope="module")
def generated(trained, tmp_path_factory):
    out = tmp_path_factory.mktemp("generated")
    return generate(trained, out), out


def test_annotations_agree_with_each_other(generated, trained):
    result, out = generated
    bank = load_bank(trained / "bank.safetensors")
    star = read_particles_star(out / "particles.star")
    table = star.particles
    assert result.n_particles == len(table) > 10
    assert float(star.optics["rlnImagePixelSize"].iloc[0]) == pytest.approx(9.0)
    assert len(read_micrographs_star(out / "micrographs.star").particles) == 3
    with (out / "poses.pkl").open("rb") as stream:
        rotations, shifts = pickle.load(stream)
    angles = table[["rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"]].to_numpy(copy=True)
    assert np.abs(euler_to_matrix(torch.from_numpy(angles)).numpy() - rotations).max() < 1e-5
    assert shifts.shape == (len(table), 2)
    with (out / "ctf.pkl").open("rb") as stream:
        ctf = pickle.load(stream)
    assert np.allclose(ctf[:, 2], table["rlnDefocusU"], atol=0.01)
    topaz = (out / "topaz.txt").read_text().splitlines()
    assert topaz[0].split("\t") == ["image_name", "x_coord", "y_coord"]
    assert len(topaz) == len(table) + 1
    assert topaz[1].split("\t")[0] == "synthetic_000000"
    assert set(table["icestreamBorder"]) <= {0, 1}
    assert result.n_border == int(table["icestreamBorder"].sum())
    for name, rows in table.groupby("rlnMicrographName"):
        with mrcfile.open(out / name) as handle:
            assert handle.data.shape == bank.shape_yx
            assert float(handle.voxel_size.x) == pytest.approx(9.0, abs=1e-4)
            # grey values of the session's scale
            assert float(handle.data.mean()) == pytest.approx(
                bank.facts.greys.mean, abs=3 * bank.facts.greys.sd
            )
        mask = np.asarray(Image.open(out / "masks" / f"{Path(name).stem}.png"))
        y, x = rows["rlnCoordinateY"].to_numpy(), rows["rlnCoordinateX"].to_numpy()
        assert (mask[y.round().astype(int), x.round().astype(int)] == 255).mean() > 0.9
        with mrcfile.open(out / "particles" / f"{Path(name).stem}.mrcs") as handle:
            assert len(handle.data) == len(rows)


def test_noise_free_particles_are_what_their_annotations_say(trained, tmp_path):
    """Pose, CTF, place and sign of the STAR file predict each image of the stack."""
    path = tmp_path / "generate.yaml"
    document = {
        "training": str(trained),
        "out": "made",
        "n_micrographs": 2,
        "noise": "none",
        "controls": {"ice": "even"},
    }
    path.write_text(yaml.safe_dump(document))
    generate_micrographs(read_generate_config(path))
    table = read_particles_star(tmp_path / "made" / "particles.star").particles
    alone = table[(table["icestreamBorder"] == 0) & (table["icestreamOverlap"] == 0)]
    bank = load_bank(trained / "bank.safetensors")
    projector = Projector(bank.volumes[0], bank.facts.pixel_size_angstrom)
    found = []
    for _, row in alone.iterrows():
        euler = torch.tensor(
            [[row["rlnAngleRot"], row["rlnAngleTilt"], row["rlnAnglePsi"]]], dtype=torch.float64
        )
        projection = projector.project(euler_to_matrix(euler).float())[0]
        ctf = CtfTruth(
            defocus_u_angstrom=row["rlnDefocusU"],
            defocus_v_angstrom=row["rlnDefocusV"],
            astigmatism_angle_deg=row["rlnDefocusAngle"],
            phase_shift_deg=row["rlnPhaseShift"],
        )
        wide = torch.nn.functional.pad(projection, (40, 40, 40, 40))
        seen = -image_specimen(wide, ctf, bank.facts.microscope, bank.facts.pixel_size_angstrom)
        index, stack = row["rlnImageName"].split("@")
        with mrcfile.open(tmp_path / "made" / stack) as handle:
            image = np.array(handle.data[int(index) - 1])
        half, middle = image.shape[0] // 2, seen.shape[0] // 2
        expected = seen[middle - half : middle + half, middle - half : middle + half].numpy()
        found.append(np.corrcoef(image[4:-4, 4:-4].ravel(), expected[4:-4, 4:-4].ravel())[0, 1])
    assert len(found) >= 5
    assert np.median(found) > 0.9


def test_a_micrograph_does_not_depend_on_the_others(trained, generated, tmp_path):
    generate(trained, tmp_path, n_micrographs=1)
    for name in (
        "micrographs/synthetic_000000.mrc",
        "particles/synthetic_000000.mrcs",
        "masks/synthetic_000000.png",
    ):
        assert (tmp_path / name).read_bytes() == (generated[1] / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("noise", ["cryogem", "poisson_gaussian"])
def test_same_seed_same_bytes_for_any_number_of_workers(trained, tmp_path, noise):
    generate(trained, tmp_path / "one", noise=noise, workers=1)
    generate(trained, tmp_path / "two", noise=noise, workers=2)
    files = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*") if p.is_file())
    assert len(files) == 3 * 4 + 6
    for path in files:
        if path.name != "summary.json":
            assert (tmp_path / "one" / path).read_bytes() == (tmp_path / "two" / path).read_bytes(), path


def test_another_seed_gives_other_micrographs(trained, generated, tmp_path):
    generate(trained, tmp_path, seed=6, n_micrographs=1)
    name = Path("micrographs/synthetic_000000.mrc")
    assert (tmp_path / name).read_bytes() != (generated[1] / name).read_bytes()


def test_controls_are_what_the_annotations_say(trained, tmp_path):
    write_picks_star(tmp_path / "wanted.star", np.array([[30.5, 40.25], [100.0, 120.0]]), np.ones(2))
    path = tmp_path / "generate.yaml"
    document = {
        "training": str(trained),
        "out": "made",
        "n_micrographs": 2,
        "noise": "gaussian",
        "controls": {
            "positions": "wanted.star",
            "poses": [[10.0, 20.0, 30.0]],
            "defocus_angstrom": [9000, 21000],
            "conformation": 0,
            "ice": "even",
        },
    }
    path.write_text(yaml.safe_dump(document))
    generate_micrographs(read_generate_config(path))
    table = read_particles_star(tmp_path / "made" / "particles.star").particles
    assert table[["rlnCoordinateY", "rlnCoordinateX"]].to_numpy()[:2].tolist() == [
        [30.5, 40.25],
        [100.0, 120.0],
    ]
    assert np.allclose(table[["rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"]], [10.0, 20.0, 30.0], atol=1e-3)
    mean = 0.5 * (table["rlnDefocusU"] + table["rlnDefocusV"])
    assert mean.round().tolist() == [9000, 9000, 21000, 21000]
    assert (
        read_micrographs_star(tmp_path / "made" / "micrographs.star").particles["icestreamIceMap"] == -1
    ).all()


@pytest.mark.parametrize(
    ("controls", "message"),
    [
        ({"conformation": 3}, "controls.conformation"),
        ({"ice": 99}, "controls.ice"),
        ({"defocus_angstrom": [-1.0]}, "over 0"),
    ],
)
def test_controls_out_of_range_are_refused(trained, tmp_path, controls, message):
    path = tmp_path / "generate.yaml"
    path.write_text(yaml.safe_dump({"training": str(trained), "out": "made", "controls": controls}))
    with pytest.raises(ConfigurationError, match=message):
        generate_micrographs(read_generate_config(path))


def test_positions_outside_the_frame_are_refused(trained, tmp_path):
    write_picks_star(tmp_path / "wanted.star", np.array([[30.0, 4000.0]]), np.ones(1))
    path = tmp_path / "generate.yaml"
    path.write_text(
        yaml.safe_dump({"training": str(trained), "out": "made", "controls": {"positions": "wanted.star"}})
    )
    with pytest.raises(InputError, match="170 x 128 px"):
        generate_micrographs(read_generate_config(path))


def test_a_folder_without_training_is_refused(tmp_path):
    with pytest.raises(InputError, match="a training folder of CryoGEM"):
        generate(tmp_path, tmp_path / "made")


@pytest.mark.slow
def test_the_job_prints_one_document(session, tmp_path, run_job):
    config = write_config(tmp_path, session)
    document = run_job("cryogem", config, tmp_path / "out")
    assert Path(document["checkpoint"]).is_file()
    assert document["metrics"]["n_steps"] == 4
    assert (tmp_path / "out" / "losses.csv").is_file()


def run_command(*arguments: object) -> dict:
    from typer.testing import CliRunner

    from stream.cli import app

    done = CliRunner().invoke(app, [str(a) for a in arguments])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_the_commands_print_their_contract(trained, tmp_path):
    path = tmp_path / "generate.yaml"
    path.write_text(yaml.safe_dump({"training": str(trained), "out": "made", "n_micrographs": 1}))
    made = run_command("generate", path, "--json")
    assert [Path(p).is_file() for p in made["micrographs"]] == [True]
    assert Path(made["annotations"]).is_file()
    judged = run_command("evaluate", "cryogem", trained, "--panel", tmp_path / "panel.png", "--json")
    formulas = {f"{m}{at}" for m in ("gaussian", "poisson", "poisson_gaussian") for at in ("", " at SNR 0.1")}
    assert set(judged["distances"]) == {
        "real",
        "physics",
        *formulas,
        trained.name,
        f"{trained.name}, untranslated",
    }
    assert judged["content"]["physics"] > judged["content"]["gaussian at SNR 0.1"] > 0.3
    assert judged["distances"]["real"]["spectrum"] < judged["distances"]["physics"]["spectrum"]
    assert Image.open(tmp_path / "panel.png").size == (4 * 128, 128)


def test_trainings_of_other_sessions_are_not_compared(trained, session, tmp_path):
    from actors.cryogem.evaluation import evaluate_trainings

    layout = copied(session, tmp_path)
    layout.micrograph(load_bank(trained / "bank.safetensors").facts.names[-1]).unlink()
    other = tmp_path / "other"
    read_job(write_config(tmp_path, layout.root), None).train(other, Workers(), lambda _point: None)
    with pytest.raises(InputError, match="hold out the same micrographs"):
        evaluate_trainings([trained, other])


def test_train_prints_its_contract_and_goes_on_in_its_folder(session, tmp_path):
    config = write_config(tmp_path, session)
    first = run_command("train", "cryogem", config, "--out", tmp_path / "out", "--seed", 4, "--json")
    assert {"checkpoint", "metrics", "sha256", "skipped_micrographs"} <= set(first)
    assert (tmp_path / "out" / "metrics.prom").is_file()
    again = run_command("train", "cryogem", config, "--out", tmp_path / "out", "--seed", 4, "--json")
    assert again["sha256"] == first["sha256"]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_ray_workers_train_together(session, tmp_path, run_job):
    path = write_config(tmp_path, session, workers=2)
    document = run_job("cryogem", path, tmp_path / "shared")
    assert document["metrics"]["n_steps"] == 4
    losses = (tmp_path / "shared" / "losses.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in losses] == ["step", "0", "2"]
    assert (tmp_path / "shared" / "metrics.prom").is_file()
    assert load_generator(Path(document["checkpoint"]))[1] == read_job(path, None).config.physics


@pytest.mark.parametrize("workers", [0, 3])
def test_workers_that_cannot_share_the_frames_are_refused(session, tmp_path, workers):
    with pytest.raises(ConfigurationError, match="workers"):
        read_job(write_config(tmp_path, session, workers=workers), None)
