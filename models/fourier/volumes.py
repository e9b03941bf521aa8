"""Bringing a volume onto another grid."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from models.fourier.transforms import centred_irfft3, centred_rfft3


def resample_volume(
    volume: Float[Tensor, "d d d"],
    pixel_size_angstrom: float,
    new_pixel_size_angstrom: float,
    new_box_px: int,
) -> Float[Tensor, "n n n"]:
    """Return the volume on a grid of another pixel size and box, both centred on the middle voxel.

    Frequencies beyond a coarser grid's Nyquist are removed first; then values are interpolated linearly
    on a grid made at least twice as fine as the new one, so that linear interpolation costs little. What lies
    outside the old box is zero.
    """
    n_old = int(volume.shape[0])
    spectrum = centred_rfft3(volume)
    if new_pixel_size_angstrom > pixel_size_angstrom:
        full = torch.fft.fftfreq(n_old, pixel_size_angstrom)
        half = torch.fft.rfftfreq(n_old, pixel_size_angstrom)
        k2 = full[:, None, None] ** 2 + full[None, :, None] ** 2 + half[None, None, :] ** 2
        spectrum = spectrum * (k2 <= (0.5 / new_pixel_size_angstrom) ** 2)
    factor = max(1, -(-2 * pixel_size_angstrom // new_pixel_size_angstrom))
    fine = _upsample(spectrum, n_old, int(factor))
    fine_pixel = pixel_size_angstrom / int(factor)
    n_fine = int(fine.shape[0])
    position = (torch.arange(new_box_px) - new_box_px // 2) * (
        new_pixel_size_angstrom / fine_pixel
    ) + n_fine // 2
    normalised = 2.0 * position / (n_fine - 1) - 1.0
    z, y, x = torch.meshgrid(normalised, normalised, normalised, indexing="ij")
    grid = torch.stack((x, y, z), dim=-1)[None]
    return functional.grid_sample(fine[None, None], grid, padding_mode="zeros", align_corners=True)[0, 0]


def _upsample(spectrum: Tensor, n_old: int, factor: int) -> Tensor:
    if factor == 1:
        return centred_irfft3(spectrum, n_old)
    n_new = n_old * factor
    out = spectrum.new_zeros((n_new, n_new, n_new // 2 + 1))
    positive, negative = (n_old + 1) // 2, n_old // 2
    columns = n_old // 2 + 1
    for rows in (slice(0, positive), slice(-negative, None)):
        for sections in (slice(0, positive), slice(-negative, None)):
            out[sections, rows, :columns] = spectrum[sections, rows, :columns]
    return centred_irfft3(out, n_new) * factor**3
