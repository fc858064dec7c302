"""What people do to the collector, and what it notices itself: each becomes an event in its own chain.

Owns: changes of the register of media, the signed register, and the shape of the collector's own events (OCSF as
`codes` says: acts of people are API Activity and name who, from where, which operation). All functions that take a
`Writer` run inside its transaction, so the change and its event are durable together or not at all.
Must not know: HTTP, roles (who may is settled before).
"""

import secrets
import uuid
from typing import Any

import msgspec
from msgspec import Raw, Struct

from agent.contract import chain, codes, event, wire
from server_stub.commit import Writer
from server_stub.config import VERSION
from server_stub.fleet import Change
from server_stub.refusal import Refusal

_PRODUCT = Raw(msgspec.json.encode({"name": codes.PRODUCT, "vendor_name": codes.PRODUCT, "version": VERSION}))


class By(Struct, frozen=True):
    """Who acts, and from where: a person's login name if one is known, else the name of a token."""

    name: str
    person: bool
    address: str

    def actor(self) -> Raw:
        """OCSF `actor`; no user is named if none is known."""
        return Raw(msgspec.json.encode({"user": {"name": self.name}} if self.person else {"app_name": self.name}))


class Unknown(Refusal):
    """There is no such thing in the register."""


def _event(
    writer: Writer, code: str, host: dict[str, Any], sekisho: event.Sekisho, *, message: str, **more: Any
) -> event.Event:
    row = codes.code_of(code)
    return event.Event(
        class_uid=row.class_uid,
        category_uid=row.class_uid // 1000,
        activity_id=row.activity_id,
        activity_name=row.activity_name,
        type_uid=row.type_uid,
        severity_id=row.severity,
        time=writer.now(),
        metadata=event.Metadata(
            version=codes.OCSF_VERSION, product=_PRODUCT, uid=str(uuid.uuid4()), event_code=code, profiles=["host"]
        ),
        unmapped=event.Unmapped(sekisho),
        device=Raw(msgspec.json.encode({"type_id": 0, **host})),
        message=message,
        **more,
    )


def _act(writer: Writer, by: By, code: str, operation: str, *, sekisho: event.Sekisho, message: str) -> None:
    where = {"hostname": by.address} if not by.address[:1].isdigit() and ":" not in by.address else {"ip": by.address}
    more = {"actor": by.actor(), "api": {"operation": operation}, "src_endpoint": where}
    writer.record(
        _event(writer, code, {"uid": writer.id, "hostname": writer.name, "type_id": 1}, sekisho, message=message, **more)
    )


def note_change(writer: Writer, change: Change) -> None:
    """A machine fell silent or is back: say so in an event, and remember it."""
    machine = change.machine
    silent = change.now == "silent"
    writer.session.execute("UPDATE agents SET silent = ? WHERE agent = ?", (int(silent), machine.agent))
    message = f"{machine.name} stopped reporting" if silent else f"{machine.name} reports again"
    sekisho = event.Sekisho(detail={"last_seen": machine.last_seen})
    host = {"uid": machine.agent, "hostname": machine.name} if machine.name else {"uid": machine.agent}
    writer.record(_event(writer, f"agent.{change.now}", host, sekisho, message=message))


def entries(writer: Writer) -> list[wire.ApprovalEntry]:
    """The register as it stands, by key."""
    rows = writer.session.execute("SELECT entry FROM approvals ORDER BY key")
    return [msgspec.json.decode(text, type=wire.ApprovalEntry) for (text,) in rows]


def sign_register(writer: Writer, version: int) -> wire.SignedRegister:
    """The whole register, signed for the agents."""
    body = wire.RegisterBody(version=version, issued_at=writer.now(), approvals=entries(writer))
    text = msgspec.json.encode(body).decode()
    return wire.SignedRegister(text, chain.sign(b"sekisho/register/v1\n" + text.encode(), writer.key))


def current_register(writer: Writer) -> tuple[int, wire.SignedRegister]:
    """Version and signed register as stored. A lost store begins at a version above any it may have given out: the time."""
    rows = writer.session.execute("SELECT value FROM meta WHERE name = 'register'")
    if rows:
        version, _, rest = rows[0][0].partition("\n")
        return int(version), msgspec.json.decode(rest, type=wire.SignedRegister)
    return _store_register(writer, writer.now())


def _store_register(writer: Writer, version: int) -> tuple[int, wire.SignedRegister]:
    signed = sign_register(writer, version)
    text = f"{version}\n{msgspec.json.encode(signed).decode()}"
    writer.session.execute("INSERT OR REPLACE INTO meta VALUES ('register', ?)", (text,))
    return version, signed


def _entry(writer: Writer, key: str) -> wire.ApprovalEntry | None:
    rows = writer.session.execute("SELECT entry FROM approvals WHERE key = ?", (key,))
    return msgspec.json.decode(rows[0][0], type=wire.ApprovalEntry) if rows else None


def _put(writer: Writer, entry: wire.ApprovalEntry, by: By, operation: str, message: str) -> tuple[int, wire.SignedRegister]:
    text = msgspec.json.encode(entry).decode()
    writer.session.execute("INSERT OR REPLACE INTO approvals VALUES (?, ?)", (entry.key, text))
    stored = _store_register(writer, max(current_register(writer)[0] + 1, writer.now()))
    medium = event.MediumInfo(key=entry.key, approval=entry.id, decision="revoked" if entry.revoked else "approved")
    detail = {"entry": msgspec.to_builtins(entry), "version": stored[0]}
    _act(writer, by, "register.changed", operation, sekisho=event.Sekisho(medium=medium, detail=detail), message=message)
    return stored


def approve(writer: Writer, entry: wire.ApprovalEntry, by: By) -> tuple[wire.ApprovalEntry, tuple[int, wire.SignedRegister]]:
    """Put `entry` in the register, in place of what stood for its key; it gets an id, and a start if it has none."""
    entry = msgspec.structs.replace(entry, id=secrets.token_hex(8), since=entry.since or writer.now())
    message = f"{by.name} put the medium {entry.key} in the register"
    return entry, _put(writer, entry, by, "media.approve", message)


def revoke(writer: Writer, key: str, reason: str, by: By) -> tuple[wire.ApprovalEntry, tuple[int, wire.SignedRegister]]:
    """Withdraw the approval of a medium; the entry stays, so that agents can say why. Raises Unknown."""
    entry = _entry(writer, key)
    if entry is None:
        raise Unknown(f'no medium "{key}" is in the register; see: sekisho-collector media list')
    entry = msgspec.structs.replace(entry, revoked=True, reason=reason)
    return entry, _put(writer, entry, by, "media.revoke", f"{by.name} revoked the medium {key}")


def viewed(writer: Writer, by: By, operation: str, given: dict[str, str], *, count: int, since: int) -> None:
    """Somebody looked at records, `count` times since `since`, with this filter."""
    what = ", ".join(f"{name}={value}" for name, value in given.items()) or "all"
    detail = {"filter": given, "count": count, "since": since}
    message = f"{by.name} looked at records ({what})" + (f" {count} times more" if writer.now() > since else "")
    _act(writer, by, "record.viewed", operation, sekisho=event.Sekisho(detail=detail), message=message)


def erased(writer: Writer, by: By, before: int, count: int, first: int, last: int) -> None:
    """Retention erased the content of `count` events, between these positions of the log."""
    detail = {"before": before, "count": count, "first": first, "last": last}
    message = f"the content of {count} events was erased, as retention says"
    _act(writer, by, "record.erased", "records.erase", sekisho=event.Sekisho(detail=detail), message=message)
