"""The two-dimensional projector: an image's twofold padded transform, read and filled at turned frequencies.

The flat counterpart of `projector`: a plane holds (re, im) up to a radius, zero frequency in the middle; bilinear
reading multiplies the image by sinc² along each axis, which is divided out before reading and after insertion.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from models.reconstruction.projector import PADDING, HalfPlane, cube_half_side


def images_to_planes(images: Float[Tensor, "c n n"], max_shell: float) -> Float[Tensor, "c 2 d d"]:
    """Return the padded, gridding-corrected transforms of images up to `max_shell`."""
    n, h = int(images.shape[-1]), cube_half_side(max_shell)
    m, low = PADDING * n, PADDING * n // 2 - n // 2
    padded = images.new_zeros((len(images), m, m))
    padded[:, low : low + n, low : low + n] = images / _window(n)
    spectrum = torch.fft.fft2(torch.fft.ifftshift(padded, dim=(-2, -1)))
    index = torch.arange(-h, h + 1) % m
    cut = spectrum[:, index][:, :, index]
    return torch.stack((cut.real, cut.imag), dim=1).contiguous()


def sums_to_images(planes: Float[Tensor, "c 2 d d"], box_size_px: int) -> Float[Tensor, "c n n"]:
    """Return the images of solved sums; insertion spread each value over its neighbours, so divide by the window."""
    n, m = box_size_px, PADDING * box_size_px
    h = (planes.shape[-1] - 1) // 2
    index = torch.arange(-h, h + 1) % m
    full = torch.zeros((len(planes), m, m), dtype=torch.complex64)
    full[:, index[:, None], index[None, :]] = torch.complex(planes[:, 0], planes[:, 1])
    padded = torch.fft.fftshift(torch.fft.ifft2(full).real, dim=(-2, -1))
    low = m // 2 - n // 2
    return padded[:, low : low + n, low : low + n] / _window(n)


def turned_points(psi_rad: Float[Tensor, "*b"], plane: HalfPlane) -> Float[Tensor, "*b k 2"]:
    """Return where images at RELION's psi read an upright class: Rz(psi)ᵀ (kx, ky), in cycles per box."""
    cos, sin = torch.cos(psi_rad)[..., None], torch.sin(psi_rad)[..., None]
    return torch.stack((cos * plane.kx - sin * plane.ky, sin * plane.kx + cos * plane.ky), dim=-1)


def read_planes(
    planes: Float[Tensor, "c 2 d d"], points: Float[Tensor, "c j k 2"]
) -> Float[Tensor, "c 2 j k"]:
    """Interpolate each plane at its own points."""
    h = (planes.shape[-1] - 1) // 2
    return functional.grid_sample(planes, points * (PADDING / h), mode="bilinear", align_corners=True)


def insert_planes(
    sums: Float[Tensor, "c q d d"], values: Float[Tensor, "c q j k"], points: Float[Tensor, "c j k 2"]
) -> Float[Tensor, "c q d d"]:
    """Return the sums plus the adjoint of reading applied to `values`."""
    h = (sums.shape[-1] - 1) // 2
    align_corners = True
    wanted = [True, False]  # the gradient by the plane, not by the points
    gradient: Tensor = torch.ops.aten.grid_sampler_2d_backward(
        values.contiguous(), sums, (points * (PADDING / h)).contiguous(), 0, 0, align_corners, wanted
    )[0]
    return sums + gradient


def add_friedel(sums: Float[Tensor, "c 3 d d"]) -> Float[Tensor, "c 3 d d"]:
    """Add each coefficient's Friedel mate: channels (re, im, weight), of which im changes its sign."""
    return sums + sums.flip(2, 3) * torch.tensor([1.0, -1.0, 1.0])[:, None, None]


def plane_shells(half_side: int) -> tuple[Tensor, Tensor]:
    """Return (shell, radius) of every sample of a plane in cycles per unpadded box."""
    x = torch.arange(-half_side, half_side + 1).float() / PADDING
    radius = torch.sqrt(x[:, None].square() + x[None, :].square())
    return radius.round().long(), radius


def _window(n: int) -> Float[Tensor, "n n"]:
    line = torch.sinc((torch.arange(n) - n // 2) / (PADDING * n)).square()
    return line[:, None] * line[None, :]
