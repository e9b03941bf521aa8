"""A micrograph cut into fields is a session that CryoGEM reads: places, scale and particle are the micrograph's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from actors.cryogem.config import SourceConfig
from actors.cryogem.field_session import (
    FieldSessionSettings,
    main,
    make_shell,
    read_picks,
    write_field_session,
)
from actors.cryogem.session_bank import read_session_bank
from models.cryogem.physics import image_specimen
from models.optics.ctf_fit import Microscope
from models.simulation.imaging import CtfTruth
from stream.ingest.movie_reader import read_micrograph
from stream.records.errors import InputError
from stream.sinks.relion_star import read_picks_star

PIXEL_ANGSTROM, DIAMETER_ANGSTROM = 3.0, 122.0


@pytest.fixture(scope="module")
def micrograph():
    """Noise seen through a CTF of 2 µm, so that it has rings; picks on a coarse grid."""
    noise = torch.randn((480, 512), generator=torch.Generator().manual_seed(0))
    ctf = CtfTruth(
        defocus_u_angstrom=20_000.0,
        defocus_v_angstrom=20_000.0,
        astigmatism_angle_deg=0.0,
        phase_shift_deg=0.0,
    )
    scope = Microscope(voltage_kv=300.0, cs_mm=2.7, amplitude_contrast=0.1)
    image = 100.0 + image_specimen(noise, ctf, scope, PIXEL_ANGSTROM) + 0.2 * torch.randn(480, 512)
    rows, columns = np.meshgrid(np.arange(30, 480, 60), np.arange(40, 512, 64), indexing="ij")
    return image.numpy().astype(np.float32), np.stack((rows.ravel(), columns.ravel()), axis=1).astype(float)


def settings(**changes):
    given = {
        "pixel_size_angstrom": PIXEL_ANGSTROM,
        "diameter_angstrom": DIAMETER_ANGSTROM,
        "fields_yx": (2, 2),
        "shell_angstrom": (38.0, 61.0),
        "symmetry": "O",
    }
    return FieldSessionSettings(**{**given, **changes})


def test_fields_are_the_micrograph_and_picks_stay_where_they_are(micrograph, tmp_path):
    image, picks = micrograph
    layout = write_field_session(tmp_path, image, picks, settings())
    assert np.array_equal(read_micrograph(layout.micrograph("field_1_0")), image[240:480, :256])
    found = [
        read_picks_star(layout.picks(f"field_{y}_{x}"))[0] + (240 * y, 256 * x)
        for y in (0, 1)
        for x in (0, 1)
    ]
    assert sorted(map(tuple, np.concatenate(found))) == sorted(map(tuple, picks))


def test_cryogem_reads_the_fields_as_a_session(micrograph, tmp_path):
    write_field_session(tmp_path, *micrograph, settings())
    bank = read_session_bank(SourceConfig(session=tmp_path, short_side_px=120, held_out_fraction=0.5))
    assert bank.shape_yx == (120, 128)
    assert bank.facts.symmetry == "O"
    assert bank.facts.pixel_size_angstrom == pytest.approx(6.0)
    assert bank.facts.diameter_angstrom == pytest.approx(DIAMETER_ANGSTROM, rel=0.15)
    assert float(bank.ctfs[:, :2].mean()) == pytest.approx(20_000.0, rel=0.02)
    assert bank.facts.counts.mean == 16.0


def test_a_shell_is_hollow_and_as_large_as_it_was_asked_for():
    shell = make_shell(38.0, 61.0)
    middle = shell.shape[0] // 2
    assert float(shell[middle, middle, middle]) < 0.01
    assert float(shell[middle, middle, middle + round(50.0 / 3.0)]) > 0.9
    assert float(shell[middle, middle, middle + round(72.0 / 3.0)]) < 0.01


def test_what_contradicts_itself_is_refused(tmp_path):
    with pytest.raises(ValueError, match="exactly one of them"):
        settings(map=tmp_path / "map.mrc")
    with pytest.raises(ValueError, match="two fields or more"):
        settings(fields_yx=(1, 1))
    with pytest.raises(ValueError, match="an inner and a larger outer radius"):
        settings(shell_angstrom=(61.0, 38.0))
    (tmp_path / "picks.csv").write_text("x,y\nhere,there\n")
    with pytest.raises(InputError, match=r"picks.csv.*CSV file of x and y"):
        read_picks(tmp_path / "picks.csv")


def test_the_command_takes_a_png(micrograph, tmp_path):
    from PIL import Image

    image, picks = micrograph
    Image.fromarray((image * 100.0).astype(np.uint16)).save(tmp_path / "image.png")
    np.savetxt(tmp_path / "picks.csv", picks[:, ::-1], delimiter=",", header="x,y")
    arguments = [
        str(tmp_path / "image.png"),
        "--picks",
        str(tmp_path / "picks.csv"),
        "--out",
        str(tmp_path / "out"),
    ]
    arguments += ["--pixel-size-angstrom", "3", "--diameter-angstrom", "122", "--shell-angstrom", "38", "61"]
    main([*arguments, "--fields", "2", "1"])
    assert len(read_picks_star(tmp_path / "out/picks/field_1_0.star")[0]) == 32
