"""Particles that somebody else extracted: one frozen table of columns, its checks and its images.

An image's address is (absolute path of the stack, index in it): subsets, several jobs and equal file names in
different folders stay apart. Units and signs are RELION's; conversions from other programs happen in
`particle_sets`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stream.ingest.files import translate_os_error
from stream.ingest.mrc_layout import MrcLayout, read_mrc_layout
from stream.records.errors import InputError

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

ROWS_PER_STACK_GROUP = 250
"""Rows of one share when micrographs are not known; about what one micrograph gives."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParticleTable:
    """One row per particle; NaN where a number is not known, None where nobody wrote the column.

    Coordinates are in pixels of the micrograph, `euler_deg` is (rot, tilt, psi), `origin_xy_angstrom` the shift
    to apply to the image. `contrast_sign` -1 means that protein is dark in the stack (CryoSPARC's blob/sign).
    `micrograph_names` holds None where a row names no micrograph. `beam_tilt_xy_mrad` has RELION's sign;
    `aberrations` names columns of further aberrations that are not zero.
    """

    source: str
    stack_paths: NDArray[np.object_]
    stack_indices: Integers
    micrograph_names: NDArray[np.object_]
    coordinate_y_px: Floats
    coordinate_x_px: Floats
    defocus_u_angstrom: Floats
    defocus_v_angstrom: Floats
    astigmatism_angle_deg: Floats
    phase_shift_deg: Floats
    voltage_kv: Floats
    cs_mm: Floats
    amplitude_contrast: Floats
    pixel_size_angstrom: Floats
    box_size_px: int
    optics_groups: Integers
    uids: NDArray[np.uint64] | None = None
    half_sets: NDArray[np.int8] | None = None
    euler_deg: Floats | None = None
    origin_xy_angstrom: Floats | None = None
    contrast_sign: NDArray[np.int8] | None = None
    figure_of_merit: Floats | None = None
    beam_tilt_xy_mrad: Floats | None = None
    aberrations: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.stack_indices)

    @property
    def has_ctf(self) -> bool:
        """Whether every row has a defocus."""
        return bool(np.isfinite(self.defocus_u_angstrom).all())

    def take(self, rows: Integers) -> ParticleTable:
        """Return a table of these rows, in this order."""
        changes: dict[str, Any] = {}
        for name in self.__dataclass_fields__:
            column = getattr(self, name)
            if isinstance(column, np.ndarray):
                changes[name] = column[rows]
        return replace(self, **changes)


@dataclass(frozen=True, slots=True, kw_only=True)
class ParticleGroup:
    """The rows that travel as one exposure; `name` is the micrograph's name or the stack's name and part."""

    name: str
    rows: Integers


def split_by_micrograph(table: ParticleTable) -> list[ParticleGroup]:
    """Return the rows of each micrograph, in order of first appearance.

    Rows without a micrograph are grouped by stack file; when they all lie in one stack, into shares of at
    most 250 rows, so that half-sets can be balanced. Such a name starts with `stack:`.
    """
    order: dict[str, list[int]] = {}
    nameless: dict[str, list[int]] = {}
    for row, (name, stack) in enumerate(zip(table.micrograph_names, table.stack_paths, strict=True)):
        (nameless.setdefault(stack, []) if name is None else order.setdefault(name, [])).append(row)
    groups = [ParticleGroup(name=name, rows=np.asarray(rows)) for name, rows in order.items()]
    base = Path(table.source).parent
    for stack, rows in nameless.items():
        path = Path(stack)
        label = path.relative_to(base).as_posix() if path.is_relative_to(base) else stack
        size = ROWS_PER_STACK_GROUP if len(nameless) == 1 else len(rows)
        for part, start in enumerate(range(0, len(rows), size), start=1):
            name = f"stack:{label}#{part:04d}"
            groups.append(ParticleGroup(name=name, rows=np.asarray(rows[start : start + size])))
    return groups


def read_stack_layout(path: str) -> MrcLayout:
    """Return where the images of an MRC stack lie."""
    try:
        with Path(path).open("rb") as stream:
            return read_mrc_layout(stream, path)
    except OSError as error:
        raise translate_os_error(path, error) from error


def check_stacks(source: str, stack_paths: NDArray[np.object_], stack_indices: Integers) -> tuple[int, float]:
    """Return box and pixel size (NaN = not said) of the stacks after checking every address.

    Raises
    ------
    InputError
        A stack is missing or truncated, an index lies beyond its end, boxes differ or are not square.
    """
    unique, inverse = np.unique(stack_paths.astype(str), return_inverse=True)
    boxes: dict[int, str] = {}
    pixel_size = float("nan")
    for number, path in enumerate(unique):
        layout = read_stack_layout(path)
        if layout.shape_yx[0] != layout.shape_yx[1]:
            raise InputError(
                path, "particle boxes are square", f"{layout.shape_yx[0]} x {layout.shape_yx[1]}"
            )
        boxes.setdefault(layout.shape_yx[0], path)
        if len(boxes) > 1:
            value = ", ".join(f"{box} px in {where}" for box, where in boxes.items())
            raise InputError(source, "all particles have one box size", value)
        indices = stack_indices[inverse == number]
        if indices.min() < 0 or indices.max() >= layout.n_sections:
            bad = int(indices.max() if indices.max() >= layout.n_sections else indices.min())
            value = f"image {bad + 1} of {path}, which has {layout.n_sections}"
            raise InputError(source, "every particle's index lies within its stack", value)
        if layout.pixel_size_angstrom is not None:
            pixel_size = layout.pixel_size_angstrom
    return next(iter(boxes)), pixel_size


def iterate_images(table: ParticleTable, rows: Integers) -> Iterator[NDArray[np.floating[Any]]]:
    """Yield the images `(h w)` of these rows in order, float16 where the stack is, else float32.

    One stack is open at a time; only the images asked for are read.
    """
    opened: tuple[str, NDArray[Any]] | None = None
    for row in rows:
        path = str(table.stack_paths[row])
        if opened is None or opened[0] != path:
            layout = read_stack_layout(path)
            shape = (layout.n_sections, *layout.shape_yx)
            try:
                opened = path, np.memmap(path, layout.dtype, mode="r", offset=layout.data_offset, shape=shape)
            except OSError as error:
                raise translate_os_error(path, error) from error
        image = opened[1][table.stack_indices[row]]
        yield np.array(
            image, dtype=np.float16 if image.dtype.kind == "f" and image.dtype.itemsize == 2 else np.float32
        )
