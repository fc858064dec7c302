"""Foreign text made harmless and fitted into columns; sizes, windows and times as people write them.

Owns: what may reach a terminal (a file may be named like a terminal escape, a line break or a right-to-left trick), how
wide text is there, and tables. Pure. Must not know: events, languages, terminals; `show` and the command lines ask it.
"""

import unicodedata
from datetime import UTC, datetime, tzinfo

MAX_PIECE = 400
"""Characters of one foreign text, at most; a path may have 4096."""

FORMULA = ("=", "+", "-", "@", "\t", "\r", "＝", "＋", "－", "＠")
"""With what a cell begins that a spreadsheet may run as a formula; the full-width ones in Japanese versions"""
_INVISIBLE = "\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0"
"""Letters and marks by their category, and nothing to be seen"""
_MOST_MARKS = 4
"""Combining marks on one letter; more are no writing, but a smear over the lines above"""
_UNSAFE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def harmless(text: str, limit: int = MAX_PIECE) -> str:
    """Foreign text for a terminal: controls, line breaks, bidi, invisible characters as `\\u{hex}`; cut at `limit`."""
    cut = text if len(text) <= limit else text[: limit - 1] + "…"
    if cut.isascii() and cut.isprintable():
        return cut
    shown, marks = [], 0
    for each in cut:
        marks = marks + 1 if unicodedata.category(each)[0] == "M" else 0
        shown.append(each if _safe(each) and marks <= _MOST_MARKS else f"\\u{{{ord(each):x}}}")
    return "".join(shown)


def guarded(text: str) -> str:
    """A cell of CSV that no spreadsheet takes for a formula: a quote is put before what looks like one. Numbers stay."""
    number = text[:1] in "+-" and text[1:].isascii() and text[1:].isdigit()
    return f"'{text}" if text.startswith(FORMULA) and text != "-" and not number else text


def _safe(each: str) -> bool:
    """Whether it shows, and as one thing: of blanks only the plain and the full-width one do."""
    kind = unicodedata.category(each)
    return each in " \u3000" if kind == "Zs" else kind not in _UNSAFE and each not in _INVISIBLE


def display_width(text: str) -> int:
    """Columns `text` takes on a terminal: 2 for wide characters (UAX 11), 0 for combining ones."""
    if text.isascii():
        return len(text)
    return sum(0 if unicodedata.combining(each) else 2 if unicodedata.east_asian_width(each) in "WF" else 1 for each in text)


def fit(text: str, width: int) -> str:
    """`text` cut to `width` columns, with an ellipsis if it was longer."""
    if display_width(text) <= width:
        return text
    kept, used = [], 0
    for each in text:
        used += display_width(each)
        if used > width - 1:
            break
        kept.append(each)
    return "".join(kept) + "…"


def pad(text: str, width: int) -> str:
    """`text` and spaces up to `width` columns."""
    return text + " " * (width - display_width(text))


def size_text(count: int) -> str:
    """ "4.2 MB": decimal units, as media are sold and file managers show them."""
    if count < 1000:
        return f"{count} B"
    value = float(count)
    for unit in ("kB", "MB", "GB", "TB", "PB"):
        value /= 1000
        if value < 999.95 or unit == "PB":
            break
    return f"{value:.1f} {unit}"


def window_text(seconds: int) -> str:
    """ "10m", "30d": as it is written in the configuration."""
    for unit, name in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= unit and seconds % unit == 0:
            return f"{seconds // unit}{name}"
    return f"{seconds}s"


def time_text(ms: int, zone: tzinfo | None) -> str:
    """Local date and time to the second; a time no calendar has is shown as the number it is."""
    try:
        return datetime.fromtimestamp(ms / 1000, zone or UTC).strftime("%Y-%m-%d %H:%M:%S")
    except (ValueError, OverflowError, OSError):
        return f"{ms} ms"


def table(rows: list[list[str]], heads: list[str], gap: int = 2) -> str:
    """Rows of foreign text as columns under `heads`; the last column is not padded."""
    clean = [heads, *([harmless(cell) for cell in row] for row in rows)]
    widths = [max(display_width(row[n]) for row in clean) for n in range(len(heads))]
    lines = [[pad(cell, widths[n] + gap) if n + 1 < len(heads) else cell for n, cell in enumerate(row)] for row in clean]
    return "\n".join("".join(cells).rstrip() for cells in lines)
