"""The embedded engine from files to files: results, fixed halves, warm start, bad input, stopping."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import mrcfile
import numpy as np
import pandas as pd
import pytest
import starfile
import torch
from typer.testing import CliRunner

from actors.engines import embedded
from actors.engines.base import EngineInput, EngineProgress, EngineSettings, EngineStopped, SeedRefused
from actors.engines.embedded import EmbeddedEngine
from actors.engines.incremental_run import state_after
from actors.engines.particle_images import assign_half_sets, good_size_at_most, load_particles
from actors.engines.session_run import read_union
from actors.engines.state_file import read_state, write_state
from actors.engines.union_run import best_union_of
from models.fourier.point_groups import symmetry_matrices
from models.fourier.volumes import resample_volume
from models.reconstruction.blobs import BlobPhantom, BlobSet, images_of, simulate_blob_images
from models.reconstruction.buckets import BucketSums
from models.reconstruction.grids import random_rotations
from models.reconstruction.masks import spherical_mask
from models.reconstruction.pose_schedule import RefinementSettings
from models.reconstruction.refinement import RefinementResult
from models.reconstruction.volume_io import read_volume, write_volume
from stream.cli import app
from stream.records.errors import ConfigurationError, InputError
from stream.sinks.exporter import write_labels

N, BOX, PIXEL = 160, 32, 6.0
SETTINGS = EngineSettings(effort="quick", n_starts=1, seed=1)


@pytest.fixture(scope="module")
def particles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """160 images of a blob phantom on four micrographs, as preprocessing writes them; and the truth's map."""
    root = tmp_path_factory.mktemp("set")
    generator = torch.Generator().manual_seed(11)
    phantom = BlobPhantom.random(BOX, generator, n_blobs=9, sigma_fraction=0.05)
    images = simulate_blob_images(phantom, N, generator, snr=0.5, pixel_size_angstrom=PIXEL)
    with mrcfile.new(root / "stack.mrcs") as handle:
        handle.set_data(images_of(images.data).numpy().astype(np.float32))
        handle.voxel_size = PIXEL
    write_volume(root / "truth.mrc", phantom.volume(), PIXEL)
    _write_star(root / "particles.star", images)
    return root / "particles.star"


def _write_star(path: Path, images: BlobSet) -> None:
    """Write a table as preprocessing does: 40 particles per micrograph, uids from 1000."""
    n = len(images.data)
    optics = pd.DataFrame(
        {
            "rlnOpticsGroup": [1],
            "rlnOpticsGroupName": ["opticsGroup1"],
            "rlnVoltage": [300.0],
            "rlnSphericalAberration": [2.7],
            "rlnAmplitudeContrast": [0.1],
            "rlnImagePixelSize": [PIXEL],
            "rlnImageSize": [BOX],
            "rlnImageDimensionality": [2],
        }
    )
    table = pd.DataFrame(
        {
            "rlnImageName": [f"{i + 1:06d}@stack.mrcs" for i in range(n)],
            "rlnMicrographName": [f"mic{i // 40}.mrc" for i in range(n)],
            "rlnDefocusU": images.ctf.defocus_u_angstrom.numpy(),
            "rlnDefocusV": images.ctf.defocus_v_angstrom.numpy(),
            "rlnDefocusAngle": images.ctf.astigmatism_angle_deg.numpy(),
            "rlnOpticsGroup": 1,
            "icestreamUid": [str(1000 + i) for i in range(n)],
        }
    )
    starfile.write({"optics": optics, "particles": table}, path)


def _edited(particles: Path, name: str, **columns: object) -> EngineInput:
    """Write a variant of the table beside it; None drops a column."""
    blocks = starfile.read(particles, always_dict=True, parse_as_string=["icestreamUid"])
    table = blocks["particles"]
    for column, values in columns.items():
        table = table.drop(columns=column) if values is None else table.assign(**{column: values})
    target = particles.with_name(name)
    starfile.write({"optics": blocks["optics"], "particles": table}, target, overwrite=True)
    return EngineInput(particles_star=target, root=particles.parent)


def _source(particles: Path) -> EngineInput:
    return EngineInput(particles_star=particles, root=particles.parent)


def test_a_run_leaves_a_complete_folder_with_fixed_halves_and_a_warm_start_continues_it(
    particles: Path, tmp_path: Path
) -> None:
    engine, steps = EmbeddedEngine(), list[EngineProgress]()
    half = np.where(np.arange(N) % 3 == 0, 1, 2)
    source = _edited(particles, "halves.star", rlnRandomSubset=half)
    first = engine.refine(
        source, particles.with_name("truth.mrc"), SETTINGS, tmp_path / "a", progress=steps.append
    )
    for name in ("map.mrc", "half1.mrc", "half2.mrc", "mask.mrc", "fsc.star", "poses.star",
                 "orientation.json", "summary.json", "map.png", "fsc.png", "orientation.png"):  # fmt: skip
        assert (tmp_path / "a" / name).stat().st_size > 0, name
    assert not list((tmp_path / "a").glob(".tmp-*"))
    assert first.resolution_angstrom is not None
    assert first.resolution_angstrom < 26.0
    assert [step.phase for step in steps] == ["refine"] * len(steps)
    assert len(steps) >= 3
    poses = starfile.read(tmp_path / "a" / "poses.star", always_dict=True, parse_as_string=["icestreamUid"])
    assert poses["particles"]["rlnRandomSubset"].tolist() == half.tolist()
    assert poses["particles"]["icestreamUid"].tolist() == [str(1000 + i) for i in range(N)]
    summary = json.loads((tmp_path / "a" / "summary.json").read_text())
    assert summary["n_particles"] == N
    again = engine.orientation_diagnostics(tmp_path / "a")
    assert again["cfar"] == pytest.approx(first.cfar, abs=1e-6)
    # The old particles keep their poses within a local search; the particles of a new set are matched by uid.
    second = engine.refine(
        source, first.map, SETTINGS, tmp_path / "b", warm_start_poses=tmp_path / "a" / "poses.star"
    )
    assert second.resolution_angstrom is not None
    assert second.resolution_angstrom < 1.15 * first.resolution_angstrom


def test_a_grown_set_continues_the_earlier_runs_sums(particles: Path, tmp_path: Path) -> None:
    engine, truth = EmbeddedEngine(), particles.with_name("truth.mrc")
    blocks = starfile.read(particles, always_dict=True, parse_as_string=["icestreamUid"])
    table = blocks["particles"].assign(rlnRandomSubset=np.arange(N) % 2 + 1)
    for name, rows in (("old.star", slice(0, 130)), ("new.star", slice(10, N))):
        blocks["particles"] = table.iloc[rows]
        starfile.write(blocks, particles.with_name(name), overwrite=True)
    sources = [
        EngineInput(particles_star=particles.with_name(n), root=particles.parent)
        for n in ("old.star", "new.star")
    ]
    first = engine.refine(sources[0], truth, SETTINGS, tmp_path / "a")
    second = engine.refine(sources[1], first.map, SETTINGS, tmp_path / "b", warm_start_poses=first.poses_star)
    assert "30 new, 30 revisited, 10 dropped" in second.note
    assert second.resolution_angstrom is not None
    assert first.resolution_angstrom is not None
    assert second.resolution_angstrom < 1.15 * first.resolution_angstrom
    poses = starfile.read(second.poses_star, always_dict=True, parse_as_string=["icestreamUid"])["particles"]
    assert poses["icestreamUid"].tolist() == [str(1000 + i) for i in range(10, N)]
    state = read_state(tmp_path / "b" / "refinement.state")
    assert sorted(state.records.uids.tolist()) == list(range(1010, 1000 + N))
    # The sums are those of the poses that were written: rebuilt from them they are the same.
    loaded = load_particles(second.poses_star, particles.parent, max_box_px=96)
    rows = state.records.rows_of(torch.from_numpy(loaded.table.uids.astype(np.int64)))
    scratch = BucketSums(state.sums.grid.max_shell, BOX)
    scratch.take(loaded.data, state.records.inserted.take(rows))
    for bucket, sums in scratch.sums.items():
        assert float((state.sums.sums[bucket] - sums).norm() / sums.norm()) < 1e-3
    growth = json.loads((tmp_path / "b" / "summary.json").read_text())["growth"]
    assert [p["n_particles"] for p in growth["points"]] == sorted(p["n_particles"] for p in growth["points"])


def test_a_state_that_is_damaged_or_of_other_halves_is_not_continued(particles: Path, tmp_path: Path) -> None:
    engine, truth = EmbeddedEngine(), particles.with_name("truth.mrc")
    half = np.arange(N) % 2 + 1
    source = _edited(particles, "even.star", rlnRandomSubset=half)
    first = engine.refine(source, truth, SETTINGS, tmp_path / "a")
    swapped = _edited(particles, "swapped.star", rlnRandomSubset=3 - half)
    second = engine.refine(swapped, first.map, SETTINGS, tmp_path / "b", warm_start_poses=first.poses_star)
    assert "continued" not in second.note
    path = tmp_path / "a" / "refinement.state"
    content = bytearray(path.read_bytes())
    content[-1000] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(InputError, match="checksum"):
        read_state(path)
    third = engine.refine(source, first.map, SETTINGS, tmp_path / "c", warm_start_poses=first.poses_star)
    assert "continued" not in third.note
    for damage, rule in ((content[:-1], "bytes"), (b"ICSTAT0\n" + content[8:], "magic")):
        path.write_bytes(damage)
        with pytest.raises(InputError, match=rule):
            read_state(path)


_WRITER = """
import sys, torch
from pathlib import Path
from actors.engines.state_file import read_state, write_state
path = Path(sys.argv[1])
state = read_state(path)
while True:
    state.tick += 1
    write_state(path, state)
    print(state.tick, flush=True)
"""


def test_a_state_survives_a_kill_at_any_moment(particles: Path, tmp_path: Path) -> None:
    loaded = load_particles(particles, particles.parent, max_box_px=96)
    n = len(loaded.data)
    result = RefinementResult(
        half1=torch.zeros(0), half2=torch.zeros(0), rotations=random_rotations(n, torch.Generator().manual_seed(1)),
        shifts_xy_px=torch.zeros(n, 2), log_likelihood_gain=torch.zeros(n), scales=torch.ones(n),
        weights=torch.ones(n), defocus_offset_angstrom=torch.zeros(n), fsc=torch.zeros(0), n_iterations=1,
    )  # fmt: skip
    state = state_after(loaded, result, RefinementSettings(), torch.eye(3)[None])
    assert state is not None
    path = tmp_path / "refinement.state"
    write_state(path, state)
    with subprocess.Popen(
        [sys.executable, "-c", _WRITER, str(path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for _ in range(3):
            told = int(process.stdout.readline())
        process.kill()
    after = read_state(path)
    assert after.tick >= told
    for bucket, sums in state.sums.sums.items():
        assert sums.dtype == torch.float32
        assert torch.equal(after.sums.sums[bucket], sums)


def test_an_initial_model_is_written_with_every_start_that_was_tried(
    particles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What the search finds is tested with the models; here a few iterations are enough.
    monkeypatch.setitem(embedded._EFFORT, "quick", (6, 60))
    path = EmbeddedEngine().initial_model(_source(particles), SETTINGS, tmp_path)
    volume, pixel_size = read_volume(path)
    assert volume.shape == (BOX, BOX, BOX)
    assert pixel_size == pytest.approx(PIXEL)
    starts = json.loads((tmp_path / "initial.json").read_text())["starts"]
    assert len(starts) == 1
    assert np.isfinite(starts[0]["log_evidence_nats"])
    # Asked again for the same, it is not searched for again.
    written = path.stat().st_mtime_ns
    assert EmbeddedEngine().initial_model(_source(particles), SETTINGS, tmp_path) == path
    assert path.stat().st_mtime_ns == written


def test_a_stopped_run_goes_on_where_it_was_and_ends_as_if_it_had_not_been_stopped(
    particles: Path, tmp_path: Path
) -> None:
    engine, truth, steps = EmbeddedEngine(), particles.with_name("truth.mrc"), list[EngineProgress]()
    whole = engine.refine(_source(particles), truth, SETTINGS, tmp_path / "a", progress=steps.append)
    n_steps = len(steps)
    steps.clear()
    with pytest.raises(EngineStopped):
        engine.refine(
            _source(particles), truth, SETTINGS, tmp_path / "b", progress=steps.append,
            should_stop=lambda: len(steps) >= 2,
        )  # fmt: skip
    assert not (tmp_path / "b" / "map.mrc").exists()
    resumed = engine.refine(_source(particles), truth, SETTINGS, tmp_path / "b", progress=steps.append)
    assert [step.iteration for step in steps] == list(range(1, n_steps + 1))
    a, b = read_volume(whole.half1)[0], read_volume(resumed.half1)[0]
    assert float((a - b).norm() / a.norm()) < 1e-3
    assert not list((tmp_path / "b").glob("*.checkpoint*"))


def test_a_checkpoint_of_other_settings_is_ignored(particles: Path, tmp_path: Path) -> None:
    engine, truth, steps = EmbeddedEngine(), particles.with_name("truth.mrc"), list[EngineProgress]()

    def stop() -> bool:
        return len(steps) >= 1

    for settings in (SETTINGS, replace(SETTINGS, seed=2)):
        steps.clear()
        with pytest.raises(EngineStopped):
            engine.refine(
                _source(particles), truth, settings, tmp_path, progress=steps.append, should_stop=stop
            )
        assert [step.iteration for step in steps] == [1]


@pytest.mark.slow
def test_noise_refined_from_a_given_map_has_no_resolution(particles: Path, tmp_path: Path) -> None:
    truth = particles.with_name("truth.mrc")
    for seed in range(30):
        noise = _noise_images(tmp_path, 200, seed)
        # Three in four draws have the wrong contrast in one half by chance, which is told at once.
        try:
            output = EmbeddedEngine().refine(noise, truth, SETTINGS, tmp_path / "run")
        except InputError:
            continue
        break
    assert output.resolution_angstrom is None
    assert "no resolution" in output.note
    assert not json.loads((tmp_path / "run" / "summary.json").read_text())["cross_evidence"]["z"] > 4.0


def test_scales_weights_and_the_given_mask_are_in_the_run_folder(particles: Path, tmp_path: Path) -> None:
    with mrcfile.open(particles.with_name("stack.mrcs")) as handle:
        data = handle.data.copy()
    data[:40] *= 0.5
    with mrcfile.new(tmp_path / "stack.mrcs") as handle:
        handle.set_data(data)
        handle.voxel_size = PIXEL
    (tmp_path / "particles.star").write_text(particles.read_text())
    mask = spherical_mask(BOX, 11, 4)
    write_volume(tmp_path / "mask.mrc", mask, PIXEL)
    source = EngineInput(particles_star=tmp_path / "particles.star", root=tmp_path)
    settings = replace(SETTINGS, mask=tmp_path / "mask.mrc")
    output = EmbeddedEngine().refine(source, particles.with_name("truth.mrc"), settings, tmp_path / "run")
    assert torch.allclose(read_volume(output.mask)[0], mask, atol=1e-5)
    table = starfile.read(output.poses_star, always_dict=True)["particles"]
    scale = table.groupby("rlnMicrographName")["rlnGroupScaleCorrection"].first()
    assert table.groupby("rlnMicrographName")["rlnGroupScaleCorrection"].nunique().max() == 1
    # Half of the contrast; halves are scaled apart, each to a mean of 1.
    assert scale["mic0.mrc"] < 0.75 * scale[["mic1.mrc", "mic2.mrc", "mic3.mrc"]].max()
    assert table["icestreamWeight"].between(0, 1).all()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["images"]["scale_of_micrograph"].keys() == {f"mic{i}.mrc" for i in range(4)}
    assert summary["cross_evidence"]["z"] > 10


@pytest.mark.parametrize(
    ("box", "pixel", "peak", "rule"),
    [(24, PIXEL, 1.0, "box of 32 px"), (32, 2.0, 1.0, "pixel size"), (32, PIXEL, 7.0, "between 0 and 1"),
     (32, PIXEL, 0.0, "not empty")],
)  # fmt: skip
def test_a_mask_that_is_none_is_refused(
    particles: Path, tmp_path: Path, box: int, pixel: float, peak: float, rule: str
) -> None:
    write_volume(tmp_path / "mask.mrc", peak * spherical_mask(box, box / 3, 3), pixel)
    settings = replace(SETTINGS, mask=tmp_path / "mask.mrc")
    with pytest.raises(InputError, match=rule):
        EmbeddedEngine().refine(_source(particles), particles.with_name("truth.mrc"), settings, tmp_path)


def test_images_of_the_wrong_sign_and_other_wrong_input_are_named(particles: Path, tmp_path: Path) -> None:
    with mrcfile.open(particles.with_name("stack.mrcs")) as handle:
        data = -handle.data
    with mrcfile.new(tmp_path / "stack.mrcs") as handle:
        handle.set_data(data)
        handle.voxel_size = 2.0 * PIXEL
    (tmp_path / "particles.star").write_text(particles.read_text())
    source = EngineInput(particles_star=tmp_path / "particles.star", root=tmp_path)
    with pytest.raises(InputError, match="contrast"):
        EmbeddedEngine().refine(source, particles.with_name("truth.mrc"), SETTINGS, tmp_path / "run")
    loaded = load_particles(source.particles_star, tmp_path, max_box_px=96)
    assert any("12.000 Å per pixel, the table 6.000" in note for note in embedded._loading_notes(loaded))
    bent = _edited(particles, "bent.star", rlnOddZernike="[0,0,0.4,0,0,0]")
    with pytest.raises(InputError, match="rlnOddZernike"):
        load_particles(bent.particles_star, particles.parent, max_box_px=96)


def test_a_symmetry_that_the_map_does_not_have_is_told_with_its_score(particles: Path) -> None:
    loaded = load_particles(particles, particles.parent, max_box_px=96)
    notes: list[str] = []
    group = symmetry_matrices("C7").float()
    embedded._reference(particles.with_name("truth.mrc"), loaded, group, "C7", notes)
    assert "with score 0." in notes[0]
    assert "does not have C7" in notes[1]


def test_unknown_poses_are_counted(particles: Path, tmp_path: Path) -> None:
    loaded = load_particles(particles, particles.parent, max_box_px=96)
    angles = {f"rlnAngle{name}": np.zeros(N) for name in ("Rot", "Tilt", "Psi")}
    uids = [str(1000 + i) if i % 2 else str(5000 + i) for i in range(N)]
    old = _edited(
        particles, "old_poses.star", **angles, rlnOriginXAngst=0.0, rlnOriginYAngst=0.0, icestreamUid=uids
    )
    notes: list[str] = []
    warm = embedded._warm_poses(old.particles_star, particles.parent, loaded, notes)
    assert warm is not None
    assert int(warm.is_known.sum()) == N // 2
    assert notes == [f"{N // 2} earlier poses belong to particles that are not in this set"]
    bare = _edited(particles, "no_poses.star")
    with pytest.raises(InputError, match="angles and origins"):
        embedded._warm_poses(bare.particles_star, particles.parent, loaded, notes)


_FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from actors.engines.base import EngineInput, EngineSettings
from actors.engines.embedded import EmbeddedEngine
from stream.records.errors import ResourceError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
root = Path(sys.argv[1])
try:
    EmbeddedEngine().refine(
        EngineInput(particles_star=root / "particles.star", root=root), root / "truth.mrc",
        EngineSettings(effort="quick", n_starts=1, seed=1), Path(sys.argv[2]),
    )
except ResourceError as error:
    print(error)
"""


def test_a_disk_that_is_full_ends_the_run_by_name_and_leaves_no_half_written_file(
    particles: Path, tmp_path: Path
) -> None:
    # A limit on file sizes, as no test may fill a disk: maps of 32 px have 130 kB.
    done = subprocess.run(
        [sys.executable, "-c", _FULL_DISK, str(particles.parent), str(tmp_path)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert str(tmp_path) in done.stdout
    assert "disk" in done.stdout
    assert not list(tmp_path.glob(".tmp-*"))
    assert not list(tmp_path.glob("*.mrc"))
    assert not (tmp_path / "summary.json").exists()


@pytest.mark.slow
def test_refined_defocus_is_in_the_poses(particles: Path, tmp_path: Path) -> None:
    arguments = ["reconstruct", str(particles), "--out", str(tmp_path / "run"), "--effort", "quick", "--json"]
    arguments += ["--initial", str(particles.with_name("truth.mrc")), "--refine-defocus"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    new = starfile.read(told["poses_star"], always_dict=True)["particles"]
    old = starfile.read(particles, always_dict=True)["particles"]
    change = new["rlnDefocusU"] - old["rlnDefocusU"]
    assert change.std() > 1.0
    assert change.abs().max() < 2100.0
    assert np.allclose(change, new["rlnDefocusV"] - old["rlnDefocusV"], atol=0.1)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["images"]["defocus_offset_sd_angstrom"] == pytest.approx(change.std(), rel=0.01)


@pytest.mark.slow
def test_unions_of_feature_clusters_are_measured_from_a_runs_sums(particles: Path, tmp_path: Path) -> None:
    uids = np.arange(1000, 1000 + N, dtype=np.uint64)
    labels = (np.arange(N) % 4 == 0).astype(np.int16)
    write_labels(tmp_path / "labels.npz", uids, labels)
    source = replace(_source(particles), clusters=tmp_path / "labels.npz", clustering="k1")
    engine, truth = EmbeddedEngine(), particles.with_name("truth.mrc")
    first = engine.refine(source, truth, SETTINGS, tmp_path / "run")
    told = best_union_of(tmp_path / "run")
    assert {tuple(row["clusters"]) for row in told["measured"]} == {(0,), (1,), (0, 1)}
    assert told["best"]["cfar"] == max(row["cfar"] for row in told["measured"])
    assert told["all"]["n_particles"] == N
    assert [(row["left_out"], row["n_particles"]) for row in told["without"]] == [(0, 40), (1, 120)]
    forecast = read_union(tmp_path / "run" / "unions.json")
    assert forecast is not None
    assert forecast.clustering == "k1"
    assert list(forecast.clusters) == told["best"]["clusters"]
    (tmp_path / "run" / "unions.json").unlink()
    again = best_union_of(tmp_path / "run")  # measured again from the sums that the run left
    assert again["all"]["cfar"] == pytest.approx(told["all"]["cfar"], abs=0.02)
    # Particles in other clusters move in the sums without being aligned anew.
    write_labels(tmp_path / "labels.npz", uids, (np.arange(N) % 3).astype(np.int16))
    second = engine.refine(source, first.map, SETTINGS, tmp_path / "more", warm_start_poses=first.poses_star)
    assert "continued" in second.note
    state = read_state(tmp_path / "more" / "refinement.state")  # reading checks sums against records
    assert torch.bincount(state.records.inserted.cluster).tolist() == [54, 53, 53]
    write_labels(tmp_path / "labels.npz", uids + np.uint64(10_000), labels)
    with pytest.raises(InputError, match="labels belong to particles"):
        engine.refine(source, truth, SETTINGS, tmp_path / "none")


def _noise_images(folder: Path, n: int, seed: int = 5) -> EngineInput:
    generator = np.random.default_rng(seed)
    with mrcfile.new(folder / "stack.mrcs", overwrite=True) as handle:
        handle.set_data(generator.standard_normal((n, BOX, BOX)).astype(np.float32))
    table = pd.DataFrame(
        {
            "rlnImageName": [f"{i + 1:06d}@stack.mrcs" for i in range(n)],
            "rlnMicrographName": [f"mic{i // 30}.mrc" for i in range(n)],
            "rlnDefocusU": generator.uniform(10_000, 22_000, n),
            "rlnDefocusV": generator.uniform(10_000, 22_000, n),
            "rlnDefocusAngle": generator.uniform(0, 180, n),
            "rlnOpticsGroup": 1,
        }
    )
    optics = pd.DataFrame(
        {
            "rlnOpticsGroup": [1], "rlnOpticsGroupName": ["o1"], "rlnVoltage": [300.0],
            "rlnSphericalAberration": [2.7], "rlnAmplitudeContrast": [0.1], "rlnImagePixelSize": [PIXEL],
            "rlnImageSize": [BOX], "rlnImageDimensionality": [2],
        }
    )  # fmt: skip
    starfile.write({"optics": optics, "particles": table}, folder / "noise.star", overwrite=True)
    return EngineInput(particles_star=folder / "noise.star", root=folder)


@pytest.mark.parametrize("symmetry", ["C1", pytest.param("D2", marks=pytest.mark.slow)])
def test_noise_is_refused_before_anything_is_built_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, symmetry: str
) -> None:
    # The judgement holds for whatever map a search came up with, so that a short one is enough.
    monkeypatch.setitem(embedded._EFFORT, "quick", (4, 40))
    source = _noise_images(tmp_path, 300)
    settings = EngineSettings(effort="quick", n_starts=1, seed=1, symmetry=symmetry)
    with pytest.raises(SeedRefused, match="no better than"):
        EmbeddedEngine().initial_model(source, settings, tmp_path / "run")
    told = json.loads((tmp_path / "run" / "initial.json").read_text())["acceptance"]
    assert not told["is_accepted"]
    assert told["log_evidence"] < 0.5
    assert not (tmp_path / "run" / "initial.mrc").exists()


def test_the_command_reports_a_refusal_and_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(embedded._EFFORT, "quick", (4, 40))
    source = _noise_images(tmp_path, 100)
    arguments = [
        "reconstruct",
        str(source.particles_star),
        "--out",
        str(tmp_path / "run"),
        "--effort",
        "quick",
    ]
    result = CliRunner().invoke(app, [*arguments, "--starts", "1", "--json"])
    assert isinstance(result.exception, SeedRefused)  # which the command line turns into exit code 1
    told = json.loads(result.stdout)
    assert told["resolution_angstrom"] is None
    assert told["is_refused"]
    assert "no better than" in told["note"]


def test_a_run_stops_when_asked(particles: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineStopped):
        EmbeddedEngine().initial_model(_source(particles), SETTINGS, tmp_path, should_stop=lambda: True)
    assert not (tmp_path / "initial.mrc").exists()


def test_nan_and_constant_particles_are_left_out_and_counted(particles: Path, tmp_path: Path) -> None:
    with mrcfile.open(particles.with_name("stack.mrcs"), permissive=True) as handle:
        data = handle.data.copy()
    data[3, 5, 5], data[7] = np.nan, 1.5
    with mrcfile.new(tmp_path / "stack.mrcs") as handle:
        with pytest.warns(RuntimeWarning, match="NaN"):
            handle.set_data(data)
        handle.voxel_size = PIXEL
    (tmp_path / "particles.star").write_text(particles.read_text())
    loaded = load_particles(tmp_path / "particles.star", tmp_path, max_box_px=96)
    assert loaded.excluded == {"not finite": 1, "constant": 1}
    assert 3 not in loaded.rows
    assert 7 not in loaded.rows
    assert len(loaded.data) == N - 2


def test_float16_stacks_are_read(particles: Path, tmp_path: Path) -> None:
    with mrcfile.open(particles.with_name("stack.mrcs")) as handle:
        data = handle.data.copy()
    with mrcfile.new(tmp_path / "stack.mrcs") as handle:
        handle.set_data(data.astype(np.float16))
        handle.voxel_size = PIXEL
    (tmp_path / "particles.star").write_text(particles.read_text())
    half_precision = load_particles(tmp_path / "particles.star", tmp_path, max_box_px=96).data.coefficients
    full = load_particles(particles, particles.parent, max_box_px=96).data.coefficients
    assert float((half_precision - full).norm() / full.norm()) < 1e-3


def test_large_boxes_are_reduced_without_moving_or_rescaling_the_signal(particles: Path) -> None:
    full = load_particles(particles, particles.parent, max_box_px=96).data
    small = load_particles(particles, particles.parent, max_box_px=26).data
    assert small.box_size_px == 24
    assert small.box_angstrom == pytest.approx(full.box_angstrom)
    n = len(small.plane)
    scale = (24 / 32) ** 2
    expected = full.coefficients[:, :n] * scale
    assert float((small.coefficients - expected).norm() / expected.norm()) < 1e-4
    assert torch.allclose(small.ctf, full.ctf[:, :n], atol=1e-4)


def test_missing_ctf_too_few_particles_and_an_empty_half_are_named(particles: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="rlnDefocusU"):
        load_particles(
            _edited(particles, "noctf.star", rlnDefocusU=None).particles_star, particles.parent, max_box_px=96
        )
    undefined = np.full(N, np.nan)
    undefined[:20] = 10000.0
    source = _edited(particles, "few.star", rlnDefocusU=undefined)
    with pytest.raises(InputError, match="at least 50 particles"):
        load_particles(source.particles_star, particles.parent, max_box_px=96)
    source = _edited(particles, "onehalf.star", rlnRandomSubset=np.ones(N, dtype=int))
    with pytest.raises(InputError, match="half 2: 0"):
        load_particles(source.particles_star, particles.parent, max_box_px=96)
    with pytest.raises(ConfigurationError, match="point group"):
        EmbeddedEngine().initial_model(_source(particles), EngineSettings(symmetry="Q7"), tmp_path)


def test_a_map_with_nan_is_refused(particles: Path, tmp_path: Path) -> None:
    volume = torch.zeros((8, 8, 8))
    volume[0, 0, 0] = float("nan")
    with pytest.warns(RuntimeWarning, match="NaN"):
        write_volume(tmp_path / "bad.mrc", volume, PIXEL)
    with pytest.raises(InputError, match="finite"):
        EmbeddedEngine().refine(_source(particles), tmp_path / "bad.mrc", SETTINGS, tmp_path / "out")


def test_half_sets_are_balanced_per_micrograph() -> None:
    names = ["b"] * 30 + ["a"] * 25 + ["c"] * 5 + ["d"] * 40
    half = assign_half_sets(list(names), None)
    for name in set(names):
        assert len({int(h) for h, n in zip(half, names, strict=True) if n == name}) == 1
    assert abs(int((half == 1).sum()) - int((half == 2).sum())) <= 40
    without = assign_half_sets([None] * 10, np.arange(10, 20, dtype=np.uint64))
    assert without.tolist() == [1, 2] * 5


def test_the_working_box_is_even_smooth_and_within_the_bound() -> None:
    assert good_size_at_most(64, 96) == 64
    assert good_size_at_most(65, 96) == 64
    assert good_size_at_most(400, 96) == 96
    assert good_size_at_most(400, 94) == 90


def test_a_map_keeps_its_density_on_another_grid() -> None:
    phantom = BlobPhantom.random(
        48, torch.Generator().manual_seed(3), sigma_fraction=0.05, radius_fraction=0.2
    )
    coarse = BlobPhantom(32, phantom.centres_xyz / 1.5, phantom.sigmas / 1.5, phantom.weights).volume()
    moved = resample_volume(phantom.volume(), 2.0, 3.0, 32)
    assert float((moved - coarse).norm() / coarse.norm()) < 0.02
