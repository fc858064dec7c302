"""`sekisho-agent enforce --dry-run`: what mode "enforce" would have stopped, from what was recorded while it did not.

Owns: one row a medium, by its key: how it would have been stopped under the policy as configured now, how often, and what of
its use would not have happened. Judged by the decision that each event carries, as it stood then. Must not know the register,
nor act. Files read from a refused medium are counted only where they were recorded, and an approval's directories are judged
by the copies that were told.
"""

import time
import uuid
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

import msgspec
from msgspec import UNSET, Struct, field, structs

from agent import config, daemon, enforcing
from agent.contract import event
from agent.contract.columns import display_width, harmless, pad, size_text
from agent.contract.event import MediumInfo, Seen
from agent.contract.show import medium_text
from agent.core import facts
from agent.core.pipeline import Core
from agent.core.policy import BAD
from agent.core.stopping import EnforcePolicy, off_the_bus, rule_of
from agent.words import Language, say

_COLUMNS = ("medium", "decision", "would", "plugged", "copies", "others", "bytes", "people", "last")
_WRITES = {"file.copied_out", "file.written"}
_READS = {"file.brought_in"}


class Row(Struct, kw_only=True):
    """One medium. `would`: "read_only", "refuse", "deauthorize" or "directories"; `copies` are protected files, `files` others
    that would not have been written, `read` files that would not have been read; `people` by login name or uid."""

    key: str
    medium: str
    kind: str
    decision: str
    reason: str = ""
    would: str = ""
    plugged: int = 0
    copies: int = 0
    files: int = 0
    read: int = 0
    bytes: int = 0
    people: list[str] = field(default_factory=list)
    first_ms: int = 0
    last_ms: int = 0

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return structs.asdict(self)


def replayed(site: config.Config, recorded: BinaryIO) -> list[bytes]:
    """The events that recorded facts lead to under this configuration. Raises facts.BadFact."""
    core = Core(daemon.core_config(site, "0" * 32), lambda: uuid.uuid4().hex)
    return [event.seal(made, 0, 0, bytes(32)) for fact in facts.read(recorded) for made in core.feed(fact)]


def judge(agent: config.Agent, events: Iterable[bytes], since_ms: int) -> list[Row]:
    """What would have been stopped since then, the most copies first. Events that can't be read are passed over."""
    policy, rows = enforcing.policy_of(agent), dict[tuple[str, str], Row]()
    for data in events if agent.media.require_approval else ():
        try:
            seen = event.read(data)
        except msgspec.MsgspecError:
            continue  # only its digest is left
        medium = seen.unmapped.sekisho.medium
        if seen.time < since_ms or medium is UNSET or medium.decision is UNSET:
            continue
        would = _would(policy, medium, seen)
        if would:
            row = rows.setdefault((medium.key, would), _row(medium, would, seen))
            _count(row, seen, would)
    found = [row for row in rows.values() if row.plugged or row.copies or row.files or row.read]
    return sorted(found, key=lambda row: (-row.copies, -row.files, row.first_ms))


def _would(policy: EnforcePolicy, medium: MediumInfo, seen: Seen) -> str:
    kind: Any = medium.kind if medium.kind is not UNSET else "other"
    decision: Any = medium.decision
    interfaces = medium.interfaces if medium.interfaces is not UNSET else []
    if off_the_bus(policy, kind, interfaces, decision):
        return "deauthorize"
    rule = rule_of(policy, decision)
    if kind == "keyboard" or (kind in ("network", "other") and medium.fs is UNSET):
        return ""  # nothing on it can be mounted
    if decision not in BAD or medium.decision_reason not in ("read_only_approval", "other_directory"):
        return "" if rule == "allow" else rule
    if medium.decision_reason == "read_only_approval":
        return "read_only"
    return "directories" if policy.directories == "refuse" and seen.metadata.event_code == "file.copied_out" else ""


def _row(medium: MediumInfo, would: str, seen: Seen) -> Row:
    kind = medium.kind if medium.kind is not UNSET else "other"
    reason = medium.decision_reason if medium.decision_reason is not UNSET else ""
    decision = str(medium.decision)
    return Row(
        key=medium.key,
        medium=medium_text(medium),
        kind=kind,
        decision=decision,
        reason=reason,
        would=would,
        first_ms=seen.time,
    )


def _count(row: Row, seen: Seen, would: str) -> None:
    code, said = seen.metadata.event_code, seen.unmapped.sekisho
    row.last_ms = max(row.last_ms, seen.time)
    row.plugged += code == "medium.attached"
    if code in _WRITES and seen.action_id != 2:
        row.copies += code == "file.copied_out"
        row.files += code == "file.written"
        size = said.bytes if said.bytes is not UNSET else said.dest.size if said.dest is not UNSET else UNSET
        row.bytes += size if size is not UNSET else 0
    elif code in _READS and would in ("refuse", "deauthorize"):
        row.read += 1
    else:
        return
    if said.login is not UNSET:
        name = said.login.user if said.login.user is not UNSET else f"uid {said.login.uid}"
        if name not in row.people:
            row.people.append(name)


def table(rows: list[Row], lang: Language, since: str) -> Iterator[str]:
    """The rows for people, in columns."""
    if not rows:
        yield say(lang, "dry.nothing", since=since)
        return
    yield say(lang, "dry.head", since=since, count=len(rows))
    cells = [tuple(say(lang, f"col.{name}") for name in _COLUMNS)]
    for row in rows:
        last = time.strftime("%Y-%m-%d %H:%M", time.localtime(row.last_ms / 1000))
        counts = (str(row.plugged), str(row.copies), str(row.files + row.read), size_text(row.bytes))
        people = ", ".join(harmless(each, 40) for each in row.people[:5]) or "-"
        cells.append((row.medium, say(lang, row.decision), say(lang, f"would.{row.would}"), *counts, people, last))
    widths = [max(display_width(line[at]) for line in cells) for at in range(len(_COLUMNS))]
    for line in cells:
        yield "  ".join(pad(cell, width) for cell, width in zip(line, widths, strict=True)).rstrip()
