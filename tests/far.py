"""A machine far away, for tests of ways out: a network namespace of the test's own, joined by a veth pair, with servers in it.

Its address is not loopback, so that what goes there leaves this machine as far as the kernel can tell. Needs root and ip(8).
"""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

NEEDS = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("ip") is None, reason="needs root and iproute2 (ip): a network namespace of its own"
)

_SINK = """
import socket, sys, threading
server = socket.create_server((sys.argv[1], int(sys.argv[2])), backlog=64)
def swallow(peer):
    while peer.recv(1 << 16):
        pass
    peer.close()
def http(peer):
    head = b""
    while b"\\r\\n\\r\\n" not in head:
        piece = peer.recv(1 << 16)
        if not piece:
            return peer.close()
        head += piece
    top, _, body = head.partition(b"\\r\\n\\r\\n")
    if b"expect: 100" in top.lower():
        peer.sendall(b"HTTP/1.1 100 Continue\\r\\n\\r\\n")
    lengths = [line.split(b":")[1] for line in top.lower().split(b"\\r\\n") if line.startswith(b"content-length")]
    left = int(lengths[0]) - len(body) if lengths else 0
    while left > 0:
        left -= len(peer.recv(min(left, 1 << 16)) or b"x" * left)
    peer.sendall(b"HTTP/1.1 200 OK\\r\\nContent-Length: 0\\r\\nConnection: close\\r\\n\\r\\n")
    swallow(peer)
act = {"http": http, "swallow": swallow}[sys.argv[3]]
print("ready", flush=True)
while True:
    threading.Thread(target=act, args=(server.accept()[0],), daemon=True).start()
"""


class Far:
    """`address` is the far machine's, `here` ours as it sees us; `http()` and `sink()` give ports of servers that take all."""

    def __init__(self, name: str, address: str, here: str) -> None:
        self.name, self.address, self.here = name, address, here
        self._servers: list[subprocess.Popen[str]] = []
        self._port = 8000

    def http(self) -> int:
        """A server that takes uploads."""
        return self._serve("http")

    def sink(self) -> int:
        """A server that swallows bytes until the sender closes."""
        return self._serve("swallow")

    def ssh(self, home: Path) -> str:
        """An sshd; the options that lead a client to it. Its files lie in `home`."""
        sshd = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:/usr/bin")
        if sshd is None or shutil.which("ssh") is None:
            pytest.skip("needs openssh-server and openssh-client")
        Path("/run/sshd").mkdir(exist_ok=True)
        for key in ("host", "id"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", home / key], check=True)
        port = self._next_port()
        home.joinpath("sshd.conf").write_text(
            f"Port {port}\nListenAddress {self.address}\nHostKey {home}/host\nAuthorizedKeysFile {home}/id.pub\n"
            "StrictModes no\nPermitRootLogin yes\nUsePAM no\nPidFile none\nSubsystem sftp internal-sftp\n"
        )
        home.joinpath("ssh.conf").write_text(
            f"Host far\n HostName {self.address}\n Port {port}\n User root\n IdentityFile {home}/id\n"
            " StrictHostKeyChecking no\n UserKnownHostsFile /dev/null\n LogLevel ERROR\n"
        )
        self._start([sshd, "-D", "-e", "-f", str(home / "sshd.conf")])
        self._until_open(port)
        return f"-F {home}/ssh.conf"

    def run(self, *command: str) -> "subprocess.Popen[str]":
        """A program on the far machine, ended with the test."""
        return self._start(list(command))

    def close(self) -> None:
        """End the servers."""
        for server in self._servers:
            server.kill()
            server.communicate()

    def _serve(self, kind: str) -> int:
        port = self._next_port()
        server = self._start([sys.executable, "-c", _SINK, self.address, str(port), kind])
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n"
        return port

    def _next_port(self) -> int:
        self._port += 1
        return self._port

    def _start(self, command: list[str]) -> "subprocess.Popen[str]":
        inside = ["ip", "netns", "exec", self.name, *command]
        server = subprocess.Popen(
            inside, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL, text=True
        )
        self._servers.append(server)
        return server

    def _until_open(self, port: int) -> None:
        deadline = time.monotonic() + 20
        while True:
            done = subprocess.run(["bash", "-c", f"exec 3<>/dev/tcp/{self.address}/{port}"], capture_output=True)
            if not done.returncode:
                return
            assert time.monotonic() < deadline, "sshd does not start"
            time.sleep(0.05)


@contextlib.contextmanager
def far() -> Iterator[Far]:
    """The far machine, gone at the end."""
    pid = os.getpid()
    name, ours, theirs = f"sekisho{pid}", f"sk{pid % 100_000}a", f"sk{pid % 100_000}b"
    net = f"10.{64 + pid % 64}.{pid // 64 % 256}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"needs network namespaces: {made.stderr.strip()}")
    try:
        for command in (
            f"link add {ours} type veth peer name {theirs} netns {name}",
            f"addr add {net}.1/24 dev {ours}",
            f"link set {ours} up",
            f"-n {name} addr add {net}.2/24 dev {theirs}",
            f"-n {name} link set {theirs} up",
            f"-n {name} link set lo up",
        ):
            done = subprocess.run(["ip", *command.split()], capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"needs veth: ip {command}: {done.stderr.strip()}")
        machine = Far(name, f"{net}.2", f"{net}.1")
        try:
            yield machine
        finally:
            machine.close()
    finally:
        subprocess.run(["ip", "netns", "del", name], capture_output=True)
        subprocess.run(["ip", "link", "del", ours], capture_output=True)
