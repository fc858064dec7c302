"""The register of media as the store keeps it: all of its SQL, its signed form for the agents, and the event of each change.

Owns: one row a medium (`approvals`: its `Record` as JSON), groups of machines and the signed register (`meta`). Every change
of a record, its `register.changed` event and the newly signed register are one transaction: all functions that take a `Writer`
run inside it. Must not know: the rules (`rulebook`, which it applies), HTTP, roles.
"""

import secrets
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from agent.contract import chain, event, unlock, wire
from server_stub import acts, bulk, rulebook
from server_stub.acts import By
from server_stub.commit import Writer
from server_stub.records import Change, Record, entries, read_record
from server_stub.rulebook import Actor, Ruled

Rows = Callable[[str, Sequence[Any]], list[tuple[Any, ...]]]
"""`store.rows`, or `session.execute` within the writer."""
Stored = tuple[int, wire.SignedRegister]
"""Version and signed register."""
Act = Callable[[Record, int], Change]
"""What is done to a record, now (ms). Raises Ruled."""
MAX_GROUP = 5_000


def new_id() -> str:
    """Of an approval or a request."""
    return secrets.token_hex(8)


def record(rows: Rows, key: str) -> Record:
    """What is held of a medium; an empty record if nothing is."""
    found = rows("SELECT entry FROM approvals WHERE key = ?", (key,))
    return read_record(key, found[0][0]) if found else Record(key=key)


def records(rows: Rows) -> list[Record]:
    """Every medium, by key."""
    return [read_record(key, text) for key, text in rows("SELECT key, entry FROM approvals ORDER BY key", ())]


def record_of_request(rows: Rows, id: str) -> Record:
    """The record that an approval or request of this id is in. Raises Ruled."""
    if id.isalnum():
        for key, text in rows("SELECT key, entry FROM approvals WHERE entry LIKE ?", (f'%"id":"{id}"%',)):
            held = read_record(key, text)
            if any(each.id == id for each in held.approvals):
                return held
    raise Ruled(404, f'there is no request "{id[:64]}"; see: sekisho-collector media list --state requested')


def groups(rows: Rows) -> dict[str, list[str]]:
    """Machines by the name of their group."""
    found = rows("SELECT value FROM meta WHERE name = 'machine_groups'", ())
    return msgspec.json.decode(found[0][0], type=dict[str, list[str]]) if found else {}


# -- the signed register ---------------------------------------------------------------------------------------------------


def read_register(rows: Rows) -> Stored | None:
    """The register in force as stored, None if none was ever signed."""
    found = rows("SELECT value FROM meta WHERE name = 'register'", ())
    if not found:
        return None
    version, _, rest = found[0][0].partition("\n")
    return int(version), msgspec.json.decode(rest, type=wire.SignedRegister)


def current_register(writer: Writer) -> Stored:
    """The register in force. A lost store begins at a version above any it may have given out: the time."""
    return read_register(writer.session.execute) or _sign(writer, writer.now())


def _sign(writer: Writer, version: int) -> Stored:
    run = writer.session.execute
    told = [each for held in records(run) for each in entries(held)]
    body = wire.RegisterBody(version=version, issued_at=writer.now(), approvals=told, groups=groups(run) or msgspec.UNSET)
    text = msgspec.json.encode(body).decode()
    signed = wire.SignedRegister(text, chain.sign(b"sekisho/register/v1\n" + text.encode(), writer.key))
    _keep_meta(writer, "register", f"{version}\n{msgspec.json.encode(signed).decode()}")
    return version, signed


def _keep_meta(writer: Writer, name: str, value: str) -> None:
    put = "INSERT INTO meta (name, value) VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value"
    writer.session.execute(put, (name, value))


def _next_version(writer: Writer) -> int:
    return max(current_register(writer)[0] + 1, writer.now())


# -- changes ---------------------------------------------------------------------------------------------------------------


def put(writer: Writer, changes: list[Change], by: By) -> Stored:
    """Keep changes, tell each, and sign the register anew, once."""
    if not changes:
        return current_register(writer)
    version = _next_version(writer)
    for change in changes:
        keep = "INSERT INTO approvals (key, entry) VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET entry = excluded.entry"
        writer.session.execute(keep, (change.record.key, msgspec.json.encode(change.record).decode()))
        _tell(writer, change, by, version)
    return _sign(writer, version)


def _tell(writer: Writer, change: Change, by: By, version: int) -> None:
    held = change.record
    told = entries(held)
    after = change.after
    entry = next((each for each in told if after and each.id == after.id), told[-1] if told else None)
    detail: dict[str, Any] = {"version": version, "revision": held.revision}
    detail |= {name: msgspec.to_builtins(got) for name in ("before", "after") if (got := getattr(change, name)) is not None}
    if entry is not None:
        detail["entry"] = msgspec.to_builtins(entry)
    medium = event.MediumInfo(key=held.key)
    if after is not None:
        medium.approval = after.id
    if entry is not None:
        medium.decision = "revoked" if entry.revoked else "approved"
    acts.changed(writer, by, change.operation, event.Sekisho(medium=medium, detail=detail), change.message)


def change(writer: Writer, key: str, revision: int | None, by: By, act: Act) -> tuple[Change, Stored]:
    """Do `act` to the record of a medium, if it is still at `revision` (None: whatever it is). Raises Ruled."""
    held = record(writer.session.execute, rulebook.valid_key(key))
    rulebook.held_at(held, revision)
    done = act(held, writer.now())
    return done, put(writer, [done], by)


def load(writer: Writer, rows: list[bulk.Row], actor: Actor, by: By) -> tuple[list[bulk.Told], Stored]:
    """Put a list into the register, all of it or, if a row is refused, nothing."""
    told, changes = plan(writer.session.execute, rows, actor, writer.now())
    if any(each.outcome == "refused" for each in told):
        changes = []
    return told, put(writer, changes, by)


def plan(rows: Rows, wanted: list[bulk.Row], actor: Actor, now_ms: int) -> tuple[list[bulk.Told], list[Change]]:
    """What a list would change."""
    held = {key: record(rows, key) for key in dict.fromkeys(row.key for row in wanted)}
    return bulk.plan(held, wanted, actor, now_ms, new_id)


def note_ends(writer: Writer, keys: list[str], warn_ms: int, by: By) -> Stored:
    """Put on record what ends soon, or ended, of these media; the register as it then is."""
    found = (rulebook.ending(record(writer.session.execute, key), writer.now(), warn_ms) for key in keys)
    return put(writer, [each for each in found if each], by)


def set_group(writer: Writer, name: str, machines: list[str] | None, by: By) -> Stored:
    """Say which machines a group holds; None: it goes. Raises Ruled."""
    if not (1 <= len(name) <= 64 and name.isprintable()) or "," in name or ";" in name or name.startswith("@"):
        raise Ruled(422, 'a group\'s name has up to 64 characters, none of them "," or ";", and does not begin with "@"')
    held = groups(writer.session.execute)
    before = held.get(name)
    if machines is None and before is None:
        raise Ruled(404, f'there is no group "{name}"; see: sekisho-collector media group list')
    machines = None if machines is None else list(dict.fromkeys(machines))
    if machines is not None and (len(machines) > MAX_GROUP or any(not 1 <= len(each) <= 255 for each in machines)):
        raise Ruled(422, f"a group holds up to {MAX_GROUP} machines, each by its name or agent id")
    if machines == before:
        return current_register(writer)
    now = {each: of for each, of in held.items() if each != name} | ({name: machines} if machines is not None else {})
    version = _next_version(writer)
    _keep_meta(writer, "machine_groups", msgspec.json.encode(now).decode())
    detail: dict[str, Any] = {"version": version, "group": name, "count": len(machines or [])}
    detail |= {"added": sorted(set(machines or []) - set(before or []))[:500]}
    detail |= {"removed": sorted(set(before or []) - set(machines or []))[:500]}
    message = f'{by.name} changed the group of machines "{name}"'
    acts.changed(writer, by, "media.group", event.Sekisho(detail=detail), message)
    return _sign(writer, version)


def note_used(writer: Writer, rows: Sequence[Any], machine: str) -> Stored | None:
    """Whether these new events of an agent (`intake.Row`) use up a one-time pass; then the register that says so."""
    changes: list[Change] = []
    for row in rows:
        if row.medium is None or row.code not in ("medium.attached", "medium.mounted", "medium.detached"):
            continue
        if b'"decision":"approved"' not in row.raw or b'"approval":' not in row.raw:
            continue
        said = event.read(row.raw).unmapped.sekisho.medium
        id = said.approval if isinstance(said, event.MediumInfo) else ""
        held = record(writer.session.execute, row.medium)
        if isinstance(id, str) and id and (done := rulebook.used(held, id, row.agent, machine, writer.now())):
            changes.append(done)
            put(writer, [done], By(machine or row.agent, False, "agent"))
    return current_register(writer) if changes else None


def unlock_code(
    writer: Writer, key: str, machine: tuple[str, bytes, str], for_ms: int, reason: str, by: By, *, read_only: bool
) -> tuple[str, unlock.Unlock]:
    """A break-glass code for a medium on `machine` (agent id, public key, name); on record before it is given out.

    Raises Ruled.
    """
    agent, public_key, name = machine
    now = writer.now()
    held = record(writer.session.execute, rulebook.valid_key(key))
    if held.lost is not None:
        raise Ruled(409, f"the medium {key} was reported lost; no code opens it. If it was found: media found KEY")
    try:
        secret = unlock.shared_secret(writer.key, public_key)
        number = secrets.randbelow(unlock.NUMBERS)
        code = unlock.make(secret, agent, key, at_ms=now, for_ms=for_ms, number=number, read_only=read_only)
    except ValueError as error:
        raise Ruled(422, f"{error}; give --for as 15m to 7d") from None
    made = unlock.check(secret, agent, [key], code, now_ms=now, seen_ms=now, used=())
    detail = {"unlock": made.id, "machine": name, "agent": agent, "until": made.until_ms, "reason": reason}
    detail |= {"read_only": True} if read_only else {}
    message = f"{by.name} gave out a break-glass code for the medium {key} on {name}"
    acts.changed(writer, by, "media.unlock", event.Sekisho(medium=event.MediumInfo(key=key), detail=detail), message)
    return code, made
