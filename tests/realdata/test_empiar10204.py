"""EMPIAR-10204 (β-galactosidase, 2374 picks with junk, 64 px of 3.54 Å): from nothing to a map like its model."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from actors.engines.base import EngineInput, EngineSettings
from actors.engines.embedded import EmbeddedEngine
from models.reconstruction.alignment import align_volumes, apply_alignment, map_correlation
from models.reconstruction.masks import mask_from_map
from models.reconstruction.volume_io import read_volume
from models.simulation.structure import density_from_atoms, read_structure

DATA = Path(os.environ.get("ICESTREAM_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.realdata,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not DATA.is_dir(), reason=f"no real data in {DATA} (ICESTREAM_TEST_DATA)"),
]


def test_beta_galactosidase_is_found_from_nothing(tmp_path: Path) -> None:
    star = DATA / "particles" / "betagal_empiar10204" / "particles.star"
    engine, source = EmbeddedEngine(), EngineInput(particles_star=star, root=star.parent)
    settings = EngineSettings(symmetry="D2", n_starts=4, n_threads=2)
    output = engine.refine(source, engine.initial_model(source, settings, tmp_path), settings, tmp_path)
    assert output.resolution_angstrom is not None
    assert output.resolution_angstrom <= 9.0
    volume, pixel_size = read_volume(output.map)
    atoms = read_structure(DATA / "models" / "8bk7_betagal.cif.gz")
    density = density_from_atoms(atoms, volume.shape[-1], pixel_size)
    alignment = align_volumes(
        volume, density, pixel_size, generator=torch.Generator().manual_seed(0), lowpass_angstrom=10.0
    )
    aligned = apply_alignment(volume, alignment)
    mask = mask_from_map(density, pixel_size)
    assert map_correlation(aligned, density, mask, pixel_size, 10.0) >= 0.8
