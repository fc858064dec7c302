"""Stories of what goes on before anybody watches it: copied on within milliseconds, linked or moved a moment before, and media
that are written to past their file systems."""

import pytest
from workstation import ROOT, STICK, Workstation

from agent.core import facts
from agent.core.facts import OpenFile

COPY = "/tmp/s"


@pytest.fixture
def ws() -> Workstation:
    return Workstation().login("sato").plug()


def _finish(ws: Workstation, pid: int, path: str, size: int | None, key: bytes) -> list[facts.Fact]:
    """A file elsewhere is finished; the questions that follow from that alone."""
    ws.tell(facts.Closed(at_ms=ws.now, pid=pid, key=key, path=path, size=size, born_ms=ws.now))
    return ws.core.compare()


def _stage(ws: Workstation, alike: str = "same", size: int = 300_000) -> None:
    """cp a.csv /tmp/s"""
    ws.file(COPY, size)
    cp = ws.run("cp").read("a.csv")
    (ask,) = _finish(ws, cp.pid, COPY, size, ws.keys[COPY])
    ws.tell(facts.Compared(at_ms=ws.now, key=ask.key, path=COPY, size=size, alike=alike))
    cp.end()


def _take_on(ws: Workstation, source: str, to: str, size: int) -> None:
    """Copied by who holds the source when the destination is made; its opening was not told, as nothing watched it."""
    cp = ws.run("cp").seen(files=[OpenFile(source, size, ws.keys[source])])
    cp.create(f"{STICK_DIR}/{to}").close(f"{STICK_DIR}/{to}", size)


STICK_DIR = "/media/Kingston"


def test_a_copy_is_compared_at_once_not_after_it_has_settled(ws):
    ws.file(COPY, 300_000)
    cp = ws.run("cp").read("a.csv")
    assert [ask.path for ask in _finish(ws, cp.pid, COPY, 300_000, ws.keys[COPY])] == [COPY]


def test_taken_on_before_anybody_knew_that_it_is_a_copy(ws):
    ws.file(COPY, 300_000)
    first = ws.run("cp").read("a.csv")
    _take_on(ws, COPY, "x", 300_000)
    (ask,) = _finish(ws, first.pid, COPY, 300_000, ws.keys[COPY])
    ws.tell(facts.Compared(at_ms=ws.now, key=ask.key, path=COPY, size=300_000, alike="same"))
    ws.wait(1)
    event = ws.only("file.copied_out")
    assert event.source["path"] == f"{ROOT}/a.csv" and event.link == "lineage" and event.bytes == 300_000


def test_moved_on_before_anybody_could_look_at_it(ws):
    """cp a.csv /tmp/s; mv /tmp/s onto the stick: the copy is gone when its end is told, but mv was seen with it in hand."""
    ws.file(COPY, 300_000)
    first = ws.run("cp").read("a.csv")
    _take_on(ws, COPY, "x", 300_000)
    (ask,) = _finish(ws, first.pid, "", None, ws.keys[COPY])
    assert ask.path == COPY
    ws.tell(facts.Compared(at_ms=ws.now, key=ask.key, path=COPY, size=0, alike="gone"))
    ws.wait(1)
    assert ws.only("file.copied_out").source["path"] == f"{ROOT}/a.csv"


def test_a_file_that_is_gone_and_that_nobody_held_is_nothing(ws):
    cp = ws.run("cp").read("a.csv")
    assert _finish(ws, cp.pid, "", None, b"nobody's") == []


def test_parts_of_a_source_come_to_its_size(ws):
    for number in range(3):
        part = f"/tmp/part{number}"
        ws.file(part, 100_000)
        split = ws.run("split").read("a.csv")
        (ask,) = _finish(ws, split.pid, part, 100_000, ws.keys[part])
        ws.tell(facts.Compared(at_ms=ws.now, key=ask.key, path=part, size=100_000, alike="part"))
        ws.core.mark()
        _take_on(ws, part, f"part{number}", 100_000)
        ws.wait(1)
    assert [event.bytes for event in ws.all("file.copied_out")] == [100_000] * 3


def test_a_part_is_one_after_a_restart_too(ws):
    _stage(ws, "part", 100_000)
    assert ws.only("file.staged").bytes == 100_000
    ws.restart().plug()
    _take_on(ws, COPY, "x", 100_000)
    ws.wait(1)
    assert ws.only("file.copied_out").bytes == 100_000


def test_a_hard_link_that_is_noticed_only_when_somebody_holds_it(ws):
    link = "/home/sato/x"
    ws.file(link, 300_000)
    cp = ws.run("cp").seen(files=[OpenFile(link, 300_000, ws.keys[link])])
    ws.tell(facts.Attributes(at_ms=ws.now, pid=0, key=ws.keys[link], path=f"{ROOT}/a.csv", inode=1, links=2))
    cp.create(f"{STICK_DIR}/y").close(f"{STICK_DIR}/y", 300_000)
    ws.wait(1)
    assert ws.only("file.copied_out").source["path"] == f"{ROOT}/a.csv"


def _write_raw(ws: Workstation, pid: int, node: str) -> None:
    ws.tell(facts.NodeWritten(at_ms=ws.now, pid=pid, node=node, path="/dev/sdb", since_ms=ws.now))
    ws.wait(1)


def test_what_is_written_to_the_bare_device_is_what_its_writer_read(ws):
    dd = ws.run("dd").read("a.csv")
    _write_raw(ws, dd.pid, STICK.nodes[0])
    event = ws.only("file.copied_out")
    assert event.source["path"] == f"{ROOT}/a.csv" and event.link == "process" and event.bytes == 300_000
    assert event.dest["path"] == "/dev/sdb" and event.medium["serial"] == STICK.serial and event.confidence <= 0.5


def test_formatting_a_medium_is_no_copy_and_no_file(ws):
    _write_raw(ws, ws.run("mkfs.vfat").pid, STICK.nodes[0])
    assert not ws.all("file.copied_out") and not ws.all("file.written")


def test_the_bare_device_of_no_medium_is_nobodys_business(ws):
    dd = ws.run("dd").read("a.csv")
    _write_raw(ws, dd.pid, "259:0")
    ws.none("file.copied_out")
