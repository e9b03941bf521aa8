"""The images of a training step: a rendered frame seen through a drawn CTF and ice, and a real micrograph.

Every draw of step n comes from (seed, n), every rendered frame from (seed, index).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from models.cryogem.greys import levels_to_network_range
from models.cryogem.losses import has_both_labels
from models.cryogem.physics import PhysicsStage, RenderedField
from models.cryogem.settings import TrainingSettings
from models.cryogem.translation import add_input_noise

_FIELD_TRIES = 5
_CROP_TRIES = 10


class Purpose(IntEnum):
    """What a random stream is for; streams of different purposes never meet."""

    FIELD = 0
    STEP = 1
    QUERIES = 2
    EPOCH = 3
    WEIGHTS = 4
    VALIDATION = 5
    GENERATION = 6
    DOWNSTREAM = 7


def random_stream(seed: int, purpose: Purpose, *words: int) -> np.random.Generator:
    """Return the generator of one purpose and item: the same whatever was drawn before."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, int(purpose), *words))))


def torch_stream(rng: np.random.Generator) -> torch.Generator:
    """Return a torch generator seeded by the next draw of a NumPy one."""
    return torch.Generator().manual_seed(int(rng.integers(2**62)))


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingPair:
    """One step's images `(1 1 c c)`: I_phy, the generator's input, its mask `(c c)`, and a real image."""

    physics: Float[Tensor, "1 1 c c"]
    source: Float[Tensor, "1 1 c c"]
    mask: Bool[Tensor, "c c"]
    real: Float[Tensor, "1 1 c c"]


class PairSource:
    """Makes the pair of any step, from a bank; rendered frames stay in memory.

    A frame without particles, or without background, is drawn again a few times and then left out (`n_skipped`).
    """

    def __init__(self, stage: PhysicsStage, settings: TrainingSettings) -> None:
        if settings.crop_px > min(stage.bank.shape_yx):
            raise ValueError(f"crop_px: {settings.crop_px}, must not exceed the frames {stage.bank.shape_yx}")
        self.stage = stage
        self.settings = settings
        self.n_skipped = 0
        self._frames: dict[int, RenderedField | None] = {}

    def pair(self, step: int) -> TrainingPair:
        """Return the pair of a step: a rendered frame in this epoch's order, and a real micrograph."""
        settings = self.settings
        epoch, place = divmod(step, settings.n_simulated)
        order = random_stream(settings.seed, Purpose.EPOCH, epoch).permutation(settings.n_simulated)
        rng = random_stream(settings.seed, Purpose.STEP, step)
        rendered = self._some_frame(order, place)
        imaging = self.stage.draw_imaging(rng)
        turns = int(rng.integers(4))
        top, left = self._choose_corner(rendered, rng)
        margin, size = rendered.margin_px, settings.crop_px
        window = (slice(top, top + size + 2 * margin), slice(left, left + size + 2 * margin))
        specimen = torch.rot90(rendered.projection[window], turns)
        mask = torch.rot90(rendered.mask[top : top + size, left : left + size], turns)
        ice = self.stage.ice_canvas(imaging, rendered)[window]
        seen = self.stage.image_canvas(specimen, ice, imaging)[margin : margin + size, margin : margin + size]
        mean = self.stage.frame_mean(rendered, imaging)
        source = add_input_noise(seen, mean, self.stage, torch_stream(rng))
        return TrainingPair(
            physics=seen[None, None],
            source=source[None, None],
            mask=mask,
            real=self._real(rng)[None, None],
        )

    def frame(self, index: int) -> RenderedField | None:
        """Return a rendered frame, or None where none of its draws can be sampled."""
        if index not in self._frames:
            self._frames[index] = self._render(index)
        return self._frames[index]

    def _render(self, index: int) -> RenderedField | None:
        for attempt in range(_FIELD_TRIES):
            rng = random_stream(self.settings.seed, Purpose.FIELD, index, attempt)
            rendered = self.stage.render(self.stage.draw_specimen(rng))
            if has_both_labels(rendered.mask):
                return rendered
        self.n_skipped += 1
        return None

    def _some_frame(self, order: np.ndarray[Any, np.dtype[np.int64]], place: int) -> RenderedField:
        for index in np.roll(order, -place).tolist():
            rendered = self.frame(index)
            if rendered is not None:
                return rendered
        raise ValueError(
            f"frames: {len(order)} rendered, none has particles and background: check particle counts, the map and mask_threshold"
        )

    def _choose_corner(self, rendered: RenderedField, rng: np.random.Generator) -> tuple[int, int]:
        """Return a random corner whose crop has both labels, if one of a few tries has."""
        size = self.settings.crop_px
        height, width = self.stage.bank.shape_yx
        for _ in range(_CROP_TRIES):
            top, left = int(rng.integers(height - size + 1)), int(rng.integers(width - size + 1))
            if has_both_labels(rendered.mask[top : top + size, left : left + size]):
                break
        return top, left

    def _real(self, rng: np.random.Generator) -> Float[Tensor, "c c"]:
        micrographs = self.stage.bank.training_micrographs
        size = self.settings.crop_px
        chosen = micrographs[int(rng.integers(len(micrographs)))]
        top = int(rng.integers(chosen.shape[0] - size + 1))
        left = int(rng.integers(chosen.shape[1] - size + 1))
        turned = torch.rot90(chosen[top : top + size, left : left + size], int(rng.integers(4)))
        return levels_to_network_range(turned.contiguous())
