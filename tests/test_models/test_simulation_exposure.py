"""Exposures: same seed same bytes, motion, CTF zeros, damage, poses, camera."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from models.fourier.rotations import euler_to_matrix
from models.fourier.transforms import shift_phases
from models.optics.ctf import evaluate_ctf, frequency_grid
from models.simulation.camera import build_camera, camera_mtf, draw_poisson
from models.simulation.exposure import (
    VirtualMicroscope,
    damage_envelope,
    simulate_exposure,
    simulate_micrograph,
)
from models.simulation.imaging import interaction_constant_rad_per_v_angstrom
from models.simulation.motion import draw_motion
from models.simulation.phantom import build_phantom
from models.simulation.settings import MicroscopeSettings, SessionSettings, SpecimenSettings
from models.simulation.specimen import Junk, JunkKind, draw_poses, draw_specimen, draw_views, place_particles
from models.simulation.structure import ICE_MEAN_POTENTIAL_V, density_from_atoms

PIXEL = 3.0


@pytest.fixture(scope="module")
def volume() -> torch.Tensor:
    phantom = build_phantom(2, mass_kda=40)
    return density_from_atoms(phantom, 48, PIXEL, solvent_potential_v=ICE_MEAN_POTENTIAL_V)


def microscope(
    volume: torch.Tensor, *, seed: int = 5, specimen: dict | None = None, **values
) -> VirtualMicroscope:
    optics = {
        "shape_yx_px": (192, 224),
        "pixel_size_angstrom": PIXEL,
        "n_frames": 5,
        "dose_e_per_angstrom2": 30.0,
        "defocus_um": (1.0, 2.0),
        "defect_fraction": 2e-4,
    } | values
    crowd = {"particles_per_exposure": 8.0, "junk_fraction": 0.3} | (specimen or {})
    settings = SessionSettings(
        specimen=SpecimenSettings(**crowd), microscope=MicroscopeSettings(**optics), seed=seed
    )
    return VirtualMicroscope(volume, 110.0, settings)


def test_same_seed_gives_the_same_bytes_in_any_order(volume):
    first, again = microscope(volume), microscope(volume)
    forward = {i: np.stack(list(first.expose(i).frames())).tobytes() for i in (0, 1)}
    later = again.expose(1)
    assert later.frame(4).tobytes() == forward[1][-later.frame(4).nbytes :]
    assert np.stack(list(later.frames())).tobytes() == forward[1]
    assert np.stack(list(again.expose(0).frames())).tobytes() == forward[0]
    assert forward[0] != forward[1]
    assert np.array_equal(first.gain, again.gain)
    other = microscope(volume, seed=6).expose(0)
    assert np.stack(list(other.frames())).tobytes() != forward[0]


def test_truth_and_picture_agree_on_where_particles_are(volume):
    quiet = {"junk_fraction": 0.0, "ice_granularity": 0.0, "particles_per_exposure": 6.0}
    scope = microscope(volume, specimen=quiet, dose_e_per_angstrom2=400.0, defocus_um=(2.0, 2.0))
    image, truth = simulate_micrograph(scope, 0)
    assert truth.n_particles >= 3
    smooth = torch.fft.irfft2(
        torch.fft.rfft2(torch.from_numpy(image))
        * torch.exp(-((torch.hypot(*frequency_grid((192, 224), PIXEL)) * 60.0) ** 2)),
        s=(192, 224),
    ).numpy()
    away = np.ones(image.shape, dtype=bool)
    yy, xx = np.mgrid[:192, :224]
    at = []
    for y, x in truth.coordinates_yx_px:
        near = np.hypot(yy - y, xx - x)
        away &= near > 35
        at.append(smooth[near < 4].mean())
    # Raw micrographs show protein dark.
    assert (np.array(at) < smooth[away].mean() - 2.0 * smooth[away].std()).all()


def test_frames_move_as_the_truth_says(volume):
    scope = microscope(
        volume,
        specimen={"junk_fraction": 0.0},
        dose_e_per_angstrom2=30.0,
        local_motion_angstrom=0.0,
        motion_angstrom=20.0,
        defect_fraction=0.0,
        has_gain=False,
    )
    exposure = simulate_exposure(scope, 1)
    spectra = torch.fft.rfft2(torch.stack([exposure.expected_frame(f) for f in (0, 4)]))
    weight = torch.exp(-((torch.hypot(*frequency_grid((192, 224), 1.0)) / 0.12) ** 2))
    weight[0, 0] = 0.0
    displacement = torch.from_numpy(exposure.truth.motion.global_yx_px[4]).float()
    assert float(displacement.norm()) > 2.0
    cross = spectra[1] * spectra[0].conj() * weight
    best, runner_up = (
        float((cross * shift_phases((192, 224), d).conj()).real.sum())
        for d in (displacement, displacement + torch.tensor([0.7, 0.0]))
    )
    assert best > runner_up
    line = torch.linspace(-1.0, 1.0, 21)
    scores = [
        [
            float((cross * shift_phases((192, 224), displacement + torch.tensor([a, b])).conj()).real.sum())
            for b in line
        ]
        for a in line
    ]
    row, column = np.unravel_index(np.argmax(scores), (21, 21))
    assert abs(float(line[row])) <= 0.2
    assert abs(float(line[column])) <= 0.2


def test_tiles_without_local_motion_equal_one_shift_of_the_whole(volume):
    scope = microscope(volume, local_motion_angstrom=0.0, motion_angstrom=15.0)
    exposure = scope.expose(0)
    still = exposure._exit_image
    shape = tuple(still.contrast.shape)
    k = torch.hypot(*frequency_grid(shape, PIXEL))
    dose = 3.5 * 30.0 / 5
    factor = camera_mtf(shape) * damage_envelope(k, dose, 300.0)
    factor = factor * shift_phases(shape, torch.from_numpy(exposure.truth.motion.global_yx_px[3]).float())
    whole = torch.fft.irfft2(torch.fft.rfft2(still.contrast) * factor, s=shape)
    m = still.margin_px
    tiled = exposure._tiles.render(3, exposure.truth.motion)
    difference = tiled - whole[m : m + 192, m : m + 224]
    assert float(difference.abs().max()) < 0.02 * float(whole.std())


def test_local_motion_starts_at_zero_and_settles_with_dose():
    settings = MicroscopeSettings(n_frames=40, dose_e_per_angstrom2=40.0, local_motion_angstrom=2.0)
    motion = draw_motion(settings, np.random.default_rng(3))
    local = motion.local_yx_px([100.0, 900.0], [100.0, 900.0])
    assert local.shape == (40, 2, 2)
    assert np.allclose(local[0], 0.0)
    assert np.allclose(motion.global_yx_px[0], 0.0)
    steps = np.linalg.norm(np.diff(local, axis=0), axis=-1)
    assert (steps[0] > 5 * steps[-1]).all()
    # Magnitudes of the real data: RELION's paths over EMPIAR-10204 are 9-17 Å long in all.
    paths = []
    for seed in range(20):
        drawn = draw_motion(settings, np.random.default_rng(seed))
        step_lengths = np.linalg.norm(np.diff(drawn.global_yx_px, axis=0), axis=1)
        paths.append(step_lengths.sum() * settings.pixel_size_angstrom)
    assert 6.0 < float(np.median(paths)) < 25.0


def test_power_spectrum_has_its_zeros_where_the_ctf_has():
    blank = torch.zeros(16, 16, 16)
    size, pixel = 384, 2.0
    scope = VirtualMicroscope(
        blank,
        30.0,
        SessionSettings(
            specimen=SpecimenSettings(
                particles_per_exposure=0.0,
                junk_fraction=0.0,
                ice_granularity=3.0,
                ice_thickness_angstrom=(80.0, 80.0),
                ice_gradient=0.0,
            ),
            microscope=MicroscopeSettings(
                shape_yx_px=(size, size),
                pixel_size_angstrom=pixel,
                defocus_um=(1.2, 1.2),
                astigmatism_angstrom=1500.0,
                dose_e_per_angstrom2=30.0,
                n_frames=1,
                b_factor_angstrom2=0.0,
            ),
        ),
    )
    # The still picture, before damage and counting.
    exposure = scope.expose(0)
    still = exposure._exit_image
    inside = still.contrast[still.margin_px :, still.margin_px :][:size, :size]
    hann = torch.hann_window(size)[:, None] * torch.hann_window(size)[None, :]
    power = torch.fft.rfft2(inside * hann).abs().square()
    ky, kx = frequency_grid((size, size), pixel)
    k = torch.hypot(ky, kx)
    ctf = exposure.truth.ctf
    curve = evaluate_ctf(
        ky,
        kx,
        defocus_u_angstrom=ctf.defocus_u_angstrom,
        defocus_v_angstrom=ctf.defocus_v_angstrom,
        astigmatism_angle_deg=ctf.astigmatism_angle_deg,
        voltage_kv=300.0,
        cs_mm=2.7,
        amplitude_contrast=0.1,
    ).abs()
    band = (k > 1 / 40) & (k < 1 / 7)
    dark, bright = power[band & (curve < 0.1)], power[band & (curve > 0.95)]
    assert float(dark.mean()) < 0.1 * float(bright.mean())
    turned = dataclasses.replace(ctf, astigmatism_angle_deg=ctf.astigmatism_angle_deg + 90.0)
    wrong = evaluate_ctf(
        ky,
        kx,
        defocus_u_angstrom=turned.defocus_u_angstrom,
        defocus_v_angstrom=turned.defocus_v_angstrom,
        astigmatism_angle_deg=turned.astigmatism_angle_deg,
        voltage_kv=300.0,
        cs_mm=2.7,
        amplitude_contrast=0.1,
    ).abs()
    assert float(power[band & (wrong < 0.1)].mean()) > 2.0 * float(dark.mean())


def test_damage_follows_grant_and_grigorieff():
    k = torch.tensor([1 / 3.0])
    critical = 0.245 * (1 / 3.0) ** -1.665 + 2.81
    assert float(damage_envelope(k, critical, 300.0)) == pytest.approx(math.exp(-0.5), rel=1e-5)
    assert float(damage_envelope(k, 0.8 * critical, 200.0)) == pytest.approx(math.exp(-0.5), rel=1e-5)
    assert float(damage_envelope(torch.zeros(1), 40.0, 300.0)) == pytest.approx(1.0, abs=1e-3)


def test_interaction_constant_has_its_tabulated_value():
    assert interaction_constant_rad_per_v_angstrom(300.0) == pytest.approx(6.526e-4, rel=2e-3)
    assert interaction_constant_rad_per_v_angstrom(200.0) == pytest.approx(7.288e-4, rel=2e-3)


def test_gain_reference_restores_even_counts(volume):
    scope = microscope(
        volume,
        specimen={
            "particles_per_exposure": 0.0,
            "junk_fraction": 0.0,
            "ice_granularity": 0.0,
            "ice_gradient": 0.0,
        },
        dose_e_per_angstrom2=400.0,
        n_frames=40,
        defect_fraction=1e-3,
    )
    raw = np.stack(list(scope.expose(0).frames())).astype(np.float64).sum(0)
    dead, hot = scope.gain == 0.0, raw > 5 * np.median(raw)
    assert (raw[dead] == 0).all()
    assert dead.sum() >= 15
    assert hot.sum() >= 15
    good = ~dead & ~hot
    corrected = (raw * scope.gain)[good]
    shot = math.sqrt(corrected.mean())
    assert corrected.std() == pytest.approx(shot, rel=0.05)
    assert raw[good].std() > 1.5 * shot


def test_counts_are_poisson():
    settings = MicroscopeSettings(shape_yx_px=(200, 200), has_gain=False, defect_fraction=0.0)
    camera = build_camera(settings, np.random.default_rng(0))
    counts = camera.expose(np.full((200, 200), 1.7, dtype=np.float32), np.random.default_rng(1))
    assert counts.dtype == np.uint8
    assert counts.mean() == pytest.approx(1.7, rel=0.02)
    assert counts.var() == pytest.approx(1.7, rel=0.03)
    bright = camera.expose(np.full((200, 200), 300.0, dtype=np.float32), np.random.default_rng(1))
    assert bright.dtype == np.uint16


@pytest.mark.parametrize("mean", [0.3, 2.0, 40.0, 900.0])
def test_fast_poisson_draws_follow_the_distribution_of_uneven_images(mean):
    rng = np.random.default_rng(8)
    expected = (mean * rng.uniform(0.7, 1.3, (400, 400))).astype(np.float32)
    expected[:4] = 0.0
    expected[4:8] = 5.0 * mean
    counts = draw_poisson(expected, rng)
    assert (counts[:4] == 0).all()
    assert counts[4:8].mean() == pytest.approx(5.0 * mean, rel=0.05)
    pull = (counts - expected)[8:] / np.sqrt(expected[8:])
    assert pull.mean() == pytest.approx(0.0, abs=0.012)
    assert pull.var() == pytest.approx(1.0, rel=0.03)
    # The third moment of a Poisson variable is its mean, too.
    third = ((counts - expected)[8:] ** 3).mean() / expected[8:].mean()
    assert third == pytest.approx(1.0, rel=0.1 + 0.25 * math.sqrt(mean))


def second_moment(euler_deg: np.ndarray) -> np.ndarray:
    views = euler_to_matrix(torch.from_numpy(euler_deg))[:, 2].numpy()
    return np.linalg.eigvalsh(views.T @ views / len(views))


def test_uniform_and_preferred_view_distributions():
    rng = np.random.default_rng(0)
    uniform = draw_poses(6000, SpecimenSettings(), draw_views(2, rng), rng)
    assert np.allclose(second_moment(uniform), 1 / 3, atol=0.02)
    view = np.array([[0.6, 0.0, 0.8]])
    settings = SpecimenSettings(preferred_fraction=0.8, preferred_spread_deg=8.0, n_preferred_views=1)
    preferred = draw_poses(6000, settings, view, rng)
    views = euler_to_matrix(torch.from_numpy(preferred))[:, 2].numpy()
    near = (views @ view[0] > math.cos(math.radians(25.0))).mean()
    assert near == pytest.approx(0.8 + 0.2 * 0.047, abs=0.03)
    assert second_moment(preferred)[2] > 0.7
    # The in-plane angle is free whatever the view.
    assert np.histogram(preferred[:, 2], bins=6, range=(-180, 180))[0].min() > 800


def test_particles_keep_their_distance_and_stay_off_junk():
    junk = (
        Junk(kind=JunkKind.CARBON, y_px=200.0, x_px=300.0, radius_px=100.0, angle_deg=0.0),
        Junk(kind=JunkKind.ICE_CRYSTAL, y_px=60.0, x_px=60.0, radius_px=30.0, angle_deg=0.0),
    )
    placed = place_particles(
        200, shape_yx_px=(400, 400), margin_px=10.0, spacing_px=30.0, junk=junk, rng=np.random.default_rng(0)
    )
    assert len(placed) > 50
    gaps = np.linalg.norm(placed[:, None] - placed[None], axis=-1) + 1e9 * np.eye(len(placed))
    assert gaps.min() >= 30.0
    # The carbon's inside lies along its normal, here towards larger x.
    assert placed[:, 1].max() <= 300.0 - 15.0 + 1e-6
    assert (np.hypot(placed[:, 0] - 60.0, placed[:, 1] - 60.0) >= 45.0 - 1e-6).all()


def test_heights_fall_on_layers_within_the_ice():
    specimen = draw_specimen(
        SpecimenSettings(particles_per_exposure=40.0, ice_thickness_angstrom=(500.0, 500.0)),
        shape_yx_px=(512, 512),
        pixel_size_angstrom=2.0,
        diameter_angstrom=100.0,
        session_views=np.array([[0.0, 0.0, 1.0]]),
        rng=np.random.default_rng(2),
    )
    assert np.allclose(specimen.height_angstrom % 40.0, 0.0)
    assert np.abs(specimen.height_angstrom).max() <= 200.0
    assert len(np.unique(specimen.height_angstrom)) > 4


@pytest.mark.parametrize(
    "values",
    [{"defocus_um": (2.0, 1.0)}, {"voltage_kv": 3.0}, {"n_frames": 0}, {"pixel_size_angstrom": float("nan")}],
)
def test_settings_out_of_range_are_named(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        MicroscopeSettings(**values)
