"""Procedural phantoms: protein-like assemblies of ideal helices and strands, for any point group.

The asymmetric unit is a cluster of domains that touch but do not overlap, each a stack of layers of parallel
helices or strands at the distances of real folds (helices 9.6 Å apart, strands 4.8 Å, layers 9.6-10 Å). Every
residue near a neighbour, or near a symmetry mate, is tested for clashes. Same seed, same atoms.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.spatial import cKDTree

from models.fourier.point_groups import group_order, normalise_symmetry, symmetry_matrices
from models.simulation.peptide import (
    HELIX_RISE_ANGSTROM,
    HELIX_TORSIONS_DEG,
    STRAND_RISE_ANGSTROM,
    STRAND_TORSIONS_DEG,
    draw_side_chain,
    grow_side_chain,
    ideal_backbone,
)
from models.simulation.structure import HYDROGENS_PER_HEAVY_ATOM, AtomicStructure

FloatArray = npt.NDArray[np.float64]

MIN_MASS_KDA, MAX_MASS_KDA = 20.0, 2000.0
_RESIDUE_KDA = 0.110
_RESIDUE_VOLUME_ANGSTROM3 = 175.0
"""Volume per residue of our layered packing, gaps between segments included (real proteins: 134 Å³)."""

_MIN_CA_DISTANCE_ANGSTROM = 3.9
_MIN_ATOM_DISTANCE_ANGSTROM = 2.4
_MIN_BOND_ANGSTROM = 1.2
"""No two atoms of a residue, or of residues in sequence, are nearer than a bond (C=O is 1.23 Å)."""

_ELEMENT_MASS_DA = {
    z: mass + 1.008 * HYDROGENS_PER_HEAVY_ATOM[z]
    for z, mass in ((6, 12.011), (7, 14.007), (8, 15.999), (16, 32.06))
}
_BACKBONE_ELEMENTS = (7, 6, 6, 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class PhantomSpec:
    """What `phantom:SEED[:mass_kda=M][:symmetry=S]` says."""

    seed: int
    mass_kda: float = 300.0
    symmetry: str = "C1"


def parse_phantom(text: str) -> PhantomSpec:
    """Parse `phantom:SEED`, optionally `phantom:SEED:mass_kda=300:symmetry=D2`; raise ValueError otherwise."""
    word, *parts = text.split(":")
    if word != "phantom" or not parts or not parts[0].isdigit():
        raise ValueError(f"structure: {text!r}, a phantom is phantom:SEED[:mass_kda=M][:symmetry=S]")
    mass_kda, symmetry = 300.0, "C1"
    for part in parts[1:]:
        key, _, value = part.partition("=")
        if key == "mass_kda":
            try:
                mass_kda = float(value)
            except ValueError as error:
                raise ValueError(f"structure: mass_kda={value!r}, must be a number of kDa") from error
        elif key == "symmetry":
            symmetry = normalise_symmetry(value)
        else:
            raise ValueError(f"structure: {key!r} in {text!r}, must be mass_kda or symmetry")
    return PhantomSpec(seed=int(parts[0]), mass_kda=mass_kda, symmetry=symmetry)


def build_phantom(seed: int, *, mass_kda: float = 300.0, symmetry: str = "C1") -> AtomicStructure:
    """Build a phantom within about two per cent of `mass_kda`, with the symmetry axes through the origin.

    Raises ValueError for a mass outside 20-2000 kDa or less than 6 kDa per asymmetric unit.
    """
    group = normalise_symmetry(symmetry)
    order = group_order(group)
    if not MIN_MASS_KDA <= mass_kda <= MAX_MASS_KDA or mass_kda / order < 6.0:
        raise ValueError(
            f"mass_kda: {mass_kda} for {group}, must lie in {MIN_MASS_KDA}-{MAX_MASS_KDA} kDa"
            " and give each asymmetric unit 6 kDa"
        )
    mates = symmetry_matrices(group).double().numpy()
    target_da = 1000.0 * mass_kda / order
    for swelling in (1.0, 1.15, 1.35, 1.6, 2.0):
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, 0x9A37))))
        domains = _place_domains(target_da / 110.0 * swelling, mates, rng)
        residues = _fill_domains(domains, mates, rng)
        residues = _drop_clashes(residues, mates)
        if sum(r.mass_da for r in residues) >= target_da:
            break
    unit = _trim_to_mass(residues, target_da)
    positions = np.concatenate([r.atoms for r in unit])
    numbers = np.concatenate([r.elements for r in unit]).astype(np.int16)
    whole = np.einsum("gij,nj->gni", mates, positions).reshape(-1, 3)
    if order == 1:  # symmetric assemblies keep their axes; an asymmetric one sits at its mass centre
        weights = np.array([_ELEMENT_MASS_DA[int(z)] for z in numbers])
        whole = whole - (whole * weights[:, None]).sum(0) / weights.sum()
    return AtomicStructure(
        positions_angstrom=whole.astype(np.float32),
        atomic_numbers=np.tile(numbers, order),
        name=f"phantom:{seed}:mass_kda={mass_kda:g}:symmetry={group}",
        symmetry=group,
    )


@dataclass(frozen=True, slots=True)
class _Domain:
    centre: FloatArray
    radius: float


@dataclass(frozen=True, slots=True)
class _Residue:
    atoms: FloatArray
    elements: npt.NDArray[np.int16]
    segment: int
    depth: float

    @property
    def mass_da(self) -> float:
        return float(sum(_ELEMENT_MASS_DA[int(z)] for z in self.elements))


def _place_domains(n_residues: float, mates: FloatArray, rng: np.random.Generator) -> list[_Domain]:
    """Place touching spheres of 60-260 residues, clear of one another and of all symmetry mates."""
    sizes: list[float] = []
    while (left := n_residues - sum(sizes)) > 1.0:
        size = float(rng.uniform(90.0, 260.0))
        sizes.append(left if left < size + 60.0 else size)
    domains: list[_Domain] = []
    for size in sizes:
        radius = (0.75 / math.pi * size * _RESIDUE_VOLUME_ANGSTROM3) ** (1.0 / 3.0)
        domains.append(_Domain(_find_place(domains, radius, mates, rng), radius))
    return domains


def _find_place(
    domains: list[_Domain], radius: float, mates: FloatArray, rng: np.random.Generator
) -> FloatArray:
    """Return a free centre, near what is there already: of many candidates one of the most compact."""
    overlap = 0.88  # spheres may interpenetrate a little; residues are divided between them afterwards
    centres = np.array([m @ d.centre for d in domains for m in mates]).reshape(-1, 3)
    radii = np.array([d.radius for d in domains for _ in mates])
    others = mates[1:]
    for attempt in range(40):
        directions = rng.normal(size=(300, 3))
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        if domains:
            hosts = rng.integers(len(domains), size=300)
            host_centres = np.array([d.centre for d in domains])[hosts]
            reach = overlap * (np.array([d.radius for d in domains])[hosts] + radius) * (1.0 + 0.05 * attempt)
            candidates = host_centres + directions * reach[:, None]
        elif len(others) == 0:
            return np.zeros(3)
        else:
            candidates = directions * (radius * 0.3 * (1.0 + attempt))
        free = np.ones(300, dtype=bool)
        if len(radii):
            gaps = np.linalg.norm(candidates[:, None] - centres[None], axis=2)
            free &= (gaps >= overlap * (radii[None] + radius) - 1e-6).all(1)
        for mate in others:
            free &= np.linalg.norm(candidates @ mate.T - candidates, axis=1) >= 2.0 * overlap * radius
        candidates = candidates[free]
        if len(candidates):
            spread = np.linalg.norm(candidates, axis=1)
            best = np.argsort(spread)[: max(1, len(candidates) // 4)]
            return np.asarray(candidates[rng.choice(best)])
    raise ValueError(f"phantom: {len(mates)} symmetry mates, found no place for a domain of {radius:.0f} Å")


def _fill_domains(domains: list[_Domain], mates: FloatArray, rng: np.random.Generator) -> list[_Residue]:
    """Fill every domain with layers of segments, keeping residues nearer to it than to any other domain."""
    centres = np.array([m @ d.centre for d in domains for m in mates])
    radii = np.array([d.radius for d in domains for _ in mates])
    residues: list[_Residue] = []
    n_segments = 0
    for index, domain in enumerate(domains):
        turn = _random_rotation(rng)
        for backbone in _layered_segments(domain.radius, rng):
            placed = backbone @ turn.T + domain.centre
            alphas = placed[:, 1]
            power = np.linalg.norm(alphas[:, None] - centres[None], axis=2) ** 2 - radii[None] ** 2
            own = power.argmin(1) == index * len(mates)
            inside = own & (np.linalg.norm(alphas - domain.centre, axis=1) < 1.02 * domain.radius)
            for run in _runs(inside, minimum=4):
                n_segments += 1
                for i in run:
                    residues.append(
                        _complete_residue(placed[i], n_segments, float(power[i, index * len(mates)]), rng)
                    )
    return residues


def _layered_segments(radius: float, rng: np.random.Generator) -> list[FloatArray]:
    """Return the backbones of a domain's segments, along z, in layers stacked along y."""
    kind = rng.choice(("helices", "strands", "mixed"), p=(0.4, 0.2, 0.4))
    segments: list[FloatArray] = []
    n_layers = math.ceil(2.0 * radius / 9.8) + 1
    for layer in range(n_layers):
        is_helix = kind == "helices" or (kind == "mixed" and layer % 3 != 1)
        spacing = 9.6 if is_helix else 4.85
        y = (layer - (n_layers - 1) / 2) * (8.6 if kind == "helices" else 9.8)
        # Neighbouring layers cross at about 20°, as packed helices and sheets do.
        crossing = math.radians(20.0 * ((layer % 2) - 0.5))
        tilt = np.array(
            [
                [math.cos(crossing), 0.0, math.sin(crossing)],
                [0.0, 1.0, 0.0],
                [-math.sin(crossing), 0.0, math.cos(crossing)],
            ]
        )
        n_lines = math.ceil(2.2 * radius / spacing)
        for line in range(n_lines):
            x = (line - (n_lines - 1) / 2 + 0.5 * (layer % 2)) * spacing
            for backbone in _segments_on_line(1.1 * radius, is_helix=is_helix, rng=rng, flip=line % 2 == 1):
                segments.append((backbone + np.array([x, 0.0, 0.0])) @ tilt.T + np.array([0.0, y, 0.0]))
    return segments


def _segments_on_line(
    half_length: float, *, is_helix: bool, rng: np.random.Generator, flip: bool
) -> list[FloatArray]:
    """Return segments one after another along z from -half_length, with loop-sized gaps between them."""
    rise = HELIX_RISE_ANGSTROM if is_helix else STRAND_RISE_ANGSTROM
    torsions = HELIX_TORSIONS_DEG if is_helix else STRAND_TORSIONS_DEG
    z = -half_length + float(rng.uniform(0.0, 6.0))
    segments: list[FloatArray] = []
    while z < half_length:
        n = int(rng.integers(10, 25) if is_helix else rng.integers(5, 10))
        backbone = ideal_backbone(*torsions, n)
        # Side chains of neighbouring strands point alternately; helices take any phase.
        phase = float(rng.uniform(0.0, 2.0 * math.pi)) if is_helix else 0.5 * math.pi
        c, s = math.cos(phase), math.sin(phase)
        turned = backbone @ np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]]).T
        if flip:
            turned = turned @ np.diag([1.0, -1.0, -1.0])
        length = n * rise
        segments.append(turned + np.array([0.0, 0.0, z + 0.5 * length]))
        z += length + float(rng.uniform(3.5, 7.0))
    return segments


def _complete_residue(backbone: FloatArray, segment: int, depth: float, rng: np.random.Generator) -> _Residue:
    elements = draw_side_chain(rng)
    atoms = np.concatenate((backbone, grow_side_chain(backbone, elements, rng)))
    return _Residue(atoms, np.array(_BACKBONE_ELEMENTS + elements, dtype=np.int16), segment, depth)


def _drop_clashes(residues: list[_Residue], mates: FloatArray) -> list[_Residue]:
    """Drop residues whose Cα is too near another segment's, then side-chain atoms that collide."""
    alphas = np.array([r.atoms[1] for r in residues])
    segments = np.array([r.segment for r in residues])
    copies = np.einsum("gij,nj->gni", mates, alphas)
    n = len(residues)
    tree = cKDTree(copies.reshape(-1, 3))
    keep = np.ones(n, dtype=bool)
    for i, found in enumerate(tree.query_ball_point(alphas, _MIN_CA_DISTANCE_ANGSTROM)):
        for other in found:
            mate, j = divmod(other, n)
            clashes = mate > 0 or (segments[i] != segments[j] and j < i)
            if clashes and keep[j] and (mate == 0 or j <= i):
                keep[i] = False
    kept = [r for r, flag in zip(residues, keep, strict=True) if flag]
    return _truncate_side_chains(kept, mates)


def _truncate_side_chains(residues: list[_Residue], mates: FloatArray) -> list[_Residue]:
    """Cut a side chain before its first atom that lies within 2.4 Å of another residue's atom."""
    atoms = np.concatenate([r.atoms for r in residues])
    owner = np.repeat(np.arange(len(residues)), [len(r.atoms) for r in residues])
    order = np.concatenate([np.arange(len(r.atoms)) for r in residues])
    copies = np.einsum("gij,nj->gni", mates, atoms).reshape(-1, 3)
    limit = np.array([len(r.atoms) for r in residues])
    for i, other in _close_pairs(atoms, copies):
        mate, j = divmod(other, len(atoms))
        if order[i] < 4 or i == other:
            continue
        is_neighbour = mate == 0 and abs(int(owner[i]) - int(owner[j])) <= 1
        if is_neighbour and np.linalg.norm(atoms[i] - atoms[j]) > _MIN_BOND_ANGSTROM:
            continue
        loses = order[j] < 4 or (int(owner[j]), int(order[j])) <= (int(owner[i]), int(order[i]))
        if loses and order[j] < limit[owner[j]]:
            limit[owner[i]] = min(int(limit[owner[i]]), int(order[i]))
    return [
        _Residue(r.atoms[:n], r.elements[:n], r.segment, r.depth)
        for r, n in zip(residues, limit.tolist(), strict=True)
    ]


def _close_pairs(atoms: FloatArray, copies: FloatArray) -> list[tuple[int, int]]:
    found = cKDTree(copies).query_ball_point(atoms, _MIN_ATOM_DISTANCE_ANGSTROM)
    return [(i, j) for i, others in enumerate(found) for j in sorted(others)]


def _trim_to_mass(residues: list[_Residue], target_da: float) -> list[_Residue]:
    """Leave out the residues farthest out in their domains until the mass is reached."""
    by_depth = sorted(range(len(residues)), key=lambda i: residues[i].depth)
    total = 0.0
    chosen: list[int] = []
    for i in by_depth:
        if total >= target_da:
            break
        chosen.append(i)
        total += residues[i].mass_da
    return [residues[i] for i in sorted(chosen)]


def _runs(flags: npt.NDArray[np.bool_], *, minimum: int) -> list[list[int]]:
    """Return the indices of each run of True at least `minimum` long."""
    runs: list[list[int]] = []
    current: list[int] = []
    for i, flag in enumerate([*flags.tolist(), False]):
        if flag:
            current.append(i)
            continue
        if len(current) >= minimum:
            runs.append(current)
        current = []
    return runs


def _random_rotation(rng: np.random.Generator) -> FloatArray:
    """Return a rotation uniform on SO(3) (Shoemake's quaternion)."""
    w, x, y, z = (q := rng.normal(size=4)) / np.linalg.norm(q)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )
