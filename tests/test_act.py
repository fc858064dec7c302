"""The hand's parts: mounts as it reads them, what it never touches, what it remembers; USB; codes typed at the machine."""

import base64
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent import unlocking
from agent.act import filesystems, usbports
from agent.act.exempt import system_devices
from agent.act.hand import Hand
from agent.act.journal import NAME, Done, Journal
from agent.contract import unlock
from agent.core.facts import Acted, Device, Fact, Unlocked
from agent.core.media import Medium, medium_of
from agent.core.register import Verdict
from agent.core.stopping import Stop, StoppedMount
from agent.identity import Identity, Pinned, load_or_create
from agent.sense.refusing import Rule
from tests.house import until
from tests.kernel_lab import EXT4, ROOT, medium, run

MOUNTINFO = b"""25 1 8:2 / / rw,relatime shared:1 - ext4 /dev/sda2 rw
26 25 8:1 / /boot/efi rw,nosuid,nodev,noexec - vfat /dev/sda1 rw,fmask=0022,codepage=437
40 25 0:45 / /media/stick\\040two ro,nosuid,nodev - ntfs3 /dev/sdb1 rw,uid=1000,gid=1000
not a line of its form
41 25 8:33 / /media/other rw,nosuid - ext4 /dev/sdc1 ro,sync
"""


def test_mountinfo_as_a_remount_needs_it() -> None:
    found = filesystems.parse(MOUNTINFO)
    assert sorted(found) == [25, 26, 40, 41]
    stick, other = found[40], found[41]
    assert stick.mount == b"/media/stick two" and stick.options == b"uid=1000,gid=1000"
    assert (stick.read_only, stick.mount_read_only) == (False, True)
    assert stick.flags == 0x2 | 0x4
    assert other.read_only and other.flags == 0x2 | 0x10 and other.options == b""


def test_what_carries_the_system_is_known_by_its_devices(tmp_path: Path) -> None:
    table = filesystems.parse(MOUNTINFO)
    none = tmp_path / "swaps"
    none.write_text("Filename Type Size Used Priority\n")
    carried = system_devices(table, ["/media/stick two/state"], str(none))
    assert carried["8:2"] == "/" and carried["8:1"] == "/boot/efi"
    assert carried["0:45"] == "/media/stick two/state"
    assert "8:33" not in carried


@ROOT
@EXT4
def test_a_loop_device_is_followed_to_the_file_system_its_image_lies_on(tmp_path: Path) -> None:
    with medium(tmp_path) as stick:
        inner = stick / "inner"
        inner.mkdir()
        with medium(inner, 8) as lower:
            table = filesystems.mounted()
            outer = next(found for found in table.values() if found.mount == os.fsencode(stick))
            carried = system_devices(table, [str(lower)])
            assert carried[outer.dev] == str(lower)


def test_the_journal_outlives_a_kill_and_not_a_boot(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path), "boot-1")
    one, two = Done("read_only", "8:17", "stick", "/media/stick"), Done("node", "/dev/sdb1", "stick")
    journal.write(one)
    journal.write(two)
    assert (tmp_path / NAME).stat().st_mode & 0o777 == 0o600
    again = Journal(str(tmp_path), "boot-1")
    assert list(again.done.values()) == [one, two]
    again.strike(one)
    assert list(Journal(str(tmp_path), "boot-1").done.values()) == [two]
    assert not Journal(str(tmp_path), "boot-2").done
    (tmp_path / NAME).write_bytes(b'{"boot": "boot-1", "done": [{"act')
    assert not Journal(str(tmp_path), "boot-1").done


# -- the hand, with a world it can change ------------------------------------------------------------------------------


class World:
    """What a hand is given: a device in a sysfs of our own, and ears for what it tells."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.told, self.rules = folder, list[Fact](), dict[bytes, Rule]()
        self.state = folder / "state"
        self.state.mkdir()

    def hand(self, closed: bool = False) -> Hand:
        return Hand(Journal(str(self.state), "boot"), [str(self.state)], closed, self.refuse, self.told.append)

    def refuse(self, rules: dict[bytes, Rule]) -> dict[bytes, str]:
        self.rules = rules
        return {}

    def acts(self) -> list[Acted]:
        return [fact for fact in self.told if isinstance(fact, Acted) and fact.id]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    yield World(tmp_path)
    assert not [thread for thread in threading.enumerate() if thread.name == "hand"], "a hand was left over"


def stick_at(mount: Path, level: Any = "read_only", folder: bool = False, usb: bool = False, id: str = "sim:s") -> Stop:
    found = medium_of(Device(id=id, bus="usb", serial="A1", interfaces=["08:06:50"], declared_kind="storage", simulated=True))
    assert isinstance(found, Medium)
    mounts = () if usb else (StoppedMount(str(mount), -1, folder, True),)
    return Stop(medium=found, level=level, verdict=Verdict("unapproved", "not_registered", ""), usb=usb, mounts=mounts)


def port(folder: Path) -> Path:
    folder.mkdir()
    (folder / "authorized").write_text("1\n")
    (folder / "bDeviceClass").write_text("00\n")
    return folder / "authorized"


@ROOT
@EXT4
def test_options_and_flags_of_a_mount_come_back_as_they_were(world: World) -> None:
    with medium(world.folder) as mount:
        run(f"mount -o remount,nosuid,nodev,noatime {mount}")
        before = filesystems.mounted()
        hand = world.hand()
        hand.want([stick_at(mount)], 1)
        until(lambda: world.acts(), "nothing is told")
        stopped = next(found for found in filesystems.mounted().values() if found.mount == os.fsencode(mount))
        assert stopped.read_only and stopped.flags == 0x2 | 0x4
        assert world.acts()[0].did == ["read_only"]
        hand.want([], 2)
        until(lambda: len(world.acts()) > 1, "it is never released")
        assert filesystems.mounted() == before
        hand.close(5)


@ROOT
@EXT4
def test_only_what_we_made_read_only_is_made_writable(world: World) -> None:
    with medium(world.folder) as mount:
        run(f"mount -o remount,ro {mount}")
        hand = world.hand()
        hand.want([stick_at(mount)], 1)
        until(lambda: world.acts(), "nothing is told")
        hand.want([], 2)
        until(lambda: len(world.acts()) > 1, "it is never released")
        hand.close(5)
        assert next(found for found in filesystems.mounted().values() if found.mount == os.fsencode(mount)).read_only


@ROOT
@EXT4
def test_somebody_who_makes_it_writable_again_does_so_for_seconds(world: World) -> None:
    with medium(world.folder) as mount:
        hand = world.hand()
        hand.want([stick_at(mount)], 1)
        until(lambda: world.acts(), "nothing is told")
        run(f"mount -o remount,rw {mount}")

        def again() -> bool:
            return next(found for found in filesystems.mounted().values() if found.mount == os.fsencode(mount)).read_only

        until(again, "it stays writable")
        hand.close(5)


@ROOT
def test_a_block_device_takes_no_writes_and_then_takes_them_again(tmp_path: Path) -> None:
    image = tmp_path / "stick.img"
    image.write_bytes(bytes(1 << 20))
    done = subprocess.run(["losetup", "-f", "--show", image], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"needs loop devices: {done.stderr.strip()}")
    node = done.stdout.strip()
    try:
        number = os.stat(node).st_rdev
        assert filesystems.node_path(f"{os.major(number)}:{os.minor(number)}") == node
        filesystems.set_node_read_only(node, True)
        assert filesystems.node_is_read_only(node)
        raw = subprocess.run(["dd", "if=/dev/zero", f"of={node}", "count=1"], capture_output=True, text=True, check=False)
        assert raw.returncode != 0 and "not permitted" in raw.stderr
        filesystems.set_node_read_only(node, False)
        assert subprocess.run(["dd", "if=/dev/zero", f"of={node}", "count=1"], capture_output=True, check=False).returncode == 0
    finally:
        subprocess.run(["losetup", "-d", node], check=True)


@ROOT
@pytest.mark.skipif(shutil.which("ntfs-3g") is None or shutil.which("mkfs.ntfs") is None, reason="needs ntfs-3g")
def test_ntfs_by_fuse_is_made_read_only_above_its_server(tmp_path: Path) -> None:
    image, mount = tmp_path / "stick.img", tmp_path / "stick"
    mount.mkdir()
    with image.open("wb") as file:
        file.truncate(16 << 20)
    run(f"mkfs.ntfs -q -F {image}")
    done = subprocess.run(["ntfs-3g", image, mount], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"needs /dev/fuse: {done.stderr.strip()}")
    try:
        found = next(each for each in filesystems.mounted().values() if each.mount == os.fsencode(mount))
        filesystems.set_read_only(found, True)
        with pytest.raises(OSError, match="Read-only"):
            (mount / "x").write_text("x")
        filesystems.set_read_only(found, False)
        (mount / "x").write_text("x")
    finally:
        subprocess.run(["umount", mount], check=True)


def test_usb_authorization_is_written_and_hubs_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = port(tmp_path / "1-1")
    assert usbports.is_authorized(file) is True
    usbports.authorize(file, False)
    assert usbports.is_authorized(file) is False
    assert usbports.is_authorized(tmp_path / "gone" / "authorized") is None
    assert usbports.port("sim:stick") is None
    assert usbports.port(str(tmp_path / "1-1")) is None, "a device is one of /sys"


def test_usbguard_is_known_by_its_daemon_and_not_by_a_file_left_over(tmp_path: Path) -> None:
    pid_file = tmp_path / "usbguard.pid"
    assert not usbports.usbguard_runs(str(pid_file))
    pid_file.write_text(f"{os.getpid()}\n")
    assert not usbports.usbguard_runs(str(pid_file))
    with subprocess.Popen(
        ["bash", "-c", "echo -n usbguard-daemon > /proc/self/comm; read"],
        stdin=subprocess.PIPE,
    ) as daemon:
        pid_file.write_text(f"{daemon.pid}\n")
        until(lambda: usbports.usbguard_runs(str(pid_file)), "it is not known")
        assert daemon.stdin is not None
        daemon.stdin.close()


# -- break-glass -------------------------------------------------------------------------------------------------------

DAY_MS = 86_400_000
NOW = unlock.EPOCH_MS + 100 * DAY_MS
KEY = "usb:0951:1666:60A"


class Unlocking:
    """A machine that was enrolled, and the collector's side that makes codes for it."""

    def __init__(self, folder: Path) -> None:
        self.identity: Identity = load_or_create(folder / "agent")
        other: Identity = load_or_create(folder / "collector")
        self.identity.pin(Pinned(url="https://x", key=base64.b64encode(other.public_key).decode(), agent=self.identity.agent))
        self.secret = unlock.shared_secret(other.key, self.identity.public_key)
        self.desk = unlocking.Desk(str(folder / "agent"), self.identity)
        self.state = str(folder / "agent")
        self.taken: list[Unlocked] = []
        self.used: dict[str, int] = {}

    def code(self, at_ms: int = NOW, for_ms: int = 3_600_000, key: str = KEY, **more: Any) -> str:
        return unlock.make(self.secret, self.identity.agent, key, at_ms=at_ms, for_ms=for_ms, number=7, **more)

    def take(self, fact: Unlocked) -> bool:
        self.taken.append(fact)
        self.used[fact.id] = fact.until_ms
        return True

    def type(self, code: str, now_ms: int = NOW) -> unlocking.Said:
        found: list[unlocking.Said | None] = []
        asking = threading.Thread(target=lambda: found.append(unlocking.ask(self.state, code, "mark")))
        asking.start()
        until(lambda: (Path(self.state) / unlocking.ASKED).exists(), "nothing is asked")
        self.desk.look(now_ms, [KEY], 0, self.used, self.take)
        asking.join(20)
        assert found and found[0] is not None
        return found[0]


@pytest.fixture
def unlocked(tmp_path: Path) -> Unlocking:
    return Unlocking(tmp_path)


def test_a_good_code_is_taken_once(unlocked: Unlocking) -> None:
    code = unlocked.code(read_only=True)
    said = unlocked.type(code)
    assert (said.why, said.key, said.read_only) == ("", KEY, True)
    assert unlocked.taken[0].until_ms == said.until_ms > NOW
    assert unlocked.type(code).why == "used"


@pytest.mark.parametrize(
    ("code", "why"),
    [({"at_ms": NOW - DAY_MS}, "over"), ({"at_ms": NOW + DAY_MS}, "too_early"), ({"key": "usb:other"}, "not_for_this")],
)
def test_other_codes_are_not(unlocked: Unlocking, code: dict[str, Any], why: str) -> None:
    assert unlocked.type(unlocked.code(**code)).why == why
    assert not unlocked.taken


def test_a_mistyped_code_names_its_group_and_guessing_is_slow(unlocked: Unlocking) -> None:
    said = unlocked.type("0" * 24)
    assert (said.why, said.group) == ("mistyped", 1)
    for _ in range(unlocking.TRIES - 1):
        unlocked.type("0" * 24)
    assert unlocked.type(unlocked.code()).why == "too_often"
    assert unlocked.type(unlocked.code(), NOW + unlocking.WITHIN_MS).why == ""


def test_a_clock_that_was_set_back_buys_nothing(unlocked: Unlocking) -> None:
    code = unlocked.code()
    unlocked.desk.look(NOW + DAY_MS, [KEY], 0, {}, unlocked.take)  # the machine has seen a later time
    assert unlocked.type(code).why == "clock_back"


def test_a_code_that_can_not_be_recorded_is_not_taken(unlocked: Unlocking) -> None:
    unlocked.take = lambda fact: False  # type: ignore[method-assign]
    assert unlocked.type(unlocked.code()).why == "not_recorded"


def test_a_machine_without_a_collector_takes_none(tmp_path: Path) -> None:
    machine = Unlocking(tmp_path)
    (tmp_path / "agent" / "collector.json").unlink()
    assert machine.type(machine.code()).why == "no_collector"
    assert json.loads((tmp_path / "agent" / "agent.json").read_text())  # the identity is untouched


def test_nothing_typed_costs_nothing(unlocked: Unlocking) -> None:
    unlocked.desk.look(NOW, [KEY], 0, {}, unlocked.take)
    assert not unlocked.taken and not (Path(unlocked.state) / unlocking.SAID).exists()
