"""Antisymmetric aberrations: the phases that a tilted beam adds to an image (coma), in RELION's convention."""

from __future__ import annotations

import math

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from models.optics.ctf import electron_wavelength_angstrom
from models.reconstruction.projector import HalfPlane


def undo_beam_tilt(
    plane: HalfPlane,
    pixel_size_angstrom: float,
    beam_tilt_xy_mrad: Float[Tensor, "b 2"],
    *,
    voltage_kv: float,
    cs_mm: float,
) -> Complex[Tensor, "b k"]:
    """Return the factors that take the phases of a beam tilt off an image's coefficients.

    An image under tilt t is that without times exp(−2πi Cs λ² (t · k) k²) (Zivanov et al. 2018, their eq. for the
    axial coma; the sign is that of rlnBeamTiltX and Y). Tilts in mrad, Cs in mm.
    """
    box_angstrom = plane.box_size_px * pixel_size_angstrom
    wavelength = electron_wavelength_angstrom(voltage_kv)
    kx, ky = plane.kx / box_angstrom, plane.ky / box_angstrom
    k2 = kx.square() + ky.square()
    tilt = beam_tilt_xy_mrad * 1e-3
    phase = 2.0 * math.pi * cs_mm * 1e7 * wavelength**2 * k2 * (tilt[:, :1] * kx + tilt[:, 1:] * ky)
    return torch.polar(torch.ones_like(phase), phase)
