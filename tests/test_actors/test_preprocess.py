"""One exposure from its file to extracted particles, good and bad files, and the commands."""

import json
import math

import mrcfile
import numpy as np
import pytest
import starfile
import tifffile
import torch
from typer.testing import CliRunner

from actors.preprocess.exposure import preprocess_exposure
from actors.preprocess.settings import PreprocessSettings
from models.motion.gain import MAX_GAIN_RESIDUAL
from models.optics.ctf import evaluate_ctf, frequency_grid
from stream.ingest.movie_reader import identify_file, inspect_movie
from stream.ingest.movie_writers import split_for_eer, write_eer
from stream.records.errors import ConfigurationError, InputError
from stream.records.particles import derive_exposure_id, derive_particle_uid
from stream.records.values import AcquisitionMetadata, Exposure, GainOrientation, InputKind, Optics
from stream.store.layout import OutputLayout

PIXEL = 3.0
DIAMETER = 150.0
OPTICS = Optics(voltage_kv=300.0, cs_mm=2.7, amplitude_contrast=0.1)
DEFOCUS = (15000.0, 14500.0, 25.0)
SIZE = 512
N_FRAMES = 6


def make_frames(seed=0, *, drift_px=1.5):
    """Return counting frames of moving particles in ice, the particles' centres (y, x), all under one CTF."""
    generator = torch.Generator().manual_seed(seed)
    axis = torch.arange(SIZE, dtype=torch.float32)
    scene = 0.35 * torch.randn(SIZE, SIZE, generator=generator)
    centres = [(70.0 + 75 * i + 6 * (j % 3), 66.0 + 78 * j - 5 * (i % 2)) for i in range(6) for j in range(6)]
    radius = 0.5 * DIAMETER / PIXEL
    for y, x in centres:
        r2 = (axis[:, None] - y) ** 2 + (axis[None, :] - x) ** 2
        scene += 1.2 * (1 - r2 / radius**2).clamp(min=0).sqrt()
    ky, kx = frequency_grid((SIZE, SIZE), PIXEL)
    u, v, angle = DEFOCUS
    ctf = evaluate_ctf(
        ky,
        kx,
        defocus_u_angstrom=u,
        defocus_v_angstrom=v,
        astigmatism_angle_deg=angle,
        voltage_kv=300.0,
        cs_mm=2.7,
        amplitude_contrast=0.1,
    )
    spectrum = torch.fft.rfft2(scene) * ctf
    frames = []
    for i in range(N_FRAMES):
        ramp = 2 * math.pi * drift_px * i * torch.fft.fftfreq(SIZE)[:, None]
        moved = torch.fft.irfft2(spectrum * torch.polar(torch.ones_like(ramp), -ramp), s=(SIZE, SIZE))
        frames.append(torch.poisson((6.0 * (1 - 0.25 * moved)).clamp(min=0), generator=generator))
    return torch.stack(frames).numpy(), np.array(centres)


@pytest.fixture(scope="module")
def movie_frames():
    return make_frames()


def write_tiff(path, frames):
    tifffile.imwrite(path, frames.astype(np.uint8), compression="lzw", photometric="minisblack")


def make_exposure(path, kind=InputKind.MOVIE, name="exposure_1"):
    header = inspect_movie(path)
    return Exposure(
        exposure_id=derive_exposure_id(path.name),
        name=name,
        kind=kind,
        file=identify_file(path),
        n_frames=header.n_frames,
        shape_yx=header.shape_yx,
        metadata=AcquisitionMetadata(),
    )


def make_settings(**more):
    return PreprocessSettings(
        **{
            "pixel_size_angstrom": PIXEL,
            "optics": OPTICS,
            "dose_e_per_angstrom2": 4.0,
            "particle_diameter_angstrom": DIAMETER,
            **more,
        }
    )


@pytest.fixture(scope="module")
def processed(movie_frames, tmp_path_factory):
    folder = tmp_path_factory.mktemp("preprocess")
    write_tiff(folder / "exposure_1.tiff", movie_frames[0])
    layout = OutputLayout(folder / "out")
    exposure = make_exposure(folder / "exposure_1.tiff")
    return preprocess_exposure(exposure, make_settings(), layout), layout, exposure


def test_the_result_accounts_for_every_pick(processed):
    result, _, _ = processed
    assert result.n_particles > 20
    assert result.n_picks == result.n_particles + result.n_excluded_particles


def test_the_ctf_is_that_of_the_specimen(processed):
    result, layout, _ = processed
    assert result.ctf.is_reliable
    mean = 0.5 * (result.ctf.defocus_u_angstrom + result.ctf.defocus_v_angstrom)
    assert mean == pytest.approx(0.5 * (DEFOCUS[0] + DEFOCUS[1]), rel=0.015)
    values = json.loads(layout.ctf_values("exposure_1").read_text())
    assert values["defocus_u_angstrom"] == pytest.approx(result.ctf.defocus_u_angstrom)


def test_motion_is_measured_and_written_as_corrections(processed):
    result, layout, _ = processed
    blocks = starfile.read(layout.motion("exposure_1"))
    shifts = blocks["global_shift"]
    assert shifts["rlnMicrographShiftY"].to_numpy() == pytest.approx(-1.5 * np.arange(N_FRAMES), abs=0.25)
    assert shifts["rlnMicrographShiftX"].to_numpy() == pytest.approx(np.zeros(N_FRAMES), abs=0.25)
    assert result.motion.total_motion_angstrom == pytest.approx(1.5 * PIXEL * (N_FRAMES - 1), rel=0.2)


def test_every_file_of_the_layout_is_there_and_no_temporary_one(processed):
    _, layout, _ = processed
    name = "exposure_1"
    for path in (
        layout.micrograph(name),
        layout.thumbnail(name),
        layout.motion(name),
        layout.ctf_picture(name),
        layout.ctf_values(name),
        layout.picks(name),
        layout.particles(name),
        layout.particles_table(name),
    ):
        assert path.stat().st_size > 0
    assert not list(layout.root.rglob(".tmp-*"))


def test_picks_sit_on_the_particles(processed, movie_frames):
    _, layout, _ = processed
    table = starfile.read(layout.picks("exposure_1"))
    picks = table[["rlnCoordinateY", "rlnCoordinateX"]].to_numpy()
    distance = np.linalg.norm(picks[:, None] - movie_frames[1][None], axis=-1).min(axis=1)
    assert (distance < 0.3 * DIAMETER / PIXEL).mean() > 0.85


def test_the_particle_table_points_at_the_stack_and_carries_the_ctf(processed):
    result, layout, exposure = processed
    blocks = starfile.read(layout.root / result.particles)
    particles, optics = blocks["particles"], blocks["optics"]
    with mrcfile.open(layout.particles("exposure_1")) as mrc:
        stack, voxel = np.array(mrc.data), float(mrc.voxel_size.x)
        assert mrc.is_image_stack()
    assert stack.dtype == np.float16
    assert stack.shape == (result.n_particles, result.box_size_px, result.box_size_px)
    assert voxel == pytest.approx(result.pixel_size_angstrom)
    assert list(particles["rlnImageName"])[:1] == ["000001@particles/exposure_1.mrcs"]
    assert set(particles["rlnMicrographName"]) == {"micrographs/exposure_1.mrc"}
    assert float(particles["rlnDefocusU"].iloc[0]) == pytest.approx(result.ctf.defocus_u_angstrom, rel=1e-5)
    picks = starfile.read(layout.picks("exposure_1"))
    of_first = np.flatnonzero(np.isclose(picks["rlnCoordinateX"], particles["rlnCoordinateX"].iloc[0]))[0]
    uid = derive_particle_uid(exposure.exposure_id, int(of_first))
    assert f"{uid}" in layout.particles_table("exposure_1").read_text()
    assert int(np.ravel(optics["rlnImageSize"])[0]) == result.box_size_px


def test_particles_are_white_with_a_normalised_background(processed):
    result, layout, _ = processed
    with mrcfile.open(layout.particles("exposure_1")) as mrc:
        stack = np.array(mrc.data, dtype=np.float32)
    n = result.box_size_px
    y, x = np.indices((n, n)) - n // 2
    r = np.hypot(y, x)
    radius = make_settings().boxes.background_radius_px
    outside = stack[:, r > radius]
    assert outside.mean(axis=1) == pytest.approx(np.zeros(len(stack)), abs=5e-3)
    assert outside.std(axis=1) == pytest.approx(np.ones(len(stack)), abs=5e-3)
    assert stack.mean(axis=0)[r < 0.25 * n].mean() > 0.1


def test_running_twice_leaves_the_same_result(processed, movie_frames):
    first, layout, exposure = processed
    before = mrcfile.read(layout.particles("exposure_1")).astype(np.float32)
    second = preprocess_exposure(exposure, make_settings(), layout)
    after = mrcfile.read(layout.particles("exposure_1")).astype(np.float32)
    # vector units may round differently from run to run: the tolerance is that of float16
    assert after == pytest.approx(before, abs=0.02)
    assert second.n_particles == first.n_particles
    assert second.ctf.defocus_u_angstrom == pytest.approx(first.ctf.defocus_u_angstrom, abs=0.5)


@pytest.mark.parametrize("dose", [None, 60.0])
def test_the_sum_without_dose_weights_is_kept_on_demand(movie_frames, tmp_path, dose):
    write_tiff(tmp_path / "m.tiff", movie_frames[0])
    layout = OutputLayout(tmp_path / "out")
    settings = make_settings(keeps_unweighted=True, dose_e_per_angstrom2=dose, has_local_motion=False)
    preprocess_exposure(make_exposure(tmp_path / "m.tiff"), settings, layout)
    with (
        mrcfile.open(layout.unweighted("exposure_1")) as plain,
        mrcfile.open(layout.micrograph("exposure_1")) as weighted,
    ):
        assert plain.voxel_size.x == weighted.voxel_size.x == pytest.approx(PIXEL)
        # without a dose there is nothing to weigh by
        assert np.array_equal(plain.data, weighted.data) == (dose is None)
        assert np.corrcoef(plain.data.ravel(), weighted.data.ravel())[0, 1] > 0.7


def test_gain_and_dead_pixels_are_corrected(movie_frames, tmp_path):
    generator = np.random.default_rng(0)
    gain = generator.uniform(0.8, 1.25, (SIZE, SIZE)).astype(np.float32)
    frames = movie_frames[0] * 8 / gain
    frames[:, 100:102, 200] = 0
    bad_gain = gain.copy()
    bad_gain[100:102, 200] = 0
    tifffile.imwrite(tmp_path / "m.tiff", np.rint(frames).astype(np.uint16), photometric="minisblack")
    mrcfile.write(tmp_path / "gain.mrc", bad_gain)
    layout = OutputLayout(tmp_path / "out")
    settings = make_settings(gain=tmp_path / "gain.mrc", has_local_motion=False)
    preprocess_exposure(make_exposure(tmp_path / "m.tiff"), settings, layout)
    plain = OutputLayout(tmp_path / "plain")
    write_tiff(tmp_path / "p.tiff", movie_frames[0])
    preprocess_exposure(make_exposure(tmp_path / "p.tiff"), make_settings(has_local_motion=False), plain)
    one, two = (mrcfile.read(x.micrograph("exposure_1")) for x in (layout, plain))
    assert np.corrcoef(one.ravel(), two.ravel())[0, 1] > 0.99


def test_a_gain_of_another_shape_belongs_to_the_movie(movie_frames, tmp_path):
    write_tiff(tmp_path / "m.tiff", movie_frames[0])
    mrcfile.write(tmp_path / "gain.mrc", np.ones((SIZE, SIZE - 2), dtype=np.float32))
    with pytest.raises(InputError, match="gain"):
        preprocess_exposure(
            make_exposure(tmp_path / "m.tiff"),
            make_settings(gain=tmp_path / "gain.mrc"),
            OutputLayout(tmp_path / "out"),
        )


def test_a_movie_with_a_nan_is_refused(movie_frames, tmp_path):
    frames = movie_frames[0].astype(np.float32)
    frames[3, 5, 5] = np.nan
    with pytest.warns(RuntimeWarning, match="NaN"):
        mrcfile.write(tmp_path / "m.mrc", frames)
    with pytest.raises(InputError, match=r"m\.mrc"):
        preprocess_exposure(
            make_exposure(tmp_path / "m.mrc"), make_settings(), OutputLayout(tmp_path / "out")
        )


def test_a_movie_with_an_empty_frame_is_refused(movie_frames, tmp_path):
    frames = movie_frames[0].copy()
    frames[2] = 0
    write_tiff(tmp_path / "m.tiff", frames)
    with pytest.raises(InputError, match="frame 3"):
        preprocess_exposure(
            make_exposure(tmp_path / "m.tiff"), make_settings(), OutputLayout(tmp_path / "out")
        )


def test_an_empty_micrograph_is_refused(tmp_path):
    mrcfile.write(tmp_path / "m.mrc", np.zeros((256, 256), dtype=np.float32))
    with pytest.raises(InputError, match="has signal"):
        preprocess_exposure(
            make_exposure(tmp_path / "m.mrc", InputKind.MICROGRAPH),
            make_settings(),
            OutputLayout(tmp_path / "out"),
        )


def test_an_exposure_without_rings_ends_without_particles(tmp_path):
    frames = np.random.default_rng(0).poisson(6.0, (3, SIZE, SIZE)).astype(np.uint8)
    write_tiff(tmp_path / "m.tiff", frames)
    result = preprocess_exposure(
        make_exposure(tmp_path / "m.tiff"), make_settings(), OutputLayout(tmp_path / "out")
    )
    assert not result.ctf.is_reliable
    assert result.particles is None
    assert result.n_particles == 0


def test_a_micrograph_goes_the_same_way_without_motion(movie_frames, tmp_path):
    mrcfile.write(tmp_path / "m.mrc", make_frames(drift_px=0.0)[0].sum(axis=0).astype(np.float32))
    result = preprocess_exposure(
        make_exposure(tmp_path / "m.mrc", InputKind.MICROGRAPH),
        make_settings(is_float16=False),
        OutputLayout(tmp_path / "out"),
    )
    assert result.motion is None
    assert result.n_particles > 20


def test_binning_doubles_the_pixel_size_of_the_micrograph(movie_frames, tmp_path):
    doubled = np.repeat(np.repeat(movie_frames[0], 2, axis=1), 2, axis=2)
    write_tiff(tmp_path / "m.tiff", doubled)
    layout = OutputLayout(tmp_path / "out")
    settings = make_settings(pixel_size_angstrom=PIXEL / 2, binning=2.0, has_local_motion=False)
    preprocess_exposure(make_exposure(tmp_path / "m.tiff"), settings, layout)
    with mrcfile.open(layout.micrograph("exposure_1")) as mrc:
        assert mrc.data.shape == (SIZE, SIZE)
        assert float(mrc.voxel_size.x) == pytest.approx(PIXEL)


def test_default_boxes_hold_one_and_a_half_diameters_in_at_most_96_pixels():
    settings = make_settings(pixel_size_angstrom=1.0, particle_diameter_angstrom=200.0)
    boxes = settings.boxes
    assert boxes.extract_box_px <= 98
    assert boxes.extract_box_px * settings.particle_pixel_size_angstrom >= 300.0
    assert settings.particle_pixel_size_angstrom == pytest.approx(boxes.box_size_px / boxes.extract_box_px)


def test_boxes_follow_the_pixel_size_and_the_side_that_were_asked_for():
    settings = make_settings(pixel_size_angstrom=1.1, extract_pixel_size_angstrom=3.3, box_size_px=64)
    assert settings.boxes.extract_box_px == 64
    assert settings.boxes.box_size_px == 192
    assert settings.particle_pixel_size_angstrom == pytest.approx(3.3)


def run_command(*arguments: object):
    from stream.cli import app

    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_the_command_goes_on_after_a_bad_file_and_ends_with_one(movie_frames, tmp_path):
    write_tiff(tmp_path / "good.tiff", movie_frames[0])
    (tmp_path / "bad.tiff").write_bytes(b"II*\0 this is no movie")
    result = run_command(
        "preprocess", tmp_path / "bad.tiff", tmp_path / "good.tiff", "--out", tmp_path / "out",
        "--pixel-size-angstrom", PIXEL, "--particle-diameter-angstrom", DIAMETER,
        "--dose-e-per-angstrom2", 4, "--json",
    )  # fmt: skip
    assert result.exit_code == 1
    (document,) = json.loads(result.stdout)
    assert document["movie"].endswith("good.tiff")
    assert {
        "total_motion_angstrom",
        "defocus_u_angstrom",
        "ctf_fit_angstrom",
        "ice_ratio",
        "picks",
        "seconds",
    } <= set(document)
    assert sum("bad.tiff" in line for line in result.stderr.splitlines()) == 1


def test_the_ctf_command_takes_micrographs(movie_frames, tmp_path):
    mrcfile.write(tmp_path / "m.mrc", make_frames(drift_px=0.0)[0].sum(axis=0).astype(np.float32))
    result = run_command("ctf", tmp_path / "m.mrc", "--pixel-size-angstrom", PIXEL, "--json")
    assert result.exit_code == 0
    (document,) = json.loads(result.stdout)
    assert document["defocus_u_angstrom"] == pytest.approx(DEFOCUS[0], rel=0.03)


def preprocess(path, folder, **more):
    """Preprocess a movie that has no local motion; return the result and its layout."""
    layout = OutputLayout(folder)
    settings = make_settings(has_local_motion=False, **more)
    return preprocess_exposure(make_exposure(path), settings, layout), layout


@pytest.fixture(scope="module")
def gain_movie(movie_frames, tmp_path_factory):
    """A movie whose pixels differ by 5 %, and the reference that corrects it."""
    folder = tmp_path_factory.mktemp("gain")
    gain = np.random.default_rng(4).normal(1, 0.05, (SIZE, SIZE)).astype(np.float32)
    frames = np.random.default_rng(5).poisson(movie_frames[0] / gain)
    tifffile.imwrite(folder / "m.tiff", frames.astype(np.uint8), photometric="minisblack")
    mrcfile.write(folder / "gain.mrc", gain)
    return folder


def test_the_gain_residual_tells_a_reference_that_fits_from_a_flipped_one(gain_movie, tmp_path):
    path, gain = gain_movie / "m.tiff", gain_movie / "gain.mrc"
    fits, _ = preprocess(path, tmp_path / "a", gain=gain)
    assert abs(fits.gain_residual) < MAX_GAIN_RESIDUAL / 4
    flipped, _ = preprocess(path, tmp_path / "b", gain=gain, gain_flip_x=True)
    assert flipped.gain_residual == pytest.approx(1, abs=0.1)
    none, _ = preprocess(path, tmp_path / "c")
    assert none.gain_residual is None


def test_an_orientation_that_was_found_replaces_that_of_the_settings(gain_movie, tmp_path):
    turned = preprocess_exposure(
        make_exposure(gain_movie / "m.tiff"),
        make_settings(gain=gain_movie / "gain.mrc", gain_flip_x=True, has_local_motion=False),
        OutputLayout(tmp_path),
        gain_orientation=GainOrientation(),
    )
    assert abs(turned.gain_residual) < MAX_GAIN_RESIDUAL / 4


@pytest.fixture(scope="module")
def eer_path(movie_frames, tmp_path_factory):
    path = tmp_path_factory.mktemp("eer") / "m.eer"
    write_eer(path, split_for_eer(movie_frames[0].astype(np.uint8), 16))
    return path


def test_an_eer_gives_the_micrograph_of_its_fractions(eer_path, processed, tmp_path):
    result, layout = preprocess(eer_path, tmp_path, eer_fractions=N_FRAMES)
    assert result.motion.total_motion_angstrom == pytest.approx(1.5 * PIXEL * (N_FRAMES - 1), rel=0.2)
    ours, tiff = (mrcfile.read(x.micrograph("exposure_1")) for x in (layout, processed[1]))
    assert np.corrcoef(ours.ravel(), tiff.ravel())[0, 1] > 0.97
    general = starfile.read(layout.motion("exposure_1"))["general"]
    assert (general["rlnEERGrouping"], general["rlnEERUpsampling"]) == (16, 1)


def test_an_eer_is_grouped_by_the_dose_of_a_fraction(eer_path, tmp_path):
    _, layout = preprocess(eer_path, tmp_path, eer_dose_per_fraction_e_per_angstrom2=1.0)
    assert len(starfile.read(layout.motion("exposure_1"))["global_shift"]) == 4
    with pytest.raises(InputError, match=r"needs the movie's dose.*eer_dose_per_fraction"):
        preprocess(
            eer_path, tmp_path / "b", eer_dose_per_fraction_e_per_angstrom2=1.0, dose_e_per_angstrom2=None
        )


@pytest.mark.slow
def test_up_sampled_events_give_twice_the_pixels_and_with_binning_the_same(eer_path, processed, tmp_path):
    fine, layout = preprocess(eer_path, tmp_path / "fine", eer_fractions=N_FRAMES, eer_upsampling=2)
    with mrcfile.open(layout.micrograph("exposure_1")) as mrc:
        assert mrc.data.shape == (2 * SIZE, 2 * SIZE)
        assert float(mrc.voxel_size.x) == pytest.approx(PIXEL / 2)
    assert fine.motion.total_motion_angstrom == pytest.approx(1.5 * PIXEL * (N_FRAMES - 1), rel=0.2)
    assert fine.ctf.defocus_u_angstrom == pytest.approx(DEFOCUS[0], rel=0.03)
    binned, layout = preprocess(
        eer_path, tmp_path / "binned", eer_fractions=N_FRAMES, eer_upsampling=2, binning=2.0
    )
    assert binned.pixel_size_angstrom == pytest.approx(processed[0].pixel_size_angstrom)
    ours, tiff = (mrcfile.read(x.micrograph("exposure_1")) for x in (layout, processed[1]))
    assert ours.shape == tiff.shape
    coarse = [image.reshape(SIZE // 4, 4, SIZE // 4, 4).mean(axis=(1, 3)).ravel() for image in (ours, tiff)]
    # two fine pixels have their middle a quarter of a pixel from that of one coarse one, and noise moves with it
    assert np.corrcoef(coarse)[0, 1] > 0.9


def test_a_movie_without_events_cannot_be_up_sampled(movie_frames, tmp_path):
    write_tiff(tmp_path / "m.tiff", movie_frames[0])
    with pytest.raises(InputError, match=r"eer_upsampling 2 is for EER movies alone \(found: tiff\)"):
        preprocess(tmp_path / "m.tiff", tmp_path / "out", eer_upsampling=2)


def test_a_movie_of_one_frame_is_taken_and_has_no_motion(movie_frames, tmp_path):
    counts = np.random.default_rng(0).poisson(make_frames(drift_px=0.0)[0].sum(axis=0, keepdims=True))
    tifffile.imwrite(tmp_path / "m.tiff", counts.astype(np.uint16), photometric="minisblack")
    layout = OutputLayout(tmp_path / "out")
    result = preprocess_exposure(make_exposure(tmp_path / "m.tiff"), make_settings(), layout)
    assert result.motion is None
    assert result.n_particles >= 10
    assert len(starfile.read(layout.motion("exposure_1"))["global_shift"]) == 1


def test_a_movie_without_a_dose_is_summed_without_weights(movie_frames, tmp_path):
    write_tiff(tmp_path / "m.tiff", movie_frames[0])
    result, layout = preprocess(tmp_path / "m.tiff", tmp_path / "out", dose_e_per_angstrom2=None)
    assert result.motion.early_motion_angstrom > 0
    assert "rlnMicrographDoseRate" not in starfile.read(layout.motion("exposure_1"))["general"]


def test_dead_rows_are_filled_and_a_dead_block_is_refused(movie_frames, processed, tmp_path):
    frames = movie_frames[0].copy()
    frames[:, 200:202] = 0
    frames[:, :, 77] = 0
    write_tiff(tmp_path / "m.tiff", frames)
    _, layout = preprocess(tmp_path / "m.tiff", tmp_path / "out")
    ours, whole = (mrcfile.read(x.micrograph("exposure_1")) for x in (layout, processed[1]))
    assert np.corrcoef(ours.ravel(), whole.ravel())[0, 1] > 0.97
    inner = ours[20:-20, 20:-20]
    rows = (inner.mean(axis=1) - np.median(inner.mean(axis=1))) / whole[20:-20, 20:-20].mean(axis=1).std()
    assert np.abs(rows[178:184]).max() < 4  # the dead rows do not stand out
    frames[:, :200, :200] = 0
    write_tiff(tmp_path / "n.tiff", frames)
    with pytest.raises(InputError, match=r"n\.tiff: frames: 1\d% of the pixels are dead or hot, at most 10%"):
        preprocess(tmp_path / "n.tiff", tmp_path / "out2")


def test_a_saturated_frame_is_refused(movie_frames, tmp_path):
    frames = movie_frames[0].copy()
    frames[2] = np.minimum(frames[2] * 40.0, 255)
    write_tiff(tmp_path / "m.tiff", frames)
    with pytest.raises(InputError, match=r"saturated.*frame 3"):
        preprocess(tmp_path / "m.tiff", tmp_path / "out")


def gain_command(folder, out, *more: object):
    return run_command(
        "preprocess", folder / "m.tiff", "--out", out, "--pixel-size-angstrom", PIXEL,
        "--particle-diameter-angstrom", DIAMETER, "--dose-e-per-angstrom2", 4, "--json", *more,
    )  # fmt: skip


def test_the_command_turns_the_gain_by_itself_and_says_how(gain_movie, tmp_path):
    mrcfile.write(
        tmp_path / "lying.mrc", np.ascontiguousarray(np.rot90(mrcfile.read(gain_movie / "gain.mrc")))
    )
    result = gain_command(
        gain_movie, tmp_path / "out", "--gain", tmp_path / "lying.mrc", "--gain-orientation", "auto"
    )
    assert result.exit_code == 0, result.stderr
    assert "lying.mrc fits turned by 270°" in result.stderr
    (document,) = json.loads(result.stdout)
    assert abs(document["gain_residual"]) < MAX_GAIN_RESIDUAL / 4


def test_the_command_refuses_a_gain_that_fits_in_no_way_with_all_eight_correlations(gain_movie, tmp_path):
    mrcfile.write(
        tmp_path / "g.mrc", np.random.default_rng(8).normal(1, 0.05, (SIZE, SIZE)).astype(np.float32)
    )
    result = gain_command(
        gain_movie, tmp_path / "out", "--gain", tmp_path / "g.mrc", "--gain-orientation", "auto"
    )
    assert isinstance(result.exception, ConfigurationError)
    assert str(result.exception).count("±") == 8
    result = gain_command(
        gain_movie,
        tmp_path / "out",
        "--gain",
        tmp_path / "g.mrc",
        "--gain-orientation",
        "auto",
        "--gain-flip-x",
    )
    assert "leave --gain-flip" in str(result.exception)


def test_the_command_refuses_a_pixel_size_that_contradicts_the_header(movie_frames, tmp_path):
    with mrcfile.new(tmp_path / "m.mrcs") as mrc:
        mrc.set_data(movie_frames[0].astype(np.int16))
        mrc.set_image_stack()
        mrc.voxel_size = 1.1
    result = run_command(
        "preprocess", tmp_path / "m.mrcs", "--out", tmp_path / "o", "--pixel-size-angstrom", 3.0
    )
    assert result.exit_code == 1
    assert "1.1 Å in" in result.stderr
    assert "3 Å in the configuration" in result.stderr
