"""Who this agent is: its Ed25519 key, its id, the collector it joined, and the last head that collector acknowledged.

Owns: the state directory's small files, and their owner and modes. It is the only reader of the key file.
    agent.key       32-byte Ed25519 seed (RFC 8032), 0600, made once, never rewritten
    agent.json      for which machine the key was made: a digest of /etc/machine-id (machine-id(5): never published itself)
    collector.json  the collector joined: URL and its pinned public key
    head.json       the last acknowledged head, so that a new spool can name the old one's
    register.json   the register of media, as signed; written by `sender`
Must not know: events, HTTP, SQLite. A key is never read by two machines knowingly: if the machine-id is another than when the
key was made (a golden image, a cloned disk), the key is kept aside under another name and a new one is made.
"""

import base64
import hashlib
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import msgspec
from msgspec import Struct
from nacl.signing import SigningKey

from agent.contract import chain
from agent.core.facts import Tampered

MACHINE_ID = Path("/etc/machine-id")
T = TypeVar("T")


class IdentityError(Exception):
    """The state directory or a file in it can't be trusted or used; str() is one sentence that says what to do."""


class Pinned(Struct, kw_only=True):
    """collector.json. `key`: its Ed25519 public key, base64; `token_digest`: SHA-256 (hex) of the token that was used up.

    `former`: keys it had before, newest first; what is kept here may still be signed by them.
    """

    url: str
    key: str
    agent: str
    name: str = ""
    ca_file: str = ""
    enrolled_at: int = 0
    token_digest: str = ""
    former: list[str] = []

    @property
    def kept_keys(self) -> list[bytes]:
        """The keys that may have signed what is kept here, the pinned one first."""
        return [self.public_key, *(base64.b64decode(key) for key in self.former)]

    def succeeded(self, key: bytes) -> "Pinned":
        """With `key` in the place of the pinned one."""
        return msgspec.structs.replace(self, key=base64.b64encode(key).decode(), former=[self.key, *self.former])

    @property
    def public_key(self) -> bytes:
        """The collector's Ed25519 public key, 32 bytes."""
        return base64.b64decode(self.key)


class Acknowledged(Struct, kw_only=True):
    """head.json: the newest head a signed receipt named. `hash` in hex, `at_ms` by the agent's clock."""

    agent: str
    epoch: int
    seq: int
    hash: str
    at_ms: int = 0


class Birth(Struct, kw_only=True):
    """agent.json: on which machine the key was made (digest; empty if it has no machine-id)."""

    machine: str = ""


class Identity:
    """The loaded key and the files beside it. `former` is the agent id that was put aside because the machine is another."""

    def __init__(self, state_dir: Path, key: SigningKey, former: str = "") -> None:
        self.state_dir, self.key, self.former = state_dir, key, former
        self.public_key = bytes(key.verify_key)
        self.agent = chain.agent_id(self.public_key)

    def tampered(self, now_ms: int) -> Tampered | None:
        """The fact to feed if the identity found was another machine's and a new one was made."""
        if not self.former:
            return None
        return Tampered(at_ms=now_ms, what="cloned_identity", detail={"former": self.former, "agent": self.agent})

    def pinned(self) -> Pinned | None:
        """The collector joined, None if none. Raises IdentityError if the file can't be read or is another agent's."""
        found = _load(self.state_dir / "collector.json", Pinned)
        if found is None:
            return None
        try:
            whole = found.agent == self.agent and len(found.public_key) == 32
        except ValueError:
            whole = False
        if not whole:
            raise IdentityError(f"{self.state_dir}/collector.json does not fit this agent's key; remove it and enroll again")
        return found

    def pin(self, pinned: Pinned) -> None:
        """Remember the collector joined; durable when it returns."""
        write_file(self.state_dir / "collector.json", msgspec.json.encode(pinned))

    def acknowledged(self) -> Acknowledged | None:
        """The newest acknowledged head, None if there is none (or it is a former identity's)."""
        found = _load(self.state_dir / "head.json", Acknowledged)
        return found if found and found.agent == self.agent else None

    def acknowledge(self, head: Acknowledged) -> None:
        """Remember an acknowledged head; durable when it returns."""
        write_file(self.state_dir / "head.json", msgspec.json.encode(head))


def load_or_create(state_dir: str | Path, machine_id: Path = MACHINE_ID) -> Identity:
    """The identity kept in `state_dir`, made if missing. Raises IdentityError."""
    state_dir = Path(state_dir)
    _own_directory(state_dir)
    key_path, birth_path = state_dir / "agent.key", state_dir / "agent.json"
    machine, former = _machine_digest(machine_id), ""
    birth = _load(birth_path, Birth)
    key = _read_key(key_path)
    if key and birth and birth.machine and machine and birth.machine != machine:
        former = _put_aside(state_dir, key)
        key = birth = None
    if key is None:
        key = _create_key(key_path)
        birth = None
    if birth is None:
        write_file(birth_path, msgspec.json.encode(Birth(machine=machine)))
    return Identity(state_dir, key, former)


_OWN = ("agent.key", "agent.json", "collector.json", "head.json", "register.json")


def _put_aside(state_dir: Path, key: SigningKey, names: tuple[str, ...] = _OWN) -> str:
    """Keep these files under the name of the identity they are of; its id."""
    former = chain.agent_id(bytes(key.verify_key))
    for name in names:
        with suppress(FileNotFoundError):
            (state_dir / name).rename(state_dir / f"{name}.of-{former[:12]}")
    _sync_directory(state_dir)
    return former


def renew(state_dir: str | Path) -> str:
    """Put the key and all that belongs to it aside, the spool too, so that the next start makes a new one; the former id.

    For an agent that is stopped and has sent everything. Raises IdentityError.
    """
    held = load(state_dir)
    spool = ("spool.db", "spool.db-wal", "spool.db-shm")
    try:
        return _put_aside(held.state_dir, held.key, (*_OWN, *spool))
    except OSError as error:
        raise IdentityError(f"{state_dir}: its files can't be put aside ({error.strerror}); mend the disk") from None


def load(state_dir: str | Path) -> Identity:
    """The identity that is there; makes nothing. Raises IdentityError, also if there is none."""
    state_dir = Path(state_dir)
    if not state_dir.is_dir():
        raise IdentityError(f"state_dir {state_dir}: is not there; has the agent ever run on this machine?")
    _own_directory(state_dir)
    key = _read_key(state_dir / "agent.key")
    if key is None:
        raise IdentityError(f"{state_dir}/agent.key: is not there; start the agent or enroll it once")
    return Identity(state_dir, key)


def public_key(state_dir: str | Path) -> bytes:
    """The agent's Ed25519 public key, 32 bytes. Raises IdentityError."""
    return load(state_dir).public_key


def write_file(path: Path, data: bytes) -> None:
    """Replace `path` by `data` (0600) so that a crash leaves either the old or the new one, whole. Raises IdentityError."""
    spare = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        _write_new(spare, data)
        spare.rename(path)
        _sync_directory(path.parent)
    except OSError as error:
        with suppress(OSError):
            spare.unlink()
        raise IdentityError(f"{path}: can't be written ({error.strerror}); free some space or mend the disk") from None


def _load(path: Path, kind: type[T]) -> T | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise IdentityError(f"{path}: can't be read ({error.strerror}); run as the user who owns it") from None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise IdentityError(f"{path}: is damaged; move it away, and enroll again if it is collector.json") from None


def _machine_digest(path: Path) -> str:
    try:
        text = path.read_text("ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""
    return hashlib.sha256(f"sekisho/machine\n{text}".encode()).hexdigest() if len(text) == 32 else ""


def _own_directory(path: Path) -> None:
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        seen = path.stat()
    except OSError as error:
        raise IdentityError(
            f"state_dir {path}: can't be used ({error.strerror}); name a directory this user may write"
        ) from None
    _trust(f"state_dir {path}", seen, 0o700)


def _trust(what: str, seen: os.stat_result, mode: int) -> None:
    """Refuse what another user owns, or what others may read or write."""
    if seen.st_uid != os.geteuid():
        raise IdentityError(f"{what} belongs to uid {seen.st_uid}; run `chown {os.geteuid()}` on it or run as its owner")
    if seen.st_mode & 0o077:
        raise IdentityError(f"{what} has mode {stat.S_IMODE(seen.st_mode):04o}, open to others; run `chmod {mode:o}` on it")


def _read_key(path: Path) -> SigningKey | None:
    try:
        # O_NOFOLLOW: a link would let whoever made it choose the key; O_NONBLOCK: a FIFO in its place must not hang us.
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise IdentityError(f"{path}: can't be read ({error.strerror}); it must be a plain file of this user") from None
    with os.fdopen(handle, "rb") as file:
        _trust(str(path), os.fstat(handle), 0o600)
        seed = file.read(33)
    if len(seed) != 32:
        raise IdentityError(f"{path}: is not a 32-byte key; restore it from a backup, or move it away and enroll again")
    return SigningKey(seed)


def _create_key(path: Path) -> SigningKey:
    spare = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        _write_new(spare, bytes(SigningKey.generate()))
        # link(2) never replaces: if another process was first, its key is the key.
        with suppress(FileExistsError):
            os.link(spare, path)
        spare.unlink()
        _sync_directory(path.parent)
    except OSError as error:
        with suppress(OSError):
            spare.unlink()
        raise IdentityError(f"{path}: can't be made ({error.strerror}); free some space or mend the disk") from None
    key = _read_key(path)
    if key is None:
        raise IdentityError(f"{path}: vanished as it was made; see who else writes in that directory")
    return key


def _write_new(path: Path, data: bytes) -> None:
    with suppress(FileNotFoundError):
        path.unlink()
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(handle)


def _sync_directory(path: Path) -> None:
    """Make names durable: fsync(2) of a file does not cover its directory entry."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
