"""Contamination on drawn and simulated micrographs of known truth."""

import numpy as np
import pytest
import torch

from models.picking.contamination import find_contamination
from models.picking.correlation import mask_micrograph
from models.simulation.session import build_microscope
from models.simulation.settings import MicroscopeSettings, SessionSettings, SpecimenSettings
from models.simulation.specimen import JunkKind

DIAMETER_PX = 16.0
PIXEL = 3.0


def noise(seed=0, n=256):
    return torch.randn(n, n, generator=torch.Generator().manual_seed(seed))


def overlap(mask, truth):
    return (mask & truth).sum() / (mask | truth).sum()


def expose(junk_fraction, index=0, *, n_particles=40):
    settings = SessionSettings(
        specimen=SpecimenSettings(particles_per_exposure=n_particles, junk_fraction=junk_fraction),
        microscope=MicroscopeSettings(shape_yx_px=(640, 640), pixel_size_angstrom=PIXEL, n_frames=2),
        seed=11,
    )
    microscope = build_microscope("phantom:3:mass_kda=300", settings)
    image, truth = microscope.micrograph(index)
    mask = mask_micrograph(torch.from_numpy(image), PIXEL, diameter_angstrom=microscope.diameter_angstrom)
    return mask, truth


def junk_area(truth, shape, kinds):
    """Return which cells of the mask's grid lie in junk of these kinds."""
    y, x = (640 * (np.arange(n) + 0.5) / n for n in shape)
    area = np.zeros(shape, dtype=bool)
    for item in truth.junk:
        if item.kind in kinds:
            area |= item.signed_distance_px(y[:, None], x[None, :]) < 0
    return area


def test_noise_is_not_contamination():
    assert not any(find_contamination(noise(seed), DIAMETER_PX, 6.0).any() for seed in range(5))


def test_a_flat_image_has_no_contamination():
    assert not find_contamination(torch.full((64, 64), 3.0), DIAMETER_PX, 6.0).any()


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_dark_or_bright_disc_larger_than_a_particle_is_masked_as_it_lies(sign):
    axis = torch.arange(256.0)
    disc = (axis[:, None] - 90) ** 2 + (axis[None, :] - 170) ** 2 < 40**2
    mask = find_contamination(noise() + sign * 3.0 * disc, DIAMETER_PX, 6.0)
    assert overlap(mask.numpy(), disc.numpy()) > 0.7


def test_an_area_of_another_texture_is_masked():
    rough = noise()
    rough[40:120, 100:200] *= 2.0
    truth = np.zeros((256, 256), dtype=bool)
    truth[40:120, 100:200] = True
    assert overlap(find_contamination(rough, DIAMETER_PX, 6.0).numpy(), truth) > 0.6


def test_the_smaller_side_of_a_carbon_edge_is_masked():
    side = torch.arange(256.0)[None, :].expand(256, 256) < 90
    mask = find_contamination(noise() + 2.0 * side, DIAMETER_PX, 6.0)
    assert overlap(mask.numpy(), side.numpy()) > 0.85


def test_an_even_slope_of_the_ice_is_not_an_edge():
    slope = torch.linspace(0.0, 4.0, 256)[None, :] + torch.linspace(0.0, 2.0, 256)[:, None]
    assert float(find_contamination(noise() + slope, DIAMETER_PX, 6.0).float().mean()) < 0.01


def test_a_field_of_particles_is_not_contamination():
    mask, _ = expose(0.0)
    assert mask.mean() < 0.02


def test_simulated_carbon_is_masked():
    # of this session's exposures with much junk, the first that has a carbon edge
    for index in range(8):
        mask, truth = expose(0.5, index, n_particles=8)
        if any(item.kind is JunkKind.CARBON for item in truth.junk):
            break
    carbon = junk_area(truth, mask.shape, (JunkKind.CARBON,))
    assert carbon.mean() > 0.05
    assert (mask & carbon).sum() > 0.85 * carbon.sum()


def test_most_of_the_simulated_ice_crystals_are_masked():
    hit = total = 0
    for index in range(2):
        mask, truth = expose(0.12, index, n_particles=20)
        kinds = (JunkKind.ICE_CRYSTAL,)
        if any(item.kind in (JunkKind.CARBON, JunkKind.EMPTY) for item in truth.junk):
            continue
        crystals = junk_area(truth, mask.shape, kinds)
        hit, total = hit + int((mask & crystals).sum()), total + int(crystals.sum())
    assert total > 100
    assert hit > 0.6 * total
