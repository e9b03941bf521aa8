"""EPU XML and SerialEM mdoc, made and real."""

import os
import shutil
import tarfile
from pathlib import Path

import pytest

from stream.ingest.metadata import (
    check_against_configuration,
    find_sidecar,
    parse_epu_xml,
    read_acquisition_metadata,
    read_sidecar,
)
from stream.records.errors import ConfigurationError, InputError
from stream.records.values import AcquisitionMetadata

DATA = Path(os.environ.get("ICESTREAM_TEST_DATA", Path(__file__).parents[2] / "../shared/data")).resolve()
real = pytest.mark.skipif(not DATA.is_dir(), reason=f"no real data at {DATA}")

MDOC = """T = SerialEM: somewhere
Voltage = 300

[FrameSet = 0]
ExposureDose = 0
PixelSpacing = 0.834
ImageShift = 1.25004 -0.00001
NumSubFrames = 40
DateTime = 06-Dec-20  18:55:58
"""


@pytest.mark.parametrize(
    ("movie", "sidecar"),
    [
        ("FoilHole_1_Data_2_fractions.tiff", "FoilHole_1_Data_2.xml"),
        ("FoilHole_1_Data_2_Fractions.mrc", "FoilHole_1_Data_2.xml"),
        ("FoilHole_1_Data_2_EER.eer", "FoilHole_1_Data_2.xml"),
        ("a.tif", "a.xml"),
        ("a.tif", "a.tif.mdoc"),
        ("a.tif", "a.mdoc"),
    ],
)
def test_metadata_are_found_beside_the_movie_by_name(tmp_path, movie, sidecar):
    (tmp_path / sidecar).touch()
    assert find_sidecar(tmp_path / movie) == tmp_path / sidecar


def test_a_movie_without_metadata_has_none_of_them(tmp_path):
    assert read_acquisition_metadata(tmp_path / "a.tif") == AcquisitionMetadata()


def test_an_mdoc_gives_pixel_size_voltage_frames_and_beam_shift(tmp_path):
    (tmp_path / "a.tif.mdoc").write_text(MDOC)
    sidecar = read_sidecar(tmp_path / "a.tif")
    found = sidecar.metadata
    assert (found.pixel_size_angstrom, found.voltage_kv, sidecar.n_frames) == (0.834, 300, 40)
    assert found.beam_shift_group == "1.2500,0.0000"
    assert found.dose_e_per_angstrom2 is None  # SerialEM's 0 is "not calibrated"
    assert found.acquired_at == "06-Dec-20  18:55:58"


def test_broken_metadata_name_file_and_value(tmp_path):
    (tmp_path / "a.mdoc").write_text(MDOC.replace("0.834", "unknown"))
    with pytest.raises(InputError, match=r"a\.mdoc: PixelSpacing is a number \(found: unknown\)"):
        read_sidecar(tmp_path / "a.tif")
    (tmp_path / "a.mdoc").write_text(MDOC + "[FrameSet = 1]\n")
    with pytest.raises(InputError, match=r"2 sections"):
        read_sidecar(tmp_path / "a.tif")
    (tmp_path / "b.xml").write_text("<MicroscopeImage><Spati")
    with pytest.raises(InputError, match=r"b\.xml: an EPU metadata file is complete XML"):
        read_sidecar(tmp_path / "b.tif")
    (tmp_path / "c.xml").write_text("<Acquisition/>")
    with pytest.raises(InputError, match=r"holds a MicroscopeImage.*Acquisition"):
        read_sidecar(tmp_path / "c.tif")


EPU = (
    "<MicroscopeImage><SpatialScale><pixelSize><x><numericValue>{pixel}</numericValue></x></pixelSize>"
    "</SpatialScale><CustomData><KeyValueOfstring><Key>Dose</Key><Value>{dose}</Value></KeyValueOfstring>"
    "</CustomData></MicroscopeImage>"
)


def test_a_dose_or_pixel_size_of_zero_counts_as_not_measured(tmp_path):
    (tmp_path / "a.xml").write_text(EPU.format(pixel="0", dose="0"))
    found = read_sidecar(tmp_path / "a.tif").metadata
    assert found.dose_e_per_angstrom2 is None
    assert found.pixel_size_angstrom is None
    (tmp_path / "a.xml").write_text(EPU.format(pixel="8.5e-11", dose="4.2e21"))
    found = read_sidecar(tmp_path / "a.tif").metadata
    assert found.dose_e_per_angstrom2 == pytest.approx(42)
    assert found.pixel_size_angstrom == pytest.approx(0.85)


@pytest.mark.parametrize(
    ("pixel", "dose", "message"),
    [
        ("8.5e-11", "-3e21", r"a\.xml: Dose is not negative \(found: -3e\+21\)"),
        ("8.5e-11", "NaN", r"a\.xml: Dose is a finite number \(found: NaN\)"),
        ("inf", "3e21", r"a\.xml: x is a finite number \(found: inf\)"),
    ],
)
def test_a_dose_or_pixel_size_that_cannot_be_is_refused(tmp_path, pixel, dose, message):
    (tmp_path / "a.xml").write_text(EPU.format(pixel=pixel, dose=dose))
    with pytest.raises(InputError, match=message):
        read_sidecar(tmp_path / "a.tif")


def test_disagreement_names_both_values_and_both_sources():
    metadata = AcquisitionMetadata(pixel_size_angstrom=0.85, voltage_kv=300, source="a.xml")
    check_against_configuration(
        metadata, "a.tif", pixel_size_angstrom=0.86, voltage_kv=300, dose_e_per_angstrom2=50
    )
    with pytest.raises(ConfigurationError) as caught:
        check_against_configuration(metadata, "a.tif", pixel_size_angstrom=1.1)
    assert str(caught.value) == (
        "a.tif: pixel size agrees with the configuration within 2% "
        "(found: 0.85 Å in a.xml, 1.1 Å in the configuration)"
    )
    with pytest.raises(ConfigurationError, match=r"300 kV in a.xml, 200 kV in the configuration"):
        check_against_configuration(metadata, "a.tif", voltage_kv=200)
    with pytest.raises(ConfigurationError, match=r"header.*0.5 Å in a.tif"):
        check_against_configuration(
            metadata, "a.tif", header_pixel_size_angstrom=0.5, pixel_size_angstrom=0.85
        )


def test_a_factor_of_two_passes_only_where_super_resolution_is_stated():
    metadata = AcquisitionMetadata(pixel_size_angstrom=0.85)
    for configured in (0.425, 1.7):
        check_against_configuration(metadata, "a", pixel_size_angstrom=configured, allow_factor_two=True)
        with pytest.raises(ConfigurationError):
            check_against_configuration(metadata, "a", pixel_size_angstrom=configured)
    with pytest.raises(ConfigurationError):
        check_against_configuration(metadata, "a", pixel_size_angstrom=0.6, allow_factor_two=True)


@pytest.mark.realdata
@real
@pytest.mark.parametrize(
    ("name", "movie", "pixel_size", "dose", "shift", "n_frames"),
    [
        ("epu_2022_FoilHole_5850127.xml", "m_fractions.tiff", 1.28520, 63.993, "0.2477,-0.0372", 70),
        ("epu_2024_FoilHole_31936319_a.xml", "m_EER.eer", 0.415015, 25.714, "-0.0119,0.0040", None),
        ("epu_falcon3_FoilHole_5330585.xml", "m_Fractions.mrc", 0.870768, 30.431, "0.0080,-0.0190", 22),
    ],
)
def test_real_epu_metadata(tmp_path, name, movie, pixel_size, dose, shift, n_frames):
    shutil.copyfile(DATA / "metadata" / name, tmp_path / "m.xml")
    sidecar = read_sidecar(tmp_path / movie)
    found = sidecar.metadata
    assert found.pixel_size_angstrom == pytest.approx(pixel_size, rel=1e-4)
    assert found.dose_e_per_angstrom2 == pytest.approx(dose, rel=1e-3)
    assert found.voltage_kv == 300
    assert found.beam_shift_group == shift
    assert found.acquired_at is not None
    assert sidecar.n_frames == n_frames


@pytest.mark.realdata
@real
def test_all_189_exposures_of_a_real_session_are_read_and_fall_into_beam_shift_groups():
    groups, n_read = set(), 0
    with tarfile.open(DATA / "metadata/epu_afis_falcon3_189exposures_xml.tar.gz") as archive:
        for member in archive:
            if not member.name.endswith(".xml") or member.name.endswith("_Fractions.xml"):
                continue
            stream = archive.extractfile(member)
            assert stream is not None
            found = parse_epu_xml(stream.read().decode("utf-8-sig"), member.name).metadata
            assert found.pixel_size_angstrom == pytest.approx(0.8708, abs=1e-3)
            assert found.voltage_kv == 300
            assert found.dose_e_per_angstrom2 is not None
            groups.add(found.beam_shift_group)
            n_read += 1
    assert n_read == 189
    assert 2 < len(groups) <= 189


@pytest.mark.realdata
@real
@pytest.mark.parametrize(
    ("name", "pixel_size", "n_frames"),
    [
        ("serialem_k3_frameset_tif_super_normed.mdoc", 78.45, 4),
        ("serialem_k3_frameset_mrc_count_normed.mdoc", 156.9, 15),
        ("serialem_k3_frameset_tif_count_unproc.mdoc", None, None),
    ],
)
def test_real_mdoc_of_single_exposures(tmp_path, name, pixel_size, n_frames):
    shutil.copyfile(DATA / "metadata" / name, tmp_path / "m.tif.mdoc")
    sidecar = read_sidecar(tmp_path / "m.tif")
    assert sidecar.metadata.voltage_kv == 300
    if pixel_size is not None:
        assert sidecar.metadata.pixel_size_angstrom == pixel_size
        assert sidecar.n_frames == n_frames


@pytest.mark.realdata
@real
@pytest.mark.parametrize(
    "name", ["serialem_tilt_TS_41.mrc.mdoc", "serialem_montage_section.mdoc", "murfey_test_1.mdoc"]
)
def test_tilt_series_and_montages_are_not_taken_for_a_movies_metadata(tmp_path, name):
    shutil.copyfile(DATA / "metadata" / name, tmp_path / "m.tif.mdoc")
    with pytest.raises(InputError, match=r"one FrameSet or ZValue section"):
        read_sidecar(tmp_path / "m.tif")
