"""The approvals of a register, packed: 10,000 of them in a megabyte, found by the key of their medium.

Owns: what of an approval decides on this machine (`Entry`), and where each lies. As objects they would take ten times as much,
of an agent's memory that is mostly for other things; a medium is asked for now and then. Must not know: what an approval means.
"""

import hashlib
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator

import msgspec
from msgspec import Struct

_NEAR = 64
"""Media whose approvals are kept unpacked."""


class Entry(Struct, array_like=True, omit_defaults=True, frozen=True, gc=False):
    """What decides of an approval, on this machine. `here`: it counts on this machine."""

    id: str
    key: str
    since_ms: int = 0
    until_ms: int | None = None
    here: bool = True
    read_only: bool = False
    revoked: bool = False
    lost: bool = False
    once: bool = False
    used_by: str = ""
    dirs: tuple[str, ...] = ()


_decoder = msgspec.msgpack.Decoder(Entry)


def packed(entries: Iterable[Entry]) -> bytes:
    """Entries one after the other, each with its length before it."""
    blob, encoder = bytearray(), msgspec.msgpack.Encoder()
    for entry in entries:
        data = encoder.encode(entry)
        blob += len(data).to_bytes(4) + data
    return bytes(blob)


class Approvals:
    """Those that `blob` holds. Raises msgspec.MsgspecError if it is none of `packed`."""

    def __init__(self, blob: bytes = b"") -> None:
        self.blob = blob
        places = [_hash(entry.key) << 32 | at for at, entry in self._walk()]
        places.sort()
        self._places = array("Q", places)
        self._near: dict[str, list[Entry]] = {}

    def _walk(self) -> Iterator[tuple[int, Entry]]:
        at = 0
        while at < len(self.blob):
            entry, end = self._at(at)
            yield at, entry
            at = end

    def _at(self, at: int) -> tuple[Entry, int]:
        end = at + 4 + int.from_bytes(self.blob[at : at + 4])
        return _decoder.decode(self.blob[at + 4 : end]), end

    def of(self, key: str) -> list[Entry]:
        """The approvals of a medium."""
        found = self._near.get(key)
        if found is None:
            wanted, found = _hash(key), []
            for place in self._places[bisect_left(self._places, wanted << 32) :]:
                if place >> 32 != wanted:
                    break
                entry, _ = self._at(place & 0xFFFFFFFF)
                if entry.key == key:
                    found.append(entry)
            if len(self._near) >= _NEAR:
                self._near.clear()
            self._near[key] = found
        return found


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=4).digest())
