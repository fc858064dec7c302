"""What archives on media say they hold: read from real ones, and from a stranger's bytes without harm."""

import io
import os
import tarfile
import zipfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent.sense import archives, autorun, origins
from agent.sense.archives import Archives, is_archive


def zipped(names: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in names.items():
            archive.writestr(name, data)
    return out.getvalue()


def tarred(names: dict[str, bytes], mode: str = "w", kind: int = tarfile.GNU_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode, format=kind) as archive:  # type: ignore[call-overload]
        for name, data in names.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


FILES = {"inner/a.csv": b"a" * 700, "b.txt": b"hello", "deep/" + "d" * 180 + "/long.bin": b"x" * 1025, "顧客.csv": b"1,2"}
MADE = {
    "zip": zipped(FILES),
    "gnu tar": tarred(FILES),
    "pax tar": tarred(FILES, kind=tarfile.PAX_FORMAT),
}


@pytest.mark.parametrize("kind", MADE)
def test_members_are_known_by_name_and_size(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x"
    path.write_bytes(MADE[kind])
    archive = Archives().of(os.fsencode(path))
    assert archive is not None and archive.is_one
    for name, data in FILES.items():
        assert archive.holds(os.fsencode(name.rpartition("/")[2]), len(data)) is True, name
    assert archive.holds(b"a.csv", 701) is False and archive.holds(b"other", 700) is False


def test_what_is_packed_as_a_whole_keeps_no_list(tmp_path: Path) -> None:
    path = tmp_path / "x.tgz"
    path.write_bytes(tarred(FILES, "w:gz"))
    archive = Archives().of(os.fsencode(path))
    assert archive is not None and archive.is_one and archive.holds(b"a.csv", 700) is None
    for head in (b"7z\xbc\xaf\x27\x1c", b"Rar!\x1a\x07", b"\xfd7zXZ\0", b"BZh9", b"\x28\xb5\x2f\xfd"):
        path.write_bytes(head + bytes(100))
        archive = Archives().of(os.fsencode(path))
        assert archive is not None and archive.is_one and archive.holds(b"x", 1) is None and is_archive(head)
    path.write_bytes(b"%PDF-1.7 no archive")
    archive = Archives().of(os.fsencode(path))
    assert archive is not None and not archive.is_one


def test_a_changed_archive_is_read_anew(tmp_path: Path) -> None:
    path, known = tmp_path / "x.zip", Archives()
    path.write_bytes(zipped({"one": b"1"}))
    first = known.of(os.fsencode(path))
    assert first is not None and known.of(os.fsencode(path)) is first
    path.write_bytes(zipped({"two": b"22"}))
    second = known.of(os.fsencode(path))
    assert second is not None and second.holds(b"two", 2)


def test_a_link_or_a_pipe_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/etc/passwd")
    os.mkfifo(tmp_path / "pipe")
    assert Archives().of(os.fsencode(tmp_path / "link")) is None
    assert Archives().of(os.fsencode(tmp_path / "gone")) is None
    archive = Archives().of(os.fsencode(tmp_path / "pipe"))
    assert archive is None or not archive.is_one


@given(
    st.sampled_from(list(MADE.values())),
    st.lists(st.tuples(st.integers(0, 4_000), st.binary(max_size=12)), max_size=8),
    st.integers(0, 6_000),
)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_strangers_bytes_hurt(tmp_path: Path, whole: bytes, changes: list[tuple[int, bytes]], length: int) -> None:
    data = bytearray(whole)
    for at, change in changes:
        data[at : at + len(change)] = change
    path = tmp_path / "x"
    path.write_bytes(bytes(data[:length]))
    archive = Archives().of(os.fsencode(path))
    assert archive is not None and archive.holds(b"x", 1) in (True, False, None)
    assert archive.members is None or len(archive.members) <= archives.LISTED


@given(st.binary(max_size=300))
@settings(max_examples=300, deadline=None)
def test_any_first_line_names_programs_that_are_there_or_none(head: bytes) -> None:
    for line in (head, b"#!" + head):
        assert all(os.path.isabs(path) and os.path.exists(path) for path in origins.named(line))


def test_scripts_name_what_runs_them() -> None:
    shell = os.path.realpath(b"/bin/sh")
    assert origins.named(b"#!/bin/sh -e\necho") == {shell}
    assert shell in origins.named(b"#!/usr/bin/env sh\n") and origins.named(b"echo #!/bin/sh") == set()
    assert shell in origins.interpreters()


def test_what_asks_to_be_run_is_found_by_name_alone(tmp_path: Path) -> None:
    assert autorun.look(str(tmp_path)) == [] and autorun.look("/nonexistent\0") == []
    (tmp_path / "autorun.inf").symlink_to("/dev/zero")
    (tmp_path / ".autorun").write_text("x")
    assert sorted(autorun.look(str(tmp_path))) == [".autorun", "autorun.inf"]
