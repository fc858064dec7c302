"""Stories of copies whose reader and writer are not one: inherited descriptors, pipes, decoys, moved-out files, pieces."""

import pytest
from workstation import ROOT, Workstation

from agent.core import facts
from agent.core.facts import OpenFile


@pytest.fixture
def ws() -> Workstation:
    return Workstation().login("sato").plug()


def _files(ws: Workstation, count: int, size: int = 10_000) -> list[str]:
    return [ws.file(f"{ROOT}/m/{number}.csv", size + number) for number in range(count)]


# -- the parent holds the destination --------------------------------------------------------------------------------------


def test_a_loop_of_cats_into_one_file_names_each(ws):
    """`for f in *.csv; do cat $f; done > all`: the shell opens and closes, its children read; most were seen too late."""
    shell, to = ws.run("bash", "-c", "for …"), f"{ws.stick}/all"
    sources = _files(ws, 100)
    shell.create(to)
    for source in sources:
        shell.child("", known="cached").read(source).end()
        ws.wait(0.05)
    shell.close(to, sum(ws.sizes[source] for source in sources)).end()
    ws.wait(1)
    assert sorted(event.source["path"] for event in ws.all("file.copied_out")) == sorted(sources)
    assert {(event.link, event.confidence) for event in ws.all("file.copied_out")} == {("pipeline", 0.7)}


def test_a_reader_that_was_seen_to_hold_the_destination_is_surer(ws):
    shell, to = ws.run("bash"), f"{ws.stick}/x"
    shell.create(to)
    shell.child("/usr/bin/cat", files=[OpenFile(to, 0, ws.keys[to])]).read("a.csv").end()
    shell.child("/usr/bin/cat", files=[OpenFile(to, 0, ws.keys[to])]).read("b.csv").end()
    shell.close(to, 500_000)
    ws.wait(1)
    assert sorted(ws.sources()) == ["a.csv", "b.csv"]
    assert {event.confidence for event in ws.all("file.copied_out")} == {0.85}


def test_a_descriptor_that_a_sleeping_child_closes_last(ws):
    shell, to = ws.run("bash"), f"{ws.stick}/x"
    shell.create(to)
    sleep = shell.child("/usr/bin/sleep", "3")
    shell.child("/usr/bin/cat").read("b.csv").end()
    ws.wait(3)
    sleep.close(to, 200_000)
    ws.wait(1)
    assert ws.sources() == ["b.csv"]


def test_xargs_whose_grandchildren_read(ws):
    xargs, to = ws.run("xargs", "-n1", "sh"), f"{ws.stick}/x"
    xargs.create(to)
    xargs.child("/usr/bin/dash").child("", known="cached").read("a.csv").end()
    ws.wait(5)
    xargs.child("/usr/bin/dash").child("", known="cached").read("b.csv").end()
    xargs.close(to, 500_000)
    ws.wait(1)
    assert sorted(ws.sources()) == ["a.csv", "b.csv"]


def test_a_subshell_into_a_pipe_names_all_that_its_children_read(ws):
    """`(cat a; cat b) | cat > x`: the subshell becomes the last cat."""
    subshell, to = ws.run("bash", pipes=[901]), f"{ws.stick}/x"
    writer = ws.run("cat", pipes=[901]).create(to)
    subshell.child("", known="cached").read("a.csv").end()
    subshell.seen(exe="/usr/bin/cat").read("b.csv").end()
    writer.close(to, 500_000)
    ws.wait(1)
    assert sorted(ws.sources()) == ["a.csv", "b.csv"]


def test_what_a_command_substitution_read_is_in_what_its_shell_wrote(ws):
    """`x=$(base64 a); echo "$x" > var`"""
    shell = ws.run("bash")
    shell.child("/usr/bin/base64", pipes=[5], files=[OpenFile(f"{ROOT}/a.csv", 300_000)]).read("a.csv").end()
    shell.create(f"{ws.stick}/var").close(f"{ws.stick}/var", 405_000)
    ws.wait(1)
    assert ws.sources() == ["a.csv"]


def test_a_shell_that_writes_its_own_while_its_old_viewer_is_open(ws):
    ws.shell.child("/usr/bin/less").read("a.csv")
    ws.wait(5)
    ws.shell.create(f"{ws.stick}/notes").close(f"{ws.stick}/notes", 100_000)
    ws.wait(1).none("file.copied_out")


def test_a_log_of_a_script_whose_child_reads_into_another_file(ws):
    script, log = ws.run("bash"), f"{ws.stick}/log"
    script.create(log)
    script.child("/usr/bin/cat", files=[OpenFile(f"{ROOT}/a.csv", 300_000), OpenFile("/tmp/out", 0)]).read("a.csv").end()
    script.close(log, 280_000)
    ws.wait(1).none("file.copied_out")


# -- pipes -----------------------------------------------------------------------------------------------------------------


def test_the_other_end_of_a_pipe_ended_before_anyone_could_look(ws):
    """`tar c a b | gzip > x` as recorded: of tar only its pid and its parent are known."""
    shell = ws.run("sh")
    ws.tell(facts.Tick(at_ms=ws.now))
    gzip = shell.child("/usr/bin/dash", pipes=[7])
    tar = shell.child("", known="cached")
    gzip.create(f"{ws.stick}/x.tgz").close(f"{ws.stick}/x.tgz", 90_000)
    tar.read("a.csv").read("b.csv")
    ws.wait(1)
    assert sorted(ws.sources()) == ["a.csv", "b.csv"]
    assert all(event.link == "pipeline" and event.confidence <= 0.7 for event in ws.all("file.copied_out"))


def test_a_stage_between_that_opens_no_file(ws):
    """`cat a | base64 | split`: nobody tells base64, so the two ends share no pipe."""
    cat = ws.run("cat", pipes=[21]).read("a.csv")
    ws.run("split", pipes=[22]).create(f"{ws.stick}/x").close(f"{ws.stick}/x", 405_000)
    cat.end()
    ws.wait(1)
    event = ws.only("file.copied_out")
    assert event.link == "pipeline" and event.confidence <= 0.7


def test_without_a_pipe_a_sibling_that_read_is_nobody(ws):
    ws.run("", known="cached").read("a.csv")
    ws.run("python3").create(f"{ws.stick}/x").close(f"{ws.stick}/x", 280_000)
    ws.wait(1).none("file.copied_out")


def test_dead_copiers_that_held_the_same_inherited_pipe_are_no_pipeline(ws):
    """A script's children all have its output pipe; one of them writes what it was not seen to read."""
    script = ws.run("python3", "loop")
    for number in range(11):
        source = ws.file(f"{ROOT}/s/{number}", 20_000 + number)
        cp = script.child("/usr/bin/cp", pipes=[66])
        cp.copy(source) if number % 2 else cp.read(source)
        cp.end()
        ws.wait(0.1)
    before = len(ws.all("file.copied_out"))
    script.child("/usr/bin/cp", pipes=[66]).create(f"{ws.stick}/z").close(f"{ws.stick}/z", 20_000)
    ws.wait(1)
    assert len(ws.all("file.copied_out")) == before == 5


def test_what_a_copier_wrote_itself_is_not_offered_to_its_sibling(ws):
    script = ws.run("python3", "loop")
    script.child("/usr/bin/cp", pipes=[66]).copy("a.csv").end()
    script.child("/usr/bin/cp", pipes=[66]).create(f"{ws.stick}/z").close(f"{ws.stick}/z", 300_000)
    ws.wait(1)
    assert len(ws.all("file.copied_out")) == 1


# -- decoys, and other names -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arrived", [300_000, 290_000])
def test_a_decoy_of_the_same_size_hides_nothing(ws, arrived):
    shell = ws.run("bash", files=[OpenFile("/home/sato/decoy", arrived, b"decoy")])
    shell.create(f"{ws.stick}/x").seen(exe="/usr/bin/cat").read("a.csv").close(f"{ws.stick}/x", arrived)
    ws.wait(1)
    event = ws.only("file.copied_out")
    assert event.source["path"] == f"{ROOT}/a.csv" and event.confidence == 0.5


def test_moved_out_and_copied_under_another_name(ws):
    ws.mark(f"{ROOT}/a.csv")
    ws.run("mv").rename(f"{ROOT}/a.csv", "/home/sato/m").end()
    ws.wait(7)
    ws.copy("/home/sato/m", to=f"{ws.stick}/x")
    ws.wait(1)
    event = ws.only("file.copied_out")
    assert event.source["path"] == f"{ROOT}/a.csv" and event.source["via"] == ["/home/sato/m"] and event.link == "lineage"


def test_a_hard_link_copied_under_another_name(ws):
    ws.keys["/tmp/h"], ws.sizes["/tmp/h"] = ws.keys[f"{ROOT}/a.csv"], 300_000
    ws.tell(facts.Attributes(at_ms=ws.now, pid=0, key=ws.keys["/tmp/h"], path=f"{ROOT}/a.csv", links=2))
    ws.copy("/tmp/h", to=f"{ws.stick}/x")
    ws.wait(1)
    assert ws.sources() == ["a.csv"]


def test_a_directory_moved_out_twice_and_a_file_of_it_copied_under_another_name(ws):
    path = ws.file(f"{ROOT}/2014/06.csv", 70_000)
    ws.mark(path)
    steps = [(f"{ROOT}/2014", "/home/sato/x"), ("/home/sato/x", "/home/sato/y")]
    for old, new in steps:
        ws.tell(facts.Moved(at_ms=ws.now, pid=1, key=b"dir", path=new, old_path=old, is_dir=True))
    ws.keys["/home/sato/y/06.csv"], ws.sizes["/home/sato/y/06.csv"] = ws.keys.pop(path), ws.sizes.pop(path)
    ws.copy("/home/sato/y/06.csv", to=f"{ws.stick}/z")
    ws.wait(1)
    event = ws.only("file.copied_out")
    assert event.source["path"] == path and event.source["via"] == ["/home/sato/y/06.csv"]


# -- sizes that nobody could look up ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "sure"), [("a.csv", 0.7), ("#1234", 0.5)])
def test_a_file_whose_size_could_not_be_looked_up(ws, name, sure):
    """O_TMPFILE and linkat(2), or renamed at once."""
    ws.run("python3").read("a.csv").create(f"{ws.stick}/{name}").close(f"{ws.stick}/{name}", None)
    ws.wait(1)
    event = ws.only("file.copied_out")
    assert event.source["path"] == f"{ROOT}/a.csv" and event.bytes == 300_000 and event.confidence == sure


# -- pieces ----------------------------------------------------------------------------------------------------------------


def test_split_into_small_pieces_counts_each_byte_once(ws):
    split = ws.run("split", "-b", "1000").read(ws.file(f"{ROOT}/d.csv", 80_021))
    sizes = [1_000] * 80 + [521]
    for number, size in enumerate(sizes):
        split.create(f"{ws.stick}/p.{number}").close(f"{ws.stick}/p.{number}", size)
    ws.wait(1)
    told = ws.all("file.copied_out")
    assert {event.source["path"] for event in told} == {f"{ROOT}/d.csv"}
    assert len({event.dest["path"] for event in told}) == len(told) == 81
    assert sum(event.bytes for event in told) == 80_021


def test_base64_in_pieces_by_a_pipe(ws):
    cat = ws.run("cat", pipes=[9]).read(ws.file(f"{ROOT}/c.csv", 70_003))
    split = ws.run("split", pipes=[9])
    rest = 94_566
    for number in range(24):
        split.create(f"{ws.stick}/p.{number}").close(f"{ws.stick}/p.{number}", min(rest, 4_000))
        rest -= 4_000
    cat.end()
    ws.wait(1)
    told = ws.all("file.copied_out")
    assert len(told) == 24 and sum(event.bytes for event in told) == 70_003


def test_a_program_that_made_an_archive_and_then_writes_its_own(ws):
    python = ws.run("python3").read("a.csv").create(f"{ws.stick}/x.zip").close(f"{ws.stick}/x.zip", 60_000)
    ws.wait(3)
    for number, size in enumerate((2_000, 9_000, 500)):
        python.create(f"{ws.stick}/{number}.txt").close(f"{ws.stick}/{number}.txt", size)
    ws.wait(1)
    assert len(ws.all("file.copied_out")) == 1


# -- by which end, and when it began ---------------------------------------------------------------------------------------


def test_the_way_of_the_bytes_goes_from_who_writes_a_named_pipe_to_who_reads_it(ws):
    ws.run("cat", pipes=["fifo:64:9"], ends=[2]).read("a.csv")
    ws.run("gzip", pipes=["fifo:64:9"], ends=[1]).create(f"{ws.stick}/x.gz").close(f"{ws.stick}/x.gz", 270_000)
    event = ws.wait(1).only("file.copied_out")
    assert event.link == "pipeline" and event.confidence > 0.7


def test_two_sockets_of_a_pair_hand_on_and_one_socket_held_twice_does_not(ws):
    ws.run("client", pipes=["unix:7:8"], ends=[1]).read("a.csv")
    ws.run("other", pipes=["unix:7:8"], ends=[1]).create(f"{ws.stick}/y").close(f"{ws.stick}/y", 270_000)
    ws.wait(1).none("file.copied_out")
    ws.run("server", pipes=["unix:7:8"], ends=[2]).create(f"{ws.stick}/x").close(f"{ws.stick}/x", 270_000)
    assert ws.wait(1).only("file.copied_out").link == "pipeline"


def test_who_writes_to_the_same_output_pipe_of_a_session_is_no_stage(ws):
    """Everything that a supervisor starts writes into its pipe; none of it reads there."""
    ws.run("grep", pipes=[66], ends=[2]).read("a.csv")
    ws.run("sort", pipes=[66], ends=[2]).create(f"{ws.stick}/x").close(f"{ws.stick}/x", 270_000)
    ws.wait(1).none("file.copied_out")


def test_a_stage_that_had_ended_before_the_next_was_forked(ws):
    """A busy machine: the shell comes to fork gzip when tar is done; the pipe keeps what tar wrote."""
    shell = ws.run("sh")
    tar = shell.child("", known="cached", began_ms=ws.now - 300, ended_ms=ws.now - 200).read("a.csv")
    gzip = shell.child("/usr/bin/gzip", pipes=[7], ends=[1], began_ms=ws.now - 100)
    gzip.create(f"{ws.stick}/x.gz").close(f"{ws.stick}/x.gz", 270_000)
    tar.end()
    assert ws.wait(1).only("file.copied_out").link == "pipeline"


def test_an_agent_that_comes_late_to_the_files(ws):
    """It is told of the processes, and comes to read of their files 800 ms later."""
    shell = ws.run("sh")
    gzip = shell.child("/usr/bin/gzip", pipes=[7], ends=[1], began_ms=ws.now)
    tar = shell.child("", known="cached", began_ms=ws.now)
    ws.now += 800
    tar.read("a.csv")
    gzip.create(f"{ws.stick}/x.gz").close(f"{ws.stick}/x.gz", 270_000)
    assert ws.wait(1).only("file.copied_out").link == "pipeline"


def test_a_command_before_it_in_a_script_fed_nobody(ws):
    """`grep … customers; sort other > x`: they follow each other, and share no pipe."""
    shell = ws.run("sh")
    shell.child("", known="cached", began_ms=ws.now - 500, ended_ms=ws.now - 300).read("a.csv").end()
    sort = shell.child("/usr/bin/sort", began_ms=ws.now - 100)
    sort.create(f"{ws.stick}/x").close(f"{ws.stick}/x", 270_000)
    ws.wait(1).none("file.copied_out")
