"""Who sits at the machine, as logind's files say it: a seat, a person without one, several, nobody."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from agent.core.facts import Session
from agent.sense.sessions import Sessions

ROOTS = "UID=0\nUSER=root\nACTIVE=1\nCLASS=user\n"


def logged_in(run: Path, session: str, said: str) -> None:
    (run / "sessions").mkdir(exist_ok=True)
    (run / "sessions" / session).write_text(f"# This is private data. Do not parse.\n{said}")


def told(run: Path) -> list[tuple[int | None, str]]:
    return [(fact.uid, fact.session) for fact in Sessions(run).drain(1) if isinstance(fact, Session)]


@contextmanager
def within(seconds: int) -> Iterator[None]:
    def late(*_: object) -> None:
        pytest.fail(f"it waited for more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_while_somebody_is_logged_in_nobody_waits_for_the_pipe_beside_the_session(tmp_path: Path) -> None:
    logged_in(tmp_path, "5", ROOTS)
    os.mkfifo(tmp_path / "sessions" / "5.ref")
    kept_open = os.open(tmp_path / "sessions" / "5.ref", os.O_RDWR)  # as login(1) keeps it until logout
    try:
        with within(5):
            assert told(tmp_path) == [(0, "5")]
    finally:
        os.close(kept_open)


def test_the_person_at_the_seat_is_named_and_one_from_afar_is_not(tmp_path: Path) -> None:
    logged_in(tmp_path, "1", ROOTS)
    logged_in(tmp_path, "2", ROOTS + "REMOTE=1\n")
    (tmp_path / "seats").mkdir()
    (tmp_path / "seats" / "seat0").write_text("ACTIVE=1\n")
    assert told(tmp_path) == [(0, "1")]
    (tmp_path / "seats" / "seat0").write_text("ACTIVE=2\n")
    assert told(tmp_path) == [(None, "")]


def test_of_two_people_without_a_seat_nobody_is_named(tmp_path: Path) -> None:
    logged_in(tmp_path, "1", ROOTS)
    logged_in(tmp_path, "2", ROOTS.replace("UID=0", "UID=1001"))
    assert told(tmp_path) == [(None, "")]
