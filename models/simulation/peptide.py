"""Ideal peptide segments: backbone and side-chain atoms from bond lengths, angles and torsions.

Bond geometry is Engh & Huber's (1991), rounded; side chains are random trees of ideal tetrahedral carbons with
the mean size and composition of proteins, so that mass and density come out right.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

HELIX_TORSIONS_DEG = (-57.0, -47.0)
STRAND_TORSIONS_DEG = (-120.0, 130.0)
HELIX_RISE_ANGSTROM = 1.5
STRAND_RISE_ANGSTROM = 3.35

SIDE_CHAINS: tuple[tuple[float, tuple[int, ...]], ...] = (
    (0.07, ()), (0.09, (6,)), (0.06, (6, 8)), (0.13, (6, 6, 6)), (0.15, (6, 6, 6, 6)), (0.12, (6, 6, 8, 8)),
    (0.12, (6, 6, 6, 8, 8)), (0.10, (6, 6, 6, 6, 7)), (0.08, (6, 6, 6, 7, 6, 7)), (0.04, (6, 6, 16, 6)),
    (0.04, (6, 6, 6, 6, 6, 6, 8)),
)  # fmt: skip
"""Probability and heavy atoms (Cβ outwards) of a side chain; the mean residue weighs 110 Da with hydrogens."""


def place_atom(
    a: FloatArray, b: FloatArray, c: FloatArray, bond_angstrom: float, angle_deg: float, torsion_deg: float
) -> FloatArray:
    """Return the atom bound to `c` with the given bond to c, angle b-c-x and torsion a-b-c-x (NeRF)."""
    angle, torsion = math.radians(angle_deg), math.radians(torsion_deg)
    bc = (c - b) / np.linalg.norm(c - b)
    normal = np.cross(b - a, bc)
    normal /= np.linalg.norm(normal)
    local = np.array(
        [-math.cos(angle), math.sin(angle) * math.cos(torsion), math.sin(angle) * math.sin(torsion)]
    )
    frame = np.stack((bc, np.cross(normal, bc), normal), axis=1)
    return np.asarray(c + bond_angstrom * (frame @ local), dtype=np.float64)


@lru_cache(maxsize=16)
def ideal_backbone(phi_deg: float, psi_deg: float, n_residues: int) -> FloatArray:
    """Return N, CA, C, O of an ideal segment, shape (n, 4, 3) in Å, its axis along z through the origin."""
    chain = [
        np.array([0.0, 0.0, 0.0]),
        np.array([1.458, 0.0, 0.0]),
        np.array([1.458 + 1.525 * math.cos(math.radians(69.0)), 1.525 * math.sin(math.radians(69.0)), 0.0]),
    ]
    for _ in range(n_residues):
        for bond, angle, torsion in (
            (1.329, 116.6, psi_deg),
            (1.458, 121.7, 180.0),
            (1.525, 111.0, phi_deg),
        ):
            chain.append(place_atom(chain[-3], chain[-2], chain[-1], bond, angle, torsion))
    atoms = np.empty((n_residues, 4, 3))
    for i in range(n_residues):
        n, ca, c, following = chain[3 * i : 3 * i + 4]
        outward = (c - ca) / np.linalg.norm(c - ca) + (c - following) / np.linalg.norm(c - following)
        atoms[i] = n, ca, c, c + 1.231 * outward / np.linalg.norm(outward)
    alphas = atoms[:, 1]
    axis = np.linalg.svd(alphas - alphas.mean(0))[2][0]
    axis *= math.copysign(1.0, float(axis @ (alphas[-1] - alphas[0])))
    return np.asarray((atoms - atoms.mean((0, 1))) @ _frame_with_axis(axis), dtype=np.float64)


def _frame_with_axis(axis: FloatArray) -> FloatArray:
    """Return an orthonormal matrix whose third column is `axis` (right-handed)."""
    helper = np.array([1.0, 0.0, 0.0]) if abs(axis[0]) < 0.9 else np.array([0.0, 1.0, 0.0])
    first = np.cross(helper, axis)
    first /= np.linalg.norm(first)
    return np.stack((first, np.cross(axis, first), axis), axis=1)


def grow_side_chain(backbone: FloatArray, elements: tuple[int, ...], rng: np.random.Generator) -> FloatArray:
    """Return the side chain's atoms, shape (n, 3), for one residue's N, CA, C, O; the first is Cβ.

    Each further atom follows the last in a random staggered torsion; where a branch would collide with an
    atom two bonds away, the geometry itself keeps them apart.
    """
    if not elements:
        return np.empty((0, 3))
    n, ca, c = backbone[:3]
    atoms = [place_atom(c, n, ca, 1.53, 110.5, -122.6)]
    trail = [n, ca, atoms[0]]
    torsion = float(rng.choice((-60.0, 180.0, 60.0)))
    for position in range(1, len(elements)):
        if position >= 3 and position % 2 == 1:  # a branch: second substituent of the atom before the last
            atoms.append(place_atom(trail[-4], trail[-3], trail[-2], 1.50, 111.0, torsion + 120.0))
            continue
        torsion = float(rng.choice((-60.0, 180.0, 180.0, 60.0)))
        atoms.append(place_atom(trail[-3], trail[-2], trail[-1], 1.51, 112.0, torsion))
        trail.append(atoms[-1])
    return np.stack(atoms)


def draw_side_chain(rng: np.random.Generator) -> tuple[int, ...]:
    """Return the elements of a random residue's side chain."""
    weights = np.array([weight for weight, _ in SIDE_CHAINS])
    return SIDE_CHAINS[int(rng.choice(len(SIDE_CHAINS), p=weights / weights.sum()))][1]
