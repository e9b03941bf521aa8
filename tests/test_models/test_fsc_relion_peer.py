"""Our FSC curves beside `relion_postprocess` on the same half-maps, where that program is installed.

What differs: RELION adds each stored coefficient of the half transform once, so that the plane kx = 0, stored with
both k and −k, counts double (up to 0.008 in our curve; with that weighting both agree to rounding). The corrected
curve depends on the random phases drawn. RELION reports the last shell above 0.143, we interpolate.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import starfile
import torch

from models.reconstruction.fsc import fourier_shell_correlation, masked_fsc, resolution_at
from models.reconstruction.masks import gaussian_lowpass, mask_from_map
from models.reconstruction.volume_io import write_volume

DATA = Path(os.environ.get("ICESTREAM_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))

needs_relion = pytest.mark.skipif(
    shutil.which("relion_postprocess") is None, reason="RELION is not installed"
)
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no real data in {DATA} (ICESTREAM_TEST_DATA)")


def published_halves() -> tuple[torch.Tensor, torch.Tensor]:
    halves = []
    for name in ("3D_density_map_h1.mrc.gz", "3D_density_map_h2.mrc.gz"):
        with mrcfile.open(DATA / "maps" / name) as handle:
            halves.append(torch.from_numpy(np.array(handle.data, dtype=np.float32)))
    return halves[0], halves[1]


def relion_curves(folder: Path, halves, mask, pixel_size: float):
    for h, half in enumerate(halves, start=1):
        write_volume(folder / f"half{h}_class001_unfil.mrc", half, pixel_size)
    write_volume(folder / "mask.mrc", mask, pixel_size)
    (folder / "post").mkdir()  # where RELION leaves an empty report if Ghostscript is missing
    subprocess.run(
        ["relion_postprocess", "--i", "half1_class001_unfil.mrc", "--mask", "mask.mrc", "--force_mask",
         "--angpix", str(pixel_size), "--o", "post"],
        cwd=folder, check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    return starfile.read(folder / "post.star", always_dict=True)["fsc"]


def assert_curves_agree(table, halves, mask, pixel_size: float) -> None:
    curves = masked_fsc(*halves, mask, pixel_size, generator=torch.Generator().manual_seed(0))
    n = min(len(table), len(curves.masked)) - 1  # the last shell lies on Nyquist and is cut differently
    unmasked = table["rlnFourierShellCorrelationUnmaskedMaps"].to_numpy()[1:n]
    masked = table["rlnFourierShellCorrelationMaskedMaps"].to_numpy()[1:n]
    corrected = table["rlnFourierShellCorrelationCorrected"].to_numpy()[1:n]
    assert np.abs(curves.unmasked[1:n].numpy() - unmasked).max() < 0.012
    assert np.abs(curves.masked[1:n].numpy() - masked).max() < 0.012
    # Two draws of random phases: what a shell's correction may differ by shrinks with its radius.
    difference = np.abs(curves.corrected[1:n].numpy() - corrected)
    assert np.median(difference) < 0.03
    ours = curves.resolution_angstrom
    below = np.flatnonzero(corrected[1:] < 0.143)
    theirs = 1.0 / table["rlnResolution"].to_numpy()[2 + below[0]]
    assert ours is not None
    # RELION reports the last shell above the threshold, we interpolate to the crossing.
    box = halves[0].shape[0] * pixel_size
    assert abs(box / ours - box / theirs) <= 1.6


@needs_data
@pytest.mark.realdata
def test_the_published_crossing_of_two_half_maps_is_found():
    """Maps and value of FourierShellCorr's example: 9.8 Å at 0.143, without a mask."""
    a, b = published_halves()
    assert resolution_at(fourier_shell_correlation(a, b), 0.143, 2.0, 100) == pytest.approx(9.8, abs=0.05)


@needs_relion
@needs_data
@pytest.mark.realdata
def test_curves_of_published_half_maps_agree_with_relion(tmp_path):
    halves = published_halves()
    mask = mask_from_map(halves[0] + halves[1], 2.0)
    assert_curves_agree(relion_curves(tmp_path, halves, mask, 2.0), halves, mask, 2.0)


@needs_relion
def test_curves_of_simulated_half_maps_agree_with_relion(tmp_path):
    n, pixel_size = 64, 2.0
    generator = torch.Generator().manual_seed(1)
    molecule = gaussian_lowpass(torch.randn(n, n, n, generator=generator), pixel_size, 8.0)
    axis = torch.arange(n) - n // 2
    r = (axis[:, None, None] ** 2 + axis[None, :, None] ** 2 + axis[None, None, :] ** 2).sqrt()
    molecule = (molecule / molecule.std() + 1.0) * (r < 18)
    halves = tuple(molecule + 0.8 * torch.randn(n, n, n, generator=generator) for _ in range(2))
    mask = (1 - (r - 21) / 5).clamp(0, 1)
    assert_curves_agree(relion_curves(tmp_path, halves, mask, pixel_size), halves, mask, pixel_size)
