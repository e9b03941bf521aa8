"""Atoms and the electrostatic potential that they make.

Potentials are in volts. Electron scattering factors are the five-Gaussian fits C4322 (International Tables C,
table 4.3.2.2) as tabulated in gemmi; the potential of an atom is 47.878 V Å² times the Fourier transform of
its scattering factor. Atoms are spread over a finer grid, one grid per element, then multiplied by the form factor in
Fourier space.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import gemmi
import mrcfile
import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int
from torch import Tensor

from models.fourier.transforms import centred_irfft3, centred_rfft3, good_size

POTENTIAL_PER_SCATTERING_V_ANGSTROM2 = 47.87801
"""h²/(2π m e): turns a scattering factor in Å into a potential integral in V Å³."""

ICE_MEAN_POTENTIAL_V = 4.5
"""Mean inner potential of vitreous ice at 0.93 g/cm³ from the same scattering factors (measured: 3.5-4.8 V)."""

HYDROGENS_PER_HEAVY_ATOM = {6: 1.2, 7: 1.2, 8: 0.2, 16: 0.2}
"""Mean hydrogens bound to C, N, O, S in proteins, used where a file carries no hydrogens."""

_DISPLACED_VOLUME_ANGSTROM3 = {1: 5.15, 6: 16.44, 7: 2.49, 8: 9.13, 12: 7.0, 15: 5.73, 16: 19.86}
"""Solvent displaced by an atom, Fraser, MacRae & Suzuki 1978, table 1 (others: the value of carbon)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AtomicStructure:
    """Atoms centred at their mass centre; positions are xyz in Å."""

    positions_angstrom: npt.NDArray[np.float32]
    atomic_numbers: npt.NDArray[np.int16]
    name: str
    symmetry: str = "C1"

    @property
    def has_hydrogens(self) -> bool:
        """True where hydrogens are among the atoms (more than a tenth of all)."""
        return bool((self.atomic_numbers == 1).mean() > 0.1)

    @property
    def mass_kda(self) -> float:
        """The mass, hydrogens included (estimated where the file has none)."""
        total = 0.0
        for number, count in zip(*np.unique(self.atomic_numbers, return_counts=True), strict=True):
            hydrogens = 0.0 if self.has_hydrogens else HYDROGENS_PER_HEAVY_ATOM.get(int(number), 0.0)
            total += float(count) * (gemmi.Element(int(number)).weight + 1.008 * hydrogens)
        return total / 1000.0

    @property
    def radius_angstrom(self) -> float:
        """Distance of the farthest atom from the centre."""
        return float(np.linalg.norm(self.positions_angstrom, axis=1).max())


def centred_structure(
    positions_angstrom: npt.NDArray[np.floating],
    atomic_numbers: npt.NDArray[np.integer],
    name: str,
    symmetry: str = "C1",
) -> AtomicStructure:
    """Return a structure moved to its mass centre."""
    weights = np.array([gemmi.Element(int(z)).weight for z in range(119)])[atomic_numbers]
    positions = np.asarray(positions_angstrom, dtype=np.float64)
    centre = (positions * weights[:, None]).sum(0) / weights.sum()
    return AtomicStructure(
        positions_angstrom=(positions - centre).astype(np.float32),
        atomic_numbers=np.asarray(atomic_numbers, dtype=np.int16),
        name=name,
        symmetry=symmetry,
    )


def read_structure(path: Path) -> AtomicStructure:
    """Read the first model of a PDB or mmCIF file (also .gz) as deposited; waters are left out.

    Of alternative conformations the first is used. Raises ValueError when the file has no atoms.
    """
    try:
        document = gemmi.read_structure(str(path))
    except (RuntimeError, ValueError, OSError) as error:
        raise ValueError(f"{path}: not a readable PDB or mmCIF file ({error})") from error
    positions: list[tuple[float, float, float]] = []
    numbers: list[int] = []
    for chain in document[0] if len(document) else ():
        for residue in chain:
            if residue.is_water():
                continue
            for atom in residue:
                if atom.altloc in ("\0", "A", "1") and atom.element.atomic_number > 0:
                    positions.append((atom.pos.x, atom.pos.y, atom.pos.z))
                    numbers.append(atom.element.atomic_number)
    if not positions:
        raise ValueError(f"{path}: 0 atoms, a structure has at least one")
    return centred_structure(np.array(positions), np.array(numbers, dtype=np.int16), path.name)


def density_from_atoms(
    structure: AtomicStructure,
    box_px: int,
    pixel_size_angstrom: float,
    *,
    resolution_angstrom: float | None = None,
    b_factor_angstrom2: float = 0.0,
    solvent_potential_v: float = 0.0,
) -> Float[Tensor, "d d d"]:
    """Return the potential in volts on a cube (z, y, x) whose origin is the middle voxel.

    With `solvent_potential_v` each atom displaces that much uniform solvent (a Gaussian of its Fraser volume),
    which gives the potential *difference* to ice that makes contrast. `resolution_angstrom` is a Gaussian
    that falls to 1/e at 1/resolution (the convention of `molmap`). Atoms outside the box raise ValueError.
    """
    half = pixel_size_angstrom * (box_px // 2 - 1)
    if float(np.abs(structure.positions_angstrom).max()) > half:
        raise ValueError(
            f"box_px: {box_px} px of {pixel_size_angstrom} Å, must hold {structure.name}"
            f" (needs {2 * float(np.abs(structure.positions_angstrom).max()):.0f} Å)"
        )
    k2 = _squared_frequencies(box_px, pixel_size_angstrom)
    positions = torch.from_numpy(structure.positions_angstrom)
    numbers = torch.from_numpy(structure.atomic_numbers.astype(np.int64))
    total: Tensor | None = None
    for number in np.unique(structure.atomic_numbers).tolist():
        grid = _splat_fourier(positions[numbers == number], box_px, pixel_size_angstrom)
        factor = form_factor(
            int(number),
            k2,
            solvent_potential_v=solvent_potential_v,
            n_hydrogens=0.0 if structure.has_hydrogens else HYDROGENS_PER_HEAVY_ATOM.get(int(number), 0.0),
        )
        total = grid * factor if total is None else total + grid * factor
    if total is None:
        raise ValueError(f"{structure.name}: 0 atoms, a structure has at least one")
    exponent = -0.25 * b_factor_angstrom2 * k2
    if resolution_angstrom is not None:
        exponent = exponent - k2 * resolution_angstrom**2
    total = total * torch.exp(exponent) * (POTENTIAL_PER_SCATTERING_V_ANGSTROM2 / pixel_size_angstrom**3)
    return centred_irfft3(total, box_px)


def form_factor(
    atomic_number: int,
    k2: Float[Tensor, "*k"],
    *,
    solvent_potential_v: float = 0.0,
    n_hydrogens: float = 0.0,
) -> Float[Tensor, "*k"]:
    """Return the electron scattering factor in Å at squared frequencies k² in 1/Å², less displaced solvent."""
    total = torch.zeros_like(k2)
    parts = [(atomic_number, 1.0)] + ([(1, n_hydrogens)] if n_hydrogens else [])
    for number, weight in parts:
        table = gemmi.Element(number).c4322
        for a, b in zip(table.a, table.b, strict=True):
            total = total + weight * a * torch.exp(-0.25 * b * k2)
    if solvent_potential_v:
        volume = sum(
            weight * _DISPLACED_VOLUME_ANGSTROM3.get(number, _DISPLACED_VOLUME_ANGSTROM3[6])
            for number, weight in parts
        )
        displaced = solvent_potential_v * volume / POTENTIAL_PER_SCATTERING_V_ANGSTROM2
        # A Gaussian of this width has peak 1 and integral `volume`: uniform solvent where atoms are dense.
        total = total - displaced * torch.exp(-math.pi * volume ** (2.0 / 3.0) * k2)
    return total


def read_density_map(path: Path) -> tuple[Float[Tensor, "d d d"], float]:
    """Read a cubic MRC map (also .gz); return it with its pixel size in Å."""
    try:
        with mrcfile.open(path, permissive=True) as handle:
            data = np.array(handle.data, dtype=np.float32)
            pixel_size = float(handle.voxel_size.x)
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: not a readable MRC map ({error})") from error
    if data.ndim != 3 or len(set(data.shape)) != 1:
        raise ValueError(f"{path}: shape {data.shape}, a density map is a cube")
    if not np.isfinite(data).all() or pixel_size <= 0:
        raise ValueError(f"{path}: pixel size {pixel_size} Å, a map is finite and has a positive pixel size")
    return torch.from_numpy(data), pixel_size


def scale_map_to_potential(
    volume: Float[Tensor, "d d d"], *, contrast_v: float = 3.3
) -> Float[Tensor, "d d d"]:
    """Return a map of arbitrary units as a potential difference to ice: protein's mean becomes `contrast_v`.

    Protein is what lies above the mean by three standard deviations; the solvent's level becomes 0.
    """
    level = volume.median()
    is_protein = volume > volume.mean() + 3.0 * volume.std()
    if not bool(is_protein.any()):
        raise ValueError("volume: no voxel 3 sd above the mean, a map must hold a particle")
    return (volume - level) * (contrast_v / (volume[is_protein].mean() - level))


def _squared_frequencies(box_px: int, pixel_size_angstrom: float) -> Float[Tensor, "d d dr"]:
    full: Tensor = torch.fft.fftfreq(box_px, pixel_size_angstrom).square()
    half: Tensor = torch.fft.rfftfreq(box_px, pixel_size_angstrom).square()
    return full[:, None, None] + full[None, :, None] + half[None, None, :]


def _splat_fourier(
    positions_angstrom: Float[Tensor, "n 3"], box_px: int, pixel_size_angstrom: float
) -> Tensor:
    """Return the half spectrum of unit point atoms on the box's grid, by cubic B-splines on a finer grid.

    The spline's own transform (sinc⁴) is divided out. What is left is aliasing: on a grid 1.5 times as fine
    6 % of the amplitude at Nyquist and 0.2 % at half of it, in random phase.
    """
    fine = good_size(math.ceil(1.5 * box_px))
    scale = fine / box_px
    place = positions_angstrom.flip(-1) * (scale / pixel_size_angstrom) + fine // 2
    base = place.floor().long()
    weights = _cubic_spline_weights(place - base)
    grid = torch.zeros(fine**3)
    for z in range(4):
        for y in range(4):
            for x in range(4):
                step = torch.tensor([z - 1, y - 1, x - 1])
                weight = weights[:, 0, z] * weights[:, 1, y] * weights[:, 2, x]
                grid.index_add_(0, _flat_index(base + step, fine), weight)
    spectrum = centred_rfft3(grid.reshape(fine, fine, fine))
    low = torch.cat((torch.arange((box_px + 1) // 2), torch.arange(fine - box_px // 2, fine)))
    spectrum = spectrum[low][:, low][:, :, : box_px // 2 + 1]
    full = torch.sinc(torch.fft.fftfreq(fine)[low]).pow(4)
    half = torch.sinc(torch.fft.rfftfreq(fine)[: box_px // 2 + 1]).pow(4)
    return spectrum / (full[:, None, None] * full[None, :, None] * half[None, None, :])


def _cubic_spline_weights(t: Float[Tensor, "n 3"]) -> Float[Tensor, "n 3 4"]:
    """Return the weights of the grid points at -1, 0, 1, 2 for fractions t in [0, 1)."""
    u = 1.0 - t
    return torch.stack(
        (
            u**3 / 6.0,
            2.0 / 3.0 - t.square() + 0.5 * t**3,
            2.0 / 3.0 - u.square() + 0.5 * u**3,
            t**3 / 6.0,
        ),
        dim=-1,
    )


def _flat_index(index_zyx: Int[Tensor, "n 3"], size: int) -> Int[Tensor, " n"]:
    clipped = index_zyx.clamp(0, size - 1)
    return (clipped[:, 0] * size + clipped[:, 1]) * size + clipped[:, 2]
