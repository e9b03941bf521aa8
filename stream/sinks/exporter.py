"""A session's exports and an engine's input, from what the output folder holds.

Every path in a table is relative to the output folder, so that RELION (started there) and CryoSPARC (with it as
the project's folder) find the stacks. Uids and half-sets are the session's own in every file.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mrcfile
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from stream.records.commands import RunMember
from stream.records.errors import InputError
from stream.records.values import Optics, ParticleSubset, RunId
from stream.sinks.cryosparc_cs import MicrographPlace, write_particles_cs
from stream.sinks.particle_table import (
    annotate,
    concatenate,
    join_poses,
    select_above,
    select_best,
    select_uids,
)
from stream.sinks.relion_star import (
    UID_COLUMN,
    ParticleStar,
    make_micrograph_optics,
    read_particles_star,
    read_uid_table,
    write_micrographs_star,
    write_particles_star,
)
from stream.store.feature_cache import FeatureCache
from stream.store.files import replacing
from stream.store.layout import OutputLayout

log = logging.getLogger(__name__)

CTF_COLUMNS = {
    "rlnDefocusU": "defocus_u_angstrom",
    "rlnDefocusV": "defocus_v_angstrom",
    "rlnDefocusAngle": "astigmatism_angle_deg",
    "rlnPhaseShift": "phase_shift_deg",
    "rlnCtfMaxResolution": "ctf_fit_angstrom",
    "rlnCtfFigureOfMerit": "ctf_score",
}
"""RELION's columns of a micrograph's CTF, from the keys of ctf/NAME.json."""

_EVERYTHING = float("-inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportResult:
    """Which files were written (None = there was nothing to write) and how much they hold."""

    particles_star: Path | None
    particles_cs: Path | None
    all_particles_star: Path | None
    micrographs_star: Path | None
    n_particles: int
    n_all_particles: int
    n_micrographs: int


def export_session(
    layout: OutputLayout,
    members: Sequence[RunMember],
    *,
    model_hash: str,
    run_id: RunId | None = None,
    score_threshold: float | None = None,
) -> ExportResult:
    """Write export/: particles.star and particles.cs, all_particles.star, micrographs.star.

    `particles.*` hold the scored particles: above `score_threshold` if given, and with `run_id` those that
    the run used, with their poses. `all_particles.star` holds every particle of the members; one that could not
    be scored has the score nan. Exposures that are no members (rejected ones) are in no file; a file of an
    earlier export for which nothing is left goes.
    """
    tables = list(_read_members(layout, members, model_hash))
    places = _find_micrographs(layout, members)
    micrographs_star = _write_micrographs(layout, members, tables, places)
    paths = [layout.exports / name for name in ("particles.star", "particles.cs", "all_particles.star")]
    if not tables:
        for path in (*paths, layout.exports / "micrographs.star"):
            path.unlink(missing_ok=True)
        return ExportResult(
            particles_star=None,
            particles_cs=None,
            all_particles_star=None,
            micrographs_star=micrographs_star,
            n_particles=0,
            n_all_particles=0,
            n_micrographs=len(places),
        )
    everything = concatenate([table for _, table in tables])
    chosen = select_above(everything, _EVERYTHING if score_threshold is None else score_threshold)
    if run_id is not None:
        chosen = join_poses(chosen, read_uid_table(layout.run(run_id) / "poses.star"))
    write_particles_star(paths[0], chosen.particles, chosen.optics)
    write_particles_cs(paths[1], chosen, places)
    write_particles_star(paths[2], everything.particles, everything.optics)
    log.info("session_exported", extra={"n_particles": len(chosen.particles)})
    return ExportResult(
        particles_star=paths[0],
        particles_cs=paths[1],
        all_particles_star=paths[2],
        micrographs_star=micrographs_star,
        n_particles=len(chosen.particles),
        n_all_particles=len(everything.particles),
        n_micrographs=len(places),
    )


def write_run_input(
    layout: OutputLayout, members: Sequence[RunMember], model_hash: str, subset: ParticleSubset, path: Path
) -> int:
    """Write the engine's input STAR, the particles of the subset; return how many they are.

    Image paths are relative to the output folder.
    """
    star = read_subset(layout, members, model_hash, subset)
    write_particles_star(path, star.particles, star.optics)
    return len(star.particles)


def read_subset(
    layout: OutputLayout, members: Sequence[RunMember], model_hash: str, subset: ParticleSubset
) -> ParticleStar:
    """Return the members' particles that a subset holds, with half-set and score, in the members' order.

    One exposure's table is in memory with what was selected. Ranks go over all members; equal scores are
    ranked by uid, so that the same particles are chosen whatever the members' order.
    """
    tables = [
        select_above(table, subset.score_threshold) for _, table in _read_members(layout, members, model_hash)
    ]
    if not tables:
        raise InputError("particles", "at least one exposure has particles", f"{len(members)} exposures")
    star = concatenate(tables)
    if subset.top is not None:
        star = select_best(star, subset.top)
    if subset.clusters and subset.clustering is not None:
        labels = layout.cluster_labels(subset.clustering)
        uids, numbers = read_labels(labels)
        star = select_uids(star, uids[np.isin(numbers, subset.clusters)])
    return star


def write_labels(path: Path, uids: NDArray[np.uint64], labels: NDArray[np.int16]) -> None:
    """Write which cluster each particle is in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, temporary.open("wb") as stream:
        np.savez(stream, uids=uids, labels=labels)


def read_labels(path: Path) -> tuple[NDArray[np.uint64], NDArray[np.int16]]:
    """Return (uids, labels) of a clustering, or raise `InputError` that names the file."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return arrays["uids"].astype(np.uint64), arrays["labels"].astype(np.int16)
    except (OSError, KeyError, ValueError) as error:
        raise InputError(path, "a clustering has its labels beside it", error) from error


def _read_members(
    layout: OutputLayout, members: Sequence[RunMember], model_hash: str
) -> Iterator[tuple[RunMember, ParticleStar]]:
    """Yield each exposure's particles with half-set and score; exposures without particles have no table."""
    cache = FeatureCache(layout.features)
    for member in members:
        path = layout.particles_table(member.name)
        if not path.is_file():
            if layout.particles(member.name).exists():
                raise InputError(path, "a particle stack has its table beside it", "missing")
            continue
        star = read_particles_star(path)
        if UID_COLUMN not in star.particles.columns:
            raise InputError(
                path, f"the table has the column {UID_COLUMN}", ", ".join(star.particles.columns)
            )
        _, scores = cache.lookup(model_hash, star.particles[UID_COLUMN].to_numpy(np.uint64))
        yield member, annotate(star, half_set=member.half_set, scores=scores)


def _find_micrographs(layout: OutputLayout, members: Sequence[RunMember]) -> dict[str, MicrographPlace]:
    """Return shape and pixel size of every micrograph that is there, by its name in the tables."""
    places = {}
    for member in members:
        path = layout.micrograph(member.name)
        if not path.is_file():
            continue
        with mrcfile.open(path, header_only=True) as header_only:
            header = header_only.header
            digest = hashlib.blake2b(f"{member.exposure_id}/micrograph".encode(), digest_size=8).digest()
            places[layout.relative(path)] = MicrographPlace(
                uid=int.from_bytes(digest, "little") or 1,
                shape_yx=(int(header.ny), int(header.nx)),
                pixel_size_angstrom=float(header.cella.x) / max(int(header.mx), 1),
            )
    return places


def _write_micrographs(
    layout: OutputLayout,
    members: Sequence[RunMember],
    tables: Sequence[tuple[RunMember, ParticleStar]],
    places: dict[str, MicrographPlace],
) -> Path | None:
    """Write micrographs.star; a micrograph without particles takes the optics of the first that has some."""
    if not places or not tables:
        return None
    stars = {member.exposure_id: star for member, star in tables}
    first = tables[0][1]
    rows = []
    for member in members:
        name = layout.relative(layout.micrograph(member.name))
        if name not in places:
            continue
        star = stars.get(member.exposure_id)
        row = _ctf_of(layout.ctf_values(member.name)) | {
            "rlnMicrographName": name,
            "rlnOpticsGroup": 1,
            "rlnMicrographNameNoDW": _unweighted_of(member, layout),
            "icestreamParticles": 0 if star is None else len(star.particles),
        }
        optics = _micrograph_optics((star or first).optics, places[name].pixel_size_angstrom)
        rows.append(ParticleStar(optics=optics, particles=pd.DataFrame([row])))
    joined = concatenate(rows)
    path = layout.exports / "micrographs.star"
    write_micrographs_star(path, joined.particles, joined.optics)
    return path


def _micrograph_optics(particle_optics: pd.DataFrame, pixel_size_angstrom: float) -> pd.DataFrame:
    row = particle_optics.iloc[0]
    optics = Optics(
        voltage_kv=float(row["rlnVoltage"]),
        cs_mm=float(row["rlnSphericalAberration"]),
        amplitude_contrast=float(row["rlnAmplitudeContrast"]),
    )
    return make_micrograph_optics(
        optics, micrograph_pixel_size_angstrom=pixel_size_angstrom, name=str(row["rlnOpticsGroupName"])
    )


def _unweighted_of(member: RunMember, layout: OutputLayout) -> str:
    """Return RELION's second micrograph; "None" is its word for one that was not written."""
    path = layout.unweighted(member.name)
    return layout.relative(path) if path.is_file() else "None"


def _ctf_of(path: Path) -> dict[str, Any]:
    """Return RELION's CTF columns of a fit; without a fit they are nan."""
    values = json.loads(path.read_text()) if path.is_file() else {}
    return {
        column: float("nan") if values.get(key) is None else float(values[key])
        for column, key in CTF_COLUMNS.items()
    }
