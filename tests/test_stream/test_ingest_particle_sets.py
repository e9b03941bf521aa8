"""Particle inputs: STAR, .cs and bare stacks, real and made."""

import gzip
import os
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import starfile

from stream.ingest.particle_sets import iterate_images, read_particle_table, split_by_micrograph
from stream.records.errors import InputError
from stream.records.values import Optics

DATA = Path(os.environ.get("ICESTREAM_TEST_DATA", Path(__file__).parents[2] / "../shared/data")).resolve()
real = pytest.mark.skipif(not DATA.is_dir(), reason=f"no real data at {DATA}")

OPTICS = (
    "data_optics\n\nloop_\n_rlnOpticsGroup #1\n_rlnOpticsGroupName #2\n_rlnVoltage #3\n_rlnSphericalAberration #4\n"
    "_rlnAmplitudeContrast #5\n_rlnImagePixelSize #6\n1 og1 300 2.7 0.1 2.0\n\n"
)
COLUMNS = (
    "rlnImageName",
    "rlnMicrographName",
    "rlnDefocusU",
    "rlnDefocusV",
    "rlnDefocusAngle",
    "rlnOpticsGroup",
)


def write_stack(path: Path, n: int = 4, box: int = 16, value: float = 0.0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with mrcfile.new(path, overwrite=True) as mrc:
        mrc.set_data((np.arange(n)[:, None, None] + value + np.zeros((n, box, box))).astype(np.float32))
        mrc.set_image_stack()
        mrc.voxel_size = 2.0
    return path


def write_star(path: Path, names, *, micrographs=None, columns=COLUMNS, optics=OPTICS, extra=()) -> Path:
    micrographs = micrographs or ["m.mrc"] * len(names)
    header = "".join(f"_{name} #{i + 1}\n" for i, name in enumerate([*columns, *(name for name, _ in extra)]))
    lines = []
    for row, (name, micrograph) in enumerate(zip(names, micrographs, strict=True)):
        values = dict(zip(COLUMNS, (name, micrograph, 10000, 9000, 30, 1), strict=True))
        lines.append(" ".join(str(values[c]) for c in columns) + "".join(f" {v[row]}" for _, v in extra))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(optics + "data_particles\n\nloop_\n" + header + "\n".join(lines) + "\n")
    return path


def test_rows_address_stacks_by_path_and_index_whatever_their_names(tmp_path):
    write_stack(tmp_path / "job1/a.mrcs", value=0)
    write_stack(tmp_path / "job2/a.mrcs", value=100)
    star = write_star(tmp_path / "job3/p.star", ["3@job1/a.mrcs", "000002@job2/a.mrcs", "1@job1/a.mrcs"])
    table = read_particle_table(star)  # paths are relative to the project folder, a parent of the STAR's
    images = list(iterate_images(table, np.array([0, 1, 2])))
    assert [image[0, 0] for image in images] == [2, 101, 0]
    assert (table.box_size_px, table.pixel_size_angstrom[0], table.voltage_kv[0]) == (16, 2.0, 300)
    assert [image[0, 0] for image in iterate_images(table.take(np.array([1])), np.array([0]))] == [101]


def test_a_given_root_comes_first(tmp_path):
    write_stack(tmp_path / "here/a.mrcs", value=0)
    write_stack(tmp_path / "there/a.mrcs", value=50)
    star = write_star(tmp_path / "here/p.star", ["1@a.mrcs"])
    table = read_particle_table(star, root=tmp_path / "there")
    assert next(iterate_images(table, np.array([0])))[0, 0] == 50


def test_gzipped_star_and_uids_beyond_what_floats_hold_are_read(tmp_path):
    write_stack(tmp_path / "a.mrcs")
    uids = [2**64 - 1, 2**53 + 1]
    star = write_star(tmp_path / "p.star", ["1@a.mrcs", "2@a.mrcs"], extra=[("icestreamUid", uids)])
    (tmp_path / "p.star.gz").write_bytes(gzip.compress(star.read_bytes()))
    table = read_particle_table(tmp_path / "p.star.gz")
    assert table.uids is not None
    assert table.uids.tolist() == uids


def test_optional_columns_come_along(tmp_path):
    write_stack(tmp_path / "a.mrcs")
    extra = [("rlnAngleRot", [1, 2]), ("rlnAngleTilt", [3, 4]), ("rlnAnglePsi", [5, 6])]
    extra += [("rlnOriginX", [1, 2]), ("rlnOriginY", [0, 3]), ("rlnRandomSubset", [2, 1])]
    table = read_particle_table(write_star(tmp_path / "p.star", ["1@a.mrcs", "2@a.mrcs"], extra=extra))
    assert table.euler_deg.tolist() == [[1, 3, 5], [2, 4, 6]]
    assert table.origin_xy_angstrom.tolist() == [[2, 0], [4, 6]]  # pixels of 2 Å
    assert table.half_sets.tolist() == [2, 1]


def test_rows_are_split_by_micrograph_in_order_of_first_appearance(tmp_path):
    write_stack(tmp_path / "a.mrcs")
    names = [f"{i}@a.mrcs" for i in (1, 2, 3, 4)]
    table = read_particle_table(write_star(tmp_path / "p.star", names, micrographs=["y", "x", "y", "x"]))
    assert [(g.name, g.rows.tolist()) for g in split_by_micrograph(table)] == [("y", [0, 2]), ("x", [1, 3])]


def test_without_micrographs_rows_go_by_stack_and_one_stack_by_shares_of_250(tmp_path):
    columns = tuple(c for c in COLUMNS if c != "rlnMicrographName")
    write_stack(tmp_path / "a.mrcs")
    write_stack(tmp_path / "b.mrcs")
    star = write_star(tmp_path / "p.star", ["1@a.mrcs", "1@b.mrcs", "2@a.mrcs"], columns=columns)
    groups = split_by_micrograph(read_particle_table(star))
    assert [(g.name, g.rows.tolist()) for g in groups] == [
        ("stack:a.mrcs#0001", [0, 2]),
        ("stack:b.mrcs#0001", [1]),
    ]
    write_stack(tmp_path / "c.mrcs", n=600, box=8)
    optics = Optics(voltage_kv=300, cs_mm=2.7, amplitude_contrast=0.1)
    table = read_particle_table(tmp_path / "c.mrcs", require_ctf=False, optics=optics)
    assert [len(g.rows) for g in split_by_micrograph(table)] == [250, 250, 100]
    assert not table.has_ctf
    assert table.voltage_kv[0] == 300


def test_a_bare_stack_has_no_ctf_and_says_so(tmp_path):
    with pytest.raises(InputError, match=r"a\.mrcs: particles have a CTF"):
        read_particle_table(write_stack(tmp_path / "a.mrcs"))


def test_a_missing_stack_is_named_with_where_it_was_looked_for(tmp_path):
    star = write_star(tmp_path / "p.star", ["1@Extract/job9/gone.mrcs"])
    with pytest.raises(
        InputError, match=r"p\.star: every particle stack is there.*Extract/job9/gone\.mrcs, looked for"
    ):
        read_particle_table(star)


@pytest.mark.parametrize("name", ["5@a.mrcs", "0@a.mrcs"])
def test_an_index_outside_its_stack_is_named(tmp_path, name):
    write_stack(tmp_path / "a.mrcs", n=4)
    with pytest.raises(InputError, match=rf"image {name[0]} of .*a\.mrcs, which has 4"):
        read_particle_table(write_star(tmp_path / "p.star", ["1@a.mrcs", name]))


def test_missing_ctf_columns_are_named(tmp_path):
    write_stack(tmp_path / "a.mrcs")
    columns = ("rlnImageName", "rlnMicrographName", "rlnDefocusU", "rlnOpticsGroup")
    star = write_star(tmp_path / "p.star", ["1@a.mrcs"], columns=columns)
    with pytest.raises(InputError, match=r"rlnDefocusV, rlnDefocusAngle"):
        read_particle_table(star)
    assert np.isnan(read_particle_table(star, require_ctf=False).defocus_v_angstrom[0])


def test_mixed_boxes_are_named_with_a_stack_of_each(tmp_path):
    write_stack(tmp_path / "a.mrcs", box=16)
    write_stack(tmp_path / "b.mrcs", box=24)
    with pytest.raises(InputError, match=r"one box size.*16 px in .*a\.mrcs, 24 px in .*b\.mrcs"):
        read_particle_table(write_star(tmp_path / "p.star", ["1@a.mrcs", "1@b.mrcs"]))


def test_truncated_stacks_unknown_groups_and_repeated_uids_are_refused(tmp_path):
    stack = write_stack(tmp_path / "a.mrcs")
    star = write_star(tmp_path / "p.star", ["1@a.mrcs", "2@a.mrcs"], extra=[("icestreamUid", [7, 7])])
    with pytest.raises(InputError, match=r"uid of its own.*7 is there 2 times"):
        read_particle_table(star)
    star.write_text(star.read_text().replace("\n1 og1", "\n4 og1"))
    with pytest.raises(InputError, match=r"optics group is in the optics block.*group 1"):
        read_particle_table(star)
    stack.write_bytes(stack.read_bytes()[:-1500])
    star = write_star(tmp_path / "q.star", ["1@a.mrcs"])
    with pytest.raises(InputError, match=r"a\.mrcs: .*truncated"):
        read_particle_table(star)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.star", b"nonsense", "particle STAR has a table|can be parsed"),
        ("p.star.gz", b"no gzip", "can be unpacked"),
        ("p.cs", b"\x93NUMPY\x01\x00", "NumPy structured array"),
        ("p.cs", b"\x95CSDAT....", "in NumPy format"),
        ("p.txt", b"hello", "particles come as"),
    ],
)
def test_files_that_hold_no_particles_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_particle_table(tmp_path / name)


def test_poses_of_cryosparc_become_relion_angles(tmp_path):
    torch = pytest.importorskip("torch")
    from models.fourier.rotations import euler_to_matrix

    write_stack(tmp_path / "a.mrc")
    fields = [("uid", "<u8"), ("blob/path", "S8"), ("blob/idx", "<u4"), ("alignments3D/pose", "<f4", (3,))]
    fields += [
        ("alignments3D/shift", "<f4", (2,)),
        ("alignments3D/psize_A", "<f4"),
        ("alignments3D/split", "<u4"),
    ]
    rows = np.zeros(3, dtype=fields)
    rows["uid"], rows["blob/path"], rows["blob/idx"] = [1, 2, 3], b"a.mrc", [0, 1, 2]
    rows["alignments3D/pose"] = [[0.3, -0.5, 1.1], [0, 0, 0], [2.0, 1.0, -1.5]]
    rows["alignments3D/shift"], rows["alignments3D/psize_A"], rows["alignments3D/split"] = (
        [1, -2],
        4.0,
        [0, 1, 0],
    )
    with (tmp_path / "p.cs").open("wb") as stream:
        np.save(stream, rows)
    table = read_particle_table(tmp_path / "p.cs", require_ctf=False)
    x, y, z = (rows["alignments3D/pose"][0, i].item() for i in range(3))
    skew = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    angle = np.linalg.norm([x, y, z])
    rodrigues = np.eye(3) + np.sin(angle) / angle * skew + (1 - np.cos(angle)) / angle**2 * skew @ skew
    ours = euler_to_matrix(torch.tensor(table.euler_deg[0])).numpy()
    # pyem's expmap, which it takes for RELION's matrix A, is the transpose of Rodrigues' formula
    np.testing.assert_allclose(ours, rodrigues.T, atol=1e-5)
    assert table.origin_xy_angstrom[0].tolist() == [4, -8]
    assert table.half_sets.tolist() == [1, 2, 1]


@pytest.mark.realdata
@real
def test_the_real_betagal_set_is_read_as_starfile_reads_it():
    star = DATA / "particles/betagal_empiar10204/particles.star"
    table = read_particle_table(star)
    assert (len(table), table.box_size_px) == (2374, 64)
    groups = split_by_micrograph(table)
    assert len(groups) == 10
    assert sum(len(group.rows) for group in groups) == 2374
    reference = starfile.read(star)["particles"]
    np.testing.assert_allclose(table.defocus_v_angstrom, reference["rlnDefocusV"])
    np.testing.assert_allclose(table.coordinate_x_px, reference["rlnCoordinateX"])
    rows = groups[4].rows[:5]
    stack = mrcfile.read(star.parent / reference["rlnImageName"][rows[0]].split("@")[1])
    np.testing.assert_array_equal(
        np.stack(list(iterate_images(table, rows))), stack[table.stack_indices[rows]]
    )


@pytest.mark.realdata
@real
def test_the_same_real_particles_from_star_and_cs_agree():
    folder = DATA / "particles/small_real"
    star = read_particle_table(folder / "empiar_10076_7.star")
    cs = read_particle_table(folder / "empiar_10076_7.cs")
    assert star.stack_paths.tolist() == cs.stack_paths.tolist()
    np.testing.assert_array_equal(star.stack_indices, cs.stack_indices)
    for name in ("defocus_u_angstrom", "defocus_v_angstrom", "astigmatism_angle_deg", "pixel_size_angstrom"):
        np.testing.assert_allclose(getattr(star, name), getattr(cs, name), rtol=1e-5)
    for name in ("voltage_kv", "cs_mm", "amplitude_contrast", "phase_shift_deg"):
        np.testing.assert_allclose(getattr(star, name), getattr(cs, name), rtol=1e-6)
    assert cs.uids is not None
    assert (cs.contrast_sign == -1).all()


@pytest.mark.realdata
@real
def test_a_real_cs_without_its_stacks_names_the_first_one_missing():
    with pytest.raises(InputError, match=r"J19/extract/20150917_05196_DNA-TET.*particles\.mrc, looked for"):
        read_particle_table(DATA / "orientations/cryosparc_P12_J24_001_particles.cs")
