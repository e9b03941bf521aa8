"""Single particles of known structure and view, simulated to judge an encoder by (paper, "Datasets for evaluation").

View directions fall into twelve classes around the corners of an icosahedron; of each class the half nearest to its
centre is kept, and the same number of images is drawn from each, in-plane rotations uniform. Images are projections of
atomic models or phantoms seen through a CTF, with the ice's noise and white noise, in boxes of 1.45 diameters.
SNR is the variance of the CTF-modulated particle inside its diameter over that of the noise, per pixel.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from models.cryo_ief.config import ResizeMode
from models.cryo_ief.preprocess import to_grey_levels
from models.cryoranker.specimen import (
    DIAMETER_PX,
    GRID_PX,
    project_views,
    random_rotations,
    rendering_of,
    structure_named,
)
from models.optics.ctf import evaluate_ctf, frequency_grid

N_POSE_CLASSES = 12
_VERSION = 1
"""Part of the cache's key: raise it when this module changes what it draws."""
_STRUCTURAL_FRACTION = 0.2
"""Part of the noise variance that comes from the ice and is modulated by the CTF."""
_B_FACTOR_ANGSTROM2 = 100.0
_IMAGES_AT_ONCE = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class PoseSet:
    """What a set is made of; the same values give the same bytes."""

    structures: tuple[str, ...]
    """`phantom:SEED…` or paths of PDB and mmCIF files."""
    images_per_class: int
    snr: float
    input_size_px: int
    resize_mode: ResizeMode = "hartley"
    seed: int = 5
    max_shift_px: float = 1.5

    def __post_init__(self) -> None:
        if self.images_per_class < 2 or not self.snr > 0.0 or not self.structures:
            msg = (
                f"images_per_class, snr, structures: {self.images_per_class}, {self.snr}, {len(self.structures)},"
                " must be 2 or more, above 0, 1 or more"
            )
            raise ValueError(msg)


@dataclass(frozen=True, slots=True, kw_only=True)
class PosedParticles:
    """Grey levels with the index of their structure and the class of their view."""

    grey: NDArray[np.uint8]
    structure: NDArray[np.int16]
    pose_class: NDArray[np.int16]

    def __len__(self) -> int:
        return len(self.structure)


def class_centres() -> Float[Tensor, "c 3"]:
    """Return the twelve corners of an icosahedron as unit vectors."""
    golden = (1.0 + math.sqrt(5.0)) / 2.0
    corners = [(0.0, a, b * golden) for a in (-1.0, 1.0) for b in (-1.0, 1.0)]
    turned = [
        (x, y, z)
        for corner in corners
        for x, y, z in (corner, corner[1:] + corner[:1], corner[2:] + corner[:2])
    ]
    return torch.nn.functional.normalize(torch.tensor(turned), dim=1)


def classify_views(views: Float[Tensor, "n 3"]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return each view's class, and whether it belongs to its class's nearer half."""
    cosine = (views.double() @ class_centres().double().T).numpy()
    nearest = cosine.argmax(axis=1)
    is_kept = np.zeros(len(views), bool)
    for number in range(N_POSE_CLASSES):
        members = np.flatnonzero(nearest == number)
        order = members[np.argsort(-cosine[members, number], kind="stable")]
        is_kept[order[: len(members) // 2]] = True
    return nearest, is_kept


def simulate_pose_set(
    spec: PoseSet, folder: Path, *, on_progress: Callable[[int, int], None] | None = None
) -> PosedParticles:
    """Return the set from `folder` if it is there, else simulate and keep it."""
    key = json.dumps([_VERSION, asdict(spec)], sort_keys=True)
    path = folder / f"pose-set-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"
    if path.exists():
        with np.load(path, allow_pickle=False) as stored:
            return PosedParticles(**{name: stored[name] for name in PosedParticles.__dataclass_fields__})
    grey, structures, classes = [], [], []
    for index, name in enumerate(spec.structures):
        images, pose_class = _simulate_structure(spec, index, name)
        grey.append(to_grey_levels(images, spec.input_size_px, spec.resize_mode, is_exact=False))
        structures.append(np.full(len(images), index, np.int16))
        classes.append(pose_class)
        if on_progress is not None:
            on_progress(index + 1, len(spec.structures))
    result = PosedParticles(
        grey=np.concatenate(grey), structure=np.concatenate(structures), pose_class=np.concatenate(classes)
    )
    folder.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part.npz")
    np.savez(temporary, grey=result.grey, structure=result.structure, pose_class=result.pose_class)
    temporary.replace(path)
    return result


def _simulate_structure(
    spec: PoseSet, index: int, name: str
) -> tuple[NDArray[np.float32], NDArray[np.int16]]:
    generator = torch.Generator().manual_seed(1000 * spec.seed + index)
    rotations, classes = _draw_rotations(spec.images_per_class, generator)
    rendering = rendering_of(structure_named(name))
    views = project_views(rendering.structure, rendering.pixel_size_angstrom, rotations)
    parts = [
        _image_views(part, rendering.pixel_size_angstrom, spec, generator)
        for part in views.split(_IMAGES_AT_ONCE)
    ]
    return torch.cat(parts).numpy(), classes


def _draw_rotations(
    n_per_class: int, generator: torch.Generator
) -> tuple[Float[Tensor, "n 3 3"], NDArray[np.int16]]:
    """Return rotations whose views lie in the nearer halves of the classes, `n_per_class` of each class in order."""
    rotations = random_rotations(2 * N_POSE_CLASSES * (n_per_class + 40), generator)
    # The view direction is the last row: where the beam passes in the particle's own frame.
    nearest, is_kept = classify_views(rotations[:, 2])
    rows = []
    for number in range(N_POSE_CLASSES):
        members = np.flatnonzero((nearest == number) & is_kept)
        if len(members) < n_per_class:
            msg = f"images_per_class: {n_per_class}, only {len(members)} views were drawn in class {number}"
            raise ValueError(msg)
        rows.append(members[:n_per_class])
    chosen = np.concatenate(rows)
    return rotations[torch.from_numpy(chosen)], nearest[chosen].astype(np.int16)


def _image_views(
    views: Float[Tensor, "n s s"], pixel_size_angstrom: float, spec: PoseSet, generator: torch.Generator
) -> Float[Tensor, "n s s"]:
    """Return the views shifted, seen through a CTF each, under noise."""
    n, rim = len(views), GRID_PX // 2
    padded = torch.nn.functional.pad(views, (rim, rim, rim, rim))
    size = padded.shape[-1]
    ky, kx = frequency_grid((size, size), pixel_size_angstrom)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, generator=generator)

    defocus, astigmatism = uniform(8_000.0, 25_000.0), uniform(0.0, 400.0)
    ctf = evaluate_ctf(
        ky,
        kx,
        defocus_u_angstrom=defocus + astigmatism / 2,
        defocus_v_angstrom=defocus - astigmatism / 2,
        astigmatism_angle_deg=uniform(0.0, 180.0),
        voltage_kv=300.0,
        cs_mm=2.7,
        amplitude_contrast=0.1,
    )
    envelope = ctf * torch.exp(-0.25 * _B_FACTOR_ANGSTROM2 * (ky.square() + kx.square()))
    shift_px = spec.max_shift_px * (2.0 * torch.rand((n, 2), generator=generator) - 1.0)
    phase = (
        -2.0
        * math.pi
        * pixel_size_angstrom
        * (ky * shift_px[:, 0, None, None] + kx * shift_px[:, 1, None, None])
    )
    inner = slice(rim, rim + GRID_PX)
    spectrum = torch.fft.rfft2(padded) * envelope * torch.polar(torch.ones_like(phase), phase)
    seen = torch.fft.irfft2(spectrum, s=(size, size))[:, inner, inner]
    ice = torch.randn((n, size, size), generator=generator)
    ice = torch.fft.irfft2(torch.fft.rfft2(ice) * envelope, s=(size, size))[:, inner, inner]
    white = torch.randn((n, GRID_PX, GRID_PX), generator=generator)
    axis = torch.arange(GRID_PX) - GRID_PX // 2
    inside = torch.hypot(axis[:, None].float(), axis[None, :].float()) <= DIAMETER_PX / 2
    signal = seen / seen[:, inside].std()
    noise = math.sqrt(_STRUCTURAL_FRACTION) * ice / ice.std() + math.sqrt(1.0 - _STRUCTURAL_FRACTION) * white
    return signal + noise / math.sqrt(spec.snr)
