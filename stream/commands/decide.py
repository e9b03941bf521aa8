"""`icestream decide`: a person's word on runs, symmetry, mask, threshold and exposures, and how it is taken back."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from stream.commands.common import AsJson, print_json
from stream.commands.delivery import deliver
from stream.records.errors import ConfigurationError
from stream.records.values import QualityLimits, RunId
from stream.records.wishes import TimeWindow, Wish, WishKind
from stream.store.inbox import LimitsRequest, Request, WishRequest
from stream.store.layout import OutputLayout

if TYPE_CHECKING:
    from stream.control.controller import Controller
    from stream.control.wishes import PersonsDecision

_LIMITS = {
    ("ctf", ">"): "max_ctf_fit_angstrom",
    ("astigmatism", ">"): "max_astigmatism_angstrom",
    ("defocus", "<"): "min_defocus_angstrom",
    ("defocus", ">"): "max_defocus_angstrom",
    ("motion", ">"): "max_total_motion_angstrom",
    ("early-motion", ">"): "max_early_motion_angstrom",
    ("ice", ">"): "max_ice_ratio",
    ("crystalline-ice", ">"): "max_crystalline_ice",
    ("masked", ">"): "max_masked_fraction",
    ("picks", "<"): "min_picks",
    ("picks", ">"): "max_picks",
}
_CONDITION = re.compile(r"\s*(?P<figure>[a-z-]+)\s*(?P<sign>[<>])\s*(?P<value>[-+.\deE]+)\s*")
_CONDITIONS = ", ".join(f"{figure}{sign}NUMBER" for figure, sign in _LIMITS)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        "decide",
        help="Decide what the session would else decide by itself: which run's map counts, the symmetry, the mask, the "
        "score threshold, which exposures are left out, that a run starts now. Works while the session runs and after. "
        "Only what depends on it is done again; every decision is kept, listed by --list and taken back by --undo.\n\n"
        "Example: icestream decide /data/session --symmetry D2 --reason 'two-fold axes in the class averages'",
    )(decide)


def decide(
    out: Annotated[Path, typer.Argument(help="A session's output folder.")],
    pin: Annotated[str | None, typer.Option(help="Use this run's map, whatever others give.")] = None,
    reject_run: Annotated[
        str | None, typer.Option(help="Never use this run's map nor start from it.")
    ] = None,
    symmetry: Annotated[
        str | None, typer.Option(help="Point group of the next runs: Cn, Dn, T, O or I.")
    ] = None,
    mask_diameter_angstrom: Annotated[
        float | None, typer.Option(help="Diameter of the next runs' mask; Å.")
    ] = None,
    score_threshold: Annotated[
        float | None, typer.Option(help="τ: particles that score at or above it are used; 0 to 1.")
    ] = None,
    run: Annotated[bool, typer.Option("--run", help="Start a run on today's particles now.")] = False,
    exclude: Annotated[
        list[str] | None,
        typer.Option(help=f"Leave out exposures by a figure (repeatable): {_CONDITIONS}."),
    ] = None,
    exclude_time: Annotated[
        tuple[str, str] | None,
        typer.Option(
            metavar="FROM TO",
            help="Leave out exposures taken in this time, as 2026-03-01T14:00 (local, or with a zone).",
        ),
    ] = None,
    train_cryogem: Annotated[
        bool,
        typer.Option(
            "--train-cryogem",
            help="Train CryoGEM on this session, beside its live stages (section cryogem of the configuration).",
        ),
    ] = False,
    undo: Annotated[
        list[str] | None, typer.Option(help="Take a decision back, by its id (repeatable).")
    ] = None,
    list_all: Annotated[
        bool, typer.Option("--list", help="List every decision, those of `quality` too.")
    ] = False,
    reason: Annotated[str, typer.Option(help="Why; kept in the journal.")] = "",
    as_json: AsJson = False,
) -> None:
    """Decide about a session, or list what was decided."""
    wishes = [Wish(kind=WishKind.UNDO, decision_id=decision_id) for decision_id in undo or ()]
    if pin is not None:
        wishes.append(Wish(kind=WishKind.PIN_RUN, run_id=RunId(pin)))
    if reject_run is not None:
        wishes.append(Wish(kind=WishKind.REJECT_RUN, run_id=RunId(reject_run)))
    if symmetry is not None:
        wishes.append(Wish(kind=WishKind.SET_SYMMETRY, symmetry=symmetry.upper()))
    if mask_diameter_angstrom is not None:
        wishes.append(Wish(kind=WishKind.SET_MASK_DIAMETER, mask_diameter_angstrom=mask_diameter_angstrom))
    if score_threshold is not None:
        wishes.append(Wish(kind=WishKind.SET_SCORE_THRESHOLD, score_threshold=score_threshold))
    if exclude_time is not None:
        wishes.append(Wish(kind=WishKind.EXCLUDE_TIME, window=parse_window(*exclude_time)))
    if run:
        wishes.append(Wish(kind=WishKind.FORCE_RUN))
    if train_cryogem:
        wishes.append(Wish(kind=WishKind.TRAIN_CRYOGEM))
    if not (wishes or exclude or list_all):
        raise ConfigurationError("decide", "it is told what to decide, or --list (see --help)")
    document = decide_session(OutputLayout(out), wishes, conditions=exclude or (), reason=reason)
    if as_json:
        print_json(document)
    else:
        print_decisions(document, list_all=list_all)


def decide_session(
    layout: OutputLayout,
    wishes: Sequence[Wish],
    *,
    conditions: Sequence[str] = (),
    reason: str = "",
) -> dict[str, Any]:
    """Make the decisions known to the session and return what was decided so far and what is in force.

    A running service gets them through its inbox; without one they are committed here. Each is tried on a replay
    first, so that a mistake is an error before anything is written.
    """
    from stream.requests import event_for_request
    from stream.status import describe_wishes, load_controller

    controller = load_controller(layout.root)
    n_before = len(controller.wishes.history)
    requests: list[Request] = [WishRequest(wish=wish, reason=reason) for wish in wishes]
    for request in requests:
        controller.handle(event_for_request(request, controller, time.time()))
    if conditions:
        limits = tighten(controller.limits, conditions)
        requests.append(LimitsRequest(limits=limits, reason=reason))
        controller.handle(event_for_request(requests[-1], controller, time.time()))
    delivered = deliver(layout, requests) if requests else None
    return {
        "delivered": delivered,
        "made": [describe_decision(d, controller) for d in controller.wishes.history[n_before:]],
        "in_force": describe_wishes(controller) | {"limits": asdict(controller.limits)},
        "decisions": [describe_decision(d, controller) for d in controller.wishes.history],
    }


def tighten(limits: QualityLimits, conditions: Sequence[str]) -> dict[str, float | int | None]:
    """Return the limits that leave out what the conditions name, too; a condition like `ctf>6` names a figure in Å."""
    tightened = asdict(limits)
    for condition in conditions:
        found = _CONDITION.fullmatch(condition)
        name = _LIMITS.get((found["figure"], found["sign"])) if found else None
        value = _number(found["value"]) if found else None
        if name is None or value is None:
            raise ConfigurationError("--exclude", f"a condition is one of {_CONDITIONS}", condition)
        now = tightened[name]
        is_looser = now is not None and (value > now if name.startswith("max_") else value < now)
        if is_looser:
            rule = (
                f"the limit in force, {name} {now:g}, leaves these out already; icestream quality changes it"
            )
            raise ConfigurationError("--exclude", rule, condition)
        tightened[name] = value
    return tightened


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def parse_window(start: str, end: str) -> TimeWindow:
    """Return the time between two moments in ISO 8601; one without a zone is this machine's local time."""
    return TimeWindow(from_s=_moment(start), to_s=_moment(end))


def _moment(text: str) -> float:
    try:
        return datetime.fromisoformat(text).astimezone().timestamp()
    except ValueError as error:
        rule = "a time is written as 2026-03-01T14:00 or 2026-03-01T14:00:00+01:00"
        raise ConfigurationError("--exclude-time", rule, text) from error


def describe_decision(decision: PersonsDecision, controller: Controller) -> dict[str, Any]:
    """Return one decision, and whether it stands."""
    from stream.control.wishes import OverruleChange

    what = decision.what
    if isinstance(decision.content, OverruleChange) and not decision.undoes:
        record = controller.exposures.get(decision.content.exposure_id)
        what = f"{what} {decision.content.exposure_id if record is None else record.name}"
    undo = controller.wishes.find_undo_of(decision.decision_id) if decision.is_undone else None
    return {
        "id": decision.decision_id,
        "at": decision.at,
        "what": what,
        "reason": decision.reason,
        "taken_back_by": None if undo is None else undo.decision_id,
    }


def print_decisions(document: dict[str, Any], *, list_all: bool) -> None:
    """Print what was decided for a person on stdout."""
    console = Console(highlight=False, soft_wrap=True)
    for item in document["decisions" if list_all else "made"]:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(item["at"]))
        words = escape(f"{item['what']}: {item['reason'] or 'no reason given'}")
        taken = f" [yellow](taken back by {item['taken_back_by']})[/yellow]" if item["taken_back_by"] else ""
        console.print(f"{item['id']:<5} [dim]{when}[/dim] {words}{taken}")
    if list_all and not document["decisions"]:
        console.print("nobody has decided anything: the session decides by itself")
    said = {
        "service": "taken by the running service",
        "journal": "written to the journal; runs that follow from it start when the session runs again",
    }
    if document["delivered"] is not None:
        console.print(said[document["delivered"]])
