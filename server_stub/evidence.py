"""What the commands do that make evidence and keep it: export, key, witness, retain, backup, restore.

Owns: from arguments to routes, files that appear whole or not at all, and the two commands that need the store for themselves
(`key rotate`, `restore`). `verify` is in `judged`. Must not know: how a bundle or a proof is made.
"""

import argparse
import contextlib
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO
from urllib.parse import urlencode

import msgspec
from nacl.signing import SigningKey

from agent.contract import columns
from server_stub import config, moving, signers, witness, words
from server_stub.client import Failed, as_owner
from server_stub.collector import load_key, locked
from server_stub.commands import _params, client, local_zone, say
from server_stub.judged import language
from server_stub.query import BadQuery
from server_stub.store import sqlite
from server_stub.store.opening import open_store


@contextlib.contextmanager
def _new_file(name: str, *, replace: bool) -> Iterator[IO[bytes]]:
    """A file (0600) that gets its name only once it is whole. Raises Failed."""
    path = Path(name)
    spare = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        if not replace and path.exists():
            raise Failed(f"{name}: is there already; choose another name")
        with os.fdopen(os.open(spare, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        spare.rename(path)
    except OSError as error:
        raise Failed(f"{name}: can't be written ({error.strerror or error}); choose another place") from None
    finally:
        spare.unlink(missing_ok=True)


def export(args: argparse.Namespace) -> int:
    """A bundle, to a file or stdout."""
    params = _params(args)
    if args.size is not None:
        params["size"] = str(args.size)
    target = f"/v1/export?{urlencode(params)}"
    if not args.output and sys.stdout.isatty():
        raise BadQuery("a bundle is no text for a terminal; name a file with -o FILE")
    asked = client(args)
    if not args.output:
        for part in asked.parts(target):
            sys.stdout.buffer.write(part)
        sys.stdout.buffer.flush()
        return 0
    with _new_file(args.output, replace=True) as file:
        for part in asked.parts(target):
            file.write(part)
    return 0


def key_show(args: argparse.Namespace) -> int:
    """The public key, as `verify --key` and `[[collector.cosign]]` take it."""
    keys = client(args).get("/v1/log/keys")
    say(msgspec.json.encode(keys).decode() if args.output == "json" else keys["verifier"])
    return 0


def witness_send(args: argparse.Namespace) -> int:
    """Give the newest checkpoint to every witness; 1 if one did not take it."""
    told = msgspec.json.decode(client(args).request("POST", "/v1/log/witness"))["witnesses"]
    if not told:
        raise Failed("no witness is configured; name one in [[collector.witness]]")
    for each in told:
        if args.output == "json":
            say(msgspec.json.encode(each).decode())
        elif each["ok"]:
            say(columns.harmless(words.say(language(args), "carried", **each)))
        else:
            sys.stderr.write(f"sekisho-collector: {columns.harmless(each['why'])}\n")
    return 0 if all(each["ok"] for each in told) else 1


def witness_show(args: argparse.Namespace) -> int:
    """The newest checkpoint as a note; on a terminal as the block that a report prints."""
    note = client(args).request("GET", "/v1/log/checkpoint" + ("?cosigned=1" if args.cosigned else "")).decode()
    sys.stdout.write(witness.printed(note) if sys.stdout.isatty() else note)
    return 0


def retain(args: argparse.Namespace) -> int:
    """Erase content that was received longer ago than asked."""
    try:
        age_s = config.parse_seconds(args.older_than)
    except ValueError as error:
        raise BadQuery(f"--older-than: {error}") from None
    if age_s < 86_400:
        raise BadQuery("--older-than must be 1d or more: what is younger is still needed")
    before = time.time_ns() // 1_000_000 - int(age_s * 1000)
    done = msgspec.json.decode(client(args).request("POST", f"/v1/retention?before={max(before, 0):015d}"))["erased"]
    at = columns.time_text(before, local_zone())
    say(words.say(language(args), "erased", count=done, before=at))
    return 0


def key_rotate(args: argparse.Namespace) -> int:
    """A new signing key, that the old one vouches for."""
    settings = config.load(args.config)
    if not settings.postgres and not settings.store_file.exists():
        raise Failed(f"{settings.store_file}: is not there; start the collector once before its key can be changed")
    with as_owner(settings.state_dir), locked(settings, 0.5):
        store = open_store(settings, alone=True)
        try:
            session = store.session()
            old = signers.finish(session, settings.key_file, load_key(settings.key_file))
            signers.known(session, bytes(old.verify_key))
            size = session.execute("SELECT coalesce(max(pos), 0) FROM events")[0][0]
            new = SigningKey.generate()
            signers.rotate(session, settings.key_file, old, new, size)
            origin = session.execute("SELECT key FROM signers ORDER BY n LIMIT 1")[0][0]
        except OSError as error:
            raise Failed(f"{settings.key_file}: the new key can't be kept ({error.strerror}); see to its directory") from None
        finally:
            store.close()
    from agent.contract.chain import agent_id

    say(witness.vkey(f"sekisho/{agent_id(bytes(origin))}", bytes(new.verify_key)))
    sys.stderr.write("the key was changed; start the collector, back up the new key, and hand out the line above\n")
    return 0


def backup(args: argparse.Namespace) -> int:
    """A copy of the store as of now."""
    settings = config.load(args.config)
    if settings.postgres:
        return moving.backup(settings, args.file)
    if not settings.store_file.exists():
        raise Failed(f"{settings.store_file}: is not there; nothing to back up")
    target = Path(args.file)
    if target.exists():
        raise Failed(f"{target}: is there already; choose another name")
    with as_owner(settings.state_dir), _private_spare(settings.state_dir) as spare:
        sqlite.copy(settings.store_file, spare)
        size = sqlite.checked(spare)
        with spare.open("rb") as made, _as_asker(), _new_file(args.file, replace=False) as file:
            shutil.copyfileobj(made, file, 1 << 20)
    sys.stderr.write(f"{args.file}: the store at size {size}; the signing key is not in it: keep {settings.key_file} apart\n")
    return 0


@contextlib.contextmanager
def _private_spare(directory: Path) -> Iterator[Path]:
    """A name beside the store for a copy, removed at the end."""
    spare = directory / f".copy-{os.getpid()}.db"
    try:
        yield spare
    finally:
        for name in (spare, *(spare.with_name(spare.name + end) for end in ("-wal", "-shm", "-journal"))):
            name.unlink(missing_ok=True)


@contextlib.contextmanager
def _as_asker() -> Iterator[None]:
    """With the rights of whoever typed the command, for a file that they named."""
    owner = os.geteuid()
    if os.getuid() == owner:
        yield
        return
    os.seteuid(os.getuid())
    try:
        yield
    finally:
        os.seteuid(owner)


def restore(args: argparse.Namespace) -> int:
    """Put a backup in the store's place; what was there is kept beside it."""
    settings = config.load(args.config)
    if settings.postgres:
        return moving.restore(settings, args.file)
    given = Path(args.file)
    if not given.is_file():
        raise Failed(f"{given}: is not there; name what `sekisho-collector backup` wrote")
    now = time.time_ns()
    with given.open("rb") as source, as_owner(settings.state_dir), locked(settings, 0.5):  # noqa: SIM117 - in this order
        with _private_spare(settings.state_dir) as spare:
            with os.fdopen(os.open(spare, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
                shutil.copyfileobj(source, file, 1 << 20)
                file.flush()
                os.fsync(file.fileno())
            size = sqlite.checked(spare)
            _fits(settings, spare)
            sqlite.new_epoch(spare, now // 1_000_000_000)
            store = settings.store_file
            for end in ("", "-wal", "-shm"):
                former = store.with_name(store.name + end)
                if former.exists():
                    former.rename(store.with_name(f"{store.name}.before-restore-{now // 1_000_000}{end}"))
            spare.rename(store)
    sys.stderr.write(
        f"the store is back at size {size}; agents send again what they still hold. Tokens and the register of media"
        " are as they were then: revoke again what was revoked since\n"
    )
    return 0


def _fits(settings: config.Settings, copy: Path) -> None:
    """Raise Failed unless the copy is a log that our key signs."""
    store = sqlite.SqliteStore(copy)
    try:
        key = load_key(settings.key_file)
        newest = store.rows("SELECT key FROM signers ORDER BY n DESC LIMIT 1")
        if newest and bytes(newest[0][0]) != bytes(key.verify_key):
            raise Failed(f"{settings.key_file}: is not the key this backup's log is signed with; restore the key of its time")
    finally:
        store.close()
