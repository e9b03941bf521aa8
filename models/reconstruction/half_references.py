"""From two halves' sums to the references of the next search: FSC, radial prior, radius, masked cubes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from models.reconstruction.masks import mask_from_map
from models.reconstruction.projector import volume_to_cube
from models.reconstruction.sufficient import ReconstructionGrid, correlate_shells, ssnr_of

FSC_THRESHOLD = 0.143
"""The half-map correlation up to which a shell is used for alignment (Rosenthal & Henderson 2003)."""

FLAT_SSNR = 10.0
"""A prior so weak that it only fills holes: for maps whose correlation is to be measured."""


@dataclass(frozen=True, slots=True)
class HalfReferences:
    """Both halves' cubes, the FSC between them and the radius (shells) for alignment."""

    cubes: tuple[Tensor, Tensor]
    fsc: Tensor
    shell: float

    @property
    def crossing_shell(self) -> float:
        """The last shell before the FSC falls below 0.143: what resolution is quoted from."""
        return float(last_shell_above(self.fsc))


def last_shell_above(fsc: Float[Tensor, "s"], threshold: float = FSC_THRESHOLD) -> int:
    """Return the last shell before the curve first falls below the threshold."""
    above = fsc >= threshold
    return int((~above[1:]).int().argmax()) if not bool(above[1:].all()) else int(fsc.numel()) - 1


def half_references(
    volume_of: Callable[[int, Tensor], Tensor],
    grid: ReconstructionGrid,
    pixel_size_angstrom: float,
    sphere: Float[Tensor, "n n n"],
    *,
    is_first: bool = False,
) -> HalfReferences:
    """Solve both halves for their FSC and, with it as prior, for the next references.

    `volume_of(half, ssnr)` gives the map of half 1 or 2. Each is masked by its own envelope within the sphere
    (`is_first`: by the sphere alone, before a map is good enough to have one).
    """
    flat = torch.full((grid.n_shells,), FLAT_SSNR)
    plain = [volume_of(half, flat) for half in (1, 2)]
    masks = [sphere if is_first else _envelope(v, pixel_size_angstrom) * sphere for v in plain]
    cubes = [volume_to_cube(v * m, grid.max_shell) for v, m in zip(plain, masks, strict=True)]
    fsc = correlate_shells(cubes[0], cubes[1], grid)
    # Two shells beyond the crossing let a resolution that can grow do so; the prior keeps them quiet.
    shell = min(grid.max_shell, max(last_shell_above(fsc), 3) + 2.0)
    ssnr = torch.where(torch.arange(grid.n_shells) <= shell, ssnr_of(fsc, n_halves=1), torch.zeros(()))
    first, second = (
        volume_to_cube(volume_of(half, ssnr) * mask, grid.max_shell)
        for half, mask in zip((1, 2), masks, strict=True)
    )
    return HalfReferences((first, second), fsc, shell)


def _envelope(volume: Tensor, pixel_size_angstrom: float) -> Tensor:
    """Return a half's own wide solvent mask."""
    return mask_from_map(
        volume, pixel_size_angstrom, lowpass_angstrom=20.0, dilate_angstrom=15.0, soft_angstrom=12.0
    )
