"""What the collector does by the clock, not because it was asked: it watches for silence, counts looks, erases what is old
enough, and carries checkpoints to witnesses.

Owns: how often each is done, and that a failure is logged, counted and tried again, so that none of them ends the others.
Must not know: HTTP; what silence, a look or a checkpoint is (`fleet`, `looks`, `tree`).
"""

import asyncio
import logging
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from server_stub import acts, carry, fleet, ledger, looks, retention, rulebook, tree
from server_stub.commit import Writer
from server_stub.config import Witness
from server_stub.fleet import Machine
from server_stub.store import StoreError

if TYPE_CHECKING:
    from server_stub.collector import Collector

RETENTION_S = 3600.0
REGISTER_S = 60.0
"""How often is looked which approvals end."""
STEP_S = 0.25
log = logging.getLogger(__name__)


async def watch_fleet(c: "Collector") -> None:
    """Find who fell silent or is back; a failed commit is tried again at the next look."""
    pause = min(max(c.settings.silent_after_ms / 5000, 0.05), 5.0)
    while not c.stopping:
        await asyncio.sleep(pause)
        if c.store.shared:
            try:
                await c.reread_agents()
            except StoreError as error:
                log.warning("fleet watch failed error=%r", error)
                continue
        machines = [Machine(agent, it.name, it.last_seen, it.silent) for agent, it in c.agents.items()]
        found = fleet.changes(machines, c.now(), c.settings.silent_after_ms, c.started_at)
        seen = [(c.agents[agent].last_seen, agent) for agent in c._seen]
        now = c.now()
        due = c.looks.due(now)
        if not found and not seen and not due:
            continue
        try:
            told = await c.change(lambda writer, f=found, s=seen: _note(writer, f, s))  # type: ignore[misc]
            for change in told:
                c.agents[change.machine.agent].silent = change.now == "silent"
            await keep_looks(c, due, now)
        except Exception as error:
            log.warning("fleet watch failed error=%r", error)
            continue
        c._seen -= {agent for at, agent in seen if c.agents[agent].last_seen == at}


def _note(writer: Writer, found: list[fleet.Change], seen: list[tuple[int, str]]) -> list[fleet.Change]:
    """Keep who was heard, tell who changed; those told. Another collector over this store may have heard or told it since."""
    told = []
    for at, agent in seen:
        writer.session.execute("UPDATE agents SET last_seen = ? WHERE agent = ? AND last_seen < ?", (at, agent, at))
    for change in found:
        machine = change.machine
        held = writer.session.execute("SELECT silent, last_seen FROM agents WHERE agent = ?", (machine.agent,))
        if held and bool(held[0][0]) == machine.silent and (machine.silent or held[0][1] <= machine.last_seen):
            acts.note_change(writer, change)
            told.append(change)
    return told


async def keep_in_step(c: "Collector") -> None:
    """Over a store that others write, too: read again what is remembered of it, soon after they changed it."""
    while c.store.shared and not c.stopping:
        await c.elsewhere.wait()
        c.elsewhere.clear()
        try:
            await c.reread()
        except Exception as error:
            log.warning("the store can't be read again error=%r", error)
        await asyncio.sleep(STEP_S)


async def keep_looks(c: "Collector", due: list[looks.Due], now: int) -> None:
    """Have the store know how often was looked, and windows that are over be told."""
    for name in await c.change(lambda writer: c.looks.keep(writer, due, now)):
        c.looks.open.pop(name, None)
    for _, look, count in due:
        look.kept = count


async def erase(c: "Collector", before_ms: int, by: acts.By) -> int:
    """Erase the content of events received before `before_ms`; how many. What is done when this fails stays done."""
    done, after, first = 0, 0, 0
    try:
        await c.reading(lambda: c.store.fold_months(before_ms))
        done, first, after = await c.change(lambda writer: retention.months(writer, before_ms))
        while (found := await c.change(lambda writer, a=after: retention.portion(writer, before_ms, a))).events:  # type: ignore[misc]
            done, after, first = done + found.events, found.last, first or found.first
    finally:
        if done:
            all_of_it = retention.Erased(done, first, after)
            await c.change(lambda writer: retention.finish(writer, before_ms, all_of_it, by))
            await c.reading(c.store.settle)
    return done


async def keep_retention(c: "Collector") -> None:
    """Once an hour: erase what the configuration says is old enough."""
    kept_ms = c.settings.retention_ms
    while kept_ms and not c.stopping:
        try:
            await erase(c, c.now() - kept_ms, acts.By("retention", False, "localhost"))
        except Exception as error:
            log.warning("retention failed error=%r", error)
        await asyncio.sleep(RETENTION_S)


async def keep_register(c: "Collector") -> None:
    """Once a minute: put on record which approvals end soon, or ended."""
    by, warn_ms = acts.By("register", False, "localhost"), c.settings.expiring_ms
    while not c.stopping:
        try:
            held = await c.reading(lambda: ledger.records(c.store.rows))
            if due := [each.key for each in held if rulebook.ending(each, c.now(), warn_ms)]:
                c.take_register(await c.change(partial(ledger.note_ends, keys=due, warn_ms=warn_ms, by=by)))
        except Exception as error:
            log.warning("register failed error=%r", error)
        await asyncio.sleep(REGISTER_S)


async def carry_all(c: "Collector") -> list[dict[str, Any]]:
    """Give the newest checkpoint to every witness; `{witness, size, ok, why}` for each."""
    point, told = await c.point(), []
    for each in c.settings.witnesses:
        name, why, result = each.url or each.file or each.mail, "", "ok"
        try:
            await _carry(c, each, point)
        except carry.NotCarried as error:
            why, result = str(error), "rewritten" if error.rewritten else "failed"
            log.error("a checkpoint was not taken: %s", why)
        c.carried[result] += 1
        told.append({"witness": name, "size": point.size, "ok": not why, "why": why})
    return told


async def _carry(c: "Collector", each: Witness, point: carry.Point) -> None:
    if each.file:
        await c.reading(lambda: carry.to_file(Path(each.file), point, c.store.subtree))
    elif each.mail:
        await c.reading(lambda: carry.to_mail(c.settings.smtp, c.settings.mail_from, each.mail, point))
    else:
        rows = await c.rows("SELECT value FROM meta WHERE name = ?", (f"peer {each.url}",))
        seen = min(int(rows[0][0]), point.size) if rows else 0

        def ask() -> str:
            return carry.to_collector(each, seen, point, lambda old: tree.consistency(old, point.size, c.store.subtree))

        line = await c.reading(ask)

        def keep(writer: Writer) -> None:
            put = "INSERT INTO meta VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value"
            writer.session.execute(put, (f"peer {each.url}", str(point.size)))
            writer.session.execute("DELETE FROM cosigned WHERE size < ?", (point.size,))
            put = "INSERT INTO cosigned VALUES (?, ?, ?) ON CONFLICT (size, line) DO UPDATE SET note = excluded.note"
            writer.session.execute(put, (point.size, line, point.note))

        await c.change(keep)


async def keep_witnesses(c: "Collector") -> None:
    """Give a checkpoint to the witnesses now and then, if the log grew."""
    given = 0
    while c.settings.witnesses and not c.stopping:
        if c.writer.size != given:
            try:
                size = c.writer.size
                if all(each["ok"] for each in await carry_all(c)):
                    given = size
            except Exception as error:
                log.warning("witnesses failed error=%r", error)
        await asyncio.sleep(c.settings.witness_every_s)
