"""One event as one line: the sentences, both languages side by side, and foreign text made harmless."""

import json
import re
import string
from datetime import timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.contract import codes, columns, event, show, words
from tests.collector_client import Client, copied, draft

JST = timezone(timedelta(hours=9))
AT = 1_402_300_800_000  # 2014-06-09 17:00:00 in Japan
STICK = copied("")["medium"]


def raw(code: str = "file.copied_out", **ours: Any) -> bytes:
    agent = Client(0, "ws-042")
    return agent.append(draft(code, agent=agent.id, name="ws-042", at=AT, **ours))


def said(code: str, lang: words.Language = "en", **ours: Any) -> str:
    return show.what(event.read(raw(code, **ours)), lang, JST)


def test_a_copy_reads_as_the_admin_was_promised() -> None:
    line = show.line(raw(**copied("2014-06.csv")), zone=JST)
    assert line == (
        "2014-06-09 17:00:00 low ws-042 sato"
        " customers/2014-06.csv → Kingston DataTraveler 3.0 (60A44C…) 4.2 MB by cp, unapproved"
    )
    japanese = show.line(raw(**copied("2014-06.csv")), lang="ja", zone=JST)
    assert japanese == (
        "2014-06-09 17:00:00 低 ws-042 sato"
        " customers/2014-06.csv → Kingston DataTraveler 3.0 (60A44C…) 4.2 MB (cp による)、未承認"
    )


SENTENCES = [
    ("medium.attached", {"medium": STICK}, "Kingston DataTraveler 3.0 (60A44C…) connected, unapproved"),
    (
        "medium.attached",
        {"medium": STICK, "simulated": True},
        "Kingston DataTraveler 3.0 (60A44C…) connected, unapproved (simulated)",
    ),
    ("medium.detached", {"medium": event.MediumInfo(key="usb:1")}, "usb:1 disconnected"),
    (
        "medium.mounted",
        {"medium": event.MediumInfo(key="k", model="Flash", serial="1234", mount="/media/a", fs="vfat", read_only=True)},
        "Flash (1234) mounted at /media/a (vfat), read-only",
    ),
    (
        "file.copied_out",
        {**copied("a.csv"), "link": "time"},
        "customers/a.csv → Kingston DataTraveler 3.0 (60A44C…) 4.2 MB by cp, unapproved, joined by time alone",
    ),
    (
        "file.copied_out",
        {"source": event.SourceInfo(path="/srv/x"), "way": "network", "dest": event.DestInfo(path="host:/y"), "bytes": 12},
        "/srv/x → host:/y (network) 12 B",
    ),
    (
        "file.written",
        {"medium": STICK, "dest": event.DestInfo(path="/media/a/b.txt", size=1500)},
        "/media/a/b.txt written to Kingston DataTraveler 3.0 (60A44C…) 1.5 kB, unapproved",
    ),
    (
        "file.history",
        {
            "protected": event.ProtectedInfo(path="/srv/c", label="customers"),
            "detail": {"reads": 12, "writes": 1, "deletes": 0},
        },
        "customers: 12 read, 1 changed",
    ),
    ("medium.unapproved", {"medium": STICK}, "Kingston DataTraveler 3.0 (60A44C…) has no valid approval, unapproved"),
    (
        "copy.burst",
        {"limit": event.LimitInfo(name="burst", window=600, bytes=104_857_600, files=31), "medium": STICK},
        "limit burst passed: 104.9 MB, 31 files within 10m → Kingston DataTraveler 3.0 (60A44C…), unapproved",
    ),
    (
        "agent.gap",
        {"lost": event.LostInfo(reason="fanotify_overflow", since=AT, until=AT + 5000, count=40)},
        "40 events lost from 2014-06-09 17:00:00 to 2014-06-09 17:00:05: the kernel's queue of file events overflowed",
    ),
    (
        "agent.gap",
        {"lost": event.LostInfo(reason="not_running", since=AT, until=AT)},
        "an unknown number of events lost at 2014-06-09 17:00:00: the agent was not running",
    ),
    (
        "agent.gap",
        {"lost": event.LostInfo(reason="newer_than_us", since=0, until=AT)},
        "an unknown number of events lost until 2014-06-09 17:00:00: newer_than_us",
    ),
    (
        "agent.sensors",
        {"detail": {"sensor": "fanotify", "ok": False, "blind": ["fresh_hard_links", "newer_than_us"]}},
        "fanotify: does not see hard links just made elsewhere, newer_than_us",
    ),
    ("agent.sensors", {"detail": {"sensor": "holder", "ok": True, "blind": []}}, "holder: sees everything again"),
    (
        "agent.sensors",
        {"detail": {"sensor": "mounts", "ok": True, "blind": ["other_namespaces_until_used"]}},
        "mounts: sees all but other mount namespaces until used",
    ),
    (
        "agent.sensors",
        {"detail": {"sensor": "config", "ok": False, "blind": ["config_refused"]}},
        "config: the changed configuration has an error and was not taken",
    ),
    (
        "file.written",
        {"medium": STICK, "process": event.ProcessInfo(pid=8972), "attribution": "unknown"},
        "a file written to Kingston DataTraveler 3.0 (60A44C…) by an unknown program, unapproved",
    ),
    (
        "file.written",
        {"medium": STICK, "attribution": "unknown"},
        "a file written to Kingston DataTraveler 3.0 (60A44C…), unapproved, process unknown",
    ),
    ("agent.clock", {"detail": {"jump_ms": -1500}}, "the clock jumped by -1.5 s"),
    ("agent.clock", {"detail": {"suspended_ms": 90_000}}, "the machine was suspended for 90 s"),
    (
        "agent.tampered",
        {"detail": {"what": "register_altered"}},
        "the agent's own records or files were altered: the kept register of media was altered",
    ),
    ("agent.silent", {"detail": {"last_seen": AT}}, "stopped reporting, last heard 2014-06-09 17:00:00"),
]


@pytest.mark.parametrize(("code", "ours", "sentence"), SENTENCES)
def test_sentences(code: str, ours: dict[str, Any], sentence: str) -> None:
    assert said(code, **ours) == sentence
    assert said(code, "ja", **ours)


def test_a_finding_raised_again_says_what_is_new() -> None:
    first = draft("medium.unapproved", at=AT, medium=STICK)
    again = draft("medium.unapproved", at=AT, medium=STICK)
    again.activity_id, again.type_uid = 2, again.class_uid * 100 + 2
    lines = [show.what(event.read(event.seal(each, 1, 1, b"")), "en") for each in (first, again)]
    assert lines == [
        "Kingston DataTraveler 3.0 (60A44C…) has no valid approval, unapproved",
        "now protected files went onto Kingston DataTraveler 3.0 (60A44C…), which has no valid approval, unapproved",
    ]
    assert "書き込まれました" in show.what(event.read(event.seal(again, 1, 1, b"")), "ja")


def test_losses_and_blindness_are_told_in_japanese_too() -> None:
    lost = event.LostInfo(reason="disk_full", since=AT, until=AT + 5000, count=3)
    assert said("agent.gap", "ja", lost=lost) == (
        "3 件欠落 (2014-06-09 17:00:00 から 2014-06-09 17:00:05 まで): ディスクが一杯でした"
    )
    detail = {"sensor": "inotify", "ok": False, "blind": ["process", "login_user"]}
    assert said("agent.sensors", "ja", detail=detail) == "inotify: 見えないもの: 操作したプログラム、操作した人"


def test_acts_on_records_are_told_in_the_readers_language() -> None:
    looked = {"filter": {"event": "copy.*", "user": "sato"}, "count": 3, "since": AT}
    assert said("record.viewed", detail=looked) == "records were looked at by test: event=copy.*, user=sato, 3 times"
    assert said("record.viewed", "ja", detail=looked) == "記録が閲覧されました (test による): event=copy.*、user=sato、3 回"
    seen = json.loads(raw("record.viewed", detail={"filter": {}, "count": 1}))
    seen["actor"] = {"user": {"name": "kato"}}  # a person stands in a column of their own
    assert show.what(event.read(json.dumps(seen).encode())) == "records were looked at: all of them"
    assert show.what(event.read(json.dumps(seen).encode()), "ja") == "記録が閲覧されました: すべて"
    assert said("record.erased", detail={"count": 7}) == "the content of 7 old events was erased, their proofs kept"


def test_every_code_that_operations_explains_has_words() -> None:
    page = (Path(__file__).parent.parent / "docs" / "operations.md").read_text("utf-8")
    for heading, table in (("## What `agent.gap` says", words.REASONS), ("## What `blind` says", words.BLIND)):
        part = page.split(heading)[1].split("\n## ")[0]
        rows = [line.split("|")[1] for line in part.splitlines() if line.startswith("| `")]
        explained = set(re.findall(r"`(\w+)`", " ".join(rows)))
        assert explained and sorted(explained) == sorted(table)
    part = page.split("`agent.tampered` (`unmapped.sekisho.detail.what`)")[1].split("\n\n")[0]
    assert set(words.TAMPERED) - set(words.REASONS) == set(re.findall(r"`(\w+)`", part))
    for english, japanese in (words.BLIND | words.REASONS | words.TAMPERED).values():
        assert english.isascii() and not japanese.isascii()


@pytest.mark.parametrize("code", [*codes.CODES, "copy.drip", "future.code"])
@pytest.mark.parametrize("lang", ["en", "ja"])
def test_every_code_has_a_sentence_even_with_nothing_known(code: str, lang: words.Language) -> None:
    if code == "future.code":
        text = raw("agent.back").replace(b"agent.back", b"future.code")
        assert show.what(event.read(text), lang) == "future.code"
        return
    sentence = said(code, lang)
    assert sentence and "{" not in sentence
    if code in codes.CODES:
        assert code in words.TEXTS[lang]


def names(template: str) -> list[str]:
    return sorted(field or "" for _, field, _, _ in string.Formatter().parse(template) if field is not None)


def test_the_languages_say_the_same_things() -> None:
    assert words.EN.keys() == words.JA.keys()
    for key in words.EN:
        assert names(words.EN[key]) == names(words.JA[key]), key
        assert words.JA[key] or not words.EN[key]


HOSTILE = [
    "\x1b[2J\x1b[31mred",
    "a\nb\rc",
    "\u202egpj.exe",
    "\u2066x\u2069",
    "\x9b31m",
    "\x07bell",
    "zero\u200bwidth",
    "\u2028line",
    "tab\there",
    "\ufeffbom",
    "del\x7f",
    "\U000e0041tag",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_names_stay_on_their_line(text: str) -> None:
    ours = copied(text, user=text)
    ours["process"] = event.ProcessInfo(pid=1, exe=f"/tmp/{text}")
    ours["medium"] = event.MediumInfo(key=text, vendor=text, model=text, serial=text, label=text, mount=text, decision=text)
    for code in ("file.copied_out", "medium.mounted", "medium.unapproved", "file.written"):
        for lang in ("en", "ja"):
            line = show.line(raw(code, **ours), lang=lang, zone=JST)
            assert_harmless(line)
    assert "\\u{" in show.line(raw(**ours))


def assert_harmless(line: str) -> None:
    assert line.isprintable() or all(each.isprintable() or each in " \u3000" for each in line), ascii(line)
    assert len(line.splitlines()) == 1


@given(st.text(max_size=60), st.text(max_size=60))
@settings(max_examples=200, deadline=None)
def test_no_text_of_any_kind_reaches_the_terminal_as_it_is(rel: str, name: str) -> None:
    text = raw(**copied("REL"))
    spoiled = json.loads(text)
    spoiled["unmapped"]["sekisho"]["protected"]["rel"] = rel
    spoiled["device"]["hostname"] = name
    spoiled["metadata"]["event_code"] = name or "x"
    spoiled["message"] = rel
    data = json.dumps(spoiled).encode()
    assert_harmless(show.line(data, zone=JST))
    assert_harmless(show.line(data, lang="ja", width=80))


@given(st.binary(max_size=200), st.integers(20, 120))
@settings(deadline=None)
def test_bytes_that_are_no_event_are_shown_harmlessly(data: bytes, width: int) -> None:
    line = show.line(data, width=width)
    assert_harmless(line)
    assert columns.display_width(line) <= width


def test_a_terminal_gets_columns_and_the_whole_sentence_however_narrow_it_is() -> None:
    ours = copied("顧客リスト/二〇一四年六月.csv", user="佐藤")
    for lang, end in (("en", "unapproved"), ("ja", "未承認")):
        sentence = show.what(event.read(raw(**ours)), lang, JST)  # type: ignore[arg-type]
        assert sentence.endswith(end)
        for width in (60, 80, 100):
            line = show.line(raw(**ours), lang=lang, zone=JST, width=width)  # type: ignore[arg-type]
            assert line.endswith(sentence)
            assert columns.display_width(line.removesuffix(sentence)) == 53


def test_a_machine_is_called_what_it_enrolled_as() -> None:
    spoiled = json.loads(raw(**copied("a.csv")))
    spoiled["device"] = {"uid": "a1", "hostname": "ws-boss", "type_id": 0}
    data = json.dumps(spoiled).encode()
    assert " ws-boss " in show.line(data)
    told = show.line(data, names={"a1": "ws-042", "b2": "ws-boss"})
    assert " ws-042 " in told and "ws-boss" not in told
    assert " ws-boss " in show.line(data, names={"b2": "ws-042"})


def test_colour_only_when_asked_and_always_ended() -> None:
    high = raw("copy.burst", limit=event.LimitInfo(name="burst", window=600, bytes=1, files=1))
    assert "\x1b" not in show.line(high)
    coloured = show.line(high, colour=True)
    assert coloured.count("\x1b[31m") == 1 and coloured.endswith("\x1b[0m")


def test_impossible_times_are_shown_as_they_are() -> None:
    for at in (0, 1 << 53, -1):
        assert columns.time_text(at, JST)
    assert columns.time_text(1 << 53, JST).endswith(" ms")


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (4_200_000, "4.2 MB"), (999_999, "1.0 MB"), (10**18, "1000.0 PB")],
)
def test_sizes(count: int, text: str) -> None:
    assert columns.size_text(count) == text


def test_tables_line_up_whatever_stands_in_them() -> None:
    lines = columns.table([["佐藤", "1"], ["\x1b[2J", "22"]], ["NAME", "N"]).splitlines()
    assert [columns.display_width(line[: line.rindex(" ") + 1]) for line in lines] == [11, 11, 11]
