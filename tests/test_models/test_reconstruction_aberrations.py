"""Beam tilt: phases are taken off with RELION's sign, and a STAR's tilt reaches the images."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import mrcfile
import numpy as np
import pandas as pd
import pytest
import starfile
import torch

from actors.engines.particle_images import load_particles
from models.fourier.rotations import matrix_to_euler
from models.reconstruction.aberrations import undo_beam_tilt
from models.reconstruction.blobs import BlobPhantom, BlobSet, simulate_blob_images
from models.reconstruction.fsc import fourier_shell_correlation
from models.reconstruction.volume_io import read_volume

BOX, PIXEL, N = 48, 1.6, 120
TILT_MRAD = (1.5, -0.8)


@pytest.fixture(scope="module")
def tilted(tmp_path_factory: pytest.TempPathFactory) -> tuple[BlobPhantom, BlobSet, Path]:
    """Particles as a tilted beam shows them, in a stack, with poses."""
    root = tmp_path_factory.mktemp("tilt")
    generator = torch.Generator().manual_seed(5)
    phantom = BlobPhantom.random(BOX, generator, n_blobs=20, sigma_fraction=0.02)
    images = simulate_blob_images(phantom, N, generator, snr=1.0, pixel_size_angstrom=PIXEL)
    undo = undo_beam_tilt(
        images.data.plane, PIXEL, torch.tensor([TILT_MRAD]).expand(N, 2), voltage_kv=300.0, cs_mm=2.7
    )
    stack = images.data.plane.images(images.data.coefficients * undo.conj())
    with mrcfile.new(root / "stack.mrcs") as handle:
        handle.set_data(stack.numpy().astype(np.float32))
        handle.voxel_size = PIXEL
    return phantom, images, root


def _write_star(images: BlobSet, root: Path, tilt_mrad: tuple[float, float]) -> Path:
    euler, origin = matrix_to_euler(images.rotations).numpy(), (images.origin_xy_px * PIXEL).numpy()
    optics = pd.DataFrame(
        {
            "rlnOpticsGroup": [1], "rlnOpticsGroupName": ["o1"], "rlnVoltage": [300.0],
            "rlnSphericalAberration": [2.7], "rlnAmplitudeContrast": [0.1], "rlnImagePixelSize": [PIXEL],
            "rlnImageSize": [BOX], "rlnImageDimensionality": [2], "rlnBeamTiltX": [tilt_mrad[0]],
            "rlnBeamTiltY": [tilt_mrad[1]],
        }
    )  # fmt: skip
    table = pd.DataFrame(
        {
            "rlnImageName": [f"{i + 1:06d}@stack.mrcs" for i in range(N)],
            "rlnMicrographName": [f"mic{i // 20}.mrc" for i in range(N)],
            "rlnDefocusU": images.ctf.defocus_u_angstrom.numpy(),
            "rlnDefocusV": images.ctf.defocus_v_angstrom.numpy(),
            "rlnDefocusAngle": images.ctf.astigmatism_angle_deg.numpy(),
            "rlnAngleRot": euler[:, 0], "rlnAngleTilt": euler[:, 1], "rlnAnglePsi": euler[:, 2],
            "rlnOriginXAngst": origin[:, 0], "rlnOriginYAngst": origin[:, 1], "rlnOpticsGroup": 1,
        }
    )  # fmt: skip
    path = root / f"tilt{tilt_mrad[0]}.star"
    starfile.write({"optics": optics, "particles": table}, path, overwrite=True)
    return path


def test_images_are_as_without_a_tilt_once_it_is_taken_off(tilted):
    _, images, root = tilted
    straight = load_particles(_write_star(images, root, TILT_MRAD), root, max_box_px=96).data.coefficients
    bent = load_particles(_write_star(images, root, (0.0, 0.0)), root, max_box_px=96).data.coefficients
    radius = images.data.plane.radius
    inside = (radius > 0) & (radius < BOX / 2 - 2)
    expected = images.data.coefficients[:, inside]
    assert float((straight[:, inside] - expected).norm() / expected.norm()) < 1e-3
    assert float((bent[:, inside] - expected).norm() / expected.norm()) > 0.3


@pytest.mark.skipif(shutil.which("relion_reconstruct") is None, reason="RELION is not installed")
def test_relion_takes_the_same_tilt_off(tilted):
    phantom, images, root = tilted
    agreement = {}
    for sign in (1.0, -1.0):
        star = _write_star(images, root, (sign * TILT_MRAD[0], sign * TILT_MRAD[1]))
        out = star.with_suffix(".mrc")
        command = ["relion_reconstruct", "--i", star.name, "--o", out.name, "--ctf"]
        subprocess.run(command, cwd=root, check=True, capture_output=True)
        curve = fourier_shell_correlation(read_volume(out)[0], phantom.volume())
        agreement[sign] = float(curve[12:20].mean())
    assert agreement[1.0] > agreement[-1.0] + 0.2
