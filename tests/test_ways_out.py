"""The matrix of ways out: its judge, its table, its page, and a quick part of it against a real agent.

The whole matrix is `make ways-out` (some ten minutes, root).
"""

import json
import os
import random
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.house import can_set_loginuid
from tests.ways_out import judge, page, table
from tests.ways_out.judge import Doing, Expected
from tests.ways_out.lab import Lab
from tests.ways_out.run import Runner

HERE = Path(__file__).parent
OURS = HERE / "ways_out" / "ways.toml"
PAGE = HERE.parent / "docs" / "coverage.md"
STICK = {"serial": "STICK"}


def told(source: str, dest: str = "/media/s/one/x", **changed: Any) -> dict[str, Any]:
    """An event of a copy, as the agent records it."""
    said: dict[str, Any] = {"source": {"path": source}, "bytes": 100, "link": "process", "confidence": 0.9}
    said |= {
        "dest": {"path": dest} if dest else {"peer": "10.0.0.1:80"},
        "medium": STICK,
        "login": {"uid": 1000},
        "attribution": "exact",
        "way": "mount",
        **changed,
    }
    return {"metadata": {"event_code": "file.copied_out"}, "unmapped": {"sekisho": said}}


def doing(name: str = "one", *sources: str, **more: Any) -> Doing:
    expected = [Expected(path=source, bytes=100, login=1000) for source in sources]
    return Doing(
        id=name,
        source=f"/p/{name}/",
        dest=f"/media/s/{name}/",
        expected=expected,
        serial="STICK",
        links=list(table.LINKS),
        **more,
    )


# -- the judge --------------------------------------------------------------------------------------------------------------


def test_a_copy_told_rightly_is_right() -> None:
    (verdict,) = judge.judge([doing("one", "/p/one/a")], [told("/p/one/a")])
    assert (verdict.outcome, verdict.right, verdict.links["process"]) == ("right", 1, 1)


@pytest.mark.parametrize(
    ("changed", "bad"),
    [
        ({"bytes": 99}, "bytes"),
        ({"medium": {"serial": "OTHER"}}, "medium"),
        ({"login": {}}, "login"),
        ({"login": {"uid": 0}}, "login"),
    ],
)
def test_a_copy_told_with_anything_wrong_is_not_right(changed: dict[str, Any], bad: str) -> None:
    (verdict,) = judge.judge([doing("one", "/p/one/a")], [told("/p/one/a", **changed)])
    assert (verdict.outcome, verdict.seen, getattr(verdict, bad)) == ("missed", 1, 0)
    assert bad in verdict.wrong[0]


def test_a_join_by_time_alone_counts_as_none() -> None:
    (verdict,) = judge.judge([doing("one", "/p/one/a")], [told("/p/one/a", link="time")])
    assert (verdict.outcome, verdict.by_time, verdict.false) == ("missed", 1, [])


def test_pieces_add_up_to_their_file() -> None:
    (verdict,) = judge.judge([doing("one", "/p/one/a")], [told("/p/one/a", bytes=60), told("/p/one/a", bytes=40)])
    assert verdict.outcome == "right"


def test_one_of_two_is_partly() -> None:
    (verdict,) = judge.judge([doing("one", "/p/one/a", "/p/one/b")], [told("/p/one/a")])
    assert (verdict.outcome, verdict.right) == ("partly", 1)


def test_a_source_that_was_not_carried_out_is_a_false_join_unless_by_time() -> None:
    innocent = doing("one", innocent=True)
    assert judge.judge([innocent], [told("/p/one/a")])[0].outcome == "wrong"
    assert judge.judge([innocent], [told("/p/one/a", link="time")])[0].outcome == "silent"


def test_another_case_s_source_in_a_folder_is_that_folder_s_false_join() -> None:
    one, two = judge.judge([doing("one", "/p/one/a"), doing("two")], [told("/p/one/a", dest="/media/s/two/x")])
    assert (one.outcome, two.outcome) == ("missed", "wrong")


def test_a_way_that_is_no_mount_needs_no_medium_but_the_way() -> None:
    sent = Doing(
        id="n",
        source="/p/n/",
        dest="",
        expected=[Expected(path="/p/n/a", bytes=100, login=1000)],
        way="network",
        links=["process"],
    )
    event = told("/p/n/a", "", medium={}, way="network")
    assert judge.judge([sent], [event])[0].outcome == "right"
    assert judge.judge([sent], [told("/p/n/a", "")])[0].outcome == "missed"


# -- the table --------------------------------------------------------------------------------------------------------------


def test_our_table_reads_and_multiplies_out() -> None:
    ways = table.read(OURS)
    cases = table.cases(ways)
    assert len({case.id for case in cases}) == len(cases)
    assert {case.disk for case in cases} == set(table.DISKS)
    assert {case.onto for case in cases} >= set(table.MEDIA)
    assert len(table.cases(ways, runs=2)) == 2 * len(cases)
    assert sum(way.innocent for way in ways) >= 9


def test_a_line_is_enough_for_a_new_way(tmp_path: Path) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text('[[way]]\nname = "my way"\ngroup = "mine"\nrun = "cp $F $OUT/"\n')
    (case,) = table.cases(table.read(mine))
    assert case.title == "my way, disk → ext4"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("way = 3", "way"),
        ('[[way]]\nname = "x"\ngroup = "g"\nrun = "true"\nfeils = 2', "feils"),
        ('[[way]]\nname = "x"\ngroup = "g"\nrun = "true"\nonto = ["floppy"]', "floppy"),
        ('[[way]]\nname = "x"\ngroup = "g"\nrun = "true"\nlinks = ["time"]', "time"),
        ('[[way]]\nname = "x"\ngroup = "g"\nrun = "true"\ninnocent = true', "operations"),
        ('[[way]]\nname = "x"\ngroup = "g"\nrun = "true"\nsize = "big"', "size"),
        ('[[way]]\nname = "x!"\ngroup = "g"\nrun = "true"\n[[way]]\nname = "x?"\ngroup = "g"\nrun = "true"', "twice"),
        ("", "no [[way]]"),
    ],
)
def test_a_wrong_table_says_where_and_what(tmp_path: Path, text: str, says: str) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text(text)
    with pytest.raises(table.TableError, match=re.escape(says)) as error:
        table.read(mine)
    assert str(mine) in str(error.value)


# -- the page ---------------------------------------------------------------------------------------------------------------


def test_the_page_has_a_row_for_every_way_of_the_table_and_no_other() -> None:
    """Made by `make ways-out ARGS='-o md'`; a way that was added since must be carried out before it is told of."""
    rows = re.findall(r"^\| ((?:\\\||[^|])+) \|", PAGE.read_text(), re.MULTILINE)
    written = [row.replace("\\|", "|").strip() for row in rows if row not in ("way", "work") and not set(row) <= set("-")]
    assert sorted(written) == sorted(" ".join(way.name.split()) for way in table.read(OURS))


def test_the_page_names_what_was_not_right() -> None:
    ways = table.read(OURS)[:2]
    cases = table.cases(ways)[:2]
    missed = Doing(id="m", source="/p/m/", dest="/d/", expected=[Expected(path="/p/m/a", bytes=1, login=1)])
    verdicts = judge.judge([missed, Doing(id="s", source="/p/s/", dest="/e/", skipped="needs a | floppy")], [])
    text = page.markdown(cases, verdicts, 60, page.machine())
    assert f"**{cases[0].title}**: not told" in text
    assert "needs a \\| floppy" in text
    again = [
        page.from_dict(json.loads(json.dumps(page.as_dict(*pair))), {way.name: way for way in ways})
        for pair in zip(cases, verdicts)
    ]
    assert page.markdown([case for case, _ in again], [each for _, each in again], 60, page.machine()) == text, "printed again"


# -- a quick part of it, for real -------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: mounts, fanotify and login uids")
@pytest.mark.skipif(not can_set_loginuid(), reason="the matrix needs a login uid to set (audit in the kernel)")
@pytest.mark.timeout(240)
def test_the_quick_ways_are_seen_and_nothing_is_wrongly_joined() -> None:
    cases = table.cases(table.read(OURS), quick=True)
    with tempfile.TemporaryDirectory(dir="/var/tmp") as root, Lab(Path(root)) as lab:  # a folder that other users may enter
        doings = Runner(lab, random.Random(20260)).run(cases)
    verdicts = judge.judge(doings, lab.events)
    text, totals = page.text(cases, verdicts), page.totals(cases, verdicts)
    assert not totals["false_joins"], text
    assert not totals["broken"], text
    assert totals["copy_recall"] >= 0.99, text
