"""Benchmark of the orientation branch: one view preferred, a few others, with the branch and without it.

A receptor with its G protein, which has no symmetry, stands upright on the film (its long axis along the beam), save for a
minority of uniform views. The same particle file goes through two sessions in this process, one whose policy divides particles by
view when no map passes the cFAR bound and one whose policy does not. The truth is the density that the images were made from.
A run from nothing takes up to four minutes on one core, and there are up to a dozen; a session that was stopped goes on from
its journal when the benchmark is asked again in the same folder.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stream.records.errors import ConfigurationError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

MODEL = "3sn6_b2ar_gs.pdb.gz"
BOX_PX = 48
SNR = 0.6
PREFERRED_FRACTION = 0.95
SPREAD_DEG = 8.0
N_PARTICLES = 4_000
N_PER_MICROGRAPH = 100
N_CLUSTERS = 8
MIN_CLUSTER = 50
OTHER_VIEW_DEG = 40.0
"""From the preferred axis, either way: beyond it a view is another one (five standard deviations of the spread)."""

PARTS = ("clusters", "without", "with")


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewSet:
    """Where the particle file and the true density lie."""

    particles_star: Path
    truth: Path
    pixel_size_angstrom: float


def run_views_benchmark(
    folder: Path, *, n_particles: int = N_PARTICLES, part: str | None = None, box_px: int | None = None
) -> list[dict[str, Any]]:
    """Run what `part` names ("with", "without": the sessions; "clusters"; None = all) and return a figure for each."""
    if part not in (None, *PARTS):
        raise ConfigurationError("--part", f"one of {', '.join(PARTS)}, or all by leaving it out", part)
    made = simulate_views(folder, n_particles, box_px=box_px or BOX_PX)
    figures = []
    for name in PARTS if part is None else (part,):
        if name == "clusters":
            figures.extend(measure_clusters(made))
        else:
            figures.append(_run_session(folder, made, n_particles, has_branch=name == "with"))
    return figures


def measure_clusters(made: ViewSet) -> list[dict[str, Any]]:
    """Return, for features and for class averages, how many of each cluster show other views than the preferred one."""
    import numpy as np
    import torch

    from actors.engines.particle_images import load_particles
    from models.cryoranker.clusters import cluster_features
    from models.cryoranker.serve import DEFAULT_MODEL, OnnxRanker
    from models.reconstruction.classification import ClassificationSettings, classify
    from stream.ingest.particle_sets import iterate_images, read_particle_table

    is_other = np.load(made.particles_star.with_name("views.npy")) > OTHER_VIEW_DEG
    table = read_particle_table(made.particles_star, root=made.particles_star.parent)
    images = np.stack([image.astype(np.float32) for image in iterate_images(table, np.arange(len(is_other)))])
    ranker = OnnxRanker(DEFAULT_MODEL, n_threads=1)
    started = time.process_time()
    features = np.concatenate([ranker.score(images[i : i + 64])[1] for i in range(0, len(images), 64)])
    by_features = cluster_features(lambda: iter([features]), N_CLUSTERS).labels
    seconds = time.process_time() - started
    started = time.process_time()
    data = load_particles(made.particles_star, made.particles_star.parent, max_box_px=images.shape[-1]).data
    settings = ClassificationSettings(n_classes=N_CLUSTERS, n_iterations=14, max_shell=10.0)
    found = {
        f"classes from features, seed {seed}": classify(
            data, settings, torch.Generator().manual_seed(seed), labels=torch.from_numpy(by_features).long()
        )
        for seed in range(3)
    }
    found |= {
        f"classes from random starts, seed {seed}": classify(
            data, settings, torch.Generator().manual_seed(seed)
        )
        for seed in range(3)
    }
    each = (time.process_time() - started) / len(found)
    divided = {"features": (by_features, seconds)} | {
        name: (classes.assignment.numpy(), each) for name, classes in found.items()
    }
    figures = []
    for source, (labels, cpu_s) in divided.items():
        own = [is_other[labels == label] for label in range(N_CLUSTERS)]
        shares = [(len(part), round(float(part.mean()), 3)) for part in own if len(part)]
        figures.append({
            "name": f"views, clusters by {source}",
            "value": max((share for size, share in shares if size >= MIN_CLUSTER), default=None),
            "unit": f"share of other views in the best cluster of {MIN_CLUSTER} particles or more",
            "baseline": "their share of all particles",
            "baseline_value": round(float(is_other.mean()), 3),
            "size_and_share": shares,
            "cpu_s": round(cpu_s, 1),
        })  # fmt: skip
    return figures


def simulate_views(folder: Path, n_particles: int, *, box_px: int, seed: int = 0) -> ViewSet:
    """Write particles.star with its stacks, one for each simulated micrograph, and the true density."""
    import mrcfile
    import numpy as np
    import pandas as pd
    import torch

    from models.fourier.rotations import euler_to_matrix
    from models.reconstruction.particle_data import CtfParameters
    from models.reconstruction.projector import HalfPlane
    from models.reconstruction.volume_io import write_volume
    from models.simulation.projection import Projector
    from models.simulation.settings import SpecimenSettings
    from models.simulation.specimen import draw_poses
    from stream.commands.bench_convergence import density_of_model
    from stream.records.values import Optics
    from stream.sinks.relion_star import make_particle_optics, write_particles_star

    generator = torch.Generator().manual_seed(seed)
    density, pixel = density_of_model(MODEL, box_px)
    settings = SpecimenSettings(
        preferred_fraction=PREFERRED_FRACTION, preferred_spread_deg=SPREAD_DEG, n_preferred_views=1
    )
    upright = _long_axis(density)[None]
    euler = draw_poses(n_particles, settings, upright, np.random.default_rng(seed))
    n_micrographs = math.ceil(n_particles / N_PER_MICROGRAPH)
    defocus = 10_000.0 + 12_000.0 * torch.rand(n_micrographs, generator=generator)
    micrograph = torch.arange(n_particles) // N_PER_MICROGRAPH
    ctf = CtfParameters(
        defocus_u_angstrom=defocus[micrograph],
        defocus_v_angstrom=defocus[micrograph],
        astigmatism_angle_deg=torch.zeros(n_particles),
        phase_shift_deg=torch.zeros(n_particles),
        voltage_kv=300.0,
        cs_mm=2.7,
        amplitude_contrast=0.1,
    )
    shift = 1.0 * torch.randn((n_particles, 2), generator=generator)
    clean = Projector(density, pixel).project(euler_to_matrix(torch.from_numpy(euler).float()), shift) / pixel
    plane = HalfPlane.of(box_px, box_px // 2 - 1)
    signal = torch.cat([
        plane.images(plane.coefficients(images) * values)
        for images, values in zip(clean.split(500), ctf.evaluate(plane, pixel).split(500), strict=True)
    ])  # fmt: skip
    noise = math.sqrt(float(signal.var(dim=(1, 2)).mean()) / SNR)
    star, truth = folder / "particles.star", folder / "truth.mrc"
    if star.is_file():  # a benchmark that goes on must not find its input changed
        return ViewSet(particles_star=star, truth=truth, pixel_size_angstrom=pixel)
    images = (signal / noise + torch.randn(signal.shape, generator=generator)).numpy()
    (folder / "stacks").mkdir(parents=True, exist_ok=True)
    axis = torch.from_numpy(upright[0]).float()
    cosine = (euler_to_matrix(torch.from_numpy(euler).float())[:, 2] @ axis).abs().clamp(max=1.0)
    np.save(folder / "views.npy", torch.rad2deg(torch.arccos(cosine)).numpy())
    rows = []
    for number in range(n_micrographs):
        own = (micrograph == number).numpy()
        with mrcfile.new(folder / "stacks" / f"m{number:03d}.mrcs", overwrite=True) as stack:
            stack.set_data(images[own].astype(np.float32))
            stack.voxel_size = pixel
        for i in range(int(own.sum())):
            rows.append(
                {
                    "rlnImageName": f"{i + 1:06d}@stacks/m{number:03d}.mrcs",
                    "rlnMicrographName": f"m{number:03d}.mrc",
                    "rlnDefocusU": float(defocus[number]),
                    "rlnDefocusV": float(defocus[number]),
                    "rlnDefocusAngle": 0.0,
                    "rlnPhaseShift": 0.0,
                    "rlnOpticsGroup": 1,
                }
            )
    optics = make_particle_optics(
        Optics(voltage_kv=300.0, cs_mm=2.7, amplitude_contrast=0.1),
        image_pixel_size_angstrom=pixel,
        image_size_px=box_px,
    )
    write_particles_star(star, pd.DataFrame(rows), optics)
    write_volume(truth, density, pixel)
    return ViewSet(particles_star=star, truth=truth, pixel_size_angstrom=pixel)


def _long_axis(density: Tensor) -> NDArray[np.float64]:
    """Return the unit vector (x, y, z) along which the density (z, y, x) is longest: for D2 a twofold axis."""
    import numpy as np

    points = np.argwhere(density.numpy() > 0.2 * float(density.max()))[:, ::-1].astype(float)
    return np.linalg.eigh(np.cov(points.T))[1][:, -1]


def _run_session(folder: Path, made: ViewSet, n_particles: int, *, has_branch: bool) -> dict[str, Any]:
    from stream.config import parse_settings
    from stream.wiring import run_session

    name = "with" if has_branch else "without"
    out = folder / name
    minimum = n_particles // 2
    document: dict[str, Any] = {
        "particles": made.particles_star.absolute(),
        "out": out.absolute(),
        "microscope": {"voltage_kv": 300, "cs_mm": 2.7},
        "acquisition": {"pixel_size_angstrom": made.pixel_size_angstrom},
        "ingest": {"settle_s": 0.0, "poll_interval_s": 0.5},
        "ranker": {"score_threshold": 0.0},
        "policy": {
            "rungs": [100 * n_particles],
            "full_rungs": [],
            "full_min_particles": minimum,
            "search_sizes": [n_particles],
            "n_parts": 1,
            "n_clusters": N_CLUSTERS,
            "cluster_by": "classes",
            "cluster_min_particles": MIN_CLUSTER,
            "orientation_branch": has_branch,
        },
        "engine": {"n_starts": 2, "effort": "quick", "max_box_px": 64},
        "telemetry": {"port": None},
    }
    started, started_cpu = time.perf_counter(), time.process_time()
    status = run_session(parse_settings(document, item=name), until_idle=True, in_process=True)
    seconds, cpu_s = time.perf_counter() - started, time.process_time() - started_cpu
    runs = [_describe(out, run, made.truth) for run in status["runs"]]
    (folder / f"{name}.json").write_text(json.dumps({"runs": runs, "status": status}, indent=2))
    final = next((r for r in runs if r["run_id"] == status["accepted_run"]), None) or _find_finest(runs)
    return {
        "name": f"views, {name} the orientation branch",
        "value": final.get("truth_angstrom"),
        "unit": "Å at FSC 0.5 against the truth (accepted map; where none is, the finest)",
        "accepted": status["accepted_run"],
        "run": final.get("run_id"),
        "resolution_angstrom": final.get("resolution_angstrom"),
        "cfar": final.get("cfar"),
        "cfar_null": final.get("cfar_null"),
        "truth_mean_fsc": final.get("truth_mean_fsc"),
        "advice": [advice["words"] for advice in status["advice"]],
        "seconds": round(seconds, 1),
        "cpu_s": round(cpu_s, 1),
        "runs": runs,
    }


def _describe(out: Path, run: dict[str, Any], truth: Path) -> dict[str, Any]:
    """Return a run's figures, those against the truth, too."""
    shown = ("run_id", "purpose", "particles", "resolution_angstrom", "cfar", "cfar_null", "scf_star")
    figures = {key: run[key] for key in shown} | {"reason": run["reason"], "verdict": run["verdict"]}
    return figures | _compare_with_truth(out, run, truth)


def _find_finest(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the run of the finest resolution: what a person would take who looks at nothing else."""
    resolved = [run for run in runs if run["resolution_angstrom"] is not None]
    return min(resolved, key=lambda run: (run["resolution_angstrom"], -run["particles"]), default={})


def _compare_with_truth(out: Path, run: dict[str, Any], truth: Path) -> dict[str, Any]:
    """Return where the FSC with the aligned truth falls to 0.5 (Å), and its mean over all shells."""
    from stream.commands.demo import compare_with_truth

    if run["folder"] is None or not (out / run["folder"] / "map.mrc").is_file():
        return {"truth_angstrom": None, "truth_mean_fsc": None}
    resolution, curve = compare_with_truth(out / run["folder"], truth)
    return {"truth_angstrom": resolution, "truth_mean_fsc": round(float(curve[1:].mean()), 3)}
