"""Labelled data for a ranker: simulated once, kept as bytes on disk, augmented on the fly.

A set is simulated structure by structure, each with its own random stream spawned from the set's seed, so that the
result does not depend on how many processes share the work.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
from torch import Tensor

from models.cryo_ief.config import ResizeMode
from models.cryo_ief.preprocess import to_grey_levels
from models.cryoranker.simulate import MOST_JUNK, LabelledBoxes, simulate_boxes
from models.cryoranker.specimen import render_pool, stretched, structure_named

SIMULATION_VERSION = 2
"""Part of the cache's key: raise it when `simulate.py` or `specimen.py` change what they draw."""

_SYMMETRIES = ("C1", "C1", "C1", "C2", "C3", "C4", "C5", "C6", "D2", "D2", "D3", "D4", "D7", "T", "O")


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedSet:
    """What a set is made of; the same values give the same bytes."""

    structures: tuple[str, ...]
    seed: int
    fields_per_structure: int
    input_size_px: int
    resize_mode: ResizeMode = "hartley"
    n_shapes: int = 1
    """Shapes per structure: as it is, and this many less one stretched ones."""
    snr: float | None = None
    box_size_px: int | None = None
    n_views: int = 96
    n_fragments: int = 24
    weak_part: float = 0.0
    """Part of the fields with an SNR of 0.03-0.1, beside those that the whole range gives."""
    most_junk: int = MOST_JUNK
    """Aggregates tried in a field, and broken pieces: 0 to this many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledParticles:
    """Grey levels as the network takes them, with labels and what they were simulated as."""

    grey: NDArray[np.uint8]
    labels: NDArray[np.float32]
    kinds: NDArray[np.int8]
    snr: NDArray[np.float32]
    structure: NDArray[np.int16]

    def __len__(self) -> int:
        return len(self.labels)


def phantom_names(seeds: range, *, least_kda: float = 80.0, most_kda: float = 900.0) -> tuple[str, ...]:
    """Return one phantom per seed, its mass (log-uniform) and point group drawn from that seed."""
    names = []
    for seed in seeds:
        rng = np.random.default_rng((seed, 0xC0))
        mass = float(np.exp(rng.uniform(np.log(least_kda), np.log(most_kda))))
        symmetry = str(rng.choice(_SYMMETRIES)) if mass > 200.0 else str(rng.choice(_SYMMETRIES[:5]))
        names.append(f"phantom:{seed}:mass_kda={mass:.0f}:symmetry={symmetry}")
    return tuple(names)


def simulate_set(
    spec: SimulatedSet, *, n_processes: int = 1, on_progress: Callable[[int, int], None] | None = None
) -> LabelledParticles:
    """Simulate a set; `on_progress(done, total)` is called after each structure."""
    tasks = [(spec, index) for index in range(len(spec.structures))]
    parts: list[LabelledParticles] = []

    def keep(part: LabelledParticles) -> None:
        parts.append(part)
        if on_progress is not None:
            on_progress(len(parts), len(tasks))

    if n_processes == 1:
        for task in tasks:
            keep(_simulate_structure(task))
    else:
        with ProcessPoolExecutor(n_processes, mp_context=get_context("spawn")) as pool:
            for part in pool.map(_simulate_structure, tasks):
                keep(part)
    return concatenate(parts)


def simulate_set_cached(
    spec: SimulatedSet,
    folder: Path,
    *,
    n_processes: int = 1,
    on_progress: Callable[[int, int], None] | None = None,
) -> LabelledParticles:
    """Return the set from `folder` if it is there, else simulate and keep it."""
    key = json.dumps([SIMULATION_VERSION, asdict(spec)], sort_keys=True)
    path = folder / f"ranker-set-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"
    if path.exists():
        with np.load(path, allow_pickle=False) as stored:
            return LabelledParticles(
                **{name: stored[name] for name in LabelledParticles.__dataclass_fields__}
            )
    result = simulate_set(spec, n_processes=n_processes, on_progress=on_progress)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part.npz")
    np.savez(
        temporary,
        grey=result.grey,
        labels=result.labels,
        kinds=result.kinds,
        snr=result.snr,
        structure=result.structure,
    )
    temporary.replace(path)
    return result


def simulate_input_sizes(
    spec: SimulatedSet, sizes_px: tuple[int, ...], *, on_progress: Callable[[int, int], None] | None = None
) -> dict[int, LabelledParticles]:
    """Simulate a set once and prepare the same boxes for several input sizes."""
    parts: dict[int, list[LabelledParticles]] = {size: [] for size in sizes_px}
    for index in range(len(spec.structures)):
        for boxes in _fields(spec, index):
            for size, part in parts.items():
                part.append(_prepared(boxes, replace(spec, input_size_px=size), index))
        if on_progress is not None:
            on_progress(index + 1, len(spec.structures))
    return {size: concatenate(part) for size, part in parts.items()}


def concatenate(parts: list[LabelledParticles]) -> LabelledParticles:
    """Return several sets as one, in order."""
    return LabelledParticles(
        grey=np.concatenate([part.grey for part in parts]),
        labels=np.concatenate([part.labels for part in parts]),
        kinds=np.concatenate([part.kinds for part in parts]),
        snr=np.concatenate([part.snr for part in parts]),
        structure=np.concatenate([part.structure for part in parts]),
    )


def augment(
    grey: UInt8[Tensor, "b s s"],
    mean: float,
    std: float,
    generator: torch.Generator,
    *,
    rotation_probability: float = 0.0,
    max_shift_px: int = 1,
) -> Float[Tensor, "b 1 s s"]:
    """Return normalised input: each image mirrored or turned by 90° at random, shifted, its contrast and level moved.

    The labels are invariant under all of these. Contrast stands for the outlier pixels that set an image's
    stretch to grey levels. Turning by any angle softens the noise, so it is off unless asked for.
    """
    b = grey.shape[0]
    images = grey.float() / 255.0
    symmetry = torch.randint(0, 8, (b,), generator=generator)
    turned = torch.empty_like(images)
    for element in range(8):
        chosen = symmetry == element
        part = torch.rot90(images[chosen], element % 4, dims=(1, 2))
        turned[chosen] = part.flip(2) if element >= 4 else part
    shift = torch.randint(-max_shift_px, max_shift_px + 1, (2,), generator=generator)
    turned = torch.roll(turned, (int(shift[0]), int(shift[1])), dims=(1, 2))
    if rotation_probability > 0.0:
        turned = _rotate_some(turned, rotation_probability, generator)
    level = images.mean(dim=(1, 2), keepdim=True)
    contrast = torch.exp(0.2 * torch.randn((b, 1, 1), generator=generator))
    offset = 0.04 * torch.randn((b, 1, 1), generator=generator)
    moved = (turned - level) * contrast + level + offset
    return (moved.clamp(0.0, 1.0)[:, None] - mean) / std


def _rotate_some(
    images: Float[Tensor, "b s s"], probability: float, generator: torch.Generator
) -> Float[Tensor, "b s s"]:
    b = images.shape[0]
    is_chosen = torch.rand(b, generator=generator) < probability
    angle = 2.0 * torch.pi * torch.rand(b, generator=generator) * is_chosen
    zero = torch.zeros(b)
    rows = (angle.cos(), -angle.sin(), zero, angle.sin(), angle.cos(), zero)
    grid = torch.nn.functional.affine_grid(
        torch.stack(rows, dim=-1).reshape(b, 2, 3), [b, 1, *images.shape[1:]], align_corners=False
    )
    turned = torch.nn.functional.grid_sample(
        images[:, None], grid, padding_mode="reflection", align_corners=False
    )[:, 0]
    return torch.where(is_chosen[:, None, None], turned, images)


def _simulate_structure(task: tuple[SimulatedSet, int]) -> LabelledParticles:
    """Simulate the part of a set that belongs to one structure; runs in a worker process."""
    torch.set_num_threads(1)
    spec, index = task
    return concatenate([_prepared(boxes, spec, index) for boxes in _fields(spec, index)])


def _fields(spec: SimulatedSet, index: int) -> Iterator[LabelledBoxes]:
    rng = np.random.default_rng((spec.seed, index))
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    structure = structure_named(spec.structures[index])
    shapes = [structure] + [stretched(structure, 0.25, generator) for _ in range(spec.n_shapes - 1)]
    pools = [
        render_pool(shape, n_views=spec.n_views, n_fragments=spec.n_fragments, generator=generator)
        for shape in shapes
    ]
    return simulate_boxes(
        pools,
        rng,
        n_fields=spec.fields_per_structure,
        snr=spec.snr,
        box_size_px=spec.box_size_px,
        weak_part=spec.weak_part,
        most_junk=spec.most_junk,
    )


def _prepared(boxes: LabelledBoxes, spec: SimulatedSet, index: int) -> LabelledParticles:
    n = len(boxes.labels)
    return LabelledParticles(
        grey=to_grey_levels(boxes.images.numpy(), spec.input_size_px, spec.resize_mode, is_exact=False),
        labels=boxes.labels,
        kinds=boxes.kinds,
        snr=np.full(n, boxes.conditions.snr, np.float32),
        structure=np.full(n, index, np.int16),
    )
