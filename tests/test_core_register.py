"""The register's decisions as an auditor reads them: tests/cases/register.toml, one row a decision; passes, codes and age."""

import tomllib
from pathlib import Path

import pytest

from agent.core.facts import Approval, Register, Unlocked
from agent.core.register import REASONS, MediaRegister

CASES = tomllib.loads(Path(__file__).with_name("cases").joinpath("register.toml").read_text())["case"]
DAY_MS, KEY = 86_400_000, "usb:0951:1666:60A"


def _approval(row: dict) -> Approval:
    given = {"key": KEY} | row
    until, since = given.pop("until", None), given.pop("since", 0)
    return Approval(since_ms=int(since * DAY_MS), until_ms=None if until is None else int(until * DAY_MS), **given)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["tells"])
@pytest.mark.parametrize("restarted", [False, True], ids=["", "after a restart"])
def test_decision(case, restarted):
    register = MediaRegister("agent-1", "ws-042")
    if not case.get("no_register"):
        approvals = [_approval(row) for row in case["approvals"]]
        register.replace(Register(at_ms=0, version=1, approvals=approvals, groups=case.get("groups", {})))
    for act in case.get("first", ()):
        if act == "unlock":
            register.unlock(Unlocked(at_ms=99 * DAY_MS, id="C", key=KEY, until_ms=101 * DAY_MS))
        else:
            getattr(register, act)(*((KEY, 100 * DAY_MS) if act == "plugged" else (KEY,)))
    if restarted:
        kept, register = register.to_bytes(), MediaRegister("agent-1", "ws-042")
        register.from_bytes(kept)
    verdict = register.decide(KEY, 100 * DAY_MS, tuple(case.get("dirs", ())), case.get("writing", False))
    assert verdict == (case["decision"], case["reason"], case.get("approval", ""), 0)
    assert verdict.reason in REASONS


def test_every_reason_has_a_case():
    assert {case["reason"] for case in CASES} == set(REASONS)


def test_an_older_register_is_not_taken():
    register = MediaRegister("a")
    assert register.replace(Register(at_ms=0, version=2, approvals=[Approval(id="A", key=KEY)]))
    assert not register.replace(Register(at_ms=0, version=1))
    assert register.decide(KEY, 0).decision == "approved"


def test_a_pass_is_used_up_by_one_plugging_in_also_without_a_network():
    register = MediaRegister("agent-1")
    register.replace(Register(at_ms=0, version=1, approvals=[Approval(id="A", key=KEY, once=True)]))
    assert register.plugged(KEY, 1) and not register.plugged(KEY, 2), "taken once"
    assert register.decide(KEY, 2).decision == "approved"
    # The collector heard of it, and says so to everyone: here it goes on for as long as the medium stays.
    register.replace(Register(at_ms=3, version=2, approvals=[Approval(id="A", key=KEY, once=True, used_by="agent-1")]))
    assert register.decide(KEY, 4).decision == "approved"
    assert register.unplugged(KEY) and not register.unplugged(KEY)
    register.plugged(KEY, 5)
    assert register.decide(KEY, 5) == ("expired", "pass_used", "A", 0)
    register.replace(Register(at_ms=6, version=3, approvals=[Approval(id="B", key=KEY, once=True)]))
    assert register.plugged(KEY, 7), "a new pass"


def test_a_pass_that_another_machine_used_is_over_here():
    register = MediaRegister("agent-2")
    register.replace(Register(at_ms=0, version=1, approvals=[Approval(id="A", key=KEY, once=True, used_by="agent-1")]))
    assert not register.plugged(KEY, 1)
    assert register.decide(KEY, 1).reason == "pass_used"


def test_how_old_the_register_is_goes_with_the_decision():
    register = MediaRegister("agent-1")
    register.replace(Register(at_ms=0, version=1, approvals=[Approval(id="A", key=KEY)], confirmed_ms=DAY_MS))
    assert register.decide(KEY, DAY_MS + 3_599_000).stale_s == 0
    assert register.decide(KEY, 3 * DAY_MS + 100_000).stale_s == 2 * 86_400
    register.confirmed(3 * DAY_MS)
    assert register.decide(KEY, 3 * DAY_MS + 100_000).stale_s == 0
    kept, register = register.to_bytes(), MediaRegister("agent-1")
    register.from_bytes(kept)
    assert register.decide(KEY, 4 * DAY_MS).stale_s == 86_400, "known over a restart"


def test_a_code_ends_at_its_time_and_a_clock_set_back_makes_it_no_longer():
    register = MediaRegister("agent-1")
    register.unlock(Unlocked(at_ms=0, id="C", key=KEY, until_ms=100))
    assert register.decide(KEY, 99) == ("approved", "unlocked", "C", 0)
    assert register.decide(KEY, 100).decision == "unknown"
    register.passed(90)
    kept, register = register.to_bytes(), MediaRegister("agent-1")
    register.from_bytes(kept)
    register.passed(10)  # set back by 80 while the agent was down: 10 are left
    assert register.decide(KEY, 19).decision == "approved"
    assert register.decide(KEY, 20).decision == "unknown"
    assert "C" in register.unlocks_used


def test_a_code_for_reading_does_not_cover_writing():
    register = MediaRegister("agent-1")
    register.unlock(Unlocked(at_ms=0, id="C", key=KEY, until_ms=100, read_only=True))
    assert register.decide(KEY, 1).decision == "approved"
    assert register.decide(KEY, 1, writing=True) == ("unapproved", "read_only_approval", "C", 0)


def test_the_same_register_again_is_taken_by_the_names_of_now():
    """The machine was given another name meanwhile."""
    approvals = [Approval(id="A", key=KEY, machines=["ws-2"])]
    register = MediaRegister("agent-1", "ws-1")
    register.replace(Register(at_ms=0, version=5, approvals=approvals))
    kept, register = register.to_bytes(), MediaRegister("agent-1", "ws-2")
    register.from_bytes(kept)
    assert register.replace(Register(at_ms=0, version=5, approvals=approvals))
    assert register.decide(KEY, 1).decision == "approved"


def test_times_that_nobody_can_mean_do_not_stop_the_agent():
    register = MediaRegister("agent-1")
    wild = [Approval(id="A", key=KEY, since_ms=-(10**30), until_ms=10**30), Approval(id="B", key="k", until_ms=-(10**30))]
    assert register.replace(Register(at_ms=0, version=1, approvals=wild))
    assert register.decide(KEY, 100 * DAY_MS).decision == "approved"
    assert register.decide("k", 100 * DAY_MS).decision == "expired"
