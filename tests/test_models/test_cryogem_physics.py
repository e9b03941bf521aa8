"""The physics stage against equations 3, 8 and 9, its annotations and its controls; banks as files."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from models.cryogem.bank import BankFacts, SessionBank, load_bank, save_bank
from models.cryogem.greys import GreyStatistics
from models.cryogem.physics import Controls, PhysicsSettings, build_physics, image_specimen
from models.cryogem.specimen import CountDistribution
from models.cryogem.translation import add_input_noise
from models.optics.ctf_fit import Microscope
from models.simulation.imaging import CtfTruth

PIXEL = 8.0
BOX = 24
SHAPE = (160, 128)
MICROSCOPE = Microscope(voltage_kv=300.0, cs_mm=2.7, amplitude_contrast=0.1)


def blob(sigma_px: float, offset_x: float = 0.0) -> torch.Tensor:
    """A Gaussian ball, a little longer along x where it is moved."""
    line = torch.arange(BOX, dtype=torch.float32) - BOX // 2
    z, y, x = torch.meshgrid(line, line, line, indexing="ij")
    return torch.exp(-(z**2 + y**2 + (x - offset_x) ** 2) / (2 * sigma_px**2))


@pytest.fixture(scope="module")
def bank() -> SessionBank:
    facts = BankFacts(
        pixel_size_angstrom=PIXEL,
        micrograph_pixel_size_angstrom=PIXEL / 4,
        diameter_angstrom=100.0,
        symmetry="C1",
        microscope=MICROSCOPE,
        counts=CountDistribution(mean=12.0, sd=2.0),
        spacing_px=16.0,
        greys=GreyStatistics(mean=40.0, sd=5.0, skewness=0.1),
        names=("a", "b"),
        n_held_out=1,
        skipped={"not a number": 1},
        sources=("map.mrc",),
    )
    ramp = torch.linspace(0.4, 1.0, 64)[None, :].expand(64, 64)
    return SessionBank(
        facts=facts,
        volumes=torch.stack((blob(2.0), blob(3.0))),
        ctfs=torch.tensor(
            [[15200.0, 14800.0, 30.0, 0.0], [17300.0, 16700.0, 80.0, 0.0]], dtype=torch.float64
        ),
        ice_maps=torch.stack((ramp, torch.ones(64, 64))),
        micrographs=torch.randint(
            0, 255, (2, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
        ),
    )


@pytest.fixture(scope="module")
def stage(bank):
    return build_physics(bank, PhysicsSettings())


def rng(seed: int = 3) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_bank_is_the_same_after_a_round_trip(bank, tmp_path):
    save_bank(tmp_path / "bank.safetensors", bank)
    read = load_bank(tmp_path / "bank.safetensors")
    assert read.facts == bank.facts
    for name in ("volumes", "ctfs", "ice_maps", "micrographs"):
        assert torch.equal(getattr(read, name), getattr(bank, name))
    assert len(read.training_micrographs) == len(read.held_out_micrographs) == 1


def test_a_file_that_is_no_bank_is_refused(tmp_path):
    from models.weights import save_checkpoint

    save_checkpoint(tmp_path / "other.safetensors", {"a": torch.ones(2)}, {})
    with pytest.raises(ValueError, match="format None"):
        load_bank(tmp_path / "other.safetensors")


def test_imaging_is_minus_the_ctf_of_equation_8():
    ctf = CtfTruth(
        defocus_u_angstrom=16000.0,
        defocus_v_angstrom=15000.0,
        astigmatism_angle_deg=25.0,
        phase_shift_deg=0.0,
    )
    delta = torch.zeros(64, 64, dtype=torch.float64)
    delta[0, 0] = 1.0
    transfer = torch.fft.fft2(image_specimen(delta.float(), ctf, MICROSCOPE, PIXEL).double()).real
    # equations 8 and 9 written out
    w, cs, wavelength = 0.1, 2.7e7, 0.0196875
    k = torch.fft.fftfreq(64, PIXEL, dtype=torch.float64)
    ky, kx = torch.meshgrid(k, k, indexing="ij")
    theta = torch.atan2(ky, kx)
    defocus = 15500.0 + 500.0 * torch.cos(2 * (theta - np.deg2rad(25.0)))
    g2 = ky**2 + kx**2
    chi = np.pi * wavelength * g2 * (defocus - 0.5 * wavelength**2 * g2 * cs)
    expected = -((1 - w**2) ** 0.5) * torch.sin(chi) - w * torch.cos(chi)
    inner = g2 < (0.45 / PIXEL) ** 2  # at Nyquist a real image cannot hold an astigmatic phase
    assert float((transfer - expected)[inner].abs().max()) < 2e-3


def test_micrograph_is_equation_3_and_protein_is_dark(stage):
    controls = Controls(centres_yx_px=np.array([[80.0, 64.0]]), conformation=1, ice_map=0)
    field = stage.render(stage.draw_specimen(rng(), controls))
    imaging = stage.draw_imaging(rng(), controls)
    seen = stage.image(field, imaging)
    assert seen.shape == SHAPE
    ice = stage.ice_canvas(imaging, field)
    expected = image_specimen(ice * (field.projection - 1.0), imaging.ctf, MICROSCOPE, PIXEL)
    m = field.margin_px
    assert torch.allclose(seen, expected[m : m + SHAPE[0], m : m + SHAPE[1]], atol=1e-6)
    surround = seen[60:100, 44:84].median()
    assert float(seen[80, 64]) < float(surround) - 0.1


def test_ice_shows_as_brightness_and_thin_signal(stage):
    even, ramp = Controls(ice_map=-1), Controls(ice_map=0)
    field = stage.render(stage.draw_specimen(rng()))
    with_ramp = stage.image(field, stage.draw_imaging(rng(), ramp))
    without = stage.image(field, stage.draw_imaging(rng(), even))
    # amplitude contrast carries the background: brightness follows the map with slope w
    difference = (with_ramp - without)[:, 10:-10].mean(0)
    weights = torch.linspace(0.4, 1.0, SHAPE[1])[10:-10]
    slope = np.polyfit(weights.numpy(), difference.numpy(), 1)[0]
    assert 0.05 < slope < 0.15


def test_particle_lies_where_the_annotation_says(stage):
    for seed, centre in ((1, (40.3, 77.6)), (2, (100.7, 30.25))):
        controls = Controls(centres_yx_px=np.array([centre]), conformation=0)
        field = stage.render(stage.draw_specimen(rng(seed), controls))
        density = field.projection.clamp_min(0.02) - 0.02
        rows, columns = (torch.arange(n, dtype=torch.float32) - field.margin_px for n in density.shape)
        total = float(density.sum())
        assert float((density.sum(1) * rows).sum()) / total == pytest.approx(centre[0], abs=0.05)
        assert float((density.sum(0) * columns).sum()) / total == pytest.approx(centre[1], abs=0.05)


def test_mask_covers_particles_alone_and_does_not_depend_on_overlap(stage):
    lone = Controls(centres_yx_px=np.array([[60.0, 60.0]]), conformation=0)
    crowded = Controls(centres_yx_px=np.array([[60.0, 60.0], [120.0, 80.0], [120.0, 80.0]]), conformation=0)
    first = stage.render(stage.draw_specimen(rng(), lone)).mask
    second = stage.render(stage.draw_specimen(rng(), crowded)).mask
    # a Gaussian of 2 px falls to 0.1 at 2.146 σ
    assert int(first.sum()) == pytest.approx(np.pi * (2.146 * 2.0) ** 2, rel=0.08)
    assert torch.equal(first[:90], second[:90])


def test_border_and_overlap_are_flagged(stage):
    centres = np.array([[1.0, 60.0], [60.0, 60.0], [60.0, 65.0], [100.0, 30.0]])
    field = stage.render(stage.draw_specimen(rng(), Controls(centres_yx_px=centres, conformation=0)))
    assert field.is_border.tolist() == [True, False, False, False]
    assert field.is_overlapping.tolist() == [False, True, True, False]


def test_same_seed_same_frame(stage):
    a, b = (stage.render(stage.draw_specimen(rng(9))) for _ in range(2))
    assert torch.equal(a.projection, b.projection)
    assert np.array_equal(a.specimen.rotations, b.specimen.rotations)


def test_every_placement_has_a_pose_of_its_own(stage):
    rotations = np.concatenate([stage.draw_specimen(rng(i)).rotations for i in range(20)])
    assert len(np.unique(rotations.reshape(-1, 9), axis=0)) == len(rotations) > 150


def test_defocus_follows_the_sessions_ctfs(stage):
    drawn = [stage.draw_imaging(rng(i)).ctf for i in range(300)]
    means = np.array([0.5 * (c.defocus_u_angstrom + c.defocus_v_angstrom) for c in drawn])
    assert means.mean() == pytest.approx(16000.0, abs=120.0)
    assert means.std() == pytest.approx(0.959 * 1000.0, rel=0.1)
    assert means.min() >= 14000.0
    pairs = {(round(c.defocus_u_angstrom - c.defocus_v_angstrom), c.astigmatism_angle_deg) for c in drawn}
    assert pairs == {(400, 30.0), (600, 80.0)}


def test_controls_fix_pose_conformation_and_defocus(stage):
    turn = np.eye(3, dtype=np.float32)[None]
    controls = Controls(
        centres_yx_px=np.array([[60.0, 60.0], [100.0, 60.0]]),
        rotations=turn,
        conformation=1,
        defocus_angstrom=9000.0,
    )
    specimen = stage.draw_specimen(rng(), controls)
    assert specimen.conformations.tolist() == [1, 1]
    assert np.array_equal(specimen.rotations[1], np.eye(3))
    ctf = stage.draw_imaging(rng(), controls).ctf
    assert 0.5 * (ctf.defocus_u_angstrom + ctf.defocus_v_angstrom) == pytest.approx(9000.0)


def test_conformations_follow_their_weights(bank):
    weighted = build_physics(bank, PhysicsSettings(conformation_weights=(3.0, 1.0)))
    drawn = np.concatenate([weighted.draw_specimen(rng(i)).conformations for i in range(60)])
    assert drawn.mean() == pytest.approx(0.25, abs=0.06)
    with pytest.raises(ValueError, match="conformation_weights"):
        build_physics(bank, PhysicsSettings(conformation_weights=(1.0,)))


def test_noise_has_the_asked_signal_to_noise_ratio(bank, stage):
    variance = np.mean(
        [
            float(stage.image(stage.render(stage.draw_specimen(rng(i))), stage.draw_imaging(rng(i))).var())
            for i in range(20)
        ]
    )
    assert variance / stage.noise_sd**2 == pytest.approx(0.1, rel=0.35)
    louder = build_physics(bank, PhysicsSettings(snr=0.4))
    assert stage.noise_sd / louder.noise_sd == pytest.approx(2.0, rel=1e-5)


def test_particles_of_a_symmetric_target_are_folded(bank):
    facts = dataclasses.replace(bank.facts, symmetry="D2")
    symmetric = build_physics(dataclasses.replace(bank, facts=facts), PhysicsSettings())
    views = np.concatenate([symmetric.draw_specimen(rng(i)).rotations[:, 2] for i in range(30)])
    # a quarter of the sphere: D2's cell around a generic direction
    assert np.linalg.norm(views.mean(0)) > 0.4


@pytest.mark.parametrize(("key", "value"), [("mask_threshold", 1.0), ("snr", 0.0), ("background", -1.0)])
def test_settings_out_of_range_are_refused(key, value):
    with pytest.raises(ValueError, match=key):
        PhysicsSettings(**{key: value})


def test_a_frames_mean_is_known_without_imaging_it(stage):
    for ice_map in (-1, 0):
        controls = Controls(ice_map=ice_map)
        field = stage.render(stage.draw_specimen(rng(), controls))
        imaging = stage.draw_imaging(rng(), controls)
        assert stage.frame_mean(field, imaging) == pytest.approx(
            float(stage.image(field, imaging).mean()), abs=2e-3
        )


def test_parts_of_a_frame_keep_their_brightness(stage):
    """The network's input is scaled by the frame, not by the crop: thick ice stays darker."""
    field = stage.render(stage.draw_specimen(rng()))
    imaging = stage.draw_imaging(rng(), Controls(ice_map=0))
    seen, mean = stage.image(field, imaging), stage.frame_mean(field, imaging)

    def scaled(part):
        return add_input_noise(part, mean, stage, torch.Generator().manual_seed(1))

    whole = scaled(seen)
    assert float(whole.mean()) == pytest.approx(150 / 127.5 - 1, abs=0.02)
    assert float(whole.std()) == pytest.approx(40 / 127.5, rel=0.05)
    assert float(scaled(seen[:, -40:]).mean()) > float(scaled(seen[:, :40]).mean()) + 0.03


def test_without_physics_a_frame_is_the_specimens_negative(bank, stage):
    bare = build_physics(bank, PhysicsSettings(imaging="projection"))
    rendered = bare.render(bare.draw_specimen(rng()))
    imaging = bare.draw_imaging(rng())
    frame, margin = bare.image(rendered, imaging), bare.margin_px
    projection = rendered.projection[margin : margin + SHAPE[0], margin : margin + SHAPE[1]]
    assert torch.allclose(frame, 1.0 - projection)
    assert bare.frame_mean(rendered, imaging) == pytest.approx(float(frame.mean()), abs=1e-5)
    # the same specimen through ice and CTF is another image
    assert float((stage.image(rendered, imaging) - frame).abs().max()) > 0.1
    assert bare.noise_sd == pytest.approx(float(frame.std()) / 0.1**0.5, rel=0.3)
