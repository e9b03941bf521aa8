"""Virtual specimens and ice maps: counts, placement, poses in the asymmetric unit, exact clusters."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from models.cryogem.greys import (
    GreyStatistics,
    from_network_range,
    levels_to_network_range,
    measure_greys,
    prepare_micrograph,
    to_network_range,
    working_shape,
)
from models.cryogem.ice_weights import cluster_values, estimate_ice_weights, spread_ice_weights
from models.cryogem.specimen import (
    CountDistribution,
    draw_rotations,
    fit_counts,
    fold_rotations,
    measure_spacing,
    place_on_free_pixels,
    spacing_from_collapse,
)
from models.fourier.point_groups import group_order, symmetry_matrices
from models.reconstruction.grids import asymmetric_unit, random_rotations


def rng(seed: int = 1) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_counts_follow_the_session_and_stay_within_two_deviations():
    counts = fit_counts([80, 100, 120])
    assert counts.mean == pytest.approx(100.0)
    assert counts.sd == pytest.approx(16.33, abs=0.01)
    drawn = np.array([counts.draw(generator) for generator in [rng()] for _ in range(4000)])
    assert drawn.min() >= 100 - 33
    assert drawn.max() <= 100 + 33
    assert drawn.mean() == pytest.approx(100.0, abs=1.0)
    # clipping at two deviations leaves 0.959 of the spread
    assert drawn.std() == pytest.approx(0.959 * 16.33, rel=0.05)


def test_a_frame_has_at_least_one_particle():
    assert CountDistribution(mean=0.2, sd=0.1).draw(rng()) == 1


def test_counts_without_any_pick_are_refused():
    with pytest.raises(ValueError, match="counts"):
        fit_counts([0, 0])


def test_placed_particles_keep_their_chebyshev_distance_and_lie_in_the_frame():
    centres = place_on_free_pixels(60, (200, 150), 17.0, rng())
    assert len(centres) > 30
    apart = np.abs(centres[:, None] - centres[None]).max(-1) + 1e9 * np.eye(len(centres))
    assert apart.min() >= 17.0
    assert (centres >= 0).all()
    assert (centres <= np.array([199, 149])).all()
    assert np.abs(centres - centres.round()).max() > 0.3  # sub-pixel positions


def test_placement_is_uniform_over_free_pixels():
    centres = np.concatenate([place_on_free_pixels(1, (40, 80), 5.0, rng(i)) for i in range(1500)])
    mean, spread = centres.mean(0), centres.std(0)
    assert mean == pytest.approx([19.5, 39.5], abs=1.5)
    assert spread == pytest.approx([40 / 12**0.5, 80 / 12**0.5], rel=0.06)


def test_placement_ends_early_in_a_full_frame():
    assert 1 <= len(place_on_free_pixels(100, (50, 50), 30.0, rng())) <= 4


def test_collapse_ratio_gives_the_spacing():
    assert spacing_from_collapse(90, 0.5) == 45.0
    with pytest.raises(ValueError, match="collapse_ratio"):
        spacing_from_collapse(90, 1.0)


def test_spacing_is_measured_from_picks():
    grid = np.stack(np.meshgrid(np.arange(5) * 30.0, np.arange(5) * 30.0), -1).reshape(-1, 2)
    assert measure_spacing([grid, grid[:1]]) == pytest.approx(30.0)
    assert measure_spacing([grid[:1]]) is None


@pytest.mark.parametrize("symmetry", ["C1", "C4", "D2", "D7", "T", "O", "I"])
def test_rotations_are_in_the_asymmetric_unit_and_still_uniform(symmetry):
    group = symmetry_matrices(symmetry)
    rotations = torch.from_numpy(draw_rotations(3000, symmetry, rng()))
    assert len(asymmetric_unit(rotations, group)) == 3000
    # unfolding by a random element of the group gives back uniform rotations: E[R] = 0, E[R_ij²] = 1/3
    chosen = group[torch.randint(len(group), (3000,), generator=torch.Generator().manual_seed(1))]
    unfolded = rotations @ chosen
    assert float(unfolded.mean(0).abs().max()) < 0.05
    assert float((unfolded.square().mean(0) - 1 / 3).abs().max()) < 0.03


def test_in_plane_angles_of_symmetric_targets_are_uniform():
    rotations = draw_rotations(4000, "D7", rng())
    psi = np.arctan2(rotations[:, 1, 2], -rotations[:, 0, 2])
    assert abs(np.exp(1j * psi).mean()) < 0.05
    assert np.histogram(psi, bins=8, range=(-np.pi, np.pi))[0].min() > 400


def test_folding_keeps_the_projection():
    group = symmetry_matrices("D3")
    rotations = random_rotations(50, torch.Generator().manual_seed(3))
    folded = fold_rotations(rotations, group)
    change = rotations.transpose(1, 2) @ folded
    nearest = (change[:, None] - group[None]).abs().amax((-2, -1)).amin(1)
    assert float(nearest.max()) < 1e-5
    assert group_order("D3") == len(group)


def test_clusters_are_the_exact_optimum():
    values = np.concatenate((rng().normal(0, 1, 7), rng(2).normal(5, 1, 6)))
    labels = cluster_values(values, 3)

    def cost(assigned):
        return sum(
            ((values[assigned == k] - values[assigned == k].mean()) ** 2).sum()
            for k in set(assigned.tolist())
        )

    order = np.argsort(values)
    best = np.inf
    for cuts in itertools.combinations(range(1, len(values)), 2):
        trial = np.zeros(len(values), int)
        trial[order[cuts[0] : cuts[1]]] = 1
        trial[order[cuts[1] :]] = 2
        best = min(best, cost(trial))
    assert cost(labels) == pytest.approx(best)
    means = [values[labels == k].mean() for k in range(3)]
    assert means == sorted(means)


def test_fewer_distinct_values_than_clusters_make_fewer_clusters():
    assert cluster_values(np.array([2.0, 2.0, 1.0]), 6).tolist() == [1, 1, 0]


def uneven(seed: int = 5, n: int = 256) -> torch.Tensor:
    """White noise on a brightness that falls from left to right."""
    x = torch.linspace(1.0, 0.6, n)
    noise = torch.randn(n, n, generator=torch.Generator().manual_seed(seed))
    return 100.0 * x[None, :].expand(n, n) + 4.0 * noise


def test_ice_map_follows_the_brightness_and_is_the_same_each_time():
    first, second = estimate_ice_weights(uneven(), 6.0), estimate_ice_weights(uneven(), 6.0)
    assert torch.equal(first, second)
    columns = first.mean(0)
    assert float(first.max()) == pytest.approx(1.0)
    assert bool((columns[:-4:4] >= columns[4::4] - 1e-4).all())
    assert float(columns[0]) > 1.5 * float(columns[-1])
    rows = first.mean(1)
    assert float(rows.max() - rows.min()) < 0.1


def test_even_ice_gives_an_even_map():
    flat = 100.0 + torch.randn(256, 256, generator=torch.Generator().manual_seed(2))
    assert float(estimate_ice_weights(flat, 6.0).min()) > 0.75


def test_ice_map_low_pass_uses_the_pixel_size():
    # the same picture is blurred over more pixels where the pixel is finer: another map
    image = uneven(n=128)
    assert not torch.equal(estimate_ice_weights(image, 1.0), estimate_ice_weights(image, 10.0))


def test_ice_map_refuses_nan_and_small_images():
    image = uneven()
    image[3, 4] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        estimate_ice_weights(image, 6.0)
    with pytest.raises(ValueError, match="32 px"):
        estimate_ice_weights(torch.zeros(20, 40), 6.0)


def test_spread_map_covers_a_frame_that_is_not_square():
    spread = spread_ice_weights(estimate_ice_weights(uneven(), 6.0), (300, 200))
    assert spread.shape == (300, 200)


def test_network_range_has_the_papers_mean_and_deviation():
    noise = 7.0 + 3.0 * torch.randn(200, 200, generator=torch.Generator().manual_seed(1))
    levels = (to_network_range(noise) + 1) * 127.5
    assert float(levels.mean()) == pytest.approx(150.0, abs=0.5)
    assert float(levels.std()) == pytest.approx(40.0, abs=0.6)
    assert float(levels.max()) <= 255.0


def test_one_hot_pixel_does_not_rescale_a_micrograph():
    noise = torch.randn(300, 300, generator=torch.Generator().manual_seed(1))
    hot = noise.clone()
    hot[10, 10] = 1e6
    rest = torch.ones(300, 300, dtype=torch.bool)
    rest[10, 10] = False
    assert float((to_network_range(noise) - to_network_range(hot))[rest].abs().max()) < 1e-3


def test_network_range_is_inverted_to_the_sessions_greys():
    image = 40.0 + 5.0 * torch.randn(128, 128, generator=torch.Generator().manual_seed(4))
    back = from_network_range(to_network_range(image), measure_greys(image))
    inside = to_network_range(image).abs() < 1.0
    assert torch.allclose(back[inside], image[inside], atol=0.02)


def test_prepared_micrograph_is_reduced_and_bytes():
    image = 40.0 + 5.0 * torch.randn(301, 400, generator=torch.Generator().manual_seed(4))
    prepared = prepare_micrograph(image, 150)
    assert prepared.levels.shape == (150, 200)
    assert prepared.levels.dtype == torch.uint8
    seen = levels_to_network_range(prepared.levels)
    assert float(seen.mean()) == pytest.approx(150 / 127.5 - 1, abs=0.02)
    # a Fourier crop to half the side averages four pixels of white noise
    assert prepared.statistics.sd == pytest.approx(2.5, rel=0.05)


def test_small_micrographs_are_not_enlarged():
    assert working_shape((100, 131), 1024) == (100, 130)
    assert working_shape((4096, 4096), 1024) == (1024, 1024)


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_micrograph_with_a_bad_value_is_refused(broken):
    image = torch.rand(64, 64)
    image[0, 0] = broken
    with pytest.raises(ValueError, match="1 pixels are NaN or infinite"):
        prepare_micrograph(image, 64)


def test_constant_micrograph_is_refused():
    with pytest.raises(ValueError, match="not constant"):
        prepare_micrograph(torch.full((64, 64), 5.0), 64)


def test_statistics_know_skewness():
    counts = torch.from_numpy(rng().poisson(4.0, (400, 400)).astype(np.float32))
    found = measure_greys(counts)
    assert isinstance(found, GreyStatistics)
    assert found.mean == pytest.approx(4.0, abs=0.02)
    assert found.skewness == pytest.approx(0.5, abs=0.03)
