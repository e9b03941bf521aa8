"""Benchmark of movie alignment: simulated movies with known motion, ours against RELION's own implementation.

Both programs read the same MRC movies and the same gain reference, with one thread, the same number of patches and
dose weighting, and write motion files that one reader evaluates. (RELION turns TIFF movies upside down, MRC not.)
RELION is run as a program and is no part of icestream; on Debian it is the package `relion`.
"""

from __future__ import annotations

import math
import os
import resource
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stream.records.errors import ConfigurationError, IcestreamError

if TYPE_CHECKING:
    from models.simulation.exposure import VirtualMicroscope
    from models.simulation.motion import Motion

PROGRAM = "relion_run_motioncorr"
PIXEL_SIZE_ANGSTROM = 0.885
VOLTAGE_KV, CS_MM, AMPLITUDE_CONTRAST = 200.0, 1.4, 0.1
DOSE_PER_FRAME_E_PER_ANGSTROM2 = 1.277
"""EMPIAR-10204's optics and dose; its whole frames move by 9-17 Å, corners by 2-5 Å against them."""

_CORNERS = ((0.05, 0.05), (0.05, 0.95), (0.95, 0.05), (0.95, 0.95))
_GRID = tuple((y, x) for y in np.linspace(0.05, 0.95, 7) for x in np.linspace(0.05, 0.95, 7))
_STRUCTURE = "phantom:1:mass_kda=460:symmetry=D2"
# EMPIAR-10204's micrographs of 3838 x 3710 px hold about this many particles.
_PARTICLES_PER_MEGAPIXEL = 21.0

_RELION_STAR = """
# version 30001

data_optics

loop_
_rlnOpticsGroupName #1
_rlnOpticsGroup #2
_rlnMicrographOriginalPixelSize #3
_rlnVoltage #4
_rlnSphericalAberration #5
_rlnAmplitudeContrast #6
opticsGroup1 1 {pixel} {voltage} {cs} {contrast}

data_movies

loop_
_rlnMicrographMovieName #1
_rlnOpticsGroup #2
movie.mrcs 1
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Outcome:
    """What one program made of one movie; errors in px, times of its process."""

    centre_px: float
    corners_px: float
    field_px: float
    wall_s: float
    cpu_s: float
    ring_weighted_angstrom: float
    ring_plain_angstrom: float
    score_weighted: float
    score_plain: float
    truth_correlation: float


def run_motion_benchmark(
    folder: Path,
    *,
    side_px: int = 2048,
    n_movies: int = 8,
    n_frames: int = 24,
    n_patches: int = 5,
    motion_angstrom: float = 12.0,
    local_motion_angstrom: float = 2.0,
    shape_yx: tuple[int, int] | None = None,
    seed: int = 1,
) -> list[dict[str, Any]]:
    """Align `n_movies` movies with both programs and compare error, processor time, Thon rings and the truth's image.

    The error at a place is the rms over frames and both axes of the motion file's trajectory against the truth,
    less its mean over the frames (a shift that all frames share is no motion). Centre and four corners (at 5 %
    of the field from the edges) are pooled over movies, as is a grid of 7 x 7 for the whole field.
    """
    program = shutil.which(PROGRAM)
    if program is None:
        raise ConfigurationError(
            PROGRAM,
            "is on the PATH (on Debian: apt-get install relion); the benchmark compares with it",
            "none",
        )
    shape = shape_yx or (side_px, side_px)
    microscope = _build_microscope(shape, n_frames, motion_angstrom, local_motion_angstrom, seed=seed)
    ours, relions, still = [], [], []
    for index in range(n_movies):
        work = folder / f"movie{index}"
        work.mkdir()
        motion = _write_movie(work, microscope, index)
        still.append(float(np.sqrt(np.mean(_about_mean(_truth(motion, _positions(shape, _GRID))) ** 2))))
        ours.append(_run_ours(work, motion, n_patches))
        relions.append(_run_relion(work, program, motion, n_patches))
        shutil.rmtree(work)
    return _figures(ours, relions, still, shape=shape, n_frames=n_frames, n_patches=n_patches)


def _build_microscope(
    shape: tuple[int, int], n_frames: int, motion: float, local: float, *, seed: int
) -> VirtualMicroscope:
    from models.simulation.session import build_microscope
    from models.simulation.settings import MicroscopeSettings, SessionSettings, SpecimenSettings

    settings = SessionSettings(
        seed=seed,
        specimen=SpecimenSettings(
            particles_per_exposure=_PARTICLES_PER_MEGAPIXEL * shape[0] * shape[1] / 1e6, junk_fraction=0.0
        ),
        microscope=MicroscopeSettings(
            shape_yx_px=shape,
            pixel_size_angstrom=PIXEL_SIZE_ANGSTROM,
            voltage_kv=VOLTAGE_KV,
            cs_mm=CS_MM,
            amplitude_contrast=AMPLITUDE_CONTRAST,
            dose_e_per_angstrom2=DOSE_PER_FRAME_E_PER_ANGSTROM2 * n_frames,
            n_frames=n_frames,
            motion_angstrom=motion,
            local_motion_angstrom=local,
        ),
    )
    return build_microscope(_STRUCTURE, settings)


def _write_movie(work: Path, microscope: VirtualMicroscope, index: int) -> Motion:
    from stream.ingest.movie_writers import write_gain_reference, write_mrc

    exposure = microscope.expose(index)
    write_mrc(work / "movie.mrcs", exposure.frames(), pixel_size_angstrom=PIXEL_SIZE_ANGSTROM)
    write_gain_reference(work / "gain.mrc", microscope.gain)
    np.save(work / "truth.npy", exposure.expected_frame(0).numpy())
    return exposure.truth.motion


def _run_ours(work: Path, motion: Motion, n_patches: int) -> _Outcome:
    import torch

    from actors.preprocess.clock import StageClock
    from actors.preprocess.movie import align_movie
    from actors.preprocess.settings import PreprocessSettings
    from models.motion.align import AlignmentSettings
    from stream.ingest.files import identify_file
    from stream.ingest.movie_reader import inspect_movie
    from stream.records.values import AcquisitionMetadata, Exposure, ExposureId, InputKind, Optics
    from stream.sinks.mrc_images import write_micrograph
    from stream.store.layout import OutputLayout

    path = work / "movie.mrcs"
    header = inspect_movie(path)
    exposure = Exposure(
        exposure_id=ExposureId("movie"),
        name="movie",
        kind=InputKind.MOVIE,
        file=identify_file(path),
        n_frames=header.n_frames,
        shape_yx=header.shape_yx,
        metadata=AcquisitionMetadata(),
    )
    settings = PreprocessSettings(
        pixel_size_angstrom=PIXEL_SIZE_ANGSTROM,
        optics=Optics(voltage_kv=VOLTAGE_KV, cs_mm=CS_MM, amplitude_contrast=AMPLITUDE_CONTRAST),
        dose_e_per_angstrom2=DOSE_PER_FRAME_E_PER_ANGSTROM2 * header.n_frames,
        gain=work / "gain.mrc",
        alignment=AlignmentSettings(patch_angstrom=max(header.shape_yx) * PIXEL_SIZE_ANGSTROM / n_patches),
    )
    layout = OutputLayout(work / "ours")
    for output in (layout.motion("movie"), layout.micrograph("movie")):
        output.parent.mkdir(parents=True, exist_ok=True)
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    started, cpu = time.perf_counter(), time.process_time()
    aligned = align_movie(exposure, settings, layout, StageClock())
    plain = layout.micrograph("movie").with_name("plain.mrc")
    write_micrograph(layout.micrograph("movie"), aligned.summed.micrograph.numpy(), PIXEL_SIZE_ANGSTROM)
    write_micrograph(plain, aligned.summed.unweighted.numpy(), PIXEL_SIZE_ANGSTROM)
    wall, cpu = time.perf_counter() - started, time.process_time() - cpu
    torch.set_num_threads(n_threads)
    return _judge(work, layout.motion("movie"), (layout.micrograph("movie"), plain), motion, wall, cpu)


def _run_relion(work: Path, program: str, motion: Motion, n_patches: int) -> _Outcome:
    text = _RELION_STAR.format(
        pixel=PIXEL_SIZE_ANGSTROM, voltage=VOLTAGE_KV, cs=CS_MM, contrast=AMPLITUDE_CONTRAST
    )
    (work / "movies.star").write_text(text)
    patches = str(n_patches)
    command = [
        program,
        "--use_own",
        "--i",
        "movies.star",
        "--o",
        "relion",
        "--j",
        "1",
        "--gainref",
        "gain.mrc",
    ]
    command += ["--patch_x", patches, "--patch_y", patches, "--dose_weighting", "--save_noDW"]
    command += ["--dose_per_frame", str(DOSE_PER_FRAME_E_PER_ANGSTROM2)]
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    run = subprocess.run(
        command,
        cwd=work,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    star = work / "relion" / "movie.star"
    # a missing Ghostscript is complained about at the very end, when everything is written
    if not star.is_file():
        raise IcestreamError(PROGRAM, "aligns the movie", (run.stderr or run.stdout)[-500:])
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    micrographs = (work / "relion" / "movie.mrc", work / "relion" / "movie_noDW.mrc")
    return _judge(work, star, micrographs, motion, wall, cpu)


def _judge(
    work: Path, star: Path, micrographs: tuple[Path, Path], motion: Motion, wall_s: float, cpu_s: float
) -> _Outcome:
    import torch

    from models.optics.ctf_fit import Microscope, fit_ctf
    from stream.ingest.movie_reader import read_micrograph
    from stream.sinks.motion_star import evaluate_motion, read_motion_star

    table = read_motion_star(star)
    shape = table.movie_shape_yx

    def error(places: tuple[tuple[float, float], ...]) -> float:
        positions = _positions(shape, places)
        # corrections are minus the specimen's displacement
        difference = evaluate_motion(table, positions) + _truth(motion, positions)
        return float(np.sqrt(np.mean(_about_mean(difference) ** 2)))

    microscope = Microscope(voltage_kv=VOLTAGE_KV, cs_mm=CS_MM, amplitude_contrast=AMPLITUDE_CONTRAST)
    images = [read_micrograph(path) for path in micrographs]
    fits = [fit_ctf(torch.from_numpy(image), PIXEL_SIZE_ANGSTROM, microscope)[0] for image in images]
    return _Outcome(
        centre_px=error(((0.5, 0.5),)),
        corners_px=error(_CORNERS),
        field_px=error(_GRID),
        wall_s=wall_s,
        cpu_s=cpu_s,
        ring_weighted_angstrom=fits[0].fit_resolution_angstrom,
        ring_plain_angstrom=fits[1].fit_resolution_angstrom,
        score_weighted=fits[0].score,
        score_plain=fits[1].score,
        truth_correlation=_correlate(images[0], np.load(work / "truth.npy")),
    )


def _correlate(image: NDArray[np.float32], truth: NDArray[np.float32]) -> float:
    """Return the mean Fourier ring correlation between 10 and 2.5 Å with the noise-free first frame.

    Particles, ice and optics are in that frame as they were drawn, in the coordinates that the micrograph is to have.
    """
    import torch

    from models.fourier.filters import squared_frequencies

    shape = (int(image.shape[0]), int(image.shape[1]))
    window = torch.hann_window(shape[0])[:, None] * torch.hann_window(shape[1])[None, :]
    a, b = (
        torch.fft.rfft2((x - x.mean()) * window) for x in (torch.from_numpy(image), torch.from_numpy(truth))
    )
    ring = (squared_frequencies(shape, PIXEL_SIZE_ANGSTROM).sqrt() * 100.0).long()
    correlations = []
    for index in range(10, 40):
        x, y = a[ring == index], b[ring == index]
        power = x.abs().square().sum() * y.abs().square().sum()
        correlations.append(float((x * y.conj()).real.sum() / power.sqrt()))
    return sum(correlations) / len(correlations)


def _positions(shape: tuple[int, int], places: tuple[tuple[float, float], ...]) -> NDArray[np.float64]:
    return np.asarray(places) * np.asarray(shape, dtype=np.float64)


def _truth(motion: Motion, positions: NDArray[np.float64]) -> NDArray[np.float64]:
    return motion.global_yx_px[:, None] + motion.local_yx_px(positions[:, 0], positions[:, 1])


def _about_mean(trajectories: NDArray[np.floating]) -> NDArray[np.floating]:
    return np.asarray(trajectories - trajectories.mean(axis=0))


def _figures(
    ours: list[_Outcome],
    relions: list[_Outcome],
    still: list[float],
    *,
    shape: tuple[int, int],
    n_frames: int,
    n_patches: int,
) -> list[dict[str, Any]]:
    def pooled(outcomes: list[_Outcome], name: str) -> float:
        return math.sqrt(sum(getattr(o, name) ** 2 for o in outcomes) / len(outcomes))

    def mean(outcomes: list[_Outcome], name: str) -> float:
        return float(sum(getattr(o, name) for o in outcomes)) / len(outcomes)

    baseline = f"{PROGRAM} --use_own, the same movies, patches and dose weights, one thread, same run"
    common = {"n_movies": len(ours), "shape_yx": list(shape), "n_frames": n_frames, "n_patches": n_patches}
    figures = []
    for part in ("corners", "centre", "field"):
        value, reference = pooled(ours, f"{part}_px"), pooled(relions, f"{part}_px")
        figures.append(
            {"name": f"motion-error-{part}", "value": value, "unit": "px rms", "baseline": baseline}
            | {"baseline_value": reference, "ratio": value / reference}
            | {"uncorrected_px": math.sqrt(sum(s * s for s in still) / len(still))}
            | {"per_movie": [round(getattr(o, f"{part}_px"), 4) for o in ours]}
            | {"baseline_per_movie": [round(getattr(o, f"{part}_px"), 4) for o in relions], **common}
        )
    for name in ("cpu_s", "wall_s"):
        value, reference = mean(ours, name), mean(relions, name)
        figures.append(
            {"name": f"motion-{name[:-2]}", "value": value, "unit": "s per movie", "baseline": baseline}
            | {"baseline_value": reference, "ratio": value / reference, **common}
        )
    for name in ("ring_weighted_angstrom", "ring_plain_angstrom"):
        value, reference = mean(ours, name), mean(relions, name)
        score = name.replace("ring", "score").removesuffix("_angstrom")
        figures.append(
            {"name": f"motion-thon-{name.split('_')[1]}", "value": value, "unit": "Å", "baseline": baseline}
            | {"baseline_value": reference, "ratio": value / reference}
            | {"score": mean(ours, score), "baseline_score": mean(relions, score)}
            | {"per_movie": [round(getattr(o, name), 3) for o in ours]}
            | {"baseline_per_movie": [round(getattr(o, name), 3) for o in relions], **common}
        )
    value, reference = mean(ours, "truth_correlation"), mean(relions, "truth_correlation")
    figures.append(
        {
            "name": "motion-truth-correlation",
            "value": value,
            "unit": "mean FRC, 10-2.5 Å",
            "baseline": baseline,
        }
        | {"baseline_value": reference, "ratio": value / reference}
        | {"per_movie": [round(o.truth_correlation, 4) for o in ours]}
        | {"baseline_per_movie": [round(o.truth_correlation, 4) for o in relions], **common}
    )
    return figures
