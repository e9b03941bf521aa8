"""From a session's journal and configuration to the facts of its report; nothing is measured again."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from operator import add
from pathlib import Path

from pydantic import BaseModel

from models.cryoranker.providers import CPU, CUDA, OPENVINO, TENSORRT
from stream import __version__
from stream.config import SessionSettings, load_settings
from stream.control.advice import cfar_ratio
from stream.control.controller import Controller
from stream.control.exposures import ExposureRecord, ExposureState
from stream.control.quality import describe_limits
from stream.control.runs import RunRecord
from stream.control.trend import median_of
from stream.records.errors import InputError
from stream.records.events import (
    DiskSpaceChanged,
    DrainRequested,
    Event,
    ExposureFound,
    ExposurePreprocessed,
    ExposureRanked,
    InputEnded,
    RunFailed,
    SessionOpened,
    StageFailed,
)
from stream.records.values import ExposureId, FailureKind, PreprocessResult, Stage
from stream.sinks.report.facts import (
    ExposureFacts,
    ModelFacts,
    PersonsWord,
    ReportFacts,
    RunFacts,
    Said,
    SessionState,
)
from stream.status import advise_session
from stream.store.journal import is_journal_held, read_journal
from stream.store.layout import OutputLayout

_PROVIDERS = {
    "tensorrt": TENSORRT,
    "cuda": CUDA,
    "openvino": OPENVINO,
    "openvino-bf16": OPENVINO,
    "cpu": CPU,
}
"""What is in use when the configured provider can be had."""


class _History:
    """What the controller forgets: when things happened, what ran the model, what was tried again."""

    def __init__(self) -> None:
        self.first_at: float | None = None
        self.last_at: float | None = None
        self.n_openings = 0
        self.versions: dict[str, None] = {}
        self.story: list[Said] = []
        self.latency_s: dict[ExposureId, float] = {}
        self.model_of: dict[ExposureId, tuple[str, str]] = {}
        self.n_retried: Counter[Stage] = Counter()
        self.last_retry = ""
        self.n_runs_failed = 0
        self.is_disk_low = False
        self.last_result: PreprocessResult | None = None
        self.n_by_picker: Counter[str] = Counter()
        self._landed: dict[ExposureId, float] = {}
        self._n_decided = 0

    def take(self, event: Event, controller: Controller) -> None:
        """Take an event that the controller has just handled."""
        self.first_at = event.at if self.first_at is None else self.first_at
        self.last_at = event.at
        self._tell(event)
        match event:
            case ExposureFound(exposure=exposure):
                # A file that was there before the session began to wait when the session did; a clock that is
                # ahead may give a time of writing after the file was found.
                landed = max(exposure.file.mtime_ns / 1e9, self.first_at)
                self._landed[exposure.exposure_id] = min(landed, event.at)
            case ExposurePreprocessed(result=result):
                self.last_result = result
                self.n_by_picker[result.picker] += 1
            case ExposureRanked(result=ranked):
                landed = self._landed.get(ranked.exposure_id, event.at)
                self.latency_s.setdefault(ranked.exposure_id, event.at - landed)
                self.model_of[ranked.exposure_id] = ranked.model_hash, ranked.provider or "not recorded"
            case StageFailed(kind=FailureKind.RESOURCE):
                self.n_retried[event.stage] += 1
                self.last_retry = event.reason
            case RunFailed():
                self.n_runs_failed += 1
            case _:
                pass
        self._follow(controller)

    def _tell(self, event: Event) -> None:
        match event:
            case SessionOpened():
                self.n_openings += 1
                self.versions[event.version] = None
                self._say(event.at, "session opened", f"icestream {event.version}")
            case DiskSpaceChanged(is_low=is_low):
                self.is_disk_low = is_low
                state = (
                    "under the reserve: nothing new starts" if is_low else "above the reserve: work goes on"
                )
                self._say(event.at, "free disk space", f"{event.free_bytes / 2**30:.1f} GiB, {state}")
            case InputEnded():
                self._say(event.at, "no more input", "")
            case DrainRequested():
                self._say(event.at, "draining", "what is in work ends, nothing new starts")
            case _:
                pass

    def _say(self, at: float, what: str, why: str) -> None:
        self.story.append(Said(at=at, is_decision=False, what=what, why=why))

    def _follow(self, controller: Controller) -> None:
        """Take the controller's new decisions; it keeps but the last thousand."""
        n_new = controller.decisions.n_decided - self._n_decided
        if n_new:
            self._n_decided = controller.decisions.n_decided
            self.story += [
                Said(at=d.at, is_decision=True, what=d.what, why=d.why)
                for d in list(controller.decisions)[-n_new:]
            ]


def gather_facts(out: Path) -> ReportFacts:
    """Return the facts of the session in `out`, which a service may be writing.

    Raises `InputError` where the folder holds no session.
    """
    layout = OutputLayout(out)
    for path in (layout.journal, layout.session):
        if not path.is_file():
            rule = "a session's output folder holds journal.sqlite and session.yaml"
            raise InputError(out, rule, f"no {path.name}" if out.is_dir() else "no such folder")
    settings = load_settings(layout.session)
    is_held = is_journal_held(layout.journal)
    controller = Controller(settings.controller_settings(n_preprocess_workers=1))
    history = _History()
    for event in read_journal(layout.journal):
        controller.handle(event)
        history.take(event, controller)
    model = _describe_model(settings, history)
    return ReportFacts(
        out=out,
        icestream_version=__version__,
        written_at=time.time(),
        session_versions=tuple(history.versions),
        state=_find_state(controller, is_held=is_held),
        first_at=history.first_at,
        last_at=history.last_at,
        n_openings=history.n_openings,
        source=str(settings.source),
        settings=tuple(_list_settings(settings, controller, history)),
        changed=tuple(_list_changed(settings)),
        limits=describe_limits(controller.limits),
        session_yaml=layout.session.read_text(encoding="utf-8"),
        exposures=tuple(_describe_exposure(r, controller, history) for r in controller.exposures.values()),
        n_by_state={state.value: controller.n_by_state[state] for state in ExposureState},
        n_rejected_by={rule: n for rule, n in sorted(controller.n_rejected_by.items()) if n},
        score_threshold=controller.score_threshold,
        score_histogram=_pool_scores(controller),
        n_above_threshold=controller.n_above_threshold,
        model=model,
        engine=settings.engine.name,
        runs=tuple(_describe_run(run, controller) for run in controller.runs.values()),
        advice=advise_session(controller),
        story=tuple(history.story),
        persons_words=tuple(
            PersonsWord(
                decision_id=d.decision_id, at=d.at, what=d.what, reason=d.reason, is_undone=d.is_undone
            )
            for d in controller.wishes.history
        ),
        warnings=tuple(_list_warnings(controller, history, model)),
    )


def _find_state(controller: Controller, *, is_held: bool) -> SessionState:
    if controller.is_finished:
        return SessionState.ENDED
    return SessionState.RUNNING if is_held else SessionState.STOPPED


def _describe_exposure(record: ExposureRecord, controller: Controller, history: _History) -> ExposureFacts:
    figures, histogram = record.figures, record.score_histogram
    return ExposureFacts(
        name=record.name,
        path=record.file.path,
        state=record.state.value,
        rule=record.rejected_by,
        reason=record.reason,
        has_rings=None if figures is None else figures.has_rings,
        n_picks=0 if figures is None else figures.n_picks,
        n_particles=0 if figures is None else record.n_particles,
        n_excluded=0 if figures is None else record.n_excluded,
        n_unscored=0 if histogram is None else record.n_unscored,
        n_scored=0 if histogram is None else sum(histogram),
        n_above=controller.count_above(record),
        ctf_fit_angstrom=None if figures is None else figures.ctf_fit_angstrom,
        defocus_angstrom=None if figures is None else figures.defocus_angstrom,
        astigmatism_angstrom=None if figures is None else figures.astigmatism_angstrom,
        total_motion_angstrom=None if figures is None else figures.total_motion_angstrom,
        ice_ratio=None if figures is None else figures.ice_ratio,
        score_median=None if histogram is None else median_of(histogram),
        latency_s=history.latency_s.get(record.exposure_id),
    )


def _pool_scores(controller: Controller) -> tuple[int, ...]:
    """Return the scores of the exposures in use by the model that scored last, in equal bins over [0, 1]."""
    pooled: list[int] = []
    for record in controller.exposures.values():
        is_counted = record.state is ExposureState.DONE and record.model_hash == controller.model_hash
        if is_counted and record.score_histogram is not None:
            pooled = (
                list(map(add, pooled, record.score_histogram)) if pooled else list(record.score_histogram)
            )
    return tuple(pooled)


def _describe_run(run: RunRecord, controller: Controller) -> RunFacts:
    request, result, best = run.request, run.result, controller.best_run
    return RunFacts(
        run_id=request.run_id,
        campaign_id=request.campaign_id,
        purpose=request.purpose.value,
        state=run.state.value,
        reason=request.reason,
        verdict=run.verdict,
        start_map=request.start_map,
        warm_start=request.warm_start,
        n_particles=request.n_particles if result is None else result.n_particles,
        symmetry=request.symmetry if result is None else result.symmetry,
        resolution_angstrom=None if result is None else result.resolution_angstrom,
        nyquist_angstrom=None if result is None else result.nyquist_angstrom,
        cfar=None if result is None else result.cfar,
        cfar_null=None if result is None else result.cfar_null,
        cfar_ratio=None if result is None else cfar_ratio(result),
        scf_star=None if result is None else result.scf_star,
        note="" if result is None else result.note,
        folder=None if result is None else result.folder,
        seconds=None if result is None or not result.seconds else sum(result.seconds.values()),
        growth=None if result is None or result.figures is None else result.figures.growth,
        is_accepted=best is not None and best.run_id == request.run_id,
        is_rejected_by_person=run.is_rejected,
    )


def _describe_model(settings: SessionSettings, history: _History) -> ModelFacts:
    model = settings.ranker.model
    return ModelFacts(
        path=None if model is None else str(model),
        asked_for=settings.ranker.provider,
        n_by_hash=Counter(model_hash for model_hash, _ in history.model_of.values()),
        n_by_provider=Counter(provider for _, provider in history.model_of.values()),
    )


# --- settings ------------------------------------------------------------------------------------------


def _list_settings(
    settings: SessionSettings, controller: Controller, history: _History
) -> Iterator[tuple[str, str]]:
    """Yield what a person asks for first: the microscope, the movies, the particle."""
    m, a, p = settings.microscope, settings.acquisition, settings.particle
    yield "voltage", f"{m.voltage_kv:g} kV"
    yield "spherical aberration", f"{m.cs_mm:g} mm"
    yield "amplitude contrast", f"{m.amplitude_contrast:g}"
    binned = "" if a.binning == 1.0 else f", binned by {a.binning:g}"
    yield "pixel size", f"{a.pixel_size_angstrom:g} Å{binned}"
    if a.dose_e_per_angstrom2 is not None:
        before = a.pre_exposure_e_per_angstrom2
        yield "dose", f"{a.dose_e_per_angstrom2:g} e/Å²" + (f" after {before:g} e/Å²" if before else "")
    if settings.movies is not None:
        yield "gain reference", "none" if a.gain is None else str(a.gain)
    yield "particle diameter", f"{p.diameter_angstrom:g} Å"
    last = history.last_result
    if last is not None:
        yield "extracted", f"{last.box_size_px} px of {last.pixel_size_angstrom:.4g} Å"
        yield "picked by", ", ".join(f"{picker} ({n:,})" for picker, n in history.n_by_picker.items())
    wishes = controller.wishes
    yield "symmetry", wishes.symmetry or settings.engine.symmetry
    mask = wishes.mask_diameter_angstrom or settings.engine.mask_diameter_angstrom
    yield "mask diameter", "from the map" if mask is None else f"{mask:g} Å"
    yield "quality limits", describe_limits(controller.limits)


def _list_changed(settings: SessionSettings) -> Iterator[tuple[str, str, str]]:
    """Yield key, value and default of every setting that has a default and another value."""
    for name in SessionSettings.model_fields:
        section = getattr(settings, name)
        if not isinstance(section, BaseModel):
            continue
        for key, field in type(section).model_fields.items():
            if field.is_required():
                continue
            value, default = getattr(section, key), field.get_default(call_default_factory=True)
            if value != default:
                yield f"{name}.{key}", _show(value), _show(default)


def _show(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(_show, value)) or "none"
    return "none" if value is None else str(value)


# --- warnings ------------------------------------------------------------------------------------------


def _list_warnings(controller: Controller, history: _History, model: ModelFacts) -> Iterator[str]:
    """Yield what a reader must know beside the advice: what waits, what failed, what ran on something else."""
    found, counted = len(controller.exposures), sum(controller.n_by_state[state] for state in ExposureState)
    if found != counted:
        yield f"the books do not balance: {found:,} exposures found, {counted:,} in a state"
    for stage in Stage:
        hold = controller.find_hold(stage)
        if hold is not None:
            yield f"{stage.value} waits: {hold}"
    if history.is_disk_low:
        yield "free disk space is under the reserve: nothing new starts"
    yield from _warn_of_provider(model)
    if len(model.n_by_hash) > 1:
        shares = ", ".join(f"{h[:12]} ({n:,})" for h, n in model.n_by_hash.items())
        yield f"exposures were last scored by different models: {shares}; their scores are not comparable"
    for stage, n in history.n_retried.items():
        yield f"{stage.value} failed {n:,} times for the machine's sake and was tried again; last: {history.last_retry}"
    if history.n_runs_failed:
        yield f"{history.n_runs_failed:,} engine runs failed: see the runs"
    records = controller.exposures.values()
    if n := sum(r.figures is not None and r.figures.has_rings is False for r in records):
        yield f"{n:,} exposures show no Thon rings: their CTF fits mean nothing and are in no plot"
    if n := sum(r.n_unscored for r in records):
        yield f"{n:,} particles could not be scored (constant images or NaN)"


def _warn_of_provider(model: ModelFacts) -> Iterator[str]:
    used = {name: n for name, n in model.n_by_provider.items() if name.endswith("ExecutionProvider")}
    wanted = _PROVIDERS.get(model.asked_for)
    fell_back = {name: n for name, n in used.items() if wanted is not None and name != wanted}
    for name, n in fell_back.items():
        yield f"ranker.provider {model.asked_for} could not be had for {n:,} exposures: {name} scored them"
    if not fell_back and len(used) > 1:
        shares = ", ".join(f"{name} ({n:,})" for name, n in used.items())
        yield f"more than one provider scored: {shares}"
