"""Rotations in RELION's convention: intrinsic ZYZ Euler angles (rot, tilt, psi).

The matrix R acts on `xyz` column vectors of the specimen and gives coordinates in the microscope's frame
(its z axis is the beam). The projection of density V at pose R is P(x, y) = ∫ V(Rᵀ (x, y, z)) dz, hence the
central slice is P̂(kx, ky) = V̂(Rᵀ (kx, ky, 0)); the view direction in the specimen's frame is R's third row.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def euler_to_matrix(euler_deg: Float[Tensor, "*b 3"]) -> Float[Tensor, "*b 3 3"]:
    """Return R = Rz(psi) Ry(tilt) Rz(rot) for angles (rot, tilt, psi) in degrees (RELION's A matrix)."""
    rot, tilt, psi = torch.deg2rad(euler_deg).unbind(-1)
    ca, sa = torch.cos(rot), torch.sin(rot)
    cb, sb = torch.cos(tilt), torch.sin(tilt)
    cg, sg = torch.cos(psi), torch.sin(psi)
    rows = (
        torch.stack((cg * cb * ca - sg * sa, cg * cb * sa + sg * ca, -cg * sb), dim=-1),
        torch.stack((-sg * cb * ca - cg * sa, -sg * cb * sa + cg * ca, sg * sb), dim=-1),
        torch.stack((sb * ca, sb * sa, cb), dim=-1),
    )
    return torch.stack(rows, dim=-2)


def matrix_to_euler(matrix: Float[Tensor, "*b 3 3"]) -> Float[Tensor, "*b 3"]:
    """Return (rot, tilt, psi) in degrees, tilt in [0, 180]; at the poles rot carries nothing (0)."""
    tilt = torch.atan2(torch.hypot(matrix[..., 2, 0], matrix[..., 2, 1]), matrix[..., 2, 2])
    is_pole = torch.sin(tilt).abs() < 1e-6
    rot = torch.where(is_pole, torch.zeros_like(tilt), torch.atan2(matrix[..., 2, 1], matrix[..., 2, 0]))
    psi = torch.where(
        is_pole,
        torch.atan2(matrix[..., 0, 1], matrix[..., 1, 1]),
        torch.atan2(matrix[..., 1, 2], -matrix[..., 0, 2]),
    )
    return torch.rad2deg(torch.stack((rot, tilt, psi), dim=-1))
