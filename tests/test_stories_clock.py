"""The wall clock is set in the middle of things: a day on, an hour back, a little to and fro. Copies are told all the same."""

import pytest
from workstation import ROOT, Workstation

from agent.contract.codes import LOW, MEDIUM
from agent.core import facts
from agent.core.facts import OpenFile, Process

SLEWS_MS = [86_400_000, 3_600_000, 1_500, -1_500, -3_600_000, -86_400_000]


@pytest.fixture
def ws() -> Workstation:
    return Workstation().login("sato").plug()


def jump(ws: Workstation, by_ms: int) -> None:
    ws.now += by_ms
    ws.tell(facts.Clock(at_ms=ws.now, jump_ms=by_ms))


@pytest.mark.parametrize("by_ms", SLEWS_MS)
@pytest.mark.parametrize("when", ["before the read", "before it is made", "before the close", "while it settles"])
@pytest.mark.parametrize("name", ["a.csv", "other.bin"])
def test_a_copy_during_which_the_clock_is_set_is_told_once(ws: Workstation, by_ms: int, when: str, name: str) -> None:
    program, to = ws.run("cp", f"{ROOT}/a.csv", ws.stick), f"{ws.stick}/{name}"
    if when == "before the read":
        jump(ws, by_ms)
    program.read("a.csv").seen(files=[OpenFile(f"{ROOT}/a.csv", 300_000, ws.keys[f"{ROOT}/a.csv"])])
    if when == "before it is made":
        jump(ws, by_ms)
    program.create(to)
    if when == "before the close":
        jump(ws, by_ms)
    program.close(to, 300_000)
    if when == "while it settles":
        jump(ws, by_ms)
    ws.wait(3)
    told = ws.only("file.copied_out")
    assert told.link == "process" and told.login_user == "sato"


@pytest.mark.parametrize("by_ms", SLEWS_MS)
def test_packed_before_the_clock_was_set_is_told_after_it(ws: Workstation, by_ms: int) -> None:
    tar = ws.run("tar", "cz", ROOT).read("a.csv").read("b.csv").create(f"{ws.stick}/x.tgz")
    jump(ws, by_ms)
    tar.close(f"{ws.stick}/x.tgz", 260_000)
    ws.wait(3)
    assert sorted(ws.sources()) == ["a.csv", "b.csv"]


@pytest.mark.parametrize("by_ms", SLEWS_MS)
def test_what_was_counted_before_the_clock_was_set_still_counts(ws: Workstation, by_ms: int) -> None:
    for number in range(99):
        ws.file(f"{ROOT}/f{number}.csv", 1_000 + number)
        ws.copy(f"f{number}.csv")
    ws.none("copy.burst")
    jump(ws, min(by_ms, 300_000))
    ws.copy("a.csv")
    ws.only("copy.burst")


def test_a_pid_known_by_its_fork_alone_hands_nothing_to_its_next_owner(ws: Workstation) -> None:
    ws.tell(facts.ProcSeen(at_ms=ws.now, process=Process(pid=77, start=760, known="cached")))
    ws.tell(facts.Opened(at_ms=ws.now, pid=77, key=ws.keys[f"{ROOT}/a.csv"], path=f"{ROOT}/a.csv"))
    ws.run("python3", pid=77).create(f"{ws.stick}/own.bin").close(f"{ws.stick}/own.bin", 300_000)
    ws.wait(3).none("file.copied_out").only("file.written")


def test_a_start_that_differs_by_a_tick_is_the_same_process(ws: Workstation) -> None:
    ws.tell(facts.ProcSeen(at_ms=ws.now, process=Process(pid=77, start=771, known="cached")))
    ws.tell(facts.Opened(at_ms=ws.now, pid=77, key=ws.keys[f"{ROOT}/a.csv"], path=f"{ROOT}/a.csv"))
    ws.run("cp", pid=77).create(f"{ws.stick}/a.csv").close(f"{ws.stick}/a.csv", 300_000)
    ws.wait(3)
    assert ws.only("file.copied_out").link == "process"


def test_an_agent_that_was_stopped_in_order_is_no_alarm() -> None:
    ws = Workstation()
    for reason in ("stopped", "not_running"):
        ws.tell(facts.Lost(at_ms=ws.now, reason=reason, since_ms=1, until_ms=2))
    assert [gap.severity for gap in ws.all("agent.gap")] == [LOW, MEDIUM]
