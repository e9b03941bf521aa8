"""What a killed run leaves behind so that the same run, started again, goes on where it was.

A checkpoint belongs to its inputs: it carries a digest of the particle table, the start map and the settings, and is
ignored where that differs. It is written after every iteration, whole or not at all, and removed with success.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actors.engines.base import EngineSettings
from models.reconstruction.refinement import Refinement
from stream.store.files import replacing

CHECKPOINT_NAME = "refine.checkpoint.npz"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The file of one run, with the digest of what the run works on."""

    path: Path
    digest: str

    def save(self, refinement: Refinement) -> None:
        """Keep every pose and where in the schedule it was reached."""
        arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in refinement.progress().items()}
        with replacing(self.path) as temporary, temporary.open("wb") as stream:
            np.savez(stream, digest=np.array(self.digest), **arrays)

    def restore(self, refinement: Refinement) -> bool:
        """Put a refinement where the checkpoint left it; False where there is none that belongs to these inputs."""
        try:
            with np.load(self.path, allow_pickle=False) as stored:
                if str(stored["digest"]) != self.digest:
                    return False
                progress = {name: torch.from_numpy(stored[name]) for name in stored.files if name != "digest"}
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):
            return False
        refinement.resume(progress)
        return True


def digest_of(settings: EngineSettings, *files: Path | None, more: Mapping[str, Any] | None = None) -> str:
    """Return a digest of files' contents and settings; the number of threads does not matter to a result."""
    document = {k: v for k, v in asdict(settings).items() if k != "n_threads"} | dict(more or {})
    total = hashlib.sha256(json.dumps(document, sort_keys=True, default=str).encode())
    for file in files:
        content = b"" if file is None else file.read_bytes()
        total.update(len(content).to_bytes(8, "little"))
        total.update(content)
    return total.hexdigest()
