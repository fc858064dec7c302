"""The register as CSV: there and back without loss, no formulas, and mistakes said with line and column."""

import csv
import io
from datetime import UTC
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server_stub import sheet
from server_stub.bulk import Row

TOKYO, BERLIN = ZoneInfo("Asia/Tokyo"), ZoneInfo("Europe/Berlin")
texts = st.text(st.characters(blacklist_categories=("Cc", "Cs", "Zl", "Zp")), max_size=30).map(str.strip)
some = texts.filter(bool)
lists = st.lists(some, max_size=3)
times = st.integers(1, 250_000_000_000_000)
rows = st.builds(
    Row, key=some, id=texts, owner=some, department=texts, approver=some, requester=texts, purpose=texts,
    machines=lists, dirs=lists,
    read_only=st.booleans(), once=st.booleans(), since=times | st.just(0), until=times | st.none(), reason=texts,
    state=st.sampled_from(["requested", "approved", "denied", "revoked", "lost"]),
)  # fmt: skip


def written(row: Row, zone, japanese: bool = False) -> str:
    text = io.StringIO(newline="")
    csv.writer(text).writerows([sheet.heads(japanese), sheet.cells(row, zone)])
    return text.getvalue()


@given(row=rows, zone=st.sampled_from([UTC, TOKYO, BERLIN]), japanese=st.booleans())
def test_there_and_back(row, zone, japanese):
    assert sheet.read(written(row, zone, japanese), zone) == ([(2, row)], [])


@given(text=st.text(max_size=20))
def test_no_cell_is_a_formula_and_the_guard_comes_off_again(text):
    cell = sheet.guarded(text)
    assert not cell.startswith(("=", "+", "-", "@", "\t", "\r", "＝", "＋", "－", "＠"))
    assert sheet.plain(cell) == text


@given(text=st.text(max_size=200))
def test_whatever_a_file_holds_is_rows_or_faults(text):
    sheet.read(text, UTC)


def fault(*lines: str) -> list[tuple[int, str, str]]:
    found = sheet.read("\n".join(lines), TOKYO)[1]
    return [(each.line, each.column, each.why) for each in found]


def read(*lines: str) -> list[Row]:
    found, faults = sheet.read("\n".join(lines), TOKYO)
    assert faults == []
    return [row for _, row in found]


def test_days_mean_their_last_moment_and_their_first():
    (row,) = read("key,owner,approver,since,until", "k,a,b,2026-04-01,2027-03-31")
    assert row.since == 1_774_969_200_000  # 2026-04-01 00:00 in Tokyo
    assert row.until == 1_806_505_200_000  # 2027-04-01 00:00
    assert "2026-04-01,2027-03-31" in written(row, TOKYO)


@pytest.mark.parametrize("day", ["2027/3/31", "2027/03/31", "2027-3-31", "2027-03-31"])
def test_days_as_spreadsheets_write_them(day):
    assert read("key,owner,approver,until", f"k,a,b,{day}")[0].until == 1_806_505_200_000


def test_japanese_heads_and_words():
    (row,) = read("媒体キー,所有者,承認者,読み取り専用,期限,状態", "usb:1,佐藤,森,はい,無期限,申請中")
    assert (row.key, row.owner, row.read_only, row.until, row.state) == ("usb:1", "佐藤", True, None, "requested")


def test_lists_of_earlier_versions():
    (row,) = read("key,owner,approver,purpose,until,machines,dirs,read_only,revoked,reason", "k,a,b,p,never,x;y,,,yes,left")
    assert (row.machines, row.state, row.reason) == (["x", "y"], "revoked", "left")


def test_every_mistake_is_said_with_its_place():
    found = fault(
        "key,owner,approver,until,read_only,state", "k,a,b,soon,maybe,gone", "", ",,b,never,,", 'k2,a,b,2027-02-30,,"'
    )
    assert [(line, column) for line, column, _ in found] == [
        (2, "read_only"), (2, "state"), (2, "until"), (4, "key"), (4, "owner"), (5, ""),
    ]  # fmt: skip
    assert "write" in found[0][2]
    assert "quote" in found[-1][2]


def test_heads_that_are_none():
    assert fault("key,owner", "x,y")[0] == (
        1, "", f"lacks the column approver; the head line is: {','.join(sheet.COLUMNS)}",
    )  # fmt: skip
    assert fault("key,owner,approver,colour", "x,y,z,red")[0][:2] == (1, "colour")
    assert fault("key,owner,approver,キー", "x,y,z,x")[0][2].startswith("stands twice")
    assert fault("")[0][0] == 1


def test_the_same_approval_twice_in_one_file():
    found = fault("key,owner,approver,machines", "k,a,b,x;y", "k,a,b,z", "k,a,c,y;x")
    assert found == [(4, "key", "says the same approval as line 2; remove one")]


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_utf_8_with_and_without_a_mark(mark):
    assert sheet.decode(mark + "所有者".encode()) == "所有者"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("所有者".encode("cp932"), "--encoding cp932"),
        ("所有者".encode("utf-16"), "--encoding utf-16"),
        (b"\xff\xff\x80", "is not UTF-8"),
    ],
)
def test_other_encodings_are_named(data, said):
    with pytest.raises(sheet.NotText, match=said):
        sheet.decode(data)


def test_shift_jis_is_read_if_that_is_said():
    assert sheet.decode("所有者①".encode("cp932"), "cp932") == "所有者①"
    with pytest.raises(sheet.NotText, match="is not in cp932"):
        sheet.decode(b"\x81", "cp932")
    with pytest.raises(sheet.NotText, match="no encoding"):
        sheet.decode(b"x", "kana")
