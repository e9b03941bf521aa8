"""CryoGEM's networks: a UNet that paints noise, a PatchGAN that judges it, heads that turn its features into vectors.

The layer plan is pix2pix's and CUT's (Isola et al. 2017, Park et al. 2020): 4 × 4 convolutions of stride 2 with biases,
instance norm without parameters, LeakyReLU(0.2) on the way down and ReLU on the way up. Weights start from N(0, 0.02²), biases
from 0, drawn by a generator that is handed in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

OutputForm = Literal["image", "change"]

_SLOPE = 0.2
_INITIAL_SD = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkSettings:
    """Sizes. The defaults are the paper's; images must be multiples of 2**depth a side.

    `nce_levels` counts encoder levels from 1: features behind the level's LeakyReLU, at 1/2**level of the side.
    `output` "image" is the paper's; with "change" the network gives what is added to its input and begins as the identity,
    which short trainings are better off with: what they have not learnt yet stays the noisy micrograph that it was.
    """

    depth: int = 10
    generator_filters: int = 64
    discriminator_filters: int = 128
    discriminator_layers: int = 3
    nce_levels: tuple[int, ...] = (1, 2, 3, 4, 5)
    head_width: int = 256
    output: OutputForm = "image"

    def __post_init__(self) -> None:
        if self.output not in get_args(OutputForm):
            raise ValueError(f"output: {self.output!r}, must be one of {', '.join(get_args(OutputForm))}")
        if self.depth < 2:
            raise ValueError(f"depth: {self.depth}, must be 2 or more")
        if not self.nce_levels or min(self.nce_levels) < 1 or max(self.nce_levels) >= self.depth:
            raise ValueError(
                f"nce_levels: {self.nce_levels}, must lie in 1 … {self.depth - 1} (depth {self.depth})"
            )
        for name in ("generator_filters", "discriminator_filters", "head_width", "discriminator_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)}, must be 1 or more")

    @property
    def multiple_px(self) -> int:
        """Sides of images are multiples of this."""
        return int(2**self.depth)

    @property
    def encoder_channels(self) -> tuple[int, ...]:
        """Channels of each encoder level."""
        return tuple(self.generator_filters * min(2**level, 8) for level in range(self.depth))


class UnetGenerator(nn.Module):
    """The generator: `encode` gives the features of the first levels without computing the rest."""

    def __init__(self, settings: NetworkSettings) -> None:
        super().__init__()
        self.settings = settings
        channels = settings.encoder_channels
        self.down = nn.ModuleList(
            nn.Conv2d(1 if i == 0 else channels[i - 1], channels[i], 4, stride=2, padding=1)
            for i in range(settings.depth)
        )
        innermost = settings.depth - 1
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(
                channels[i] * (1 if i == innermost else 2),
                1 if i == 0 else channels[i - 1],
                4,
                stride=2,
                padding=1,
            )
            for i in range(settings.depth)
        )

    def forward(self, image: Float[Tensor, "b 1 h w"]) -> Float[Tensor, "b 1 h w"]:
        """Return the image translated, in [-1, 1]."""
        height, width = image.shape[-2:]
        multiple = self.settings.multiple_px
        if height % multiple or width % multiple:
            raise ValueError(f"image: {height} x {width} px, sides must be multiples of {multiple}")
        return self.decode(self.encode(image, self.settings.depth - 1), image)

    def decode(self, features: Sequence[Tensor], image: Float[Tensor, "b 1 h w"]) -> Float[Tensor, "b 1 h w"]:
        """Return the translated image from the image and its features of all levels but the innermost."""
        depth = self.settings.depth
        value = functional.relu(self.down[depth - 1](features[-1]))
        for level in range(depth - 1, 0, -1):
            value = functional.instance_norm(self.up[level](value))
            value = functional.relu(torch.cat((features[level - 1], value), dim=1))
        painted = torch.tanh(self.up[0](value))
        # a change has to carry a pixel from one end of the range to the other
        return painted if self.settings.output == "image" else (image + 2.0 * painted).clamp(-1.0, 1.0)

    def initialise(self, generator: torch.Generator) -> None:
        """Draw the weights (`initialise`); a network that gives a change begins with none."""
        initialise(self, generator)
        if self.settings.output == "change":
            nn.init.zeros_(self.up[0].weight)  # type: ignore[arg-type]

    def encode(self, image: Float[Tensor, "b 1 h w"], n_levels: int) -> list[Tensor]:
        """Return the features of levels 1 … `n_levels` (fewer than the depth), behind their LeakyReLU."""
        features: list[Tensor] = []
        value = image
        for level in range(n_levels):
            value = self.down[level](value)
            if level:
                value = functional.instance_norm(value)
            value = functional.leaky_relu(value, _SLOPE)
            features.append(value)
        return features


class PatchDiscriminator(nn.Module):
    """The PatchGAN: with three layers each output judges 70 × 70 pixels."""

    def __init__(self, settings: NetworkSettings) -> None:
        super().__init__()
        n = settings.discriminator_layers
        filters = [settings.discriminator_filters * min(2**i, 8) for i in range(n + 1)]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(1 if i == 0 else filters[i - 1], filters[i], 4, stride=2 if i < n else 1, padding=1)
            for i in range(n + 1)
        )
        self.judge = nn.Conv2d(filters[n], 1, 4, stride=1, padding=1)

    def forward(self, image: Float[Tensor, "b 1 h w"]) -> Float[Tensor, "b 1 hp wp"]:
        """Return a logit per patch, high for real."""
        value = image
        for i, convolution in enumerate(self.convolutions):
            value = convolution(value)
            if i:
                value = functional.instance_norm(value)
            value = functional.leaky_relu(value, _SLOPE)
        return self.judge(value)


class FeatureHeads(nn.Module):
    """One two-layer MLP per contrastive level: features at given places become unit vectors."""

    def __init__(self, settings: NetworkSettings) -> None:
        super().__init__()
        channels = settings.encoder_channels
        self.levels = settings.nce_levels
        self.heads = nn.ModuleList(
            nn.Sequential(
                nn.Linear(channels[level - 1], settings.head_width),
                nn.ReLU(),
                nn.Linear(settings.head_width, settings.head_width),
            )
            for level in self.levels
        )

    def forward(
        self, features: Sequence[Tensor], places_yx: Int[Tensor, "n 2"]
    ) -> list[Float[Tensor, "n c"]]:
        """Return the vectors of every level at pixels of the image; a pixel takes the feature of the cell it lies in.

        `features` are those of `UnetGenerator.encode` for one image, level 1 first.
        """
        vectors = []
        for head, level in zip(self.heads, self.levels, strict=True):
            grid = features[level - 1][0]
            cell = torch.div(places_yx, 2**level, rounding_mode="floor")
            taken = grid[:, cell[:, 0], cell[:, 1]].T
            vectors.append(functional.normalize(head(taken.float()), dim=-1))
        return vectors


def initialise(module: nn.Module, generator: torch.Generator) -> None:
    """Draw the weights of every convolution and linear layer from N(0, 0.02²); set biases to 0."""
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
                layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) * _INITIAL_SD)
                if layer.bias is not None:
                    layer.bias.zero_()
