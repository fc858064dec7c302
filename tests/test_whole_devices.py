"""Devices and a real agent: what came and went while it did not run, and what `media` shows."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def media(agent: Any, *arguments: str) -> str:
    """What `sekisho-agent media` prints."""
    command = [sys.executable, "-m", "agent.cli", "media", "-c", str(agent.config_file), *arguments]
    env = {**os.environ, "LC_ALL": "C"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent, env=env)
    return done.stdout


def test_what_came_and_went_while_no_agent_ran_is_told_so(sekisho_agent: Any, sekisho_media: Any) -> None:
    stays, goes = sekisho_media.plug("stays", serial="ST-0001"), sekisho_media.plug("goes", serial="GO-0001")
    first = {event["unmapped"]["sekisho"]["medium"]["serial"]: event for event in sekisho_agent.wait_for("medium.attached", 2)}
    sekisho_agent.wait_for("medium.mounted", 2)
    sekisho_agent.stop()
    sekisho_media.unplug(goes)
    sekisho_agent.start()
    gone = sekisho_agent.wait_for("medium.detached")
    assert gone["unmapped"]["sekisho"]["medium"]["serial"] == "GO-0001"
    assert gone["unmapped"]["sekisho"]["detail"] == {"time": "unknown"}
    again = sekisho_agent.wait_for("medium.attached", 3)[-1]["unmapped"]["sekisho"]["medium"]
    assert (again["serial"], again["since"]) == ("ST-0001", "earlier_run")
    assert again["story"] == first["ST-0001"]["metadata"]["uid"]
    sekisho_media.unplug(stays)


def test_media_shows_the_story_of_each_device(sekisho_agent: Any, sekisho_media: Any) -> None:
    sekisho_media.plug("odd", serial="OD-0001", interfaces=["08:06:50", "03:01:01"])
    sekisho_agent.wait_for("device.disguised")
    (row,) = [json.loads(line) for line in media(sekisho_agent, "--json").splitlines()]
    assert row["identity"] == "serial" and row["disguised"] == ["types"] and row["interfaces"] == ["08:06:50", "03:01:01"]
    assert 0 <= time.time() * 1000 - row["since_ms"] < 60_000
    shown = media(sekisho_agent)
    assert "OD-0001" in shown and "03:01:01" in shown and "types on a keyboard" in shown
