"""Point groups as rotation matrices, with RELION's axis conventions.

Cn and Dn have their main axis along z, Dn a two-fold along x (so D2 has its axes along x, y, z). O has its
four-folds along the axes. I and I2 have two-folds along x, y, z and a five-fold in the xz plane, I1 the same
turned by 90° about y and z; T has a three-fold along z (RELION's choice, not the one of Heymann et al.).
"""

from __future__ import annotations

import math
import re

import torch
from jaxtyping import Float
from torch import Tensor

_GENERATORS: dict[str, tuple[tuple[int, tuple[float, float, float]], ...]] = {
    "T": ((3, (0.0, 0.0, 1.0)), (2, (0.0, math.sqrt(2.0 / 3.0), math.sqrt(1.0 / 3.0)))),
    "O": ((3, (1.0, 1.0, 1.0)), (4, (0.0, 0.0, 1.0))),
    "I1": ((2, (1.0, 0.0, 0.0)), (5, (0.85065080702670, 0.0, -0.5257311142635))),
    "I2": ((2, (0.0, 0.0, 1.0)), (5, (0.525731114, 0.0, 0.850650807))),
}
_ORDERS = {"T": 12, "O": 24, "I1": 60, "I2": 60}


def normalise_symmetry(name: str) -> str:
    """Return the group's canonical name (`"c4"` → `"C4"`, `"I"` → `"I2"`, `"D1"` stays); unknown names raise."""
    upper = name.strip().upper()
    upper = {"I": "I2"}.get(upper, upper)
    match = re.fullmatch(r"([CD])([1-9]\d{0,2})", upper)
    if match is None and upper not in _GENERATORS:
        raise ValueError(f"symmetry: {name!r}, must be Cn, Dn, T, O, I, I1 or I2")
    return upper


def group_order(name: str) -> int:
    """Return the number of rotations in the group."""
    group = normalise_symmetry(name)
    if group in _ORDERS:
        return _ORDERS[group]
    n = int(group[1:])
    return n if group[0] == "C" else 2 * n


def symmetry_matrices(name: str) -> Float[Tensor, "g 3 3"]:
    """Return the group's rotation matrices, acting on xyz column vectors; the first is the identity."""
    group = normalise_symmetry(name)
    if group[0] in "CD" and group not in _GENERATORS:
        n = int(group[1:])
        turns = [_axis_rotation((0.0, 0.0, 1.0), 2.0 * math.pi * i / n) for i in range(n)]
        if group[0] == "D":
            flip = _axis_rotation((1.0, 0.0, 0.0), math.pi)
            turns += [turn @ flip for turn in turns]
        return torch.stack(turns).float()
    generators = [_axis_rotation(axis, 2.0 * math.pi / fold) for fold, axis in _GENERATORS[group]]
    return _close_group(generators, _ORDERS[group]).float()


def _axis_rotation(axis: tuple[float, float, float], angle_rad: float) -> Tensor:
    """Return Rodrigues' rotation about `axis`, in double precision."""
    x, y, z = torch.nn.functional.normalize(torch.tensor(axis, dtype=torch.float64), dim=0).tolist()
    cross = torch.tensor([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]], dtype=torch.float64)
    eye = torch.eye(3, dtype=torch.float64)
    return eye + math.sin(angle_rad) * cross + (1.0 - math.cos(angle_rad)) * (cross @ cross)


def _close_group(generators: list[Tensor], order: int) -> Tensor:
    """Return all products of the generators; `order` bounds the walk."""
    members = [torch.eye(3, dtype=torch.float64)]
    position = 0
    while position < len(members):
        for generator in generators:
            product = generator @ members[position]
            if all(float((product - member).abs().max()) > 1e-4 for member in members):
                members.append(product)
        position += 1
        if len(members) > order:
            raise RuntimeError(f"point group: {len(members)} rotations, must close at {order}")
    return torch.stack(members)
