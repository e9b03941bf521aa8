"""Benchmark of a growing set: a tenth more particles by continuing the sums, against refining everything again.

Each set is refined from the truth's 30 Å shape twice, without and with its last eleventh, by the engine's own schedule.
The smaller run's sums then take the newcomers in, as a run of the service that follows another does (as many old
particles are revisited). Processor time of the computing alone, one thread; reading, writing and diagnostics,
which cost the same either way, are left out.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stream.commands.engine_sets import SETS, PreparedSet, measure_volume, prepare_set
from stream.records.errors import ConfigurationError

if TYPE_CHECKING:
    from torch import Tensor

    from actors.engines.particle_images import LoadedParticles
    from models.reconstruction.pose_schedule import RefinementSettings
    from models.reconstruction.refinement import RefinementResult

DEFAULT_SIZE = 1_100
DEFAULT_BOX_PX = 64


def run_incremental_benchmark(
    folder: Path,
    *,
    n_particles: int = DEFAULT_SIZE,
    box_px: int = DEFAULT_BOX_PX,
    part: str | None = None,
) -> list[dict[str, Any]]:
    """Measure the sets of `part` (names with commas, default `ribozyme`); those measured already are not run again."""
    names = ["ribozyme"] if part is None else part.split(",")
    for name in names:
        if name not in SETS:
            raise ConfigurationError("--part", f"a set is one of {', '.join(SETS)}", name)
    figures = []
    for name in names:
        work = folder / f"{name}-{n_particles}-{box_px}"
        done = work / "figure.json"
        if not done.is_file():
            work.mkdir(parents=True, exist_ok=True)
            done.write_text(json.dumps(_measure(prepare_set(work, name, n_particles, box_px), box_px)))
        figures.append(json.loads(done.read_text()))
    return figures


def _measure(prepared: PreparedSet, box_px: int) -> dict[str, Any]:
    import torch

    from actors.engines.incremental_run import N_GROUPS
    from actors.engines.particle_images import load_particles, mask_fraction
    from models.fourier.point_groups import symmetry_matrices
    from models.reconstruction.incremental import Newcomers, advance, half_maps, start_state
    from models.reconstruction.pose_schedule import RefinementSettings
    from models.reconstruction.pose_search import Hypotheses

    torch.set_num_threads(1)
    particles = load_particles(prepared.star, prepared.star.parent, max_box_px=box_px)
    data, n = particles.data, len(particles.data)
    group = symmetry_matrices(prepared.symmetry).float()
    fraction = mask_fraction(prepared.diameter_angstrom, data.box_angstrom)
    settings = RefinementSettings(mask_diameter_fraction=fraction)
    first, rest = torch.arange(round(n / 1.1)), torch.arange(round(n / 1.1), n)
    everything, scratch_s = _refine(particles, torch.arange(n), prepared, settings, group)
    base, _ = _refine(particles, first, prepared, settings, group)
    uids, nothing = torch.arange(n), torch.zeros(n, dtype=torch.long)
    poses = Hypotheses(base.rotations[:, None], base.shifts_xy_px[:, None], base.log_likelihood_gain[:, None])
    started = time.process_time()
    state = start_state(
        data.take(first), uids[first], particles.half_set[first], nothing[first], poses,
        scales=base.scales, weights=base.weights, symmetry=group, settings=settings, n_groups=N_GROUPS,
    )  # fmt: skip
    state_s = time.process_time() - started
    newcomers = Newcomers(
        data=data.take(rest),
        uids=rest,
        half=particles.half_set[rest],
        cluster=nothing[rest],
        micrograph=particles.groups.micrograph[rest],
        scales=torch.full((len(rest),), torch.nan),
    )
    started = time.process_time()
    report = advance(state, newcomers, data.take, generator=torch.Generator().manual_seed(0))
    advance_s = time.process_time() - started
    maps = {
        "scratch": 0.5 * (everything.half1 + everything.half2),
        "before": 0.5 * (base.half1 + base.half2),
        "increment": 0.5 * torch.stack(half_maps(state)).sum(0),
    }
    measured = {
        f"{name}_{k}": v for name, volume in maps.items() for k, v in measure_volume(volume, prepared).items()
    }
    return {
        "name": f"increment, {prepared.name}",
        "value": advance_s,
        "unit": f"CPU s for {len(rest)} more",
        "baseline": f"refining all {n} again (CPU s)",
        "baseline_value": scratch_s,
        "ratio": advance_s / scratch_s,
        "building_the_sums_cpu_s": state_s,
        "n_revisited": report.n_revisited,
        "needs_rebase": report.needs_rebase,
        "box_px": data.box_size_px,
        **measured,
    }


def _refine(
    particles: LoadedParticles,
    rows: Tensor,
    prepared: PreparedSet,
    settings: RefinementSettings,
    group: Tensor,
) -> tuple[RefinementResult, float]:
    """Refine these particles; return what came out and the processor time of it."""
    import torch

    from models.reconstruction.refinement import Refinement

    started = time.process_time()
    refinement = Refinement(
        particles.data.take(rows), particles.half_set[rows], prepared.truth, settings, group,
        torch.Generator().manual_seed(0), groups=particles.groups.take(rows),
    )  # fmt: skip
    while not refinement.is_done:
        refinement.step()
    return refinement.result(), time.process_time() - started
