"""What fanotify tells of protected directories and media, on a real kernel with real file systems."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.contract.event import path_text
from agent.core.facts import Attributes, Closed, Created, Deleted, Fact, FileFact, Found, Grown, Lost, Moved, Opened, Sized
from agent.sense import SensorError, kernel, sizes
from agent.sense.fanotify import Fanotify
from agent.sense.marks import alone
from agent.sense.mounts import Mounts
from tests.kernel_lab import EXT4, ROOT, medium, run, until

pytestmark = ROOT


@pytest.fixture
def files() -> Iterator[Fanotify]:
    sensor = Fanotify()
    yield sensor
    sensor.close()


@pytest.fixture
def protected(tmp_path: Path, files: Fanotify) -> Path:
    folder = tmp_path / "customers"
    (folder / "2026").mkdir(parents=True)
    (folder / "a.csv").write_text("id,name\n")
    (folder / "2026" / "b.csv").write_text("1,sato\n" * 100)
    files.watch_tree(str(folder))
    return folder


@pytest.fixture
def stick(tmp_path: Path) -> Iterator[Path]:
    with medium(tmp_path) as mount:
        yield mount


def told(files: Fanotify, *kinds: type[FileFact]) -> list[FileFact]:
    return [fact for fact in files.drain(1) if isinstance(fact, FileFact) and (not kinds or isinstance(fact, kinds))]


def test_each_file_read_is_one_fact_with_a_key_that_lasts(files: Fanotify, protected: Path) -> None:
    run(f"cat {protected}/a.csv; ls -lR {protected}; cat {protected}/2026/b.csv; grep -r sato {protected}")
    facts = told(files)
    assert [type(fact) for fact in facts] == [Opened] * 4
    keys = {fact.path: fact.key for fact in facts}
    assert keys == {
        str(path): kernel.file_key(os.fsencode(path)) for path in (protected / "a.csv", protected / "2026" / "b.csv")
    }
    assert all(fact.size is None for fact in facts if isinstance(fact, Opened))


@EXT4
def test_the_size_comes_with_what_a_program_opens_after_it_wrote_to_a_medium(
    files: Fanotify, protected: Path, stick: Path
) -> None:
    files.watch_medium(str(stick), alone=True)
    for wanted in (False, True):
        files.want_sizes = wanted
        run(f"cat {protected}/a.csv; cp {protected}/a.csv {protected}/2026/b.csv {stick}")
        reader, first, second = (fact for fact in told(files) if isinstance(fact, Opened))
        assert reader.size is None and first.size is None, "nobody knows yet that it will be written"
        assert (second.size, second.inode) == ((700, (protected / "2026" / "b.csv").stat().st_ino) if wanted else (None, None))


def test_sizes_are_looked_up_when_they_are_asked_for(tmp_path: Path) -> None:
    odd = tmp_path / "顧客 \\ 2026.csv"
    odd.write_text("12345")
    (tmp_path / "link").symlink_to(odd)
    paths = [path_text(os.fsencode(path)) for path in (odd, tmp_path / "gone", tmp_path / "link", tmp_path)]
    facts = list(sizes.look(paths, 7))
    assert [(fact.path, fact.size) for fact in facts if isinstance(fact, Sized)] == list(zip(paths, (5, None, None, None)))
    assert facts[0] == Sized(at_ms=7, path=paths[0], size=5, inode=odd.stat().st_ino)


def test_a_name_in_any_script_or_bytes_arrives_as_path_text(files: Fanotify, protected: Path) -> None:
    odd = os.fsencode(protected) + "/顧客 \\".encode() + b"\xff\n"
    with open(odd, "wb"):
        pass
    list(files.drain(1))
    subprocess.run([b"cat", odd], check=True)
    assert [fact.path for fact in told(files)] == [path_text(odd)]


def test_our_own_reading_is_not_told(files: Fanotify, protected: Path) -> None:
    (protected / "a.csv").read_text()
    assert told(files) == []


def test_every_pid_is_shown_before_any_path_is_resolved(files: Fanotify, protected: Path) -> None:
    run(f"cat {protected}/a.csv; cat {protected}/a.csv")
    order: list[object] = []
    for fact in files.drain(1, order.append):
        order.append(fact)
    assert [type(each) for each in order] == [int, int, Opened, Opened]


def test_a_file_moved_about_keeps_its_key_and_is_followed_outside(files: Fanotify, protected: Path, tmp_path: Path) -> None:
    outside = tmp_path / "home"
    outside.mkdir()
    key = kernel.file_key(os.fsencode(protected / "a.csv"))
    run(f"mv {protected}/a.csv {protected}/2026/c.csv; mv {protected}/2026/c.csv {outside}/holiday.jpg")
    list(files.drain(1))
    run(f"cat {outside}/holiday.jpg")
    run(f"mv {outside}/holiday.jpg {protected}/a.csv")
    facts = told(files)
    assert [type(fact) for fact in facts] == [Opened, Moved]
    assert facts[0].path == str(outside / "holiday.jpg") and {fact.key for fact in facts} == {key}
    assert isinstance(facts[1], Moved) and facts[1].path == str(protected / "a.csv")


def test_a_directory_moved_out_takes_its_watch_along(files: Fanotify, protected: Path, tmp_path: Path) -> None:
    run(f"cat {protected}/2026/b.csv")
    list(files.drain(1))
    run(f"mv {protected}/2026 {tmp_path}/photos; cat {tmp_path}/photos/b.csv")
    moved, opened = told(files)
    assert isinstance(moved, Moved) and moved.is_dir and moved.old_path == str(protected / "2026")
    assert isinstance(opened, Opened) and opened.path == f"{tmp_path}/photos/b.csv", "a cached path would be wrong now"


def test_hard_links_are_seen_under_every_name(files: Fanotify, protected: Path, tmp_path: Path) -> None:
    os.link(protected / "2026" / "b.csv", tmp_path / "old-link")
    files.close()
    again = Fanotify()
    try:
        again.watch_tree(str(protected))
        run(f"cat {tmp_path}/old-link")
        whose, opened = again.drain(1)
        assert isinstance(whose, Attributes) and isinstance(opened, Opened) and opened.path == f"{tmp_path}/old-link"
        assert (whose.key, whose.path, whose.links, whose.pid) == (opened.key, f"{protected}/2026/b.csv", 2, 0)
        assert list(again.sweep(2)) == [], "said once"
        os.link(protected / "a.csv", tmp_path / "new-link")  # the kernel tells nobody
        noticed = until(lambda: again.sweep(2), lambda facts: bool(facts))
        assert isinstance(noticed[0], Attributes) and noticed[0].links == 2 and noticed[0].path == str(protected / "a.csv")
        run(f"cat {tmp_path}/new-link")
        assert [fact.path for fact in again.drain(3) if isinstance(fact, Opened)] == [f"{tmp_path}/new-link"]
    finally:
        again.close()


def test_mode_and_link_count_of_protected_files_are_watched(files: Fanotify, protected: Path) -> None:
    run(f"chmod 600 {protected}/a.csv")
    run(f"ln {protected}/a.csv {protected}/d.csv")
    facts = told(files)
    assert [type(fact) for fact in facts] == [Attributes, Created]
    assert {fact.key for fact in facts} == {kernel.file_key(os.fsencode(protected / "a.csv"))}


def test_no_file_of_200_new_directories_is_lost(files: Fanotify, protected: Path) -> None:
    script = (
        f"mkdir -p {protected}/n/a/b; for i in $(seq 200); do mkdir {protected}/n/a/b/$i; echo x > {protected}/n/a/b/$i/f; done"
    )
    with subprocess.Popen(script, shell=True) as maker:
        facts = until(lambda: files.drain(1), lambda facts: len({_path(fact) for fact in facts if _path(fact)}) >= 200)
        assert maker.wait() == 0
    paths = {fact.path for fact in facts if isinstance(fact, Created | Closed | Found)}
    assert paths == {f"{protected}/n/a/b/{number}/f" for number in range(1, 201)}
    assert all(fact.pid for fact in facts if isinstance(fact, Found)), "who made the directory is told as a hint"


def _path(fact: Fact) -> str:
    return fact.path if isinstance(fact, Created | Closed | Found) else ""


def test_what_is_found_in_a_new_directory_comes_after_what_the_kernel_told(
    files: Fanotify, protected: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "folder-medium"
    folder.mkdir()
    files.watch_medium(str(folder), alone=False)
    run(f"cp -r {protected} {folder}/")
    facts = [fact for fact in told(files) if not isinstance(fact, Attributes)]
    first_write = next(place for place, fact in enumerate(facts) if fact.path.startswith(str(folder)))
    assert any(isinstance(fact, Opened) for fact in facts[:first_write])
    written = {fact.path for fact in facts if isinstance(fact, Closed | Found) and fact.path.startswith(str(folder))}
    assert written == {f"{folder}/customers/a.csv", f"{folder}/customers/2026/b.csv"}


def test_a_missing_directory_is_said_to_be_missing_and_can_come_later(files: Fanotify, tmp_path: Path) -> None:
    late = tmp_path / "late"
    with pytest.raises(SensorError, match="as soon as it is there"):
        files.watch_tree(str(late))
    late.mkdir()
    files.watch_tree(str(late))
    files.watch_tree(str(late))
    run(f"echo x > {late}/f")
    assert Created in {type(fact) for fact in told(files)}


def test_a_symbolic_link_does_not_widen_the_watch(files: Fanotify, protected: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "f").write_text("x")
    run(f"ln -s {elsewhere} {protected}/link; ln -s {elsewhere}/f {protected}/flink")
    list(files.sweep(1))
    list(files.drain(1))
    run(f"cat {elsewhere}/f {protected}/link/f {protected}/flink")
    assert told(files) == []


@EXT4
def test_a_copy_to_a_stick_is_told_from_first_byte_to_last_name(files: Fanotify, protected: Path, stick: Path) -> None:
    assert alone(str(stick)) and not alone(str(protected))
    files.watch_medium(str(stick), alone=True)
    run(f"cp {protected}/2026/b.csv {stick}/x.tmp; mv {stick}/x.tmp {stick}/x; rm {stick}/x")
    run(f"mkdir -p {stick}/d/e; echo 1 > {stick}/d/e/f")
    facts = [fact for fact in told(files) if fact.path.startswith(str(stick))]
    assert [(type(fact), fact.path.removeprefix(f"{stick}/")) for fact in facts] == [
        (Created, "x.tmp"),
        (Closed, "x.tmp"),
        (Moved, "x"),
        (Deleted, "x"),
        (Closed, "d/e/f"),
    ]
    assert len({fact.key for fact in facts[:4]}) == 1
    assert [fact.made for fact in facts if isinstance(fact, Closed)] == [False, True]  # one record, one fact


@EXT4
def test_the_size_of_a_file_still_being_written_can_be_asked(files: Fanotify, stick: Path) -> None:
    files.watch_medium(str(stick), alone=True)
    writer = subprocess.Popen(f"exec > {stick}/big; echo start; read line; echo more", shell=True, stdin=subprocess.PIPE)
    assert writer.stdin is not None
    until(lambda: files.drain(1), lambda facts: any(isinstance(fact, Created) for fact in facts))
    grown = until(lambda: files.grown(2), lambda facts: bool(facts))
    assert isinstance(grown[0], Grown) and grown[0].size == 6 and grown[0].path == f"{stick}/big"
    assert list(files.grown(3)) == [], "said once for each size"
    writer.communicate(b"go\n")
    closed = until(lambda: files.drain(4), lambda facts: any(isinstance(fact, Closed) for fact in facts))
    assert [fact.size for fact in closed if isinstance(fact, Closed)] == [11]
    assert list(files.grown(5)) == []


@EXT4
def test_the_stick_can_be_pulled_at_any_time_and_put_back(
    files: Fanotify, protected: Path, stick: Path, tmp_path: Path
) -> None:
    files.watch_medium(str(stick), alone=True)
    run(f"cp -r {protected} {stick}/one")
    run(f"umount {stick}")  # with everything unread
    assert {Path(fact.path).name for fact in told(files, Closed)} == {"a.csv", "b.csv"}
    files.unwatch(str(stick))
    run(f"mount -o loop {tmp_path}/stick.img {stick}")
    files.watch_medium(str(stick), alone=True)
    run(f"cp {protected}/a.csv {stick}/two; umount {stick}")
    assert len([fact for fact in told(files, Closed) if fact.path.endswith("two")]) == 1


@EXT4
def test_a_stick_mounted_twice_is_told_once(files: Fanotify, stick: Path, tmp_path: Path) -> None:
    second = tmp_path / "second"
    second.mkdir()
    run(f"mount --bind {stick} {second}")
    try:
        files.watch_medium(str(stick), alone=True)
        files.watch_medium(str(second), alone=True)
        run(f"echo x > {second}/f")
        assert [type(fact) for fact in told(files)] == [Closed]
        files.unwatch(str(second))
        run(f"echo x > {stick}/g")
        assert [fact.path for fact in told(files, Closed)] == [f"{stick}/g"]
    finally:
        run(f"umount {second}")


def test_a_whole_file_system_is_never_marked_where_the_system_or_protected_files_live(
    files: Fanotify, protected: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    with pytest.raises(SensorError, match="shares its file system"):
        files.watch_medium(str(folder), alone=True)
    files.watch_medium(str(folder), alone=False)
    run(f"echo x > {folder}/in; echo x > {tmp_path}/beside")
    assert {fact.path for fact in told(files)} == {f"{folder}/in"}
    files.unwatch(str(folder))
    run(f"echo x > {folder}/after")
    assert told(files) == []


@pytest.fixture
def overlay(tmp_path: Path) -> Iterator[Path]:
    for name in ("disk", "top"):
        (tmp_path / name).mkdir()
    run(f"mount -t tmpfs none {tmp_path}/disk; mkdir {tmp_path}/disk/lower {tmp_path}/disk/upper {tmp_path}/disk/work")
    where = ",".join(f"{name}dir={tmp_path}/disk/{name}" for name in ("lower", "upper", "work"))
    top = tmp_path / "top"
    done = subprocess.run(["mount", "-t", "overlay", "-o", where, "none", top], capture_output=True, check=False)
    try:
        if done.returncode:
            pytest.skip("needs overlayfs")
        yield top
        run(f"umount {top}")
    finally:
        run(f"umount {tmp_path}/disk")


def test_a_medium_that_refuses_handles_is_told_by_finished_writes(files: Fanotify, overlay: Path) -> None:
    files.watch_medium(str(overlay), alone=True)
    run(f"echo 12345 > {overlay}/f")
    (closed,) = told(files)
    assert isinstance(closed, Closed) and closed.path == f"{overlay}/f" and closed.size == 6
    said = files.coverage(1)
    assert not said.ok and "medium_renames" in said.blind


def test_a_protected_directory_in_a_container_has_paths_too(files: Fanotify, overlay: Path) -> None:
    run(f"mkdir -p {overlay}/p/s; echo 1 > {overlay}/p/s/f")
    try:
        files.watch_tree(str(overlay / "p"))
    except SensorError:
        pytest.skip("needs a kernel that marks overlayfs with file handles (6.6)")
    run(f"cat {overlay}/p/s/f; mv {overlay}/p/s {overlay}/p/t; cat {overlay}/p/t/f")
    assert [fact.path for fact in told(files, Opened)] == [f"{overlay}/p/s/f", f"{overlay}/p/t/f"]


@pytest.mark.parametrize("kind", ["disk", "overlay"])
def test_a_new_directory_renamed_before_we_looked_is_searched_all_the_same(
    kind: str, files: Fanotify, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    place = tmp_path if kind == "disk" else request.getfixturevalue("overlay")
    folder = place / "p"
    folder.mkdir()
    try:
        files.watch_tree(str(folder))
    except SensorError:
        pytest.skip("needs a kernel that marks overlayfs with file handles (6.6)")
    run(f"mkdir {folder}/new; echo x > {folder}/new/f; mv {folder}/new {folder}/renamed")
    assert [fact.path for fact in told(files, Found)] == [f"{folder}/renamed/f"]
    run(f"cat {folder}/renamed/f")
    assert [fact.path for fact in told(files, Opened)] == [f"{folder}/renamed/f"]


def test_an_overflow_is_a_loss_and_media_are_searched(files: Fanotify, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    files.watch_medium(str(folder), alone=False)
    (folder / "unheard").write_text("123")
    overflow = kernel.EVENT_METADATA.pack(
        kernel.EVENT_METADATA.size, 3, 0, kernel.EVENT_METADATA.size, kernel.FAN_Q_OVERFLOW, -1, 0
    )
    facts = list(files._facts(overflow, 1, None))
    assert isinstance(facts[0], Lost) and facts[0].reason == "fanotify_overflow"
    assert [(type(fact), fact.path, fact.size) for fact in facts[1:] if isinstance(fact, Found)] == [
        (Found, f"{folder}/unheard", 3)
    ]


@EXT4
def test_a_protected_directory_renamed_for_a_moment_is_told_by_its_configured_path(
    files: Fanotify, protected: Path, stick: Path
) -> None:
    files.watch_medium(str(stick), alone=True)
    run(f"mv {protected} {protected}.x; cp {protected}.x/2026/b.csv {stick}/y; mv {protected}.x {protected}")
    facts = told(files)
    assert [fact.path for fact in facts if isinstance(fact, Opened)] == [f"{protected}/2026/b.csv"]
    said = files.coverage(2)
    assert not said.ok and "protected_moved" in said.blind and str(protected) in said.why
    assert "protected_moved" not in files.coverage(60_000).blind, "back in its place"


@EXT4
@pytest.mark.parametrize("above", [False, True], ids=["itself", "the directory above it"])
def test_a_protected_directory_that_stays_elsewhere_is_watched_there(
    above: bool, files: Fanotify, stick: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "srv" / "customers"
    (folder / "2026").mkdir(parents=True)
    (folder / "2026" / "b.csv").write_text("1,sato\n")
    files.watch_tree(str(folder))
    there = tmp_path / "away" / "customers" if above else tmp_path / "srv" / "holiday"
    run(f"mv {tmp_path}/srv {tmp_path}/away" if above else f"mv {folder} {there}")
    run(f"cat {there}/2026/b.csv; mkdir {there}/new; echo 12 > {there}/new/f")
    opened = [(fact.path, fact.size) for fact in files.drain(1) if isinstance(fact, Opened)]
    assert opened == [(f"{folder}/2026/b.csv", 7)], "nobody could look up the size by that path"
    run(f"cat {there}/new/f")
    assert [fact.path for fact in told(files, Opened)] == [f"{folder}/new/f"]
    assert f"renamed to {there}" in files.coverage(1).why


def test_a_protected_directory_with_another_put_in_its_place_stays_protected(
    files: Fanotify, protected: Path, tmp_path: Path
) -> None:
    run(f"mv {protected} {tmp_path}/old; mkdir {protected}; echo x > {protected}/f")
    list(files.drain(1))
    files.watch_tree(str(protected))
    run(f"cat {tmp_path}/old/2026/b.csv; cat {protected}/f")
    assert [fact.path for fact in told(files, Opened)] == [f"{protected}/2026/b.csv", f"{protected}/f"]


def test_a_protected_directory_removed_and_made_again_is_watched_again(files: Fanotify, protected: Path) -> None:
    run(f"rm -rf {protected}; mkdir {protected}")  # ext4 and tmpfs may give it the same inode number
    list(files.drain(1))
    files.watch_tree(str(protected))
    run(f"echo x > {protected}/f; cat {protected}/f")
    assert Opened in {type(fact) for fact in told(files)}


@EXT4
@pytest.mark.parametrize("first", ["close", "name", "close, and we read it"])
def test_a_file_that_gets_its_name_when_it_is_finished_is_told_with_its_size(first: str, files: Fanotify, stick: Path) -> None:
    files.watch_medium(str(stick), alone=True)
    script = (
        "import os\n"
        f"fd = os.open('{stick}', os.O_TMPFILE | os.O_RDWR)\n"
        "os.write(fd, b'12345')\n"
        "other = os.open(f'/proc/self/fd/{fd}', os.O_RDONLY)\n"
        + ("os.close(fd); fd = other\n" if first != "name" else "")
        + "print('written', flush=True); input()\n"
        f"os.link(f'/proc/self/fd/{{fd}}', '{stick}/named', src_dir_fd=fd, follow_symlinks=True)\n"  # linkat(2)
    )
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", script], stdin=pipe, stdout=pipe) as writer:
        assert writer.stdout is not None and writer.stdout.readline() == b"written\n"
        before = told(files, Closed) if first == "close, and we read it" else []
        writer.communicate(b"go\n")
    ends = [(fact.path, fact.size) for fact in before + told(files) if isinstance(fact, Closed) and fact.size is not None]
    assert writer.returncode == 0 and ends == [(f"{stick}/named", 5)]


@EXT4
def test_a_second_name_for_a_finished_file_comes_with_its_size(files: Fanotify, stick: Path) -> None:
    files.watch_medium(str(stick), alone=True)
    run(f"echo 1234 > {stick}/a")
    list(files.drain(1))
    run(f"ln {stick}/a {stick}/b")
    assert [(type(fact), fact.path) for fact in told(files)] == [(Created, f"{stick}/b"), (Closed, f"{stick}/b")]


@EXT4
def test_the_size_is_known_although_the_directory_was_renamed_meanwhile(files: Fanotify, stick: Path) -> None:
    files.watch_medium(str(stick), alone=True)
    run(f"mkdir {stick}/d; echo 1 > {stick}/d/f")
    list(files.drain(1))
    run(f"echo 12345 > {stick}/d/g; mv {stick}/d {stick}/e")
    assert [(fact.path, fact.size) for fact in files.drain(1) if isinstance(fact, Closed)] == [(f"{stick}/d/g", 6)]


@EXT4
def test_a_copy_followed_at_once_by_an_unmount_keeps_its_path(files: Fanotify, stick: Path) -> None:
    run(f"mkdir {stick}/seen")
    files.watch_medium(str(stick), alone=True)
    run(f"echo 1 > {stick}/seen/a; mv {stick}/seen {stick}/now; echo 1 > {stick}/now/b")
    list(files.drain(1))
    run(f"echo 12 > {stick}/top; echo 12 > {stick}/now/c; umount {stick}")
    assert [fact.path for fact in told(files, Closed)] == [f"{stick}/top", f"{stick}/now/c"]


def deep(top: Path, levels: int) -> None:
    """`levels` directories with names of 200 characters below `top`, and a file `f` in the last."""
    script = (
        "import os, sys\n"
        "os.chdir(sys.argv[1])\n"
        f"for _ in range({levels}):\n    os.mkdir('d' * 200)\n    os.chdir('d' * 200)\n"
        "with open('f', 'w') as file:\n    file.write('12345')\n"
    )
    subprocess.run([sys.executable, "-c", script, str(top)], check=True)


@EXT4
@pytest.mark.parametrize("levels", [19, 25], ids=["nearly PATH_MAX", "beyond PATH_MAX"])
def test_no_path_is_too_long_to_be_told(levels: int, files: Fanotify, stick: Path, tmp_path: Path) -> None:
    folder = tmp_path / "p"
    folder.mkdir()
    deep(folder, levels)
    try:
        files.watch_tree(str(folder))
        files.watch_medium(str(stick), alone=True)
        reader = f"cd {folder}; for i in $(seq {levels}); do cd -P {'d' * 200} 2>/dev/null || cd {'d' * 200}; done; cat f"
        subprocess.run(["bash", "-c", reader], check=True, capture_output=True)
        (opened,) = told(files, Opened)
        assert opened.path.startswith(f"{folder}/") and opened.path.endswith("/f") and len(opened.path) > 3000
        deep(stick, levels)
        (closed,) = told(files, Closed)
        assert closed.path.startswith(f"{stick}/") and closed.path.endswith("/f") and len(closed.path) > 3000
        assert isinstance(closed, Closed) and closed.size == 5
        assert ("/…/" in closed.path) == ("/…/" in opened.path) == (levels > 19)
    finally:
        run(f"rm -rf {folder}")


@pytest.mark.parametrize(("owner", "views"), [(0, ["/home/mallory/m"]), (1001, [])])
def test_what_a_user_mounted_is_no_view_of_the_protected_directory(tmp_path: Path, owner: int, views: list[str]) -> None:
    (tmp_path / "self").mkdir()
    line = f"77 1 0:52 / /home/mallory/m rw - fuse.bindfs /srv/customers rw,user_id={owner},group_id=0"
    (tmp_path / "self" / "mountinfo").write_text(line)
    mounts = Mounts(str(tmp_path))
    list(mounts.drain(0))
    assert mounts.views(["/srv/customers"]) == views
    mounts.close()
