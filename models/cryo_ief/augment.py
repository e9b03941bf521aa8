"""Two random views of each particle for contrastive learning: the augmentations that the Cryo-IEF paper lists.

Rotation, crop (resized back), then contrast and brightness, blur and solarisation in random order. What is random is
drawn first, for the whole batch, and applied afterwards: workers that share a batch draw the same numbers and apply
their own rows. The paper publishes no strengths: probabilities and blur follow MoCo v3, the crop is milder, because a
particle that leaves its box is another image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

Range = tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class AugmentationConfig:
    """Strengths and probabilities; pairs of probabilities are those of the first and the second view."""

    rotation_probability: float = 1.0
    max_rotation_deg: float = 180.0
    crop_probability: float = 1.0
    crop_area: Range = (0.4, 1.0)
    """Area of the crop over the image's."""
    crop_aspect: Range = (0.75, 4.0 / 3.0)
    jitter_probability: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    blur_probability: Range = (1.0, 0.1)
    blur_sigma_px: Range = (0.1, 2.0)
    solarise_probability: Range = (0.0, 0.2)
    solarise_above: float = 128.0 / 255.0

    def __post_init__(self) -> None:
        probabilities = {
            "rotation_probability": (self.rotation_probability,),
            "crop_probability": (self.crop_probability,),
            "jitter_probability": (self.jitter_probability,),
            "blur_probability": self.blur_probability,
            "solarise_probability": self.solarise_probability,
        }
        for name, values in probabilities.items():
            if not all(0.0 <= value <= 1.0 for value in values):
                msg = f"augmentation.{name}: {values}, a probability is in [0, 1]"
                raise ValueError(msg)
        for name, (low, high) in (
            ("crop_area", self.crop_area),
            ("crop_aspect", self.crop_aspect),
            ("blur_sigma_px", self.blur_sigma_px),
        ):
            if not 0.0 < low <= high:
                msg = f"augmentation.{name}: ({low}, {high}), must be above 0 and rising"
                raise ValueError(msg)
        if self.crop_area[1] > 1.0:
            msg = f"augmentation.crop_area: {self.crop_area}, a crop is no larger than its image"
            raise ValueError(msg)
        if not (0.0 <= self.brightness < 1.0 and 0.0 <= self.contrast < 1.0):
            msg = f"augmentation.brightness, contrast: {self.brightness}, {self.contrast}, must be in [0, 1)"
            raise ValueError(msg)


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawnView:
    """What is random about one view of a batch. `order` holds the three grey-level changes in the order they come."""

    placement: Float[Tensor, "b 2 3"]
    """Affine map from the view's coordinates (x, y in [-1, 1]) to the image's."""
    brightness: Float[Tensor, " b"]
    contrast: Float[Tensor, " b"]
    blur_sigma_px: Float[Tensor, " b"]
    """0 where the image is not blurred."""
    solarise_above: Float[Tensor, " b"]
    """Infinite where the image is not solarised."""
    order: tuple[int, ...]

    def take(self, rows: slice) -> DrawnView:
        """Return the same draw for some of the images."""
        return DrawnView(
            placement=self.placement[rows],
            brightness=self.brightness[rows],
            contrast=self.contrast[rows],
            blur_sigma_px=self.blur_sigma_px[rows],
            solarise_above=self.solarise_above[rows],
            order=self.order,
        )


def draw_view(n: int, config: AugmentationConfig, view: int, generator: torch.Generator) -> DrawnView:
    """Draw view 0 or 1 of `n` images."""

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, generator=generator)

    def is_chosen(probability: float) -> Tensor:
        return torch.rand(n, generator=generator) < probability

    angle = torch.deg2rad(uniform(-config.max_rotation_deg, config.max_rotation_deg))
    angle = angle * is_chosen(config.rotation_probability)
    is_cropped = is_chosen(config.crop_probability)
    area = torch.where(is_cropped, uniform(*config.crop_area), 1.0)
    log_aspect = uniform(math.log(config.crop_aspect[0]), math.log(config.crop_aspect[1]))
    aspect = torch.where(is_cropped, log_aspect.exp(), 1.0)
    # A crop wider than the image is cut to its width, as torchvision's fallback does.
    width, height = (area * aspect).sqrt().clamp(max=1.0), (area / aspect).sqrt().clamp(max=1.0)
    shift_x, shift_y = (1.0 - width) * uniform(-1.0, 1.0), (1.0 - height) * uniform(-1.0, 1.0)
    is_jittered = is_chosen(config.jitter_probability)
    brightness = torch.where(is_jittered, uniform(1.0 - config.brightness, 1.0 + config.brightness), 1.0)
    contrast = torch.where(is_jittered, uniform(1.0 - config.contrast, 1.0 + config.contrast), 1.0)
    sigma = uniform(*config.blur_sigma_px) * is_chosen(config.blur_probability[view])
    is_solarised = is_chosen(config.solarise_probability[view])
    return DrawnView(
        placement=_placement(angle, width, height, shift_x, shift_y),
        brightness=brightness,
        contrast=contrast,
        blur_sigma_px=sigma,
        solarise_above=torch.where(is_solarised, config.solarise_above, math.inf),
        order=tuple(torch.randperm(3, generator=generator).tolist()),
    )


def apply_view(grey: UInt8[Tensor, "b s s"], drawn: DrawnView) -> Float[Tensor, "b 1 s s"]:
    """Return the drawn view of each image as grey level / 255, in [0, 1]."""
    device = grey.device
    images = grey.float()[:, None] / 255.0
    grid = torch.nn.functional.affine_grid(
        drawn.placement.to(device), list(images.shape), align_corners=False
    )
    images = torch.nn.functional.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    changes = (_jitter, _blur, _solarise)
    for index in drawn.order:
        images = changes[index](images, drawn)
    return images


def _placement(angle: Tensor, width: Tensor, height: Tensor, shift_x: Tensor, shift_y: Tensor) -> Tensor:
    """Return the map (view → image): scale and shift select the crop, the rotation turns the image under it."""
    cos, sin = angle.cos(), angle.sin()
    rows = (
        cos * width,
        -sin * height,
        cos * shift_x - sin * shift_y,
        sin * width,
        cos * height,
        sin * shift_x + cos * shift_y,
    )
    return torch.stack(rows, dim=-1).reshape(-1, 2, 3)


def _jitter(images: Float[Tensor, "b 1 s s"], drawn: DrawnView) -> Float[Tensor, "b 1 s s"]:
    """Scale the brightness, then the contrast about the image's mean, as colour jitter does."""
    brightness, contrast = (
        value.to(images.device)[:, None, None, None] for value in (drawn.brightness, drawn.contrast)
    )
    bright = (images * brightness).clamp(0.0, 1.0)
    mean = bright.mean(dim=(2, 3), keepdim=True)
    return ((bright - mean) * contrast + mean).clamp(0.0, 1.0)


def _blur(images: Float[Tensor, "b 1 s s"], drawn: DrawnView) -> Float[Tensor, "b 1 s s"]:
    """Convolve with a Gaussian: multiply the spectrum by exp(−2π²σ²k²)."""
    if not bool((drawn.blur_sigma_px > 0.0).any()):
        return images
    size = images.shape[-1]
    ky = torch.fft.fftfreq(size, device=images.device)[:, None]
    kx = torch.fft.rfftfreq(size, device=images.device)[None, :]
    sigma = drawn.blur_sigma_px.to(images.device)[:, None, None, None]
    window = torch.exp(-2.0 * (math.pi * sigma).square() * (ky.square() + kx.square()))
    blurred: Tensor = torch.fft.irfft2(torch.fft.rfft2(images.float()) * window, s=(size, size))
    return blurred.clamp(0.0, 1.0)


def _solarise(images: Float[Tensor, "b 1 s s"], drawn: DrawnView) -> Float[Tensor, "b 1 s s"]:
    """Invert what is brighter than the threshold."""
    above = drawn.solarise_above.to(images.device)[:, None, None, None]
    return torch.where(images >= above, 1.0 - images, images)
