"""Images of particle stacks, addressed by (absolute path, index), and which of them can be scored."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stream.ingest.particle_table import read_stack_layout
from stream.records.errors import InputError

Images = NDArray[np.float32]


def find_usable_images(images: Images) -> NDArray[np.bool_]:
    """Return which images [b, n, n] are finite everywhere and not one single value."""
    if not len(images):
        return np.zeros(0, dtype=bool)
    flat = images.reshape(len(images), -1)
    low, high = flat.min(axis=1), flat.max(axis=1)
    is_usable: NDArray[np.bool_] = np.isfinite(low) & np.isfinite(high) & (high > low)
    return is_usable


def find_mendable_images(images: Images) -> NDArray[np.bool_]:
    """Return which images [b, n, n] have two different finite values."""
    flat = images.reshape(len(images), -1) if len(images) else images.reshape(0, 1)
    is_finite = np.isfinite(flat)
    low = flat.min(axis=1, where=is_finite, initial=np.inf)
    high = flat.max(axis=1, where=is_finite, initial=-np.inf)
    is_usable: NDArray[np.bool_] = high > low
    return is_usable


def read_images(
    stack_paths: NDArray[np.object_],
    stack_indices: NDArray[np.int64],
    rows: NDArray[np.intp],
    *,
    chunk: int,
) -> Iterator[tuple[NDArray[np.intp], Images]]:
    """Yield (rows, images [b, n, n]) of at most `chunk` images, one stack after the other, by memory map."""
    paths, inverse = np.unique(stack_paths[rows].astype(str), return_inverse=True)
    for number, path in enumerate(paths):
        mine = rows[inverse == number]
        mine = mine[np.argsort(stack_indices[mine], kind="stable")]
        stack = _map_stack(path)
        if len(mine) and not 0 <= stack_indices[mine[0]] <= stack_indices[mine[-1]] < len(stack):
            value = f"images {stack_indices[mine[0]] + 1} to {stack_indices[mine[-1]] + 1}"
            raise InputError(path, f"an image's number lies in the stack of {len(stack)}", value)
        for start in range(0, len(mine), chunk):
            part = mine[start : start + chunk]
            yield part, stack[stack_indices[part]].astype(np.float32)


def _map_stack(path: str) -> NDArray[Any]:
    layout = read_stack_layout(path)
    if layout.shape_yx[0] != layout.shape_yx[1]:
        raise InputError(path, "particle boxes are square", f"{layout.shape_yx[0]} x {layout.shape_yx[1]}")
    shape = (layout.n_sections, *layout.shape_yx)
    try:
        return np.memmap(Path(path), layout.dtype, mode="r", offset=layout.data_offset, shape=shape)
    except (OSError, ValueError) as error:
        raise InputError(path, "the stack can be read", error) from error
