"""CryoGEM beside a live session: offered once, started by a person's word, kept out of the live stages' share, safe to kill."""

from __future__ import annotations

import json
import os
import sys
import textwrap
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from still_service import StillRuntime, StillSource
from story import found, make_settings, preprocessed, ranked, replay, run_result, tell
from typer.testing import CliRunner

from actors.cryogem.virtual_session import VirtualSessionSettings, write_virtual_session
from stream.app import Service, write_session
from stream.cli import app
from stream.config import CryogemChoice, SessionSettings
from stream.control.controller import Controller
from stream.control.training import TrainingDesk, TrainingPolicy
from stream.records.errors import ConfigurationError
from stream.records.events import Event, RunEnded, RunStarted, TrainingChanged
from stream.records.training import TrainingState
from stream.status import load_status, summarize
from stream.store.journal import Journal, read_journal
from stream.store.layout import OutputLayout
from stream.telemetry.metrics import Telemetry
from stream.training_job import CONFIG_FILE, PROGRAM, RESULT_FILE, TrainingRunner

PLACE = TrainingPolicy(min_micrographs=3, no_place=None)
TRAINING = """
    import json, os, sys, time
    from pathlib import Path
    out = Path(sys.argv[3])
    with (out / "starts").open("a") as stream:
        stream.write("started\\n")
    (out / "seen.json").write_text(json.dumps({"cores": sorted(os.sched_getaffinity(0)),
        "niceness": os.nice(0), "threads": os.environ["OMP_NUM_THREADS"], "gpus": os.environ["CUDA_VISIBLE_DEVICES"]}))
    for step in (0, 1, 4):
        print("2026-01-01 00:00:00,000 " + json.dumps({"step": step, "n_steps": 10}), file=sys.stderr, flush=True)
    deadline = time.monotonic() + 120.0  # a test that failed leaves nothing behind for long
    while not (out / "go").exists():
        if time.monotonic() > deadline:
            sys.exit("nobody said go")
        time.sleep(0.02)
    if (out / "fail").exists():
        print("step 5: losses nan, must be finite; lower the learning rate", file=sys.stderr)
        sys.exit(1)
    print(json.dumps({"checkpoint": str(out / "generator.safetensors")}))
"""


@pytest.fixture(autouse=True)
def two_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0, 1})


@pytest.fixture
def settings(tmp_path: Path) -> SessionSettings:
    return make_settings(
        tmp_path,
        cryogem={"cpus": 1, "min_micrographs": 3},
        policy={"rungs": [100], "final_min_particles": 50},
    )


def history(settings: SessionSettings, n_micrographs: int = 3) -> list[Event]:
    """Return a session's events: some micrographs, and the map that its first run gave."""
    controller = Controller(settings.controller_settings(n_preprocess_workers=1))
    committed: list[Event] = []
    for index in range(n_micrographs):
        for event in (found(f"m{index}"), preprocessed(f"m{index}"), ranked(f"m{index}")):
            committed += tell(controller, event)[1]
    run = next(event.request.run_id for event in committed if isinstance(event, RunStarted))
    return committed + tell(controller, RunEnded(at=5.0, result=run_result(run)))[1]


@pytest.fixture
def layout(settings: SessionSettings) -> OutputLayout:
    layout = OutputLayout(settings.out)
    with Journal(layout.journal) as journal:
        write_session(settings, layout)
        journal.append(history(settings))
    return layout


def open_service(
    settings: SessionSettings, layout: OutputLayout, tmp_path: Path, *, program: tuple[str, ...] = ()
) -> Service:
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(TRAINING))
    journal = Journal(layout.journal)
    controller, telemetry = (
        Controller(settings.controller_settings(n_preprocess_workers=1)),
        Telemetry("test"),
    )
    for event in journal.replay():
        controller.handle(event)
        telemetry.observe(event, replay=True)
    ticks = iter(range(100, 1_000_000))
    service = Service(
        settings,
        controller=controller,
        journal=journal,
        source=StillSource(),
        runtime=StillRuntime(),
        telemetry=telemetry,
        trainer=TrainingRunner(settings, program=program or (sys.executable, str(script))),
        clock=lambda: float(next(ticks)),
    )
    service.open()
    return service


def decide(layout: OutputLayout, *arguments: str) -> str:
    result = CliRunner().invoke(app, ["decide", str(layout.root), *arguments])
    return result.output if result.exception is None else str(result.exception)


def decide_while(service: Service, layout: OutputLayout, *arguments: str) -> None:
    """Decide as a person does while the service runs."""
    asker = threading.Thread(target=decide, args=(layout, *arguments))
    asker.start()
    while asker.is_alive():
        service.step(0.0)
        asker.join(0.01)


def step_until(service: Service, state: TrainingState, words: str = "", *, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        service.step(0.0)
        desk = service.controller.training
        if desk.state is state and words in desk.words:
            return
        time.sleep(0.01)
    raise AssertionError(f"{service.controller.training.state}: {service.controller.training.words}")


def trainings(layout: OutputLayout) -> list[tuple[str, str]]:
    events = read_journal(layout.journal)
    return [(e.state.value, e.words) for e in events if isinstance(e, TrainingChanged)]


# --- the offer ---------------------------------------------------------------------------------------------


def test_the_offer_takes_enough_good_micrographs_a_map_and_a_place():
    best = run_result("run001")
    assert TrainingDesk(TrainingPolicy()).propose(0.0, 500, best) == []
    assert TrainingDesk(PLACE).propose(0.0, 2, best) == []
    assert TrainingDesk(PLACE).propose(0.0, 3, None) == []
    (offer,) = TrainingDesk(PLACE).propose(7.0, 3, best)
    assert isinstance(offer, TrainingChanged)
    assert offer.state is TrainingState.OFFERED
    assert offer.words.startswith("3 good micrographs and a map (run001 at 8.0 Å)")
    assert "icestream decide OUT --train-cryogem" in offer.words


def test_a_session_offers_once_and_a_replay_offers_no_more(settings):
    events = history(settings)
    offers = [e for e in events if isinstance(e, TrainingChanged)]
    assert len(offers) == 1
    controller = replay(settings.controller_settings(n_preprocess_workers=1), events)
    assert tell(controller, found("late"))[1][1:] == []
    assert summarize(controller)["cryogem"]["state"] == "offered"
    assert ("CryoGEM offered", offers[0].words) in [(d.what, d.why) for d in controller.decisions]


@pytest.mark.parametrize(
    ("choice", "workers", "words"),
    [
        ({}, 1, "cryogem.cpus is 0"),
        ({"cpus": 1}, None, "preprocessing has every core"),
        ({"cpus": 1}, 2, "2 preprocessing workers and 1 cores for it are more than the 2 there are"),
        ({"cpus": 1}, 1, None),
    ],
)
def test_the_live_stages_cores_are_no_place_for_a_training(choice, workers, words):
    refusal = CryogemChoice(**choice).policy(workers).no_place
    assert refusal is None if words is None else words in (refusal or "")


def test_a_training_is_refused_with_the_reason(settings, layout):
    few = replace(PLACE, min_micrographs=100)
    assert TrainingDesk(few).find_refusal(99, run_result("r")) == (
        "it takes 100 good micrographs (cryogem.min_micrographs), there are 99"
    )
    assert TrainingDesk(PLACE).find_refusal(3, None) == "it takes an accepted map, there is none yet"
    without = settings.model_copy(update={"cryogem": CryogemChoice()})
    write_session(without, layout)
    assert "there is no place for it beside the live stages: cryogem.cpus is 0" in decide(
        layout, "--train-cryogem"
    )
    assert trainings(layout) == trainings(layout)[:1]


# --- the training ------------------------------------------------------------------------------------------


def test_an_accepted_training_runs_in_its_own_process_and_its_states_are_told(settings, layout, tmp_path):
    service = open_service(settings, layout, tmp_path)
    decide_while(service, layout, "--train-cryogem")
    step_until(service, TrainingState.RUNNING, "step 5 of 10")
    folder = layout.training("d1")
    seen = json.loads((folder / "seen.json").read_text())
    assert seen["threads"] == "1"
    assert seen["gpus"] == ""
    given = yaml.safe_load((folder / CONFIG_FILE).read_text())
    assert given == {
        "source": {"session": str(layout.root.absolute())},
        "cpus": 1,
        "training": {"device": "cpu"},
    }
    assert "one is running" in decide(layout, "--train-cryogem")
    (folder / "go").touch()
    step_until(service, TrainingState.DONE)
    service.close()
    assert json.loads((folder / RESULT_FILE).read_text())["checkpoint"].endswith("generator.safetensors")
    assert [state for state, _ in trainings(layout)] == ["offered", "running", "running", "done"]
    shown = CliRunner().invoke(app, ["status", str(layout.root)]).output
    assert "CryoGEM    done: the generator is in trainings/cryogem-d1" in shown
    assert load_status(layout.root)["cryogem"]["refusal"] is None


def test_a_training_is_nicer_than_the_stages_and_stays_on_its_core(settings, layout, tmp_path, monkeypatch):
    monkeypatch.undo()
    service = open_service(settings, layout, tmp_path)
    decide_while(service, layout, "--train-cryogem")
    step_until(service, TrainingState.RUNNING)
    process = service._trainer._process
    assert process is not None
    assert os.getpriority(os.PRIO_PROCESS, process.pid) >= 10
    assert len(os.sched_getaffinity(process.pid)) == 1
    service.close()
    assert process.returncode is not None


def test_a_failure_is_told_with_its_last_words_and_another_may_be_asked_for(settings, layout, tmp_path):
    service = open_service(settings, layout, tmp_path)
    folder = layout.training("d1")
    folder.mkdir(parents=True)
    (folder / "fail").touch()
    (folder / "go").touch()
    decide_while(service, layout, "--train-cryogem")
    step_until(service, TrainingState.FAILED, "lower the learning rate")
    decide_while(service, layout, "--train-cryogem")
    layout.training("d2").mkdir(exist_ok=True)
    (layout.training("d2") / "go").touch()
    step_until(service, TrainingState.DONE)
    service.close()


def test_taken_back_it_stops(settings, layout, tmp_path):
    service = open_service(settings, layout, tmp_path)
    decide_while(service, layout, "--train-cryogem")
    step_until(service, TrainingState.RUNNING)
    decide_while(service, layout, "--undo", "d1")
    step_until(service, TrainingState.STOPPED)
    assert service._trainer._process is None
    service.close()


def test_a_service_that_comes_back_goes_on_and_never_trains_twice_at_once(settings, layout, tmp_path):
    """The first service is killed: its training lives on, and is let end before another process takes its folder."""
    service = open_service(settings, layout, tmp_path)
    decide_while(service, layout, "--train-cryogem")
    step_until(service, TrainingState.RUNNING, "step 5")
    folder, orphan = layout.training("d1"), service._trainer._process
    assert orphan is not None
    service._trainer._process = None
    service.close()
    second = open_service(settings, layout, tmp_path)
    for _ in range(20):
        second.step(0.0)
    assert (folder / "starts").read_text().count("started") == 1
    (folder / "go").touch()
    assert orphan.wait(60) == 0
    step_until(second, TrainingState.DONE)
    second.close()
    assert (folder / "starts").read_text().count("started") == 2
    assert [state for state, _ in trainings(layout)][-1] == "done"


def test_a_session_of_a_person_who_never_asked_trains_nothing(settings, layout, tmp_path):
    service = open_service(settings, layout, tmp_path)
    for _ in range(5):
        service.step(0.0)
    service.close()
    assert not (layout.root / "trainings").exists()
    with pytest.raises(ConfigurationError):
        make_settings(tmp_path, cryogem={"cores": 1})


@pytest.mark.slow
def test_a_real_training_ends_with_a_generator(tmp_path, monkeypatch):
    """The process that a service starts trains on the session's own files and says where its generator is."""
    monkeypatch.undo()
    virtual = VirtualSessionSettings(
        n_micrographs=3,
        shape_yx_px=(192, 256),
        pixel_size_angstrom=6.0,
        structure="phantom:3:mass_kda=300",
        particles_per_micrograph=14.0,
    )
    layout = write_virtual_session(tmp_path / "out", virtual)
    diameter = yaml.safe_load(layout.session.read_text())["particle"]["diameter_angstrom"]
    sizes = {
        "source": {"session": "wherever", "short_side_px": 128},
        "networks": {"depth": 4, "generator_filters": 4, "discriminator_filters": 4, "nce_levels": [1, 2]},
        "training": {
            "n_simulated": 2,
            "crop_px": 64,
            "constant_epochs": 5,
            "decay_epochs": 0,
            "n_queries": 16,
        },
    }
    (tmp_path / "sizes.yaml").write_text(yaml.safe_dump(sizes))
    settings = make_settings(
        tmp_path,
        particle={"diameter_angstrom": diameter},
        cryogem={"cpus": 1, "min_micrographs": 3, "config": str(tmp_path / "sizes.yaml")},
        policy={"rungs": [100], "final_min_particles": 50},
    )
    with Journal(layout.journal) as journal:
        write_session(settings, layout)
        journal.append(history(settings))
    service = open_service(settings, layout, tmp_path, program=PROGRAM)
    decide_while(service, layout, "--train-cryogem")
    step_until(service, TrainingState.DONE, timeout_s=240.0)
    service.close()
    folder = layout.training("d1")
    document = json.loads((folder / RESULT_FILE).read_text())
    assert Path(document["checkpoint"]).parent == folder
    assert document["micrographs"] == 3
    assert ("running", "step 10 of 10") in trainings(layout)
