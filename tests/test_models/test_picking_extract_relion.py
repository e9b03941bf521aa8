"""Extraction against `relion_preprocess` on one small micrograph; skipped where RELION is not installed."""

import shutil
import subprocess

import mrcfile
import numpy as np
import pytest
import torch

from models.picking.extract import BoxSettings, background_mask, extract_particles

pytestmark = pytest.mark.skipif(
    shutil.which("relion_preprocess") is None, reason="relion_preprocess is not installed"
)

BOX, RADIUS = 96, 0.375
CENTRES = [(60, 70), (130, 90), (200, 180), (77, 190), (150, 150)]


def draw_micrograph():
    generator = torch.Generator().manual_seed(4)
    axis = torch.arange(256.0)
    image = (
        80.0 + 8.0 * torch.randn(256, 256, generator=generator) + 0.03 * axis[:, None] - 0.02 * axis[None, :]
    )
    for y, x in CENTRES:
        r2 = (axis[:, None] - y) ** 2 + (axis[None, :] - x - 3.0) ** 2
        image -= 6.0 * torch.exp(-r2 / (2.0 * 12.0**2))
    return image


def extract_by_relion(folder, image, size):
    """Return the stack of RELION's extraction: rescaled, inverted, normalised."""
    with mrcfile.new(folder / "mic.mrc") as mrc:
        mrc.set_data(image.numpy())
        mrc.voxel_size = 2.0
    (folder / "mics.star").write_text(
        "data_optics\n\nloop_\n_rlnOpticsGroupName #1\n_rlnOpticsGroup #2\n_rlnMicrographPixelSize #3\n"
        "_rlnVoltage #4\n_rlnSphericalAberration #5\n_rlnAmplitudeContrast #6\n_rlnMicrographOriginalPixelSize #7\n"
        "opticsGroup1 1 2.0 300.0 2.7 0.1 2.0\n\n"
        "data_micrographs\n\nloop_\n_rlnMicrographName #1\n_rlnOpticsGroup #2\nmic.mrc 1\n"
    )
    rows = "".join(f"{x} {y}\n" for y, x in CENTRES)
    (folder / "mic_picked.star").write_text(
        f"data_\n\nloop_\n_rlnCoordinateX #1\n_rlnCoordinateY #2\n{rows}\n"
    )
    command = [
        "relion_preprocess",
        "--i",
        "mics.star",
        "--coord_suffix",
        "_picked.star",
        "--part_star",
        "out.star",
    ]
    command += [
        "--coord_dir",
        "./",
        "--part_dir",
        "parts/",
        "--extract",
        "--extract_size",
        str(BOX),
        "--scale",
        str(size),
    ]
    command += ["--norm", "--bg_radius", str(round(RADIUS * size)), "--invert_contrast"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=60)
    with mrcfile.open(folder / "parts" / "mic.mrcs", permissive=True) as mrc:
        return torch.from_numpy(np.array(mrc.data, dtype=np.float32))


def below_nyquist(images):
    """Return the images less their Nyquist row and column, where cropping folds ± Nyquist in one way or another."""
    spectrum = torch.fft.rfft2(images)
    half = images.shape[-1] // 2
    spectrum[:, half, :] = 0
    spectrum[:, :, half] = 0
    return torch.fft.irfft2(spectrum, s=images.shape[-2:])


@pytest.mark.parametrize("size", [96, 48])
def test_particles_are_those_of_relion(tmp_path, size):
    image = draw_micrograph()
    theirs = extract_by_relion(tmp_path, image, size)
    boxes = BoxSettings(box_size_px=BOX, extract_box_px=size, background_radius_px=round(RADIUS * size))
    (ours,) = extract_particles(image, np.array(CENTRES, dtype=np.float64), boxes)
    assert theirs.shape == ours.shape
    assert float((below_nyquist(ours) - below_nyquist(theirs)).abs().max()) < 0.05
    for mine, other in zip(below_nyquist(ours), below_nyquist(theirs), strict=True):
        assert np.corrcoef(mine.numpy().ravel(), other.numpy().ravel())[0, 1] > 0.999
    if size == BOX:
        for mine, other in zip(ours, theirs, strict=True):
            assert np.corrcoef(mine.numpy().ravel(), other.numpy().ravel())[0, 1] > 0.999


@pytest.mark.parametrize("size", [96, 48])
def test_backgrounds_are_normalised_as_those_of_relion(tmp_path, size):
    theirs = extract_by_relion(tmp_path, draw_micrograph(), size)
    background = background_mask(size, round(RADIUS * size))
    (ours,) = extract_particles(
        draw_micrograph(),
        np.array(CENTRES, dtype=np.float64),
        BoxSettings(box_size_px=BOX, extract_box_px=size, background_radius_px=round(RADIUS * size)),
    )
    for images in (theirs, ours):
        assert float(images[:, background].mean(dim=1).abs().max()) < 1e-3
        assert images[:, background].std(dim=1).numpy() == pytest.approx(1.0, abs=5e-3)
