"""Events to fill a spool with, and a spool that is easily opened: what the tests of spool, sender and chain share."""

import itertools
import random
from pathlib import Path

from msgspec import UNSET, Raw

from agent import identity
from agent.contract import codes
from agent.contract.event import Event, LostInfo, Metadata, Sekisho, Unmapped
from agent.core.facts import Fact, Lost
from agent.spool import Spool

_uids = itertools.count(1)
_chance, _LETTERS = random.Random(2014), "".join(map(chr, range(35, 92))) + "".join(map(chr, range(93, 127)))
NOW_MS = 1_760_000_000_000


def event(
    code: str = "file.written", *, severity: int | None = None, size: int = 0, bulk: int = 0, time: int = NOW_MS
) -> Event:
    """An event of `code`; `size` bytes more of text, or `bulk` that stay so many however they are packed."""
    row = codes.code_of(code)
    return Event(
        class_uid=row.class_uid,
        category_uid=row.class_uid // 1000,
        activity_id=row.activity_id,
        activity_name=row.activity_name,
        type_uid=row.type_uid,
        severity_id=row.severity if severity is None else severity,
        time=time,
        metadata=Metadata(version="1.8.0", product=Raw(b'{"name":"Sekisho"}'), uid=f"uid-{next(_uids)}", event_code=code),
        message="x" * size if size else "".join(_chance.choices(_LETTERS, k=bulk * 3 // 2)) if bulk else UNSET,
        unmapped=Unmapped(Sekisho(way="mount")),
    )


def gap(lost: Lost) -> Event:
    """The `agent.gap` event that tells of `lost`, as the core makes it."""
    made = event("agent.gap")
    info = LostInfo(reason=lost.reason, since=lost.since_ms, until=lost.until_ms)
    info.count = UNSET if lost.count is None else lost.count
    info.first_seq = UNSET if lost.first_seq is None else lost.first_seq
    info.last_seq = UNSET if lost.last_seq is None else lost.last_seq
    made.unmapped.sekisho.lost = info
    return made


class Machine:
    """A state directory with its identity and spool, and all that was told."""

    def __init__(self, state_dir: Path, max_bytes: int = 64 << 20) -> None:
        self.state_dir, self.max_bytes = state_dir, max_bytes
        self.machine_id = state_dir.parent / "machine-id"
        self.machine_id.write_text("1" * 32 + "\n")
        self.identity = identity.load_or_create(state_dir, self.machine_id)
        self.told: list[Fact] = []
        self.spool = self.open()

    def open(self, now_ms: int = NOW_MS) -> Spool:
        self.spool = Spool.open(self.state_dir, self.identity, self.max_bytes, now_ms, self.told.append)
        return self.spool

    def restart(self, now_ms: int = NOW_MS) -> Spool:
        self.spool.close()
        self.identity = identity.load_or_create(self.state_dir, self.machine_id)
        return self.open(now_ms)

    def told_of(self, kind: type[Fact]) -> list[Fact]:
        return [fact for fact in self.told if isinstance(fact, kind)]

    @property
    def path(self) -> Path:
        return self.state_dir / "spool.db"
