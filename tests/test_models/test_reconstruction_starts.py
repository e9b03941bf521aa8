"""Which starts go on: two where they agree, all and as many new ones where none do, and none further for noise."""

from __future__ import annotations

import pytest
import torch

from models.reconstruction import initial_model
from models.reconstruction.blobs import BlobPhantom, simulate_blob_images
from models.reconstruction.fine_em import Finalist
from models.reconstruction.initial_model import InitialModel, find_initial_model
from models.reconstruction.online_em import OnlineEmSettings
from models.reconstruction.particle_data import ParticleData

SETTINGS = OnlineEmSettings(n_iterations=6, first_batch=30, last_batch=40, last_shell=7.0)


@pytest.fixture(scope="module")
def data() -> ParticleData:
    phantom = BlobPhantom.random(32, torch.Generator().manual_seed(1), n_blobs=9, sigma_fraction=0.05)
    return simulate_blob_images(
        phantom, 120, torch.Generator().manual_seed(2), snr=2.0, pixel_size_angstrom=6.0
    ).data


def find(data: ParticleData, monkeypatch: pytest.MonkeyPatch, agreement: float) -> InitialModel:
    def agree(a: Finalist, b: Finalist) -> float:
        assert a.score >= b.score
        return agreement

    monkeypatch.setattr(initial_model, "agreement_of", agree)
    monkeypatch.setattr(initial_model, "FINE_BLOCK", 1)
    monkeypatch.setattr(initial_model, "MAX_FINE_STEPS", 2)
    return find_initial_model(data, SETTINGS, torch.eye(3)[None], n_starts=3, seed=0)


def test_two_starts_that_agree_are_enough(data: ParticleData, monkeypatch: pytest.MonkeyPatch) -> None:
    model = find(data, monkeypatch, 0.9)
    names = [report.name for report in model.reports]
    assert len(names) == 3
    assert sum(name.endswith("left at half time") for name in names) == 1
    # One of each kind of start: odd ones begin at 4 shells, even ones at 7.
    assert {int(name.split()[1]) % 2 for name in names[:2]} == {0, 1}
    assert model.acceptance.agreement == 0.9
    assert model.acceptance.is_accepted


def test_where_none_agree_all_and_as_many_again_are_run_and_the_seed_is_refused(
    data: ParticleData, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = find(data, monkeypatch, 0.1)
    assert sorted(report.name for report in model.reports) == [f"start {i}" for i in range(1, 7)]
    scores = [report.fine_score for report in model.reports if report.fine_score is not None]
    assert len(scores) == 6
    assert scores == sorted(scores, reverse=True)
    assert not model.acceptance.is_accepted
    assert "no second start" in str(model.acceptance.reason)


def test_noise_is_not_searched_further(data: ParticleData, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(3)
    noise = torch.complex(
        torch.randn(data.coefficients.shape, generator=generator),
        torch.randn(data.coefficients.shape, generator=generator),
    )
    empty = ParticleData(data.plane, data.pixel_size_angstrom, noise, data.ctf)
    model = find(empty, monkeypatch, 0.1)
    assert len(model.reports) == 3
    assert "own noise" in str(model.acceptance.reason)
