"""Poses by regression: a small convolutional network trained on particles of known pose (CryoGEM §5.3, appendix C.3).

The paper supervises cryoFIRE's pose module; this network is our own, with the same kind of output (two vectors made a rotation,
and a shift). Images are square, white, of background mean 0 and deviation 1. Every batch is turned by multiples of 90° and
mirrored at random: a mirrored projection is the view from the other side, so pose and shift follow exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from models.cryogem.poses import pose_loss, rotation_from_six

_STRIDE = 8
_GROUPS = 8
_SHIFT_UNIT = 0.1
"""The loss's unit of shift, in boxes (the paper names none). In boxes, particles a few hundredths off centre would count for so
little beside rotations that shifts are never learnt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PosedParticles:
    """Particle images with their truth: rotations, and where the particle is from the box's middle pixel (n // 2).

    Shifts are (y, x) as fractions of the box.
    """

    images: Float[Tensor, "b n n"]
    rotations: Float[Tensor, "b 3 3"]
    shifts: Float[Tensor, "b 2"]

    def __len__(self) -> int:
        return len(self.images)

    def take(self, rows: Tensor) -> PosedParticles:
        """Return the particles at `rows`."""
        return PosedParticles(
            images=self.images[rows], rotations=self.rotations[rows], shifts=self.shifts[rows]
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PoseTraining:
    """How a pose network is trained; the paper's batch is 256, for 200 epochs of 100,000 particles."""

    seed: int = 0
    epochs: int = 8
    batch_size: int = 64
    learning_rate: float = 2e-3
    width: int = 16
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)}, must be 1 or more")
        if self.width % _GROUPS:
            raise ValueError(f"width: {self.width}, must be a multiple of {_GROUPS}")
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate: {self.learning_rate}, must be over 0")


class PoseNetwork(nn.Module):
    """Three stages of strided and residual convolutions, and two dense layers onto eight numbers.

    Parameters
    ----------
    box_px
        Side of the images, a multiple of 8.
    width
        Channels of the first stage, a multiple of 8; doubled by each stage.
    """

    def __init__(self, box_px: int, width: int = 32) -> None:
        super().__init__()
        if box_px % _STRIDE or box_px < 2 * _STRIDE:
            raise ValueError(f"box_px: {box_px}, must be a multiple of {_STRIDE}, {2 * _STRIDE} or more")
        self.box_px = box_px
        stages: list[nn.Module] = [nn.Conv2d(1, width, 7, stride=2, padding=3)]
        for channels in (width, 2 * width):
            stages += [_Residual(channels), nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1)]
        stages.append(_Residual(4 * width))
        self.stages = nn.Sequential(*stages)
        side = box_px // _STRIDE
        self.head = nn.Sequential(
            nn.GroupNorm(_GROUPS, 4 * width),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(4 * width * side * side, 8 * width),
            nn.ReLU(),
            nn.Linear(8 * width, 8),
        )

    def forward(self, images: Float[Tensor, "b n n"]) -> tuple[Float[Tensor, "b 3 3"], Float[Tensor, "b 2"]]:
        """Return rotations and shifts."""
        if images.shape[-1] != self.box_px or images.shape[-2] != self.box_px:
            raise ValueError(f"images: {tuple(images.shape)}, must be (b, {self.box_px}, {self.box_px})")
        found = self.head(self.stages(images[:, None]))
        return rotation_from_six(found[:, :6]), _SHIFT_UNIT * found[:, 6:]


class _Residual(nn.Module):
    """Two convolutions behind norms, added to what they are given."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        self.norms = nn.ModuleList([nn.GroupNorm(_GROUPS, channels) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        """Return x + F(x)."""
        inner = self.first(functional.relu(self.norms[0](x)))
        return x + self.second(functional.relu(self.norms[1](inner)))


def train_pose_network(
    particles: PosedParticles,
    group: Float[Tensor, "g 3 3"],
    settings: PoseTraining,
    *,
    on_epoch: Callable[[int, float], None] | None = None,
) -> PoseNetwork:
    """Train a network on particles of known pose; `on_epoch` gets the epoch and its mean loss.

    The result depends on the seed alone (CPU, same number of threads).
    """
    if not len(particles) or not bool(torch.isfinite(particles.images).all()):
        raise ValueError(f"particles: {len(particles)} images, must be one or more, and finite")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        network = PoseNetwork(int(particles.images.shape[-1]), settings.width)
    device = torch.device(settings.device)
    network.to(device).train()
    symmetry = group.to(device)
    optimiser = torch.optim.AdamW(network.parameters(), lr=settings.learning_rate, weight_decay=1e-2)
    n_batches = math.ceil(len(particles) / settings.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, settings.learning_rate, total_steps=settings.epochs * n_batches
    )
    rng = np.random.default_rng(settings.seed)
    for epoch in range(settings.epochs):
        order, total = torch.from_numpy(rng.permutation(len(particles))), 0.0
        for rows in order.split(settings.batch_size):
            batch = turn_particles(
                particles.take(rows), quarter_turns=int(rng.integers(4)), is_mirrored=bool(rng.integers(2))
            )
            rotations, shifts = network(batch.images.to(device))
            loss = pose_loss(
                rotations,
                shifts / _SHIFT_UNIT,
                batch.rotations.to(device),
                batch.shifts.to(device) / _SHIFT_UNIT,
                symmetry,
            )
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()
            total += float(loss.detach()) * len(rows)
        if on_epoch is not None:
            on_epoch(epoch, total / len(particles))
    return network.cpu().eval()


@torch.inference_mode()
def predict_poses(
    network: PoseNetwork, images: Float[Tensor, "b n n"], *, batch_size: int = 256
) -> tuple[Float[Tensor, "b 3 3"], Float[Tensor, "b 2"]]:
    """Return rotations and shifts of images."""
    parts = [network(part) for part in images.split(batch_size)]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def turn_particles(particles: PosedParticles, *, quarter_turns: int, is_mirrored: bool) -> PosedParticles:
    """Return the particles turned by multiples of 90° in the image and mirrored in x, with poses and shifts that say so.

    Turns are about the middle between pixels, half a pixel from n // 2: shifts change by that too.
    """
    n = int(particles.images.shape[-1])
    images, half = particles.images, 0.5 / n
    y, x = (particles.shifts + half).unbind(-1)
    turn = torch.eye(3)
    if is_mirrored:
        images, x = images.flip(-1), -x
        # seen from behind: half a turn about y
        turn = torch.diag(torch.tensor([-1.0, 1.0, -1.0]))
    for _ in range(quarter_turns % 4):
        images, (y, x) = torch.rot90(images, 1, dims=(-2, -1)), (-x, y)
        turn = torch.tensor([[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]) @ turn
    return PosedParticles(
        images=images.contiguous(),
        rotations=turn @ particles.rotations,
        shifts=torch.stack((y, x), dim=-1) - half,
    )
