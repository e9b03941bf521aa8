"""Benchmark of the embedded engine beside RELION on the same particles: initial model, then refinement.

RELION runs with the usual settings of its InitialModel and 3D auto-refine jobs (`INITIAL_MODEL`, `AUTO_REFINE`); both engines refine
from the same start map with the same half sets and mask diameter. RELION's full course takes hours on a CPU: a time limit
stops it, the last map that it wrote is measured, and how far it had come is stated. Times are wall and CPU seconds
of both, everything included but the reading of the truth.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stream.commands.bench_convergence import BOX_PX, SNR, simulate_particles
from stream.records.errors import ConfigurationError

if TYPE_CHECKING:
    from torch import Tensor

    from models.reconstruction.particle_data import CtfParameters

SETS = ("ribozyme", "rod", "antibody", "betagal")
"""Three simulated sets, and the 2,374 picks of EMPIAR-10204 (D2)."""

DEFAULT_SIZE = 1_000
DEFAULT_BOX_PX = 32
DEFAULT_LIMIT_S = 600.0
START_ANGSTROM = 30.0

INITIAL_MODEL = (
    "--sgd --denovo_3dref --ctf --K 1 --flatten_solvent --zero_mask --pool 3 --pad 1 --skip_gridding "
    "--sgd_ini_iter 50 --sgd_inbetween_iter 200 --sgd_fin_iter 50 --sgd_ini_resol 35 --sgd_fin_resol 15 "
    "--sgd_ini_subset 100 --sgd_fin_subset 500 --sgd_write_iter 10 --oversampling 1 --healpix_order 1 "
    "--offset_range 6 --offset_step 4 --dont_combine_weights_via_disc --j 1"
)
N_SGD_ITERATIONS = 300

MPI_RUN = "mpirun -n 3 --oversubscribe --allow-run-as-root --bind-to none --mca mpi_yield_when_idle 1"

AUTO_REFINE = (
    "--auto_refine --split_random_halves --ctf --firstiter_cc --flatten_solvent --zero_mask --pool 3 --pad 2 "
    "--oversampling 1 --healpix_order 2 --auto_local_healpix_order 4 --offset_range 5 --offset_step 2 "
    "--low_resol_join_halves 40 --norm --scale --dont_combine_weights_via_disc --j 1"
)


@dataclass(frozen=True, slots=True)
class PreparedSet:
    """One set on disk: star, truth map, and what both engines are told."""

    name: str
    star: Path
    truth: Tensor
    pixel_size_angstrom: float
    symmetry: str
    diameter_angstrom: float
    n_particles: int


@dataclass(frozen=True, slots=True)
class TimedRun:
    """Seconds of a program, whether it came to its end, and the iterations it had done."""

    wall_s: float
    cpu_s: float
    is_finished: bool
    n_iterations: int


def run_engine_benchmark(
    folder: Path,
    *,
    n_particles: int = DEFAULT_SIZE,
    box_px: int = DEFAULT_BOX_PX,
    limit_s: float = DEFAULT_LIMIT_S,
    part: str | None = None,
) -> list[dict[str, Any]]:
    """Run the sets of `part` (names with commas, default `ribozyme`); return two figures per set.

    Sets whose figures `engine.jsonl` has already (same size, box and limit) are not run again.
    """
    names = ["ribozyme"] if part is None else part.split(",")
    for name in names:
        if name not in SETS:
            raise ConfigurationError("--part", f"a set is one of {', '.join(SETS)}", name)
    if shutil.which("relion_refine_mpi") is None or shutil.which("mpirun") is None:
        raise ConfigurationError("bench engine", "RELION 3.1 and mpirun are on PATH", "relion_refine_mpi")
    done_file = folder / "engine.jsonl"
    figures = []
    for name in names:
        key = {"set": name, "size": n_particles, "box_px": box_px, "limit_s": limit_s}
        own = [f for f in _read_lines(done_file) if f["key"] == key]
        if not own:
            own = [figure | {"key": key} for figure in _run_set(folder, name, n_particles, box_px, limit_s)]
            with done_file.open("a") as lines:
                lines.writelines(json.dumps(figure) + "\n" for figure in own)
        figures += [{k: v for k, v in figure.items() if k != "key"} for figure in own]
    return figures


def _read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _run_set(folder: Path, name: str, n_particles: int, box_px: int, limit_s: float) -> list[dict[str, Any]]:
    from actors.engines.base import EngineInput, EngineSettings, SeedRefused
    from actors.engines.embedded import EmbeddedEngine

    work = folder / f"{name}-{n_particles}-{box_px}"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    prepared = prepare_set(work, name, n_particles, box_px)
    engine, source = EmbeddedEngine(), EngineInput(particles_star=prepared.star, root=work)
    settings = EngineSettings(
        symmetry=prepared.symmetry, mask_diameter_angstrom=prepared.diameter_angstrom, n_starts=4
    )
    note, initial = "", work / "true_start.mrc"
    clock = _Clock()
    try:
        initial = engine.initial_model(source, settings, work / "ours")
        own_time = clock.stop(n_iterations=0)
        own_initial = measure_map(initial, prepared)
    except SeedRefused as refusal:
        own_time, own_initial, note = clock.stop(n_iterations=0), {}, f"refused: {refusal.rule}"
        _write_start(initial, prepared)
    their_time = run_relion(
        ["relion_refine", *relion_input(prepared), *INITIAL_MODEL.split(), "--sym", prepared.symmetry],
        work / "relion_initial", limit_s,
    )  # fmt: skip
    their_initial = _measure_latest(work / "relion_initial", r"run_it(\d+)_class001\.mrc", prepared)
    done = max(their_time.n_iterations, 1)
    figures = [{
        "name": f"initial model, {name}",
        "value": own_time.cpu_s,
        "unit": "CPU s",
        "baseline": "RELION 3.1.3 relion_refine --sgd --denovo_3dref, same particles (CPU s)",
        "baseline_value": their_time.cpu_s,
        "ratio": own_time.cpu_s / their_time.cpu_s,
        "wall_s": own_time.wall_s,
        "relion_wall_s": their_time.wall_s,
        "relion_iterations": f"{their_time.n_iterations} of {N_SGD_ITERATIONS}",
        "relion_cpu_s_if_all_iterations_cost_the_same": their_time.cpu_s * N_SGD_ITERATIONS / done,
        **{f"ours_{k}": v for k, v in own_initial.items()},
        **{f"relion_{k}": v for k, v in their_initial.items()},
        "n_particles": prepared.n_particles,
        "box_px": box_px,
        "note": note,
    }]  # fmt: skip
    clock = _Clock()
    output = engine.refine(source, initial, settings, work / "ours")
    own_time = clock.stop(n_iterations=0)
    own = measure_map(output.map, prepared) | measure_halves(output.half1, output.half2, prepared)
    their_time = run_relion(
        [
            *MPI_RUN.split(),
            "relion_refine_mpi", *relion_input(prepared), *AUTO_REFINE.split(), "--sym", prepared.symmetry,
            "--ref", str(initial), "--ini_high", f"{START_ANGSTROM:.0f}",
        ],
        work / "relion_refine", limit_s,
    )  # fmt: skip
    theirs = _measure_relion_refinement(work / "relion_refine", prepared)
    figures.append({
        "name": f"refinement, {name}",
        "value": own_time.cpu_s,
        "unit": "CPU s",
        "baseline": "RELION 3.1.3 auto-refine (3 MPI ranks) from the same start (CPU s, its idle leader included)",
        "baseline_value": their_time.cpu_s,
        "ratio": own_time.cpu_s / their_time.cpu_s,
        "wall_s": own_time.wall_s,
        "relion_wall_s": their_time.wall_s,
        "relion_iterations": their_time.n_iterations,
        "relion_is_converged": their_time.is_finished,
        **{f"ours_{k}": v for k, v in own.items()},
        **{f"relion_{k}": v for k, v in theirs.items()},
        "start": "true map at 30 Å (our initial model was refused)" if note else "our initial model",
        "n_particles": prepared.n_particles,
        "box_px": box_px,
    })  # fmt: skip
    return figures


def relion_input(prepared: PreparedSet) -> list[str]:
    """Return what both of RELION's programs are told of a set."""
    return [
        "--i",
        prepared.star.name,
        "--particle_diameter",
        f"{prepared.diameter_angstrom:.0f}",
        "--random_seed",
        "1",
    ]


class _Clock:
    """Wall and CPU seconds of this process since it was made."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def stop(self, *, n_iterations: int) -> TimedRun:
        return TimedRun(time.perf_counter() - self._wall, time.process_time() - self._cpu, True, n_iterations)


def run_relion(command: list[str], out: Path, limit_s: float) -> TimedRun:
    """Run one of RELION's programs from the set's folder, at most `limit_s` wall seconds; it writes to `out/run`."""
    if shutil.which(command[0]) is None or shutil.which("relion_refine") is None:
        raise ConfigurationError(
            "engine", "RELION and mpirun are installed (relion_refine on PATH)", command[0]
        )
    out.mkdir(parents=True, exist_ok=True)
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    stopped_cpu_s = 0.0
    with (out / "log.txt").open("w") as log:
        child = subprocess.Popen(
            [*command, "--o", str(out / "run")],
            cwd=out.parent, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True,
        )  # fmt: skip
        try:
            code = child.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            code, stopped_cpu_s = None, _session_cpu_s(child.pid)
            os.killpg(child.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(timeout=20.0)
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # A stopped mpirun does not wait for its ranks, so that their time is not among the children's.
    cpu_s = max(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, stopped_cpu_s)
    if code not in (None, 0):
        raise RuntimeError(f"{command[0]}: exit code {code}, see {out / 'log.txt'}")
    begun = re.findall(r"(?:Gradient Descent|Expectation) iteration (\d+)", (out / "log.txt").read_text())
    n_begun = max((int(number) for number in begun), default=0)
    n_done = n_begun if code == 0 else max(n_begun - 1, 0)
    return TimedRun(time.perf_counter() - started, cpu_s, code == 0, n_done)


def _session_cpu_s(session: int) -> float:
    """Return the CPU seconds that the living processes of a session have used (Linux; 0 elsewhere)."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[3]) == session:
                ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def prepare_set(folder: Path, name: str, n_particles: int, box_px: int) -> PreparedSet:
    """Write particles.star and particles.mrcs (white, background of mean 0 and variance 1) with fixed half sets."""
    if name == "betagal":
        return _prepare_betagal(folder, n_particles, box_px)
    simulated = simulate_particles(name, n_particles, BOX_PX, SNR, seed=0)
    box = 64 * simulated.pixel_size_angstrom
    images, truth = _to_box(simulated.images, simulated.truth, simulated.pixel_size_angstrom, box_px)
    pixel = box / box_px
    star = _write_particles(folder, images, simulated.ctf, pixel)
    return PreparedSet(name, star, truth, pixel, "C1", round(0.75 * box), n_particles)


def _to_box(images: Tensor, truth: Tensor, pixel: float, box_px: int) -> tuple[Tensor, Tensor]:
    from models.fourier.transforms import fourier_resize
    from models.fourier.volumes import resample_volume

    old = int(images.shape[-1])
    return (
        fourier_resize(images, (box_px, box_px)),
        resample_volume(truth, pixel, pixel * old / box_px, box_px),
    )


def _prepare_betagal(folder: Path, n_particles: int, box_px: int) -> PreparedSet:
    import numpy as np
    import torch

    from models.fourier.volumes import resample_volume
    from models.reconstruction.particle_data import CtfParameters
    from models.simulation.structure import density_from_atoms, read_structure
    from stream.ingest.particle_sets import read_particle_table
    from stream.ingest.particle_table import iterate_images

    data = Path(os.environ.get("ICESTREAM_TEST_DATA", "../shared/data"))
    source = data / "particles" / "betagal_empiar10204" / "particles.star"
    if not source.is_file():
        raise ConfigurationError(
            "ICESTREAM_TEST_DATA", "the folder has EMPIAR-10204's particles", str(source)
        )
    table = read_particle_table(source, root=source.parent)
    rows = np.linspace(0, len(table) - 1, min(n_particles, len(table))).round().astype(np.int64)
    images = torch.from_numpy(np.stack([i.astype(np.float32) for i in iterate_images(table, rows)]))
    old_pixel, old_box = 3.54, int(images.shape[-1])
    structure = read_structure(data / "models" / "8bk7_betagal.cif.gz")
    density = density_from_atoms(
        structure, 2 * old_box, old_pixel / 2, resolution_angstrom=5.0, solvent_potential_v=4.5
    )
    density = resample_volume(density, old_pixel / 2, old_pixel, old_box)
    images, truth = _to_box(images, density, old_pixel, box_px)
    ctf = CtfParameters(
        defocus_u_angstrom=torch.from_numpy(np.asarray(table.defocus_u_angstrom)[rows]).float(),
        defocus_v_angstrom=torch.from_numpy(np.asarray(table.defocus_v_angstrom)[rows]).float(),
        astigmatism_angle_deg=torch.from_numpy(np.asarray(table.astigmatism_angle_deg)[rows]).float(),
        phase_shift_deg=torch.zeros(len(rows)),
        voltage_kv=200.0,
        cs_mm=1.4,
        amplitude_contrast=0.1,
    )
    pixel = old_pixel * old_box / box_px
    star = _write_particles(folder, images, ctf, pixel)
    return PreparedSet("betagal", star, truth, pixel, "D2", 200.0, len(rows))


def _write_particles(folder: Path, images: Tensor, ctf: CtfParameters, pixel: float) -> Path:
    import mrcfile
    import pandas as pd
    import starfile
    import torch

    n, box = len(images), int(images.shape[-1])
    axis = torch.arange(box).float() - box // 2
    outside = (axis[:, None].square() + axis.square()).sqrt() > 0.47 * box
    background = images[:, outside]
    normal = (images - background.mean(1)[:, None, None]) / background.std(1)[:, None, None]
    with mrcfile.new(folder / "particles.mrcs", normal.numpy()) as stack:
        stack.set_image_stack()
        stack.voxel_size = pixel
    optics = pd.DataFrame([{
        "rlnOpticsGroupName": "opticsGroup1", "rlnOpticsGroup": 1, "rlnMicrographOriginalPixelSize": pixel,
        "rlnVoltage": ctf.voltage_kv, "rlnSphericalAberration": ctf.cs_mm,
        "rlnAmplitudeContrast": ctf.amplitude_contrast, "rlnImagePixelSize": pixel, "rlnImageSize": box,
        "rlnImageDimensionality": 2,
    }])  # fmt: skip
    particles = pd.DataFrame({
        "rlnImageName": [f"{i + 1:06d}@particles.mrcs" for i in range(n)],
        "rlnMicrographName": [f"mic{i // 50:04d}.mrc" for i in range(n)],
        "rlnOpticsGroup": 1,
        "rlnDefocusU": ctf.defocus_u_angstrom.numpy(),
        "rlnDefocusV": ctf.defocus_v_angstrom.numpy(),
        "rlnDefocusAngle": ctf.astigmatism_angle_deg.numpy(),
        "rlnRandomSubset": [i % 2 + 1 for i in range(n)],
    })  # fmt: skip
    star = folder / "particles.star"
    starfile.write({"optics": optics, "particles": particles}, star)
    return star


def _write_start(path: Path, prepared: PreparedSet) -> None:
    from models.reconstruction.masks import gaussian_lowpass
    from models.reconstruction.volume_io import write_volume

    low = gaussian_lowpass(prepared.truth, prepared.pixel_size_angstrom, START_ANGSTROM)
    write_volume(path, low, prepared.pixel_size_angstrom)


def measure_map(path: Path, prepared: PreparedSet) -> dict[str, Any]:
    """Align a map with the truth; return the resolution at FSC 0.5 and the mean FSC to Nyquist, in a mask of the truth."""
    import torch

    from models.reconstruction.alignment import align_volumes, apply_alignment, truth_resolution
    from models.reconstruction.masks import mask_from_map
    from models.reconstruction.volume_io import read_volume

    volume, _ = read_volume(path)
    pixel = prepared.pixel_size_angstrom
    lowpass = max(12.0, 3.0 * pixel)
    mask = mask_from_map(prepared.truth, pixel, lowpass_angstrom=lowpass)
    found = align_volumes(
        volume, prepared.truth, pixel, generator=torch.Generator().manual_seed(0), lowpass_angstrom=lowpass
    )
    aligned = apply_alignment(volume, found)
    resolution, curve = truth_resolution(aligned, prepared.truth, pixel, mask)
    top = int(volume.shape[0]) // 2
    return {"truth_resolution_angstrom": resolution, "truth_mean_fsc": float(curve[1:top].mean())}


def measure_halves(half1: Path, half2: Path, prepared: PreparedSet) -> dict[str, Any]:
    """Return the half-maps' resolution (0.143) in one soft sphere of the particle's diameter, for both engines alike."""
    from models.reconstruction.fsc import fourier_shell_correlation, resolution_at
    from models.reconstruction.masks import spherical_mask
    from models.reconstruction.volume_io import read_volume

    a, b = read_volume(half1)[0], read_volume(half2)[0]
    pixel, box = prepared.pixel_size_angstrom, int(a.shape[0])
    ball = spherical_mask(box, 0.5 * prepared.diameter_angstrom / pixel, 3.0)
    curve = fourier_shell_correlation(a * ball, b * ball)
    return {"half_resolution_angstrom": resolution_at(curve, 0.143, pixel, box)}


def _latest(folder: Path, pattern: str) -> Path | None:
    found = [
        (int(match.group(1)), path)
        for path in folder.iterdir()
        if (match := re.fullmatch(pattern, path.name))
    ]
    return max(found)[1] if found else None


def _measure_latest(folder: Path, pattern: str, prepared: PreparedSet) -> dict[str, Any]:
    path = _latest(folder, pattern)
    return {} if path is None else measure_map(path, prepared)


def _measure_relion_refinement(folder: Path, prepared: PreparedSet) -> dict[str, Any]:
    """Measure the converged maps, or the last iteration's where the limit came first."""
    half1, half2 = (folder / f"run_half{h}_class001_unfil.mrc" for h in (1, 2))
    final = folder / "run_class001.mrc"
    if final.is_file() and half1.is_file() and half2.is_file():
        return measure_map(final, prepared) | measure_halves(half1, half2, prepared)
    last = _latest(folder, r"run_it(\d+)_half1_class001\.mrc")
    if last is None or "_it000_" in last.name:
        return {}
    other = last.with_name(last.name.replace("half1", "half2"))
    return measure_map(last, prepared) | measure_halves(last, other, prepared)
