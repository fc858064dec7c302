"""What an attacker writes on a stick, in a descriptor or a file name, is shown nowhere as anything but text.

One rule cleans (`agent/contract/columns.py`: `harmless`, `guarded`; for what is stored, `media.clean` and `path_text`); here
every place that shows foreign text is driven: events, lines, tables, status, notices, terminals, CSV, metrics, the register.
"""

import csv
import io
import json
import os
import re
import unicodedata
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ocsf_check import problems
from workstation import START, Workstation

from agent import checkup, notifying, voice
from agent.contract import columns, show
from agent.contract.event import path_bytes, path_text, read
from agent.core import facts
from agent.core.facts import Device, OpenFile, Process
from agent.core.notice import KINDS, Notice, of_event

EVIL = [
    "\x1b[2J\x1b]0;owned\x07\x1b[31m",
    "\x9b31mC1",
    "two\nlines\r\nthree\x85four\u2028five\u2029",
    "invoice\u202exlsx.exe\u2066\u2069\u200f",
    "%s%n%x{0}{seen.__class__}$(reboot)`id`;rm -rf ~|&",
    '<b>bold</b><img src=x onerror="x()">&amp;<a href="http://x">y</a>',
    '=HYPERLINK("http://x","y")',
    "＝1＋1",
    "+1-1@SUM(A1)",
    "@cmd|'/c calc'!A0",
    "\t=1+1",
    "-2+3",
    "nul\0byte",
    "x" * 4096,
    "é" * 2000 + "\u0301" * 300,
    "\u3164\u115f\u2800\ufeff\u200b",
    "\udcff\udc80\ud800",
    '","severity_id":5,"x":"',
    "\\u001b[31m\\x1b",
    "../../etc/passwd",
    "# HELP x\nsekisho_events_accepted_total 0",
    "' OR 1=1; DROP TABLE events; --",
    "",
    " ",
    "ｶﾀｶﾅ・顧客🦊\U000e0041",
]
EVIL_TEXT = st.one_of(
    st.sampled_from(EVIL),
    st.text(max_size=300),
    st.text(alphabet=st.characters(categories=["Cc", "Cf", "Cs", "Co", "Zl", "Zp", "Mn", "Zs"]), max_size=40),
    st.tuples(st.sampled_from(EVIL), st.sampled_from(EVIL)).map("".join),
)
EVIL_NAME = st.one_of(
    st.sampled_from(EVIL).map(lambda text: text.encode("utf-8", "surrogateescape" if _escapes(text) else "replace")),
    st.binary(min_size=1, max_size=255),
).map(lambda raw: raw.replace(b"\0", b"").replace(b"/", b"_") or b"x")


def _escapes(text: str) -> bool:
    return not any("\ud800" <= each <= "\udfff" and not "\udc80" <= each <= "\udcff" for each in text)


def assert_line(text: str) -> None:
    """One line that any terminal shows as it is."""
    bad = [each for each in text if not each.isprintable() and each not in " \u3000"]
    assert not bad and len(text.splitlines()) <= 1, ascii(text)
    assert not any(unicodedata.category(each) in ("Cc", "Cf", "Cs", "Zl", "Zp") for each in text), ascii(text)


@st.composite
def stories(draw: st.DrawFn) -> Workstation:
    """A stick whose every string is hostile, protected and other files with hostile names onto it and from it."""
    ws = Workstation(record_names=draw(st.booleans()), name=draw(EVIL_TEXT), require_approval=draw(st.booleans()))
    device = Device(
        id="/sys/devices/usb1/1-9",
        bus=draw(st.one_of(st.just("usb"), EVIL_TEXT)),
        subsystem="usb",
        vendor=draw(EVIL_TEXT),
        model=draw(EVIL_TEXT),
        serial=draw(EVIL_TEXT),
        vendor_id=draw(EVIL_TEXT),
        product_id=draw(EVIL_TEXT),
        interfaces=[draw(EVIL_TEXT), "08:06:50"],
        nodes=["8:32", "8:33"],
        removable=True,
    )
    name = path_text(draw(EVIL_NAME))
    at = f"/media/{path_text(draw(EVIL_NAME))}"
    ws.login(draw(EVIL_TEXT), tty=draw(EVIL_TEXT))
    ws.tell(facts.Register(at_ms=ws.now, version=1, approvals=[]))
    ws.tell(facts.Plugged(at_ms=ws.now, device=device))
    ws.stick = at
    ws.tell(
        facts.Mounted(
            at_ms=ws.now,
            mount_id=9,
            dev="8:33",
            mount=at,
            fs=draw(EVIL_TEXT),
            label=draw(EVIL_TEXT),
            fs_uuid=draw(EVIL_TEXT),
            autorun=[draw(EVIL_TEXT)],
        )
    )
    source = ws.file(f"/srv/customers/{name}", 30_000)
    shell = ws.run("/usr/bin/cp", draw(EVIL_TEXT), exe_name := f"/opt/{name}", unit=draw(EVIL_TEXT), container=draw(EVIL_TEXT))
    shell.seen(files=[OpenFile(source, 30_000, ws.keys[source]), OpenFile(exe_name, 3)])
    shell.read(source).create(f"{at}/{name}").close(f"{at}/{name}", 30_000)
    other = ws.run(f"/opt/{name}", name).create(f"{at}/x{name}").close(f"{at}/x{name}", 17)
    program = ws.run("/usr/bin/cp", name)
    there = ws.file(f"{at}/in-{name}", 4_000)
    ws.tell(facts.MediumRead(at_ms=ws.now, pid=program.pid, key=ws.keys[there], path=there))
    home = ws.file(f"/home/sato/in-{name}", 4_000)
    ws.tell(facts.Closed(at_ms=ws.now, pid=program.pid, key=ws.keys[home], path=home, size=4_000, born_ms=ws.now))
    for ask in ws.core.trace():
        ws.tell(facts.Traced(at_ms=ws.now, key=ask.key, path=ask.path, how="copied", size=4_000))
    ws.tell(facts.Executed(at_ms=ws.now, pid=other.pid, key=ws.keys[there], path=there))
    ws.tell(
        facts.WayHeld(at_ms=ws.now, pid=shell.pid, way="network", id="tcp:1", peer=draw(EVIL_TEXT), sent=0, since_ms=ws.now)
    )
    ws.tell(facts.WayClosed(at_ms=ws.now, id="tcp:1", pid=shell.pid, sent=40_000))
    ws.tell(facts.Coverage(at_ms=ws.now, sensor="x", ok=False, blind=[draw(EVIL_TEXT)], why=draw(EVIL_TEXT)))
    ws.tell(facts.Lost(at_ms=ws.now, reason=draw(EVIL_TEXT), since_ms=START, until_ms=ws.now))
    ws.tell(facts.Tampered(at_ms=ws.now, what="key_missing", detail={"where": draw(EVIL_TEXT)}))
    return ws.wait(40).unplug(device)


@given(stories())
@settings(max_examples=120, deadline=None)
def test_no_string_spoils_an_event_or_a_line(ws: Workstation) -> None:
    codes = {event.code for event in ws.events}
    assert {"medium.attached", "medium.mounted", "file.copied_out", "file.brought_in"} <= codes, ws.tale("not all was told")
    for raw, event in zip(ws.raw, ws.events, strict=True):
        assert not problems(event)
        raw.decode("utf-8")
        assert raw.count(b"\n") == 0 and json.loads(raw)["severity_id"] == event.severity
        for lang in ("en", "ja"):
            for width in (None, 80):
                assert_line(show.line(raw, lang=lang, width=width))  # type: ignore[arg-type]
            coloured = show.line(raw, lang=lang, colour=True)  # type: ignore[arg-type]
            assert_line(re.sub(r"\x1b\[[0-9;]*m", "", coloured))
            assert coloured.count("\x1b") == len(re.findall(r"\x1b\[[0-9;]*m", coloured)), "no escapes but our own"
        medium = event.said.get("medium")
        for text in (medium or {}).values():
            for each in [text] if isinstance(text, str) else []:
                assert not any(unicodedata.category(letter) in ("Cc", "Cs") for letter in each) or each == medium.get("mount")


@given(stories())
@settings(max_examples=60, deadline=None)
def test_no_string_spoils_what_commands_print_of_the_machine(ws: Workstation) -> None:
    rows = ws.core.media_now(ws.now)
    for lang in ("en", "ja"):
        for line in checkup.media_table([*rows, *({**row, "mount": EVIL[0]} for row in rows)], lang):  # type: ignore[arg-type]
            assert_line(line)


@pytest.mark.parametrize("text", EVIL)
def test_status_shows_foreign_text_harmlessly(text: str) -> None:
    status = {
        "running": True, "healthy": False, "version": "1", "agent": "a" * 32, "name": text, "mode": "warn", "pid": 1,
        "protected": [{"path": text, "watched": False}], "watched_media": [text], "blind": [],
        "sensors": [{"name": text, "ok": False, "sees": [], "blind": [], "why": text}],
        "media": [], "queue": {"waiting": 1, "error": text},
        "spool": {"events": 1, "bytes": 1, "last_seq": 1, "oldest_ms": 1, "acked": 0},
        "collector": {"url": text, "last_error": text, "backlog": 1, "last_receipt": None},
        "counts": {}, "memory_kib": 1, "notices": {"desktop": 0, "terminal": 0, "nobody": 1, "last_why": text},
    }  # fmt: skip
    for lang in ("en", "ja"):
        for line in checkup.lines(status, lang, lambda shown, tone: shown):  # type: ignore[arg-type]
            assert_line(line)


# -- what a person is told -------------------------------------------------------------------------------------------------


class _Markup(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


@given(EVIL_TEXT, EVIL_TEXT, EVIL_TEXT, st.sampled_from(KINDS))
@settings(max_examples=300, deadline=None)
def test_a_notice_has_no_markup_and_no_controls_but_ours(medium: str, contact: str, limit: str, kind: Any) -> None:
    notice = Notice(at_ms=1, uid=1, kind=kind, severity=4, medium=medium, key=medium, limit=limit, decision="unapproved")
    for lang in ("en", "ja"):
        link = voice.approval_link("https://x/{medium}?h={machine}", "", notice, contact if _escapes(contact) else "x")
        title, lines = voice.spoken(notice, lang, contact, link)  # type: ignore[arg-type]
        for line in (title, *lines):
            assert_line(line)
            assert len(line) < 4_000
            shown = _Markup()
            shown.feed(notifying.escape(line))
            shown.close()
            assert not shown.tags and shown.text == line
        json.dumps([title, lines]).encode()


@given(stories())
@settings(max_examples=40, deadline=None)
def test_what_is_said_of_events_is_harmless_too(ws: Workstation) -> None:
    for raw in ws.raw:
        seen = read(raw)
        if seen.unmapped.sekisho.medium is not msgspec.UNSET:
            assert_line(show.medium_text(seen.unmapped.sekisho.medium))


def test_a_real_terminal_gets_only_text() -> None:
    """What reaches the person's terminal between our own line breaks and bell."""
    if os.geteuid() != 0:
        pytest.skip("needs root: a terminal that belongs to somebody")
    import pty
    import tty

    ours, theirs = pty.openpty()
    tty.setraw(theirs)
    try:
        name = os.ttyname(theirs).removeprefix("/dev/")
        for text in EVIL:
            notice = Notice(at_ms=1, uid=0, kind="copied", severity=4, medium=text, key=text)
            title, lines = voice.spoken(notice, "en", text, "")
            asked = {"uid": os.geteuid(), "tty": name, "dev": "/dev", "texts": {"en": [title, lines], "ja": [title, lines]}}
            assert notifying._write(f"/dev/{name}", asked, "en")
            got = b""
            while not got.endswith(b"\r\n\r\n"):
                got += os.read(ours, 65536)
            for line in got.decode().replace("\a", "").split("\r\n"):
                assert_line(line)
    finally:
        os.close(ours)
        os.close(theirs)


# -- tables, CSV, metrics, the register's commands -------------------------------------------------------------------------


@given(st.lists(st.tuples(EVIL_TEXT, EVIL_TEXT), max_size=5))
@settings(max_examples=200, deadline=None)
def test_a_table_keeps_its_rows(rows: list[tuple[str, str]]) -> None:
    text = columns.table([list(row) for row in rows], ["ONE", "TWO"])
    assert len(text.split("\n")) == len(rows) + 1
    for line in text.split("\n"):
        assert_line(line)


def runs(cell: str) -> bool:
    """Whether a spreadsheet may take a cell for more than text or a number."""
    return bool(cell) and unicodedata.normalize("NFKC", cell[0]) in "=+-@\t\r" and not re.fullmatch(r"[+-]?[0-9]*|-", cell)


@given(EVIL_TEXT)
@settings(max_examples=400, deadline=None)
def test_no_cell_is_a_formula_and_none_breaks_its_row(text: str) -> None:
    from server_stub import commands, register

    cell = commands._cell(text)
    assert not runs(cell), ascii(cell)
    out = io.StringIO()
    csv.writer(out).writerow([cell, "end"])
    assert next(csv.reader(io.StringIO(out.getvalue()))) == [cell, "end"] and out.getvalue().count("\n") == 1
    assert_line(cell)
    made = io.StringIO()
    stdout, register.sys.stdout = register.sys.stdout, made  # type: ignore[attr-defined]
    try:
        register._csv(["KEY"], [[text]])
    finally:
        register.sys.stdout = stdout  # type: ignore[attr-defined]
    ((_,), (shown,)) = csv.reader(io.StringIO(made.getvalue()))
    assert not runs(shown)
    assert_line(shown)


@given(EVIL_TEXT.filter(_escapes))
@settings(max_examples=200, deadline=None)
def test_an_exported_register_comes_back_as_it_was(text: str) -> None:
    from server_stub import sheet

    kept = columns.harmless(text)
    assert sheet.plain(sheet.guarded(kept)) == kept and not runs(sheet.guarded(kept))


def test_metrics_carry_no_foreign_text() -> None:
    """Labels are ours alone: no name of a machine, medium or person is in them."""
    import inspect

    from server_stub import pages

    told = inspect.getsource(pages.metrics)
    assert "hostname" not in told and ".name" not in told.replace("name}", "")


@given(EVIL_NAME)
def test_a_path_comes_back_byte_by_byte(raw: bytes) -> None:
    assert path_bytes(path_text(raw)) == raw


@given(EVIL_TEXT)
def test_harmless_text_is_harmless(text: str) -> None:
    for limit in (12, 400):
        shown = columns.harmless(text, limit)
        assert_line(shown)
        assert columns.harmless(shown, 10_000) == shown, "cleaning twice changes nothing"


@pytest.fixture(scope="module")
def facts_written() -> Iterator[list[bytes]]:
    yield [
        facts.write(facts.ProcSeen(at_ms=1, process=Process(pid=1, exe=text.encode("utf-8", "replace").decode())))
        for text in EVIL
    ]


def test_recorded_facts_are_one_a_line(facts_written: list[bytes]) -> None:
    assert all(b"\n" not in line for line in facts_written)
    assert len(list(facts.read(facts_written))) == len(EVIL)


def test_of_event_never_fails_on_what_a_stick_says() -> None:
    for text in EVIL:
        ws = Workstation(record_names=True).login("sato")
        ws.tell(facts.Register(at_ms=ws.now, version=1, approvals=[]))
        device = Device(id="x", bus="usb", vendor=text, model=text, serial=text, nodes=["8:1"], removable=True)
        for event in ws.core.feed(facts.Plugged(at_ms=ws.now, device=device)):
            notice = of_event(event)
            assert notice is None or (assert_line(notice.medium) or notice.uid == 1000)
