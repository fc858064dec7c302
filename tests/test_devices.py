"""Descriptors × decisions: each row of tests/devices/table.toml through the real udev sensor (umockdev) and the real core."""

import ctypes.util
import json
import os
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from workstation import STICK, Seen, Workstation

from agent.core import facts

HERE = Path(__file__).parent
TABLE: list[dict[str, Any]] = tomllib.loads((HERE / "devices" / "table.toml").read_text())["device"]
PRELOAD = "libumockdev-preload.so.0"


@cache
def told() -> list[list[str]]:
    """The facts of every row, by one process that has no devices but the recorded ones."""
    env = {**os.environ, "LD_PRELOAD": PRELOAD, "PYTHONPATH": str(HERE.parent)}
    asked = json.dumps([row["steps"] for row in TABLE])
    done = subprocess.run(
        [sys.executable, "-m", "tests.mock_devices"],
        input=asked,
        capture_output=True,
        text=True,
        env=env,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def lived(row: dict[str, Any]) -> Workstation:
    """A workstation at which this row happened."""
    ws = Workstation(first_use=False).login("sato").approve(STICK)
    ws.tell(facts.Started(at_ms=ws.now, boot_id="b1"))
    for fact in facts.read(line.encode() for line in told()[TABLE.index(row)]):
        ws.now = fact.at_ms
        ws.tell(fact)
    return ws


def said(event: Seen) -> str:
    """ "attached", "card in", "disc out"."""
    word = event.code.removeprefix("medium.")
    part = (event.medium or {}).get("part")
    return word if part is None else f"{part} {'in' if word == 'attached' else 'out'}"


def outcome(row: dict[str, Any]) -> dict[str, Any]:
    """What a row says must come out, as it came out."""
    ws = lived(row)
    media = [event for event in ws.events if event.code in ("medium.attached", "medium.detached")]
    first = media[0].medium if media else {}
    found = ws.all("device.disguised")
    return {
        "kind": [event.medium["kind"] for event in media if said(event) == "attached"],
        "events": [said(event) for event in media],
        "disguised": found[-1].detail["reasons"] if found else [],
        "severity": found[-1].severity if found else 0,
        "decision": first.get("decision", "-"),
        "identity": first.get("identity", "-"),
        "since": first.get("since", "-"),
    }


umockdev = pytest.mark.skipif(
    ctypes.util.find_library("umockdev") is None or not sys.platform.startswith("linux"),
    reason="umockdev is not installed (apt install umockdev libumockdev0)",
)


@umockdev
@pytest.mark.parametrize("row", TABLE, ids=lambda row: row["story"])
def test_a_device_is_told_as_the_table_says(row: dict[str, Any]) -> None:
    expected = {"disguised": [], "severity": 0, "since": "-"} | {
        name: row[name] for name in row if name not in ("story", "steps")
    }
    assert outcome(row) == expected
