"""The benchmarks of the reconstruction: sets of known truth, runs that go on where they were, peers that are stopped."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models.reconstruction.online_em import OnlineEmSettings
from models.reconstruction.particle_data import particle_data
from models.reconstruction.volume_io import write_volume
from stream.commands import bench_convergence, bench_engine
from stream.commands.bench_convergence import (
    grid_error_deg,
    near_symmetric_rod,
    run_convergence_benchmark,
    simulate_particles,
    summarise,
)
from stream.commands.bench_engine import measure_map
from stream.commands.bench_incremental import run_incremental_benchmark
from stream.commands.engine_sets import PreparedSet, prepare_set
from stream.commands.relion_runs import read_progress, run_relion
from stream.ingest.particle_sets import read_particle_table
from stream.records.errors import ConfigurationError


def test_simulated_particles_have_the_stated_noise_and_poses() -> None:
    particles = simulate_particles("rod", 60, 32, 0.05, seed=3)
    assert int(particles.is_junk.sum()) == 3
    clean = simulate_particles("rod", 60, 32, 1e6, seed=3)
    assert torch.equal(clean.rotations, particles.rotations)
    signal = clean.images[~clean.is_junk].var(dim=(1, 2)).mean()
    noise = (particles.images - clean.images).var(dim=(1, 2)).mean()
    assert float(signal / noise) == pytest.approx(0.05, rel=0.03)
    # Without noise, matching against the truth finds the poses to what a 15° grid allows.
    good = (~clean.is_junk).nonzero()[:, 0]
    data = particle_data(clean.images, clean.pixel_size_angstrom, clean.ctf).take(good)
    settings = OnlineEmSettings(last_shell=11.0)
    error = grid_error_deg(clean.truth, data, clean.rotations[good], settings, 0)
    assert error < 12.0
    wrong = grid_error_deg(clean.truth.flip(0).roll(1, 0), data, clean.rotations[good].flip(0), settings, 0)
    assert wrong > 40.0


def test_the_rod_is_nearly_the_same_upside_down() -> None:
    volume = near_symmetric_rod(32).volume()
    turned = volume.flip((0, 1)).roll((1, 1), (0, 1))
    correlation = float(torch.corrcoef(torch.stack((volume.flatten(), turned.flatten())))[0, 1])
    assert 0.85 < correlation < 0.97


def test_runs_that_are_done_are_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[str, int]] = []

    def run(name: str, seed: int, folder: Path) -> dict[str, Any]:
        assert folder == tmp_path
        ran.append((name, seed))
        return made_up_run(name, seed, error=10.0)

    monkeypatch.setattr(bench_convergence, "run_once", run)
    run_convergence_benchmark(tmp_path, part="rod:0-1,antibody:3")
    # One seed of every structure after the other.
    figures = run_convergence_benchmark(tmp_path, part="antibody:1-2,rod:0-2")
    assert ran == [("rod", 0), ("rod", 1), ("antibody", 3), ("antibody", 1), ("antibody", 2), ("rod", 2)]
    assert [(f["name"], f["value"], f["unit"]) for f in figures] == [
        ("convergence, rod", 3, "of 3 solved"),
        ("convergence, antibody", 3, "of 3 solved"),
    ]
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == 6
    # What another recipe did is no part of this one's figures, and is run again.
    monkeypatch.setattr(bench_convergence, "RECIPE", "another")
    assert run_convergence_benchmark(tmp_path, part="rod:0")[0]["unit"] == "of 1 solved"


def made_up_run(name: str, seed: int, *, error: float, is_refused: bool = False) -> dict[str, Any]:
    return {
        "structure": name,
        "seed": seed,
        "recipe": bench_convergence.RECIPE,
        "is_solved": error <= 12.0,
        "is_refused": is_refused,
        "median_error_deg": error,
        "oracle_error_deg": 8.0,
        "ratio": error / 8.0,
        "cpu_s": 60.0,
    }


def test_a_wrong_map_that_was_accepted_is_counted_apart() -> None:
    runs = [
        made_up_run("rod", 0, error=9.0),
        made_up_run("rod", 1, error=9.0, is_refused=True),
        made_up_run("rod", 2, error=50.0, is_refused=True),
        made_up_run("rod", 3, error=60.0),
    ]
    figure = summarise(runs)[0]
    assert (figure["value"], figure["unit"]) == (2, "of 4 solved")
    assert (figure["refused"], figure["solved_and_refused"], figure["wrong_and_accepted"]) == (2, 1, 1)
    assert figure["worst_ratio"] == 7.5


@pytest.mark.parametrize("part", ["ribosome", "rod:a", "rod:1-b"])
def test_an_unknown_part_is_named(tmp_path: Path, part: str) -> None:
    with pytest.raises(ConfigurationError, match="--part"):
        run_convergence_benchmark(tmp_path, part=part)


@pytest.mark.parametrize("part", ["ribosome", "rod:final"])
def test_an_unknown_set_or_program_is_named(tmp_path: Path, part: str) -> None:
    with pytest.raises(ConfigurationError, match="betagal"):
        bench_engine.run_engine_benchmark(tmp_path, part=part)


@pytest.fixture
def rod_set(tmp_path: Path) -> PreparedSet:
    return prepare_set(tmp_path, "rod", 60, 32)


def test_a_prepared_set_reads_back_with_halves_and_a_normal_background(rod_set: PreparedSet) -> None:
    table = read_particle_table(rod_set.star, root=rod_set.star.parent)
    assert len(table) == 60
    assert table.box_size_px == 32
    assert rod_set.pixel_size_angstrom == pytest.approx(6.0)
    assert np.unique(np.asarray(table.half_sets), return_counts=True)[1].tolist() == [30, 30]


def test_a_map_is_measured_whatever_its_frame(rod_set: PreparedSet, tmp_path: Path) -> None:
    path = tmp_path / "map.mrc"
    turned = rod_set.truth.permute(2, 0, 1).flip(1).roll(1, 1)  # a rotation and a mirror
    write_volume(path, turned, rod_set.pixel_size_angstrom)
    assert measure_map(path, rod_set)["truth_mean_fsc"] > 0.9
    noise = torch.randn(rod_set.truth.shape, generator=torch.Generator().manual_seed(0))
    write_volume(tmp_path / "noise.mrc", noise, rod_set.pixel_size_angstrom)
    assert measure_map(tmp_path / "noise.mrc", rod_set)["truth_mean_fsc"] < 0.5


@pytest.mark.skipif(shutil.which("relion_refine") is None, reason="RELION is not installed")
def test_relion_is_stopped_at_its_limit_and_goes_on_with_a_higher_one(
    rod_set: PreparedSet, tmp_path: Path
) -> None:
    few = (
        "--sgd --denovo_3dref --ctf --K 1 --zero_mask --pad 1 --sgd_ini_iter 2 --sgd_inbetween_iter 2 --sgd_fin_iter 2 "
        "--sgd_ini_subset 10 --sgd_fin_subset 10 --sgd_write_iter 1 --oversampling 0 --healpix_order 1 --offset_range 0"
    )
    command = ["relion_refine", *bench_engine.relion_input(rod_set), *few.split()]
    out = tmp_path / "out"
    stopped = run_relion(command, out, 0.1, resume=("--pad", "1"))
    assert not stopped.is_finished
    assert stopped.n_iterations < 6
    kept = read_progress(out)
    finished = run_relion(command, out, 300.0, resume=("--pad", "1"))
    assert (finished.is_finished, finished.n_iterations) == (True, 6)
    assert finished.wall_s > kept.wall_s
    assert finished.cpu_s > max(kept.cpu_s, 0.1)
    # What is done is not run again.
    assert run_relion(command, out, 600.0) == finished == read_progress(out)


def test_a_failing_peer_is_an_error_with_its_log(rod_set: PreparedSet, tmp_path: Path) -> None:
    if shutil.which("relion_refine") is None:
        pytest.skip("RELION is not installed")
    with pytest.raises(RuntimeError, match=r"log\.txt"):
        run_relion(["relion_refine", "--i", "absent.star"], tmp_path / "out", 20.0)


def test_taking_in_a_tenth_more_is_compared_with_refining_all_again(tmp_path: Path) -> None:
    (figure,) = run_incremental_benchmark(tmp_path, n_particles=110, box_px=32, part="rod")
    assert figure["unit"] == "CPU s for 10 more"
    assert figure["n_revisited"] == 10
    assert 0.0 < figure["ratio"] < 0.8
    scratch, increment = figure["scratch_truth_mean_fsc"], figure["increment_truth_mean_fsc"]
    assert increment == pytest.approx(scratch, abs=0.1)
    assert increment > 0.4
    # What is measured is not measured again.
    assert run_incremental_benchmark(tmp_path, n_particles=110, box_px=32, part="rod") == [figure]
    with pytest.raises(ConfigurationError, match="--part"):
        run_incremental_benchmark(tmp_path, part="ribosome")
