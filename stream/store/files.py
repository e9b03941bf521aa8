"""Durable files: written under a temporary name beside the target, synced, then renamed.

A stage that is killed half-way leaves a `.tmp-` file and no half-written result; a stage that runs twice
leaves one result. The next service on the folder removes what killed stages left (`remove_leftovers`).
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

TEMPORARY_PREFIX = ".tmp-"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path that replaces `path` when the block ends well, and is removed otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{uuid.uuid4().hex[:8]}-{path.name}")
    try:
        yield temporary
        descriptor = os.open(temporary, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(folders: Iterable[Path]) -> int:
    """Remove the temporary files right below `folders` that killed writers left; return how many.

    Only for folders that nobody writes into now. Folders under a temporary name stay: a run goes on from them.
    """
    n_removed = 0
    for folder in folders:
        if not folder.is_dir():
            continue
        with os.scandir(folder) as entries:
            left = [e.path for e in entries if e.name.startswith(TEMPORARY_PREFIX) and e.is_file()]
        for path in left:
            Path(path).unlink(missing_ok=True)
        n_removed += len(left)
    return n_removed
