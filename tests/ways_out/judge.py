"""What was done against what was told: of each copy whether it was seen, joined, and named rightly; and what was told wrongly.

Owns: the verdict. A copy is right if an event names its source, with a link that is not `time`, the bytes that left, the
medium (or way) and the login user. Any other event of a copy that rests on more than time is a false join. Pure: events and
expectations in, verdicts out. Must not know files, the agent or how cases were run.
"""

from collections import Counter, defaultdict
from typing import Any

from msgspec import Struct, field


class Expected(Struct, kw_only=True):
    """A file that was carried out: `path` as events spell it. `bytes` None: any amount. `login` None: nobody may be named."""

    path: str
    bytes: int | None
    login: int | None


class Doing(Struct, kw_only=True):
    """A case as it was done. `source` and `dest` are the folders (with "/") that only this case uses; `may`: sources that may
    be told without being expected. `skipped` and `broken` say why it was not done, or failed."""

    id: str
    source: str
    dest: str
    expected: list[Expected] = []
    may: list[str] = []
    serial: str = ""
    way: str = "mount"
    links: list[str] = []
    innocent: bool = False
    skipped: str = ""
    broken: str = ""
    seconds: float = 0.0


class Verdict(Struct, kw_only=True):
    """What became of a case: counts of its copies."""

    doing: Doing
    seen: int = 0
    joined: int = 0
    bytes: int = 0
    medium: int = 0
    login: int = 0
    right: int = 0
    by_time: int = 0
    links: Counter[str] = field(default_factory=Counter)
    attributions: Counter[str] = field(default_factory=Counter)
    confidence: float = 1.0
    false: list[str] = []
    wrong: list[str] = []

    @property
    def outcome(self) -> str:
        """skipped, broken, wrong (a false join), silent (an innocent one, rightly), right, partly or missed."""
        if self.doing.skipped:
            return "skipped"
        if self.doing.broken:
            return "broken"
        if self.false:
            return "wrong"
        if self.doing.innocent:
            return "silent"
        return "right" if self.right == len(self.doing.expected) else "partly" if self.right else "missed"


def judge(doings: list[Doing], events: list[dict[str, Any]]) -> list[Verdict]:
    """A verdict a doing, in their order. `events` are all that the agent recorded."""
    verdicts = {doing.id: Verdict(doing=doing, false=[], wrong=[]) for doing in doings}
    told: dict[str, list[dict[str, Any]]] = defaultdict(list)
    known = {doing.id: {*doing.may, *(each.path for each in doing.expected)} for doing in doings}
    whose = _Whose(doings)
    for event in events:
        if event["metadata"]["event_code"] != "file.copied_out":
            continue
        said = event["unmapped"]["sekisho"]
        source, dest = said["source"]["path"], said.get("dest", {}).get("path", "")
        origin = whose.at(source, "source")
        target = whose.at(dest, "dest") or origin
        if target is None:
            continue  # of neither this matrix' sources nor its folders
        verdict = verdicts[target.id]
        if origin is not target:
            if said["link"] != "time":
                verdict.false.append(f"{source} → {dest} ({said['link']} {said['confidence']})")
            continue
        if said["link"] == "time":
            verdict.by_time += 1
            continue
        if source in known[target.id]:
            told[source].append(said)
        else:
            verdict.false.append(f"{source} → {dest} ({said['link']} {said['confidence']})")
    for verdict in verdicts.values():
        for expected in verdict.doing.expected:
            _one(verdict, expected, told.get(expected.path, []))
    return list(verdicts.values())


def complete(doing: Doing, events: list[dict[str, Any]]) -> bool:
    """Whether all that is expected of a case is told: there is nothing to wait for."""
    verdict = judge([doing], events)[0]
    return bool(doing.expected) and verdict.right == len(doing.expected)


class _Whose:
    """Which doing a path belongs to, remembered by folder."""

    def __init__(self, doings: list[Doing]) -> None:
        self._doings = doings
        self._known: dict[tuple[str, str], Doing | None] = {}

    def at(self, path: str, end: str) -> Doing | None:
        folder = path[: path.rfind("/") + 1]
        if (end, folder) not in self._known:
            mine = (doing for doing in self._doings if (under := getattr(doing, end)) and folder.startswith(under))
            self._known[end, folder] = next(mine, None)
        return self._known[end, folder]


def _one(verdict: Verdict, expected: Expected, told: list[dict[str, Any]]) -> None:
    if not told:
        verdict.wrong.append(f"{expected.path}: not told")
        return
    doing = verdict.doing
    moved = sum(each.get("bytes", 0) for each in told)
    logins = {each.get("login", {}).get("uid") for each in told}
    linked = {each["link"] for each in told}
    if doing.way == "mount":
        way = all(each.get("medium", {}).get("serial") == doing.serial for each in told)
    else:
        way = all(each.get("way") == doing.way for each in told)
    checks = {
        "joined": linked <= set(doing.links),
        "bytes": expected.bytes is None or moved == expected.bytes,
        "medium": way,
        "login": logins == {expected.login},
    }
    verdict.seen += 1
    for name, good in checks.items():
        setattr(verdict, name, getattr(verdict, name) + good)
    verdict.right += all(checks.values())
    verdict.links.update(linked)
    verdict.attributions.update(each.get("attribution", "unknown") for each in told)
    verdict.confidence = min([verdict.confidence, *(each["confidence"] for each in told)])
    if not all(checks.values()):
        said = {"link": sorted(linked), "bytes": moved, "of": expected.bytes, "login": sorted(map(str, logins))}
        bad = [name for name, good in checks.items() if not good]
        verdict.wrong.append(
            f"{expected.path}: {', '.join(bad)} not right: {said}, medium {told[0].get('medium', {}).get('serial')}"
        )
