"""The micrograph on the picker's coarse grid, and its locally normalised correlation with banks of templates.

The response to a template is the normalised cross-correlation over its support times √(pixels of the support):
on white noise it has mean 0 and spread 1, whatever the dose and however densely the micrograph is packed (a
spread measured on the micrograph itself would count its particles as noise). Many templates share one support:
their bank is written in its principal components, of which a few dozen hold 99.9 % of what a thousand views and
turns have, so that a micrograph takes a few dozen transforms and one matrix product.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from models.fourier.filters import smooth_gaussian
from models.fourier.transforms import crop_rfft2, good_size
from models.picking.contamination import find_contamination

PIXELS_PER_DIAMETER = 16.0
"""Resolution of the coarse grid for blobs: finer gains nothing (F1 on expert picks), coarser misplaces shells."""

CONTAMINATION_SD = 6.0
"""Limit of the contamination mask in robust standard deviations (safe: 5-8)."""

# What the components of a bank may leave out of its power; scores lose half of it (safe: 1e-4-1e-2).
_LEFT_OUT = 1e-3
# Values held at once per matrix product (32 MB): larger blocks leave the cache, smaller ones waste the product.
_BLOCK_VALUES = 8_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class CoarseMicrograph:
    """A micrograph's negative (white protein), binned and flattened, with its mask.

    Pixel 0 stays in its place: coordinates times `scale_yx` are pixels of the micrograph.
    """

    flat: Float[Tensor, "h w"]
    mask: Bool[Tensor, "h w"]
    pixel_size_angstrom: float
    scale_yx: tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateBank:
    """Templates `(t, s, s)` with the middle pixel (s // 2, s odd) as origin, and the support that they share."""

    templates: Float[Tensor, "t s s"]
    support: Bool[Tensor, "s s"]

    def __post_init__(self) -> None:
        """Refuse an even box, whose middle would lie between pixels."""
        if self.templates.shape[-1] % 2 == 0:
            raise ValueError(f"templates: box of {self.templates.shape[-1]} px, must be odd")


def coarsen_micrograph(
    micrograph: Float[Tensor, "h w"],
    pixel_size_angstrom: float,
    *,
    coarse_pixel_angstrom: float,
    diameter_angstrom: float,
    contamination_sd: float,
) -> CoarseMicrograph:
    """Bin to about the given pixel, mask contamination, and flatten the background over three diameters."""
    binned, scale, pixel = _bin(micrograph, pixel_size_angstrom, coarse_pixel_angstrom)
    diameter_px = diameter_angstrom / pixel
    mask = find_contamination(binned, diameter_px, contamination_sd)
    return CoarseMicrograph(
        flat=flatten_background(binned, diameter_px, mask).to(micrograph.device),
        mask=mask,
        pixel_size_angstrom=pixel,
        scale_yx=scale,
    )


def mask_micrograph(
    micrograph: Float[Tensor, "h w"],
    pixel_size_angstrom: float,
    *,
    diameter_angstrom: float,
    contamination_sd: float = CONTAMINATION_SD,
) -> NDArray[np.bool_]:
    """Return the contamination of a micrograph on the grid that blobs of the diameter are picked on."""
    coarse = diameter_angstrom / PIXELS_PER_DIAMETER
    binned, _, pixel = _bin(micrograph, pixel_size_angstrom, coarse)
    return np.asarray(find_contamination(binned, diameter_angstrom / pixel, contamination_sd).numpy())


def _bin(
    micrograph: Tensor, pixel_size_angstrom: float, coarse_pixel_angstrom: float
) -> tuple[Tensor, tuple[float, float], float]:
    """Return the binned negative, pixels per binned pixel along y and x, and the binned pixel size.

    The micrograph is mirrored to a good length first: a wrapped-around edge would look like a particle.
    """
    height, width = (int(n) for n in micrograph.shape)
    factor = max(1.0, coarse_pixel_angstrom / pixel_size_angstrom)
    padded = (good_size(height + height // 50), good_size(width + width // 50))
    pad = (0, padded[1] - width, 0, padded[0] - height)
    image = torch.nn.functional.pad(-micrograph[None, None], pad, mode="reflect")[0, 0]
    # the mean goes first: float32 transforms of a bright background lose digits
    image = image - image.mean()
    new = (2 * round(padded[0] / factor / 2), 2 * round(padded[1] / factor / 2))
    # the coarse grid is small: masks and backgrounds are made on the CPU, wherever the micrograph is
    small = torch.fft.irfft2(crop_rfft2(torch.fft.rfft2(image), padded, new), s=new).cpu()
    scale = (padded[0] / new[0], padded[1] / new[1])
    binned = small[: int(height / scale[0]), : int(width / scale[1])]
    pixel = pixel_size_angstrom * math.sqrt(scale[0] * scale[1])
    return binned, scale, pixel


def flatten_background(
    image: Float[Tensor, "h w"], diameter_px: float, mask: Bool[Tensor, "h w"]
) -> Float[Tensor, "h w"]:
    """Return the image less its background over three diameters, divided by its local contrast; 0 where masked.

    Background and contrast are means over the unmasked surroundings. The local standard deviation over six
    diameters may fall at most to half of the micrograph's median, so that empty areas are not blown up to look
    like full ones.
    """
    sigma = max(2.0, 1.5 * diameter_px)
    used = (~mask).to(image.dtype)
    if not mask.any():
        centred = image - smooth_gaussian(image, sigma)
        weight: Tensor | float = 1.0
    else:
        share = smooth_gaussian(used, sigma).clamp(min=1e-3)
        centred = (image - smooth_gaussian(image * used, sigma) / share) * used
        weight = smooth_gaussian(used, 2.0 * sigma).clamp(min=1e-3)
    limit = 6.0 * float(centred.std())
    squares = smooth_gaussian(centred.clamp(-limit, limit).square(), 2.0 * sigma) / weight
    local = squares.clamp(min=0.0).sqrt()
    typical = 0.0 if mask.all() else float(local[~mask].median())
    return centred / local.clamp(min=max(0.5 * typical, 1e-12))


def correlate(
    flat: Float[Tensor, "h w"], bank: TemplateBank
) -> tuple[Float[Tensor, "h w"], Int[Tensor, "h w"]]:
    """Return the greatest response over the bank at every pixel, and which template gave it."""
    height, width = (int(n) for n in flat.shape)
    half = bank.templates.shape[-1] // 2
    pad = min(half, height - 1, width - 1)
    size = (good_size(height + 2 * pad), good_size(width + 2 * pad))
    pads = (pad, min(size[1] - width - pad, width - 1), pad, min(size[0] - height - pad, height - 1))
    padded = torch.nn.functional.pad(flat[None, None], pads, mode="reflect")[0, 0]
    shape = (int(padded.shape[0]), int(padded.shape[1]))
    spectrum, squares = torch.fft.rfft2(padded), torch.fft.rfft2(padded.square())

    def convolve(of: Tensor, kernel: Tensor) -> Tensor:
        # correlation: the kernel's conjugate; its middle pixel goes to the origin
        whole = torch.zeros(shape, dtype=flat.dtype, device=flat.device)
        whole[: 2 * half + 1, : 2 * half + 1] = kernel
        whole = whole.roll((-half, -half), dims=(0, 1))
        found: Tensor = torch.fft.irfft2(of * torch.fft.rfft2(whole).conj(), s=shape)
        return found[pad : pad + height, pad : pad + width]

    support = bank.support.to(flat.dtype)
    n = float(support.sum())
    variance = convolve(squares, support / n) - convolve(spectrum, support / n).square()
    # half of the typical variance keeps an empty corner from being blown up
    norm = variance.clamp(min=max(0.5 * float(variance.median()), 1e-12)).rsqrt()
    weights, components = _components(bank)
    maps = torch.stack([convolve(spectrum, c) * norm for c in components]).reshape(len(components), -1)
    block = max(1, _BLOCK_VALUES // len(weights))
    parts = [(weights @ part).max(dim=0) for part in maps.split(block, dim=1)]
    best = torch.cat([part.values for part in parts]).reshape(height, width)
    which = torch.cat([part.indices for part in parts]).reshape(height, width)
    return best, which


def normalise_templates(bank: TemplateBank) -> Float[Tensor, "t s s"]:
    """Return the templates with zero mean and unit norm over the support, and zero outside."""
    support = bank.support.to(bank.templates.dtype)
    centred = (
        bank.templates - (bank.templates * support).sum((-2, -1), keepdim=True) / support.sum()
    ) * support
    return centred / centred.square().sum((-2, -1), keepdim=True).sqrt().clamp(min=1e-12)


def _components(bank: TemplateBank) -> tuple[Float[Tensor, "t c"], Float[Tensor, "c s s"]]:
    """Return weights and orthonormal components with templates ≈ weights · components."""
    templates = normalise_templates(bank)
    rows = templates[:, bank.support]
    gram = rows.T @ rows
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(0).clamp(min=0.0), vectors.flip(1)
    kept = 1 + int((values.cumsum(0) < (1.0 - _LEFT_OUT) * values.sum()).sum())
    basis = vectors[:, :kept]
    components = templates.new_zeros((kept, *templates.shape[1:]))
    components[:, bank.support] = basis.T
    return rows @ basis, components
