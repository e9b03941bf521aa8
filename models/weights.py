"""The one door to checkpoint files: safetensors, or torch files read with `weights_only`.

Nothing here unpickles arbitrary objects: a torch file that holds anything but tensors and plain containers is
refused. What was loaded is known by the SHA-256 of the file's bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_CHUNK_BYTES = 1 << 20
_STATE_KEYS = ("state_dict", "model", "model_state_dict")
_METADATA_KEY = "icestream"


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checkpoint's tensors, the hash of its file, and what icestream wrote beside them (if it did)."""

    path: Path
    sha256: str
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, Any] = field(default_factory=dict)


def sha256_of_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def load_checkpoint(path: Path, *, expected_sha256: str | None = None) -> Checkpoint:
    """Read a `.safetensors`, `.pt`, `.pth` or `.bin` file into tensors on the CPU.

    Raises `ValueError` where the file is missing, has another hash than expected, is truncated, or would need
    unpickling of objects.
    """
    if not path.is_file():
        msg = f"{path}: no such file, a checkpoint is a .safetensors or torch file"
        raise ValueError(msg)
    sha256 = sha256_of_file(path)
    if expected_sha256 is not None and sha256 != expected_sha256.lower():
        msg = f"{path}: SHA-256 {sha256}, expected {expected_sha256.lower()}"
        raise ValueError(msg)
    read = _read_safetensors if path.suffix == ".safetensors" else _read_torch
    tensors, metadata = read(path)
    if not tensors:
        msg = f"{path}: no tensors, a checkpoint has a state dictionary"
        raise ValueError(msg)
    return Checkpoint(path=path, sha256=sha256, tensors=tensors, metadata=metadata)


def save_checkpoint(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> str:
    """Write a safetensors file atomically with JSON metadata and return its SHA-256."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    plain = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as stream:
        temporary = Path(stream.name)
    try:
        save_file(plain, temporary, metadata={_METADATA_KEY: json.dumps(metadata, sort_keys=True)})
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return sha256_of_file(path)


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as stream:
            names = list(stream.keys())
            tensors = {name: stream.get_tensor(name) for name in names}
            written = (stream.metadata() or {}).get(_METADATA_KEY, "{}")
    except (SafetensorError, OSError) as error:
        msg = f"{path}: not a whole safetensors file ({error})"
        raise ValueError(msg) from error
    try:
        metadata = json.loads(written)
    except json.JSONDecodeError as error:
        msg = f"{path}: metadata is not JSON ({error})"
        raise ValueError(msg) from error
    return tensors, metadata if isinstance(metadata, dict) else {}


def _read_torch(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        msg = f"{path}: holds objects besides tensors and is not unpickled; convert it to safetensors"
        raise ValueError(msg) from error
    except (RuntimeError, EOFError, OSError, zipfile.BadZipFile, KeyError, ValueError) as error:
        msg = f"{path}: not a whole torch file ({error})"
        raise ValueError(msg) from error
    if not isinstance(loaded, Mapping):
        msg = f"{path}: holds a {type(loaded).__name__}, a checkpoint is a dictionary of tensors"
        raise ValueError(msg)  # noqa: TRY004 - the file's content is a value here
    state = next((loaded[key] for key in _STATE_KEYS if isinstance(loaded.get(key), Mapping)), loaded)
    tensors = {str(key): value for key, value in state.items() if isinstance(value, Tensor)}
    written = loaded.get(_METADATA_KEY)
    return tensors, dict(written) if isinstance(written, Mapping) else {}
