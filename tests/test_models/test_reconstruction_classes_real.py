"""Class averages of EMPIAR-10204's picks look like projections of the protein's model."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from actors.engines.base import EngineInput
from actors.engines.class_run import run_classification
from models.fourier.rotations import euler_to_matrix
from models.fourier.transforms import fourier_resize
from models.reconstruction.grids import healpix_directions
from models.reconstruction.projector import HalfPlane, extract_slices, volume_to_cube
from models.simulation.structure import density_from_atoms, read_structure

DATA = Path(os.environ.get("ICESTREAM_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
PIXEL, BOX, SHELL = 3.54, 64, 19  # 12 Å

pytestmark = [
    pytest.mark.slow,
    pytest.mark.realdata,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not DATA.is_dir(), reason=f"no real data in {DATA} (ICESTREAM_TEST_DATA)"),
]


def projections(psi_step_deg: float) -> torch.Tensor:
    """Views of 8bk7 from 96 directions and all in-plane angles, to 12 Å, both hands (a view and its mirror image)."""
    density = density_from_atoms(read_structure(DATA / "models" / "8bk7_betagal.cif.gz"), BOX, PIXEL)
    directions = healpix_directions(2)
    directions = directions[directions[:, 2] >= 0]
    tilt = torch.rad2deg(torch.acos(directions[:, 2]))
    rot = torch.rad2deg(torch.atan2(directions[:, 1], directions[:, 0]))
    psi = torch.arange(0.0, 360.0, psi_step_deg)
    grid = torch.cartesian_prod(torch.arange(len(rot)), torch.arange(len(psi)))
    euler = torch.stack((rot[grid[:, 0]], tilt[grid[:, 0]], psi[grid[:, 1]]), dim=-1)
    plane = HalfPlane.of(BOX, SHELL)
    images = plane.images(
        extract_slices(volume_to_cube(density, float(SHELL)), euler_to_matrix(euler), plane)
    )
    small = fourier_resize(images, (40, 40))
    return torch.cat((small, small.flip(-1)))


def test_the_largest_classes_look_like_the_protein(tmp_path: Path) -> None:
    star = DATA / "particles" / "betagal_empiar10204" / "particles.star"
    torch.set_num_threads(1)
    run = run_classification(EngineInput(particles_star=star, root=star.parent), tmp_path, n_classes=30)
    assert run.n_particles == 2374
    assert sum(row["particles"] for row in run.rows) == 2374
    import mrcfile

    with mrcfile.open(run.averages) as handle:
        averages = torch.from_numpy(handle.data[:10].copy())
    plane = HalfPlane.of(BOX, SHELL)
    averages = fourier_resize(plane.images(plane.coefficients(averages)), (40, 40))
    references = projections(10.0)
    references = references - references.mean((1, 2), keepdim=True)
    spectra = torch.fft.rfft2(references / references.flatten(1).norm(dim=1)[:, None, None]).conj()
    best = []
    for average in averages:
        centred = average - average.mean()
        product = torch.fft.irfft2(torch.fft.rfft2(centred / centred.norm()) * spectra, s=(40, 40))
        best.append(float(product.max()))
    assert sum(best) / len(best) > 0.9
    assert min(best) > 0.8
