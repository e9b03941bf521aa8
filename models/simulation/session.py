"""From a structure's name to a virtual microscope."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from models.fourier.transforms import good_size
from models.fourier.volumes import resample_volume
from models.simulation.exposure import VirtualMicroscope
from models.simulation.phantom import build_phantom, parse_phantom
from models.simulation.settings import SessionSettings
from models.simulation.structure import (
    ICE_MEAN_POTENTIAL_V,
    AtomicStructure,
    density_from_atoms,
    read_density_map,
    read_structure,
    scale_map_to_potential,
)

_MAP_SUFFIXES = (".mrc", ".map", ".mrc.gz", ".map.gz")


def load_structure(text: str) -> AtomicStructure:
    """Return the structure that `phantom:SEED…` or the path of a PDB/mmCIF file names."""
    if text.startswith("phantom:"):
        spec = parse_phantom(text)
        return build_phantom(spec.seed, mass_kda=spec.mass_kda, symmetry=spec.symmetry)
    return read_structure(Path(text))


def is_map_path(text: str) -> bool:
    """Return whether the text names an MRC map and not atoms."""
    return text.lower().endswith(_MAP_SUFFIXES)


def particle_box_px(diameter_angstrom: float, pixel_size_angstrom: float) -> int:
    """Return the box of a particle's potential: its diameter and a little room, FFT-friendly and even."""
    return good_size(math.ceil(1.08 * diameter_angstrom / pixel_size_angstrom) + 8)


def specimen_volume(text: str, pixel_size_angstrom: float) -> tuple[Float[Tensor, "d d d"], float]:
    """Return the potential difference to ice in volts at the given pixel size, and the diameter in Å."""
    if is_map_path(text):
        return potential_from_map(*read_density_map(Path(text)), pixel_size_angstrom)
    structure = load_structure(text)
    diameter = 2.0 * structure.radius_angstrom + 4.0
    box = particle_box_px(diameter, pixel_size_angstrom)
    volume = density_from_atoms(structure, box, pixel_size_angstrom, solvent_potential_v=ICE_MEAN_POTENTIAL_V)
    return volume, diameter


def potential_from_map(
    volume: Float[Tensor, "n n n"], map_pixel_size_angstrom: float, pixel_size_angstrom: float
) -> tuple[Float[Tensor, "d d d"], float]:
    """Return a map of arbitrary units as a potential difference to ice at another pixel size, and its diameter in Å."""
    potential = scale_map_to_potential(volume)
    diameter = _map_diameter(potential, map_pixel_size_angstrom)
    box = particle_box_px(diameter, pixel_size_angstrom)
    resampled = resample_volume(potential, map_pixel_size_angstrom, pixel_size_angstrom, box)
    return _mask_sphere(resampled), diameter


def build_microscope(text: str, settings: SessionSettings) -> VirtualMicroscope:
    """Return a virtual microscope with the named structure on its grid."""
    volume, diameter = specimen_volume(text, settings.microscope.pixel_size_angstrom)
    return VirtualMicroscope(volume, diameter, settings)


def _map_diameter(volume: Tensor, pixel_size_angstrom: float) -> float:
    """Return twice the distance of the farthest voxel above a third of protein's mean (3.3 V)."""
    centre = int(volume.shape[0]) // 2
    found = (volume > 1.6).nonzero() - centre
    return 2.0 * pixel_size_angstrom * float(found.float().norm(dim=1).quantile(0.999))


def _mask_sphere(volume: Tensor) -> Tensor:
    size = int(volume.shape[0])
    line = torch.arange(size) - size // 2
    radius2 = line[:, None, None] ** 2 + line[None, :, None] ** 2 + line[None, None, :] ** 2
    return volume * (radius2 < (size // 2 - 1) ** 2)
