"""Benchmark of honesty: what half-maps claim against what the truth says, noise alone, and views removed step by step.

Ten sets of particles (five structures and a rod, several boxes, numbers and SNRs, 5 % junk) are refined with the
engine's own schedule from the truth's 30 Å shape; the half-map resolution is compared with FSC 0.5 against the
truth, in the same mask. Particles without any signal are refined the same way and must end without a resolution.
Rings of views are then taken out of one set with known poses, and as many particles at random beside it. Each
measurement is a line of `honesty.jsonl`, and those that are there are not made again.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stream.records.errors import ConfigurationError

if TYPE_CHECKING:
    from torch import Tensor

    from models.reconstruction.blobs import BlobSet
    from models.reconstruction.particle_data import ParticleData

MAX_DIFFERENCE = 0.10
"""Relative difference up to which a half-map resolution agrees with the one against the truth."""

VIEW_LIMITS_DEG = (90, 75, 60, 50, 40, 30, 20)
"""Views farther than this from the axis are removed."""

_MAX_DRAWS = 50

N_VIEWS, VIEWS_BOX_PX, VIEWS_SNR = 6_000, 64, 0.05


@dataclass(frozen=True, slots=True)
class HonestySet:
    """One simulated set: structure of `bench_convergence`, box, number of particles and SNR (0 = noise alone)."""

    structure: str
    box_px: int
    n_particles: int
    snr: float


SETS = (
    HonestySet("rod", 48, 1500, 0.05),
    HonestySet("ribozyme", 64, 1000, 0.1),
    HonestySet("ribozyme", 48, 2500, 0.02),
    HonestySet("receptor", 48, 1500, 0.05),
    HonestySet("receptor", 64, 800, 0.05),
    HonestySet("antibody", 48, 2000, 0.05),
    HonestySet("channel", 64, 1000, 0.05),
    HonestySet("channel", 48, 600, 0.1),
    HonestySet("chaperone", 64, 1500, 0.03),
    HonestySet("chaperone", 48, 2500, 0.02),
)
NOISE = (
    HonestySet("ribozyme", 48, 1000, 0.0),
    HonestySet("channel", 48, 3000, 0.0),
    HonestySet("chaperone", 64, 1000, 0.0),
)


def run_honesty_benchmark(folder: Path, *, part: str | None = None) -> list[dict[str, Any]]:
    """Measure what of `part` ("set0-4", "noise", "views"; several with commas) is not there yet; return the figures."""
    path = folder / "honesty.jsonl"
    for key, measure in _wanted(part).items():
        if key in {row["key"] for row in read_rows(path)}:
            continue
        row = {"key": key} | measure()
        with path.open("a") as lines:
            lines.write(json.dumps(row) + "\n")
    return summarise(read_rows(path))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the measurements that are in the file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _wanted(part: str | None) -> dict[str, Callable[[], dict[str, Any]]]:
    every: dict[str, Callable[[], dict[str, Any]]] = {}
    for kind, sets in (("set", SETS), ("noise", NOISE)):
        for number, one in enumerate(sets):
            every[f"{kind}{number}"] = lambda one=one, number=number: refine_set(one, number)  # type: ignore[misc]
    for limit in VIEW_LIMITS_DEG:
        every[f"views{limit}"] = lambda limit=limit: measure_views(limit)  # type: ignore[misc]
    if part is None:
        return every
    chosen: dict[str, Callable[[], dict[str, Any]]] = {}
    for item in part.split(","):
        kind = item.rstrip("0123456789-")
        low, _, high = item[len(kind) :].partition("-")
        numbers = range(int(low or 0), int(high or low or 9_999) + 1)
        own = [key for key in every if kind and key.rstrip("0123456789") == kind]
        found = {key: every[key] for key in own if int(key[len(kind) :]) in numbers}
        if not found:
            raise ConfigurationError("--part", "set, set0-4, noise or views, several with commas", item)
        chosen |= found
    return chosen


def refine_set(one: HonestySet, seed: int) -> dict[str, Any]:
    """Refine one simulated set and measure it as the engine does, and against the truth."""
    import torch

    from models.reconstruction.alignment import align_volumes, apply_alignment, truth_resolution
    from models.reconstruction.blobs import pose_errors_deg
    from models.reconstruction.cross_evidence import cross_half_evidence
    from models.reconstruction.fsc import masked_fsc
    from models.reconstruction.masks import mask_from_map
    from models.reconstruction.particle_data import particle_data
    from models.reconstruction.pose_schedule import RefinementSettings
    from models.reconstruction.refinement import Refinement
    from stream.commands.bench_convergence import simulate_particles

    particles = simulate_particles(one.structure, one.n_particles, one.box_px, one.snr or 0.05, seed)
    pixel, truth = particles.pixel_size_angstrom, particles.truth
    half = torch.arange(one.n_particles) % 2 + 1
    started = time.process_time()
    generator = torch.Generator().manual_seed(seed)

    def begin(images: Tensor) -> Refinement:
        data = particle_data(images, pixel, particles.ctf)
        return Refinement(data, half, truth, RefinementSettings(), torch.eye(3)[None], generator)

    draws = 1
    if one.snr > 0.0:
        refinement = begin(particles.images)
    else:
        # The contrast of three in four draws of noise disagrees with the map in one half: refused at once.
        for draws in range(1, _MAX_DRAWS + 1):
            noise = torch.Generator().manual_seed(100 * seed + draws)
            with contextlib.suppress(ValueError):
                refinement = begin(torch.randn(particles.images.shape, generator=noise))
                break
        else:
            return {"structure": one.structure, "resolution_angstrom": None, "refused_draws": draws}
    while not refinement.is_done:
        refinement.step()
    result = refinement.result()
    whole = 0.5 * (result.half1 + result.half2)
    mask = mask_from_map(whole, pixel)
    curves = masked_fsc(result.half1, result.half2, mask, pixel, generator=generator)
    evidence = cross_half_evidence(
        refinement.data,
        half,
        (result.half1, result.half2),
        curves.unmasked,
        mask,
        torch.eye(3)[None],
        generator,
    )
    claimed = curves.resolution_angstrom if evidence.is_supported else None
    document = {
        "structure": one.structure, "box_px": one.box_px, "n_particles": one.n_particles, "snr": one.snr,
        "pixel_size_angstrom": pixel, "resolution_angstrom": claimed,
        "fsc_angstrom": curves.resolution_angstrom, "is_at_nyquist": curves.is_at_nyquist,
        "cross_evidence_nats": evidence.log_evidence, "cross_evidence_z": evidence.z,
        "elsewhere": evidence.elsewhere,
        "cpu_s": round(time.process_time() - started, 1),
    }  # fmt: skip
    if one.snr == 0.0:
        return document | {"refused_draws": draws - 1}
    at = align_volumes(whole, truth, pixel, generator=generator, try_mirror=False)
    found, _ = truth_resolution(apply_alignment(whole, at), truth, pixel, mask)
    real = ~particles.is_junk
    errors = pose_errors_deg(result.rotations[real], particles.rotations[real], is_hand_free=False)
    difference = None if claimed is None or found is None else claimed / found - 1.0
    return document | {
        "truth_angstrom": found,
        "difference": difference,
        "median_error_deg": float(errors.median()),
        "share_beyond_30_deg": float((errors > 30.0).float().mean()),
        "junk_mean_weight": float(result.weights[particles.is_junk].mean()),
        "mean_weight": float(result.weights[real].mean()),
    }


def measure_views(limit_deg: int) -> dict[str, Any]:
    """Measure a set at its true poses without the views beyond `limit_deg` of the axis, and with as many at random."""
    import torch

    images = _view_set()
    # A view and its opposite show the same projection.
    keep = images.rotations[:, 2, 2].abs() >= math.cos(math.radians(limit_deg)) - 1e-6
    rows = keep.nonzero()[:, 0]
    at_random = torch.randperm(N_VIEWS, generator=torch.Generator().manual_seed(limit_deg))[: len(rows)]
    document: dict[str, Any] = {"limit_deg": limit_deg, "n_particles": len(rows)}
    for name, index in (("removed", rows), ("random", at_random)):
        document[name] = _diagnose(
            images.data.take(index), images.rotations[index], images.origin_xy_px[index]
        )
    return document


@functools.lru_cache(maxsize=1)
def _view_set() -> BlobSet:
    import torch

    from models.reconstruction.blobs import BlobPhantom, simulate_blob_images

    generator = torch.Generator().manual_seed(5)
    phantom = BlobPhantom.random(VIEWS_BOX_PX, generator)
    return simulate_blob_images(phantom, N_VIEWS, generator, snr=VIEWS_SNR)


def _diagnose(data: ParticleData, rotations: Tensor, origin: Tensor) -> dict[str, Any]:
    import torch

    from models.reconstruction.fsc import masked_fsc
    from models.reconstruction.half_references import FLAT_SSNR
    from models.reconstruction.masks import spherical_mask
    from models.reconstruction.orientation import orientation_diagnostics
    from models.reconstruction.projector import sums_to_volume
    from models.reconstruction.sufficient import ReconstructionGrid, accumulate_posed, solve_map

    plane, c1 = data.plane, torch.eye(3)[None]
    grid = ReconstructionGrid(float(plane.shell.max()))
    halves = []
    for h in (0, 1):
        sums = grid.zeros()
        for index in torch.arange(h, len(data), 2).split(500):
            few = data.take(index)
            images = few.ctf * few.coefficients * plane.phases(origin[index])
            sums = accumulate_posed(sums, images, few.ctf.square(), rotations[index], plane, c1)
        flat = torch.full((grid.n_shells,), FLAT_SSNR)
        halves.append(sums_to_volume(solve_map(sums, flat, grid), data.box_size_px))
    box, pixel = data.box_size_px, data.pixel_size_angstrom
    mask = spherical_mask(box, 0.34 * box, 0.08 * box)
    generator = torch.Generator().manual_seed(0)
    curves = masked_fsc(halves[0], halves[1], mask, pixel, generator=generator)
    found = orientation_diagnostics(
        halves[0], halves[1], mask, pixel, generator=generator, rotations=rotations, n_null=10
    )
    return {
        "resolution_angstrom": curves.resolution_angstrom, "cfar": found.cfar, "cfar_null": found.cfar_null,
        "scf_star": found.scf_star, "view_efficiency": found.view_efficiency,
        "worst_angstrom": found.worst_resolution_angstrom, "best_angstrom": found.best_resolution_angstrom,
    }  # fmt: skip


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return up to three figures: the largest difference to the truth, noise with a resolution, cFAR without views."""
    figures: list[dict[str, Any]] = []
    sets = [row for row in rows if row["key"].startswith("set")]
    if sets:
        differences = [row["difference"] for row in sets]
        known = [abs(d) for d in differences if d is not None]
        figures.append({
            "name": "honesty, half-maps against the truth",
            "value": 100.0 * max(known, default=math.inf),
            "unit": f"% largest difference of {len(sets)} sets",
            "baseline": f"{100 * MAX_DIFFERENCE:.0f} % allowed",
            "ratio": max(known, default=math.inf) / MAX_DIFFERENCE,
            "mean_difference": sum(d for d in differences if d is not None) / max(len(known), 1),
            "without_resolution": len(sets) - len(known),
            "sets": sets,
        })  # fmt: skip
    noise = [row for row in rows if row["key"].startswith("noise")]
    if noise:
        n_found = sum(row["resolution_angstrom"] is not None for row in noise)
        figures.append({
            "name": "honesty, noise alone", "value": n_found, "unit": f"of {len(noise)} sets have a resolution",
            "baseline": "none allowed", "ratio": float(n_found), "sets": noise,
        })  # fmt: skip
    views = sorted((row for row in rows if row["key"].startswith("views")), key=lambda row: -row["limit_deg"])
    if views:
        cfar = [row["removed"]["cfar"] for row in views]
        rises = sum(b > a for a, b in itertools.pairwise(cfar))
        figures.append({
            "name": "honesty, cFAR as views are removed", "value": cfar[-1],
            "unit": f"at the last of {len(cfar)} steps, {rises} of them upwards",
            "baseline": "all views", "ratio": cfar[-1] / cfar[0] if cfar[0] else math.inf, "steps": views,
        })  # fmt: skip
    return figures
