"""The contrast transfer function.

Sign convention (RELION's): underfocus is positive, and the CTF of an underfocused image starts *positive* at
low frequency, so that white-on-black particles equal density times CTF. A raw micrograph, where protein is
dark, is minus that.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor


def electron_wavelength_angstrom(voltage_kv: float) -> float:
    """Return the relativistic de Broglie wavelength in Å: 0.01969 at 300 kV, 0.02508 at 200 kV."""
    volt = voltage_kv * 1e3
    return 12.2643247 / math.sqrt(volt * (1.0 + 0.978466e-6 * volt))


def frequency_grid(
    shape_yx: tuple[int, int], pixel_size_angstrom: float, *, device: torch.device | None = None
) -> tuple[Float[Tensor, "h wr"], Float[Tensor, "h wr"]]:
    """Return (ky, kx) in 1/Å for the half spectrum of `torch.fft.rfft2` of an image of `shape_yx`.

    The row of the Nyquist frequency, whose sign is free, counts as positive, as in RELION and Warp.
    """
    height, width = shape_yx
    ky = torch.fft.fftfreq(height, pixel_size_angstrom, device=device)
    if height % 2 == 0:
        ky[height // 2] = -ky[height // 2]
    kx = torch.fft.rfftfreq(width, pixel_size_angstrom, device=device)
    return ky[:, None].expand(height, kx.numel()), kx[None, :].expand(height, kx.numel())


def evaluate_ctf(
    ky: Float[Tensor, "*k"],
    kx: Float[Tensor, "*k"],
    *,
    defocus_u_angstrom: Float[Tensor, "*b"] | float,
    defocus_v_angstrom: Float[Tensor, "*b"] | float,
    astigmatism_angle_deg: Float[Tensor, "*b"] | float,
    voltage_kv: float,
    cs_mm: float,
    amplitude_contrast: float,
    phase_shift_deg: Float[Tensor, "*b"] | float = 0.0,
) -> Float[Tensor, "..."]:
    """Return the CTF at frequencies (ky, kx) in 1/Å, in [-1, 1].

    Parameters given as tensors of shape `(b,)` give a result of shape `(b, *k)`; plain floats give `(*k)`.
    χ(k) = π λ z(θ) k² − (π/2) Cs λ³ k⁴ + phase shift + asin(amplitude contrast), CTF = sin χ; z(θ) as in
    CryoGEM eq. 8-9 and Rohou & Grigorieff 2015 eq. 3-5, up to the overall sign (see the module's docstring).
    """
    wavelength = electron_wavelength_angstrom(voltage_kv)
    cs = cs_mm * 1e7
    u, v, angle, phase = (
        _with_trailing_axes(value, ky)
        for value in (defocus_u_angstrom, defocus_v_angstrom, astigmatism_angle_deg, phase_shift_deg)
    )
    k2 = ky.square() + kx.square()
    theta = torch.atan2(ky, kx)
    z = 0.5 * (u + v + (u - v) * torch.cos(2.0 * (theta - torch.deg2rad(angle))))
    chi = math.pi * wavelength * z * k2 - 0.5 * math.pi * cs * wavelength**3 * k2.square()
    return torch.sin(chi + torch.deg2rad(phase) + math.asin(amplitude_contrast))


def _with_trailing_axes(value: Tensor | float, grid: Tensor) -> Tensor:
    tensor = torch.as_tensor(value, dtype=grid.dtype, device=grid.device)
    return tensor.reshape(*tensor.shape, *([1] * grid.ndim)) if tensor.ndim else tensor
