"""Summing a movie: every tile of every frame is moved by its own trajectory, weighted and added in Fourier space.

A tile follows whole-frame shift and local motion at its centre; it is small enough that motion between frames
differs little within it. What all frames have in common of the local motion (its mean over time) is a smooth
distortion: the sum is made without it and moved once in the end, on a fine grid, so that the micrograph lies in
the coordinates of the first frame, as RELION's does. Nothing is interpolated but by exact phase shifts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from models.fourier.transforms import crop_rfft2, good_size
from models.motion.dose import critical_exposure, dose_weight, noise_normalisation
from models.motion.local import LocalMotion, spatial_basis
from models.motion.tiles import TileGrid, mirrored

# Cores of tiles to choose from, in pixels; without local motion the largest one is cheapest.
_CORES_PX = (528, 272, 176, 112)
# The greatest rms over the frames by which motion may differ between a tile's centre and its edge: at half the
# Nyquist frequency that costs 3 % of the signal in the worst place.
_SPREAD_PX = 0.15
# Tiles of the final distortion: neighbours differ by less than a tenth of a pixel.
_FINE_CORE_PX = 80


@dataclass(frozen=True, slots=True, kw_only=True)
class SummedMovie:
    """The micrograph, and the plain sum of the same frames: Thon rings are best seen in that one."""

    micrograph: Float[Tensor, "y2 x2"]
    unweighted: Float[Tensor, "y2 x2"]


def sum_frames(
    frames: Iterable[Float[Tensor, "y x"]],
    shifts_px: Float[Tensor, "frame 2"],
    *,
    pixel_size_angstrom: float,
    accumulated_e_per_angstrom2: Float[Tensor, "frame"] | None,
    voltage_kv: float,
    local: LocalMotion | None = None,
    binning: float = 1.0,
) -> SummedMovie:
    """Return the aligned sums, dose-weighted when exposures are given, Fourier-cropped by `binning` (≥ 1).

    With or without dose weights a sum has the mean and the noise power of a plain sum of the frames
    (per pixel of the binned image: grey values keep their mean on cropping).
    """
    total: _Sum | None = None
    index = -1
    for index, frame in enumerate(frames):
        if index >= len(shifts_px):
            continue
        if total is None:
            total = _Sum(frame, local, accumulated_e_per_angstrom2, pixel_size_angstrom, voltage_kv)
        total.add(frame, shifts_px[index], index)
    if total is None or index + 1 != len(shifts_px):
        raise ValueError(f"frames: {index + 1}, there are {len(shifts_px)} shifts")
    unweighted = total.blend(total.plain)
    micrograph = unweighted if total.weighted is None else total.blend(total.weighted)
    return SummedMovie(micrograph=bin_image(micrograph, binning), unweighted=bin_image(unweighted, binning))


class _Sum:
    """Spectra of tiles, plain and dose-weighted, that frames are added to."""

    def __init__(
        self,
        first: Float[Tensor, "y x"],
        local: LocalMotion | None,
        accumulated: Float[Tensor, "frame"] | None,
        pixel_size_angstrom: float,
        voltage_kv: float,
    ) -> None:
        shape = (int(first.shape[0]), int(first.shape[1]))
        self.grid = TileGrid(shape, _choose_core(shape, local), first.device)
        self._local = local
        self._moves: Tensor | None = None
        if local is not None:
            basis = spatial_basis(self.grid.centres[:, 0], self.grid.centres[:, 1])
            amplitudes = local.amplitudes - local.amplitudes.mean(dim=-1, keepdim=True)
            self._moves = torch.einsum("ps,asf->fpa", basis, amplitudes)
        self.plain = self.grid.zeros()
        self.weighted: Tensor | None = None
        self._exposures: list[float] = []
        if accumulated is not None:
            self.weighted = self.grid.zeros()
            self._exposures = accumulated.tolist()
            ky = torch.fft.fftfreq(self.grid.tile_yx[0], pixel_size_angstrom, device=first.device)
            kx = torch.fft.rfftfreq(self.grid.tile_yx[1], pixel_size_angstrom, device=first.device)
            self._critical = critical_exposure(torch.hypot(ky[:, None], kx[None, :]), voltage_kv)
            self._norm = noise_normalisation(self._critical, accumulated)

    def add(self, frame: Float[Tensor, "y x"], shift_px: Float[Tensor, "2"], index: int) -> None:
        shifts = shift_px.expand(len(self.grid.centres), 2)
        if self._moves is not None:
            shifts = shifts + self._moves[index]
        weight = None
        if self.weighted is not None:
            weight = self._norm * dose_weight(self._critical, self._exposures[index])
        for row, spectra in enumerate(self.grid.move(frame, shifts)):
            self.plain[row] += spectra
            if weight is not None and self.weighted is not None:
                self.weighted[row] += spectra.mul_(weight)

    def blend(self, spectra: Tensor) -> Float[Tensor, "y x"]:
        """Return the image, moved by what all frames have in common of the local motion."""
        image = self.grid.blend(spectra)
        return image if self._local is None else _apply_distortion(image, self._local)


def _choose_core(shape_yx: tuple[int, int], local: LocalMotion | None) -> int:
    """Return the largest core within which the frames' motion is all but the same."""
    if local is None:
        return _CORES_PX[0]
    line = torch.linspace(-0.5, 0.5, 9, device=local.amplitudes.device)
    v, u = (g.flatten() for g in torch.meshgrid(line, line, indexing="ij"))
    field = torch.einsum("ps,asf->pfa", spatial_basis(v, u), local.amplitudes)
    spread = (field - field.mean(dim=1, keepdim=True)).reshape(9, 9, -1, 2)
    for core in _CORES_PX:
        # motion between neighbouring points of the grid, scaled to half a core
        worst = 0.0
        for axis, n in enumerate(shape_yx):
            rms = spread.diff(dim=axis).square().sum(dim=-1).mean(dim=-1).sqrt()
            worst = max(worst, float(rms.max()) * 8.0 / n * 0.5 * core)
        if worst <= _SPREAD_PX:
            return core
    return _CORES_PX[-1]


def _apply_distortion(image: Float[Tensor, "y x"], local: LocalMotion) -> Float[Tensor, "y x"]:
    """Return the image moved by the local motion's mean over the frames."""
    grid = TileGrid((int(image.shape[0]), int(image.shape[1])), _FINE_CORE_PX, image.device)
    mean = local.amplitudes.mean(dim=-1)
    shifts = spatial_basis(grid.centres[:, 0], grid.centres[:, 1]) @ mean.T
    return grid.blend(torch.stack(list(grid.move(image, shifts))))


def padded_shape(shape_yx: tuple[int, int], binning: float) -> tuple[int, int]:
    """Return good transform sizes ≥ shape whose ratio to `binning` is even, where one lies within 10 %."""
    y, x = (_padded_length(n, binning) for n in shape_yx)
    return y, x


def _padded_length(n: int, binning: float) -> int:
    size = good_size(n)
    while size < 1.1 * n:
        binned = size / binning
        if abs(binned - round(binned)) < 1e-6 and round(binned) % 2 == 0:
            return size
        size = good_size(size + 1)
    return good_size(n)


def bin_image(image: Float[Tensor, "y x"], binning: float) -> Float[Tensor, "y2 x2"]:
    """Return the image Fourier-cropped by `binning`; its far edges are continued by their mirror images."""
    if binning == 1.0:
        return image
    height, width = (int(n) for n in image.shape)
    padded = padded_shape((height, width), binning)
    cropped = (2 * round(padded[0] / binning / 2), 2 * round(padded[1] / binning / 2))
    pads = (padded[0] - height, padded[1] - width)
    wide = mirrored(image, pads[0], pads[1])[pads[0] :, pads[1] :]
    spectrum = crop_rfft2(torch.fft.rfft2(wide), padded, cropped)
    binned: Tensor = torch.fft.irfft2(spectrum, s=cropped)
    return binned[: int(height / binning), : int(width / binning)].clone()
