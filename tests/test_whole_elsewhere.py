"""Copies that take a detour on the way to the medium: an image or an encrypted view on it, a mount in another namespace, a
disk that shares no marks with others, a file that was open before anybody watched. With the real agent, on real file systems.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from agent.core import facts
from agent.core.lineage import Lineage
from agent.core.media import Media
from agent.core.places import Places, ProtectedDir
from agent.pytest_plugin import Agent
from agent.pytest_plugin import Media as Sticks
from agent.sense.mounts import Mount, image_below, shown
from agent.simulate import SUFFIX
from tests.house import as_person, until
from tests.workstation import STICK

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: fanotify (CAP_SYS_ADMIN) and mount(8)")


def needs(program: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(program) is None, reason=f"needs {program}")


@pytest.fixture
def undo() -> Iterator[ExitStack]:
    """What is mounted in a test goes at its end, last first, whatever happened."""
    with ExitStack() as stack:
        yield stack


def run(*command: str | Path) -> str:
    done = subprocess.run([str(each) for each in command], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{command}: {done.stderr or done.stdout}"
    return done.stdout.strip()


def mount(undo: ExitStack, where: Path, *how: str | Path) -> None:
    where.mkdir(exist_ok=True, parents=True)
    run("mount", *how, where)
    undo.callback(subprocess.run, ["umount", "-l", where], capture_output=True)


def fuse(undo: ExitStack, where: Path, *command: str | Path) -> None:
    """A view made by a FUSE server, gone before anything asks for it."""
    where.mkdir(exist_ok=True, parents=True)
    run(*command, where)
    undo.callback(subprocess.run, ["umount", "-l", where], capture_output=True)
    until(lambda: os.path.ismount(where), f"{where} is not there")


def image(at: Path, size_mib: int = 32) -> Path:
    with at.open("wb") as file:
        file.truncate(size_mib << 20)
    run("mkfs.ext4", "-q", "-F", at)
    return at


def customer(folder: Path, name: str = "2014-06.csv") -> Path:
    made = folder / name
    made.write_bytes(os.urandom(30_000))
    return made


def copied(agent: Agent, name: str) -> dict[str, Any]:
    event = agent.wait_for("file.copied_out", where=lambda each: each["unmapped"]["sekisho"]["protected"]["rel"] == name)
    said: dict[str, Any] = event["unmapped"]["sekisho"]
    return said


def mounted(agent: Agent, at: Path) -> None:
    agent.wait_for("medium.mounted", where=lambda event: event["unmapped"]["sekisho"]["medium"]["mount"] == str(at))


# -- on the medium, in another form -----------------------------------------------------------------------------------------


@root_only
def test_an_image_on_the_stick_is_the_stick(
    sekisho_agent: Agent, sekisho_media: Sticks, undo: ExitStack, tmp_path: Path
) -> None:
    source, stick, inside = customer(sekisho_agent.protected), sekisho_media.plug("stick1", fs="ext4"), tmp_path / "inside"
    mount(undo, inside, "-o", "loop", image(stick.path / "holiday.img"))
    mounted(sekisho_agent, inside)
    as_person(f"cp {source} {inside}/")
    there = f"{inside}/{source.name}"  # the image itself may be told, too: it holds the file, and who made it is kin
    event = sekisho_agent.wait_for("file.copied_out", where=lambda each: each["unmapped"]["sekisho"]["dest"]["path"] == there)
    said = event["unmapped"]["sekisho"]
    assert (said["medium"]["serial"], said["source"]["path"], said["link"]) == ("STICK1", str(source), "process")


@root_only
@needs("bindfs")
def test_a_view_of_the_stick_by_a_server_that_may_itself_be_held(
    sekisho_agent: Agent, sekisho_media: Sticks, undo: ExitStack, tmp_path: Path
) -> None:
    """Its server opens files on the stick, where openers are held: nobody may wait for anybody in a circle."""
    source, stick, view = customer(sekisho_agent.protected), sekisho_media.plug("stick1", fs="ext4"), tmp_path / "view"
    fuse(undo, view, "bindfs", stick.path)
    mounted(sekisho_agent, view)
    began = time.monotonic()
    for number in range(3):  # what is copied at once may come before the view is watched (docs/limits.md)
        as_person(f"cp {source} {view}/{number}.csv")
    assert time.monotonic() - began < 5
    there = f"{view}/2.csv"  # the first may be seen beneath the view, by its bytes; this one is told of who wrote it, there
    event = sekisho_agent.wait_for("file.copied_out", where=lambda each: each["unmapped"]["sekisho"]["dest"]["path"] == there)
    assert event["unmapped"]["sekisho"]["medium"]["serial"] == "STICK1"
    names = [Path(each["unmapped"]["sekisho"]["dest"]["path"]).name for each in sekisho_agent.events("file.copied_out")]
    assert len(names) == len(set(names)), "told once in the view and once beneath, where its server wrote it"
    assert not sekisho_agent.events("agent.gap"), "the process that holds had to be killed"


@root_only
@needs("bindfs")
def test_a_view_of_the_protected_directory_is_protected(
    sekisho_agent: Agent, sekisho_media: Sticks, undo: ExitStack, tmp_path: Path
) -> None:
    source, stick, view = customer(sekisho_agent.protected), sekisho_media.plug("stick1", fs="ext4"), tmp_path / "view"
    fuse(undo, view, "bindfs", sekisho_agent.protected)
    until(lambda: str(view) in [each["path"] for each in sekisho_agent.status()["protected"]], "the view is not watched")
    as_person(f"cp {view}/{source.name} {stick.path}/x.jpg")
    said = copied(sekisho_agent, source.name)
    assert said["source"]["path"] == str(source)
    assert said["source"]["via"] == [f"{view}/{source.name}"]
    run("umount", view)
    until(lambda: str(view) not in [each["path"] for each in sekisho_agent.status()["protected"]], "it is watched for ever")


# -- mounted where the agent is not -----------------------------------------------------------------------------------------


@root_only
def test_a_stick_that_only_a_container_mounts(
    sekisho_agent: Agent, sekisho_media: Sticks, undo: ExitStack, tmp_path: Path
) -> None:
    source, inside = customer(sekisho_agent.protected), tmp_path / "inside"
    inside.mkdir()
    device = run("losetup", "--find", "--show", image(tmp_path / "stick.img"))
    undo.callback(subprocess.run, ["losetup", "-d", device])
    (sekisho_media.root / f"bare{SUFFIX}").write_text(f'serial = "BARE"\ndevice = "{device}"\n')
    sekisho_agent.wait_for("medium.attached", where=lambda each: each["unmapped"]["sekisho"]["medium"]["serial"] == "BARE")
    script = f"mount {device} {inside}; echo; read go; cp {source} {inside}/x; sync; read go"
    box = subprocess.Popen(
        ["unshare", "-m", "--propagation", "private", "sh", "-ec", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    undo.callback(box.wait)
    undo.callback(box.kill)
    assert box.stdin and box.stdout
    with box.stdin as say, box.stdout as hear:
        hear.readline()
        mounted(sekisho_agent, inside)
        say.write(b"\n")
        say.flush()
        said = copied(sekisho_agent, source.name)
    assert (said["medium"]["serial"], said["dest"]["path"]) == ("BARE", f"{inside}/x")
    box.wait(10)
    sekisho_agent.wait_for("medium.unmounted")
    (sekisho_media.root / f"bare{SUFFIX}").unlink()
    sekisho_agent.wait_for("medium.detached")


# -- disks that share no marks, and what was open before --------------------------------------------------------------------


@root_only
@needs("bindfs")
def test_a_protected_directory_on_fuse_beside_one_on_disk(sekisho_media: Sticks, undo: ExitStack, tmp_path: Path) -> None:
    """Linux refuses marks of both in one group of fanotify (EXDEV)."""
    view, below = tmp_path / "view", tmp_path / "below"
    below.mkdir()
    fuse(undo, view, "bindfs", below)
    agent = Agent(tmp_path, sekisho_media)
    agent.config_file.write_text(
        agent.config_file.read_text().replace(
            "[agent.media]", f'[[agent.protect]]\npath = "{view}"\nlabel = "view"\n[agent.media]'
        )
    )
    undo.callback(agent.stop)
    agent.start()
    until(lambda: [each["watched"] for each in agent.status()["protected"]] == [True, True], "one of them is not watched")
    one, two, stick = customer(agent.protected, "one.csv"), customer(view, "two.csv"), sekisho_media.plug("stick1", fs="ext4")
    as_person(f"cp {one} {two} {stick.path}/")
    assert copied(agent, "one.csv")["protected"]["label"] == "customers"
    assert copied(agent, "two.csv")["protected"]["label"] == "view"


@root_only
def test_a_file_that_was_open_before_the_agent_started(sekisho_media: Sticks, undo: ExitStack, tmp_path: Path) -> None:
    agent = Agent(tmp_path, sekisho_media)
    source = customer(agent.protected)
    script = "import sys; f = open(sys.argv[1], 'rb'); print(flush=True); to = input(); open(to, 'wb').write(f.read())"
    reader = subprocess.Popen([sys.executable, "-c", script, source], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    undo.callback(reader.wait)
    undo.callback(reader.kill)
    assert reader.stdin and reader.stdout
    with reader.stdin as say, reader.stdout as hear:
        hear.readline()
        undo.callback(agent.stop)
        agent.start()
        stick = sekisho_media.plug("stick1", fs="ext4")
        say.write(f"{stick.path}/x.csv\n".encode())
        say.flush()
        said = copied(agent, source.name)
    assert (said["link"], said["bytes"]) == ("process", 30_000)


# -- the pure parts ---------------------------------------------------------------------------------------------------------


def test_what_lies_on_a_medium_is_its_own_whichever_is_told_first() -> None:
    media = Media()
    inner = facts.Mounted(at_ms=1, mount_id=2, dev="7:3", mount="/mnt", fs="ext4", lies_on="/media/stick/a.img")
    outer = facts.Mounted(at_ms=1, mount_id=1, dev=STICK.nodes[1], mount="/media/stick", fs="vfat")
    assert media.mounted(inner) is None
    media.plugged(facts.Plugged(at_ms=1, device=STICK))
    assert media.mounted(outer) is not None
    assert [each.mount for each in media.stacked()] == ["/mnt"]
    assert media.stacked() == []
    found = media.at("/mnt/x/")
    assert found is not None and found.medium.serial == STICK.serial


def test_a_view_is_forgotten_with_its_mount() -> None:
    lineage = Lineage()
    lineage.show((0, 7), "/home/sato/view", "/srv/customers/", "/srv/customers", 1)
    origin = lineage.of(b"", "/home/sato/view/2026/a.csv")
    assert origin is not None and origin.path == "/srv/customers/2026/a.csv"
    again = Lineage()
    again.from_bytes(lineage.to_bytes())
    assert again.empty, "another file system may be there after a restart"
    lineage.hide((0, 7))
    assert lineage.of(b"", "/home/sato/view/2026/a.csv") is None


@pytest.mark.parametrize(
    ("lies_on", "there", "here"),
    [
        ("/srv/customers/", "/view", "/srv/customers/"),
        ("/srv/customers/2026/", "/view", "/srv/customers/2026/"),
        ("/srv/", "/view/customers/", "/srv/customers/"),
    ],
)
def test_where_a_part_of_a_protected_directory_shows(lies_on: str, there: str, here: str) -> None:
    places = Places(Media())
    places.protect([ProtectedDir(path="/srv/customers", label="c")])
    assert [(outside, inside) for outside, inside, _ in places.shown("/view", lies_on)] == [(there, here)]
    assert not list(places.shown("/view", "/home/sato/"))


def test_only_a_server_s_view_says_what_it_shows() -> None:
    line = Mount(1, 0, "0:50", b"/", b"/view", False, "fuse.gocryptfs", b"/media/stick/c")
    assert shown(line) == b"/media/stick/c/"
    assert shown(line._replace(fs="ext4")) == b""
    assert shown(line._replace(source=b"far:/home")) == b""


def test_the_image_below_partitions_and_encryption(tmp_path: Path) -> None:
    """sysfs: loop0 with a partition, and an opened LUKS volume on that."""
    disk, part, dm = tmp_path / "loop0", tmp_path / "loop0" / "loop0p1", tmp_path / "dm-0"
    for folder in (disk / "loop", part, dm / "slaves"):
        folder.mkdir(parents=True)
    (disk / "loop" / "backing_file").write_text("/media/stick/a.img\n")
    (dm / "slaves" / "loop0p1").symlink_to(part)
    assert image_below(str(disk)) == image_below(str(part)) == image_below(str(dm)) == b"/media/stick/a.img"
    assert image_below(str(tmp_path / "sda")) == b""
