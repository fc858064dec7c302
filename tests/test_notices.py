"""What the person at the machine is told: on a real session bus, on real terminals, and never at the price of the agent."""

import json
import os
import pty
import pwd
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from workstation import STICK, Workstation

from agent import checkup, notifying, voice
from agent.config import ConfigError, parse
from agent.core.notice import CALM_MS, KINDS, UPDATE_MS, Notice, Notices, of_event
from agent.notify import Notifier
from agent.pytest_plugin import Agent, Media
from tests.desktop import DBUS, Server, notice, reachable, session
from tests.house import LOGIN_UID, can_set_loginuid, until

UID = pwd.getpwnam("nobody").pw_uid  # dbus-daemon asks for an entry
ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: to become another user")


# -- what is said, and how often -------------------------------------------------------------------------------------------


class Warned(Workstation):
    def __init__(self, **more: Any) -> None:
        self.notices: list[Notice] = []
        super().__init__(**more)
        feed = self.core.feed

        def hear(fact: Any) -> Any:
            made = feed(fact)
            self.notices += [each for event in made if (each := of_event(event)) is not None]
            return made

        self.core.feed = hear  # type: ignore[method-assign]


def test_a_copy_to_an_unapproved_medium_is_said_to_who_did_it() -> None:
    ws = Warned().login("sato")
    ws.approve(STICK, until_ms=ws.now - 1).plug().copy("customers/a.csv")
    kinds = [(each.kind, each.uid, each.decision) for each in ws.notices]
    assert kinds == [("unapproved", 1000, "expired"), ("copied", 1000, "expired"), ("unapproved", 1000, "expired")]
    assert ws.notices[1].medium == "Kingston DataTraveler 3.0 (60A44C…)" and ws.notices[1].tty == "tty2"


def test_an_approved_medium_needs_no_words() -> None:
    ws = Warned().login("sato")
    ws.approve(STICK).plug().copy("customers/a.csv")
    assert not ws.notices


def test_nobody_is_told_what_a_service_did() -> None:
    ws = Warned()
    ws.approve(STICK, until_ms=ws.now - 1).plug().copy("customers/a.csv")
    assert not ws.notices, "no login uid, no person"


def test_a_storm_is_one_notice_that_grows() -> None:
    notices, said = Notices(), []
    for number in range(1_000):
        at_ms = 1_000 + number * 10
        due = notices.add(notice(at_ms=at_ms))
        said += [due.notice] if due else []
        said += [each.notice for each in notices.due(at_ms)]
    said += [each.notice for each in notices.due(11_000 + UPDATE_MS)]
    assert len(said) <= 2 + 10_000 // UPDATE_MS
    assert said[0].count == 1 and not said[0].replaces
    assert said[-1].count == 1_000 and all(each.replaces for each in said[1:])
    assert not notices.due(99_000)
    again = notices.add(notice(at_ms=11_000 + CALM_MS))
    assert again is not None and again.notice.count == 1 and not again.notice.replaces


@given(st.lists(st.tuples(st.integers(0, 9_000), st.integers(0, 300), st.sampled_from(KINDS)), max_size=600))
def test_nothing_is_lost_however_they_come(many: list[tuple[int, int, Any]]) -> None:
    notices, last, now_ms = Notices(), dict[Any, int](), 0
    for gap, medium, kind in many:
        now_ms += gap
        about = {"at_ms": now_ms, "kind": kind, "key": str(medium % 5)}
        for due in [*notices.due(now_ms), *filter(None, [notices.add(notice(**about))])]:
            last[due.about] = due.notice.count
    for due in notices.due(now_ms + UPDATE_MS):
        last[due.about] = due.notice.count
    for (_, kind, key), count in last.items():
        assert 1 <= count <= sum(1 for _, medium, each in many if (each, str(medium % 5)) == (kind, key))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lang", ["en", "ja"])
def test_every_kind_has_words_in_both_languages(kind: Any, lang: Any) -> None:
    title, lines = voice.spoken(notice(kind=kind, limit="burst"), lang, "情報システム部 内線 1234", "https://x/ask")
    assert title and lines and "情報システム部 内線 1234" in lines[-1] + lines[-2]
    assert not any("{" in line for line in (title, *lines))
    assert voice.spoken(notice(kind=kind), "en", "", "") != voice.spoken(notice(kind=kind), "ja", "", "")


def test_the_link_carries_the_medium_and_no_more() -> None:
    link = voice.approval_link("https://x/ask?m={medium}&h={machine}", "https://c", notice(key='usb:a&b="\n'), "ws 1")
    assert link == "https://x/ask?m=usb%3Aa%26b%3D%22%0A&h=ws%201"
    assert voice.approval_link("", "https://c:8443", notice(), "ws") == "https://c:8443"


def test_a_link_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="must begin with https"):
        parse('[agent.warn]\napproval_url = "javascript:alert(1)"\n')


# -- the person's desktop --------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    return reachable(folder)


@pytest.fixture
def notifier(run: Path, tmp_path: Path) -> Iterator[Notifier]:
    made = Notifier("情報システム部 <1234>", "", "https://collector:8443", "ws-042", run=str(run), dev="/dev")
    yield made
    made.close()


def outcome(notifier: Notifier, count: int = 1, within_s: float = 20.0) -> dict[str, Any]:
    """Wait until so many notices came to an end."""

    def ended() -> bool:
        notifier.step(time.time_ns() // 1_000_000)
        return sum(notifier.status()[name] for name in ("desktop", "terminal", "nobody")) >= count

    until(ended, lambda: str(notifier.status()), within_s)
    return notifier.status()


@ROOT
@DBUS
def test_a_notification_is_shown_on_the_persons_desktop(notifier: Notifier, run: Path) -> None:
    with session(run, UID) as address:
        server = Server(address, UID)
        notifier.tell(notice())
        assert outcome(notifier)["desktop"] == 1
        ((_, replaces, title, body, urgency),) = server.shown
        assert (replaces, title, urgency) == (0, "Protected files went onto an unapproved medium", 2)
        assert "Kingston DataTraveler 3.0" in body and "https://collector:8443" in body
        assert "&lt;1234&gt;" in body, "what looks like markup is escaped"
        server.close()


@ROOT
@DBUS
def test_a_storm_replaces_what_it_said_before(notifier: Notifier, run: Path) -> None:
    with session(run, UID) as address:
        server = Server(address, UID)
        for number in range(1_000):
            notifier.tell(notice(at_ms=1_000 + number))
        outcome(notifier)
        notifier.step(1_000 + 1_000 + UPDATE_MS)
        outcome(notifier, 2)
        first, second = server.shown
        assert (first[:2], second[:2]) == ([1, 0], [1, 1])
        assert "1000 protected files" in second[3]
        server.close()


@ROOT
@DBUS
@pytest.mark.parametrize("manner", ["silent", "nonsense", "refuses"])
def test_a_hostile_desktop_costs_the_agent_nothing(notifier: Notifier, run: Path, manner: str) -> None:
    with session(run, UID) as address:
        server = Server(address, UID, manner)
        began = time.monotonic()
        notifier.tell(notice())
        assert time.monotonic() - began < 1.0, "nobody waits for it"
        status = outcome(notifier)
        assert status["nobody"] == 1 and status["last_why"].isprintable() and len(status["last_why"]) <= 200
        server.close()


@ROOT
@DBUS
def test_whose_desktop_hangs_is_told_on_the_terminal(notifier: Notifier, run: Path, terminal: tuple[int, str]) -> None:
    with session(run, UID) as address:
        server = Server(address, UID, "silent")
        notifier.tell(notice(tty=terminal[1]))
        assert outcome(notifier)["terminal"] == 1 and "Kingston" in read(terminal[0])
        server.close()


@ROOT
def test_a_bus_that_floods_or_never_speaks_is_given_up(notifier: Notifier, run: Path) -> None:
    home = run / "user" / str(UID)
    home.mkdir(parents=True)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(home / "bus"))
    (home / "bus").chmod(0o777)
    listener.listen()
    stop = threading.Event()

    def flood() -> None:
        peer, _ = listener.accept()
        with peer:
            while not stop.is_set():
                try:
                    peer.sendall(b"OK " + b"f" * 60_000 + b"\r\n" + b"l\x02\0\1\xff\xff\xff\x07" * 4_000)
                except OSError:
                    return

    thread = threading.Thread(target=flood, daemon=True)
    thread.start()
    notifier.tell(notice())
    assert outcome(notifier)["nobody"] == 1
    stop.set()
    thread.join(10)
    notifier.tell(notice(kind="limit"))
    assert outcome(notifier, 2)["nobody"] == 2, "the second time it does not even answer"
    listener.close()


@ROOT
def test_a_stopped_teller_holds_up_nobody_and_is_ended(notifier: Notifier, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.notify._PATIENCE_S", 0.5)
    notifier.tell(notice())
    (pid,) = notifier.pids
    os.kill(pid, signal.SIGSTOP)
    notifier.tell(notice(kind="limit", limit="burst"))
    assert notifier.pids == [pid], "one at a time for one person"
    status = outcome(notifier)
    assert status["last_why"] == "it took too long"
    outcome(notifier, 2)


@ROOT
@DBUS
def test_the_teller_is_the_person_and_nobody_more(run: Path) -> None:
    code = (
        "import json, os, sys; sys.path.insert(0, sys.argv[1]); from agent import notifying\n"
        "os.setgroups([0, 4])\nnotifying.become(int(sys.argv[2]))\n"
        "print(json.dumps([os.getresuid(), os.getresgid(), os.getgroups(), open('/proc/self/status').read()]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(Path(voice.__file__).parent.parent), str(UID)],
        capture_output=True,
        text=True,
        check=True,
    )
    uids, gids, groups, status = json.loads(done.stdout)
    assert (uids, gids, groups) == ([UID] * 3, [65534] * 3, [])
    assert "CapEff:\t0000000000000000" in status and "CapPrm:\t0000000000000000" in status


# -- terminals -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def terminal() -> Iterator[tuple[int, str]]:
    """A terminal that belongs to the person: (our end of it, its name)."""
    ours, theirs = pty.openpty()
    name = os.ttyname(theirs)
    os.chown(name, UID, -1)
    yield ours, name.removeprefix("/dev/")
    os.close(ours)
    os.close(theirs)


def read(ours: int) -> str:
    ready, _, _ = select.select([ours], [], [], 0.2)
    return os.read(ours, 65536).decode() if ready else ""


@ROOT
def test_who_has_no_desktop_is_told_on_the_terminal(notifier: Notifier, terminal: tuple[int, str]) -> None:
    ours, name = terminal
    notifier.tell(notice(tty=name))
    assert outcome(notifier)["terminal"] == 1
    said = read(ours)
    assert "Sekisho: Protected files went onto an unapproved medium" in said and "Kingston" in said


@ROOT
def test_sessions_and_utmp_say_where_the_person_is(notifier: Notifier, run: Path, terminal: tuple[int, str]) -> None:
    ours, name = terminal
    sessions = run / "systemd" / "sessions"
    sessions.mkdir(parents=True)
    (sessions / "7").write_text(f"UID={UID}\nTTY={name}\nACTIVE=1\n")
    (sessions / "8").write_text("UID=0\nTTY=../../etc/passwd\n")
    notifier.tell(notice())
    assert outcome(notifier)["terminal"] == 1 and "Kingston" in read(ours)
    (sessions / "7").unlink()
    fields = (7, 1, name.encode(), b"", b"sato", b"", 0, 0, 0, 0, 0, b"")
    (run / "utmp").write_bytes(notifying._UTMP.pack(*fields))
    assert notifying._UTMP.size == 384
    notifier.tell(notice(kind="limit"))
    assert outcome(notifier, 2)["terminal"] == 2


@ROOT
def test_nobody_elses_terminal_is_written_to(notifier: Notifier, terminal: tuple[int, str], tmp_path: Path) -> None:
    ours, name = terminal
    os.chown(f"/dev/{name}", 0, -1)
    os.chmod(f"/dev/{name}", 0o666)
    notifier.tell(notice(tty=name))
    assert outcome(notifier)["nobody"] == 1 and not read(ours)


@ROOT
@pytest.mark.parametrize("name", ["null", "../tmp/x", "/etc/passwd", "zero", ""])
def test_what_is_no_terminal_is_not_written_to(notifier: Notifier, name: str) -> None:
    notifier.tell(notice(tty=name))
    assert outcome(notifier)["nobody"] == 1


@ROOT
def test_a_terminal_that_was_stopped_holds_up_nobody(notifier: Notifier, terminal: tuple[int, str]) -> None:
    _, name = terminal
    writer = os.open(f"/dev/{name}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        while os.write(writer, b"x"):
            continue
    except BlockingIOError:
        pass
    finally:
        os.close(writer)
    notifier.tell(notice(tty=name))
    assert outcome(notifier)["nobody"] == 1


@ROOT
def test_the_persons_own_programs_say_the_language(tmp_path: Path) -> None:
    sleeper = subprocess.Popen(["sleep", "60"], user=UID, env={"LANG": "ja_JP.UTF-8", "DISPLAY": ":0"})
    try:
        until(lambda: b"sleep" in Path(f"/proc/{sleeper.pid}/cmdline").read_bytes(), "sleep does not start")
        assert notifying.language(UID) == "ja"
    finally:
        sleeper.kill()
        sleeper.wait()


@pytest.mark.parametrize(
    ("environ", "lang"),
    [
        ({"LANG": "ja_JP.UTF-8"}, "ja"),
        ({"LANG": "ja_JP.UTF-8", "LC_ALL": "C"}, "en"),
        ({"LANGUAGE": "ja:en", "LANG": "C"}, "ja"),
        ({}, "en"),
    ],
)
def test_a_locale_is_read_as_others_read_it(environ: dict[str, str], lang: str) -> None:
    assert notifying._spoken(notifying._locale(environ)) == lang


@ROOT
@DBUS
@pytest.mark.skipif(not (shutil.which("dunst") and shutil.which("Xvfb")), reason="needs dunst and Xvfb")
def test_a_desktops_own_server_shows_it(notifier: Notifier, run: Path) -> None:
    """dunst, as desktops run it: on an X server, found over the bus."""
    with session(run, UID) as address:
        read_end, write_end = os.pipe()
        screen = subprocess.Popen(
            ["Xvfb", "-displayfd", str(write_end), "-ac", "-nolisten", "tcp"],
            pass_fds=[write_end],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(write_end)
        with open(read_end) as ready:
            display = ready.readline().strip()
        env = {
            "DISPLAY": f":{display}",
            "DBUS_SESSION_BUS_ADDRESS": address,
            "HOME": "/nonexistent",
            "PATH": os.environ["PATH"],
        }
        server = subprocess.Popen(["dunst"], env=env, user=UID, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            ask = [
                "dbus-send",
                f"--bus={address}",
                "--print-reply",
                "--dest=org.freedesktop.Notifications",
                "/org/freedesktop/Notifications",
                "org.freedesktop.Notifications.GetServerInformation",
            ]
            until(
                lambda: subprocess.run(ask, capture_output=True, check=False, user=UID).returncode == 0, "dunst does not start"
            )
            notifier.tell(notice(medium="<b>bad</b> & \x1b[31m"))
            assert outcome(notifier)["desktop"] == 1
        finally:
            for each in (server, screen):
                each.kill()
                each.wait()


# -- the whole agent -------------------------------------------------------------------------------------------------------


@ROOT
@pytest.mark.skipif(not can_set_loginuid(), reason="needs a login uid: /proc/self/loginuid can't be set here")
def test_a_person_who_copies_to_a_medium_is_told_by_the_agent(tmp_path: Path, sekisho_media: Media) -> None:
    """Mode warn: the copy goes on, and its doer is told, here on the terminal; `status` says so."""
    limit = '[[agent.limit]]\nname = "three"\nbytes = "100KiB"\nwindow = "10m"\n'
    agent = Agent(tmp_path, sekisho_media, f'[agent.warn]\ncontact = "1234"\n{limit}')
    agent.config_file.write_text(agent.config_file.read_text().replace("[agent]\n", '[agent]\nmode = "warn"\n', 1))
    (agent.protected / "list.csv").write_text("some names\n" * 4_000)
    ours_end, theirs = pty.openpty()
    os.chown(os.ttyname(theirs), LOGIN_UID, -1)
    agent.start()
    stick = sekisho_media.plug("stick1")
    copies = f"for n in 0 1 2 3; do cp {agent.protected}/list.csv {stick.path}/$n.csv; done"
    shell = at_terminal(theirs, "bash", "-c", f"{copies}; exec setpriv --reuid={LOGIN_UID} --clear-groups sleep 60")
    try:
        agent.wait_for("copy.three")
        until(lambda: agent.status()["notices"]["terminal"], lambda: str(agent.status()["notices"]))
        said = read(ours_end)
        assert "“three”" in said and "Ask: 1234" in said
        printed = "\n".join(checkup.lines(agent.status(), "en", lambda text, tone: text))
        assert "1 on terminals" in printed
    finally:
        agent.stop()
        shell.kill()
        shell.wait()
        os.close(ours_end)
        os.close(theirs)


def at_terminal(terminal: int, *command: str | Path) -> subprocess.Popen[bytes]:
    """A program of somebody who logged in at a terminal."""

    def login() -> None:
        Path("/proc/self/loginuid").write_text(str(LOGIN_UID))
        os.setsid()
        import fcntl
        import termios

        fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)

    return subprocess.Popen(command, preexec_fn=login, pass_fds=[terminal])
