"""Events of a storm made by a form are, byte for byte, the events that would have been made one by one."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.contract.event import path_text, read, seal
from agent.contract.form import Filled
from agent.core import facts
from agent.core.ocsf import Writer
from tests.spooled import Machine
from tests.workstation import ROOT, STICK, Workstation


class OneByOne(Writer):
    """A writer to whom no event is like the one before."""

    def copied_out(self, *what):
        self._copies.goes_on()
        return super().copied_out(*what)

    def staged(self, *what):
        self._stagings.goes_on()
        return super().staged(*what)


def storm(names: list[str], one_by_one: bool = False, **config: object) -> Workstation:
    """`cp -r` of these files onto a stick, as one process."""
    ws = Workstation(**config).login("sato").plug(STICK)
    if one_by_one:
        ws.core._writer.__class__ = OneByOne
    cp = ws.run("cp", "-r", ROOT, f"{ws.stick}/all")
    for number, name in enumerate(names):
        source = ws.file(f"{ROOT}/{name}", 100 + number)
        ws.mark(source)
        cp.read(source).create(f"{ws.stick}/all/{name}").close(f"{ws.stick}/all/{name}", 100 + number)
    cp.end()
    return ws.wait(3)


names = st.lists(
    st.binary(min_size=1, max_size=20).map(lambda raw: path_text(raw.replace(b"\0", b"").replace(b"/", b"")) + ".csv"),
    min_size=3,
    max_size=12,
    unique=True,
)


@settings(deadline=None, max_examples=60)
@given(names, st.booleans())
def test_a_form_makes_the_very_same_bytes(names, record_names):
    made, wanted = storm(names, record_names=record_names), storm(names, True, record_names=record_names)
    assert len(made.all("file.copied_out")) == len(names)
    assert made.raw == wanted.raw


@pytest.mark.parametrize("percent", ["100%.csv", "%b%d%s.csv", '"quoted".csv', "back\\\\slash.csv"])
def test_what_means_something_elsewhere_is_only_text_here(percent):
    ws = storm(["a1.csv", "a2.csv", percent])
    assert ws.all("file.copied_out")[-1].source["path"] == f"{ROOT}/{percent}"


def test_the_third_of_a_storm_is_made_by_a_form_and_a_finding_rests_on_it():
    ws = storm([f"f{number}.csv" for number in range(150)])
    finding = next(event for event in ws.events if event.code == "copy.burst")
    copies = {event.uid for event in ws.all("file.copied_out")}
    assert {each["uid"] for each in finding["finding_info"]["related_events"]} <= copies
    assert finding.login_user == "sato"
    assert finding["actor"]["process"]["name"] == "cp"
    assert finding.medium["serial"] == STICK.serial


def test_another_program_or_another_verdict_is_another_form():
    ws = storm(["a1.csv", "a2.csv", "a3.csv"])
    ws.tell(facts.Register(at_ms=ws.now, version=1, approvals=[]))
    dd = ws.run("dd")
    for name in ("b1.csv", "b2.csv", "b3.csv"):
        source = ws.file(f"{ROOT}/{name}", 77)
        dd.read(source).create(f"{ws.stick}/{name}").close(f"{ws.stick}/{name}", 77)
    ws.wait(3)
    told = ws.all("file.copied_out")
    assert [event.process["exe"] for event in told] == ["/usr/bin/cp"] * 3 + ["/usr/bin/dd"] * 3
    assert [event.medium["decision"] for event in told] == ["unknown"] * 3 + ["unapproved"] * 3


def test_what_was_made_by_a_form_is_kept_packed_and_whole_as_any_other(tmp_path):
    ws = Workstation().login("sato").plug(STICK)
    cp, made = ws.run("cp", "-r"), []
    for number in range(300):
        at, to = ws.file(f"{ROOT}/f{number}.csv", 10), ws.file(f"{ws.stick}/f{number}.csv", 10)
        stick, source = ws.keys[to], ws.keys[at]
        made += ws.core.feed(facts.Opened(at_ms=ws.now, pid=cp.pid, key=source, path=at, size=10, inode=number))
        made += ws.core.feed(facts.Created(at_ms=ws.now, pid=cp.pid, key=stick, path=to))
        made += ws.core.feed(facts.Closed(at_ms=ws.now, pid=cp.pid, key=stick, path=to, size=10))
    assert sum(isinstance(each, Filled) for each in made) > 290
    machine = Machine(tmp_path / "state")
    sealed = machine.spool.append(made)
    assert sealed[200] == seal(made[200], 201, machine.spool.epoch, machine.spool.hash_at(200))
    assert [read(data).metadata.uid for data in sealed] == [each.uid for each in made]
    assert [each.metadata.uid for each in made] == [each.uid for each in made]
    machine.spool.close()


def staged(names: list[str], record_names: bool, one_by_one: bool = False) -> Workstation:
    """`cp -r` of these files to a home directory, as one process."""
    ws = Workstation(record_names=record_names).login("sato")
    if one_by_one:
        ws.core._writer.__class__ = OneByOne
    cp = ws.run("cp", "-r", ROOT, "/home/sato/all")
    for number, name in enumerate(names):
        source, copy = ws.file(f"{ROOT}/{name}", 100 + number), ws.file(f"/home/sato/all/{name}", 100 + number)
        cp.read(source)
        ws.tell(facts.Closed(at_ms=ws.now, pid=cp.pid, key=ws.keys[copy], path=copy, size=100 + number, born_ms=ws.now))
        for path in ws.core.ask():
            ws.tell(facts.Sized(at_ms=ws.now, path=path, size=ws.sizes[path], inode=number))
        for ask in ws.core.compare():
            ws.tell(facts.Compared(at_ms=ws.now, key=ask.key, path=ask.path, size=100 + number, alike="same"))
    return ws


@settings(deadline=None, max_examples=30)
@given(names, st.booleans())
def test_copies_elsewhere_are_the_very_same_bytes_too(names, record_names):
    made, wanted = staged(names, record_names), staged(names, record_names, True)
    assert len(made.all("file.staged")) == len(names)
    assert made.raw == wanted.raw
