"""Sockets as the real kernel tells them: who opened one, what it sent, and that it is gone; a user's FUSE mount for root."""

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agent.core.facts import Fact, Lost, WayClosed, WayHeld
from agent.sense import fusemount, handles, sockdiag, sockets
from agent.sense.connects import Connects
from agent.sense.sockdiag import Namespace, Socket, spoken
from tests.far import NEEDS, Far, far

pytestmark = NEEDS
SIZE = 200_000


@pytest.fixture(scope="module")
def machine() -> Iterator[Far]:
    with far() as made:
        yield made


@pytest.fixture
def sensor() -> Iterator[sockets.Sockets]:
    made = sockets.Sockets(now_ms())
    yield made
    made.close()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "list.csv"
    path.write_bytes(os.urandom(SIZE))
    return path


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def until(sensor: sockets.Sockets, holds: Callable[[list[Fact]], bool]) -> list[Fact]:
    told: list[Fact] = []
    deadline = time.monotonic() + 10
    while not holds(told):
        assert time.monotonic() < deadline, "never told; only:\n" + "\n".join(map(repr, told))
        told += sensor.drain(now_ms())
        time.sleep(0.002)
    return told


def held(told: list[Fact]) -> list[WayHeld]:
    return [fact for fact in told if isinstance(fact, WayHeld)]


def closed(told: list[Fact]) -> list[WayClosed]:
    return [fact for fact in told if isinstance(fact, WayClosed)]


def heard() -> Connects:
    try:
        return Connects()
    except OSError as error:
        pytest.skip(f"needs perf_event_open and tracefs: {error}")


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_who_connected_is_known_though_it_is_gone(machine: Far, file: Path) -> None:
    connects = heard()
    try:
        port = machine.http()
        senders = [subprocess.Popen(["curl", "-s", "-T", file, f"http://{machine.address}:{port}/"]) for _ in range(5)]
        for sender in senders:
            assert sender.wait(20) == 0
        told = [each for each in connects.drain() if each.there[1] == port]
        assert {each.pid for each in told} == {sender.pid for sender in senders}
        assert {spoken(each.there) for each in told} == {f"{machine.address}:{port}"}
        assert len({each.here for each in told}) == 5
    finally:
        connects.close()


def test_a_socket_that_is_gone_tells_its_count_and_none_within_the_machine(machine: Far) -> None:
    namespace = Namespace()
    try:
        port = machine.sink()
        with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as near:
            near.sendall(b"x" * 5_000)
        with socket.create_connection((machine.address, port)) as sender:
            here = sender.getsockname()
            sender.sendall(b"x" * 50_000)
            found = [each for each in namespace.dump() if each.there[1] == port]
            assert [spoken(each.here) for each in found] == [f"{here[0]}:{here[1]}"]
        deadline, ends = time.monotonic() + 5, []
        while not any(each.there[1] == port for each in ends):
            assert time.monotonic() < deadline, ends
            ends += list(namespace.destroyed())
        (end,) = [each for each in ends if each.there[1] == port]
        assert end.cookie == found[0].cookie and end.sent is not None and 50_000 <= end.sent <= 50_002
        assert not [each for each in ends if each.there[1] and sockdiag.loopback(each.there[0])]
    finally:
        namespace.close()


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_a_short_upload_is_told_with_its_reader_and_all_its_bytes(machine: Far, file: Path, sensor: sockets.Sockets) -> None:
    heard().close()
    port = machine.http()
    sender = subprocess.Popen(["curl", "-s", "-T", file, f"http://{machine.address}:{port}/"])
    assert sender.wait(20) == 0
    sensor.reading(sender.pid, os.getpid(), now_ms())
    told = until(sensor, lambda told: bool(closed(told)))
    way, end = held(told)[-1], closed(told)[-1]
    assert (way.pid, way.way, way.peer, way.id) == (sender.pid, "network", f"{machine.address}:{port}", end.id)
    assert SIZE <= (end.sent or 0) <= SIZE + 4_000 and way.since_ms is not None


def test_nothing_is_told_of_who_reads_nothing(machine: Far, sensor: sockets.Sockets) -> None:
    port = machine.sink()
    with socket.create_connection((machine.address, port)) as sender:
        sender.sendall(b"x" * 50_000)
    for _ in range(50):
        assert not list(sensor.drain(now_ms()))
        time.sleep(0.002)


def test_a_connection_that_was_there_before_is_found_and_counted(machine: Far, sensor: sockets.Sockets) -> None:
    port = machine.sink()
    script = (
        "import socket, sys\n"
        f"s = socket.create_connection(({machine.address!r}, {port}))\n"
        "s.sendall(b'x' * 30_000); print('open', flush=True)\n"
        "sys.stdin.readline(); s.sendall(b'x' * 70_000); sys.stdin.readline()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None
    assert process.stdout.readline() == "open\n"
    sensor.reading(process.pid, os.getpid(), now_ms())
    first = held(until(sensor, lambda told: bool(held(told))))[0]
    assert first.pid == process.pid and (first.sent or 0) >= 30_000
    process.stdin.write("\n")
    process.stdin.flush()
    until(sensor, lambda told: any((way.sent or 0) >= 100_000 for way in held(told)))
    process.communicate("\n")
    assert closed(until(sensor, lambda told: bool(closed(told))))[0].id == first.id


def test_a_forwarder_on_this_machine_is_told_with_whom_it_serves(machine: Far, sensor: sockets.Sockets) -> None:
    port = machine.sink()
    forwarder_script = (
        "import socket\nserver = socket.create_server(('127.0.0.1', 0)); print(server.getsockname()[1], flush=True)\n"
        f"near, _ = server.accept(); far = socket.create_connection(({machine.address!r}, {port}))\n"
        "while data := near.recv(1 << 16):\n    far.sendall(data)\n"
    )
    forwarder = subprocess.Popen([sys.executable, "-c", forwarder_script], stdout=subprocess.PIPE, text=True)
    assert forwarder.stdout is not None
    with socket.create_connection(("127.0.0.1", int(forwarder.stdout.readline()))) as near:
        near.sendall(b"x" * 50_000)
        sensor.reading(os.getpid(), os.getppid(), now_ms())
        sensor._readers[os.getpid()].next_ms = 0
        told = until(sensor, lambda told: any(way.pid == forwarder.pid for way in held(told)))
    way = next(way for way in held(told) if way.pid == forwarder.pid)
    assert way.feeders == [os.getpid()] and way.peer == f"{machine.address}:{port}"
    forwarder.communicate(timeout=20)


def test_a_reader_in_another_network_namespace(machine: Far, sensor: sockets.Sockets, tmp_path: Path) -> None:
    """A container's own network: its sockets are in none of our tables."""
    with socket.create_server((machine.here, 0)) as server:
        taken: list[int] = []

        def take() -> None:
            peer, _ = server.accept()
            with peer:
                while piece := peer.recv(1 << 16):
                    taken.append(len(piece))

        taker = threading.Thread(target=take)
        taker.start()
        script = (
            f"import socket, sys\ns = socket.create_connection(({machine.here!r}, {server.getsockname()[1]}))\n"
            "s.sendall(b'x' * 40_000); print('sent', flush=True); sys.stdin.readline()\n"
        )
        inside = ["ip", "netns", "exec", machine.name, sys.executable, "-c", script]
        process = subprocess.Popen(inside, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None and process.stdout.readline() == "sent\n"
        sensor.reading(process.pid, os.getpid(), now_ms())
        told = until(sensor, lambda told: any((way.sent or 0) >= 40_000 for way in held(told)))
        assert held(told)[0].pid == process.pid
        process.communicate("\n", timeout=20)
        taker.join(20)
        assert sum(taken) == 40_000


def test_printing_is_told_by_what_the_service_spools(sensor: sockets.Sockets, tmp_path: Path) -> None:
    """A service with the print service's socket, that writes what it is given to a file."""
    service_script = (
        "import socket, sys\nserver = socket.socket(socket.AF_UNIX); server.bind(sys.argv[1]); server.listen()\n"
        "print('ready', flush=True); near, _ = server.accept(); spool = open(sys.argv[2], 'wb', buffering=0)\n"
        "while data := near.recv(1 << 16):\n    spool.write(data)\n"
    )
    path = tmp_path / "cups.sock"
    command = [sys.executable, "-c", service_script, str(path), str(tmp_path / "spool")]
    service = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert service.stdout is not None and service.stdout.readline() == "ready\n"
    with socket.socket(socket.AF_UNIX) as near:
        near.connect(str(path))
        sensor.reading(os.getpid(), os.getppid(), now_ms())
        until(sensor, lambda told: any(way.way == "print" for way in held(told)))
        near.sendall(b"x" * 60_000)
        told = until(sensor, lambda told: any((way.sent or 0) >= 60_000 for way in held(told)))
        assert {way.pid for way in held(told) if way.way == "print"} == {os.getpid()}
    service.communicate(timeout=20)
    assert closed(until(sensor, lambda told: bool(closed(told))))


def test_bluetooth_sockets_are_known_by_their_inode(tmp_path: Path) -> None:
    head = "sk               RefCnt Rmem   Wmem   User   Inode  Parent\n"
    tmp_path.joinpath("rfcomm").write_text(head + "00000000a1b2c3d4 2      0      0      1000   48213  0     \n")
    tmp_path.joinpath("l2cap").write_text(head)
    assert handles.bluetooth_inodes(str(tmp_path)) == {48213}
    assert handles.bluetooth_inodes(str(tmp_path / "none")) == frozenset()


@pytest.mark.skipif(shutil.which("sshfs") is None or not Path("/dev/fuse").exists(), reason="needs sshfs and /dev/fuse")
def test_root_may_act_on_a_users_fuse_mount_as_that_user(machine: Far, tmp_path: Path) -> None:
    options = machine.ssh(tmp_path).split()
    mount, key = tmp_path / "mount", tmp_path / "id"
    mount.mkdir()
    os.chown(mount, 65534, 65534)
    os.chown(key, 65534, 65534)
    for folder in (tmp_path, *tmp_path.parents[:3]):
        folder.chmod(folder.stat().st_mode | 0o111)
    person = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"]
    done = subprocess.run([*person, "sshfs", *options, f"far:{tmp_path}", mount], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"needs FUSE mounts by users: {done.stderr.strip()}")
    try:
        with pytest.raises(PermissionError):
            mount.stat()
        owner = fusemount.owner_at(os.fsencode(mount))
        assert owner == (65534, 65534)
        with fusemount.as_owner(owner):
            assert mount.stat().st_ino and os.getresuid() == (65534,) * 3
        assert os.getresuid() == (0, 0, 0) and os.getresgid() == (0, 0, 0)
    finally:
        subprocess.run(["umount", "-l", mount], check=True)


def test_nobody_hides_a_far_machine_by_naming_its_address_his_own(sensor: sockets.Sockets) -> None:
    """In a network namespace that a person makes without privilege, any address can be had."""
    far = Socket(1, sockdiag.TCP, sockdiag.ESTABLISHED, (b"\x0a\0\0\1", 4000), (bytes([203, 0, 113, 77]), 443), 1, 0, 5)
    person = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", "unshare", "-Urn"]
    shell = 'ip link set lo up; ip addr add 203.0.113.77/32 dev lo; exec /usr/bin/python3 -c "$0"'
    code = (
        "import socket; a = socket.create_server(('203.0.113.77', 999)); b = socket.create_connection(('203.0.113.77', 999));"
        "print('there', flush=True); input()"
    )
    reader = subprocess.Popen([*person, "sh", "-c", shell, code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert reader.stdout is not None
    if reader.stdout.readline() != "there\n":
        pytest.skip("needs user namespaces without privilege, and ip(8)")
    try:
        assert sensor._outside(far)
        sensor.reading(reader.pid, 0, now_ms())
        until(sensor, lambda _: len(sensor._namespaces) > 1)
        assert sensor._outside(far)
    finally:
        reader.communicate("\n")
    namespaces = len(sensor._namespaces)
    later = now_ms() + sockets._UNUSED_MS + 1_000
    list(sensor.drain(later))
    assert namespaces == 2 and list(sensor._namespaces) == [0], "a namespace that ended is kept for ever"


def test_ends_that_the_kernel_dropped_are_counted(sensor: sockets.Sockets) -> None:
    sensor.reading(os.getpid(), 0, now_ms())
    sensor._namespaces[0].lost = True
    told = list(sensor.drain(now_ms()))
    assert [fact.reason for fact in told if isinstance(fact, Lost)] == ["connects_overflow"]
    assert not [fact for fact in sensor.drain(now_ms()) if isinstance(fact, Lost)]
