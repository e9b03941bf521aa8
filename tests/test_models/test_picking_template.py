"""Template picking: views, poses of picks, calibration on noise, and what it gains over blobs."""

from functools import partial

import numpy as np
import pytest
import torch
from scipy.stats import norm

from models.fourier.rotations import euler_to_matrix
from models.optics.ctf import evaluate_ctf, frequency_grid
from models.picking.correlation import TemplateBank, correlate, normalise_templates
from models.picking.template import (
    TemplatePickSettings,
    asymmetric_views,
    make_templates,
    pick_templates,
    template_bank,
)
from models.simulation.projection import Projector
from models.simulation.session import specimen_volume

PIXEL = 4.0
CTF = partial(
    evaluate_ctf,
    defocus_u_angstrom=15000.0,
    defocus_v_angstrom=14500.0,
    astigmatism_angle_deg=30.0,
    voltage_kv=300.0,
    cs_mm=2.7,
    amplitude_contrast=0.1,
)


@pytest.fixture(scope="module")
def phantom():
    return specimen_volume("phantom:3:mass_kda=300", PIXEL)


@pytest.fixture(scope="module")
def templates(phantom):
    volume, diameter = phantom
    return make_templates(volume, PIXEL, diameter_angstrom=diameter, n_views=20)


def draw_micrograph(phantom, *, sd, n=512, seed=0):
    """Dark particles on a grid, in random poses, under CTF, on white noise of the given SD (signal SD 1)."""
    volume, diameter = phantom
    generator = np.random.default_rng(seed)
    step = 1.25 * diameter / PIXEL
    axis = np.arange(step, n - step, step)
    centres = np.array([(y, x) for y in axis for x in axis]) + generator.uniform(-3, 3, (len(axis) ** 2, 2))
    tilt = np.degrees(np.arccos(generator.uniform(-1, 1, len(centres))))
    euler = np.stack(
        [generator.uniform(-180, 180, len(centres)), tilt, generator.uniform(-180, 180, len(centres))], 1
    )
    whole = np.floor(centres).astype(int)
    shifts = torch.from_numpy(centres - whole).float()
    images = Projector(volume, PIXEL).project(euler_to_matrix(torch.from_numpy(euler)).float(), shifts)
    scene, half = torch.zeros(n, n), volume.shape[0] // 2
    for (y, x), image in zip(whole, images, strict=True):
        scene[y - half : y + half, x - half : x + half] += image
    ky, kx = frequency_grid((n, n), PIXEL)
    signal = torch.fft.irfft2(torch.fft.rfft2(scene) * CTF(ky, kx), s=(n, n))
    signal = signal / signal.std()
    noise = torch.randn(n, n, generator=torch.Generator().manual_seed(seed))
    return 50.0 - signal + sd * noise, centres, euler


def n_found(picks, centres, tolerance):
    distance = np.linalg.norm(picks.centres_yx_px[:, None] - centres[None], axis=-1)
    return int((distance.min(axis=0, initial=np.inf) <= tolerance).sum())


@pytest.mark.parametrize(("symmetry", "order"), [("C1", 1), ("C4", 4), ("D2", 4), ("D7", 14), ("O", 24)])
def test_views_fill_one_asymmetric_unit(symmetry, order):
    views = asymmetric_views(symmetry, 30)
    wanted = min(30, np.ceil(4 * np.pi / (order * np.radians(15) ** 2)))
    assert 0.7 * wanted <= len(views) <= 1.3 * wanted + 1


def test_responses_are_normalised_cross_correlations(templates):
    """A noiseless template on the plane gives √n at its own place: its correlation with itself is 1."""
    bank = template_bank(templates, CTF)
    unit = normalise_templates(bank)
    size = unit.shape[-1]
    image = 1e-3 * torch.randn(96, 96, generator=torch.Generator().manual_seed(0))
    image[40 : 40 + size, 30 : 30 + size] += 50.0 * unit[77]
    one = TemplateBank(templates=bank.templates[77:78], support=bank.support)
    best, _ = correlate(image, one)
    peak = divmod(int(best.argmax()), 96)
    assert peak == (40 + size // 2, 30 + size // 2)
    assert float(best.max()) == pytest.approx(float(bank.support.sum()) ** 0.5, rel=0.02)


def test_components_stand_for_the_whole_bank(templates):
    """The bank in its principal components gives what each template alone gives."""
    bank = template_bank(templates, CTF)
    few = TemplateBank(templates=bank.templates[::97], support=bank.support)
    image = torch.randn(80, 80, generator=torch.Generator().manual_seed(1))
    best, which = correlate(image, few)
    alone = [
        correlate(image, TemplateBank(templates=t[None], support=bank.support))[0] for t in few.templates
    ]
    direct, index = torch.stack(alone).max(dim=0)
    assert float((best - direct).abs().max()) < 0.2
    assert float((which == index).float().mean()) > 0.95


def test_particles_are_found_with_view_and_turn(phantom, templates):
    image, centres, euler = draw_micrograph(phantom, sd=1.0)
    picks = pick_templates(image, PIXEL, templates, CTF, TemplatePickSettings(border_angstrom=90.0))
    distance = np.linalg.norm(picks.centres_yx_px[:, None] - centres[None], axis=-1)
    of = distance.argmin(axis=1)
    assert n_found(picks, centres, 12.0) >= 0.95 * len(centres)
    assert np.median(distance.min(axis=1)) < 2.0
    views = asymmetric_views("C1", 20)
    found = np.concatenate([views[picks.template_index], picks.in_plane_deg[:, None]], axis=1)
    matrices = [
        euler_to_matrix(torch.from_numpy(np.asarray(e, dtype=np.float64))) for e in (found, euler[of])
    ]
    trace = torch.einsum("nij,nij->n", *matrices)
    angle = torch.rad2deg(torch.arccos(((trace - 1) / 2).clamp(-1, 1)))
    # the views are 36° apart; a random pose is 126° off
    assert float(angle.median()) < 35.0


def test_templates_find_what_noise_hides_from_their_wrong_ctf(phantom, templates):
    image, centres, _ = draw_micrograph(phantom, sd=5.0)
    far = partial(CTF, defocus_u_angstrom=60000.0, defocus_v_angstrom=60000.0)
    settings = TemplatePickSettings(border_angstrom=90.0)
    right, wrong = (pick_templates(image, PIXEL, templates, ctf, settings) for ctf in (CTF, far))
    assert n_found(right, centres, 12.0) > n_found(wrong, centres, 12.0)


def test_noise_gives_as_many_picks_as_the_scores_say_however_many_templates(templates):
    """No reference bias: 720 templates on noise give Q(z) picks per squared diameter, as one would."""
    found, areas = np.zeros(2), 0.0
    for seed in range(2):
        noise = torch.randn(640, 640, generator=torch.Generator().manual_seed(100 + seed))
        picks = pick_templates(noise, 10.0, templates, CTF, TemplatePickSettings(threshold=2.0))
        found += [(picks.scores >= z).sum() for z in (2.0, 3.5)]
        areas += (640 * 10.0 / templates.diameter_angstrom) ** 2
    assert 0.5 * areas * norm.sf(2.0) < found[0] < 1.7 * areas * norm.sf(2.0)
    assert found[1] <= 4


def test_a_map_without_contrast_and_a_low_pass_out_of_reach_are_refused(phantom):
    volume, diameter = phantom
    with pytest.raises(ValueError, match="contrast"):
        make_templates(torch.zeros_like(volume), PIXEL, diameter_angstrom=diameter)
    with pytest.raises(ValueError, match="low_pass_angstrom"):
        make_templates(volume, PIXEL, diameter_angstrom=diameter, low_pass_angstrom=5.0)
    with pytest.raises(ValueError, match="low_pass_angstrom"):
        make_templates(volume, PIXEL, diameter_angstrom=diameter, low_pass_angstrom=120.0)


def test_a_micrograph_coarser_than_the_templates_is_refused(templates):
    with pytest.raises(ValueError, match="pixel_size_angstrom"):
        pick_templates(torch.randn(64, 64), 30.0, templates, None, TemplatePickSettings())
