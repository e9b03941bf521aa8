"""Summing a movie: whole-frame shifts and dose weights in Fourier space, local motion by warping.

Frames are added up in Fourier space with exact phase shifts. Local motion is applied by bicubic warping of
*groups* of consecutive frames: within a group the local displacement differs by at most `_GROUP_SPREAD_PX`
from the group's mean (nowhere in the field), which damps the signal at Nyquist by under 2 %, and spares most
of the cost of warping every frame. What a shift brings in across the edge wraps around, as in RELION.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from models.fourier.filters import squared_frequencies
from models.fourier.transforms import crop_rfft2, good_size, shift_phases
from models.motion.dose import critical_exposure, dose_weight, noise_normalisation
from models.motion.local import LocalMotion, spatial_basis, time_basis

_GROUP_SPREAD_PX = 0.15
# Rows that are warped at once: bounds the sampling grid to some tens of MB.
_STRIP_ROWS = 512


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


@dataclass(frozen=True, slots=True, kw_only=True)
class SummedMovie:
    """The micrograph, and the plain sum with whole-frame shifts alone: Thon rings are best seen in that one."""

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
    n_frames = len(shifts_px)
    groups = _group_frames(n_frames, local)
    result: Tensor | None = None
    padded = cropped = shape = (0, 0)
    weights = _Weights(accumulated_e_per_angstrom2, voltage_kv)
    group: Tensor | None = None
    plain: Tensor | None = None
    mean = 0.0
    index = -1
    for index, frame in enumerate(frames):
        if result is None:
            height, width = (int(n) for n in frame.shape)
            padded = padded_shape((height, width), binning)
            cropped = (2 * round(padded[0] / binning / 2), 2 * round(padded[1] / binning / 2))
            shape = (int(height / binning), int(width / binning))
            weights.prepare(cropped, pixel_size_angstrom * padded[0] / cropped[0])
            result = torch.zeros(shape)
        frame_mean = float(frame.mean())
        mean += frame_mean
        spectrum = crop_rfft2(torch.fft.rfft2(frame - frame_mean, s=padded), padded, cropped)
        scale = torch.tensor([cropped[0] / padded[0], cropped[1] / padded[1]])
        spectrum = spectrum * shift_phases(cropped, shifts_px[index] * scale)
        plain = spectrum if plain is None else plain.add_(spectrum)
        spectrum = weights.apply(spectrum, index)
        group = spectrum.clone() if group is None else group.add_(spectrum)
        if index + 1 in groups:
            image = torch.fft.irfft2(weights.normalise(group), s=cropped)[: shape[0], : shape[1]]
            if local is None:
                result += image
            else:
                members = torch.arange(groups[index + 1], index + 1, dtype=torch.float32)
                _add_warped(result, image, local, members, binning)
            group = None
    if result is None or plain is None or index + 1 != n_frames:
        raise ValueError(f"frames: {index + 1}, there are {n_frames} shifts")
    unweighted = torch.fft.irfft2(plain, s=cropped)[: shape[0], : shape[1]] + mean
    return SummedMovie(micrograph=result + mean, unweighted=unweighted)


class _Weights:
    """Dose weights, or none; prepared once the frames' shape is known."""

    def __init__(self, accumulated: Float[Tensor, "frame"] | None, voltage_kv: float) -> None:
        self._accumulated = accumulated
        self._voltage_kv = voltage_kv
        self._critical = torch.zeros(0)
        self._norm = torch.zeros(0)

    def prepare(self, shape_yx: tuple[int, int], pixel_size_angstrom: float) -> None:
        if self._accumulated is not None:
            k = squared_frequencies(shape_yx, pixel_size_angstrom).sqrt()
            self._critical = critical_exposure(k, self._voltage_kv)
            self._norm = noise_normalisation(self._critical, self._accumulated)

    def apply(self, spectrum: Complex[Tensor, "h wr"], index: int) -> Complex[Tensor, "h wr"]:
        if self._accumulated is None:
            return spectrum
        return spectrum * dose_weight(self._critical, float(self._accumulated[index]))

    def normalise(self, spectrum: Complex[Tensor, "h wr"]) -> Complex[Tensor, "h wr"]:
        return spectrum if self._accumulated is None else spectrum * self._norm


def _group_frames(n_frames: int, local: LocalMotion | None) -> dict[int, int]:
    """Return {end (exclusive): start} of groups of frames whose local displacements are all but the same."""
    if local is None:
        return {n_frames: 0}
    corners = torch.linspace(-0.5, 0.5, 5)
    v, u = (g.flatten() for g in torch.meshgrid(corners, corners, indexing="ij"))
    t = time_basis(torch.arange(n_frames, dtype=torch.float32))
    field = torch.einsum("ps,ast,ft->fpa", spatial_basis(v, u), local.coefficients, t)
    groups: dict[int, int] = {}
    start = 0
    for end in range(1, n_frames + 1):
        if end == n_frames or _spread(field[start : end + 1]) > _GROUP_SPREAD_PX:
            groups[end] = start
            start = end
    return groups


def _spread(field: Float[Tensor, "frame point 2"]) -> float:
    return float((field - field.mean(dim=0)).norm(dim=-1).max())


def _add_warped(
    result: Tensor,
    image: Float[Tensor, "y x"],
    local: LocalMotion,
    members: Float[Tensor, "frame"],
    binning: float,
) -> None:
    """Add to `result` (in place: it is this module's accumulator) the image moved by the group's mean field."""
    height, width = (int(n) for n in image.shape)
    x = torch.arange(width, dtype=torch.float32)
    mean_time = time_basis(members).mean(dim=0)
    at_time = local.coefficients @ mean_time
    for top in range(0, height, _STRIP_ROWS):
        rows = torch.arange(top, min(height, top + _STRIP_ROWS), dtype=torch.float32)
        yy, xx = torch.meshgrid(rows, x, indexing="ij")
        shift = spatial_basis(yy / height - 0.5, xx / width - 0.5) @ at_time.T / binning
        grid = torch.stack(
            [
                (xx - shift[..., 1]) * (2.0 / (width - 1)) - 1.0,
                (yy - shift[..., 0]) * (2.0 / (height - 1)) - 1.0,
            ],
            dim=-1,
        )
        warped = torch.nn.functional.grid_sample(
            image[None, None], grid[None], mode="bicubic", padding_mode="reflection", align_corners=True
        )
        result[top : top + len(rows)] += warped[0, 0]
