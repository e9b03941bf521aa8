"""The skeleton of a TIFF file: every image directory and every strip, checked against the file's size.

A reader that decodes finds a truncated file late and by accident; this walk reads only directories and
offset tables (about 1 % of the file), so it is cheap enough for each look at a file that is still growing.
Layout: TIFF 6.0 §2 and the BigTIFF extension (8-byte offsets, magic 43).
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from typing import BinaryIO

from stream.records.errors import InputError

MAX_DIRECTORIES = 100_000
"""A longer chain is a damaged file; the longest EER in use has a few thousand frames."""

EER_COMPRESSIONS = frozenset({65000, 65001, 65002})

_TYPE_BYTES = {
    1: 1,
    2: 1,
    3: 2,
    4: 4,
    5: 8,
    6: 1,
    7: 1,
    8: 2,
    9: 4,
    10: 8,
    11: 4,
    12: 8,
    13: 4,
    16: 8,
    17: 8,
    18: 8,
}
_INTEGER_CODES = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q", 18: "Q"}
_TAGS = {
    256: "width",
    257: "height",
    258: "bits",
    259: "compression",
    273: "offsets",
    277: "samples",
    278: "rows_per_strip",
    279: "byte_counts",
    282: "x_resolution",
    296: "resolution_unit",
    322: "tile_width",
    323: "tile_height",
    324: "offsets",
    325: "byte_counts",
    339: "sample_format",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TiffDirectory:
    """One image of a TIFF; `offset` is where its directory starts, `data_end` the end of its last strip."""

    offset: int
    shape_yx: tuple[int, int]
    bits: int
    sample_format: int
    samples: int
    compression: int
    data_end: int
    pixel_size_angstrom: float | None

    @property
    def is_eer(self) -> bool:
        """Whether the strips hold electron events."""
        return self.compression in EER_COMPRESSIONS


@dataclass(frozen=True, slots=True)
class _Flavour:
    order: str
    is_big: bool

    @property
    def offset_bytes(self) -> int:
        return 8 if self.is_big else 4

    @property
    def entry_bytes(self) -> int:
        return 20 if self.is_big else 12

    def unpack(self, code: str, data: bytes) -> int:
        value: int = struct.unpack(self.order + code, data)[0]
        return value


def is_tiff(head: bytes) -> bool:
    """Return whether the first bytes are those of a TIFF or BigTIFF file."""
    return head[:4] in {b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"}


def read_tiff_layout(stream: BinaryIO, item: str) -> list[TiffDirectory]:
    """Return all images of an open TIFF; every directory and strip must lie within the file.

    Raises
    ------
    InputError
        The file is not a TIFF, has no image, or a directory or a strip lies beyond the end of the file.
    """
    size = stream.seek(0, os.SEEK_END)
    flavour, offset = _read_header(stream, item)
    directories: list[TiffDirectory] = []
    seen: set[int] = set()
    while offset:
        if offset in seen or len(directories) >= MAX_DIRECTORIES:
            raise InputError(
                item, "the chain of TIFF directories ends", f"directory {len(directories)} repeats"
            )
        seen.add(offset)
        directory, offset = _read_directory(stream, flavour, offset, size, item, len(directories))
        directories.append(directory)
    if not directories:
        raise InputError(item, "a movie has at least one frame", "0 frames")
    return directories


def _read_header(stream: BinaryIO, item: str) -> tuple[_Flavour, int]:
    stream.seek(0)
    head = stream.read(16)
    if not is_tiff(head):
        raise InputError(item, "a TIFF starts with II*, MM*, II+ or MM+", head[:4].hex(" ") or "0 bytes")
    flavour = _Flavour("<" if head[:2] == b"II" else ">", is_big=b"+" in head[2:4])
    start = 8 if flavour.is_big else 4
    raw = head[start : start + flavour.offset_bytes]
    if len(raw) < flavour.offset_bytes:
        raise InputError(item, "a TIFF header is complete (file truncated)", f"{len(head)} bytes")
    return flavour, flavour.unpack("Q" if flavour.is_big else "I", raw)


def _read_at(stream: BinaryIO, offset: int, n_bytes: int, size: int, item: str, what: str) -> bytes:
    if offset + n_bytes > size:
        value = f"{what} needs byte {offset + n_bytes}, the file has {size}"
        raise InputError(item, "every frame lies within the file (file truncated)", value)
    stream.seek(offset)
    data = stream.read(n_bytes)
    if len(data) < n_bytes:
        raise InputError(item, "every frame lies within the file (file truncated)", f"{what} ends early")
    return data


def _read_directory(
    stream: BinaryIO, flavour: _Flavour, offset: int, size: int, item: str, index: int
) -> tuple[TiffDirectory, int]:
    what = f"the directory of frame {index + 1}"
    count_bytes = 8 if flavour.is_big else 2
    n_entries = flavour.unpack(
        "Q" if flavour.is_big else "H", _read_at(stream, offset, count_bytes, size, item, what)
    )
    if n_entries > 4096:
        raise InputError(item, "a TIFF directory has at most 4096 entries", f"{what}: {n_entries}")
    table_bytes = n_entries * flavour.entry_bytes
    table = _read_at(stream, offset + count_bytes, table_bytes + flavour.offset_bytes, size, item, what)
    values: dict[str, list[int]] = {}
    for entry in range(n_entries):
        raw = table[entry * flavour.entry_bytes : (entry + 1) * flavour.entry_bytes]
        tag = flavour.unpack("H", raw[:2])
        if tag in _TAGS:
            values[_TAGS[tag]] = _read_values(stream, flavour, raw, size, item, what)
    following = flavour.unpack("Q" if flavour.is_big else "I", table[table_bytes:])
    return _describe(values, offset, size, item, index), following


def _read_values(
    stream: BinaryIO, flavour: _Flavour, raw: bytes, size: int, item: str, what: str
) -> list[int]:
    kind = flavour.unpack("H", raw[2:4])
    width = flavour.offset_bytes
    count = flavour.unpack("Q" if flavour.is_big else "I", raw[4 : 4 + width])
    n_bytes = count * _TYPE_BYTES.get(kind, 0)
    inline = raw[4 + width :]
    if n_bytes > len(inline):
        start = flavour.unpack("Q" if flavour.is_big else "I", inline)
        data = _read_at(stream, start, n_bytes, size, item, what)
    else:
        data = inline[:n_bytes]
    if kind == 5:
        return list(struct.unpack(f"{flavour.order}{2 * count}I", data))
    code = _INTEGER_CODES.get(kind)
    return [] if code is None else list(struct.unpack(f"{flavour.order}{count}{code}", data))


def _describe(values: dict[str, list[int]], offset: int, size: int, item: str, index: int) -> TiffDirectory:
    what = f"frame {index + 1}"
    width, height = _first(values, "width", 0), _first(values, "height", 0)
    if width < 1 or height < 1:
        raise InputError(item, "a frame has at least one pixel", f"{what}: {height} x {width}")
    offsets, counts = values.get("offsets", []), values.get("byte_counts", [])
    expected = _expected_strips(values, height, width)
    if len(offsets) != len(counts) or len(offsets) < expected:
        raise InputError(item, "every strip of a frame is listed", f"{what}: {len(offsets)} of {expected}")
    for start, n_bytes in zip(offsets, counts, strict=True):
        if start == 0 or n_bytes == 0:
            raise InputError(
                item, "every strip of a frame is written (frame missing)", f"{what}: empty strip"
            )
        if start + n_bytes > size:
            value = f"{what} needs byte {start + n_bytes}, the file has {size}"
            raise InputError(item, "every frame lies within the file (file truncated)", value)
    return TiffDirectory(
        offset=offset,
        shape_yx=(height, width),
        bits=_first(values, "bits", 1),
        sample_format=_first(values, "sample_format", 1),
        samples=_first(values, "samples", 1),
        compression=_first(values, "compression", 1),
        data_end=max(start + n_bytes for start, n_bytes in zip(offsets, counts, strict=True)),
        pixel_size_angstrom=_pixel_size(values),
    )


def _first(values: dict[str, list[int]], name: str, default: int) -> int:
    found = values.get(name)
    return found[0] if found else default


def _expected_strips(values: dict[str, list[int]], height: int, width: int) -> int:
    if "tile_width" in values and "tile_height" in values:
        tile_y, tile_x = max(1, values["tile_height"][0]), max(1, values["tile_width"][0])
        return -(-height // tile_y) * -(-width // tile_x)
    rows = min(max(1, _first(values, "rows_per_strip", height)), height)
    return -(-height // rows)


def _pixel_size(values: dict[str, list[int]]) -> float | None:
    """Pixel size from a resolution in pixels per centimetre (as SerialEM writes); None where it is not one."""
    resolution = values.get("x_resolution", [])
    if _first(values, "resolution_unit", 2) != 3 or len(resolution) < 2 or 0 in resolution[:2]:
        return None
    pixel_size = 1e8 * resolution[1] / resolution[0]
    # Cameras and image programs leave 72 dpi and the like there, which would be micrometres per pixel.
    return pixel_size if 0.05 <= pixel_size <= 500 else None
