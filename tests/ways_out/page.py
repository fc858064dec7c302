"""Verdicts for people: lines for a terminal, JSON for programs, and the page docs/coverage.md.

Owns: totals and words. The page is made from a run and from nothing else; its text tells how to make it again. Must not know
how cases are run or judged.
"""

import os
import platform
from collections import Counter
from pathlib import Path
from typing import Any

from agent import __version__
from tests.ways_out.judge import Doing, Expected, Verdict
from tests.ways_out.table import Case, Way

Pairs = list[tuple[Case, Verdict]]


def totals(cases: list[Case], verdicts: list[Verdict]) -> dict[str, Any]:
    """Recall and false joins. `recall` is of cases that were done: one with 100,000 files counts as much as one with one."""
    done = [verdict for verdict in verdicts if not verdict.doing.skipped and not verdict.doing.broken]
    ways = [verdict for verdict in done if not verdict.doing.innocent]
    copies = sum(len(verdict.doing.expected) for verdict in ways)
    right = sum(verdict.right for verdict in ways)
    shares = [verdict.right / len(verdict.doing.expected) for verdict in ways if verdict.doing.expected]
    harmless = {case.id: case.way.operations for case in cases if case.way.innocent}
    operations = sum(harmless[verdict.doing.id] for verdict in done if verdict.doing.innocent)
    wrongly = sum(len(verdict.false) for verdict in done if verdict.doing.innocent)
    return {
        "cases": len(ways),
        "wholly_right": sum(verdict.outcome == "right" for verdict in ways),
        "recall": sum(shares) / len(shares) if shares else 1.0,
        "copies": copies,
        "copies_seen": sum(verdict.seen for verdict in ways),
        "copies_right": right,
        "copy_recall": right / copies if copies else 1.0,
        "by_time_alone": sum(verdict.by_time for verdict in done),
        "false_joins": sum(len(verdict.false) for verdict in done),
        "innocent_cases": sum(verdict.doing.innocent for verdict in done),
        "innocent_operations": operations,
        "innocent_false_joins": wrongly,
        "innocent_false_joins_per_1000": 1000 * wrongly / operations if operations else 0.0,
        "skipped": sum(bool(verdict.doing.skipped) for verdict in verdicts),
        "broken": sum(bool(verdict.doing.broken) for verdict in verdicts),
    }


def machine() -> dict[str, str]:
    """What the figures were measured on."""
    model = next((line.partition(":")[2].strip() for line in _read("/proc/cpuinfo").splitlines() if "model name" in line), "")
    system = next(
        (line.partition("=")[2].strip('"') for line in _read("/etc/os-release").splitlines() if line.startswith("PRETTY")), ""
    )
    return {
        "sekisho": __version__,
        "kernel": platform.release().split("-")[0],
        "system": system,
        "python": platform.python_version(),
        "processor": f"{os.cpu_count()} × {model or platform.machine()}",
    }


def as_dict(case: Case, verdict: Verdict) -> dict[str, Any]:
    """One case for programs."""
    doing = verdict.doing
    return {
        "id": doing.id,
        "way": case.way.name,
        "group": case.way.group,
        "disk": case.disk,
        "medium": case.onto,
        "outcome": verdict.outcome,
        "copies": len(doing.expected),
        "seen": verdict.seen,
        "joined": verdict.joined,
        "bytes": verdict.bytes,
        "right_medium": verdict.medium,
        "login": verdict.login,
        "right": verdict.right,
        "by_time": verdict.by_time,
        "links": dict(verdict.links),
        "attribution": dict(verdict.attributions),
        "confidence": verdict.confidence if verdict.seen else None,
        "false": verdict.false,
        "wrong": verdict.wrong[:20],
        "skipped": doing.skipped,
        "broken": doing.broken,
        "seconds": round(doing.seconds, 2),
    }


def from_dict(row: dict[str, Any], ways: dict[str, Way]) -> tuple[Case, Verdict]:
    """A case of a former run, from what `as_dict` made of it. Raises KeyError if the table has no such way any more."""
    way = ways[row["way"]]
    one = Expected(path="", bytes=None, login=None)
    said = {name: row[name] for name in ("skipped", "broken", "seconds")}
    doing = Doing(id=row["id"], source="", dest="", expected=[one] * row["copies"], innocent=way.innocent, **said)
    counts = {name: row[name] for name in ("seen", "joined", "bytes", "login", "right", "by_time", "false", "wrong")}
    links, known = Counter(row["links"]), Counter(row["attribution"])
    verdict = Verdict(doing=doing, medium=row["right_medium"], links=links, attributions=known, **counts)
    verdict.confidence = row["confidence"] or 1.0
    return Case(way, row["disk"], row["medium"], row["id"]), verdict


def text(cases: list[Case], verdicts: list[Verdict]) -> str:
    """A line a case, what was wrong below it, the totals last."""
    lines = []
    for case, verdict in zip(cases, verdicts, strict=True):
        lines.append(f"{verdict.outcome:8} {case.title:58} {_how(verdict)}")
        doing = verdict.doing
        lines += [f"           {why}" for why in (doing.skipped, doing.broken) if why]
        lines += [f"           false: {each}" for each in verdict.false[:5]]
        lines += [f"           {each}" for each in verdict.wrong[:5]]
    told = totals(cases, verdicts)
    lines += ["", *_sums(told)]
    bad = _not_right(list(zip(cases, verdicts, strict=True)))
    lines += ["", "not right:" if bad else "all was right", *(f"  {case.title}: {_why(verdict)}" for case, verdict in bad)]
    return "\n".join(lines)


def markdown(cases: list[Case], verdicts: list[Verdict], seconds: float, on: dict[str, str]) -> str:
    """docs/coverage.md. `on` is the `machine` it was measured on."""
    pairs = list(zip(cases, verdicts, strict=True))
    told = totals(cases, verdicts)
    out = [
        "# Coverage: every way out, carried out and looked up",
        "",
        "Made by `make ways-out ARGS='-o md'` from a run, not by hand. Each row of `tests/ways_out/ways.toml` was carried",
        "out against a real agent; a copy counts as right if an event names its source, the bytes, the medium (or way) and the",
        "login user, by a link other than `time`. Your own ways: add a row, or `make ways-out FILE=yours.toml`. How far a join",
        "can be trusted and what no agent can see: [limits.md](limits.md).",
        "",
        f"Sekisho {on['sekisho']}, Linux {on['kernel']}, {on['system']}, Python {on['python']}, {on['processor']};",
        f"{seconds / 60:.0f} minutes.",
        "",
        *[f"- {line}" for line in _sums(told)],
        "",
    ]
    ways = [pair for pair in pairs if not pair[0].way.innocent]
    for group in dict.fromkeys(case.way.group for case, _ in ways):
        out += [
            f"## {group[:1].upper()}{group[1:]}",
            "",
            "| way | from → onto | right | link | process known | remarks |",
            "|---|---|---|---|---|---|",
        ]
        for name in dict.fromkeys(case.way.name for case, _ in ways if case.way.group == group):
            out.append(_row([pair for pair in ways if pair[0].way.name == name]))
        out.append("")
    innocent = [pair for pair in pairs if pair[0].way.innocent]
    if innocent:
        out += [
            "## Ordinary work, which must not be told as a copy",
            "",
            "| work | operations | false joins | per 1,000 | remarks |",
            "|---|---|---|---|---|",
        ]
        for name in dict.fromkeys(case.way.name for case, _ in innocent):
            out.append(_quiet([pair for pair in innocent if pair[0].way.name == name]))
        out.append("")
    missed = _not_right(pairs)
    out += ["## Not right in this run", ""]
    out += [f"- **{case.title}**: {_cell(_why(verdict))}" for case, verdict in missed] or ["Nothing."]
    not_done = sorted({(case.way.name, verdict.doing.skipped) for case, verdict in pairs if verdict.doing.skipped})
    out += ["", "## Not carried out in this run", ""]
    out += [f"- {name}: {_cell(why)}" for name, why in not_done] or ["Everything was."]
    return "\n".join(out) + "\n"


def _not_right(pairs: Pairs) -> Pairs:
    """Those that were carried out and not told as they ought to be, ordinary work told as a copy among them."""
    return [pair for pair in pairs if pair[1].outcome in ("missed", "partly", "wrong", "broken")]


def _row(pairs: Pairs) -> str:
    case = pairs[0][0]
    done = [verdict for _, verdict in pairs if not verdict.doing.skipped]
    copies, right = sum(len(verdict.doing.expected) for verdict in done), sum(verdict.right for verdict in done)
    links: Counter[str] = sum((verdict.links for verdict in done), Counter())
    known: Counter[str] = sum((verdict.attributions for verdict in done), Counter())
    disks, onto = list(dict.fromkeys(c.disk for c, _ in pairs)), list(dict.fromkeys(c.onto for c, _ in pairs))
    remarks = [case.way.note] if case.way.note else []
    by_time = sum(verdict.by_time for verdict in done)
    remarks += [f"{by_time} by time alone"] if by_time else []
    wrongly = sum(len(verdict.false) for verdict in done)
    remarks += [f"**{wrongly} false**"] if wrongly else []
    seen = "not carried out" if not done else f"{right:,} of {copies:,}"
    cells = [
        case.way.name,
        f"{', '.join(disks)} → {', '.join(onto)}",
        seen,
        ", ".join(links),
        ", ".join(known),
        "; ".join(remarks),
    ]
    return "| " + " | ".join(_cell(cell) for cell in cells) + " |"


def _quiet(pairs: Pairs) -> str:
    way = pairs[0][0].way
    done = [verdict for _, verdict in pairs if not verdict.doing.skipped and not verdict.doing.broken]
    operations, wrongly = way.operations * len(done), sum(len(verdict.false) for verdict in done)
    each = f"{1000 * wrongly / operations:.1f}" if operations else ""
    by_time = sum(verdict.by_time for verdict in done)
    remarks = "; ".join(filter(None, (way.note, f"{by_time} by time alone" if by_time else "")))
    counts = [f"{operations:,}", str(wrongly), each] if done else ["not carried out", "", ""]
    return "| " + " | ".join(_cell(cell) for cell in (way.name, *counts, remarks)) + " |"


def _sums(told: dict[str, Any]) -> list[str]:
    return [
        f"{told['cases']} cases carried out, {told['wholly_right']} wholly right: recall {told['recall']:.1%}",
        f"{told['copies']:,} copies, {told['copies_right']:,} right ({told['copy_recall']:.2%}), {told['copies_seen']:,} seen",
        f"{told['false_joins']} false joins; {told['by_time_alone']} joins by time alone, which count as none",
        f"{told['innocent_operations']:,} innocent operations in {told['innocent_cases']} kinds of ordinary work: "
        f"{told['innocent_false_joins']} false joins, {told['innocent_false_joins_per_1000']:.2f} per 1,000",
        f"{told['skipped']} cases not possible here, {told['broken']} failed by themselves",
    ]


def _how(verdict: Verdict) -> str:
    if verdict.doing.skipped or verdict.doing.broken or verdict.doing.innocent:
        return f"{verdict.by_time} by time" if verdict.by_time else ""
    parts = [f"{verdict.right}/{len(verdict.doing.expected)}", ",".join(verdict.links), ",".join(verdict.attributions)]
    parts += [f"{verdict.confidence:g}" if verdict.seen else "", f"{verdict.by_time} by time" if verdict.by_time else ""]
    return " ".join(filter(None, parts))


def _why(verdict: Verdict) -> str:
    reasons = [verdict.doing.broken, *(f"false: {each}" for each in verdict.false[:2])]
    if not verdict.seen and not verdict.doing.broken:
        reasons.append(f"not told{', but by time alone' if verdict.by_time else ''}")
    elif verdict.right < len(verdict.doing.expected):
        counts = {
            "seen": verdict.seen,
            "joined": verdict.joined,
            "bytes": verdict.bytes,
            "medium": verdict.medium,
            "login": verdict.login,
        }
        reasons.append(f"of {len(verdict.doing.expected)}: " + ", ".join(f"{name} {count}" for name, count in counts.items()))
    return "; ".join(filter(None, reasons))


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
