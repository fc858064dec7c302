"""`sekisho-agent check`: what it says of a machine and a configuration, in both languages, before anything runs."""

import os
from pathlib import Path

import pytest

from agent import checkup, config


def checked(tmp_path: Path, text: str = "") -> dict[str, checkup.Result]:
    """The results of a configuration with one protected directory, by subject."""
    protected = tmp_path / "customers"
    protected.mkdir(exist_ok=True)
    file = tmp_path / "config.toml"
    head = f'[agent]\nstate_dir = "{tmp_path}/state"\n[[agent.protect]]\npath = "{protected}"\nlabel = "customers"\n'
    file.write_text(head + text)
    return {result.subject: result for result in checkup.check(config.load(str(file)))}


def test_every_sense_has_its_line(tmp_path: Path) -> None:
    told = checked(tmp_path)
    for subject in ("files", "writers", "processes", "copies elsewhere", "uploads", "phones", "devices", "sessions"):
        assert told[subject].verdict in ("ok", "blind")
        assert told[subject].says("en")
        assert told[subject].says("ja")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: fanotify")
def test_with_privilege_copies_elsewhere_are_followed(tmp_path: Path) -> None:
    held = checked(tmp_path)["copies elsewhere"]
    standing = checked(tmp_path, "[agent.staging]\nhold = false\n")["copies elsewhere"]
    if held.key == "sensor_part":
        assert held.values["blind"] == ["staging_elsewhere"]
        pytest.skip(f"this machine has file systems that can't be watched: {held.says('en')}")
    assert (held.key, standing.key) == ("staging_hold", "staging_standing")


def test_every_line_says_what_it_is_about_in_both_languages(tmp_path: Path) -> None:
    text = '[agent.staging]\nwatch = false\n[agent.ways]\nprint = "off"\n'
    for subject, result in checked(tmp_path, text).items():
        assert result.about("en") == subject
        assert not result.about("ja").isascii(), subject


def test_what_the_site_turned_off_is_said_with_its_key(tmp_path: Path) -> None:
    text = '[agent.staging]\nwatch = false\n[agent.ways]\nnetwork = "off"\nprint = "off"\nbluetooth = "off"\n'
    told = checked(tmp_path, text)
    assert "uploads" not in told
    for subject, key in (
        ("copies elsewhere", "agent.staging.watch"),
        ("way network", "agent.ways.network"),
        ("way print", "agent.ways.print"),
        ("way bluetooth", "agent.ways.bluetooth"),
    ):
        assert told[subject].verdict == "blind"
        assert key in told[subject].advice("en")
        assert key in told[subject].advice("ja")


def test_what_a_sensor_lacks_is_said_in_the_readers_language() -> None:
    lack = checkup.Result("blind", "uploads", "sensor_part", {"blind": ["network_ways"], "why": "sock_diag: refused"})
    assert lack.says("en") == "uploads and other connections (sock_diag: refused)"
    assert lack.says("ja") == "アップロードなどの通信 (sock_diag: refused)"
    assert lack.as_dict()["says"] == lack.says("en")
