"""Scales of micrographs, weights of images, noise per group and defocus of single particles, against known truth."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from models.reconstruction.blobs import BlobPhantom, BlobSet, simulate_blob_images
from models.reconstruction.defocus_search import search_defocus
from models.reconstruction.half_set import HalfSet, WarmPoses
from models.reconstruction.image_fit import (
    ImageGroups,
    fit_rings,
    image_weights,
    micrograph_scales,
    noise_per_group,
    particle_probability,
)
from models.reconstruction.particle_data import ParticleData, particle_defocus
from models.reconstruction.pose_schedule import RefinementSettings
from models.reconstruction.projector import volume_to_cube
from models.reconstruction.refinement import Refinement
from models.reconstruction.sufficient import ReconstructionGrid, correlate_shells

BOX, PIXEL, N, SHELL = 32, 4.0, 400, 12.0
C1 = torch.eye(3)[None]


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


PHANTOM = BlobPhantom.random(BOX, gen(1), n_blobs=9, sigma_fraction=0.045)


@pytest.fixture(scope="module")
def images() -> BlobSet:
    return simulate_blob_images(PHANTOM, N, gen(2), snr=0.2, pixel_size_angstrom=PIXEL)


@pytest.fixture(scope="module")
def truth() -> torch.Tensor:
    return volume_to_cube(PHANTOM.volume(), SHELL)


def signal(images: BlobSet) -> torch.Tensor:
    """What the images hold beside noise."""
    plane = images.data.plane
    return images.data.ctf * PHANTOM.slices(images.rotations, plane) * plane.phases(-images.origin_xy_px)


def changed(images: BlobSet, coefficients: torch.Tensor) -> ParticleData:
    data = images.data
    return ParticleData(data.plane, data.pixel_size_angstrom, coefficients, data.ctf)


def flat_noise(data: ParticleData, n: int) -> torch.Tensor:
    """Inverse noise per image and ring of images whose outer rings are noise alone."""
    level = data.mean_power()[-3:].mean()
    return torch.full((n, int(data.plane.shell.max()) + 1), 1.0 / float(level))


def contrast(n_micrographs: int) -> torch.Tensor:
    """Scales that thick and thin ice would give, mean 1."""
    scales = torch.linspace(0.6, 1.4, n_micrographs)
    return scales[torch.randperm(n_micrographs, generator=gen(4))]


def test_scales_of_micrographs_are_found_with_poses_known(images, truth):
    micrograph = torch.arange(N) // 40
    known = contrast(10)
    data = changed(images, images.data.coefficients + (known[micrograph] - 1.0)[:, None] * signal(images))
    fit = fit_rings(data, truth, images.rotations, images.origin_xy_px, SHELL)
    found = micrograph_scales(fit, flat_noise(data, N), micrograph, torch.ones(N), SHELL)
    assert float((found.reshape(10, 40)[:, 0] - known).abs().max()) < 0.06
    assert float(found.mean()) == pytest.approx(1.0, abs=1e-3)
    # A map of other units changes nothing: only differences between micrographs are theirs.
    other = fit_rings(data, 5.0 * truth, images.rotations, images.origin_xy_px, SHELL)
    again = micrograph_scales(other, flat_noise(data, N), micrograph, torch.ones(N), SHELL)
    assert torch.allclose(again, found, atol=0.02)


def test_a_micrograph_of_one_noisy_particle_stays_near_one_and_all_are_bounded(images, truth):
    micrograph = torch.arange(N) // 40
    micrograph[-1] = 10
    coefficients = images.data.coefficients.clone()
    coefficients[:40] -= 1.5 * signal(images)[:40]  # contrast of the wrong sign
    data = changed(images, coefficients)
    fit = fit_rings(data, truth, images.rotations, images.origin_xy_px, SHELL)
    found = micrograph_scales(fit, 0.02 * flat_noise(data, N), micrograph, torch.ones(N), SHELL)
    assert abs(float(found[-1]) - 1.0) < 0.2
    assert float(found.min()) >= 0.25
    assert float(found[0]) < 0.6
    unknown = micrograph_scales(fit, flat_noise(data, N), torch.full((N,), -1), torch.ones(N), SHELL)
    assert torch.equal(unknown, torch.ones(N))


def test_a_refinement_finds_scales_of_micrographs_by_itself(images):
    micrograph = torch.arange(N) // 40
    known = contrast(10)
    data = changed(images, images.data.coefficients + (known[micrograph] - 1.0)[:, None] * signal(images))
    settings = RefinementSettings(n_global=1, n_local=2, initial_resolution_angstrom=30.0, grid_order=1)
    half = micrograph % 2 + 1
    refinement = Refinement(
        data, half, PHANTOM.volume(), settings, C1, gen(), groups=ImageGroups(micrograph, 0 * micrograph)
    )
    while not refinement.is_done:
        refinement.step()
    found = refinement.result().scales
    for h in (1, 2):
        own = torch.arange(h - 1, 10, 2)
        relative = known[own] / known[own].mean()
        assert float((found[own * 40] - relative).abs().max()) < 0.12


def with_empty_boxes(images: BlobSet, share: float) -> tuple[ParticleData, torch.Tensor]:
    """Take the particle out of a share of the images; say which still have theirs."""
    is_empty = torch.arange(N) % 20 < int(20 * share)
    return changed(images, images.data.coefficients - is_empty[:, None] * signal(images)), ~is_empty


def with_other_things(images: BlobSet, data: ParticleData, rows: torch.Tensor) -> ParticleData:
    """Put views of as many other phantoms into these images."""
    coefficients = data.coefficients.clone()
    for row in rows.tolist():
        other = BlobPhantom.random(BOX, gen(100 + row), n_blobs=9, sigma_fraction=0.045)
        coefficients[row] += data.ctf[row] * other.slices(images.rotations[row : row + 1], data.plane)[0]
    return changed(images, coefficients)


def test_junk_is_weighed_down_and_a_clean_set_left_alone(images, truth):
    data, is_good = with_empty_boxes(images, 0.3)
    data = with_other_things(images, data, torch.nonzero(~is_good)[::2, 0])
    fit = fit_rings(data, truth, images.rotations, images.origin_xy_px, SHELL)
    weights = image_weights(fit, flat_noise(data, N), torch.ones(N), SHELL)
    assert float(weights[is_good].mean()) > 0.95
    assert float(weights[~is_good].mean()) < 0.1
    clean = fit_rings(images.data, truth, images.rotations, images.origin_xy_px, SHELL)
    kept = image_weights(clean, flat_noise(images.data, N), torch.ones(N), SHELL)
    assert float(kept.mean()) > 0.99


def test_weights_bring_a_map_of_particles_and_empty_boxes_nearer_to_the_truth(images):
    data, is_good = with_empty_boxes(images, 0.4)
    half = torch.arange(N) // 20 % 2 + 1
    agreement = {}
    grid, cube = ReconstructionGrid(12), volume_to_cube(PHANTOM.volume(), 12)
    for is_weighed in (False, True):
        settings = RefinementSettings(
            n_global=1, n_local=2, initial_resolution_angstrom=30.0, grid_order=1, weigh_images=is_weighed
        )
        refinement = Refinement(data, half, PHANTOM.volume(), settings, C1, gen())
        while not refinement.is_done:
            refinement.step()
        result = refinement.result()
        maps = volume_to_cube(0.5 * (result.half1 + result.half2) * refinement.sphere, 12)
        agreement[is_weighed] = float(correlate_shells(maps, cube, grid)[1:10].mean())
    assert float(result.weights[is_good].mean()) > 0.9
    assert float(result.weights[~is_good].mean()) < 0.2
    assert agreement[True] > agreement[False] + 0.01


def test_one_skewed_population_keeps_its_weights():
    skewed = torch.distributions.Gamma(6.0, 6.0).sample((3000,))
    assert float(particle_probability(skewed).min()) == 1.0
    two = torch.cat(
        (0.3 + 0.15 * torch.randn(600, generator=gen(1)), 1 + 0.15 * torch.randn(1400, generator=gen(2)))
    )
    probability = particle_probability(two)
    assert float(probability[600:].mean()) > 0.97
    assert float(probability[:600].mean()) < 0.06


def test_noise_is_estimated_for_each_optics_group_and_images_are_whitened_to_one_level(images, truth):
    optics = (torch.arange(N) % 4 == 0).long()
    noise = images.data.coefficients - signal(images)
    data = changed(images, images.data.coefficients + optics[:, None] * noise)  # group 1: twice the noise
    fit = fit_rings(data, truth, images.rotations, images.origin_xy_px, SHELL)
    found = noise_per_group(fit, data, optics, torch.ones(N), torch.ones(N))
    ratio = found[1, 1:] / found[0, 1:]
    assert float(ratio.min()) > 3.3
    assert float(ratio.max()) < 4.7
    half = HalfSet(
        data, PHANTOM.volume(), None, ReconstructionGrid(15.0), ImageGroups(optics - 1, optics), None
    )
    half.rotations, half.shifts = images.rotations, images.origin_xy_px
    half.measure(SHELL, None, RefinementSettings())
    equal = half.images(torch.arange(N)).coefficients.abs().square()[:, 200:]
    assert float(equal[optics == 1].mean() / equal[optics == 0].mean()) == pytest.approx(1.0, abs=0.1)


@pytest.fixture(scope="module")
def fine() -> BlobSet:
    """Images fine enough that a few hundred Å of defocus turn the phase at the rim by more than a radian."""
    phantom = BlobPhantom.random(48, gen(5), n_blobs=20, sigma_fraction=0.02)
    return simulate_blob_images(phantom, 120, gen(6), snr=0.2, pixel_size_angstrom=1.6)


def test_defocus_of_single_particles_is_found_with_poses_known(fine):
    phantom = BlobPhantom.random(48, gen(5), n_blobs=20, sigma_fraction=0.02)
    offset = 300.0 * torch.randn(120, generator=gen(7))
    told = replace(
        fine.ctf,
        defocus_u_angstrom=fine.ctf.defocus_u_angstrom - offset,
        defocus_v_angstrom=fine.ctf.defocus_v_angstrom - offset,
    )
    data = fine.data.with_ctf(told.evaluate(fine.data.plane, 1.6))
    model = particle_defocus(told, data.plane, 1.6)
    # The CTF at the offset is that of the defocus changed by it.
    assert torch.allclose(model.ctf_at(data.ctf, data.plane.radius, offset), fine.data.ctf, atol=2e-3)
    found = search_defocus(
        data, model, torch.ones(120), volume_to_cube(phantom.volume(), 23), flat_noise(data, 120),
        fine.rotations, fine.origin_xy_px, 22.0,
    )  # fmt: skip
    assert float((found - offset).std()) < 0.4 * float(offset.std())
    assert float((found - offset).median().abs()) < 30.0


def test_a_refinement_corrects_defocus_when_asked(fine):
    phantom = BlobPhantom.random(48, gen(5), n_blobs=20, sigma_fraction=0.02)
    offset = 400.0 * torch.randn(120, generator=gen(7))
    told = replace(
        fine.ctf,
        defocus_u_angstrom=fine.ctf.defocus_u_angstrom - offset,
        defocus_v_angstrom=fine.ctf.defocus_v_angstrom - offset,
    )
    data = fine.data.with_ctf(told.evaluate(fine.data.plane, 1.6))
    settings = RefinementSettings(n_global=0, n_local=3, initial_resolution_angstrom=10.0, grid_order=1)
    warm = WarmPoses(fine.rotations, fine.origin_xy_px, torch.ones(120, dtype=torch.bool))
    refinement = Refinement(
        data, torch.arange(120) % 2 + 1, phantom.volume(), settings, C1, gen(), warm,
        defocus=particle_defocus(told, data.plane, 1.6),
    )  # fmt: skip
    while not refinement.is_done:
        refinement.step()
    found = refinement.result().defocus_offset_angstrom
    assert float((found - offset).std()) < 0.7 * float(offset.std())
