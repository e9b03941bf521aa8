"""Reading and writing maps as MRC files; values float32, axes (z, y, x), origin at the middle voxel."""

from __future__ import annotations

from pathlib import Path

import mrcfile
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


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
