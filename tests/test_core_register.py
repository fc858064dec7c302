"""The register's decisions as an auditor reads them: tests/cases/register.toml, one row a decision."""

import tomllib
from pathlib import Path

import pytest

from agent.core.facts import Approval, Register
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
        register.replace(Register(at_ms=0, version=1, approvals=[_approval(row) for row in case["approvals"]]))
    if restarted:
        kept, register = register.to_bytes(), MediaRegister("agent-1", "ws-042")
        register.from_bytes(kept)
    verdict = register.decide(KEY, 100 * DAY_MS, tuple(case.get("dirs", ())), case.get("writing", False))
    assert verdict == (case["decision"], case["reason"], case.get("approval", ""))
    assert verdict.reason in REASONS


def test_every_reason_has_a_case():
    assert {case["reason"] for case in CASES} == set(REASONS)


def test_an_older_register_is_not_taken():
    register = MediaRegister("a")
    assert register.replace(Register(at_ms=0, version=2, approvals=[Approval(id="A", key=KEY)]))
    assert not register.replace(Register(at_ms=0, version=1))
    assert register.decide(KEY, 0).decision == "approved"
