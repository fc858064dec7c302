"""Reaching PostgreSQL: what is asked of a database before anything is kept in it, and its errors in our words.

Owns: connections (PostgreSQL 15 or later, UTF-8, commits that are on the disk when they return, peers that are gone are
noticed), `?` for parameters, texts without NUL, and PostgreSQL's errors as `StoreError`, without the address's password.
Must not know: tables.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit

import psycopg
from psycopg import Connection
from psycopg.conninfo import make_conninfo

from server_stub.store import StoreError

OLDEST = 150_000
CONNECT_S = 5


def shown(url: str) -> str:
    """The address without its password, for people."""
    parts = urlsplit(url)
    return f"postgresql://{parts.netloc.rpartition('@')[2]}{parts.path}"


@contextlib.contextmanager
def told(url: str) -> Iterator[None]:
    """PostgreSQL's errors as `StoreError`."""
    try:
        yield
    except psycopg.Error as error:
        said = " ".join(str(error).split()) or type(error).__name__
        advice = "make room on its disk" if error.sqlstate == "53100" else "see to the database server"
        raise StoreError(f"{shown(url)}: {said[:300]}; {advice}") from error


@lru_cache(512)
def translated(sql: str) -> str:
    """`?` for parameters → psycopg's `%s`."""
    return sql.replace("%", "%%").replace("?", "%s")


def given(values: Sequence[Any]) -> tuple[Any, ...]:
    """Parameters; PostgreSQL's texts hold no NUL, and what is kept as text is an index, not the record."""
    return tuple(value.replace("\0", "\ufffd") if isinstance(value, str) and "\0" in value else value for value in values)


def _zone() -> str:
    """The name of this machine's time zone, so that a day is one of the collector's."""
    named = os.environ.get("TZ", "").removeprefix(":")
    if not named:
        named = os.path.realpath("/etc/localtime").partition("/zoneinfo/")[2]
    return named or "UTC"


def connect(url: str, name: str) -> Connection[Any]:
    """A connection whose commits are durable when they return. Raises psycopg.Error, StoreError."""
    address = make_conninfo(
        url, application_name=f"sekisho {name}", connect_timeout=CONNECT_S, target_session_attrs="read-write",
        keepalives_idle=5, keepalives_interval=2, keepalives_count=3, tcp_user_timeout=15_000,
    )  # fmt: skip
    db = psycopg.connect(address, autocommit=True)
    try:
        rows = db.execute(
            "SELECT current_setting('server_encoding'), current_setting('fsync'), current_setting('synchronous_commit')"
        ).fetchall()
        encoding, fsync, synchronous = rows[0]
        if db.info.server_version < OLDEST:
            raise StoreError(f"{shown(url)}: is PostgreSQL {db.info.server_version // 10_000}; use 15 or later")
        if encoding != "UTF8":
            raise StoreError(f"{shown(url)}: its encoding is {encoding}; make the database with ENCODING 'UTF8'")
        if fsync != "on":
            raise StoreError(f'{shown(url)}: runs with "fsync = off", so no receipt would hold; turn it on')
        if synchronous in ("off", "local"):
            db.execute("SET synchronous_commit = on")
        db.execute("SELECT set_config('TimeZone', name, false) FROM pg_timezone_names WHERE name = %s", (_zone(),))
    except BaseException:
        db.close()
        raise
    return db
