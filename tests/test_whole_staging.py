"""Copies made elsewhere on the machine, by real programs, with the real agent: told, followed, and named when they leave.

Nobody may be kept from working by it: opens go on whoever is stopped or killed.
"""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.pytest_plugin import Agent, Media
from tests.house import until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: fanotify (CAP_SYS_ADMIN)")
DEADLINE_S = 30.0


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    folder = tmp_path / "home"
    folder.mkdir()
    return folder


@pytest.fixture
def agent(tmp_path: Path, sekisho_media: Media) -> Iterator[Agent]:
    made = Agent(tmp_path, sekisho_media)
    customers(made.protected)
    made.start()
    yield made
    made.stop()


_CUSTOMERS = """
import pathlib, sys
for number in range(int(sys.argv[2])):
    rows = (f"{row},{number},佐藤 {row * 7919 % 10007},tokyo-{row * 31 % 977}@example.jp" for row in range(int(sys.argv[3])))
    pathlib.Path(sys.argv[1], f"customers-{number}.csv").write_text("\\n".join(rows))
"""


def customers(folder: Path, count: int = 1, rows: int = 3_000) -> list[Path]:
    """Customer lists that look like some, each other than the others; by another process, for who writes has opened them."""
    subprocess.run([sys.executable, "-c", _CUSTOMERS, folder, str(count), str(rows)], check=True, start_new_session=True)
    return [folder / f"customers-{number}.csv" for number in range(count)]


def shell(text: str, cwd: Path | None = None) -> None:
    """Run as a job of its own, as at a prompt."""
    done = subprocess.run(["bash", "-c", text], cwd=cwd, capture_output=True, text=True, timeout=120, start_new_session=True)
    assert done.returncode == 0, f"{text}: {done.stderr or done.stdout}"


def ours(event: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = event["unmapped"]["sekisho"]
    return found


def staged(agent: Agent, path: Path, count: int = 1) -> list[dict[str, Any]]:
    """What was told of the copy at `path`."""
    found = agent.wait_for("file.staged", count, where=lambda event: ours(event)["dest"]["path"] == str(path))
    return [ours(event) for event in ([found] if count == 1 else found)]


def armed(pid: int) -> bool:
    """Whether the agent's group for writes carries a mark on a file system now: fdinfo, proc(5)."""
    for info in Path(f"/proc/{pid}/fdinfo").iterdir():
        try:
            lines = info.read_text().splitlines()
        except OSError:
            continue
        if any(line.startswith("fanotify flags:233 ") for line in lines):
            return any(line.startswith("fanotify sdev:") for line in lines)
    return False


def rest(agent: Agent) -> None:
    """Wait until nobody is left who read something, and the watch on writes has ended."""
    until(lambda: not armed(agent.pid), lambda: "the watch never ended", DEADLINE_S)


WAYS = {
    "cp": ("cp {src} {out}/x.csv", "x.csv"),
    "cp-same-name": ("cp {src} {out}/", "customers-0.csv"),
    "reflink": ("cp --reflink=auto {src} {out}/x.csv", "x.csv"),
    "jpg": ("cp {src} {out}/holiday.jpg", "holiday.jpg"),
    "cat": ("cat {src} > {out}/x", "x"),
    "dd": ("dd if={src} of={out}/x bs=64k status=none", "x"),
    "zip": ("zip -q {out}/x.zip {src}", "x.zip"),
    "tar": ("tar cf {out}/x.tar {src}", "x.tar"),
    "tar-gzip": ("tar c {src} | gzip > {out}/x.tgz", "x.tgz"),
    "tar-czf": ("tar czf {out}/x.tgz {src}", "x.tgz"),
    "gzip": ("gzip -c {src} > {out}/x.gz", "x.gz"),
    "xz": ("xz -c {src} > {out}/x.xz", "x.xz"),
    "7z": ("7z a -bso0 {out}/x.7z {src}", "x.7z"),
    "openssl": ("openssl enc -aes-256-cbc -pbkdf2 -k x -in {src} -out {out}/x.enc", "x.enc"),
    "gpg": ("gpg --homedir {out} --batch --passphrase x --pinentry-mode loopback -o {out}/x.gpg -c {src}", "x.gpg"),
    "base64": ("base64 {src} > {out}/x.txt", "x.txt"),
    "python": ('python3 -c \'import shutil; shutil.copy("{src}", "{out}/x")\'', "x"),
    "rsync": ("rsync {src} {out}/x.csv", "x.csv"),
    "install": ("install {src} {out}/x.csv", "x.csv"),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_copy_elsewhere_is_told_and_named_when_it_leaves(agent: Agent, outside: Path, sekisho_media: Media, way: str) -> None:
    command, name = WAYS[way]
    program = command.split()[0]
    if shutil.which(program) is None:
        pytest.skip(f"needs {program}")
    source = agent.protected / "customers-0.csv"
    shell(command.format(src=source, out=outside))
    (copy,) = staged(agent, outside / name)
    assert copy["source"]["path"] == str(source) and copy["confidence"] >= 0.7
    stick = sekisho_media.plug("stick1")
    shell(f"cp {outside / name} {stick.path}/out.bin")
    event = ours(agent.wait_for("file.copied_out"))
    assert event["source"]["path"] == str(source) and event["source"]["via"] == [str(outside / name)]
    assert event["link"] == "lineage" and event["bytes"] == source.stat().st_size
    finding = agent.wait_for("copy.staged")
    related = {each["uid"] for each in finding["finding_info"]["related_events"]}
    told = {
        event["metadata"]["uid"]
        for event in agent.events()
        if event["metadata"]["event_code"] in ("file.staged", "file.copied_out")
    }
    assert related == told


def test_parts_of_a_file_are_copies_of_it(agent: Agent, outside: Path) -> None:
    shell(f"split -n 4 {agent.protected}/customers-0.csv {outside}/part-")
    for part in ("part-aa", "part-ab", "part-ac", "part-ad"):
        (copy,) = staged(agent, outside / part)
        assert copy["source"]["path"] == str(agent.protected / "customers-0.csv")


def test_a_file_moved_to_another_file_system_is_followed_there(agent: Agent) -> None:
    with_own = Path("/dev/shm")
    if with_own.stat().st_dev == agent.protected.stat().st_dev:
        pytest.skip("needs a second file system: /dev/shm")
    there = with_own / f"sekisho-test-{os.getpid()}"
    there.mkdir()
    try:
        source = agent.protected / "customers-0.csv"
        shell(f"mv {source} {there}/")
        (copy,) = staged(agent, there / source.name)
        assert copy["source"]["path"] == str(source)
    finally:
        shutil.rmtree(there)


def test_an_archive_of_fifty_files_leaves_as_fifty(agent: Agent, outside: Path, sekisho_media: Media) -> None:
    sources = customers(agent.protected, 50, 200)
    shell(f"zip -qr {outside}/x.zip {agent.protected}")
    staged(agent, outside / "x.zip", 50)
    stick = sekisho_media.plug("stick1")
    shell(f"mv {outside}/x.zip {stick.path}/")
    left = [ours(event) for event in agent.wait_for("file.copied_out", 50)]
    assert {event["source"]["path"] for event in left} == {str(source) for source in sources}
    assert {event["bytes"] for event in left} == {source.stat().st_size for source in sources}
    assert all(event["link"] == "lineage" for event in left)
    agent.wait_for("copy.staged")
    assert len(agent.events("copy.staged")) == 1, "one detour, one finding"


def test_an_exported_database_is_a_copy_of_its_file(agent: Agent, outside: Path) -> None:
    if shutil.which("sqlite3") is None:
        pytest.skip("needs sqlite3")
    database = agent.protected / "customers.db"
    values = (f"({n}, 'Sato Taro {n * 7919 % 10007}', 'sato{n}@mail.example.jp')" for n in range(3_000))
    rows = "".join(f"insert into c values{each};" for each in values)
    made = f"create table c(id integer, name text, mail text); begin; {rows} commit;"
    subprocess.run(["sqlite3", database], input=made, text=True, check=True)
    shell(f"sqlite3 {database} .dump > {outside}/x.sql; sqlite3 -csv {database} 'select name, mail from c' > {outside}/x.csv")
    for name in ("x.sql", "x.csv"):
        (copy,) = staged(agent, outside / name)
        assert copy["source"]["path"] == str(database)


def test_a_copy_of_a_copy_leads_back_over_renames_and_restarts(
    agent: Agent, outside: Path, sekisho_media: Media, tmp_path: Path
) -> None:
    shell(f"cp {agent.protected}/customers-0.csv {outside}/one")
    staged(agent, outside / "one")
    rest(agent)
    shell(f"gzip -c {outside}/one > {outside}/two.gz")  # nobody reads a protected file now
    (copy,) = staged(agent, outside / "two.gz")
    assert copy["source"]["via"] == [str(outside / "one")] and copy["link"] == "lineage"
    shell(f"mkdir {outside}/deep; mv {outside}/two.gz {outside}/deep/holiday.jpg")
    agent.stop(signal.SIGKILL)
    shell(f"mv {outside}/deep/holiday.jpg {outside}/deep/later.jpg; rm {outside}/one")
    agent.start()
    stick = sekisho_media.plug("stick1")
    shell(f"cp {outside}/deep/later.jpg {stick.path}/x.jpg")
    event = ours(agent.wait_for("file.copied_out"))
    assert event["source"]["path"] == str(agent.protected / "customers-0.csv")
    assert event["source"]["via"] == [str(outside / "one"), str(outside / "deep/later.jpg")]


def test_a_copy_that_was_overwritten_is_none_any_more(agent: Agent, outside: Path, sekisho_media: Media) -> None:
    shell(f"cp {agent.protected}/customers-0.csv {outside}/one")
    staged(agent, outside / "one")
    shell(f"head -c 70000 /dev/urandom > {outside}/one")
    until(lambda: agent.status()["counts"]["copies"] == 0, lambda: "still a copy")
    stick = sekisho_media.plug("stick1")
    shell(f"cp {outside}/one {stick.path}/x")
    agent.wait_for("file.written")
    assert not agent.events("file.copied_out")


def test_another_file_in_the_place_of_a_copy_is_not_taken_for_it(agent: Agent, outside: Path, sekisho_media: Media) -> None:
    shell(f"cp {agent.protected}/customers-0.csv {outside}/one")
    staged(agent, outside / "one")
    agent.stop()
    shell(f"rm {outside}/one; head -c 70000 /dev/urandom > {outside}/one")
    agent.start()
    stick = sekisho_media.plug("stick1")
    shell(f"cp {outside}/one {stick.path}/x")
    agent.wait_for("file.written")
    assert not agent.events("file.copied_out")


INNOCENT = {
    "settings": """
import json
count = open(source).read().count(",")
json.dump({"recent": [source], "count": count}, open(f"{out}/settings.json", "w"))
""",
    "large settings": """
open(source).read()
open(f"{out}/registry.xcu", "w").write('<item oor:path="/org/office"><prop><value/></prop></item>\\n' * 1500)
""",
    "index": """
import zlib
words = open(source, "rb").read().split()
open(f"{out}/index.db", "wb").write(b"\\0".join(b"%08x" % zlib.crc32(word) for word in words))
""",
    "checksums": """
import hashlib
data = open(source, "rb").read()
sums = (hashlib.sha256(data[at : at + 64]).hexdigest()[:20] for at in range(0, len(data), 64))
open(f"{out}/sums", "w").write("\\n".join(sums))
""",
    "thumbnail": """
import os
open(source).read()
open(f"{out}/thumb.png", "wb").write(os.urandom(4000))
""",
    "log": """
for line in list(open(source))[:200]:
    print(line[:2], "ok", file=open(f"{out}/log", "a"))
""",
}


@pytest.mark.parametrize("doing", INNOCENT)
def test_what_a_reader_writes_besides_is_no_copy(agent: Agent, outside: Path, doing: str) -> None:
    source = agent.protected / "customers-0.csv"
    program = "import sys\nsource, out = sys.argv[1:]\n" + INNOCENT[doing]
    subprocess.run([sys.executable, "-c", program, source, outside], check=True)
    shell(f"cp {source} {outside}/marker.csv")
    staged(agent, outside / "marker.csv")
    assert len(agent.events("file.staged")) == 1, [ours(event)["dest"] for event in agent.events("file.staged")]


def test_two_thousand_copies_side_by_side_are_all_told(agent: Agent, outside: Path) -> None:
    sources = customers(agent.protected, 2_000, 8)
    names = "\n".join(str(source) for source in sources)
    subprocess.run(["xargs", "-P", "8", "-n", "1", "-I{}", "cp", "{}", f"{outside}/"], input=names, text=True, check=True)
    told = agent.wait_for("file.staged", 2_000)
    pairs = {(ours(event)["source"]["path"], ours(event)["dest"]["path"]) for event in told}
    assert pairs == {(str(source), str(outside / source.name)) for source in sources}


# -- nobody is kept waiting ------------------------------------------------------------------------------------------------


def holder_of(agent: Agent) -> int:
    """The small process that holds: the one child that stays (a look at access rights is another one, for a moment)."""
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children")
    until(lambda: len(children.read_text().split()) == 1, lambda: f"not one child: {children.read_text()}")
    return int(children.read_text())


def opens_within(path: Path, seconds: float) -> bool:
    """Whether somebody can read a file, soon."""
    reader = subprocess.Popen(["cat", path], stdout=subprocess.DEVNULL)
    try:
        return reader.wait(seconds) == 0
    except subprocess.TimeoutExpired:
        reader.kill()
        reader.wait()
        return False


@pytest.mark.parametrize("when", ["killed", "stopped"])
@pytest.mark.parametrize("who", ["agent", "holder"])
def test_readers_go_on_whoever_is_killed_or_stopped(agent: Agent, who: str, when: str) -> None:
    rest(agent)
    source, victim = agent.protected / "customers-0.csv", agent.pid if who == "agent" else holder_of(agent)
    os.kill(victim, signal.SIGKILL if when == "killed" else signal.SIGSTOP)
    try:
        # a stopped holder is killed by the agent once it was silent for 1.5 s
        assert opens_within(source, 6.0 if (who, when) == ("holder", "stopped") else 1.0)
        assert opens_within(source, 1.0)
    finally:
        if (who, when) == ("agent", "stopped"):
            os.kill(victim, signal.SIGCONT)
        if (who, when) == ("agent", "killed"):
            agent.stop(signal.SIGKILL)


def test_a_holder_that_was_killed_is_replaced_and_copies_are_seen_meanwhile_and_after(agent: Agent, outside: Path) -> None:
    rest(agent)
    os.kill(holder_of(agent), signal.SIGKILL)
    until(lambda: armed(agent.pid), lambda: "not armed without a holder", DEADLINE_S)
    shell(f"cp {agent.protected}/customers-0.csv {outside}/one")
    staged(agent, outside / "one")
    rest(agent)
    shell(f"cp {agent.protected}/customers-0.csv {outside}/two")
    staged(agent, outside / "two")


def test_the_watch_on_writes_comes_with_a_reader_and_goes_after_it(agent: Agent, outside: Path) -> None:
    rest(agent)
    shell(f"cat {agent.protected}/customers-0.csv > /dev/null")
    assert armed(agent.pid), "the mark is there before the open returns"
    rest(agent)


def test_single_copies_out_of_rest_are_all_seen(agent: Agent, outside: Path) -> None:
    for number in range(3):
        rest(agent)
        shell(f"cp {agent.protected}/customers-0.csv {outside}/{number}")
        staged(agent, outside / str(number))


def test_without_holding_the_watch_stands(tmp_path: Path, sekisho_media: Media, outside: Path) -> None:
    made = Agent(tmp_path, sekisho_media, "[agent.staging]\nhold = false\n")
    customers(made.protected)
    made.start()
    try:
        assert armed(made.pid)
        shell(f"cp {made.protected}/customers-0.csv {outside}/one")
        staged(made, outside / "one")
    finally:
        made.stop()


def test_without_watching_nothing_is_told(tmp_path: Path, sekisho_media: Media, outside: Path) -> None:
    made = Agent(tmp_path, sekisho_media, "[agent.staging]\nwatch = false\n")
    customers(made.protected)
    made.start()
    try:
        shell(f"cp {made.protected}/customers-0.csv {outside}/one")
        stick = sekisho_media.plug("stick1")
        shell(f"cp {made.protected}/customers-0.csv {stick.path}/")
        made.wait_for("file.copied_out")
        assert not made.events("file.staged") and not armed(made.pid)
    finally:
        made.stop()
