"""Sphericity of the 3D FSC and efficiency of views: closed forms, the published definitions, real views."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from models.reconstruction.cones import half_directions
from models.reconstruction.efficiency import (
    _GRID_PX,
    _K_MAX,
    _K_STEP,
    B_FACTOR_ANGSTROM2,
    _widths,
    view_efficiency,
)
from models.reconstruction.grids import quaternion_to_matrix, random_rotations
from models.reconstruction.sampling import sampling_factor
from models.reconstruction.sphericity import fsc_body, isosurface_area, sphericity, sphericity_of_body

DATA = Path(os.environ.get("ICESTREAM_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def radii(size: int, stretch: tuple[float, float, float] = (1, 1, 1)) -> np.ndarray:
    z, y, x = np.indices((size,) * 3) - size // 2
    return np.sqrt((z / stretch[0]) ** 2 + (y / stretch[1]) ** 2 + (x / stretch[2]) ** 2)


def curves_falling_at(shells: torch.Tensor, n_shells: int) -> torch.Tensor:
    """1 before each direction's own shell and 0 from there on."""
    return (torch.arange(n_shells)[None] < shells[:, None]).float()


def test_the_surface_of_a_ball_is_4_pi_r_squared():
    field = (20.0 - radii(52)).astype(np.float32)
    assert isosurface_area(field, 0.0) == pytest.approx(4 * math.pi * 20**2, rel=0.005)
    assert isosurface_area(np.zeros((8, 8, 8), dtype=np.float32), 0.5) == 0.0


def test_a_plane_has_exactly_its_area_whatever_its_slope():
    z, y, x = np.indices((12, 12, 12)).astype(np.float32)
    assert isosurface_area(z - 5.3, 0.0) == pytest.approx(121, rel=1e-5)
    # Over the unit square the plane z = 5.3 + y/4 + x/8 is larger by the length of its normal.
    tilted = z - 3.3 - y / 4 - x / 8
    assert isosurface_area(tilted, 0.0) == pytest.approx(121 * math.sqrt(1 + 1 / 16 + 1 / 64), rel=1e-5)


def test_bodies_have_the_sphericity_of_solid_geometry():
    assert sphericity_of_body(radii(64) < 22) == pytest.approx(1.0, abs=0.01)
    # Prolate spheroid 2:1, closed form of the surface area.
    a, c = 13.0, 26.0
    e = math.sqrt(1 - (a / c) ** 2)
    area = 2 * math.pi * a**2 * (1 + c / (a * e) * math.asin(e))
    volume = 4 / 3 * math.pi * a**2 * c
    expected = math.pi ** (1 / 3) * (6 * volume) ** (2 / 3) / area
    assert sphericity_of_body(radii(64, (c / a, 1, 1)) < a) == pytest.approx(expected, abs=0.01)


def test_isotropic_curves_make_a_sphere_and_a_weak_axis_makes_it_flat():
    directions = half_directions()
    even = curves_falling_at(torch.full((len(directions),), 18), 33)
    weak = curves_falling_at(torch.where(directions[:, 2].abs() > math.cos(math.radians(40)), 6, 18), 33)
    assert sphericity(even, 64, 2.0) == pytest.approx(1.0, abs=0.015)
    assert sphericity(weak, 64, 2.0) < 0.85
    body = fsc_body(weak, 64, 2.0, threshold=0.5)
    assert body[32, 32, 32 + 15]
    assert not body[32 + 15, 32, 32]
    assert body[32 + 4, 32, 32]


def test_what_lies_outward_of_a_gap_does_not_belong_to_the_body():
    curve = torch.ones(len(half_directions()), 33)
    curve[:, 10:12] = 0.0  # a step along the diagonal passes over one shell, in the published rule too
    body = fsc_body(curve, 64, 2.0, threshold=0.5)
    assert not body[radii(64) > 11.5].any()
    assert body[radii(64) < 9.0].all()


def test_a_map_without_signal_keeps_the_coarsest_shells_alone():
    none = torch.zeros(len(half_directions()), 33)
    body = fsc_body(none, 64, 5.0, threshold=0.5)  # 320 Å: shell 1 is coarser than 200 Å
    assert 1 <= int(body.sum()) <= 27


def cone_of_views(half_angle_deg: float, n: int) -> torch.Tensor:
    z = 1 - (1 - math.cos(math.radians(half_angle_deg))) * torch.rand(n, generator=gen(1))
    phi = 2 * math.pi * torch.rand(n, generator=gen(2))
    r = (1 - z**2).sqrt()
    return torch.stack((r * torch.cos(phi), r * torch.sin(phi), z), dim=1)


def test_even_views_are_efficient_and_narrow_cones_are_not():
    values = [view_efficiency(cone_of_views(a, 10_000)).efficiency for a in (60, 45, 30, 15)]
    even = view_efficiency(random_rotations(10_000, gen())[:, 2]).efficiency
    assert even > 0.97
    assert even > values[0] > values[1] > values[2] > values[3]
    assert values[0] < 0.8
    assert values[1] < 0.5


def counted_efficiency(views: torch.Tensor) -> float:
    """The definition by brute force: every view at every voxel of the grid."""
    axis = (torch.arange(_GRID_PX).float() - _GRID_PX // 2) * _K_STEP
    k = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij")[::-1], dim=-1).reshape(-1, 3)
    share = torch.cat([((part @ views.T).abs() <= 0.5 * _K_STEP).float().mean(1) for part in k.split(16_384)])
    decay = torch.exp(-0.25 * B_FACTOR_ANGSTROM2 * k.square().sum(1)) * (k.norm(dim=1) <= _K_MAX)
    widths = _widths((share.sqrt() * decay).reshape((_GRID_PX,) * 3))
    return 1.0 - 2.0 * float(widths.std(correction=0) / widths.mean())


def test_binned_views_give_the_efficiency_of_counting_each():
    side = torch.nn.functional.normalize(
        torch.randn((400, 3), generator=gen(3)) * torch.tensor([1.0, 1.0, 0.1]), dim=1
    )
    for views in (cone_of_views(40, 400), side):
        assert view_efficiency(views).efficiency == pytest.approx(counted_efficiency(views), abs=0.03)


def test_the_worst_direction_is_the_one_that_no_view_shows_from_the_side():
    result = view_efficiency(cone_of_views(30, 5_000))
    assert abs(result.worst_direction[2]) > math.cos(math.radians(25))


def test_efficiency_does_not_depend_on_the_frame_or_on_a_views_sign():
    views = cone_of_views(45, 10_000)
    turned = views @ random_rotations(1, gen(5))[0]
    base = view_efficiency(views).efficiency
    assert view_efficiency(turned).efficiency == pytest.approx(base, abs=0.03)
    assert view_efficiency(-views).efficiency == pytest.approx(base, abs=1e-3)


def test_symmetry_fills_in_views():
    from models.fourier.point_groups import symmetry_matrices

    views = cone_of_views(30, 5_000)
    octahedral = view_efficiency(views, group=symmetry_matrices("O").float()).efficiency
    assert octahedral > 0.85 > view_efficiency(views).efficiency


def test_no_views_are_refused():
    with pytest.raises(ValueError, match="views"):
        view_efficiency(torch.zeros(0, 3))


@pytest.mark.realdata
@pytest.mark.skipif(not DATA.is_dir(), reason=f"no real data in {DATA} (ICESTREAM_TEST_DATA)")
def test_real_views_of_a_ribosomal_subunit_are_uneven_but_sufficient():
    with np.load(DATA / "orientations" / "empiar10076_poses_ctf.npz") as poses:
        xyzw = poses["quat_xyzw"].astype(np.float32)
    rotations = quaternion_to_matrix(torch.from_numpy(np.roll(xyzw, 1, axis=1)))
    views = rotations[:, 2]
    moments = torch.linalg.eigvalsh(views.T @ views / len(views))
    # As published with the set: the second moment of the third rows, isotropic 1/3 each.
    assert moments.tolist() == pytest.approx([0.237, 0.325, 0.438], abs=0.002)
    even = view_efficiency(random_rotations(10_000, gen())[:, 2]).efficiency
    assert 0.8 < view_efficiency(views).efficiency < even
    assert 0.81 < sampling_factor(views, generator=gen()).scf_star < 1.0
