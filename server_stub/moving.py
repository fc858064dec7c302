"""What the commands `migrate`, and `backup` and `restore` of a site in PostgreSQL, do for an administrator.

Owns: the order of steps and what is said meanwhile; PostgreSQL's own programs, which make and read its backups, and their
environment: an address with its password never stands in a list of processes. Must not know: tables.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from server_stub import config
from server_stub.client import Failed, as_owner
from server_stub.collector import locked
from server_stub.config import ConfigError, Settings
from server_stub.store import StoreError

WAIT_S = 0.5


def _driver() -> None:
    try:
        import psycopg  # noqa: F401
    except ImportError:
        raise Failed('PostgreSQL\'s driver is not installed; run: pip install "sekisho[collector,postgres]"') from None


def migrate(args: argparse.Namespace) -> int:
    """Move the store of this machine's collector to PostgreSQL."""
    _driver()
    from server_stub.migrate import Move
    from server_stub.store.pglink import shown

    settings = config.load(args.config)
    if not settings.store_file.exists():
        raise Failed(f"{settings.store_file}: is not there; there is nothing to move")
    if not args.to.startswith(("postgresql://", "postgres://")):
        raise ConfigError(f'--to is "{shown(args.to)}"; write it like postgresql://sekisho@db.example/sekisho')
    with as_owner(settings.state_dir):
        move = Move(settings.store_file, args.to)
        try:
            for progress in move.copy():
                sys.stderr.write(f"\r{progress.done} of {progress.size} events copied" + " " * 8)
            sys.stderr.write("\n")
            while True:
                try:
                    with locked(settings, 0.0):
                        size = move.finish(time.time_ns() // 1_000_000)
                    break
                except ConfigError:
                    sys.stderr.write("\rnow stop the collector: agents keep what they have, and send it later" + " " * 8)
                    for _ in move.copy():
                        pass
                    time.sleep(WAIT_S)
        finally:
            move.close()
    sys.stderr.write(
        f'\n{size} events are in {shown(args.to)}, and the tree over them is the one it was. Set "database" to it in'
        " [collector], then start the collector\n"
    )
    return 0


def _environment(url: str) -> dict[str, str]:
    """libpq's variables for an address."""
    from psycopg.conninfo import conninfo_to_dict

    names = {"host": "PGHOST", "port": "PGPORT", "user": "PGUSER", "password": "PGPASSWORD", "dbname": "PGDATABASE"}
    more = {"sslmode": "PGSSLMODE", "sslrootcert": "PGSSLROOTCERT", "sslcert": "PGSSLCERT", "sslkey": "PGSSLKEY"}
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
    asked = conninfo_to_dict(url)
    return kept | {name: str(asked[key]) for key, name in (names | more).items() if asked.get(key)}


def _run(url: str, program: str, *args: str) -> None:
    try:
        done = subprocess.run([program, *args], capture_output=True, text=True, env=_environment(url), check=False)
    except FileNotFoundError:
        raise Failed(f"{program} is not installed here; install PostgreSQL's client programs") from None
    if done.returncode:
        said = " ".join(done.stderr.split())[:300]
        raise Failed(f"{program} failed ({said}); see to the database server")


def backup(settings: Settings, file: str) -> int:
    """A backup by pg_dump, of one moment, while collectors work."""
    _driver()
    if Path(file).exists():
        raise Failed(f"{file}: is there already; choose another name")
    before = os.umask(0o077)
    try:
        _run(settings.postgres, "pg_dump", "--format=custom", "--no-owner", "--schema=public", f"--file={file}")
    finally:
        os.umask(before)
    sys.stderr.write(f"{file}: the database as of now; the signing key is not in it: keep {settings.key_file} apart\n")
    return 0


def restore(settings: Settings, file: str) -> int:
    """Put a backup in the database's place; what was there is kept in a schema beside it."""
    _driver()
    from server_stub.store.postgres import PostgresStore, set_aside

    if not Path(file).is_file():
        raise Failed(f"{file}: is not there; name what `sekisho-collector backup` wrote")
    aside = set_aside(settings.postgres, time.time_ns() // 1_000_000)
    database = _environment(settings.postgres)["PGDATABASE"]
    _run(settings.postgres, "pg_restore", "--no-owner", "--exit-on-error", "--schema=public", f"--dbname={database}", file)
    store = PostgresStore(settings.postgres, alone=True)
    try:
        size = store.checked()
        store.rows("UPDATE meta SET value = ? WHERE name = 'epoch'", (str(time.time_ns() // 1_000_000_000),))
    except StoreError as error:
        raise Failed(f"{error}; what was there before is in the schema {aside}") from None
    finally:
        store.close()
    sys.stderr.write(
        f"the store is back at size {size} (what was there is in the schema {aside}); agents send again what they still hold."
        " Tokens and the register of media are as they were then: revoke again what was revoked since\n"
    )
    return 0
