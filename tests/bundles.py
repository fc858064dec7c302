"""Bundles for tests: a small log made by the real writer with fixed keys and times, taken apart, spoiled, put together."""

import base64
import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from nacl.signing import SigningKey

from agent.contract import chain, wire
from agent.contract.event import MediumInfo, Sekisho
from server_stub import acts, bundle, export, intake, tree
from server_stub.commit import Writer
from server_stub.query import Filter
from server_stub.store.sqlite import SqliteStore

COLLECTOR, A, B, THIEF = (SigningKey(bytes(range(n, n + 32))) for n in (1, 2, 3, 99))
EPOCH = 1_760_000_000_000
DAY = 86_400_000
Members = dict[str, bytes]


class Machine:
    """An agent's chain, fixed to the byte."""

    def __init__(self, key: SigningKey, name: str, epoch: int = EPOCH) -> None:
        self.key, self.name, self.epoch = key, name, epoch
        self.id = chain.agent_id(bytes(key.verify_key))
        self.lines: list[bytes] = []
        self.hashes = [chain.genesis(self.id, epoch)]

    def event(self, code: str = "file.copied_out", at: int | None = None, **more: Any) -> bytes:
        """Its next event."""
        seq = len(self.lines) + 1
        made = {
            "class_uid": 1001, "type_uid": 100101, "severity_id": 2, "time": EPOCH + seq * 1000 if at is None else at,
            "metadata": {"uid": f"{self.name}-{self.epoch}-{seq}", "event_code": code, "sequence": seq},
            "device": {"uid": self.id, "hostname": self.name, "type_id": 2}, "message": f"顧客 {seq}",
            "unmapped": {"sekisho": {"seq": seq, "epoch": self.epoch, "prev": self.hashes[-1].hex()}}, **more,
        }  # fmt: skip
        self.lines.append(json.dumps(made, ensure_ascii=False, separators=(",", ":")).encode())
        self.hashes.append(chain.link(self.hashes[-1], chain.digest(self.lines[-1])))
        return self.lines[-1]

    def head(self, first: int, last: int) -> wire.Head:
        before, after = self.hashes[first - 1].hex(), self.hashes[last].hex()
        head = wire.Head(self.id, self.epoch, first, last, before, after, EPOCH + last * 1000 + 500)
        head.sig = chain.sign(chain.head_bytes(head), self.key)
        return head

    def batch(self, first: int, last: int, folded: tuple[int, ...] = ()) -> intake.Examined:
        """Events `first`..`last` as the collector takes them; of those in `folded` only digests."""
        lines = [
            wire.folded_line(seq, chain.digest(line)) if seq in folded else line
            for seq, line in enumerate(self.lines[first - 1 : last], first)
        ]
        body = wire.batch_body(self.head(first, last), lines)
        return intake.examine(body, False, self.id, bytes(self.key.verify_key), self.name)


class Log:
    """A log over a store in `directory`, without a collector around it."""

    def __init__(self, directory: Path, key: SigningKey = COLLECTOR) -> None:
        self.key, self.store = key, SqliteStore(directory / "collector.db")
        self.clock = EPOCH
        self.writer = Writer(self.store, key, "collector", now=self.now, woken=lambda _size: None)
        self.keys: dict[str, bytes] = {}

    def now(self) -> int:
        self.clock += 1
        return self.clock

    def take(self, machine: Machine, first: int, last: int, folded: tuple[int, ...] = ()) -> wire.Receipt:
        self.keys[machine.id] = bytes(machine.key.verify_key)
        batch = machine.batch(first, last, folded)
        return self.writer.submit(lambda writer: writer.take(batch)).result(10)[1]

    def note(self, name: str) -> None:
        """An event of the collector's own."""
        by = acts.By(name, True, "localhost")
        said = Sekisho(medium=MediumInfo(key="usb:1"))
        self.writer.submit(lambda writer: acts.changed(writer, by, "media.approve", said, f"{name} approved")).result(10)

    def bundle(self, size: int | None = None, **given: str) -> bytes:
        wanted = Filter(**given) if "severity" not in given else Filter(severity=int(given["severity"]))
        signer = export.Signer(f"sekisho/{self.writer.id}", self.key, self.writer.keys, self.writer.rotations)
        asked = export.Asked(wanted, given, self.writer.size if size is None else size)
        keys = {**self.keys, self.writer.id: bytes(self.key.verify_key)}
        return b"".join(export.chunks(self.store, asked, signer, keys.get))

    def checkpoint(self) -> str:
        size = self.writer.size
        return tree.checkpoint(f"sekisho/{self.writer.id}", size, tree.root_at(size, self.store.subtree), self.key)

    def close(self) -> None:
        self.writer.close()
        self.store.close()


def small_log(directory: Path, key: SigningKey = COLLECTOR, a: SigningKey = A, b: SigningKey = B) -> Log:
    """Two machines and the collector's own word between them; one event came as a digest, one batch began in what was held."""
    log, first, second = Log(directory, key), Machine(a, "ws-1"), Machine(b, "ws-2")
    for _ in range(7):
        first.event()
    for _ in range(5):
        second.event()
    log.take(first, 1, 3)
    log.take(second, 1, 2)
    log.take(first, 4, 4)
    log.take(second, 3, 5, folded=(4,))
    log.take(first, 3, 7)
    return log


def members(data: bytes) -> Members:
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        return {name: file.read(name) for name in file.namelist()}


def packed(parts: Members) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in parts.items():
            file.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), data)
    return out.getvalue()


def lines_of(parts: Members) -> list[bytes]:
    return parts[bundle.EVENTS].splitlines(keepends=True)


def with_lines(parts: Members, lines: list[bytes]) -> Members:
    return parts | {bundle.EVENTS: b"".join(lines)}


def with_batches(parts: Members, change: Callable[[list[dict[str, Any]]], Any]) -> Members:
    rows = [json.loads(line) for line in parts[bundle.BATCHES].splitlines()]
    change(rows)
    return parts | {bundle.BATCHES: b"".join(msgspec.json.encode(row) + b"\n" for row in rows)}


def resigned(row: dict[str, Any], key: SigningKey) -> None:
    """Sign a line of batches.ndjson anew."""
    head = msgspec.convert(row, bundle.Entry).head()
    row["sig"] = chain.sign(chain.head_bytes(head), key)


def reroot(parts: Members, key: SigningKey = COLLECTOR, **changes: Any) -> Members:
    """Manifest and checkpoint made anew by `key` for what the bundle holds now: what only its collector could do."""
    manifest = json.loads(parts[bundle.MANIFEST]) | changes
    edge = tree.Frontier()
    for line in parts[bundle.EVENTS].splitlines():
        edge.add(tree.leaf_hash(line))
    told = json.dumps(manifest).encode()
    note = tree.checkpoint(manifest["origin"], manifest["size"], edge.root(), key)
    sig = chain.sign(b"sekisho/bundle/v1\n" + told, key).encode()
    return parts | {bundle.MANIFEST: told, bundle.SIGNATURE: sig, bundle.CHECKPOINT: note.encode()}


def b64(key: SigningKey) -> str:
    return base64.b64encode(bytes(key.verify_key)).decode()
