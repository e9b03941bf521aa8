"""Phantoms: mass, geometry, symmetry, repeatability."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial import cKDTree

from models.fourier.point_groups import group_order, symmetry_matrices
from models.simulation.peptide import HELIX_TORSIONS_DEG, STRAND_TORSIONS_DEG, ideal_backbone
from models.simulation.phantom import build_phantom, parse_phantom


@pytest.mark.parametrize(
    ("seed", "mass_kda", "symmetry"),
    [(1, 60, "C1"), (2, 120, "C4"), (3, 160, "D2"), (4, 500, "I"), (5, 240, "T")],
)
def test_mass_is_as_asked_and_the_assembly_has_its_symmetry(seed, mass_kda, symmetry):
    phantom = build_phantom(seed, mass_kda=mass_kda, symmetry=symmetry)
    assert phantom.mass_kda == pytest.approx(mass_kda, rel=0.02)
    positions = phantom.positions_angstrom.astype(np.float64)
    tree = cKDTree(positions)
    for matrix in symmetry_matrices(symmetry).double().numpy()[:6]:
        distance, partner = tree.query(positions @ matrix.T)
        assert distance.max() < 1e-3
        assert (phantom.atomic_numbers[partner] == phantom.atomic_numbers).all()
    assert len(positions) % group_order(symmetry) == 0


def test_atoms_do_not_overlap_and_are_packed_as_densely_as_protein():
    phantom = build_phantom(7, mass_kda=80)
    tree = cKDTree(phantom.positions_angstrom)
    assert len(tree.query_pairs(1.1)) == 0
    # Neighbours within 8 Å of an atom: about 100 inside a protein, 10 in a loose chain.
    neighbours = np.array([len(found) for found in tree.query_ball_point(phantom.positions_angstrom, 8.0)])
    assert 50 < np.median(neighbours) < 130


def test_same_seed_gives_the_same_atoms_and_another_seed_others():
    first, again, other = (build_phantom(seed, mass_kda=40) for seed in (5, 5, 6))
    assert first.positions_angstrom.tobytes() == again.positions_angstrom.tobytes()
    assert first.positions_angstrom.tobytes() != other.positions_angstrom.tobytes()


@pytest.mark.parametrize(("torsions", "rise"), [(HELIX_TORSIONS_DEG, 1.5), (STRAND_TORSIONS_DEG, 3.35)])
def test_ideal_segments_have_real_bonds_and_rise(torsions, rise):
    backbone = ideal_backbone(*torsions, 16)
    n, ca, c, o = (backbone[:, i] for i in range(4))
    assert np.allclose(np.linalg.norm(ca - n, axis=1), 1.458, atol=1e-6)
    assert np.allclose(np.linalg.norm(c - ca, axis=1), 1.525, atol=1e-6)
    assert np.allclose(np.linalg.norm(o - c, axis=1), 1.231, atol=1e-6)
    assert np.allclose(np.linalg.norm(n[1:] - c[:-1], axis=1), 1.329, atol=1e-6)
    assert (ca[-1, 2] - ca[0, 2]) / 15 == pytest.approx(rise, abs=0.12)


def test_helix_is_right_handed():
    alphas = ideal_backbone(*HELIX_TORSIONS_DEG, 20)[:, 1]
    angle = np.unwrap(np.arctan2(alphas[:, 1], alphas[:, 0]))
    assert np.degrees(angle[-1] - angle[0]) / 19 == pytest.approx(100.0, abs=5.0)


def test_spec_strings_are_parsed_and_bad_ones_refused():
    spec = parse_phantom("phantom:12:mass_kda=450.5:symmetry=d2")
    assert (spec.seed, spec.mass_kda, spec.symmetry) == (12, 450.5, "D2")
    for text in (
        "phantom:",
        "phantom:x",
        "phantom:1:mass=3",
        "phantom:1:mass_kda=heavy",
        "phantom:1:symmetry=Z",
    ):
        with pytest.raises(ValueError, match=r"structure|symmetry"):
            parse_phantom(text)


@pytest.mark.parametrize(("mass_kda", "symmetry"), [(5, "C1"), (5000, "C1"), (100, "I")])
def test_a_mass_out_of_range_is_refused(mass_kda, symmetry):
    with pytest.raises(ValueError, match="mass_kda"):
        build_phantom(1, mass_kda=mass_kda, symmetry=symmetry)
