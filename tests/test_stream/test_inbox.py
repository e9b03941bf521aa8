"""The inbox: what a person asks for takes effect once, in order, whoever is killed when."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from story import found, preprocessed, ranked

from stream.control.controller import Controller
from stream.control.exposures import ExposureState
from stream.control.settings import ControllerSettings, RunPolicy
from stream.records.events import Event, ExposureOverruled, QualityLimitsChanged
from stream.requests import take_inbox
from stream.store.inbox import Inbox, LimitsRequest, OverruleRequest
from stream.store.journal import Journal


class Killed(Exception):  # noqa: N818 - an end, not an error
    """The process died here."""


class Session:
    """A journal with its controller, as a service holds them."""

    def __init__(self, folder: Path) -> None:
        self.journal = Journal(folder / "journal.sqlite")
        self.controller = Controller(ControllerSettings(runs=RunPolicy(enabled=False)))
        self.inbox = Inbox(folder / "inbox")
        for event in self.journal.replay():
            self.controller.handle(event)

    def commit(self, event: Event) -> None:
        self.journal.append([event])
        self.controller.handle(event)

    def take(self) -> None:
        take_inbox(self.inbox, self.controller, 9.0, self.commit)

    def limits_events(self) -> list[QualityLimitsChanged]:
        return [e for e in self.journal.replay() if isinstance(e, QualityLimitsChanged)]


@pytest.fixture
def session(tmp_path: Path) -> Session:
    session = Session(tmp_path)
    for event in (found("a"), preprocessed("a", 60), ranked("a", 60)):
        session.commit(event)
    return session


def kept(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []


def test_requests_are_taken_in_order_and_moved_to_done(session: Session, tmp_path: Path) -> None:
    names = [
        session.inbox.post(LimitsRequest(limits={"max_picks": 10})),
        session.inbox.post(LimitsRequest(limits={"max_picks": 100})),
        session.inbox.post(OverruleRequest(name="a", is_accepted=False, reason="drift")),
    ]
    assert [session.inbox.find_outcome(n) for n in names] == [None] * 3
    session.take()
    assert [e.limits.max_picks for e in session.limits_events()] == [10, 100]
    assert session.controller.exposures["a"].reason == "rejected by hand: drift"  # type: ignore[index]
    assert kept(tmp_path / "inbox" / "done") == sorted(names)
    assert [session.inbox.find_outcome(n) for n in names] == [""] * 3
    session.take()
    assert len(session.limits_events()) == 2


def test_a_service_killed_between_journal_and_move_does_not_do_it_twice(
    session: Session, tmp_path: Path
) -> None:
    name = session.inbox.post(LimitsRequest(limits={"max_picks": 10}))

    def commit_and_die(event: Event) -> None:
        session.commit(event)
        raise Killed

    with pytest.raises(Killed):
        take_inbox(session.inbox, session.controller, 9.0, commit_and_die)
    assert session.inbox.find_outcome(name) is None
    session.journal.close()
    again = Session(tmp_path)
    again.take()
    assert len(again.limits_events()) == 1
    assert again.inbox.find_outcome(name) == ""


def test_a_service_killed_before_the_journal_does_it_when_it_is_back(
    session: Session, tmp_path: Path
) -> None:
    session.inbox.post(OverruleRequest(name="a", is_accepted=False, reason="drift"))

    def die(event: Event) -> None:
        raise Killed

    with pytest.raises(Killed):
        take_inbox(session.inbox, session.controller, 9.0, die)
    session.journal.close()
    again = Session(tmp_path)
    again.take()
    assert again.controller.n_by_state[ExposureState.REJECTED] == 1


def test_the_same_words_written_again_are_another_request(session: Session) -> None:
    for limit in (10, 100, 10):
        session.inbox.post(LimitsRequest(limits={"max_picks": limit}))
        session.take()
    assert [e.limits.max_picks for e in session.limits_events()] == [10, 100, 10]


def test_a_file_of_the_same_name_and_content_is_another_request_too(session: Session, tmp_path: Path) -> None:
    (tmp_path / "inbox").mkdir()
    for limit in (10, 100, 10):
        (tmp_path / "inbox" / "limits.json").write_text(
            json.dumps({"type": "limits", "limits": {"max_picks": limit}})
        )
        session.take()
    assert [e.limits.max_picks for e in session.limits_events()] == [10, 100, 10]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "JSON"),
        (b"\xff\xfe", "JSON"),
        (b'{"type": "format_disk"}', "JSON of a kind"),
        (b'{"type": "limits", "limits": {}, "extra": 1}', "extra"),
        (b'{"type": "limits", "limits": {"max_ctf": 5}}', "unknown key quality.max_ctf"),
        (b'{"type": "limits", "limits": {"max_masked_fraction": 30}}', "not per cent"),
        (b'{"type": "limits", "limits": {"max_defocus_angstrom": 2.5}}', "not µm"),
        (b'{"type": "limits", "limits": {"max_ctf_fit_angstrom": "5"}}', "max_ctf_fit_angstrom|float"),
        (b'{"type": "limits", "limits": {"min_picks": 9, "max_picks": 3}}', "min_picks is at most max_picks"),
        (b'{"type": "overrule", "name": "b", "is_accepted": true}', "b: an exposure of this name"),
        (b'{"type": "overrule", "name": "a", "is_accepted": false}', "for a reason that is said"),
        (b'{"type": "overrule", "name": "a"}', "is_accepted"),
        (b" " * 70_000, "at most 65536 bytes"),
    ],
)
def test_what_is_no_request_is_refused_with_its_reason_and_changes_nothing(
    session: Session, tmp_path: Path, content: bytes, words: str
) -> None:
    inbox = tmp_path / "inbox"
    inbox.mkdir()
    (inbox / "0.json").write_bytes(content)
    n_before = len(list(session.journal.replay()))
    session.take()
    assert len(list(session.journal.replay())) == n_before
    assert kept(inbox) == ["refused"]
    assert kept(inbox / "refused") == ["0.json", "0.txt"]
    reason = session.inbox.find_outcome("0.json") or ""
    assert any(word in reason for word in words.split("|"))
    assert "\n" not in reason


def test_half_written_and_foreign_files_are_left_alone(session: Session, tmp_path: Path) -> None:
    inbox = tmp_path / "inbox"
    inbox.mkdir()
    for name in (".tmp-1-x.json", "notes.txt"):
        (inbox / name).write_text("{")
    session.take()
    assert kept(inbox) == [".tmp-1-x.json", "notes.txt"]


def test_a_file_that_cannot_be_moved_is_not_taken_again(session: Session, tmp_path: Path) -> None:
    session.inbox.post(LimitsRequest(limits={"max_picks": 10}))
    (tmp_path / "inbox" / "done").write_text("a file where the folder should be")
    session.take()
    session.take()
    assert len(session.limits_events()) == 1


def test_a_written_request_is_what_the_documentation_shows(session: Session, tmp_path: Path) -> None:
    name = session.inbox.post(OverruleRequest(name="a", is_accepted=None))
    document = json.loads((tmp_path / "inbox" / name).read_text())
    assert document == {"type": "overrule", "name": "a", "is_accepted": None, "reason": ""}
    session.take()
    events = [e for e in session.journal.replay() if isinstance(e, ExposureOverruled)]
    assert [e.is_accepted for e in events] == [None]
