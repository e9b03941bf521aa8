"""Settings of a session: the only place where text becomes values.

Unknown keys and values outside their physical range are refused with the key, the value and the rule. Keys
carry their units, so a number in another unit is caught by its range.
"""

from __future__ import annotations

import difflib
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from models.cryoranker.providers import ProviderChoice
from stream.control.advice import AdviceSettings
from stream.control.settings import ControllerSettings, RunPolicy
from stream.control.training import TrainingPolicy
from stream.records.errors import ConfigurationError
from stream.records.values import ClusterSource, Optics, QualityLimits, SweepPolicy
from stream.store.yaml_files import read_mapping

Voltage = Annotated[float, Field(ge=60, le=400, description="kV; 300000 is in volts")]
Length = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1, description="a fraction, not per cent")]
# Underfocus is positive; a value in µm would lie under the bound.
Defocus = Annotated[float | None, Field(ge=100, le=200_000, description="Å, not µm")]

Symmetry = Annotated[
    str, Field(pattern=r"^(C[1-9]\d?|D[2-9]\d?|T|O|I)$", description="a point group: Cn, Dn, T, O or I")
]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class MicroscopeSettings(_Section):
    """The microscope's constants."""

    voltage_kv: Voltage
    cs_mm: Annotated[float, Field(ge=0, le=10, description="mm")]
    amplitude_contrast: Annotated[float, Field(ge=0, le=0.5, description="a fraction, not per cent")] = 0.1


class AcquisitionSettings(_Section):
    """How the movies were taken; the pixel size is the movie's."""

    pixel_size_angstrom: Annotated[float, Field(gt=0.1, lt=20, description="Å, not nm")]
    dose_e_per_angstrom2: Annotated[float, Field(gt=0, le=500, description="total, e/Å²")] | None = None
    pre_exposure_e_per_angstrom2: Annotated[float, Field(ge=0, le=500)] = 0.0
    gain: Path | None = None
    gain_flip_x: bool = False
    gain_flip_y: bool = False
    gain_rotate_deg: Literal[0, 90, 180, 270] = 0
    gain_convention: Literal["auto", "multiply", "divide"] = "auto"
    gain_orientation: Literal["given", "auto"] = "given"
    max_gain_residual: Annotated[float, Field(gt=0, le=10, description="a share")] = 0.2
    gain_residual_movies: Annotated[int, Field(ge=1, le=1000)] = 20
    binning: Annotated[float, Field(ge=1, le=8, description="Fourier cropping of the movie")] = 1.0
    has_local_motion: bool = True
    keeps_unweighted: bool = False
    eer_fractions: Annotated[int, Field(ge=1, le=500)] = 40
    eer_dose_per_fraction_e_per_angstrom2: (
        Annotated[float, Field(gt=0, le=100, description="e/Å²; in place of eer_fractions")] | None
    ) = None
    eer_upsampling: Literal[1, 2] = 1

    @model_validator(mode="after")
    def _orientation_is_said_once(self) -> AcquisitionSettings:
        if self.gain_orientation == "given":
            return self
        if self.gain is None:
            msg = "gain_orientation auto needs a gain"
            raise ValueError(msg)
        if self.gain_flip_x or self.gain_flip_y or self.gain_rotate_deg:
            msg = "gain_orientation auto finds flips and rotation itself: leave them out, or say given"
            raise ValueError(msg)
        return self


class IngestSettings(_Section):
    """How files are noticed."""

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    recursive: bool = True
    observer: Literal["auto", "inotify", "polling"] = "auto"
    settle_s: Annotated[float, Field(ge=0, le=3600)] = 5.0
    give_up_s: Annotated[float, Field(ge=0, le=86400)] = 60.0
    poll_interval_s: Annotated[float, Field(gt=0, le=3600)] = 5.0


class ParticleSettings(_Section):
    """What is looked for, and how it is cut out; a box of None is derived from the diameter."""

    diameter_angstrom: Annotated[float, Field(gt=20, lt=2000, description="Å")] = 150.0
    extract_pixel_size_angstrom: Annotated[float, Field(gt=0.1, lt=20)] | None = None
    box_size_px: Annotated[int, Field(ge=16, le=2048)] | None = None
    pick_threshold_sd: Annotated[float, Field(gt=0)] | None = None
    max_picks: Annotated[int, Field(ge=1)] | None = None
    picker: Literal["blob", "template-after-map", "topaz"] = "blob"
    template_min_resolution_angstrom: Length = 20.0
    topaz_executable: Path | None = None
    topaz_model: Path | None = None


class CtfSettings(_Section):
    """What the CTF fit searches; a phase shift is fitted for phase plates, ice thickness where a limit is given."""

    min_defocus_angstrom: Annotated[float, Field(ge=0, lt=200_000, description="Å, underfocus positive")] = (
        2000.0
    )
    max_defocus_angstrom: Annotated[float, Field(gt=0, lt=200_000, description="Å, underfocus positive")] = (
        50000.0
    )
    finest_resolution_angstrom: Annotated[float, Field(gt=1, lt=20, description="Å")] = 4.0
    has_phase_shift: bool = False
    max_thickness_angstrom: Annotated[float, Field(gt=0, lt=10_000, description="Å")] | None = None

    @model_validator(mode="after")
    def _range_is_not_empty(self) -> CtfSettings:
        if self.min_defocus_angstrom >= self.max_defocus_angstrom:
            msg = "min_defocus_angstrom is below max_defocus_angstrom"
            raise ValueError(msg)
        return self


class QualitySettings(_Section):
    """What an exposure must keep to be used; a limit of None is not applied.

    They are where a session begins. `icestream quality` changes them while it runs; giving others here and
    starting again changes them, too.
    """

    max_ctf_fit_angstrom: Length | None = None
    max_astigmatism_angstrom: Length | None = None
    min_defocus_angstrom: Defocus = None
    max_defocus_angstrom: Defocus = None
    max_total_motion_angstrom: Length | None = None
    max_early_motion_angstrom: Length | None = None
    max_ice_ratio: Length | None = None
    max_crystalline_ice: float | None = None
    max_masked_fraction: Annotated[
        float | None, Field(ge=0, le=1, description="a fraction, not per cent")
    ] = None
    min_picks: Annotated[int, Field(ge=0)] | None = None
    max_picks: Annotated[int, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _ranges_are_not_empty(self) -> QualitySettings:
        for lower, upper in (("min_defocus_angstrom", "max_defocus_angstrom"), ("min_picks", "max_picks")):
            low, high = getattr(self, lower), getattr(self, upper)
            if low is not None and high is not None and low > high:
                msg = f"{lower} is at most {upper}"
                raise ValueError(msg)
        return self

    @property
    def limits(self) -> QualityLimits:
        """The limits as a record."""
        return QualityLimits(**self.model_dump())


class RankerSettings(_Section):
    """Which ONNX CryoRanker scores, and how; None is the shipped default model.

    With `model_sha256` a file with another hash stops the session before it begins. `provider` is what runs it: auto takes
    TensorRT, CUDA, OpenVINO or the CPU, the first that works.
    `outlier_sigmas` turns the guard against NaN, hot and dead pixels on; the released models were trained without.
    """

    model: Path | None = None
    model_sha256: Annotated[str, Field(pattern=r"^[0-9a-fA-F]{64}$")] | None = None
    provider: ProviderChoice = "auto"
    outlier_sigmas: Annotated[float, Field(gt=0)] | None = None
    batch_size: Annotated[int, Field(ge=1, le=8192)] = 64
    max_wait_s: Annotated[float, Field(ge=0, le=600)] = 2.0
    score_threshold: Annotated[float, Field(ge=0, le=1)] = 0.4


Rungs = Annotated[tuple[Annotated[int, Field(ge=50)], ...], Field(min_length=1)]


class PolicySettings(_Section):
    """When campaigns of runs start, what they are, and which map is accepted (CryoWizard's policy, incremental)."""

    enabled: bool = True
    rungs: Rungs = (2_000, 5_000, 10_000, 20_000, 50_000, 100_000)
    growth_factor: Annotated[float, Field(gt=1)] = 1.5
    full_rungs: tuple[Annotated[int, Field(ge=50)], ...] = (10_000, 50_000)
    full_min_particles: Annotated[int, Field(ge=50)] = 5_000
    final_min_particles: Annotated[int, Field(ge=50)] = 200
    rebuild_factor: Annotated[float, Field(gt=1)] = 4.0
    rerun_loss_fraction: Fraction = 0.1
    supersede_growth: Annotated[float, Field(gt=1)] = 2.0
    search_sizes: Annotated[tuple[Annotated[int, Field(ge=50)], ...], Field(min_length=1, max_length=4)] = (
        50_000,
        100_000,
    )
    cfar_bound: Fraction = 0.15
    cfar_null_ratio: Fraction = 0.25
    cfar_null_min: Fraction = 0.1
    search: Literal["paper", "bounds"] = "paper"
    n_parts: Annotated[int, Field(ge=1, le=64)] = 4
    n_parts_light: Annotated[int, Field(ge=1, le=64)] = 2
    part_min_particles: Annotated[int, Field(ge=50)] = 1_000
    bound_scores: tuple[Fraction, Fraction] = (0.8, 0.1)
    turns: Annotated[tuple[Annotated[int, Field(ge=1, le=64)], ...], Field(min_length=1, max_length=8)] = (
        8,
        4,
        4,
    )
    orientation_branch: bool = True
    n_clusters: Annotated[int, Field(ge=2, le=64)] = 8
    cluster_by: Literal["features", "classes"] = "features"
    cluster_min_particles: Annotated[int, Field(ge=50)] = 500
    union_cfar_ratio: Fraction = 0.5

    @model_validator(mode="after")
    def _numbers_agree(self) -> PolicySettings:
        upper, lower = self.bound_scores
        faults = (
            (list(self.rungs) != sorted(set(self.rungs)), "rungs ascend"),
            (
                self.final_min_particles > self.rungs[0],
                "final_min_particles is at most the first of the rungs",
            ),
            (
                any(rung < self.full_min_particles for rung in self.full_rungs),
                "full_rungs are at least full_min_particles",
            ),
            (len(set(self.search_sizes)) < len(self.search_sizes), "search_sizes differ"),
            (upper <= lower, "bound_scores are the upper one first: it selects fewer particles"),
            (
                self.full_min_particles < 2 * self.cluster_min_particles,
                "full_min_particles is at least twice cluster_min_particles, or nothing can be divided",
            ),
        )
        for is_broken, rule in faults:
            if is_broken:
                raise ValueError(rule)
        return self

    def run_policy(self, engine: EngineChoice) -> RunPolicy:
        """Return the policy as the controller's record."""
        numbers = self.model_dump(exclude={"search", "cluster_by"})
        return RunPolicy(
            **numbers,
            cluster_by=ClusterSource(self.cluster_by),
            sweep=SweepPolicy(self.search),
            max_parallel_runs=engine.max_parallel_runs,
            symmetry=engine.symmetry,
            mask_diameter_angstrom=engine.mask_diameter_angstrom,
        )


class AdviceChoice(_Section):
    """Numbers that advice goes by."""

    low_cfar: Fraction = 0.5
    low_cfar_ratio: Fraction = 0.5
    even_cfar_ratio: Annotated[float, Field(ge=0, le=2)] = 0.8
    max_cfar_drift: Fraction = 0.05
    min_gain_angstrom: Annotated[float, Field(ge=0)] = 0.1
    min_gain_fraction: Fraction = 0.03
    nyquist_margin: Annotated[float, Field(ge=1)] = 1.05
    min_score_fall: Fraction = 0.2
    min_particles_per_exposure: Annotated[float, Field(ge=0)] = 10.0
    planned_exposures: Annotated[int, Field(ge=1)] | None = None


class CryogemChoice(_Section):
    """CryoGEM trained on the session beside its live stages, once a person says so; without `cpus` it is not offered.

    `cpus` cores are those that `runtime.preprocess_workers` leaves; `gpu` is the number of a GPU of its own. `config` is a
    training's YAML file for its sizes, those of the paper by default; its `source.session` is this session whatever it says.
    """

    min_micrographs: Annotated[int, Field(ge=2)] = 100
    cpus: Annotated[int, Field(ge=0, le=256)] = 0
    gpu: Annotated[int, Field(ge=0, le=64)] | None = None
    config: Path | None = None

    def policy(self, preprocess_workers: int | None) -> TrainingPolicy:
        """Return when it is offered, and why there is no place for it beside so many workers."""
        return TrainingPolicy(
            min_micrographs=self.min_micrographs, no_place=self._find_no_place(preprocess_workers)
        )

    def _find_no_place(self, preprocess_workers: int | None) -> str | None:
        if self.cpus == 0:
            return TrainingPolicy().no_place
        if preprocess_workers is None:
            return "preprocessing has every core; runtime.preprocess_workers is to leave cryogem.cpus of them"
        n_cores = len(os.sched_getaffinity(0))
        if preprocess_workers + self.cpus > n_cores:
            return f"{preprocess_workers} preprocessing workers and {self.cpus} cores for it are more than the {n_cores} there are"
        return None


class EngineChoice(_Section):
    """Which engine reconstructs, and with what."""

    name: Literal["embedded"] = "embedded"
    symmetry: Symmetry = "C1"
    mask_diameter_angstrom: Length | None = None
    n_threads: Annotated[int, Field(ge=1, le=256)] | None = None
    n_starts: Annotated[int, Field(ge=1, le=20)] = 4
    effort: Literal["quick", "normal", "thorough"] = "normal"
    max_box_px: Annotated[int, Field(ge=32, le=512)] = 96
    seed: int = 0
    max_parallel_runs: Annotated[int, Field(ge=1, le=16)] = 1
    timeout_s: Annotated[float, Field(gt=0)] = 86_400.0


class RuntimeSettings(_Section):
    """Where it runs; None for workers means one per core."""

    preprocess_workers: Annotated[int, Field(ge=1, le=4096)] | None = None
    ray_address: str | None = None
    ranker_gpus: Annotated[float, Field(ge=0, le=16)] = 0.0
    engine_gpus: Annotated[float, Field(ge=0, le=16)] = 0.0
    min_free_disk_bytes: Annotated[int, Field(ge=0)] = 2 * 2**30
    stage_timeout_s: Annotated[float, Field(gt=0)] = 1800.0


class TelemetrySettings(_Section):
    """Prometheus endpoints, ours and Ray's own; port 0 takes a free one, None serves nothing."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] | None = 9464
    ray_port: Annotated[int, Field(ge=1, le=65535)] | None = None


class SessionSettings(_Section):
    """One session: exactly one kind of input, one output folder."""

    movies: Path | None = None
    micrographs: Path | None = None
    particles: Path | None = None
    out: Path
    microscope: MicroscopeSettings
    acquisition: AcquisitionSettings
    ingest: IngestSettings = IngestSettings()
    particle: ParticleSettings = ParticleSettings()
    ctf: CtfSettings = CtfSettings()
    quality: QualitySettings = QualitySettings()
    ranker: RankerSettings = RankerSettings()
    policy: PolicySettings = PolicySettings()
    engine: EngineChoice = EngineChoice()
    advice: AdviceChoice = AdviceChoice()
    cryogem: CryogemChoice = CryogemChoice()
    runtime: RuntimeSettings = RuntimeSettings()
    telemetry: TelemetrySettings = TelemetrySettings()

    @model_validator(mode="after")
    def _has_one_input(self) -> SessionSettings:
        given = [k for k in ("movies", "micrographs", "particles") if getattr(self, k) is not None]
        if len(given) != 1:
            msg = f"exactly one of movies, micrographs, particles is given (found: {', '.join(given) or 'none'})"
            raise ValueError(msg)
        return self

    @model_validator(mode="after")
    def _output_is_not_input(self) -> SessionSettings:
        source = self.source
        if source.is_dir() and self.out.resolve() == source.resolve():
            msg = "the output folder is not the input folder"
            raise ValueError(msg)
        return self

    @property
    def source(self) -> Path:
        """The input folder (or particle file)."""
        source = self.movies or self.micrographs or self.particles
        if source is None:  # pragma: no cover - the validator has seen to it
            raise ConfigurationError("session", "exactly one input is given")
        return source

    @property
    def optics(self) -> Optics:
        """The microscope's constants as a record."""
        m = self.microscope
        return Optics(voltage_kv=m.voltage_kv, cs_mm=m.cs_mm, amplitude_contrast=m.amplitude_contrast)

    def controller_settings(self, *, n_preprocess_workers: int) -> ControllerSettings:
        """Return the controller's numbers; each worker has one item in work and one waiting."""
        a = self.acquisition
        return ControllerSettings(
            score_threshold=self.ranker.score_threshold,
            runs=self.policy.run_policy(self.engine),
            max_in_flight_preprocess=2 * n_preprocess_workers,
            is_gain_orientation_sought=self.movies is not None and a.gain_orientation == "auto",
            max_gain_residual=a.max_gain_residual,
            n_gain_residual_movies=a.gain_residual_movies,
            is_picking_by_template=self.particle.picker == "template-after-map",
            template_min_resolution_angstrom=self.particle.template_min_resolution_angstrom,
            advice=AdviceSettings(**self.advice.model_dump()),
            training=self.cryogem.policy(self.runtime.preprocess_workers),
        )

    def to_yaml(self) -> str:
        """Return the settings with every default written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    def digest(self) -> str:
        """Return a short hash of the settings."""
        return hashlib.blake2b(self.to_yaml().encode(), digest_size=8).hexdigest()


def load_settings(path: Path) -> SessionSettings:
    """Read a session's YAML; relative paths in it are relative to its folder.

    Raises `ConfigurationError` that names the file, the key, the value and the rule.
    """
    settings = parse_settings(read_mapping(path), item=str(path))
    return _anchor_paths(settings, path.parent)


def parse_settings(document: Mapping[str, Any], *, item: str) -> SessionSettings:
    """Return validated settings, or raise one `ConfigurationError` that lists every fault in a line each."""
    try:
        return SessionSettings.model_validate(document)
    except ValidationError as error:
        faults = [_describe_fault(dict(fault)) for fault in error.errors()]
        raise ConfigurationError(item, "; ".join(faults)) from error


def parse_limits(document: Mapping[str, Any], *, item: str) -> QualityLimits:
    """Return validated limits on quality (keys as in the section `quality`), or raise `ConfigurationError`."""
    return _parse_section("quality", QualitySettings, document, item=item).limits


def parse_engine_choice(document: Mapping[str, Any], *, item: str) -> EngineChoice:
    """Return validated settings of the engine (keys as in the section `engine`), or raise `ConfigurationError`."""
    return _parse_section("engine", EngineChoice, document, item=item)


def parse_score_threshold(value: float, *, item: str) -> float:
    """Return a validated τ, or raise `ConfigurationError`."""
    return _parse_section("ranker", RankerSettings, {"score_threshold": value}, item=item).score_threshold


_S = TypeVar("_S", bound=_Section)


def _parse_section(name: str, section: type[_S], document: Mapping[str, Any], *, item: str) -> _S:
    try:
        return section.model_validate(document)
    except ValidationError as error:
        located = [dict(fault) | {"loc": (name, *fault["loc"])} for fault in error.errors()]
        raise ConfigurationError(item, "; ".join(_describe_fault(fault) for fault in located)) from error


_MOVED_KEYS = {
    "policy.first_run_particles": "the first of policy.rungs",
    "policy.final_run_min_particles": "policy.final_min_particles",
    "policy.max_ctf_fit_angstrom": "quality.max_ctf_fit_angstrom",
    "policy.max_total_motion_angstrom": "quality.max_total_motion_angstrom",
}


def _describe_fault(fault: dict[str, Any]) -> str:
    key = ".".join(str(part) for part in fault["loc"]) or "session"
    if fault["type"] == "extra_forbidden":
        if key in _MOVED_KEYS:
            return f"{key} is now {_MOVED_KEYS[key]}"
        close = difflib.get_close_matches(str(fault["loc"][-1]), _all_keys(), n=1)
        hint = f", did you mean {close[0]}?" if close else ""
        return f"unknown key {key}{hint}"
    if fault["type"] == "missing":
        return f"{key} is missing"
    found = fault.get("input")
    shown = f" (found: {found})" if isinstance(found, (int, float, str)) else ""
    note = _note_of(fault["loc"])
    if note and fault["type"] == "string_pattern_mismatch":
        return f"{key} is {note}{shown}"
    return f"{key}: {fault['msg']}{f', in {note}' if note else ''}{shown}"


def _note_of(location: tuple[str | int, ...]) -> str | None:
    model: type[BaseModel] = SessionSettings
    for part in location:
        field = model.model_fields.get(str(part))
        if field is None:
            return None
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            model = annotation
            continue
        return field.description
    return None


def _all_keys() -> list[str]:
    keys = list(SessionSettings.model_fields)
    for field in SessionSettings.model_fields.values():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            keys += list(annotation.model_fields)
    return keys


def _anchor_paths(settings: SessionSettings, folder: Path) -> SessionSettings:
    def anchor(path: Path | None) -> Path | None:
        return None if path is None else (folder / path.expanduser()).absolute()

    def anchor_program(path: Path | None) -> Path | None:
        # A bare name is a program that is looked up.
        return path if path is None or path.parent == Path() else anchor(path)

    return settings.model_copy(
        update={
            "movies": anchor(settings.movies),
            "micrographs": anchor(settings.micrographs),
            "particles": anchor(settings.particles),
            "out": anchor(settings.out),
            "acquisition": settings.acquisition.model_copy(
                update={"gain": anchor(settings.acquisition.gain)}
            ),
            "ranker": settings.ranker.model_copy(update={"model": anchor(settings.ranker.model)}),
            "cryogem": settings.cryogem.model_copy(update={"config": anchor(settings.cryogem.config)}),
            "particle": settings.particle.model_copy(
                update={
                    "topaz_executable": anchor_program(settings.particle.topaz_executable),
                    "topaz_model": anchor(settings.particle.topaz_model),
                }
            ),
        }
    )
