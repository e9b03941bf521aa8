"""Is a seed worth building on? Held-out images must prefer its map to noise, and its shape to a featureless ball.

Two paired tests on images that no start has seen, both in nats of log marginal likelihood (`online_em.evidence_of`),
and one on two maps:
- **signal**: the images against themselves with their phases drawn anew. Noise has random phases anyway, so that for a
  set without particles the two are exchangeable whatever map the search came up with.
- **shape**: the map against its own average over all directions. Blobs of any kind (ice, carbon, aggregates) pass the
  first test; a ball explains most of them. With very many images this test tells the smallest difference, so that
  `shape_share` is reported beside it.

- **agreement** (C1 alone): in some other start's map the images have the same poses, up to one rotation and hand. Wrong maps
  are wrong in many ways. Maps alone tell too little: one that mixes two registers of a nearly sixfold particle correlated
  with the right one as well as two right ones do (0.97), and half of its poses were one subunit off.

What this does not see: a map that is wrong in a way that every start is (facts §2.2: reproducible and wrong).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from models.reconstruction.alignment import align_volumes
from models.reconstruction.blobs import pose_errors_deg
from models.reconstruction.fine_em import Finalist
from models.reconstruction.fine_poses import decided
from models.reconstruction.online_em import EmResult, OnlineEmSettings, evidence_of, held_out_rows
from models.reconstruction.particle_data import ParticleData
from models.reconstruction.sufficient import ReconstructionGrid

MINIMUM_Z_SIGNAL = 4.0
"""Standard deviations of the mean difference; 3e-5 by chance, and the best of several starts was chosen."""

MINIMUM_Z_SHAPE = 5.0
"""Round blobs of mixed sizes reach 4.2 with 60 held-out images, particles of SNR 0.03 6.6 (README)."""

MINIMUM_AGREEMENT = 0.8
"""Share of images with the same pose in two starts' maps (where poses say nothing: their shell correlation)."""

SAME_POSE_DEG = 20.0
"""Poses of one image in two maps this near are the same: nearly equal views lie farther apart."""

DECIDED_MASS = 0.9
"""Images that leave more of their posterior to a second mode say nothing about agreement: symmetry, noise or junk."""

DECIDED_SHARE = 0.2
"""Where fewer images are decided poses say nothing, as for a particle that is symmetric in truth."""

SYMMETRIC_STEPS = 10
"""Iterations with fine poses after which such maps are compared themselves: nearly equal views would have come apart."""

AGREEMENT_SHELLS = 9.0
"""Shells compared: a 15° grid says little about finer ones."""

ROUND_SHARE = 0.3
"""Below this share of the evidence in shape a set is round (apoferritin) or junk: worth a note, no ground to refuse."""

MINIMUM_HELD_OUT = 8
"""Fewer images have no standard deviation to speak of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedAcceptance:
    """Mean log evidence per held-out image (nats) of the map, of randomised images, of the ball; z of both differences.

    `agreement` is how far another start's map agrees (`agreement_of`); None with one start, and with a point group, whose
    starts in C1 need not look alike.
    """

    log_evidence: float
    log_evidence_noise: float
    log_evidence_ball: float
    z_signal: float
    z_shape: float
    n_held_out: int
    agreement: float | None = None

    @property
    def shape_share(self) -> float:
        """How much of the evidence a featureless ball lacks, in [0, 1] where there is any."""
        return 1.0 - self.log_evidence_ball / self.log_evidence if self.log_evidence > 0 else 0.0

    @property
    def is_accepted(self) -> bool:
        """Whether both tests are passed."""
        return self.reason is None

    @property
    def reason(self) -> str | None:
        """Why the seed is refused, None where it is not."""
        if self.n_held_out < MINIMUM_HELD_OUT:
            return f"{self.n_held_out} images could be held out, a judgement needs {MINIMUM_HELD_OUT}"
        if self.z_signal < MINIMUM_Z_SIGNAL:
            return (
                f"held-out images fit the map no better than their own noise does ({self.log_evidence:.2f} against "
                f"{self.log_evidence_noise:.2f} nats per image, {self.z_signal:.1f} standard deviations)"
            )
        if self.z_shape < MINIMUM_Z_SHAPE:
            return (
                f"held-out images fit the map no better than a featureless ball ({self.log_evidence:.2f} against "
                f"{self.log_evidence_ball:.2f} nats per image, {self.z_shape:.1f} standard deviations)"
            )
        if self.agreement is not None and self.agreement < MINIMUM_AGREEMENT:
            return (
                f"no second start came to the same map (agreement {self.agreement:.2f}, "
                f"{MINIMUM_AGREEMENT} are needed): more particles or more starts may decide"
            )
        return None


def correlate_maps(a: EmResult, b: EmResult) -> float:
    """Return the mean shell correlation of two maps after rotation, shift and hand that make it highest."""
    # A pixel of 1 Å makes the box's side its shells' common numerator.
    lowpass = a.volume.shape[0] / min(AGREEMENT_SHELLS, a.max_shell)
    generator = torch.Generator().manual_seed(0)
    return align_volumes(a.volume, b.volume, 1.0, generator=generator, lowpass_angstrom=lowpass).correlation


def agreement_of(a: Finalist, b: Finalist) -> float:
    """Return the share of decided images that have the same pose in both maps, up to one rotation and hand.

    Where hardly any image is decided in both, 0 until both have gone on with fine poses, then the maps' correlation.
    """
    is_decided = decided(a.poses, DECIDED_MASS) & decided(b.poses, DECIDED_MASS)
    rows = is_decided.nonzero()[:, 0]
    if len(rows) < max(MINIMUM_HELD_OUT, DECIDED_SHARE * len(is_decided)):
        return correlate_maps(a.result, b.result) if min(a.n_steps, b.n_steps) >= SYMMETRIC_STEPS else 0.0
    apart = pose_errors_deg(a.poses.rotations[rows, 0], b.poses.rotations[rows, 0])
    return float((apart < SAME_POSE_DEG).float().mean())


def judge_seed(
    data: ParticleData,
    result: EmResult,
    settings: OnlineEmSettings,
    generator: torch.Generator,
    agreement: float | None = None,
) -> SeedAcceptance:
    """Test a start's map on the images that it was not made from."""
    held = data.within(result.max_shell).take(held_out_rows(len(data), settings))
    grid = ReconstructionGrid(result.max_shell)
    noise = evidence_of(held.with_random_phases(generator), result.cube, result.inverse_noise, settings)
    ball = evidence_of(held, _ball(result.cube, grid), result.inverse_noise, settings)
    return SeedAcceptance(
        log_evidence=result.log_evidence,
        log_evidence_noise=float(noise.mean()),
        log_evidence_ball=float(ball.mean()),
        z_signal=_z(result.evidence - noise),
        z_shape=_z(result.evidence - ball),
        n_held_out=len(held),
        agreement=agreement,
    )


def _ball(cube: Float[Tensor, "2 d d d"], grid: ReconstructionGrid) -> Float[Tensor, "2 d d d"]:
    """Return the map's average over all rotations: each shell's mean, which is real."""
    mean = grid.shell_sum(cube[0]) / grid.counts.clamp_min(1.0)
    return torch.stack((grid.spread(mean), torch.zeros_like(cube[1])))


def _z(difference: Float[Tensor, " h"]) -> float:
    """Return the mean over its standard error, 0 where there is no spread to judge by."""
    n = difference.numel()
    if n < 2:
        return 0.0
    values = difference.double()
    return float(values.mean() / (values.std() / math.sqrt(n)).clamp_min(1e-12))
