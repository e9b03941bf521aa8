"""Known poses, even and preferred views: global resolution selects the broken map, cFAR and SCF* do not.

Each set is simulated from blobs in closed form (64 px, 3 Å, 3,000 images, SNR 0.05, CTF), reconstructed with its true
poses in two halves by our own back-projection, and measured inside a soft sphere.
"""

from __future__ import annotations

import math

import pytest
import torch

from models.reconstruction.blobs import BlobPhantom, simulate_blob_images
from models.reconstruction.fsc import masked_fsc
from models.reconstruction.grids import random_rotations
from models.reconstruction.masks import spherical_mask
from models.reconstruction.orientation import OrientationDiagnostics, orientation_diagnostics
from models.reconstruction.projector import cube_to_volume
from models.reconstruction.sufficient import ReconstructionGrid, accumulate_posed, solve_map

pytestmark = pytest.mark.slow

SIZE, PIXEL, SNR, N_IMAGES = 64, 3.0, 0.05, 3_000
IMAGES_PER_BLOCK = 250


def gen(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rotations_within(half_angle_deg: float, share_uniform: float, seed: int) -> torch.Tensor:
    """Poses whose views lie within a cone about z, but for a share of uniform ones; in-plane angles are free."""
    limit = math.cos(math.radians(half_angle_deg))
    kept: list[torch.Tensor] = []
    g = gen(seed)
    n_cone = round(N_IMAGES * (1 - share_uniform))
    while sum(len(k) for k in kept) < n_cone:
        drawn = random_rotations(20_000, g)
        kept.append(drawn[drawn[:, 2, 2] >= limit])
    rotations = torch.cat((torch.cat(kept)[:n_cone], random_rotations(N_IMAGES - n_cone, g)))
    return rotations[torch.randperm(len(rotations), generator=g)]


def reconstruct_half(phantom: BlobPhantom, rotations: torch.Tensor, seed: int) -> torch.Tensor:
    grid = ReconstructionGrid(SIZE // 2 - 1)
    accumulator = grid.zeros()
    group = torch.eye(3)[None]
    for block, poses in enumerate(torch.split(rotations, IMAGES_PER_BLOCK)):
        images = simulate_blob_images(
            phantom, len(poses), gen(1000 * seed + block), snr=SNR, pixel_size_angstrom=PIXEL, rotations=poses
        )
        plane, ctf = images.data.plane, images.data.ctf
        centred = images.data.coefficients * plane.phases(images.origin_xy_px) * ctf
        accumulator = accumulate_posed(accumulator, centred, ctf.square(), poses, plane, group)
    flat_prior = torch.full((grid.n_shells,), 10.0)
    return cube_to_volume(solve_map(accumulator, flat_prior, grid), SIZE)


@pytest.fixture(scope="module")
def table() -> dict[str, tuple[float, OrientationDiagnostics]]:
    phantom = BlobPhantom.random(SIZE, gen(3))
    sets = {
        "uniform": rotations_within(180, 0.0, 1),
        "60": rotations_within(60, 0.0, 2),
        "30": rotations_within(30, 0.0, 3),
        "15": rotations_within(15, 0.0, 4),
        "30 + 10 %": rotations_within(30, 0.1, 5),
    }
    mask = spherical_mask(SIZE, 22, 5)
    out = {}
    for seed, (name, rotations) in enumerate(sets.items()):
        halves = [
            reconstruct_half(phantom, half, 2 * seed + h) for h, half in enumerate(torch.chunk(rotations, 2))
        ]
        curves = masked_fsc(*halves, mask, PIXEL, generator=gen(0))
        diagnostics = orientation_diagnostics(
            *halves, mask, PIXEL, generator=gen(0), rotations=rotations, n_null=5
        )
        assert curves.resolution_angstrom is not None
        out[name] = (curves.resolution_angstrom, diagnostics)
    for name, (resolution, d) in out.items():
        print(  # noqa: T201 - the table is what a reader of this test wants to see
            f"{name:>10}  {resolution:5.2f} Å  cFAR {d.cfar:.3f} (unweighted {d.cfar_unweighted:.3f}, null {d.cfar_null:.3f})"
            f"  {d.worst_resolution_angstrom:.1f}-{d.best_resolution_angstrom:.1f} Å  SCF* {d.scf_star:.3f}"
        )
    return out


def test_resolution_alone_does_not_see_the_missing_cone(table):
    resolution = {name: row[0] for name, row in table.items()}
    assert resolution["30"] < 1.08 * resolution["uniform"]
    assert resolution["15"] < 1.08 * resolution["uniform"]


def test_a_little_of_the_cure_makes_resolution_look_worse(table):
    assert table["30 + 10 %"][0] > table["30"][0]


def test_cfar_falls_as_views_are_removed_and_rises_with_the_cure(table):
    cfar = {name: row[1].cfar for name, row in table.items()}
    assert cfar["uniform"] > 0.5
    assert cfar["uniform"] > 1.7 * cfar["60"]
    assert cfar["60"] > 2.5 * cfar["30"]
    assert cfar["30"] > 0.9 * cfar["15"]
    assert cfar["30 + 10 %"] > 1.5 * cfar["30"]
    assert table["uniform"][1].cfar_ratio > 0.75
    assert table["60"][1].cfar_ratio < 0.5


def test_the_weighted_ratio_separates_where_the_unweighted_one_hardly_does(table):
    broken = table["30"][1]
    assert broken.cfar < 0.15
    assert broken.cfar_unweighted > 2 * broken.cfar


def test_scf_star_has_its_reference_values(table):
    assert table["uniform"][1].scf_star == pytest.approx(0.98, abs=0.015)
    assert table["60"][1].scf_star == pytest.approx(0.059, rel=0.1)
    assert table["30"][1].scf_star == pytest.approx(0.010, rel=0.15)
    assert table["30 + 10 %"][1].scf_star == pytest.approx(0.150, rel=0.15)


def test_the_worst_direction_lies_in_the_part_of_space_that_no_view_measured(table):
    # Views near z measure the planes around z's normal. (The axis itself may look *best*: Fourier space is empty
    # there, and what the mask carries over from its neighbours is the same in both halves and free of noise.)
    assert abs(table["30"][1].worst_direction[2]) > math.cos(math.radians(60))
