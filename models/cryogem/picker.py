"""A small picker to be trained on annotated micrographs: fully convolutional, on a grid of 16 pixels to a diameter.

It stands where the paper has Topaz (§5.2): the same network, trained on data of different origin, says what the data are worth.
Micrographs are binned, flattened and masked as for the blob picker, so that one network serves any pixel size and dose. The
target is a Gaussian on each particle, the loss the focal loss of such heat maps (Lin et al. 2017; Zhou et al. 2019, eq. 1), since
particles cover one pixel in a hundred. Scores are probabilities, for ranking; they are not the calibrated z-scores of blobs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from models.picking.correlation import (
    CONTAMINATION_SD,
    PIXELS_PER_DIAMETER,
    CoarseMicrograph,
    coarsen_micrograph,
)
from models.picking.maxima import Picks, find_maxima

_TARGET_SD_DIAMETERS = 0.12
_DILATIONS = (1, 2, 4, 2, 1)
"""With the first 5 × 5 window a pixel sees 25: one and a half diameters."""
_POSITIVE_POWER, _NEGATIVE_POWER = 2.0, 4.0
_PRIOR = 0.02
_LOWEST_SCORE = 0.005
MIN_DISTANCE_DIAMETERS = 0.7


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledMicrograph:
    """A micrograph (dark protein), the centres of all its particles, and their scale."""

    image: Float[Tensor, "h w"]
    centres_yx_px: NDArray[np.float64]
    pixel_size_angstrom: float
    diameter_angstrom: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PickerTraining:
    """How a picker is trained: passes over the micrographs, one micrograph a step."""

    seed: int = 0
    epochs: int = 20
    learning_rate: float = 2e-3
    width: int = 16
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("epochs", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)}, must be 1 or more")
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate: {self.learning_rate}, must be over 0")


class PickerNetwork(nn.Module):
    """Convolutions without pooling: a logit for each pixel of the coarse grid."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(1, width, 5, padding=2), nn.ReLU()]
        for dilation in _DILATIONS:
            layers += [nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation), nn.ReLU()]
        last = nn.Conv2d(width, 1, 1)
        # start at the share of particles: a network that starts at a half first has to unlearn that (Lin et al. 2017)
        nn.init.constant_(last.bias, float(np.log(_PRIOR / (1.0 - _PRIOR))))  # type: ignore[arg-type]
        self.layers = nn.Sequential(*layers, last)

    def forward(self, flat: Float[Tensor, "b h w"]) -> Float[Tensor, "b h w"]:
        """Return logits."""
        return self.layers(flat[:, None])[:, 0]


def heat_map(
    centres_yx: NDArray[np.floating], shape_yx: tuple[int, int], diameter_px: float
) -> Float[Tensor, "h w"]:
    """Return a Gaussian of 0.12 diameters on each centre, 1 at its pixel; the greater where two overlap."""
    target = torch.zeros(shape_yx)
    sd = _TARGET_SD_DIAMETERS * diameter_px
    rows, columns = torch.arange(shape_yx[0]).float(), torch.arange(shape_yx[1]).float()
    for y, x in np.rint(np.asarray(centres_yx, dtype=np.float64)).tolist():
        if not (0 <= y < shape_yx[0] and 0 <= x < shape_yx[1]):
            continue
        down = torch.exp(-0.5 * ((rows - y) / sd).square())
        across = torch.exp(-0.5 * ((columns - x) / sd).square())
        target = torch.maximum(target, down[:, None] * across[None, :])
    return target


def focal_loss(
    logits: Float[Tensor, "*b h w"], target: Float[Tensor, "*b h w"], is_used: Bool[Tensor, "*b h w"]
) -> Float[Tensor, ""]:
    """Return the focal loss of heat maps, per particle.

    -(1 - p)² log p at the targets' peaks, -(1 - t)⁴ p² log(1 - p) elsewhere: near a particle little is asked for.
    """
    p = torch.sigmoid(logits)
    is_peak = (target >= 1.0) & is_used
    positive = (1.0 - p).pow(_POSITIVE_POWER) * functional.logsigmoid(logits) * is_peak
    rest = is_used & ~is_peak
    negative = (
        (1.0 - target).pow(_NEGATIVE_POWER) * p.pow(_POSITIVE_POWER) * functional.logsigmoid(-logits) * rest
    )
    return -(positive.sum() + negative.sum()) / is_peak.sum().clamp_min(1)


def train_picker(
    micrographs: Sequence[LabelledMicrograph],
    settings: PickerTraining,
    *,
    on_epoch: Callable[[int, float], None] | None = None,
) -> PickerNetwork:
    """Train a picker from random weights; `on_epoch` gets the epoch and its mean loss.

    Micrographs without particles count as background. The result depends on the seed alone (CPU, same number of threads).
    """
    if not any(len(m.centres_yx_px) for m in micrographs):
        raise ValueError(f"micrographs: {len(micrographs)}, must hold a particle or more")
    device = torch.device(settings.device)
    prepared = []
    for micrograph in micrographs:
        coarse = coarsen(micrograph.image, micrograph.pixel_size_angstrom, micrograph.diameter_angstrom)
        centres = micrograph.centres_yx_px.reshape(-1, 2) / np.asarray(coarse.scale_yx)
        shape = (int(coarse.flat.shape[0]), int(coarse.flat.shape[1]))
        diameter_px = micrograph.diameter_angstrom / coarse.pixel_size_angstrom
        target = heat_map(centres, shape, diameter_px)
        prepared.append((coarse.flat.to(device), target.to(device), ~coarse.mask.to(device)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        network = PickerNetwork(settings.width)
    network.to(device).train()
    optimiser = torch.optim.AdamW(network.parameters(), lr=settings.learning_rate, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, settings.learning_rate, total_steps=settings.epochs * len(prepared)
    )
    rng = np.random.default_rng(settings.seed)
    for epoch in range(settings.epochs):
        total = 0.0
        for index in rng.permutation(len(prepared)).tolist():
            turns, is_mirrored = int(rng.integers(4)), bool(rng.integers(2))
            flat, target, used = (_turned(part, turns, is_mirrored=is_mirrored) for part in prepared[index])
            loss = focal_loss(network(flat[None])[0], target, used)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()
            total += float(loss.detach())
        if on_epoch is not None:
            on_epoch(epoch, total / len(prepared))
    return network.cpu().eval()


@torch.inference_mode()
def pick_with_network(
    network: PickerNetwork,
    image: Float[Tensor, "h w"],
    pixel_size_angstrom: float,
    diameter_angstrom: float,
    *,
    max_picks: int = 5000,
) -> Picks:
    """Pick a micrograph (dark protein); scores are the network's probabilities, best first."""
    coarse = coarsen(image, pixel_size_angstrom, diameter_angstrom)
    diameter_px = diameter_angstrom / coarse.pixel_size_angstrom
    maxima = find_maxima(
        torch.sigmoid(network(coarse.flat[None])[0]),
        coarse.mask,
        threshold=_LOWEST_SCORE,
        min_distance_px=MIN_DISTANCE_DIAMETERS * diameter_px,
        border_px=0.5 * diameter_px,
        max_picks=max_picks,
    )
    n = len(maxima.values)
    return Picks(
        centres_yx_px=(maxima.centres_yx * np.asarray(coarse.scale_yx)).astype(np.float32),
        scores=maxima.values.astype(np.float32),
        diameters_angstrom=np.full(n, diameter_angstrom, dtype=np.float32),
        mask=coarse.mask.numpy(),
    )


def coarsen(
    image: Float[Tensor, "h w"], pixel_size_angstrom: float, diameter_angstrom: float
) -> CoarseMicrograph:
    """Return the micrograph on the network's grid, white protein."""
    return coarsen_micrograph(
        image,
        pixel_size_angstrom,
        coarse_pixel_angstrom=diameter_angstrom / PIXELS_PER_DIAMETER,
        diameter_angstrom=diameter_angstrom,
        contamination_sd=CONTAMINATION_SD,
    )


def _turned(image: Tensor, quarter_turns: int, *, is_mirrored: bool) -> Tensor:
    turned = torch.rot90(image, quarter_turns, dims=(-2, -1))
    return turned.flip(-1) if is_mirrored else turned
