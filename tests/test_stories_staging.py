"""Stories of copies made elsewhere on the machine first: told, remembered, and named when they leave."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from workstation import ROOT, START, STICK, Program, Seen, Workstation

from agent.core import facts
from agent.core.lineage import MOST_SOURCES, MOST_STAGED, Lineage, Source, Staged

DAY_S = 86_400


@pytest.fixture
def ws() -> Workstation:
    return Workstation().login("sato").plug()


class Desk:
    """What happens outside of protected directories, as the sensor tells it: finished writes of those who may have read."""

    def __init__(self, ws: Workstation) -> None:
        self.ws = ws
        self.asked: list[str] = []

    def write(self, program: Program, path: str, size: int, alike: str = "same", born: bool = True) -> None:
        """A file is finished elsewhere, settles, and is compared (`alike`) if the core wants that."""
        ws = self.ws
        if path not in ws.keys:
            ws.file(path, size)
        ws.sizes[path] = size
        closed = facts.Closed(at_ms=ws.now, pid=program.pid, key=ws.keys[path], path=path, size=size)
        closed.born_ms = ws.now if born else ws.now - 86_400_000
        ws.tell(closed).wait(1)
        self.answer(alike)

    def answer(self, alike: str, path: str = "") -> None:
        for ask in self.ws.core.compare():
            self.asked.append(ask.path)
            there = path or ask.path
            self.ws.tell(facts.Compared(at_ms=self.ws.now, key=ask.key, path=there, size=self.ws.sizes[ask.path], alike=alike))
        for _, marked in self.ws.core.mark():
            self.ws.mark(marked)

    def copy(self, source: str, to: str, alike: str = "same") -> None:
        program = self.ws.run("cp", source, to).read(source)
        self.write(program, to, self.ws.sizes[self.ws.path(source)], alike)
        program.end()


@pytest.fixture
def desk(ws: Workstation) -> Desk:
    return Desk(ws)


def _sources(events: list[Seen]) -> list[str]:
    return sorted(event.source["path"] for event in events)


def test_a_copy_elsewhere_is_told_with_its_source_and_person(ws, desk):
    desk.copy("a.csv", "/home/sato/a.csv")
    event = ws.only("file.staged")
    assert event.source["path"] == f"{ROOT}/a.csv" and event.dest == {"path": "/home/sato/a.csv", "size": 300_000}
    assert event.protected["label"] == "顧客マスタ" and event.login_user == "sato" and event.bytes == 300_000
    assert event.link == "process" and event.confidence >= 0.9 and event.medium is None
    assert event["file"]["path"] == "/home/sato/a.csv"


def _handed_over(ws: Workstation, copy: str, size: int) -> None:
    """A service that reads nothing writes the bytes of `copy` to the stick."""
    path = f"{ws.stick}/x"
    ws.held[path] = {copy: size}
    ws.program("/usr/sbin/smbd").create(path).close(path, size)
    ws.wait(2)


def test_a_copy_that_a_service_puts_on_the_stick_is_known_by_its_bytes(ws, desk):
    desk.copy("a.csv", "/home/sato/one")
    ws.program("/usr/bin/less").read("/home/sato/one")
    _handed_over(ws, "/home/sato/one", 300_000)
    assert ws.only("file.copied_out").source["path"] == f"{ROOT}/a.csv"


@pytest.mark.parametrize("how", ["overwritten", "removed", "moved"])
def test_what_lies_where_a_copy_lay_is_not_what_was_read_there(ws, desk, how):
    desk.copy("a.csv", "/home/sato/one")
    ws.program("/usr/bin/less").read("/home/sato/one")
    other = ws.program("/usr/bin/head")
    if how == "overwritten":  # whoever opens it to write over it is told as one who opened it
        desk.write(other.read("/home/sato/one"), "/home/sato/one", 70_000, "other", born=False)
    elif how == "removed":
        other.delete("/home/sato/one")
    else:
        key = ws.keys.pop("/home/sato/one")
        ws.tell(facts.Moved(at_ms=ws.now, pid=other.pid, key=key, path="/home/sato/two", old_path=""))
    if how != "overwritten":
        ws.file("/home/sato/one", 70_000)
    _handed_over(ws, "/home/sato/one", 70_000)
    ws.none("file.copied_out").only("file.written")


def test_it_leaves_a_week_later_after_a_restart_and_names_its_origin(ws, desk):
    desk.copy("a.csv", "/home/sato/holiday.jpg")
    ws.restart().login("sato").wait(7 * DAY_S)
    ws.plug()
    ws.copy("/home/sato/holiday.jpg")
    event = ws.only("file.copied_out")
    assert event.source == {"path": f"{ROOT}/a.csv", "size": 300_000, "via": ["/home/sato/holiday.jpg"]}
    assert event.link == "lineage" and event.bytes == 300_000 and event.protected["rel"] == "a.csv"
    finding = ws.only("copy.staged")
    assert finding.severity == 4 and finding.login_user == "sato"
    related = [each["uid"] for each in finding["finding_info"]["related_events"]]
    assert related == [ws.only("file.staged").uid, event.uid]


def test_the_finding_is_milder_where_the_medium_is_approved(ws, desk):
    ws.approve(STICK)
    desk.copy("a.csv", "/home/sato/a.csv")
    ws.copy("/home/sato/a.csv")
    assert ws.only("file.copied_out").severity == 2 and ws.only("copy.staged").severity == 3


def test_an_archive_leaves_as_all_that_is_in_it(ws, desk):
    sources = [ws.file(f"{ROOT}/{number}.csv", 10_000 + number) for number in range(50)]
    tar = ws.run("zip", "x.zip")
    for source in sources:
        tar.read(source)
    desk.write(tar, "/tmp/x.zip", 120_000, "packed")
    assert _sources(ws.all("file.staged")) == sorted(sources)
    ws.copy("/tmp/x.zip")
    left = ws.all("file.copied_out")
    assert _sources(left) == sorted(sources)
    assert {event.bytes for event in left} == {10_000 + number for number in range(50)}
    assert {tuple(event.source["via"]) for event in left} == {("/tmp/x.zip",)}
    ws.only("copy.staged")


def test_parts_of_one_file_that_leave_in_one_archive_add_up(ws, desk):
    split = ws.run("split", "a.csv").read("a.csv")
    for number in range(3):
        desk.write(split, f"/tmp/x{number}", 100_000, "part")
    tar = ws.run("tar", "c", "/tmp/x0", "/tmp/x1")
    for number in range(2):
        tar.read(f"/tmp/x{number}")
    tar.create(f"{ws.stick}/x.tar").close(f"{ws.stick}/x.tar", 210_000)
    ws.wait(2)
    left = ws.only("file.copied_out")
    assert left.source["path"] == f"{ROOT}/a.csv" and left.bytes == 200_000


def test_half_of_a_copy_that_leaves_is_half_of_its_source(ws, desk):
    desk.copy("a.csv", "/tmp/x")
    program = ws.run("head").read("/tmp/x").create(f"{ws.stick}/half").close(f"{ws.stick}/half", 150_000)
    ws.wait(1)
    assert ws.only("file.copied_out").source["path"] == f"{ROOT}/a.csv"
    assert program.pid


def test_a_pipeline_elsewhere_names_what_was_read_into_it(ws, desk):
    gzip = ws.run("gzip", pipes=[77])
    tar = ws.run("tar", "c", pipes=[77]).read("a.csv").read("b.csv")
    tar.end()
    desk.write(gzip, "/tmp/x.tgz", 90_000, "packed")
    assert _sources(ws.all("file.staged")) == [f"{ROOT}/a.csv", f"{ROOT}/b.csv"]
    assert {event.link for event in ws.all("file.staged")} == {"pipeline"}


def test_a_copy_of_a_copy_leads_back_to_the_first(ws, desk):
    desk.copy("a.csv", "/tmp/one")
    desk.copy("/tmp/one", "/home/sato/two")
    ws.copy("/home/sato/two")
    assert ws.only("file.copied_out").source["via"] == ["/tmp/one", "/home/sato/two"]
    assert ws.only("file.copied_out").source["path"] == f"{ROOT}/a.csv"


def test_a_copy_is_followed_under_its_new_name(ws, desk):
    desk.copy("a.csv", "/tmp/one")
    ws.keys["/home/sato/z"], ws.sizes["/home/sato/z"] = ws.keys.pop("/tmp/one"), ws.sizes.pop("/tmp/one")
    ws.tell(facts.Moved(at_ms=ws.now, pid=1, key=ws.keys["/home/sato/z"], path="/home/sato/z", old_path=""))
    ws.copy("/home/sato/z")
    assert ws.only("file.copied_out").source["via"] == ["/home/sato/z"]


def test_mv_to_the_medium_names_the_copy_although_it_is_gone(ws, desk):
    desk.copy("a.csv", "/tmp/one")
    mv = ws.run("mv").read("/tmp/one").create(f"{ws.stick}/one").close(f"{ws.stick}/one", 300_000)
    ws.tell(facts.Deleted(at_ms=ws.now, pid=mv.pid, key=ws.keys["/tmp/one"], path=""))
    ws.wait(1)
    assert ws.only("file.copied_out").source["path"] == f"{ROOT}/a.csv"


def test_a_copy_renamed_onto_a_folder_that_plays_a_medium(ws, desk):
    desk.copy("a.csv", "/tmp/one")
    key = ws.keys["/tmp/one"]
    ws.tell(facts.Moved(at_ms=ws.now, pid=1, key=key, path=f"{ws.stick}/one", old_path="", size=300_000))
    event = ws.only("file.copied_out")
    assert event.source["path"] == f"{ROOT}/a.csv" and event.link == "lineage"


@pytest.mark.parametrize("alike", ["other", "gone"])
def test_what_holds_none_of_its_bytes_is_no_copy(ws, desk, alike):
    office = ws.run("soffice").read("a.csv")
    desk.write(office, "/home/sato/.config/registry.xcu", 290_000, alike)
    ws.none("file.staged")
    assert desk.asked == ["/home/sato/.config/registry.xcu"]


def test_what_is_far_too_small_is_not_even_compared(ws, desk):
    office = ws.run("soffice").read("a.csv")
    desk.write(office, "/home/sato/.config/recent", 900)
    ws.none("file.staged")
    assert not desk.asked


def test_moved_away_to_another_file_system_there_is_nothing_to_compare(ws, desk):
    mv = ws.run("mv").read("a.csv")
    del ws.sizes[f"{ROOT}/a.csv"], ws.keys[f"{ROOT}/a.csv"]
    desk.write(mv, "/tmp/a.csv", 300_000, "unknown")
    assert ws.only("file.staged").source["path"] == f"{ROOT}/a.csv"


def test_a_guess_that_can_not_be_compared_is_not_told(ws, desk):
    zipper = ws.run("zip").read("a.csv").read("b.csv")
    desk.write(zipper, "/tmp/x.zip", 90_000, "unknown")
    ws.none("file.staged")


def test_what_a_reader_wrote_elsewhere_does_not_use_up_what_it_read(ws, desk):
    python = ws.run("python3").read("a.csv")
    desk.write(python, "/home/sato/notes", 290_000, "other")
    python.create(f"{ws.stick}/x").close(f"{ws.stick}/x", 300_000)
    ws.wait(1)
    event = ws.only("file.copied_out")
    assert event.link == "process" and event.confidence >= 0.85


def test_a_copy_overwritten_by_who_read_nothing_is_none_any_more(ws, desk):
    desk.copy("a.csv", "/tmp/one")
    desk.write(ws.run("dd"), "/tmp/one", 70_000, "packed", born=False)
    ws.copy("/tmp/one")
    ws.wait(1)
    ws.none("file.copied_out")


def test_a_copy_that_somebody_added_a_line_to_is_one_still(ws, desk):
    desk.copy("a.csv", "/tmp/one")
    desk.write(ws.run("vi"), "/tmp/one", 300_100, "same", born=False)
    ws.copy("/tmp/one")
    ws.wait(1)
    assert ws.only("file.copied_out").source["path"] == f"{ROOT}/a.csv"


def test_the_same_copy_made_again_is_told_once(ws, desk):
    desk.copy("a.csv", "/tmp/one")
    desk.copy("a.csv", "/tmp/one")
    ws.only("file.staged")


def test_many_copies_that_leave_together_are_one_finding_and_later_ones_another(ws, desk):
    for number in range(5):
        desk.copy(ws.file(f"{ROOT}/{number}.csv", 20_000 + number), f"/tmp/{number}")
        ws.copy(f"/tmp/{number}")
    ws.only("copy.staged")
    ws.wait(3_600)
    ws.copy("/tmp/1", to=f"{ws.stick}/again")
    ws.wait(1)
    assert len(ws.all("copy.staged")) == 2


def test_as_the_agent_stops_a_copy_is_told_by_name_and_size_and_nothing_comes_after(ws):
    for name, to in (("a.csv", "/home/sato/a.csv"), ("b.csv", "/home/sato/other")):
        cp, size = ws.run("cp").read(name), ws.sizes[f"{ROOT}/{name}"]
        key = ws.keys[ws.file(to, size - (to.endswith("other")))]
        ws.tell(facts.Closed(at_ms=ws.now, pid=cp.pid, key=key, path=to, size=ws.sizes[to], born_ms=ws.now))
    ws.tell(facts.Stopping(at_ms=ws.now))
    assert ws.only("file.staged").dest["path"] == "/home/sato/a.csv"
    assert ws.events[-1].code == "agent.stopped" and not ws.core.compare()


def test_a_copy_not_seen_for_long_is_forgotten(desk, ws):
    desk.copy("a.csv", "/tmp/one")
    ws.wait(91 * DAY_S)
    ws.copy("/tmp/one")
    ws.wait(1)
    ws.none("file.copied_out")


def test_how_long_is_the_sites_to_say():
    ws = Workstation(keep_copies_ms=3_600_000).login("sato").plug()
    Desk(ws).copy("a.csv", "/tmp/one")
    ws.wait(3_700)
    ws.copy("/tmp/one")
    ws.wait(1)
    ws.none("file.copied_out")


def test_a_moved_out_file_that_is_written_anew_is_no_copy_of_itself(ws, desk):
    ws.run("mv").rename(f"{ROOT}/a.csv", "/home/sato/a.csv").end()
    ws.mark("/home/sato/a.csv")
    editor = ws.run("vi").read("/home/sato/a.csv")
    desk.write(editor, "/home/sato/a.csv", 300_010, born=False)
    ws.none("file.staged")
    assert not desk.asked


def test_no_copy_outlives_the_room_there_is_and_what_is_dropped_is_said(ws, desk, monkeypatch):
    monkeypatch.setattr("agent.core.lineage.MOST_STAGED", 3)
    for number in range(5):
        desk.copy(ws.file(f"{ROOT}/{number}.csv", 20_000 + number), f"/tmp/{number}")
    ws.wait(20)
    assert sum(event.lost["count"] for event in ws.all("agent.gap") if event.lost["reason"] == "lineage_full") == 2
    ws.copy("/tmp/0")
    ws.wait(1)
    ws.none("file.copied_out")
    ws.copy("/tmp/4")
    assert ws.only("file.copied_out").source["path"] == f"{ROOT}/4.csv"


_KEYS = st.binary(min_size=1, max_size=2)
_PATHS = st.sampled_from([f"/tmp/{name}" for name in "abcd"])
_MADE = st.lists(st.sampled_from([Source(f"{ROOT}/{name}", ROOT, 5) for name in "uvwxyz"]), min_size=1, max_size=6)
_STEPS = st.one_of(
    st.tuples(st.just("stage"), _KEYS, _PATHS, _MADE),
    st.tuples(st.just("moved"), _KEYS, _PATHS),
    st.tuples(st.just("gone"), _KEYS),
    st.tuples(st.just("end"), _KEYS),
    st.tuples(st.just("sweep"), st.integers(0, 200 * DAY_S * 1000)),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(_STEPS, max_size=60))
def test_lineage_stays_within_its_bounds_and_survives_a_restart(steps):
    lineage = Lineage()
    for what, *more in steps:
        if what == "stage":
            key, path, made = more
            lineage.stage(key, Staged(path, 10, tuple(dict.fromkeys(made)), (), "uid", START))
        elif what == "moved":
            lineage.moved(*more)
        elif what == "gone":
            lineage.gone(more[0], START)
        elif what == "end":
            lineage.end(more[0])
        else:
            lineage.sweep(START + more[0])
        copies = {key: lineage.staged(key) for key in lineage._staged}
        assert len(copies) <= MOST_STAGED and lineage._sources <= MOST_SOURCES
        assert lineage._sources == sum(len(copy.sources) for copy in copies.values())
        assert set(lineage._at.values()) <= set(copies), "no path leads to a copy that is forgotten"
    again = Lineage()
    again.from_bytes(lineage.to_bytes())
    assert dict(again.copies()) == dict(lineage.copies())
    assert all(again.staged(key).sources == lineage.staged(key).sources for key, _ in lineage.copies())
