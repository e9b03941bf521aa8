"""The same virtual specimens under noise of different origin: what trainings on generated data are compared on.

Every arm has the same particles, poses, CTFs and ice; what differs is the noise. Baselines are the paper's: Gaussian, Poisson and
Poisson-Gaussian at a signal-to-noise ratio of 0.1; beside them each training of CryoGEM that is given (ablations, say), and the generator's input untranslated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from actors.cryogem.generation import (
    GENERATOR_FILE,
    Noise,
    fit_session_noise,
    make_noise,
    noise_by_formula,
    untranslated,
)
from models.cryogem.bank import SessionBank
from models.cryogem.baselines import NOISE_MODELS
from models.cryogem.pairs import Purpose, random_stream
from models.cryogem.physics import PhysicsStage, build_physics
from models.cryogem.specimen import VirtualSpecimen
from models.cryogem.translation import load_generator

PAPER_SNR = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class CleanFrame:
    """A noise-free micrograph and the particles in it."""

    image: Tensor
    specimen: VirtualSpecimen


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """A source of training data: the noise, and the frames it is put on."""

    name: str
    noise: Noise
    frames: Sequence[CleanFrame]
    seed: int

    def image(self, index: int) -> Tensor:
        """Return a noisy micrograph in the networks' range: the same whenever it is asked for."""
        return self.noise(self.frames[index].image, random_stream(self.seed, Purpose.DOWNSTREAM, index, 1))


def make_arms(
    bank: SessionBank,
    folders: Sequence[Path],
    n_frames: int,
    seed: int,
    *,
    on_progress: Callable[[str], None] | None = None,
) -> list[Arm]:
    """Return the baselines and a training per folder; the baselines have the first folder's physics."""
    stage: PhysicsStage | None = None
    arms: list[Arm] = []
    frames: list[CleanFrame] = []
    for folder in folders:
        network, physics = load_generator(folder / GENERATOR_FILE)
        own = build_physics(bank, physics)
        if stage is None:
            stage = own
            frames = render_frames(stage, n_frames, seed)
            papers = build_physics(bank, replace(physics, contrast="given"))
            plain = frames if papers.settings == physics else render_frames(papers, n_frames, seed)
            if on_progress is not None:
                on_progress(f"rendered {n_frames} micrographs")
            fit = fit_session_noise(papers).at_snr(PAPER_SNR)
            for model in NOISE_MODELS:
                noise = noise_by_formula(model, fit)
                arms.append(Arm(name=f"{model} at SNR {PAPER_SNR}", noise=noise, frames=plain, seed=seed))
        # an ablation without physics sees the same specimens in its own way
        seen = frames if own.settings == stage.settings else render_frames(own, n_frames, seed)
        plain_name = f"{folder.name}, untranslated"
        arms.append(Arm(name=plain_name, noise=untranslated(own), frames=seen, seed=seed))
        arms.append(Arm(name=folder.name, noise=make_noise("cryogem", own, network), frames=seen, seed=seed))
    return arms


def render_frames(stage: PhysicsStage, n_frames: int, seed: int) -> list[CleanFrame]:
    """Return noise-free micrographs with all of their particles."""
    frames = []
    for index in range(n_frames):
        rng = random_stream(seed, Purpose.DOWNSTREAM, index)
        rendered = stage.render(stage.draw_specimen(rng))
        frames.append(
            CleanFrame(image=stage.image(rendered, stage.draw_imaging(rng)), specimen=rendered.specimen)
        )
    return frames
