"""Stories of protected files that leave: by every common program, and told once per source and destination."""

import pytest
from workstation import PHONE, ROOT, STICK, Workstation

from agent.core import facts
from agent.core.facts import OpenFile


@pytest.fixture
def ws() -> Workstation:
    return Workstation().login("sato").plug()


@pytest.mark.parametrize("by", ["cp", "cat", "dd", "python", "mv", "install", "rsync"])
def test_a_plain_copy_is_told_with_file_bytes_person_and_medium(ws, by):
    ws.copy("customers/a.csv", by=by)
    ws.wait(1)
    event = ws.only("file.copied_out")
    assert event.source["path"] == f"{ROOT}/a.csv" and event.bytes == 300_000
    assert event["file"]["path"] == event.dest["path"] == "/media/Kingston/a.csv"
    assert event.login_user == "sato" and event["actor"]["user"] == {"uid": "1000", "name": "sato"}
    assert event.medium["key"] == "usb:0951:1666:60A44C413F8CF320" and event.medium["mount"] == "/media/Kingston"
    assert event.link == ("pipeline" if by == "rsync" else "process") and event.confidence >= 0.85
    assert event.protected == {"path": ROOT, "label": "顧客マスタ", "rel": "a.csv"}
    ws.none("file.written")


def test_a_plain_copy_is_told_at_its_close_not_later(ws):
    ws.copy("customers/a.csv", by="cp")
    assert ws.only("file.copied_out")["time"] == ws.now


def test_a_copy_under_another_name_joins_by_size(ws):
    ws.copy("customers/a.csv", by="cat", to="/media/Kingston/holiday.jpg")
    ws.wait(1)
    assert ws.only("file.copied_out").dest["path"] == "/media/Kingston/holiday.jpg"


def test_the_same_file_twice_by_one_process_is_two_copies(ws):
    python = ws.run("python3")
    for name in ("one.csv", "two.csv"):
        python.read("a.csv").create(f"{ws.stick}/{name}").close(f"{ws.stick}/{name}", 300_000)
    ws.wait(1)
    assert [event.dest["path"] for event in ws.all("file.copied_out")] == ["/media/Kingston/one.csv", "/media/Kingston/two.csv"]
    assert ws.sources() == ["a.csv", "a.csv"]


def test_tar_to_gzip_by_a_pipe_names_each_file_in_the_archive(ws):
    gzip = ws.run("bash", pipes=[901])
    tar = ws.run("tar", "c", ROOT, pipes=[901])
    gzip.create(f"{ws.stick}/x.tgz").seen(exe="/usr/bin/gzip", argv=["gzip"])
    tar.read("a.csv").read("b.csv").end()
    ws.wait(2)
    gzip.close(f"{ws.stick}/x.tgz", 90_000).end()
    ws.wait(1)
    assert sorted(ws.sources()) == ["a.csv", "b.csv"]
    assert {event.link for event in ws.all("file.copied_out")} == {"pipeline"}
    assert sorted(event.bytes for event in ws.all("file.copied_out")) == [200_000, 300_000]


def test_tar_czf_whose_child_writes(ws):
    tar = ws.run("tar", "czf", "x.tgz", ROOT)
    gzip = tar.child("/usr/bin/gzip")
    gzip.create(f"{ws.stick}/x.tgz")
    tar.read("a.csv").read("b.csv")
    gzip.close(f"{ws.stick}/x.tgz", 90_000).end()
    tar.end()
    ws.wait(1)
    assert sorted(ws.sources()) == ["a.csv", "b.csv"]


def test_cat_of_two_files_whose_close_is_told_before_the_second_read(ws):
    """The kernel merges the destination's write and close into one record, queued at the first write."""
    cat = ws.run("bash").create(f"{ws.stick}/c").seen(exe="/usr/bin/cat")
    cat.read("a.csv").close(f"{ws.stick}/c", 500_000).read("b.csv").end()
    ws.wait(1)
    assert sorted(ws.sources()) == ["a.csv", "b.csv"]


def test_each_file_zipped_by_one_program_in_one_batch_joins_its_own_source(ws):
    python = ws.run("python3")
    for name in ("a.csv", "b.csv"):
        python.read(name).create(f"{ws.stick}/{name}.gz").close(f"{ws.stick}/{name}.gz", 60_000)
    ws.wait(1)
    pairs = [(event.source["path"], event.dest["path"]) for event in ws.all("file.copied_out")]
    assert pairs == [(f"{ROOT}/{name}", f"{ws.stick}/{name}.gz") for name in ("a.csv", "b.csv")]


def test_written_from_memory_after_a_while(ws):
    python = ws.run("python3").read("a.csv")
    ws.wait(30)
    python.create(f"{ws.stick}/x").close(f"{ws.stick}/x", 300_000)
    ws.wait(1)
    assert ws.only("file.copied_out").link == "process"


def test_rsync_of_many_files_names_each_by_its_final_name(ws):
    sources = [ws.file(f"{ROOT}/d/{number}.csv", 10_000) for number in range(50)]
    ws.rsync(sources)
    ws.wait(1)
    told = [
        (event.source["path"].rpartition("/")[2], event.dest["path"].rpartition("/")[2]) for event in ws.all("file.copied_out")
    ]
    assert told == [(f"{number}.csv", f"{number}.csv") for number in range(50)]


def test_rsync_whose_size_could_only_be_looked_up_after_the_rename(ws):
    sender = ws.run("rsync").read("a.csv")
    receiver = sender.child("/usr/bin/rsync").child("/usr/bin/rsync")
    receiver.create(f"{ws.stick}/.a.csv.Q").close(f"{ws.stick}/.a.csv.Q", None)
    ws.sizes[f"{ws.stick}/.a.csv.Q"] = 300_000
    receiver.rename(f"{ws.stick}/.a.csv.Q", f"{ws.stick}/a.csv")
    assert ws.only("file.copied_out").bytes == 300_000


def test_a_browsers_temporary_name_gives_way_to_the_final_one(ws):
    browser = ws.run("firefox").read("a.csv").create(f"{ws.stick}/x.part").close(f"{ws.stick}/x.part", 290_000)
    browser.rename(f"{ws.stick}/x.part", f"{ws.stick}/x.bin")
    assert ws.only("file.copied_out").dest["path"] == f"{ws.stick}/x.bin"


def test_a_directory_renamed_on_the_medium_while_a_file_in_it_settles(ws):
    program = ws.run("zip").read("a.csv").create(f"{ws.stick}/d/x.zip").close(f"{ws.stick}/d/x.zip", 90_000)
    moved = facts.Moved(at_ms=ws.now, pid=program.pid, key=b"dir", path=f"{ws.stick}/e", old_path=f"{ws.stick}/d", is_dir=True)
    ws.tell(moved).wait(1)
    assert ws.only("file.copied_out").dest["path"] == f"{ws.stick}/e/x.zip"


def test_a_hard_link_is_its_origin(ws):
    ws.keys["/tmp/x"], ws.sizes["/tmp/x"] = ws.keys[f"{ROOT}/a.csv"], 300_000
    ws.tell(facts.Attributes(at_ms=ws.now, pid=0, key=ws.keys["/tmp/x"], path=f"{ROOT}/a.csv", links=2))
    ws.copy("/tmp/x")
    event = ws.only("file.copied_out")
    assert event.source["path"] == f"{ROOT}/a.csv" and event.source["via"] == ["/tmp/x"] and event.link == "lineage"


def test_moved_out_and_then_copied_after_a_restart_of_the_agent(ws):
    ws.mark(f"{ROOT}/a.csv")
    ws.run("mv").rename(f"{ROOT}/a.csv", "/home/sato/a.csv").end()
    ws.restart().plug(cold=True)
    ws.copy("/home/sato/a.csv")
    assert ws.only("file.copied_out").source == {
        "path": f"{ROOT}/a.csv",
        "size": 300_000,
        "inode": ws.only("file.copied_out").source["inode"],
        "via": ["/home/sato/a.csv"],
    }


def test_a_whole_directory_moved_out_keeps_its_files_protected(ws):
    path = ws.file(f"{ROOT}/2014/06.csv", 70_000)
    moved = facts.Moved(at_ms=ws.now, pid=1, key=b"dir", path="/home/sato/x", old_path=f"{ROOT}/2014", is_dir=True)
    ws.tell(moved).mark(path)
    ws.keys["/home/sato/x/06.csv"], ws.sizes["/home/sato/x/06.csv"] = ws.keys.pop(path), ws.sizes.pop(path)
    ws.copy("/home/sato/x/06.csv")
    assert ws.only("file.copied_out").source["path"] == path


def test_renamed_onto_a_folder_medium_of_the_same_file_system(ws):
    ws.run("mv").rename(f"{ROOT}/a.csv", f"{ws.stick}/a.csv")
    event = ws.only("file.copied_out")
    assert event.source["path"] == f"{ROOT}/a.csv" and event.bytes == 300_000 and event.confidence == 1.0


def test_a_hard_link_made_on_a_folder_medium(ws):
    key = ws.keys[f"{ROOT}/a.csv"]
    ws.tell(facts.Attributes(at_ms=ws.now, pid=0, key=key, path=f"{ROOT}/a.csv", links=2))
    ws.tell(facts.Created(at_ms=ws.now, pid=ws.shell.pid, key=key, path=f"{ws.stick}/a.csv"))
    assert ws.only("file.copied_out").source["path"] == f"{ROOT}/a.csv"


def test_a_stick_pulled_in_mid_copy_tells_what_had_arrived(ws):
    cp = ws.run("cp").read("a.csv").create(f"{ws.stick}/a.csv")
    ws.tell(facts.Grown(at_ms=ws.now, pid=cp.pid, key=ws.keys[f"{ws.stick}/a.csv"], path=f"{ws.stick}/a.csv", size=100_000))
    ws.unplug()
    assert ws.only("file.copied_out").bytes == 100_000
    codes = [event.code for event in ws.events]
    assert codes.index("file.copied_out") < codes.index("medium.detached") < codes.index("medium.unmounted")


def test_a_copy_cut_off_by_the_user_counts_what_arrived(ws):
    ws.run("cp").read("a.csv").create(f"{ws.stick}/a.csv").close(f"{ws.stick}/a.csv", 4_096)
    ws.wait(1)
    assert ws.only("file.copied_out").bytes == 4_096


def test_a_stick_mounted_twice_tells_the_mount_that_was_written_by(ws):
    ws.mount(STICK, "/mnt/again")
    ws.copy("a.csv", to="/mnt/again/a.csv")
    assert ws.only("file.copied_out").medium["mount"] == "/mnt/again"
    assert {watch.mount for watch in ws.core.watches()} == {"/media/Kingston", "/mnt/again"}


def test_a_medium_mounted_below_the_protected_directory_is_a_medium(ws):
    ws.mount(STICK, f"{ROOT}/stick")
    ws.copy("a.csv", to=f"{ROOT}/stick/a.csv")
    assert ws.only("file.copied_out").dest["path"] == f"{ROOT}/stick/a.csv"


def test_a_copy_in_another_mount_namespace(ws):
    fact = facts.Mounted(at_ms=ws.now, mount_id=7, dev="8:17", mount="/mnt/x", namespace=4026532, reach="/proc/77/root/mnt/x")
    ws.tell(fact)
    ws.copy("a.csv", to="/proc/77/root/mnt/x/a.csv")
    assert ws.only("file.copied_out").dest["path"] == "/mnt/x/a.csv"
    assert "/proc/77/root/mnt/x" in {watch.reach for watch in ws.core.watches()}


def test_copies_of_many_files_join_one_to_one(ws):
    sources = [ws.file(f"{ROOT}/{number % 9}/{number % 40}.csv", 1_000 + number % 3) for number in range(300)]
    cp = ws.run("cp", "-r")
    for source in sources:
        cp.copy(source, ws.stick + source.removeprefix(ROOT))
    ws.wait(1)
    assert len(ws.sources()) == 300
    assert all(
        event.source["path"].removeprefix(ROOT) == event.dest["path"].removeprefix(ws.stick)
        for event in ws.all("file.copied_out")
    )


def test_two_people_at_once_while_a_backup_reads_everything(ws):
    backup = ws.program("/usr/bin/restic", uid=0, user="root")
    first = ws.run("cp")
    second = ws.login("tanaka", 1001).run("cp")
    ws.plug(PHONE)
    for name in ("a.csv", "b.csv"):
        backup.read(name)
    first.read("a.csv").create("/media/Kingston/a.csv")
    second.read("a.csv").create("/media/Google/a.csv")
    backup.read("a.csv")
    first.close("/media/Kingston/a.csv", 300_000)
    second.close("/media/Google/a.csv", 300_000)
    ws.wait(1)
    told = {(event.login_user, event.medium["kind"]) for event in ws.all("file.copied_out")}
    assert told == {("sato", "storage"), ("tanaka", "phone")} and len(ws.all("file.copied_out")) == 2


def test_an_unknown_program_that_read_and_wrote_is_told_without_a_person(ws):
    ws.tell(facts.Opened(at_ms=ws.now, pid=7777, key=b"k", path=f"{ROOT}/a.csv", size=300_000))
    ws.tell(facts.Created(at_ms=ws.now, pid=7777, key=b"d", path=f"{ws.stick}/a.csv"))
    ws.tell(facts.Closed(at_ms=ws.now, pid=7777, key=b"d", path=f"{ws.stick}/a.csv", size=300_000))
    event = ws.only("file.copied_out")
    assert event.attribution == "unknown" and event["actor"] == {"process": {"pid": 7777}} and event.login is None


def test_without_any_process_a_join_is_by_time_and_never_sure(ws):
    """Inotify names nobody."""
    ws.tell(facts.Opened(at_ms=ws.now, pid=0, key=b"k", path=f"{ROOT}/a.csv", size=300_000))
    ws.tell(facts.Created(at_ms=ws.now, pid=0, key=b"d", path=f"{ws.stick}/a.csv"))
    ws.tell(facts.Closed(at_ms=ws.now, pid=0, key=b"d", path=f"{ws.stick}/a.csv", size=300_000)).wait(1)
    event = ws.only("file.copied_out")
    assert event.link == "time" and event.confidence <= 0.5 and event["actor"] == {"app_name": "Sekisho"}


def test_a_file_found_after_an_overflow_joins_by_time(ws):
    ws.run("cp").read("a.csv").end()
    ws.tell(facts.Found(at_ms=ws.now, pid=0, key=b"d", path=f"{ws.stick}/a.csv", size=300_000)).wait(2)
    event = ws.only("file.copied_out")
    assert (event.link, event.attribution) == ("time", "unknown") and "user" not in event["actor"]


def test_found_first_and_closed_later_is_one_copy(ws):
    """In a new directory the first file is found by looking; its close may be told as well."""
    cp = ws.run("cp", "-r").read("a.csv")
    ws.file(f"{ws.stick}/d/a.csv", 300_000)
    key = ws.keys[f"{ws.stick}/d/a.csv"]
    ws.tell(facts.Found(at_ms=ws.now, pid=cp.pid, key=key, path=f"{ws.stick}/d/a.csv", size=300_000))
    cp.close(f"{ws.stick}/d/a.csv", 300_000)
    ws.wait(5)
    cp.close(f"{ws.stick}/d/a.csv", 300_000)
    ws.wait(5)
    assert ws.only("file.copied_out").login_user == "sato"
    ws.none("file.written")


def test_an_archive_of_very_many_files_is_handed_out_in_portions(ws):
    tar = ws.run("tar").create(f"{ws.stick}/x.tar")
    total = 0
    for number in range(2_500):
        total += ws.sizes[ws.file(f"{ROOT}/m/{number}", 100 + number)]
        ws.core.feed(facts.Opened(at_ms=ws.now, pid=tar.pid, key=b"%d" % number, path=f"{ROOT}/m/{number}", size=100 + number))
    ws.core.feed(
        facts.Closed(at_ms=ws.now, pid=tar.pid, key=ws.keys[f"{ws.stick}/x.tar"], path=f"{ws.stick}/x.tar", size=total)
    )
    first = ws.core.feed(facts.Tick(at_ms=ws.now + 400))
    assert ws.core.due_ms is not None
    second = ws.core.feed(facts.Tick(at_ms=ws.now + 500))
    left = [event for event in first + second if event.metadata.event_code == "file.copied_out"]
    assert len(left) == 2_500 and len(first) < 2_200 and ws.core.due_ms is None


def _grove(ws: Workstation, folders: int = 40, files: int = 60) -> list[str]:
    """A tree in which every directory holds the same names, of equal sizes, some of them empty."""
    return [
        ws.file(f"{ROOT}/d{number // 8}/s{number % 8}/f{file}", 0 if file % 7 == 3 else 1_000 + file % 2)
        for number in range(folders)
        for file in range(files)
    ]


def _pairs(ws: Workstation) -> list[tuple[str, str]]:
    told = ws.all("file.copied_out")
    return [(event.source["path"].removeprefix(ROOT), event.dest["path"].removeprefix(ws.stick)) for event in told]


def test_cp_of_a_tree_of_equal_names_and_sizes_names_the_right_source_of_each(ws):
    cp = ws.run("cp", "-r", ROOT)
    sources = _grove(ws)
    for source in sources:
        to = ws.stick + source.removeprefix(ROOT)
        cp.read(source).create(to).close(to, ws.sizes[source])
    ws.wait(1)
    assert _pairs(ws) == [(path.removeprefix(ROOT),) * 2 for path in sources]
    assert {event.confidence for event in ws.all("file.copied_out")} == {0.95}


def test_cp_told_by_the_kernel_in_bulk_of_a_tree_of_equal_names(ws):
    """Many opens, then many closes: only the paths tell which is which."""
    cp = ws.run("python3", "parallel-copy")
    sources = _grove(ws, folders=12)
    for source in sources:
        cp.read(source)
    for source in reversed(sources):
        to = ws.stick + source.removeprefix(ROOT)
        cp.create(to).close(to, ws.sizes[source])
    ws.wait(1)
    assert sorted(_pairs(ws)) == sorted((path.removeprefix(ROOT),) * 2 for path in sources)


def test_rsync_of_a_tree_of_equal_names(ws):
    sender = ws.run("rsync", "-a", ROOT, ws.stick)
    receiver = sender.child("/usr/bin/rsync").child("/usr/bin/rsync")
    sources = _grove(ws, folders=16)
    for source in sources:
        sender.read(source)
    for source in sources:
        folder, _, name = source.removeprefix(ROOT).rpartition("/")
        temp = f"{ws.stick}{folder}/.{name}.Xy12Zq"
        receiver.create(temp).close(temp, ws.sizes[source]).rename(temp, f"{ws.stick}{folder}/{name}")
    ws.wait(1)
    assert sorted(_pairs(ws)) == sorted((path.removeprefix(ROOT),) * 2 for path in sources)


def test_mv_of_a_tree_of_equal_names_whose_sources_are_gone_when_they_are_looked_up(ws):
    mv = ws.run("mv", ROOT, ws.stick)
    sources = _grove(ws, folders=8)
    sizes = dict(ws.sizes)
    for source in sources:
        mv.read(source)
        ws.sizes.pop(source)
    for source in sources:
        to = ws.stick + source.removeprefix(ROOT)
        mv.create(to).close(to, sizes[source])
        mv.delete(source)
    ws.wait(1)
    assert sorted(_pairs(ws)) == sorted((path.removeprefix(ROOT),) * 2 for path in sources)
    assert all(event.confidence <= 0.8 for event in ws.all("file.copied_out")), "the size was never seen"


def test_tar_of_a_tree_of_equal_names_names_each_file_once(ws):
    gzip = ws.run("bash", pipes=[901])
    tar = ws.run("tar", "c", ROOT, pipes=[901])
    sources = _grove(ws)
    gzip.create(f"{ws.stick}/x.tgz").seen(exe="/usr/bin/gzip", argv=["gzip"])
    for source in sources:
        tar.read(source)
    gzip.close(f"{ws.stick}/x.tgz", 900_000).end()
    ws.wait(2)
    assert sorted(event.source["path"] for event in ws.all("file.copied_out")) == sorted(sources)
    assert sum(event.bytes for event in ws.all("file.copied_out")) == sum(ws.sizes[source] for source in sources)


def test_an_archive_written_anew_over_the_one_before_is_a_copy_too(ws):
    for number, size in enumerate((90_000, 60_000, 150_000)):
        tar = ws.run("tar", "czf", "x.tgz", ROOT)
        gzip = tar.child("/usr/bin/gzip")
        if number == 0:
            gzip.create(f"{ws.stick}/x.tgz")
        tar.read("a.csv").read("b.csv")
        gzip.close(f"{ws.stick}/x.tgz", size).end()
        tar.end()
        ws.wait(5)
    assert sorted(ws.sources()) == ["a.csv"] * 3 + ["b.csv"] * 3


def test_an_archive_written_over_one_that_was_on_the_stick_already(ws):
    ws.file(f"{ws.stick}/x.tgz", 80_000)
    ws.run("tar", "czf", "x.tgz").read("a.csv").read("b.csv").close(f"{ws.stick}/x.tgz", 90_000).end()
    ws.wait(1)
    assert sorted(ws.sources()) == ["a.csv", "b.csv"]
    assert {event.confidence for event in ws.all("file.copied_out")} == {0.4}, "it may have grown by a little only"


# -- innocent doings ---------------------------------------------------------------------------------------------------


def test_a_count_of_protected_lines_is_not_a_copy(ws):
    cat = ws.run("cat", pipes=[77]).read("a.csv")
    ws.run("wc", pipes=[77]).create(f"{ws.stick}/count").close(f"{ws.stick}/count", 7)
    cat.end()
    ws.wait(1).none("file.copied_out").only("file.written")


def test_a_checksum_list_is_not_a_copy(ws):
    ws.run("md5sum").create(f"{ws.stick}/sums").read("a.csv").close(f"{ws.stick}/sums", 60)
    ws.wait(1).none("file.copied_out")


def test_a_log_line_of_a_program_that_read_protected_files(ws):
    ws.run("python3").read("a.csv").create(f"{ws.stick}/log").close(f"{ws.stick}/log", 120)
    ws.wait(1).none("file.copied_out")


@pytest.mark.parametrize("known", [False, True])
def test_a_line_added_to_a_log_on_the_stick_after_reading_is_never_sure(ws, known):
    path = ws.file(f"{ws.stick}/app.log", 100_000)
    if known:
        ws.run("python3").create(path).close(path, 100_000).end()
        ws.wait(5)
    ws.run("python3").read("a.csv").close(path, 100_120).end()
    ws.wait(1)
    assert all(event.confidence <= 0.4 for event in ws.all("file.copied_out"))


def test_a_file_manager_that_looked_at_a_protected_file_and_copies_another(ws):
    manager = ws.run("nautilus").read("a.csv")
    holiday = OpenFile("/home/sato/holiday.jpg", 5_000_000)
    manager.seen(files=[holiday]).create(f"{ws.stick}/holiday.jpg").close(f"{ws.stick}/holiday.jpg", 5_000_000)
    ws.wait(1).none("file.copied_out")
    assert ws.only("file.written")["file"]["name"] == "*.jpg"


def test_a_file_manager_that_looked_long_ago_at_little_and_writes_much(ws):
    manager = ws.run("nautilus").read("a.csv")
    ws.wait(120)
    manager.create(f"{ws.stick}/film.mkv").close(f"{ws.stick}/film.mkv", 900_000_000)
    ws.wait(1).none("file.copied_out")


def test_mixed_copies_by_one_process_join_only_their_own(ws):
    cp = ws.run("cp")
    cp.seen(files=[OpenFile("/home/sato/holiday.jpg", 5_000_000)])
    cp.create(f"{ws.stick}/holiday.jpg").close(f"{ws.stick}/holiday.jpg", 5_000_000)
    cp.copy("a.csv")
    cp.create(f"{ws.stick}/notes.txt").close(f"{ws.stick}/notes.txt", 20_000)
    ws.wait(1)
    assert ws.sources() == ["a.csv"] and len(ws.all("file.written")) == 2


def test_two_sessions_one_reads_the_other_copies_its_own(ws):
    ws.run("less").read("a.csv")
    ws.login("tanaka", 1001).run("cp").create(f"{ws.stick}/x").close(f"{ws.stick}/x", 300_001)
    ws.wait(1).none("file.copied_out")


def test_a_pipe_that_a_whole_build_inherited_links_nobody(ws):
    make = ws.run("make", pipes=[55])
    ws.wait(5)
    grep = make.child("/usr/bin/grep", pipes=[55]).read("a.csv")
    make.child("/usr/bin/strip", pipes=[55]).create(f"{ws.stick}/tool").close(f"{ws.stick}/tool", 280_000)
    grep.end()
    ws.wait(1).none("file.copied_out")


def test_reading_and_listing_alone_says_nothing(ws):
    for _ in range(5):
        ws.run("less").read("a.csv").end()
    before = len(ws.events)
    ws.wait(5)
    assert len(ws.events) == before


def test_touching_a_copied_file_again_tells_nothing_new(ws):
    ws.copy("a.csv")
    ws.run("touch").close(f"{ws.stick}/a.csv", 300_000).end()
    ws.wait(2).only("file.copied_out")
    ws.none("file.written")


# -- privacy -----------------------------------------------------------------------------------------------------------


def test_of_a_private_file_only_extension_and_size_are_written(ws):
    ws.run("cp", "/home/sato/Letter to Hanako.odt", ws.stick).create(f"{ws.stick}/Letter to Hanako.odt").close(
        f"{ws.stick}/Letter to Hanako.odt", 8_000
    )
    ws.wait(1)
    event = ws.only("file.written")
    assert event["file"]["name"] == "*.odt" and event["file"]["size"] == 8_000
    assert b"Hanako" not in ws.raw[ws.events.index(event)]


def test_a_site_may_record_names():
    ws = Workstation(record_names=True).login("sato").plug()
    ws.run("cp").create(f"{ws.stick}/x.odt").close(f"{ws.stick}/x.odt", 8_000)
    ws.wait(1)
    assert ws.only("file.written")["file"]["path"] == f"{ws.stick}/x.odt"


def test_secrets_on_a_command_line_are_masked(ws):
    said = ["--password", "hunter2", "--token=abc", "https://u:pw@h/x", "AKIAIOSFODNN7EXAMPLE", "-pq", "PGPASSWORD=x"]
    ws.run("mysql", *said).copy("a.csv")
    argv = ws.only("file.copied_out").process["argv"]
    assert argv == ["mysql", "--password", "***", "--token=***", "https://u:***@h/*", "AKIAIOSF***", "-p***", "PGPASSWORD=***"]
