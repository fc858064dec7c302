"""The lab: disks with protected directories, media of every kind, one agent with a state of its own, and somebody to send to.

Owns: making and unmaking all of it below one folder, in the order in which a machine would: disks, files, the agent, then the
media. Needs root. What can't be made here (a file system that the kernel or mkfs lacks) is said in `missing`, by name. Must
not know the table's rows, nor what the agent ought to tell.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from agent import simulate
from agent.checkup import NotRunning, ask
from agent.spoolfile import read_events

FIRST, SECOND = 1000, 1001
"""Login uids of the two persons."""
_READY_S = 30.0
_DISKS_S = 6.0
"""The agent looks for protected directories every 5 s."""
_IMAGE_MIB = 512
_ROOMY = ("medium-large", "disk-ext4")
_HERE = Path(__file__).resolve().parent
_PEER, _GATE = "10.213.77.2", "10.213.77.1"


class LabError(Exception):
    """The lab can't be made at all; str() says why."""


class Lab:
    """`disks` and `media` by name → folder. Use as a context; nothing stays mounted after it."""

    def __init__(self, root: Path, record: Path | None = None) -> None:
        self.root = root
        self.missing: dict[str, str] = {}
        self.disks: dict[str, Path] = {}
        self.media: dict[str, Path] = {}
        self.devices: dict[str, str] = {}
        self.events: list[dict[str, Any]] = []
        self._record = record
        self._seq = 0
        self._stack = ExitStack()
        self._agent: subprocess.Popen[bytes] | None = None
        self.carry = root / "carry"
        self.state = root / "state"
        self.log = root / "agent.log"
        self.peer = ""

    def __enter__(self) -> "Lab":
        if os.geteuid() != 0:
            raise LabError("the matrix mounts file systems and sets login uids; run it as root")
        self.root.chmod(0o755)
        for name in ("disks", "media", "images", "work"):
            (self.root / name).mkdir()
        done = _run("cc", "-O2", "-o", self.carry, _HERE / "carry.c")
        if done:
            self.missing["carry"] = f"the helper can't be compiled: {done}"
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.stop()
        finally:
            self._stack.close()

    # -- file systems --------------------------------------------------------------------------------------------------

    def disk(self, name: str) -> None:
        """Make the disk `name` with its protected directory and a place beside it."""
        self._made(name, self.root / "disks" / name, "disk")
        if name in self.disks:
            for folder in ("protected", "elsewhere"):
                (self.disks[name] / folder).mkdir()
                (self.disks[name] / folder).chmod(0o777)

    def medium(self, name: str) -> None:
        """Make the medium `name`, not plugged in yet."""
        self._made(name, self.root / "media" / name, "medium")
        if name in self.media:
            self.media[name].chmod(0o777)

    def scratch(self) -> None:
        """A tmpfs that is neither protected nor a medium."""
        where = self.root / "work" / "scratch"
        where.mkdir()
        self._mount(where, "-t", "tmpfs", "-o", "size=2g", "scratch")

    def plug(self, name: str) -> None:
        """Its descriptor appears, and the agent (if it runs) takes notice."""
        if name == "device":
            said = f'vendor = "Kingston"\nserial = {json.dumps(self.serial(name))}\ndevice = {json.dumps(self.devices[name])}\n'
            (self.root / "media" / f"{name}{simulate.SUFFIX}").write_text(said)
            patience = time.monotonic() + _DISKS_S
            while time.monotonic() < patience and not self._present(name):
                time.sleep(0.1)
            return
        simulate.plug(self.root / "media", name, serial=self.serial(name))
        if self._agent is not None:
            path = str(self.media[name])
            self._until(lambda: path in self.status().get("watched_media", []), f"{name} is not watched")

    def _present(self, name: str) -> bool:
        return any(row["serial"] == self.serial(name) for row in self.status().get("media", []))

    @staticmethod
    def serial(name: str) -> str:
        """The serial number of the medium `name`."""
        return f"WAYS-{name.upper()}"

    def _made(self, name: str, where: Path, what: str) -> None:
        where.mkdir()
        kind = {"early": "ext4", "large": "ext4", "btrfs": "btrfs-subvolume" if what == "disk" else "btrfs"}.get(name, name)
        why = getattr(self, "_" + kind.replace("-", "_"))(where, f"{what}-{name}")
        if why:
            self.missing[f"{what} {name}"] = f"no {kind} here: {why}"
            return
        if where.is_dir():
            (self.disks if what == "disk" else self.media)[name] = where

    def _disk(self, where: Path, image: str) -> str:
        return ""

    _folder = _disk

    def _tmpfs(self, where: Path, image: str) -> str:
        return self._mount(where, "-t", "tmpfs", "-o", "size=1g", image)

    def _ext4(self, where: Path, image: str) -> str:
        many = ["-N", "330000"] if image.endswith(_ROOMY) else []
        return self._image(image, "mkfs.ext4", "-q", "-F", *many) or self._mount(where, "-o", "loop", self._file(image))

    def _xfs(self, where: Path, image: str) -> str:
        return self._image(image, "mkfs.xfs", "-q") or self._mount(where, "-o", "loop", self._file(image))

    def _btrfs(self, where: Path, image: str) -> str:
        return self._image(image, "mkfs.btrfs", "-q") or self._mount(where, "-o", "loop", self._file(image))

    def _btrfs_subvolume(self, where: Path, image: str) -> str:
        whole = self.root / "work" / f"{image}-whole"
        whole.mkdir()
        why = self._btrfs(whole, image) or _run("btrfs", "subvolume", "create", whole / "sub")
        if why:
            return why
        device = (
            subprocess.run(["findmnt", "-no", "SOURCE", whole], capture_output=True, text=True).stdout.split("[")[0].strip()
        )
        return self._mount(where, "-t", "btrfs", "-o", "subvol=sub", device)

    def _overlay(self, where: Path, image: str) -> str:
        base = self.root / "work" / image
        base.mkdir()
        why = self._mount(base, "-t", "tmpfs", "-o", "size=1g", image)
        for folder in ("lower", "upper", "work"):
            (base / folder).mkdir()
        options = f"lowerdir={base}/lower,upperdir={base}/upper,workdir={base}/work"
        return why or self._mount(where, "-t", "overlay", "-o", options, "overlay")

    def _fuse(self, where: Path, image: str) -> str:
        """A file system in user space over an ext4 image, as ntfs-3g and exfat-fuse are."""
        if shutil.which("bindfs") is None:
            return "install bindfs"
        base = self.root / "work" / image
        base.mkdir()
        why = self._ext4(base, image) or _run("chmod", "777", base) or _run("bindfs", base, where)
        if not why:
            self._stack.callback(_run, "umount", "-l", where)
        return why

    def _none(self, where: Path, image: str) -> str:
        where.rmdir()
        return ""

    def _device(self, where: Path, image: str) -> str:
        """A block device of its own, which a case formats and mounts."""
        where.rmdir()
        why = self._image(image, "mkfs.ext4", "-q", "-F")
        if why:
            return why
        done = subprocess.run(["losetup", "--find", "--show", self._file(image)], capture_output=True, text=True)
        if done.returncode:
            return done.stderr.strip()
        self.devices["device"] = done.stdout.strip()
        self._stack.callback(_run, "losetup", "-d", self.devices["device"])
        return ""

    def _file(self, image: str) -> Path:
        return self.root / "images" / f"{image}.img"

    def _image(self, image: str, *mkfs: str) -> str:
        if shutil.which(mkfs[0]) is None:
            return f"install {mkfs[0]}"
        with self._file(image).open("wb") as file:
            file.truncate((2048 if image.endswith(_ROOMY) else _IMAGE_MIB) << 20)  # sparse
        return _run(*mkfs, self._file(image))

    def _mount(self, where: Path, *how: str | Path) -> str:
        why = _run("mount", *how, where)
        if not why:
            self._stack.callback(_run, "umount", "-l", where)
        return why

    def connect(self) -> None:
        """Somebody to send to: a network namespace of its own, with a server in it that takes what comes. Sets `peer`."""
        name, link = f"ways{os.getpid()}", f"wo{os.getpid() % 100000}"
        why = _run("ip", "netns", "add", name)
        if why:
            self.missing["peer"] = f"no network namespace: {why}"
            return
        self._stack.callback(_run, "ip", "netns", "del", name)
        steps = [
            f"link add {link} type veth peer name eth0 netns {name}",
            f"addr add {_GATE}/30 dev {link}",
            f"link set {link} up",
            f"-n {name} addr add {_PEER}/30 dev eth0",
            f"-n {name} link set eth0 up",
            f"-n {name} link set lo up",
        ]
        why = next((bad for step in steps if (bad := _run("ip", *step.split()))), "")
        if why:
            self.missing["peer"] = f"no link to a network namespace: {why}"
            return
        command = ["ip", "netns", "exec", name, sys.executable, _HERE / "peer.py", _PEER]
        server = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert server.stdout
        self._stack.callback(server.stdout.close)
        self._stack.callback(server.wait)
        self._stack.callback(server.kill)
        if server.stdout.readline():
            self.peer = _PEER
        else:
            self.missing["peer"] = "the server of the matrix did not start"

    # -- the agent -----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the agent over all disks, and wait until it watches them."""
        protect = "".join(
            f"[[agent.protect]]\npath = {json.dumps(str(at / 'protected'))}\nlabel = {json.dumps(name)}\n"
            for name, at in self.disks.items()
        )
        config = self.root / "config.toml"
        config.write_text(
            f'[agent]\nname = "matrix"\nstate_dir = {json.dumps(str(self.state))}\n{protect}'
            f'[agent.media]\nsimulated_dir = {json.dumps(str(self.root / "media"))}\n[agent.spool]\nmax_bytes = "4GiB"\n'
        )
        command = [sys.executable, "-m", "agent.cli", "run", "-c", str(config)]
        if self._record:
            command += ["--record", str(self._record)]
        environment = os.environ | {"PYTHONPATH": str(_HERE.parent.parent)}
        with self.log.open("ab") as log:
            self._agent = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=self.root)
        self._until(lambda: bool(self.status().get("protected")), "the agent does not answer")
        patience = time.monotonic() + _DISKS_S  # one that can't be watched is a finding of its cases, no reason to stop
        while time.monotonic() < patience and not all(each["watched"] for each in self.status()["protected"]):
            time.sleep(0.1)

    def stop(self) -> None:
        """End the agent and take its last events."""
        if self._agent is None:
            return
        self._agent.terminate()
        try:
            self._agent.wait(_READY_S)
        except subprocess.TimeoutExpired:
            self._agent.kill()
            self._agent.wait()
        self._agent = None
        if (self.state / "spool.db").exists():  # else it never came so far
            self.news()

    def alive(self) -> None:
        """Raises LabError if the agent was started and has ended."""
        if self._agent is not None and self._agent.poll() is not None:
            raise LabError(f"the agent ended with {self._agent.returncode}:\n{self.log.read_text()[-2000:]}")

    def status(self) -> dict[str, Any]:
        """The agent's status; empty while it does not answer. Raises LabError when it ended."""
        self.alive()
        try:
            return ask(str(self.state))
        except NotRunning:
            return {}

    def news(self) -> list[dict[str, Any]]:
        """Events recorded since the last call; `events` has all."""
        fresh = []
        for seq, data in read_events(str(self.state), self._seq):
            self._seq = seq
            fresh.append(json.loads(data))
        self.events += fresh
        return fresh

    def _until(self, holds: Any, otherwise: str) -> None:
        deadline = time.monotonic() + _READY_S
        while not holds():
            if time.monotonic() > deadline:
                raise LabError(f"{otherwise}\n{self.log.read_text()[-2000:]}\n{json.dumps(self.status())[:3000]}")
            time.sleep(0.05)


def _run(*command: str | Path) -> str:
    """Run a command of the lab's own; why it failed, empty if it did not."""
    try:
        done = subprocess.run([str(each) for each in command], capture_output=True, text=True, timeout=120)
    except OSError as error:
        return f"{command[0]}: {error.strerror}"
    return (done.stderr.strip() or f"{command[0]} ended with {done.returncode}") if done.returncode else ""
