"""Do the images of one half support the other half's map? What noise refined from a given start does not pass.

Two halves that begin with the same 30 Å shape can agree far beyond it without a single particle: noise is aligned to
that shape, masks sharpen it, and what they add is the same in both halves. The FSC cannot know. The images can: a
half's map has not seen the other half's images, so that the log marginal likelihood of noise under it is below 0 on
average and that of images with their phases drawn anew is the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from models.reconstruction.fine_poses import find_fine_poses
from models.reconstruction.grids import asymmetric_unit, so3_grid
from models.reconstruction.online_em import OnlineEmSettings, evidence_of
from models.reconstruction.particle_data import ParticleData
from models.reconstruction.projector import volume_to_cube
from models.reconstruction.sufficient import ReconstructionGrid, ring_mean

MINIMUM_Z = 4.0
"""Standard deviations of the mean difference to randomised images, as for seeds (`acceptance`)."""

SHARED_MISTAKES = 0.1
"""Above this share of poses elsewhere a resolution is said to be too high, probably."""

MAX_SHELL = 12.0
"""The grid of 15° knows no finer waves."""

IMAGES_PER_HALF = 150


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossEvidence:
    """Mean log evidence per image (nats) under the other half's map, that of randomised images, z of the difference.

    `elsewhere` is the mean posterior mass outside an image's best pose and its surroundings: the share of poses that are
    probably wrong by a nearly equal view. Halves make the same mistakes, so that their FSC does not know of it.
    """

    log_evidence: float
    log_evidence_noise: float
    z: float
    n_images: int
    elsewhere: float

    @property
    def is_supported(self) -> bool:
        """Whether images that the map has not seen prefer it to noise."""
        return self.z >= MINIMUM_Z


def cross_half_evidence(
    data: ParticleData,
    half_set: Int[Tensor, " b"],
    half_maps: tuple[Float[Tensor, "n n n"], Float[Tensor, "n n n"]],
    fsc: Float[Tensor, " s"],
    mask: Float[Tensor, "n n n"],
    group: Float[Tensor, "g 3 3"],
    generator: torch.Generator,
) -> CrossEvidence:
    """Test each half's map, filtered by the FSC and masked, on up to `IMAGES_PER_HALF` images of the other."""
    max_shell = min(MAX_SHELL, float(data.plane.shell.max()))
    near, grid = data.within(max_shell), ReconstructionGrid(max_shell)
    gain = grid.spread(fsc[: grid.n_shells].clamp(0.0, 1.0))
    settings, own, noise, mass = OnlineEmSettings(), [], [], []
    rotations = asymmetric_unit(so3_grid(2), group)
    for half, volume in enumerate(half_maps, start=1):
        others = torch.nonzero(half_set == 3 - half)[:, 0]
        few = torch.linspace(0, len(others) - 1, min(IMAGES_PER_HALF, len(others))).long()
        images = near.take(others[few])
        cube = volume_to_cube(volume * mask, max_shell) * gain
        inverse = _inverse_noise(images, cube, grid)
        own.append(evidence_of(images, cube, inverse, settings))
        noise.append(evidence_of(images.with_random_phases(generator), cube, inverse, settings))
        poses = find_fine_poses(images, cube, inverse, rotations, settings, group)
        mass.append(torch.softmax(poses.scores, dim=1)[:, 0])
    difference = (torch.cat(own) - torch.cat(noise)).double()
    spread = float(difference.std()) / math.sqrt(len(difference))
    return CrossEvidence(
        log_evidence=float(torch.cat(own).double().mean()),
        log_evidence_noise=float(torch.cat(noise).double().mean()),
        z=float(difference.mean()) / max(spread, 1e-12),
        n_images=len(difference),
        elsewhere=1.0 - float(torch.cat(mass).double().mean()),
    )


def _inverse_noise(
    data: ParticleData, cube: Float[Tensor, "2 d d d"], grid: ReconstructionGrid
) -> Float[Tensor, " k"]:
    """Return 1/σ² per coefficient: the images' power without what the map explains of it; 0 for the mean."""
    shell = data.plane.shell
    power = data.mean_power()
    signal = grid.shell_sum(cube.square().sum(0)) / grid.counts.clamp_min(1.0)
    explained = ring_mean(data.ctf.square() * signal[shell], shell, len(power))
    inverse = (1.0 / torch.maximum(power - explained, 0.1 * power).clamp_min(1e-20))[shell]
    inverse[0] = 0.0
    return inverse
