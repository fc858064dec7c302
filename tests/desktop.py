"""A person's desktop, for tests: a session bus of their own (dbus-daemon), and a notification server on it that remembers.

The server speaks the Desktop Notifications Specification and can misbehave on demand: never answer, answer nonsense, refuse.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.house import until

ROOT = Path(__file__).parent.parent

DBUS = pytest.mark.skipif(shutil.which("dbus-daemon") is None, reason="needs dbus-daemon")
_CONFIG = """<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig><type>session</type><listen>unix:path={path}</listen><auth>EXTERNAL</auth>
<policy context="default"><allow send_destination="*" eavesdrop="true"/><allow eavesdrop="true"/><allow own="*"/></policy>
</busconfig>
"""


class Server:
    """The one that shows notifications, with the user's ids. `shown`: [id, replaces, title, body, urgency], in order."""

    def __init__(self, address: str, uid: int, manner: str = "well", markup: bool = True) -> None:
        command = [sys.executable, __file__, address, str(uid), manner, str(int(markup))]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)})
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"ready\n", "no notification server"

    @property
    def shown(self) -> list[list[Any]]:
        """All until now; the server is ended for that."""
        self._process.terminate()
        out, _ = self._process.communicate()
        return [json.loads(line) for line in out.splitlines()]

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.communicate()


def serve(address: str, uid: int, manner: str, markup: bool) -> None:
    """The server's process."""
    from jeepney import DBusAddress, new_error, new_method_call, new_method_return
    from jeepney.io.blocking import open_dbus_connection
    from jeepney.low_level import HeaderFields, MessageType

    from agent import notifying

    notifying.become(uid)
    connection = open_dbus_connection(bus=address)
    bus = DBusAddress("/org/freedesktop/DBus", "org.freedesktop.DBus", "org.freedesktop.DBus")
    connection.send_and_get_reply(new_method_call(bus, "RequestName", "su", ("org.freedesktop.Notifications", 4)))
    print("ready", flush=True)
    count = 0
    while True:
        message = connection.receive()
        if message.header.message_type != MessageType.method_call or manner == "silent":
            continue
        if manner == "refuses":
            connection.send(new_error(message, "org.example.No"))
        elif message.header.fields[HeaderFields.member] == "GetCapabilities":
            can = ["body", *(["body-markup"] if markup else [])]
            connection.send(new_method_return(message, "as", (can,)))
        elif manner == "nonsense":
            connection.send(new_method_return(message, "s", ("\x1b[31m" * 1000,)))
        else:
            _, replaces, _, title, body, _, hints, _ = message.body
            count = replaces or count + 1
            print(json.dumps([count, replaces, title, body, hints["urgency"][1]]), flush=True)
            connection.send(new_method_return(message, "u", (count,)))


@contextmanager
def session(folder: Path, uid: int) -> Iterator[str]:
    """`folder` (as /run) with the user's session bus in it, run by that user. Yields the bus's address."""
    home = folder / "user" / str(uid)
    home.mkdir(parents=True)
    path = home / "bus"
    config = folder / "bus.conf"
    config.write_text(_CONFIG.format(path=path))
    os.chown(home, uid, 65534)
    command = ["dbus-daemon", f"--config-file={config}", "--nofork", "--nopidfile"]
    bus = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=sys.stderr, user=uid, group=65534, extra_groups=[])
    try:
        until(path.exists, "the bus does not start")
        yield f"unix:path={path}"
    finally:
        bus.kill()
        bus.wait()


def reachable(folder: Path) -> Path:
    """Let other users walk to it: pytest's folders are for their owner alone."""
    for each in (folder, *folder.parents):
        if each.stat().st_uid == os.geteuid() and each != Path("/"):
            each.chmod(each.stat().st_mode | 0o011)
    return folder


def notice(**more: Any) -> Any:
    """Something to say."""
    from agent.core.notice import Notice

    about = {"at_ms": 1_000, "uid": 65534, "kind": "copied", "severity": 4, "medium": "Kingston DataTraveler 3.0 (60A44C…)"}
    return Notice(**(about | {"key": "usb:0951:1666:X", "decision": "unapproved"} | more))


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4] == "1")
