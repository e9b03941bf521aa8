"""Online EM with fine poses: what a start that ran on the search's grid goes on with where starts do not agree.

A map that mixes nearly equal views (one subunit of six off, head for tail) is almost as likely as the right one on a 15°
grid and stays as it is; with poses searched locally the mixture comes apart within a pass or two (README).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from models.reconstruction.fine_poses import find_fine_poses
from models.reconstruction.grids import random_rotations, so3_grid
from models.reconstruction.online_em import EmProgress, EmResult, OnlineEm
from models.reconstruction.particle_data import ParticleData
from models.reconstruction.pose_search import Hypotheses
from models.reconstruction.projector import insert_slices
from models.reconstruction.scoring import weighted_images

MINIMUM_MASS = 0.01
"""A mode that holds less of an image's posterior is left out of the sums."""


@dataclass(frozen=True, slots=True)
class Finalist:
    """A start's map with the likeliest distinct poses of the held-out images in it, after `n_steps` with fine poses."""

    result: EmResult
    poses: Hypotheses
    n_steps: int

    @property
    def score(self) -> float:
        """Mean log likelihood of the held-out images at their best poses, over no particle at all (nats)."""
        return float(self.poses.scores[:, 0].double().mean())


class FineEm:
    """Goes on where an `OnlineEm` is, with its batches, its sums and its map."""

    def __init__(self, em: OnlineEm) -> None:
        self.em = em
        self.n_steps = 0
        self.grid = so3_grid(2)

    def find_poses(self, data: ParticleData) -> Hypotheses:
        """Return the images' poses in the map as it is."""
        em = self.em
        turn = random_rotations(1, em.generator)[0]
        return find_fine_poses(data, em.cube, em.inverse_noise, self.grid @ turn, em.settings)

    def step(self) -> EmProgress:
        """Run one iteration: poses of a batch, the sums of its two sub-halves, a new map."""
        em = self.em
        batch = em.data.take(em.next_batch())
        poses = self.find_poses(batch)
        images, weights = weighted_images(batch, em.inverse_noise)
        share = torch.softmax(poses.scores, dim=1)
        is_odd = torch.arange(len(batch)) % 2 == 1
        new = []
        for part in (~is_odd, is_odd):
            rows, mode = ((share > MINIMUM_MASS) & part[:, None]).nonzero(as_tuple=True)
            own = share[rows, mode][:, None]
            centred = own * images[rows] * batch.plane.phases(poses.shifts_xy_px[rows, mode])
            channels = torch.stack((centred.real, centred.imag, own * weights[rows]))
            new.append(insert_slices(em.grid.zeros(), channels, poses.rotations[rows, mode], batch.plane))
        scale = em.training.numel() / len(batch)
        # What was summed at the grid's poses is forgotten at once; from then on one pass is remembered.
        eta = max(1.0 / (self.n_steps + 1), min(1.0, 1.0 / scale))
        em.sums = (1 - eta) * em.sums + (eta * scale) * torch.cat(new)
        em.update_map(em.max_shell)
        self.n_steps += 1
        em.iteration += 1
        return EmProgress(
            iteration=em.iteration,
            n_iterations=max(em.settings.n_iterations, em.iteration),
            shell=em.max_shell,
            inverse_temperature=1.0,
            fsc=em.fsc,
        )

    def run(self, n_steps: int, on_progress: Callable[[EmProgress], None] | None = None) -> None:
        """Run so many iterations; `on_progress` may raise."""
        for _ in range(n_steps):
            progress = self.step()
            if on_progress is not None:
                on_progress(progress)

    def finalist(self) -> Finalist:
        """Return the map with the held-out images' evidence and poses."""
        poses = self.find_poses(self.em.data.take(self.em.held_out))
        return Finalist(self.em.result(), poses, self.n_steps)
