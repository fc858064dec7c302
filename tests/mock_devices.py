"""A machine with no devices but those of recordings: the real udev sensor inside umockdev, its facts on stdout.

Run by `tests/test_devices.py` in a process of its own, with libumockdev-preload in LD_PRELOAD, which puts /sys and the udev
socket of a testbed in the place of the machine's. Reads a JSON list of stories from stdin, each a list of steps:
`"cold NAME"` (there before the sensor looks), `"+NAME"`, `"-NAME"` (recordings in tests/devices), `"wait SECONDS"`, and
`"NAME ATTRIBUTE=VALUE"` or `"NAME PROPERTY:VALUE"` (a change of its disk, told as the kernel or udev tells it).
Writes a JSON list of stories, each a list of facts as text, with times that begin at `START_MS`.
"""

import ctypes
import ctypes.util
import json
import re
import sys
from pathlib import Path
from typing import Any

from agent.core import facts
from agent.sense.udev import Udev

RECORDINGS = Path(__file__).with_name("devices")
START_MS = 1_767_225_600_000
_SHORT_MS = 100


class Testbed:
    """libumockdev's UMockdevTestbed (umockdev.h), by ctypes."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(ctypes.util.find_library("umockdev") or "libumockdev.so.0")
        self._library.umockdev_testbed_new.restype = ctypes.c_void_p
        self._bed = ctypes.c_void_p(self._library.umockdev_testbed_new())
        self._library.umockdev_testbed_get_root_dir.restype = ctypes.c_char_p
        self._root = Path(self._library.umockdev_testbed_get_root_dir(self._bed).decode())
        self._objects = ctypes.CDLL(ctypes.util.find_library("gobject-2.0") or "libgobject-2.0.so.0")

    def _call(self, name: str, *arguments: str | None) -> None:
        encoded = [None if each is None else each.encode() for each in arguments]
        getattr(self._library, f"umockdev_testbed_{name}")(self._bed, *map(ctypes.c_char_p, encoded))

    def add(self, text: str) -> None:
        """Make the devices of a recording; each is told as "add", as the kernel would."""
        self._call("add_from_string", text, None)

    def change(self, path: str, attribute: str = "", value: str = "", held: bool = False) -> None:
        """Set an attribute (or a property, `held`) of a device, which is told as "change"."""
        self._call("set_property" if held else "set_attribute", f"/sys{path}", attribute, value)
        self._call("uevent", f"/sys{path}", "change")

    def remove(self, path: str) -> None:
        """Take one device away."""
        self._call("uevent", f"/sys{path}", "remove")
        self._call("remove_device", f"/sys{path}")
        sys_folder = self._root / "sys"
        for folder in (*sys_folder.glob("block"), *sys_folder.glob("class/*"), *sys_folder.glob("bus/*/devices")):
            (folder / path.rpartition("/")[2]).unlink(missing_ok=True)  # links that umockdev forgets

    def close(self) -> None:
        """Give it back, with its folder."""
        self._objects.g_object_unref(self._bed)


def recording(name: str) -> str:
    """The text of a recording, without its notes."""
    lines = (RECORDINGS / f"{name}.umockdev").read_text().splitlines()
    return "\n".join(line for line in lines if not line.startswith("#")) + "\n"


def story(steps: list[str]) -> list[str]:
    """The facts that the sensor tells while these steps are made."""
    bed, sensor, told, now_ms = Testbed(), None, list[facts.Fact](), START_MS
    try:
        for step in steps:
            name, _, rest = step.partition(" ")
            if step.startswith("cold "):
                bed.add(recording(rest))
                continue
            if sensor is None:
                sensor = Udev()
                told += sensor.drain(now_ms)
            if step[0] == "+":
                for device in recording(name[1:]).split("\n\n"):  # one by one, as the socket holds ten messages
                    bed.add(device.strip() + "\n")
                    told += sensor.drain(now_ms)
            elif step[0] == "-":
                for path in reversed(re.findall(r"^P: (.*)", recording(name[1:]), re.MULTILINE)):
                    bed.remove(path)
                    told += sensor.drain(now_ms)
            elif "=" in rest or ":" in rest:
                disk = re.findall(r"^P: (.*/block/\w+)$", recording(name), re.MULTILINE)[0]
                attribute, value = re.split("[=:]", rest, maxsplit=1)
                bed.change(disk, attribute, value, held=":" in rest)
            for _ in range(max(1, int(rest)) if name == "wait" else 1):
                now_ms += 1_000 if name == "wait" else _SHORT_MS
                told += [*sensor.drain(now_ms), *sensor.count(now_ms), facts.Tick(at_ms=now_ms)]
    finally:
        if sensor is not None:
            sensor.close()
        bed.close()
    return [facts.write(fact).decode() for fact in told]


def main() -> None:
    """All stories of stdin."""
    asked: list[Any] = json.load(sys.stdin)
    json.dump([story(steps) for steps in asked], sys.stdout)


if __name__ == "__main__":
    main()
