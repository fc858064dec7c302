"""`verify`: a bundle's file, checked offline, with public keys alone.

Owns: which keys are believed and where they are from, the forms that public keys come in, and older checkpoints held
against the log. The lines are checked by `shares`; what fits and what does not is decided in `bundle`.
Must not know: collectors, stores, the network; it loads nothing of theirs.
"""

import base64
import binascii
import re
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import msgspec
from msgspec import Struct

from agent.contract import chain
from agent.contract.chain import NotWhole
from server_stub import bundle, shares, tree
from server_stub.bundle import Bad, Keys, Manifest

T = TypeVar("T")
MAX_SMALL = 64 << 20
_NOTE = re.compile(r"^(sekisho/[0-9a-f]{32})\n([0-9]+)\n[A-Za-z0-9+/=]{44}\n\n(?:— \S+ \S+\n)+", re.MULTILINE)
_DER = bytes.fromhex("302a300506032b6570032100")
"""What stands before an Ed25519 key in a SubjectPublicKeyInfo (RFC 8410)."""


class NoBundle(Exception):
    """What was named is no bundle, no key or no checkpoint; str() is one sentence that says what to do."""


class Verdict(Struct, kw_only=True):
    """What was found. `bad` None: whole. `given`: the key was given, not taken from the bundle."""

    origin: str
    size: int
    filter: dict[str, str]
    lines: int
    events: int
    machines: int
    given: bool
    keys: list[str]
    compared: list[int]
    uncovered: list[str]
    bad: Bad | None = None


def read_keys(path: str) -> list[bytes]:
    """The public keys in a file: base64, hex, C2SP verifier keys (`name+hash+key`) or PEM. Raises NoBundle."""
    try:
        text = Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise NoBundle(f"{path}: can't be read as a key ({error}); give the file with the collector's public key") from None
    text = re.sub(r"-----BEGIN PUBLIC KEY-----|-----END PUBLIC KEY-----", "", text)
    keys = []
    for line in text.splitlines():
        word = line.strip().strip('"')
        if not word or word.startswith("#"):
            continue
        try:
            data = bytes.fromhex(word) if re.fullmatch("[0-9a-fA-F]{64}", word) else _unpacked(word.rpartition("+")[2], word)
        except (ValueError, binascii.Error):
            data = b""
        if len(data) != 32:
            raise NoBundle(f"{path}: holds no Ed25519 public key; `sekisho-collector key show` prints what belongs there")
        keys.append(data)
    if not keys:
        raise NoBundle(f"{path}: holds no key; `sekisho-collector key show` prints what belongs there")
    return keys


def _unpacked(last: str, word: str) -> bytes:
    """base64 of a key, of 0x01 and a key behind `name+hash+`, or of a SubjectPublicKeyInfo."""
    if re.fullmatch(r"[^+\s]+\+[0-9a-f]{8}\+[A-Za-z0-9+/=]+", word):
        return base64.b64decode(word.split("+", 2)[2], validate=True).removeprefix(b"\x01")
    return base64.b64decode(word, validate=True).removeprefix(_DER)


def read_notes(path: str) -> list[tuple[str, str, int]]:
    """Every checkpoint in a text: `(note, origin, size)`. Raises NoBundle if there is none."""
    try:
        text = Path(path).read_text("utf-8").replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError) as error:
        raise NoBundle(f"{path}: can't be read ({error}); give the file that a witness kept") from None
    found = [(note[0], note[1], int(note[2])) for note in _NOTE.finditer(text if text.endswith("\n") else text + "\n")]
    if not found:
        raise NoBundle(f"{path}: holds no checkpoint of a Sekisho log; give the file that a witness kept")
    return found


def _small(file: zipfile.ZipFile, name: str) -> bytes:
    try:
        if file.getinfo(name).file_size > MAX_SMALL:
            raise Bad("unreadable", None, 0, f'"{name}" is too large')
        return file.read(name)
    except KeyError:
        raise Bad("unreadable", None, 0, f'the bundle lacks "{name}"') from None


def _decoded(data: bytes, name: str, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise Bad("unreadable", None, 0, f'"{name}" can\'t be read: {error}') from None


def verify(path: str, key_file: str = "", checkpoint_files: Sequence[str] = ()) -> Verdict:
    """Check the bundle at `path`. Raises NoBundle for what is none, or can't be read."""
    given = read_keys(key_file) if key_file else []
    notes = [note for each in checkpoint_files for note in read_notes(each)]
    verdict = Verdict(
        origin="", size=0, filter={}, lines=0, events=0, machines=0, given=bool(given), keys=[], compared=[], uncovered=[]
    )
    try:
        with Path(path).open("rb") as raw:
            if raw.read(2) != b"PK":
                raise NoBundle(f"{path}: is no bundle; name a file that `sekisho-collector export` wrote")
        _verify(path, given, notes, verdict)
    except OSError as error:
        raise NoBundle(f"{path}: can't be read ({error.strerror or error}); name a bundle's file") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        verdict.bad = Bad("unreadable", None, 0, f"the file is damaged or cut off: {error}")
    except shares.Killed as error:
        raise NoBundle(f"{path}: {error}") from None
    except Bad as bad:
        verdict.bad = bad
    return verdict


def _signed(manifest_bytes: bytes, sig: bytes, note: str, origin: str, key: bytes) -> tuple[int, bytes]:
    """Size and root that the collector signed. Raises Bad."""
    try:
        chain.check(b"sekisho/bundle/v1\n" + manifest_bytes, sig.decode("ascii", "replace").strip(), key)
        return tree.read_checkpoint(note, origin, key)
    except NotWhole as error:
        raise Bad("forged", None, 0, f"the collector's key did not sign this: {error.why}") from None


def _verify(path: str, given: list[bytes], notes: list[tuple[str, str, int]], verdict: Verdict) -> None:
    with zipfile.ZipFile(path) as file:
        names = file.namelist()
        if len(set(names)) != len(names):
            raise Bad("unreadable", None, 0, "the file holds two members of one name")
        manifest_bytes = _small(file, bundle.MANIFEST)
        manifest = _decoded(manifest_bytes, bundle.MANIFEST, Manifest)
        keys = _decoded(_small(file, bundle.KEYS), bundle.KEYS, Keys)
        note, sig = _small(file, bundle.CHECKPOINT).decode("utf-8", "replace"), _small(file, bundle.SIGNATURE)
        for name in (bundle.EVENTS, bundle.BATCHES, bundle.LEAVES, bundle.GAPS):
            if name not in names:
                raise Bad("unreadable", None, 0, f'the bundle lacks "{name}"')
    verdict.uncovered = sorted(set(names) - set(bundle.MEMBERS))
    verdict.origin, verdict.size, verdict.filter = manifest.origin, manifest.size, manifest.filter
    if re.fullmatch(r"sekisho/bundle/v[0-9]{1,4}", manifest.format) and manifest.format != bundle.FORMAT:
        raise NoBundle(f'{path}: its format is "{manifest.format}", which this version does not know; use a newer one')
    if not keys.collector or any(len(key) != 32 for key in [*keys.collector, *keys.agents.values()]):
        raise Bad("unreadable", None, 0, f'"{bundle.KEYS}" holds no usable keys')
    signers = chain.successors(keys.collector[0], keys.rotations)
    verdict.keys = [base64.b64encode(key).decode() for key in signers]
    if given and not set(given) & set(signers):
        raise Bad("forged", None, 0, "no key that was given is the key of the collector that made this bundle")
    if manifest.origin != f"sekisho/{chain.agent_id(signers[0])}":
        raise Bad("forged", None, 0, "the log's name is not that of the collector's first key")
    keys.collector = signers
    size, root = _signed(manifest_bytes, sig, note, manifest.origin, signers[-1])
    if manifest.format != bundle.FORMAT:
        raise Bad("unreadable", None, 0, "the manifest names no format")
    if size != manifest.size:
        raise Bad("unreadable", None, 0, "the checkpoint is of another size than the bundle")
    marks = sorted({old for _, _, old in notes})
    found = shares.run(path, keys, manifest, marks)
    try:
        edge, roots = shares.joined(found, marks)
    except Bad as bad:
        with zipfile.ZipFile(path) as file, file.open(bundle.BATCHES) as batches, file.open(bundle.EVENTS) as events:
            raise bundle.named(bad, shares.entries_of(batches), shares.Lines(events), chain.agent_id(signers[0])) from None
    verdict.lines, verdict.events = found[-1].lines, sum(share.events for share in found)
    verdict.machines = len(keys.agents)
    if edge.root() != root:
        raise Bad("tree", None, 0, "the events are signed, but stood in another order in the log, or a digest was changed")
    if (verdict.lines, verdict.events) != (manifest.lines, manifest.events):
        raise Bad("unreadable", None, 0, "the manifest counts other events than are here")
    for old, origin, mark in notes:
        _compare((old, origin, mark), roots, manifest.origin, size, signers)
        verdict.compared.append(mark)


def _compare(old: tuple[str, str, int], roots: dict[int, bytes], ours: str, total: int, signers: list[bytes]) -> None:
    """Raise Bad unless the older checkpoint is of this log's past; NoBundle if that can't be seen here."""
    note, origin, size = old
    if origin != ours:
        raise NoBundle(f"the checkpoint of size {size} is one of {origin}, not of this bundle's log {ours}")
    for key in signers:
        try:
            _, root = tree.read_checkpoint(note, origin, key)
            break
        except NotWhole:
            continue
    else:
        raise NoBundle(f"the checkpoint of size {size} is not signed by this log's key; it proves nothing")
    if size > total:
        raise Bad("removed", None, 0, f"the log had {size} events when the other checkpoint was signed, {total} are here")
    if size and size not in roots:
        raise NoBundle(f"this bundle can't be held against the checkpoint of size {size}: export all up to there, unfiltered")
    if size and roots[size] != root:
        raise Bad("tree", None, 0, f"the log was rewritten: its first {size} events are not those of the older checkpoint")
