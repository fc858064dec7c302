"""Approvals as CSV, there and back: what `media export` writes, `media import` reads, and a spreadsheet in between may change.

Owns: the columns with their English and Japanese heads, how times, lists and yes/no stand in a cell, and that no cell is a
formula for a spreadsheet (a leading quote is put before, and taken away on the way back). What can't be read is said with line
and column. Pure: texts in, rows out; the time zone is handed in. Must not know: files, the collector, which rows are allowed.
"""

import csv
import re
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta, tzinfo
from typing import Any

from msgspec import Struct

from agent.contract import columns
from server_stub import query
from server_stub.bulk import Row
from server_stub.query import BadQuery

COLUMNS: dict[str, str] = {
    "key": "媒体キー",
    "owner": "所有者",
    "department": "部署",
    "approver": "承認者",
    "requester": "申請者",
    "purpose": "目的",
    "since": "開始日",
    "until": "期限",
    "machines": "端末",
    "dirs": "対象ディレクトリ",
    "read_only": "読み取り専用",
    "once": "一回限り",
    "state": "状態",
    "reason": "理由",
    "id": "ID",
}
"""Each column and its Japanese head; either may stand in a file."""
_NEEDED = ("key", "owner", "approver")
_OTHER_HEADS = {"キー": "key", "媒体": "key", "終了日": "until", "有効期限": "until", "ディレクトリ": "dirs", "ラベル": "dirs"}
_YES = ("yes", "true", "1", "x", "○", "はい")
_NO = ("", "no", "false", "0", "-", "×", "いいえ")
_STATES = {"requested": "申請中", "approved": "承認済み", "denied": "却下", "revoked": "取消済み", "lost": "紛失"}
_NEVER = ("", "never", "無期限", "なし")
_FORMULA = (*columns.FORMULA, "'")
_DAY = timedelta(days=1)


class Fault(Struct):
    """What is wrong with a file: where, and what to do. `column` "" if it is not about one."""

    line: int
    column: str
    why: str


class NotText(ValueError):
    """A file's bytes are no text in the encoding it should have; the sentence says what to do."""


def decode(data: bytes, encoding: str = "") -> str:
    """A file's text: UTF-8 with or without a mark, or the `encoding` that was named. Raises NotText."""
    if encoding:
        try:
            return data.decode(encoding)
        except UnicodeDecodeError:
            raise NotText(f"is not in {encoding}; leave out --encoding if it is UTF-8") from None
        except LookupError:
            raise NotText(f'"{encoding}" is no encoding; the usual ones are utf-8 and cp932 (Shift_JIS)') from None
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise NotText('is UTF-16 ("Unicode text"); save it as "CSV UTF-8", or say --encoding utf-16')
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        pass
    try:
        data.decode("cp932")
    except UnicodeDecodeError:
        raise NotText('is not UTF-8; save it as "CSV UTF-8"') from None
    raise NotText('is not UTF-8, but it may be Shift_JIS: save it as "CSV UTF-8", or say --encoding cp932')


# -- writing ---------------------------------------------------------------------------------------------------------------


def heads(japanese: bool) -> list[str]:
    """The head line."""
    return list(COLUMNS.values()) if japanese else list(COLUMNS)


def cells(row: Row, zone: tzinfo | None) -> list[str]:
    """A row as it stands in a file."""
    made: dict[str, str] = {name: str(getattr(row, name)) for name in COLUMNS}
    made |= {name: _joined(getattr(row, name)) for name in ("machines", "dirs")}
    made |= {name: "yes" if getattr(row, name) else "" for name in ("read_only", "once")}
    made["since"] = _first_day(row.since, zone) if row.since else ""
    made["until"] = "never" if row.until is None else _last_day(row.until, zone)
    return [guarded(made[name]) for name in COLUMNS]


def guarded(text: str) -> str:
    """A cell that no spreadsheet takes for a formula; `plain` undoes it."""
    return f"'{text}" if text.startswith(_FORMULA) else text


def plain(cell: str) -> str:
    """What `guarded` was given."""
    return cell[1:] if cell[:1] == "'" and cell[1:].startswith(_FORMULA) else cell


def _joined(many: list[str]) -> str:
    return ";".join(each.replace("\\", "\\\\").replace(";", "\\;") for each in many)


def _first_day(ms: int, zone: tzinfo | None) -> str:
    """A day that begins then, or the exact time."""
    at = _at(ms, zone)
    day = f"{at:%Y-%m-%d}" if at else ""
    return day if day and _parsed(day, zone) == ms else _exact(ms)


def _last_day(ms: int, zone: tzinfo | None) -> str:
    """A day that ends then, or the exact time."""
    at = _at(ms - 1, zone)
    day = f"{at:%Y-%m-%d}" if at else ""
    return day if day and _end(day, zone) == ms else _exact(ms)


def _at(ms: int, zone: tzinfo | None) -> datetime | None:
    try:
        return datetime.fromtimestamp(ms / 1000, zone or UTC)
    except (ValueError, OverflowError, OSError):
        return None


def _exact(ms: int) -> str:
    at = _at(ms, UTC)
    text = at.isoformat(timespec="milliseconds") if at else ""
    return text if text and _parsed(text, UTC) == ms else f"{ms:015d}"


# -- reading ---------------------------------------------------------------------------------------------------------------


def read(text: str, zone: tzinfo | None) -> tuple[list[tuple[int, Row]], list[Fault]]:
    """The rows of a file, each with its line, and what is wrong with it."""
    lines = csv.reader(text.splitlines(keepends=True), strict=True)
    rows: list[tuple[int, Row]] = []
    faults: list[Fault] = []
    try:
        names = _names(next(lines, []), faults)
        if faults:
            return [], faults
        for found in lines:
            if any(cell.strip() for cell in found):
                _row(lines.line_num, dict(zip(names, found, strict=False)), zone, rows, faults)
    except csv.Error as error:
        faults.append(Fault(lines.line_num, "", f"is no CSV here ({error}); look for a quote that is not closed"))
    faults += _twice(rows)
    return rows, faults


def _names(heads: Iterable[str], faults: list[Fault]) -> list[str]:
    known = (
        {head: name for name, japanese in COLUMNS.items() for head in (name, japanese)} | _OTHER_HEADS | {"revoked": "revoked"}
    )
    names = [known.get(head.strip().lower(), head.strip()) for head in heads]
    if missing := [name for name in _NEEDED if name not in names]:
        wanted = ",".join(COLUMNS)
        faults.append(Fault(1, "", f"lacks the column {', '.join(missing)}; the head line is: {wanted}"))
    strange = [name for name in names if name and name not in known.values()]
    if strange:
        faults.append(Fault(1, strange[0], f"is no column of this list; the columns are: {','.join(COLUMNS)}"))
    twice = [name for name in names if name and names.count(name) > 1]
    if twice:
        faults.append(Fault(1, twice[0], "stands twice in the head line; remove one"))
    return names


def _row(line: int, found: dict[str, str], zone: tzinfo | None, rows: list[tuple[int, Row]], faults: list[Fault]) -> None:
    said = {name: plain(cell.strip()) for name, cell in found.items()}
    known = len(faults)
    made: dict[str, Any] = {name: said.get(name, "") for name in ("key", "id", "owner", "department", "approver", "requester")}
    made |= {name: said.get(name, "") for name in ("purpose", "reason")}
    made |= {name: _split(said.get(name, "")) for name in ("machines", "dirs")}

    def wrong(column: str, why: str) -> None:
        faults.append(Fault(line, column, why))

    for name in ("read_only", "once", "revoked"):
        text = said.get(name, "").lower()
        if text not in _YES and text not in _NO:
            wrong(name, f'"{text[:40]}" is neither yes nor no; write yes, or leave it empty')
        made[name] = text in _YES
    state = {word: each for each, japanese in _STATES.items() for word in (each, japanese)}.get(
        said.get("state", "") or "approved"
    )
    if state is None:
        wrong("state", f'"{said["state"][:40]}" is no state; write one of {", ".join(_STATES)}')
    made["state"] = "revoked" if made.pop("revoked") and state in ("approved", None) else state
    for name, read_it, empty in (("since", _parsed, 0), ("until", _end, None)):
        text = said.get(name, "")
        try:
            made[name] = empty if text in _NEVER else read_it(text, zone)
        except BadQuery as error:
            wrong(name, str(error))
    for name in ("key", "owner", "approver"):
        optional = name != "key" and state in ("lost", "requested")
        if not made[name] and not (optional and (name == "approver" or state == "lost")):
            wrong(name, "is empty; fill it in")
    if len(faults) == known:
        rows.append((line, Row(**made)))


def _twice(rows: list[tuple[int, Row]]) -> Iterator[Fault]:
    """Rows that say the same approval twice."""
    seen: dict[tuple[Any, ...], int] = {}
    for line, row in rows:
        scope = (row.key, row.id) if row.id else (row.key, frozenset(row.machines), frozenset(row.dirs), row.once, row.state)
        if (first := seen.setdefault(scope, line)) != line:
            yield Fault(line, "key", f"says the same approval as line {first}; remove one")


def _split(cell: str) -> list[str]:
    parts: list[str] = []
    now, at = "", 0
    while at < len(cell):
        if cell[at] == "\\" and cell[at + 1 : at + 2] in ("\\", ";"):
            now, at = now + cell[at + 1], at + 2
        elif cell[at] == ";":
            parts, now, at = [*parts, now.strip()], "", at + 1
        else:
            now, at = now + cell[at], at + 1
    return [each for each in (*parts, now.strip()) if each]


def _iso(text: str) -> str:
    """A day as spreadsheets write it (2026/1/5 9:00) in the form of ISO 8601; anything else as it is."""
    found = re.fullmatch(r"(\d{4})[/-](\d{1,2})[/-](\d{1,2})(?:[ T](\d{1,2})(:.*))?", text)
    if not found:
        return text
    day = f"{found[1]}-{int(found[2]):02d}-{int(found[3]):02d}"
    return f"{day}T{int(found[4]):02d}{found[5]}" if found[4] else day


def _parsed(text: str, zone: tzinfo | None) -> int:
    """A time as it stands, ms. Raises BadQuery."""
    if not text[:1].isdecimal():  # "today" would be another day each time the file is read
        raise BadQuery(f'"{text[:40]}" is no day; write "2026-11-23", or an exact time, or "never"')
    return query.parse_time(_iso(text), 0, zone)


def _end(text: str, zone: tzinfo | None) -> int:
    """The end of a validity: a day counts to its end. Raises BadQuery."""
    day = _iso(text)
    at = _parsed(day, zone)
    if len(day) != 10 or day > "9999-12-30":
        return at
    return _parsed(f"{datetime.fromisoformat(day) + _DAY:%Y-%m-%d}", zone)
