"""Disk images of removable media, made on the host, whose own kernel need not know their filesystems."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import tempfile
import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

MIB = 1 << 20
Files = Mapping[str, bytes | Path]


def sh(*argv: str | Path) -> str:
    done = subprocess.run([str(arg) for arg in argv], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, argv))}: {done.stdout}{done.stderr}")
    return done.stdout


def lay(files: Files, folder: Path) -> Path:
    """Write the files (relative name to bytes, or to a host file) out as a folder."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Path):
            shutil.copy(content, path)
        else:
            path.write_bytes(content)
    return folder


def fill_by_fuse(image: Path, tree: Path, *mounter: str) -> None:
    with tempfile.TemporaryDirectory() as where:
        server = subprocess.Popen([*mounter, str(image), where], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            while not os.path.ismount(where):
                if server.poll() is not None:
                    raise RuntimeError(f"{mounter[0]} ended {server.returncode}")
                time.sleep(0.02)
            shutil.copytree(tree, where, dirs_exist_ok=True, copy_function=shutil.copyfile)
        finally:
            subprocess.run(["umount", where])
            server.wait()  # only now is all of it in the image


def vfat(image: Path, label: str, tree: Path) -> None:
    sh("mkfs.vfat", "-n", label, image)
    if entries := list(tree.iterdir()):
        sh("mcopy", "-s", "-i", image, *entries, "::")


def exfat(image: Path, label: str, tree: Path) -> None:
    sh("mkfs.exfat", "-L", label, image)
    if any(tree.iterdir()):
        loop = sh("losetup", "-f", "--show", image).strip()  # this server takes block devices only
        try:
            fill_by_fuse(Path(loop), tree, "mount.exfat-fuse", "-d")
        finally:
            sh("losetup", "-d", loop)


def ntfs(image: Path, label: str, tree: Path) -> None:
    sh("mkfs.ntfs", "-F", "-q", "-Q", "-L", label, image)
    if any(tree.iterdir()):
        fill_by_fuse(image, tree, "ntfs-3g", "-o", "no_detach")


def ext4(image: Path, label: str, tree: Path) -> None:
    sh("mke2fs", "-q", "-F", "-t", "ext4", "-L", label, "-d", tree, image)


def raw(image: Path, label: str, tree: Path) -> None:
    """No filesystem at all."""


MAKERS: dict[str, tuple[int, Callable[[Path, str, Path], None]]] = {  # MBR type, maker
    "vfat": (0x0C, vfat),
    "exfat": (0x07, exfat),
    "ntfs": (0x07, ntfs),
    "ext4": (0x83, ext4),
    "raw": (0x83, raw),
}


def make(
    image: Path,
    size_mb: int,
    fs: str,
    files: Files,
    *,
    label: str = "STICK",
    passphrase: str | None = None,
    partition: bool = True,
) -> None:
    """A stick of `size_mb`, as sold: an MBR with one partition (or none), `fs` on it, LUKS around it if asked."""
    kind, maker = MAKERS[fs]
    with tempfile.TemporaryDirectory(dir=image.parent) as scratch:
        tree, volume = Path(scratch, "tree"), Path(scratch, "volume")
        tree.mkdir()
        lay(files, tree)
        room = size_mb - (1 if partition else 0) - (4 if passphrase else 0)
        with volume.open("wb") as out:
            out.truncate(room * MIB)
        maker(volume, label, tree)
        if passphrase:
            kind, volume = 0x83, luks(volume, passphrase)
        with image.open("wb") as out:
            if partition:
                sectors = (size_mb - 1) * MIB // 512
                entry = struct.pack("<B3sB3sII", 0, b"\xfe\xff\xff", kind, b"\xfe\xff\xff", MIB // 512, sectors)
                out.write(bytes(440) + struct.pack("<IH", zlib.crc32(image.name.encode()), 0))
                out.write(entry + bytes(48) + b"\x55\xaa")
                out.seek(MIB)
            with volume.open("rb") as source:
                while block := source.read(MIB):
                    if block.count(0) == len(block):
                        out.seek(len(block), 1)
                    else:
                        out.write(block)
            out.truncate(size_mb * MIB)


def luks(volume: Path, passphrase: str) -> Path:
    """LUKS1 around a volume; a cheap key derivation, as the guest is emulated."""
    secret, out = volume.with_name("secret"), volume.with_name("luks")
    secret.write_text(passphrase)
    sh(
        "qemu-img",
        "convert",
        "-O",
        "luks",
        "--object",
        f"secret,id=key,file={secret}",
        "-o",
        "key-secret=key,iter-time=1",
        volume,
        out,
    )
    return out


def make_iso(image: Path, files: Files) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        sh("genisoimage", "-quiet", "-R", "-J", "-V", "DISC", "-o", image, lay(files, Path(scratch)))
