"""CryoGEM's YAML files as values: unknown keys and wrong types are refused with the key, the value and the rule.

A relative path means a path below the folder that holds the YAML file.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import TypeAdapter, ValidationError

from models.cryogem.baselines import NoiseModel
from models.cryogem.networks import NetworkSettings
from models.cryogem.physics import PhysicsSettings
from models.cryogem.settings import CryogemSettings, TrainingSettings
from stream.records.errors import ConfigurationError
from stream.store.yaml_files import read_mapping

T = TypeVar("T")
NoiseName = Literal["cryogem", "none"] | NoiseModel


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceConfig:
    """Where a training takes its physics from. Only `session` (the OUT of `icestream run`) has to be given.

    Maps: one, or several conformations; by default the newest `runs/ID/map.mrc`, inside its `mask.mrc`. The symmetry is
    the run's. Micrographs: the newest `n_micrographs` with a reliable CTF (and rings to `max_ctf_fit_angstrom`, if given) and
    picks, Fourier-cropped to `short_side_px`. `collapse_ratio` None takes the spacing from the picks.
    """

    session: Path
    maps: tuple[Path, ...] = ()
    symmetry: str | None = None
    diameter_angstrom: float | None = None
    n_micrographs: int = 100
    held_out_fraction: float = 0.2
    short_side_px: int = 1024
    max_ctf_fit_angstrom: float | None = None
    collapse_ratio: float | None = None

    def __post_init__(self) -> None:
        if self.n_micrographs < 2:
            raise ValueError(f"n_micrographs: {self.n_micrographs}, must be 2 or more (one is held out)")
        if not 0.0 < self.held_out_fraction < 1.0:
            raise ValueError(f"held_out_fraction: {self.held_out_fraction}, must lie in (0, 1)")
        if self.short_side_px < 64:
            raise ValueError(f"short_side_px: {self.short_side_px}, must be 64 or more")
        if self.collapse_ratio is not None and not 0.0 <= self.collapse_ratio < 1.0:
            raise ValueError(f"collapse_ratio: {self.collapse_ratio}, must lie in [0, 1)")

    def describe(self) -> str:
        """Return what was asked for as one line of JSON, without the folder where it was looked for."""
        values = {name: value for name, value in asdict(self).items() if name != "session"}
        return json.dumps(values, default=str, sort_keys=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """A training's YAML file; `cpus` are the threads of each of its `workers`, which have a GPU each with `device: cuda`."""

    source: SourceConfig
    workers: int = 1
    cpus: int = 1
    physics: PhysicsSettings = field(default_factory=PhysicsSettings)
    networks: NetworkSettings = field(default_factory=NetworkSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)

    def __post_init__(self) -> None:
        for name in ("workers", "cpus"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)}, must be 1 or more")
        if self.training.n_simulated % self.workers:
            given = f"{self.training.n_simulated}, {self.workers}"
            raise ValueError(f"training.n_simulated, workers: {given}, the first is a multiple of the second")

    @property
    def settings(self) -> CryogemSettings:
        """What the training depends on besides the session."""
        return CryogemSettings(physics=self.physics, networks=self.networks, training=self.training)


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlConfig:
    """What is fixed in generated micrographs; whatever is left out is drawn.

    `positions` is a STAR file of picks, in pixels of the generated micrographs. `poses` are Euler angles (rot, tilt, psi) in
    degrees that particles take in turn. `defocus_angstrom` is one value, or several that micrographs take in turn.
    `ice`: "drawn", "even", or the number of one of the bank's maps.
    """

    positions: Path | None = None
    poses: tuple[tuple[float, float, float], ...] = ()
    conformation: int | None = None
    defocus_angstrom: tuple[float, ...] = ()
    ice: Literal["drawn", "even"] | int = "drawn"


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateConfig:
    """The YAML file of `icestream generate`: what a training left, and what is wanted.

    `noise` "cryogem" translates with the trained generator; the others add fitted noise by formula, "none" adds none.
    `box_size_px` None takes one and a half of the particle's diameter. `scale` of the micrographs is the session's.
    """

    training: Path
    out: Path
    n_micrographs: int = 10
    seed: int = 0
    workers: int = 1
    noise: NoiseName = "cryogem"
    box_size_px: int | None = None
    device: str = "cpu"
    controls: ControlConfig = field(default_factory=ControlConfig)

    def __post_init__(self) -> None:
        for name in ("n_micrographs", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)}, must be 1 or more")
        if self.seed < 0:
            raise ValueError(f"seed: {self.seed}, must be 0 or more")
        if self.box_size_px is not None and (self.box_size_px < 8 or self.box_size_px % 2):
            raise ValueError(f"box_size_px: {self.box_size_px}, must be even and at least 8")


def read_train_config(path: Path) -> TrainConfig:
    """Read a training's YAML file."""
    return _read(path, TrainConfig)


def read_generate_config(path: Path) -> GenerateConfig:
    """Read a generation's YAML file."""
    return _read(path, GenerateConfig)


def _read(path: Path, kind: type[T]) -> T:
    document = read_mapping(path)
    _check_keys(path, document, kind, "")
    try:
        value = TypeAdapter(kind).validate_python(document)
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise ConfigurationError(path, "; ".join(faults)) from error
    return _anchored(value, path.absolute().parent)


def _check_keys(path: Path, document: Mapping[str, Any], kind: type[Any], where: str) -> None:
    known = {item.name: item for item in fields(kind)}
    for key, value in document.items():
        if key not in known:
            close = difflib.get_close_matches(str(key), list(known), n=1)
            hint = f", did you mean {where}{close[0]}?" if close else f"; known are {', '.join(known)}"
            raise ConfigurationError(path, f"unknown key {where}{key}{hint}")
        section = _SECTIONS.get(key)
        if section is not None and isinstance(value, Mapping):
            _check_keys(path, value, section, f"{where}{key}.")
    required = [n for n, f in known.items() if f.default is MISSING and f.default_factory is MISSING]
    for name in required:
        if name not in document:
            raise ConfigurationError(path, f"{where}{name} is missing")


_SECTIONS: dict[str, type[Any]] = {
    "source": SourceConfig,
    "physics": PhysicsSettings,
    "networks": NetworkSettings,
    "training": TrainingSettings,
    "controls": ControlConfig,
}


def _anchored(value: T, folder: Path) -> T:
    """Return a configuration with relative paths made absolute."""
    changes: dict[str, Any] = {}
    for item in fields(value):  # type: ignore[arg-type]
        found = getattr(value, item.name)
        if isinstance(found, Path):
            changes[item.name] = (folder / found.expanduser()).absolute()
        elif isinstance(found, tuple) and found and isinstance(found[0], Path):
            changes[item.name] = tuple((folder / p.expanduser()).absolute() for p in found)
        elif isinstance(found, (SourceConfig, ControlConfig)):
            changes[item.name] = _anchored(found, folder)
    return replace(value, **changes)  # type: ignore[type-var]
