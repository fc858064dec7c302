"""sekisho-collector as people use it: what it prints, where, and with which exit code."""

import json
import os
import re
import signal
import string
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.pytest_plugin import _environment
from server_stub import commands, config, query, words
from server_stub.collector import load_key
from tests.collector_client import Client, copied, draft
from tests.house import Collector, until


@pytest.fixture
def collector(tmp_path: Path, store_kind: str) -> Iterator[Collector]:
    made = Collector(tmp_path)
    made.start()
    yield made
    made.stop()


def run(collector: Collector | None, *args: str, code: int = 0, stdin: str = "", **environment: str) -> tuple[str, str]:
    named = ["-c", str(collector.config_file)] if collector else []
    command = [sys.executable, "-m", "server_stub.cli", *args, *named]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        input=stdin,
        env={**_environment(), "LANG": "C.UTF-8", **environment},
        timeout=60,
    )
    assert done.returncode == code, f"{args}: {done.returncode}\n{done.stdout}{done.stderr}"
    assert "Traceback" not in done.stderr
    return done.stdout, done.stderr


def fill(collector: Collector) -> Client:
    agent = Client(collector.port, "ws-042")
    agent.enrol()
    for number, user in enumerate(("sato", "sato", "ito")):
        agent.append(
            draft(
                agent=agent.id, name="ws-042", at=1_402_300_800_000 + number * 1000, **copied(f"2014-0{number}.csv", user=user)
            )
        )
    agent.append(draft("medium.attached", agent=agent.id, name="ws-042", medium=copied("")["medium"]))
    assert agent.send()[0] == 200
    return agent


def test_the_same_answers_served_and_not(collector: Collector) -> None:
    fill(collector)
    commands = [
        ("tail", "-n", "3"),
        ("tail", "-o", "json", "-p", "low"),
        ("tail", "-o", "cat", "--user", "ito"),
        ("query", "-o", "csv"),
        ("query", "-o", "table", "--since", "2014-06-01", "--until", "2014-07-01"),
        ("query", "--group-by", "user", "--event", "file.*"),
        ("query", "--group-by", "day", "-o", "json"),
        ("media", "list"),
        ("token", "list"),
        ("agents",),
    ]
    run(
        collector,
        "media",
        "approve",
        "usb:1",
        "--owner",
        "sato",
        "--approver",
        "mori",
        "--purpose",
        "p",
        "--until",
        "2099-12-31",
    )
    served = [run(collector, *command)[0] for command in commands]
    collector.stop()
    unserved = [run(collector, *command)[0] for command in commands]
    assert served == unserved
    tail, as_json, cat, as_csv, _, counted, _, media, _, agents = served
    assert "customers/2014-02.csv → Kingston DataTraveler 3.0 (60A44C…) 4.2 MB by cp, unapproved" in tail
    assert len([json.loads(line) for line in as_json.splitlines()]) == 3
    assert cat.splitlines() == ["customers/2014-02.csv → Kingston DataTraveler 3.0 (60A44C…) 4.2 MB by cp, unapproved"]
    assert as_csv.splitlines()[0].startswith("time,severity,machine,user,event")
    assert [line.split() for line in counted.splitlines()] == [
        ["USER", "EVENTS", "BYTES"],
        ["sato", "2", "8.4", "MB"],
        ["ito", "1", "4.2", "MB"],
    ]
    assert "usb:1" in media and "2099-12-31" in media
    assert "ws-042" in agents
    collector.start()


def test_a_follower_outlives_the_collector_and_ends_quietly(collector: Collector) -> None:
    agent = Client(collector.port, "ws-1")
    agent.enrol()
    agent.append_some(6)
    agent.send(1, 2)
    command = [sys.executable, "-m", "server_stub.cli", "tail", "-f", "-n", "1", "-o", "json", "-c", str(collector.config_file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=_environment()) as tail:
        lines: list[int] = []
        talk: list[str] = []
        assert tail.stdout and tail.stderr

        def read() -> None:
            assert tail.stdout
            for line in tail.stdout:
                lines.append(json.loads(line)["metadata"]["sequence"])

        readers = [threading.Thread(target=read), threading.Thread(target=lambda: talk.extend(tail.stderr or ()))]
        for reader in readers:
            reader.start()
        until(lambda: lines == [2], lambda: f"{lines}")
        agent.send(3, 3)
        until(lambda: lines == [2, 3], lambda: f"{lines}")
        collector.stop(signal.SIGKILL)
        collector.start()
        agent.send(4, 4)
        until(lambda: lines == [2, 3, 4], lambda: f"{lines} {talk}")
        collector.stop()
        until(lambda: sum("waiting" in line for line in talk) >= 2, lambda: f"{talk}")
        collector.start()
        agent.send(5, 6)
        until(lambda: lines == [2, 3, 4, 5, 6], lambda: f"{lines} {talk}")
        tail.send_signal(signal.SIGINT)
        assert tail.wait(10) == 0
        for reader in readers:
            reader.join()
    assert not any("Traceback" in line for line in talk)


def test_a_follower_without_a_collector_begins_with_what_is_stored(collector: Collector) -> None:
    agent = Client(collector.port, "ws-1")
    agent.enrol()
    agent.append_some(5)
    agent.send(1, 4)
    collector.stop()
    command = [sys.executable, "-m", "server_stub.cli", "tail", "-f", "-n", "3", "-o", "json", "-c", str(collector.config_file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=_environment()) as tail:
        lines: list[int] = []
        talk: list[str] = []

        def read() -> None:
            assert tail.stdout
            lines.extend(json.loads(line)["metadata"]["sequence"] for line in tail.stdout)

        readers = [threading.Thread(target=read), threading.Thread(target=lambda: talk.extend(tail.stderr or ()))]
        for reader in readers:
            reader.start()
        until(lambda: lines == [2, 3, 4] and talk, lambda: f"{lines} {talk}")
        assert talk[0].endswith("no collector is served here; waiting for it to come back\n")
        collector.start()
        agent.send(5, 5)
        until(lambda: lines == [2, 3, 4, 5], lambda: f"{lines} {talk}")
        tail.send_signal(signal.SIGINT)
        assert tail.wait(10) == 0
        for reader in readers:
            reader.join()
    assert len(talk) == 1


def test_a_follower_whose_token_is_revoked_is_told_so(collector: Collector) -> None:
    token = collector.run("token", "create", "--role", "viewer", "--note", "leaver").strip()
    named = ["--url", collector.url, "--token", token]
    command = [sys.executable, "-m", "server_stub.cli", "tail", "-f", *named]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=_environment()) as tail:
        until(lambda: b"sekisho_tail_readers 1" in metrics(collector), "the reader does not arrive")
        rows = [json.loads(line) for line in run(collector, "token", "list", "--json")[0].splitlines()]
        run(collector, "token", "revoke", next(row["id"] for row in rows if row["note"] == "leaver"))
        began = time.monotonic()
        _, error = tail.communicate(timeout=30)
        assert time.monotonic() - began < 20
        assert tail.returncode == 1 and "this token is not known here" in error


def test_tables_speak_the_language_of_their_reader(collector: Collector) -> None:
    agent = fill(collector)
    agent.append(
        draft(
            "agent.sensors",
            agent=agent.id,
            name="ws-042",
            detail={"sensor": "inotify", "ok": False, "blind": ["process", "login_user"]},
        )
    )
    assert agent.send(len(agent.lines))[0] == 200
    tables = [("agents",), ("token", "list"), ("media", "list"), ("query", "-o", "table"), ("query", "--group-by", "user")]
    english = [run(collector, *command)[0] for command in tables]
    japanese = [run(collector, *command, LC_ALL="ja_JP.UTF-8")[0] for command in tables]
    for one, other in zip(english, japanese, strict=True):
        heads, others = one.splitlines()[0], other.splitlines()[0]
        assert heads.isascii() and not others.isascii()
    assert "which person, which program" in english[0] and "blind" in english[0]
    assert "操作した人、操作したプログラム" in japanese[0] and "死角あり" in japanese[0]
    assert run(collector, "query", "-o", "csv", LC_ALL="ja_JP.UTF-8")[0].splitlines()[0].startswith("time,severity")


def test_both_languages_have_every_word_with_the_same_pieces() -> None:
    for key, (english, japanese) in words.WORDS.items():
        pieces = [
            [name for _, name, _, _ in string.Formatter().parse(text) if name is not None] for text in (english, japanese)
        ]
        assert english and japanese and sorted(pieces[0]) == sorted(pieces[1]), key
    assert {*commands.HEADS, *query.FIELDS} <= words.WORDS.keys()


def test_a_stop_is_quick_and_clean_even_with_readers(collector: Collector) -> None:
    command = [sys.executable, "-m", "server_stub.cli", "tail", "-f", "-c", str(collector.config_file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=_environment()) as tail:
        until(lambda: b"sekisho_tail_readers 1" in metrics(collector), "the reader does not arrive")
        began = time.monotonic()
        assert collector.stop() == 0
        assert time.monotonic() - began < 5
        tail.send_signal(signal.SIGINT)
        tail.communicate(timeout=10)
    assert not (collector.state_dir / "collector.sock").exists()
    assert collector.log.read_text().count("Traceback") == 0
    collector.start()


def metrics(collector: Collector) -> bytes:
    import urllib.request

    with urllib.request.urlopen(collector.url + "/metrics", timeout=5) as answer:
        return bytes(answer.read())


def test_over_the_network_a_token_is_needed_and_enough(collector: Collector) -> None:
    fill(collector)
    token = collector.run("token", "create", "--role", "viewer").strip()
    elsewhere = {"SEKISHO_URL": collector.url, "SEKISHO_TOKEN": token}
    assert "2014-00.csv" in run(None, "tail", **elsewhere)[0]
    assert "2014-00.csv" in run(None, "query", "--url", collector.url, "--token", token)[0]
    _, error = run(None, "tail", "--url", collector.url, code=1, SEKISHO_TOKEN="")
    assert "token" in error and len(error.splitlines()) == 1
    _, error = run(None, "media", "revoke", "usb:1", "--reason", "x", code=1, **elsewhere)
    assert '"viewer" may not' in error
    _, error = run(None, "tail", "-f", code=1, **{**elsewhere, "SEKISHO_TOKEN": "wrong"})
    assert "not known" in error
    listed = [json.loads(line) for line in run(collector, "token", "list", "--json")[0].splitlines()]
    run(collector, "token", "revoke", listed[-1]["id"])
    assert "not known" in run(None, "tail", code=1, **elsewhere)[1]
    _, error = run(None, "tail", "--url", "http://collector.example:8443", "--token", token, code=1)
    assert "https://" in error


def test_mistakes_are_one_sentence(collector: Collector, tmp_path: Path) -> None:
    for args, said in (
        (("tail", "-p", "urgent"), "is no severity"),
        (("query", "--since", "soon"), "is no time"),
        (("tail", "-n", "-1"), "-n must be"),
        (("token", "create", "--role", "admin", "--uses", "3"), "--uses is for --enroll"),
        (("media", "approve", "--owner", "a", "--approver", "b", "--purpose", "c", "--until", "never"), "KEY"),
    ):
        error = run(collector, *args, code=2)[1]
        assert said in error and len(error.splitlines()) == 1
    for args, said in (
        (("media", "revoke", "nothing", "--reason", "x"), "no medium"),
        (
            ("media", "approve", "k", "--owner", "a", "--approver", "b", "--purpose", "c", "--until", "2001-01-01"),
            "end before it begins",
        ),
        (("token", "revoke", "nothing"), "no token"),
        (("media", "import", "/nowhere"), "can't be read"),
    ):
        error = run(collector, *args, code=1)[1]
        assert said in error and len(error.splitlines()) == 1
    wrong = tmp_path / "wrong.toml"
    wrong.write_text("[collector]\nlissten = 3\n")
    error = run(None, "tail", "-c", str(wrong), code=2)[1]
    assert re.search(r'wrong.toml:2: unknown key "lissten" .*did you mean "listen"', error)


def test_times_ago_are_no_options(collector: Collector) -> None:
    agent = fill(collector)
    agent.append(draft(agent=agent.id, name="ws-042", **copied("now.csv")))
    assert agent.send(len(agent.lines))[0] == 200
    for since in (("--since", "-30d"), ("--since=-30d",), ("-S", "-1h"), ("-S-1h",), ("--sin", "-1h")):
        assert "now.csv" in run(collector, "query", "--user", "sato", *since)[0]
        assert "2014-00.csv" not in run(collector, "query", "--user", "sato", *since)[0]
    for until_then in (("--until", "-1h"), ("-U", "-1h")):
        assert "2014-00.csv" in run(collector, "tail", *until_then)[0]
        assert "now.csv" not in run(collector, "tail", *until_then)[0]
    assert "2014-00.csv" in run(collector, "query", "--since", "1970-01-01")[0]
    assert "-1h" not in run(collector, "query", "-g", "now", "--until", "-1h")[0]
    assert "expired already" in run(collector, "token", "create", "--role", "viewer", "--until", "-1h", code=1)[1]
    run(collector, "token", "create", "--role", "viewer", "--until", "-x", code=2)


def test_lists_as_json_both_ways(collector: Collector) -> None:
    fill(collector)
    run(collector, "media", "approve", "k", "--owner", "a", "--approver", "b", "--purpose", "c", "--until", "never")
    for listing in (("agents",), ("token", "list"), ("media", "list")):
        told = run(collector, *listing, "-o", "json")[0]
        assert told == run(collector, *listing, "--json")[0]
        assert all(isinstance(json.loads(line), dict) for line in told.splitlines()) and told
        assert run(collector, *listing, "-o", "table")[0] == run(collector, *listing)[0]


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (("query", "--event", ","), 2, "names no event code"),
        (("query", "--event", "file.copied_uot"), 2, 'did you mean "file.copied_out"'),
        (("tail", "--event", "nonsense.*"), 2, "is no event code"),
        (("query", "-g", b"a\xff"), 2, "is not UTF-8"),
        (("query", "--url", "http://127.0.0.1:abc", "--token", "t"), 1, "port must be a number"),
        (("query", "--url", "http://127.0.0.1:70000", "--token", "t"), 1, "port must be a number"),
        (("query", "--url", "http://127.0.0.1:1", "--token", "a\nb"), 1, "the token"),
        (("query", "--url", "http://127.0.0.1:1", "--token", "鍵"), 1, "the token"),
        (("query", "--url", "http://127.0.0.1:1/ä", "--token", "t"), 1, "plain ASCII"),
    ],
)
def test_odd_arguments_are_one_sentence(collector: Collector, args: tuple[str | bytes, ...], code: int, said: str) -> None:
    error = run(collector, *(os.fsdecode(arg) for arg in args), code=code)[1]
    assert said in error and len(error.splitlines()) == 1


@pytest.mark.parametrize("head", [b"Transfer-Encoding: chunked", b"Content-Length: 9000"])
@pytest.mark.parametrize("form", ["json", "csv", "short", "table"])
def test_an_answer_that_breaks_off_is_not_taken_for_whole(form: str, head: bytes) -> None:
    import socket

    line = Client(0).append(draft(agent="a1", **copied("a.csv"))) + b"\n"
    part = b"%x\r\n%s\r\n" % (len(line), line) if b"chunked" in head else line
    names = b'{"names":{"a1":"ws-042"}}'

    def answer(sock: socket.socket) -> None:
        while True:
            try:
                connection = sock.accept()[0]
            except OSError:
                return
            with connection:
                asked = connection.recv(65536)
                if b"only=names" in asked:
                    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(names), names))
                else:
                    connection.sendall(b"HTTP/1.1 200 OK\r\n" + head + b"\r\n\r\n" + part)

    with socket.create_server(("127.0.0.1", 0)) as sock:
        threading.Thread(target=answer, args=(sock,), daemon=True).start()
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        told, error = run(None, "query", "-o", form, "--url", url, "--token", "t", code=1)
        sock.shutdown(socket.SHUT_RDWR)
    assert "the answer broke off" in error and len(error.splitlines()) == 1
    assert form == "table" or "a.csv" in told


@pytest.mark.sqlite
@pytest.mark.parametrize("served", [True, False])
def test_a_store_that_fails_halfway_is_seen_by_whoever_asked(collector: Collector, served: bool) -> None:
    agent = Client(collector.port, "ws-1")
    agent.enrol()
    agent.append_some(2500)
    assert agent.send(1, 1500)[0] == agent.send(1501)[0] == 200
    collector.stop()
    store = collector.state_dir / "collector.db"
    with store.open("r+b") as file:
        page = file.read().index(agent.lines[1499]) // 8192 * 8192
        file.seek(page)
        file.write(bytes(8192))
    if served:
        collector.start()
    told, error = run(collector, "query", "-o", "json", code=1)
    assert "broke off" in error and len(error.splitlines()) == 1
    assert 0 < len(told.splitlines()) < 2500


@pytest.mark.sqlite
def test_the_state_is_the_owners_alone_whatever_the_umask(tmp_path: Path, store_kind: str) -> None:
    house = Collector(tmp_path)
    before = os.umask(0o022)
    try:
        house.run("token", "create", "--enroll")
        house.start()
        files = list(house.state_dir.iterdir())
        assert {"collector.db", "collector.db-wal", "lock", "signing.key"} <= {file.name for file in files}
        assert [file.name for file in [house.state_dir, *files] if file.stat().st_mode & 0o077] == []
    finally:
        house.stop()
        os.umask(before)
    house.state_dir.chmod(0o755)
    for command in (("serve",), ("tail",)):
        error = run(house, *command, code=2)[1]
        assert "open to others (mode 0755)" in error and "chmod 700" in error and len(error.splitlines()) == 1
    house.state_dir.chmod(0o700)
    (house.state_dir / "signing.key").chmod(0o644)
    assert "others may use the signing key" in run(house, "tail", code=2)[1]


def test_a_signing_key_is_made_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "signing.key"

    def crash(_descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", crash)
        with pytest.raises(config.ConfigError, match="can't be read or made"):
            load_key(path)
    assert list(tmp_path.iterdir()) == []
    made = load_key(path)
    assert load_key(path) == made
    assert path.stat().st_mode & 0o777 == 0o600 and list(tmp_path.iterdir()) == [path]


def test_approving_from_an_event_and_back_through_a_file(collector: Collector, tmp_path: Path) -> None:
    agent = fill(collector)
    uid = json.loads(agent.lines[-1])["metadata"]["uid"]
    approval = ("--owner", "sato", "--approver", "mori", "--purpose", "month-end", "--until", "2099-01-31")
    run(
        collector,
        "media",
        "approve",
        "--from-event",
        uid,
        *approval,
        "--machines",
        "ws-042",
        "ws-7",
        "--dirs",
        "customers",
        "--read-only",
    )
    (row,) = [json.loads(line) for line in run(collector, "media", "list", "--json")[0].splitlines()]
    assert (row["key"], row["machines"], row["dirs"], row["read_only"]) == (
        "usb:0951:1666:60A44C413F8CF320",
        ["ws-042", "ws-7"],
        ["customers"],
        True,
    )
    run(collector, "media", "approve", "usb:2/odd key", *approval)
    run(collector, "media", "revoke", "usb:2/odd key", "--reason", "lost, on a train")
    saved = tmp_path / "media.csv"
    run(collector, "media", "export", "-o", str(saved))
    before = saved.read_text()
    run(collector, "media", "import", str(saved))
    assert run(collector, "media", "export")[0] == before
    saved.write_text("key,owner\nx,y\n")
    assert "lacks the column approver" in run(collector, "media", "import", str(saved), code=1)[1]
    told = collector.events(event="register.changed")
    assert [event["api"]["operation"] for event in told] == [
        "media.approve",
        "media.approve",
        "media.revoke",
    ], "what stands already is not changed by an import"


def test_csv_cells_are_no_formulas(collector: Collector) -> None:
    agent = Client(collector.port, "ws-1")
    agent.enrol()
    agent.append(draft(agent=agent.id, name="ws-1", **copied("=cmd|' /C calc'!A0", user="@sum(1)")))
    agent.send()
    text = run(collector, "query", "-o", "csv")[0]
    assert "'=cmd" in text and "'@sum" in text


def test_help_is_quick_and_names_only_what_exists() -> None:
    began = time.monotonic()
    text = run(None, "--help")[0]
    assert time.monotonic() - began < 2
    evidence = ["export", "verify", "key", "witness", "retain", "backup", "migrate", "restore"]
    listed = re.findall(r"^    (\w+) ", text, re.MULTILINE)
    assert listed == ["serve", "tail", "query", "agents", "media", "token", *evidence]
    heavy = ("starlette", "uvicorn", "sqlite3", "nacl")
    code = f"import sys, server_stub.cli as c; c.parser(); print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=_environment())
    assert done.stdout.strip() == "[]", done.stderr


def test_a_reader_that_has_seen_enough_is_no_error(collector: Collector) -> None:
    agent = Client(collector.port, "ws-1")
    agent.enrol()
    agent.append_some(2000)
    agent.send()
    line = f"{sys.executable} -m server_stub.cli query -c {collector.config_file} | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, env=_environment())
    assert (done.returncode, done.stderr, len(done.stdout.splitlines())) == (0, "", 1)


def test_the_supervisor_is_told(tmp_path: Path, store_kind: str) -> None:
    import socket

    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.settimeout(20)
        house = Collector(tmp_path)
        old = dict(os.environ)
        os.environ |= {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "200000"}
        try:
            house.start()
        finally:
            os.environ.clear()
            os.environ.update(old)
        said = [sock.recv(100) for _ in range(4)]
        assert b"READY=1" in said and said.count(b"WATCHDOG=1") >= 2
        house.stop()
        while sock.recv(100) != b"STOPPING=1":
            pass
