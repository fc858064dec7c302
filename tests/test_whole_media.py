"""Media and protected directories on their worst days: pulled, mounted twice, renamed, full, replaced, encrypted.

Each test is what happens to a person's stick or to a customer directory, with the real agent on real file systems; the
admin must read about every copy, once, with the right medium, and nobody may be kept from working.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from agent.pytest_plugin import Agent, Media
from tests.house import LOGIN_UID, as_person, can_set_loginuid, until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: fanotify (CAP_SYS_ADMIN) and mount(8)")
MOUNT_WITHIN_S = 12.0
"""The daemon looks for protected directories every 5 s."""


@pytest.fixture
def mounts(tmp_path: Path) -> Iterator[ExitStack]:
    """What is mounted in a test goes at its end, last first, whatever happened."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def agent(tmp_path: Path, sekisho_media: Media) -> Iterator[Agent]:
    """An agent that is not started yet."""
    made = Agent(tmp_path, sekisho_media)
    yield made
    made.stop()


def ours(event: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = event["unmapped"]["sekisho"]
    return found


def run(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{command}: {done.stderr or done.stdout}"


def mount(mounts: ExitStack, where: Path, *how: str | Path) -> None:
    """mount(8), undone at the end of the test."""
    where.mkdir(exist_ok=True, parents=True)
    run("mount", *how, where)
    mounts.callback(subprocess.run, ["umount", "-l", where], capture_output=True)


def customer(folder: Path, name: str = "2014-06.csv", size: int = 30_000) -> Path:
    """A customer list, other than any other."""
    folder.mkdir(parents=True, exist_ok=True)
    made = folder / name
    made.write_bytes(os.urandom(size))
    return made


def told(agent: Agent, name: str, code: str = "file.copied_out") -> dict[str, Any]:
    """The one event about the source `name`: a second one fails."""
    agent.wait_for(code, where=lambda event: ours(event)["protected"]["rel"] == name)
    found = [ours(event) for event in agent.events(code) if ours(event)["protected"]["rel"] == name]
    assert len(found) == 1, f"told {len(found)} times"
    return found[0]


def healthy_enough(agent: Agent) -> None:
    """It answers, and its sensors that worked still do."""
    status = agent.status()
    assert status and not status["queue"]["error"], agent.log.read_text()


# -- the stick -------------------------------------------------------------------------------------------------------------

SLOW = """
import sys, time
with open(sys.argv[1], "rb") as source, open(sys.argv[2], "wb", buffering=0) as target:
    sent = 0
    while piece := source.read(65536):
        sent += target.write(piece)
        print(sent, flush=True)
        time.sleep(0.01)
"""


@pytest.mark.parametrize("fs", ["tmpfs", "ext4"])
def test_a_stick_pulled_in_mid_copy_tells_what_was_seen(
    sekisho_agent: Agent, sekisho_media: Media, mounts: ExitStack, fs: Any
) -> None:
    source = customer(sekisho_agent.protected, "large.bin", 64 << 20)
    stick = sekisho_media.plug("stick1", fs=fs)
    mounts.callback(subprocess.run, ["umount", "-l", stick.path], capture_output=True)
    command = [sys.executable, "-c", SLOW, source, stick.path / "large.bin"]
    writer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    mounts.callback(writer.kill)
    assert writer.stdout
    arrived, started = 0, time.monotonic()
    while time.monotonic() < started + 2.5:  # longer than two looks at what grows
        arrived = int(writer.stdout.readline())
    stick.descriptor_path.unlink()
    run("umount", "-l", stick.path)
    writer.kill()
    arrived = max([arrived, *(int(line) for line in writer.stdout if line.endswith("\n"))])
    writer.wait()
    writer.stdout.close()
    said = told(sekisho_agent, "large.bin")
    assert 0 < said["bytes"] <= arrived + 65536, "what was seen, and not more than there was"
    assert said["medium"]["serial"] == "STICK1"
    sekisho_agent.wait_for("medium.detached")
    healthy_enough(sekisho_agent)
    customer(sekisho_agent.protected)
    other = sekisho_media.plug("stick2", fs="tmpfs")
    as_person(f"cp {sekisho_agent.protected}/2014-06.csv {other.path}/")
    assert told(sekisho_agent, "2014-06.csv")["medium"]["serial"] == "STICK2"


def test_a_stick_mounted_read_only_is_said_to_be_so(sekisho_agent: Agent, sekisho_media: Media) -> None:
    source = customer(sekisho_agent.protected)
    for name, fs in (("made", "ext4"), ("bare", "tmpfs")):
        stick = sekisho_media.plug(name, fs=fs, read_only=True)
        event = sekisho_agent.wait_for("medium.mounted", where=lambda event: ours(event)["medium"]["serial"] == name.upper())
        assert "true" in json.dumps(event).split('"read_only":')[1][:6]
        done = subprocess.run(["cp", source, stick.path], capture_output=True)
        assert done.returncode != 0, "a read-only stick takes nothing"
    writable = sekisho_media.plug("other", fs="tmpfs")
    as_person(f"cp {source} {writable.path}/")
    assert told(sekisho_agent, source.name)["medium"]["serial"] == "OTHER"
    assert not sekisho_agent.events("file.written")


@pytest.mark.parametrize("fs", ["tmpfs", "ext4"])
def test_a_stick_mounted_twice_is_one_stick(
    sekisho_agent: Agent, sekisho_media: Media, mounts: ExitStack, tmp_path: Path, fs: Any
) -> None:
    stick = sekisho_media.plug("stick1", fs=fs)
    (stick.path / "photos").mkdir()
    elsewhere, part = tmp_path / "elsewhere", tmp_path / "part"
    mount(mounts, elsewhere, "--bind", stick.path)
    mount(mounts, part, "--bind", stick.path / "photos")
    for number, where in enumerate((elsewhere, part, stick.path)):
        customer(sekisho_agent.protected, f"{number}.csv", 20_000 + number)
        as_person(f"cp {sekisho_agent.protected}/{number}.csv {where}/")
        said = told(sekisho_agent, f"{number}.csv")
        assert said["medium"]["serial"] == "STICK1"
        assert said["dest"]["path"].startswith(str(stick.path)), "told by the name under which the stick is known"
    assert len(sekisho_agent.events("medium.mounted")) == 1
    healthy_enough(sekisho_agent)


@pytest.mark.parametrize("fs", ["tmpfs", "ext4", "folder"])
def test_a_private_namespace_hides_nothing_and_hurts_nobody(
    sekisho_agent: Agent, sekisho_media: Media, tmp_path: Path, fs: Any
) -> None:
    stick = sekisho_media.plug("stick1", fs=fs)
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    for name in ("1.csv", "2.csv", "3.csv"):
        customer(sekisho_agent.protected, name)
    private = "unshare -m --propagation private sh -ec"
    as_person(f"{private} 'mount -t tmpfs none {hidden}; cp {sekisho_agent.protected}/1.csv {hidden}/'")
    as_person(f"{private} 'mount --bind {stick.path} {hidden}; cp {sekisho_agent.protected}/2.csv {hidden}/'")
    said = told(sekisho_agent, "2.csv")
    assert said["medium"]["serial"] == "STICK1"
    as_person(f"cp {sekisho_agent.protected}/3.csv {stick.path}/")
    told(sekisho_agent, "3.csv")
    healthy_enough(sekisho_agent)


def test_a_namespace_that_keeps_the_mount_does_not_keep_the_user_from_ejecting(
    sekisho_agent: Agent, sekisho_media: Media, mounts: ExitStack
) -> None:
    stick = sekisho_media.plug("stick1", fs="tmpfs")
    keeper = subprocess.Popen(
        ["unshare", "-m", "--propagation", "private", "sh", "-c", "echo; exec sleep 60"], stdout=subprocess.PIPE
    )
    mounts.callback(keeper.wait)
    mounts.callback(keeper.kill)
    assert keeper.stdout
    keeper.stdout.readline()
    sekisho_media.unplug(stick)
    sekisho_agent.wait_for("medium.detached")
    again = sekisho_media.plug("stick1", fs="tmpfs")
    customer(sekisho_agent.protected)
    as_person(f"cp {sekisho_agent.protected}/2014-06.csv {again.path}/")
    told(sekisho_agent, "2014-06.csv")
    keeper.stdout.close()


@pytest.mark.parametrize("fs", ["folder", "tmpfs", "ext4"])
def test_renaming_on_the_stick_loses_no_trail(sekisho_agent: Agent, sekisho_media: Media, fs: Any) -> None:
    stick = sekisho_media.plug("stick1", fs=fs)
    first, second, third = (customer(sekisho_agent.protected, f"{name}.csv", 20_000 + name) for name in range(3))
    as_person(f"mkdir {stick.path}/a {stick.path}/b; cp {first} {stick.path}/a/x.csv")
    told(sekisho_agent, "0.csv")
    as_person(
        f"mv {stick.path}/a/x.csv {stick.path}/b/y.jpg; mv {stick.path}/a {stick.path}/c; mv {stick.path}/b {stick.path}/c/d"
    )
    as_person(f"cp {second} {stick.path}/c/d/new.csv")
    assert told(sekisho_agent, "1.csv")["dest"]["path"] == str(stick.path / "c/d/new.csv")
    as_person(f"mkdir -p {stick.path}/c/d/e; mv {stick.path}/c {stick.path}/z; cat {third} > {stick.path}/z/d/e/deep.csv")
    assert told(sekisho_agent, "2.csv")["dest"]["path"] == str(stick.path / "z/d/e/deep.csv")
    healthy_enough(sekisho_agent)


@pytest.mark.parametrize("layout", ["folders", "flat", "plain folder"])
def test_a_stick_with_100_000_files_stalls_nothing(
    sekisho_agent: Agent, sekisho_media: Media, mounts: ExitStack, tmp_path: Path, layout: str
) -> None:
    pocket, where = tmp_path / "pocket", sekisho_media.root / "full"
    inside = pocket / "photos"
    if layout != "plain folder":
        mount(mounts, pocket, "-t", "tmpfs", "-o", "nr_inodes=200k", "full")
    for number in range(100_000):
        if number % 1000 == 0 and (layout != "flat" or number == 0):
            inside = pocket / str(number)
            inside.mkdir(parents=True)
        os.close(os.open(f"{inside}/photo-{number:06}.jpg", os.O_CREAT | os.O_WRONLY))
    customer(sekisho_agent.protected)
    before = sekisho_agent.status()["memory_kib"]
    if layout == "plain folder":
        pocket.rename(where)
    else:
        mount(mounts, where, "--bind", pocket)
    (sekisho_media.root / "full.medium.toml").write_text('kind = "storage"\nserial = "FULL"\n')
    slowest, peak = 0.0, 0

    def seen() -> bool:
        nonlocal slowest, peak
        asked = time.monotonic()
        status = sekisho_agent.status()
        assert status, "it does not answer"
        slowest, peak = max(slowest, time.monotonic() - asked), max(peak, status["memory_kib"])
        return str(where) in status["watched_media"]

    until(seen, "the stick is not watched")
    as_person(f"cp {sekisho_agent.protected}/2014-06.csv {where}/{inside.name}/")
    assert told(sekisho_agent, "2014-06.csv")["medium"]["serial"] == "FULL"
    seen()
    print(f"{layout}: status after {slowest:.3f} s at most, {before / 1024:.1f} MiB before, {peak / 1024:.1f} MiB at most")
    assert slowest < 2.0
    assert peak - before < 24 << 10


def test_a_stick_can_be_ejected_at_any_time(sekisho_agent: Agent, sekisho_media: Media) -> None:
    """Thirty times plugged, copied to, ejected at once: never busy, and every copy is told, once, and right."""
    for number in range(30):
        customer(sekisho_agent.protected, f"{number:02}.csv", 20_000 + number)
        stick = sekisho_media.plug("stick1", fs="ext4")
        as_person(f"cp {sekisho_agent.protected}/{number:02}.csv {stick.path}/")
        sekisho_media.unplug(stick)  # raises if it is busy
    sekisho_agent.wait_for("file.copied_out", 30)
    told = [ours(event)["protected"]["rel"] for event in sekisho_agent.events("file.copied_out")]
    assert sorted(told) == [f"{number:02}.csv" for number in range(30)]
    assert len(sekisho_agent.wait_for("medium.detached", 30)) == 30
    assert not sekisho_agent.events("agent.gap")


# -- the customer directory -------------------------------------------------------------------------------------------------


def watched(agent: Agent) -> bool:
    return bool(agent.status()["protected"][0]["watched"])


def copied(agent: Agent, media: Media, source: Path, name: str = "stick1") -> dict[str, Any]:
    """Copy `source` onto a new stick as a person; what was told of it."""
    stick = media.plug(name, fs="tmpfs")
    as_person(f"cp {source} {stick.path}/out-{source.name}")
    said = told(agent, str(source.relative_to(agent.protected)))
    media.unplug(stick)
    return said


def test_a_directory_that_comes_late_is_waited_for_aloud(agent: Agent, sekisho_media: Media) -> None:
    agent.protected.rmdir()
    agent.start()
    until(lambda: "protected_missing" in agent.status()["blind"], "its absence is not said")
    lack = agent.wait_for("agent.sensors", where=lambda event: "protected_missing" in ours(event)["detail"]["blind"])
    assert not ours(lack)["detail"]["ok"]
    source = customer(agent.protected / "2026")
    until(lambda: watched(agent), "it is not watched", MOUNT_WITHIN_S)
    copied(agent, sekisho_media, source)
    assert "protected_missing" not in agent.status()["blind"]
    agent.wait_for("agent.sensors", where=lambda e: ours(e)["detail"]["sensor"] == "protected" and ours(e)["detail"]["ok"])


def test_a_directory_that_is_replaced_is_watched_again(sekisho_agent: Agent, sekisho_media: Media) -> None:
    customer(sekisho_agent.protected, "old.csv")
    sekisho_agent.protected.rename(sekisho_agent.root / "archive")
    source = customer(sekisho_agent.protected / "2027", "new.csv")
    stick = sekisho_media.plug("stick1", fs="tmpfs")

    def seen() -> bool:
        as_person(f"cp {source} {stick.path}/")
        return bool(sekisho_agent.events("file.copied_out"))

    until(seen, "the new directory is not watched", MOUNT_WITHIN_S)
    assert ours(sekisho_agent.wait_for("file.copied_out"))["protected"]["rel"] == "2027/new.csv"


def test_a_file_system_mounted_over_the_directory_is_watched_and_told(
    sekisho_agent: Agent, sekisho_media: Media, mounts: ExitStack
) -> None:
    """As autofs, LUKS and encrypted homes do: what was an empty directory is another file system a moment later."""
    mount(mounts, sekisho_agent.protected, "-t", "tmpfs", "late")
    source = customer(sekisho_agent.protected)
    stick = sekisho_media.plug("stick1", fs="tmpfs")

    def seen() -> bool:
        as_person(f"cp {source} {stick.path}/")
        return bool(sekisho_agent.events("file.copied_out"))

    until(seen, "the new content is not watched", MOUNT_WITHIN_S)
    sekisho_agent.wait_for("agent.sensors", where=lambda event: ours(event)["detail"]["sensor"] == "protected")
    run("umount", sekisho_agent.protected)
    below = customer(sekisho_agent.protected, "below.csv", 33_000)

    def seen_below() -> bool:
        as_person(f"cp {below} {stick.path}/")
        return any(ours(event)["protected"]["rel"] == "below.csv" for event in sekisho_agent.events("file.copied_out"))

    until(seen_below, "what was below it is not watched again", MOUNT_WITHIN_S)


def test_hard_links_and_files_moved_out_stay_protected(agent: Agent, sekisho_media: Media, tmp_path: Path) -> None:
    linked, moved = customer(agent.protected, "linked.csv"), customer(agent.protected, "moved.csv", 31_000)
    os.link(linked, tmp_path / "diary.txt")
    agent.start()
    stick = sekisho_media.plug("stick1", fs="tmpfs")
    as_person(f"cp {tmp_path}/diary.txt {stick.path}/")
    assert told(agent, "linked.csv")["bytes"] == 30_000
    as_person(f"mv {moved} {tmp_path}/photo.jpg; cp {tmp_path}/photo.jpg {stick.path}/")
    assert told(agent, "moved.csv")["bytes"] == 31_000
    fresh = customer(agent.protected, "fresh.csv", 32_000)
    os.link(fresh, tmp_path / "recipes.txt")

    def seen() -> bool:  # link(2) tells the directory of the file nothing: it is noticed by looking, some seconds later
        as_person(f"cp {tmp_path}/recipes.txt {stick.path}/")
        return any(ours(event)["protected"]["rel"] == "fresh.csv" for event in agent.events("file.copied_out"))

    until(seen, "a hard link made elsewhere is never noticed", MOUNT_WITHIN_S)


def _tmpfs(mounts: ExitStack, where: Path, root: Path) -> None:
    mount(mounts, where, "-t", "tmpfs", "customers")


def _image(mounts: ExitStack, where: Path, root: Path, *make: str | Path) -> None:
    image = root / "customers.img"
    with image.open("wb") as file:
        file.truncate(320 << 20)
    run(*make, image)
    mount(mounts, where, "-o", "loop", image)


def _ext4(mounts: ExitStack, where: Path, root: Path) -> None:
    _image(mounts, where, root, "mkfs.ext4", "-q", "-F")


def _xfs(mounts: ExitStack, where: Path, root: Path) -> None:
    _image(mounts, where, root, "mkfs.xfs", "-q", "-f")


def _btrfs(mounts: ExitStack, where: Path, root: Path) -> None:
    """A subvolume of its own, as distributions make for /home."""
    top = root / "btrfs"
    _image(mounts, top, root, "mkfs.btrfs", "-q", "-f")
    run("btrfs", "subvolume", "create", top / "@customers")
    mount(mounts, where, "-o", "loop,subvol=@customers", root / "customers.img")


def _overlay(mounts: ExitStack, where: Path, root: Path) -> None:
    below = root / "layers"
    for name in ("lower", "upper", "work"):
        (below / name).mkdir(parents=True)
    (below / "lower" / "from-below.csv").write_bytes(os.urandom(25_000))
    options = f"lowerdir={below}/lower,upperdir={below}/upper,workdir={below}/work"
    mount(mounts, where, "-t", "overlay", "-o", options, "overlay")


def _fuse(mounts: ExitStack, where: Path, *command: str | Path, key: str = "") -> None:
    done = subprocess.run(command, input=key, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{command}: {done.stderr or done.stdout}"
    mounts.callback(subprocess.run, ["fusermount3", "-uz", where], capture_output=True)
    until(lambda: os.path.ismount(where), f"{command[0]} does not mount")


def _bindfs(mounts: ExitStack, where: Path, root: Path) -> None:
    (root / "real").mkdir()
    _fuse(mounts, where, "bindfs", root / "real", where)


def _gocryptfs(mounts: ExitStack, where: Path, root: Path) -> None:
    (root / "cipher").mkdir()
    (root / "word").write_text("password\n")
    run("gocryptfs", "-init", "-q", "-scryptn", "10", "-passfile", root / "word", root / "cipher")
    _fuse(mounts, where, "gocryptfs", "-q", "-passfile", root / "word", root / "cipher", where)


def _encfs(mounts: ExitStack, where: Path, root: Path) -> None:
    (root / "cipher").mkdir()
    _fuse(mounts, where, "encfs", "--standard", "--stdinpass", root / "cipher", where, key="password\n")


def _fscrypt(mounts: ExitStack, where: Path, root: Path) -> None:
    """ext4's own encryption, as fscrypt sets it up for a home; the key is in the kernel by the time the agent looks."""
    image = root / "customers.img"
    with image.open("wb") as file:
        file.truncate(64 << 20)
    run("mkfs.ext4", "-q", "-F", "-O", "encrypt", image)
    mount(mounts, where, "-o", "loop", image)
    (root / "key").write_bytes(os.urandom(32))
    if not Path("/etc/fscrypt.conf").exists():
        mounts.callback(Path("/etc/fscrypt.conf").unlink, missing_ok=True)
        run("fscrypt", "setup", "--quiet", "--force")
    run("fscrypt", "setup", "--quiet", "--force", where)
    home = where / "home"
    home.mkdir()
    run("fscrypt", "encrypt", "--quiet", "--source=raw_key", f"--key={root / 'key'}", "--name=home", home)


WHERE: dict[str, tuple[Callable[[ExitStack, Path, Path], None], str]] = {
    "tmpfs": (_tmpfs, "mount"),
    "ext4": (_ext4, "mkfs.ext4"),
    "xfs": (_xfs, "mkfs.xfs"),
    "btrfs subvolume": (_btrfs, "mkfs.btrfs"),
    "overlay": (_overlay, "mount"),
    "bindfs": (_bindfs, "bindfs"),
    "gocryptfs": (_gocryptfs, "gocryptfs"),
    "encfs": (_encfs, "encfs"),
    "fscrypt": (_fscrypt, "fscrypt"),
}


@pytest.mark.parametrize("where", WHERE)
def test_customers_on_any_file_system_are_watched(
    agent: Agent, sekisho_media: Media, mounts: ExitStack, tmp_path: Path, where: str
) -> None:
    make, program = WHERE[where]
    if shutil.which(program) is None:
        pytest.skip(f"needs {program}")
    make(mounts, agent.protected, tmp_path)
    folder = agent.protected / "home" if where == "fscrypt" else agent.protected / "2026"
    there_before = customer(folder, "before.csv", 20_001)
    agent.start()
    assert watched(agent), agent.status()
    stick = sekisho_media.plug("stick1", fs="tmpfs")
    made_later = customer(agent.protected / folder.name / "new", "later.csv", 20_002)
    sources = [there_before, made_later]
    if where == "overlay":
        sources.append(agent.protected / "from-below.csv")
    for source in sources:
        as_person(f"cp {source} {stick.path}/out-{source.name}")
        said = told(agent, str(source.relative_to(agent.protected)))
        assert said["source"]["path"] == str(source) and said["bytes"] == source.stat().st_size
        assert said["attribution"] in ("exact", "cached")
        if can_set_loginuid():
            assert said["login"]["uid"] == LOGIN_UID
    as_person(f"tar c -C {agent.protected} {folder.name} | gzip > {stick.path}/all.tgz")

    def piped() -> set[str]:
        return {
            ours(event)["protected"]["rel"] for event in agent.events("file.copied_out") if ours(event)["link"] == "pipeline"
        }

    packed = {str(source.relative_to(agent.protected)) for source in (there_before, made_later)}
    until(lambda: piped() == packed, lambda: f"told through a pipe: {sorted(piped())}")
    agent.stop(signal.SIGTERM)
