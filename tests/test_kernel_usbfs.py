"""Who holds a USB device's node: real files, real holders, the kernel's own fanotify and FUSE. Only the node is a plain file in
a folder of the test's own, and its counters in sysfs are files too, as no phone can be plugged in here (tests/vm plugs one).
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agent.core.facts import Device, Fact, Mounted, Plugged, Unplugged, WayClosed, WayHeld
from agent.sense import SensorError, usbfs

HOLD = "import os, sys; fd = os.open(sys.argv[1], os.O_RDWR); print('open', flush=True); sys.stdin.read(1)"
HAND_ON = (
    "import os, sys; fd = os.open(sys.argv[1], os.O_RDWR); child = os.fork()\n"
    "if child: print(child, flush=True); os._exit(0)\n"
    "sys.stdin.read(1)"
)


class Port:
    """A phone's place: its node, and what sysfs tells of it."""

    def __init__(self, folder: Path) -> None:
        self.node = folder / "bus" / "003" / "007"
        self.node.parent.mkdir(parents=True)
        self.node.touch()
        self.sysfs = folder / "3-1"
        self.sysfs.mkdir()
        (self.sysfs / "busnum").write_text("3\n")
        (self.sysfs / "devnum").write_text("7\n")
        self.uses(10)
        self.device = Device(id=str(self.sysfs), bus="usb", serial="PH0NE", interfaces=["06:01:01"])

    def uses(self, count: int) -> None:
        (self.sysfs / "urbnum").write_text(f"{count}\n")


@pytest.fixture
def port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Port:
    monkeypatch.setattr(usbfs, "_NODES", os.fsencode(tmp_path / "bus") + b"/")
    return Port(tmp_path)


@pytest.fixture
def sensor() -> Iterator[usbfs.Usbfs]:
    try:
        made = usbfs.Usbfs()
    except SensorError as error:
        pytest.skip(str(error))
    yield made
    made.close()


@pytest.fixture
def hold(port: Port) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """Starts a program on the node; it goes on until its input ends."""
    begun: list[subprocess.Popen[str]] = []

    def start(program: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-I", "-S", "-c", program, str(port.node)]
        begun.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        return begun[-1]

    yield start
    for process in begun:
        process.communicate()


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def until(sensor: usbfs.Usbfs, holds: Callable[[list[Fact]], bool]) -> list[Fact]:
    told: list[Fact] = []
    deadline = time.monotonic() + 20
    while not holds(told):
        assert time.monotonic() < deadline, "never told; only:\n" + "\n".join(map(repr, told))
        told += sensor.drain(now_ms())
        time.sleep(0.005)
    return told


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def let_go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("x")
    process.stdin.flush()


def by(told: list[Fact], pid: int) -> list[WayHeld]:
    return [fact for fact in told if isinstance(fact, WayHeld) and fact.pid == pid]


def test_who_opens_the_node_is_told_until_he_lets_go(
    port: Port, sensor: usbfs.Usbfs, hold: Callable[[str], subprocess.Popen[str]]
) -> None:
    sensor.learn(Plugged(at_ms=now_ms(), device=port.device))
    holder = hold(HOLD)
    assert said(holder) == "open"
    (first, *_) = by(until(sensor, lambda told: bool(by(told, holder.pid))), holder.pid)
    assert (first.way, first.id, first.device, first.sent, first.uses) == ("mtp", "usb:003/007", port.device.id, None, 10)

    assert not [fact for fact in sensor.drain(now_ms()) if isinstance(fact, WayHeld)], "nothing was said to it meanwhile"
    port.uses(900)
    (more, *_) = by(until(sensor, lambda told: bool(by(told, holder.pid))), holder.pid)
    assert more.uses == 900

    let_go(holder)
    told = until(sensor, lambda told: any(isinstance(fact, WayClosed) for fact in told))
    assert [(fact.id, fact.pid) for fact in told if isinstance(fact, WayClosed)] == [("usb:003/007", holder.pid)]


def test_a_child_that_was_handed_the_node_holds_it(
    port: Port, sensor: usbfs.Usbfs, hold: Callable[[str], subprocess.Popen[str]]
) -> None:
    sensor.learn(Plugged(at_ms=now_ms(), device=port.device))
    opener = hold(HAND_ON)
    child = int(said(opener))
    assert by(until(sensor, lambda told: bool(by(told, child))), child)[0].way == "mtp"


def test_who_held_it_before_the_agent_came_is_found(
    port: Port, sensor: usbfs.Usbfs, hold: Callable[[str], subprocess.Popen[str]]
) -> None:
    holder = hold(HOLD)
    assert said(holder) == "open"
    sensor.learn(Plugged(at_ms=now_ms(), device=port.device, cold=True))
    until(sensor, lambda told: bool(by(told, holder.pid)))


@pytest.mark.skipif(shutil.which("bindfs") is None, reason="needs bindfs")
def test_what_a_holder_serves_lies_on_the_device(port: Port, sensor: usbfs.Usbfs, tmp_path: Path) -> None:
    other, mine, below = tmp_path / "other", tmp_path / "mine", tmp_path / "below"
    for folder in (other, mine, below):
        folder.mkdir()
    sensor.learn(Plugged(at_ms=now_ms(), device=port.device))
    node = os.open(port.node, os.O_RDWR)
    servers = [
        subprocess.Popen(["bindfs", "-f", below, mine], pass_fds=[node]),  # serves from the phone
        subprocess.Popen(["bindfs", "-f", below, other]),
    ]
    os.close(node)
    try:
        deadline = time.monotonic() + 20
        while not (mine.is_mount() and other.is_mount()):
            assert time.monotonic() < deadline, "bindfs does not start"
            time.sleep(0.01)
        for number, folder in enumerate((other, mine), 100):
            at = folder.stat().st_dev
            dev = f"{os.major(at)}:{os.minor(at)}"
            sensor.learn(Mounted(at_ms=now_ms(), mount_id=number, dev=dev, mount=str(folder), fs="fuse"))
        told = until(sensor, lambda told: any(isinstance(fact, Plugged) for fact in told))
        assert [fact.device.nodes for fact in told if isinstance(fact, Plugged)] == [[dev]], "the last one's, and no other"
        again = Plugged(at_ms=now_ms(), device=port.device)
        sensor.learn(again)
        assert again.device.nodes == [dev], "told anew by udev, it keeps what lies on it"
    finally:
        for server, folder in zip(servers, (mine, other), strict=True):
            subprocess.run(["umount", folder], check=False)
            server.send_signal(signal.SIGTERM)
            server.wait(20)


def test_a_pulled_phone_and_what_is_no_usb_device_tell_nothing(
    port: Port, sensor: usbfs.Usbfs, hold: Callable[[str], subprocess.Popen[str]]
) -> None:
    sensor.learn(Plugged(at_ms=now_ms(), device=port.device))
    sensor.learn(Unplugged(at_ms=now_ms(), id=port.device.id))
    sensor.learn(Plugged(at_ms=now_ms(), device=Device(id=port.device.id, bus="scsi")))
    holder = hold(HOLD)
    assert said(holder) == "open"
    assert not [fact for wait in (0, 400, 6_000) for fact in sensor.drain(now_ms() + wait)]
    assert sensor.coverage(now_ms()).ok


@pytest.mark.parametrize(
    ("interfaces", "properties", "way"),
    [
        (["06:01:01"], {}, "mtp"),
        (["ff:ff:00"], {"ID_MTP_DEVICE": "1"}, "mtp"),
        (["06:01:01", "07:01:02"], {"ID_GPHOTO2": "1"}, "mtp"),
        (["07:01:02"], {}, "print"),
        (["03:01:01"], {}, "usb"),
    ],
)
def test_what_leaves_by_a_device_goes_by_its_interfaces(interfaces: list[str], properties: dict[str, str], way: str) -> None:
    assert usbfs._way(Device(id="x", bus="usb", interfaces=interfaces, properties=properties)) == way


class Counter:
    """Stands in for the kernel's count of bytes, as no phone is here: at each `count` so many have gone out."""

    def __init__(self, *by_then: int) -> None:
        self.by_then, self.now = list(by_then), 0

    def count(self) -> None:
        if self.by_then:
            self.now = self.by_then.pop(0)

    def sent(self, device: str) -> int | None:
        return self.now

    def watch(self, device: str) -> None: ...

    def leave(self, device: str) -> None: ...

    def forget(self, device: str) -> None: ...

    def close(self) -> None: ...


def test_what_a_short_lived_holder_sent_while_it_was_looked_at_is_its_own(
    port: Port, sensor: usbfs.Usbfs, hold: Callable[[str], subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It opened, sent all, and let go in the time that one look takes."""
    sensor.learn(Plugged(at_ms=now_ms(), device=port.device))
    until(sensor, lambda _: not sensor.due(now_ms() + 5_000))
    monkeypatch.setattr(sensor, "_urbs", Counter(0, 0, 54_426))
    list(sensor.drain(now_ms()))
    holder = hold(HOLD)
    assert said(holder) == "open"
    let_go(holder)
    holder.wait()
    told = list(sensor.drain(now_ms()))
    assert [(fact.idle_sent, fact.sent) for fact in by(told, holder.pid)][-1] == (0, 54_426)
    assert isinstance(told[-1], WayClosed)


def test_what_went_until_a_phone_was_pulled_is_told(
    port: Port, sensor: usbfs.Usbfs, hold: Callable[[str], subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its node and its counters are gone, its holder does not know yet."""
    sensor.learn(Plugged(at_ms=now_ms(), device=port.device))
    counter = Counter()
    monkeypatch.setattr(sensor, "_urbs", counter)
    holder = hold(HOLD)
    assert said(holder) == "open"
    until(sensor, lambda told: bool(by(told, holder.pid)))
    counter.now = 4_000_000
    shutil.rmtree(port.sysfs)
    port.node.unlink()
    told = list(sensor.drain(now_ms()))
    assert [fact.sent for fact in by(told, holder.pid)] == [4_000_000]
    assert [fact.pid for fact in told if isinstance(fact, WayClosed)] == [holder.pid]
