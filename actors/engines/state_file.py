"""An incremental refinement's state as one file: versioned header, float32 sums, a checksum for every array.

Layout: 8 bytes magic, 4 bytes header length (little endian), the header (JSON), then the arrays one after another.
The file is written beside its target, synced and renamed, so that a process killed at any moment leaves the old state
or the new one. Reading verifies every checksum and that the sums belong to the records.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.reconstruction.buckets import SUM_TOLERANCE, Bucket, BucketSums, Inserted
from models.reconstruction.incremental import IncrementalState, ParticleRecords
from models.reconstruction.pose_schedule import RefinementSettings
from stream.records.errors import InputError
from stream.store.files import replacing

MAGIC = b"ICSTATE\n"
VERSION = 2
_MAX_HEADER_BYTES = 64 << 20
_SCALARS = ("pixel_size_angstrom", "tick", "base_n", "base_resolution_angstrom", "n_groups")


def write_state(path: Path, state: IncrementalState) -> None:
    """Write the state; `path` holds the old or the new one at every moment."""
    arrays = _arrays_of(state)
    header = {
        "version": VERSION,
        "box_size_px": state.sums.box_size_px,
        "max_shell": state.sums.grid.max_shell,
        "settings": asdict(state.settings),
        "buckets": [[b.half, b.group, b.cluster] for b in state.sums.sums],
        **{name: getattr(state, name) for name in _SCALARS},
        "arrays": [
            {
                "name": name,
                "dtype": array.dtype.str,
                "shape": list(array.shape),
                "crc32": zlib.crc32(array.tobytes()),
            }
            for name, array in arrays.items()
        ],
    }
    text = json.dumps(header).encode()
    with replacing(path) as temporary, temporary.open("wb") as stream:
        stream.write(MAGIC + struct.pack("<I", len(text)) + text)
        for array in arrays.values():
            stream.write(array.tobytes())


def read_state(path: Path) -> IncrementalState:
    """Read and verify a state; raise `InputError` for a file that is damaged, foreign or of another version."""
    try:
        with path.open("rb") as stream:
            header = _read_header(path, stream)
            arrays = {entry["name"]: _read_array(path, stream, entry) for entry in header["arrays"]}
            if stream.read(1):
                raise InputError(path, "a state file ends with its last array", "more bytes")
    except OSError as error:
        raise InputError(path, "a state file can be read", error) from error
    state = _state_of(header, arrays)
    gap = state.sums.check_sums(state.records.ctf_power, state.records.inserted)
    if gap > SUM_TOLERANCE:
        raise InputError(path, f"sums and records agree within {SUM_TOLERANCE}", f"{gap:.2e}")
    return state


def _arrays_of(state: IncrementalState) -> dict[str, NDArray[Any]]:
    records, inserted = state.records, state.records.inserted
    tensors: dict[str, Tensor] = {
        "symmetry": state.sums.symmetry.float(),
        "uids": records.uids,
        "gains": records.gains,
        "ctf_power": records.ctf_power,
        "aligned_at": records.aligned_at,
        "half": inserted.half,
        "group": inserted.group,
        "cluster": inserted.cluster,
        "rotations": inserted.rotations,
        "shifts_xy_px": inserted.shifts_xy_px,
        "weights": inserted.weights,
        "scales": inserted.scales,
        **{f"noise{h}": noise for h, noise in state.noise.items()},
        **{f"bucket{i}": sums for i, sums in enumerate(state.sums.sums.values())},
    }
    return {name: np.ascontiguousarray(tensor.numpy()) for name, tensor in tensors.items()}


def _read_header(path: Path, stream: BinaryIO) -> dict[str, Any]:
    start = stream.read(len(MAGIC) + 4)
    if start[: len(MAGIC)] != MAGIC or len(start) < len(MAGIC) + 4:
        raise InputError(path, "a state file begins with its magic", start[: len(MAGIC)])
    (length,) = struct.unpack("<I", start[len(MAGIC) :])
    if length > _MAX_HEADER_BYTES:
        raise InputError(path, f"a header has at most {_MAX_HEADER_BYTES} bytes", length)
    try:
        header: dict[str, Any] = json.loads(stream.read(length))
    except ValueError as error:
        raise InputError(path, "a state file has a JSON header", error) from error
    if header.get("version") != VERSION:
        raise InputError(path, f"this version reads state files of version {VERSION}", header.get("version"))
    return header


def _read_array(path: Path, stream: BinaryIO, entry: Mapping[str, Any]) -> Tensor:
    dtype, shape = np.dtype(entry["dtype"]), tuple(entry["shape"])
    n_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    data = stream.read(n_bytes)
    if len(data) != n_bytes:
        raise InputError(path, f"array {entry['name']} has {n_bytes} bytes", len(data))
    if zlib.crc32(data) != entry["crc32"]:
        raise InputError(path, f"array {entry['name']} has the checksum it was written with", "another")
    return torch.from_numpy(np.frombuffer(data, dtype=dtype).reshape(shape).copy())


def _state_of(header: Mapping[str, Any], arrays: Mapping[str, Tensor]) -> IncrementalState:
    sums = BucketSums(float(header["max_shell"]), int(header["box_size_px"]), arrays["symmetry"])
    for i, address in enumerate(header["buckets"]):
        sums.sums[Bucket(*address)] = arrays[f"bucket{i}"]
    inserted = Inserted(
        arrays["half"], arrays["group"], arrays["cluster"], arrays["rotations"], arrays["shifts_xy_px"],
        arrays["weights"], arrays["scales"],
    )  # fmt: skip
    records = ParticleRecords(
        uids=arrays["uids"],
        inserted=inserted,
        gains=arrays["gains"],
        ctf_power=arrays["ctf_power"],
        aligned_at=arrays["aligned_at"],
    )
    return IncrementalState(
        sums=sums,
        records=records,
        noise={h: arrays[f"noise{h}"] for h in (1, 2)},
        settings=RefinementSettings(**header["settings"]),
        **{name: header[name] for name in _SCALARS},
    )
