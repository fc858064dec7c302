"""Mode "enforce" with the real agent on real file systems: what is stopped, what goes on, what is left."""

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.pytest_plugin import Agent, Media
from agent.sense.mounts import Mounts
from tests.house import none_is_bad_ocsf, until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: fanotify (CAP_SYS_ADMIN) and mount(2)")
Start = Callable[..., Agent]


@pytest.fixture
def start(tmp_path: Path, sekisho_media: Media) -> Iterator[Start]:
    """An agent in mode "enforce" that treats media as unapproved, as it does without an entry in the register."""
    made: list[Agent] = []

    def enforcing(**enforce: str) -> Agent:
        keys = "".join(f"{key} = {json.dumps(value)}\n" for key, value in ({"unknown": "read_only"} | enforce).items())
        agent = Agent(tmp_path, sekisho_media, f"[agent.enforce]\n{keys}")
        text = agent.config_file.read_text()
        agent.config_file.write_text(text.replace("[agent]\n", '[agent]\nmode = "enforce"\n', 1))
        (agent.protected / "a.csv").write_text("customer\n" * 500)
        agent.start()
        made.append(agent)
        return agent

    yield enforcing
    for agent in made:
        none_is_bad_ocsf(agent.events())
        agent.stop()


def shell(command: str) -> tuple[int, str]:
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=30, check=False)
    return done.returncode, done.stderr


def read_only(path: Path) -> bool:
    found = Mounts().mount_at(str(path))
    assert found is not None
    return found[1]


def ours(event: dict[str, Any]) -> dict[str, Any]:
    said: dict[str, Any] = event["unmapped"]["sekisho"]
    return said


def stopped(agent: Agent, code: str) -> dict[str, Any]:
    found: dict[str, Any] = agent.wait_for(
        "medium.unapproved", where=lambda each: code in ours(each).get("detail", {}).get("did", ())
    )
    return found


def test_a_medium_without_approval_is_made_read_only_and_given_back_when_the_agent_stops(
    start: Start, sekisho_media: Media
) -> None:
    agent = start()
    stick = sekisho_media.plug("stick", fs="ext4", serial="60A44C")
    event = stopped(agent, "read_only")
    assert read_only(stick.path)
    assert event["action_id"] == 2 and event["disposition_id"] == 2
    assert ours(event)["detail"]["targets"][0] == str(stick.path)
    code, said = shell(f"cp {agent.protected}/a.csv {stick.path}/a.csv")
    assert code != 0 and "Read-only file system" in said
    assert shell(f"ls {stick.path}")[0] == 0
    assert [row["stopped"] for row in agent.status()["media"]] == [["read_only"]]
    assert agent.stop() == 0
    assert not read_only(stick.path)


def test_a_folder_that_plays_a_medium_is_refused_open_by_open_and_each_says_who_and_what(
    start: Start, sekisho_media: Media
) -> None:
    agent = start()
    stick = sekisho_media.plug("stick", serial="60A44C")
    stopped(agent, "no_writes")
    code, said = shell(f"cp {agent.protected}/a.csv {stick.path}/a.csv")
    assert code != 0 and "Operation not permitted" in said
    event = agent.wait_for("file.written")
    assert (event["action_id"], event["disposition_id"], event["status_id"]) == (2, 2, 2)
    assert ours(event)["dest"]["path"] == f"{stick.path}/a.csv"
    assert ours(event)["protected"]["rel"] == "a.csv"
    assert ours(event)["process"]["exe"].endswith("/cp")
    assert ours(event)["medium"]["serial"] == "60A44C"
    assert (stick.path / "a.csv").stat().st_size == 0
    assert not agent.events("file.copied_out")
    assert shell(f"cat {stick.path}/a.csv")[0] == 0


def test_a_refused_medium_opens_nothing(start: Start, sekisho_media: Media) -> None:
    agent = start(unknown="refuse")
    stick = sekisho_media.plug("stick", fs="ext4")
    stopped(agent, "no_opens")
    assert "Operation not permitted" in shell(f"ls {stick.path}")[1]
    assert read_only(stick.path)
    assert agent.stop() == 0
    assert shell(f"touch {stick.path}/x")[0] == 0


def test_what_somebody_has_open_for_writing_is_stopped_as_soon_as_it_is_closed(start: Start, sekisho_media: Media) -> None:
    agent = start(unknown="allow")
    stick = sekisho_media.plug("stick", fs="ext4")
    with (stick.path / "open.txt").open("w") as file:
        file.write("begun")
        file.flush()
        text = agent.config_file.read_text()
        agent.config_file.write_text(text.replace('unknown = "allow"', 'unknown = "read_only"'))
        os.kill(agent.pid, signal.SIGHUP)
        stopped(agent, "no_writes")
        until(lambda: "not_stopped" in agent.status()["blind"], "it is not said that it can't be stopped yet")
        assert "Operation not permitted" in shell(f"echo x > {stick.path}/another")[1]
    stopped(agent, "read_only")
    assert (stick.path / "open.txt").read_text() == "begun"
    until(lambda: "not_stopped" not in agent.status()["blind"], "it is still said that it can't be stopped")


def test_failing_closed_leaves_media_as_they_are(start: Start, sekisho_media: Media) -> None:
    agent = start(on_failure="closed")
    stick = sekisho_media.plug("stick", fs="ext4")
    stopped(agent, "read_only")
    agent.stop()
    assert read_only(stick.path)
    agent.start()
    until(lambda: [row["stopped"] for row in agent.status()["media"]] == [["read_only"]], "it does not know what it did before")


@pytest.mark.parametrize("mode", ["enforce", "observe"])
def test_after_a_crash_what_was_done_is_known_and_undone_when_it_is_not_wished_any_more(
    start: Start, sekisho_media: Media, mode: str
) -> None:
    agent = start()
    stick = sekisho_media.plug("stick", fs="ext4")
    stopped(agent, "read_only")
    agent.stop(signal.SIGKILL)
    assert read_only(stick.path)
    agent.config_file.write_text(agent.config_file.read_text().replace('mode = "enforce"', f'mode = "{mode}"'))
    agent.start()
    if mode == "observe":
        until(lambda: not read_only(stick.path), "it is never given back")
        return
    until(lambda: [row["stopped"] for row in agent.status()["media"]] == [["read_only"]], "it forgot what it had stopped")
    assert agent.stop() == 0
    assert not read_only(stick.path)


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
@pytest.mark.parametrize("on_failure", ["open", "closed"])
def test_the_machine_goes_on_whatever_happens_to_the_agent(
    start: Start, sekisho_media: Media, number: signal.Signals, on_failure: str
) -> None:
    agent = start(on_failure=on_failure)
    folder = sekisho_media.plug("folder", serial="A1")
    stopped(agent, "no_writes")
    assert shell(f"echo x > {folder.path}/before")[0] != 0
    os.kill(agent.pid, number)
    try:
        shell(f"echo x > {folder.path}/after; cat {agent.protected}/a.csv")  # raises if it takes more than 30 s
        assert shell(f"cat {agent.protected}/a.csv")[0] == 0
    finally:
        agent.stop(signal.SIGKILL)
    until(lambda: shell(f"echo x > {folder.path}/released")[0] == 0, "the kernel does not let go")


def test_what_the_machine_lives_on_is_left_alone(start: Start, sekisho_media: Media, tmp_path: Path) -> None:
    agent = start()
    agent.stop()
    stick = sekisho_media.plug("stick", fs="ext4")
    system = stick.path / "state"
    system.mkdir(0o700)
    text = agent.config_file.read_text()
    agent.config_file.write_text(text.replace(json.dumps(str(agent.state_dir)), json.dumps(str(system))))
    agent.state_dir = system
    agent.start()
    until(lambda: any("exempt_media" in each["blind"] for each in agent.status()["sensors"]), "it is not said to be exempt")
    assert not read_only(stick.path)
    assert shell(f"echo x > {stick.path}/free")[0] == 0
    agent.stop()
