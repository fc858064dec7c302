"""The agent against what people, programs and machines do to it: odd names, load, reloads, full disks, a state that is removed.

Real agent, real collector where one is needed, real mounts. What must hold: nobody wrong is named, every copy is told once,
and whatever is lost is said.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import unicodedata
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from agent.contract.event import path_text
from agent.pytest_plugin import Agent, Media, _environment
from tests.house import LOGIN_UID, Collector, as_person, can_set_loginuid, link_config, until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: fanotify (CAP_SYS_ADMIN) and mount(8)")


@pytest.fixture
def house(sekisho_media: Media) -> Iterator[ExitStack]:
    """What is started or mounted in a test goes at its end, last first, whatever happened."""
    with ExitStack() as stack:
        yield stack


def ours(event: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = event["unmapped"]["sekisho"]
    return found


def command(agent: Agent, *words: str) -> subprocess.CompletedProcess[str]:
    """A command of sekisho-agent, as an admin types it."""
    line = [sys.executable, "-m", "agent.cli", *words, "-c", str(agent.config_file)]
    return subprocess.run(line, capture_output=True, text=True, env=_environment(), timeout=60)


def started(house: ExitStack, agent: Agent) -> Agent:
    agent.start()
    house.callback(agent.stop)
    return agent


def sources(agent: Agent) -> list[str]:
    return [ours(event)["protected"]["rel"] for event in agent.events("file.copied_out")]


# -- names ------------------------------------------------------------------------------------------------------------------

NAMES = {
    "newline": b"two\nlines.csv",
    "not UTF-8": b"caf\xe9 \xff\xfe.csv",
    "255 bytes": b"x" * 251 + b".csv",
    "terminal sequences": b"\x1b[2J\x1b]0;owned\x07\x1b[31m.csv",
    "right-to-left override": "invoice\u202evsc.exe".encode(),
    "leading dash": b"-rf --no-preserve-root.csv",
    "only blanks": b"  ",
    "backslashes": rb"\x41\\n.csv",
    "carriage return": b"good.csv\revil.csv",
    "JSON": b'","severity_id":1,"x":"',
    "C1 control": "csi\u009b31m.csv".encode(),
}


def harmless(line: str) -> bool:
    """Whether a line can be printed on any terminal: no control, no invisible ordering character."""
    return not any(unicodedata.category(each) in ("Cc", "Cf", "Cs", "Zl", "Zp") for each in line)


def test_no_name_breaks_an_event_or_a_terminal(house: ExitStack, tmp_path: Path, sekisho_media: Media) -> None:
    collector = Collector(tmp_path)
    collector.start()
    house.callback(collector.stop)
    agent = Agent(tmp_path, sekisho_media, link_config(collector))
    folder = os.fsencode(agent.protected)
    there = os.fsencode(sekisho_media.root / "stick1")
    while len(folder) + 205 < 4_000:
        folder, there = folder + b"/" + b"d" * 200, there + b"/" + b"d" * 200
    os.makedirs(folder)
    deep = b"e" * (4_000 - len(folder) - 1)
    Path(os.fsdecode(folder + b"/" + deep)).write_bytes(os.urandom(20_000))
    started(house, agent)
    stick = sekisho_media.plug("stick1", fs="ext4")
    for number, (what, name) in enumerate(NAMES.items()):
        source, target = os.fsencode(agent.protected) + b"/" + name, os.fsencode(stick.path) + b"/" + name
        Path(os.fsdecode(source)).write_bytes(os.urandom(10_000 + number))
        subprocess.run([b"cp", b"--", source, target], check=True)
        event = agent.wait_for("file.copied_out", where=lambda event: ours(event)["bytes"] == 10_000 + number)
        assert ours(event)["protected"]["rel"] == path_text(name), what
        assert ours(event)["dest"]["path"] == path_text(target), what
    assert r"\xff\xfe" in json.dumps(agent.events()).replace("\\\\", "\\")
    os.makedirs(there)
    subprocess.run([b"cp", folder + b"/" + deep, there + b"/z"], check=True)
    event = agent.wait_for("file.copied_out", where=lambda event: ours(event)["bytes"] == 20_000)
    assert ours(event)["source"]["path"] == os.fsdecode(folder + b"/" + deep)
    until(lambda: agent.status()["collector"]["backlog"] == 0, "not all is sent")
    whole = len(agent.events())
    printed = command(agent, "events", "-o", "short")
    assert printed.returncode == 0, printed.stderr
    assert len(printed.stdout.splitlines()) == whole
    tail = collector.run("tail", "-n", "1000")
    query = collector.run("query", "-o", "short")
    for line in (*printed.stdout.split("\n"), *tail.split("\n"), *query.split("\n")):
        assert harmless(line), ascii(line)
    assert sum("by cp" in line for line in tail.split("\n")) == len(NAMES) + 1
    assert command(agent, "verify").returncode == 0


def test_a_path_longer_than_the_kernel_can_say_hurts_nobody(sekisho_agent: Agent, sekisho_media: Media) -> None:
    stick = sekisho_media.plug("stick1", fs="tmpfs")
    (sekisho_agent.protected / "a.csv").write_bytes(os.urandom(10_000))
    (sekisho_agent.protected / "b.csv").write_bytes(os.urandom(10_001))
    deeper = "import os\nfor _ in range(30):\n os.mkdir('d' * 200)\n os.chdir('d' * 200)\n"
    copy = f"import shutil\nshutil.copyfile('{sekisho_agent.protected}/a.csv', 'x')\n"
    subprocess.run([sys.executable, "-c", deeper + copy], cwd=stick.path, check=True)
    as_person(f"cp {sekisho_agent.protected}/b.csv {stick.path}/")
    sekisho_agent.wait_for("file.copied_out", where=lambda event: ours(event)["protected"]["rel"] == "b.csv")
    assert not sekisho_agent.status()["queue"]["error"]
    sekisho_agent.wait_for("file.copied_out", where=lambda event: ours(event)["protected"]["rel"] == "a.csv")


# -- load -------------------------------------------------------------------------------------------------------------------


def hogs(house: ExitStack, count: int = 2) -> None:
    """Programs that never rest."""
    for _ in range(count):
        busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        house.callback(busy.wait)
        house.callback(busy.kill)


COPIES = 2_000


def test_2000_short_copies_on_a_busy_machine_are_told_once_each(
    sekisho_agent: Agent, sekisho_media: Media, house: ExitStack
) -> None:
    for number in range(COPIES):
        (sekisho_agent.protected / f"{number}.csv").write_bytes(os.urandom(500 + number))
    stick = sekisho_media.plug("stick1", fs="ext4")
    hogs(house)
    as_person(f"seq 0 {COPIES - 1} | xargs -P2 -I% cp {sekisho_agent.protected}/%.csv {stick.path}/%.out")

    def settled() -> bool:
        time.sleep(0.25)  # between two looks: asking costs the agent time that it needs
        return len(sources(sekisho_agent)) >= COPIES

    complaint = ""
    try:
        until(settled, "not all are told", 20)
    except AssertionError as error:
        complaint = str(error)
    events = sekisho_agent.events("file.copied_out")
    told = Counter(ours(event)["dest"]["path"] for event in events)
    right = sum(
        ours(event)["protected"]["rel"].removesuffix(".csv") == Path(ours(event)["dest"]["path"]).stem for event in events
    )
    how = Counter(ours(event)["attribution"] for event in events)
    people = Counter(ours(event).get("login", {}).get("uid") for event in events)
    argv = sum(bool(ours(event).get("process", {}).get("argv")) for event in events)
    links = Counter(ours(event)["link"] for event in events)
    print(
        f"{len(told)} told, {len(events) - len(told)} twice, {right} with the right source; {dict(how)}; {dict(people)};"
        f" {argv} with argv; {dict(links)}; {len(sekisho_agent.events('file.written'))} without source {complaint}"
    )
    assert set(told.values()) == {1}, "told twice"
    assert len(told) >= 0.99 * COPIES and right >= 0.99 * COPIES
    if can_set_loginuid():
        assert set(people) <= {LOGIN_UID, None} and people[LOGIN_UID] >= 0.99 * COPIES
    assert how["exact"] + how["cached"] >= 0.99 * COPIES


def test_two_people_and_a_backup_at_once_are_not_mixed_up(sekisho_agent: Agent, sekisho_media: Media, house: ExitStack) -> None:
    """Same sizes, same moment, same stick; the backup reads all of it and writes nowhere."""
    if not can_set_loginuid():
        pytest.skip("needs a kernel that lets root set /proc/self/loginuid once")
    people = {"sato": 1001, "tanaka": 1002}
    for person in people:
        for number in range(60):
            (sekisho_agent.protected / f"{person}-{number}.csv").write_bytes(os.urandom(20_000))
    stick = sekisho_media.plug("stick1", fs="ext4")

    def as_login(uid: int, shell: str) -> subprocess.Popen[bytes]:
        made = subprocess.Popen(["bash", "-c", f"echo {uid} > /proc/self/loginuid; {shell}"], stdout=subprocess.DEVNULL)
        house.callback(made.wait)
        house.callback(made.kill)
        return made

    tree = sekisho_agent.protected
    backup = as_login(
        1003, f"for round in 1 2 3 4 5 6 7 8; do tar c -C {tree} . | cat > /dev/null; cat {tree}/*.csv > /dev/null; done"
    )
    copies = [
        as_login(uid, f"for n in {{0..59}}; do cp {tree}/{person}-$n.csv {stick.path}/{person}-$n.out; done")
        for person, uid in people.items()
    ]
    for each in (*copies, backup):
        assert each.wait(60) == 0
    events = sekisho_agent.wait_for("file.copied_out", 120)
    for event in events:
        said = ours(event)
        person = said["protected"]["rel"].split("-")[0]
        assert Path(said["dest"]["path"]).stem == said["protected"]["rel"].removesuffix(".csv")
        assert said["login"]["uid"] == people[person]
    assert len(events) == 120
    assert not sekisho_agent.events("file.written")


# -- life cycle -------------------------------------------------------------------------------------------------------------


def test_a_reload_takes_a_good_configuration_and_refuses_a_bad_one(sekisho_agent: Agent, sekisho_media: Media) -> None:
    second = sekisho_agent.root / "contracts"
    second.mkdir()
    source = second / "nda.pdf"
    source.write_bytes(os.urandom(12_345))
    good = sekisho_agent.config_file.read_text()
    more = good + f'[[agent.protect]]\npath = {json.dumps(str(second))}\nlabel = "contracts"\n'
    sekisho_agent.config_file.write_text(more.replace("[agent]\n", "[agent]\nnmae = 'x'\n"))
    os.kill(sekisho_agent.pid, signal.SIGHUP)
    refused = sekisho_agent.wait_for("agent.sensors", where=lambda event: "config_refused" in ours(event)["detail"]["blind"])
    assert "nmae" in refused["message"] and '"name"' in refused["message"], "the key, and the right one"
    assert "config_refused" in sekisho_agent.status()["blind"]
    assert len(sekisho_agent.status()["protected"]) == 1, "the old one stays in force"
    sekisho_agent.config_file.write_text(more)
    os.kill(sekisho_agent.pid, signal.SIGHUP)
    until(lambda: len(sekisho_agent.status()["protected"]) == 2, "the new directory is not watched")
    until(lambda: "config_refused" not in sekisho_agent.status()["blind"], "the refusal is not over")
    assert len(sekisho_agent.wait_for("agent.config", 2)) == 2
    stick = sekisho_media.plug("stick1", fs="tmpfs")
    as_person(f"cp {source} {stick.path}/")
    assert ours(sekisho_agent.wait_for("file.copied_out"))["protected"]["label"] == "contracts"


def test_a_stop_in_order_is_told_and_leaves_nobody_behind(sekisho_agent: Agent, sekisho_media: Media) -> None:
    sekisho_media.plug("stick1", fs="tmpfs")
    children = Path(f"/proc/{sekisho_agent.pid}/task/{sekisho_agent.pid}/children")
    helpers = [int(pid) for pid in until(lambda: children.read_text().split(), "nobody holds")]
    assert sekisho_agent.stop(signal.SIGTERM) == 0
    assert sekisho_agent.events()[-1]["metadata"]["event_code"] == "agent.stopped"
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in helpers), "a helper outlives the agent", 5)
    assert command(sekisho_agent, "status").returncode == 4
    assert command(sekisho_agent, "verify").returncode == 0


def test_a_killed_agent_leaves_nobody_behind(sekisho_agent: Agent, sekisho_media: Media) -> None:
    stick = sekisho_media.plug("stick1", fs="ext4")
    children = Path(f"/proc/{sekisho_agent.pid}/task/{sekisho_agent.pid}/children")
    helpers = [int(pid) for pid in until(lambda: children.read_text().split(), "nobody holds")]
    sekisho_agent.stop(signal.SIGKILL)
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in helpers), "a helper outlives the agent", 5)
    as_person(f"echo free > {stick.path}/note; cat {stick.path}/note")


MANY_FILES = """
import os, sys
for number in range(int(sys.argv[2])):
    os.close(os.open(f"{sys.argv[1]}/{number}", os.O_CREAT | os.O_WRONLY))
"""


def test_a_full_disk_is_said_and_survived(house: ExitStack, tmp_path: Path, sekisho_media: Media) -> None:
    agent = Agent(tmp_path, sekisho_media)
    agent.state_dir.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128m,mode=700", "state", agent.state_dir], check=True)
    house.callback(subprocess.run, ["umount", "-l", agent.state_dir])
    started(house, agent)
    stick = sekisho_media.plug("stick1", fs="tmpfs")
    filler = agent.state_dir / "somebody-elses.log"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 16))
        except OSError:
            pass
    (agent.protected / "a.csv").write_bytes(os.urandom(10_000))
    as_person(f"cp {agent.protected}/a.csv {stick.path}/")
    until(lambda: agent.status()["queue"]["error"], "the full disk is not said")
    assert command(agent, "status").returncode == 3
    assert not sources(agent)
    writer = subprocess.Popen([sys.executable, "-c", MANY_FILES, stick.path, "26000"])
    house.callback(writer.kill)
    assert writer.wait(40) == 0
    until(lambda: agent.status()["counts"].get("file.written", 0) >= 26_000, "not all are seen", 40)
    assert agent.status()["queue"]["waiting"] > 20_000 or agent.events("agent.gap"), "they wait, or are counted"
    most = agent.status()["memory_kib"]
    filler.unlink()
    until(lambda: not agent.status()["queue"]["error"] and not agent.status()["queue"]["waiting"], "it does not recover", 40)
    print(f"{most / 1024:.1f} MiB with a full disk and a full queue")
    assert sources(agent) == ["a.csv"], "the copy outlasts what is less severe"
    lost = [ours(event)["lost"] for event in agent.events("agent.gap")]
    written = len(agent.events("file.written"))
    counted = sum(each["count"] for each in lost if each["reason"] == "disk_full")
    assert written + counted == 26_000, f"{written} written and {counted} lost"
    assert agent.status()["healthy"] or not agent.status()["queue"]["error"]
    assert command(agent, "verify").returncode == 0


def test_a_state_that_is_removed_is_told_and_the_watch_goes_on(house: ExitStack, tmp_path: Path, sekisho_media: Media) -> None:
    collector = Collector(tmp_path)
    collector.start()
    house.callback(collector.stop)
    agent = started(house, Agent(tmp_path, sekisho_media, link_config(collector)))
    stick = sekisho_media.plug("stick1", fs="tmpfs")
    until(lambda: agent.status()["collector"]["backlog"] == 0, "not all is sent")
    pid = agent.pid
    shutil.rmtree(agent.state_dir)
    (agent.protected / "a.csv").write_bytes(os.urandom(10_000))
    as_person(f"cp {agent.protected}/a.csv {stick.path}/")
    until(lambda: collector.events(event="file.copied_out"), lambda: f"the copy is lost:\n{agent.log.read_text()}", 25)
    until(lambda: collector.events(event="agent.tampered"), lambda: f"it is not told:\n{agent.log.read_text()}", 25)
    assert Path(f"/proc/{pid}").exists()


def test_a_collector_that_is_away_at_the_start_gets_everything_later(
    house: ExitStack, tmp_path: Path, sekisho_media: Media
) -> None:
    collector = Collector(tmp_path)
    agent = started(house, Agent(tmp_path, sekisho_media, link_config(collector)))
    stick = sekisho_media.plug("stick1", fs="tmpfs")
    (agent.protected / "a.csv").write_bytes(os.urandom(10_000))
    as_person(f"cp {agent.protected}/a.csv {stick.path}/")
    agent.wait_for("file.copied_out")
    assert command(agent, "status").returncode == 3
    collector.start()
    house.callback(collector.stop)
    until(lambda: collector.events(event="file.copied_out"), lambda: f"not sent: {agent.status()['collector']}", 30)
    seqs = [ours(event)["seq"] for event in collector.events() if event["device"].get("uid") == agent.status()["agent"]]
    assert seqs == list(range(1, len(seqs) + 1))
    assert re.fullmatch(r"[0-9a-f]{32}", agent.status()["agent"])
