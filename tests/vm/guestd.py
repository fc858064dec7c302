#!/usr/bin/python3
"""Guest side of the lab: runs what vm.py asks for over a virtio-serial port.

Frame, both ways: two big-endian u32 (header length, body length), a JSON
header, then the raw body. Each request carries an "id", is handled in a thread
of its own, and is answered once, so that slow commands do not block quick ones.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
import pwd
import signal
import struct
import subprocess
import tarfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PORT = "/dev/virtio-ports/lab.guestd"
RNDRESEEDCRNG = 0x5207

Header = dict[str, Any]
Answer = tuple[Header, bytes]


def become(user: str) -> Callable[[], None]:
    """Make the forked child what login(1) makes it: loginuid, groups, uid."""
    entry = pwd.getpwnam(user)

    def apply() -> None:
        Path("/proc/self/loginuid").write_text(str(entry.pw_uid))
        os.initgroups(entry.pw_name, entry.pw_gid)
        os.setgid(entry.pw_gid)
        os.setuid(entry.pw_uid)

    return apply


def run(req: Header, body: bytes) -> Answer:
    cmd = req["cmd"]
    argv = ["/bin/bash", "-c", cmd] if isinstance(cmd, str) else list(cmd)
    env = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}
    cwd, preexec = req.get("cwd") or "/", None
    if user := req.get("user"):
        entry = pwd.getpwnam(user)
        env |= {"HOME": entry.pw_dir, "USER": user, "LOGNAME": user, "SHELL": entry.pw_shell}
        env["XDG_RUNTIME_DIR"] = f"/run/user/{entry.pw_uid}"
        env["DBUS_SESSION_BUS_ADDRESS"] = f"unix:path=/run/user/{entry.pw_uid}/bus"
        cwd = req.get("cwd") or entry.pw_dir
        if req.get("pam"):  # a logind session of its own, as sshd or a tty would open it
            props = ["-p", "PAMName=login", f"--uid={user}", f"--working-directory={cwd}"]
            setenv = [f"--setenv={k}={v}" for k, v in {**env, **(req.get("env") or {})}.items()]
            argv = ["systemd-run", "-q", "--pipe", "--wait", "--collect", *props, *setenv, "--", *argv]
        else:
            preexec = become(user)
    env |= req.get("env") or {}
    began = time.monotonic()
    proc = subprocess.Popen(
        argv,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=cwd,
        env=env,
        preexec_fn=preexec,
        start_new_session=True,
    )
    timed_out = False
    try:
        out, err = proc.communicate(body, timeout=req.get("timeout") or 120)
    except subprocess.TimeoutExpired:
        timed_out = True
        os.killpg(proc.pid, signal.SIGKILL)
        out, err = proc.communicate()
    took = time.monotonic() - began
    return {"rc": proc.returncode, "out": len(out), "timed_out": timed_out, "took": took}, out + err


def push(req: Header, body: bytes) -> Answer:
    dest = Path(req["path"])
    dest.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=io.BytesIO(body)) as tar:
        tar.extractall(dest)
    return {}, b""


def pull(req: Header, body: bytes) -> Answer:
    path = Path(req["path"])
    buf = io.BytesIO()
    with tarfile.open(fileobj=buf, mode="w") as tar:
        tar.add(path, arcname=path.name)
    return {}, buf.getvalue()


def sync(req: Header, body: bytes) -> Answer:
    """After a restore: right the clock and stop every copy drawing the same random numbers."""
    time.clock_settime(time.CLOCK_REALTIME, req["time"])
    fd = os.open("/dev/urandom", os.O_WRONLY)
    try:
        os.write(fd, body)
        fcntl.ioctl(fd, RNDRESEEDCRNG)
    finally:
        os.close(fd)
    return {}, b""


def ping(req: Header, body: bytes) -> Answer:
    state = subprocess.run(["systemctl", "is-system-running"], capture_output=True, text=True).stdout.strip()
    return {"uptime": time.monotonic(), "kernel": os.uname().release, "state": state}, b""


OPS: dict[str, Callable[[Header, bytes], Answer]] = {"run": run, "push": push, "pull": pull, "sync": sync, "ping": ping}


def serve(fd: int) -> None:
    lock = threading.Lock()

    def read(count: int) -> bytes | None:
        buf = bytearray()
        while len(buf) < count:
            part = os.read(fd, min(count - len(buf), 1 << 18))
            if not part:  # the host side is not connected
                return None
            buf += part
        return bytes(buf)

    def answer(req: Header, body: bytes) -> None:
        try:
            head, out = OPS[req["op"]](req, body)
        except Exception as exc:  # every failure goes back to the caller
            head, out = {"error": f"{type(exc).__name__}: {exc}"}, b""
        raw = json.dumps({"id": req.get("id"), **head}).encode()
        data = memoryview(struct.pack(">II", len(raw), len(out)) + raw + out)
        with lock:
            while data:
                data = data[os.write(fd, data[: 1 << 18]) :]

    while True:
        sizes = read(8)
        if sizes is None:
            time.sleep(0.05)
            continue
        head_len, body_len = struct.unpack(">II", sizes)
        raw, body = read(head_len), read(body_len) if body_len else b""
        if raw is None or body is None:
            continue
        threading.Thread(target=answer, args=(json.loads(raw), body), daemon=True).start()


if __name__ == "__main__":
    serve(os.open(PORT, os.O_RDWR))
