"""Assembly of particle tables: pure functions of tables, no file is touched.

A table is a `ParticleStar`: RELION's columns with an optics block. Many exposures' tables become one with joint
optics groups; scores, half-sets and poses are joined by uid. Nothing is written into an argument.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from stream.records.errors import InputError
from stream.records.values import HalfSet
from stream.sinks.relion_star import HALF_SET_COLUMN, SCORE_COLUMN, UID_COLUMN, ParticleStar

POSE_COLUMNS = ("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi", "rlnOriginXAngst", "rlnOriginYAngst")


def annotate(star: ParticleStar, *, half_set: HalfSet, scores: NDArray[np.float32]) -> ParticleStar:
    """Add one exposure's half-set and scores (NaN = none) to its particles."""
    columns = {
        HALF_SET_COLUMN: np.full(len(star.particles), half_set, np.int64),
        SCORE_COLUMN: scores.astype(np.float64),
    }
    return replace(star, particles=star.particles.assign(**columns))


def select_above(star: ParticleStar, threshold: float) -> ParticleStar:
    """Return the particles with a score above `threshold` (RELION's order kept); no score is never above."""
    is_above = star.particles[SCORE_COLUMN].to_numpy(np.float64) > threshold
    return replace(star, particles=star.particles[is_above])


def select_best(star: ParticleStar, n_particles: int) -> ParticleStar:
    """Return the `n_particles` of greatest score, equal scores by ascending uid; the order stays."""
    if len(star.particles) <= n_particles:
        return star
    scores = star.particles[SCORE_COLUMN].to_numpy(np.float64)
    uids = star.particles[UID_COLUMN].to_numpy(np.uint64)
    chosen = np.sort(np.lexsort((uids, -scores))[:n_particles])
    return replace(star, particles=star.particles.iloc[chosen].reset_index(drop=True))


def select_uids(star: ParticleStar, uids: NDArray[np.uint64]) -> ParticleStar:
    """Return the particles with one of these uids; the order stays."""
    is_wanted = np.isin(star.particles[UID_COLUMN].to_numpy(np.uint64), uids)
    return replace(star, particles=star.particles[is_wanted].reset_index(drop=True))


def concatenate(stars: Sequence[ParticleStar]) -> ParticleStar:
    """Return all particles in order, with the optics groups of all tables, equal ones counted once."""
    if not stars:
        raise InputError("particles", "there is at least one table to join", 0)
    optics: dict[tuple[object, ...], int] = {}
    rows: list[pd.DataFrame] = []
    tables = []
    for star in stars:
        renumbered: dict[int, int] = {}
        for position, group in enumerate(star.optics["rlnOpticsGroup"].tolist()):
            row = star.optics.iloc[[position]]
            content = row.drop(columns="rlnOpticsGroup")
            key = (*content.columns, *content.iloc[0].tolist())
            if key not in optics:
                optics[key] = len(optics) + 1
                rows.append(row.assign(rlnOpticsGroup=optics[key]))
            renumbered[int(group)] = optics[key]
        table = star.particles
        groups = table["rlnOpticsGroup"].map(renumbered).astype(np.int64)
        tables.append(table.assign(rlnOpticsGroup=groups))
    filled = [table for table in tables if len(table)]
    particles = pd.concat(filled, ignore_index=True) if filled else tables[0]
    return ParticleStar(optics=_with_unique_names(pd.concat(rows, ignore_index=True)), particles=particles)


def join_poses(star: ParticleStar, poses: pd.DataFrame) -> ParticleStar:
    """Return the particles that `poses` knows, with its angles and shifts, joined by uid.

    A particle without a pose is left out, because a pose of zero, which the formats would need, is a pose.
    """
    missing = [column for column in (UID_COLUMN, *POSE_COLUMNS) if column not in poses.columns]
    if missing:
        rule = f"poses have the columns {UID_COLUMN}, {', '.join(POSE_COLUMNS)}"
        raise InputError("poses", rule, f"without {', '.join(missing)}")
    rows, is_known = match_uids(
        poses[UID_COLUMN].to_numpy(np.uint64), star.particles[UID_COLUMN].to_numpy(np.uint64)
    )
    particles = star.particles[is_known]
    values = poses.iloc[rows[is_known]]
    columns = {column: values[column].to_numpy(np.float64) for column in POSE_COLUMNS}
    return replace(star, particles=particles.assign(**columns).reset_index(drop=True))


def match_uids(
    known: NDArray[np.uint64], wanted: NDArray[np.uint64]
) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
    """Return (row in `known` [n], whether it is there [n]) of each wanted uid; the row of an unknown is 0."""
    if not len(known):
        return np.zeros(len(wanted), np.intp), np.zeros(len(wanted), bool)
    order = np.argsort(known, kind="stable")
    places = np.minimum(np.searchsorted(known, wanted, sorter=order), len(known) - 1)
    rows = order[places]
    is_known = known[rows] == wanted
    return np.where(is_known, rows, 0), is_known


def _with_unique_names(optics: pd.DataFrame) -> pd.DataFrame:
    """Groups of one name that differ in their values (two pixel sizes, say) get their number appended."""
    if "rlnOpticsGroupName" not in optics.columns:
        return optics
    is_repeated = optics["rlnOpticsGroupName"].duplicated().tolist()
    names = [
        f"{name}_{group}" if is_again else name
        for name, group, is_again in zip(
            optics["rlnOpticsGroupName"], optics["rlnOpticsGroup"], is_repeated, strict=True
        )
    ]
    return optics.assign(rlnOpticsGroupName=names)
