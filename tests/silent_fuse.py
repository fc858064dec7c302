"""A FUSE server by hand, for one file `f`, which never answers the requests named: `python silent_fuse.py MOUNT UID OP…`.

Sources: <linux/fuse.h> for the requests' numbers and layouts. It mounts as root and then has the user's ids, as sshfs has.
"""

import contextlib
import ctypes
import errno
import os
import stat
import struct
import sys

LOOKUP, FORGET, GETATTR, SETATTR, OPEN, WRITE, STATFS, RELEASE = 1, 2, 3, 4, 14, 16, 17, 18
FLUSH, INIT, OPENDIR, INTERRUPT, BATCH_FORGET, RELEASEDIR = 25, 26, 27, 36, 42, 29
_IN, _OUT = struct.Struct("=IIQQIIII"), struct.Struct("=IiQ")
_ATTR = struct.Struct("=QQQQQQIIIIIIIIII")
SIZE = 10


def _attributes(node: int, uid: int) -> bytes:
    mode = stat.S_IFDIR | 0o755 if node == 1 else stat.S_IFREG | 0o644
    return _ATTR.pack(node, 0 if node == 1 else SIZE, 0, 0, 0, 0, 0, 0, 0, mode, 1, uid, uid, 0, 4096, 0)


def _answer(request: int, node: int, body: bytes, uid: int) -> bytes | None:
    """What is answered; None: no such thing."""
    if request == INIT:
        return struct.pack("=IIIIHHIIHHIIHH", 7, 31, 65536, 0, 12, 9, 1 << 17, 1, 0, 0, 0, 0, 0, 0) + bytes(20)
    if request in (GETATTR, SETATTR):
        return struct.pack("=QII", 0, 0, 0) + _attributes(node, uid)
    if request == LOOKUP:
        return struct.pack("=QQQQII", 2, 0, 0, 0, 0, 0) + _attributes(2, uid) if body == b"f\0" else None
    if request in (OPEN, OPENDIR):
        return struct.pack("=QII", 5, 0, 0)
    if request == STATFS:
        return struct.pack("=QQQQQIII", 1, 1, 1, 1, 1, 4096, 255, 4096) + bytes(28)
    if request == WRITE:
        return struct.pack("=II", struct.unpack_from("=QQI", body)[2], 0)
    return b"" if request in (RELEASE, RELEASEDIR, FLUSH) else None


def main(mount: str, uid: int, silent: set[int]) -> None:
    """Serve until it is unmounted."""
    fd = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={fd},rootmode=40000,user_id={uid},group_id={uid}"
    if ctypes.CDLL(None, use_errno=True).mount(b"far:/", mount.encode(), b"fuse.sshfs", 0, options.encode()):
        sys.exit(f"mount: {os.strerror(ctypes.get_errno())}")
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    print("mounted", flush=True)
    while True:
        try:
            data = os.read(fd, 1 << 20)
        except OSError as error:
            if error.errno == errno.ENODEV:
                return
            continue
        _, request, unique, node, *_ = _IN.unpack_from(data)
        if request in silent | {FORGET, BATCH_FORGET, INTERRUPT}:
            continue
        said = _answer(request, node, data[_IN.size :], uid)
        code = 0 if said is not None else -errno.ENOENT if request == LOOKUP else -errno.ENOSYS
        with contextlib.suppress(OSError):  # whoever asked is gone
            os.write(fd, _OUT.pack(_OUT.size + len(said or b""), code, unique) + (said or b""))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), {int(each) for each in sys.argv[3:]})
