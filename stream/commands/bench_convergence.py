"""Benchmark of the initial model: six structures, many seeds; how often poses come out as well as they can.

A run draws particles of known pose, finds a map from nothing and matches particles against it on the search's own
grid. It is *solved* if their median pose error, after the one rotation (and hand) that no map can know, is at most
1.5 times that of matching against the true map. Runs are appended to `runs.jsonl` one by one, and those that are
there already are not run again: the whole of it takes hours on one core. Runs of another `RECIPE` do not count.
"""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stream.records.errors import ConfigurationError

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from models.reconstruction.blobs import BlobPhantom
    from models.reconstruction.online_em import OnlineEmSettings
    from models.reconstruction.particle_data import CtfParameters, ParticleData

BOX_PX = 64
N_PARTICLES = 3_000
SNR = 0.05
JUNK_FRACTION = 0.05
N_STARTS = 4
RECIPE = "pairs, 80 iterations with fine poses, agreement of poses"
"""What the search does; to be renamed where that changes, so that runs of different recipes are not counted together."""

MAX_RATIO = 1.5
"""Solved: the median error is at most this multiple of the error against the true map."""

_FILL = 0.64
"""The longest diameter over the box."""

_N_MATCHED = 600

STRUCTURES: dict[str, str | None] = {
    "rod": None,
    "ribozyme": "7yc8_ribozyme.cif.gz",
    "receptor": "3sn6_b2ar_gs.pdb.gz",
    "antibody": "1igt_igg2a.pdb.gz",
    "channel": "6bqn_enac.cif.gz",
    "chaperone": "6rn3_clpb.cif.gz",
}
"""A phantom rod that is nearly the same upside down; RNA; a receptor with its G protein; IgG2a; ENaC with antibody
fragments, nearly threefold; ClpB, a spiral that is nearly sixfold."""


@dataclass(frozen=True, slots=True)
class SimulatedParticles:
    """Images `(b, n, n)` with their truth; junk has poses too, which mean nothing."""

    images: Tensor
    rotations: Tensor
    origin_xy_px: Tensor
    is_junk: Tensor
    ctf: CtfParameters
    truth: Tensor
    pixel_size_angstrom: float


def run_convergence_benchmark(
    folder: Path, *, n_seeds: int = 10, part: str | None = None
) -> list[dict[str, Any]]:
    """Run what of `part` ("rod", "rod:0-3", several with commas) is not done yet; return a figure per structure."""
    runs_file = folder / "runs.jsonl"
    wanted = [(seed, name) for name, seeds in _parse_part(part, n_seeds) for seed in seeds]
    done = {(run["seed"], run["structure"]) for run in read_runs(runs_file)}
    # One seed of every structure after the other: what is done when it is stopped tells of all of them.
    for seed, name in sorted(wanted, key=lambda one: one[0]):
        if (seed, name) not in done:
            run = run_once(name, seed, folder)
            with runs_file.open("a") as lines:
                lines.write(json.dumps(run) + "\n")
    return summarise(read_runs(runs_file))


def _parse_part(part: str | None, n_seeds: int) -> list[tuple[str, range]]:
    wanted = []
    for item in ",".join(STRUCTURES).split(",") if part is None else part.split(","):
        name, _, seeds = item.partition(":")
        low, _, high = seeds.partition("-")
        if name not in STRUCTURES or not all(number.isdigit() for number in (low, high) if number):
            raise ConfigurationError(
                "--part", f"STRUCTURE or STRUCTURE:0-3, of {', '.join(STRUCTURES)}", item
            )
        first = int(low) if low else 0
        last = int(high) if high else (first if low else n_seeds - 1)
        wanted.append((name, range(first, last + 1)))
    return wanted


def read_runs(path: Path) -> list[dict[str, Any]]:
    """Return the runs of this recipe that are in the file, none where there is no file."""
    lines = path.read_text().splitlines() if path.is_file() else []
    return [run for run in map(json.loads, lines) if run.get("recipe") == RECIPE]


def summarise(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a figure per structure: solved of run, what was refused, errors and seconds (medians)."""
    figures = []
    for name in dict.fromkeys(run["structure"] for run in runs):
        own = [run for run in runs if run["structure"] == name]
        solved = [run for run in own if run["is_solved"]]
        figures.append({
            "name": f"convergence, {name}",
            "value": len(solved),
            "unit": f"of {len(own)} solved",
            "baseline": "median error against the true map on the same grid (median of runs)",
            "baseline_value": _median([run["oracle_error_deg"] for run in own]),
            "ratio": _median([run["ratio"] for run in own]),
            "median_error_deg": _median([run["median_error_deg"] for run in own]),
            "worst_ratio": max(run["ratio"] for run in own),
            "refused": sum(run["is_refused"] for run in own),
            "solved_and_refused": sum(run["is_refused"] for run in solved),
            "wrong_and_accepted": sum(not run["is_refused"] and not run["is_solved"] for run in own),
            "cpu_s": _median([run["cpu_s"] for run in own]),
        })  # fmt: skip
    return figures


def _median(values: list[float]) -> float:
    import statistics

    return float(statistics.median(values))


def run_once(name: str, seed: int, folder: Path) -> dict[str, Any]:
    """Simulate one set, find its initial model, keep it in `folder` and measure it against the truth."""
    import torch

    from models.reconstruction.initial_model import find_initial_model
    from models.reconstruction.online_em import OnlineEmSettings
    from models.reconstruction.particle_data import particle_data
    from models.reconstruction.volume_io import write_volume

    particles = simulate_particles(name, N_PARTICLES, BOX_PX, SNR, seed)
    pixel = particles.pixel_size_angstrom
    data = particle_data(particles.images, pixel, particles.ctf)
    settings = OnlineEmSettings(n_iterations=60, last_batch=400)
    started, started_cpu = time.perf_counter(), time.process_time()
    model = find_initial_model(data, settings, torch.eye(3)[None], n_starts=N_STARTS, seed=seed)
    seconds, cpu_s = time.perf_counter() - started, time.process_time() - started_cpu
    write_volume(folder / f"{name}-{seed}.mrc", model.volume, pixel)
    rows = (~particles.is_junk).nonzero()[:_N_MATCHED, 0]
    subset, truth_poses = data.take(rows), particles.rotations[rows]
    error = grid_error_deg(model.volume, subset, truth_poses, settings, seed)
    oracle = grid_error_deg(particles.truth, subset, truth_poses, settings, seed)
    return {
        "structure": name,
        "seed": seed,
        "recipe": RECIPE,
        "n_particles": N_PARTICLES,
        "pixel_size_angstrom": pixel,
        "is_solved": error <= MAX_RATIO * oracle,
        "is_refused": not model.acceptance.is_accepted,
        "reason": model.acceptance.reason,
        "median_error_deg": error,
        "oracle_error_deg": oracle,
        "ratio": error / oracle,
        "z_signal": model.acceptance.z_signal,
        "z_shape": model.acceptance.z_shape,
        "agreement": model.acceptance.agreement,
        "evidence": {report.name: round(report.log_evidence, 3) for report in model.reports},
        "fine_score": {r.name: round(r.fine_score, 3) for r in model.reports if r.fine_score is not None},
        "seconds": round(seconds, 1),
        "cpu_s": round(cpu_s, 1),
    }


def grid_error_deg(
    volume: Tensor, data: ParticleData, truth: Tensor, settings: OnlineEmSettings, seed: int
) -> float:
    """Match images against a map on the search's fine grid (turned at random); return the median pose error."""
    import torch

    from models.reconstruction.blobs import pose_errors_deg
    from models.reconstruction.grids import random_rotations, so3_grid
    from models.reconstruction.online_em import fine_shift_search
    from models.reconstruction.pose_search import search_globally
    from models.reconstruction.projector import volume_to_cube

    near = data.within(settings.last_shell)
    inverse_noise = (1.0 / near.mean_power().clamp_min(1e-20))[near.plane.shell]
    inverse_noise[0] = 0.0
    turn = random_rotations(1, torch.Generator().manual_seed(seed))[0]
    search = fine_shift_search(data.box_size_px, settings)
    cube = volume_to_cube(volume, settings.last_shell)
    found = search_globally(near, cube, inverse_noise, so3_grid(2) @ turn, search, n_keep=1)
    return float(pose_errors_deg(found.rotations[:, 0], truth).median())


def simulate_particles(name: str, n: int, box_px: int, snr: float, seed: int) -> SimulatedParticles:
    """Return white particles with CTF, shifts (σ 1.5 px of a 64 px box), junk and white noise of variance signal/SNR.

    The SNR is signal variance over noise variance in the whole box, the CTF applied. Half of the junk is empty, half
    shows a few large blobs of the particles' power. Projections are by cubic splines, not by the engine's slicer.
    """
    import torch

    from models.reconstruction.grids import random_rotations
    from models.reconstruction.particle_data import CtfParameters
    from models.reconstruction.projector import HalfPlane
    from models.simulation.projection import Projector

    generator = torch.Generator().manual_seed(7919 * seed + 1)
    truth, pixel = true_volume(name, box_px)
    rotations = random_rotations(n, generator)
    origin = 1.5 * box_px / 64 * torch.randn((n, 2), generator=generator)
    defocus = 10_000.0 + 12_000.0 * torch.rand(n, generator=generator)
    ctf = CtfParameters(
        defocus_u_angstrom=defocus + 150.0,
        defocus_v_angstrom=defocus - 150.0,
        astigmatism_angle_deg=180.0 * torch.rand(n, generator=generator),
        phase_shift_deg=torch.zeros(n),
        voltage_kv=300.0,
        cs_mm=2.7,
        amplitude_contrast=0.1,
    )
    # The image's content lies at −origin: origins are what centres it.
    clean = Projector(truth, pixel).project(rotations, -origin.flip(-1)) / pixel
    order = torch.randperm(n, generator=generator)
    n_junk = round(JUNK_FRACTION * n)
    is_junk = torch.zeros(n, dtype=torch.bool)
    is_junk[order[:n_junk]] = True
    power = clean[~is_junk].var(dim=(1, 2)).mean()
    empty, blobs = order[: n_junk // 2], order[n_junk // 2 : n_junk]
    clean[empty] = 0.0
    if len(blobs):
        clean[blobs] = _blobs(len(blobs), box_px, generator)
        clean[blobs] *= torch.sqrt(power / clean[blobs].var(dim=(1, 2)).mean())
    plane = HalfPlane.of(box_px, box_px // 2 - 1)
    signal = torch.cat([
        plane.images(plane.coefficients(part) * values)
        for part, values in zip(clean.split(500), ctf.evaluate(plane, pixel).split(500), strict=True)
    ])  # fmt: skip
    sigma = torch.sqrt(signal[~is_junk].var(dim=(1, 2)).mean() / snr)
    noisy = signal + sigma * torch.randn(signal.shape, generator=generator)
    return SimulatedParticles(noisy, rotations, origin, is_junk, ctf, truth, pixel)


def true_volume(name: str, box_px: int) -> tuple[Tensor, float]:
    """Return a structure's density on the box and its pixel size: 3 Å at 64 px for the rod, else what fills 64 %."""
    file = STRUCTURES[name]
    if file is None:
        return near_symmetric_rod(box_px).volume(), 3.0 * 64 / box_px
    return density_of_model(file, box_px)


def density_of_model(file: str, box_px: int) -> tuple[Tensor, float]:
    """Return the density of one of the test data's atomic models and its pixel size: it fills 64 % of the box."""
    from models.simulation.structure import density_from_atoms, read_structure

    path = Path(os.environ.get("ICESTREAM_TEST_DATA", "../shared/data")) / "models" / file
    if not path.is_file():
        raise ConfigurationError(
            "ICESTREAM_TEST_DATA", "the folder has the benchmark's structures", str(path)
        )
    structure = read_structure(path)
    pixel = round(2.0 * structure.radius_angstrom / (_FILL * box_px), 2)
    density = density_from_atoms(
        structure, box_px, pixel, resolution_angstrom=2.0 * pixel, solvent_potential_v=4.5
    )
    return density, pixel


def near_symmetric_rod(box_px: int) -> BlobPhantom:
    """Return a rod of 33 blobs (RMS 9 × 13 × 24 Å in a box of 192 Å): 15 pairs by a half turn, and three without a mate."""
    import torch

    from models.reconstruction.blobs import BlobPhantom

    generator = torch.Generator().manual_seed(24)
    scale = box_px / 192.0
    pairs = torch.randn((15, 3), generator=generator).clamp(-1.7, 1.7) * torch.tensor([9.0, 13.0, 24.0])
    mates = pairs * torch.tensor([1.0, -1.0, -1.0])
    single = torch.tensor([[6.0, 8.0, 22.0], [-7.0, 4.0, 30.0], [3.0, -10.0, 12.0]])
    centres = torch.cat((pairs, mates, single)) * scale
    sigmas = scale * 4.5 * (0.8 + 0.6 * torch.rand(15, generator=generator))
    weights = 0.5 + torch.rand(15, generator=generator)
    sigmas = torch.cat((sigmas, sigmas, torch.full((3,), 4.5 * scale)))
    weights = torch.cat((weights, weights, torch.ones(3)))
    middle = (centres * weights[:, None]).sum(0) / weights.sum()
    return BlobPhantom(box_px, centres - middle, sigmas, weights)


def _blobs(n: int, box_px: int, generator: Generator) -> Tensor:
    """Return images of four Gaussians (σ 3-8 % of the box) at random places within the particle's radius."""
    import torch

    axis = torch.arange(box_px).float() - box_px // 2
    total = torch.zeros((n, box_px, box_px))
    for _ in range(4):
        radius = 0.5 * _FILL * box_px * torch.rand(n, generator=generator)
        angle = 2.0 * math.pi * torch.rand(n, generator=generator)
        sigma = box_px * (0.03 + 0.05 * torch.rand(n, generator=generator))
        x, y = radius * torch.cos(angle), radius * torch.sin(angle)
        gx = torch.exp(-0.5 * ((axis[None] - x[:, None]) / sigma[:, None]).square())
        gy = torch.exp(-0.5 * ((axis[None] - y[:, None]) / sigma[:, None]).square())
        total += gy[:, :, None] * gx[:, None, :]
    return total
