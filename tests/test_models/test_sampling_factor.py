"""SCF and SCF*: analytic limits and reference values of an independent implementation (10,000 views, R = 23)."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from models.fourier.point_groups import symmetry_matrices
from models.reconstruction.grids import quaternion_to_matrix, random_rotations
from models.reconstruction.sampling import (
    fibonacci_hemisphere,
    sampling_counts,
    sampling_factor,
    symmetric_views,
    view_directions,
)

DATA = Path(os.environ.get("ICESTREAM_TEST_DATA", Path(__file__).parents[2] / "../shared/data"))


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def uniform_views(n: int, seed: int = 0) -> torch.Tensor:
    return view_directions(random_rotations(n, gen(seed)))


def cone_views(n: int, half_angle_deg: float, seed: int = 0) -> torch.Tensor:
    g = gen(seed)
    z = 1 - torch.rand(n, generator=g) * (1 - math.cos(math.radians(half_angle_deg)))
    phi = 2 * math.pi * torch.rand(n, generator=g)
    radius = (1 - z * z).sqrt()
    return torch.stack((radius * phi.cos(), radius * phi.sin(), z), -1)


def test_uniform_views_sample_almost_perfectly():
    result = sampling_factor(uniform_views(10_000), generator=gen())
    assert result.scf_star == pytest.approx(0.995, abs=0.002)
    assert result.unsampled_fraction == 0.0


def test_side_views_give_eight_over_pi_squared():
    phi = 2 * math.pi * torch.rand(10_000, generator=gen(1))
    views = torch.stack((phi.cos(), phi.sin(), torch.zeros_like(phi)), -1)
    assert sampling_factor(views, generator=gen()).scf_star == pytest.approx(8 / math.pi**2, abs=0.01)


@pytest.mark.parametrize(
    ("half_angle_deg", "expected"),
    [(75, 0.221), (60, 0.059), (45, 0.023), (30, 0.010), (20, 0.005), (10, 0.002)],
)
def test_views_within_a_cone_give_the_reference_values_and_leave_one_minus_sine_unsampled(
    half_angle_deg, expected
):
    result = sampling_factor(cone_views(10_000, half_angle_deg), generator=gen())
    assert result.scf_star == pytest.approx(expected, rel=0.05, abs=0.0006)
    assert result.unsampled_fraction == pytest.approx(1 - math.sin(math.radians(half_angle_deg)), abs=0.03)


@pytest.mark.parametrize(("share", "expected"), [(0.01, 0.010), (0.05, 0.055), (0.10, 0.117), (0.30, 0.357)])
def test_a_few_other_views_cure_a_narrow_cone_as_the_reference_says(share, expected):
    n_other = int(share * 10_000)
    views = torch.cat((cone_views(10_000 - n_other, 10), uniform_views(n_other)))
    assert sampling_factor(views, generator=gen()).scf_star == pytest.approx(expected, rel=0.08, abs=0.001)


def test_few_views_are_drawn_repeatedly_so_that_the_number_stays_comparable():
    assert sampling_factor(uniform_views(3_000), generator=gen()).scf_star == pytest.approx(0.98, abs=0.012)


def test_symmetry_fills_views():
    views = cone_views(4_000, 45)
    plain = sampling_factor(views, generator=gen())
    octahedral = sampling_factor(views, generator=gen(), group=symmetry_matrices("O"))
    assert plain.unsampled_fraction > 0.25
    assert octahedral.unsampled_fraction == 0.0
    assert octahedral.scf_star > 0.81
    assert octahedral.n_views == 24 * 4_000
    assert symmetric_views(views, symmetry_matrices("C3")).shape == (12_000, 3)


def test_counts_are_those_of_slabs_one_voxel_thick():
    points = fibonacci_hemisphere(64)
    views = uniform_views(50)
    expected = [sum(abs(float(v @ p)) * 23.0 < 0.5 for v in views) for p in points]
    assert sampling_counts(views, points).tolist() == expected


def test_no_views_is_refused():
    with pytest.raises(ValueError, match="views"):
        sampling_factor(torch.zeros(0, 3), generator=gen())


@pytest.mark.realdata
def test_a_real_mildly_uneven_set_of_poses_lies_between_side_views_and_uniform():
    path = DATA / "orientations/empiar10076_poses_ctf.npz"
    if not path.exists():
        pytest.skip(f"needs {path}")
    with np.load(path, allow_pickle=False) as file:
        name = next(key for key in file.files if file[key].ndim == 2 and file[key].shape[1] == 4)
        rotations = quaternion_to_matrix(torch.from_numpy(file[name].astype(np.float32)))
    second_moment = np.linalg.eigvalsh(np.cov(view_directions(rotations).T, bias=True))
    assert 0.1 < second_moment[0] < second_moment[2] < 0.6
    assert 0.81 < sampling_factor(view_directions(rotations), generator=gen()).scf_star < 0.995
