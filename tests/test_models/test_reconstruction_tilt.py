"""What a stage tilt does to a set of views: cases whose geometry is known."""

from __future__ import annotations

import math

import pytest
import torch

from models.fourier.point_groups import symmetry_matrices
from models.fourier.rotations import euler_to_matrix
from models.reconstruction.grids import random_rotations
from models.reconstruction.sampling import sampling_factor
from models.reconstruction.tilt import TiltForecast, forecast_views, recommend_tilt, tilted_views


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def poses_along_z(n: int = 4000, *, spread_deg: float = 0.0) -> torch.Tensor:
    """Top views: tilt up to `spread_deg` of the axis, any angle in the plane."""
    draw = torch.rand(n, 3, generator=generator())
    cosine = 1.0 - draw[:, 1] * (1.0 - math.cos(math.radians(spread_deg)))
    tilt = torch.rad2deg(torch.acos(cosine.clamp(-1, 1)))
    return euler_to_matrix(torch.stack((360 * draw[:, 0], tilt, 360 * draw[:, 2]), dim=-1))


@pytest.mark.parametrize("tilt_deg", [20.0, 30.0, 40.0])
def test_one_preferred_view_opens_to_a_cone_of_the_tilt(tilt_deg: float) -> None:
    views = tilted_views(poses_along_z(), tilt_deg)
    assert torch.allclose(
        views[:, 2], torch.full_like(views[:, 2], math.cos(math.radians(tilt_deg))), atol=1e-5
    )
    # Planes normal to the cone's views leave out a cone of 90° − α: 1 − sin α of the half sphere.
    sampling = sampling_factor(views, generator=generator())
    assert sampling.unsampled_fraction == pytest.approx(1.0 - math.sin(math.radians(tilt_deg)), abs=0.03)


def test_a_tilt_of_a_right_angle_turns_top_views_into_side_views() -> None:
    views = tilted_views(poses_along_z(), 90.0)
    assert sampling_factor(views, generator=generator()).scf_star == pytest.approx(8 / math.pi**2, abs=0.02)


def test_top_views_lack_side_views_and_the_best_tilt_is_recommended() -> None:
    forecast = forecast_views(
        poses_along_z(spread_deg=10.0), generator=generator(), tilts_deg=(0.0, 20.0, 40.0)
    )
    assert forecast.missing_rot_tilt_deg is not None
    assert forecast.missing_rot_tilt_deg[1] > 80.0
    # Directions within 10° + 20° of the axis have views: 1 − cos 30° = 0.134 of the half sphere, less its rim.
    assert forecast.missing_fraction == pytest.approx(0.87, abs=0.04)
    # A cone of 10° leaves out 1 − sin 10°; tilted by 40° it reaches from 30° to 50° and leaves out 1 − sin 50°.
    assert forecast.tilts[0].unsampled_fraction == pytest.approx(1 - math.sin(math.radians(10)), abs=0.03)
    assert forecast.tilts[-1].unsampled_fraction == pytest.approx(1 - math.sin(math.radians(50)), abs=0.03)
    scores = [t.scf_star for t in forecast.tilts]
    assert scores == sorted(scores)
    assert scores[0] == pytest.approx(0.002, abs=0.002)
    assert forecast.recommended_tilt_deg == 40.0


def test_even_views_have_no_gap_and_need_no_tilt() -> None:
    forecast = forecast_views(
        random_rotations(4000, generator()), generator=generator(), tilts_deg=(0.0, 30.0)
    )
    assert forecast.missing_fraction == 0.0
    assert forecast.missing_view is None
    assert forecast.missing_rot_tilt_deg is None
    assert forecast.recommended_tilt_deg is None
    assert min(t.scf_star for t in forecast.tilts) > 0.95


def test_symmetry_fills_gaps() -> None:
    poses = poses_along_z(spread_deg=45.0)
    alone = forecast_views(poses, generator=generator(), tilts_deg=(0.0,))
    octahedral = forecast_views(
        poses, generator=generator(), group=symmetry_matrices("O").float(), tilts_deg=(0.0,)
    )
    # The threefold axis is 54.7° from a fourfold one: within reach of views up to 45° from it.
    assert alone.missing_fraction > 0.3
    assert octahedral.missing_fraction == 0.0
    assert octahedral.tilts[0].scf_star > 2.0 * alone.tilts[0].scf_star


def test_the_smallest_tilt_that_is_enough_is_recommended() -> None:
    def tilts(*scores: float) -> list[TiltForecast]:
        return [
            TiltForecast(tilt_deg=t, scf_star=s, scf_star_mixed=s, unsampled_fraction=0.5)
            for t, s in zip((0.0, 20.0, 30.0, 40.0), scores, strict=True)
        ]

    assert recommend_tilt(tilts(0.3, 0.7, 0.85, 0.9)) == 30.0
    assert recommend_tilt(tilts(0.3, 0.4, 0.5, 0.6)) == 40.0
    assert recommend_tilt(tilts(0.5, 0.51, 0.55, 0.6)) is None
    assert recommend_tilt(tilts(0.9, 0.5, 0.95, 0.99)) is None


def test_no_poses_are_refused() -> None:
    with pytest.raises(ValueError, match="rotations: none"):
        forecast_views(torch.zeros(0, 3, 3), generator=generator())
