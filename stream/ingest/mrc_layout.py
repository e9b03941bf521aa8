"""The header of an MRC file, read strictly: what it promises must be in the file.

Format: MRC2014 (Cheng et al., J. Struct. Biol. 192, 146, 2015); old files without `MAP ` are taken when
their dimensions and mode make sense and the size agrees exactly.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from typing import BinaryIO

from stream.records.errors import InputError

HEADER_BYTES = 1024
MODES = {0: "i1", 1: "i2", 2: "f4", 6: "u2", 12: "f2"}
_IMOD_STAMP = 1146047817


@dataclass(frozen=True, slots=True, kw_only=True)
class MrcLayout:
    """Where the images of an MRC file lie; `dtype` is a numpy name with byte order.

    `pixel_size_angstrom` is None where the header has none: zero, or exactly 1.0, which programs leave there
    when they do not know it.
    """

    n_sections: int
    shape_yx: tuple[int, int]
    mode: int
    dtype: str
    data_offset: int
    pixel_size_angstrom: float | None


def is_mrc(head: bytes) -> bool:
    """Return whether the first kilobyte carries the MRC2014 signature `MAP `."""
    return len(head) >= HEADER_BYTES and head[208:211] == b"MAP"


def looks_like_old_mrc(head: bytes, size: int) -> bool:
    """Return whether a header without signature makes sense and promises exactly the bytes that are there."""
    if len(head) < HEADER_BYTES:
        return False
    for order in "<>":
        nx, ny, nz, mode = struct.unpack(f"{order}4i", head[:16])
        n_extended = struct.unpack(f"{order}i", head[92:96])[0]
        if mode in MODES and min(nx, ny, nz) > 0 and n_extended >= 0:
            itemsize = int(MODES[mode][1])
            if HEADER_BYTES + n_extended + nx * ny * nz * itemsize == size:
                return True
    return False


def read_mrc_layout(stream: BinaryIO, item: str) -> MrcLayout:
    """Return the layout of an open MRC file; the file must hold every section that the header promises."""
    size = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    head = stream.read(HEADER_BYTES)
    if len(head) < HEADER_BYTES:
        raise InputError(item, "an MRC header has 1024 bytes (file truncated)", f"{len(head)} bytes")
    order = _byte_order(head, item)
    nx, ny, nz, mode = struct.unpack(f"{order}4i", head[:16])
    if mode not in MODES:
        raise InputError(item, f"an MRC movie has mode {', '.join(map(str, MODES))}", f"mode {mode}")
    if nz == 0:
        raise InputError(item, "a movie has at least one frame", "0 frames")
    if min(nx, ny, nz) < 1:
        raise InputError(item, "MRC dimensions are positive", f"nx {nx}, ny {ny}, nz {nz}")
    n_extended = struct.unpack(f"{order}i", head[92:96])[0]
    if n_extended < 0:
        raise InputError(item, "an MRC extended header has a length of at least 0", f"{n_extended} bytes")
    itemsize = int(MODES[mode][1])
    _check_size(item, size, HEADER_BYTES + n_extended, nz, ny * nx * itemsize)
    return MrcLayout(
        n_sections=nz,
        shape_yx=(ny, nx),
        mode=mode,
        dtype=order + ("u1" if mode == 0 and _is_unsigned(head, order) else MODES[mode]),
        data_offset=HEADER_BYTES + n_extended,
        pixel_size_angstrom=_pixel_size(head, order),
    )


def _byte_order(head: bytes, item: str) -> str:
    """The order in which the mode makes sense; the machine stamp is wrong too often to be the first witness."""
    for order in "<>":
        mode = struct.unpack(f"{order}i", head[12:16])[0]
        if 0 <= mode < 256 and (mode or struct.unpack(f"{order}i", head[:4])[0] < 1 << 20):
            return order
    raise InputError(item, "an MRC header has a known mode", head[12:16].hex(" "))


def _check_size(item: str, size: int, start: int, n_sections: int, section_bytes: int) -> None:
    expected = start + n_sections * section_bytes
    if size < expected:
        whole = max(0, size - start) // section_bytes
        value = f"{whole} of {n_sections} frames, {size} of {expected} bytes"
        raise InputError(item, "the file holds every frame its header promises (file truncated)", value)
    if size >= expected + section_bytes:
        value = f"header {n_sections} frames, file {(size - start) // section_bytes}"
        raise InputError(item, "the header counts every frame in the file (still being written?)", value)


def _is_unsigned(head: bytes, order: str) -> bool:
    """IMOD marks signed bytes by bit 0 of imodFlags; its files without that bit hold unsigned bytes."""
    stamp, flags = struct.unpack(f"{order}2i", head[152:160])
    return bool(stamp == _IMOD_STAMP and not flags & 1)


def _pixel_size(head: bytes, order: str) -> float | None:
    mx = struct.unpack(f"{order}i", head[28:32])[0]
    cell_x: float = struct.unpack(f"{order}f", head[40:44])[0]
    if mx < 1 or not 0 < cell_x < 1e9:
        return None
    pixel_size = cell_x / mx
    return None if abs(pixel_size - 1.0) < 1e-6 or not 0.05 <= pixel_size <= 500 else pixel_size
