"""Which events: one grammar of filters for the API, the tail and the command line, and its SQL.

Owns: the names of filters and fields, what a value may look like (relative times, severity names, prefixes), cursors,
and the SQL with its parameters: a user's text is never part of the SQL. Pure: "now" and the time zone are handed in.
Must not know: who asks, HTTP, the engine.

`q` looks for text in the event's exact bytes as they are shown; all in lower case, it ignores the case of ASCII letters.
"""

import difflib
import re
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta, tzinfo
from typing import Any

import msgspec
from msgspec import Struct

from agent.contract.codes import CODES, SEVERITIES

FILTERS = ("agent", "user", "medium", "way", "event", "severity", "since", "until", "q")
MAX_LIMIT = 10_000
DEFAULT_LIMIT = 100
MAX_TEXT = 1_000

FIELDS = {
    "user": '"user"',
    "agent": "host",
    "medium": "medium",
    "event": "code",
    "label": "label",
    "way": "way",
    "program": "program",
    "day": "",
}
"""What events can be counted by → its column, a number of `names`; a day has none (`Dialect.day`)."""

_NAME = "(SELECT id FROM names WHERE text = ?)"
_UUID = re.compile("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")

_UNITS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400, "w": 604800}


def uid_key(uid: str) -> bytes | str:
    """How an event's uid is kept: a UUID as its 16 bytes, anything else as it is."""
    return bytes.fromhex(uid.replace("-", "")) if _UUID.fullmatch(uid) else uid


class Dialect(Struct, frozen=True):
    """What engines say differently; the defaults are SQLite's. In `raw_like` and `raw_has` the needle was made by `needle`.

    `like`: matches a pattern, ignoring the case of ASCII letters. `day`: of `time`, in the collector's time zone.
    """

    like: str = "LIKE ? ESCAPE '\\'"
    raw_like: str = "CAST(raw AS TEXT) LIKE ? ESCAPE '\\'"
    raw_has: str = "instr(raw, CAST(? AS BLOB)) > 0"
    day: str = "date(time / 1000, 'unixepoch', 'localtime')"
    like_needle: Callable[[str], Any] = str
    has_needle: Callable[[str], Any] = str
    uid: Callable[[str], Any] = uid_key


SQLITE = Dialect()


class BadQuery(Exception):
    """A filter can't be understood; the sentence says which and how to write it."""


class Filter(Struct, kw_only=True, frozen=True):
    """All that is given must hold. Times in ms (`since` included, `until` not); `severity`: at least."""

    agent: str | None = None
    user: str | None = None
    medium: str | None = None
    way: str | None = None
    event: str | None = None
    severity: int | None = None
    since: int | None = None
    until: int | None = None
    q: str | None = None


def parse_time(text: str, now_ms: int, zone: tzinfo | None) -> int:
    """Milliseconds of "-1h", "now", "today", "yesterday", a date, a date and time, RFC 3339, or ms. Raises BadQuery."""
    text = text.strip()
    ago = re.fullmatch(r"-([0-9]{1,6})\s*([a-z]+)", text)
    if ago and ago[2] in _UNITS:
        return now_ms - int(ago[1]) * _UNITS[ago[2]] * 1000
    if re.fullmatch(r"[0-9]{11,15}", text):
        return int(text)
    now = datetime.fromtimestamp(now_ms / 1000, zone)
    midnight = now.replace(hour=0, minute=0, second=0, microsecond=0)
    named = {"now": now, "today": midnight, "yesterday": midnight - timedelta(days=1)}.get(text)
    try:
        at = named or datetime.fromisoformat(text)
        return int((at if at.tzinfo else at.replace(tzinfo=zone)).timestamp() * 1000)
    except (ValueError, OverflowError):
        raise BadQuery(
            f'"{text[:40]}" is no time; write "-1h", "today", "yesterday", "2026-11-23" or "2026-11-23T10:00:00+09:00"'
        ) from None


def parse_severity(text: str) -> int:
    """A name or number → 1..5. Raises BadQuery."""
    numbers = {name: number for number, name in SEVERITIES.items()}
    numbers |= {str(number): number for number in SEVERITIES} | {"informational": 1}
    if text.lower() not in numbers:
        raise BadQuery(f'"{text[:40]}" is no severity; write one of {", ".join(SEVERITIES.values())}, or 1 to 5')
    return numbers[text.lower()]


def _codes(text: str) -> list[str]:
    """The event codes, or beginnings of them, of a list with commas."""
    return [code for each in text.split(",") if (code := each.strip())]


def _check_codes(text: str) -> None:
    """A mistyped code must not look like "no such events". Limits are named by the sites: any `copy.<limit>` may exist."""
    for code in (each.removeprefix("!") for each in _codes(text)):
        start = code.removesuffix("*")
        known = [each for each in CODES if each.startswith(start)] if code.endswith("*") else [code] * (code in CODES)
        if known or start.startswith("copy."):
            continue
        near = difflib.get_close_matches(code, CODES, 1)
        hint = f'; did you mean "{near[0]}"?' if near else "; docs/reference.md lists them"
        raise BadQuery(f'"{code[:40]}" is no event code{hint}')


def parse(values: Mapping[str, str], now_ms: int, zone: tzinfo | None) -> Filter:
    """The filter in a mapping of texts (a query string, arguments); empty texts are not given. Raises BadQuery."""
    got: dict[str, Any] = {}
    for name in FILTERS:
        text = values.get(name, "")
        if not text:
            continue
        if len(text) > MAX_TEXT or "\0" in text:
            raise BadQuery(f'"{name}" is too long or holds a NUL; shorten it')
        if name == "event" and not _codes(text):
            raise BadQuery('"event" names no event code; write it like "file.copied_out" or "copy.*,medium.*"')
        if name == "event":
            _check_codes(text)
        if name in ("since", "until"):
            got[name] = parse_time(text, now_ms, zone)
        else:
            got[name] = parse_severity(text) if name == "severity" else text
    return Filter(**got)


def parse_number(text: str | None, name: str, default: int, low: int, high: int) -> int:
    """A whole number between `low` and `high`. Raises BadQuery."""
    if text is None or text == "":
        return default
    if not re.fullmatch(r"[0-9]{1,18}", text) or not low <= int(text) <= high:
        raise BadQuery(f'"{name}" must be a whole number from {low} to {high}')
    return int(text)


def _like(text: str) -> str:
    return re.sub(r"([\\%_])", r"\\\1", text)


def by_uid(uid: str, dialect: Dialect = SQLITE) -> tuple[str, list[Any]]:
    """Rows `(pos, raw)` of the event with this uid, the first that came."""
    return "SELECT pos, raw FROM events WHERE uid = ? ORDER BY pos LIMIT 1", [dialect.uid(uid)]


def where(wanted: Filter, dialect: Dialect = SQLITE) -> tuple[str, list[Any]]:
    """The condition and its parameters; never empty, and never true of a folded event."""
    terms, values = ["code IS NOT NULL"], list[Any]()
    if wanted.agent is not None:
        chains = "SELECT id FROM chains WHERE agent = ?"
        terms.append(f"(chain IN ({chains}) OR {_NAME} IN (machine, host))")
        values += [wanted.agent] * 2
    if wanted.user is not None:
        terms.append(f'"user" = {_NAME}')
        values.append(wanted.user)
    if wanted.medium is not None:
        keys = f"SELECT id FROM names WHERE text {dialect.like}"  # noqa: S608 - constants
        serials = f"SELECT medium FROM serials WHERE serial {dialect.like}"  # noqa: S608 - constants
        terms.append(f"medium IN ({keys} UNION {serials})")
        values += [_like(wanted.medium) + "%"] * 2
    if wanted.way is not None:
        terms.append(f"way = {_NAME}")
        values.append(wanted.way)
    if wanted.event is not None:
        codes = _codes(wanted.event)
        for unwanted in (False, True):
            some = [code.removeprefix("!") for code in codes if code.startswith("!") == unwanted]
            if not some:
                continue
            each = " OR ".join(f"text {dialect.like}" if code.endswith("*") else "text = ?" for code in some)
            terms.append(f"code {'NOT ' * unwanted}IN (SELECT id FROM names WHERE {each})")  # noqa: S608 - constants
            values += [_like(code[:-1]) + "%" if code.endswith("*") else code for code in some]
    if wanted.severity is not None:
        # Said as a constant, too: an index over part of the events can't be chosen by what a parameter will be.
        terms.append("severity >= 3 AND severity >= ?" if wanted.severity >= 3 else "severity >= ?")
        values.append(wanted.severity)
    if wanted.since is not None:
        terms.append("time >= ?")
        values.append(wanted.since)
    if wanted.until is not None:
        terms.append("time < ?")
        values.append(wanted.until)
    if wanted.q is not None:
        text = msgspec.json.encode(wanted.q).decode()[1:-1]
        if text == text.lower():
            terms.append(dialect.raw_like)
            values.append(dialect.like_needle(f"%{_like(text)}%"))
        else:
            terms.append(dialect.raw_has)
            values.append(dialect.has_needle(text))
    return " AND ".join(terms), values


def tail(wanted: Filter, *, after: int, upto: int, limit: int, dialect: Dialect = SQLITE) -> tuple[str, list[Any]]:
    """Rows `(pos, raw, folded, agent)` for a live reader: the events wanted, and those whose content is gone."""
    condition, values = where(wanted, dialect)
    folded = "code IS NULL"
    if wanted.agent is not None:
        named = "SELECT agent FROM agents WHERE name = ?"
        folded += f" AND chain IN (SELECT id FROM chains WHERE agent = ? OR agent IN ({named}))"  # noqa: S608 - constants
        values += [wanted.agent] * 2
    whose = "(SELECT agent FROM chains WHERE id = chain)"
    text = f"SELECT pos, raw, code IS NULL, {whose} FROM events WHERE pos > ? AND pos <= ? AND (({condition}) OR ({folded}))"  # noqa: S608
    return f"{text} ORDER BY pos LIMIT ?", [after, upto, *values, limit]


def sql(
    wanted: Filter, *, after: int | None, descending: bool, limit: int, upto: int | None = None, dialect: Dialect = SQLITE
) -> tuple[str, list[Any]]:
    """Rows `(pos, raw)` beyond the cursor `after`, in order of arrival; `upto` is the last `pos` looked at."""
    condition, values = where(wanted, dialect)
    if after is not None:
        condition += " AND pos < ?" if descending else " AND pos > ?"
        values.append(after)
    if upto is not None:
        condition += " AND pos <= ?"
        values.append(upto)
    order = "DESC" if descending else "ASC"
    return f"SELECT pos, raw FROM events WHERE {condition} ORDER BY pos {order} LIMIT ?", [*values, limit]  # noqa: S608


def counts(wanted: Filter, field: str, dialect: Dialect = SQLITE) -> tuple[str, list[Any]]:
    """Rows `(value, events, bytes)`, the largest first. Raises BadQuery for an unknown field.

    Bytes are those that left (`file.copied_out`), unless the filter names the events whose bytes are meant: a staged copy
    that leaves later would count twice."""
    if field not in FIELDS:
        raise BadQuery(f'can\'t count by "{field[:40]}"; the fields are: {", ".join(FIELDS)}')
    condition, values = where(wanted, dialect)
    value = "v" if field == "day" else "(SELECT text FROM names WHERE id = v)"
    left = "bytes" if wanted.event else "CASE WHEN code = (SELECT id FROM names WHERE text = 'file.copied_out') THEN bytes END"
    column, total = FIELDS[field] or dialect.day, f"CAST(coalesce(sum({left}), 0) AS BIGINT)"
    each = f"SELECT {column} AS v, count(*) AS n, {total} AS b FROM events"  # noqa: S608 - constants
    order = "t" if field == "day" else "b DESC, n DESC, t"
    return f"SELECT {value} AS t, n, b FROM ({each} WHERE {condition} GROUP BY v) AS g ORDER BY {order}", values  # noqa: S608
