"""By whose hand, when the hand lives for less than a millisecond: thousands of tiny copies, each by a process of its own.

The real agent on a real medium; beside the copies the machine builds something. Nearly every event must name the program and
the login user, and say how it knows; the others must say that they don't know.
"""

import os
import subprocess
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from agent.pytest_plugin import Agent, Media
from tests.house import LOGIN_UID, as_person, can_set_loginuid, until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: fanotify (CAP_SYS_ADMIN) and mount(8)")
COPIES = 2_000
BUILD = "while :; do for n in 1 2 3 4; do sh -c 'sed s/a/b/ /etc/passwd | sort | uniq -c' & done; wait; done"


def known(event: dict[str, Any]) -> bool:
    """Program, login user and where that is known from."""
    said = event["unmapped"]["sekisho"]
    named = said["attribution"] in ("exact", "cached") and said["process"].get("exe", "").endswith("/cp")
    return named and (said.get("login", {}).get("uid") == LOGIN_UID or not can_set_loginuid())


@pytest.mark.parametrize("fs", ["folder", "tmpfs"])
def test_two_thousand_tiny_copies_beside_a_build_are_told_by_whose_hand(
    sekisho_agent: Agent, sekisho_media: Media, fs: Any
) -> None:
    for number in range(COPIES):
        (sekisho_agent.protected / f"{number:04}.csv").write_bytes(b"%04d," % number * 64)
    stick = sekisho_media.plug("stick1", fs=fs)
    with ExitStack() as beside:
        build = subprocess.Popen(["sh", "-c", BUILD], stdout=subprocess.DEVNULL, start_new_session=True)
        beside.callback(build.wait)
        beside.callback(os.killpg, build.pid, 9)
        as_person(f"ls {sekisho_agent.protected} | xargs -P2 -I F cp {sekisho_agent.protected}/F {Path(stick.path)}/")
    until(
        lambda: sekisho_agent.status()["counts"].get("file.copied_out", 0) >= COPIES,
        lambda: f"told: {sekisho_agent.status()['counts']}",
        60,
    )
    until(lambda: sekisho_agent.status()["queue"]["waiting"] == 0, "not recorded")
    events = sekisho_agent.events("file.copied_out")
    assert len(events) == COPIES
    share = sum(map(known, events)) / COPIES
    print(f"{fs}: {share:.2%} name program and login user")
    assert share >= 0.99
    for event in events:
        if not known(event):
            assert event["unmapped"]["sekisho"]["attribution"] in ("exact", "cached", "unknown")
