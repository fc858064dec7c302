"""What comes from media onto the machine, by real programs, with the real agent; and what was only looked at is not told."""

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.pytest_plugin import Agent, Media
from agent.simulate import Medium

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: fanotify (CAP_SYS_ADMIN)")
KINDS = ["folder", "tmpfs"]


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    folder = tmp_path / "home"
    folder.mkdir()
    return folder


@pytest.fixture
def agent(tmp_path: Path, sekisho_media: Media) -> Iterator[Agent]:
    made = Agent(tmp_path, sekisho_media, "record_names = true\n")
    made.start()
    yield made
    made.stop()


@pytest.fixture(params=KINDS)
def stick(request: pytest.FixtureRequest, agent: Agent, sekisho_media: Media, tmp_path: Path) -> Medium:
    """A medium with a report, a program, a script and archives on it, put there by somebody else."""
    medium = sekisho_media.plug("stick1", fs=request.param)
    filled = tmp_path / "filled"
    fill(filled)
    shell(f"cp -a {filled}/. {medium.path}/")
    agent.wait_for("file.written", 6)
    return medium


def fill(folder: Path) -> None:
    folder.mkdir()
    text = "\n".join(f"{row},report {row * 7919 % 10007},tokyo-{row * 31 % 977}" for row in range(6_000))
    (folder / "report.csv").write_text(text)
    (folder / "second.csv").write_text(text[::-1])
    (folder / "x.sh").write_text("#!/bin/sh\nexit 0\n")
    shutil.copy(shutil.which("true") or "/bin/true", folder / "tool")
    with zipfile.ZipFile(folder / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(folder / "report.csv", "inner/report.csv")
        archive.writestr("inner/note.txt", "a short note\n")
    shell(
        f"tar czf {folder}/a.tgz -C {folder} report.csv second.csv && tar cf {folder}/a.tar -C {folder} report.csv second.csv"
    )


def shell(text: str, cwd: Path | None = None) -> None:
    """Run as a job of its own, as at a prompt."""
    done = subprocess.run(["bash", "-c", text], cwd=cwd, capture_output=True, text=True, timeout=60, start_new_session=True)
    assert done.returncode == 0, f"{text}: {done.stderr or done.stdout}"


def ours(event: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = event["unmapped"]["sekisho"]
    return found


def brought(agent: Agent, *paths: Path) -> list[dict[str, Any]]:
    """What was told of these files, in their order."""
    wanted = [str(path) for path in paths]
    found = agent.wait_for("file.brought_in", len(paths), where=lambda event: ours(event).get("dest", {}).get("path") in wanted)
    by_path = {ours(event)["dest"]["path"]: event for event in (found if len(paths) > 1 else [found])}
    return [by_path[path] for path in wanted]


COPIES = {
    "cp": ("cp {stick}/report.csv {out}/", "report.csv"),
    "cp-name": ("cp {stick}/report.csv {out}/holiday.jpg", "holiday.jpg"),
    "cat": ("cat {stick}/report.csv > {out}/x", "x"),
    "dd": ("dd if={stick}/report.csv of={out}/x bs=64k status=none", "x"),
    "pipe": ("cat {stick}/report.csv | cat > {out}/x", "x"),
    "install": ("install {stick}/report.csv {out}/x.csv", "x.csv"),
    "rsync": ("rsync {stick}/report.csv {out}/", "report.csv"),
    "python": ('python3 -c \'import shutil; shutil.copy("{stick}/report.csv", "{out}/x")\'', "x"),
    "tar-up": ("tar cf {out}/all.tar {stick}/report.csv", "all.tar"),
    "gzip-up": ("gzip -c {stick}/report.csv > {out}/x.gz", "x.gz"),
    "part": ("head -c 40000 {stick}/report.csv > {out}/x", "x"),
}


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_from_a_medium_is_told_with_where_it_came_from(agent: Agent, stick: Medium, outside: Path, way: str) -> None:
    command, name = COPIES[way]
    if shutil.which(command.split()[0]) is None:
        pytest.skip(f"needs {command.split()[0]}")
    shell(command.format(stick=stick.path, out=outside))
    (event,) = brought(agent, outside / name)
    said = ours(event)
    assert said["source"]["path"] == f"{stick.path}/report.csv" and said["detail"]["how"] == "copied"
    assert said["source"]["size"] == Path(stick.path, "report.csv").stat().st_size
    assert said["dest"]["size"] == (outside / name).stat().st_size and said["confidence"] >= 0.7
    assert said["medium"]["key"] and event["severity_id"] == 1


def test_what_is_moved_from_a_medium_was_brought_in(agent: Agent, stick: Medium, outside: Path) -> None:
    shell(f"mv {stick.path}/report.csv {outside}/")
    (event,) = brought(agent, outside / "report.csv")
    assert ours(event)["source"]["path"] == f"{stick.path}/report.csv"


def test_a_copy_into_a_protected_directory_is_told_and_named_there(agent: Agent, stick: Medium) -> None:
    shell(f"cp {stick.path}/report.csv {agent.protected}/")
    (event,) = brought(agent, agent.protected / "report.csv")
    assert ours(event)["protected"]["rel"] == "report.csv"


ARCHIVES = {
    "unzip": ("unzip -q {stick}/a.zip -d {out}", "a.zip", ("inner/report.csv", "inner/note.txt"), 0.9),
    "bsdtar": ("bsdtar xf {stick}/a.zip -C {out}", "a.zip", ("inner/report.csv", "inner/note.txt"), 0.9),
    "tar": ("tar xf {stick}/a.tar -C {out}", "a.tar", ("report.csv", "second.csv"), 0.9),
    "tgz": ("tar xf {stick}/a.tgz -C {out}", "a.tgz", ("report.csv", "second.csv"), 0.6),
    "gunzip-tar": ("gunzip -c {stick}/a.tgz | tar x -C {out}", "a.tgz", ("report.csv", "second.csv"), 0.6),
    "7z": ("7z x -bso0 -o{out} {stick}/a.zip", "a.zip", ("inner/report.csv", "inner/note.txt"), 0.9),
    "python": ("python3 -m zipfile -e {stick}/a.zip {out}", "a.zip", ("inner/report.csv", "inner/note.txt"), 0.9),
}


@pytest.mark.parametrize("way", ARCHIVES)
def test_each_file_out_of_an_archive_on_a_medium_is_told(agent: Agent, stick: Medium, outside: Path, way: str) -> None:
    command, archive, names, sure = ARCHIVES[way]
    if shutil.which(command.split()[0]) is None:
        pytest.skip(f"needs {command.split()[0]}")
    shell(command.format(stick=stick.path, out=outside))
    for event in brought(agent, *(outside / name for name in names)):
        said = ours(event)
        assert said["source"]["path"] == f"{stick.path}/{archive}" and said["detail"]["how"] == "extracted"
        assert said["confidence"] == sure


def test_a_program_that_runs_from_a_medium_is_told(agent: Agent, stick: Medium) -> None:
    shell(f"{stick.path}/tool; true")
    event = agent.wait_for("file.brought_in")
    said = ours(event)
    assert (said["detail"]["how"], said["source"]["path"]) == ("executed", f"{stick.path}/tool") and "dest" not in said
    assert event["activity_id"] == 14 and event["severity_id"] == 3, "no register here: nobody knows if it was approved"


@pytest.mark.parametrize(
    "command", ["sh {stick}/x.sh", "cd {stick} && sh ./x.sh", "bash {stick}/x.sh", "chmod +x {stick}/x.sh; {stick}/x.sh"]
)
def test_a_script_that_runs_from_a_medium_is_told(agent: Agent, stick: Medium, command: str) -> None:
    shell(command.format(stick=stick.path))
    said = ours(agent.wait_for("file.brought_in"))
    assert said["source"]["path"] == f"{stick.path}/x.sh"
    if command.startswith("chmod"):  # the kernel ran it, or its interpreter opened it: whichever was told first
        assert said["detail"]["how"] in ("executed", "script") and said["confidence"] >= 0.95
    else:
        assert said["detail"]["how"] == "script" and said["confidence"] == (0.6 if command.startswith("bash") else 0.95)


_VIEWER = """
import pathlib, sys
data = pathlib.Path(sys.argv[2]).read_bytes()
pathlib.Path(sys.argv[1], "recently-used.xbel").write_text("<x>" + sys.argv[2] * 40)
pathlib.Path(sys.argv[1], "settings.ini").write_text("[window]\\nwidth = 1024\\n" * 30)
pathlib.Path(sys.argv[1], "thumbnail.png").write_bytes(bytes((7 * n * n) % 251 for n in range(20_000)))
"""


@pytest.mark.parametrize("name", ["report.csv", "a.zip"])
def test_what_was_only_looked_at_was_not_brought_in(agent: Agent, stick: Medium, outside: Path, name: str) -> None:
    subprocess.run([sys.executable, "-c", _VIEWER, outside, f"{stick.path}/{name}"], check=True, start_new_session=True)
    shell(f"less {stick.path}/{name} > /dev/null || cat {stick.path}/{name} > /dev/null")
    shell(f"wc -l {stick.path}/report.csv > {outside}/count")
    shell(f"cat {stick.path}/x.sh > /dev/null; grep exit {stick.path}/x.sh > /dev/null")
    shell(f"cp {stick.path}/second.csv {outside}/last.csv")
    brought(agent, outside / "last.csv")
    told = [(ours(event)["source"], ours(event).get("dest"), ours(event)["link"]) for event in agent.events("file.brought_in")]
    assert len(told) == 1, told


def test_what_asks_to_be_run_when_mounted_is_told_with_the_mount(agent: Agent, sekisho_media: Media) -> None:
    (sekisho_media.root / "stick2").mkdir()
    (sekisho_media.root / "stick2" / "autorun.inf").write_text("[autorun]\nopen=x.exe\n")
    sekisho_media.plug("stick2")
    event = agent.wait_for("medium.mounted")
    assert ours(event)["detail"]["autorun"] == ["autorun.inf"] and event["severity_id"] == 2


def test_names_are_not_kept_unless_the_site_wants_them(tmp_path: Path, sekisho_media: Media, outside: Path) -> None:
    agent = Agent(tmp_path, sekisho_media)
    agent.start()
    try:
        medium = sekisho_media.plug("stick1")
        fill(tmp_path / "filled")
        shell(f"cp {tmp_path}/filled/report.csv {medium.path}/salaries-of-sato.csv")
        agent.wait_for("file.written")
        shell(f"cp {medium.path}/salaries-of-sato.csv {outside}/")
        event = agent.wait_for("file.brought_in")
        assert "salaries" not in str(event) and event["file"]["name"] == "*.csv" and event["file"]["ext"] == "csv"
        assert ours(event)["source"]["path"] == f"{medium.path}/*.csv" and "path" not in ours(event)["dest"]
    finally:
        agent.stop()
