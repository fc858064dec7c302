"""Stories of what comes from media: told with its source, sure as far as it is, and not told if it was only looked at."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from workstation import ROOT, STICK, Program, Workstation

from agent.core import facts
from agent.core.inbound import MOST_ASKED

HOME = "/home/sato"


class Desk(Workstation):
    """A workstation at which somebody reads from a stick."""

    def __init__(self, **config: Any) -> None:
        super().__init__(record_names=config.pop("record_names", True), **config)
        self.login("sato").plug()
        self.file(f"{self.stick}/report.pdf", 90_000)
        self.file(f"{self.stick}/all.zip", 50_000)
        self.traces: list[Any] = []

    def take(self, program: Program, name: str) -> Program:
        """A file on the stick is opened."""
        path = f"{self.stick}/{name}"
        self.tell(facts.MediumRead(at_ms=self.now, pid=program.pid, key=self.keys[path], path=path))
        return program

    def put(self, program: Program, path: str, size: int, how: str = "copied", source: str = "", born: bool = True) -> None:
        """A file is finished elsewhere; an edge looks at it if it is asked to."""
        if path not in self.keys:
            self.file(path, size)
        self.sizes[path] = size
        fact = facts.Closed(at_ms=self.now, pid=program.pid, key=self.keys[path], path=path, size=size)
        fact.born_ms = self.now if born else self.now - 86_400_000
        self.tell(fact).wait(1)
        self.look(how, source)

    def look(self, how: str, source: str = "", program: bool = False) -> None:
        for ask in self.core.trace():
            self.traces.append(ask)
            at = f"{self.stick}/{source}" if source else ""
            size = self.sizes.get(ask.path, 0)
            fact = facts.Traced(at_ms=self.now, key=ask.key, path=ask.path, how=how, size=size, source=at, program=program)
            self.tell(fact)

    def copy_in(self, name: str, to: str, how: str = "copied") -> None:
        program = self.take(self.run("cp", name, to), name)
        self.put(program, to, self.sizes[f"{self.stick}/{name}"], how)
        program.end()


def test_a_copy_is_told_with_person_source_and_medium() -> None:
    desk = Desk()
    desk.copy_in("report.pdf", f"{HOME}/report.pdf")
    event = desk.only("file.brought_in")
    assert event.source == {"path": f"{desk.stick}/report.pdf", "size": 90_000}
    assert event.dest == {"path": f"{HOME}/report.pdf", "size": 90_000}
    assert (event.login_user, event.link, event.confidence, event.bytes) == ("sato", "process", 0.95, 90_000)
    assert event.medium["key"].startswith("usb:0951") and event.detail == {"how": "copied"}
    assert desk.traces[-1].plain, "nothing was compared"


def test_what_was_only_viewed_is_not_told() -> None:
    desk = Desk()
    viewer = desk.take(desk.run("evince", "report.pdf"), "report.pdf")
    desk.put(viewer, f"{HOME}/.cache/thumbnail.png", 30_000, "other")
    desk.put(viewer, f"{HOME}/.local/recently-used.xbel", 4_000, "other")
    desk.none("file.brought_in")


def test_another_name_needs_the_bytes() -> None:
    desk = Desk()
    desk.copy_in("report.pdf", f"{HOME}/x.bin")
    assert desk.only("file.brought_in").confidence == 0.9 and not desk.traces[-1].plain


def test_each_file_out_of_an_archive_has_the_archive_as_its_source() -> None:
    desk = Desk()
    unzip = desk.take(desk.run("unzip", "all.zip"), "all.zip")
    for number in range(3):
        desk.put(unzip, f"{HOME}/out/{number}.txt", 700 + number, "extracted", "all.zip")
    events = desk.all("file.brought_in")
    assert [event.dest["size"] for event in events] == [700, 701, 702]
    assert {event.source["path"] for event in events} == {f"{desk.stick}/all.zip"}
    assert {event.detail["how"] for event in events} == {"extracted"}


def test_an_archive_that_is_packed_whole_is_less_sure_and_only_for_new_files() -> None:
    desk = Desk()
    tar = desk.take(desk.run("tar", "xf"), "all.zip")
    desk.put(tar, f"{HOME}/a", 700, "unpacked", "all.zip")
    desk.put(tar, f"{HOME}/settings", 700, "other", born=False)
    assert desk.only("file.brought_in").confidence == 0.6
    assert [trace.new for trace in desk.traces] == [True, False]


def test_a_file_brought_into_a_protected_directory_is_named_there_though_names_are_not_kept() -> None:
    desk = Desk(record_names=False)
    program = desk.take(desk.run("cp", "report.pdf"), "report.pdf")
    path = f"{ROOT}/report.pdf"
    desk.file(path, 90_000)
    desk.tell(facts.Created(at_ms=desk.now, pid=program.pid, key=desk.keys[path], path=path))
    desk.tell(facts.Closed(at_ms=desk.now, pid=program.pid, key=desk.keys[path], path=path, size=90_000)).wait(1)
    desk.look("copied")
    event = desk.only("file.brought_in")
    assert event.protected["rel"] == "report.pdf" and event.dest["path"] == path
    assert event.source["path"] == f"{desk.stick}/*.pdf" and "argv" not in event.process


def test_a_plain_folder_is_left_by_a_rename() -> None:
    desk = Desk()
    program = desk.run("mv", "report.pdf", HOME)
    program.rename(f"{desk.stick}/report.pdf", f"{HOME}/report.pdf")
    event = desk.only("file.brought_in")
    assert event.detail == {"how": "moved"} and event.confidence == 1.0 and event.dest["size"] == 90_000


def test_moved_by_copying_the_source_is_gone_by_then() -> None:
    desk = Desk()
    program = desk.take(desk.run("mv", "report.pdf", HOME), "report.pdf")
    del desk.sizes[f"{desk.stick}/report.pdf"]
    desk.put(program, f"{HOME}/report.pdf", 90_000, "unknown")
    event = desk.only("file.brought_in")
    assert event.confidence == 0.8 and "size" not in event.source


def test_from_one_stick_to_another_nothing_comes_in() -> None:
    desk = Desk()
    program = desk.take(desk.run("cp", "report.pdf"), "report.pdf")
    program.create(f"{desk.stick}/second.pdf").close(f"{desk.stick}/second.pdf", 90_000)
    desk.wait(2).none("file.brought_in")
    assert len(desk.all("file.written")) == 1


@pytest.mark.parametrize(("decision", "severity"), [("none", 3), ("approved", 1), ("unapproved", 4)])
def test_a_program_that_runs_from_a_medium_weighs_by_its_approval(decision: str, severity: int) -> None:
    desk = Desk()
    if decision == "approved":
        desk.approve(STICK)
    elif decision == "unapproved":
        desk.tell(facts.Register(at_ms=desk.now, version=1, approvals=[]))
    tool = desk.run(f"{desk.stick}/report.pdf")
    fact = facts.Executed(
        at_ms=desk.now, pid=tool.pid, key=desk.keys[f"{desk.stick}/report.pdf"], path=f"{desk.stick}/report.pdf"
    )
    desk.tell(fact).tell(fact)
    event = desk.only("file.brought_in")
    assert event.severity == severity and event["activity_id"] == 14 and "dest" not in event.said
    assert event.detail == {"how": "executed", "program": True}


def test_a_script_counts_only_if_it_is_named_first_and_runs() -> None:
    desk = Desk()
    desk.file(f"{desk.stick}/x.sh", 90)
    desk.take(desk.run("grep", "word", "x.sh"), "x.sh")
    assert not desk.core.trace()
    desk.take(desk.run("cat", "x.sh"), "x.sh")
    desk.look("other")
    desk.none("file.brought_in")
    desk.take(desk.run("sh", "x.sh"), "x.sh")
    desk.look("script")
    assert desk.only("file.brought_in").detail["how"] == "script"


def test_one_finished_file_is_told_once_however_often_it_is_closed() -> None:
    desk = Desk()
    program = desk.take(desk.run("cp", "report.pdf"), "report.pdf")
    for _ in range(3):
        desk.put(program, f"{HOME}/report.pdf", 90_000)
    assert len(desk.all("file.brought_in")) == 1


def test_a_storm_that_nobody_looks_at_is_told_as_far_as_it_is_plain_and_counted() -> None:
    desk = Desk()
    program = desk.run("cp", "-r", "all")
    count = MOST_ASKED + 300
    for number in range(count):
        desk.file(f"{desk.stick}/f{number}", 1_000 + number)
        desk.take(program, f"f{number}")
    for number in range(count):
        path = desk.file(f"{HOME}/f{number}", 1_000 + number)
        fact = facts.Closed(at_ms=desk.now, pid=program.pid, key=desk.keys[path], path=path, size=1_000 + number)
        desk.tell(fact)
    desk.wait(2)
    assert len(desk.all("file.brought_in")) == 300, "for which there was no room to ask"
    desk.wait(90)
    assert len(desk.all("file.brought_in")) == count
    desk.none("agent.gap")


def test_what_the_stop_finds_undecided_is_told_if_it_is_plain() -> None:
    desk = Desk()
    program = desk.take(desk.run("cp", "report.pdf"), "report.pdf")
    path = desk.file(f"{HOME}/report.pdf", 90_000)
    desk.tell(facts.Closed(at_ms=desk.now, pid=program.pid, key=desk.keys[path], path=path, size=90_000))
    desk.tell(facts.Stopping(at_ms=desk.now))
    assert desk.only("file.brought_in").dest["path"] == path


STEPS = st.lists(
    st.tuples(st.sampled_from(["take", "put", "home", "run", "end", "tick", "answer"]), st.integers(0, 4)), max_size=60
)


@given(STEPS)
@settings(max_examples=150, deadline=None)
def test_in_whatever_order_it_comes_every_event_is_one(steps: list[tuple[str, int]]) -> None:
    desk = Desk()
    programs = [desk.run("cp", f"f{number}") for number in range(5)]
    for number in range(5):
        desk.file(f"{desk.stick}/f{number}", 5_000 + number)
    for what, number in steps:
        program = programs[number]
        if what == "take":
            desk.take(program, f"f{(number * 2) % 5}")
        elif what == "put":
            desk.put(program, f"{HOME}/f{(number * 2) % 5}", 5_000 + (number * 2) % 5, "unknown")
        elif what == "home":
            path = desk.file(f"{HOME}/g{number}", 7_000)
            desk.tell(facts.Closed(at_ms=desk.now, pid=program.pid, key=desk.keys[path], path=path, size=7_000))
        elif what == "run":
            path = f"{desk.stick}/f{number}"
            desk.tell(facts.Executed(at_ms=desk.now, pid=program.pid, key=desk.keys[path], path=path))
        elif what == "end":
            program.end()
        elif what == "answer":
            desk.tell(facts.Traced(at_ms=desk.now, key=b"nobody asked", path="/x", how="copied", size=1))
        else:
            desk.wait(61)
    for event in desk.all("file.brought_in"):
        assert event.source["path"].startswith(desk.stick) and event.confidence > 0
