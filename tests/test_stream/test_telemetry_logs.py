from __future__ import annotations

import io
import json
import logging
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream.telemetry.logs import configure_logging, get_logger, redact


def lines(*, as_json: bool = False, secrets: tuple[str, ...] = (), level: str = "info") -> io.StringIO:
    stream = io.StringIO()
    configure_logging(stream=stream, as_json=as_json, secrets=secrets, level=level)
    return stream


def test_an_event_is_one_line_of_time_level_name_and_fields():
    stream = lines()
    get_logger("stream.app").info(
        "movie_aligned", movie="Foil Hole_1", seconds=3.25, picks=12, ctf=None, ok=True
    )
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z info stream\.app movie_aligned "
        r'movie="Foil Hole_1" seconds=3\.25 picks=12 ctf=null ok=true\n',
        stream.getvalue(),
    )


def test_json_lines_keep_types_and_put_fields_apart():
    stream = lines(as_json=True)
    get_logger("actors.rank").warning("batch_slow", event_like="x", seconds=1.5, bad=float("nan"), n=3)
    document = json.loads(stream.getvalue())
    assert document["event"] == "batch_slow"
    assert document["level"] == "warning"
    assert document["fields"] == {"event_like": "x", "seconds": 1.5, "bad": "nan", "n": 3}


def test_a_field_may_be_called_like_a_log_records_own_attribute():
    stream = lines()
    get_logger("stream.x").info("found", name="a.tiff", message="m", levelname="l")
    assert "name=a.tiff message=m levelname=l" in stream.getvalue()


def test_what_a_library_stamps_on_every_record_is_no_field():
    stream = lines()
    logging.getLogger("stream.x").warning("late", extra={"_stamp_of_a_library": 17, "movie": "a"})
    assert stream.getvalue().endswith(" stream.x late movie=a\n")


def test_levels_below_the_chosen_one_are_not_written():
    stream = lines(level="warning")
    log = get_logger("stream.x")
    log.debug("a")
    log.info("b")
    log.error("c")
    assert [line.split()[3] for line in stream.getvalue().splitlines()] == ["c"]


def test_configuring_again_replaces_the_handler():
    first, second = lines(), lines()
    get_logger("stream.x").info("once")
    assert first.getvalue() == ""
    assert second.getvalue().count("once") == 1


def test_an_error_shows_its_own_line_and_json_its_traceback():
    def fail() -> None:
        raise ValueError("box_size_px: 63, it is even")

    for as_json in (False, True):
        stream = lines(as_json=as_json)
        try:
            fail()
        except ValueError:
            get_logger("stream.x").exception("stage_failed", movie="a")
        text = stream.getvalue()
        assert text.count("\n") == 1
        assert "ValueError: box_size_px: 63, it is even" in text
        assert ("Traceback" in text) == as_json


def test_plain_logging_calls_pass_through_the_same_formatter():
    stream = lines()
    logging.getLogger("stream.ingest").warning("took %d files\nfrom token=abc123", 3)
    assert "took 3 files\\nfrom token=***" in stream.getvalue()


def refuse_login() -> None:
    raise ConnectionError("401 for hunter2-licence and password: abcdef123")


@pytest.mark.parametrize("as_json", [False, True])
def test_secrets_reach_no_line_wherever_they_hide(as_json: bool):
    stream = lines(as_json=as_json, secrets=("hunter2-licence",))
    log = get_logger("stream.x")
    log.info(
        "a",
        token="abcdef123",
        ray_auth_token="abcdef123",
        cryosparc_license_id="abcdef123",
        api_key="abcdef123",
    )
    log.info(
        "b",
        url="https://me:abcdef123@host/x",
        header="Authorization: Bearer abcdef123",
        env="TOKEN=abcdef123",
    )
    log.info("c hunter2-licence", note="it is hunter2-licence indeed")
    try:
        refuse_login()
    except ConnectionError:
        log.exception("d")
    text = stream.getvalue()
    assert "abcdef123" not in text
    assert "hunter2" not in text
    assert text.count("***") >= 9


def test_words_that_only_sound_like_secrets_stay():
    stream = lines()
    get_logger("stream.x").info(
        "a", n_tokens=5, monkey="b", path="/data/tokens/movie.tiff", accepted_keys="k"
    )
    assert "n_tokens=5 monkey=b path=/data/tokens/movie.tiff accepted_keys=k" in stream.getvalue()


@given(st.text(), st.text())
def test_any_field_stays_on_one_line_and_json_reads_back(value: str, other: str):
    stream = lines(as_json=True)
    get_logger("stream.x").info("a", value=value)
    text = stream.getvalue()
    assert len(text.split("\n")) == 2
    if redact(value) == value:
        assert json.loads(text)["fields"]["value"] == value
    stream = lines()
    get_logger("stream.x").info("a", value=value, other=other)
    assert stream.getvalue().count("\n") == 1


def test_fields_of_a_plain_logging_call_are_fields_too():
    stream = lines(as_json=True)
    logging.getLogger("actors.ranker").warning(
        "ranker_batch_halved", extra={"batch_size": 8, "api_token": "x"}
    )
    document = json.loads(stream.getvalue())
    assert document["event"] == "ranker_batch_halved"
    assert document["fields"] == {"batch_size": 8, "api_token": "***"}
