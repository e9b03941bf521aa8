"""Benchmark of preprocessing: seconds per stage, memory, movies per hour, and RELION's own motion correction.

One movie as a camera writes it (8-bit counts in LZW TIFF, raw, with a gain reference): a scene of particles under
one CTF, moved by whole pixels from frame to frame, with Poisson counts. It is cheaper than the virtual
microscope's physics and has no local motion; the time that the stages take does not depend on that. Every
measurement is a fresh process, pinned to the core that it is given, so that its memory is its own.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from actors.preprocess.settings import PreprocessSettings

SHAPE_YX = (3838, 3710)
EER_SHAPE_YX = (4096, 4096)
PIXEL_SIZE_ANGSTROM = 0.885
VOLTAGE_KV, CS_MM = 200.0, 1.4
ELECTRONS_PER_PX = 1.2
"""Per frame; 1.5 e/Å², 61 e/Å² in 40 frames."""

DIAMETER_ANGSTROM = 180.0
RELION = "relion_run_motioncorr"
PATCHES_PER_SIDE = 5
STAGES = ("read", "motion", "ctf", "pick", "extract", "write")
PREDICTED_CORES = (8, 32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One movie in one process: CPU seconds per stage and in all, peak resident memory."""

    stage_cpu_s: dict[str, float]
    cpu_s: float
    peak_bytes: int
    n_picks: int
    gain_residual: float | None


def run_preprocess_benchmark(
    folder: Path, *, n_frames: int = 40, shape_yx: tuple[int, int] = SHAPE_YX, n_eer_frames: int = 1000
) -> list[dict[str, Any]]:
    """Measure preprocessing of one movie on one core and on two, and the memory of every format's reader."""
    with _fresh_process() as process:
        movie, gain = process.submit(write_bench_movie, folder, n_frames, shape_yx).result()
    cores = sorted(os.sched_getaffinity(0))[:2]
    float32_bytes = 4 * n_frames * shape_yx[0] * shape_yx[1]
    figures = []
    for used in (cores[:1], cores)[: len(cores)]:
        ours = _preprocess_on(folder / f"ours{len(used)}", movie, gain, used)
        relion = None
        if shutil.which(RELION):
            relion = _run_relion(folder / f"relion{len(used)}", movie, gain, n_frames, used)
        figures.append(_figure(ours, relion, float32_bytes))
    figures.append(_orientation_figure(folder, movie, gain, n_frames, figures[0]["value"]))
    formats = ("tiff", "mrc", "mrc-float", "eer")
    return figures + [_memory_figure(folder, name, n_frames, shape_yx, n_eer_frames) for name in formats]


def write_bench_movie(folder: Path, n_frames: int, shape_yx: tuple[int, int]) -> tuple[Path, Path]:
    """Write the movie and the gain reference that it needs; return their paths."""
    from stream.ingest.movie_writers import write_gain_reference, write_tiff

    rng = np.random.default_rng(0)
    gain = rng.normal(1.0, 0.03, shape_yx).astype(np.float32)
    write_gain_reference(folder / "gain.mrc", gain)
    write_tiff(folder / "movie.tiff", draw_frames(n_frames, gain, rng))
    return folder / "movie.tiff", folder / "gain.mrc"


def draw_frames(
    n_frames: int, gain: NDArray[np.float32], rng: np.random.Generator
) -> Iterator[NDArray[np.uint8]]:
    """Yield raw counts of a scene that drifts by whole pixels, fast at first."""
    from models.simulation.camera import draw_poisson

    scene = _draw_scene((gain.shape[0], gain.shape[1]), rng)
    for frame in range(n_frames):
        drift = (round(8.0 * (1.0 - math.exp(-frame / 4.0))), round(-0.1 * frame))
        expected = ELECTRONS_PER_PX * np.roll(scene, drift, axis=(0, 1)) / gain
        yield np.minimum(draw_poisson(expected.astype(np.float32), rng), 255).astype(np.uint8)


def _draw_scene(shape_yx: tuple[int, int], rng: np.random.Generator) -> NDArray[np.float32]:
    """Return electrons relative to the mean: balls of protein and amorphous ice under one CTF."""
    import torch

    from models.optics.ctf import evaluate_ctf, frequency_grid

    ice = 0.35 * rng.standard_normal(shape_yx, dtype=np.float32)
    radius = 0.5 * DIAMETER_ANGSTROM / PIXEL_SIZE_ANGSTROM
    step = 1.6 * 2.0 * radius
    reach = math.ceil(radius)
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    ball = np.sqrt(np.clip(1.0 - (y**2 + x**2) / radius**2, 0.0, None)).astype(np.float32)
    for cy in np.arange(step, shape_yx[0] - step, step):
        for cx in np.arange(step, shape_yx[1] - step, step):
            top, left = round(cy + rng.uniform(-0.2, 0.2) * radius) - reach, round(cx) - reach
            ice[top : top + len(ball), left : left + len(ball)] += 1.2 * ball
    ky, kx = frequency_grid(shape_yx, PIXEL_SIZE_ANGSTROM)
    ctf = evaluate_ctf(
        ky,
        kx,
        defocus_u_angstrom=12000.0,
        defocus_v_angstrom=11600.0,
        astigmatism_angle_deg=30.0,
        voltage_kv=VOLTAGE_KV,
        cs_mm=CS_MM,
        amplitude_contrast=0.1,
    )
    image = torch.fft.irfft2(torch.fft.rfft2(torch.from_numpy(ice)) * ctf, s=shape_yx)
    scene: NDArray[np.float32] = np.clip(1.0 - 0.25 * image.numpy(), 0.05, None).astype(np.float32)
    return scene


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """A worker of one thread on each core, all at work at once; wall seconds are those per movie of them together."""

    workers: tuple[Measurement, ...]
    wall_s: float

    def mean_cpu_s(self, *stages: str) -> float:
        return sum(w.stage_cpu_s[stage] for w in self.workers for stage in stages) / len(self.workers)


def _preprocess_on(folder: Path, movie: Path, gain: Path, cores: list[int]) -> _Run:
    processes = [_fresh_process() for _ in cores]
    try:
        for process in processes:  # started, and everything imported, before the clock runs
            process.submit(_settings, gain).result()
        started = time.perf_counter()
        running = [
            process.submit(_measure_preprocess, folder / str(core), movie, gain, core)
            for process, core in zip(processes, cores, strict=True)
        ]
        workers = tuple(future.result() for future in running)
        return _Run(workers=workers, wall_s=(time.perf_counter() - started) / len(cores))
    finally:
        for process in processes:
            process.shutdown()


def _fresh_process() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn"))


def _settings(gain: Path) -> PreprocessSettings:
    from actors.preprocess.exposure import (
        preprocess_exposure,
    )  # imported here so that no measurement pays for it
    from actors.preprocess.settings import PreprocessSettings
    from stream.records.values import Optics

    del preprocess_exposure
    return PreprocessSettings(
        pixel_size_angstrom=PIXEL_SIZE_ANGSTROM,
        optics=Optics(voltage_kv=VOLTAGE_KV, cs_mm=CS_MM, amplitude_contrast=0.1),
        dose_e_per_angstrom2=60.0,
        particle_diameter_angstrom=DIAMETER_ANGSTROM,
        gain=gain,
    )


def _measure_preprocess(folder: Path, movie: Path, gain: Path, core: int) -> Measurement:
    from actors.preprocess.clock import StageClock
    from actors.preprocess.exposure import preprocess_exposure
    from stream.ingest.validation import ExpectedAcquisition, validate_image_file
    from stream.records.values import InputKind
    from stream.store.layout import OutputLayout

    os.sched_setaffinity(0, {core})
    settings = _settings(gain)
    exposure = validate_image_file(
        movie, movie.name, InputKind.MOVIE, expected=ExpectedAcquisition(), gain=None
    )
    clock = StageClock(now=time.process_time)
    cpu = time.process_time()
    result = preprocess_exposure(exposure, settings, OutputLayout(folder), clock=clock)
    return Measurement(
        stage_cpu_s=result.seconds,
        cpu_s=time.process_time() - cpu,
        peak_bytes=_peak_bytes(),
        n_picks=result.n_picks,
        gain_residual=result.gain_residual,
    )


def _peak_bytes() -> int:
    """Return this process's own peak resident memory (rusage would have that of the one that started it, too)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


@dataclass(frozen=True, slots=True)
class _Relion:
    wall_s: float
    cpu_s: float
    peak_bytes: int


def _run_relion(folder: Path, movie: Path, gain: Path, n_frames: int, cores: list[int]) -> _Relion:
    """Run RELION's own motion correction with dose weighting and patches; also its reading and writing count."""
    folder.mkdir()
    star = folder / "movies.star"
    star.write_text(
        "# version 30001\n\ndata_optics\n\nloop_\n_rlnOpticsGroupName #1\n_rlnOpticsGroup #2\n"
        "_rlnMicrographOriginalPixelSize #3\n_rlnVoltage #4\n_rlnSphericalAberration #5\n_rlnAmplitudeContrast #6\n"
        f"opticsGroup1 1 {PIXEL_SIZE_ANGSTROM} {VOLTAGE_KV} {CS_MM} 0.1\n\n\n"
        "data_movies\n\nloop_\n_rlnMicrographMovieName #1\n_rlnOpticsGroup #2\n"
        f"{movie.name} 1\n\n"
    )
    command = [
        "taskset", "-c", ",".join(map(str, cores)),
        RELION, "--use_own", "--i", str(star), "--o", f"{folder.name}/", "--j", str(len(cores)),
        "--gainref", gain.name, "--patch_x", str(PATCHES_PER_SIDE), "--patch_y", str(PATCHES_PER_SIDE),
        "--bfactor", "150", "--dose_weighting", "--save_noDW", "--dose_per_frame", str(60.0 / n_frames),
    ]  # fmt: skip
    started = time.perf_counter()
    with (folder / "log.txt").open("wb") as log:
        process = subprocess.Popen(command, cwd=movie.parent, stdout=log, stderr=log)
        _, _, usage = os.wait4(process.pid, 0)
    wall_s = time.perf_counter() - started
    if not list(folder.rglob("*_noDW.mrc")):
        raise RuntimeError(f"{RELION} made no micrograph: {(folder / 'log.txt').read_text()[-2000:]}")
    return _Relion(wall_s, usage.ru_utime + usage.ru_stime, 1024 * usage.ru_maxrss)


def _figure(ours: _Run, relion: _Relion | None, float32_bytes: int) -> dict[str, Any]:
    n = len(ours.workers)
    cpu_s = sum(worker.cpu_s for worker in ours.workers) / n
    motion_s = ours.mean_cpu_s("read", "motion")
    peak_bytes = max(worker.peak_bytes for worker in ours.workers)
    figure: dict[str, Any] = {
        "name": f"preprocess on {n} core{'' if n == 1 else 's'}",
        "value": cpu_s,
        "unit": "CPU s per movie",
        "baseline": f"{RELION} is not installed",
        "ratio": math.nan,
        "wall_s": ours.wall_s,
        "movies_per_h": 3600.0 / ours.wall_s,
        "peak_memory_ratio": peak_bytes / float32_bytes,
        "peak_memory_bytes": peak_bytes,
        "picks": ours.workers[0].n_picks,
        "gain_residual": ours.workers[0].gain_residual,
        **{f"{stage}_cpu_s": ours.mean_cpu_s(stage) for stage in STAGES},
        # disk and memory bandwidth taken as no limit
        **{f"predicted_movies_per_h_{cores}_cores": 3600.0 * cores / cpu_s for cores in PREDICTED_CORES},
        "gpus": "not measured on a GPU: preprocessing runs on cores alone",
    }
    if relion is not None:
        figure |= {
            "baseline": f"{RELION} --use_own --j {n}: {relion.cpu_s:.1f} CPU s; reading and motion {motion_s:.1f} CPU s",
            "ratio": relion.cpu_s / motion_s,
            "relion_wall_s": relion.wall_s,
            "relion_cpu_s": relion.cpu_s,
            "relion_peak_memory_ratio": relion.peak_bytes / float32_bytes,
        }
    return figure


def _orientation_figure(
    folder: Path, movie: Path, gain: Path, n_frames: int, movie_cpu_s: float
) -> dict[str, Any]:
    """Find how a reference lies that was turned upside down and left to right."""
    import mrcfile

    from stream.ingest.movie_writers import write_gain_reference

    turned = folder / "turned.mrc"
    write_gain_reference(turned, np.ascontiguousarray(mrcfile.read(gain)[::-1, ::-1]))
    with _fresh_process() as process:
        found = process.submit(_measure_orientation, movie, turned).result()
    if found["found"] != "180, False, False":
        raise RuntimeError(f"gain reference: {found}, it lies turned by 180 degrees")
    return {
        "name": "gain orientation",
        "value": found["cpu_s"],
        "unit": "CPU s for one movie",
        "baseline": f"preprocessing one movie: {movie_cpu_s:.1f} CPU s",
        "ratio": found["cpu_s"] / movie_cpu_s,
        "contrast_standard_errors": found["contrast"],
        "peak_memory_ratio": found["peak_bytes"] / (n_frames * turned.stat().st_size),
    }


def _measure_orientation(movie: Path, gain: Path) -> dict[str, Any]:
    from actors.preprocess.gain import orient_session_gain
    from stream.ingest.validation import ExpectedAcquisition, validate_image_file
    from stream.records.values import InputKind

    exposure = validate_image_file(
        movie, movie.name, InputKind.MOVIE, expected=ExpectedAcquisition(), gain=None
    )
    settings = _settings(gain)
    started = time.process_time()
    oriented = orient_session_gain([exposure], settings)
    way = oriented.orientation
    return {
        "cpu_s": time.process_time() - started,
        "contrast": oriented.contrast,
        "found": oriented.note if way is None else f"{way.rotate_deg}, {way.flip_x}, {way.flip_y}",
        "peak_bytes": _peak_bytes(),
    }


def _memory_figure(
    folder: Path, name: str, n_frames: int, shape_yx: tuple[int, int], n_eer_frames: int
) -> dict[str, Any]:
    """Read a whole movie of one format frame by frame; its memory is above that of a process that reads nothing."""
    n = n_eer_frames if name == "eer" else n_frames
    path = _write_format(folder, name, n, EER_SHAPE_YX if (name, shape_yx) == ("eer", SHAPE_YX) else shape_yx)
    with _fresh_process() as process:
        read = process.submit(_measure_reading, path).result()
    path.unlink()
    return {
        "name": f"read {name}",
        "value": read["peak_bytes"] / read["float32_bytes"],
        "unit": "peak memory / float32 size of the frames",
        "baseline": "all frames in memory at once",
        "ratio": read["peak_bytes"] / read["float32_bytes"],
        **read,
    }


def _write_format(folder: Path, name: str, n_frames: int, shape_yx: tuple[int, int]) -> Path:
    """Write a movie of equal frames; the content does not matter to memory."""
    import mrcfile

    from stream.ingest.movie_writers import encode_eer_frame, write_eer_strips, write_tiff

    rng = np.random.default_rng(1)
    counts = rng.poisson(ELECTRONS_PER_PX, shape_yx).astype(np.uint8)
    match name:
        case "tiff":
            path = folder / "read.tiff"
            write_tiff(path, (counts for _ in range(n_frames)))
        case "eer":
            path = folder / "read.eer"
            events = (rng.random(shape_yx, dtype=np.float32) < 0.03).astype(np.uint8)
            strip = encode_eer_frame(events, rng)
            write_eer_strips(path, ((strip, shape_yx) for _ in range(n_frames)))
        case _:
            path = folder / "read.mrcs"
            mode, dtype = (2, np.float32) if name == "mrc-float" else (0, np.int8)
            with mrcfile.new_mmap(path, (n_frames, *shape_yx), mrc_mode=mode, overwrite=True) as mrc:
                for index in range(n_frames):
                    mrc.data[index] = counts.astype(dtype)
                mrc.set_image_stack()
                mrc.voxel_size = PIXEL_SIZE_ANGSTROM
    return path


def _measure_reading(path: Path) -> dict[str, float]:
    """Read the frames as preprocessing does, 40 fractions of an EER, and keep none."""
    from stream.ingest.movie_reader import inspect_movie, iterate_frames, n_iterated_frames

    idle = _peak_bytes()
    started = time.process_time()
    header = inspect_movie(path)
    for _ in iterate_frames(path, eer_fractions=40):
        pass
    n_frames = n_iterated_frames(header, eer_fractions=40)
    return {
        "cpu_s": time.process_time() - started,
        "peak_bytes": _peak_bytes(),
        "idle_bytes": idle,
        "float32_bytes": 4 * n_frames * math.prod(header.shape_yx),
        "file_bytes": path.stat().st_size,
        "file_frames": header.n_frames,
    }
