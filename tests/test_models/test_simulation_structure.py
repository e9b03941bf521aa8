"""Atoms to potential: totals, positions, files."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import gemmi
import mrcfile
import numpy as np
import pytest
import torch

from models.fourier.transforms import centred_rfft3
from models.fourier.volumes import resample_volume
from models.simulation.structure import (
    ICE_MEAN_POTENTIAL_V,
    POTENTIAL_PER_SCATTERING_V_ANGSTROM2,
    AtomicStructure,
    centred_structure,
    density_from_atoms,
    form_factor,
    read_density_map,
    read_structure,
    scale_map_to_potential,
)

DATA = Path(os.environ.get("ICESTREAM_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))


def random_atoms(n: int, *, half_width: float = 12.0, seed: int = 0) -> AtomicStructure:
    rng = np.random.default_rng(seed)
    return AtomicStructure(
        positions_angstrom=rng.uniform(-half_width, half_width, (n, 3)).astype(np.float32),
        atomic_numbers=rng.choice([6, 7, 8, 16], size=n).astype(np.int16),
        name="random",
    )


def test_total_density_is_the_sum_of_scattering_factors_at_zero():
    atoms = random_atoms(60)
    volume = density_from_atoms(atoms, 32, 1.4)
    zero = torch.zeros(1)
    expected = POTENTIAL_PER_SCATTERING_V_ANGSTROM2 * sum(
        float(form_factor(int(z), zero, n_hydrogens={6: 1.2, 7: 1.2, 8: 0.2, 16: 0.2}[int(z)]))
        for z in atoms.atomic_numbers
    )
    assert float(volume.sum()) * 1.4**3 == pytest.approx(expected, rel=1e-4)


def test_splatted_atoms_equal_the_direct_structure_factor_up_to_three_quarters_of_nyquist():
    atoms = random_atoms(30, half_width=10.0)
    carbon = AtomicStructure(
        positions_angstrom=atoms.positions_angstrom,
        atomic_numbers=np.full(30, 6, dtype=np.int16),
        name="carbon",
    )
    pixel, size = 1.3, 32
    ky = torch.fft.fftfreq(size, pixel)
    kx = torch.fft.rfftfreq(size, pixel)
    k2 = ky[:, None, None] ** 2 + ky[None, :, None] ** 2 + kx[None, None, :] ** 2
    phases = sum(
        torch.exp(-2j * torch.pi * (ky[:, None, None] * z + ky[None, :, None] * y + kx[None, None, :] * x))
        for x, y, z in carbon.positions_angstrom.tolist()
    )
    direct = phases * form_factor(6, k2, n_hydrogens=1.2) * (POTENTIAL_PER_SCATTERING_V_ANGSTROM2 / pixel**3)
    found = centred_rfft3(density_from_atoms(carbon, size, pixel))
    inside = k2.sqrt() < 0.75 * 0.5 / pixel
    error = (found - direct)[inside].abs().square().sum() / direct[inside].abs().square().sum()
    assert float(error.sqrt()) < 0.005


def test_protein_stands_out_from_ice_by_about_three_volts():
    from models.simulation.phantom import build_phantom

    phantom = build_phantom(3, mass_kda=40)
    volume = density_from_atoms(
        phantom, 48, 3.0, solvent_potential_v=ICE_MEAN_POTENTIAL_V, resolution_angstrom=10.0
    )
    inside = volume > 1.2
    assert 1.8 < float(volume[inside].mean()) < 4.0
    # 1.21 Å³/Da is the partial specific volume of proteins.
    assert float(inside.sum()) * 27.0 == pytest.approx(phantom.mass_kda * 1210.0, rel=0.35)


def test_resolution_falls_to_one_over_e():
    atoms = random_atoms(20)
    sharp = centred_rfft3(density_from_atoms(atoms, 32, 1.5))
    soft = centred_rfft3(density_from_atoms(atoms, 32, 1.5, resolution_angstrom=6.0))
    index = 8  # 8 / (32 * 1.5) = 1/6
    ratio = abs(complex(soft[0, 0, index])) / abs(complex(sharp[0, 0, index]))
    assert ratio == pytest.approx(np.exp(-1.0), rel=1e-3)


def test_atoms_outside_the_box_are_refused():
    with pytest.raises(ValueError, match="box_px"):
        density_from_atoms(random_atoms(5, half_width=40.0), 32, 1.0)


def write_model(path: Path) -> None:
    structure = gemmi.Structure()
    model = gemmi.Model("1")
    chain = gemmi.Chain("A")
    for i, (name, element) in enumerate((("GLY", "C"), ("GLY", "N"), ("HOH", "O"))):
        residue = gemmi.Residue()
        residue.name, residue.seqid = name, gemmi.SeqId(str(i + 1))
        atom = gemmi.Atom()
        atom.name, atom.element = element, gemmi.Element(element)
        atom.pos = gemmi.Position(10.0 + i, 20.0, 30.0)
        residue.add_atom(atom)
        chain.add_residue(residue)
    model.add_chain(chain)
    structure.add_model(model)
    structure.setup_entities()
    structure.write_pdb(str(path))


def test_reading_skips_waters_and_centres_on_mass(tmp_path):
    path = tmp_path / "model.pdb"
    write_model(path)
    (tmp_path / "model.pdb.gz").write_bytes(gzip.compress(path.read_bytes()))
    for name in ("model.pdb", "model.pdb.gz"):
        structure = read_structure(tmp_path / name)
        assert structure.atomic_numbers.tolist() == [6, 7]
        weights = np.array([12.011, 14.007])
        assert np.allclose(weights @ structure.positions_angstrom, 0.0, atol=1e-4)


def test_a_file_without_atoms_is_named(tmp_path):
    path = tmp_path / "empty.cif"
    path.write_text("data_none\n")
    with pytest.raises(ValueError, match=r"empty\.cif"):
        read_structure(path)


def test_map_input_is_resampled_and_scaled_to_volts(tmp_path):
    blob = density_from_atoms(
        centred_structure(random_atoms(200).positions_angstrom, random_atoms(200).atomic_numbers, "blob"),
        32,
        2.0,
        resolution_angstrom=8.0,
    )
    with mrcfile.new(tmp_path / "map.mrc") as handle:
        handle.set_data((blob * 0.01 + 5.0).numpy())
        handle.voxel_size = 2.0
    volume, pixel = read_density_map(tmp_path / "map.mrc")
    assert pixel == pytest.approx(2.0)
    scaled = scale_map_to_potential(volume)
    assert float(scaled.median()) == pytest.approx(0.0, abs=1e-3)
    finer = resample_volume(scaled, 2.0, 1.0, 64)
    assert float(finer.sum()) == pytest.approx(8.0 * float(scaled.sum()), rel=0.02)
    peak = int(scaled.argmax())
    z, y, x = peak // 1024, peak // 32 % 32, peak % 32
    assert float(finer[2 * (z - 16) + 32, 2 * (y - 16) + 32, 2 * (x - 16) + 32]) == pytest.approx(
        float(scaled.max()), rel=1e-4
    )


@pytest.mark.realdata
def test_beta_galactosidase_has_its_published_mass():
    path = DATA / "models" / "8bk7_betagal.cif.gz"
    if not path.exists():
        pytest.skip(f"no {path}")
    # The file's asymmetric unit is the whole tetramer: 4 × 116 kDa = 465 kDa.
    assert read_structure(path).mass_kda == pytest.approx(465.0, rel=0.03)
