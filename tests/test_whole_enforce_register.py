"""Mode "enforce" with a collector's register: approved, ended, revoked while plugged in; for one directory; break-glass."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent import cli
from agent.pytest_plugin import Agent, Media
from agent.sense.mounts import Mounts
from tests.house import Collector, link_config, none_is_bad_ocsf, until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: fanotify (CAP_SYS_ADMIN) and mount(2)")
KEY = "usb:0951:1666:60A44C"
WHO = ("--owner", "sato", "--approver", "suzuki", "--purpose", "print shop")


class House:
    """A collector and an agent in mode "enforce", enrolled."""

    def __init__(self, root: Path, media: Media) -> None:
        self.media, self.collector = media, Collector(root)
        self.collector.start()
        self.other = root / "drawings"
        self.other.mkdir()
        (self.other / "b.csv").write_text("line\n" * 2_000)
        more = f'{link_config(self.collector)}[[agent.protect]]\npath = {json.dumps(str(self.other))}\nlabel = "drawings"\n'
        self.agent = Agent(root, media, more)
        text = self.agent.config_file.read_text()
        self.agent.config_file.write_text(text.replace("[agent]\n", '[agent]\nmode = "enforce"\n', 1))
        (self.agent.protected / "a.csv").write_text("customer\n" * 2_000)

    def register(self, *words: str) -> str:
        return self.collector.run("media", *words)

    def plug(self, **claims: Any) -> Any:
        return self.media.plug("stick", fs="ext4", serial="60A44C", **claims)

    def stopped(self) -> list[str]:
        rows = self.agent.status()["media"]
        return list(rows[0]["stopped"]) if rows else []

    def becomes(self, *codes: str) -> None:
        until(lambda: self.stopped() == list(codes), lambda: f"it is {self.stopped()}, not {codes}")


@pytest.fixture
def house(tmp_path: Path, sekisho_media: Media) -> Iterator[House]:
    made = House(tmp_path, sekisho_media)
    made.agent.start()
    until(lambda: (made.agent.state_dir / "register.json").exists(), "the register never comes")
    yield made
    none_is_bad_ocsf(made.agent.events())
    made.agent.stop()
    made.collector.stop()


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


def test_approval_releases_and_revocation_stops_while_it_is_plugged_in(house: House) -> None:
    stick = house.plug()
    house.becomes("read_only")
    house.register("approve", KEY, *WHO, "--until", "never")
    house.becomes()
    assert not read_only(stick.path) and shell(f"cp {house.agent.protected}/a.csv {stick.path}/")[0] == 0
    house.register("revoke", KEY, "--reason", "left the company")
    house.becomes("read_only")
    assert read_only(stick.path) and shell(f"touch {stick.path}/more")[0] != 0
    acts = [ours(event)["detail"]["act"] for event in house.agent.events("medium.unapproved") if "detail" in ours(event)]
    assert acts == ["stopped", "released", "stopped"]


def test_an_approval_for_reading_is_mounted_so(house: House) -> None:
    house.register("approve", KEY, *WHO, "--until", "never", "--read-only")
    stick = house.plug()
    house.becomes("read_only")
    assert read_only(stick.path) and shell(f"ls {stick.path}")[0] == 0


def test_an_approval_for_one_directory_takes_files_of_no_other(house: House) -> None:
    house.register("approve", KEY, *WHO, "--until", "never", "--dirs", "drawings")
    stick = house.plug()
    house.becomes("directories")
    assert shell(f"cp {house.other}/b.csv {stick.path}/")[0] == 0
    assert shell(f"cp /etc/passwd {stick.path}/")[0] == 0
    code, said = shell(f"cp {house.agent.protected}/a.csv {stick.path}/")
    assert code and "Operation not permitted" in said
    code, said = shell(f"cat {house.agent.protected}/a.csv > {stick.path}/a.csv")
    assert code and "Operation not permitted" in said
    denied = house.agent.wait_for("file.written", 2, where=lambda event: event.get("action_id") == 2)
    assert {ours(event)["protected"]["rel"] for event in denied} == {"a.csv"}
    assert {ours(event)["medium"]["decision_reason"] for event in denied} == {"other_directory"}
    house.agent.wait_for("file.copied_out")
    assert {ours(event)["protected"]["rel"] for event in house.agent.events("file.copied_out")} == {"b.csv"}


def test_break_glass_opens_a_medium_without_the_collector_and_over_a_restart(
    house: House, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LC_ALL", "C")
    stick = house.plug()
    house.becomes("read_only")
    code = house.register("unlock", KEY, "--machine", "test-machine", "--for", "4h", "--reason", "the printer waits").split()[0]
    house.collector.stop()
    assert cli.main(["unlock", code, "-c", str(house.agent.config_file)]) == 0
    assert KEY in capsys.readouterr().out
    house.becomes()
    assert shell(f"touch {stick.path}/urgent")[0] == 0
    event = house.agent.wait_for("medium.unapproved", where=lambda each: ours(each).get("detail", {}).get("act") == "unlocked")
    assert event["severity_id"] == 4 and ours(event)["medium"]["decision_reason"] == "unlocked"
    assert len(ours(event)["detail"]["unlock"]) == 16
    house.agent.stop()
    house.agent.start()
    house.becomes()
    assert shell(f"touch {stick.path}/after")[0] == 0
    with pytest.raises(SystemExit) as left:
        cli.main(["unlock", code, "-c", str(house.agent.config_file)])
    assert left.value.code == 1 and "used" in capsys.readouterr().err
