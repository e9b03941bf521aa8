"""MRC micrographs and particle stacks, written durably and, for stacks, batch by batch."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import mrcfile
import numpy as np
from numpy.typing import NDArray

from stream.store.files import replacing

_FLOAT32_MODE, _FLOAT16_MODE = 2, 12
_LABEL = b"icestream"
"""In place of mrcfile's label, which holds the time: the same image gives the same bytes."""


def write_micrograph(path: Path, image: NDArray[np.float32], pixel_size_angstrom: float) -> None:
    """Write one image as a float32 MRC with its pixel size."""
    with replacing(path) as temporary, mrcfile.new(temporary, overwrite=True) as mrc:
        mrc.set_data(np.ascontiguousarray(image, dtype=np.float32))
        mrc.voxel_size = pixel_size_angstrom
        mrc.header.label[0] = _LABEL


def write_stack(
    path: Path,
    batches: Iterable[NDArray[np.float32]],
    *,
    n_images: int,
    box_size_px: int,
    pixel_size_angstrom: float,
    is_float16: bool,
) -> None:
    """Write `n_images` square images, given in batches, as an MRC stack of float32 or float16 (mode 12)."""
    mode = _FLOAT16_MODE if is_float16 else _FLOAT32_MODE
    shape = (n_images, box_size_px, box_size_px)
    low, high, total, squares, start = np.inf, -np.inf, 0.0, 0.0, 0
    with (
        replacing(path) as temporary,
        mrcfile.new_mmap(temporary, shape, mrc_mode=mode, overwrite=True) as mrc,
    ):
        for batch in batches:
            mrc.data[start : start + len(batch)] = batch
            start += len(batch)
            low, high = min(low, float(batch.min())), max(high, float(batch.max()))
            total += float(batch.sum(dtype=np.float64))
            squares += float(np.square(batch, dtype=np.float64).sum())
        if start != n_images:
            raise ValueError(f"batches: {start} images, n_images is {n_images}")
        mrc.set_image_stack()
        mrc.header.label[0] = _LABEL
        mrc.voxel_size = pixel_size_angstrom
        mean = total / (n_images * box_size_px**2)
        mrc.header.dmin, mrc.header.dmax, mrc.header.dmean = low, high, mean
        mrc.header.rms = max(squares / (n_images * box_size_px**2) - mean**2, 0.0) ** 0.5
