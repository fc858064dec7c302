"""The agent towards the service manager and the people at this machine: sd_notify(3), the status socket, limits.

Owns: those few system calls. Must not know what is reported. The status socket is `STATE/agent.sock`, mode 0600: whoever
connects is told the whole status as JSON and let go, so nothing is ever read from a peer.
"""

import contextlib
import ctypes
import gc
import json
import os
import resource
import socket
from pathlib import Path
from typing import Any

_M_ARENA_MAX = -8
_GARBAGE = 10_000
"""Objects that can be in cycles, made since the last look at them (Python's default: 700)."""


def notify(state: str) -> None:
    """sd_notify(3): tell the service manager, if there is one."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as peer, contextlib.suppress(OSError):
        peer.sendto(state.encode(), "\0" + address[1:] if address.startswith("@") else address)


def listen(state_dir: str) -> socket.socket:
    """The socket that answers `status`. Bound by a short name: sun_path takes 108 bytes (unix(7))."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    path = Path(state_dir, "agent.sock")
    path.unlink(missing_ok=True)
    folder = os.open(state_dir, os.O_PATH | os.O_CLOEXEC)
    try:
        listener.bind(f"/proc/self/fd/{folder}/agent.sock")
    finally:
        os.close(folder)
    path.chmod(0o600)
    listener.listen(16)
    return listener


def answer(listener: socket.socket, status: dict[str, Any]) -> None:
    """Tell one peer. One that does not read at once gets what fits; the daemon does not wait for it."""
    with contextlib.suppress(OSError), listener.accept()[0] as peer:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        peer.settimeout(0.2)
        peer.sendall(json.dumps(status, ensure_ascii=False).encode("utf-8", "replace"))


def raise_descriptor_limit() -> None:
    """As many descriptors as we may have: each watched directory of the fallback, each event of an fd group takes one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def collect_rarely() -> None:
    """What is there now stays, and is not looked through again; later cycles are few: looking for them took 5 % of a storm."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_GARBAGE)


def share_one_heap() -> None:
    """One malloc arena for all threads (mallopt(3), M_ARENA_MAX): four of them would each keep their own spare megabyte."""
    ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def give_back() -> None:
    """What malloc keeps for later goes back to the system (malloc_trim(3)): 2 to 4 MiB after a storm, in a few milliseconds."""
    ctypes.CDLL(None).malloc_trim(0)


def pss_kib(pids: list[int]) -> int:
    """Proportional set size of processes together, in KiB (proc(5), smaps_rollup); 0 where it can't be read."""
    total = 0
    for pid in pids:
        for line in read(f"/proc/{pid}/smaps_rollup").splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1])
    return total


def chassis() -> int:
    """OCSF device.type_id by SMBIOS chassis type (DMTF DSP0134, 7.4.1): 1 server, 2 desktop, 3 laptop, 0 unknown."""
    kind = read("/sys/class/dmi/id/chassis_type")
    if kind in ("8", "9", "10", "14", "31", "32"):
        return 3
    if kind in ("3", "4", "5", "6", "7", "13", "15", "16", "24", "35"):
        return 2
    return 1 if kind in ("17", "23") else 0


def read(path: str) -> str:
    """A small file of the kernel's, stripped; empty if it can't be read."""
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
