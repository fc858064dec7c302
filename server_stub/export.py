"""From the store to a bundle: the events wanted, the signed heads they came under, and what leads from them to a checkpoint.

Owns: which batches a filter needs, the lines that stand for events that were not asked for, the hashes of what is left out, and
the ZIP, made as it is sent: memory holds a page of events, a temporary file what is small beside them. The same log, size and
filter give the same bytes. Must not know: who asks, HTTP, what is in an event.
"""

import base64
import io
import tempfile
import zipfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import msgspec
from nacl.signing import SigningKey

from agent.contract import chain, wire
from server_stub import bundle, query, tree
from server_stub.bundle import Entry, Keys, Manifest
from server_stub.query import Filter
from server_stub.store import Store

PAGE = 256
"""Batches, or events a filter found, looked up at once."""
SPOOLED = 4 << 20
"""Bytes of a small member kept in memory; more goes to a temporary file."""
_HEADS = (
    "SELECT pos, agent, epoch, first, taken, heads.last, sent_at, sig, chain FROM heads JOIN chains ON chains.id = heads.chain"
)
NOTE = (
    "These public keys came with this bundle: whoever made it could have put others here. Compare them with those"
    " you got from the collector's administrator, or run: sekisho-collector verify FILE --key KEYFILE"
)
README = """This is a bundle of Sekisho events that can be checked without its collector.
    sekisho-collector verify FILE --key KEYFILE
KEYFILE: the collector's public key (`sekisho-collector key show`), got another way than with this file.
events.ndjson holds the events, one a line, as they were recorded; the other files prove them.
How, to the byte: docs/reference.md, "Bundles".

これは Sekisho の記録を、収集サーバーなしで検証できる形にまとめたものです。
    sekisho-collector verify FILE --key KEYFILE
KEYFILE: 収集サーバーの公開鍵 (`sekisho-collector key show`)。このファイルとは別の経路で受け取ってください。
events.ndjson に記録が 1 行 1 件、記録時のままのバイト列で入っています。ほかのファイルはその証明です。
"""


class Asked(NamedTuple):
    """What is exported: `given` is the filter as it was written, for the manifest. `size`: the log's, up to which."""

    wanted: Filter
    given: dict[str, str]
    size: int


class Signer(NamedTuple):
    """Who vouches: the log's name and present key, and all keys it ever had, oldest first."""

    origin: str
    key: SigningKey
    keys: list[bytes]
    rotations: list[wire.Rotation]


class _Sink(io.RawIOBase):
    """What zipfile writes to; it can't be sought in, so sizes follow each member's data."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.parts.append(bytes(data))
        return len(data)

    def taken(self) -> bytes:
        """What was written since."""
        done, self.parts = b"".join(self.parts), []
        return done


def is_boundary(store: Store, size: int, newest: int) -> bool:
    """Whether the log had exactly this size between two batches, as checkpoints do."""
    return size == newest or (size < newest and bool(store.rows("SELECT 1 FROM heads WHERE pos = ?", (size + 1,))))


def _info(name: str, packed: bool = True) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
    info.compress_type = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
    info.external_attr = 0o600 << 16
    info.create_system = 3
    return info


def _heads(store: Store, asked: Asked) -> Iterator[tuple[list[tuple[Any, ...]], set[int] | None]]:
    """Pages of heads in order of the log, with the positions wanted in them (None: all)."""
    after = 0
    if not asked.given:
        while heads := store.rows(f"{_HEADS} WHERE pos > ? AND pos <= ? ORDER BY pos LIMIT ?", (after, asked.size, PAGE)):
            yield heads, None
            after = heads[-1][0]
        return
    condition, values = query.where(asked.wanted, store.dialect)
    sql = f"SELECT pos FROM events WHERE pos > ? AND pos <= ? AND {condition} ORDER BY pos LIMIT ?"  # noqa: S608 - constants
    while found := [pos for (pos,) in store.rows(sql, (after, asked.size, *values, PAGE))]:
        heads = []
        upto = 0
        for pos in found:
            if pos > upto:
                heads += store.rows(f"{_HEADS} WHERE pos <= ? ORDER BY pos DESC LIMIT 1", (pos,))
                upto = heads[-1][0] + heads[-1][5] - heads[-1][4]
        if upto > found[-1]:
            # The last batch of a page may hold more of what is wanted than the page does.
            rest = store.rows(sql, (found[-1], min(upto, asked.size), *values, wire.MAX_EVENTS))
            found += [pos for (pos,) in rest]
        yield heads, set(found)
        after = max(found[-1], upto)


def _room(directory: Path | None) -> IO[bytes]:
    """A temporary file that begins in memory; whoever asked closes it."""
    return tempfile.SpooledTemporaryFile(SPOOLED, dir=str(directory) if directory else None)


class _Maker:
    def __init__(self, store: Store, asked: Asked, room: Path | None) -> None:
        self.store, self.asked = store, asked
        self.batches = _room(room)
        self.leaves = _room(room)
        self.gaps = _room(room)
        self.agents: set[str] = set()
        self.size = self.lines = self.events = self.count = 0
        self.ends: dict[int, tuple[int, bytes]] = {}

    def close(self) -> None:
        for file in (self.batches, self.leaves, self.gaps):
            file.close()

    def _gap(self, end: int) -> None:
        for level, index in bundle.blocks(self.size, end):
            self.gaps.write(self.store.subtree(level, index))

    def _hash_at(self, number: int, agent: str, epoch: int, seq: int) -> bytes:
        """The chain's hash after event `seq`."""
        if seq == 0:
            return chain.genesis(agent, epoch)
        if (known := self.ends.get(number)) and known[0] == seq:
            return known[1]
        sql = "SELECT hash FROM events WHERE chain = ? AND seq = ?"
        return bytes(self.store.rows(sql, (number, seq))[0][0])

    def events_of(self, heads: list[tuple[Any, ...]], wanted: set[int] | None) -> bytes:
        """The lines of these batches, all the rest noted down."""
        out: list[bytes] = []
        sql = "SELECT raw, leaf, hash FROM events LEFT JOIN erased USING (pos) WHERE pos >= ? AND pos < ? ORDER BY pos"
        for pos, agent, epoch, first, taken, last, sent_at, sig, number in heads:
            self._gap(pos - 1)
            rows = self.store.rows(sql, (pos, pos + last - taken + 1))
            for at, (raw, leaf, _) in enumerate(rows, pos):
                if wanted is None or at in wanted:
                    folded = raw.startswith(b'{"seq":')
                    out.append(raw)
                else:
                    folded = True
                    out.append(raw if raw.startswith(b'{"seq":') else wire.folded_line(taken + at - pos, chain.digest(raw)))
                if folded:
                    self.leaves.write(leaf or tree.leaf_hash(raw))
                else:
                    self.events += 1
            start = self._hash_at(number, agent, epoch, taken - 1)
            prev = start if first == taken else self._hash_at(number, agent, epoch, first - 1)
            self.ends[number] = (last, rows[-1][2])
            entry = Entry(
                pos=pos - 1, agent=agent, epoch=epoch, first=first, taken=taken, last=last, start=start.hex(), prev=prev.hex(),
                hash=rows[-1][2].hex(), sent_at=sent_at, sig=base64.b64encode(sig).decode(),
            )  # fmt: skip
            self.batches.write(msgspec.json.encode(entry) + b"\n")
            self.agents.add(agent)
            self.size, self.lines, self.count = pos - 1 + len(rows), self.lines + len(rows), self.count + 1
        out.append(b"")
        return b"\n".join(out)

    def finish(self) -> Manifest:
        """The log's end."""
        self._gap(self.asked.size)
        return Manifest(
            format=bundle.FORMAT, origin="", size=self.asked.size, filter=self.asked.given, batches=self.count,
            lines=self.lines, events=self.events,
        )  # fmt: skip


def chunks(
    store: Store, asked: Asked, signer: Signer, agents: Callable[[str], bytes | None], room: Path | None = None
) -> Generator[bytes, None, None]:
    """The bundle, part by part. `agents`: an agent's key by its id. Raises StoreError."""
    maker, sink = _Maker(store, asked, room), _Sink()
    try:
        with zipfile.ZipFile(sink, "w") as file:
            with file.open(_info(bundle.EVENTS), "w", force_zip64=True) as member:
                for heads, wanted in _heads(store, asked):
                    member.write(maker.events_of(heads, wanted))
                    if data := sink.taken():
                        yield data
            manifest = maker.finish()
            manifest.origin = signer.origin
            for name, held in ((bundle.BATCHES, maker.batches), (bundle.LEAVES, maker.leaves), (bundle.GAPS, maker.gaps)):
                held.seek(0)
                with file.open(_info(name, name == bundle.BATCHES), "w", force_zip64=True) as member:
                    while part := held.read(1 << 18):
                        member.write(part)
                        yield sink.taken()
            made = {agent: key for agent in sorted(maker.agents) if (key := agents(agent)) is not None}
            keys = Keys(note=NOTE, collector=signer.keys, rotations=signer.rotations, agents=made)
            told = msgspec.json.format(msgspec.json.encode(manifest))
            note = tree.checkpoint(signer.origin, asked.size, tree.root_at(asked.size, store.subtree), signer.key)
            small = {
                bundle.KEYS: msgspec.json.format(msgspec.json.encode(keys)),
                bundle.CHECKPOINT: note.encode(),
                bundle.MANIFEST: told,
                bundle.SIGNATURE: chain.sign(b"sekisho/bundle/v1\n" + told, signer.key).encode() + b"\n",
                bundle.README: README.encode(),
            }
            for name, data in small.items():
                file.writestr(_info(name), data)
        yield sink.taken()
    finally:
        maker.close()
