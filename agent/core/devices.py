"""What is told of devices as they come, change and go: the story of each, what does not fit, and a person's first medium.

Question: which events does it lead to that something was plugged in, got a card, or went? Owns: the order in which `presence`,
`known` and `disguise` are asked, that a finding is made once for each time a device is plugged in and raised when more does not
fit, and what is told of devices that went while no agent ran. Must not know approvals (`judging`), nor the shape of events.
From `pipeline` (media as facts tell them) to `judging` and `ocsf`.
"""

from collections.abc import Callable, Iterator
from typing import Any

import msgspec
from msgspec import Struct, structs

from agent.contract.codes import LOW
from agent.contract.event import Event
from agent.core import facts, presence
from agent.core.disguise import REASONS, Disguises, Doubt
from agent.core.judging import Judging
from agent.core.known import Known, Memory, recognised_by
from agent.core.media import Media, Medium, Mount
from agent.core.ocsf import Writer
from agent.core.people import People
from agent.core.policy import AT_ATTACH, AT_MOUNT
from agent.core.presence import Presence, Presences

_SETTLED_MS = 3_000
"""By then the kernel has told all parts of what was plugged in; from then on that is what is known of it"""


class _Kept(Struct, array_like=True):
    memory: bytes
    present: bytes


class _Found(Struct):
    """What does not fit with a device that is there: one finding, which grows."""

    finding_uid: str
    severity: int
    doubts: dict[str, Doubt] = {}


class Devices:
    """`plugged`, `unplugged`, `mounted` and `due` give the events. `first_use`: a person's first medium is a finding."""

    def __init__(self, media: Media, people: People, judging: Judging, writer: Writer, new_uid: Callable[[], str]) -> None:
        self._media, self._people, self._judging, self._writer, self._new_uid = media, people, judging, writer, new_uid
        self._memory, self._presences = Memory(), Presences()
        self._disguises = Disguises(self._memory)
        self._before: dict[str, Known | None] = {}
        self._settling: dict[str, int] = {}
        self._found: dict[str, _Found] = {}
        self._beginning, self._stale, self._kept = False, True, b""
        self.first_use = False

    def __len__(self) -> int:
        """How many devices are known."""
        return len(self._memory)

    @property
    def changed(self) -> bool:
        """Whether there is something new to keep."""
        return self._memory.changed or self._presences.changed

    @changed.setter
    def changed(self, changed: bool) -> None:
        self._stale = self._stale or self.changed
        self._memory.changed = self._presences.changed = changed

    def started(self, fact: facts.Started) -> None:
        """An agent begins; with the next tick all that is there was told."""
        self._presences.started(fact.boot_id)
        self._beginning = True

    def plugged(self, fact: facts.Plugged, medium: Medium, new: bool) -> Iterator[Event]:
        """A medium came or changed: its attachment, that of a card in it, and what does not fit."""
        device, at_ms, switched = fact.device, fact.at_ms, False
        there = None if new else self._presences.here.get(medium.id)
        if there is None:
            there, before = self._presences.attached(medium, device, at_ms, fact.cold)
            switched = before is not None
            known = self._memory.of(medium)
            self._before[medium.id] = None if known is None else structs.replace(known)
            self._settling[medium.id] = at_ms
            if new:
                yield self._attached(there, at_ms, fact.cold, before)
                yield from self._first_use(medium, at_ms, AT_ATTACH if not fact.cold else frozenset())
        elif change := self._presences.update(there, medium, device, at_ms):
            yield self._card(there, change, at_ms)
        yield from self._doubts(there, at_ms, fact.cold, switched)

    def unplugged(self, medium: Medium, at_ms: int) -> Event:
        """It went, with its story."""
        there = self._presences.detached(medium.id, at_ms)
        if there is None:
            return self._judging.detached(medium, at_ms, {})
        there = presence.whole(there)
        if medium.id in self._settling:
            self._memory.learn(medium, there.device, at_ms)
        self._forget(medium.id)
        return self._judging.detached(medium, at_ms, self._said(there) | presence.going(there, at_ms))

    def mounted(self, mount: Mount, at_ms: int) -> Iterator[Event]:
        """A file system of a medium was mounted; of a card or a disc that is its first use."""
        self._presences.mounted(mount.medium.id, mount.mount)
        if not mount.cold:
            yield from self._first_use(mount.medium, at_ms, AT_MOUNT)

    def story(self, medium: Medium) -> dict[str, Any]:
        """How sure it is which piece this is, and to which story a mount of it belongs."""
        there = self._presences.here.get(medium.id)
        return {} if there is None else {"identity": self._memory.identity(medium), "story": there.story}

    def about(self, medium: Medium) -> dict[str, Any]:
        """All that is known of a device that is there, for `media`."""
        there = self._presences.here.get(medium.id)
        if there is None:
            return {}
        found = self._found.get(medium.id)
        said = self._said(there) | presence.coming(there) | presence.amounts(there)
        said |= {"interfaces": list(medium.interfaces), "since_ms": there.since_ms}
        said["blocks"] = msgspec.to_builtins(said.get("blocks", []))
        return said | ({"disguised": list(found.doubts)} if found is not None else {})

    def transferred(self, fact: facts.Transferred) -> None:
        """How much went over a device by now."""
        self._presences.transferred(fact.id, fact.bytes_in, fact.bytes_out)

    def used(self, fact: facts.WayHeld) -> None:
        """How often a device was spoken to by now."""
        self._presences.used(fact.device, fact.uses)

    def due(self, at_ms: int) -> Iterator[Event]:
        """What time brings: what went while no agent ran, and devices of which all is known by now."""
        if self._beginning:
            self._beginning = False
            for gone in list(self._presences.untold()):
                said = self._said(presence.whole(gone)) | presence.going(gone, None)
                event = self._judging.detached(gone.medium, at_ms, said)
                event.unmapped.sekisho.detail = {"time": "unknown"}
                yield event
        for id, since_ms in list(self._settling.items()) if self._settling else ():
            if 0 <= at_ms - since_ms < _SETTLED_MS:
                continue
            del self._settling[id]
            there = self._presences.here.get(id)
            if there is not None:
                self._memory.learn(there.medium, there.device, at_ms)
                self._before[id] = structs.replace(self._memory.devices[there.medium.key])

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _attached(self, there: Presence, at_ms: int, cold: bool, before: Presence | None) -> Event:
        said = self._said(there) | presence.coming(there)
        if before is not None:
            said["switched_from"] = presence.modes(before.device)
        event = self._judging.attached(there.medium, at_ms, cold, said)
        if not there.story:
            there.story = event.metadata.uid
        return event

    def _card(self, there: Presence, change: str, at_ms: int) -> Event:
        """A card or a disc came into what was there, or went from it."""
        medium, verdict = there.medium, self._judging.decide(there.medium, at_ms)
        there = presence.whole(there) if change == "out" else there
        said = self._said(there) | presence.coming(there) | {"part": "disc" if medium.kind == "optical" else "card"}
        if change == "in":
            self._judging.unapproved.gone(medium)  # another card is another incident
            return self._writer.attached(medium, verdict, LOW, self._people.session, at_ms, False, said)
        said |= {"present_ms": max(0, at_ms - there.loaded_ms)} if there.loaded_ms else {}
        if there.bytes_in is not None and there.bytes_out is not None:
            said |= {"bytes_in": there.bytes_in - there.base[0], "bytes_out": there.bytes_out - there.base[1]}
        return self._writer.detached(medium, verdict, self._people.session, at_ms, said)

    def _doubts(self, there: Presence, at_ms: int, cold: bool, switched: bool) -> Iterator[Event]:
        medium, before = there.medium, self._before.get(there.medium.id)
        others, verdict = list(self._media.present.values()), self._judging.decide(medium, at_ms)
        looked = self._disguises.look(medium, there.device, before, others, at_ms, cold, switched, verdict.decision)
        found = self._found.get(medium.id) or _Found("", 0, {})
        fresh = {doubt.reason: doubt for doubt in looked if doubt.reason not in found.doubts}
        if not fresh:
            return
        if fresh.keys() & {"cloned_serial", "capacity_changed"}:
            if self._memory.of(medium) is None:
                self._memory.learn(medium, there.device, at_ms)
            self._memory.share(medium)
        told = [reason for reason in fresh if reason not in there.doubts]
        update, found.finding_uid = bool(there.doubts), there.finding or self._new_uid()
        found.doubts |= fresh
        found.severity = max(found.severity, *(doubt.severity for doubt in fresh.values()))
        self._found[medium.id] = found
        there.finding, there.doubts = found.finding_uid, list(dict.fromkeys([*there.doubts, *fresh]))
        if told:
            detail: dict[str, Any] = {"reasons": list(found.doubts), "identity": self._memory.identity(medium)}
            detail |= {
                "doubts": [{name: value for name, value in each._asdict().items() if value} for each in found.doubts.values()]
            }
            message = "; ".join(REASONS[reason] for reason in found.doubts)
            yield self._writer.doubted(
                "device.disguised", medium, verdict, self._people.session, at_ms, found.finding_uid, update, found.severity,
                there.story, detail, message,
            )  # fmt: skip

    def _first_use(self, medium: Medium, at_ms: int, kinds: frozenset[str]) -> Iterator[Event]:
        uid, there = self._people.session.uid, self._presences.here.get(medium.id)
        if not self.first_use or uid is None or medium.kind not in kinds or not self._memory.first_use(uid, at_ms):
            return
        verdict, story = self._judging.decide(medium, at_ms), there.story if there is not None else ""
        yield self._writer.doubted(
            "medium.first_use", medium, verdict, self._people.session, at_ms, self._new_uid(), False, LOW, story, {}, ""
        )

    def _said(self, there: Presence) -> dict[str, Any]:
        return {"identity": self._memory.identity(there.medium), "identity_by": recognised_by(there.medium, there.device)}

    def _forget(self, id: str) -> None:
        for table in (self._before, self._settling, self._found):
            table.pop(id, None)

    def to_bytes(self) -> bytes:
        """What is kept over a restart; made anew only if something changed, as other rooms change with every file."""
        if self._stale or self.changed:
            self._stale = False
            self._kept = msgspec.msgpack.encode(_Kept(self._memory.to_bytes(), self._presences.to_bytes()))
        return self._kept

    def from_bytes(self, data: bytes) -> None:
        """Take back what `to_bytes` gave. Raises msgspec.MsgspecError."""
        if data:
            kept = msgspec.msgpack.decode(data, type=_Kept)
            self._memory.from_bytes(kept.memory)
            self._presences.from_bytes(kept.present)
            self._media.recall(key for key, known in self._memory.devices.items() if known.kind == "phone")
