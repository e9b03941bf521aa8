"""Reading and writing maps as MRC files; values float32, axes (z, y, x), origin at the middle voxel."""

from __future__ import annotations

from pathlib import Path

import mrcfile
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from models.fourier.transforms import good_size


def write_volume(path: Path, volume: Float[Tensor, "n n n"], pixel_size_angstrom: float) -> None:
    """Write a map to `path` (any suffix); the caller makes it atomic."""
    with mrcfile.new(path, overwrite=True) as handle:
        handle.set_data(volume.detach().cpu().numpy().astype(np.float32))
        handle.set_volume()
        handle.voxel_size = pixel_size_angstrom


def read_volume(path: Path) -> tuple[Float[Tensor, "n n n"], float]:
    """Return a cubic map and its pixel size in Å; raise ValueError for anything else."""
    try:
        with mrcfile.open(path, permissive=False) as handle:
            data = np.asarray(handle.data, dtype=np.float32)
            pixel_size = float(handle.voxel_size.x)
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: {error}, a map is a readable MRC file") from error
    if data.ndim != 3 or len(set(data.shape)) != 1:
        raise ValueError(f"{path}: shape {data.shape}, a map is a cube")
    if not np.isfinite(data).all():
        raise ValueError(f"{path}: holds NaN or infinity, a map is finite")
    if pixel_size <= 0:
        raise ValueError(f"{path}: pixel size {pixel_size} Å, a map has a positive pixel size")
    return torch.from_numpy(data.copy()), pixel_size


def resample_volume(
    volume: Float[Tensor, "n n n"],
    pixel_size_angstrom: float,
    box_size_px: int,
    new_pixel_size_angstrom: float,
) -> Float[Tensor, "m m m"]:
    """Return the map on another grid about the same centre: padded, Fourier-cropped, cut or padded to the box."""
    n = int(volume.shape[-1])
    ratio = pixel_size_angstrom / new_pixel_size_angstrom
    if n == box_size_px and abs(ratio - 1.0) < 1e-4:
        return volume
    padded_size = good_size(n + n // 2) if abs(ratio - 1.0) > 1e-4 else n
    # The padded size whose Fourier-cropped counterpart is an even integer keeps the pixel size within 0.2 %.
    best = min(
        range(padded_size, padded_size + 40, 2),
        key=lambda size: abs(size * ratio / 2 - round(size * ratio / 2)) / size,
    )
    source = _centred(volume, best)
    target_size = 2 * round(best * ratio / 2)
    spectrum = torch.fft.fftshift(torch.fft.fftn(torch.fft.ifftshift(source)))
    resized = _centred(spectrum, target_size)
    out = torch.fft.fftshift(torch.fft.ifftn(torch.fft.ifftshift(resized)).real) * (target_size / best) ** 3
    return _centred(out, box_size_px)


def _centred(array: Tensor, size: int) -> Tensor:
    """Cut or zero-pad a cube about its middle sample (n // 2)."""
    n = int(array.shape[-1])
    out = array.new_zeros((size,) * 3)
    low = size // 2 - n // 2
    source = slice(max(0, -low), max(0, -low) + min(n, size))
    target = slice(max(0, low), max(0, low) + min(n, size))
    out[target, target, target] = array[source, source, source]
    return out
