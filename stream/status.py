"""What a session's status is: derived from the controller, never stored."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from stream.control.advice import EndedRun, SessionFacts, advise
from stream.control.campaign import CampaignRecord
from stream.control.controller import Controller
from stream.control.exposures import ExposureState
from stream.control.runs import RunRecord
from stream.control.settings import ControllerSettings
from stream.control.wishes import describe_window
from stream.quality_report import count_rejected_by, list_overruled, list_rejected
from stream.records.advice import Advice
from stream.records.errors import ConfigurationError
from stream.records.values import Stage
from stream.store.journal import read_journal
from stream.store.layout import OutputLayout

N_DECISIONS_SHOWN = 20
N_REASONS_SHOWN = 20


def summarize(controller: Controller) -> dict[str, Any]:
    """Return the status document (architecture's command-line contract)."""
    counts = {state.value: controller.n_by_state[state] for state in ExposureState}
    found = len(controller.exposures)
    records = controller.exposures.values()
    used = [r for r in records if r.state is not ExposureState.REJECTED]
    best, gain = controller.best_run, controller.gain
    n_scored = sum(sum(r.score_histogram) for r in used if r.score_histogram is not None)
    return {
        "movies": {"found": found, **counts},
        "particles": {
            "extracted": sum(r.n_particles for r in used),
            "excluded": sum(r.n_excluded + r.n_unscored for r in used),
            "rejected": sum(r.n_particles for r in records if r.state is ExposureState.REJECTED),
            "scored": n_scored,
            "above_threshold": controller.n_above_threshold,
            "score_threshold": controller.score_threshold,
        },
        "balanced": found == sum(counts.values()),
        "campaigns": [_describe_campaign(campaign) for campaign in controller.campaigns.values()],
        "runs": [_describe_run(run) for run in controller.runs.values()],
        "resolution_angstrom": None if best is None else best.resolution_angstrom,
        "cfar": None if best is None else best.cfar,
        "accepted_run": None if best is None else best.run_id,
        "finished": controller.is_finished,
        "quarantine": [
            {"name": r.name, "path": r.file.path, "reason": r.reason}
            for r in records
            if r.state is ExposureState.QUARANTINED
        ][:N_REASONS_SHOWN],
        "rejected": list_rejected(controller)[:N_REASONS_SHOWN],
        "rejected_by": count_rejected_by(controller),
        "limits": asdict(controller.limits),
        "overruled": list_overruled(controller)[:N_REASONS_SHOWN],
        "gain": {
            "orientation": None if gain.orientation is None else asdict(gain.orientation),
            "residual": controller.gain_residual.mean,
        },
        "wishes": describe_wishes(controller),
        "cryogem": _describe_training(controller),
        "advice": [
            {"kind": a.kind.value, "severity": a.severity.value, "words": a.words, "numbers": dict(a.numbers)}
            for a in advise_session(controller)
        ],
        "holds": {stage.value: reason for stage in Stage if (reason := controller.find_hold(stage))},
        "decisions": [
            {"at": d.at, "what": d.what, "why": d.why}
            for d in list(controller.decisions)[-N_DECISIONS_SHOWN:]
        ],
    }


def _describe_training(controller: Controller) -> dict[str, Any]:
    """Return where the training of CryoGEM stands, and why none can be started now."""
    desk = controller.training
    return {
        "state": None if desk.state is None else desk.state.value,
        "words": desk.words,
        "refusal": desk.find_refusal(controller.n_by_state[ExposureState.DONE], controller.best_run),
    }


def describe_wishes(controller: Controller) -> dict[str, Any]:
    """Return what people's decisions amount to now, limits apart; None = nobody decided."""
    wishes = controller.wishes
    return {
        "pinned_run": wishes.pinned_run,
        "rejected_runs": sorted(wishes.rejected_runs),
        "symmetry": wishes.symmetry,
        "mask_diameter_angstrom": wishes.mask_diameter_angstrom,
        "score_threshold": wishes.score_threshold,
        "excluded_times": [describe_window(window) for window in wishes.excluded_windows],
    }


def advise_session(controller: Controller) -> tuple[Advice, ...]:
    """Return the advice that stands now; runs that a person rejected have no say."""
    rejected = controller.wishes.rejected_runs
    runs = [
        EndedRun(request=run.request, result=run.result)
        for run_id, run in controller.runs.items()
        if run.result is not None and run_id not in rejected
    ]
    gain, residual = controller.gain, controller.gain_residual.mean
    facts = SessionFacts(
        runs=runs,
        trend=controller.trend,
        score_threshold=controller.score_threshold,
        n_exposures=len(controller.exposures),
        gain_residual=residual,
        gain_residual_limit=controller.settings.max_gain_residual,
        gain_hold=gain.hold if gain.is_given_up else None,
    )
    return advise(facts, controller.settings.advice)


def _describe_campaign(campaign: CampaignRecord) -> dict[str, Any]:
    request = campaign.request
    return {
        "campaign_id": request.campaign_id,
        "trigger": request.trigger.value,
        "plan": request.plan.value,
        "particles": request.n_particles,
        "symmetry": request.symmetry,
        "reason": request.reason,
        "is_in_work": campaign.is_active,
        "runs": [run.request.run_id for run in campaign.runs],
        "verdict": campaign.verdict,
    }


def _describe_run(run: RunRecord) -> dict[str, Any]:
    result = run.result
    return {
        "run_id": run.request.run_id,
        "campaign_id": run.request.campaign_id,
        "purpose": run.request.purpose.value,
        "state": run.state.value,
        "reason": run.request.reason,
        "verdict": run.verdict,
        "start_map": run.request.start_map,
        "warm_start": run.request.warm_start,
        "particles": run.request.n_particles if result is None else result.n_particles,
        "resolution_angstrom": None if result is None else result.resolution_angstrom,
        "cfar": None if result is None else result.cfar,
        "cfar_null": None if result is None else result.cfar_null,
        "scf_star": None if result is None else result.scf_star,
        "folder": None if result is None else result.folder,
        "seconds": {} if result is None else result.seconds,
    }


def load_status(out: Path) -> dict[str, Any]:
    """Return the status of an output folder, which a service may be writing."""
    return summarize(load_controller(out))


def load_controller(out: Path) -> Controller:
    """Replay the journal of an output folder, which a service may be writing."""
    layout = OutputLayout(out)
    if not layout.journal.is_file():
        raise ConfigurationError(out, "an output folder holds a journal.sqlite; no session was started here")
    controller = Controller(read_controller_settings(layout))
    for event in read_journal(layout.journal):
        controller.handle(event)
    return controller


def read_controller_settings(layout: OutputLayout) -> ControllerSettings:
    """Return the rules that the session was last started with."""
    from stream.config import load_settings

    return load_settings(layout.session).controller_settings(n_preprocess_workers=1)
