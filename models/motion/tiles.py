"""Moving an image piece by piece: overlapping tiles, each shifted exactly by phases, blended into one again.

Whole pixels are moved by cutting the tile elsewhere, so that phases move by half a pixel at most; what lies beyond
the image's edge is its mirror image, never its other side.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

from models.fourier.transforms import good_size

# Tiles reach that far beyond their core: half of it is blended, the rest keeps what wraps around out.
_RIM_PX = 24


class TileGrid:
    """A grid of equal tiles over an image of `shape_yx` whose cores are at most `core_px` wide.

    `centres` are the tiles' centres (v, u), as fractions of the image from −0.5 to 0.5. Tiles are indexed row by row.
    """

    def __init__(self, shape_yx: tuple[int, int], core_px: int, device: torch.device) -> None:
        self.shape_yx = shape_yx
        self.counts = (math.ceil(shape_yx[0] / core_px), math.ceil(shape_yx[1] / core_px))
        self._cores = tuple(math.ceil(n / c) for n, c in zip(shape_yx, self.counts, strict=True))
        self.tile_yx = (good_size(self._cores[0] + 2 * _RIM_PX), good_size(self._cores[1] + 2 * _RIM_PX))
        middles = [
            (torch.arange(count, device=device) + 0.5) * core / n - 0.5
            for count, core, n in zip(self.counts, self._cores, shape_yx, strict=True)
        ]
        self.centres = torch.cartesian_prod(*middles)
        self._windows = [self._window(axis, device) for axis in (0, 1)]
        self._fy = torch.fft.fftfreq(self.tile_yx[0], device=device)
        self._fx = torch.fft.rfftfreq(self.tile_yx[1], device=device)

    def _window(self, axis: int, device: torch.device) -> Float[Tensor, "n"]:
        """Return the blend of an inner tile: neighbours sum to one."""
        core = self._cores[axis]
        x = torch.arange(self.tile_yx[axis], device=device) + 0.5 - _RIM_PX
        rise = (x / _RIM_PX + 0.5).clamp(0.0, 1.0)
        fall = ((core - x) / _RIM_PX + 0.5).clamp(0.0, 1.0)
        return torch.sin(0.5 * math.pi * rise).square() * torch.sin(0.5 * math.pi * fall).square()

    def zeros(self) -> Complex[Tensor, "row column h wr"]:
        """Return empty spectra of all tiles."""
        shape = (*self.counts, self.tile_yx[0], self.tile_yx[1] // 2 + 1)
        return torch.zeros(shape, dtype=torch.complex64, device=self._fy.device)

    def move(
        self, image: Float[Tensor, "y x"], shifts_px: Float[Tensor, "tile 2"]
    ) -> Iterator[Complex[Tensor, "column h wr"]]:
        """Yield, row by row, the spectra of the tiles, each one's content moved by its shift."""
        whole = shifts_px.round()
        rest = shifts_px - whole
        rows, columns = _phases(rest[:, 0], self._fy), _phases(rest[:, 1], self._fx)
        reach = [_RIM_PX + n for n in whole.abs().amax(dim=0).int().tolist()]
        reach = [r + t - c for r, t, c in zip(reach, self.tile_yx, self._cores, strict=True)]
        padded = mirrored(image, reach[0], reach[1])
        origins = self._origins(whole, reach)
        h, w = self.tile_yx
        for row in range(self.counts[0]):
            part = slice(row * self.counts[1], (row + 1) * self.counts[1])
            cuts = torch.stack([padded[y : y + h, x : x + w] for y, x in origins[part]])
            spectra = torch.fft.rfft2(cuts)
            spectra *= columns[part, None, :]
            spectra *= rows[part, :, None]
            yield spectra

    def _origins(self, whole: Float[Tensor, "tile 2"], reach: list[int]) -> list[tuple[int, int]]:
        """Return where each tile is cut from the padded image."""
        corners = [
            (r * self._cores[0], c * self._cores[1])
            for r in range(self.counts[0])
            for c in range(self.counts[1])
        ]
        moves = whole.int().tolist()
        return [
            (y - dy + reach[0] - _RIM_PX, x - dx + reach[1] - _RIM_PX)
            for (y, x), (dy, dx) in zip(corners, moves, strict=True)
        ]

    def blend(self, spectra: Complex[Tensor, "row column h wr"]) -> Float[Tensor, "y x"]:
        """Return the image that the tiles make up."""
        height, width = (
            n * core + tile - core
            for n, core, tile in zip(self.counts, self._cores, self.tile_yx, strict=True)
        )
        canvas = torch.zeros(height, width, device=spectra.device)
        h, w = self.tile_yx
        for r, row in enumerate(spectra):
            tiles = torch.fft.irfft2(row, s=self.tile_yx)
            for c, tile in enumerate(tiles):
                window = self._edge_window(0, r)[:, None] * self._edge_window(1, c)[None, :]
                y, x = r * self._cores[0], c * self._cores[1]
                canvas[y : y + h, x : x + w] += tile * window
        return canvas[_RIM_PX : _RIM_PX + self.shape_yx[0], _RIM_PX : _RIM_PX + self.shape_yx[1]].clone()

    def _edge_window(self, axis: int, index: int) -> Float[Tensor, "n"]:
        """Return the blend of one tile: there is nothing to share at the image's edges."""
        window = self._windows[axis].clone()
        middle = len(window) // 2
        if index == 0:
            window[:middle] = 1.0
        if index == self.counts[axis] - 1:
            window[middle:] = 1.0
        return window


def mirrored(image: Float[Tensor, "y x"], reach_y: int, reach_x: int) -> Float[Tensor, "y2 x2"]:
    """Return the image with its mirror images around, `reach` pixels on each side (more than once if need be)."""
    rows = _mirror_indices(int(image.shape[0]), reach_y, image.device)
    columns = _mirror_indices(int(image.shape[1]), reach_x, image.device)
    return image.index_select(0, rows).index_select(1, columns)


def _mirror_indices(n: int, reach: int, device: torch.device) -> Int[Tensor, "m"]:
    index = torch.arange(-reach, n + reach, device=device) % (2 * n)
    return torch.minimum(index, 2 * n - 1 - index)


def _phases(shift: Float[Tensor, "tile"], frequency: Float[Tensor, "n"]) -> Complex[Tensor, "tile n"]:
    angle = -2.0 * math.pi * shift[:, None] * frequency
    return torch.polar(torch.ones_like(angle), angle)
