"""The main job, for real: a person copies protected files to a medium, and the admin reads a line about each."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.pytest_plugin import Agent, Media, _environment
from tests.house import LOGIN_UID, Collector, as_person, can_set_loginuid, link_config, none_is_bad_ocsf, until

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: fanotify (CAP_SYS_ADMIN)")


@pytest.fixture
def collector(tmp_path: Path) -> Iterator[Collector]:
    made = Collector(tmp_path)
    made.start()
    yield made
    none_is_bad_ocsf(made.events())
    made.stop()


@pytest.fixture
def agent(tmp_path: Path, sekisho_media: Media, collector: Collector) -> Iterator[Agent]:
    made = Agent(tmp_path, sekisho_media, link_config(collector))
    made.start()
    yield made
    made.stop()


def customers(agent: Agent, count: int, size: int = 30_000) -> None:
    """Customer lists that do not compress well, each of its own size."""
    for number in range(count):
        (agent.protected / f"2014-{number:02}.csv").write_bytes(os.urandom(size + number))


def ours(event: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = event["unmapped"]["sekisho"]
    return found


@root_only
@pytest.mark.parametrize("fs", ["folder", "tmpfs", "ext4"])
def test_a_copy_onto_a_stick_is_a_line_in_the_admins_tail(
    agent: Agent, sekisho_media: Media, collector: Collector, fs: Any
) -> None:
    customers(agent, 3)
    command = [sys.executable, "-m", "server_stub.cli", "tail", "-f", "-n", "100", "-c", str(collector.config_file)]
    tail = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=_environment())
    lines: list[str] = []
    assert tail.stdout
    reader = threading.Thread(target=lambda: lines.extend(iter(tail.stdout.readline, "")), daemon=True)
    reader.start()
    try:
        stick = sekisho_media.plug("stick1", serial="60A44C413F8CF320", fs=fs)
        until(lambda: any("60A44C" in line for line in lines), lambda: f"plugging is not told: {lines}")
        as_person(f"cp {agent.protected}/*.csv {stick.path}/")
        until(
            lambda: sum("customers/2014-" in line and " by cp" in line for line in lines) >= 3, lambda: f"not all told: {lines}"
        )
    finally:
        tail.send_signal(signal.SIGINT)
        tail.wait(20)
        reader.join()
        tail.stdout.close()
    assert "customers/2014-00.csv → Kingston DataTraveler 3.0 (60A44C…) 30.0 kB by cp, unapproved" in "".join(lines)
    events = collector.events(event="file.copied_out")
    assert sorted(ours(event)["protected"]["rel"] for event in events) == ["2014-00.csv", "2014-01.csv", "2014-02.csv"]
    for event in events:
        said = ours(event)
        assert said["bytes"] == said["source"]["size"] == said["dest"]["size"] >= 30_000
        assert said["medium"]["serial"] == "60A44C413F8CF320"
        assert said["link"] == "process"
        assert said["process"]["argv"][0] == "cp"
        assert said["attribution"] in ("exact", "cached")
        if can_set_loginuid():
            assert said["login"]["uid"] == LOGIN_UID
            assert event["actor"]["user"]["uid"] == str(LOGIN_UID)


WAYS = {
    "cp": ("cp 'P/2014-00.csv' 'M/x'", "process"),
    "mv": ("mv 'P/2014-00.csv' 'M/x'", "process"),
    "cat": ("cat 'P/2014-00.csv' > 'M/x'", "process"),
    "dd": ("dd if='P/2014-00.csv' of='M/x' bs=4k status=none", "process"),
    "python": ("python3 -c \"import shutil; shutil.copy('P/2014-00.csv', 'M/x')\"", "process"),
    "tar pipe gzip": ("tar c -C P 2014-00.csv | gzip > M/x.tgz", "pipeline"),
    "cat pipe cat": ("cat 'P/2014-00.csv' | cat > 'M/x'", "pipeline"),
    "rsync": ("rsync P/2014-00.csv M/", None),
    "tar czf": ("tar czf M/x.tgz -C P 2014-00.csv", None),
    "hidden name, then renamed": ("cp P/2014-00.csv M/.x.tmp && mv M/.x.tmp M/holiday.jpg", "process"),
}


@root_only
@pytest.mark.parametrize("fs", ["folder", "tmpfs"])
def test_every_plain_way_onto_a_stick_is_joined_to_its_source(sekisho_agent: Agent, sekisho_media: Media, fs: Any) -> None:
    stick = sekisho_media.plug("stick1", fs=fs)
    missed = {}
    for number, (way, (text, link)) in enumerate(WAYS.items()):
        (sekisho_agent.protected / "2014-00.csv").write_bytes(os.urandom(30_000 + number))
        before = len(sekisho_agent.events("file.copied_out"))
        as_person(
            text.replace("P/", f"{sekisho_agent.protected}/")
            .replace("M/", f"{stick.path}/")
            .replace("P ", f"{sekisho_agent.protected} ")
        )
        try:
            event = (
                sekisho_agent.wait_for("file.copied_out", before + 1)[-1]
                if before
                else sekisho_agent.wait_for("file.copied_out")
            )
            said = ours(event)
            if link and said["link"] != link:
                missed[way] = f"link {said['link']}"
            if said["protected"]["rel"] != "2014-00.csv":
                missed[way] = f"source {said['protected']}"
        except pytest.fail.Exception as failure:
            missed[way] = str(failure).splitlines()[0]
    assert not missed


@root_only
def test_own_documents_on_a_stick_are_told_without_a_name(sekisho_agent: Agent, sekisho_media: Media, tmp_path: Path) -> None:
    (tmp_path / "my-diary.txt").write_text("private" * 1000)
    stick = sekisho_media.plug("stick1")
    as_person(f"cp {tmp_path}/my-diary.txt {stick.path}/")
    event = sekisho_agent.wait_for("file.written")
    assert event["file"]["size"] == 7000
    assert "my-diary" not in str(event["file"]) + str(ours(event).get("dest", ""))
    assert not sekisho_agent.events("file.copied_out")


@root_only
def test_sudo_does_not_hide_the_person(sekisho_agent: Agent, sekisho_media: Media) -> None:
    if not can_set_loginuid():
        pytest.skip("needs a kernel that lets root set /proc/self/loginuid once")
    customers(sekisho_agent, 1)
    stick = sekisho_media.plug("stick1")
    as_person(f"su -s /bin/sh root -c 'cp {sekisho_agent.protected}/*.csv {stick.path}/'")
    event = sekisho_agent.wait_for("file.copied_out")
    assert ours(event)["login"]["uid"] == LOGIN_UID


@root_only
def test_a_limit_is_found_across_a_restart(tmp_path: Path, sekisho_media: Media) -> None:
    limit = '[[agent.limit]]\nname = "drip"\nfiles = 6\nwindow = "1h"\n'
    agent = Agent(tmp_path, sekisho_media, limit)
    agent.start()
    try:
        customers(agent, 8)
        stick = sekisho_media.plug("stick1", fs="tmpfs")
        as_person(f"cp {agent.protected}/2014-0[0-3].csv {stick.path}/")
        agent.wait_for("file.copied_out", 4)
        assert not agent.events("copy.drip")
        agent.stop(signal.SIGKILL)
        agent.start()
        until(lambda: str(stick.path) in agent.status().get("watched_media", []), "the stick is not watched again")
        as_person(f"cp {agent.protected}/2014-0[4-7].csv {stick.path}/")
        finding = agent.wait_for("copy.drip")
        assert ours(finding)["limit"]["files"] >= 6
        assert finding["finding_info"]["related_events"]
        gap = agent.wait_for("agent.gap")
        assert ours(gap)["lost"]["reason"] == "not_running"
    finally:
        agent.stop()


def chain_of(events: list[dict[str, Any]]) -> list[tuple[int, int]]:
    return [(ours(event)["epoch"], ours(event)["seq"]) for event in events]


@root_only
def test_kill_9_of_either_side_loses_and_doubles_nothing(
    tmp_path: Path, sekisho_media: Media, collector: Collector, agent: Agent
) -> None:
    customers(agent, 40, 2_000)
    stick = sekisho_media.plug("stick1", fs="tmpfs")
    for round_number in range(6):
        copying = threading.Thread(
            target=as_person,
            args=(f"mkdir -p {stick.path}/{round_number}; cp {agent.protected}/* {stick.path}/{round_number}/",),
        )
        copying.start()
        if round_number % 2:
            agent.stop(signal.SIGKILL)
            copying.join()
            agent.start()
            until(lambda: str(stick.path) in agent.status().get("watched_media", []), "the stick is not watched again")
        else:
            collector.stop(signal.SIGKILL)
            copying.join()
            collector.start()
    until(
        lambda: agent.status()["collector"]["backlog"] == 0 and agent.status()["queue"]["waiting"] == 0, "not all is sent", 60
    )
    spooled = [ours(event)["seq"] for event in agent.events()]
    received = [event for event in collector.events() if event["device"].get("uid") == agent.status()["agent"]]
    got = [ours(event)["seq"] for event in received]
    assert got == sorted(set(got)), "in order, once"
    assert set(spooled) - set(got) == set() or max(spooled) - max(got) < 5
    assert got == list(range(1, len(got) + 1)), "without a hole"


@root_only
def test_a_collector_that_lost_everything_is_filled_again(collector: Collector, agent: Agent, sekisho_media: Media) -> None:
    customers(agent, 5)
    stick = sekisho_media.plug("stick1", fs="tmpfs")
    as_person(f"cp {agent.protected}/* {stick.path}/")
    agent.wait_for("file.copied_out", 5)
    until(lambda: agent.status()["collector"]["backlog"] == 0, "not all is sent")
    collector.stop()
    collector.forget()
    collector.start()
    until(
        lambda: len(collector.events(event="file.copied_out")) == 5,
        lambda: f"not filled again: {agent.status()['collector']}",
        60,
    )
    mine = [ours(event)["seq"] for event in collector.events() if event["device"].get("uid") == agent.status()["agent"]]
    assert mine == list(range(1, len(mine) + 1))


def test_without_privilege_the_rest_is_seen_and_the_lack_is_said(tmp_path: Path, sekisho_media: Media) -> None:
    no_privilege = ("setpriv", "--bounding-set=-all", "--inh-caps=-all") if os.geteuid() == 0 else ()
    agent = Agent(tmp_path, sekisho_media, launcher=no_privilege)
    agent.start()
    try:
        assert "process" in agent.status()["blind"]
        customers(agent, 1)
        stick = sekisho_media.plug("stick1")
        as_person(f"cp {agent.protected}/*.csv {stick.path}/")
        said = ours(agent.wait_for("file.copied_out"))
        assert said["protected"]["rel"] == "2014-00.csv" and said["medium"]["serial"] == "STICK1"
        assert said["attribution"] != "unknown" or said["link"] in ("time", "content"), "nobody is named who was not seen"
        lack = agent.wait_for("agent.sensors", where=lambda told: "process" in ours(told)["detail"]["blind"])
        assert not ours(lack)["detail"]["ok"]
    finally:
        agent.stop()
