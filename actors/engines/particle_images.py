"""From a particle table to what the reconstruction computes on: sane images of one box, with CTF and half sets.

Images that hold NaN or no variation are left out and counted. Larger boxes are Fourier-cropped to the working
box. Half sets are taken from the table; where it has none they are assigned per micrograph, balanced. The phases of
a beam tilt are taken off the images; further aberrations are refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from models.fourier.transforms import fourier_resize, good_size
from models.fourier.volumes import resample_volume
from models.reconstruction.aberrations import undo_beam_tilt
from models.reconstruction.image_fit import ImageGroups
from models.reconstruction.particle_data import CtfParameters, DefocusModel, ParticleData, particle_defocus
from models.reconstruction.projector import HalfPlane
from models.reconstruction.volume_io import read_volume
from stream.ingest.particle_sets import read_particle_table
from stream.ingest.particle_table import ParticleTable, iterate_images, read_stack_layout
from stream.records.errors import ConfigurationError, InputError
from stream.sinks.exporter import read_labels

MIN_PARTICLES = 50
"""Fewer images than this give no half maps worth the name at any resolution."""

_CHUNK = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedParticles:
    """The images that are used; `rows` are their places in `table`, `half_set` is 1 or 2, `cluster` counts from 0.

    `micrographs` are the names that `groups.micrograph` numbers.
    """

    table: ParticleTable
    rows: NDArray[np.int64]
    data: ParticleData
    half_set: torch.Tensor
    groups: ImageGroups
    micrographs: tuple[str, ...]
    cluster: torch.Tensor
    stack_pixel_size_angstrom: float | None
    excluded: dict[str, int]

    @property
    def n_excluded(self) -> int:
        """How many rows of the table were left out."""
        return sum(self.excluded.values())

    def defocus_model(self) -> DefocusModel:
        """Return what the images' CTF at another defocus follows from."""
        plane, pixel_size = self.data.plane, self.data.pixel_size_angstrom
        quadrature, rate = torch.empty_like(self.data.ctf), torch.empty(len(self.data))
        for where, ctf in _ctf_parameters(self.table, self.rows):
            own = particle_defocus(ctf, plane, pixel_size)
            quadrature[where], rate[where] = own.quadrature, own.phase_per_angstrom
        return DefocusModel(quadrature, rate)


def load_particles(
    particles: Path, root: Path, *, max_box_px: int, clusters: Path | None = None
) -> LoadedParticles:
    """Read table and images; raise `InputError` with the file, the rule and the value.

    `clusters` is a file of labels by uid (`stream.sinks.exporter.write_labels`); without it all are in cluster 0.
    """
    table = read_particle_table(particles, root=root)
    if table.aberrations:
        rule = "aberrations are zero but for a beam tilt (rlnBeamTiltX, rlnBeamTiltY)"
        raise InputError(particles, rule, ", ".join(table.aberrations))
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
    _check_optics(table, used, particles)
    ctf = torch.empty((len(used), len(plane)))
    for where, parameters in _ctf_parameters(table, used):
        ctf[where] = parameters.evaluate(plane, working_pixel)
    coefficients = torch.cat(parts)
    _undo_tilts(coefficients, table, used, plane, working_pixel)
    names = sorted({str(n) for n in table.micrograph_names[used] if n is not None})
    return LoadedParticles(
        table=table,
        rows=used,
        data=ParticleData(plane, working_pixel, coefficients, ctf),
        half_set=torch.from_numpy(_half_sets(table, used, particles)),
        groups=_groups(table, used, names),
        micrographs=tuple(names),
        cluster=_clusters(table, used, clusters),
        stack_pixel_size_angstrom=read_stack_layout(str(table.stack_paths[used[0]])).pixel_size_angstrom,
        excluded={reason: n for reason, n in excluded.items() if n},
    )


def mask_fraction(diameter_angstrom: float | None, box_angstrom: float) -> float:
    """Return a soft sphere's diameter over the box; None means 0.85, and a sphere never exceeds the box."""
    if diameter_angstrom is None:
        return 0.85
    if diameter_angstrom <= 0:
        raise ConfigurationError(
            "mask_diameter_angstrom", "a mask has a positive diameter", diameter_angstrom
        )
    return min(0.95, diameter_angstrom / box_angstrom)


def read_mask(path: Path, particles: LoadedParticles) -> torch.Tensor:
    """Read a solvent mask on the particles' box and bring it onto the working grid.

    Raises `InputError` for a mask of another shape or pixel size, or with values outside [0, 1].
    """
    try:
        mask, pixel_size = read_volume(path)
    except ValueError as error:
        raise InputError(path, "a mask is a finite cubic MRC map", error) from error
    box, own = particles.table.box_size_px, float(particles.table.pixel_size_angstrom[0])
    if mask.shape[-1] not in (box, particles.data.box_size_px):
        raise InputError(path, f"a mask has the particles' box of {box} px", f"{mask.shape[-1]} px")
    expected = own * box / int(mask.shape[-1])
    if abs(pixel_size / expected - 1.0) > 0.01:
        raise InputError(
            path, f"a mask has the particles' pixel size of {expected:.3f} Å", f"{pixel_size:.3f} Å"
        )
    if float(mask.min()) < -1e-3 or float(mask.max()) > 1.0 + 1e-3 or not bool((mask > 0.5).any()):
        raise InputError(
            path,
            "a mask lies between 0 and 1 and is not empty",
            f"{float(mask.min()):.3g} to {float(mask.max()):.3g}",
        )
    data = particles.data
    if mask.shape[-1] != data.box_size_px:
        mask = resample_volume(mask, pixel_size, data.pixel_size_angstrom, data.box_size_px)
    return mask.clamp(0.0, 1.0)


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


def _check_optics(table: ParticleTable, rows: NDArray[np.int64], source: Path) -> None:
    optics = np.stack([table.voltage_kv, table.cs_mm, table.amplitude_contrast], axis=1)[rows]
    if not np.isfinite(optics).all():
        raise InputError(source, "every particle has voltage, Cs and amplitude contrast", "missing")


def _ctf_parameters(
    table: ParticleTable, rows: NDArray[np.int64]
) -> Iterator[tuple[torch.Tensor, CtfParameters]]:
    """Yield the images (places in `rows`) of every set of voltage, Cs and amplitude contrast, with their CTF."""
    optics = np.stack([table.voltage_kv, table.cs_mm, table.amplitude_contrast], axis=1)[rows]
    unique, inverse = np.unique(optics, axis=0, return_inverse=True)
    for number, (voltage, cs, contrast) in enumerate(unique):
        where = np.flatnonzero(inverse.reshape(-1) == number)
        own = rows[where]
        yield (
            torch.from_numpy(where),
            CtfParameters(
                defocus_u_angstrom=torch.from_numpy(table.defocus_u_angstrom[own]).float(),
                defocus_v_angstrom=torch.from_numpy(table.defocus_v_angstrom[own]).float(),
                astigmatism_angle_deg=torch.from_numpy(table.astigmatism_angle_deg[own]).float(),
                phase_shift_deg=torch.from_numpy(np.nan_to_num(table.phase_shift_deg[own])).float(),
                voltage_kv=float(voltage),
                cs_mm=float(cs),
                amplitude_contrast=float(contrast),
            ),
        )


def _undo_tilts(
    coefficients: torch.Tensor,
    table: ParticleTable,
    rows: NDArray[np.int64],
    plane: HalfPlane,
    pixel_size_angstrom: float,
) -> None:
    """Take the phases of the table's beam tilts off freshly loaded coefficients, in place."""
    if table.beam_tilt_xy_mrad is None:
        return
    tilt = torch.from_numpy(np.nan_to_num(table.beam_tilt_xy_mrad[rows])).float()
    if not bool(tilt.any()):
        return
    for where, ctf in _ctf_parameters(table, rows):
        for index in where.split(_CHUNK):
            coefficients[index] *= undo_beam_tilt(
                plane, pixel_size_angstrom, tilt[index], voltage_kv=ctf.voltage_kv, cs_mm=ctf.cs_mm
            )


def _groups(table: ParticleTable, rows: NDArray[np.int64], micrographs: list[str]) -> ImageGroups:
    place = {name: number for number, name in enumerate(micrographs)}
    names = table.micrograph_names[rows].tolist()
    _, optics = np.unique(table.optics_groups[rows], return_inverse=True)
    return ImageGroups(
        torch.tensor([-1 if name is None else place[str(name)] for name in names], dtype=torch.long),
        torch.from_numpy(optics.reshape(-1).astype(np.int64)),
    )


def _clusters(table: ParticleTable, rows: NDArray[np.int64], path: Path | None) -> torch.Tensor:
    """Return every image's feature cluster; images that the labels do not name share one more cluster."""
    if path is None:
        return torch.zeros(len(rows), dtype=torch.long)
    uids, labels = read_labels(path)
    if table.uids is None:
        raise InputError(table.source, "particles in clusters have uids (icestreamUid)", "none")
    if len(uids) != len(labels) or (len(labels) and int(labels.min()) < 0):
        raise InputError(path, "every uid has a label from 0", f"{len(uids)} uids, {len(labels)} labels")
    of_uid = dict(zip(uids.tolist(), labels.tolist(), strict=True))
    rest = int(labels.max()) + 1 if len(labels) else 0
    found = [of_uid.get(uid, rest) for uid in table.uids[rows].tolist()]
    if all(label == rest for label in found):
        raise InputError(path, "labels belong to particles of the set", f"none of {len(found)} is named")
    return torch.tensor(found, dtype=torch.long)


def _single(values: NDArray[np.float64], source: Path, rule: str) -> float:
    low, high = float(values.min()), float(values.max())
    if not np.isfinite(low) or low <= 0 or high - low > 1e-4 * high:
        raise InputError(source, rule, f"{low} to {high} Å")
    return low
