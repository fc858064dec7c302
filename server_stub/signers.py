"""The keys this log was signed with, and how one takes the place of another without breaking the log's name or its proofs.

Owns: the table of keys, the rotation that the old and the new key both sign, and the order of steps that leaves a usable
pair of key file and store wherever a crash comes. The log keeps the id and name of its first key. Must not know: HTTP, events.

    signing.key.next   the new key, durable before the store says so; takes the place of signing.key after that
    signing.key.N      the Nth key, kept by whoever may still want to prove what it signed; it signs nothing any more
"""

import base64
import os
from pathlib import Path

import msgspec
from nacl.signing import SigningKey

from agent.contract import chain, wire
from server_stub.store import Session, StoreError


def known(session: Session, key: bytes) -> tuple[list[bytes], list[wire.Rotation]]:
    """All keys, oldest first, and their rotations; a new log begins with `key`. Raises StoreError if it is not the newest."""
    session.begin()  # two collectors may begin a log at once
    rows = session.execute("SELECT key, rotation FROM signers ORDER BY n")
    if not rows:
        session.execute("INSERT INTO signers VALUES (1, ?, 0, '')", (key,))
    session.commit()
    if not rows:
        return [key], []
    keys = [bytes(row[0]) for row in rows]
    if keys[-1] != key:
        raise StoreError(
            "the signing key is not the one this log is signed with; restore that key's file from your backup"
            " (a new one is made with: sekisho-collector key rotate)"
        )
    return keys, [msgspec.json.decode(text, type=wire.Rotation) for _, text in rows if text]


def finish(session: Session, key_file: Path, key: SigningKey) -> SigningKey:
    """The key to use: a rotation that was cut short after the store took it is brought to its end."""
    spare = key_file.with_name(key_file.name + ".next")
    if not spare.exists():
        return key
    new = SigningKey(base64.b64decode(spare.read_bytes()))
    rows = session.execute("SELECT key FROM signers ORDER BY n DESC LIMIT 1")
    if rows and bytes(rows[0][0]) == bytes(new.verify_key):
        _replace(session, key_file, spare)
        return new
    spare.unlink()
    return key


def rotate(session: Session, key_file: Path, old: SigningKey, new: SigningKey, size: int) -> wire.Rotation:
    """Make `new` the log's key from `size` on. The caller holds the store's lock. Raises StoreError, OSError."""
    said = [base64.b64encode(bytes(each.verify_key)).decode() for each in (old, new)]
    rotation = wire.Rotation(said[0], said[1], size)
    rotation.old_sig = chain.sign(chain.rotation_bytes(rotation), old)
    rotation.new_sig = chain.sign(chain.rotation_bytes(rotation), new)
    spare = key_file.with_name(key_file.name + ".next")
    with os.fdopen(os.open(spare, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as file:
        file.write(base64.b64encode(bytes(new)) + b"\n")
        file.flush()
        os.fsync(file.fileno())
    text = msgspec.json.encode(rotation).decode()
    session.begin()
    session.execute("INSERT INTO signers SELECT max(n) + 1, ?, ?, ? FROM signers", (bytes(new.verify_key), size, text))
    # The register is signed anew, and under a higher version, when the collector starts: agents then ask for it.
    session.execute("DELETE FROM meta WHERE name = 'register'")
    session.commit()
    _replace(session, key_file, spare)
    return rotation


def _replace(session: Session, key_file: Path, spare: Path) -> None:
    """Put the new key in the old one's place, which is kept under its number."""
    number = session.execute("SELECT max(n) FROM signers")[0][0] - 1
    former = key_file.with_name(f"{key_file.name}.{number}")
    if not former.exists():
        os.link(key_file, former)
    spare.rename(key_file)
    handle = os.open(key_file.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
