"""How well a set of views samples Fourier space: the sampling compensation factor SCF and SCF*.

Baldwin and Lyumkis 2020/2021; the form of SCF* is that of their program (the factor 1/2 of 2020). SCF*
depends on the radius and on the number of views: both default to the values CryoSPARC uses (R = 23, 10,000
views), so that numbers can be compared. Uniform views give 0.995, side views 8/π² = 0.81 (the usual limit),
views within 30° of one axis 0.010.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

SCF_RADIUS = 23.0
SCF_VIEWS = 10_000
_N_POINTS = 5_000
_POINTS_PER_BLOCK = 250
"""Bounds the block of dot products to 10 MB, which stays in cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Sampling of the Fourier sphere by views.

    `scf` alone may exceed 1 for incomplete sampling and is never to be shown without `unsampled_fraction`;
    `scf_star` is in [0, 1] for practical purposes, below 0.81 meaning preferred orientation.
    """

    scf: float
    scf_star: float
    unsampled_fraction: float
    n_views: int


def view_directions(rotations: Float[Tensor, "n 3 3"]) -> Float[Tensor, "n 3"]:
    """Return the beam's direction (x, y, z) in the specimen's frame: the third row of every rotation."""
    return rotations[:, 2, :]


def symmetric_views(views: Float[Tensor, "n 3"], group: Float[Tensor, "g 3 3"]) -> Float[Tensor, "m 3"]:
    """Return all images of the views under a point group (n · g of them)."""
    return torch.einsum("gij,nj->gni", group.to(views), views).reshape(-1, 3)


def fibonacci_hemisphere(n_points: int) -> Float[Tensor, "n 3"]:
    """Return near-uniform unit vectors with z > 0 (golden-angle spiral)."""
    i = torch.arange(n_points, dtype=torch.float64)
    z = 1.0 - (i + 0.5) / n_points
    phi = i * (math.pi * (3.0 - math.sqrt(5.0)))
    radius = torch.sqrt(1.0 - z * z)
    return torch.stack((radius * torch.cos(phi), radius * torch.sin(phi), z), dim=-1).float()


def sampling_counts(
    views: Float[Tensor, "n 3"], points: Float[Tensor, "p 3"], radius: float = SCF_RADIUS
) -> Int[Tensor, " p"]:
    """Count for every point the views whose central slice, one voxel thick, passes through it at `radius`."""
    blocks = [
        ((block @ views.T).abs_() < 0.5 / radius).sum(dim=1)
        for block in torch.split(points.to(views), _POINTS_PER_BLOCK)
    ]
    return torch.cat(blocks)


def sampling_factor(
    views: Float[Tensor, "n 3"],
    *,
    generator: torch.Generator,
    group: Float[Tensor, "g 3 3"] | None = None,
    radius: float = SCF_RADIUS,
    n_views: int = SCF_VIEWS,
) -> Sampling:
    """Return SCF = 1 / (⟨1/S⟩ over S > 0 · ⟨S⟩) and SCF* = SCF / (1 + (Q/P) ⟨S⟩ SCF / 2).

    Parameters
    ----------
    views
        Unit vectors in the specimen's frame, see `view_directions`.
    generator
        Draws `n_views` of them: without repetition if there are more, with repetition if there are fewer.
    group
        Point group of the molecule; its images of the views are added before the draw.
    radius
        Fourier radius in voxels at which the sampling is counted.
    n_views
        Size of the draw; SCF* of incompletely sampled sets depends on it.
    """
    if views.shape[0] == 0:
        raise ValueError("views: none, need at least one")
    unit = torch.nn.functional.normalize(views.float(), dim=-1)
    everything = unit if group is None else symmetric_views(unit, group)
    n = everything.shape[0]
    if n >= n_views:
        chosen = torch.randperm(n, generator=generator)[:n_views]
    else:
        chosen = torch.randint(n, (n_views,), generator=generator)
    counts = sampling_counts(everything[chosen], fibonacci_hemisphere(_N_POINTS), radius).double()
    is_sampled = counts > 0
    mean = float(counts.mean())
    unsampled_fraction = 1.0 - float(is_sampled.double().mean())
    if mean == 0:
        return Sampling(scf=0.0, scf_star=0.0, unsampled_fraction=1.0, n_views=n)
    scf = 1.0 / (float((1.0 / counts[is_sampled]).mean()) * mean)
    odds = unsampled_fraction / (1.0 - unsampled_fraction)
    scf_star = scf / (1.0 + odds * mean * scf / 2.0)
    return Sampling(scf=scf, scf_star=scf_star, unsampled_fraction=unsampled_fraction, n_views=n)
