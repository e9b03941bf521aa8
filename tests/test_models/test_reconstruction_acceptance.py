"""Seeds are judged by images they have not seen: particles pass, noise and featureless blobs do not."""

from __future__ import annotations

import pytest
import torch

from models.reconstruction.acceptance import MINIMUM_Z_SHAPE, MINIMUM_Z_SIGNAL, judge_seed
from models.reconstruction.blobs import BlobPhantom, BlobSet, simulate_blob_images
from models.reconstruction.online_em import EmResult, OnlineEm, OnlineEmSettings
from models.reconstruction.particle_data import ParticleData

BOX, N = 32, 200
SETTINGS = OnlineEmSettings(n_iterations=8, last_batch=60, last_shell=9.0)
PHANTOM = BlobPhantom.random(BOX, torch.Generator().manual_seed(1), n_blobs=9, sigma_fraction=0.05)


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def images() -> BlobSet:
    return simulate_blob_images(PHANTOM, N, gen(2), snr=0.3, pixel_size_angstrom=6.0)


def seed_of(data: ParticleData, start: torch.Tensor | None = None) -> EmResult:
    """The truth (on the EM's own box) as a start that is not improved, or what two iterations make of nothing."""
    em = OnlineEm(data, SETTINGS, gen(3), start=start)
    if start is None:
        em.step()
        em.step()
    return em.result()


def on_small_box(volume: torch.Tensor) -> torch.Tensor:
    from models.fourier.volumes import resample_volume

    box = 2 * (9 + 2)
    return resample_volume(volume, 6.0, 6.0 * BOX / box, box) * (BOX / box) ** 3


def test_particles_with_their_own_map_are_accepted(images):
    found = judge_seed(images.data, seed_of(images.data, on_small_box(PHANTOM.volume())), SETTINGS, gen(4))
    assert found.reason is None
    assert found.z_signal > MINIMUM_Z_SIGNAL
    assert found.z_shape > MINIMUM_Z_SHAPE
    assert found.shape_share > 0.3
    assert found.log_evidence > 0 > found.log_evidence_noise


def test_noise_prefers_no_map_whatever_it_is(images):
    power = images.data.coefficients.abs().square().mean().sqrt()
    noise = torch.view_as_complex(torch.randn((*images.data.coefficients.shape, 2), generator=gen(5))) * power
    data = ParticleData(images.data.plane, 6.0, noise / 2**0.5, images.data.ctf)
    for start in (None, on_small_box(PHANTOM.volume())):
        result = seed_of(data, start)
        assert result.log_evidence < 0.05  # at most 0 on average, see `evidence_of`
        found = judge_seed(data, result, SETTINGS, gen(6))
        assert not found.is_accepted
        assert "own noise" in found.reason


def test_particles_with_a_ball_for_a_map_are_refused_for_its_shape(images):
    x = torch.arange(22.0) - 11
    r2 = x[:, None, None] ** 2 + x[None, :, None] ** 2 + x[None, None, :] ** 2
    ball = torch.exp(-r2 / (2 * 3.5**2))
    scale = on_small_box(PHANTOM.volume()).sum() / ball.sum()
    found = judge_seed(images.data, seed_of(images.data, ball * scale), SETTINGS, gen(7))
    assert found.z_signal > MINIMUM_Z_SIGNAL
    assert not found.is_accepted
    assert "ball" in found.reason


def test_too_few_images_to_hold_out_are_no_judgement(images):
    few = images.data.take(torch.arange(30))
    found = judge_seed(few, seed_of(few, on_small_box(PHANTOM.volume())), SETTINGS, gen(8))
    assert found.n_held_out == 6
    assert "could be held out" in found.reason
