"""Projections of structures for the ranker's training fields: one pool of random views per structure.

All structures are rendered on the same grid, `GRID_PX` pixels across with the structure's diameter spanning
`DIAMETER_PX` of them; a training field resamples a view to the diameter it needs. Potentials, solvent displacement and
slicing are the shared ones (`models.simulation`, `models.reconstruction.projector`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from models.fourier.rotations import euler_to_matrix
from models.reconstruction.projector import HalfPlane, extract_slices, volume_to_cube
from models.simulation.phantom import build_phantom, parse_phantom
from models.simulation.structure import (
    ICE_MEAN_POTENTIAL_V,
    AtomicStructure,
    density_from_atoms,
    read_structure,
)

GRID_PX = 64
DIAMETER_PX = 44
_MAX_SHELL = 31.0
_N_PIECES = 3
_OUTERMOST = 0.995
"""Fraction of atoms inside the radius that counts: one stray loop must not shrink the whole structure."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewPool:
    """Random views of one structure, protein positive, on `GRID_PX` pixels."""

    name: str
    diameter_angstrom: float
    views: Float[Tensor, "v n n"]
    fragments: Float[Tensor, "f n n"]
    """Views of pieces that hold a fifth to two fifths of the atoms: broken particles."""


def random_rotations(n: int, generator: torch.Generator) -> Float[Tensor, "n 3 3"]:
    """Return `n` rotation matrices, uniform on SO(3)."""
    u = torch.rand((n, 3), generator=generator)
    tilt = torch.rad2deg(torch.arccos(1.0 - 2.0 * u[:, 1]))
    return euler_to_matrix(torch.stack((360.0 * u[:, 0], tilt, 360.0 * u[:, 2]), dim=-1))


def structure_named(name: str) -> AtomicStructure:
    """Return the structure that `phantom:SEED[:mass_kda=M][:symmetry=S]` or a PDB or mmCIF file's path names."""
    if not name.startswith("phantom:"):
        return read_structure(Path(name))
    spec = parse_phantom(name)
    return build_phantom(spec.seed, mass_kda=spec.mass_kda, symmetry=spec.symmetry)


def stretched(structure: AtomicStructure, sigma: float, generator: torch.Generator) -> AtomicStructure:
    """Return a structure stretched along three random axes by factors exp(N(0, sigma)): another shape of the same mass.

    Distances between atoms are no longer chemical, which a ranker's 8 Å images do not show.
    """
    axes = random_rotations(1, generator)[0].numpy()
    factors = torch.exp(sigma * torch.randn(3, generator=generator)).numpy()
    factors = factors / factors.prod() ** (1.0 / 3.0)
    return AtomicStructure(
        positions_angstrom=(structure.positions_angstrom @ axes.T * factors) @ axes,
        atomic_numbers=structure.atomic_numbers,
        name=structure.name,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendering:
    """The atoms of a structure that the grid holds, and the pixel size that fits its diameter to `DIAMETER_PX`."""

    structure: AtomicStructure
    pixel_size_angstrom: float

    @property
    def diameter_angstrom(self) -> float:
        """The structure's diameter."""
        return self.pixel_size_angstrom * DIAMETER_PX


def rendering_of(structure: AtomicStructure) -> Rendering:
    """Return how a structure fits on the grid."""
    radius = float(np.quantile(np.linalg.norm(structure.positions_angstrom, axis=1), _OUTERMOST))
    pixel_size_angstrom = 2.0 * radius / DIAMETER_PX
    inside = np.abs(structure.positions_angstrom).max(axis=1) < pixel_size_angstrom * (GRID_PX // 2 - 2)
    return Rendering(structure=_subset(structure, inside), pixel_size_angstrom=pixel_size_angstrom)


def render_pool(
    structure: AtomicStructure, *, n_views: int, n_fragments: int, generator: torch.Generator
) -> ViewPool:
    """Return `n_views` uniformly random views of a structure and `n_fragments` of its broken pieces."""
    rendering = rendering_of(structure)
    pixel_size_angstrom = rendering.pixel_size_angstrom
    fragments = [_broken(rendering.structure, generator) for _ in range(_N_PIECES)]
    n_of_each = -(-n_fragments // len(fragments))
    pieces = [
        project_views(piece, pixel_size_angstrom, random_rotations(n_of_each, generator))
        for piece in fragments
    ]
    return ViewPool(
        name=structure.name,
        diameter_angstrom=rendering.diameter_angstrom,
        views=project_views(rendering.structure, pixel_size_angstrom, random_rotations(n_views, generator)),
        fragments=torch.cat(pieces)[:n_fragments],
    )


def project_views(
    structure: AtomicStructure, pixel_size_angstrom: float, rotations: Float[Tensor, "v 3 3"]
) -> Float[Tensor, "v n n"]:
    """Return projections of a structure on `GRID_PX` pixels, protein positive, the solvent's potential displaced."""
    density = density_from_atoms(
        structure, GRID_PX, pixel_size_angstrom, solvent_potential_v=ICE_MEAN_POTENTIAL_V
    )
    plane = HalfPlane.of(GRID_PX, _MAX_SHELL)
    values = extract_slices(volume_to_cube(density, _MAX_SHELL), rotations, plane)
    ky, kx = plane.ky.long() % GRID_PX, plane.kx.long()
    spectrum = torch.zeros((len(rotations), GRID_PX, GRID_PX // 2 + 1), dtype=torch.complex64)
    spectrum[:, ky, kx] = values
    # The plane lists each independent coefficient once; the column kx = 0 holds both of a Friedel pair.
    on_axis = plane.kx == 0
    spectrum[:, (-plane.ky[on_axis].long()) % GRID_PX, 0] = values[:, on_axis].conj()
    views: Tensor = torch.fft.fftshift(torch.fft.irfft2(spectrum, s=(GRID_PX, GRID_PX)), dim=(-2, -1))
    return views


def _broken(structure: AtomicStructure, generator: torch.Generator) -> AtomicStructure:
    """Return the fifth to two fifths of the atoms that lie farthest along a random direction."""
    direction = torch.nn.functional.normalize(torch.randn(3, generator=generator), dim=0).numpy()
    along = structure.positions_angstrom @ direction
    fraction = 0.2 + 0.2 * float(torch.rand((), generator=generator))
    return _subset(structure, along > np.quantile(along, 1.0 - fraction), is_centred=True)


def _subset(
    structure: AtomicStructure,
    is_kept: np.ndarray[tuple[int], np.dtype[np.bool_]],
    *,
    is_centred: bool = False,
) -> AtomicStructure:
    positions = structure.positions_angstrom[is_kept]
    if is_centred:
        positions = positions - positions.mean(axis=0, keepdims=True)
    return AtomicStructure(
        positions_angstrom=positions,
        atomic_numbers=structure.atomic_numbers[is_kept],
        name=structure.name,
    )
