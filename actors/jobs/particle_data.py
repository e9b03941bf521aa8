"""Pre-training data: particle sets that somebody extracted, or simulated picks, as grey levels in a cache folder.

Every image is addressed by (absolute path of its stack, index in it), so subsets, several jobs and stacks of equal names stay
apart. A set is preprocessed once, into a `.npy` file that is mapped, not loaded: memory does not grow with the data. A
half-written file is never taken for a whole one.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from models.cryo_ief.config import VitConfig
from models.cryo_ief.image_sets import ImageSet, image_set_of
from models.cryo_ief.preprocess import to_grey_levels
from models.cryoranker.dataset import SimulatedSet, phantom_names, simulate_set_cached
from stream.ingest.particle_sets import read_particle_table
from stream.ingest.particle_table import ParticleTable, iterate_images
from stream.records.errors import InputError
from stream.store.files import replacing

log = logging.getLogger(__name__)

_ROWS_AT_ONCE = 256
_CACHE_VERSION = 1
"""Part of the cache's key: raise it when preprocessing changes what it writes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedPicks:
    """Boxes cut from simulated fields of phantoms: particles, junk and noise, as a picker would give them."""

    n_phantoms: int = 24
    first_seed: int = 2000
    fields_per_structure: int = 40
    seed: int = 1
    n_shapes: int = 1
    snr: float | None = None
    """None draws 0.01 to 0.25 for each field."""
    n_processes: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetSettings:
    """One data set: either a particle file (.star, .star.gz, .cs, .mrcs) or simulated picks."""

    particles: str | None = None
    root: str | None = None
    """Folder to which the stacks' paths in the particle file are relative."""
    simulated: SimulatedPicks | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        if (self.particles is None) == (self.simulated is None):
            msg = "datasets: each one has either particles (a file) or simulated"
            raise ValueError(msg)


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSettings:
    """The data of a pre-training and where their grey levels are kept."""

    datasets: tuple[DatasetSettings, ...] = ()
    cache: str = "~/.cache/icestream/cryo-ief"
    outlier_sigmas: float | None = None
    """Replace NaN, hot and dead pixels before the stretch to grey levels; None is upstream's way."""


def build_image_sets(data: DataSettings, model: VitConfig) -> list[ImageSet]:
    """Return every data set as grey levels of the model's input size, made now or found in the cache."""
    cache = Path(data.cache).expanduser()
    return [
        _simulated(each, model, cache, number)
        if each.simulated is not None
        else _extracted(each, model, cache, data.outlier_sigmas)
        for number, each in enumerate(data.datasets)
    ]


def read_grey_levels(
    table: ParticleTable, rows: NDArray[np.int64], model: VitConfig, outlier_sigmas: float | None = None
) -> NDArray[np.uint8]:
    """Return the grey levels `(b, s, s)` of these rows of a particle table, dark particles inverted."""
    images = np.stack([np.asarray(image, np.float32) for image in iterate_images(table, rows)])
    if table.contrast_sign is not None:
        images *= table.contrast_sign[rows, None, None]
    return to_grey_levels(
        images, model.input_size_px, model.resize_mode, is_exact=False, outlier_sigmas=outlier_sigmas
    )


def _simulated(settings: DatasetSettings, model: VitConfig, cache: Path, number: int) -> ImageSet:
    picks = settings.simulated or SimulatedPicks()
    spec = SimulatedSet(
        structures=phantom_names(range(picks.first_seed, picks.first_seed + picks.n_phantoms)),
        seed=picks.seed,
        fields_per_structure=picks.fields_per_structure,
        input_size_px=model.input_size_px,
        resize_mode=model.resize_mode,
        n_shapes=picks.n_shapes,
        snr=picks.snr,
    )
    particles = simulate_set_cached(
        spec,
        cache,
        n_processes=picks.n_processes,
        on_progress=lambda done, total: log.info("simulated %d of %d structures", done, total),
    )
    return image_set_of(settings.name or f"simulated-{number}", particles.grey)


def _extracted(
    settings: DatasetSettings, model: VitConfig, cache: Path, outlier_sigmas: float | None
) -> ImageSet:
    path = Path(str(settings.particles)).expanduser()
    root = Path(settings.root).expanduser() if settings.root is not None else None
    table = read_particle_table(path, root=root, require_ctf=False)
    if len(table) < 2:
        raise InputError(path, "a data set has at least two particles", len(table))
    grey_path = cache / f"grey-{_key(table, model, outlier_sigmas)}.npy"
    if not grey_path.exists():
        _write_grey_levels(grey_path, table, model, outlier_sigmas)
    grey = np.load(grey_path, mmap_mode="r", allow_pickle=False)
    return image_set_of(settings.name or path.stem, grey)


def _key(table: ParticleTable, model: VitConfig, outlier_sigmas: float | None) -> str:
    """Return a name for the grey levels: of which bytes on disk they are made, and how."""
    stacks = {}
    for stack in sorted(set(table.stack_paths.tolist())):
        status = Path(stack).stat()
        stacks[str(stack)] = (status.st_size, status.st_mtime_ns)
    digest = hashlib.sha256()
    how = [_CACHE_VERSION, model.input_size_px, model.resize_mode, outlier_sigmas, stacks]
    digest.update(json.dumps(how, sort_keys=True).encode())
    digest.update("\n".join(table.stack_paths.tolist()).encode())
    digest.update(np.ascontiguousarray(table.stack_indices, np.int64).tobytes())
    if table.contrast_sign is not None:
        digest.update(np.ascontiguousarray(table.contrast_sign, np.int8).tobytes())
    return digest.hexdigest()[:20]


def _write_grey_levels(
    path: Path, table: ParticleTable, model: VitConfig, outlier_sigmas: float | None
) -> None:
    shape = (len(table), model.input_size_px, model.input_size_px)
    with replacing(path) as temporary:
        out = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=shape)
        # Stack by stack, so that each file is opened once, whatever the order of the rows.
        order = np.lexsort((table.stack_indices, table.stack_paths.astype(str)))
        for first in range(0, len(table), _ROWS_AT_ONCE):
            rows = order[first : first + _ROWS_AT_ONCE]
            out[rows] = read_grey_levels(table, rows, model, outlier_sigmas)
        out.flush()
