"""What the sums of a run foretell of unions of its feature clusters: `unions.json` in the run folder.

No particle is aligned again. Poses come from the map of all, and the best of many unions is a selection: refine the
winner by itself before believing it (`models.reconstruction.unions`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from actors.engines.base import STATE_NAME
from actors.engines.state_file import read_state
from models.fourier.volumes import resample_volume
from models.reconstruction.incremental import IncrementalState
from models.reconstruction.unions import UnionQuality, best_union, leave_one_out
from models.reconstruction.volume_io import read_volume
from stream.records.errors import InputError
from stream.store.files import replacing

UNIONS_NAME = "unions.json"

_SEED = 11


def best_union_of(folder: Path) -> dict[str, Any]:
    """Return what unions.json of a run folder says, measuring it from the folder's sums where it is not there."""
    path = folder / UNIONS_NAME
    if path.is_file():
        document: dict[str, Any] = json.loads(path.read_text())
        return document
    state = read_state(folder / STATE_NAME)
    mask, pixel_size = read_volume(folder / "mask.mrc")
    mask = resample_volume(mask, pixel_size, state.pixel_size_angstrom, state.sums.box_size_px)
    summary = json.loads((folder / "summary.json").read_text())
    found = write_unions(state, mask, path, clustering=summary["provenance"].get("clustering"))
    if found is None:
        raise InputError(folder, "a run with unions had its particles in clusters", "one cluster")
    return found


def write_unions(
    state: IncrementalState,
    mask: Tensor,
    path: Path,
    *,
    clustering: str | None,
    cfar_null: float | None = None,
) -> dict[str, Any] | None:
    """Measure every union, or the most promising ones, and write them; None where there is but one cluster.

    `best` is the union of the largest cFAR, `without` tells what the map of all loses with each cluster.
    """
    clusters = tuple(sorted(set(state.records.inserted.cluster.tolist())))
    if len(clusters) < 2:
        return None
    best, measured = best_union(state, mask, generator=torch.Generator().manual_seed(_SEED))
    everything, *without = leave_one_out(
        state, clusters, mask, generator=torch.Generator().manual_seed(_SEED)
    )
    document = {
        "clustering": clustering,
        "best": _row(best) | {"clustering": clustering or "clusters", "cfar_null": cfar_null},
        "all": _row(everything),
        "without": [_row(union) | {"left_out": out} for out, union in zip(clusters, without, strict=True)],
        "measured": [_row(union) for union in sorted(measured, key=lambda u: -u.cfar)],
    }
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(document, indent=2) + "\n")
    return document


def _row(union: UnionQuality) -> dict[str, Any]:
    return {
        "clusters": list(union.clusters),
        "n_particles": union.n_particles,
        "resolution_angstrom": union.resolution_angstrom,
        "cfar": union.cfar,
        "scf_star": union.scf_star,
    }
