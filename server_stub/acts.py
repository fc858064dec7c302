"""What people do to the collector, and what it notices itself: each becomes an event in its own chain.

Owns: the shape of the collector's own events (OCSF as `codes` says: acts of people are API Activity and name who, from where,
which operation). All functions that take a `Writer` run inside its transaction, so the change and its event are durable
together or not at all. Must not know: HTTP, roles (who may is settled before), the register of media (`ledger`).
"""

import uuid
from typing import Any

import msgspec
from msgspec import Raw, Struct

from agent.contract import codes, event
from server_stub.commit import Writer
from server_stub.config import VERSION
from server_stub.fleet import Change

_PRODUCT = Raw(msgspec.json.encode({"name": codes.PRODUCT, "vendor_name": codes.PRODUCT, "version": VERSION}))


class By(Struct, frozen=True):
    """Who acts, and from where: a person's login name if one is known, else the name of a token."""

    name: str
    person: bool
    address: str

    def actor(self) -> Raw:
        """OCSF `actor`; no user is named if none is known."""
        return Raw(msgspec.json.encode({"user": {"name": self.name}} if self.person else {"app_name": self.name}))


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


def changed(writer: Writer, by: By, operation: str, sekisho: event.Sekisho, message: str) -> None:
    """Somebody, or a one-time pass, or time, changed the register of media."""
    _act(writer, by, "register.changed", operation, sekisho=sekisho, message=message)


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
