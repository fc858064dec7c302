"""A workstation in memory: people, programs, protected files and media, told to a real Core as the kernel would tell it.

The order of facts is the kernel's awkward one: a shell's child opens the destination before it execs; what a held writer
has open is known at its first open on the medium; equal events of one file merge into the first, so that a close can be told
before a later read; a process is gone before its last close is read. On failure the story and every event are printed.
"""

import itertools
import json
from typing import Any

from ocsf_check import problems

from agent.contract.event import seal
from agent.core import facts
from agent.core.doubts import Doubt
from agent.core.facts import Device, OpenFile, Process
from agent.core.pipeline import Core, CoreConfig, ProtectedDir, WindowLimit

START = 1_767_225_600_000
ROOT = "/srv/customers"
STICK = Device(
    id="/sys/devices/usb1/1-1",
    bus="usb",
    subsystem="usb",
    vendor="Kingston",
    model="DataTraveler 3.0",
    serial="60A44C413F8CF320",
    vendor_id="0951",
    product_id="1666",
    interfaces=["08:06:50"],
    nodes=["8:16", "8:17"],
    removable=True,
)
PHONE = Device(
    id="/sys/devices/usb1/1-2",
    bus="usb",
    subsystem="usb",
    vendor="Google",
    model="Pixel 7",
    serial="28161FDH2000X1",
    vendor_id="18d1",
    product_id="4ee1",
    interfaces=["06:01:01"],
    nodes=["phone:1"],
    properties={"ID_MTP_DEVICE": "1"},
)
LIMITS = [
    WindowLimit(name="burst", window_s=600, bytes=100 << 20, files=100),
    WindowLimit(name="drip", window_s=30 * 86400, bytes=1 << 30, files=500),
]


class Seen(dict[str, Any]):
    """An event as its readers see it, with short ways to what the stories assert."""

    code = property(lambda self: self["metadata"]["event_code"])
    uid = property(lambda self: self["metadata"]["uid"])
    said = property(lambda self: self["unmapped"]["sekisho"])
    severity = property(lambda self: self["severity_id"])

    def __getattr__(self, name: str) -> Any:
        return self["unmapped"]["sekisho"].get(name)

    @property
    def login_user(self) -> str | None:
        return (self.said.get("login") or {}).get("user")


class Program:
    """A running program of the workstation."""

    def __init__(self, ws: "Workstation", process: Process) -> None:
        self.ws, self.process, self.pid = ws, process, process.pid

    def seen(self, **changes: Any) -> "Program":
        for name, value in changes.items():
            setattr(self.process, name, value)
        self.ws.tell(facts.ProcSeen(at_ms=self.ws.now, process=facts.msgspec.structs.replace(self.process)))
        return self

    def child(self, exe: str, *argv: str, **more: Any) -> "Program":
        parents = [facts.Parent(self.pid, self.process.start, self.process.exe), *self.process.parents]
        same = {name: getattr(self.process, name) for name in ("uid", "user", "loginuid", "login_user", "session", "tty")}
        return self.ws.program(exe, *argv, ppid=self.pid, parents=parents, **{**same, **more})

    def read(self, name: str) -> "Program":
        """Open a file: told only if somebody watches it."""
        path = self.ws.path(name)
        key = self.ws.keys[path]
        if self.ws.watched(path):
            fact = facts.Opened(at_ms=self.ws.now, pid=self.pid, key=key, path=path)
            if self.pid in self.ws.writers:
                fact.size, fact.inode = self.ws.sizes[path], int.from_bytes(key[-4:], "big")
            self.ws.tell(fact)
        return self

    def create(self, path: str) -> "Program":
        self.ws.file(path, 0)
        self.ws.writers.add(self.pid)
        self.ws.tell(facts.Created(at_ms=self.ws.now, pid=self.pid, key=self.ws.keys[path], path=path))
        return self

    def close(self, path: str, size: int | None) -> "Program":
        self.ws.sizes[path] = size or 0
        self.ws.tell(facts.Closed(at_ms=self.ws.now, pid=self.pid, key=self.ws.keys[path], path=path, size=size))
        return self

    def rename(self, old: str, new: str, told: bool = True) -> "Program":
        self.ws.keys[new], self.ws.sizes[new] = self.ws.keys.pop(old), self.ws.sizes.pop(old)
        if told:
            fact = facts.Moved(at_ms=self.ws.now, pid=self.pid, key=self.ws.keys[new], path=new, old_path=old)
            fact.size = self.ws.sizes[new]
            self.ws.tell(fact)
        return self

    def delete(self, path: str) -> "Program":
        self.ws.tell(facts.Deleted(at_ms=self.ws.now, pid=self.pid, key=self.ws.keys.pop(path), path=path))
        return self

    def copy(self, name: str, to: str | None = None) -> "Program":
        """A plain copy, as cp does it: the source is held open when the destination is made."""
        source = self.ws.path(name)
        to = to or f"{self.ws.stick}/{source.rpartition('/')[2]}"
        self.read(source)
        self.seen(files=[OpenFile(source, self.ws.sizes[source], self.ws.keys[source])])
        return self.create(to).close(to, self.ws.sizes[source])

    def end(self) -> "Program":
        self.ws.tell(facts.ProcGone(at_ms=self.ws.now, pid=self.pid, start=self.process.start))
        return self


class Workstation:
    """`ws.login(...)`, `ws.plug(...)`, `ws.copy(...)`, then `ws.only("file.copied_out")`."""

    def __init__(self, **config: Any) -> None:
        self._uids = itertools.count(1)
        self.config = CoreConfig(
            agent="a" * 32,
            name="ws-042",
            version="0.1",
            protect=[ProtectedDir(path=ROOT, label="顧客マスタ")],
            limits=LIMITS,
            device_type=2,
        )
        for name, value in config.items():
            setattr(self.config, name, value)
        self.core = Core(self.config, lambda: f"uid-{next(self._uids)}")
        self.now = START
        self.story: list[str] = []
        self.events: list[Seen] = []
        self.raw: list[bytes] = []
        self.sizes: dict[str, int] = {}
        self.keys: dict[str, bytes] = {}
        self.writers: set[int] = set()
        self.stick = ""
        self.alike: dict[str, str] = {}
        self.held: dict[str, dict[str, int]] = {}
        self.doubts: list[Doubt] = []
        self._pids = itertools.count(1000)
        self._keys = itertools.count(1)
        self._mounts: dict[str, list[tuple[int, str]]] = {}
        self._mount_ids = itertools.count(30)
        self.shell = self.program("/usr/sbin/sshd")
        self.file(f"{ROOT}/a.csv", 300_000)
        self.file(f"{ROOT}/b.csv", 200_000)
        self.file("/home/sato/holiday.jpg", 5_000_000)

    # -- the machine ---------------------------------------------------------------------------------------------------

    def tell(self, fact: facts.Fact) -> "Workstation":
        self.story.append(facts.write(fact).decode())
        for event in self.core.feed(fact):
            data = seal(event, len(self.events) + 1, 1, bytes(32))
            self.raw.append(data)
            self.events.append(Seen(json.loads(data)))
            wrong = problems(self.events[-1])
            assert not wrong, self.tale(f"not OCSF: {wrong}\n{data.decode()}")
        for path in self.core.ask():  # the daemon looks them up at once
            size = self.sizes.get(path)
            inode = None if size is None else int.from_bytes(self.keys[path][-4:], "big")
            self.tell(facts.Sized(at_ms=self.now, path=path, size=size, inode=inode))
        for doubt in self.core.doubt():
            self.doubts.append(doubt)
            alike = self.alike.get(doubt.path, "unknown")
            if alike:  # else nobody answers
                told = facts.Compared(at_ms=self.now, key=doubt.key, path=doubt.path, size=doubt.size, alike=alike)
                told.held = self.held.get(doubt.path, {})
                self.tell(told)
        return self

    def wait(self, seconds: float) -> "Workstation":
        """Time passes, with a tick each second (each minute, over long times)."""
        end = self.now + int(seconds * 1000)
        step = 1_000 if seconds < 3_600 else 60_000 if seconds < 86_400 * 2 else 3_600_000
        while self.now < end:
            self.now = min(end, self.now + step)
            self.tell(facts.Tick(at_ms=self.now))
        return self

    def restart(self, boot_id: str = "") -> "Workstation":
        """The agent is killed and starts again with what it kept; media that are there are told as cold."""
        kept = self.core.state()
        self.core = Core(self.config, lambda: f"uid-{next(self._uids)}")
        self.core.restore(kept)
        return self.tell(facts.Started(at_ms=self.now, boot_id=boot_id))

    def file(self, path: str, size: int) -> str:
        self.sizes[path] = size
        self.keys[path] = b"fs01" + next(self._keys).to_bytes(4, "big")
        return path

    def path(self, name: str) -> str:
        return name if name.startswith("/") else f"{ROOT}/{name.removeprefix('customers/')}"

    def watched(self, path: str) -> bool:
        """Whether a mark lies on it: protected directories, and files that were in one (hard links, moved out)."""
        inside = {self.keys[known] for known in self.keys if known.startswith(ROOT + "/")}
        return path.startswith(ROOT + "/") or self.keys[path] in inside | self._marked

    _marked: frozenset[bytes] = frozenset()

    def mark(self, path: str) -> None:
        self._marked |= {self.keys[path]}

    # -- people and programs -------------------------------------------------------------------------------------------

    def program(self, exe: str, *argv: str, **more: Any) -> Program:
        pid = more.pop("pid", next(self._pids))
        process = Process(pid=pid, start=pid * 10, exe=exe, argv=[exe.rpartition("/")[2], *argv], **more)
        return Program(self, process).seen()

    def login(self, user: str, uid: int = 1000, tty: str = "tty2") -> "Workstation":
        """A person sits down: a shell with a login uid, and the active session."""
        who = {"uid": uid, "user": user, "loginuid": uid, "login_user": user, "session": str(uid % 100), "tty": tty}
        self.shell = self.program("/usr/bin/bash", **who)
        return self.tell(facts.Session(at_ms=self.now, uid=uid, user=user, session=str(uid % 100)))

    def sudo(self, user: str, uid: int = 0) -> "Workstation":
        """The shell of another user, below the one of who logged in: the login uid stays."""
        self.shell = self.shell.child("/usr/bin/sudo", "-i").child("/usr/bin/bash", uid=uid, user=user)
        return self

    def run(self, exe: str, *argv: str, **more: Any) -> Program:
        return self.shell.child(exe if exe.startswith("/") else f"/usr/bin/{exe}", *argv, **more)

    # -- media ---------------------------------------------------------------------------------------------------------

    def plug(self, device: Device = STICK, mount: str | None = "", **more: Any) -> "Workstation":
        """Plug in, and mount unless `mount` is None."""
        self.tell(facts.Plugged(at_ms=self.now, device=device, **more))
        return self if mount is None else self.mount(device, mount or f"/media/{device.vendor}", **more)

    def mount(self, device: Device, at: str, **more: Any) -> "Workstation":
        self.stick = at
        mount_id = next(self._mount_ids)
        self._mounts.setdefault(device.id, []).append((mount_id, at))
        fact = facts.Mounted(
            at_ms=self.now, mount_id=mount_id, dev=device.nodes[-1], mount=at, fs="vfat", label="STICK", **more
        )
        return self.tell(fact)

    def unplug(self, device: Device = STICK, mounts_too: bool = True) -> "Workstation":
        self.tell(facts.Unplugged(at_ms=self.now, id=device.id))
        for mount_id, _ in self._mounts.pop(device.id, []) if mounts_too else []:
            self.tell(facts.Unmounted(at_ms=self.now, mount_id=mount_id))
        return self

    def approve(self, device: Device, version: int = 1, **more: Any) -> "Workstation":
        key = f"usb:{device.vendor_id}:{device.product_id}:{device.serial}"
        entry = facts.Approval(id="A-1", key=key, **more)
        return self.tell(facts.Register(at_ms=self.now, version=version, approvals=[entry]))

    # -- ways out ------------------------------------------------------------------------------------------------------

    def copy(self, name: str, by: str = "cp", to: str | None = None) -> Program:
        """A protected (or other) file goes to the medium, by one of the programs people use."""
        source = self.path(name)
        to = to or f"{self.stick}/{source.rpartition('/')[2]}"
        size = self.sizes[source]
        if by in ("cp", "mv", "install"):
            made = self.run(by, source, to).copy(source, to)
            if by == "mv":
                made.delete(source)
        elif by == "cat":  # the shell's child opens the destination before it execs cat
            made = self.run("bash").create(to)
            made.seen(exe="/usr/bin/cat", argv=["cat", source]).read(source).close(to, size)
        elif by in ("dd", "python"):
            made = self.run(by, source).read(source).create(to).close(to, size)
        elif by == "rsync":
            return self.rsync([source])
        else:
            raise AssertionError(by)
        return made.end()

    def rsync(self, sources: list[str]) -> Program:
        """Sender reads, its grandchild writes temporary names and renames them; all in one batch of facts."""
        sender = self.run("rsync", "-a", *sources, self.stick)
        receiver = sender.child("/usr/bin/rsync").child("/usr/bin/rsync")
        for source in sources:
            sender.read(source)
        for source in sources:
            name = self.path(source).rpartition("/")[2]
            temp = f"{self.stick}/.{name}.Xy12Zq"
            receiver.create(temp).close(temp, self.sizes[self.path(source)]).rename(temp, f"{self.stick}/{name}")
        return sender

    # -- what came out -------------------------------------------------------------------------------------------------

    def all(self, code: str) -> list[Seen]:
        return [event for event in self.events if event.code == code]

    def only(self, code: str) -> Seen:
        found = self.all(code)
        assert len(found) == 1, self.tale(f"{len(found)} events {code}, not one")
        return found[0]

    def none(self, code: str) -> "Workstation":
        assert not self.all(code), self.tale(f"there must be no {code}")
        return self

    def sources(self) -> list[str]:
        """What left, by the names of the sources, in order."""
        return [event.source["path"].removeprefix(ROOT + "/") for event in self.all("file.copied_out")]

    def tale(self, why: str) -> str:
        events = (f"{each.code} {json.dumps(each.said, ensure_ascii=False)}" for each in self.events)
        return "\n".join([why, "-- the story:", *self.story[-80:], "-- the events:", *events])
