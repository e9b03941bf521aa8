"""Cutting particles out: boxes, Fourier rescaling, RELION's background normalisation, contrast inversion."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from models.fourier.transforms import crop_rfft2, shift_phases

_BATCH = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class BoxSettings:
    """Box sizes: `box_size_px` in pixels of the micrograph (even), `extract_box_px` after rescaling (even, ≤ box).

    `background_radius_px` is the radius, in pixels of the extracted image, outside which the background is.
    """

    box_size_px: int
    extract_box_px: int
    background_radius_px: float

    def __post_init__(self) -> None:
        """Refuse sizes for which centres and Nyquist terms are not defined."""
        for name, value in (("box_size_px", self.box_size_px), ("extract_box_px", self.extract_box_px)):
            if value < 8 or value % 2:
                raise ValueError(f"{name}: {value}, must be even and at least 8")
        if self.extract_box_px > self.box_size_px:
            raise ValueError(f"extract_box_px: {self.extract_box_px}, must not exceed {self.box_size_px}")


def boxes_inside(
    centres_yx_px: NDArray[np.floating], shape_yx: tuple[int, int], box_size_px: int
) -> NDArray[np.bool_]:
    """Return which boxes lie wholly inside the micrograph; the centre is the box's pixel n // 2."""
    corners = np.rint(np.asarray(centres_yx_px, dtype=np.float64)).reshape(-1, 2) - box_size_px // 2
    limits = np.asarray(shape_yx) - box_size_px
    return np.asarray(np.all((corners >= 0) & (corners <= limits), axis=1))


def extract_particles(
    micrograph: Float[Tensor, "h w"], centres_yx_px: NDArray[np.floating], settings: BoxSettings
) -> Iterator[Float[Tensor, "b s s"]]:
    """Yield batches of particles, in order: centred to sub-pixel, rescaled, white, background mean 0 and SD 1.

    Every box must lie inside (`boxes_inside`). The fraction of a pixel between a centre and the box's middle
    pixel is applied as a phase shift together with the rescaling.
    """
    centres = np.asarray(centres_yx_px, dtype=np.float64).reshape(-1, 2)
    shape_yx = (int(micrograph.shape[0]), int(micrograph.shape[1]))
    if not boxes_inside(centres, shape_yx, settings.box_size_px).all():
        raise ValueError("centres_yx_px: a box crosses the border, filter with boxes_inside first")
    box, size = settings.box_size_px, settings.extract_box_px
    corners = np.rint(centres).astype(np.int64) - box // 2
    remainders = torch.from_numpy(np.rint(centres) - centres).to(torch.float32)
    background = background_mask(size, settings.background_radius_px)
    for start in range(0, len(centres), _BATCH):
        cuts = torch.stack([micrograph[y : y + box, x : x + box] for y, x in corners[start : start + _BATCH]])
        # invert, and take the mean away first: float32 sums over a bright background lose digits
        cuts = cuts.mean(dim=(-2, -1), keepdim=True) - cuts
        spectra = torch.fft.rfft2(cuts) * shift_phases((box, box), remainders[start : start + _BATCH])
        images = torch.fft.irfft2(crop_rfft2(spectra, (box, box), (size, size)), s=(size, size))
        yield normalise_background(images, background)


def background_mask(size_px: int, radius_px: float) -> Bool[Tensor, "s s"]:
    """Return the pixels farther than the radius from the middle pixel (n // 2)."""
    axis = torch.arange(size_px, dtype=torch.float32) - size_px // 2
    mask = axis.square()[:, None] + axis.square()[None, :] > radius_px**2
    if int(mask.sum()) < 16:
        raise ValueError(f"radius_px: {radius_px}, leaves no background in a box of {size_px}")
    return mask


def normalise_background(
    images: Float[Tensor, "b s s"], background: Bool[Tensor, "s s"]
) -> Float[Tensor, "b s s"]:
    """Take away the plane fitted to the background and divide by the background's standard deviation (RELION)."""
    n = int(images.shape[-1])
    axis = (torch.arange(n, dtype=torch.float32) - n // 2) / n
    ones = torch.ones(n, n)
    planes = torch.stack([ones, axis[:, None] * ones, axis[None, :] * ones], dim=-1)
    design = planes[background]
    values = images[:, background]
    # normal equations in double precision, not lstsq: its last bits depend on where memory happens to lie
    wide = design.double()
    coefficients = (torch.linalg.inv(wide.T @ wide) @ wide.T).to(values.dtype) @ values.T
    flat = images - torch.einsum("ijp,pb->bij", planes, coefficients)
    deviation = flat[:, background].std(dim=1, correction=0).clamp(min=1e-12)
    return flat / deviation[:, None, None]
