"""Judging trainings against held-out micrographs, beside noise by formula and physics alone.

Every set is made of the same virtual specimens, poses, CTFs and ice maps; what differs is the noise. The reference is the
bank's held-out micrographs. Baselines at the paper's ratio have the paper's physics, whatever contrast the training fitted;
those with fitted noise have the training's. `real` compares them with as many training micrographs, which is the floor that no set can
be expected to beat. Where few micrographs are held out, more frames than that are made (`frames_needed`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from actors.cryogem.arms import PAPER_SNR
from actors.cryogem.generation import (
    BANK_FILE,
    GENERATOR_FILE,
    Noise,
    fit_session_noise,
    make_noise,
    noise_by_formula,
    untranslated,
)
from models.cryogem.bank import SessionBank, load_bank
from models.cryogem.baselines import NOISE_MODELS
from models.cryogem.evaluation import (
    Distances,
    Features,
    content_correlation,
    frames_needed,
    measure_distances,
    patch_side_px,
    ranker_features,
)
from models.cryogem.greys import levels_to_network_range
from models.cryogem.inception import describe_inception, inception_features
from models.cryogem.pairs import Purpose, random_stream
from models.cryogem.physics import PhysicsStage, build_physics
from models.cryogem.translation import load_generator
from stream.records.errors import ConfigurationError, InputError
from stream.store.files import replacing

_PANEL_PX = 256
_PANEL = ("real", "physics", "gaussian")


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Distances to the held-out micrographs by set; how many micrographs and patches these are, and how many frames a made set has.

    `content` is the correlation of each made set with its noise-free micrographs; `features` says whose features the Fréchet
    distance is over.
    """

    distances: Mapping[str, Distances]
    content: Mapping[str, float]
    n_micrographs: int
    n_patches: int
    n_made: int
    patch_px: int
    features: str


def evaluate_trainings(
    folders: Sequence[Path],
    *,
    n_micrographs: int | None = None,
    seed: int = 0,
    panel: Path | None = None,
    inception: Path | None = None,
    on_progress: Callable[[str], None] | None = None,
) -> Evaluation:
    """Measure trainings of one session, their ablations for example; `n_micrographs` defaults to those held out.

    Beside each stands what its generator was given, untranslated: what the network adds is the difference.

    `inception` is the file of a user's Inception v3, whose features take the place of the ranker's.
    """
    bank = common_bank(folders)
    n = min(n_micrographs or bank.facts.n_held_out, bank.facts.n_held_out)
    real = [levels_to_network_range(x) for x in bank.held_out_micrographs[:n]]
    others = [levels_to_network_range(x) for x in bank.training_micrographs[:n]]
    diameter_px = bank.facts.diameter_angstrom / bank.facts.pixel_size_angstrom
    patch_px = patch_side_px(diameter_px, bank.shape_yx)
    n_made = max(n, frames_needed(patch_px, bank.shape_yx))
    features, described = _features(inception)
    found: dict[str, Distances] = {}
    content: dict[str, float] = {}
    shown: dict[str, Tensor] = {"real": real[0]}

    def measure(name: str, images: Sequence[Tensor], clean: Sequence[Tensor]) -> None:
        content[name] = content_correlation(clean, images, diameter_px)
        found[name] = measure_distances(real, images, features, patch_px=patch_px)
        shown.setdefault(name, images[0])
        if on_progress is not None:
            on_progress(f"{name}: {found[name]}, content {content[name]:.3f}")

    if len(others) == n:
        found["real"] = measure_distances(real, others, features, patch_px=patch_px)
    for position, folder in enumerate(folders):
        network, physics = load_generator(folder / GENERATOR_FILE)
        stage = build_physics(bank, physics)
        clean = _render(stage, n_made, seed)

        def noisy(noise: Noise, images: Sequence[Tensor] = clean) -> list[Tensor]:
            return [noise(x, random_stream(seed, Purpose.GENERATION, i, 1)) for i, x in enumerate(images)]

        if position == 0:
            measure("physics", noisy(make_noise("none", stage, network)), clean)
            papers = build_physics(bank, replace(physics, contrast="given"))
            plain = clean if papers.settings == physics else _render(papers, n_made, seed)
            fit, at_paper = fit_session_noise(stage), fit_session_noise(papers).at_snr(PAPER_SNR)
            for model in NOISE_MODELS:
                measure(model, noisy(noise_by_formula(model, fit)), clean)
                measure(f"{model} at SNR {PAPER_SNR}", noisy(noise_by_formula(model, at_paper), plain), plain)
        measure(f"{folder.name}, untranslated", noisy(untranslated(stage)), clean)
        measure(folder.name, noisy(make_noise("cryogem", stage, network)), clean)
    if panel is not None:
        _write_panel(panel, [shown[name] for name in (*_PANEL, folders[0].name)])
    return Evaluation(
        distances=found,
        content=content,
        n_micrographs=n,
        n_patches=n * (bank.shape_yx[0] // patch_px) * (bank.shape_yx[1] // patch_px),
        n_made=n_made,
        patch_px=patch_px,
        features=described,
    )


def _render(stage: PhysicsStage, n: int, seed: int) -> list[Tensor]:
    frames = []
    for index in range(n):
        rng = random_stream(seed, Purpose.GENERATION, index)
        frames.append(stage.image(stage.render(stage.draw_specimen(rng)), stage.draw_imaging(rng)))
    return frames


def _features(inception: Path | None) -> tuple[Features, str]:
    if inception is None:
        return ranker_features(), "ranker"
    try:
        return inception_features(inception), describe_inception(inception)
    except ValueError as error:
        raise InputError(inception, f"the file of an Inception v3 ({error})") from error


def common_bank(folders: Sequence[Path]) -> SessionBank:
    """Return the bank of trainings of one session; trainings that hold out other micrographs are refused."""
    if len({folder.name for folder in folders}) != len(folders):
        raise ConfigurationError(
            "TRAINING", "training folders have names of their own", [f.name for f in folders]
        )
    try:
        banks = [load_bank(folder / BANK_FILE) for folder in folders]
        for folder in folders:
            load_generator(folder / GENERATOR_FILE)
    except ValueError as error:
        raise InputError(folders[0], f"a training folder of CryoGEM ({error})") from error
    for folder, bank in zip(folders, banks, strict=True):
        if not torch.equal(bank.held_out_micrographs, banks[0].held_out_micrographs):
            raise InputError(
                folder, f"trainings that are compared hold out the same micrographs as {folders[0]}"
            )
    return banks[0]


def _write_panel(path: Path, images: Sequence[Tensor]) -> None:
    """Write the middle of each image, side by side."""
    side = min(_PANEL_PX, *(min(image.shape) for image in images))
    cut = []
    for image in images:
        top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
        cut.append(image[top : top + side, left : left + side])
    levels = ((torch.cat(cut, dim=1) + 1.0) * 127.5).clamp(0, 255).round().to(torch.uint8).numpy()
    with replacing(path) as temporary:
        Image.fromarray(np.asarray(levels)).save(temporary, format="PNG", optimize=True)
