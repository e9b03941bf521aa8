"""From settings to a service that runs: which source, which runtime, which exporter."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from actors.engines.base import EngineSettings
from actors.handlers import RankerOptions, WorkerSpec
from actors.interface import Runtime
from actors.local import LocalRuntime
from actors.preprocess.settings import PreprocessSettings
from models.optics.ctf_search import PHASE_SHIFT_RANGE_DEG, CtfSearch
from stream import __version__
from stream.app import Service, write_session
from stream.config import CtfSettings, RankerSettings, SessionSettings
from stream.control.controller import Controller
from stream.control.exposures import ExposureState
from stream.ingest.source import ExposureSource, KnownFile, SourceSettings, is_about_settings
from stream.records.errors import ConfigurationError, IcestreamError
from stream.records.events import BY_CONFIGURATION, Event, QualityLimitsChanged
from stream.records.values import InputKind
from stream.status import summarize
from stream.store.files import remove_leftovers
from stream.store.journal import Journal
from stream.store.layout import OutputLayout
from stream.telemetry.logs import get_logger
from stream.telemetry.metrics import Telemetry
from stream.training_job import TrainingRunner

log = get_logger(__name__)

POLL_TIMEOUT_S = 0.25


def count_workers(settings: SessionSettings) -> int:
    """Return how many preprocessing workers there are: as set, or one per core."""
    return settings.runtime.preprocess_workers or len(os.sched_getaffinity(0))


def _check_model_hash(ranker: RankerSettings) -> None:
    """Refuse to begin with another model than the one that the configuration names by its hash."""
    if ranker.model_sha256 is None:
        return
    from models.cryoranker.serve import DEFAULT_MODEL

    path = ranker.model or DEFAULT_MODEL
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != ranker.model_sha256.lower():
        raise ConfigurationError(path, f"ranker.model_sha256 {ranker.model_sha256.lower()}", found)


def build_worker_spec(settings: SessionSettings) -> WorkerSpec:
    """Return what every worker is told."""
    model = settings.ranker.model
    if model is not None and not model.is_file():
        raise ConfigurationError(model, "ranker.model is an ONNX file that exists")
    _check_model_hash(settings.ranker)
    n_threads = settings.engine.n_threads or max(
        1, len(os.sched_getaffinity(0)) // settings.engine.max_parallel_runs
    )
    return WorkerSpec(
        out=settings.out,
        source=settings.source,
        preprocess=_preprocess_settings(settings),
        ranker=RankerOptions(
            model=model,
            batch_size=settings.ranker.batch_size,
            max_wait_s=settings.ranker.max_wait_s,
            provider=settings.ranker.provider,
            outlier_sigmas=settings.ranker.outlier_sigmas,
            n_threads=1,
            n_callers=16,
        ),
        engine_name=settings.engine.name,
        run_timeout_s=settings.engine.timeout_s,
        engine=EngineSettings(
            symmetry=settings.engine.symmetry,
            mask_diameter_angstrom=settings.engine.mask_diameter_angstrom,
            n_threads=n_threads,
            n_starts=settings.engine.n_starts,
            seed=settings.engine.seed,
            effort=settings.engine.effort,
            max_box_px=settings.engine.max_box_px,
        ),
    )


def _preprocess_settings(settings: SessionSettings) -> PreprocessSettings:
    a, p = settings.acquisition, settings.particle
    if p.picker == "topaz" and (p.topaz_executable is None or shutil.which(p.topaz_executable) is None):
        # found now, or else every movie would be quarantined for it
        rule = "the picker topaz needs its program, installed and executable"
        raise ConfigurationError("particle.topaz_executable", rule, p.topaz_executable)
    given: dict[str, Any] = {
        "extract_pixel_size_angstrom": p.extract_pixel_size_angstrom,
        "box_size_px": p.box_size_px,
        "pick_threshold_sd": p.pick_threshold_sd,
        "max_picks": p.max_picks,
    }
    return PreprocessSettings(
        pixel_size_angstrom=a.pixel_size_angstrom,
        optics=settings.optics,
        dose_e_per_angstrom2=a.dose_e_per_angstrom2,
        pre_exposure_e_per_angstrom2=a.pre_exposure_e_per_angstrom2,
        gain=a.gain,
        gain_flip_x=a.gain_flip_x,
        gain_flip_y=a.gain_flip_y,
        gain_rotate_deg=a.gain_rotate_deg,
        gain_convention=a.gain_convention,
        binning=a.binning,
        has_local_motion=a.has_local_motion,
        keeps_unweighted=a.keeps_unweighted,
        ctf_search=_ctf_search(settings.ctf),
        eer_fractions=a.eer_fractions,
        eer_dose_per_fraction_e_per_angstrom2=a.eer_dose_per_fraction_e_per_angstrom2,
        eer_upsampling=a.eer_upsampling,
        particle_diameter_angstrom=p.diameter_angstrom,
        picker=p.picker,
        topaz_executable=p.topaz_executable,
        topaz_model=p.topaz_model,
        **{key: value for key, value in given.items() if value is not None},
    )


def _ctf_search(ctf: CtfSettings) -> CtfSearch:
    return CtfSearch(
        min_defocus_angstrom=ctf.min_defocus_angstrom,
        max_defocus_angstrom=ctf.max_defocus_angstrom,
        finest_resolution_angstrom=ctf.finest_resolution_angstrom,
        phase_shift_range_deg=PHASE_SHIFT_RANGE_DEG if ctf.has_phase_shift else None,
        max_thickness_angstrom=ctf.max_thickness_angstrom,
    )


def build_source(settings: SessionSettings, controller: Controller) -> ExposureSource:
    """Return the watcher of the session's input, which knows what the journal already has."""
    kinds = {
        "movies": InputKind.MOVIE,
        "micrographs": InputKind.MICROGRAPH,
        "particles": InputKind.PARTICLES,
    }
    i, a = settings.ingest, settings.acquisition
    source_settings = SourceSettings(
        root=settings.source,
        kind=next(kind for key, kind in kinds.items() if getattr(settings, key) is not None),
        include=i.include,
        exclude=i.exclude,
        recursive=i.recursive,
        observer=i.observer,
        settle_s=i.settle_s,
        give_up_s=i.give_up_s,
        poll_interval_s=i.poll_interval_s,
        pixel_size_angstrom=a.pixel_size_angstrom,
        voltage_kv=settings.microscope.voltage_kv,
        dose_e_per_angstrom2=a.dose_e_per_angstrom2,
        gain=a.gain,
        gain_flip_x=a.gain_flip_x,
        gain_flip_y=a.gain_flip_y,
        gain_rotate_deg=a.gain_rotate_deg,
        gain_convention=a.gain_convention,
        is_gain_orientation_sought=a.gain_orientation == "auto",
        eer_upsampling=a.eer_upsampling,
    )
    # A file that was refused for the settings' sake may be right by today's settings.
    known = [
        KnownFile(
            r.exposure_id,
            r.name,
            r.file,
            is_offered_again=r.state is ExposureState.QUARANTINED and is_about_settings(r.reason),
        )
        for r in controller.exposures.values()
    ]
    source = ExposureSource(source_settings, known=known)
    source.start()
    return source


def build_runtime(settings: SessionSettings, *, in_process: bool) -> Runtime:
    """Return Ray's runtime, or the in-process one."""
    spec = build_worker_spec(settings)
    if in_process:
        return LocalRuntime(spec)
    from actors.runtime import PoolSettings, RayRuntime

    pools = PoolSettings(
        n_preprocess_workers=count_workers(settings),
        n_rank_callers=spec.ranker.n_callers,
        ray_address=settings.runtime.ray_address,
        ranker_gpus=settings.runtime.ranker_gpus,
        engine_gpus=settings.runtime.engine_gpus,
        ray_metrics_port=settings.telemetry.ray_port,
        engine_threads=spec.engine.n_threads,
        stage_timeout_s=settings.runtime.stage_timeout_s,
        n_engines=settings.engine.max_parallel_runs,
        # the run looks at its clock itself and says why it stopped; one that does not is killed later
        run_timeout_s=1.1 * settings.engine.timeout_s + 60.0,
    )
    return RayRuntime(spec, pools)


def open_service(
    settings: SessionSettings,
    *,
    in_process: bool = False,
    on_event: Callable[[Event], None] | None = None,
) -> Service:
    """Lock the output folder, replay its journal and start everything."""
    layout = OutputLayout(settings.out)
    if not settings.source.exists():
        raise ConfigurationError(settings.source, "the input folder (or particle file) must exist")
    journal = Journal(layout.journal)
    try:
        controller = Controller(settings.controller_settings(n_preprocess_workers=count_workers(settings)))
        telemetry = Telemetry(__version__, score_threshold=settings.ranker.score_threshold)
        for event in journal.replay():
            controller.handle(event)
            telemetry.observe(event, replay=True, score_threshold=controller.score_threshold)
        _commit_configured_limits(settings, journal, controller)
        if n_left := remove_leftovers(layout.stage_folders):
            log.info("leftovers_removed", files=n_left)
        write_session(settings, layout)
        _serve_metrics(telemetry, settings)
        source = build_source(settings, controller)
        runtime = build_runtime(settings, in_process=in_process)
    except BaseException:
        journal.close()
        raise
    service = Service(
        settings,
        controller=controller,
        journal=journal,
        source=source,
        runtime=runtime,
        telemetry=telemetry,
        trainer=TrainingRunner(settings),
        on_event=on_event,
    )
    service.open()
    return service


def _commit_configured_limits(settings: SessionSettings, journal: Journal, controller: Controller) -> None:
    """Make the configuration's limits an event when they are new to it; those set by hand since stay otherwise."""
    limits = settings.quality.limits
    if limits == controller.configured_limits:
        return
    event = QualityLimitsChanged(
        at=time.time(), limits=limits, reason="the configuration says so", request_id=BY_CONFIGURATION
    )
    journal.append([event])
    controller.handle(event)


def _serve_metrics(telemetry: Telemetry, settings: SessionSettings) -> None:
    if settings.telemetry.port is None:
        return
    server = telemetry.serve(
        settings.telemetry.host, settings.telemetry.port, token=os.environ.get("ICESTREAM_METRICS_TOKEN")
    )
    log.info("metrics_served", host=settings.telemetry.host, port=server.port)


@contextmanager
def draining_on_signals() -> Iterator[threading.Event]:
    """Yield an event that Ctrl-C or SIGTERM sets; a second signal ends the process at once."""
    stop = threading.Event()

    def request_stop(number: int, _frame: object) -> None:
        if stop.is_set():
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        stop.set()

    kept = {number: signal.signal(number, request_stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


class QuietClock:
    """Tells when something has been so for long enough: a file may land just after a look at the folder."""

    def __init__(self, needed_s: float) -> None:
        self._needed_s = needed_s
        self._since: float | None = None

    def has_lasted(self, is_quiet: bool) -> bool:  # noqa: FBT001 - the one thing it is told
        """Take note of what is so now; True when it has been so for long enough."""
        now = time.monotonic()
        self._since = (self._since if self._since is not None else now) if is_quiet else None
        return self._since is not None and now - self._since >= self._needed_s


def run_session(
    settings: SessionSettings,
    *,
    until_idle: bool,
    has_input_ended: Callable[[], bool] = lambda: True,
    in_process: bool = False,
    on_event: Callable[[Event], None] | None = None,
    on_step: Callable[[Controller], None] | None = None,
) -> dict[str, Any]:
    """Run a session and return its status document.

    With `until_idle` it ends when every file has an outcome and the last run is over (`has_input_ended` can
    hold that back); otherwise at a signal, after what is in work has ended.
    """
    from stream.exports import write_exports

    with draining_on_signals() as stop:
        service = open_service(settings, in_process=in_process, on_event=on_event)
        quiet = QuietClock(settings.ingest.poll_interval_s + 1.0)
        try:
            while not (stop.is_set() or service.controller.is_finished):
                service.step(POLL_TIMEOUT_S)
                if until_idle and quiet.has_lasted(service.is_input_quiet and has_input_ended()):
                    service.end_input()
                if on_step is not None:
                    on_step(service.controller)
            if not service.controller.is_finished:
                service.drain()
            while service.has_stage_in_work:
                service.step(POLL_TIMEOUT_S)
            write_exports(OutputLayout(settings.out), service.controller)
            status = summarize(service.controller)
        finally:
            service.close()
    _write_report(OutputLayout(settings.out))
    return status


def _write_report(layout: OutputLayout) -> None:
    """Leave the session's report in its folder; a session is none the worse for a report that cannot be written."""
    from stream.session_facts import gather_facts
    from stream.sinks.report.page import write_report

    try:
        write_report(layout.report, gather_facts(layout.root))
    except IcestreamError as error:
        log.warning("report_not_written", reason=str(error))
