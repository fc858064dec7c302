"""What is never touched: whatever this machine lives on.

Question: which block devices carry the system? Owns: the places that count as system, and the way down from them: the source of
a file system, what lies under an encrypted or stacked device, the file under a loop device, the layers of an overlay (a machine
booted from a stick). A medium with one of these devices is stopped in nothing, whatever the register says of it. Must not know
media or policy.
"""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from agent.act.filesystems import Found

_SYSTEM = (
    "/",
    "/usr",
    "/etc",
    "/var",
    "/boot",
    "/boot/efi",
    "/boot/firmware",
    "/efi",
    "/home",
    "/root",
    "/opt",
    "/nix",
    "/sysroot",
)
_LAYERS = (b"lowerdir", b"upperdir", b"workdir")


def system_devices(table: dict[int, Found], own: list[str], swaps: str = "/proc/swaps") -> dict[str, str]:
    """Device numbers "major:minor" → which place is on them. `own` are further paths that must stay as they are: the state
    directory, protected directories, the program itself."""
    mounts = sorted(table.values(), key=lambda found: len(found.mount))
    carried: dict[str, str] = {}
    todo = [(found, path) for path in (*_SYSTEM, *own) if (found := _covering(mounts, os.fsencode(os.path.realpath(path))))]
    for swap in _swap_files(swaps):
        if (number := _number(swap)) is not None:
            carried[number] = "swap"
        elif (found := _covering(mounts, os.fsencode(swap))) is not None:
            todo.append((found, "swap"))
    for found, path in todo:  # grows while it is walked
        for number in (found.dev, _number(os.fsdecode(found.source))):
            if number is None or number in carried:
                continue
            carried[number] = path
            for below in _below(number):
                carried.setdefault(below, path)
                if (backing := _backing(below)) and (lower := _covering(mounts, os.fsencode(backing))) is not None:
                    todo.append((lower, path))
        if found.fs == "overlay":
            todo += [(lower, path) for layer in _layers(found) if (lower := _covering(mounts, layer)) and lower is not found]
    return carried


def _covering(mounts: list[Found], path: bytes) -> Found | None:
    """The mount that a path lies on: the deepest, the last of several at one place."""
    over = [found for found in mounts if found.mount == b"/" or (path + b"/").startswith(found.mount + b"/")]
    return over[-1] if over else None


def _below(number: str) -> Iterator[str]:
    """A block device and all that it is stacked on (sysfs `slaves`), and the whole disks of these."""
    todo = [number]
    for each in todo:  # grows while it is walked
        yield each
        folder = Path(os.path.realpath(f"/sys/dev/block/{each}"))
        above = [folder.parent] if (folder / "partition").exists() else []
        slaves = [slave.resolve() for slave in (folder / "slaves").iterdir()] if (folder / "slaves").is_dir() else []
        todo += [said for place in (*slaves, *above) if (said := _read(place / "dev")) and said not in todo]


def _backing(number: str) -> str:
    return _read(Path(f"/sys/dev/block/{number}/loop/backing_file"))


def _layers(found: Found) -> Iterator[bytes]:
    for option in found.options.split(b","):
        name, _, value = option.partition(b"=")
        if name.rstrip(b"+") in _LAYERS:
            yield from (each for each in value.split(b":") if each.startswith(b"/"))


def _swap_files(swaps: str) -> list[str]:
    return [line.split()[0] for line in _read(Path(swaps)).splitlines()[1:] if line.strip()]


def _number(path: str) -> str | None:
    """The number of a block device by its device file, None if it is no such thing."""
    try:
        found = os.stat(path) if path.startswith("/dev/") else None  # noqa: PTH116 (paths are the os module's here)
    except OSError:
        return None
    if found is None or not stat.S_ISBLK(found.st_mode):
        return None
    return f"{os.major(found.st_rdev)}:{os.minor(found.st_rdev)}"


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
