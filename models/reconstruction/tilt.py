"""What a set of views lacks, and what collecting at a stage tilt would do about it.

Tilting the stage by α about an axis of the image plane turns every pose by the same rotation in the microscope's
frame, so the view of a particle becomes cos α · r₃ + sin α · r₂ (rows of its rotation). Particles lie at any angle
in the plane, so that one preferred view opens to a cone of half-angle α around it. How well the new views would
sample Fourier space is told by SCF*, as in the program of Baldwin and Lyumkis (2021): of the tilted particles
alone, and of as many tilted ones added to those that are there. What a forecast leaves out: thicker ice along the
beam (1 / cos α), more motion, and views that change because squares of another thickness are chosen.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from models.reconstruction.grids import healpix_directions
from models.reconstruction.orientation import SCF_LIMIT
from models.reconstruction.sampling import sampling_factor, symmetric_views, view_directions

TILTS_DEG = (0.0, 20.0, 30.0, 40.0)
"""What is done in practice; beyond 40° ice and focus gradient cost more than views are worth."""

MIN_GAIN = 1.5
"""A tilt that raises SCF* by less than this factor without reaching the limit is not worth its price."""

SPARSE_COVERAGE = 0.2
"""Views with less than this of their share under even views count as missing."""

_MAX_POSES = 20_000
"""Drawn of larger sets: SCF* looks at 10,000 views, and a gap of 20° shows in far fewer."""

_GRID_ORDER = 3
_REACH_DEG = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TiltForecast:
    """SCF* of the views at one stage tilt: all particles tilted, and as many tilted as there are untilted ones.

    `unsampled_fraction` is the part of Fourier space that the tilted views leave out.
    """

    tilt_deg: float
    scf_star: float
    scf_star_mixed: float
    unsampled_fraction: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewForecast:
    """What is missing and what a tilt gives.

    `missing_fraction` is the share of all views (directions up to sign) that have less than `SPARSE_COVERAGE` of
    their even share; `missing_view` is the middle of the largest gap, None without one. `recommended_tilt_deg` is
    the smallest tilt whose views reach SCF* 0.81, else the best one if it gains enough, else None.
    """

    missing_fraction: float
    missing_view: tuple[float, float, float] | None
    tilts: tuple[TiltForecast, ...]
    recommended_tilt_deg: float | None

    @property
    def missing_rot_tilt_deg(self) -> tuple[float, float] | None:
        """The missing view as RELION's rot and tilt, tilt in [0, 90]."""
        if self.missing_view is None:
            return None
        x, y, z = self.missing_view
        return math.degrees(math.atan2(y, x)), math.degrees(math.acos(max(-1.0, min(1.0, z))))

    def summary(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary."""
        return {
            "missing_fraction": self.missing_fraction,
            "missing_rot_tilt_deg": self.missing_rot_tilt_deg,
            "tilts": [asdict(tilt) for tilt in self.tilts],
            "recommended_tilt_deg": self.recommended_tilt_deg,
        }


def forecast_views(
    rotations: Float[Tensor, "n 3 3"],
    *,
    generator: torch.Generator,
    group: Float[Tensor, "g 3 3"] | None = None,
    tilts_deg: tuple[float, ...] = TILTS_DEG,
) -> ViewForecast:
    """Find the largest gap in a set of views and measure SCF* at stage tilts; seconds on one core.

    Parameters
    ----------
    rotations
        Poses of the particles (RELION convention), collected without tilt.
    generator
        Draws the views for SCF*.
    group
        Point group of the molecule; its images of the views count, too.
    tilts_deg
        Stage tilts to try; 0 is always the first.
    """
    if rotations.shape[0] == 0:
        raise ValueError("rotations: none, need at least one")
    if len(rotations) > _MAX_POSES:
        rotations = rotations[torch.randperm(len(rotations), generator=generator)[:_MAX_POSES]]
    views = view_directions(rotations)
    everything = views if group is None else symmetric_views(views, group)
    directions, is_sparse = _sparse_views(everything)
    now = sampling_factor(views, generator=generator, group=group)
    tilts = [
        TiltForecast(
            tilt_deg=0.0,
            scf_star=now.scf_star,
            scf_star_mixed=now.scf_star,
            unsampled_fraction=now.unsampled_fraction,
        )
    ]
    for tilt in (t for t in tilts_deg if t != 0.0):
        tilted = tilted_views(rotations, tilt)
        mixed = torch.cat((views, tilted))
        alone = sampling_factor(tilted, generator=generator, group=group)
        tilts.append(
            TiltForecast(
                tilt_deg=tilt,
                scf_star=alone.scf_star,
                scf_star_mixed=sampling_factor(mixed, generator=generator, group=group).scf_star,
                unsampled_fraction=alone.unsampled_fraction,
            )
        )
    return ViewForecast(
        missing_fraction=float(is_sparse.float().mean()),
        missing_view=_middle_of_gap(directions, is_sparse),
        tilts=tuple(tilts),
        recommended_tilt_deg=recommend_tilt(tilts),
    )


def tilted_views(rotations: Float[Tensor, "n 3 3"], tilt_deg: float) -> Float[Tensor, "n 3"]:
    """Return the views of the same particles with the stage tilted about the image's x axis."""
    angle = math.radians(tilt_deg)
    return math.cos(angle) * rotations[:, 2, :] + math.sin(angle) * rotations[:, 1, :]


def recommend_tilt(tilts: list[TiltForecast]) -> float | None:
    """Return the tilt to collect at; None where the views are even already, or no tilt helps enough."""
    now, *others = tilts
    if now.scf_star >= SCF_LIMIT or not others:
        return None
    enough = [t.tilt_deg for t in others if t.scf_star >= SCF_LIMIT]
    if enough:
        return min(enough)
    best = max(others, key=lambda t: t.scf_star)
    return best.tilt_deg if best.scf_star >= MIN_GAIN * now.scf_star else None


def _sparse_views(views: Float[Tensor, "m 3"]) -> tuple[Float[Tensor, "d 3"], Bool[Tensor, " d"]]:
    """Return directions of the half sphere, and which have too few views (up to sign) within 20°."""
    directions = healpix_directions(_GRID_ORDER)
    directions = directions[directions[:, 2] >= 0]
    unit = torch.nn.functional.normalize(views.float(), dim=-1)
    cosine = math.cos(math.radians(_REACH_DEG))
    near = torch.zeros(len(directions))
    for block in torch.split(unit, 20_000):
        near += ((directions @ block.T).abs() >= cosine).sum(dim=1)
    even_share = 1.0 - cosine
    return directions, near / len(unit) < SPARSE_COVERAGE * even_share


def _middle_of_gap(
    directions: Float[Tensor, "d 3"], is_sparse: Bool[Tensor, " d"]
) -> tuple[float, float, float] | None:
    """Return the sparse direction that is farthest from any direction with views."""
    if not bool(is_sparse.any()):
        return None
    gap = directions[is_sparse]
    if bool(is_sparse.all()):
        x, y, z = (float(c) for c in gap[0])
        return x, y, z
    nearest = (gap @ directions[~is_sparse].T).abs().amax(dim=1)
    x, y, z = (float(c) for c in gap[int(nearest.argmin())])
    return x, y, z
