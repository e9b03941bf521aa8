"""Conical FSC and cFAR: definition against a direct sum, closed-form noise cones, pitfalls, symmetry, null value."""

from __future__ import annotations

import math

import pytest
import torch

from models.fourier.point_groups import symmetry_matrices
from models.reconstruction.cones import (
    Cone,
    Slab,
    directional_sums,
    half_directions,
    healpix_pixel,
)
from models.reconstruction.fsc import fourier_shell_correlation, shell_index
from models.reconstruction.grids import healpix_directions, random_rotations
from models.reconstruction.masks import spherical_mask
from models.reconstruction.orientation import (
    area_ratio,
    conical_fsc,
    crossing_shells,
    orientation_diagnostics,
    weighted_area,
)


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise_spectrum(size: int, generator: torch.Generator) -> torch.Tensor:
    return torch.fft.rfftn(torch.randn(size, size, size, generator=generator))


def cosine_to_axis(size: int, axis: int) -> torch.Tensor:
    """|cos| of the angle to x (0), y (1) or z (2) on the half spectrum."""
    full, half = torch.fft.fftfreq(size) * size, torch.arange(size // 2 + 1.0)
    kz, ky, kx = torch.meshgrid(full, full, half, indexing="ij")
    radius = (kx**2 + ky**2 + kz**2).sqrt().clamp_min(1e-6)
    return ((kx, ky, kz)[axis] / radius).abs()


def power_of_shell(shells: torch.Tensor, size: int) -> torch.Tensor:
    return 100.0 * torch.exp(-((shells / (0.2 * size)) ** 2))


def noise_cone_pair(size: int, half_angle_deg: float, factor: float, seed: int = 1, axis: int = 2):
    """Two spectra with common signal P(k) and white noise whose power is `factor` times larger in a double cone."""
    g = gen(seed)
    signal = noise_spectrum(size, g) * power_of_shell(shell_index(size).float(), size).sqrt()
    is_inside = cosine_to_axis(size, axis) >= math.cos(math.radians(half_angle_deg))
    scale = torch.where(is_inside, math.sqrt(factor), 1.0)
    return signal + noise_spectrum(size, g) * scale, signal + noise_spectrum(size, g) * scale


def expected_cfar(size: int, factor: float) -> float:
    shells = torch.arange(size // 2 + 1.0)

    def area(noise_power: float) -> float:
        fsc = power_of_shell(shells, size) / (power_of_shell(shells, size) + noise_power)
        end = next((s for s in range(1, len(fsc)) if fsc[s] <= 0.143), len(fsc) - 1)
        return float((shells[1:end] ** 2 * fsc[1:end]).sum())

    return area(factor) / area(1.0)


def measured_cfar(a: torch.Tensor, b: torch.Tensor) -> float:
    cfsc = conical_fsc(a, b)
    return area_ratio(weighted_area(cfsc, crossing_shells(cfsc), power=2))


@pytest.mark.parametrize("order", [0, 2, 5])
def test_every_healpix_centre_lies_in_its_own_pixel(order):
    directions = healpix_directions(order)
    assert torch.equal(healpix_pixel(directions, 2**order), torch.arange(12 * 4**order))


def test_healpix_pixels_are_nearest_centres_up_to_their_own_size():
    views = random_rotations(2_000, gen())[:, 2]
    centres = healpix_directions(5)[healpix_pixel(views, 32)]
    angles = torch.rad2deg(torch.acos((views * centres).sum(1).clamp(-1, 1)))
    assert float(angles.max()) < 1.9


def test_there_are_3072_directions_up_to_sign():
    directions = half_directions()
    assert directions.shape == (1536, 3)
    everything = torch.cat((directions, -directions))
    nearest = (everything @ healpix_directions(4).T).max(dim=1)
    assert float(nearest.values.min()) > 1 - 1e-5
    assert len(set(nearest.indices.tolist())) == 3072


@pytest.mark.parametrize("size", [24, 25])
def test_sums_are_exact_in_the_inner_shells_and_count_each_pair_once(size):
    g = gen(3)
    a, b = torch.randn(size, size, size, generator=g), torch.randn(size, size, size, generator=g)
    A, B = torch.fft.fftn(a), torch.fft.fftn(b)
    k = torch.fft.fftfreq(size) * size
    kz, ky, kx = torch.meshgrid(k, k, k, indexing="ij")
    radius = (kx**2 + ky**2 + kz**2).sqrt()
    sums = directional_sums(torch.fft.rfftn(a), torch.fft.rfftn(b), Cone(20))
    for d in (0, 400, 1535):
        x, y, z = half_directions()[d]
        cosine = ((x * kx + y * ky + z * kz) / radius.clamp_min(1e-6)).abs()
        for shell in (1, 3, 7, 10):
            at = (torch.round(radius) == shell) & (cosine >= math.cos(math.radians(20)))
            if size % 2 == 0:
                assert float(sums.count[d, shell]) == pytest.approx(float(at.sum()) / 2, abs=0.6)
            else:
                assert float(sums.count[d, shell]) * 2 == float(at.sum())
            expected = (A[at] * B[at].conj()).real.sum() / 2
            assert float(sums.cross[d, shell]) == pytest.approx(float(expected), rel=1e-3, abs=0.5)


def test_binning_changes_cfar_by_less_than_one_hundredth_against_exact_membership():
    size = 48
    a, b = noise_cone_pair(size, 40, 5.0)
    full, half = torch.fft.fftfreq(size) * size, torch.arange(size // 2 + 1.0)
    kz, ky, kx = torch.meshgrid(full, full, half, indexing="ij")
    unit = torch.nn.functional.normalize(torch.stack((kx, ky, kz), -1).reshape(-1, 3), dim=-1)
    weight = torch.ones_like(kx)
    weight[..., 0] = weight[..., -1] = 0.5
    values = torch.stack([(a * b.conj()).real, a.abs() ** 2, b.abs() ** 2, torch.ones_like(kx)]) * weight
    shell = shell_index(size).flatten()
    exact = torch.full((1536, size // 2 + 1), torch.nan)
    for s in range(1, size // 2 + 1):
        at = shell == s
        member = ((half_directions() @ unit[at].T).abs() >= math.cos(math.radians(20))).float()
        cross, pa, pb, count = (member @ values.reshape(4, -1)[:, at].T).unbind(1)
        exact[:, s] = torch.where(count >= 5, cross / (pa * pb).clamp_min(1e-30).sqrt(), torch.nan)
    reference = area_ratio(weighted_area(exact, crossing_shells(exact), power=2))
    assert measured_cfar(a, b) == pytest.approx(reference, abs=0.01)


@pytest.mark.parametrize("factor", [3.0, 10.0])
def test_noise_cones_give_the_closed_form_cfar_in_a_small_box(factor):
    a, b = noise_cone_pair(96, 30, factor)
    assert measured_cfar(a, b) == pytest.approx(expected_cfar(96, factor), rel=0.1, abs=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(("half_angle_deg", "factor"), [(30, 3.0), (30, 10.0), (30, 100.0), (70, 30.0)])
def test_noise_cones_give_the_closed_form_cfar(half_angle_deg, factor):
    a, b = noise_cone_pair(144, half_angle_deg, factor)
    assert measured_cfar(a, b) == pytest.approx(expected_cfar(144, factor), rel=0.1, abs=0.02)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_worst_direction_is_the_axis_of_the_noise_cone_in_xyz(axis):
    a, b = noise_cone_pair(48, 30, 20.0, axis=axis)
    half1, half2 = torch.fft.irfftn(a, s=(48,) * 3), torch.fft.irfftn(b, s=(48,) * 3)
    result = orientation_diagnostics(half1, half2, None, 2.0, generator=gen(), n_null=0)
    assert abs(result.worst_direction[axis]) > math.cos(math.radians(25))
    assert abs(result.best_direction[axis]) < math.cos(math.radians(35))
    assert result.worst_resolution_angstrom > result.best_resolution_angstrom
    assert result.cfar < result.cfar_unweighted < 1
    assert result.cfar_null is None


def test_identical_maps_are_perfectly_isotropic_though_the_innermost_cones_are_empty():
    a = torch.randn(32, 32, 32, generator=gen())
    result = orientation_diagnostics(a, a, None, 2.0, generator=gen(), n_null=1)
    assert result.cfar == pytest.approx(1.0, abs=0.02)
    assert result.cfar_null == pytest.approx(1.0, abs=0.02)
    assert math.isnan(float(result.cfsc_mean[1]))
    assert float(result.cfsc_min[8:].min()) > 0.999
    torch.testing.assert_close(result.relative_signal, torch.ones(1536), atol=0.02, rtol=0)
    assert float(result.fso[8:].min()) == 1.0


def test_a_crossing_is_where_the_curve_stays_low_and_not_at_a_node_of_the_molecule():
    nan = math.nan
    falling = [1, nan, 0.1, 0.9, 0.9, 0.9, 0.9, 0.9, 0.1, 0.1, 0.1, 0.0]
    node = [1, nan, 0.9, 0.9, 0.8, 0.0, -0.2, 0.7, 0.7, 0.7, 0.6, 0.6]
    sparse = [1, nan, nan, 0.9, 0.1, nan, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9]
    high = [1, nan, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.0]
    assert crossing_shells(torch.tensor([falling, node, sparse, high])).tolist() == [8, 11, 11, 11]


def test_an_area_is_weighted_by_the_squared_shell_and_ends_at_the_crossing():
    curve = torch.tensor([[1.0, 1.0, 0.5, 0.5, 0.5, 0.0, 0.0, 0.0]])
    end = crossing_shells(curve)
    assert end.tolist() == [5]
    assert float(weighted_area(curve, end, power=2)) == pytest.approx(1.0 + 0.5 * (4 + 9 + 16))


def test_a_mean_over_cones_follows_the_global_curve():
    a, b = noise_cone_pair(48, 30, 1.0)
    half1, half2 = torch.fft.irfftn(a, s=(48,) * 3), torch.fft.irfftn(b, s=(48,) * 3)
    result = orientation_diagnostics(half1, half2, None, 2.0, generator=gen(), n_null=0)
    global_fsc = fourier_shell_correlation(half1, half2)
    assert float((result.cfsc_mean - global_fsc)[6:].abs().max()) < 0.03


def test_isotropic_maps_have_a_cfar_near_their_null_value_and_broken_maps_far_below_it():
    mask = spherical_mask(48, 16, 5)
    results = []
    for factor in (1.0, 30.0):
        a, b = noise_cone_pair(48, 40, factor)
        half1, half2 = torch.fft.irfftn(a, s=(48,) * 3), torch.fft.irfftn(b, s=(48,) * 3)
        results.append(orientation_diagnostics(half1, half2, mask, 2.0, generator=gen(), n_null=5))
    assert results[0].cfar_null == pytest.approx(results[0].cfar, rel=0.15)
    assert results[0].cfar_ratio == pytest.approx(results[0].cfar / results[0].cfar_null)
    assert results[1].cfar_ratio < 0.5 * results[0].cfar_ratio
    assert results[0].is_masked


def test_the_null_value_is_the_same_for_the_same_seed():
    a, b = (torch.randn(24, 24, 24, generator=gen(s)) for s in (1, 2))
    c = torch.randn(24, 24, 24, generator=gen(3)) * 2
    first = orientation_diagnostics(a + c, b + c, None, 2.0, generator=gen(7), n_null=3)
    second = orientation_diagnostics(a + c, b + c, None, 2.0, generator=gen(7), n_null=3)
    assert first.cfar_null == second.cfar_null


def test_symmetry_averages_a_noise_cone_over_its_images():
    a, b = noise_cone_pair(48, 30, 20.0, axis=2)
    half1, half2 = torch.fft.irfftn(a, s=(48,) * 3), torch.fft.irfftn(b, s=(48,) * 3)
    plain = orientation_diagnostics(half1, half2, None, 2.0, generator=gen(), n_null=0)
    octahedral = orientation_diagnostics(
        half1, half2, None, 2.0, generator=gen(), n_null=0, symmetry_matrices=symmetry_matrices("O")
    )
    assert octahedral.cfar > 1.3 * plain.cfar
    assert octahedral.n_symmetry == 24


def test_the_slab_is_the_complement_of_a_cone():
    a = noise_spectrum(24, gen())
    slab, cone = directional_sums(a, a, Slab(20)), directional_sums(a, a, Cone(70))
    total = (slab.count + cone.count)[:, 10]
    torch.testing.assert_close(total, total[0].expand(1536), rtol=1e-4, atol=0.51)


def test_poses_give_scf_star_and_the_summary_is_plain_json():
    import json

    a = torch.randn(24, 24, 24, generator=gen())
    poses = random_rotations(3_000, gen())
    result = orientation_diagnostics(a, a, None, 2.0, generator=gen(), n_null=1, rotations=poses)
    assert result.scf_star == pytest.approx(0.98, abs=0.02)
    document = result.summary()
    json.dumps(document)
    assert {"cfar", "cfar_null", "cfar_ratio", "scf_star", "cfsc_min", "cfsc_max"} <= set(document)


def test_noise_without_signal_has_cfar_zero():
    a, b = (torch.randn(32, 32, 32, generator=gen(s)) for s in (1, 2))
    assert orientation_diagnostics(a, b, None, 2.0, generator=gen(), n_null=1).cfar < 0.02


def test_inputs_of_other_shapes_are_refused_by_name():
    cube = torch.zeros(8, 8, 8)
    with pytest.raises(ValueError, match="half1"):
        orientation_diagnostics(torch.zeros(8, 8, 9), cube, None, 1.0, generator=gen())
    with pytest.raises(ValueError, match="half2"):
        orientation_diagnostics(cube, torch.zeros(9, 9, 9), None, 1.0, generator=gen())
    with pytest.raises(ValueError, match="mask"):
        orientation_diagnostics(cube, cube, torch.zeros(9, 9, 9), 1.0, generator=gen())


def test_sums_under_a_group_are_the_mean_over_each_directions_images():
    a = noise_spectrum(24, gen(4))
    group = symmetry_matrices("D2")
    plain = directional_sums(a, a, Cone(20))
    symmetric = directional_sums(a, a, Cone(20), group=group)
    directions = half_directions()
    # D2 maps HEALPix onto itself, so that the mean over images can be read off the plain sums.
    images = torch.einsum("gij,dj->dgi", group, directions)
    index = (images @ directions.T).abs().argmax(dim=-1)
    expected = plain.power_a[index].mean(dim=1)
    torch.testing.assert_close(
        symmetric.power_a[:, 2:], expected[:, 2:], rtol=0.05, atol=float(expected.max()) * 0.02
    )
