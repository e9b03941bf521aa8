"""Point groups: orders, closure, RELION's axes."""

from __future__ import annotations

import math

import pytest
import torch

from models.fourier.point_groups import group_order, normalise_symmetry, symmetry_matrices

ORDERS = {"C1": 1, "C4": 4, "C7": 7, "D2": 4, "D7": 14, "T": 12, "O": 24, "I": 60, "I1": 60, "i2": 60}


@pytest.mark.parametrize(("name", "order"), ORDERS.items())
def test_groups_have_their_order_and_are_closed(name, order):
    matrices = symmetry_matrices(name)
    assert len(matrices) == order == group_order(name)
    products = torch.einsum("aij,bjk->abik", matrices, matrices).reshape(-1, 1, 3, 3)
    nearest = (products - matrices[None]).abs().amax((-2, -1)).amin(1)
    assert float(nearest.max()) < 1e-5
    assert torch.allclose(torch.linalg.det(matrices), torch.ones(order), atol=1e-5)
    assert torch.equal(matrices[0], torch.eye(3))


@pytest.mark.parametrize("name", ["C4", "D3", "T", "O", "I", "I1"])
def test_no_rotation_is_listed_twice(name):
    matrices = symmetry_matrices(name)
    distance = (matrices[:, None] - matrices[None]).abs().amax((-2, -1)) + torch.eye(len(matrices))
    assert float(distance.min()) > 1e-2


def holds(name: str, axis: tuple[float, float, float], fold: int) -> bool:
    """Whether the group turns about the axis by a full circle over `fold`."""
    vector = torch.nn.functional.normalize(torch.tensor(axis), dim=0)
    trace = 1.0 + 2.0 * math.cos(2.0 * math.pi / fold)
    return any(
        float((m @ vector - vector).abs().max()) < 1e-4 and abs(float(m.trace()) - trace) < 1e-4
        for m in symmetry_matrices(name)
    )


def test_axes_lie_where_relion_has_them():
    x, y, z = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)
    assert holds("C4", z, 4)
    assert holds("D3", z, 3)
    assert holds("D3", x, 2)
    assert all(holds(name, axis, 2) for name in ("D2", "O", "I1", "I2") for axis in (x, y, z))
    assert all(holds("O", axis, 4) for axis in (x, y, z))
    assert holds("T", z, 3)
    assert holds("I2", (0.525731, 0.0, 0.850651), 5)


@pytest.mark.parametrize("name", ["", "C0", "E7", "D", "C-2", "I9"])
def test_unknown_symmetry_is_named(name):
    with pytest.raises(ValueError, match="symmetry"):
        normalise_symmetry(name)
