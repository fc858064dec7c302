"""The kernel's bytes, taken apart: what was recorded from real kernels, and anything at all."""

import os
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.sense import kernel, mounts, passwd, procfs
from agent.sense.fanotify_events import decode, heads, names
from agent.sense.processes import tty_name

RECORDED = Path(__file__).parent / "recorded"


def test_a_recorded_tree_is_told_name_by_name() -> None:
    records = decode((RECORDED / "fanotify-6.18-ext4-tree.bin").read_bytes())
    told = [(record.names.old_name, record.names.name) for record in records if record.mask & kernel.FAN_RENAME]
    assert told == [(b"f", b"g"), (b"g", b""), (b"", "日本".encode())]  # within, out of, and into what is marked
    created = records[0]
    assert created.names.name == b"f"
    assert created.mask & (kernel.FAN_CREATE | kernel.FAN_CLOSE_WRITE) == kernel.FAN_CREATE | kernel.FAN_CLOSE_WRITE
    same_file = {record.names.target for record in records if not record.mask & kernel.FAN_ONDIR}
    assert len(same_file) == 1, "one file under all its names has one key"
    assert any(record.mask & kernel.FAN_ONDIR and record.names.name == b"new" for record in records)


def test_the_descriptor_group_tells_descriptors_and_no_names() -> None:
    records = decode((RECORDED / "fanotify-6.18-ext4-descriptors.bin").read_bytes())
    assert [record.mask for record in records] == [kernel.FAN_CLOSE_WRITE] * 2
    assert all(record.fd >= 0 and not any(record.names) for record in records)


def test_recorded_inotify_tells_a_life_in_order() -> None:
    records = kernel.decode_inotify((RECORDED / "inotify-6.18.bin").read_bytes())
    assert [(mask, name) for _, mask, name in records] == [
        (kernel.IN_CLOSE_WRITE, b"f"),
        (kernel.IN_MOVED_FROM, b"f"),
        (kernel.IN_MOVED_TO, b"g"),
        (kernel.IN_DELETE, b"g"),
    ]


@given(st.binary(max_size=400))
def test_no_bytes_can_stop_the_decoders(junk: bytes) -> None:
    assert len(decode(junk)) <= len(junk) // kernel.EVENT_METADATA.size
    kernel.decode_inotify(junk)
    procfs.parse_stat(junk)
    procfs.parse_status(junk)
    mounts.parse(junk)
    passwd.parse(junk)


@given(st.data())
def test_a_damaged_record_ends_the_buffer_and_is_not_believed(data: st.DataObject) -> None:
    whole = (RECORDED / "fanotify-6.18-ext4-tree.bin").read_bytes()
    cut = data.draw(st.integers(0, len(whole)))
    assert heads(whole[:cut]) == [head for head in heads(whole) if head[4] <= cut]
    at, value = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(0, 255))
    for record in decode(whole[:at] + bytes([value]) + whole[at + 1 :]):
        assert len(record.names.name) < len(whole)


@given(
    st.binary(min_size=1, max_size=40).filter(lambda name: b"\0" not in name), st.binary(max_size=64), st.binary(max_size=64)
)
def test_what_the_kernel_would_write_is_read_back(name: bytes, folder: bytes, target: bytes) -> None:
    def info(kind: int, opaque: bytes, tail: bytes = b"") -> bytes:
        body = struct.pack("=QIi", 7, len(opaque), 1) + opaque + tail
        body += bytes(-len(body) % 4)
        return struct.pack("=BBH", kind, 0, 4 + len(body)) + body

    records = info(kernel.FAN_EVENT_INFO_TYPE_DFID_NAME, folder, name + b"\0") + info(kernel.FAN_EVENT_INFO_TYPE_FID, target)
    told = names(records, 0, len(records))
    assert told.name == name
    assert told.dir == struct.pack("=QIi", 7, len(folder), 1) + folder
    assert told.target == struct.pack("=QIi", 7, len(target), 1) + target


@pytest.mark.parametrize(
    ("ours", "theirs", "same"),
    [
        ("master:1", "shared:1", True),  # a unit with PrivateMounts=
        ("shared:9 master:1", "shared:1", True),
        ("master:1", "shared:2", False),
        ("master:1", "", False),
        ("", "", False),
    ],
)
def test_a_units_own_view_of_the_mounts_follows_the_machines(ours: str, theirs: str, same: bool) -> None:
    def mountinfo(optional: str) -> bytes:
        fields = ["43 42 254:0 / / rw,relatime", *optional.split(), "- ext4 /dev/vda rw"]
        return f"44 43 0:21 / /proc rw shared:7 - proc proc rw\n{' '.join(fields)}\n".encode()

    assert mounts.follows(mountinfo(ours), mountinfo(theirs)) is same


def test_recorded_mountinfo_keeps_blanks_and_backslashes() -> None:
    found = mounts.parse((RECORDED / "mountinfo-6.18.txt").read_bytes())
    by_path = {mount.mount: mount for mount in found}
    assert by_path[b"/"].fs == "ext4" and by_path[b"/"].source == b"/dev/vda"
    assert by_path[b"/media/a b"].source == b"my disk" and not by_path[b"/media/a b"].read_only
    assert by_path[b"/media/back\\slash"].read_only
    assert by_path[b"/media/sub"].dev == by_path[b"/media/a b"].dev


@given(st.binary(max_size=60).filter(lambda raw: b"\0" not in raw), st.integers(0, 3))
def test_any_mount_point_survives_the_kernels_escapes(path: bytes, optional: int) -> None:
    escaped = b"".join(b"\\%03o" % byte if byte in b" \t\n\\#" else bytes([byte]) for byte in b"/" + path)
    tags = b"".join(b" shared:%d" % number for number in range(optional))
    line = b"36 35 98:0 / " + escaped + b" rw,noatime" + tags + b" - ext3 /dev/root rw\n"
    (mount,) = mounts.parse(line)
    assert mount.mount == b"/" + path
    assert (mount.mount_id, mount.parent_id, mount.dev, mount.fs) == (36, 35, "98:0", "ext3")


@given(st.binary(max_size=15))
def test_a_program_may_call_itself_anything(comm: bytes) -> None:
    rest = b"S 12 34 56 34816 34 4194560 " + b" ".join(b"%d" % number for number in range(12)) + b" 99887 1 2 3"
    stat = procfs.parse_stat(b"4711 (" + comm + b") " + rest)
    assert stat is not None
    assert (stat.pid, stat.comm, stat.ppid, stat.pgrp, stat.session, stat.start) == (4711, comm, 12, 34, 56, 99887)


def test_our_own_stat_is_read_right() -> None:
    stat = procfs.stat(os.getpid())
    assert stat is not None and stat.ppid == os.getppid() and stat.pgrp == os.getpgrp() and stat.session == os.getsid(0)


def test_terminals_have_the_names_people_know() -> None:
    assert [tty_name(number) for number in (0, (136 << 8) | 3, (4 << 8) | 1, (4 << 8) | 64)] == ["", "pts/3", "tty1", "ttyS0"]


def test_udev_names_a_file_system(tmp_path: Path) -> None:
    (tmp_path / "b8:17").write_text("S:disk/by-id/x\nE:ID_FS_UUID=1234-ABCD\nE:ID_FS_LABEL=MY\\x20STICK\nE:ID_FS_TYPE=vfat\n")
    assert mounts.file_system_names("8:17", str(tmp_path)) == ("1234-ABCD", "MY STICK")
    assert mounts.file_system_names("8:18", str(tmp_path)) == ("", "")


def test_passwd_takes_the_first_name_of_a_uid(tmp_path: Path) -> None:
    file = tmp_path / "passwd"
    file.write_text("root:x:0:0::/root:/bin/sh\ntoor:x:0:0::/:/bin/sh\n# note\nsato:x:1000:1000::/home/sato:/bin/sh\n")
    people = passwd.Passwd(str(file))
    assert [people.name(uid) for uid in (0, 1000, None)] == ["root", "sato", ""]
