"""The machines: who fell silent, who is back, who sees less than it should. Rows and a time in, judgements out.

Owns: when silence is silence, and the fleet's table for people and programs. Pure. Must not know: the store, the
writer, clocks; what it judges becomes an event elsewhere (`acts`).
"""

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import msgspec
from msgspec import Struct

from agent.contract.event import read


class Machine(NamedTuple):
    """What is known of one agent; times in ms. `silent`: it was said to be."""

    agent: str
    name: str
    last_seen: int
    silent: bool


class Change(NamedTuple):
    """A machine fell silent, or is back."""

    machine: Machine
    now: Literal["silent", "back"]


class AgentRow(Struct, kw_only=True):
    """One line of `GET /v1/agents`.

    `state`: "ok", "silent", or "blind" (it reports, but a sensor of its does not see what it should). `blind`: codes of
    what those sensors do not see; `known_limits`: of what the others can't. `waiting`, as of its last hourly summary:
    events not on its disk yet.
    """

    agent: str
    name: str
    state: Literal["ok", "silent", "blind"]
    last_seen: int
    enrolled_at: int
    version: str | None = None
    config: str | None = None
    blind: list[str] = []
    known_limits: list[str] = []
    sensors: list[dict[str, Any]] = []
    waiting: int | None = None


def changes(machines: Iterable[Machine], now_ms: int, silent_after_ms: int, listening_since_ms: int) -> list[Change]:
    """Who changed state. Nobody is silent for time in which the collector itself was not listening."""
    found = []
    for machine in machines:
        quiet = now_ms - max(machine.last_seen, listening_since_ms) >= silent_after_ms
        if quiet and not machine.silent:
            found.append(Change(machine, "silent"))
        elif machine.silent and machine.last_seen >= listening_since_ms and now_ms - machine.last_seen < silent_after_ms:
            found.append(Change(machine, "back"))
    return found


class _Product(Struct, frozen=True):
    version: str | None = None


class _Metadata(Struct):
    product: _Product = _Product()


class _Made(Struct):
    metadata: _Metadata


def _detail(raw: bytes | None) -> dict[str, Any]:
    return read(raw).unmapped.sekisho.detail if raw is not None else {}


def _version(raw: bytes | None) -> str | None:
    try:
        return msgspec.json.decode(raw, type=_Made).metadata.product.version if raw is not None else None
    except msgspec.MsgspecError:
        return None


def _unseen(sensors: Iterable[dict[str, Any]]) -> list[str]:
    """Codes of what is not seen, over `sensors`."""
    found: set[str] = set()
    for detail in sensors:
        listed = detail.get("blind")
        found |= {code for code in listed if isinstance(code, str)} if isinstance(listed, list) else set()
    return sorted(found)


def row(machine: Machine, enrolled_at: int, latest: dict[str, bytes]) -> AgentRow:
    """The fleet's line for a machine; `latest` maps an `agent.*` code (`agent.sensors/NAME`) to its newest event's bytes."""
    sensors = [_detail(raw) for code, raw in sorted(latest.items()) if code.startswith("agent.sensors/")]
    newest = latest.get("agent.heartbeat") or latest.get("agent.started")
    digest = _detail(latest.get("agent.config")).get("config_digest")
    failing = [detail for detail in sensors if detail.get("ok") is not True]
    waiting = _detail(latest.get("agent.heartbeat")).get("waiting")
    return AgentRow(
        agent=machine.agent,
        name=machine.name,
        state="silent" if machine.silent else "blind" if failing else "ok",
        last_seen=machine.last_seen,
        enrolled_at=enrolled_at,
        version=_version(newest),
        config=digest if isinstance(digest, str) else None,
        blind=_unseen(failing),
        known_limits=_unseen(detail for detail in sensors if detail.get("ok") is True),
        sensors=sensors,
        waiting=waiting if type(waiting) is int else None,
    )
