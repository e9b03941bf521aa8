"""The virtual specimen: how many particles, where, in which pose and conformation. Draws only, nothing is rendered.

CryoGEM eq. 2. The number is a Normal fitted to the session's picks, clipped at two standard deviations. Particles are
placed one after another on free pixels, each blocking a square (Chebyshev distance) around its centre. Every placement
has a pose of its own, uniform over SO(3), given as the representative inside the point group's asymmetric unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from models.fourier.point_groups import symmetry_matrices
from models.reconstruction.grids import random_rotations

_CLIP_SD = 2.0
_CELL_CENTRE = (0.331, 0.209, 0.917)
"""Any direction on no symmetry axis: the one of `models.reconstruction.grids.asymmetric_unit`."""
_NEAR_QUANTILE = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class CountDistribution:
    """Particles per frame: a Normal clipped at two standard deviations, at least one, an integer."""

    mean: float
    sd: float

    def draw(self, rng: np.random.Generator) -> int:
        """Draw a number of particles."""
        drawn = np.clip(rng.normal(), -_CLIP_SD, _CLIP_SD) * self.sd + self.mean
        return max(1, round(float(drawn)))


@dataclass(frozen=True, slots=True, kw_only=True)
class VirtualSpecimen:
    """Particles of one frame, row by row; `n_wanted` is the number that was drawn.

    Centres are (y, x) in pixels of the frame, at sub-pixel positions; rotations act on xyz column vectors
    (`models.fourier.rotations`); a conformation is an index into the bank's volumes.
    """

    centres_yx_px: NDArray[np.float64]
    rotations: NDArray[np.float32]
    conformations: NDArray[np.int64]
    n_wanted: int

    @property
    def n_particles(self) -> int:
        """Number of particles placed; less than `n_wanted` where the frame was full."""
        return len(self.centres_yx_px)


def fit_counts(counts: Sequence[int]) -> CountDistribution:
    """Return the Normal of the session's picks per micrograph (one micrograph: its number, spread 0)."""
    values = np.asarray(counts, dtype=np.float64)
    if not len(values) or values.max() < 1:
        raise ValueError(f"counts: {list(counts)[:5]}, at least one micrograph has picks")
    return CountDistribution(mean=float(values.mean()), sd=float(values.std()))


def measure_spacing(centres_yx_px: Sequence[NDArray[np.floating]]) -> float | None:
    """Return the 5 % quantile of the Chebyshev distance from a pick to its nearest, or None without pairs."""
    nearest = []
    for centres in centres_yx_px:
        if len(centres) < 2:
            continue
        apart = np.abs(centres[:, None, :] - centres[None, :, :]).max(axis=-1).astype(np.float64)
        np.fill_diagonal(apart, np.inf)
        nearest.append(apart.min(axis=1))
    return float(np.quantile(np.concatenate(nearest), _NEAR_QUANTILE)) if nearest else None


def spacing_from_collapse(box_px: int, collapse_ratio: float) -> float:
    """Return the least Chebyshev distance of two centres, (1 - ratio) × box: 0 apart by a box, towards 1 overlapping."""
    if not 0.0 <= collapse_ratio < 1.0:
        raise ValueError(f"collapse_ratio: {collapse_ratio}, must lie in [0, 1)")
    return (1.0 - collapse_ratio) * box_px


def place_on_free_pixels(
    n_wanted: int, shape_yx: tuple[int, int], spacing_px: float, rng: np.random.Generator
) -> NDArray[np.float64]:
    """Return up to `n_wanted` centres no nearer than `spacing_px` in Chebyshev distance, uniform over free pixels.

    A centre lies anywhere in its pixel. Placement ends early when no pixel is free.
    """
    is_free = np.ones(shape_yx, dtype=bool)
    reach = int(np.ceil(spacing_px))  # one pixel more than between pixel centres, for the sub-pixel part
    centres: list[tuple[float, float]] = []
    for _ in range(n_wanted):
        free = np.flatnonzero(is_free)
        if not len(free):
            break
        y, x = divmod(int(free[rng.integers(len(free))]), shape_yx[1])
        jitter = rng.uniform(-0.5, 0.5, size=2)
        centres.append((y + float(jitter[0]), x + float(jitter[1])))
        is_free[max(0, y - reach) : y + reach + 1, max(0, x - reach) : x + reach + 1] = False
    placed = np.array(centres, dtype=np.float64).reshape(-1, 2)
    return np.clip(placed, 0.0, np.asarray(shape_yx, dtype=np.float64) - 1.0)


def draw_rotations(n: int, symmetry: str, rng: np.random.Generator) -> NDArray[np.float32]:
    """Return rotations uniform over SO(3), each as its representative in the group's asymmetric unit.

    The in-plane angle is uniform: R and R g give the same projection for g in the group, and folding takes the g that
    brings the view nearest to a generic direction, whatever the in-plane angle.
    """
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    rotations = random_rotations(n, generator)
    return fold_rotations(rotations, symmetry_matrices(symmetry)).numpy().astype(np.float32)


def fold_rotations(
    rotations: Float[Tensor, "n 3 3"], group: Float[Tensor, "g 3 3"]
) -> Float[Tensor, "n 3 3"]:
    """Return for each R the R g whose view (third row) lies nearest to a generic direction."""
    centre = torch.nn.functional.normalize(torch.tensor(_CELL_CENTRE), dim=0)
    nearness = rotations[:, 2, :] @ (group @ centre).T
    return rotations @ group[nearness.argmax(dim=1)]
