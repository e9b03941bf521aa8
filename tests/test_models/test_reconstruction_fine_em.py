"""Poses finer than the grid: pairs cost one product, and a mixture of two nearly equal views comes apart."""

from __future__ import annotations

import pytest
import torch

from models.reconstruction.acceptance import MINIMUM_AGREEMENT, agreement_of
from models.reconstruction.blobs import BlobPhantom, BlobSet, pose_errors_deg, simulate_blob_images
from models.reconstruction.cross_evidence import cross_half_evidence
from models.reconstruction.expectation import score_chosen
from models.reconstruction.fine_em import Finalist, FineEm
from models.reconstruction.grids import half_turned, random_rotations, shift_grid, so3_grid
from models.reconstruction.online_em import EmResult, OnlineEm, OnlineEmSettings
from models.reconstruction.pose_search import Hypotheses
from models.reconstruction.projector import HalfPlane, extract_slices, volume_to_cube
from models.reconstruction.scoring import Projections, ShiftSearch, score_block
from models.reconstruction.symmetry import turn_volume

BOX = 32
SETTINGS = OnlineEmSettings(n_iterations=10, last_batch=150, last_shell=11.0, n_held_out=60)
HALF_TURN = torch.diag(torch.tensor([-1.0, -1.0, 1.0]))


def gen(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def nearly_twofold() -> BlobPhantom:
    """Six pairs by a half turn about z, and two blobs without a mate."""
    generator = gen(1)
    pairs = (torch.randn((6, 3), generator=generator) * torch.tensor([3.0, 3.0, 5.0])).clamp(-8.0, 8.0)
    single = torch.tensor([[4.0, 2.0, 3.0], [-3.0, 4.0, -4.0]])
    centres = torch.cat((pairs, pairs @ HALF_TURN, single))
    return BlobPhantom(BOX, centres - centres.mean(0), torch.full((14,), 1.2), torch.ones(14))


@pytest.fixture(scope="module")
def images() -> BlobSet:
    return simulate_blob_images(nearly_twofold(), 300, gen(2), snr=0.3, pixel_size_angstrom=6.0)


def started_from(images: BlobSet, volume: torch.Tensor) -> FineEm:
    em = OnlineEm(images.data, SETTINGS, gen(3))
    em.iteration, em.cube = SETTINGS.n_iterations, volume_to_cube(volume, em.max_shell)
    return FineEm(em)


def share_right(finalist: Finalist, images: BlobSet, rows: torch.Tensor) -> float:
    errors = pose_errors_deg(finalist.poses.rotations[:, 0], images.rotations[rows])
    return float((errors < 20.0).float().mean())


def test_grids_come_in_pairs_whose_slices_are_conjugates() -> None:
    plane = HalfPlane.of(BOX, 8.0)
    cube = volume_to_cube(nearly_twofold().volume(), 8.0)
    grid = so3_grid(1) @ random_rotations(1, gen(4))[0]
    slices = extract_slices(cube, grid, plane)
    assert torch.allclose(slices[288:], slices[:288].conj(), atol=1e-4 * float(slices.abs().max()))
    with pytest.raises(ValueError, match="rotations: 575"):
        Projections.of_grid(cube, grid[1:], plane)


@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_scores_of_pairs_are_those_of_single_slices(images: BlobSet, beta: float) -> None:
    near = images.data.take(torch.arange(5)).within(8.0)
    cube = volume_to_cube(nearly_twofold().volume(), 8.0)
    grid = so3_grid(1)
    search = ShiftSearch.gaussian(shift_grid(1, 1.5), 2.0)
    shifted = near.coefficients[:, None] * near.plane.phases(search.shifts_xy_px)
    matrix = torch.cat((shifted.real, shifted.imag), dim=-1)
    weights = near.ctf.square()
    paired = Projections.of_grid(cube, grid, near.plane)
    single = Projections.of(extract_slices(cube, grid, near.plane))
    expected = score_block(matrix, weights, single, search, beta)
    found = score_block(matrix, weights, paired, search, beta)
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    # The same at rotations of one's own choice, from both halves of the grid.
    chosen = torch.tensor([[0, 300, 575], [288, 1, 2], [3, 4, 500], [5, 6, 7], [400, 401, 8]])
    few = score_chosen(matrix, weights, paired, chosen, search, beta)
    at = chosen[:, None, :].expand(-1, few.shape[1], -1)
    assert torch.allclose(few, expected.gather(2, at), rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    assert torch.equal(half_turned(half_turned(grid)), grid)


def test_a_mixture_of_two_views_comes_apart(images: BlobSet) -> None:
    volume = nearly_twofold().volume()
    mixed = 0.515 * volume + 0.485 * turn_volume(volume, HALF_TURN, torch.zeros(3))
    right, wrong = started_from(images, volume), started_from(images, mixed)
    rows = right.em.held_out
    truth, before = right.finalist(), wrong.finalist()
    assert share_right(truth, images, rows) > 0.85
    assert share_right(before, images, rows) < 0.75
    assert before.score < truth.score
    wrong.run(6)
    after = wrong.finalist()
    assert share_right(after, images, rows) > 0.8
    assert agreement_of(after, truth) > MINIMUM_AGREEMENT


def poses_of(rotations: torch.Tensor, second: float, n_steps: int = 0) -> Finalist:
    """Return a finalist whose second mode is `second` nats below the first."""
    n = len(rotations)
    scores = torch.tensor([0.0, -second]).expand(n, -1)
    poses = Hypotheses(rotations[:, None], torch.zeros((n, 2, 2)), scores)
    return Finalist(started_nowhere(), poses, n_steps)


def started_nowhere() -> EmResult:
    nothing = torch.zeros(1)
    volume = nearly_twofold().volume()
    return EmResult(
        volume=volume,
        cube=volume_to_cube(volume, 11.0),
        max_shell=11.0,
        evidence=nothing,
        inverse_noise=nothing,
        fsc=nothing,
    )


def test_maps_agree_by_the_poses_of_decided_images() -> None:
    rotations, frame = random_rotations(60, gen(5)), random_rotations(1, gen(6))[0]
    other = rotations @ frame
    assert agreement_of(poses_of(rotations, 5.0), poses_of(other, 5.0)) == 1.0
    # A third of the images one register off, as in a map that mixes two: the maps themselves may be nearly equal.
    turned = torch.where((torch.arange(60) % 3 == 0)[:, None, None], rotations @ HALF_TURN @ frame, other)
    assert agreement_of(poses_of(rotations, 5.0), poses_of(turned, 5.0)) == pytest.approx(2 / 3, abs=0.02)
    # Where no image is decided poses say nothing; maps that stay so with fine poses are compared: here they are equal.
    assert agreement_of(poses_of(rotations, 0.1), poses_of(turned, 5.0)) == 0.0
    assert agreement_of(poses_of(rotations, 0.1, 10), poses_of(turned, 5.0, 10)) > 0.95


def test_the_share_of_poses_elsewhere_is_what_the_images_leave_open() -> None:
    """A nearly twofold particle in noise: how many poses are the other view's is told without the truth."""
    phantom = nearly_twofold()
    noisy = simulate_blob_images(phantom, 200, gen(8), snr=0.06, pixel_size_angstrom=6.0, shift_sigma_px=0.6)
    volume, half_set = phantom.volume(), torch.arange(200) % 2 + 1
    fsc, mask, one = torch.ones(16), torch.ones(volume.shape), torch.eye(3)[None]
    found = cross_half_evidence(noisy.data, half_set, (volume, volume), fsc, mask, one, gen(9))
    right = started_from(noisy, volume)
    poses = right.find_poses(right.em.data).rotations[:, 0]
    errors = pose_errors_deg(poses, noisy.rotations, is_hand_free=False)
    assert found.elsewhere > 0.08
    assert found.elsewhere == pytest.approx(float((errors > 30.0).float().mean()), abs=0.06)
