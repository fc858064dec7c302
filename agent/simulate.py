"""Simulated media, for anyone's tests and demonstrations: a folder plus a descriptor is a medium.

Owns: the descriptor's form (`NAME.medium.toml` beside the folder `NAME`), and plugging and unplugging one, over a plain
folder (no privilege), a tmpfs or an ext4 image (root: a real mount of its own). Public: `Medium`, `plug`, `unplug`,
`present`. Must not know the agent: it only leaves in a directory what `agent.media.simulated_dir` is told to watch.

    from agent import simulate
    stick = simulate.plug("/tmp/media", "stick1", vendor="Kingston", serial="60A44C413F8CF320")
    (stick.path / "a.csv").write_text("…")
    simulate.unplug(stick)
"""

import contextlib
import json
import os
import re
import stat
import subprocess
import tomllib
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct, field

SUFFIX = ".medium.toml"
FileSystem = Literal["folder", "tmpfs", "ext4"]
Kind = Literal["storage", "phone", "optical", "keyboard", "network", "reader", "other"]
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_IMAGE_BYTES = 256 << 20
_DESCRIPTOR_BYTES = 64 << 10


class SimulationError(Exception):
    """A simulated medium can't be plugged, unplugged or read; str() says why and what to do."""


class Descriptor(Struct, kw_only=True):
    """What a medium claims to be. `interfaces` are USB "class:subclass:protocol" in hex. `device`: the block device (a loop
    device, say) that plays it; then no folder does, and where it is mounted is for mount(8)."""

    kind: Kind = "storage"
    bus: str = "usb"
    vendor: str = "Kingston"
    model: str = "DataTraveler 3.0"
    serial: str = ""
    vendor_id: str = "0951"
    product_id: str = "1666"
    interfaces: list[str] = field(default_factory=lambda: ["08:06:50"])
    read_only: bool = False
    device: str = ""


class Medium(Struct, kw_only=True):
    """A simulated medium that is plugged in: its folder is `path`."""

    root: Path
    name: str
    descriptor: Descriptor

    @property
    def path(self) -> Path:
        """Where its files are."""
        return self.root / self.name

    @property
    def descriptor_path(self) -> Path:
        """The file whose presence means "plugged in"."""
        return self.root / (self.name + SUFFIX)


def read_descriptor(path: Path) -> Descriptor:
    """The descriptor in `path`. Raises SimulationError if it is not there or does not parse whole.

    Whoever may write to the directory must not stall or fill a reader with root's rights: no link is followed, only a
    regular file of at most 64 KiB is read.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode) or found.st_size > _DESCRIPTOR_BYTES:
                raise SimulationError(f"{path}: is not a regular file of at most 64 KiB")
            text = os.read(fd, _DESCRIPTOR_BYTES).decode()
        finally:
            os.close(fd)
        return msgspec.convert(tomllib.loads(text), Descriptor)
    except OSError as error:
        raise SimulationError(f"{path}: can't be read ({error.strerror})") from None
    except (tomllib.TOMLDecodeError, msgspec.ValidationError, UnicodeDecodeError, RecursionError) as error:
        raise SimulationError(f"{path}: is not a medium's descriptor: {error}") from None


def present(root: str | Path) -> list[Medium]:
    """The media plugged into `root` now, by name: folder and whole descriptor both there. Others are passed over."""
    root = Path(root)
    found = []
    try:
        names = sorted(entry.name for entry in os.scandir(root) if entry.name.endswith(SUFFIX))
    except OSError:
        return []
    for file in names:
        name = file.removesuffix(SUFFIX)
        folder = root / name
        if not name or folder.is_symlink():
            continue
        try:
            descriptor = read_descriptor(root / file)
        except SimulationError:
            continue
        if descriptor.device or folder.is_dir():
            found.append(Medium(root=root, name=name, descriptor=descriptor))
    return found


def plug(
    root: str | Path,
    name: str,
    *,
    fs: FileSystem = "folder",
    kind: Kind = "storage",
    bus: str = "usb",
    vendor: str = "Kingston",
    model: str = "DataTraveler 3.0",
    serial: str | None = None,
    vendor_id: str = "0951",
    product_id: str = "1666",
    interfaces: list[str] | None = None,
    read_only: bool = False,
) -> Medium:
    """Plug the medium `name` into the directory `root` and mount it.

    `serial` defaults to one made from the name. `fs` other than "folder" needs root. A medium unplugged before comes
    back with its files, but for tmpfs. Raises SimulationError.
    """
    root = Path(root)
    if not _NAME.fullmatch(name):
        raise SimulationError(f'"{name}" can\'t be a medium\'s name; use letters, digits, ".", "_" and "-"')
    classes = {"storage": ["08:06:50"], "phone": ["06:01:01"], "keyboard": ["03:01:01"], "network": ["02:06:00"]}
    descriptor = Descriptor(
        kind=kind,
        bus=bus,
        vendor=vendor,
        model=model,
        serial=name.upper() if serial is None else serial,
        vendor_id=vendor_id,
        product_id=product_id,
        interfaces=classes.get(kind, []) if interfaces is None else interfaces,
        read_only=read_only,
    )
    medium = Medium(root=root, name=name, descriptor=descriptor)
    if medium.descriptor_path.exists():
        raise SimulationError(f'"{name}" is plugged in already; unplug it first')
    if medium.path.is_symlink():
        raise SimulationError(f"{medium.path}: is a link; a medium needs a folder of its own")
    try:
        medium.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SimulationError(f"{medium.path}: can't be made ({error.strerror})") from None
    if fs != "folder":
        _mount(medium, fs)
    lines = (f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in msgspec.structs.asdict(descriptor).items())
    fresh = medium.root / f".{name}.plugging"
    try:
        fresh.write_text("\n".join(lines) + "\n")
        fresh.rename(medium.descriptor_path)
    except OSError as error:
        raise SimulationError(f"{medium.descriptor_path}: can't be written ({error.strerror})") from None
    return medium


def unplug(medium: Medium) -> None:
    """Pull `medium`: its descriptor goes, and its own mount, if it has one; neither if it is in use (SimulationError)."""
    kept = medium.root / f".{medium.name}.unplugging"
    with contextlib.suppress(FileNotFoundError):
        medium.descriptor_path.rename(kept)
    try:
        if os.path.ismount(medium.path):
            _run(["umount", str(medium.path)], f"{medium.path}: can't be unmounted; close the programs that use it")
    except SimulationError:
        with contextlib.suppress(FileNotFoundError):
            kept.rename(medium.descriptor_path)  # still plugged in
        raise
    kept.unlink(missing_ok=True)


def _mount(medium: Medium, fs: FileSystem) -> None:
    options = "nosuid,nodev," + ("ro" if medium.descriptor.read_only else "rw")
    if os.geteuid() != 0:
        raise SimulationError(f"a medium with its own {fs} needs root; use --fs folder without it")
    if os.path.ismount(medium.path):
        raise SimulationError(f"{medium.path}: something is mounted there already; unmount it first")
    hint = f"{medium.path}: {fs} can't be mounted here"
    if fs == "tmpfs":
        _run(["mount", "-t", "tmpfs", "-o", options, f"sekisho-{medium.name}", str(medium.path)], hint)
        return
    image = medium.root / f".{medium.name}.img"
    if not image.exists():
        with image.open("wb") as file:
            file.truncate(_IMAGE_BYTES)
        _run(["mkfs.ext4", "-q", "-F", "-L", medium.name[:16], str(image)], f"{image}: ext4 can't be made; install e2fsprogs")
    _run(["mount", "-o", f"loop,{options}", str(image), str(medium.path)], hint)


def _run(command: list[str], hint: str) -> None:
    environment = os.environ | {"PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin", "LC_ALL": "C"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    except OSError as error:
        raise SimulationError(f"{hint} ({command[0]}: {error.strerror})") from None
    if done.returncode:
        raise SimulationError(f"{hint} ({done.stderr.strip() or command[0]})")
