"""From a particle table to what the reconstruction computes on: sane images of one box, with CTF and half sets.

Images that hold NaN or no variation are left out and counted. Larger boxes are Fourier-cropped to the working
box. Half sets are taken from the table; where it has none they are assigned per micrograph, balanced.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from models.fourier.transforms import fourier_resize, good_size
from models.reconstruction.particle_data import CtfParameters, ParticleData
from models.reconstruction.projector import HalfPlane
from stream.ingest.particle_sets import read_particle_table
from stream.ingest.particle_table import ParticleTable, iterate_images
from stream.records.errors import InputError

MIN_PARTICLES = 50
"""Fewer images than this give no half maps worth the name at any resolution."""

_CHUNK = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedParticles:
    """The images that are used; `rows` are their places in `table`, `half_set` is 1 or 2."""

    table: ParticleTable
    rows: NDArray[np.int64]
    data: ParticleData
    half_set: torch.Tensor
    excluded: dict[str, int]

    @property
    def n_excluded(self) -> int:
        """How many rows of the table were left out."""
        return sum(self.excluded.values())


def load_particles(particles: Path, root: Path, *, max_box_px: int) -> LoadedParticles:
    """Read table and images; raise `InputError` with the file, the rule and the value."""
    table = read_particle_table(particles, root=root)
    pixel_size = _single(table.pixel_size_angstrom, particles, "all particles have one pixel size")
    box = good_size_at_most(table.box_size_px, max_box_px)
    plane = HalfPlane.of(box, box // 2 - 1)
    kept: list[int] = []
    excluded: Counter[str] = Counter()
    parts: list[torch.Tensor] = []
    usable = np.isfinite(
        np.stack([table.defocus_u_angstrom, table.defocus_v_angstrom, table.astigmatism_angle_deg])
    ).all(axis=0)
    excluded["no CTF"] = int((~usable).sum())
    rows = np.flatnonzero(usable)
    for start in range(0, len(rows), _CHUNK):
        chunk = rows[start : start + _CHUNK]
        images = torch.from_numpy(np.stack([i.astype(np.float32) for i in iterate_images(table, chunk)]))
        is_finite = images.isfinite().flatten(1).all(1)
        spread = images.nan_to_num(0.0, 0.0, 0.0).flatten(1).std(1)
        is_good = is_finite & (spread > 0)
        excluded["not finite"] += int((~is_finite).sum())
        excluded["constant"] += int((is_finite & (spread <= 0)).sum())
        images = images[is_good]
        if table.contrast_sign is not None:
            sign = torch.from_numpy(table.contrast_sign[chunk].astype(np.float32))[is_good]
            images = images * sign[:, None, None]
        if len(images):
            parts.append(plane.coefficients(fourier_resize(images, (box, box))))
        kept.extend(chunk[is_good.numpy()].tolist())
    if len(kept) < MIN_PARTICLES:
        value = f"{len(kept)} usable of {len(table)}"
        raise InputError(particles, f"a reconstruction needs at least {MIN_PARTICLES} particles", value)
    used = np.asarray(kept, dtype=np.int64)
    working_pixel = pixel_size * table.box_size_px / box
    ctf = _evaluate_ctf(table, used, plane, working_pixel, particles)
    return LoadedParticles(
        table=table,
        rows=used,
        data=ParticleData(plane, working_pixel, torch.cat(parts), ctf),
        half_set=torch.from_numpy(_half_sets(table, used, particles)),
        excluded={reason: n for reason, n in excluded.items() if n},
    )


def good_size_at_most(box_size_px: int, max_box_px: int) -> int:
    """Return the even working box: the images' own, or the largest smooth one within the bound."""
    if box_size_px <= max_box_px:
        return box_size_px - box_size_px % 2
    size = max_box_px - max_box_px % 2
    while good_size(size) != size:
        size -= 2
    return size


def assign_half_sets(micrographs: list[str | None], uids: NDArray[np.uint64] | None) -> NDArray[np.int64]:
    """Assign halves per micrograph, each to the smaller half in order of name; without a micrograph, by uid or row."""
    half = np.zeros(len(micrographs), dtype=np.int64)
    counts = Counter(name for name in micrographs if name is not None)
    sizes = {1: 0, 2: 0}
    of_micrograph: dict[str, int] = {}
    for name in sorted(counts):
        smaller = 1 if sizes[1] <= sizes[2] else 2
        of_micrograph[name] = smaller
        sizes[smaller] += counts[name]
    for row, micrograph in enumerate(micrographs):
        if micrograph is not None:
            half[row] = of_micrograph[micrograph]
        else:
            half[row] = 1 + (int(uids[row]) if uids is not None else row) % 2
    if len(counts) == 1 and None not in micrographs:
        # One micrograph cannot be split between halves; its particles are, and the result says so.
        half = 1 + np.arange(len(micrographs)) % 2
    return half


def _half_sets(table: ParticleTable, rows: NDArray[np.int64], source: Path) -> NDArray[np.int64]:
    if table.half_sets is not None:
        half = table.half_sets[rows].astype(np.int64)
        bad = ~np.isin(half, (1, 2))
        if bad.any():
            raise InputError(source, "rlnRandomSubset is 1 or 2", int(half[bad][0]))
    else:
        names = [table.micrograph_names[row] for row in rows]
        half = assign_half_sets(names, None if table.uids is None else table.uids[rows])
    for which in (1, 2):
        n = int((half == which).sum())
        if n < MIN_PARTICLES // 5:
            raise InputError(
                source, f"each half set has at least {MIN_PARTICLES // 5} particles", f"half {which}: {n}"
            )
    return half


def _evaluate_ctf(
    table: ParticleTable, rows: NDArray[np.int64], plane: HalfPlane, pixel_size: float, source: Path
) -> torch.Tensor:
    """Evaluate the CTF per set of optics; sets share voltage, Cs and amplitude contrast."""
    optics = np.stack([table.voltage_kv, table.cs_mm, table.amplitude_contrast], axis=1)[rows]
    if not np.isfinite(optics).all():
        raise InputError(source, "every particle has voltage, Cs and amplitude contrast", "missing")
    values = torch.empty((len(rows), len(plane)))
    unique, inverse = np.unique(optics, axis=0, return_inverse=True)
    for number, (voltage, cs, contrast) in enumerate(unique):
        where = np.flatnonzero(inverse.reshape(-1) == number)
        own = rows[where]
        ctf = CtfParameters(
            defocus_u_angstrom=torch.from_numpy(table.defocus_u_angstrom[own]).float(),
            defocus_v_angstrom=torch.from_numpy(table.defocus_v_angstrom[own]).float(),
            astigmatism_angle_deg=torch.from_numpy(table.astigmatism_angle_deg[own]).float(),
            phase_shift_deg=torch.from_numpy(np.nan_to_num(table.phase_shift_deg[own])).float(),
            voltage_kv=float(voltage),
            cs_mm=float(cs),
            amplitude_contrast=float(contrast),
        )
        values[torch.from_numpy(where)] = ctf.evaluate(plane, pixel_size)
    return values


def _single(values: NDArray[np.float64], source: Path, rule: str) -> float:
    low, high = float(values.min()), float(values.max())
    if not np.isfinite(low) or low <= 0 or high - low > 1e-4 * high:
        raise InputError(source, rule, f"{low} to {high} Å")
    return low
