"""Reads of processes: what they cost, in which order they are found, and what is said of those that were forgotten."""

import gc
import tracemalloc

from hypothesis import given
from hypothesis import strategies as st
from workstation import ROOT, Workstation

from agent.core import facts, reads
from agent.core.reads import Reads


def test_50_000_reads_of_one_process_take_less_than_8_mib():
    folders = [f"/srv/customers/{year}/{branch:04d}/" for year in range(2000, 2020) for branch in range(50)]
    kept = Reads()
    gc.collect()
    tracemalloc.start()
    try:
        for number in range(50_000):
            if number % 500 == 0:  # one buffer of the kernel's has one time
                moment = (0, 1_767_225_600_000 + number)
            kept.add(7, folders[number // 50], "/srv/customers", f"record-{number:05d}.csv", None, moment)
        gc.collect()
        assert len(kept) == 50_000 and tracemalloc.get_traced_memory()[0] < 8 << 20
    finally:
        tracemalloc.stop()


def test_fresh_ones_come_first_and_those_opened_last_before_others():
    kept = Reads()
    for order, folder in enumerate(("/a/", "/b/", "/c/", "/d/")):
        kept.add(7, folder, "/", "same", (5, None), (order, 1))
    of = kept.of(7)
    assert of is not None
    by_folder = {read.folder.path: read for read in of.named("same")}
    kept.use(7, by_folder["/d/"])
    kept.add(7, "/a/", "/", "same", (5, None), (9, 1))
    kept.use(7, by_folder["/b/"])
    assert [read.folder.path for read in of.named("same")] == ["/a/", "/c/", "/b/"]
    assert [read.folder.path for read in of.sized(5)] == ["/a/", "/c/", "/b/"]
    assert of.beside("/m/x/c/", "same") is by_folder["/c/"] and of.beside("/m/x/b/", "same") is None, "that one was used"


steps = st.lists(
    st.tuples(
        st.sampled_from(["add", "add", "add", "use", "wake", "forget"]),
        st.integers(1, 3),
        st.sampled_from(["/a/", "/b/", "/c/d/"]),
        st.sampled_from(["x", "y", "z"]),
        st.none() | st.sampled_from([(0, 1), (5, 1), (5, None), (9, 2)]),
    ),
    max_size=60,
)


@given(steps)
def test_every_index_knows_the_same_reads_whatever_happened(story):
    kept = Reads()
    for order, (what, pid, folder, name, stat) in enumerate(story):
        if what == "add":
            kept.add(pid, folder, "/", name, stat, (order, order))
        elif what == "forget":
            kept.forget(pid)
        elif (of := kept.of(pid)) is not None and what == "use" and (read := next(of.named(name), None)) is not None:
            kept.use(pid, read)
        counted = 0
        for _, of in kept.everyone():
            counted += of.count
            assert of.count == len(of.fresh) + len(of.used) and not of.fresh.keys() & of.used.keys()
            for read in of.fresh:
                assert read.fresh and read in of.named(read.name)
                assert read.size is None or read in of.sized(read.size)
            assert [read.last for read in of.fresh] == sorted(read.last for read in of.fresh)
        assert counted == len(kept)


def test_reads_that_were_forgotten_are_said_once_a_minute_while_a_medium_is_there(monkeypatch):
    monkeypatch.setattr(reads, "MOST_OF_ONE", 1_000)
    ws = Workstation().login("sato")
    grep = ws.run("grep", "-r")

    def storm(since: int) -> None:
        for number in range(since, since + 2_000):
            ws.core.feed(facts.Opened(at_ms=ws.now, pid=grep.pid, key=b"%d" % number, path=f"{ROOT}/m/{number}"))

    storm(0)
    ws.wait(120).none("agent.gap")
    ws.plug().wait(1)
    first = ws.only("agent.gap")
    assert first.lost["reason"] == "reads_forgotten" and first.lost["count"] >= 1_000
    storm(2_000)
    ws.wait(30).only("agent.gap")
    storm(4_000)
    ws.wait(40)
    second = ws.all("agent.gap")[1]
    assert second.lost["count"] >= 4_000 and second.lost["since"] >= first.lost["until"]
    ws.wait(120)
    assert len(ws.all("agent.gap")) == 2


def test_reads_of_the_process_that_is_quiet_longest_are_forgotten_first(monkeypatch):
    monkeypatch.setattr(reads, "MOST_OF_ALL", 300)
    kept = Reads()
    for pid in (1, 2, 1, 3):
        for number in range(100):
            kept.add(pid, f"/{pid}/", "/", str(number), None, (0, 0))
    kept.add(4, "/4/", "/", "x", None, (0, 0))
    assert kept.of(2) is None and kept.of(1) is not None and len(kept) == 201 and kept.forgotten == 100
