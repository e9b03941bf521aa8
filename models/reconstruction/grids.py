"""Grids on the sphere, on SO(3) and in the plane of shifts. HEALPix pixel centres are computed here.

HEALPix: Górski et al. 2005, ring scheme, eq. 4-9. Order o has 12 · 4^o directions of equal area.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from models.fourier.rotations import euler_to_matrix


def healpix_directions(order: int) -> Float[Tensor, "v 3"]:
    """Return the unit vectors (x, y, z) of the HEALPix pixel centres, in ring order."""
    n_side = 2**order
    rows: list[tuple[Tensor, float]] = []
    for i in range(1, 4 * n_side):
        ring = min(i, 4 * n_side - i)
        if ring < n_side:
            j = torch.arange(4 * ring, dtype=torch.float64) + 0.5
            phi = (math.pi / (2 * ring)) * j
            z = 1.0 - ring**2 / (3.0 * n_side**2)
            z = z if i < 2 * n_side else -z
        else:
            offset = 0.5 * ((i - n_side + 1) % 2)
            phi = (math.pi / (2 * n_side)) * (torch.arange(4 * n_side, dtype=torch.float64) + offset)
            z = 4.0 / 3.0 - 2.0 * i / (3.0 * n_side)
        rows.append((phi, z))
    vectors = [
        torch.stack(
            (
                math.sqrt(1 - z * z) * torch.cos(phi),
                math.sqrt(1 - z * z) * torch.sin(phi),
                torch.full_like(phi, z),
            ),
            dim=-1,
        )
        for phi, z in rows
    ]
    return torch.cat(vectors).float()


def so3_grid(order: int) -> Float[Tensor, "j 3 3"]:
    """Return HEALPix directions × in-plane angles: 576 rotations 30° apart (order 1), 4,608 at 15° (order 2).

    They come in pairs: the second half is the first, `half_turned`. Turning them from the right and
    `asymmetric_unit` leave them so.
    """
    directions = healpix_directions(order)
    n_psi = 3 * 2**order
    tilt = torch.rad2deg(torch.acos(directions[:, 2].clamp(-1.0, 1.0)))
    rot = torch.rad2deg(torch.atan2(directions[:, 1], directions[:, 0]))
    psi = torch.arange(n_psi) * (180.0 / n_psi)
    euler = torch.stack(
        (
            rot[:, None].expand(-1, n_psi),
            tilt[:, None].expand(-1, n_psi),
            psi[None, :].expand(rot.numel(), -1),
        ),
        dim=-1,
    ).reshape(-1, 3)
    rotations = euler_to_matrix(euler)
    return torch.cat((rotations, half_turned(rotations)))


def half_turned(rotations: Float[Tensor, "j 3 3"]) -> Float[Tensor, "j 3 3"]:
    """Turn each by 180° about the beam: its slice is the conjugate, because images are real."""
    return rotations * torch.tensor([-1.0, -1.0, 1.0])[:, None]


def grid_spacing_deg(order: int) -> float:
    """Return the spacing of `so3_grid` in degrees."""
    return 60.0 / 2**order


def random_rotations(n: int, generator: torch.Generator) -> Float[Tensor, "n 3 3"]:
    """Draw rotations uniformly (normalised Gaussian quaternions)."""
    q = torch.randn((n, 4), generator=generator)
    return quaternion_to_matrix(q / q.norm(dim=-1, keepdim=True))


def quaternion_to_matrix(q: Float[Tensor, "*b 4"]) -> Float[Tensor, "*b 3 3"]:
    """Return the rotation of a unit quaternion (w, x, y, z)."""
    w, x, y, z = q.unbind(-1)
    rows = (
        torch.stack((1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)), dim=-1),
        torch.stack((2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)), dim=-1),
        torch.stack((2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)), dim=-1),
    )
    return torch.stack(rows, dim=-2)


def rotation_vector_to_matrix(vector_rad: Float[Tensor, "*b 3"]) -> Float[Tensor, "*b 3 3"]:
    """Return the rotation by |v| about v (through the quaternion; smooth at zero)."""
    half = 0.5 * torch.sqrt(vector_rad.square().sum(-1, keepdim=True) + 1e-24)
    q = torch.cat((torch.cos(half), 0.5 * vector_rad * torch.sinc(half / math.pi)), dim=-1)
    return quaternion_to_matrix(q)


def rotation_angle_deg(a: Float[Tensor, "*b 3 3"], b: Float[Tensor, "*b 3 3"]) -> Float[Tensor, "*b"]:
    """Return the angle between rotations in degrees, in [0, 180]."""
    trace = (a * b).sum(dim=(-2, -1))
    return torch.rad2deg(torch.acos(((trace - 1.0) / 2.0).clamp(-1.0, 1.0)))


def local_rotations(step_deg: float) -> Float[Tensor, "27 3 3"]:
    """Return the 27 rotations with rotation vectors in {−step, 0, step}³, identity in the middle (index 13)."""
    line = torch.tensor([-1.0, 0.0, 1.0]) * math.radians(step_deg)
    vectors = torch.cartesian_prod(line, line, line)
    return rotation_vector_to_matrix(vectors)


def shift_grid(half_extent: int, step_px: float) -> Float[Tensor, "t 2"]:
    """Return the (2·half_extent + 1)² shifts (x, y) in pixels on a square grid around zero."""
    line = torch.arange(-half_extent, half_extent + 1).float() * step_px
    return torch.cartesian_prod(line, line)


def asymmetric_unit(
    rotations: Float[Tensor, "j 3 3"], group: Float[Tensor, "g 3 3"]
) -> Float[Tensor, "i 3 3"]:
    """Keep one of each set of equivalent rotations {R g}: those whose view lies nearest to a generic direction."""
    if group.shape[0] == 1:
        return rotations
    centre = torch.nn.functional.normalize(torch.tensor([0.331, 0.209, 0.917]), dim=0)
    images = group @ centre
    views = rotations[:, 2, :]
    # v·c ≥ v·(g c) for every g: the Voronoi cell of c among its own images.
    is_inside = (views @ centre)[:, None] >= views @ images.T - 1e-6
    return rotations[is_inside.all(dim=1)]
