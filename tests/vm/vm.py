#!/usr/bin/env python3
"""A guest with real USB for acceptance tests: start, run, plug, cut, kill, restore.

    with VM() as vm:                              # about 2 s: a booted guest, restored
        stick = vm.plug_stick("S3R1AL", fs="vfat", files={"a.csv": b"1,2"})
        vm.run(f"mount {stick.part} /mnt && cat /mnt/a.csv")
        vm.run("cp ~/list.csv /media/x", user="staff")   # loginuid of staff
        vm.unplug("S3R1AL")

The first use of an image boots it once and keeps the running state beside it.
See README.md for what each thing costs and what it cannot show.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import io
import itertools
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sticks

HERE = Path(__file__).resolve().parent
CACHE = Path(os.environ.get("SEKISHO_VM_CACHE") or Path.home() / ".cache/sekisho-vm")
SHARE = "/mnt/share"
BOOT_S = 300  # a cold boot under emulation, with the other core busy
Json = dict[str, Any]


class LabError(Exception):
    pass


@dataclass
class Result:
    rc: int
    out: str
    err: str
    took: float  # seconds in the guest
    timed_out: bool = False


@dataclass
class Stick:
    serial: str
    image: Path
    dev: str | None = None  # in the guest: /dev/sdb
    part: str | None = None  # /dev/sdb1, or dev where there is no partition
    took: float | None = None  # from device_add until udev had made its links


class Qmp:
    """QEMU's control socket: one command at a time, events kept for whoever waits."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(30)
        try:
            self.sock.connect(str(path))
        except OSError:
            self.sock.close()
            raise
        self.stream = self.sock.makefile("rw")
        self.events: list[Json] = []
        self._read()  # greeting
        self("qmp_capabilities")

    def _read(self) -> Json:
        line = self.stream.readline()
        if not line:
            raise LabError("QEMU is gone")
        message: Json = json.loads(line)
        return message

    def __call__(self, command: str, **args: Any) -> Any:
        self.stream.write(json.dumps({"execute": command, "arguments": args}) + "\n")
        self.stream.flush()
        while True:
            msg = self._read()
            if "event" in msg:
                self.events.append(msg)
            elif "error" in msg:
                raise LabError(f"{command}: {msg['error']['desc']}")
            else:
                return msg["return"]

    def hmp(self, line: str) -> None:
        if text := self("human-monitor-command", **{"command-line": line}).strip():
            raise LabError(f"{line}: {text}")

    def wait_event(self, name: str, **data: Any) -> None:
        def wanted(msg: Json) -> bool:
            return bool(msg["event"] == name and data.items() <= msg.get("data", {}).items())

        while not any(map(wanted, self.events)):
            self.events.append(self._read())
        self.events.clear()

    def close(self) -> None:
        self.stream.close()
        self.sock.close()


class Channel:
    """The host end of guestd's port. Answers may come in any order."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        try:
            self.sock.connect(str(path))
        except OSError:
            self.sock.close()
            raise
        self.ids = itertools.count(int(time.time() * 1000))  # no clash with an earlier connection's
        self.waiting: dict[int, Future[tuple[Json, bytes]]] = {}
        self.lock = threading.Lock()
        threading.Thread(target=self._reader, daemon=True).start()

    def send(self, op: str, body: bytes = b"", **head: Any) -> Future[tuple[Json, bytes]]:
        future: Future[tuple[Json, bytes]] = Future()
        with self.lock:
            number = next(self.ids)
            self.waiting[number] = future
            raw = json.dumps({"id": number, "op": op, **head}).encode()
            self.sock.sendall(struct.pack(">II", len(raw), len(body)) + raw + body)
        return future

    def _reader(self) -> None:
        with suppress(OSError, struct.error), self.sock.makefile("rb") as stream:
            while True:
                head_len, body_len = struct.unpack(">II", stream.read(8))
                head, body = json.loads(stream.read(head_len)), stream.read(body_len)
                if future := self.waiting.pop(head["id"], None):
                    future.set_result((head, body))
        for future in self.waiting.values():
            future.set_exception(LabError("the guest is gone"))

    def close(self) -> None:
        with suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()


class VM:
    """One guest. Its disk, sockets, sticks and log live in `folder` (a temporary one by default)."""

    def __init__(
        self,
        folder: Path | None = None,
        *,
        kernel: str = "stable",
        base: str = "ready",
        cold: bool = False,
        share: Path | None = None,
        forwards: Mapping[int, int] | None = None,
        memory_mb: int = 1024,
        append: str = "",
    ) -> None:
        """`share`: a host folder at /mnt/share. `forwards`: host port to guest port.

        The guest reaches a server on the host's loopback as 10.0.2.2 ("collector").
        `base` is the running state to restore: "ready", or one that `freeze` kept.
        `cold` boots instead of restoring the ready state; `append` and `memory_mb`
        have an effect only then.
        """
        self.image = CACHE / kernel
        self.base = base
        self.own_folder = folder is None
        self.folder = Path(folder or tempfile.mkdtemp(prefix="lab-vm-"))
        self.folder.mkdir(parents=True, exist_ok=True)
        self.cold = cold
        self.share = Path(share) if share else None
        self.forwards = dict(forwards or {})
        self.memory_mb = memory_mb
        self.append = append
        self.detached = False
        self.pid: int | None = None
        self.qmp: Qmp
        self.channel: Channel

    # -- life ---------------------------------------------------------------

    def __enter__(self) -> VM:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def start(self) -> float:
        """Restore the ready state (or boot, if cold); returns the seconds it took."""
        began = time.monotonic()
        if self.cold:
            self._new_disk(self.image / "root.qcow2")
            self._launch()
        else:
            if self.base == "ready":
                make_ready(self.image)
            self._new_disk(self.image / f"{self.base}.qcow2")
            self._launch(self.image / f"{self.base}.state")
        self.wait_ready()
        return time.monotonic() - began

    def stop(self) -> None:
        """Pull the plug and, where the folder was ours, remove it."""
        self.power_loss()
        if self.own_folder:
            shutil.rmtree(self.folder, ignore_errors=True)

    def power_loss(self) -> None:
        """SIGKILL: what the guest had not flushed is lost. `power_on` boots the same disk."""
        if self.pid is None:
            return
        for end in (getattr(self, "qmp", None), getattr(self, "channel", None)):
            if end:
                end.close()
        if is_qemu(self.pid, self.folder):
            os.kill(self.pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(self.pid, 0)
        self.pid = None

    def power_on(self) -> float:
        began = time.monotonic()
        self._launch()
        self.wait_ready()
        return time.monotonic() - began

    def reboot(self, hard: bool = False) -> float:
        """Restart the guest: in order, or by the reset button. Sticks stay plugged."""
        began = time.monotonic()
        before = self.run("cat /proc/sys/kernel/random/boot_id").out
        if hard:
            self.qmp("system_reset")
        else:
            self.run("systemctl reboot")
        while True:
            self._reconnect()
            with suppress(LabError):
                self.wait_ready()
                if self.run("cat /proc/sys/kernel/random/boot_id").out != before:
                    return time.monotonic() - began
            time.sleep(0.5)

    def snapshot(self, name: str) -> float:
        """Keep the running guest (RAM and disk) under a name. Unplug everything first."""
        self._need_bare()
        began = time.monotonic()
        self._unmount_share()
        self.qmp.hmp(f"savevm {name}")
        self._mount_share()
        return time.monotonic() - began

    def restore(self, name: str) -> float:
        """Back to a snapshot of this guest; whatever is plugged is pulled first."""
        began = time.monotonic()
        for serial in self.plugged():
            self.unplug(serial, wait=False)
        self._unmount_share()
        try:
            self.qmp.hmp(f"loadvm {name}")
        finally:
            self.qmp("cont")  # a failed loadvm leaves the guest stopped
        self.network(True)
        self._reconnect()
        self.wait_ready()
        return time.monotonic() - began

    def freeze(self, name: str) -> None:
        """End this guest and keep its running state beside the image, for every later VM(base=name).

        For what many tests need in place, such as an installed agent. Unplug everything first.
        """
        self._need_bare()
        self._unmount_share()
        self.run("sync; echo 3 >/proc/sys/vm/drop_caches")
        state = self.image / f"{name}.state"
        self.qmp("stop")
        self.qmp("migrate-set-parameters", **{"max-bandwidth": 1 << 40})
        self.qmp("migrate", uri=f"exec:cat >'{state}.new'")
        while (status := self.qmp("query-migrate")["status"]) != "completed":
            if status == "failed":
                raise LabError(f"could not keep {name}")
            time.sleep(0.1)
        self.qmp("quit")
        until(lambda: None if is_qemu(self.pid, self.folder) else True, 30, lambda: True, self.folder / "qemu.log")
        shutil.move(self.folder / "disk.qcow2", self.image / f"{name}.qcow2")
        Path(f"{state}.new").rename(state)

    @classmethod
    def attach(cls, folder: Path) -> VM:
        """Take over a guest left running by the command line."""
        vm = cls(folder)
        vm.pid = int((vm.folder / "pid").read_text())
        if not is_qemu(vm.pid, vm.folder):
            raise LabError(f"no guest runs in {folder}")
        vm.detached = True
        vm.qmp = Qmp(vm.folder / "qmp.sock")
        vm.channel = Channel(vm.folder / "guestd.sock")
        return vm

    def detach(self) -> None:
        self.qmp.close()
        self.channel.close()

    # -- commands and files ---------------------------------------------------

    def run(
        self,
        cmd: str | list[str],
        *,
        user: str | None = None,
        pam: bool = False,
        check: bool = True,
        timeout: float = 120,
        stdin: bytes = b"",
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
    ) -> Result:
        """Run a shell line or an argv in the guest, as root or as `user` with that loginuid.

        `pam` opens a logind session for it, as a console or ssh login would (slower).
        """
        return self.spawn(cmd, user=user, pam=pam, check=check, timeout=timeout, stdin=stdin, cwd=cwd, env=env)()

    def spawn(
        self,
        cmd: str | list[str],
        *,
        user: str | None = None,
        pam: bool = False,
        check: bool = True,
        timeout: float = 120,
        stdin: bytes = b"",
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
    ) -> Callable[[], Result]:
        """As run, but do not wait: call what it returns to get the result."""
        future = self.channel.send("run", stdin, cmd=cmd, user=user, pam=pam, timeout=timeout, cwd=cwd, env=dict(env or {}))

        def wait() -> Result:
            head, body = answer(future, timeout + 30)
            cut = head["out"]
            result = Result(
                head["rc"],
                body[:cut].decode(errors="replace"),
                body[cut:].decode(errors="replace"),
                head["took"],
                head["timed_out"],
            )
            if check and result.rc:
                raise LabError(f"{cmd!r} ended {result.rc}: {result.out[-1000:]}{result.err[-2000:]}")
            return result

        return wait

    def push(self, source: Path | str | bytes, target: str, *, mode: int | None = None) -> None:
        """Put a file, a folder or bytes at the path `target` in the guest."""
        buf = io.BytesIO()
        name = Path(target).name
        with tarfile.open(fileobj=buf, mode="w") as tar:
            if isinstance(source, bytes):
                info = tarfile.TarInfo(name)
                info.size, info.mtime, info.mode = len(source), int(time.time()), mode or 0o644
                tar.addfile(info, io.BytesIO(source))
            else:
                tar.add(source, arcname=name, filter=as_root)
        answer(self.channel.send("push", buf.getvalue(), path=str(Path(target).parent)), 300)

    def pull(self, source: str, target: Path) -> Path:
        """Fetch a file or a folder of the guest into the host folder `target`."""
        _, body = answer(self.channel.send("pull", path=source), 300)
        with tarfile.open(fileobj=io.BytesIO(body)) as tar:
            tar.extractall(target, filter="data")
        return Path(target) / Path(source).name

    # -- things to plug -------------------------------------------------------

    def plug_stick(
        self,
        serial: str,
        size_mb: int = 64,
        fs: str = "vfat",
        files: Mapping[str, bytes | Path] | None = None,
        *,
        label: str = "STICK",
        passphrase: str | None = None,
        partition: bool = True,
        image: Path | None = None,
        vendor: str = "QEMU",
        model: str = "QEMU HARDDISK",
        uas: bool = False,
        removable: bool = True,
        readonly: bool = False,
        wait: bool = True,
    ) -> Stick:
        """A USB stick; with `passphrase`, LUKS around `fs`. `image` plugs an earlier stick's again."""
        if image is None:
            image = self.folder / f"{serial}.img"
            sticks.make(image, size_mb, fs, files or {}, label=label, passphrase=passphrase, partition=partition)
        return self._plug_disk(
            Stick(serial, Path(image)), "scsi-hd", uas, readonly, wait, vendor=vendor, product=model, removable=removable
        )

    def plug_cd(self, serial: str, files: Mapping[str, bytes | Path], *, wait: bool = True) -> Stick:
        """A USB optical drive with an ISO 9660 disc in it."""
        image = self.folder / f"{serial}.iso"
        sticks.make_iso(image, files)
        return self._plug_disk(Stick(serial, image), "scsi-cd", False, True, wait)

    def _plug_disk(self, stick: Stick, kind: str, uas: bool, readonly: bool, wait: bool, **lun: Any) -> Stick:
        device, node = f"usb-{stick.serial}", f"img-{stick.serial}"
        self.qmp(
            "blockdev-add",
            driver="raw",
            **{
                "node-name": node,
                "read-only": readonly,
                "file": {"driver": "file", "filename": str(stick.image), "read-only": readonly},
            },
        )
        began = time.monotonic()
        self.qmp("device_add", driver="usb-uas" if uas else "usb-bot", id=device, bus="xhci.0", serial=stick.serial)
        self.qmp(
            "device_add", driver=kind, id=f"lun-{stick.serial}", bus=f"{device}.0", drive=node, lun=0, **{"scsi-id": 0}, **lun
        )
        self.qmp("qom-set", path=f"/machine/peripheral/{device}", property="attached", value=True)
        if wait:
            stick.dev = self._wait_link(f"/dev/disk/by-id/usb-*{stick.serial}-0:0")
            stick.took = time.monotonic() - began
            stick.part = self.run(f"udevadm settle; p={stick.dev}1; [ -e $p ] || p={stick.dev}; echo $p").out.strip()
        return stick

    def insert_disc(self, files: Mapping[str, bytes | Path] | None) -> None:
        """Change the disc in the built-in optical drive (/dev/sr0); None opens the tray."""
        if files is None:
            self.qmp("eject", id="optical", force=True)
            return
        image = self.folder / f"disc-{time.monotonic_ns()}.iso"
        sticks.make_iso(image, files)
        self.qmp("blockdev-change-medium", id="optical", filename=str(image), format="raw", **{"read-only-mode": "read-only"})

    def plug_phone(self, serial: str, rootdir: Path, *, readonly: bool = False, wait: bool = True) -> float | None:
        """A phone that speaks MTP; what is copied to it lands in the host folder `rootdir`."""
        Path(rootdir).mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        self.qmp(
            "device_add",
            driver="usb-mtp",
            id=f"usb-{serial}",
            bus="xhci.0",
            serial=serial,
            rootdir=str(rootdir),
            readonly=readonly,
        )
        if not wait:
            return None
        self._wait_usb(serial)
        return time.monotonic() - began

    def plug_other(self, serial: str, driver: str = "usb-kbd", *, wait: bool = True, **props: Any) -> None:
        """A USB device that holds no files: usb-kbd, usb-mouse, usb-tablet, usb-net, usb-audio, usb-hub..."""
        self.qmp("device_add", driver=driver, id=f"usb-{serial}", bus="xhci.0", serial=serial, **props)
        if wait:
            self._wait_usb(serial)

    def unplug(self, serial: str, wait: bool = True) -> None:
        """Yank it: the guest is told afterwards. A stick's image stays in the VM's folder."""
        device = f"usb-{serial}"
        self.qmp.events.clear()
        self.qmp("device_del", id=device)
        self.qmp.wait_event("DEVICE_DELETED", device=device)
        with suppress(LabError):  # phones and keyboards have no image
            self.qmp("blockdev-del", **{"node-name": f"img-{serial}"})
        if wait:
            self.run(
                f"for i in $(seq 100); do grep -qsx {serial} /sys/bus/usb/devices/*/serial || break; "
                "sleep 0.1; done; udevadm settle"
            )

    def plugged(self) -> list[str]:
        ids = [entry["name"] for entry in self.qmp("qom-list", path="/machine/peripheral")]
        return [name[4:] for name in ids if name.startswith("usb-")]

    def properties(self, path: str) -> dict[str, str]:
        """What udev knows about a device node or a /sys path."""
        lines = self.run(["udevadm", "info", "--query=property", path]).out.splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line)

    def usb_path(self, serial: str) -> str:
        """The /sys folder of a plugged USB device."""
        return self._wait_usb(serial)

    def network(self, up: bool) -> None:
        """Cut the cable of the guest, or put it back."""
        self.qmp("set_link", name="nic0", up=up)

    # -- inside ---------------------------------------------------------------

    def _need_bare(self) -> None:
        if plugged := self.plugged():
            raise LabError(f"unplug first: {', '.join(plugged)}")

    def _wait_link(self, pattern: str) -> str:
        script = (
            f"for i in $(seq 300); do for l in {pattern}; do [ -e $l ] && readlink -f $l && exit; done; sleep 0.1; done; exit 1"
        )
        return self.run(script).out.strip()

    def _wait_usb(self, serial: str) -> str:
        script = (
            f"for i in $(seq 300); do f=$(grep -lsx {serial} /sys/bus/usb/devices/*/serial) && break; sleep 0.1; "
            "done; udevadm settle; dirname $f"
        )
        return self.run(script).out.strip()

    def _new_disk(self, backing: Path) -> None:
        if not backing.exists():
            raise LabError(f"no image in {self.image}: run build_image.sh first")
        sh("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", str(backing), str(self.folder / "disk.qcow2"))

    def _launch(self, state: Path | None = None) -> None:
        folder = self.folder
        share = self.share or folder / "share"
        share.mkdir(parents=True, exist_ok=True)
        nic = "user,id=net0" + "".join(f",hostfwd=tcp:127.0.0.1:{h}-:{g}" for h, g in self.forwards.items())
        cmdline = f"root=/dev/vda rw console=ttyS0 quiet net.ifnames=0 mitigations=off {self.append}"
        argv = [
            "qemu-system-x86_64",
            "-name",
            "lab",
            "-machine",
            "q35,vmport=off",
            "-accel",
            "tcg,thread=multi",
            "-cpu",
            "max",
            "-smp",
            "2",
            "-m",
            str(self.memory_mb if not state else 1024),
            "-nodefaults",
            "-display",
            "none",
            "-no-user-config",
            "-kernel",
            str(self.image / "vmlinuz"),
            "-initrd",
            str(self.image / "initrd"),
            "-append",
            cmdline,
            "-drive",
            f"if=none,id=disk,file={folder}/disk.qcow2,format=qcow2,cache=writeback,discard=unmap",
            "-device",
            "virtio-blk-pci,drive=disk",
            "-netdev",
            nic,
            "-device",
            "virtio-net-pci,netdev=net0,id=nic0,romfile=",
            "-device",
            "virtio-rng-pci",
            "-device",
            "virtio-serial-pci,id=serial0",
            "-chardev",
            f"socket,id=guestd,path={folder}/guestd.sock,server=on,wait=off",
            "-device",
            "virtserialport,chardev=guestd,name=lab.guestd",
            "-fsdev",
            f"local,id=share,path={share},security_model=none",
            "-device",
            "virtio-9p-pci,fsdev=share,mount_tag=share",
            "-device",
            "qemu-xhci,id=xhci,p2=8,p3=8",
            "-device",
            "ide-cd,id=optical,bus=ide.2",
            "-chardev",
            f"file,id=console,path={folder}/console.log,append=on",
            "-serial",
            "chardev:console",
            "-qmp",
            f"unix:{folder}/qmp.sock,server=on,wait=off",
        ]
        if state:
            argv += ["-incoming", f"exec:cat '{state}'"]
        log = (folder / "qemu.log").open("ab")
        proc = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=None if self.detached else die_with_parent,
        )
        log.close()
        self.pid = proc.pid
        proc.returncode = 0  # reaped by power_loss, by pid
        (folder / "pid").write_text(str(proc.pid))
        self.qmp = until(lambda: Qmp(folder / "qmp.sock"), 30, lambda: is_qemu(proc.pid, folder), folder / "qemu.log")
        if state:
            until(
                lambda: self.qmp("query-status")["status"] != "inmigrate" or None,
                60,
                lambda: is_qemu(proc.pid, folder),
                folder / "qemu.log",
            )
            self.qmp("cont")
        self.channel = Channel(folder / "guestd.sock")

    def _reconnect(self) -> None:
        self.channel.close()
        self.channel = Channel(self.folder / "guestd.sock")

    def wait_ready(self) -> None:
        """Until guestd answers; then right the clock, reseed the random pool, mount the share."""
        deadline = time.monotonic() + BOOT_S
        while True:
            future = self.channel.send("ping")
            with suppress(TimeoutError):
                answer(future, 5)
                break
            if time.monotonic() > deadline or not is_qemu(self.pid, self.folder):
                raise LabError(f"the guest does not answer; see {self.folder}/console.log")
            self._reconnect()
        answer(self.channel.send("sync", os.urandom(64), time=time.time()), 30)
        self._mount_share()

    def _mount_share(self) -> None:
        if self.share:
            self.run(
                f"mkdir -p {SHARE}; mountpoint -q {SHARE} || "
                f"mount -t 9p -o trans=virtio,version=9p2000.L,msize=262144 share {SHARE}"
            )

    def _unmount_share(self) -> None:
        if self.share:
            self.run(f"umount {SHARE}", check=False)


# -- helpers ------------------------------------------------------------------


def answer(future: Future[tuple[Json, bytes]], timeout: float) -> tuple[Json, bytes]:
    head, body = future.result(timeout)
    if "error" in head:
        raise LabError(head["error"])
    return head, body


def as_root(info: tarfile.TarInfo) -> tarfile.TarInfo:
    info.uid = info.gid = 0
    info.uname = info.gname = "root"
    return info


def sh(*argv: str) -> str:
    done = subprocess.run(argv, capture_output=True, text=True)
    if done.returncode:
        raise LabError(f"{' '.join(argv)}: {done.stdout}{done.stderr}")
    return done.stdout


def is_qemu(pid: int | None, folder: Path) -> bool:
    """Whether this pid is still the QEMU we started in this folder."""
    with suppress(OSError):
        return f"{folder}/disk.qcow2".encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def until(probe: Callable[[], Any], timeout: float, alive: Callable[[], bool], log: Path) -> Any:
    deadline = time.monotonic() + timeout
    while True:
        with suppress(OSError):
            if (value := probe()) is not None:
                return value
        if time.monotonic() > deadline or (not alive() and time.monotonic() > deadline - timeout + 2):
            raise LabError(f"QEMU did not come up: {log.read_text()[-2000:]}")
        time.sleep(0.05)


def make_ready(image: Path) -> None:
    """Boot the image once and keep its running state."""
    if not image.is_dir():
        raise LabError(f"no image in {image}: run build_image.sh first")
    with (image / ".ready.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (image / "ready.state").exists():
            return
        with VM(kernel=image.name, cold=True) as vm:
            vm.run(
                "for u in staff contractor; do for i in $(seq 600); do "
                "[ -S /run/user/$(id -u $u)/bus ] && break; sleep 0.1; done; done; "
                "systemctl is-system-running --wait; udevadm settle",
                check=False,
                timeout=BOOT_S,
            )
            vm.freeze("ready")


# -- command line -------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "-d", "--folder", type=Path, default=Path(tempfile.gettempdir()) / "lab-vm", help="where the running guest lives"
    )
    sub = parser.add_subparsers(dest="do", required=True)
    up = sub.add_parser("up", help="start a guest and leave it running")
    up.add_argument("--kernel", default="stable", choices=["stable", "backports"])
    up.add_argument("--base", default="ready", help="the kept state to restore")
    up.add_argument("--cold", action="store_true", help="boot instead")
    up.add_argument("--share", type=Path)
    up.add_argument("--forward", action="append", default=[], metavar="HOST:GUEST")
    run = sub.add_parser("run", help="run a shell line in it")
    run.add_argument("-u", "--user")
    run.add_argument("--pam", action="store_true")
    run.add_argument("line")
    for name in ("push", "pull"):
        move = sub.add_parser(name)
        move.add_argument("source")
        move.add_argument("target")
    stick = sub.add_parser("stick", help="plug a stick")
    stick.add_argument("serial")
    stick.add_argument("--fs", default="vfat", choices=sorted(sticks.MAKERS))
    stick.add_argument("--size", type=int, default=64, help="MiB")
    stick.add_argument("--passphrase")
    phone = sub.add_parser("phone", help="plug a phone")
    phone.add_argument("serial")
    phone.add_argument("rootdir", type=Path)
    other = sub.add_parser("other", help="plug a keyboard or the like")
    other.add_argument("serial")
    other.add_argument("--driver", default="usb-kbd")
    sub.add_parser("unplug").add_argument("serial")
    sub.add_parser("net").add_argument("state", choices=["up", "down"])
    for name in ("snapshot", "restore"):
        sub.add_parser(name).add_argument("name")
    for name in ("list", "reboot", "kill", "down"):
        sub.add_parser(name)
    args = parser.parse_args()

    if args.do == "up":
        pairs = (pair.split(":") for pair in args.forward)
        vm = VM(
            args.folder,
            kernel=args.kernel,
            base=args.base,
            cold=args.cold,
            share=args.share,
            forwards={int(host): int(guest) for host, guest in pairs},
        )
        vm.detached = True
        print(f"up in {vm.start():.1f} s, pid {vm.pid}, folder {vm.folder}")
        return 0
    vm = VM.attach(args.folder)
    match args.do:
        case "run":
            result = vm.run(args.line, user=args.user, pam=args.pam, check=False)
            print(result.out, end="")
            print(result.err, end="", file=sys.stderr)
            return result.rc
        case "push":
            vm.push(Path(args.source), args.target)
        case "pull":
            print(vm.pull(args.source, Path(args.target)))
        case "stick":
            print(vm.plug_stick(args.serial, args.size, args.fs, passphrase=args.passphrase))
        case "phone":
            print(vm.plug_phone(args.serial, args.rootdir.resolve()))
        case "other":
            vm.plug_other(args.serial, args.driver)
        case "unplug":
            vm.unplug(args.serial)
        case "list":
            print("\n".join(vm.plugged()))
        case "net":
            vm.network(args.state == "up")
        case "snapshot" | "restore":
            print(f"{getattr(vm, args.do)(args.name):.1f} s")
        case "reboot":
            print(f"{vm.reboot():.1f} s")
        case "kill" | "down":
            vm.power_loss()
            if args.do == "down":
                shutil.rmtree(vm.folder, ignore_errors=True)
            return 0
    vm.detach()
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except LabError as error:
        sys.exit(f"vm.py: {error}")
