"""Importing particles from real and made stacks."""

import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import starfile

from actors.particle_import import import_particles, is_normalised
from models.picking.extract import background_mask
from stream.ingest.source import ExposureSource, SourceSettings
from stream.ingest.validation import ExpectedAcquisition, validate_particle_file
from stream.records.errors import InputError
from stream.records.particles import derive_particle_uid
from stream.records.values import InputKind, Optics
from stream.sinks.relion_star import read_particles_star
from stream.store.layout import OutputLayout

OPTICS = Optics(voltage_kv=300.0, cs_mm=2.7, amplitude_contrast=0.1)


@dataclass(frozen=True)
class Settings:
    particle_diameter_angstrom: float = 60.0
    optics: Optics = OPTICS
    pixel_size_angstrom: float = 9.9


def make_set(folder: Path, images: np.ndarray, *, micrographs: list[str] | None = None) -> Path:
    (folder / "stacks").mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings(), mrcfile.new(folder / "stacks/a.mrcs") as mrc:
        warnings.simplefilter("ignore")  # mrcfile warns of the NaN that some tests want
        mrc.set_data(images)
        mrc.set_image_stack()
        mrc.voxel_size = 3.0
    names = micrographs or ["m1.mrc"] * len(images)
    lines = "\n".join(
        f"{i + 1:06d}@stacks/a.mrcs {name} {10 * i} {20 * i} {10000 + i} {9000 + i} 30 1"
        for i, name in enumerate(names)
    )
    star = folder / "particles.star"
    star.write_text(
        "data_optics\n\nloop_\n_rlnOpticsGroup #1\n_rlnOpticsGroupName #2\n_rlnVoltage #3\n"
        "_rlnSphericalAberration #4\n_rlnAmplitudeContrast #5\n_rlnImagePixelSize #6\n"
        "1 og1 300 2.7 0.1 3.0\n2 og2 300 2.7 0.1 3.0\n\n\n"
        "data_particles\n\nloop_\n_rlnImageName #1\n_rlnMicrographName #2\n_rlnCoordinateX #3\n_rlnCoordinateY #4\n"
        "_rlnDefocusU #5\n_rlnDefocusV #6\n_rlnDefocusAngle #7\n_rlnOpticsGroup #8\n" + lines + "\n"
    )
    return star


def exposures_of(star: Path):
    return validate_particle_file(star, star.name, ExpectedAcquisition(), root=None)


def test_import_writes_stack_and_table_in_the_order_of_the_rows(tmp_path):
    rng = np.random.default_rng(1)
    images = rng.normal(size=(6, 32, 32)).astype(np.float32)
    star = make_set(tmp_path / "in", images, micrographs=["m1.mrc", "m2.mrc"] * 3)
    layout = OutputLayout(tmp_path / "out")
    first, second = exposures_of(star)
    result = import_particles(second, star, Settings(), layout)
    assert (result.n_picks, result.n_particles, result.n_excluded_particles) == (3, 3, 0)
    assert result.micrograph is None
    assert (first.name, second.name, second.n_frames) == ("m1", "m2", 3)
    with mrcfile.open(layout.particles("m2")) as mrc:
        np.testing.assert_array_equal(mrc.data, images[1::2])
        assert float(mrc.voxel_size.x) == pytest.approx(3.0)
    table = read_particles_star(layout.particles_table("m2")).particles
    assert table["rlnDefocusU"].tolist() == [10001, 10003, 10005]
    assert table["rlnImageName"].tolist() == [f"{i:06d}@particles/m2.mrcs" for i in (1, 2, 3)]
    assert table["icestreamUid"].tolist() == [derive_particle_uid(second.exposure_id, i) for i in range(3)]


def test_nan_and_constant_images_are_excluded_and_shift_no_other_uid(tmp_path):
    images = np.random.default_rng(2).normal(size=(5, 32, 32)).astype(np.float32)
    images[1, 3, 3] = np.nan
    images[3] = 7
    star = make_set(tmp_path / "in", images)
    layout = OutputLayout(tmp_path / "out")
    (exposure,) = exposures_of(star)
    result = import_particles(exposure, star.parent, Settings(), layout)
    assert (result.n_particles, result.n_excluded_particles) == (3, 2)
    uids = read_particles_star(layout.particles_table("m1")).particles["icestreamUid"].tolist()
    assert uids == [derive_particle_uid(exposure.exposure_id, row) for row in (0, 2, 4)]


def test_raw_counts_are_normalised_and_normalised_stacks_are_left_alone(tmp_path):
    rng = np.random.default_rng(3)
    raw = (100 + 15 * rng.normal(size=(4, 32, 32))).astype(np.float32)
    star = make_set(tmp_path / "in", raw)
    layout = OutputLayout(tmp_path / "out")
    (exposure,) = exposures_of(star)
    import_particles(exposure, star.parent, Settings(), layout)
    background = background_mask(32, 0.375 * 32).numpy()
    with mrcfile.open(layout.particles("m1")) as mrc:
        values = mrc.data[:, background]
    np.testing.assert_allclose(values.mean(axis=1), 0, atol=1e-3)
    np.testing.assert_allclose(values.std(axis=1), 1, atol=1e-3)
    assert not is_normalised(raw, background)
    import_particles(exposure, star.parent, Settings(), layout, normalization="never")
    with mrcfile.open(layout.particles("m1")) as mrc:
        np.testing.assert_array_equal(mrc.data, raw)


def test_dark_particles_of_cryosparc_become_white_and_keep_their_uids(tmp_path):
    images = np.random.default_rng(4).normal(size=(3, 32, 32)).astype(np.float32)
    make_set(tmp_path, images)
    fields = [("uid", "<u8"), ("blob/path", "S20"), ("blob/idx", "<u4"), ("blob/psize_A", "<f4")]
    fields += [("blob/sign", "<f4"), ("location/micrograph_path", "S20")]
    fields += [
        (f"ctf/{n}", "<f4") for n in ("accel_kv", "cs_mm", "amp_contrast", "df1_A", "df2_A", "df_angle_rad")
    ]
    rows = np.zeros(3, dtype=fields)
    rows["uid"] = [2**64 - 1, 7, 9]
    rows["blob/path"] = b">stacks/a.mrcs"
    rows["blob/idx"] = [2, 1, 0]
    rows["blob/sign"] = -1
    rows["blob/psize_A"] = 3
    rows["location/micrograph_path"] = b"J1/mic.mrc"
    rows["ctf/accel_kv"], rows["ctf/df1_A"], rows["ctf/df_angle_rad"] = 300, 12000, np.pi / 6
    with (tmp_path / "p.cs").open("wb") as stream:
        np.save(stream, rows)
    layout = OutputLayout(tmp_path / "out")
    (exposure,) = exposures_of(tmp_path / "p.cs")
    import_particles(exposure, tmp_path / "p.cs", Settings(), layout)
    with mrcfile.open(layout.particles("mic")) as mrc:
        np.testing.assert_array_equal(mrc.data, -images[::-1])
    table = read_particles_star(layout.particles_table("mic")).particles
    assert table["icestreamUid"].tolist() == [2**64 - 1, 7, 9]
    assert table["rlnDefocusAngle"].tolist() == pytest.approx([30, 30, 30], abs=1e-4)


def test_a_bare_stack_can_be_imported_for_scoring_with_the_optics_of_the_settings(tmp_path):
    make_set(tmp_path, np.random.default_rng(6).normal(size=(4, 32, 32)).astype(np.float32))
    stack = tmp_path / "stacks/a.mrcs"
    (exposure,) = validate_particle_file(
        stack, stack.name, ExpectedAcquisition(), root=None, require_ctf=False
    )
    layout = OutputLayout(tmp_path / "out")
    result = import_particles(exposure, stack, Settings(), layout)
    assert (exposure.name, result.n_particles, result.pixel_size_angstrom) == ("a_0001", 4, 3.0)
    star = read_particles_star(layout.particles_table("a_0001"))
    assert star.optics["rlnVoltage"].tolist() == [300]
    assert star.particles["rlnDefocusU"].isna().all()


def test_a_share_without_a_usable_image_names_the_exposure(tmp_path):
    star = make_set(tmp_path / "in", np.zeros((2, 32, 32), dtype=np.float32))
    (exposure,) = exposures_of(star)
    with pytest.raises(InputError, match="m1: a micrograph's share"):
        import_particles(exposure, star.parent, Settings(), OutputLayout(tmp_path / "out"))


def test_mixed_optics_within_one_micrograph_are_refused(tmp_path):
    star = make_set(tmp_path / "in", np.random.default_rng(5).normal(size=(2, 32, 32)).astype(np.float32))
    text = star.read_text().replace("2 og2 300 2.7 0.1 3.0", "2 og2 300 2.7 0.1 3.3")
    star.write_text(text.replace("9001 30 1", "9001 30 2"))
    (exposure,) = exposures_of(star)
    with pytest.raises(InputError, match=r"one micrograph has one pixel_size_angstrom \(found: \[3.0, 3.3\]"):
        import_particles(exposure, star.parent, Settings(), OutputLayout(tmp_path / "out"))


DATA = Path(os.environ.get("ICESTREAM_TEST_DATA", Path(__file__).parents[2] / "../shared/data")).resolve()


@pytest.mark.realdata
@pytest.mark.skipif(not DATA.is_dir(), reason=f"no real data at {DATA}")
def test_real_particles_pass_through_unchanged_as_float16(tmp_path):
    star = DATA / "particles/betagal_empiar10204/particles.star"
    source = ExposureSource(SourceSettings(root=star, kind=InputKind.PARTICLES, voltage_kv=200, settle_s=0))
    exposures = []
    while not source.is_quiet:
        exposures += [event.exposure for event in source.poll(0.0)]
    source.close()
    assert len(exposures) == 10
    assert sum(e.n_frames for e in exposures) == 2374
    layout = OutputLayout(tmp_path)
    result = import_particles(exposures[3], star, Settings(180.0), layout)
    theirs = mrcfile.read(star.parent / "stacks" / f"{exposures[3].name}.mrcs")
    ours = mrcfile.read(layout.particles(exposures[3].name))
    assert ours.dtype == np.float16
    np.testing.assert_array_equal(ours, theirs)
    assert result.n_particles == exposures[3].n_frames
    written = starfile.read(layout.particles_table(exposures[3].name))["particles"]
    assert len(written) == result.n_particles
