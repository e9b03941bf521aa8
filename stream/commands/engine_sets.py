"""The particle sets on which reconstruction engines are compared: simulated ones of known truth, and EMPIAR-10204."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stream.commands.bench_convergence import BOX_PX, SNR, simulate_particles
from stream.records.errors import ConfigurationError

if TYPE_CHECKING:
    from torch import Tensor

    from models.reconstruction.particle_data import CtfParameters

SETS = ("ribozyme", "rod", "antibody", "betagal")
"""Three simulated sets, and the 2,374 picks of EMPIAR-10204 (D2)."""


@dataclass(frozen=True, slots=True)
class PreparedSet:
    """One set on disk: star, truth map, and what both engines are told."""

    name: str
    star: Path
    truth: Tensor
    pixel_size_angstrom: float
    symmetry: str
    diameter_angstrom: float
    n_particles: int


def prepare_set(folder: Path, name: str, n_particles: int, box_px: int) -> PreparedSet:
    """Write particles.star and particles.mrcs (white, background of mean 0 and variance 1) with fixed half sets."""
    if name == "betagal":
        return _prepare_betagal(folder, n_particles, box_px)
    simulated = simulate_particles(name, n_particles, BOX_PX, SNR, seed=0)
    box = 64 * simulated.pixel_size_angstrom
    images, truth = _to_box(simulated.images, simulated.truth, simulated.pixel_size_angstrom, box_px)
    pixel = box / box_px
    star = _write_particles(folder, images, simulated.ctf, pixel)
    return PreparedSet(name, star, truth, pixel, "C1", round(0.75 * box), n_particles)


def _to_box(images: Tensor, truth: Tensor, pixel: float, box_px: int) -> tuple[Tensor, Tensor]:
    from models.fourier.transforms import fourier_resize
    from models.fourier.volumes import resample_volume

    old = int(images.shape[-1])
    return (
        fourier_resize(images, (box_px, box_px)),
        resample_volume(truth, pixel, pixel * old / box_px, box_px),
    )


def _prepare_betagal(folder: Path, n_particles: int, box_px: int) -> PreparedSet:
    import numpy as np
    import torch

    from models.fourier.volumes import resample_volume
    from models.reconstruction.particle_data import CtfParameters
    from models.simulation.structure import density_from_atoms, read_structure
    from stream.ingest.particle_sets import read_particle_table
    from stream.ingest.particle_table import iterate_images

    data = Path(os.environ.get("ICESTREAM_TEST_DATA", "../shared/data"))
    source = data / "particles" / "betagal_empiar10204" / "particles.star"
    if not source.is_file():
        raise ConfigurationError(
            "ICESTREAM_TEST_DATA", "the folder has EMPIAR-10204's particles", str(source)
        )
    table = read_particle_table(source, root=source.parent)
    rows = np.linspace(0, len(table) - 1, min(n_particles, len(table))).round().astype(np.int64)
    images = torch.from_numpy(np.stack([i.astype(np.float32) for i in iterate_images(table, rows)]))
    old_pixel, old_box = 3.54, int(images.shape[-1])
    structure = read_structure(data / "models" / "8bk7_betagal.cif.gz")
    density = density_from_atoms(
        structure, 2 * old_box, old_pixel / 2, resolution_angstrom=5.0, solvent_potential_v=4.5
    )
    density = resample_volume(density, old_pixel / 2, old_pixel, old_box)
    images, truth = _to_box(images, density, old_pixel, box_px)
    ctf = CtfParameters(
        defocus_u_angstrom=torch.from_numpy(np.asarray(table.defocus_u_angstrom)[rows]).float(),
        defocus_v_angstrom=torch.from_numpy(np.asarray(table.defocus_v_angstrom)[rows]).float(),
        astigmatism_angle_deg=torch.from_numpy(np.asarray(table.astigmatism_angle_deg)[rows]).float(),
        phase_shift_deg=torch.zeros(len(rows)),
        voltage_kv=200.0,
        cs_mm=1.4,
        amplitude_contrast=0.1,
    )
    pixel = old_pixel * old_box / box_px
    star = _write_particles(folder, images, ctf, pixel)
    return PreparedSet("betagal", star, truth, pixel, "D2", 200.0, len(rows))


def _write_particles(folder: Path, images: Tensor, ctf: CtfParameters, pixel: float) -> Path:
    import mrcfile
    import pandas as pd
    import starfile
    import torch

    n, box = len(images), int(images.shape[-1])
    axis = torch.arange(box).float() - box // 2
    outside = (axis[:, None].square() + axis.square()).sqrt() > 0.47 * box
    background = images[:, outside]
    normal = (images - background.mean(1)[:, None, None]) / background.std(1)[:, None, None]
    with mrcfile.new(folder / "particles.mrcs", normal.numpy(), overwrite=True) as stack:
        stack.set_image_stack()
        stack.voxel_size = pixel
    optics = pd.DataFrame([{
        "rlnOpticsGroupName": "opticsGroup1", "rlnOpticsGroup": 1, "rlnMicrographOriginalPixelSize": pixel,
        "rlnVoltage": ctf.voltage_kv, "rlnSphericalAberration": ctf.cs_mm,
        "rlnAmplitudeContrast": ctf.amplitude_contrast, "rlnImagePixelSize": pixel, "rlnImageSize": box,
        "rlnImageDimensionality": 2,
    }])  # fmt: skip
    particles = pd.DataFrame({
        "rlnImageName": [f"{i + 1:06d}@particles.mrcs" for i in range(n)],
        "rlnMicrographName": [f"mic{i // 50:04d}.mrc" for i in range(n)],
        "rlnOpticsGroup": 1,
        "rlnDefocusU": ctf.defocus_u_angstrom.numpy(),
        "rlnDefocusV": ctf.defocus_v_angstrom.numpy(),
        "rlnDefocusAngle": ctf.astigmatism_angle_deg.numpy(),
        "rlnRandomSubset": [i % 2 + 1 for i in range(n)],
    })  # fmt: skip
    star = folder / "particles.star"
    starfile.write({"optics": optics, "particles": particles}, star)
    return star


def measure_volume(volume: Tensor, prepared: PreparedSet) -> dict[str, Any]:
    """Align a map with the truth; return the resolution at FSC 0.5 and the mean FSC to Nyquist, in a mask of the truth."""
    import torch

    from models.reconstruction.alignment import align_volumes, apply_alignment, truth_resolution
    from models.reconstruction.masks import mask_from_map

    pixel = prepared.pixel_size_angstrom
    lowpass = max(12.0, 3.0 * pixel)
    mask = mask_from_map(prepared.truth, pixel, lowpass_angstrom=lowpass)
    found = align_volumes(
        volume, prepared.truth, pixel, generator=torch.Generator().manual_seed(0), lowpass_angstrom=lowpass
    )
    aligned = apply_alignment(volume, found)
    resolution, curve = truth_resolution(aligned, prepared.truth, pixel, mask)
    top = int(volume.shape[0]) // 2
    return {"truth_resolution_angstrom": resolution, "truth_mean_fsc": float(curve[1:top].mean())}
