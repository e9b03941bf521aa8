"""What a predicted pose is worth: the loss of CryoGEM's eq. 11 and the errors of eq. 13, for any point group.

Rotations act on xyz column vectors of the specimen (`models.fourier.rotations`). R and R g give the same projection for
every g of the map's point group, so all comparisons take the equivalent of the truth that lies nearest to the prediction;
without that a network is taught the mean of equivalent poses, which is none of them. Shifts are (y, x), in whatever unit the
caller weighs them by.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional


def rotation_from_six(values: Float[Tensor, "b 6"]) -> Float[Tensor, "b 3 3"]:
    """Return rotations whose first two rows are two vectors made orthonormal (Zhou et al. 2019; S2S2 of cryoFIRE).

    The map is continuous and reaches every rotation, unlike angles or quaternions.
    """
    first = functional.normalize(values[:, :3], dim=-1)
    along = (first * values[:, 3:]).sum(-1, keepdim=True)
    second = functional.normalize(values[:, 3:] - along * first, dim=-1)
    return torch.stack((first, second, torch.linalg.cross(first, second)), dim=-2)


def nearest_equivalents(
    rotations: Float[Tensor, "b 3 3"], targets: Float[Tensor, "b 3 3"], group: Float[Tensor, "g 3 3"]
) -> Float[Tensor, "b 3 3"]:
    """Return for each target R the equivalent R g nearest to the given rotation in the Frobenius norm."""
    equivalents = targets[:, None] @ group[None]
    # ‖A - B‖² = 6 - 2 tr(Aᵀ B) for rotations
    likeness = (rotations[:, None] * equivalents).sum((-2, -1))
    return equivalents[torch.arange(len(targets)), likeness.argmax(1)]


def pose_loss(
    rotations: Float[Tensor, "b 3 3"],
    shifts: Float[Tensor, "b 2"],
    target_rotations: Float[Tensor, "b 3 3"],
    target_shifts: Float[Tensor, "b 2"],
    group: Float[Tensor, "g 3 3"],
) -> Float[Tensor, ""]:
    """Return eq. 11: the mean of ‖R - R̂‖²_F / 9 + ‖T - T̂‖₁ / 2."""
    nearest = nearest_equivalents(rotations.detach(), target_rotations, group)
    rotation = (rotations - nearest).square().sum((-2, -1)) / 9.0
    shift = (shifts - target_shifts).abs().sum(-1) / 2.0
    return (rotation + shift).mean()


def view_errors_deg(
    rotations: Float[Tensor, "b 3 3"], targets: Float[Tensor, "b 3 3"], group: Float[Tensor, "g 3 3"]
) -> Float[Tensor, " b"]:
    """Return the angles between predicted and true view directions; their mean is eq. 13.

    Eq. 13 writes R v with v = (0, 0, 1) for an R that takes the microscope's frame to the specimen's: here that is Rᵀ v, the
    third row. The turn within the image does not count.
    """
    views = (targets[:, None] @ group[None])[:, :, 2]
    return _angles_deg((rotations[:, None, 2] * views).sum(-1)).amin(1)


def rotation_errors_deg(
    rotations: Float[Tensor, "b 3 3"], targets: Float[Tensor, "b 3 3"], group: Float[Tensor, "g 3 3"]
) -> Float[Tensor, " b"]:
    """Return the angles of the rotations between prediction and truth, the turn within the image included."""
    nearest = nearest_equivalents(rotations, targets, group)
    return _angles_deg(0.5 * ((rotations * nearest).sum((-2, -1)) - 1.0))


def _angles_deg(cosines: Tensor) -> Tensor:
    return torch.rad2deg(torch.acos(cosines.double().clamp(-1.0, 1.0))).float()
